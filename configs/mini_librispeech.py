"""mini LibriSpeech: 5 hours of read books by 28 speakers; enough to see a real model begin to spell.

    jaxds2 prepare mini-librispeech --source PATH_TO_LIBRISPEECH --out data/mini_librispeech
    python train.py --config configs/mini_librispeech.py

Hardware: 2 CPU cores. A GPU has time for more: `training.steps=35000 training.ema_decay=0.9995`,
on N GPUs `data.rows_multiple=N` too.
Hours: 37 minutes.
Expected WER: 80 % greedy and 62 % with a 3-gram of the training text, on the 5 held-out speakers. It is high: 15
epochs of 4.9 hours are little for a model that has to learn to spell from them.
"""

from jaxds2.config import AugmentConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    return Config(
        data=DataConfig(
            train=("data/mini_librispeech/train.jsonl",),
            dev="data/mini_librispeech/dev.jsonl",
            durations="configs/durations/mini_librispeech.json",
            batch_seconds=60.0,
            num_buckets=6,
            rows_multiple=1,
            workers=2,
        ),
        augment=AugmentConfig(speed=0.1, mel_warp=0.05, freq_mask_bins=15, time_mask_fraction=0.1),
        model=ModelConfig(layers=5),
        optimizer=OptimizerConfig(name="muon", warmup_steps=300),
        training=TrainingConfig(steps=5300, ctc="optax"),  # which its figures were counted with
    )
