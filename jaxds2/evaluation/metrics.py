"""Edit counts, summed over a corpus, and the error rates that come of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jiwer import WordOutput


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
    return _count(refs, hyps, _words)


def count_character_edits(refs: Sequence[str], hyps: Sequence[str]) -> EditCounts:
    """Character edits over all pairs; spaces count as characters.

    Raises:
      ValueError: refs and hyps differ in number.
    """
    return _count(refs, hyps, list)


def align_words(refs: Sequence[str], hyps: Sequence[str]) -> list[list[tuple[str | None, str | None]]]:
    """For each pair of texts its aligned words (ref, hyp): (word, None) is a deletion, (None, word) an insertion.

    The alignment is the one that count_word_edits counts.

    Raises:
      ValueError: refs and hyps differ in number.
    """
    output = _process(refs, hyps, _words)
    alignments = []
    for ref, hyp, chunks in zip(output.references, output.hypotheses, output.alignments, strict=True):
        pairs: list[tuple[str | None, str | None]] = []
        for c in chunks:
            refs_here, hyps_here = ref[c.ref_start_idx : c.ref_end_idx], hyp[c.hyp_start_idx : c.hyp_end_idx]
            if c.type == "delete":
                pairs += [(word, None) for word in refs_here]
            elif c.type == "insert":
                pairs += [(None, word) for word in hyps_here]
            else:
                pairs += zip(refs_here, hyps_here, strict=True)
        alignments.append(pairs)
    return alignments


def _words(text: str) -> list[str]:
    return text.split()


def _count(refs: Sequence[str], hyps: Sequence[str], split: Callable[[str], list[str]]) -> EditCounts:
    output = _process(refs, hyps, split)
    return EditCounts(
        output.insertions,
        output.deletions,
        output.substitutions,
        output.hits + output.deletions + output.substitutions,
    )


def _process(refs: Sequence[str], hyps: Sequence[str], split: Callable[[str], list[str]]) -> "WordOutput":
    import jiwer

    if len(refs) != len(hyps):
        raise ValueError(f"{len(refs)} references and {len(hyps)} hypotheses: expected as many of each")

    # In place of jiwer's transforms, which strip spaces before they split.
    transform: Any = lambda texts: [split(text) for text in texts]  # noqa: E731
    return jiwer.process_words(list(refs), list(hyps), transform, transform)
