"""AN4: 42 minutes of letters, digits and short commands by 74 speakers; the smallest real corpus.

    jaxds2 prepare an4 --source PATH_TO_AN4 --out data/an4
    python train.py --config configs/an4.py

Trains on all 948 training utterances for a fixed number of steps; the recipe was chosen on the 7 dev speakers, with

    python train.py --config configs/an4.py --run runs/an4-dev \\
        data.train=data/an4/train.jsonl data.dev=data/an4/dev.jsonl

Hardware: 2 CPU cores.
Hours: 22 to 34 minutes.
Expected WER: 7.6 to 9.3 % greedy on the test set, 4.1 to 5.3 % with a 3-gram of the training text.
"""

from jaxds2.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(
            train=("data/an4/train.jsonl", "data/an4/dev.jsonl"),
            test=("data/an4/test.jsonl",),
            durations="configs/durations/an4.json",
            batch_seconds=30.0,
            num_buckets=10,
            rows_multiple=1,
            workers=2,
        ),
        augment=AugmentConfig(speed=0.12, mel_warp=0.08),
        model=ModelConfig(dropout=0.2),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=300),
        training=TrainingConfig(steps=10_000, ctc="optax"),  # which its figures were counted with
    )
