"""The recurrence of a minGRU layer as one kernel for NVIDIA GPUs, forward and backward (mosaic.py).

A program of the grid owns 128 channels of one utterance in one direction and walks over time: tiles of frames come into
shared memory ahead of it, the state stays in registers in float32, results go straight out, coalesced along the
channels. Each pass reads its inputs once and writes its outputs once, and keeps nothing else.

All directions of a layer are one launch over arrays that hold them side by side, so that one matmul makes the
pre-activations and one takes the states, and nothing is put together or taken apart in between. The biases, the frozen
padding and the sums that are the biases' gradients belong to the kernel as well: each would be a pass over the arrays.

H is the number of states of all directions; E = 2 H are the pre-activations: gate and candidate of the first
direction, gate and candidate of the second.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxds2 import mosaic
from jaxds2.model.cell import Candidate, decay, step, step_gradient

CHANNELS = mosaic.LANES
"""Channels of a program; the width of a direction must be a multiple of it."""
TILE = 8
"""Frames that are copied into shared memory at once."""
STAGES = 4
"""Tiles under way at a time."""

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest error of `probe` by dtype: rounding to bfloat16 makes 0.008 of it, a frame that is not its own 1."""


@functools.cache
def missing() -> str | None:
    """Why the kernel cannot be used on the default device; None where it can. Tried once, on small inputs."""
    return mosaic.lacking() or mosaic.fault(probe, TOLERANCES)


def why_not(width: int) -> str | None:
    """Why the kernel does not take a layer with so many states a direction on the default device; None: it does."""
    if width % CHANNELS:
        return f"it needs a multiple of {CHANNELS} states a direction, these are {width}"
    return missing()


def stand_in(width: int, platform: str) -> str | None:
    """What to say where the associative form takes the kernel's place; None: nothing.

    On a CPU `fused` is no kernel. A kernel that fails while it runs is not seen here, nor is one that never ends.
    """
    if platform == "cpu" or (why := why_not(width)) is None:
        return None
    return f"no kernel for the recurrence here ({why}); the associative form takes its place"


def probe(
    frames: int = 2 * TILE + 3,
    rows: int = 2,
    width: int = CHANNELS,
    candidate_fn: Candidate = "g",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> float:
    """Largest error of states and gradients, both directions at once, against steps one by one in NumPy's float64.

    NaN where one of them is NaN. Pre-activations and the derivatives by the states are in `dtype`. Every second
    utterance has half the frames, and NaN behind them.
    """
    rng = np.random.default_rng(0)
    reverses = (False, True)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    lengths_B1 = np.where(np.arange(rows) % 2 == 0, frames, (frames + 1) // 2).astype(np.int32)[:, None]
    valid_TB1 = np.arange(frames)[:, None, None] < lengths_B1
    pre_TBE = jnp.asarray(np.where(valid_TB1, draw(frames, rows, 4 * width), np.nan)).astype(dtype)
    bias_E = draw(4 * width)
    dh_TBH = jnp.asarray(draw(frames, rows, 2 * width)).astype(dtype)
    h0_BH, dh_last_BH = draw(rows, 2 * width), draw(rows, 2 * width)
    given: Any = pre_TBE, jnp.asarray(bias_E), jnp.asarray(lengths_B1)
    h_TBH, h_last_BH = forward(*given, jnp.asarray(h0_BH), candidate_fn=candidate_fn, reverses=reverses)
    dpre_TBE, dbias_BE, dh0_BH = backward(
        *given,
        h_TBH,
        jnp.asarray(h0_BH),
        dh_TBH,
        jnp.asarray(dh_last_BH),
        candidate_fn=candidate_fn,
        reverses=reverses,
    )
    errors = []
    for way, reverse in enumerate(reverses):
        gate, v = (slice((2 * way + i) * width, (2 * way + i + 1) * width) for i in (0, 1))
        states = slice(way * width, (way + 1) * width)
        exact = [np.asarray(pre_TBE[..., part], np.float64) + bias_E[part] for part in (gate, v)]
        exact[0] = np.where(valid_TB1, exact[0], -700.0)  # whose sigmoid is 0 next to anything
        exact[1] = np.where(valid_TB1, exact[1], 0.0)
        exact += [np.asarray(x[..., states], np.float64) for x in (h0_BH, dh_TBH, dh_last_BH)]
        h, last, dgate, dv, dh0 = _by_definition(exact, reverse, candidate_fn)
        for got, wanted in (
            (h_TBH[..., states], h),
            (h_last_BH[:, states], last),
            (dpre_TBE[..., gate], dgate),
            (dpre_TBE[..., v], dv),
            (dbias_BE[:, gate], dgate.sum(0)),
            (dbias_BE[:, v], dv.sum(0)),
            (dh0_BH[:, states], dh0),
        ):
            error = np.abs(np.asarray(got, np.float64) - wanted).max()
            errors.append(error / max(1.0, float(np.abs(wanted).max())))
    return float(np.max(errors))


def _by_definition(given: Sequence[np.ndarray], reverse: bool, candidate_fn: Candidate) -> tuple[np.ndarray, ...]:
    """States, last state, and the derivatives by gate, candidate and initial state, in float64.

    `given` are gate, candidate, h0, and the derivatives by the states and by the last state, in float64.
    """
    gate, v, h, dh, carry = given
    z, s = 1 / (1 + np.exp(-gate)), 1 / (1 + np.exp(-v))
    c, slope = (
        (v, np.ones_like(v))
        if candidate_fn == "linear"
        else (
            np.where(v >= 0, v + 0.5, s),
            np.where(v >= 0, 1.0, s * (1 - s)),
        )
    )
    before, states, total = np.zeros_like(z), np.zeros_like(z), np.zeros_like(z)
    order = range(len(z))[::-1] if reverse else range(len(z))
    for t in order:
        before[t] = h
        h = states[t] = (1 - z[t]) * h + z[t] * c[t]
    for t in reversed(order):
        total[t] = dh[t] + carry
        carry = (1 - z[t]) * total[t]
    return states, h, total * (c - before) * z * (1 - z), total * z * slope, carry


def _channels(block: jax.Array) -> Any:
    """The channels of a block of `CHANNELS`."""
    from jax.experimental import pallas as pl

    return pl.ds(block * CHANNELS, CHANNELS)


class _Place(NamedTuple):
    """What a program owns: an utterance, and blocks of `CHANNELS` among the pre-activations and the states."""

    row: jax.Array
    gate: jax.Array
    candidate: jax.Array
    state: jax.Array


@functools.partial(jax.jit, static_argnames=("candidate_fn", "reverses"))  # so that equal layers are lowered once
def forward(
    pre_TBE: jax.Array,
    bias_E: jax.Array,
    lengths_B1: jax.Array,
    h0_BH: jax.Array,
    *,
    candidate_fn: Candidate,
    reverses: tuple[bool, ...],
) -> tuple[jax.Array, jax.Array]:
    """The states of every direction.

    Args:
      pre_TBE: pre-activations without their biases, float32 or bfloat16; beyond a length anything.
      bias_E: added to them, float32.
      lengths_B1: frames of each utterance, int32; the state is frozen beyond them.
      h0_BH: state before the first step in scan order, float32.
      candidate_fn: `linear` or `g`.
      reverses: for each direction whether it runs from the last frame to the first.

    Returns:
      h_TBH in the dtype of pre_TBE and the last state in scan order, h_BH float32.
    """
    frames, rows, _ = pre_TBE.shape
    outs = jax.ShapeDtypeStruct((frames, rows, h0_BH.shape[1]), pre_TBE.dtype), _float32(h0_BH)

    def way(place: _Place, reverse: bool, ins: Sequence, outs: Sequence) -> None:
        pre_ref, bias_ref, lengths_ref, h0_ref = ins
        h_ref, last_ref = outs
        row, gates, candidates, states = place.row, *map(_channels, place[1:])
        length, gate_bias_D, v_bias_D = lengths_ref[row, 0], bias_ref[gates], bias_ref[candidates]

        def visit(t: jax.Array, gate_D: jax.Array, v_D: jax.Array, h_D: jax.Array) -> jax.Array:
            new_D = step(_biased(gate_D, gate_bias_D), _biased(v_D, v_bias_D), h_D, candidate_fn)
            h_D = jnp.where(_inside(t, length), new_D, h_D)
            h_ref[t, row, states] = h_D.astype(h_ref.dtype)
            return h_D

        sources = (pre_ref, place.gate), (pre_ref, place.candidate)
        last_ref[row, states] = _walk(visit, sources, h0_ref[row, states], row, reverse)

    return _launch(way, (pre_TBE, bias_E, lengths_B1, h0_BH), outs, reverses)


@functools.partial(jax.jit, static_argnames=("candidate_fn", "reverses"))
def backward(
    pre_TBE: jax.Array,
    bias_E: jax.Array,
    lengths_B1: jax.Array,
    h_TBH: jax.Array,
    h0_BH: jax.Array,
    dh_TBH: jax.Array,
    dh_last_BH: jax.Array,
    *,
    candidate_fn: Candidate,
    reverses: tuple[bool, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The derivatives of `forward`, walking over time the other way.

    Args:
      pre_TBE: as in `forward`, and so bias_E, lengths_B1, h0_BH, candidate_fn and reverses.
      bias_E: see there.
      lengths_B1: see there.
      h_TBH: the states that `forward` gave.
      h0_BH: see there.
      dh_TBH: derivative of the loss by the states.
      dh_last_BH: derivative by the last state in scan order, float32.
      candidate_fn: see there.
      reverses: directions of `forward`.

    Returns:
      dpre_TBE in the dtype of pre_TBE, its sums over time dbias_BE in float32, and dh0_BH in float32.
    """
    last = pre_TBE.shape[0] - 1
    outs = (
        jax.ShapeDtypeStruct(pre_TBE.shape, pre_TBE.dtype),
        jax.ShapeDtypeStruct(pre_TBE.shape[1:], jnp.float32),
        _float32(h0_BH),
    )

    def way(place: _Place, reverse: bool, ins: Sequence, outs: Sequence) -> None:
        pre_ref, bias_ref, lengths_ref, h_ref, h0_ref, dh_ref, dh_last_ref = ins
        dpre_ref, dbias_ref, dh0_ref = outs
        row, gates, candidates, states = place.row, *map(_channels, place[1:])
        length, gate_bias_D, v_bias_D = lengths_ref[row, 0], bias_ref[gates], bias_ref[candidates]

        def finish(t: jax.Array | int, waiting: Sequence[jax.Array], h_before_D: jax.Array, sums: Sequence[jax.Array]):
            gate_D, v_D, dh_D = waiting
            gradients = step_gradient(gate_D, v_D, h_before_D, dh_D, candidate_fn)
            dgate_D, dv_D = (jnp.where(_inside(t, length), x, 0.0) for x in gradients)
            dpre_ref[t, row, gates] = dgate_D.astype(dpre_ref.dtype)
            dpre_ref[t, row, candidates] = dv_D.astype(dpre_ref.dtype)
            return sums[0] + dgate_D, sums[1] + dv_D

        def visit(t: jax.Array, gate_D, v_D, h_D, dh_D, carry):
            # The state that a step started from is that of the frame visited next, so each step is finished one
            # visit late. Before the first visit nothing waits: what is written then is written again by the second.
            flowing_D, waiting, sums = carry
            after = jnp.maximum(t - 1, 0) if reverse else jnp.minimum(t + 1, last)
            sums = finish(after, waiting, h_D, sums)
            dh_D = dh_D.astype(jnp.float32) + flowing_D
            gate_D, v_D = _biased(gate_D, gate_bias_D), _biased(v_D, v_bias_D)
            return jnp.where(_inside(t, length), decay(gate_D) * dh_D, dh_D), (gate_D, v_D, dh_D), sums

        zeros_D = mosaic.lanes(jnp.zeros((CHANNELS,), jnp.float32))
        carry = dh_last_ref[row, states], (zeros_D,) * 3, (zeros_D,) * 2
        sources = (pre_ref, place.gate), (pre_ref, place.candidate), (h_ref, place.state), (dh_ref, place.state)
        flowing_D, waiting, sums = _walk(visit, sources, carry, row, not reverse)
        sums = finish(last if reverse else 0, waiting, h0_ref[row, states], sums)
        dbias_ref[row, gates], dbias_ref[row, candidates] = sums
        dh0_ref[row, states] = flowing_D

    return _launch(way, (pre_TBE, bias_E, lengths_B1, h_TBH, h0_BH, dh_TBH, dh_last_BH), outs, reverses)


def _float32(like: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, jnp.float32)


def _biased(x_D: jax.Array, bias_D: jax.Array) -> jax.Array:
    return x_D.astype(jnp.float32) + bias_D


def _inside(t: jax.Array | int, length: jax.Array) -> jax.Array:
    """Whether a frame is one of the utterance's, for every channel; a `where` leaves a NaN out, a product would not."""
    return jnp.broadcast_to(t < length, (CHANNELS,))


def _launch(way: Callable[..., None], ins: Sequence, outs: Sequence, reverses: tuple[bool, ...]) -> Any:
    """One kernel over (direction, utterance, channels): way(place, reverse, refs of ins, refs of outs)."""
    from jax.experimental import pallas as pl

    ways, (_, rows, width_of_all) = len(reverses), ins[0].shape
    blocks = width_of_all // (2 * ways * CHANNELS)

    def kernel(*refs) -> None:
        direction, row, block = (lax.axis_index(name) for name in ("direction", "row", "channels"))
        for number, reverse in enumerate(reverses):
            place = _Place(row, *(first * blocks + block for first in (2 * number, 2 * number + 1, number)))
            arguments = place, reverse, refs[: len(ins)], refs[len(ins) :]
            pl.when(direction == number)(functools.partial(way, *arguments))

    grid = ways, rows, blocks
    return mosaic.kernel(kernel, out_type=outs, grid=grid, names=("direction", "row", "channels"))(*ins)


def _walk(visit: Callable[..., Any], sources: Sequence[tuple[Any, Any]], carry: Any, row: jax.Array, reverse: bool):
    """visit(t, *values at t, carry) for every frame in turn: whole tiles through shared memory, the rest directly.

    `sources` are arrays, each with the block of channels to be read.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiles, rest = divmod(sources[0][0].shape[0], TILE)

    def in_order(count: int) -> range:
        return range(count)[::-1] if reverse else range(count)

    def over_rest(carry):
        for k in in_order(rest):
            t = tiles * TILE + k
            carry = visit(t, *(ref[t, row, _channels(block)] for ref, block in sources), carry)
        return carry

    def tile_of(number: jax.Array) -> jax.Array:
        return tiles - 1 - number if reverse else number

    def over_tile(index, *tile_refs_and_carry):
        *tile_refs, carry = tile_refs_and_carry
        first = tile_of(index[0]) * TILE
        for k in in_order(TILE):
            carry = visit(first + k, *(ref[k, 0] for ref in tile_refs), carry)
        plgpu.commit_smem()  # all threads have read the tile, which may be overwritten now
        return carry

    def over_tiles(carry):
        if not tiles:
            return carry
        pipeline = plgpu.emit_pipeline(
            over_tile,
            grid=(tiles,),
            in_specs=[
                plgpu.BlockSpec((TILE, 1, CHANNELS), lambda number, block=block: (tile_of(number), row, block))
                for _, block in sources
            ],
            max_concurrent_steps=min(STAGES, tiles),
            init_carry=carry,
        )
        return pipeline(*(ref for ref, _ in sources))

    return over_tiles(over_rest(carry)) if reverse else over_rest(over_tiles(carry))
