"""Settings are found on a development set, the same ones every time, and are used where they belong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxds2.config import Config, DataConfig, TrainingConfig
from jaxds2.decoding.decoder import DecoderChoice, make_decoder
from jaxds2.decoding.hypothesis import DecoderError
from jaxds2.decoding.lm import build_ngram
from jaxds2.decoding.settings import BeamSettings
from jaxds2.decoding.tuned import SETTINGS, defaults, settle, unused, write_tuned
from jaxds2.evaluation import tuning
from jaxds2.evaluation.metrics import count_word_edits
from jaxds2.evaluation.tuning import Point, TuningError, draw_surface, refuse_test_sets, tune
from jaxds2.files import WriteError
from jaxds2.text import Vocabulary

pytest.importorskip("kenlm")
pytest.importorskip("pyctcdecode")


@pytest.fixture(scope="module")
def an4(tmp_path_factory):
    """Log-probabilities, references, vocabulary and language model of a few utterances; see test_decoder.py."""
    with np.load(Path(__file__).parent / "an4_logprobs.npz") as file:
        log_probs = np.split(file["log_probs"], np.cumsum(file["lengths"])[:-1])
        lm = build_ngram(str(file["text"]).splitlines(), tmp_path_factory.mktemp("lm") / "lm.arpa")
        return log_probs[:6], file["refs"].tolist()[:6], Vocabulary(str(file["characters"])), lm


@pytest.fixture(scope="module")
def tuned(an4):
    log_probs, refs, vocabulary, lm = an4
    return tune(log_probs, refs, vocabulary, DecoderChoice("beam", lm=lm), progress=False)


def test_the_best_is_the_best_of_all_that_were_tried(an4, tuned):
    log_probs, refs, vocabulary, _ = an4
    assert tuned.best in tuned.points
    assert tuned.best.cost == min(p.cost for p in tuned.points)
    decode = make_decoder(tuned.best.choice, vocabulary)
    assert tuned.best.word_errors == count_word_edits(refs, [decode(x)[0].text for x in log_probs]).errors
    plain = make_decoder(DecoderChoice("beam", lm=tuned.best.choice.lm), vocabulary)
    assert tuned.best.word_errors <= count_word_edits(refs, [plain(x)[0].text for x in log_probs]).errors


def test_the_grid_is_whole_and_its_table_has_every_point(tuned):
    assert [(p.choice.beam.alpha, p.choice.beam.beta) for p in tuned.grid] == [
        (a, b) for a in tuning.ALPHAS for b in tuning.BETAS
    ]
    rows = tuned.render().splitlines()[1 : 1 + len(tuning.ALPHAS)]
    rates = [float(rate) for row in rows for rate in row.split()[2:]]
    assert rates == [round(100 * p.word_errors / tuned.words, 2) for p in tuned.grid]


def costing(points: dict[tuple[float, float], int]) -> list[Point]:
    return [Point(DecoderChoice("beam", beam=BeamSettings(alpha=a, beta=b)), n, 0) for (a, b), n in points.items()]


@pytest.mark.parametrize(
    ("good", "middle"),
    [
        ([(0.25, 0.0)], (0.25, 0.0)),
        ([(a, b) for a in (0.5, 1.0, 1.5) for b in (1.0, 2.0, 3.0)], (1.0, 2.0)),
        ([(a, 0.0) for a in tuning.ALPHAS], (1.0, 0.0)),  # in steps of the grid: by value it would be 1.05
        ([(0.25, 2.0), (2.0, 1.0), (2.0, 2.0), (2.0, 3.0)], (2.0, 2.0)),  # a mean may not be good itself
        ([(1.5, 2.0), (1.5, 3.0)], (1.5, 2.0)),
    ],
)
def test_of_equally_good_weights_those_in_the_middle_are_taken(good, middle):
    points = costing({(a, b): int((a, b) not in good) for a in tuning.ALPHAS for b in tuning.BETAS})
    for ordered in (points, points[::-1]):
        beam = tuning._middle(ordered).choice.beam
        assert (beam.alpha, beam.beta) == middle


def test_how_many_settings_are_as_good_is_said(tuned):
    equal = sum(p.cost == tuned.best.cost for p in tuned.points)
    assert equal > 1
    assert tuned.render().endswith(
        f" {tuned.best.character_errors} in their characters ({len(tuned.points)} settings tried)\n"
        f"{equal} of them are as good in both: the middle of such weights is taken, then the cheapest pruning"
    )
    assert "as good" not in replace(tuned, points=[tuned.best]).render()


def test_every_pruning_was_tried_and_no_setting_twice(tuned):
    for name, values in tuning.PRUNINGS.items():
        assert {getattr(p.choice.beam, name) for p in tuned.points} == set(values)
    assert len({p.choice.beam for p in tuned.points}) == len(tuned.points)


def test_any_number_of_processes_finds_the_same(an4, tuned):
    log_probs, refs, vocabulary, lm = an4
    assert tune(log_probs, refs, vocabulary, DecoderChoice("beam", lm=lm), workers=2, progress=False) == tuned


def test_the_surface_is_a_picture(tuned, tmp_path):
    draw_surface(tuned, tmp_path / "surface.png")
    assert (tmp_path / "surface.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["test", "test-clean", "an4_test", "TEST", "test2", "testset", "dev_test1"])
def test_a_test_set_is_refused(name):
    with pytest.raises(TuningError, match=f"{name}.*by its name a test set"):
        refuse_test_sets(Path(f"data/{name}.jsonl"), name)


@pytest.mark.parametrize("name", ["dev", "dev-clean", "contest", "latest", "testimony"])
def test_a_set_that_is_none_is_not_refused(name):
    refuse_test_sets(Path(f"data/test/{name}.jsonl"), name)


def test_what_the_run_is_scored_on_is_refused_by_whatever_name(tmp_path):
    (tmp_path / "held_out.jsonl").touch()
    (tmp_path / "dev.jsonl").symlink_to("held_out.jsonl")
    for name in ("held_out", "dev"):
        with pytest.raises(TuningError, match=rf"{name}\.jsonl: by the run's config \(data\.test\) a test set"):
            refuse_test_sets(tmp_path / f"{name}.jsonl", name, ["gone.jsonl", str(tmp_path / "held_out.jsonl")])
    refuse_test_sets(tmp_path / "other.jsonl", "other", [str(tmp_path / "held_out.jsonl")])


# decoding.json.


@pytest.fixture
def run(an4, tmp_path):
    import hashlib

    sha256 = hashlib.sha256(an4[3].read_bytes()).hexdigest()
    settings = defaults() | {"alpha": 1.25, "beam_width": 25, "blank_threshold": None}
    write_tuned(tmp_path, "pyctcdecode", {"lm_sha256": sha256, "settings": settings})
    return tmp_path


def test_explicit_settings_win_over_tuned_ones_and_those_over_the_defaults(an4, run):
    values, sources = settle({"beam_width": 50, "alpha": None}, run, "pyctcdecode", an4[3])
    assert values == defaults() | {"alpha": 1.25, "beam_width": 50}
    assert sources == dict.fromkeys(SETTINGS, "decoding.json") | {"beam_width": "command line"}


def test_settings_of_another_back_end_or_language_model_are_not_used(an4, run, tmp_path):
    other = tmp_path / "other.arpa"
    other.write_text("another")
    for backend, lm in (("flashlight", an4[3]), ("pyctcdecode", other), ("pyctcdecode", None)):
        values, sources = settle({}, run, backend, lm)
        assert values == defaults()
        assert set(sources.values()) == {"default"}
    assert settle({}, None, "pyctcdecode", an4[3])[0] == defaults()


def test_tuned_settings_that_are_not_used_are_named_by_their_language_model(an4, run, tmp_path):
    entry = json.loads((run / "decoding.json").read_text())["pyctcdecode"]
    write_tuned(run, "pyctcdecode", entry | {"lm": "data/lm.arpa"})
    other = tmp_path / "other.arpa"
    other.write_text("another")
    tuned_with = f"{run / 'decoding.json'}: its settings were tuned with data/lm.arpa; for a search"
    assert unused(run, "pyctcdecode", None) == f"{tuned_with} without one the defaults hold"
    assert unused(run, "pyctcdecode", other) == f"{tuned_with} with {other}, which is another, the defaults hold"
    for_another = "its settings were tuned for pyctcdecode; for flashlight the defaults hold"
    assert unused(run, "flashlight", None) == f"{run / 'decoding.json'}: {for_another}"
    assert unused(run, "pyctcdecode", an4[3]) is unused(None, "x", None) is None


def test_back_ends_stand_beside_one_another(run):
    write_tuned(run, "flashlight", {"lm_sha256": "x", "settings": {}})
    assert set(json.loads((run / "decoding.json").read_text())) == {"pyctcdecode", "flashlight"}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"pyctcdecode": 3}',
        '{"pyctcdecode": {"settings": {}}}',
        '{"pyctcdecode": {"lm_sha256": "0"}}',
        '{"pyctcdecode": {"lm_sha256": "0", "settings": {"alpha": "x"}}}',
        '{"pyctcdecode": {"lm_sha256": "0", "settings": {"alpha": null}}}',
        '{"pyctcdecode": {"lm_sha256": "0", "settings": {"beam_width": 2.5}}}',
    ],
)
def test_a_damaged_file_is_refused(content, an4, run):
    (run / "decoding.json").write_text(content)
    with pytest.raises(DecoderError, match=r"decoding\.json: .*; delete it or tune again"):
        settle({}, run, "pyctcdecode", an4[3])


def test_no_search_is_begun_whose_result_cannot_be_kept(an4, tmp_path):
    _, _, vocabulary, lm = an4
    config = Config("tone", DataConfig(characters=vocabulary.characters), training=TrainingConfig(steps=1))
    settings: dict[str, Any] = {"lm": lm, "backend": "pyctcdecode", "blank_threshold": None, "checkpoint": "best"}
    (tmp_path / "decoding.json").write_text("{")
    with pytest.raises(DecoderError, match="delete it or tune again"):
        tuning.tune_run(tmp_path, config, tmp_path / "dev.jsonl", **settings)
    with pytest.raises(WriteError, match=r"lm\.arpa/run: cannot be written"):
        tuning.tune_run(lm / "run", config, tmp_path / "dev.jsonl", **settings)


def test_the_defaults_are_the_settings_own():
    beam = BeamSettings()
    assert {name: getattr(beam, name) for name in SETTINGS if name != "blank_threshold"}.items() <= defaults().items()
    assert replace(beam, **{k: v for k, v in defaults().items() if k != "blank_threshold"}) == beam
