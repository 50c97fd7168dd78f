"""Cutting: nothing that sounds is lost, nothing comes twice, and it takes no more memory for a longer recording."""

import dataclasses
import tracemalloc
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.config import FeatureConfig
from jaxds2.features import FIXED_STD, log_mel
from jaxds2.inference.windows import DEAD_DB, Grid, Window, cut, holds_pause

STRIDE = 10
LOUD, QUIET = 8000, 20


@st.composite
def grids(draw) -> Grid:
    overlap, search, margin = draw(st.integers(3, 6)), draw(st.integers(0, 8)), draw(st.integers(0, 3))
    window = 2 * overlap + search + draw(st.integers(1, 30))
    return Grid(STRIDE, window, overlap, search, 2 * margin + draw(st.integers(1, 5)), draw(st.integers(1, 8)), margin)


def recording(runs: Sequence[int], tail: int = 0) -> np.ndarray:
    """Noise whose frames are silent and loud by turns, so many of each, and some samples that fill no frame."""
    rng = np.random.default_rng(len(runs))
    levels = np.repeat([QUIET if i % 2 == 0 else LOUD for i in range(len(runs))], np.array(runs) * STRIDE)
    levels = np.append(levels, np.full(tail, LOUD))
    return np.rint(levels * rng.choice([-1.0, 1.0], len(levels)) * rng.uniform(0.8, 1, len(levels))).astype(np.int16)


def blocks(waveform_S: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (waveform_S[i : i + size] for i in range(0, len(waveform_S), size))


def kept(window: Window) -> tuple[int, int]:
    """The frames that a window stands for, of the whole recording."""
    frames = -(-len(window.waveform_S) // STRIDE)
    return window.first + window.keep[0], window.first + (frames if window.keep[1] is None else window.keep[1])


many = st.lists(st.integers(1, 90), min_size=1, max_size=12)


@given(many, st.integers(0, STRIDE - 1), grids())
@settings(max_examples=80)
def test_every_frame_that_sounds_is_in_one_window_and_none_in_two(runs, tail, grid):
    waveform_S = recording(runs, tail)
    windows = list(cut(blocks(waveform_S, 333), grid))
    frames = -(-len(waveform_S) // STRIDE)
    count_U = np.zeros(frames, int)
    position = 0
    for w in windows:
        start, stop = kept(w)
        assert position <= start < stop
        position = stop
        count_U[start:stop] += 1
        assert len(w.waveform_S) <= grid.window * STRIDE
        np.testing.assert_array_equal(w.waveform_S, waveform_S[w.first * STRIDE :][: len(w.waveform_S)])
        # The model has context on both sides of what is kept, but at the ends of the stretch.
        assert w.keep[0] == (grid.overlap if w.part else 0)
        assert w.last or w.first + len(w.waveform_S) // STRIDE == stop + grid.overlap
    assert count_U.max(initial=0) <= 1
    loud_U = np.abs(waveform_S[: frames * STRIDE : STRIDE]) > 1000
    assert count_U[loud_U].all()


@given(many, st.integers(0, STRIDE - 1), grids(), st.integers(50, 4000))
@settings(max_examples=25)
def test_the_windows_do_not_depend_on_the_blocks(runs, tail, grid, size):
    waveform_S = recording(runs, tail)
    some, others = (list(cut(pieces, grid)) for pieces in (blocks(waveform_S, size), [waveform_S]))
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one.waveform_S, other.waveform_S)
        assert vars(one) | {"waveform_S": 0} == vars(other) | {"waveform_S": 0}


@given(st.lists(st.tuples(st.integers(20, 60), st.integers(1, 30)), min_size=1, max_size=8))
@settings(max_examples=50)
def test_a_pause_parts_stretches_and_less_than_a_pause_does_not(runs):
    grid = Grid(STRIDE, window=70, overlap=4, search=10, pause=9, border=5, margin=2)
    windows = list(cut([recording([30, *(n for run in runs for n in run), 30, 30])], grid))
    parted = sum(silent > grid.pause for _, silent in runs)
    assert sum(w.last for w in windows) == parted + 1
    assert [w.stretch for w in windows if w.last] == list(range(parted + 1))
    # In the pauses that part no stretches, but words.
    borders = [border for w in windows for border in w.borders]
    silences = np.cumsum([30, *(n for run in runs for n in run)])[1:].reshape(-1, 2)
    inside = [(a, b) for a, b in silences.tolist() if grid.border < b - a <= grid.pause]
    assert len(borders) == len(inside)
    assert all(a < border < b for border, (a, b) in zip(borders, inside, strict=True))


DEAD = (0, 7)
"""Amplitudes, of digital silence and of the loudest that counts as such."""


@pytest.mark.parametrize("dead", DEAD)
def test_dead_silence_is_in_no_margin(dead):
    grid = Grid(STRIDE, window=70, overlap=4, search=10, pause=9, border=5, margin=2)
    noise_S = recording([0, 40])
    silence_S = np.full(300, dead, np.int16)
    (window,) = cut([np.concatenate([silence_S, noise_S, silence_S])], grid)
    np.testing.assert_array_equal(window.waveform_S, noise_S)
    assert not list(cut([np.full(5000, dead, np.int16)], grid))


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize(("frames", "stretches"), [(5, 1), (6, 2), (9, 2)])
def test_dead_silence_parts_stretches_sooner_than_a_pause(frames, stretches, dead):
    grid = Grid(STRIDE, window=90, overlap=4, search=10, pause=9, border=5, margin=2)
    waveform_S = recording([20, 30, frames, 30, 20])
    waveform_S[50 * STRIDE : (50 + frames) * STRIDE] = dead
    assert sum(w.last for w in cut([waveform_S], grid)) == stretches


@pytest.mark.parametrize("dead", [*DEAD, None])
@pytest.mark.parametrize(("frames", "held"), [(6, False), (9, False), (10, True)])
def test_a_pause_is_held_whatever_silence_it_is(frames, held, dead):
    grid = Grid(STRIDE, window=90, overlap=4, search=10, pause=9, border=5, margin=2)
    waveform_S = recording([20, 30, frames, 30, 20])
    if dead is not None:
        waveform_S[50 * STRIDE : (50 + frames) * STRIDE] = dead
    assert holds_pause([waveform_S], grid) is held


def test_dead_silence_is_what_the_features_hardly_hear():
    features = FeatureConfig()
    noise_S = 10 ** (DEAD_DB / 20) * np.random.default_rng(0).standard_normal(160_000) / 32768
    lengths_B, fixed = jnp.array([noise_S.size]), dataclasses.replace(features, normalize="fixed")
    heard, nothing = (
        float(log_mel(jnp.asarray(x[None], jnp.float32), lengths_B, fixed)[0].mean()) for x in (noise_S, 0 * noise_S)
    )
    assert FIXED_STD * (heard - nothing) == pytest.approx(np.log(1.25), abs=0.03)


def test_noise_that_outlasts_what_is_looked_at_around_is_silent_still():
    grid = Grid(STRIDE, window=70, overlap=4, search=10, pause=9, border=5, margin=2)
    windows = list(cut([recording([30, 40, 3000, 40, 30])], grid))
    assert [w.last for w in windows] == [True, True]
    assert max(len(w.waveform_S) for w in windows) <= (40 + 2 * grid.margin) * STRIDE


def test_memory_does_not_grow_with_the_length():
    grid = Grid(STRIDE, window=700, overlap=40, search=100, pause=9, border=5, margin=2)
    one_S = recording([20, 300] * 8 + [5, 1500])
    peaks = []
    for repeats in (2, 10):
        tracemalloc.start()
        for _ in cut((one_S for _ in range(repeats)), grid):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
