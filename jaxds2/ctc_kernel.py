"""The forward and backward variables of CTC as one kernel for NVIDIA GPUs (mosaic.py).

A program of the grid owns an utterance and a direction and walks over its frames: their probabilities come into shared
memory ahead of it, a variable for each 128th label stays in each thread's registers, and what a thread needs of its
neighbour's goes through shared memory. A loop of XLA's launches several kernels a frame for the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxds2 import mosaic

NEVER = -1e30
"""Logarithm of a probability of 0, with which sums stay finite."""
BLOCK = 8
"""Frames after which the variables are made small again, and which are copied into shared memory at once."""
STAGES = 3
"""Blocks under way at a time."""
MAX_COLUMNS = 1024
"""Labels of an utterance, and one, that a program can own."""

TOLERANCE = 1e-3
"""Largest error of `probe`: float32 makes 1e-5 of it, a frame or a label that is not its own 1."""

_REVERSES = (True, False)
_WHOLE = 1.5 * 2**23
"""Added and taken off again it leaves the nearest whole number of a float32."""


@functools.cache
def missing() -> str | None:
    """Why the kernel cannot be used on the default device; None where it can. Tried once, on small inputs."""
    return mosaic.lacking() or mosaic.fault(probe, {"float32": TOLERANCE})


def why_not(labels: int) -> str | None:
    """Why the kernel does not take so many labels on the default device; None: it does."""
    if labels >= MAX_COLUMNS:
        return f"it takes fewer than {MAX_COLUMNS} labels an utterance, these are {labels}"
    return missing()


def stand_in(platform: str) -> str | None:
    """What to say where a loop takes the kernel's place; None: nothing, or on a CPU, where it is a loop anyway."""
    if platform == "cpu" or (why := missing()) is None:
        return None
    return f"no kernel for CTC here ({why}); a loop takes its place"


def add_two(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(exp(a) + exp(b))."""
    return jnp.maximum(a, b) + jnp.log(1.0 + jnp.exp(-jnp.abs(a - b)))


def variables(
    blank_UB1: jax.Array,
    label_UBN: jax.Array,
    follows_BN: jax.Array,
    lengths_B1: jax.Array,
    label_lengths_B1: jax.Array,
) -> tuple[tuple[jax.Array, ...], ...]:
    """The variables in logarithms: the backward ones, then the forward ones.

    A lattice has N blanks and N labels in the order blank, label, blank, ...; no path spells the last label. U frames
    are K blocks of `BLOCK`, the last of them maybe in part.

    Args:
      blank_UB1: the blank's logarithm in each frame.
      label_UBN: each label's, `NEVER` beyond an utterance's labels.
      follows_BN: whether a label may follow the one before it without a blank between them.
      lengths_B1: frames of each utterance; beyond them a path waits.
      label_lengths_B1: labels of each.

    Returns:
      for each direction, with all frames of whole blocks: what leads to the blanks and what leads to the labels, before
      the frame's own probabilities (U, B, N), less a whole number for each block, blanks and labels (K, B, N); and at
      the end all in one, blanks and labels (B, N).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    frames, rows, columns = label_UBN.shape
    lanes = mosaic.LANES
    blocks, parts = -(-frames // BLOCK), -(-columns // lanes)
    after, beside = blocks * BLOCK - frames, parts * lanes - columns

    def apart(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], parts, lanes)

    label_UBPL = apart(jnp.pad(label_UBN, ((0, after), (0, 0), (0, beside)), constant_values=NEVER))
    blank_UBL = jnp.pad(jnp.broadcast_to(blank_UB1, (frames, rows, lanes)), ((0, after), (0, 0), (0, 0)))
    follows_BPL = apart(jnp.pad(follows_BN.astype(jnp.float32), ((0, 0), (0, beside))))
    # Before the first frame a path stands at the blank before its first label; seen from its end, behind its last one.
    starts = (label_lengths_B1, jnp.zeros_like(label_lengths_B1))
    starts_WBPL = jnp.stack(
        [apart(jnp.where(jnp.arange(parts * lanes)[None, :] == at_B1, 0.0, NEVER)) for at_B1 in starts]
    )
    shapes = [(blocks * BLOCK, rows)] * 2 + [(blocks, rows)] * 2 + [(rows,)] * 2
    outs = [jax.ShapeDtypeStruct((*shape, parts, lanes), jnp.float32) for shape in shapes]

    def body(*refs) -> None:
        ins, outs_of_both, buffers = refs[:5], refs[5:-3], refs[-3:]
        for way, reverse in enumerate(_REVERSES):
            mine = outs_of_both[way * len(outs) : (way + 1) * len(outs)]
            pl.when(lax.axis_index("direction") == way)(
                functools.partial(_walk, way, reverse, ins, mine, buffers, blocks, parts)
            )

    kernel = mosaic.kernel(
        body,
        out_type=outs * len(_REVERSES),
        grid=(len(_REVERSES), rows),
        names=("direction", "row"),
        scratch=[plgpu.SMEM(((parts + 2) * lanes,), jnp.float32)] * 3,
    )
    found = kernel(label_UBPL, blank_UBL, follows_BPL, starts_WBPL, lengths_B1.astype(jnp.int32))
    joined = [x.reshape(*x.shape[:-2], parts * lanes)[..., :columns] for x in found]
    return tuple(joined[: len(outs)]), tuple(joined[len(outs) :])


def _walk(way: int, reverse: bool, ins: Sequence, outs: Sequence, buffers: Sequence, blocks: int, parts: int) -> None:
    """A program of the kernel. Everything is a list over the parts of the columns, an element of each in a thread."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lanes = mosaic.LANES
    label_ref, blank_ref, follows_ref, starts_ref, lengths_ref = ins
    to_blank_ref, to_label_ref, base_blank_ref, base_label_ref, end_blank_ref, end_label_ref = outs
    row = lax.axis_index("row")
    length = lengths_ref[row, 0]
    never_L, zero_L = (mosaic.lanes(jnp.full((lanes,), x, jnp.float32)) for x in (NEVER, 0.0))
    for buffer in buffers:  # what the first and the last column find beside them
        buffer[pl.ds(0, lanes)] = never_L
        buffer[pl.ds((parts + 1) * lanes, lanes)] = never_L
    follows = [follows_ref[row, p] > 0.5 for p in range(parts)]

    def each(function: Callable[..., jax.Array], *lists: Sequence[jax.Array]) -> list[jax.Array]:
        return [function(*xs) for xs in zip(*lists, strict=True)]

    def neighbours(xs: Sequence[jax.Array], buffer: Any) -> list[jax.Array]:
        """Those to the right, or walking forwards those to the left. No buffer is to be used twice in a row."""
        for p, x_L in enumerate(xs):
            buffer[pl.ds((p + 1) * lanes, lanes)] = x_L
        plgpu.commit_smem()
        return [buffer[pl.ds((p + 1) * lanes + (1 if reverse else -1), lanes)] for p in range(parts)]

    def write(ref: Any, index: jax.Array, xs: Sequence[jax.Array]) -> None:
        for p, x_L in enumerate(xs):
            ref[index, row, p] = x_L

    def whole(x_L: jax.Array) -> jax.Array:
        return jnp.where(x_L > NEVER / 2, (x_L + _WHOLE) - _WHOLE, 0.0)

    def block_of(number: jax.Array) -> jax.Array:
        return blocks - 1 - number if reverse else number

    def over_block(index, label_tile, blank_tile, carry):
        number = block_of(index[0])
        at_blank, at_label, base_blank, base_label = carry
        # Variables that no path has reached stay as they are.
        move_blank, move_label = each(whole, at_blank), each(whole, at_label)
        at_blank, base_blank = each(jnp.subtract, at_blank, move_blank), each(jnp.add, base_blank, move_blank)
        at_label, base_label = each(jnp.subtract, at_label, move_label), each(jnp.add, base_label, move_label)
        write(base_blank_ref, number, base_blank)
        write(base_label_ref, number, base_label)
        if reverse:
            to_blank_by = each(jnp.subtract, base_label, base_blank)
            to_label_by = each(jnp.subtract, neighbours(base_blank, buffers[2]), base_label)
        else:
            to_blank_by = each(jnp.subtract, neighbours(base_label, buffers[2]), base_blank)
            to_label_by = each(jnp.subtract, base_blank, base_label)

        def step(k: jax.Array, buffer: Any, at_blank: Sequence[jax.Array], at_label: Sequence[jax.Array]):
            """See `_forward_backward` of ctc.py for what follows what."""
            frame = number * BLOCK + k
            if reverse:
                to_blank = each(lambda a, b, by: add_two(a, b + by), at_blank, at_label, to_blank_by)
                beside = neighbours(each(jnp.where, follows, to_blank, at_blank), buffer)
            else:
                to_blank = each(
                    lambda a, b, by: add_two(a, b + by), at_blank, neighbours(at_label, buffer), to_blank_by
                )
                beside = each(jnp.where, follows, to_blank, at_blank)
            to_label = each(lambda a, b, by: add_two(a, b + by), at_label, beside, to_label_by)
            write(to_blank_ref, frame, to_blank)
            write(to_label_ref, frame, to_label)
            inside_L = jnp.broadcast_to(frame < length, (lanes,))
            blank_L = blank_tile[k, 0]
            labels = [label_tile[k, 0, p] for p in range(parts)]
            return (
                each(lambda to, at: jnp.where(inside_L, to + blank_L, at), to_blank, at_blank),
                each(lambda to, label, at: jnp.where(inside_L, to + label, at), to_label, labels, at_label),
            )

        def two_steps(pair: jax.Array, carry):
            for i, buffer in enumerate(buffers[:2]):
                k = 2 * pair + i
                carry = step(BLOCK - 1 - k if reverse else k, buffer, *carry)
            return carry

        # Not all frames of a block at once, which takes many times as long to compile.
        at_blank, at_label = lax.fori_loop(0, BLOCK // 2, two_steps, (at_blank, at_label))
        plgpu.commit_smem()  # all threads have read the tiles, which may be overwritten now
        return at_blank, at_label, base_blank, base_label

    carry = [starts_ref[way, row, p] for p in range(parts)], [never_L] * parts, [zero_L] * parts, [zero_L] * parts
    pipeline = plgpu.emit_pipeline(
        over_block,
        grid=(blocks,),
        in_specs=[
            plgpu.BlockSpec((BLOCK, 1, parts, lanes), lambda number: (block_of(number), row, 0, 0)),
            plgpu.BlockSpec((BLOCK, 1, lanes), lambda number: (block_of(number), row, 0)),
        ],
        max_concurrent_steps=min(STAGES, blocks),
        init_carry=carry,
    )
    at_blank, at_label, base_blank, base_label = pipeline(label_ref, blank_ref)
    for p in range(parts):
        end_blank_ref[row, p] = at_blank[p] + base_blank[p]
        end_label_ref[row, p] = at_label[p] + base_label[p]


def probe(
    frames: int = 2 * BLOCK + 3, rows: int = 2, labels: int = 5, dtype: jax.typing.DTypeLike = jnp.float32
) -> float:
    """Largest error of the variables against steps one by one in NumPy's float64; NaN where one of them is NaN.

    Every second utterance has fewer frames and labels.
    """
    rng = np.random.default_rng(0)
    odd_B1 = np.arange(rows)[:, None] % 2 == 1
    lengths_B1, label_lengths_B1 = np.where(odd_B1, (frames + 1) // 2, frames), np.where(odd_B1, labels // 2, labels)
    columns = np.arange(labels + 1)[None, :]
    blank_UB1 = rng.standard_normal((frames, rows, 1), np.float32) - 3
    label_UBN = rng.standard_normal((frames, rows, labels + 1), np.float32) - 3
    label_UBN = np.where(columns < label_lengths_B1, label_UBN, np.float32(NEVER))
    follows_BN = (rng.random((rows, labels + 1)) < 0.7) & (columns > 0)
    given = blank_UB1, label_UBN, follows_BN, lengths_B1, label_lengths_B1
    errors = []
    for reverse, found in zip(_REVERSES, variables(*map(jnp.asarray, given)), strict=True):
        to_blank, to_label, base_blank, base_label, end_blank, end_label = (np.asarray(x, np.float64) for x in found)
        whole = np.repeat(np.stack([base_blank, base_label]), BLOCK, axis=1)[:, :frames]
        got = [np.stack([to_blank, to_label])[:, :frames] + whole, np.stack([end_blank, end_label])]
        for value, wanted in zip(got, _by_definition(*given, reverse), strict=True):
            reached = wanted > NEVER / 2
            errors.append(np.abs(np.where(reached, value - wanted, 0.0)).max())
            errors.append(0.0 if (value[~reached] < NEVER / 2).all() else np.nan)
    return float(np.max(errors))


def _by_definition(
    blank_UB1: np.ndarray,
    label_UBN: np.ndarray,
    follows_BN: np.ndarray,
    lengths_B1: np.ndarray,
    label_lengths_B1: np.ndarray,
    reverse: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """What leads to blanks and labels in each frame, (2, U, B, N), and at the end, (2, B, N), in float64."""
    frames, rows, columns = label_UBN.shape
    to = np.full((2, frames, rows, columns), NEVER)
    start_B1 = label_lengths_B1 if reverse else np.zeros_like(label_lengths_B1)
    blank = np.where(np.arange(columns)[None, :] == start_B1, 0.0, NEVER)
    label = np.full((rows, columns), NEVER)
    edge_B1 = np.full((rows, 1), NEVER)
    for t in range(frames)[::-1] if reverse else range(frames):
        if reverse:
            to[0, t] = np.logaddexp(blank, label)
            beside = np.concatenate([np.where(follows_BN, to[0, t], blank)[:, 1:], edge_B1], axis=1)
        else:
            to[0, t] = np.logaddexp(blank, np.concatenate([edge_B1, label[:, :-1]], axis=1))
            beside = np.where(follows_BN, to[0, t], blank)
        to[1, t] = np.logaddexp(label, beside)
        blank = np.where(t < lengths_B1, to[0, t] + blank_UB1[t], blank)
        label = np.where(t < lengths_B1, to[1, t] + label_UBN[t], label)
    return to, np.stack([blank, label])
