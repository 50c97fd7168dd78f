"""Forced alignment, on the host: the path of a known text to times of words and characters, and those to files.

A word is where the model writes it: from the first frame of its first character to the end of the last frame of its
last one. CTC is free to write a character in any frame in which it has heard enough, and writes most in a single one:
the times are shifted by a delay that is about the same for all words of a model (RESULTS.md has figures). The space
between words is no character here; neither is the silence around them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxds2.text import Vocabulary


@dataclass(frozen=True)
class Span:
    """A character or a word, and where it is spoken."""

    text: str
    start: float
    """Seconds."""
    end: float
    score: float
    """Its probability per frame, the geometric mean over the frames that write it: 0 to 1."""


@dataclass(frozen=True)
class Word:
    """A word with its characters."""

    span: Span
    characters: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class TextAlignment:
    """A text in the frames of its recording; N characters, spaces included."""

    text: str
    starts_N: np.ndarray
    """int32, the first frame of each character."""
    ends_N: np.ndarray
    """int32, the frame behind its last."""
    log_probs_N: np.ndarray
    """float64, log-probability of each character summed over its frames, in nats."""
    score: float
    """How well the text matches the audio: log-probability of the aligned path less that of the best path whatever its
    text, per character, in nats. At most 0, which is a text that the model would have written itself. A recording that
    is hard to understand lowers both paths, a wrong text only the first; and silence, which both read alike, counts for
    nothing, as it would in a mean over frames."""

    @classmethod
    def of(cls, log_probs_UV: np.ndarray, position_U: np.ndarray, text: str, vocabulary: Vocabulary) -> "TextAlignment":
        """Read an alignment off its path.

        Args:
          log_probs_UV: log-probabilities of one utterance's own frames, without padding.
          position_U: of `ctc.forced_alignment`; every character has a frame.
          text: what was aligned, not empty.
          vocabulary: spells it.
        """
        label_N = np.array(vocabulary.encode(text))
        frames = np.flatnonzero(position_U >= 0)
        positions = position_U[frames]
        log_probs = log_probs_UV.astype(np.float64)
        of_frames = log_probs[frames, label_N[positions]]
        blanks_U = np.where(position_U < 0, log_probs[:, 0], 0.0)
        behind = of_frames.sum() + blanks_U.sum() - log_probs.max(axis=-1).sum()
        return cls(
            text=text,
            starts_N=frames[np.searchsorted(positions, np.arange(len(label_N)))].astype(np.int32),
            ends_N=frames[np.searchsorted(positions, np.arange(len(label_N)), side="right") - 1].astype(np.int32) + 1,
            log_probs_N=np.bincount(positions, of_frames, minlength=len(label_N)),
            score=min(float(behind), 0.0) / len(label_N),
        )

    def words(self, frame_seconds: float, duration: float) -> list[Word]:
        """Words and characters with their times, which lie within the file.

        Args:
          frame_seconds: from one output frame to the next.
          duration: of the recording, in seconds: the last frame may stand for more than is left of it.
        """

        def span(first: int, behind: int) -> Span:
            start, end = self.starts_N[first], self.ends_N[behind - 1]
            frames = (self.ends_N[first:behind] - self.starts_N[first:behind]).sum()
            return Span(
                text=self.text[first:behind],
                start=float(start) * frame_seconds,
                end=min(float(end) * frame_seconds, duration),
                score=float(np.exp(self.log_probs_N[first:behind].sum() / frames)),
            )

        found: list[Word] = []
        first = 0
        for word in self.text.split(" "):
            behind = first + len(word)
            found.append(Word(span(first, behind), tuple(span(n, n + 1) for n in range(first, behind))))
            first = behind + 1
        return found


def format_textgrid(tiers: Sequence[tuple[str, Sequence[Span]]], duration: float) -> str:
    """A Praat TextGrid in its long text format, to be written as UTF-8; an interval without text is silence.

    Args:
      tiers: name and spans of each, in order and apart.
      duration: of the recording, in seconds; the intervals of each tier tile it from 0 to there.
    """
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {_number(duration)}"]
    lines += ["tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for number, (name, spans) in enumerate(tiers, start=1):
        intervals = _tile(spans, duration)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f"        name = {_quoted(name)}"]
        lines += ["        xmin = 0", f"        xmax = {_number(duration)}"]
        lines += [f"        intervals: size = {len(intervals)}"]
        for k, (text, start, end) in enumerate(intervals, start=1):
            lines += [f"        intervals [{k}]:", f"            xmin = {start}", f"            xmax = {end}"]
            lines += [f"            text = {_quoted(text)}"]
    return "\n".join(lines) + "\n"


def _tile(spans: Sequence[Span], duration: float) -> list[tuple[str, str, str]]:
    """The spans and, as intervals without text, what lies between them: text, start and end as they are written."""
    intervals: list[tuple[str, str, str]] = []
    reached = _number(0.0)
    for s in spans:
        start, end = _number(s.start), _number(s.end)
        if start != reached:
            intervals.append(("", reached, start))
        intervals.append((s.text, start, end))
        reached = end
    if reached != _number(duration):
        intervals.append(("", reached, _number(duration)))
    return intervals


def _number(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
