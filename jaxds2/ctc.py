"""Connectionist temporal classification (Graves et al. 2006): the loss, and which labels fit their frames at all."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxds2.text import BLANK_ID


def min_frames(label: Sequence[int]) -> int:
    """Fewest frames that can spell a label: one per label, and a blank between equal neighbours."""
    return len(label) + sum(a == b for a, b in itertools.pairwise(label))


def feasible(logit_lengths_B: jax.Array, labels_BN: jax.Array, label_lengths_B: jax.Array) -> jax.Array:
    """Whether each label fits its frames, bool (B,); a row without frames never does."""
    both = jnp.arange(1, labels_BN.shape[1])[None, :] < label_lengths_B[:, None]
    repeats_B = jnp.sum((labels_BN[:, 1:] == labels_BN[:, :-1]) & both, axis=1)
    return (logit_lengths_B >= label_lengths_B + repeats_B) & (logit_lengths_B > 0)


def ctc_loss(
    logits_BUV: jax.Array, logit_lengths_B: jax.Array, labels_BN: jax.Array, label_lengths_B: jax.Array
) -> jax.Array:
    """Negative log-likelihood of each label, in nats, float32 (B,).

    Rows that cannot fit (see `feasible`), whose likelihood is zero, give 0 and no gradient; a mean must not count them.
    Computed by optax in float32 whatever the dtype of the logits; tiny negative values, which its arithmetic can give
    for near-certain labels, are clamped to 0.

    Args:
      logits_BUV: class BLANK_ID is the blank; what stands beyond an utterance's length is ignored.
      logit_lengths_B: valid frames.
      labels_BN: label ids, no blanks within the label length.
      label_lengths_B: labels of each row.
    """
    ok_B = feasible(logit_lengths_B, labels_BN, label_lengths_B)
    padded_frames_BU = jnp.arange(logits_BUV.shape[1])[None, :] >= logit_lengths_B[:, None]
    padded_labels_BN = jnp.arange(labels_BN.shape[1])[None, :] >= label_lengths_B[:, None]
    # Where a row is out, so are its logits: a NaN there must not reach the gradient through 0 * NaN.
    usable_BU1 = (ok_B[:, None] & ~padded_frames_BU)[..., None]
    loss_B = optax.ctc_loss(
        jnp.where(usable_BU1, logits_BUV.astype(jnp.float32), 0.0),
        padded_frames_BU.astype(jnp.float32),
        labels_BN,
        padded_labels_BN.astype(jnp.float32),
        blank_id=BLANK_ID,
    )
    return jnp.where(ok_B, jnp.maximum(loss_B, 0.0), 0.0)
