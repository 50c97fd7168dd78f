"""Where the errors of a corpus are: by utterance, speaker, length, duration and word."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxds2.evaluation.metrics import (
    Alignment,
    EditCounts,
    align_words,
    character_edits,
    count_alignment,
    sum_edits,
)

LENGTHS = (0, 1, 3, 6, 11, 21, 41)
"""Lower ends of the groups by reference words."""

SECONDS = (0, 2, 5, 10, 15, 20, 30)
"""Lower ends of the groups by duration."""


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance, what was made of it, and its errors."""

    id: str
    speaker: str | None
    duration: float
    """Seconds."""
    ref: str
    hyp: str
    pairs: Alignment
    words: EditCounts
    characters: EditCounts


def score_utterances(
    ids: Sequence[str],
    speakers: Sequence[str | None],
    durations: Sequence[float],
    refs: Sequence[str],
    hyps: Sequence[str],
) -> list[ScoredUtterance]:
    """Align and count each utterance.

    Returns:
      The utterances sorted by id.

    Raises:
      ValueError: the arguments differ in number.
    """
    aligned = align_words(refs, hyps)
    words = [count_alignment(pairs) for pairs in aligned]
    rows = zip(ids, speakers, durations, refs, hyps, aligned, words, character_edits(refs, hyps), strict=True)
    return sorted((ScoredUtterance(*row) for row in rows), key=lambda u: u.id)


def worst_first(utterances: Sequence[ScoredUtterance]) -> list[ScoredUtterance]:
    """Most word errors first; of as many, those with fewer reference words, then with more character errors."""
    return sorted(utterances, key=lambda u: (-u.words.errors, u.words.reference, -u.characters.errors, u.id))


def by_speaker(utterances: Sequence[ScoredUtterance]) -> list[dict[str, Any]]:
    """Counts of each speaker, by name; empty where no utterance names one. Nameless ones are under null."""
    if all(u.speaker is None for u in utterances):
        return []
    rows = _grouped(utterances, lambda u: (u.speaker is None, u.speaker or ""))
    return [{"speaker": None if nameless else name, **_counts(group)} for (nameless, name), group in rows]


def by_length(utterances: Sequence[ScoredUtterance]) -> list[dict[str, Any]]:
    """Counts by number of reference words, in the groups of LENGTHS that hold any; `to` is included, null: open."""
    rows = _grouped(utterances, lambda u: max(i for i, low in enumerate(LENGTHS) if low <= u.words.reference))
    return [
        {"from": LENGTHS[i], "to": LENGTHS[i + 1] - 1 if i + 1 < len(LENGTHS) else None, **_counts(group)}
        for i, group in rows
    ]


def by_duration(utterances: Sequence[ScoredUtterance]) -> list[dict[str, Any]]:
    """Counts by seconds, in the groups of SECONDS that hold any; `to` is left out of the group, null: open."""
    rows = _grouped(utterances, lambda u: max(i for i, low in enumerate(SECONDS) if low <= u.duration))
    return [
        {"from": SECONDS[i], "to": SECONDS[i + 1] if i + 1 < len(SECONDS) else None, **_counts(group)}
        for i, group in rows
    ]


@dataclass(frozen=True)
class Confusions:
    """Every error with how often it was made, the most frequent first and then by the alphabet."""

    substitutions: list[tuple[str, str, int]]
    """(reference word, what stands for it, count)."""
    deletions: list[tuple[str, int]]
    insertions: list[tuple[str, int]]


def confusions(utterances: Sequence[ScoredUtterance]) -> Confusions:
    """The words that are taken for others, left out and put in."""
    edits = Counter(pair for u in utterances for pair in u.pairs if pair[0] != pair[1])
    substitutions = {(ref, hyp): n for (ref, hyp), n in edits.items() if ref is not None and hyp is not None}
    deletions = {ref: n for (ref, hyp), n in edits.items() if ref is not None and hyp is None}
    insertions = {hyp: n for (ref, hyp), n in edits.items() if ref is None and hyp is not None}

    def ranked(counted: dict[Any, int]) -> list[tuple[Any, int]]:
        return sorted(counted.items(), key=lambda item: (-item[1], item[0]))

    return Confusions([(ref, hyp, n) for (ref, hyp), n in ranked(substitutions)], ranked(deletions), ranked(insertions))


def _grouped(
    utterances: Sequence[ScoredUtterance], key: Callable[[ScoredUtterance], Any]
) -> list[tuple[Any, list[ScoredUtterance]]]:
    return [(value, list(group)) for value, group in itertools.groupby(sorted(utterances, key=key), key=key)]


def _counts(utterances: Sequence[ScoredUtterance]) -> dict[str, Any]:
    words = sum_edits(u.words for u in utterances)
    return {
        "utterances": len(utterances),
        "seconds": round(sum(u.duration for u in utterances), 3),
        "words": words.reference,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "substitutions": words.substitutions,
        "wer": words.rate if math.isfinite(words.rate) else None,
    }
