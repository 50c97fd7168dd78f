"""One step of minGRU and its derivative: what every form of the recurrence is made of; the maths only.

Everything is elementwise and in float32, for arrays of any shape.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Candidate = Literal["linear", "g"]


def activate_candidate(v: jax.Array, candidate_fn: Candidate) -> jax.Array:
    """The candidate state of a pre-activation: v itself, or g(v) = v + 0.5 if v >= 0 else sigmoid(v).

    Feng et al. 2024, arXiv 2410.01201, section 3.1 (linear) and appendix B (g).
    """
    return v if candidate_fn == "linear" else jnp.where(v >= 0, v + 0.5, jax.nn.sigmoid(v))


def step(gate: jax.Array, v: jax.Array, h: jax.Array, candidate_fn: Candidate) -> jax.Array:
    """The new state (1 - z) h + z c, float32, with z = sigmoid(gate) and c the candidate state of v."""
    z = jax.nn.sigmoid(gate.astype(jnp.float32))
    return h + z * (activate_candidate(v.astype(jnp.float32), candidate_fn) - h)


def step_gradient(
    gate: jax.Array, v: jax.Array, h_before: jax.Array, dh: jax.Array, candidate_fn: Candidate
) -> tuple[jax.Array, jax.Array]:
    """The derivative of `step` by its pre-activations: dgate and dv, float32.

    Args:
      gate: pre-activation of the update gate.
      v: pre-activation of the candidate state.
      h_before: the state that the step started from.
      dh: derivative of the loss by the step's result, over all paths.
      candidate_fn: `linear` or `g`.
    """
    z = jax.nn.sigmoid(gate.astype(jnp.float32))
    v = v.astype(jnp.float32)
    c = activate_candidate(v, candidate_fn)
    dc = dh * z
    dgate = dc * (c - h_before.astype(jnp.float32)) * (1 - z)
    if candidate_fn == "linear":
        return dgate, dc
    return dgate, dc * jnp.where(v >= 0, 1.0, c * (1 - c))  # below 0 c is the sigmoid


def decay(gate: jax.Array) -> jax.Array:
    """1 - z, what a step keeps of the state before it and of the gradient after it, float32."""
    return jax.nn.sigmoid(-gate.astype(jnp.float32))
