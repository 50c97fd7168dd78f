"""The spoken demo corpus: digits and commands by synthetic voices; `make demo` runs it all.

    jaxds2 prepare demo --out data/demo
    python train.py --config configs/demo.py
    python eval.py --run runs/demo --manifest data/demo/test.jsonl

Hardware: 2 CPU cores.
Hours: about 3 minutes.
Expected WER: 2.9 % greedy, 0.6 % with a 3-gram of the training text, on voices that it has never heard.
"""

from jaxds2.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(
            train=("data/demo/train.jsonl",),
            dev="data/demo/dev.jsonl",
            test=("data/demo/test.jsonl",),
            durations="configs/durations/demo.json",
            batch_seconds=15.0,
            num_buckets=3,
            rows_multiple=2,
        ),
        augment=AugmentConfig(mel_warp=0.05, freq_mask_bins=15),
        model=ModelConfig(
            conv_channels=(16, 16),
            conv_strides=((3, 2), (1, 2)),
            width=160,
            hidden=80,
            layers=3,
            gate_bias=-1.0,
            dropout=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100),
        training=TrainingConfig(
            epochs=20,
            eval_every=1000,
            ema_decay=0.99,
            ctc="optax",  # which its figures were counted with
        ),
    )
