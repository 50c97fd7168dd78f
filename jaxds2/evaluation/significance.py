"""How sure an error rate is, and whether two systems differ: the bootstrap, and NIST's matched-pairs test.

Bisani & Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation"; Gillick & Cox 1989,
"Some statistical issues in the comparison of speech recognition algorithms".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxds2.evaluation.metrics import Alignment, EditCounts

REPLICATES = 10_000
LEVEL = 0.95
SEED = 0

MIN_SPEAKERS = 10
"""Speakers from which on whole speakers are drawn. The errors of one speaker depend on each other, so an interval over
single utterances is too narrow; but percentiles over a handful of speakers are too narrow as well, and coarse."""

BOUNDARY_WORDS = 2
"""Words in a row right in both systems that part two segments; sc_stats's default."""

_BLOCK_DRAWS = 1 << 20


@dataclass(frozen=True)
class Units:
    """What is drawn with replacement: speakers, or utterances."""

    kind: str
    """`speakers` or `utterances`."""
    index_U: np.ndarray
    """The unit of each utterance, int64."""
    count: int


def resampling_units(speakers: Sequence[str | None]) -> Units:
    """Speakers, where every utterance names one and there are at least MIN_SPEAKERS; else utterances.

    Args:
      speakers: of each utterance.
    """
    names, index_U = np.unique([s or "" for s in speakers], return_inverse=True)
    if len(names) >= MIN_SPEAKERS and all(s is not None for s in speakers):
        return Units("speakers", index_U.astype(np.int64), len(names))
    return Units("utterances", np.arange(len(speakers)), len(speakers))


def resample(values_UK: np.ndarray, units: Units, *, replicates: int = REPLICATES, seed: int = SEED) -> np.ndarray:
    """Sums over as many units as there are, drawn with replacement.

    Args:
      values_UK: K integers of each utterance, such as errors and reference words.
      units: what is drawn.
      replicates: how often.
      seed: the same draws for the same seed and number of units, so that two systems are compared on the same ones.

    Returns:
      (replicates, K) int64.
    """
    totals_GK = np.zeros((units.count, values_UK.shape[1]))
    np.add.at(totals_GK, units.index_U, values_UK)
    rng = np.random.default_rng(seed)
    sums = []
    rows = max(1, _BLOCK_DRAWS // units.count)
    for first in range(0, replicates, rows):
        size = min(rows, replicates - first)
        draws_RG = rng.integers(units.count, size=(size, units.count))
        cells = draws_RG + units.count * np.arange(size)[:, None]
        # How often each unit was drawn, times its totals: whole numbers below 2**53, so exact in float64.
        times_RG = np.bincount(cells.ravel(), minlength=size * units.count).reshape(size, units.count)
        sums.append(times_RG.astype(np.float64) @ totals_GK)
    return np.rint(np.concatenate(sums)).astype(np.int64)


def percentile_interval(values_R: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The central part of resampled values; both ends are values that occurred, infinite ones included."""
    tail = (1 - level) / 2
    low, high = np.quantile(values_R, (tail, 1 - tail), method="inverted_cdf")
    return float(low), float(high)


def rate_intervals(
    counts: Sequence[Sequence[EditCounts]], units: Units, *, replicates: int = REPLICATES, seed: int = SEED
) -> list[tuple[float, float]]:
    """Bootstrap intervals of error rates, as fractions, all from the same draws.

    A rate of 0 has the interval (0, 0): resampling knows no error that it has not seen.

    Args:
      counts: for each rate the counts of every utterance.
      units: what is drawn.
      replicates: how often.
      seed: of the draws.
    """
    columns = [[value for c in row for value in (c.errors, c.reference)] for row in zip(*counts, strict=True)]
    sums_RK = resample(np.array(columns, np.int64), units, replicates=replicates, seed=seed)
    return [percentile_interval(_rates(sums_RK[:, k], sums_RK[:, k + 1])) for k in range(0, sums_RK.shape[1], 2)]


def _rates(errors_R: np.ndarray, reference_R: np.ndarray) -> np.ndarray:
    """As EditCounts.rate: where a replicate holds no reference, 0 without errors and infinite with them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(errors_R == 0, 0.0, errors_R / reference_R)


@dataclass(frozen=True)
class MatchedPairs:
    """The matched-pairs sentence-segment word error test (MAPSSWE)."""

    segments: int
    mean: float
    """Errors of the first system less those of the second, per segment."""
    std: float
    """Standard deviation of that difference (n - 1)."""
    z: float
    """0, as in sc_stats, where the difference is the same in every segment."""
    p: float
    """Two-tailed: how often chance alone gives so large a z."""


def matched_pairs(first: Sequence[Alignment], second: Sequence[Alignment]) -> MatchedPairs:
    """Test whether two systems make as many errors, on the same references.

    A segment is a stretch with errors of either system; two are parted by at least BOUNDARY_WORDS words in a row that
    both have right, with nothing inserted between, so that the errors of one hardly depend on those of another.

    Args:
      first: alignments of one system, an utterance each, by align_words.
      second: of the other, in the same order.

    Raises:
      ValueError: the utterances differ in number or in their references.
    """
    differences = []
    for a, b in zip(first, second, strict=True):
        differences += [errors_a - errors_b for errors_a, errors_b in segment_errors(a, b)]
    n = len(differences)
    mean = sum(differences) / n if n else 0.0
    squares = sum((d - mean) ** 2 for d in differences)
    std = math.sqrt(squares / (n - 1)) if squares else 0.0
    z = mean / (std / math.sqrt(n)) if std else 0.0
    return MatchedPairs(n, mean, std, z, math.erfc(abs(z) / math.sqrt(2)))


def segment_errors(first: Alignment, second: Alignment) -> list[tuple[int, int]]:
    """The errors of both systems in each segment of an utterance; see matched_pairs."""
    segments: list[tuple[int, int]] = []
    right = BOUNDARY_WORDS  # right in both since the last error; an utterance's start parts as well
    words_a, words_b = _errors_at_words(first), _errors_at_words(second)
    if [word for word, *_ in words_a] != [word for word, *_ in words_b]:
        raise ValueError("the two systems' references differ")
    for (_, *errors_a), (_, *errors_b) in zip(words_a, words_b, strict=True):
        # First what is inserted before the word, then the word itself.
        for place, errors in enumerate(zip(errors_a, errors_b, strict=True)):
            if not any(errors):
                right += place
            elif right >= BOUNDARY_WORDS:
                segments.append(errors)
                right = 0
            else:
                segments[-1] = (segments[-1][0] + errors[0], segments[-1][1] + errors[1])
                right = 0
    return segments


def _errors_at_words(pairs: Alignment) -> list[tuple[str | None, int, int]]:
    """For each reference word, and the end (None): insertions before it, and 1 if it is wrong itself."""
    words: list[tuple[str | None, int, int]] = []
    inserted = 0
    for ref, hyp in pairs:
        if ref is None:
            inserted += 1
            continue
        words.append((ref, inserted, int(ref != hyp)))
        inserted = 0
    return [*words, (None, inserted, 0)]
