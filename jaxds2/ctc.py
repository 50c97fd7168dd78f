"""Connectionist temporal classification (Graves et al. 2006): the loss, which labels fit their frames at all, and where
in the frames a known label stands.
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxds2 import ctc_kernel
from jaxds2.ctc_kernel import BLOCK, NEVER, add_two
from jaxds2.mosaic import on_own_rows
from jaxds2.text import BLANK_ID

Implementation = Literal["optax", "fused"]


def min_frames(label: Sequence[object]) -> int:
    """Fewest frames that can spell labels, or the characters that they stand for: one each, and a blank between equal
    neighbours.
    """
    return len(label) + sum(map(operator.eq, label, itertools.islice(label, 1, None)))


def feasible(logit_lengths_B: jax.Array, labels_BN: jax.Array, label_lengths_B: jax.Array) -> jax.Array:
    """Whether each label fits its frames, bool (B,); a row without frames never does."""
    both = jnp.arange(1, labels_BN.shape[1])[None, :] < label_lengths_B[:, None]
    repeats_B = jnp.sum((labels_BN[:, 1:] == labels_BN[:, :-1]) & both, axis=1)
    return (logit_lengths_B >= label_lengths_B + repeats_B) & (logit_lengths_B > 0)


def ctc_loss(
    logits_BUV: jax.Array,
    logit_lengths_B: jax.Array,
    labels_BN: jax.Array,
    label_lengths_B: jax.Array,
    *,
    implementation: Implementation = "optax",
) -> jax.Array:
    """Negative log-likelihood of each label, in nats, float32 (B,).

    Rows that cannot fit (see `feasible`), whose likelihood is zero, give 0 and no gradient; a mean must not count them.
    Computed in float32 whatever the dtype of the logits; tiny negative values, which its arithmetic can give for
    near-certain labels, are clamped to 0.

    Args:
      logits_BUV: class BLANK_ID is the blank; what stands beyond an utterance's length is ignored.
      logit_lengths_B: valid frames.
      labels_BN: label ids, no blanks within the label length.
      label_lengths_B: labels of each row.
      implementation: `optax`, the reference, differentiated by JAX; or `fused`, forward and backward variables in one
        pass and the gradient in closed form: less memory, and a gradient closer to float64's (docs/numerics.md). On an
        NVIDIA GPU the pass is a kernel (ctc_kernel.py) where that has been found to work, elsewhere a loop. It has no
        second derivative.
    """
    ok_B = feasible(logit_lengths_B, labels_BN, label_lengths_B)
    padded_frames_BU = jnp.arange(logits_BUV.shape[1])[None, :] >= logit_lengths_B[:, None]
    # Where a row is out, so are its logits: a NaN there must not reach the gradient through 0 * NaN.
    usable_BU1 = (ok_B[:, None] & ~padded_frames_BU)[..., None]
    logits_BUV = jnp.where(usable_BU1, logits_BUV.astype(jnp.float32), 0.0)
    if implementation == "optax":
        padded_labels_BN = jnp.arange(labels_BN.shape[1])[None, :] >= label_lengths_B[:, None]
        loss_B = optax.ctc_loss(
            logits_BUV,
            padded_frames_BU.astype(jnp.float32),
            labels_BN,
            padded_labels_BN.astype(jnp.float32),
            blank_id=BLANK_ID,
        )
    else:
        if labels_BN.shape[1] == 0:  # a batch without labels: the loop wants a column all the same
            labels_BN = jnp.pad(labels_BN, ((0, 0), (0, 1)))
        loss_B = _fused(logits_BUV, logit_lengths_B, labels_BN, label_lengths_B)
    return jnp.where(ok_B, jnp.maximum(loss_B, 0.0), 0.0)


class Alignment(NamedTuple):
    """The most likely of the paths that spell a label, for each row of a batch."""

    position_BU: jax.Array
    """int32: which label of the row, counted from 0, a frame writes; -1: the blank, beyond the length, or no path."""
    log_prob_B: jax.Array
    """float32: log-probability of the path, in nats; -inf where no path spells the label."""
    feasible_B: jax.Array
    """Whether the label fits its frames, bool (see `feasible`)."""


def forced_alignment(
    logits_BUV: jax.Array, logit_lengths_B: jax.Array, labels_BN: jax.Array, label_lengths_B: jax.Array
) -> Alignment:
    """Force a known label on the frames: the Viterbi path through the lattice of Graves et al. 2006, section 4.1.

    A row's alignment depends on its own valid frames and labels alone. Of equally likely paths the one that, seen from
    its end, stays longest in a state is taken. Computed in float32 whatever the dtype of the logits. The steps taken
    are kept as int8, (U, B, 2 N + 1).

    Args:
      logits_BUV: logits or log-probabilities; class BLANK_ID is the blank; what stands beyond a length is ignored.
      logit_lengths_B: valid frames.
      labels_BN: label ids, no blanks within the label length.
      label_lengths_B: labels of each row.
    """
    ok_B = feasible(logit_lengths_B, labels_BN, label_lengths_B)
    valid_BU = ok_B[:, None] & (jnp.arange(logits_BUV.shape[1])[None, :] < logit_lengths_B[:, None])
    log_probs_BUV = jax.nn.log_softmax(logits_BUV.astype(jnp.float32), axis=-1)
    # States 0 ... 2 N of the lattice: a blank, the first label, a blank, ... and a blank.
    in_label_BN = jnp.arange(labels_BN.shape[1])[None, :] < label_lengths_B[:, None]
    classes_BS = jnp.full((labels_BN.shape[0], 2 * labels_BN.shape[1] + 1), BLANK_ID, labels_BN.dtype)
    classes_BS = classes_BS.at[:, 1::2].set(jnp.where(in_label_BN, labels_BN, BLANK_ID))
    scores_BUS = jnp.take_along_axis(log_probs_BUV, classes_BS[:, None, :], axis=2)
    # A label may follow another without a blank between them, unless the two are equal.
    follows_BS = (classes_BS != BLANK_ID) & (classes_BS != _from_left(classes_BS, 2, BLANK_ID))

    def forward(best_BS, frame):
        scores_BS, valid_B = frame
        # Beyond its length a row waits as it is, so nothing that stands there counts.
        skipping_BS = jnp.where(follows_BS, _from_left(best_BS, 2, NEVER), NEVER)
        ways_3BS = jnp.stack([best_BS, _from_left(best_BS, 1, NEVER), skipping_BS])
        steps_BS = jnp.where(valid_B[:, None], jnp.argmax(ways_3BS, axis=0), 0).astype(jnp.int8)
        return jnp.where(valid_B[:, None], jnp.max(ways_3BS, axis=0) + scores_BS, best_BS), steps_BS

    def backward(state_B, steps_BS):
        steps_B = jnp.take_along_axis(steps_BS, state_B[:, None], axis=1)[:, 0]
        return state_B - steps_B.astype(jnp.int32), state_B

    # Before the first frame a path stands at the blank before its first label.
    start_BS = jnp.where(jnp.arange(classes_BS.shape[1])[None, :] == 0, 0.0, jnp.full(classes_BS.shape, NEVER))
    best_BS, steps_UBS = jax.lax.scan(forward, start_BS, (jnp.swapaxes(scores_BUS, 0, 1), valid_BU.T))
    last_B = 2 * label_lengths_B.astype(jnp.int32)
    # It ends at the last label or the blank behind it. Of an empty label there is only the blank.
    ends_B2 = jnp.take_along_axis(best_BS, jnp.maximum(last_B[:, None] - jnp.arange(2)[None, :], 0), axis=1)
    _, states_UB = jax.lax.scan(backward, last_B - jnp.argmax(ends_B2, axis=1), steps_UBS, reverse=True)
    states_BU = states_UB.T
    position_BU = jnp.where(valid_BU & (states_BU % 2 == 1), states_BU // 2, -1)
    return Alignment(position_BU, jnp.where(ok_B, jnp.max(ends_B2, axis=1), -jnp.inf), ok_B)


def _from_left(x_BS: jax.Array, steps: int, fill: float) -> jax.Array:
    """Each state gets the value of the state that many to its left."""
    return jnp.pad(x_BS, ((0, 0), (steps, 0)), constant_values=fill)[:, :-steps]


def _from_right(x_BS: jax.Array, fill: float) -> jax.Array:
    """Each state gets the value of its right neighbour."""
    return jnp.pad(x_BS, ((0, 0), (0, 1)), constant_values=fill)[:, 1:]


def consistency_loss(logits_BUV: jax.Array, logit_lengths_B: jax.Array) -> jax.Array:
    """How far apart two views of each utterance are read, in nats, float32 (B / 2,).

    CR-CTC (Yao et al. 2024, arXiv 2410.05101, section 3.2): the Kullback-Leibler divergence between the classes of each
    frame, from either view to the other, half of each, summed over the valid frames. A view learns from the other as
    it stands: the distribution that is learnt from has no gradient.

    Args:
      logits_BUV: rows 2 i and 2 i + 1 are the views of utterance i; what stands beyond its length is ignored.
      logit_lengths_B: valid frames, the same in both views.
    """
    valid_BU1 = (jnp.arange(logits_BUV.shape[1])[None, :] < logit_lengths_B[:, None])[..., None]
    log_probs_BUV = jax.nn.log_softmax(jnp.where(valid_BU1, logits_BUV.astype(jnp.float32), 0.0), axis=-1)
    views_B2UV = log_probs_BUV.reshape(-1, 2, *log_probs_BUV.shape[1:])
    other_B2UV = jax.lax.stop_gradient(views_B2UV[:, ::-1])
    apart_B2UV = jnp.exp(other_B2UV) * (other_B2UV - views_B2UV)
    return jnp.sum(apart_B2UV, axis=(1, 2, 3)) / 2


@jax.custom_vjp
def _fused(logits_BUV: jax.Array, lengths_B: jax.Array, labels_BN: jax.Array, label_lengths_B: jax.Array) -> jax.Array:
    return _forward_backward(logits_BUV, lengths_B, labels_BN, label_lengths_B, with_gradient=False)[0]


def _fused_forward(
    logits_BUV: jax.Array, lengths_B: jax.Array, labels_BN: jax.Array, label_lengths_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward_backward(logits_BUV, lengths_B, labels_BN, label_lengths_B, with_gradient=True)


def _fused_reverse(grads_BUV: jax.Array, scale_B: jax.Array) -> tuple[jax.Array, None, None, None]:
    return grads_BUV * scale_B[:, None, None], None, None, None


_fused.defvjp(_fused_forward, _fused_reverse)


class _States(NamedTuple):
    """A number for each state of a lattice, which are in the order of the text blank 0, label 0, blank 1, label 1, ...

    Both arrays have N + 1 columns, so that neighbours stand in the same one; no path spells the last label.
    """

    blank: jax.Array
    label: jax.Array


class _Lane(NamedTuple):
    """The forward variables, or the backward ones: `at` + `base`, after the frames so far.

    A float32 keeps few digits of a large number. So `at` stays small: every `BLOCK` frames what has become whole of it
    is moved to `base`, which rounds nothing.
    """

    at: _States
    base: _States
    all_to: _States | None
    """`at` before each frame's own probabilities, (U, B, N + 1), in the order of time; None where no one asks."""
    all_base: _States | None
    """`base` of each block of frames."""


def _forward_backward(
    logits_BUV: jax.Array,
    lengths_B: jax.Array,
    labels_BN: jax.Array,
    label_lengths_B: jax.Array,
    *,
    with_gradient: bool,
) -> tuple[jax.Array, jax.Array]:
    """The loss (B,) and its gradient by the logits (B, U, V), which is empty unless `with_gradient`.

    Graves et al. 2006, section 4.1, in log space: the forward and the backward variables in one pass over the frames.
    The gradient needs each frame's posterior, whose sum over the states is 1.
    """
    num_frames, num_labels = logits_BUV.shape[1], labels_BN.shape[1]
    log_probs_BUV = jax.nn.log_softmax(logits_BUV, axis=-1)
    # Taken off a frame and added up apart, as whole numbers, it leaves small ones.
    best_BU1 = jnp.round(jnp.max(log_probs_BUV, axis=-1, keepdims=True))
    blank_UB1 = jnp.swapaxes(log_probs_BUV[..., BLANK_ID : BLANK_ID + 1] - best_BU1, 0, 1)
    label_UBN = jnp.swapaxes(jnp.take_along_axis(log_probs_BUV, labels_BN[:, None], axis=2) - best_BU1, 0, 1)
    # Else the paths that run on into the padding of a label would be the best, and those that count far below them.
    in_label_1BN = (jnp.arange(num_labels)[None, :] < label_lengths_B[:, None])[None]
    label_UBN = jnp.where(in_label_1BN, label_UBN, NEVER)
    label_UBN = jnp.pad(label_UBN, ((0, 0), (0, 0), (0, 1)), constant_values=NEVER)
    # A label may follow another without a blank between them, unless the two are equal.
    follows_BN = jnp.pad(labels_BN[:, 1:] != labels_BN[:, :-1], ((0, 0), (1, 1)))
    lattice = blank_UB1, label_UBN, follows_BN, lengths_B[:, None], label_lengths_B[:, None]
    if with_gradient and num_frames and ctc_kernel.why_not(num_labels) is None:
        behind, *ahead = map(_lane, on_own_rows(ctc_kernel.variables, *lattice))
    else:
        behind, *ahead = _loop(*lattice, both=with_gradient)
    end_B = add_two(*(at[:, 0] + base[:, 0] for at, base in zip(behind.at, behind.base, strict=True)))
    valid_BU1 = (jnp.arange(num_frames)[None, :] < lengths_B[:, None])[..., None]
    loss_B = -(end_B + jnp.sum(jnp.where(valid_BU1, best_BU1, 0.0), axis=(1, 2)))
    if not with_gradient:
        return loss_B, jnp.zeros((*logits_BUV.shape[:2], 0))

    # Paths up to a state, the state's own frame, and paths on from it: the posterior of the state, frame by frame.
    to, base = jax.tree.map(jnp.add, behind[2:], ahead[0][2:])

    def posterior(to_UBN: jax.Array, base_KBN: jax.Array, frame_UBN: jax.Array) -> jax.Array:
        base_K1BN = (base_KBN - jnp.round(end_B)[None, :, None])[:, None]
        base_UBN = jnp.broadcast_to(base_K1BN, (len(base_KBN), BLOCK, *base_KBN.shape[1:])).reshape(to_UBN.shape)
        return jnp.exp((to_UBN + base_UBN)[:num_frames] + frame_UBN)

    blank_UB = _sum(posterior(to.blank, base.blank, blank_UB1))
    posterior_UBN = posterior(to.label, base.label, label_UBN)[..., :-1]
    # Rounding has left the sum close to 1, and beyond a length it is anything.
    total_UB = jnp.where(valid_BU1[..., 0].T, blank_UB + _sum(posterior_UBN), 1.0)
    # By a matmul, not a scatter, whose order of summing is not defined on every device; the blank is one label more,
    # because whatever comes after the matmul is done for every class.
    posterior_UBN = jnp.concatenate([blank_UB[..., None], posterior_UBN], axis=-1) / total_UB[..., None]
    labels_BN = jnp.pad(labels_BN, ((0, 0), (1, 0)), constant_values=BLANK_ID)
    is_class_BNV = jax.nn.one_hot(labels_BN, logits_BUV.shape[2])
    occupied_BUV = jnp.einsum("ubn,bnv->buv", posterior_UBN, is_class_BNV, precision=jax.lax.Precision.HIGHEST)
    return loss_B, jnp.where(valid_BU1, jnp.exp(log_probs_BUV) - occupied_BUV, 0.0)


def _loop(
    blank_UB1: jax.Array,
    label_UBN: jax.Array,
    follows_BN: jax.Array,
    lengths_B1: jax.Array,
    label_lengths_B1: jax.Array,
    *,
    both: bool,
) -> tuple[_Lane, ...]:
    """The backward variables and, with `both`, the forward ones, as a loop; arguments as of `ctc_kernel.variables`."""
    num_blocks = -(-len(label_UBN) // BLOCK)

    def backward(at: _States, base: _States) -> _States:
        to_blank_BN = add_two(at.blank, at.label + (base.label - base.blank))
        # The blank has the label behind it already; only an equal one must not be reached without the blank.
        from_right_BN = _from_right(jnp.where(follows_BN, to_blank_BN, at.blank), NEVER)
        from_right_BN = from_right_BN + (_from_right(base.blank, 0.0) - base.label)
        return _States(to_blank_BN, add_two(at.label, from_right_BN))

    def forward(at: _States, base: _States) -> _States:
        from_left_BN = _from_left(at.label, 1, NEVER) + (_from_left(base.label, 1, 0.0) - base.blank)
        to_blank_BN = add_two(at.blank, from_left_BN)
        from_left_BN = jnp.where(follows_BN, to_blank_BN, at.blank) + (base.blank - base.label)
        return _States(to_blank_BN, add_two(at.label, from_left_BN))

    moves = (backward, forward) if both else (backward,)

    def place(move: object, index: jax.Array, count: int) -> jax.Array:
        return count - 1 - index if move is backward else index

    def block(number: jax.Array, lanes: tuple[_Lane, ...]) -> tuple[_Lane, ...]:
        def enter(move, lane: _Lane) -> _Lane:
            at, base = _rebased(lane.at, lane.base)
            return lane._replace(at=at, base=base, all_base=_put(lane.all_base, base, place(move, number, num_blocks)))

        def step(index: jax.Array, move, lane: _Lane) -> _Lane:
            frame = place(move, number * BLOCK + index, num_blocks * BLOCK)
            to = move(lane.at, lane.base)
            passed = _States(to.blank + blank_UB1[frame], to.label + label_UBN[frame])
            inside_B1 = frame < lengths_B1  # beyond its length a row waits as it is
            at = jax.tree.map(lambda new, old: jnp.where(inside_B1, new, old), passed, lane.at)
            return lane._replace(at=at, all_to=_put(lane.all_to, to, frame))

        def steps(index: jax.Array, lanes: tuple[_Lane, ...]) -> tuple[_Lane, ...]:
            return tuple(map(functools.partial(step, index), moves, lanes))

        return jax.lax.fori_loop(0, BLOCK, steps, tuple(map(enter, moves, lanes)))

    def start(start_B1: jax.Array) -> _Lane:
        never_BN = jnp.full(follows_BN.shape, NEVER)
        at_start_BN = jnp.arange(follows_BN.shape[1])[None, :] == start_B1
        states = _States(jnp.where(at_start_BN, 0.0, never_BN), never_BN)
        zeros = jax.tree.map(jnp.zeros_like, states)
        if not both:
            return _Lane(states, zeros, None, None)
        room = [jax.tree.map(lambda x, n=n: jnp.zeros((n, *x.shape)), states) for n in (num_blocks * BLOCK, num_blocks)]
        return _Lane(states, zeros, *room)

    # Before the first frame a path stands at the blank before its first label; seen from its end, behind its last one.
    lanes = tuple(map(start, (label_lengths_B1, jnp.zeros_like(label_lengths_B1))))[: len(moves)]
    return jax.lax.fori_loop(0, num_blocks, block, lanes)


def _lane(found: tuple[jax.Array, ...]) -> _Lane:
    """What the kernel has found in a direction; at the end it has put `at` and `base` together."""
    to_blank, to_label, base_blank, base_label, end_blank, end_label = found
    end = _States(end_blank, end_label)
    return _Lane(end, jax.tree.map(jnp.zeros_like, end), _States(to_blank, to_label), _States(base_blank, base_label))


def _sum(x_UBN: jax.Array) -> jax.Array:
    """Over the last axis, as a product with ones: XLA's CPU compiler adds up one number after the other, and computes
    what it adds up just so.
    """
    ones_N = jnp.ones(x_UBN.shape[-1:])
    return jnp.einsum("ubn,n->ub", x_UBN, ones_N, precision=jax.lax.Precision.HIGHEST)


def _put(rows: _States | None, row: _States, index: jax.Array) -> _States | None:
    if rows is None:
        return None
    return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, 0), rows, row)


def _rebased(at: _States, base: _States) -> tuple[_States, _States]:
    """The same numbers with what is whole of them in `base`; states that no path has reached stay as they are."""
    whole = jax.tree.map(lambda x: jnp.where(x > NEVER / 2, jnp.round(x), 0.0), at)
    return jax.tree.map(jnp.subtract, at, whole), jax.tree.map(jnp.add, base, whole)
