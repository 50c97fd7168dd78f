"""LibriSpeech train-clean-100: 100.6 hours by 251 speakers; one GPU, and results on the official test sets.

    jaxds2 prepare librispeech --download --out data/librispeech \\
        --splits train-clean-100 dev-clean test-clean test-other
    for split in train-clean-100 dev-clean; do
        jaxds2 shard data/librispeech/$split.jsonl --out data/librispeech/shards/$split
    done
    python train.py --config configs/librispeech_100.py

Hardware: one GPU with 24 GB or more.
Hours: not yet run; `--dry-run` counts 1.3e17 FLOPs, 0.7 hours for a machine that does 50 TFLOP/s of them.
Expected WER: not yet run.
"""

from jaxds2.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(
            train=("data/librispeech/shards/train-clean-100",),
            dev="data/librispeech/shards/dev-clean",
            test=("data/librispeech/test-clean.jsonl", "data/librispeech/test-other.jsonl"),
            durations="configs/durations/librispeech_100.json",
            batch_seconds=480.0,
            workers=8,
        ),
        augment=AugmentConfig(
            speed=0.1, mel_warp=0.05, freq_masks=2, freq_mask_bins=27, time_masks=10, time_mask_fraction=0.05
        ),
        model=ModelConfig(
            conv_channels=(64, 64), width=512, layers=8, hidden=512, depthwise_kernel=9, feed_forward=1024, dropout=0.2
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=2_000),
        training=TrainingConfig(epochs=100, checkpoint_every=500),
    )
