"""A recording of any length cut where it is silent, and uninterrupted sound into overlapping windows.

A model that learnt from utterances reads utterances: pauses of a second between them shift the mean and the variance
that their features are normalised by, and it writes no space where it has heard the end of a text. So each stretch of
sound between two pauses is an utterance of its own (docs/numerics.md has what that is worth). What is cut, is cut
between output frames of the whole recording, so that frames of a stretch's windows are joined frame by frame.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from jaxds2.config import Config
from jaxds2.inference.recognizer import frame_seconds

WINDOW_SECONDS = 30.0
"""The longest that the model is given. A recording that is no longer is given whole, unless it holds a long pause."""
LONG_PAUSE_SECONDS = 1.2
"""Silence inside a recording of any length with which it is cut: longer than nearly all utterances hold, so that those
are read as eval.py reads them (docs/numerics.md)."""
PAUSE_SECONDS = 0.4
"""Silence that is longer than this ends a stretch; of dead silence, which no model has learnt from, BORDER_SECONDS are
enough."""
BORDER_SECONDS = 0.25
"""Silence that is longer than this parts words: more than the closure of a stop inside a word, 0.05 to 0.15 s."""
MARGIN_SECONDS = 0.15
"""What is kept of the silence on either side of a stretch."""
OVERLAP_SECONDS = 2.0
"""Context on either side of the frames that are kept of a window."""
SEARCH_SECONDS = 5.0
"""A window ends where it is quietest in its last seconds before the overlap."""

FLOOR, TOP = 5, 99
"""Percentiles of the levels around: the noise between the words, and speech."""
ABOVE_FLOOR = 0.25
"""Silent is what lies below this share of the way from the floor to the top, in decibels,"""
ABOVE_FLOOR_DB = (3.0, 12.0)
"""but at least and at most so far above the floor: a quiet voice beside a loud one is no silence."""
RANGE_DB = 6.0
"""Where floor and top are nearer, there is no telling speech from noise, and silent is what was silent before."""
DEAD_DB = 17.5
"""Silence is dead up to this level: digital, behind a noise gate, or so faint that the features, which add LOG_OFFSET
to the mel power, hardly tell it from digital silence. White noise of this level adds a quarter of the offset to each
bin. Dead silence is in no margin: it would shift the mean of a stretch (docs/numerics.md)."""

_SMOOTH = 5
"""Frames over which a quiet place is looked for."""


@dataclass(frozen=True)
class Grid:
    """Lengths of the cutting; but for `stride` in output frames."""

    stride: int
    """Samples from the start of an output frame to that of the next."""
    window: int
    overlap: int
    search: int
    pause: int
    border: int
    margin: int

    def __post_init__(self) -> None:
        """Overlaps and the search lie inside a window and leave a frame; margins lie inside a pause."""
        assert self.window > 2 * self.overlap + self.search, self
        assert self.pause >= 2 * self.margin, self

    @classmethod
    def of(cls, config: Config, pause: float = PAUSE_SECONDS) -> "Grid":
        """The lengths above, but for the pause, on the frames of a model."""
        seconds = frame_seconds(config)
        margin = max(0.0, min(MARGIN_SECONDS, pause / 2 - seconds))
        lengths = (WINDOW_SECONDS, OVERLAP_SECONDS, SEARCH_SECONDS, pause, BORDER_SECONDS, margin)
        return cls(round(seconds * config.features.sample_rate), *(round(length / seconds) for length in lengths))


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a recording for the model, and which of its frames are kept."""

    waveform_S: np.ndarray
    """int16."""
    first: int
    """The recording's output frame with which it begins."""
    keep: tuple[int, int | None]
    """Its frames that count, from and to; None: to its last."""
    stretch: int
    """Number of its stretch, from 0."""
    part: int
    """Its number in the stretch, from 0."""
    last: bool
    """Whether the stretch ends with it."""
    borders: tuple[int, ...]
    """Frames of the recording, among those that are kept, at which one word has ended and the next not begun."""


class _Ahead:
    """The part of a recording that is being cut: samples and, in decibels above 1, the level of each frame."""

    def __init__(self, blocks: Iterable[np.ndarray], stride: int):
        self._blocks, self._stride = iter(blocks), stride
        self._first, self._samples_S = 0, np.zeros(0, np.int16)
        self._first_level, self._levels_U = 0, np.zeros(0)
        self._ended = False

    def hold(self, start: int, stop: int, *, levels_from: int) -> None:
        """Forget the samples before a frame and the levels before another, and read up to a third or to the end."""
        start, levels_from = max(start, self._first), max(levels_from, self._first_level)
        self._samples_S = self._samples_S[(start - self._first) * self._stride :]
        self._levels_U = self._levels_U[levels_from - self._first_level :]
        self._first, self._first_level = start, levels_from
        while not self._ended and self._first_level + len(self._levels_U) < stop:
            block_S = next(self._blocks, None)
            self._ended = block_S is None
            if block_S is not None:
                self._samples_S = np.concatenate([self._samples_S, block_S])
            self._measure()

    def levels(self, start: int, stop: int) -> np.ndarray:
        return self._levels_U[max(0, start - self._first_level) : stop - self._first_level]

    def samples(self, start: int, stop: int) -> np.ndarray:
        return self._samples_S[(start - self._first) * self._stride : (stop - self._first) * self._stride].copy()

    def _measure(self) -> None:
        new_S = self._samples_S[(self._first_level + len(self._levels_U) - self._first) * self._stride :]
        if not self._ended:  # a frame that is not whole waits
            new_S = new_S[: len(new_S) // self._stride * self._stride]
        starts_U = np.arange(0, len(new_S), self._stride)
        if len(starts_U):
            counts_U = np.minimum(self._stride, len(new_S) - starts_U)
            powers_U = np.add.reduceat(np.square(new_S.astype(np.float64)), starts_U) / counts_U
            self._levels_U = np.concatenate([self._levels_U, 10 * np.log10(np.maximum(powers_U, 1.0))])


def cut(blocks: Iterable[np.ndarray], grid: Grid) -> Iterator[Window]:
    """Cut a recording; it is read only some windows ahead.

    The windows do not depend on where the blocks end. Their kept frames are in order and none twice; frames in none of
    them are silent.

    Args:
      blocks: its int16 waveform in pieces of any length.
      grid: where it may be cut.

    Yields:
      Windows of at most `grid.window` frames; none of a recording that is dead silence all through.
    """
    ahead = _Ahead(blocks, grid.stride)
    threshold = DEAD_DB
    position = stretch = part = 0  # what lies before `position` is done with; in the middle of a stretch if part > 0
    while True:
        around = position - 2 * grid.window, position + 2 * grid.window
        ahead.hold(position - grid.overlap, around[1], levels_from=around[0])
        levels_U = ahead.levels(position, around[1])
        if not len(levels_U):
            return
        threshold = _threshold(ahead.levels(*around), before=threshold)
        loud_N = position + np.flatnonzero(levels_U > threshold)
        if part:
            loud_N, start, first = np.append(position, loud_N), position, position - grid.overlap
        elif len(loud_N):
            loud = int(loud_N[0])
            before_U = ahead.levels(max(position, loud - grid.margin), loud)
            start = first = loud - _alive(before_U[::-1])
        else:
            position += max(1, len(levels_U) - grid.margin)
            continue
        silent_N = np.diff(loud_N) - 1
        dead_N = np.diff(np.cumsum(levels_U <= DEAD_DB)[loud_N - position])
        gaps_N = np.flatnonzero((silent_N > grid.pause) | (dead_N > grid.border))
        end = int(loud_N[gaps_N[0]] if len(gaps_N) else loud_N[-1]) + 1
        stop = end + _alive(levels_U[end - position : end - position + grid.margin])
        last = stop - first <= grid.window
        if last:
            waveform_S, kept_to, position = ahead.samples(first, stop), None, stop
        else:
            position = _quietest(ahead, first + grid.window - grid.overlap - grid.search, grid.search)
            waveform_S, kept_to = ahead.samples(first, position + grid.overlap), position - first
        middles_N = (loud_N[:-1] + loud_N[1:])[silent_N > grid.border] // 2
        borders = tuple(middles_N[(middles_N > start) & (middles_N < min(position, end))].tolist())
        yield Window(waveform_S, first, (start - first, kept_to), stretch, part, last, borders)
        stretch, part = (stretch + 1, 0) if last else (stretch, part + 1)


def holds_pause(blocks: Iterable[np.ndarray], grid: Grid) -> bool:
    """Whether sound goes on after a silence of more than `grid.pause`, dead or not.

    Args:
      blocks: int16, as for cut.
      grid: where it may be cut.
    """
    return any(window.stretch > 0 for window in cut(blocks, replace(grid, border=grid.pause)))


def _threshold(levels_U: np.ndarray, *, before: float) -> float:
    """The level up to which a frame is silent, of those around it; `before`: that of the frames before."""
    floor, top = np.percentile(levels_U, [FLOOR, TOP])
    if top - floor < RANGE_DB:
        return before
    return max(DEAD_DB, float(floor + np.clip(ABOVE_FLOOR * (top - floor), *ABOVE_FLOOR_DB)))


def _alive(levels_U: np.ndarray) -> int:
    """How many frames there are before the first of dead silence."""
    dead_N = np.flatnonzero(levels_U <= DEAD_DB)
    return int(dead_N[0]) if len(dead_N) else len(levels_U)


def _quietest(ahead: _Ahead, start: int, count: int) -> int:
    """The frame from `start` to `start + count` around which it is quietest."""
    around_U = ahead.levels(start - _SMOOTH // 2, start + count + 1 + _SMOOTH // 2)
    return start + int(np.convolve(around_U, np.ones(_SMOOTH), "valid").argmin())
