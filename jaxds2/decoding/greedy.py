"""Best path decoding: the most likely class of each frame, collapsed (Graves et al. 2006, section 3.2)."""

from collections.abc import Iterable
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from jaxds2.text import BLANK_ID, Vocabulary


def greedy_ids(logits_BUV: jax.Array, logit_lengths_B: jax.Array) -> jax.Array:
    """ids_BU (int32): the most likely class of each frame, blank beyond the lengths. It may run under jit.

    Log-probabilities do as well as logits.
    """
    ids_BU = jnp.argmax(logits_BUV, axis=-1).astype(jnp.int32)
    frames_1U = jnp.arange(ids_BU.shape[1])[None, :]
    return jnp.where(frames_1U < logit_lengths_B[:, None], ids_BU, BLANK_ID)


def collapse(ids_U: Iterable[int]) -> list[int]:
    """The labels of a path: runs of a class merged first, blanks dropped then, so a blank parts two equal labels."""
    return [int(i) for i, _ in groupby(ids_U) if i != BLANK_ID]


def greedy_decode(log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> str:
    """The text of one utterance's best path, on the host, with single spaces between words.

    Args:
      log_probs_UV: log-probabilities or logits of its own frames, without padding.
      vocabulary: its characters are the classes 1 ... V - 1.
    """
    return " ".join(vocabulary.decode(collapse(log_probs_UV.argmax(axis=-1).tolist())).split())
