"""The benchmarks run, name every column and leave their numbers as JSON."""

import argparse
import hashlib
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import alignment
import bench_inference
import bench_mingru
import bench_step
import jax
import numpy as np
import pytest
import side_by_side

from jaxds2.compiler import compiler_options
from jaxds2.data.manifest import Utterance, write_manifest
from jaxds2.decoding.alignment import Span
from jaxds2.decoding.hypothesis import DecoderError
from jaxds2.decoding.lm import build_ngram
from jaxds2.decoding.tuned import defaults, write_tuned
from jaxds2.evaluation.logprobs import LogProbs, write_log_probs
from jaxds2.evaluation.significance import resampling_units
from jaxds2.text import Vocabulary

ERRORS = ("error", "gradient error", "h", "da", "db", "dgate", "dcandidate")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", [path.stem for path in sorted(BENCHMARKS.glob("bench_*.py"))])
def test_a_benchmark_prints_its_tables_and_writes_its_numbers(name, tmp_path):
    out = tmp_path / "numbers.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--small", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["benchmark"] == name.removeprefix("bench_")
    assert written["versions"]["jax"]
    assert written["rounds"] == 1
    assert len(written["load average at start"]) == 3
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=BENCHMARKS).stdout.strip()
    assert (written["commit"] or "").removesuffix("-dirty") == commit
    lines = [line.split() for line in done.stdout.splitlines()]
    for table in written["results"]:
        assert any(column.partition("-")[0] in ("fused", "ours") for column in table["columns"])
        for column, numbers in table["columns"].items():
            assert any(line[:1] == [column] for line in lines)
            errors = [value for key, value in numbers.items() if key in ERRORS]
            assert column.startswith("torch") or all(0 <= value < 1e-4 for value in errors), (column, numbers)
            assert errors or any(numbers.get(key, 0) > 0 for key in ("CPU ms", "planned"))
    if name in ("bench_scan", "bench_mingru"):
        assert "extreme gates" in {table.get("errors") for table in written["results"]}
    if name == "bench_pipeline":
        loading = written["results"][-1]["columns"].values()
        assert all(0 <= row["waits, % at 100"] <= 100 and row["cores for 1 a second"] > 0 for row in loading)
    bars = [bar for table in written["results"] for bar in table.get("bars", ())]
    assert len([line for line in done.stdout.splitlines() if line.startswith("bar: ")]) == len(bars)
    at_least = {"bench_scan": 2, "bench_ctc": 3, "bench_features": 1, "bench_step": 1}  # without torch
    assert len(bars) >= at_least.get(name, 0)


def test_a_bar_is_met_at_its_value_and_missed_beyond_it(capsys):
    rows: dict[str, dict[str, float | str]] = {"ours": {"CPU ms": 2.0}, "theirs": {"CPU ms": 3.0}}
    for goal, met in ((1.5, True), (1.51, False)):
        (bar,) = side_by_side.ratio_bar(rows, "theirs", "ours", at_least=goal)
        assert bar["met"] is met
    assert side_by_side.ratio_bar(rows, "missing", "ours", at_least=1) == []
    assert [side_by_side.bar("x", 3e-5, at_most=goal)["met"] for goal in (3e-5, 2.9e-5)] == [True, False]
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()] == ["met", "missed"] * 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: bench_step.our_step(bench_step.SMALL, "fused"),
        lambda: bench_step.our_encoder(bench_step.SMALL),
        lambda: bench_inference.ours(bench_step.SMALL, "fused"),
        lambda: bench_mingru.compile_layer("fused", *np.ones((2, 5, 2, 4), np.float32)),
    ],
    ids=["step", "encoder", "inference", "layer"],
)
def test_what_is_timed_gets_its_batch_as_arguments_and_the_options_of_training(build, monkeypatch):
    constants, options = [], []
    jit, real_jit = side_by_side.jit, jax.jit

    def watched(function, **rest):
        def lower(*inputs):
            constants.extend(x.size for x in jax.make_jaxpr(function)(*inputs).consts)
            monkeypatch.setattr(jax, "jit", lambda f, **given: options.append(given) or real_jit(f, **given))
            return jit(function, **rest).lower(*inputs)

        return SimpleNamespace(lower=lower)

    monkeypatch.setattr(side_by_side, "jit", watched)
    with jax.numpy_dtype_promotion("standard"):
        build()
    assert max(constants, default=0) <= 1
    assert options[-1]["compiler_options"] == compiler_options("cpu")


def test_a_benchmark_without_its_peers_names_the_extra_and_prints_our_column(tmp_path):
    out, modules = tmp_path / "numbers.json", {"torch": None, "torchaudio": None, "librosa": None}
    code = f"import runpy, sys; sys.modules.update({modules})"
    code += "; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(BENCHMARKS / "bench_features.py"), "--small", "--rounds", "1", "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for peer in ("librosa", "torch"):
        line = f"{peer} is not installed, so its columns are missing: pip install -e '.[bench]', or make bench"
        assert done.stdout.splitlines().count(line) == 1
    assert all(list(table["columns"]) == ["ours"] for table in json.loads(out.read_text())["results"])


def test_decoders_are_compared_on_the_same_utterances(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    decoding = importlib.import_module("decoding")
    units, words_U = resampling_units([None] * 50), np.full(50, 10)
    worse_UM = np.stack([np.arange(50) % 5, np.full(50, 2)], axis=1)
    base = decoding.Score(worse_UM, words_U, units, 1.0)
    assert base.wers == [20, 20]
    assert base.wer == 20
    assert base.interval(base) == (0, 0)
    # One error more in each utterance is exactly that in any sample of them; unpaired it would not be.
    other = decoding.Score(worse_UM + 1, words_U, units, 1.0)
    assert other.interval(base) == pytest.approx((10, 10))
    low, high = other.interval()
    assert 20 < low < 30 < high < 40
    # The models hear the same utterances, which are drawn together: two that err alike are no more evidence than one.
    alike = decoding.Score(worse_UM[:, [0, 0]], words_U, units, 1.0)
    assert alike.interval() == decoding.Score(worse_UM[:, :1], words_U, units, 1.0).interval()


def test_tuned_settings_of_each_back_end_are_taken(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    decoding = importlib.import_module("decoding")
    found = defaults() | {"alpha": 0.375, "beta": 2.5, "beam_width": 25, "blank_threshold": 0.99}
    write_tuned(tmp_path, "pyctcdecode", {"lm_sha256": "0", "settings": found})
    arguments = argparse.Namespace(tuned=tmp_path, logprobs=[tmp_path], alpha=1.0, beta=0.0)
    (choice,) = decoding.candidates(arguments, "pyctcdecode", tmp_path / "lm.arpa")
    assert (choice.beam.alpha, choice.beam.beta, choice.beam.beam_width, choice.blank_threshold) == (
        0.375,
        2.5,
        25,
        0.99,
    )
    assert list(decoding.searches(arguments, choice)) == [("tuned", choice)]
    with pytest.raises(DecoderError, match="lm tune --backend flashlight"):
        decoding.candidates(arguments, "flashlight", tmp_path / "lm.arpa")


def test_numbers_of_real_models_say_whose_they_are_and_are_of_the_manifest_as_it_is(monkeypatch, tmp_path):
    for package in ("kenlm", "kaldingram", "pyctcdecode"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    decoding = importlib.import_module("decoding")
    manifest, lm, out = tmp_path / "dev.jsonl", tmp_path / "lm.arpa", tmp_path / "numbers.json"
    write_manifest(manifest, [Utterance(id="u", audio_filepath=tmp_path / "u.wav", duration=1.0, text="ab ba")])
    build_ngram(["ab ba", "ba"], lm, order=2)
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    vocabulary = Vocabulary("ab ")
    log_probs_UV = np.log(np.eye(4)[vocabulary.encode("ab ba")] * 0.9 + 0.025).astype(np.float32)
    folders = [tmp_path / "lp-0", tmp_path / "lp-1"]
    for number, folder in enumerate(folders):
        origin = {"run": f"runs/x-{number}", "checkpoint": "best", "checkpoint_step": 70 + number}
        kept = LogProbs(("u",), (log_probs_UV,), vocabulary.characters, str(manifest), digest, **origin)
        write_log_probs(folder, kept)
    write_tuned(tmp_path / "tuned", "pyctcdecode", {"lm_sha256": "0", "settings": defaults()})
    command = ["decoding.py", "--logprobs", *folders, "--lm", lm, "--tuned", tmp_path / "tuned", "--json", out]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--backends", "pyctcdecode"])
    decoding.main()
    written = json.loads(out.read_text())
    assert written["models"] == [
        {"run": f"x-{n}", "checkpoint": "best", "checkpoint_step": 70 + n, "manifest_sha256": digest} for n in (0, 1)
    ]
    assert written["lm"]["lm_sha256"] == hashlib.sha256(lm.read_bytes()).hexdigest()
    assert written["tuned"] == "tuned"
    assert str(tmp_path) not in out.read_text()
    manifest.write_text(manifest.read_text().replace("ab ba", "ab"))
    with pytest.raises(SystemExit, match=r"^error: [^\n]*lp-0: log-probabilities of [^\n]*this manifest is another"):
        runpy.run_path(str(BENCHMARKS / "decoding.py"), run_name="__main__")


def test_the_frames_that_a_search_sees_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    decoding = importlib.import_module("decoding")
    probs_UV = np.full((4, 3), 1e-4)
    probs_UV[range(4), [0, 0, 1, 0]] = 0.9998  # the second of two blanks says nothing new
    material = decoding.Material(["a"], [[np.log(probs_UV)], [np.log(probs_UV)]], resampling_units([None]))
    assert decoding.searched(material, decoding.threshold("0.99")) == 0.75
    assert decoding.searched(material, decoding.threshold("no")) == 1


def test_a_delay_common_to_all_words_is_no_error_of_alignment(tmp_path, capsys):
    (tmp_path / "set.ctm").write_text("u A 0.100 0.200 turn\nu A 0.300 0.300 on_the\nv A 0.200 0.200 light\n")
    reference = alignment.read_ctm(tmp_path / "set.jsonl")
    found = {
        "u": [Span("turn", 0.14, 0.31, 1), Span("on", 0.34, 0.4, 1), Span("the", 0.45, 0.61, 1)],
        "v": [Span("light", 0.24, 0.41, 1)],
    }
    offsets = alignment.offsets(reference, found)
    np.testing.assert_allclose(offsets, [[0.04, 0.01]] * 3)
    alignment.print_times(offsets, offsets + np.array([[0.0, 0.0], [0.02, 0.0], [0.0, -0.1]]))
    rows = [line.split()[:6] for line in capsys.readouterr().out.splitlines()]
    assert rows[-2:] == [
        ["start", "3", "+0.040", "0.000", "0.018", "0.020"],
        ["end", "3", "+0.010", "0.000", "0.090", "0.100"],
    ]


def test_each_round_begins_with_another_column_and_the_first_round_is_not_counted():
    called: list[str] = []
    columns = {name: lambda name=name: called.append(name) for name in "abc"}
    medians = side_by_side.rounds(columns, 3)
    assert "".join(called[:12]) == "abcbcacababc"
    assert list(medians) == ["a", "b", "c"]


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_peak_memory_is_a_call_s_own_whatever_earlier_calls_kept():
    """In a process of its own, since `keep_pages` lasts."""
    code = """
import numpy as np, side_by_side
side_by_side.start("")
held = np.ones(2**24)
columns = {"large": lambda: np.ones(2**24), "small": lambda: np.ones(2**21), "none": lambda: held}
print(*(side_by_side.rounds(columns, 2)[name]["peak MiB"] for name in columns))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    np.testing.assert_allclose([float(x) for x in done.stdout.split()], [128, 16, 0], atol=3)
