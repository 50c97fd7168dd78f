"""Every shipped config loads, says how to run it, and describes a model that can be built."""

import ast
import json
import math
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxds2.config import load_config
from jaxds2.data.corpora import LIBRISPEECH_SPLITS
from jaxds2.features import num_frames
from jaxds2.model.deepspeech2 import Apply, Params, create, output_lengths, subsampling_factor
from jaxds2.text import Vocabulary

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
HISTOGRAMS = sorted((ROOT / "configs/durations").glob("*.json"))


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_its_name_is_that_of_its_file_and_its_docstring_the_command(path: Path):
    assert load_config(path).name == path.stem
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert f"--config configs/{path.name}" in docstring or f"make {path.stem}" in docstring


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_its_docstring_names_hardware_hours_and_expected_wer(path: Path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    facts = re.search(r"^Hardware: (.+?)\sHours: (.+?)\sExpected WER: (.+)", docstring, re.MULTILINE | re.DOTALL)
    assert facts, "expected Hardware: ... Hours: ... Expected WER: ..."
    hardware, hours, wer = facts.groups()
    assert re.search(r"\bGPU\b|\bCPU cores\b", hardware)
    assert re.search(r"\d (hours|minutes)|not yet run", hours)
    assert re.search(r"\d %|not yet run|RESULTS\.md", wer)


@pytest.mark.parametrize("name", ["an4", "librispeech_960", "librispeech_960_paper", "librispeech_960_streaming"])
def test_the_long_runs_decode_in_at_least_two_processes(name: str):
    assert load_config(ROOT / f"configs/{name}.py").data.workers >= 2


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.startswith("librispeech")], ids=by_name)
def test_the_commands_of_its_docstring_make_what_it_trains_on(path: Path):
    """They are run by a shell, with stand-ins that print what they were given."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    commands = "\n".join(line for line in docstring.splitlines() if line.startswith("    "))
    stand_ins = "jaxds2() { echo jaxds2 $@; }; python() { echo python $@; }\n"
    done = subprocess.run(["bash", "-euc", stand_ins + commands], capture_output=True, text=True, check=True)
    prepare, *shard, train = done.stdout.splitlines()
    download, splits = prepare.split(" --splits ")
    assert download == "jaxds2 prepare librispeech --download --out data/librispeech"
    assert set(splits.split()) <= set(LIBRISPEECH_SPLITS)
    data, manifests = load_config(path).data, [f"data/librispeech/{split}.jsonl" for split in splits.split()]
    pairs = [line.removeprefix("jaxds2 shard ").split(" --out ") for line in shard]
    assert [folder for _, folder in pairs] == [*data.train, data.dev]
    assert [manifest for manifest, _ in pairs] + list(data.test) == manifests
    assert all(Path(manifest).stem == Path(folder).name for manifest, folder in pairs)
    assert train == f"python train.py --config configs/{path.name}"


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_training_never_reads_the_test_set(path: Path):
    data = load_config(path).data
    assert data.train
    assert data.test or data.dev
    assert not set(data.test) & {*data.train, data.dev}


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_the_histogram_that_it_names_is_there(path: Path):
    durations = load_config(path).data.durations
    assert durations is None or ROOT / durations in HISTOGRAMS


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_its_model_makes_as_many_frames_as_output_lengths_says(path: Path):
    config = load_config(path)
    vocabulary = Vocabulary(config.data.characters)
    applies: list[Apply] = []

    def build() -> Params:
        apply, params = create(config.features.n_mels, vocabulary.size, config.model, dtype=jnp.float32)
        applies.append(apply)
        return params

    params = jax.eval_shape(build)
    frames = num_frames(3 * config.features.sample_rate + 7, config.features)
    features = jax.ShapeDtypeStruct((2, frames, config.features.n_mels), jnp.float32)
    logits, lengths = jax.eval_shape(applies[0], params, features, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert logits.shape == (2, output_lengths(frames, config.model), vocabulary.size)
    assert lengths.shape == (2,)
    assert output_lengths(frames, config.model) == math.ceil(frames / subsampling_factor(config.model))


@pytest.mark.parametrize("path", HISTOGRAMS, ids=by_name)
def test_a_histogram_agrees_with_its_own_totals(path: Path):
    histogram = json.loads(path.read_text(encoding="utf-8"))
    width, counts = histogram["seconds_per_bin"], histogram["counts"]
    assert sum(counts) == histogram["utterances"]
    hours = sum((i + 0.5) * width * n for i, n in enumerate(counts)) / 3600
    assert hours == pytest.approx(histogram["hours"], rel=0.02)
    assert histogram["corpus"]
    assert histogram["source"]


def test_what_is_scaled_from_another_corpus_says_so():
    for corpus in ("librispeech_100", "librispeech_960"):
        source = json.loads((ROOT / f"configs/durations/{corpus}.json").read_text(encoding="utf-8"))["source"]
        assert source.startswith("an approximation")


def test_the_streaming_model_waits_only_for_its_lookahead():
    config = load_config(ROOT / "configs/librispeech_960_streaming.py")
    assert not config.model.bidirectional
    assert 0 < config.model.lookahead <= 20
    assert config.features.normalize == "fixed"


def test_the_paper_plan_has_its_convolutions_in_our_order():
    model = load_config(ROOT / "configs/librispeech_960_paper.py").model
    assert model.conv_kernels == ((11, 41), (11, 21), (11, 21))  # (time, frequency)
    assert (model.layers, model.depthwise_kernel, model.feed_forward) == (7, 0, 0)
