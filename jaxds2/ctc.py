"""Connectionist temporal classification (Graves et al. 2006): the loss, which labels fit their frames at all, and where
in the frames a known label stands.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxds2.text import BLANK_ID

Implementation = Literal["optax", "fused"]

_NEVER = -1e30
"""Logarithm of a probability of 0, with which sums stay finite."""


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
        scan and the gradient in closed form: less memory, and a gradient closer to float64's (docs/numerics.md). It
        has no second derivative.
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
        if labels_BN.shape[1] == 0:  # a batch without labels: the scan wants a column all the same
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
        skipping_BS = jnp.where(follows_BS, _from_left(best_BS, 2, _NEVER), _NEVER)
        ways_3BS = jnp.stack([best_BS, _from_left(best_BS, 1, _NEVER), skipping_BS])
        steps_BS = jnp.where(valid_B[:, None], jnp.argmax(ways_3BS, axis=0), 0).astype(jnp.int8)
        return jnp.where(valid_B[:, None], jnp.max(ways_3BS, axis=0) + scores_BS, best_BS), steps_BS

    def backward(state_B, steps_BS):
        steps_B = jnp.take_along_axis(steps_BS, state_B[:, None], axis=1)[:, 0]
        return state_B - steps_B.astype(jnp.int32), state_B

    # Before the first frame a path stands at the blank before its first label.
    start_BS = jnp.where(jnp.arange(classes_BS.shape[1])[None, :] == 0, 0.0, jnp.full(classes_BS.shape, _NEVER))
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


def _forward_backward(
    logits_BUV: jax.Array,
    lengths_B: jax.Array,
    labels_BN: jax.Array,
    label_lengths_B: jax.Array,
    *,
    with_gradient: bool,
) -> tuple[jax.Array, jax.Array]:
    """The loss (B,) and its gradient by the logits (B, U, V), which is empty unless `with_gradient`.

    Graves et al. 2006, section 4.1, in log space. A lattice has N + 1 blank states and, between them, N label states.
    The backward variables obey the forward recursion on the lattice turned round, frames and labels both, so one scan
    runs the two as rows of one array: R = 2, backward first. After each frame the best state of a row is moved to 0,
    which keeps the numbers, and so their rounding, small; the moves only have to be added up for the loss, because the
    gradient needs each frame's posterior, whose sum over the states is 1.
    """
    num_frames, num_labels = logits_BUV.shape[1], labels_BN.shape[1]

    def rows(backward: jax.Array, forward: jax.Array) -> jax.Array:
        return jnp.stack([backward, forward]) if with_gradient else backward[None]

    log_probs_UBV = jax.nn.log_softmax(jnp.swapaxes(logits_BUV, 0, 1), axis=-1)
    label_UBN = jnp.take_along_axis(log_probs_UBV, labels_BN[None], axis=2)
    # Else the paths that run on into the padding of a label would be the best, and those that count far below them.
    in_label_1BN = (jnp.arange(num_labels)[None, :] < label_lengths_B[:, None])[None]
    label_UBN = jnp.where(in_label_1BN, label_UBN, _NEVER)
    blank_UB1 = log_probs_UBV[:, :, BLANK_ID : BLANK_ID + 1]
    turned_RBN = rows(labels_BN[:, ::-1], labels_BN)
    # A label may follow another without a blank between them, unless the two are equal.
    follows_RBN = jnp.pad(turned_RBN[..., 1:] != turned_RBN[..., :-1], ((0, 0), (0, 0), (1, 0)))
    # Before the first frame a path stands at the blank before its first label; turned round, the padding comes first.
    start_RB = rows(num_labels - label_lengths_B, jnp.zeros_like(label_lengths_B))
    at_blank = jnp.where(jnp.arange(num_labels + 1)[None, None, :] == start_RB[..., None], 0.0, _NEVER)
    at_label = jnp.full(turned_RBN.shape, _NEVER)

    def step(carry, frame):
        at_blank, at_label, moved = carry
        back = num_frames - 1 - frame
        label_before = jnp.pad(at_label, ((0, 0), (0, 0), (1, 0)), constant_values=_NEVER)
        to_blank = _add_two(at_blank, label_before)
        to_label = _add_three(at_label, at_blank[..., :-1], jnp.where(follows_RBN, label_before[..., :-1], _NEVER))
        # Else XLA's CPU compiler computes the logarithms again for each of their uses.
        to_blank, to_label = jax.lax.optimization_barrier((to_blank, to_label))
        blank = to_blank + rows(blank_UB1[back], blank_UB1[frame])
        label = to_label + rows(label_UBN[back][:, ::-1], label_UBN[frame])
        best = jnp.maximum(jnp.max(blank, -1, keepdims=True), jnp.max(label, -1, keepdims=True))
        inside = rows(back < lengths_B, frame < lengths_B)[..., None]  # beyond its length a row waits as it is
        carry = (
            jnp.where(inside, blank - best, at_blank),
            jnp.where(inside, label - best, at_label),
            moved + jnp.where(inside, best, 0.0),
        )
        return carry, (to_blank, to_label)

    carry = (at_blank, at_label, jnp.zeros((*start_RB.shape, 1)))
    (at_blank, at_label, moved), before = jax.lax.scan(step, carry, jnp.arange(num_frames))
    loss_B = -(_add_two(at_blank[0, :, -1], at_label[0, :, -1]) + moved[0, :, 0])
    if not with_gradient:
        return loss_B, jnp.zeros((*logits_BUV.shape[:2], 0))

    # Paths up to a state, the state's own frame, and paths on from it: the posterior of the state, frame by frame.
    to_blank, to_label = before
    blank = to_blank[::-1, 0, :, ::-1] + to_blank[:, 1] + blank_UB1
    label = to_label[::-1, 0, :, ::-1] + to_label[:, 1] + label_UBN
    best = jnp.maximum(jnp.max(blank, -1, keepdims=True), jnp.max(label, -1, keepdims=True))
    blank_UB = jnp.sum(jnp.exp(blank - best), axis=-1)
    posterior_UBN = jnp.exp(label - best)
    total_UB = blank_UB + jnp.sum(posterior_UBN, axis=-1)
    valid_BU1 = (jnp.arange(num_frames)[None, :] < lengths_B[:, None])[..., None]
    # By a matmul, not a scatter, whose order of summing is not defined on every device; the blank is one label more,
    # because whatever comes after the matmul is done for every class.
    posterior_UBN = jnp.concatenate([blank_UB[..., None], posterior_UBN], axis=-1) / total_UB[..., None]
    labels_BN = jnp.pad(labels_BN, ((0, 0), (1, 0)), constant_values=BLANK_ID)
    is_class_BNV = jax.nn.one_hot(labels_BN, logits_BUV.shape[2])
    occupied_BUV = jnp.einsum("ubn,bnv->buv", posterior_UBN, is_class_BNV, precision=jax.lax.Precision.HIGHEST)
    return loss_B, jnp.where(valid_BU1, jnp.exp(jnp.swapaxes(log_probs_UBV, 0, 1)) - occupied_BUV, 0.0)


def _add_two(a: jax.Array, b: jax.Array) -> jax.Array:
    """log(exp(a) + exp(b))."""
    return jnp.maximum(a, b) + jnp.log(1.0 + jnp.exp(-jnp.abs(a - b)))


def _add_three(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """log(exp(a) + exp(b) + exp(c)), of which the largest is not computed: exp(0) = 1."""
    high, low = jnp.maximum(a, b), jnp.minimum(a, b)
    largest, middle = jnp.maximum(high, c), jnp.minimum(high, c)
    return largest + jnp.log(1.0 + jnp.exp(low - largest) + jnp.exp(middle - largest))
