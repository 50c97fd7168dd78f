import json
import math

import pytest
from sctk_files import GOLDEN, read_trn

from jaxds2.evaluation.breakdown import score_utterances
from jaxds2.evaluation.comparison import ComparisonError, compare
from jaxds2.evaluation.report import write_report

METADATA = {"rtfx": 1.0, "manifest": "test.jsonl", "checkpoint": None, "checkpoint_step": 1}


def write(folder, ids, refs, hyps, *, digest="ab" * 32, speakers=None):
    utterances = score_utterances(ids, speakers or [None] * len(ids), [1.0] * len(ids), refs, hyps)
    write_report(folder, utterances, manifest_sha256=digest, decoder={"name": "greedy"}, **METADATA)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Scores of sclite's golden texts."""
    refs = read_trn(GOLDEN / "ref.trn")
    for name in ("a", "b"):
        hyps = read_trn(GOLDEN / f"{name}.trn")
        write(tmp_path / name, list(refs), list(refs.values()), [hyps[i] for i in refs])
    return tmp_path / "a", tmp_path / "b"


def test_both_rates_their_difference_and_the_test_are_shown(folders):
    comparison = compare(*folders)
    assert comparison.render().splitlines() == [
        f"A: {folders[0]}",
        f"   {comparison.words[0].format('WER')}, 95 % interval "
        f"{100 * comparison.intervals[0][0]:.2f} to {100 * comparison.intervals[0][1]:.2f}",
        f"B: {folders[1]}",
        f"   {comparison.words[1].format('WER')}, 95 % interval "
        f"{100 * comparison.intervals[1][0]:.2f} to {100 * comparison.intervals[1][1]:.2f}",
        f"B - A: -2.14 points, 95 % interval {100 * comparison.difference[0]:+.2f} to "
        f"{100 * comparison.difference[1]:+.2f} (paired bootstrap, 10000 resamples of 120 utterances)",
        # As sc_stats says of these texts; test_significance.py compares all of its numbers.
        "MAPSSWE: 298 segments, errors of A less those of B +0.107 each, z 1.660, p 0.097: "
        "no difference at the 5 % level",
    ]
    report = json.loads((folders[0] / "report.json").read_text())
    assert report["wer_interval"] == list(comparison.intervals[0])


def test_the_paired_interval_is_narrower_than_that_of_independent_systems(folders):
    comparison = compare(*folders)
    widths = [high - low for low, high in (*comparison.intervals, comparison.difference)]
    assert widths[2] < math.hypot(*widths[:2])


def test_a_clear_difference_is_one_and_few_segments_are_named(tmp_path):
    refs = [f"{w} a b c" for w in "defghijklm"]
    a = write(tmp_path / "a", refs, refs, refs)
    b = write(tmp_path / "b", refs, refs, [ref[2:] for ref in refs[:8]] + ["x y z", refs[9]])
    lines = compare(a, b).render().splitlines()
    assert "a difference at the 5 % level" in lines[-2]
    assert lines[-1].strip().startswith("fewer than 50 segments")
    assert compare(a, b).difference[0] > 0


def test_a_difference_that_is_the_same_in_every_segment_is_not_called_none(tmp_path):
    refs = [f"{w} a b c" for w in "defghijklm"]
    a = write(tmp_path / "a", refs, refs, refs)
    b = write(tmp_path / "b", refs, refs, [ref[2:] for ref in refs])
    line = compare(a, b).render().splitlines()[-2]
    assert "errors of A less those of B -1.000 each, z 0.000, p 1" in line
    assert line.endswith(": the same in every segment, of which this test can say nothing")


def test_what_cannot_be_compared_is_refused_in_one_line(folders, tmp_path):
    a, b = folders
    ids, refs = ["u1", "u2"], ["a b", "c"]
    write(tmp_path / "other", ids, refs, refs, digest="cd" * 32)
    spelled = write(tmp_path / "spelled", [f"v{i}" for i in range(120)], ["a"] * 120, ["a"] * 120)
    short = write(tmp_path / "short", ids, refs, refs)
    lines = (short / "utterances.jsonl").read_text().splitlines()
    (short / "utterances.jsonl").write_text(lines[0] + "\n")
    torn = write(tmp_path / "torn", ids, refs, refs)
    (torn / "utterances.jsonl").write_text(lines[0][:20])
    old = write(tmp_path / "old", ids, refs, refs)
    (old / "utterances.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/report.json").write_text('{"wer": 1}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/report.json").write_text("{")
    for second, complaint in {
        a / "." / "..": "holds no report.json",
        a / ".." / "a": "are the same folder",
        tmp_path / "other": "only scores of the same manifest",
        spelled: "the references differ",
        short: "holds 1 utterances, its report.json was made of 2",
        torn: "cannot be read",
        old: "holds no utterances.jsonl: score it again",
        tmp_path / "empty": "holds no report.json",
        tmp_path / "foreign": "lacks manifest, manifest_sha256, utterances",
        tmp_path / "broken": "cannot be read as a report",
    }.items():
        with pytest.raises(ComparisonError, match=complaint) as caught:
            compare(a, second)
        assert "\n" not in str(caught.value)
    assert compare(a, b)


def test_scores_of_another_number_of_utterances_are_refused(tmp_path):
    a = write(tmp_path / "a", ["u1", "u2"], ["a", "b"], ["a", "b"])
    b = write(tmp_path / "b", ["u1"], ["a"], ["a"])
    with pytest.raises(ComparisonError, match=r"on 2 utterances and .*b on 1 of"):
        compare(a, b)
