"""What was heard in a recording, and when."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from jaxds2.decoding.hypothesis import NOTHING, Decode, Hypothesis, path_words
from jaxds2.text import Vocabulary


@dataclass(frozen=True)
class TimedWord:
    """A word and the seconds in which it was heard."""

    text: str
    start: float
    end: float
    confidence: float
    """As decoding.hypothesis.Word has it."""


@dataclass(frozen=True)
class Transcript:
    """What became of one file: what was heard, best first, or why there is nothing."""

    path: Path
    hypotheses: tuple[Hypothesis, ...] = ()
    error: str | None = None
    duration: float = 0.0
    """Seconds."""
    silence: float = 0.0
    """Seconds that the model was not given, since they are silent."""
    frame_seconds: float = 0.0
    """From the start of one output frame to that of the next."""

    @property
    def text(self) -> str:
        """The best text; empty where there is an error."""
        return self.hypotheses[0].text if self.hypotheses else ""

    @property
    def words(self) -> tuple[TimedWord, ...]:
        """The words of the best text, in order and inside the file."""
        best = self.hypotheses[0] if self.hypotheses else NOTHING
        return tuple(
            TimedWord(
                w.text, w.start * self.frame_seconds, min(w.end * self.frame_seconds, self.duration), w.confidence
            )
            for w in best.words
        )


def decode_stretch(
    log_probs_UV: np.ndarray, decode: Decode, vocabulary: Vocabulary, *, borders: Sequence[int] = (), longest: int
) -> Hypothesis:
    """The best hypothesis of a stretch of any length, in pieces where it pauses or is long.

    A model that has learnt no pauses writes no space in one, so the stretch ends a piece at each of its borders. The
    time and the memory of a beam search grow faster than its input: a piece of more than `longest` frames is ended
    between two words of the best path too, so that best path decoding gives what it gives of the whole. A language
    model begins anew with each piece.

    Args:
      log_probs_UV: of all frames of the stretch.
      decode: as it is for an utterance.
      vocabulary: of the log-probabilities.
      borders: frames between two words, ascending.
      longest: frames.
    """
    pieces = []
    for start, stop in pairwise([0, *borders, len(log_probs_UV)]):
        edges = [start, *(start + e for e in _long_edges(log_probs_UV[start:stop], vocabulary, longest)), stop]
        pieces += [(a, decode(log_probs_UV[a:b])[0]) for a, b in pairwise(edges) if b > a]
    return join(pieces)


def _long_edges(log_probs_UV: np.ndarray, vocabulary: Vocabulary, longest: int) -> list[int]:
    """Frames between words of the best path, as few as make pieces of at most `longest` frames, where there are any."""
    if len(log_probs_UV) <= longest:
        return []
    words = path_words(log_probs_UV.argmax(axis=-1).tolist(), log_probs_UV, vocabulary)
    between = [(a.end + b.start + 1) // 2 for a, b in pairwise(words)]
    edges = [0]
    for edge, following in pairwise([*between, len(log_probs_UV)]):
        if following - edges[-1] > longest:
            edges.append(edge)
    return edges[1:]


def join(pieces: Sequence[tuple[int, Hypothesis]]) -> Hypothesis:
    """One hypothesis of those of parts that follow each other, each with the frame at which its part begins."""
    return Hypothesis(
        " ".join(h.text for _, h in pieces if h.text),
        tuple(replace(w, start=w.start + first, end=w.end + first) for first, h in pieces for w in h.words),
        sum((h.acoustic for _, h in pieces), 0.0),
        sum((h.lm for _, h in pieces), 0.0),
        sum((h.total for _, h in pieces), 0.0),
    )
