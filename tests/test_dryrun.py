"""The dry run: its FLOPs are XLA's, its shapes are training's, and it needs no data."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxds2.config import Config, ConfigError, DataConfig, ModelConfig, TrainingConfig, load_config, override
from jaxds2.ctc import ctc_loss
from jaxds2.data.manifest import Utterance, write_manifest
from jaxds2.data.plan import Bucket
from jaxds2.features import num_frames
from jaxds2.model.deepspeech2 import Apply, Params, create, output_lengths
from jaxds2.text import Vocabulary
from jaxds2.training.dryrun import activation_bytes, dry_run, flops
from jaxds2.training.selection import read_training_data, training_plan

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
MELS, CLASSES, FRAMES, BATCH = 40, 29, 64, 2

# Unrolled by the associative scan: of a loop XLA counts the body once.
SMALL = ModelConfig(conv_channels=(8, 8), width=256, layers=1, hidden=256, dropout=0.0, scan="associative")
MODELS = {
    "bidirectional": SMALL,
    "unidirectional": dataclasses.replace(SMALL, bidirectional=False, lookahead=8),
    "feed-forward": dataclasses.replace(SMALL, feed_forward=512),
    "unidirectional, feed-forward": dataclasses.replace(SMALL, bidirectional=False, feed_forward=512),
    "mostly convolutions": dataclasses.replace(
        SMALL, conv_channels=(32, 64), conv_strides=((1, 2), (2, 1)), width=64, hidden=64
    ),
}


def abstract(model: ModelConfig) -> tuple[Apply, Params]:
    """The model's apply and the shapes of its parameters."""
    applies: list[Apply] = []

    def build() -> Params:
        apply, params = create(MELS, CLASSES, model, dtype=jnp.float32)
        applies.append(apply)
        return params

    params = jax.eval_shape(build)
    return applies[0], params


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_within_5_percent_of_what_xla_counts(name: str):
    model = MODELS[name]
    apply, params = abstract(model)
    features = jax.ShapeDtypeStruct((BATCH, FRAMES, MELS), jnp.float32)
    compiled = jax.jit(apply).lower(params, features, jax.ShapeDtypeStruct((BATCH,), jnp.int32)).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    counted = analysis["flops"]
    assert sum(flops(model, MELS, CLASSES, FRAMES, BATCH).values()) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_each_weight_costs_one_multiply_add_per_output_frame(name: str):
    model = MODELS[name]
    _, params = abstract(model)
    weights = sum(
        leaf.size
        for path, leaf in params.items()
        if path.endswith(("kernel", "kernel_KD")) and not path.startswith("front_end.convs")
    )
    counted = flops(model, MELS, CLASSES, FRAMES, BATCH)
    rest = sum(n for kind, n in counted.items() if kind not in ("convolutions", "scan", "elementwise"))
    assert rest == 2 * weights * output_lengths(FRAMES, model) * BATCH


def test_flops_of_the_convolutions_by_hand():
    model = ModelConfig(conv_channels=(4, 6), conv_kernels=((3, 5), (1, 3)), conv_strides=((2, 2), (1, 3)))
    counted = flops(model, num_mels=10, num_classes=29, num_frames=7, batch=3)["convolutions"]
    assert counted == 3 * 2 * ((3 * 5) * 1 * 4 * 4 * 5 + (1 * 3) * 4 * 6 * 4 * 2)  # 4 x 5, then 4 x 2 frames x bins


def test_activations_are_near_what_xla_allocates():
    model = ModelConfig(width=128, hidden=128, layers=2, feed_forward=256, dropout=0.0, scan="fused")
    config = Config("x", model=model, training=TrainingConfig(steps=1))
    apply, params = abstract(model)
    bucket = Bucket(num_samples=4 * 16_000, rows=4, num_labels=60)
    frames = num_frames(bucket.num_samples, config.features)

    def loss(params, features_BTF, lengths_B, labels_BN):
        logits_BUV, logit_lengths_B = apply(params, features_BTF, lengths_B)
        return jnp.sum(ctc_loss(logits_BUV, logit_lengths_B, labels_BN, lengths_B))

    ints = jnp.int32
    arguments = [((4, frames, MELS), jnp.float32), ((4,), ints), ((4, bucket.num_labels), ints)]
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    memory = jax.jit(jax.grad(loss)).lower(params, *shapes).compile().memory_analysis()
    assert memory is not None
    few_mels = dataclasses.replace(config, features=dataclasses.replace(config.features, n_mels=MELS))
    estimate = activation_bytes(few_mels, bucket, itemsize=4, num_classes=CLASSES)
    assert memory.temp_size_in_bytes / 1.5 < estimate < memory.temp_size_in_bytes * 1.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_with_a_histogram_dry_runs_without_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(path)
    assert config.data.durations is not None
    histogram = ROOT / config.data.durations
    monkeypatch.chdir(tmp_path)
    found = dry_run(override(config, [f"data.durations={histogram}"]))
    kept = json.loads(histogram.read_text())["utterances"] - sum(found.left_out.values())
    assert found.utterances == kept
    assert str(histogram) in found.source
    report = found.render()
    assert str(histogram) in " ".join(report.split())  # lines are wrapped, at a space of the path too
    assert "estimate" in report
    assert 0 < found.padding_share < 0.25  # the demo makes do with three shapes, which compile sooner
    rows = {b.rows % config.data.rows_multiple for b in found.buckets}
    assert rows == {0}


@pytest.fixture
def manifest_config(tmp_path: Path) -> Config:
    rng = np.random.default_rng(0)
    durations = rng.uniform(0.05, 6, 80)
    texts = ["one two three" if d > 1 else "a" for d in durations]
    utterances = [
        Utterance(f"u{i}", tmp_path / f"{i}.wav", d, text)
        for i, (d, text) in enumerate(zip(durations.tolist(), texts, strict=True))
    ]
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    write_manifest(paths[0], utterances[:50])
    write_manifest(paths[1], utterances[50:])
    return Config(
        "x",
        data=DataConfig(train=tuple(paths), max_duration=5.0, batch_seconds=20, num_buckets=3, rows_multiple=2),
        training=TrainingConfig(epochs=3),
    )


def test_it_plans_the_batches_that_training_will_see(manifest_config: Config):
    config = override(manifest_config, ["augment.speed=0.1"])
    vocabulary = Vocabulary(config.data.characters)
    utterances, left_out = read_training_data(config, vocabulary, look=False)
    plan = training_plan(config, utterances, vocabulary)
    found = dry_run(config)
    assert found.buckets == plan.buckets
    assert found.padding_share == plan.padding_share(0)
    assert found.steps_per_epoch == plan.num_steps(0)
    assert found.total_steps == plan.steps_for_epochs(3)
    assert found.left_out == {reason: len(ids) for reason, ids in left_out.items()}
    assert found.left_out
    assert found.source.startswith("the manifests ")


def test_steps_override_epochs(manifest_config: Config):
    assert dry_run(override(manifest_config, ["training.steps=7"])).total_steps == 7


def test_parameters_are_counted_once_by_part(manifest_config: Config):
    found = dry_run(override(manifest_config, [f"features.n_mels={MELS}"]))
    _, params = abstract(manifest_config.model)
    assert sum(found.parameters.values()) == sum(p.size for p in params.values())
    assert found.parameters["head"] == 256 * 29 + 29 + 2 * 256
    assert found.memory["parameters"] == found.memory["gradients"] == 4 * sum(p.size for p in params.values())
    assert found.memory["optimizer"] >= 2 * found.memory["parameters"]


def test_the_memory_of_each_batch_shape_is_printed_and_the_largest_counts(manifest_config: Config):
    found = dry_run(manifest_config)
    assert found.memory["activations"] == max(found.activations)
    for bucket, count in zip(found.buckets, found.activations, strict=True):
        assert count == activation_bytes(manifest_config, bucket, itemsize=4, num_classes=29)
        seconds = bucket.num_samples / found.sample_rate
        assert re.search(
            rf"{bucket.rows} +{seconds:.2f} +{bucket.num_labels} +{count / 2**20:,.0f} MiB", found.render()
        )


def test_two_views_cost_twice_the_operations_and_activations(manifest_config: Config):
    one, two = dry_run(manifest_config), dry_run(override(manifest_config, ["training.consistency=0.2"]))
    assert two.training_flops_per_step == 2 * one.training_flops_per_step
    assert two.memory["activations"] == 2 * one.memory["activations"]
    assert two.memory["gradients"] == one.memory["gradients"]
    assert "in two views" in two.render()
    assert "in two views" not in one.render()


def test_no_average_costs_no_memory(manifest_config: Config):
    assert dry_run(manifest_config).memory["EMA"] > 0
    assert dry_run(override(manifest_config, ["training.ema_decay=0"])).memory["EMA"] == 0


def test_the_mean_step_holds_its_share_of_the_padded_epoch(manifest_config: Config):
    found = dry_run(manifest_config)
    epoch = found.training_flops_per_step * found.steps_per_epoch
    audio = found.training_flops_per_audio_hour * found.hours
    assert audio / epoch == pytest.approx(1 - found.padding_share)


def test_a_missing_manifest_without_a_histogram_is_one_line(manifest_config: Config):
    config = override(manifest_config, ["data.train=nowhere/train.jsonl"])
    with pytest.raises(ConfigError, match=r"^no manifest nowhere/train\.jsonl, and data\.durations names no histogram"):
        dry_run(config)
    with pytest.raises(ConfigError, match=r"data\.train names no manifest"):
        dry_run(override(manifest_config, ["data.train=()"]))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"corpus": "c", "source": "s", "seconds_per_bin": 0, "characters_per_second": 14, "counts": [1]}',
        '{"corpus": "c", "source": "s", "seconds_per_bin": 1, "characters_per_second": 14, "counts": [1, -1]}',
        '{"corpus": "c", "source": "s", "seconds_per_bin": 1, "characters_per_second": 14, "counts": ["x"]}',
        '{"corpus": "c", "source": "s", "seconds_per_bin": 1, "characters_per_second": 14, "counts": []}',
    ],
)
def test_a_bad_histogram_is_one_line(manifest_config: Config, tmp_path: Path, content: str | None):
    path = tmp_path / "durations.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^data\.durations={re.escape(str(path))}: .+$"):
        dry_run(override(manifest_config, ["data.train=nowhere/train.jsonl", f"data.durations={path}"]))


def test_a_histogram_becomes_utterances_spread_over_its_bins(manifest_config: Config, tmp_path: Path):
    path = tmp_path / "durations.json"
    record = {"corpus": "c", "source": "s", "seconds_per_bin": 2.0, "characters_per_second": 10.0, "counts": [4, 0, 2]}
    path.write_text(json.dumps(record))
    found = dry_run(override(manifest_config, ["data.train=nowhere/train.jsonl", f"data.durations={path}"]))
    # 0.25, 0.75, 1.25, 1.75, 4.5 seconds; 5.5 is above max_duration
    assert found.hours * 3600 == pytest.approx(8.5)
    assert found.left_out == {"longer than 5 s": 1}
    assert found.buckets[-1].num_labels >= 45
