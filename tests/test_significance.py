import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sctk_files import GOLDEN, read_trn, toolkit

from jaxds2.evaluation.metrics import EditCounts, align_words, count_word_edits
from jaxds2.evaluation.significance import (
    MIN_SPEAKERS,
    matched_pairs,
    percentile_interval,
    rate_intervals,
    resample,
    resampling_units,
    segment_errors,
)

texts = st.lists(st.sampled_from(["a", "b", "c"]), max_size=8).map(" ".join)


def counts(*errors: int, reference: int = 1) -> list[EditCounts]:
    return [EditCounts(substitutions=e, reference=reference) for e in errors]


def aligned(ref: str, hyp: str):
    return align_words([ref], [hyp])[0]


def binomial_quantile(q: float, n: int, p: float) -> int:
    """The smallest k with P(X <= k) >= q."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k
    return n


@pytest.mark.parametrize(("wrong", "n"), [(30, 200), (1, 50), (199, 200)])
def test_interval_of_one_word_utterances_is_the_binomials(wrong, n):
    # Of n utterances of one word, drawn again n times, the wrong ones are binomial with p = wrong / n.
    ((low, high),) = rate_intervals([counts(*[1] * wrong, *[0] * (n - wrong))], resampling_units([None] * n))
    exact = [binomial_quantile(q, n, wrong / n) / n for q in (0.025, 0.975)]
    assert abs(low - exact[0]) <= 1 / n  # 10,000 draws may miss a quantile by one step
    assert abs(high - exact[1]) <= 1 / n


def test_variance_of_the_resampled_mean_is_the_closed_form():
    values_U = np.array([0, 1, 1, 4, 9, 2, 0, 0])
    sums_RK = resample(values_U[:, None], resampling_units([None] * 8), replicates=40_000)
    assert sums_RK.mean() == pytest.approx(values_U.sum(), rel=0.01)
    assert sums_RK.var() == pytest.approx(8 * values_U.var(), rel=0.03)


def test_all_rates_are_taken_from_the_same_draws():
    errors = counts(3, 0, 5, 1, 0, 2, reference=10)
    units = resampling_units([None] * 6)
    first, second = rate_intervals([errors, errors], units)
    assert first == second == rate_intervals([errors], units)[0]


def test_draws_are_the_seeds():
    values_UK, units = np.arange(20)[:, None], resampling_units([None] * 20)
    np.testing.assert_array_equal(resample(values_UK, units), resample(values_UK, units))
    assert (resample(values_UK, units) != resample(values_UK, units, seed=1)).any()


def test_speakers_are_drawn_whole_where_there_are_enough():
    speakers = [f"s{i % MIN_SPEAKERS}" for i in range(100)]
    units = resampling_units(speakers)
    assert (units.kind, units.count) == ("speakers", MIN_SPEAKERS)
    sums_RK = resample(np.ones((100, 1), np.int64), units, replicates=100)
    assert (sums_RK == 100).all()  # all have as many utterances
    # All errors are one speaker's: in a third of the replicates, (1 - 1 / n) ** n, he is not there.
    errors = counts(*[int(s == "s0") for s in speakers])
    over_speakers = rate_intervals([errors], units)[0]
    over_utterances = rate_intervals([errors], resampling_units([None] * 100))[0]
    assert over_speakers[0] == 0
    assert over_utterances[0] > 0


@pytest.mark.parametrize(
    "speakers", [[f"s{i}" for i in range(MIN_SPEAKERS - 1)] * 2, [None, *(f"s{i}" for i in range(MIN_SPEAKERS))]]
)
def test_else_utterances_are_drawn(speakers):
    units = resampling_units(speakers)
    assert (units.kind, units.count) == ("utterances", len(speakers))


def test_no_errors_and_no_references():
    assert rate_intervals([counts(0, 0, 0)], resampling_units([None] * 3)) == [(0.0, 0.0)]
    assert rate_intervals([counts(0, 0, reference=0)], resampling_units([None] * 2)) == [(0.0, 0.0)]
    ((low, high),) = rate_intervals([counts(1, 1, reference=0)], resampling_units([None] * 2))
    assert low == high == math.inf


def test_ends_of_an_interval_occurred():
    assert percentile_interval(np.array([0.0, 1.0, 2.0, math.inf])) == (0.0, math.inf)
    assert percentile_interval(np.arange(1000.0), level=0.5) == (249.0, 749.0)


@pytest.mark.parametrize(
    ("ref", "first", "second", "segments"),
    [
        ("a b c", "a b c", "a b c", []),
        ("a b c", "a x c", "a b c", [(1, 0)]),
        ("a b c d", "x b c d", "a b c x", [(1, 0), (0, 1)]),  # parted by two right words
        ("a b c", "x b c", "a b x", [(1, 1)]),  # by one only
        ("a b c d", "x b c d", "a b y c x", [(1, 2)]),  # by an insertion between the two
        ("a b", "a b y", "a b", [(1, 0)]),  # inserted at the end
        ("a b", "a b", "y y a b", [(0, 2)]),
        ("", "y", "", [(1, 0)]),
    ],
)
def test_segments_are_parted_by_two_words_right_in_both(ref, first, second, segments):
    assert segment_errors(aligned(ref, first), aligned(ref, second)) == segments


@given(texts, texts, texts)
def test_segments_hold_every_error_once_and_none_is_empty(ref, first, second):
    segments = segment_errors(aligned(ref, first), aligned(ref, second))
    assert sum(a for a, _ in segments) == count_word_edits([ref], [first]).errors
    assert sum(b for _, b in segments) == count_word_edits([ref], [second]).errors
    assert all(a or b for a, b in segments)


def test_the_order_of_the_systems_changes_the_sign_only():
    a, b = align_words(["a b c d e f"] * 9, ["a x c"] * 9), align_words(["a b c d e f"] * 9, ["a b c d e"] * 8 + ["x"])
    there, back = matched_pairs(a, b), matched_pairs(b, a)
    assert (there.segments, there.z, there.p) == (back.segments, -back.z, back.p)


def test_equal_systems_do_not_differ():
    a = align_words(["a b c"] * 3, ["a x c"] * 3)
    test = matched_pairs(a, a)
    assert (test.segments, test.mean, test.z, test.p) == (3, 0, 0, 1)
    right = align_words(["a"], ["a"])
    assert (matched_pairs(right, right).segments, matched_pairs(right, right).p) == (0, 1)


def test_other_references_are_refused():
    with pytest.raises(ValueError, match="references differ"):
        matched_pairs(align_words(["a b"], ["a"]), align_words(["a c"], ["a"]))
    with pytest.raises(ValueError, match="shorter"):
        matched_pairs(align_words(["a", "b"], ["a", "b"]), align_words(["a"], ["a"]))


def agrees_with_sc_stats(folder: Path) -> None:
    refs, first, second = (read_trn(folder / f"{name}.trn") for name in ("ref", "a", "b"))
    ours = matched_pairs(*(align_words(list(refs.values()), [hyps[i] for i in refs]) for hyps in (first, second)))
    line = re.search(
        r"# segs: (\d+)\).*\(mean: (\S+)\) \(std dev: (\S+)\) \(Z Stat: (\S+)\) \(Stat Diff: (\w+)\)",
        (folder / "ab.stats.mapsswe").read_text(encoding="utf-8", errors="replace"),
    )
    assert line
    assert line.groups() == (
        str(ours.segments),
        f"{ours.mean:.3f}",
        f"{ours.std:.3f}",
        f"{ours.z:.3f}",
        "Yes" if ours.p < 0.05 else "No",
    )
    # sc_stats looks p up in a table of z in hundredths, rounded down.
    p = re.search(r"MP +\|\| +A +\|.*?([\d.]+) ", (folder / "ab.stats.unified").read_text(encoding="utf-8"))
    assert p
    assert p[1] == f"{math.erfc(math.floor(abs(ours.z) * 100) / 100 / math.sqrt(2)):.3f}"


def test_matched_pairs_equal_those_of_sc_stats():
    agrees_with_sc_stats(GOLDEN)


def test_matched_pairs_equal_those_of_sc_stats_run_here(tmp_path):
    sclite, sc_stats = toolkit("sclite"), toolkit("sc_stats")
    for name in ("ref", "a", "b"):
        (tmp_path / f"{name}.trn").write_bytes((GOLDEN / f"{name}.trn").read_bytes())
    command = f"{sclite} -s -e utf-8 -i spu_id -f 0 -r ref.trn trn -h a.trn trn A -h b.trn trn B -o sgml -O ."
    for line in (
        command,
        f"cat a.trn.sgml b.trn.sgml | {sc_stats} -p -t mapsswe -v -n ab -O .",
        f"cat a.trn.sgml b.trn.sgml | {sc_stats} -p -t mapsswe -u -n ab -O .",
    ):
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, capture_output=True)
    agrees_with_sc_stats(tmp_path)
