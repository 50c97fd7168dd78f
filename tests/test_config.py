"""The config: what is accepted, what is refused, and what the refusal says."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from jaxds2.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    FeatureConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    describe,
    differences,
    from_dict,
    load_config,
    override,
    read_config,
    save_config,
    to_dict,
)

BASE = Config("base", training=TrainingConfig(steps=10))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        override(BASE, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_config(folder: Path, body: str) -> Path:
    path = folder / "run.py"
    path.write_text(f"from jaxds2.config import *\n{body}")
    return path


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("trainig.steps", "unknown config field 'trainig'; did you mean 'training'?"),
        ("training.step", "unknown config field 'training.step'; did you mean 'training.steps'?"),
        (
            "training.learning_rate",
            "unknown config field 'training.learning_rate'; did you mean 'optimizer.learning_rate'?",
        ),
        ("epochs", "unknown config field 'epochs'; did you mean 'training.epochs'?"),
        ("model.bidirectionnal", "unknown config field 'model.bidirectionnal'; did you mean 'model.bidirectional'?"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(key: str, said: str):
    assert refusal(f"{key}=1") == said


def test_an_unknown_field_that_resembles_nothing_gets_the_list():
    assert refusal("optimizer.zzz=1").startswith("unknown config field 'optimizer.zzz'; fields: name, learning_rate, ")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("training.steps=many", "int or None, got 'many'"),
        ("training.steps=1.5", "int or None, got 1.5"),
        ("training.seed=True", "int, got True"),
        ("data.batch_seconds=long", "float, got 'long'"),
        ("model.bidirectional=1", "bool, got 1"),
        ("model.conv_channels=(32,'x')", "a tuple of int, got (32, 'x')"),
        ("augment.noise_snr_db=(5,10,15)", "a tuple (float, float) or None, got (5, 10, 15)"),
    ],
)
def test_a_wrong_type_says_what_was_expected(item: str, expected: str):
    assert refusal(item) == f"{item.partition('=')[0]}: expected {expected}"


def test_a_literal_names_its_choices():
    assert refusal("optimizer.name=sgd") == "optimizer.name: expected one of 'adamw', 'muon', got 'sgd'"


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("training.steps", "an override reads section.field=value"),
        ("training=3", "'training' is a section; set one of its fields, e.g. training.seed=..."),
        ("training.steps.more=3", "training.steps has no fields of its own"),
    ],
)
def test_an_override_that_is_none_is_refused(item: str, said: str):
    assert said in refusal(item)


@pytest.mark.parametrize(
    "items",
    [
        ("data.batch_seconds=0",),
        ("data.min_duration=5", "data.max_duration=5"),
        ("data.num_buckets=0",),
        ("data.rows_multiple=0",),
        ("data.workers=-1",),
        ("data.characters=abca",),
        ("data.characters=",),
        ("features.window_ms=40",),
        ("features.hop_ms=0.01",),
        ("features.n_mels=0",),
        ("augment.speed=0.5",),
        ("augment.mel_warp=-0.1",),
        ("augment.time_mask_fraction=1.1",),
        ("augment.freq_masks=-1",),
        ("augment.noise_snr_db=(20,10)",),
        ("model.conv_channels=32",),
        ("model.conv_channels=()", "model.conv_kernels=()", "model.conv_strides=()"),
        ("model.conv_kernels=((3,3),(4,3))",),
        ("model.conv_strides=((2,2),(0,2))",),
        ("model.width=0",),
        ("model.dropout=1",),
        ("model.depthwise_kernel=4",),
        ("model.feed_forward=-1",),
        ("model.lookahead=5",),
        ("model.bidirectional=False", "model.lookahead=-1"),
        ("optimizer.learning_rate=0",),
        ("optimizer.warmup_steps=-1",),
        ("optimizer.clip_norm=0",),
        ("training.steps=0",),
        ("training.steps=None",),
        ("training.ema_decay=1",),
        ("training.log_every=0",),
        ("training.max_skipped=-1",),
        ("training.watchdog_seconds=-1",),
        ("training.devices=0",),
    ],
)
def test_a_value_out_of_range_and_fields_that_contradict_each_other_are_refused(items: tuple[str, ...]):
    refusal(*items)


def test_overrides_may_depend_on_each_other_whatever_their_order():
    items = ["model.lookahead=5", "model.bidirectional=False"]
    assert override(BASE, items) == override(BASE, items[::-1])
    convolutions = ["model.conv_channels=8", "model.conv_kernels=((5,5),)", "model.conv_strides=((2,2),)"]
    assert override(BASE, convolutions).model.conv_channels == (8,)


def test_the_last_of_two_equal_overrides_wins():
    assert override(BASE, ["training.steps=3", "training.steps=4"]).training.steps == 4


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("data.train=a.jsonl", ("a.jsonl",)),
        ("data.train=('a.jsonl','b.jsonl')", ("a.jsonl", "b.jsonl")),
        ("data.train=['a.jsonl']", ("a.jsonl",)),
        ("data.train=()", ()),
        ("data.dev=none", None),
        ("data.dev='none'", "none"),
        ("data.dev=runs/a=b/dev.jsonl", "runs/a=b/dev.jsonl"),
        ("data.characters=abc' ", "abc' "),
        ("model.conv_strides=((3,2),(1,2))", ((3, 2), (1, 2))),
        ("augment.noise_snr_db=(5,10)", (5.0, 10.0)),
        ("data.batch_seconds=30", 30.0),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("optimizer.clip_norm=None", None),
        ("model.bidirectional=false", False),
    ],
)
def test_command_line_text_becomes_the_value_of_its_field(item: str, value: object):
    section, name = item.partition("=")[0].split(".")
    found = getattr(getattr(override(BASE, [item]), section), name)
    assert found == value
    assert type(found) is type(value)


def test_default_is_below_the_file_is_below_the_command_line(tmp_path: Path):
    path = write_config(
        tmp_path, "def get_config():\n    return Config('x', training=TrainingConfig(steps=5, seed=7))\n"
    )
    config = load_config(path, ["training.seed=8"])
    assert config.training.log_every == TrainingConfig().log_every
    assert config.training.steps == 5
    assert config.training.seed == 8


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("steps = 3\n", "defines no get_config()"),
        ("def get_config(: pass\n", "SyntaxError"),
        ("import not_a_module\n", "ModuleNotFoundError: No module named 'not_a_module'"),
        ("def get_config():\n    return 3\n", "returned int, expected jaxds2.config.Config"),
        (
            "def get_config():\n    return Config('x', training=TrainingConfig(step=3))\n",
            "TrainingConfig has no field 'step'; did you mean 'steps'?",
        ),
        (
            "def get_config():\n    return Config('x', modell=ModelConfig())\n",
            "Config has no field 'modell'; did you mean 'model'?",
        ),
        (
            "def get_config():\n    return Config('x', training=TrainingConfig(steps='3'))\n",
            "steps: expected int or None, got '3'",
        ),
        (
            "def get_config():\n    return Config('x', model='large', training=TrainingConfig(steps=3))\n",
            "model: expected ModelConfig, got 'large'",
        ),
        (
            "def get_config():\n    return Config('x', model=ModelConfig(dropout=2.0))\n",
            "model.dropout=2.0: must be in [0, 1)",
        ),
        ("def get_config():\n    return Config('x')\n", "set training.epochs or training.steps"),
        ("def get_config():\n    return Confg('x')\n", "NameError: name 'Confg' is not defined"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_fault_in_a_config_file_is_one_line(tmp_path: Path, body: str, said: str):
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path, body))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_where_the_shipped_ones_are(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no config file .*nothing\.py; the shipped ones are in configs/"):
        load_config(tmp_path / "nothing.py")


def test_config_json_gives_back_the_same_config(tmp_path: Path):
    config = Config(
        "everything",
        data=DataConfig(train=("a.jsonl", "b.jsonl"), dev="c.jsonl", characters="ab '\"é"),
        features=FeatureConfig(normalize="fixed"),
        augment=AugmentConfig(noise_snr_db=(5.0, 20.0)),
        model=ModelConfig(bidirectional=False, lookahead=3, conv_strides=((3, 2), (1, 1))),
        optimizer=OptimizerConfig(name="muon", clip_norm=None),
        training=TrainingConfig(epochs=2, steps=None, init_from="runs/a"),
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    save_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config


def test_a_config_of_another_version_is_refused():
    with pytest.raises(ConfigError, match="config version 0: this jaxds2 reads version 1"):
        from_dict({**to_dict(BASE), "version": 0})


def test_a_newer_version_is_refused_by_its_number_and_not_by_a_field_that_it_added(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**to_dict(BASE), "version": 2, "newer": 3}))
    with pytest.raises(ConfigError, match="config version 2: this jaxds2 reads version 1"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("data.batch_seconds=1e999", "DataConfig.batch_seconds=inf: must be finite"),
        ("augment.noise_snr_db=(0,1e999)", "AugmentConfig.noise_snr_db=inf: must be finite"),
        ("training.seed=99999999999999999999", "TrainingConfig.seed=99999999999999999999: does not fit 32 bits"),
        ("training.steps=99999999999999999999", "TrainingConfig.steps=99999999999999999999: does not fit 32 bits"),
        ("model.conv_channels=(32,0)", "model.conv_channels=(32, 0): must be at least 1 each"),
        ("features.sample_rate=-16000", "features.sample_rate=-16000: must be above 0"),
        ("data.dev=", "a manifest's name is empty"),
    ],
)
def test_a_number_that_would_fail_far_from_here_and_an_empty_name_are_refused(item: str, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        override(BASE, [item])


@pytest.mark.parametrize("content", [None, "{", "[1]", '"text"', "\x00"])
def test_a_run_without_a_readable_config_json_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        read_config(tmp_path / "config.json")


def test_bytes_that_are_not_text_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_config(tmp_path / "config.json")


def test_differences_names_each_field_that_changed_and_no_other():
    assert differences(BASE, BASE) == []
    other = override(BASE, ["training.steps=11", "model.conv_strides=((1,2),(2,2))"])
    assert sorted(differences(BASE, other)) == [
        "model.conv_strides: ((2, 2), (2, 2)) -> ((1, 2), (2, 2))",
        "training.steps: 10 -> 11",
    ]


def test_describe_prints_every_field_of_every_section():
    words = describe(BASE).split()
    for section in dataclasses.fields(Config):
        value = getattr(BASE, section.name)
        if dataclasses.is_dataclass(value):
            assert f"{section.name}:" in words
            assert all(sum(word.startswith(f"{f.name}=") for word in words) >= 1 for f in dataclasses.fields(value))
    assert {"steps=10", "conv_strides=((2,2),(2,2))"} <= set(words)
    assert max(map(len, describe(BASE).splitlines())) <= 120
