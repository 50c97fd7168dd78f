"""The recurrence of minGRU as one kernel for NVIDIA GPUs, forward and backward, in Pallas on Mosaic GPU.

A program of the grid owns 128 channels of one utterance in one direction and walks over time: tiles of frames come
into shared memory ahead of it, the state stays in registers in float32, results go straight out, coalesced along the
channels. Each pass reads its inputs once and writes its outputs once, and keeps nothing else. All directions of a layer
are one launch.

Mosaic GPU changes from release to release, so it is used in this file alone and only after `missing()` has found
it to work; scan.py has the portable forms. Needs jax 0.11 and a Hopper GPU or a later one.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, use_abstract_mesh

from jaxds2.model.cell import Candidate, decay, step, step_gradient

CHANNELS = 128
"""Channels of a program, one for each thread of a warpgroup; the width must be a multiple of it."""
TILE = 8
"""Frames that are copied into shared memory at once."""
STAGES = 4
"""Tiles under way at a time."""

MIN_JAX = (0, 11)
MIN_CAPABILITY = 9.0


TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest error of `probe` by dtype: rounding to bfloat16 makes 0.008 of it, a frame that is not its own 1."""


@functools.cache
def missing() -> str | None:
    """Why the kernel cannot be used on the default device; None where it can. Tried once, on small inputs."""
    if jax.__version_info__[:2] < MIN_JAX:
        return f"it needs jax {'.'.join(map(str, MIN_JAX))} or later, this is {jax.__version__}"
    if jax.default_backend() != "gpu":
        return f"it needs a GPU, this is a {jax.default_backend()}"
    device = jax.local_devices()[0]
    if float(getattr(device, "compute_capability", 0.0)) < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY}, the {device.device_kind} has another"
    return fault()


def fault() -> str | None:
    """What `probe` finds wrong in a dtype that training uses; None: nothing."""
    for name, tolerance in TOLERANCES.items():
        try:
            with use_abstract_mesh(AbstractMesh((), ())), jax.ensure_compile_time_eval():
                error = probe(dtype=jnp.dtype(name))
        except Exception as e:  # whatever an unstable API raises, training goes on without it
            return f"in {name}: {type(e).__name__}: {str(e).partition(chr(10))[0]}"
        if not error < tolerance:  # NaN too
            return f"it is off by {error:.1e} in {name} on this device"
    return None


def why_not(width: int) -> str | None:
    """Why the kernel does not take a layer with so many states a direction on the default device; None: it does."""
    if width % CHANNELS:
        return f"it needs a multiple of {CHANNELS} states a direction, these are {width}"
    return missing()


def stand_in(width: int, platform: str) -> str | None:
    """What to say of model.scan=fused where another form takes the kernel's place; None: nothing.

    On a CPU `fused` is no kernel. A kernel that fails while it runs is not seen here, nor is one that never ends.
    """
    if platform == "cpu" or (why := why_not(width)) is None:
        return None
    return f"model.scan=fused: no kernel here ({why}); the associative form takes its place"


def serves(gate_TBD: jax.Array) -> bool:
    """Whether the kernel takes these arrays on the default device."""
    return gate_TBD.shape[0] > 0 and why_not(gate_TBD.shape[-1]) is None


def probe(
    frames: int = 2 * TILE + 3,
    rows: int = 2,
    width: int = CHANNELS,
    candidate_fn: Candidate = "g",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> float:
    """Largest error of states and gradients, both directions at once, against steps one by one in NumPy's float64.

    NaN where one of them is NaN. Gates, candidates and the derivatives by the states are in `dtype`.
    """
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> list[np.ndarray]:
        return [rng.standard_normal(shape, np.float32) for _ in range(2)]

    def rounded(kind: list[np.ndarray]) -> list[jax.Array]:
        return [jnp.asarray(x).astype(dtype) for x in kind]

    gates, candidates, dhs = (rounded(draw(frames, rows, width)) for _ in range(3))
    h0s, dh_lasts = (list(map(jnp.asarray, draw(rows, width))) for _ in range(2))
    reverses = (False, True)
    hs, lasts = forward(gates, candidates, h0s, candidate_fn=candidate_fn, reverses=reverses)
    grads = backward(gates, candidates, hs, h0s, dhs, dh_lasts, candidate_fn=candidate_fn, reverses=reverses)
    errors = []
    for way, reverse in enumerate(reverses):
        given = [np.asarray(kind[way], np.float64) for kind in (gates, candidates, h0s, dhs, dh_lasts)]
        got = [hs[way], lasts[way], *(kind[way] for kind in grads)]
        for value, wanted in zip(got, _by_definition(given, reverse, candidate_fn), strict=True):
            errors.append(np.abs(np.asarray(value, np.float64) - wanted).max())
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


def forward(
    gates: Sequence[jax.Array],
    candidates: Sequence[jax.Array],
    h0s: Sequence[jax.Array],
    *,
    candidate_fn: Candidate,
    reverses: Sequence[bool],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The states of every direction.

    Args:
      gates: pre-activation of the update gate for each direction, (T, B, D), float32 or bfloat16.
      candidates: pre-activation of the candidate state, likewise.
      h0s: state before the first step in scan order, (B, D) float32.
      candidate_fn: `linear` or `g`.
      reverses: whether a direction runs from the last frame to the first.

    Returns:
      h_TBD in the candidates' dtype and the last state in scan order, h_BD float32, for each direction.
    """

    def way(reverse: bool, ins: Sequence, outs: Sequence, row: jax.Array, channel: jax.Array) -> None:
        gate_ref, candidate_ref, h0_ref = ins
        h_ref, last_ref = outs
        here = _own(channel)

        def visit(t: jax.Array, gate_D: jax.Array, v_D: jax.Array, h_D: jax.Array) -> jax.Array:
            h_D = step(gate_D, v_D, h_D, candidate_fn)
            h_ref[t, row, here] = h_D.astype(h_ref.dtype)
            return h_D

        last_ref[row, here] = _walk(visit, (gate_ref, candidate_ref), h0_ref[row, here], row, channel, reverse)

    h_types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in candidates]
    outs = _launch(way, [gates, candidates, h0s], [h_types, _states(h0s)], reverses)
    return outs[0], outs[1]


def backward(
    gates: Sequence[jax.Array],
    candidates: Sequence[jax.Array],
    hs: Sequence[jax.Array],
    h0s: Sequence[jax.Array],
    dhs: Sequence[jax.Array],
    dh_lasts: Sequence[jax.Array],
    *,
    candidate_fn: Candidate,
    reverses: Sequence[bool],
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """The derivatives of `forward`, walking over time the other way.

    Args:
      gates: as in `forward`, and so candidates, h0s, candidate_fn and reverses.
      candidates: see there.
      hs: the states that `forward` gave.
      h0s: see there.
      dhs: derivative of the loss by the states, (T, B, D).
      dh_lasts: derivative by the last state in scan order, (B, D) float32.
      candidate_fn: see there.
      reverses: directions of `forward`.

    Returns:
      dgate_TBD and dcandidate_TBD in the dtypes of what they belong to, and dh0_BD float32, for each direction.
    """
    last = gates[0].shape[0] - 1

    def way(reverse: bool, ins: Sequence, outs: Sequence, row: jax.Array, channel: jax.Array) -> None:
        gate_ref, candidate_ref, h_ref, dh_ref, h0_ref, dh_last_ref = ins
        dgate_ref, dcandidate_ref, dh0_ref = outs
        here = _own(channel)

        def finish(t: jax.Array | int, waiting: Sequence[jax.Array], h_before_D: jax.Array) -> None:
            gate_D, v_D, dh_D = waiting
            dgate_D, dv_D = step_gradient(gate_D, v_D, h_before_D, dh_D, candidate_fn)
            dgate_ref[t, row, here] = dgate_D.astype(dgate_ref.dtype)
            dcandidate_ref[t, row, here] = dv_D.astype(dcandidate_ref.dtype)

        def visit(t: jax.Array, gate_D, v_D, h_D, dh_D, carry):
            # The state that a step started from is that of the frame visited next, so each step is finished one
            # visit late. Before the first visit nothing waits: what is written then is written again by the second.
            flowing_D, *waiting = carry
            after = jnp.maximum(t - 1, 0) if reverse else jnp.minimum(t + 1, last)
            finish(after, waiting, h_D)
            dh_D = dh_D.astype(jnp.float32) + flowing_D
            gate_D, v_D = gate_D.astype(jnp.float32), v_D.astype(jnp.float32)
            return decay(gate_D) * dh_D, gate_D, v_D, dh_D

        flowing_D = dh_last_ref[row, here]
        nothing_D = jnp.zeros_like(flowing_D)
        refs = gate_ref, candidate_ref, h_ref, dh_ref
        carry = flowing_D, nothing_D, nothing_D, nothing_D
        flowing_D, *waiting = _walk(visit, refs, carry, row, channel, not reverse)
        finish(last if reverse else 0, waiting, h0_ref[row, here])
        dh0_ref[row, here] = flowing_D

    types = [[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kind] for kind in (gates, candidates)]
    outs = _launch(way, [gates, candidates, hs, dhs, h0s, dh_lasts], [*types, _states(h0s)], reverses)
    return outs[0], outs[1], outs[2]


def _states(h0s: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(h0_BD.shape, jnp.float32) for h0_BD in h0s]


def _own(channel: jax.Array):
    """The channels of a program."""
    from jax.experimental import pallas as pl

    return pl.ds(channel * CHANNELS, CHANNELS)


def _launch(way, ins: Sequence[Sequence], outs: Sequence[Sequence], reverses: Sequence[bool]) -> list[list[jax.Array]]:
    """One kernel over (direction, utterance, channels); `ins` and `outs` hold a list over directions for each kind."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ways, (_, rows, width) = len(reverses), ins[0][0].shape

    def kernel(*refs) -> None:
        direction, row, channel = (lax.axis_index(name) for name in ("direction", "row", "channels"))
        kinds = [refs[i : i + ways] for i in range(0, len(refs), ways)]
        for number, reverse in enumerate(reverses):
            mine = [kind[number] for kind in kinds]
            pl.when(direction == number)(
                functools.partial(way, reverse, mine[: len(ins)], mine[len(ins) :], row, channel)
            )

    launch = plgpu.kernel(
        kernel,
        out_type=[x for kind in outs for x in kind],
        grid=(ways, rows, width // CHANNELS),
        grid_names=("direction", "row", "channels"),
    )
    flat = launch(*(x for kind in ins for x in kind))
    return [list(flat[i : i + ways]) for i in range(0, len(flat), ways)]


def _walk(visit, refs: Sequence, carry, row: jax.Array, channel: jax.Array, reverse: bool):
    """visit(t, *values at t, carry) for every frame in turn: whole tiles through shared memory, the rest directly."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiles, rest = divmod(refs[0].shape[0], TILE)

    def in_order(count: int) -> range:
        return range(count)[::-1] if reverse else range(count)

    def over_rest(carry):
        for k in in_order(rest):
            t = tiles * TILE + k
            carry = visit(t, *(ref[t, row, _own(channel)] for ref in refs), carry)
        return carry

    def tile_of(number: jax.Array) -> jax.Array:
        return tiles - 1 - number if reverse else number

    def over_tile(index, *tile_refs_and_carry):
        *tile_refs, carry = tile_refs_and_carry
        first = tile_of(index[0]) * TILE
        for k in in_order(TILE):
            carry = visit(first + k, *(ref[k, 0] for ref in tile_refs), carry)
        return carry

    def over_tiles(carry):
        if not tiles:
            return carry
        tile = plgpu.BlockSpec((TILE, 1, CHANNELS), lambda number: (tile_of(number), row, channel))
        pipeline = plgpu.emit_pipeline(
            over_tile,
            grid=(tiles,),
            in_specs=[tile] * len(refs),
            max_concurrent_steps=min(STAGES, tiles),
            init_carry=carry,
        )
        return pipeline(*refs)

    return over_tiles(over_rest(carry)) if reverse else over_rest(over_tiles(carry))
