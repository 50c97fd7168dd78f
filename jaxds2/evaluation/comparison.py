"""Two scores of one manifest, beside each other: is the difference more than chance?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxds2.evaluation.breakdown import ScoredUtterance, score_utterances
from jaxds2.evaluation.metrics import EditCounts, sum_edits
from jaxds2.evaluation.significance import (
    LEVEL,
    REPLICATES,
    MatchedPairs,
    Units,
    matched_pairs,
    percentile_interval,
    rate_intervals,
    resample,
    resampling_units,
)

ENOUGH_SEGMENTS = 50
"""From which on Gillick and Cox hold the normal approximation for good."""


class ComparisonError(ValueError):
    """Two folders whose scores cannot be compared; its message is one line for the user."""


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same utterances; rates and differences are fractions."""

    folders: tuple[Path, Path]
    words: tuple[EditCounts, EditCounts]
    intervals: tuple[tuple[float, float], tuple[float, float]]
    """Bootstrap interval of each system's rate."""
    difference: tuple[float, float]
    """Paired bootstrap interval of the second rate less the first: both are drawn on the same utterances."""
    units: Units
    test: MatchedPairs

    def render(self) -> str:
        """Both rates with their intervals, their difference and the test, for a person."""
        level, alpha = f"{100 * LEVEL:.0f} %", 1 - LEVEL
        lines = []
        for label, folder, words, (low, high) in zip("AB", self.folders, self.words, self.intervals, strict=True):
            lines.append(f"{label}: {folder}")
            lines.append(f"   {words.format('WER')}, {level} interval {100 * low:.2f} to {100 * high:.2f}")
        difference = self.words[1].rate - self.words[0].rate
        low, high = self.difference
        lines.append(
            f"B - A: {100 * difference:+.2f} points, {level} interval {100 * low:+.2f} to {100 * high:+.2f} "
            f"(paired bootstrap, {REPLICATES} resamples of {self.units.count} {self.units.kind})"
        )
        test = self.test
        verdict = f"{'a' if test.p < alpha else 'no'} difference at the {100 * alpha:.0f} % level"
        if test.mean and not test.std:
            verdict = "the same in every segment, of which this test can say nothing"
        lines.append(
            f"MAPSSWE: {test.segments} segments, errors of A less those of B {test.mean:+.3f} each, z {test.z:.3f}, "
            f"p {_probability(test.p)}: {verdict}"
        )
        if test.segments < ENOUGH_SEGMENTS:
            lines.append(f"         fewer than {ENOUGH_SEGMENTS} segments: p, which takes z for normal, is rough")
        return "\n".join(lines)


def compare(first: Path, second: Path) -> Comparison:
    """Compare the scores in two folders that eval.py wrote.

    Raises:
      ComparisonError: the same folder twice, a folder without its files or with files that do not belong together,
        scores of different manifests, or references that the two alphabets spell differently.
    """
    if first.resolve() == second.resolve():
        raise ComparisonError(f"{first} and {second} are the same folder: name two scores to compare")
    reports = [_report(folder) for folder in (first, second)]
    digests = [report["manifest_sha256"] for report in reports]
    if digests[0] != digests[1]:
        raise ComparisonError(
            f"{first} was scored on {reports[0]['manifest']} ({digests[0][:12]}), {second} on {reports[1]['manifest']} "
            f"({digests[1][:12]}): only scores of the same manifest, to the byte, can be compared"
        )
    scored = [_utterances(folder, report) for folder, report in zip((first, second), reports, strict=True)]
    if len(scored[0]) != len(scored[1]):
        raise ComparisonError(
            f"{first} was scored on {len(scored[0])} utterances and {second} on {len(scored[1])} of the same manifest; "
            f"score both again"
        )
    for a, b in zip(*scored, strict=True):
        if (a.id, a.ref) != (b.id, b.ref):
            raise ComparisonError(
                f"{first} and {second}: the references differ, first in {a.id}: {a.ref!r} and {b.ref!r}; the runs "
                f"normalise text to different alphabets"
            )
    units = resampling_units([u.speaker for u in scored[0]])
    counts = [[u.words for u in utterances] for utterances in scored]
    values_UK = np.array([[a.errors, b.errors, a.reference] for a, b in zip(*counts, strict=True)], np.int64)
    sums_RK = resample(values_UK, units)
    intervals = rate_intervals(counts, units)
    return Comparison(
        folders=(first, second),
        words=(sum_edits(counts[0]), sum_edits(counts[1])),
        intervals=(intervals[0], intervals[1]),
        difference=percentile_interval((sums_RK[:, 1] - sums_RK[:, 0]) / np.maximum(sums_RK[:, 2], 1)),
        units=units,
        test=matched_pairs(*([u.pairs for u in utterances] for utterances in scored)),
    )


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        missing = {"manifest", "manifest_sha256", "utterances"} - set(report)
    except FileNotFoundError:
        raise ComparisonError(f"{folder} holds no report.json: name a folder that eval.py wrote") from None
    except (OSError, ValueError, TypeError) as e:
        raise ComparisonError(f"{path}: cannot be read as a report ({e})") from None
    if missing:
        raise ComparisonError(f"{path}: lacks {', '.join(sorted(missing))}: not a report of eval.py")
    return report


def _utterances(folder: Path, report: dict[str, Any]) -> list[ScoredUtterance]:
    path = folder / "utterances.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        columns = [[row[key] for row in rows] for key in ("id", "speaker", "duration", "ref", "hyp")]
    except FileNotFoundError:
        raise ComparisonError(f"{folder} holds no utterances.jsonl: score it again with this version") from None
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ComparisonError(f"{path}: cannot be read ({e}); score it again") from None
    if len(rows) != report["utterances"]:
        raise ComparisonError(
            f"{path}: holds {len(rows)} utterances, its report.json was made of {report['utterances']}; score it again"
        )
    return score_utterances(*columns)


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
