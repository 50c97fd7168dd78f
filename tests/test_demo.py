"""`make demo` as a whole, on a corpus that is learnt in seconds in place of the spoken one."""

import dataclasses

import pytest

from jaxds2 import demo as module
from jaxds2.config import AugmentConfig, Config, ConfigError, DataConfig, FeatureConfig, ModelConfig, OptimizerConfig
from jaxds2.config import TrainingConfig as Training
from jaxds2.data.manifest import read_manifest, write_manifest
from jaxds2.demo import demo


@pytest.fixture
def config(tones, tmp_path, monkeypatch) -> Config:
    folder = tmp_path / "corpus"

    def prepare(out):
        assert out == folder
        for name, source in (("train", "train"), ("test", "dev")):
            write_manifest(out / f"{name}.jsonl", read_manifest(tones / f"{source}.jsonl"))

    monkeypatch.setattr(module, "prepare_demo", prepare)
    return Config(
        data=DataConfig(
            train=(str(folder / "train.jsonl"),),
            test=(str(folder / "test.jsonl"),),
            characters="abc ",
            batch_seconds=8.0,
            num_buckets=1,
            rows_multiple=2,
        ),
        features=FeatureConfig(n_mels=20),
        augment=AugmentConfig(freq_masks=0, time_masks=0),
        model=ModelConfig(
            conv_channels=(8,), conv_kernels=((3, 3),), conv_strides=((2, 2),), width=32, hidden=16, layers=1
        ),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=5),
        training=Training(steps=150, ema_decay=0.5),
    )


def test_it_trains_once_shows_both_rates_and_knows_its_own_work(config, tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    assert demo(config, run_dir) == 0
    first = capsys.readouterr().out
    assert first.count("%WER") == 4  # each once when scored and once in the summary
    assert "greedy" in first
    assert "with LM" in first
    assert "tensorboard" in first
    for kind in ("greedy", "beam-lm"):
        assert (run_dir / f"eval/corpus-test-{kind}/report.json").is_file()

    monkeypatch.setattr(module, "train", None)  # not called again
    assert demo(config, run_dir) == 0
    second = capsys.readouterr().out
    assert "done already" in second
    assert second.splitlines()[-8:] == first.splitlines()[-8:]
    monkeypatch.undo()

    other = dataclasses.replace(config, training=Training(steps=150, ema_decay=0.5, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(module, "prepare_demo", lambda out: None)
        with pytest.raises(ConfigError, match=r"training\.seed: 0 -> 1"):
            demo(other, run_dir)
