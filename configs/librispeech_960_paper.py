"""LibriSpeech, all 960.9 hours, with the layer plan of Deep Speech 2's best English model (arXiv 1512.02595).

    jaxds2 prepare librispeech --download --out data/librispeech \\
        --splits train-clean-100 train-clean-360 train-other-500 dev-clean test-clean test-other
    for split in train-clean-100 train-clean-360 train-other-500 dev-clean; do
        jaxds2 shard data/librispeech/$split.jsonl --out data/librispeech/shards/$split
    done
    python train.py --config configs/librispeech_960_paper.py

The paper's plan: three convolutions over time and frequency (41 x 11, 21 x 11, 21 x 11 in its order frequency x time;
32, 32, 96 channels; stride 2 in frequency each, and 2 in time in the first), seven bidirectional recurrent layers, a
softmax over characters, 20 ms per output frame. What differs from it:
- minGRU layers, pre-norm and residual with layer norm, for its recurrent layers with batch norm;
- 80 log-mel bins for its linear spectrogram, GELU for its clipped ReLU;
- AdamW with warmup and a cosine for its SGD (Nesterov momentum 0.99, rate divided by 1.2 after each of 20 epochs);
- LibriSpeech alone for its 11,940 hours, so mild SpecAugment and speed perturbation for its added noise.

Hardware: one GPU with 80 GB, or several that divide 8.
Hours: not yet run; `--dry-run` counts 1.3e18 FLOPs, 1.7 hours for a machine that does 200 TFLOP/s of them.
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
            batch_seconds=800.0,
            num_buckets=12,
            workers=12,
        ),
        augment=AugmentConfig(speed=0.1, freq_masks=2, freq_mask_bins=20, time_masks=2, time_mask_fraction=0.1),
        model=ModelConfig(
            conv_channels=(32, 32, 96),
            conv_kernels=((11, 41), (11, 21), (11, 21)),
            conv_strides=((2, 2), (1, 2), (1, 2)),
            width=1024,
            layers=7,
            hidden=1024,
            candidate="g",
            depthwise_kernel=0,
            feed_forward=0,
            dropout=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5_000),
        training=TrainingConfig(epochs=20, precision="bfloat16", checkpoint_every=1_000),
    )
