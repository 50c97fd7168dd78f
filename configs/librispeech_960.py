"""LibriSpeech, all 960.9 hours of training: the strong recipe.

    jaxds2 prepare librispeech --download --out data/librispeech \\
        --splits train-clean-100 train-clean-360 train-other-500 dev-clean test-clean test-other
    for split in train-clean-100 train-clean-360 train-other-500 dev-clean; do
        jaxds2 shard data/librispeech/$split.jsonl --out data/librispeech/shards/$split
    done
    python train.py --config configs/librispeech_960.py

Against the paper's plan (configs/librispeech_960_paper.py): 40 ms per output frame, feed-forward blocks, a depthwise
convolution before the gates, strong SpecAugment, AdamW with warmup and a cosine, averaged weights.

Hardware: one GPU with 80 GB, or several that divide 8.
Hours: not yet run; `--dry-run` counts 1.8e18 FLOPs, 2.5 hours for a machine that does 200 TFLOP/s of them.
Expected WER: not yet run.
"""

from jaxds2.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(
            train=(
                "data/librispeech/shards/train-clean-100",
                "data/librispeech/shards/train-clean-360",
                "data/librispeech/shards/train-other-500",
            ),
            dev="data/librispeech/shards/dev-clean",
            test=("data/librispeech/test-clean.jsonl", "data/librispeech/test-other.jsonl"),
            durations="configs/durations/librispeech_960.json",
            batch_seconds=1600.0,
            num_buckets=12,
            workers=12,
        ),
        augment=AugmentConfig(speed=0.1, freq_masks=2, freq_mask_bins=27, time_masks=10, time_mask_fraction=0.05),
        model=ModelConfig(
            conv_channels=(64, 64), width=768, layers=8, hidden=768, depthwise_kernel=9, feed_forward=2048, dropout=0.1
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5_000),
        training=TrainingConfig(epochs=60, precision="bfloat16", ema_decay=0.9998, checkpoint_every=500),
    )
