"""Runs small enough to train in a test, and what they leave behind."""

import json
from pathlib import Path

from jaxds2.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FeatureConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxds2.data.plan import BatchPlan
from jaxds2.text import Vocabulary
from jaxds2.training.checkpoint import Checkpoints, digest
from jaxds2.training.selection import read_training_data, training_plan


def config(tones: Path, *, steps: int = 8, **training) -> Config:
    return Config(
        name="tones",
        data=DataConfig(
            train=(str(tones / "train.jsonl"),),
            dev=str(tones / "dev.jsonl"),
            characters="abc ",
            batch_seconds=8.0,
            num_buckets=1,
            rows_multiple=2,
        ),
        features=FeatureConfig(n_mels=20),
        augment=AugmentConfig(speed=0.05, freq_masks=1, freq_mask_bins=3, time_masks=0),
        model=ModelConfig(
            conv_channels=(8,), conv_kernels=((3, 3),), conv_strides=((2, 2),), width=32, hidden=16, layers=1
        ),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=5),
        training=TrainingConfig(**{"steps": steps, "ema_decay": 0.5, "eval_every": 1000, "log_every": 1} | training),
    )


def run_digest(run_dir: Path) -> tuple[str, int]:
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        step = checkpoints.resolve("last")
        return digest(*checkpoints.restore_weights(step)), step


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    merged: dict[int, dict[str, float]] = {}
    for record in map(json.loads, lines):
        merged.setdefault(record["step"], {}).update(record)
    return merged


def steps_of(settings: Config) -> BatchPlan:
    vocabulary = Vocabulary(settings.data.characters)
    return training_plan(settings, read_training_data(settings, vocabulary)[0], vocabulary)
