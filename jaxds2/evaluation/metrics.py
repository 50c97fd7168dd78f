"""Edit counts, summed over a corpus, and the error rates that come of them.

Where several shortest alignments of words exist, the one that NIST's sclite takes is taken, so that insertions,
deletions and substitutions are those of sclite, not only their sum.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Alignment = list[tuple[str | None, str | None]]
"""Aligned words (ref, hyp) of one utterance: (word, None) is a deletion, (None, word) an insertion."""

_MATCH, _INSERT, _DELETE = 0, 1, 2


@dataclass(frozen=True)
class EditCounts:
    """Edits that turn references into hypotheses along a shortest path (Levenshtein 1966).

    Counts add up, rates do not: the error rate of a corpus is that of the sum, not the mean over its utterances.
    """

    insertions: int = 0
    """Of the hypotheses, in no reference."""
    deletions: int = 0
    """Of the references, in no hypothesis."""
    substitutions: int = 0
    reference: int = 0
    """Words or characters of the references."""

    def __add__(self, other: "EditCounts") -> "EditCounts":
        return EditCounts(
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.substitutions + other.substitutions,
            self.reference + other.reference,
        )

    @property
    def errors(self) -> int:
        """Insertions, deletions and substitutions together."""
        return self.insertions + self.deletions + self.substitutions

    @property
    def rate(self) -> float:
        """Errors per reference word or character: a fraction, above 1 where insertions abound.

        Without any reference it is 0 if the hypotheses are empty too, else infinite.
        """
        if self.reference == 0:
            return math.inf if self.errors else 0.0
        return self.errors / self.reference

    def format(self, name: str) -> str:
        """One line as Kaldi and icefall write it: `%WER 6.31 [3320 / 52576, 393 ins, 280 del, 2647 sub]`."""
        return (
            f"%{name} {100 * self.rate:.2f} [{self.errors} / {self.reference}, "
            f"{self.insertions} ins, {self.deletions} del, {self.substitutions} sub]"
        )


def count_word_edits(refs: Sequence[str], hyps: Sequence[str]) -> EditCounts:
    """Word edits over all pairs; words are what white space separates, compared as they are.

    Raises:
      ValueError: refs and hyps differ in number.
    """
    return sum_edits(count_alignment(pairs) for pairs in align_words(refs, hyps))


def count_character_edits(refs: Sequence[str], hyps: Sequence[str]) -> EditCounts:
    """Character edits over all pairs; spaces count as characters.

    Raises:
      ValueError: refs and hyps differ in number.
    """
    return sum_edits(character_edits(refs, hyps))


def sum_edits(counts: Iterable[EditCounts]) -> EditCounts:
    """The counts of a corpus from those of its utterances."""
    return sum(counts, EditCounts())


def count_alignment(pairs: Alignment) -> EditCounts:
    """The edits of one utterance's alignment."""
    insertions, deletions = sum(ref is None for ref, _ in pairs), sum(hyp is None for _, hyp in pairs)
    wrong = sum(ref != hyp for ref, hyp in pairs)
    return EditCounts(insertions, deletions, wrong - insertions - deletions, len(pairs) - insertions)


def character_edits(refs: Sequence[str], hyps: Sequence[str]) -> list[EditCounts]:
    """The character edits of each pair.

    Raises:
      ValueError: refs and hyps differ in number.
    """
    import jiwer

    _check_numbers(refs, hyps)
    # In place of jiwer's transforms, which strip spaces before they split.
    transform: Any = lambda texts: [list(text) for text in texts]  # noqa: E731
    output = jiwer.process_words(list(refs), list(hyps), transform, transform)
    counts = []
    for ref, chunks in zip(output.references, output.alignments, strict=True):
        edits = {"insert": 0, "delete": 0, "substitute": 0, "equal": 0}
        for c in chunks:
            edits[c.type] += max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
        counts.append(EditCounts(edits["insert"], edits["delete"], edits["substitute"], len(ref)))
    return counts


def align_words(refs: Sequence[str], hyps: Sequence[str]) -> list[Alignment]:
    """The aligned words of each pair of texts, along a shortest path (Levenshtein 1966).

    Of the shortest paths the one with the fewest substitutions is taken, and of those the one that, read from the end,
    prefers a pair to an insertion and an insertion to a deletion. That is sclite's choice. sclite itself minimises
    4 substitutions + 3 (insertions + deletions), which agrees but where the text is mostly wrong: there it may count
    an edit more than needed (7 of 400 synthetic utterances at 80 % errors).

    Raises:
      ValueError: refs and hyps differ in number.
    """
    _check_numbers(refs, hyps)
    return [_align(ref.split(), hyp.split()) for ref, hyp in zip(refs, hyps, strict=True)]


def _align(ref: list[str], hyp: list[str]) -> Alignment:
    if ref == hyp:
        return list(zip(ref, hyp, strict=True))
    moves_NM = _moves(ref, hyp)
    i, j = len(ref), len(hyp)
    pairs: Alignment = []
    while i or j:
        move = moves_NM[i, j]
        i, j = i - (move != _INSERT), j - (move != _DELETE)
        pairs.append((None if move == _INSERT else ref[i], None if move == _DELETE else hyp[j]))
    return pairs[::-1]


def _moves(ref: list[str], hyp: list[str]) -> np.ndarray:
    """The last move of the best alignment of every prefix of ref with every prefix of hyp, (N + 1, M + 1) uint8."""
    # A substitution costs a little more than the others: it decides only between paths of as many edits.
    edit = 2 * max(len(ref), len(hyp)) + 1
    ids = {word: i for i, word in enumerate({*ref, *hyp})}
    ref_N, hyp_M = np.array([ids[w] for w in ref], np.int64), np.array([ids[w] for w in hyp], np.int64)
    inserted_M = edit * np.arange(len(hyp) + 1, dtype=np.int64)
    moves_NM = np.full((len(ref) + 1, len(hyp) + 1), _INSERT, np.uint8)
    costs_M = inserted_M
    for i, word in enumerate(ref_N, start=1):
        deleted_M = costs_M + edit
        matched_M = deleted_M + edit  # more than the least for the first, which has nothing to pair with
        matched_M[1:] = costs_M[:-1] + (hyp_M != word) * (edit + 1)
        # Insertions run along the row: the least cost so far, each step further costs one more.
        costs_M = np.minimum.accumulate(np.minimum(matched_M, deleted_M) - inserted_M) + inserted_M
        inserts_M = np.zeros(len(costs_M), bool)
        inserts_M[1:] = costs_M[1:] == costs_M[:-1] + edit
        moves_NM[i] = np.where(costs_M == matched_M, _MATCH, np.where(inserts_M, _INSERT, _DELETE))
    return moves_NM


def _check_numbers(refs: Sequence[str], hyps: Sequence[str]) -> None:
    if len(refs) != len(hyps):
        raise ValueError(f"{len(refs)} references and {len(hyps)} hypotheses: expected as many of each")
