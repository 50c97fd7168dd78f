"""The recurrence of minGRU, in forms that run in parallel, step by step, or in one fused pass; the maths only.

Arrays are time-major, (T, B, D): each step of a sequential form then reads and writes one contiguous slab
(docs/adr/0001-time-major.md). All forms work in float32 inside whatever the dtype of their inputs, and all give the
same values and gradients (tests/test_scan.py).

- `associative`: `jax.lax.associative_scan`, O(log T) deep: the form of the minGRU paper's parallel training. Its
  reverse rule is another associative scan.
- `sequential`: `jax.lax.scan`, differentiated by JAX: the plain twin that also exports with symbolic time.
- `fused`: one pass over time that computes the gates inside, with a reverse rule that keeps nothing of size (T, B, D)
  but its inputs and its output: the default. On a CPU it is a `jax.lax.scan`. On an NVIDIA GPU a layer is one kernel
  (mingru_kernel.py) where that has been found to work and the width is a multiple of 128; see `has_kernel`. On an
  accelerator without it the associative form takes its place, since a loop of thousands of small steps is slow there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxds2.model import mingru_kernel
from jaxds2.model.cell import Candidate, activate_candidate, decay, step, step_gradient
from jaxds2.mosaic import on_own_rows

Implementation = Literal["auto", "associative", "sequential", "fused"]

FROZEN = -1e9
"""Gate pre-activation whose sigmoid is exactly 0: the state passes through unchanged."""


def choose(implementation: Implementation) -> Literal["associative", "sequential", "fused"]:
    """The form that `auto` stands for."""
    return "fused" if implementation == "auto" else implementation


def has_kernel(implementation: Implementation, width: int) -> bool:
    """Whether `mingru_layer` is one kernel on the default device, for directions of so many states.

    Then a layer's pre-activations are best made side by side; else each by a matmul of its own.
    """
    return choose(implementation) == "fused" and mingru_kernel.why_not(width) is None


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
    if form == "sequential":
        return _scan_linear(a_TBD, b_TBD, h0_BD, reverse)
    return _linear(a_TBD, b_TBD, h0_BD, reverse, form)


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
    (h_TBD,), (h_last_BD,) = mingru_recurrences(
        (gate_TBD,),
        (candidate_TBD,),
        (h0_BD,),
        candidate_fn=candidate_fn,
        reverses=(reverse,),
        implementation=implementation,
    )
    return h_TBD, h_last_BD


def mingru_recurrences(
    gates: Sequence[jax.Array],
    candidates: Sequence[jax.Array],
    h0s: Sequence[jax.Array | None],
    *,
    candidate_fn: Candidate,
    reverses: Sequence[bool],
    implementation: Implementation,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """`mingru_recurrence` of all directions of a layer.

    Args:
      gates: gate_TBD of each direction.
      candidates: candidate_TBD of each.
      h0s: h0_BD or None of each.
      candidate_fn: `linear` or `g`.
      reverses: whether a direction runs from the last step to the first.
      implementation: see the module's docstring.

    Returns:
      h_TBD of each direction, and h_last_BD of each.
    """
    states = tuple(map(_initial_state, h0s, candidates))
    form = choose(implementation)
    if form == "sequential":
        hs, lasts = _each_way(_scan_mingru, gates, candidates, states, reverses, candidate_fn=candidate_fn)
        return hs, lasts
    return _mingru(tuple(gates), tuple(candidates), states, candidate_fn, tuple(reverses), form)


def mingru_layer(
    pre_TBE: jax.Array,
    bias_E: jax.Array,
    lengths_B: jax.Array,
    h0_BH: jax.Array | None = None,
    *,
    candidate_fn: Candidate,
    reverses: tuple[bool, ...],
    implementation: Implementation,
) -> tuple[jax.Array, jax.Array]:
    """`mingru_recurrences` of arrays that hold the directions of a layer side by side, biases and padding included.

    H is the number of states of all directions. E = 2 H: gate and candidate of the first direction, then of the next.

    Args:
      pre_TBE: pre-activations without their biases, any float dtype; what stands beyond a length is ignored.
      bias_E: added to them in float32.
      lengths_B: steps of each utterance, int32; beyond them the state is frozen.
      h0_BH: state before the first step in scan order; None is zero.
      candidate_fn: `linear` or `g`.
      reverses: for each direction whether it runs from the last step to the first.
      implementation: see the module's docstring.

    Returns:
      h_TBH in the dtype of pre_TBE, and the state after the last step in scan order, h_BH in float32.
    """
    states = bias_E.shape[0] // 2
    h0_BH = jnp.zeros((pre_TBE.shape[1], states), jnp.float32) if h0_BH is None else h0_BH.astype(jnp.float32)
    if pre_TBE.shape[0] and has_kernel(implementation, states // len(reverses)):
        lengths_B1 = lengths_B.astype(jnp.int32)[:, None]
        return _mingru_kernel(pre_TBE, bias_E.astype(jnp.float32), lengths_B1, h0_BH, candidate_fn, reverses)
    valid_TB1 = (jnp.arange(pre_TBE.shape[0])[:, None] < lengths_B[None, :])[..., None]
    parts = jnp.split(pre_TBE.astype(jnp.float32) + bias_E.astype(jnp.float32)[None, None], 2 * len(reverses), axis=-1)
    hs, lasts = mingru_recurrences(
        [jnp.where(valid_TB1, gate_TBD, FROZEN) for gate_TBD in parts[::2]],
        [jnp.where(valid_TB1, candidate_TBD, 0.0) for candidate_TBD in parts[1::2]],
        jnp.split(h0_BH, len(reverses), axis=-1),
        candidate_fn=candidate_fn,
        reverses=reverses,
        implementation=implementation,
    )
    return jnp.concatenate(hs, axis=-1).astype(pre_TBE.dtype), jnp.concatenate(lasts, axis=-1)


def mingru_step(gate_BD: jax.Array, candidate_BD: jax.Array, h_BD: jax.Array, *, candidate_fn: Candidate) -> jax.Array:
    """One step of `mingru_recurrence`: the new state, float32."""
    return step(gate_BD, candidate_BD, h_BD, candidate_fn)


def _initial_state(h0_BD: jax.Array | None, like_TBD: jax.Array) -> jax.Array:
    return jnp.zeros(like_TBD.shape[1:], jnp.float32) if h0_BD is None else h0_BD.astype(jnp.float32)


# The plain passes over time.


def _scan_linear(a_TBD: jax.Array, b_TBD: jax.Array, h0_BD: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    def one(h_BD: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_BD = ab[0].astype(jnp.float32) * h_BD + ab[1].astype(jnp.float32)
        return h_BD, h_BD.astype(b_TBD.dtype)

    h_last_BD, h_TBD = lax.scan(one, h0_BD, (a_TBD, b_TBD), reverse=reverse)
    return h_TBD, h_last_BD


def _scan_mingru(
    gate_TBD: jax.Array, candidate_TBD: jax.Array, h0_BD: jax.Array, reverse: bool, candidate_fn: Candidate
) -> tuple[jax.Array, jax.Array]:
    def one(h_BD: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_BD = step(*x, h_BD, candidate_fn)
        return h_BD, h_BD.astype(candidate_TBD.dtype)

    h_last_BD, h_TBD = lax.scan(one, h0_BD, (gate_TBD, candidate_TBD), reverse=reverse)
    return h_TBD, h_last_BD


def _associative_linear(
    a_TBD: jax.Array, b_TBD: jax.Array, h0_BD: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    def combine(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    first, last = (-1, 0) if reverse else (0, -1)
    a_TBD = a_TBD.astype(jnp.float32)
    start_TBD = b_TBD.astype(jnp.float32).at[first].add(a_TBD[first] * h0_BD)
    h_TBD = lax.associative_scan(combine, (a_TBD, start_TBD), axis=0, reverse=reverse)[1]
    return h_TBD.astype(b_TBD.dtype), h_TBD[last]


def _associative_mingru(
    gate_TBD: jax.Array, candidate_TBD: jax.Array, h0_BD: jax.Array, reverse: bool, candidate_fn: Candidate
) -> tuple[jax.Array, jax.Array]:
    z_TBD = jax.nn.sigmoid(gate_TBD.astype(jnp.float32))
    c_TBD = activate_candidate(candidate_TBD.astype(jnp.float32), candidate_fn)
    h_TBD, h_last_BD = _associative_linear(decay(gate_TBD), z_TBD * c_TBD, h0_BD, reverse)
    return h_TBD.astype(candidate_TBD.dtype), h_last_BD


# Their reverse rules. With lambda_t = dL/dh_t summed over all paths, the reverse pass is the recurrence itself run the
# other way, lambda_t = dh_t + a_{t+1} lambda_{t+1}; the rest is elementwise in (inputs, h_{t-1}, lambda_t).


def _lambdas(a_TBD: jax.Array, dh_TBD: jax.Array, dh_last_BD: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """lambda_TBD, and the derivative by the initial state."""
    ones_1BD = jnp.ones_like(a_TBD[:1])  # the last state is the last step's result
    after_TBD = jnp.concatenate([ones_1BD, a_TBD[:-1]] if reverse else [a_TBD[1:], ones_1BD])
    lambda_TBD, lambda_first_BD = _associative_linear(after_TBD, dh_TBD.astype(jnp.float32), dh_last_BD, not reverse)
    return lambda_TBD, a_TBD[-1 if reverse else 0] * lambda_first_BD


def _states_before(h_TBD: jax.Array, h0_BD: jax.Array, reverse: bool) -> jax.Array:
    """The state that each step started from."""
    h_TBD, h0_1BD = h_TBD.astype(jnp.float32), h0_BD[None]
    return jnp.concatenate([h_TBD[1:], h0_1BD] if reverse else [h0_1BD, h_TBD[:-1]])


def _state_before(h_TBD: jax.Array, h0_BD: jax.Array, t: jax.Array, reverse: bool) -> jax.Array:
    """One of `_states_before`. Read inside the pass: a shifted copy of h would cost another (T, B, D)."""
    last = h_TBD.shape[0] - 1
    previous = t + 1 if reverse else t - 1
    inside = previous <= last if reverse else previous >= 0
    h_BD = lax.dynamic_index_in_dim(h_TBD, jnp.clip(previous, 0, last), 0, keepdims=False)
    return jnp.where(inside, h_BD.astype(jnp.float32), h0_BD)


def _associative_linear_gradient(a_TBD, h_TBD, h0_BD, dh_TBD, dh_last_BD, reverse):
    lambda_TBD, dh0_BD = _lambdas(a_TBD.astype(jnp.float32), dh_TBD, dh_last_BD, reverse)
    da_TBD = lambda_TBD * _states_before(h_TBD, h0_BD, reverse)
    return da_TBD.astype(a_TBD.dtype), lambda_TBD.astype(dh_TBD.dtype), dh0_BD


def _scan_linear_gradient(a_TBD, h_TBD, h0_BD, dh_TBD, dh_last_BD, reverse):
    def one(carry_BD, x):
        dh_BD, a_BD, t = x
        lambda_BD = dh_BD.astype(jnp.float32) + carry_BD
        da_BD = lambda_BD * _state_before(h_TBD, h0_BD, t, reverse)
        return a_BD.astype(jnp.float32) * lambda_BD, (da_BD.astype(a_TBD.dtype), lambda_BD.astype(dh_TBD.dtype))

    steps = jnp.arange(a_TBD.shape[0])
    dh0_BD, (da_TBD, db_TBD) = lax.scan(one, dh_last_BD, (dh_TBD, a_TBD, steps), reverse=not reverse)
    return da_TBD, db_TBD, dh0_BD


def _associative_mingru_gradient(gate_TBD, candidate_TBD, h_TBD, h0_BD, dh_TBD, dh_last_BD, reverse, candidate_fn):
    lambda_TBD, dh0_BD = _lambdas(decay(gate_TBD), dh_TBD, dh_last_BD, reverse)
    before_TBD = _states_before(h_TBD, h0_BD, reverse)
    dgate_TBD, dv_TBD = step_gradient(gate_TBD, candidate_TBD, before_TBD, lambda_TBD, candidate_fn)
    return dgate_TBD.astype(gate_TBD.dtype), dv_TBD.astype(candidate_TBD.dtype), dh0_BD


def _scan_mingru_gradient(gate_TBD, candidate_TBD, h_TBD, h0_BD, dh_TBD, dh_last_BD, reverse, candidate_fn):
    def one(carry_BD, x):
        dh_BD, gate_BD, v_BD, t = x
        lambda_BD = dh_BD.astype(jnp.float32) + carry_BD
        before_BD = _state_before(h_TBD, h0_BD, t, reverse)
        dgate_BD, dv_BD = step_gradient(gate_BD, v_BD, before_BD, lambda_BD, candidate_fn)
        return decay(gate_BD) * lambda_BD, (dgate_BD.astype(gate_TBD.dtype), dv_BD.astype(candidate_TBD.dtype))

    xs = (dh_TBD, gate_TBD, candidate_TBD, jnp.arange(gate_TBD.shape[0]))
    dh0_BD, (dgate_TBD, dcandidate_TBD) = lax.scan(one, dh_last_BD, xs, reverse=not reverse)
    return dgate_TBD, dcandidate_TBD, dh0_BD


# The forms that carry a reverse rule of their own: `associative` and `fused`.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(
    a_TBD: jax.Array, b_TBD: jax.Array, h0_BD: jax.Array, reverse: bool, form: str
) -> tuple[jax.Array, jax.Array]:
    run = _scan_linear if _passes_over_time(form) else _associative_linear
    return run(a_TBD, b_TBD, h0_BD, reverse)


def _linear_fwd(a_TBD, b_TBD, h0_BD, reverse, form):
    states: Any = _linear(a_TBD, b_TBD, h0_BD, reverse, form)
    return states, (a_TBD, states[0], h0_BD)


def _linear_bwd(reverse, form, residuals, cotangents):
    a_TBD, h_TBD, h0_BD = residuals
    dh_TBD, dh_last_BD = cotangents
    run = _scan_linear_gradient if _passes_over_time(form) else _associative_linear_gradient
    return run(a_TBD, h_TBD, h0_BD, dh_TBD, dh_last_BD, reverse)


_linear.defvjp(_linear_fwd, _linear_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _mingru(
    gates: tuple[jax.Array, ...],
    candidates: tuple[jax.Array, ...],
    h0s: tuple[jax.Array, ...],
    candidate_fn: Candidate,
    reverses: tuple[bool, ...],
    form: str,
) -> Any:
    """(h_TBD of each direction, h_last_BD of each)."""
    run = _scan_mingru if _passes_over_time(form) else _associative_mingru
    return _each_way(run, gates, candidates, h0s, reverses, candidate_fn=candidate_fn)


def _mingru_fwd(gates, candidates, h0s, candidate_fn, reverses, form):
    states: Any = _mingru(gates, candidates, h0s, candidate_fn, reverses, form)
    return states, (gates, candidates, states[0], h0s)


def _mingru_bwd(candidate_fn, reverses, form, residuals, cotangents):
    gates, candidates, hs, h0s = residuals
    run = _scan_mingru_gradient if _passes_over_time(form) else _associative_mingru_gradient
    return _each_way(run, gates, candidates, hs, h0s, *cotangents, reverses, candidate_fn=candidate_fn)


_mingru.defvjp(_mingru_fwd, _mingru_bwd)


def _each_way(run: Callable[..., tuple], *kinds: Sequence, candidate_fn: Candidate) -> tuple[tuple, ...]:
    """`run` for each direction, given one of every kind of input; its results by kind."""
    return tuple(zip(*(run(*way, candidate_fn) for way in zip(*kinds, strict=True)), strict=True))


def _passes_over_time(form: str) -> bool:
    """Whether a form is a `lax.scan` on the default device."""
    return form == "fused" and jax.default_backend() == "cpu"


# The kernel.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _mingru_kernel(
    pre_TBE: jax.Array,
    bias_E: jax.Array,
    lengths_B1: jax.Array,
    h0_BH: jax.Array,
    candidate_fn: Candidate,
    reverses: tuple[bool, ...],
) -> Any:
    kernel = functools.partial(mingru_kernel.forward, candidate_fn=candidate_fn, reverses=reverses)
    return on_own_rows(kernel, pre_TBE, bias_E, lengths_B1, h0_BH)


def _mingru_kernel_fwd(pre_TBE, bias_E, lengths_B1, h0_BH, candidate_fn, reverses):
    states: Any = _mingru_kernel(pre_TBE, bias_E, lengths_B1, h0_BH, candidate_fn, reverses)
    return states, (pre_TBE, bias_E, lengths_B1, states[0], h0_BH)


def _mingru_kernel_bwd(candidate_fn, reverses, residuals, cotangents):
    kernel = functools.partial(mingru_kernel.backward, candidate_fn=candidate_fn, reverses=reverses)
    dpre_TBE, dbias_BE, dh0_BH = on_own_rows(kernel, *residuals, *cotangents)
    return dpre_TBE, jnp.sum(dbias_BE, axis=0), None, dh0_BH


_mingru_kernel.defvjp(_mingru_kernel_fwd, _mingru_kernel_bwd)
