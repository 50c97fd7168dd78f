"""The recurrence of minGRU, in forms that run in parallel, step by step, or in one fused pass; the maths only.

Arrays are time-major, (T, B, D): each step of a sequential form then reads and writes one contiguous slab
(docs/adr/0001-time-major.md). All forms work in float32 inside whatever the dtype of their inputs, and all give the
same values and gradients (tests/test_scan.py).

- `associative`: `jax.lax.associative_scan`, O(log T) deep: the form of the minGRU paper's parallel training, and the
  default on accelerators.
- `sequential`: `jax.lax.scan`, differentiated by JAX: the plain twin that also exports with symbolic time.
- `fused`: one `jax.lax.scan` that computes the gates inside the pass, with a reverse rule that keeps nothing of size
  (T, B, D) but its inputs and its output: the default on the CPU.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Implementation = Literal["auto", "associative", "sequential", "fused"]
Candidate = Literal["linear", "g"]


def choose(implementation: Implementation) -> Literal["associative", "sequential", "fused"]:
    """The form that `auto` stands for on the default device."""
    if implementation == "auto":
        return "fused" if jax.default_backend() == "cpu" else "associative"
    return implementation


def linear_recurrence(
    a_TBD: jax.Array,
    b_TBD: jax.Array,
    h0_BD: jax.Array | None = None,
    *,
    reverse: bool = False,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = a_t h_{t-1} + b_t.

    Args:
      a_TBD: decay, any float dtype.
      b_TBD: input, any float dtype.
      h0_BD: state before the first step in scan order (with `reverse` that is the right edge); None is zero.
      reverse: run from the last step to the first: h_t = a_t h_{t+1} + b_t.
      implementation: see the module's docstring.

    Returns:
      h_TBD in b's dtype, and the state after the last step in scan order, h_BD in float32.
    """
    h0_BD = _initial_state(h0_BD, b_TBD)
    form = choose(implementation)
    if form == "associative":
        h_TBD = _associative(a_TBD.astype(jnp.float32), b_TBD.astype(jnp.float32), h0_BD, reverse)
        return h_TBD.astype(b_TBD.dtype), h_TBD[0 if reverse else -1]
    if form == "sequential":
        return _scan_linear(a_TBD, b_TBD, h0_BD, reverse)
    return _fused_linear(a_TBD, b_TBD, h0_BD, reverse)


def mingru_recurrence(
    gate_TBD: jax.Array,
    candidate_TBD: jax.Array,
    h0_BD: jax.Array | None = None,
    *,
    candidate_fn: Candidate = "linear",
    reverse: bool = False,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = (1 - z_t) h_{t-1} + z_t c_t with z = sigmoid(gate), c = candidate or g(candidate).

    Feng et al. 2024, "Were RNNs all we needed?", arXiv 2410.01201, section 3.1 (linear candidate) and appendix B (g).
    A gate pre-activation of -1e9 gives z = 0 exactly, so the state passes through such a step unchanged.

    Args:
      gate_TBD: pre-activation of the update gate, any float dtype.
      candidate_TBD: pre-activation of the candidate state, same shape.
      h0_BD: state before the first step in scan order; None is zero.
      candidate_fn: `linear` or `g`.
      reverse: run from the last step to the first.
      implementation: see the module's docstring.

    Returns:
      h_TBD in candidate's dtype, and the state after the last step in scan order, h_BD in float32.
    """
    h0_BD = _initial_state(h0_BD, candidate_TBD)
    form = choose(implementation)
    if form == "associative":
        gate_TBD = gate_TBD.astype(jnp.float32)
        c_TBD = activate_candidate(candidate_TBD.astype(jnp.float32), candidate_fn)
        h_TBD = _associative(jax.nn.sigmoid(-gate_TBD), jax.nn.sigmoid(gate_TBD) * c_TBD, h0_BD, reverse)
        return h_TBD.astype(candidate_TBD.dtype), h_TBD[0 if reverse else -1]
    if form == "sequential":
        return _scan_mingru(gate_TBD, candidate_TBD, h0_BD, candidate_fn, reverse)
    return _fused_mingru(gate_TBD, candidate_TBD, h0_BD, candidate_fn, reverse)


def mingru_step(gate_BD: jax.Array, candidate_BD: jax.Array, h_BD: jax.Array, *, candidate_fn: Candidate) -> jax.Array:
    """One step of `mingru_recurrence`: the new state, float32. Every sequential form is made of this."""
    z_BD = jax.nn.sigmoid(gate_BD.astype(jnp.float32))
    return h_BD + z_BD * (activate_candidate(candidate_BD.astype(jnp.float32), candidate_fn) - h_BD)


def activate_candidate(v: jax.Array, candidate_fn: Candidate) -> jax.Array:
    """The candidate state of a pre-activation: v itself, or g(v) = v + 0.5 if v >= 0 else sigmoid(v) (appendix B)."""
    return v if candidate_fn == "linear" else jnp.where(v >= 0, v + 0.5, jax.nn.sigmoid(v))


def _candidate_slope(v: jax.Array, candidate_fn: Candidate) -> jax.Array:
    s = jax.nn.sigmoid(v)
    return jnp.ones_like(v) if candidate_fn == "linear" else jnp.where(v >= 0, jnp.ones_like(v), s * (1 - s))


def _initial_state(h0_BD: jax.Array | None, like_TBD: jax.Array) -> jax.Array:
    return jnp.zeros(like_TBD.shape[1:], jnp.float32) if h0_BD is None else h0_BD.astype(jnp.float32)


def _associative(a_TBD: jax.Array, b_TBD: jax.Array, h0_BD: jax.Array, reverse: bool) -> jax.Array:
    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    first = -1 if reverse else 0
    b_TBD = b_TBD.at[first].add(a_TBD[first] * h0_BD)
    return lax.associative_scan(combine, (a_TBD, b_TBD), axis=0, reverse=reverse)[1]


def _scan_linear(a_TBD: jax.Array, b_TBD: jax.Array, h0_BD: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    def step(h_BD: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_BD = ab[0].astype(jnp.float32) * h_BD + ab[1].astype(jnp.float32)
        return h_BD, h_BD.astype(b_TBD.dtype)

    h_last_BD, h_TBD = lax.scan(step, h0_BD, (a_TBD, b_TBD), reverse=reverse)
    return h_TBD, h_last_BD


def _scan_mingru(
    gate_TBD: jax.Array, candidate_TBD: jax.Array, h0_BD: jax.Array, candidate_fn: Candidate, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    def step(h_BD: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_BD = mingru_step(*x, h_BD, candidate_fn=candidate_fn)
        return h_BD, h_BD.astype(candidate_TBD.dtype)

    h_last_BD, h_TBD = lax.scan(step, h0_BD, (gate_TBD, candidate_TBD), reverse=reverse)
    return h_TBD, h_last_BD


# The fused forms. With lambda_t = dL/dh_t summed over all paths, the reverse pass is the recurrence itself run the
# other way, lambda_t = dh_t + a_{t+1} lambda_{t+1}; the rest is elementwise in (inputs, h_{t-1}, lambda_t).


def _state_before(h_TBD: jax.Array, h0_BD: jax.Array, t: jax.Array, reverse: bool) -> jax.Array:
    """The state that step t started from. Read inside the pass: a shifted copy of h would cost another (T, B, D)."""
    last = h_TBD.shape[0] - 1
    previous = t + 1 if reverse else t - 1
    inside = previous <= last if reverse else previous >= 0
    h_BD = lax.dynamic_index_in_dim(h_TBD, jnp.clip(previous, 0, last), 0, keepdims=False)
    return jnp.where(inside, h_BD.astype(jnp.float32), h0_BD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused_linear(a_TBD: jax.Array, b_TBD: jax.Array, h0_BD: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    return _scan_linear(a_TBD, b_TBD, h0_BD, reverse)


def _fused_linear_fwd(a_TBD, b_TBD, h0_BD, reverse):
    h_TBD, h_last_BD = _scan_linear(a_TBD, b_TBD, h0_BD, reverse)
    return (h_TBD, h_last_BD), (a_TBD, h_TBD, h0_BD)


def _fused_linear_bwd(reverse, residuals, cotangents):
    a_TBD, h_TBD, h0_BD = residuals
    dh_TBD, dh_last_BD = cotangents

    def step(carry_BD, x):
        dh_BD, a_BD, t = x
        lambda_BD = dh_BD.astype(jnp.float32) + carry_BD
        da_BD = lambda_BD * _state_before(h_TBD, h0_BD, t, reverse)
        return a_BD.astype(jnp.float32) * lambda_BD, (da_BD.astype(a_TBD.dtype), lambda_BD.astype(dh_TBD.dtype))

    steps = jnp.arange(a_TBD.shape[0])
    dh0_BD, (da_TBD, db_TBD) = lax.scan(step, dh_last_BD, (dh_TBD, a_TBD, steps), reverse=not reverse)
    return da_TBD, db_TBD, dh0_BD


_fused_linear.defvjp(_fused_linear_fwd, _fused_linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused_mingru(
    gate_TBD: jax.Array, candidate_TBD: jax.Array, h0_BD: jax.Array, candidate_fn: Candidate, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    return _scan_mingru(gate_TBD, candidate_TBD, h0_BD, candidate_fn, reverse)


def _fused_mingru_fwd(gate_TBD, candidate_TBD, h0_BD, candidate_fn, reverse):
    h_TBD, h_last_BD = _scan_mingru(gate_TBD, candidate_TBD, h0_BD, candidate_fn, reverse)
    return (h_TBD, h_last_BD), (gate_TBD, candidate_TBD, h_TBD, h0_BD)


def _fused_mingru_bwd(candidate_fn, reverse, residuals, cotangents):
    gate_TBD, candidate_TBD, h_TBD, h0_BD = residuals
    dh_TBD, dh_last_BD = cotangents

    def step(carry_BD, x):
        dh_BD, gate_BD, v_BD, t = x
        lambda_BD = dh_BD.astype(jnp.float32) + carry_BD
        z_BD = jax.nn.sigmoid(gate_BD.astype(jnp.float32))
        v_BD = v_BD.astype(jnp.float32)
        h_before_BD = _state_before(h_TBD, h0_BD, t, reverse)
        dgate_BD = lambda_BD * (activate_candidate(v_BD, candidate_fn) - h_before_BD) * z_BD * (1 - z_BD)
        dv_BD = lambda_BD * z_BD * _candidate_slope(v_BD, candidate_fn)
        return (1 - z_BD) * lambda_BD, (dgate_BD.astype(gate_TBD.dtype), dv_BD.astype(candidate_TBD.dtype))

    steps = jnp.arange(gate_TBD.shape[0])
    xs = (dh_TBD, gate_TBD, candidate_TBD, steps)
    dh0_BD, (dgate_TBD, dcandidate_TBD) = lax.scan(step, dh_last_BD, xs, reverse=not reverse)
    return dgate_TBD, dcandidate_TBD, dh0_BD


_fused_mingru.defvjp(_fused_mingru_fwd, _fused_mingru_bwd)
