"""LibriSpeech, all 960.9 hours, for transcribing while someone speaks: unidirectional with a lookahead convolution.

    jaxds2 prepare librispeech --download --out data/librispeech \\
        --splits train-clean-100 train-clean-360 train-other-500 dev-clean test-clean test-other
    for split in train-clean-100 train-clean-360 train-other-500 dev-clean; do
        jaxds2 shard data/librispeech/$split.jsonl --out data/librispeech/shards/$split
    done
    python train.py --config configs/librispeech_960_streaming.py

An output frame waits for 16 frames of 40 ms (0.64 s) in the lookahead convolution, besides the 30 ms that the two
convolutions of the front end see ahead and the window itself. The features have a fixed shift and scale, the depthwise
convolutions see only the past: nothing else waits for the future.

Hardware: one GPU with 80 GB, or several that divide 8.
Hours: not yet run; `--dry-run` counts 1.5e18 FLOPs, 2.1 hours for a machine that does 200 TFLOP/s of them.
Expected WER: not yet run; above that of configs/librispeech_960.py, which hears the whole utterance first.
"""

from jaxds2.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FeatureConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)


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
        features=FeatureConfig(normalize="fixed"),
        augment=AugmentConfig(speed=0.1, freq_masks=2, freq_mask_bins=27, time_masks=10, time_mask_fraction=0.05),
        model=ModelConfig(
            conv_channels=(64, 64),
            width=768,
            layers=8,
            hidden=1024,
            bidirectional=False,
            lookahead=16,
            depthwise_kernel=9,
            feed_forward=2048,
            dropout=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5_000),
        training=TrainingConfig(epochs=60, precision="bfloat16", ema_decay=0.9998, checkpoint_every=500),
    )
