"""Every form of the recurrence is the same function: values, gradients, both directions, with and without a start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations

from jaxds2.model.cell import Candidate, activate_candidate
from jaxds2.model.scan import Implementation, linear_recurrence, mingru_recurrence, mingru_recurrences, mingru_step

FORMS: list[Implementation] = ["associative", "sequential", "fused"]
CANDIDATES: list[Candidate] = ["linear", "g"]


def inputs(T: int, seed: int = 0, B: int = 2, D: int = 3) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(T, B, D), (T, B, D), (B, D)]
    return [2 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def mingru_by_definition(gate, candidate, h0, candidate_fn: Candidate, reverse: bool):
    """The paper's equations in float64 NumPy, one frame at a time."""
    gate, candidate, h = (np.asarray(x, np.float64) for x in (gate, candidate, h0))
    z = 1 / (1 + np.exp(-gate))
    c = candidate
    if candidate_fn == "g":
        c = np.where(candidate >= 0, candidate + 0.5, 1 / (1 + np.exp(-candidate)))
    out = np.zeros_like(gate)
    for t in reversed(range(len(gate))) if reverse else range(len(gate)):
        h = (1 - z[t]) * h + z[t] * c[t]
        out[t] = h
    return out, h


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("candidate_fn", CANDIDATES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [1, 2, 7, 64, 101])
def test_every_form_equals_the_definition(form, candidate_fn: Candidate, reverse, T):
    gate, candidate, h0 = inputs(T)
    h, last = mingru_recurrence(gate, candidate, h0, candidate_fn=candidate_fn, reverse=reverse, implementation=form)
    want, want_last = mingru_by_definition(gate, candidate, h0, candidate_fn, reverse)
    np.testing.assert_allclose(h, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(last, want_last, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("form", ["associative", "fused"])
@pytest.mark.parametrize("candidate_fn", CANDIDATES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [1, 2, 33])
def test_gradients_equal_those_of_the_sequential_form(form, candidate_fn: Candidate, reverse, T):
    weights, weights_last = inputs(T, seed=1)[0], inputs(T, seed=2)[2]

    def loss(implementation, gate, candidate, h0):
        h, last = mingru_recurrence(
            gate, candidate, h0, candidate_fn=candidate_fn, reverse=reverse, implementation=implementation
        )
        return jnp.sum(weights * h) + jnp.sum(weights_last * last)

    got = jax.grad(loss, argnums=(1, 2, 3))(form, *inputs(T))
    want = jax.grad(loss, argnums=(1, 2, 3))("sequential", *inputs(T))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_directions_together_equal_each_by_itself(form):
    gates, candidates, h0s = map(tuple, zip(inputs(9), inputs(9, seed=1), strict=True))
    reverses = (False, True)

    def together(gates, candidates, h0s):
        return mingru_recurrences(gates, candidates, h0s, candidate_fn="g", reverses=reverses, implementation=form)

    def apart(gates, candidates, h0s):
        ways = zip(gates, candidates, h0s, reverses, strict=True)
        hs, lasts = zip(
            *(
                mingru_recurrence(g, c, h0, candidate_fn="g", reverse=reverse, implementation=form)
                for g, c, h0, reverse in ways
            ),
            strict=True,
        )
        return hs, lasts

    got, pull_got = jax.vjp(together, gates, candidates, h0s)
    want, pull_want = jax.vjp(apart, gates, candidates, h0s)
    for g, w in zip(jax.tree.leaves((got, pull_got(want))), jax.tree.leaves((want, pull_want(want))), strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_recurrence_and_its_gradient(form, reverse):
    T = 19
    gate, b, h0 = inputs(T)
    a = jax.nn.sigmoid(gate)
    weights = inputs(T, seed=1)[0]

    def unrolled(a, b, h0):
        h, out = h0, [h0] * T
        for t in reversed(range(T)) if reverse else range(T):
            h = a[t] * h + b[t]
            out[t] = h
        return jnp.sum(weights * jnp.stack(out)) + jnp.sum(h**2)

    def loss(a, b, h0):
        h, last = linear_recurrence(a, b, h0, reverse=reverse, implementation=form)
        return jnp.sum(weights * h) + jnp.sum(last**2)

    np.testing.assert_allclose(loss(a, b, h0), unrolled(a, b, h0), rtol=1e-5)
    for got, want in zip(
        jax.grad(loss, argnums=(0, 1, 2))(a, b, h0), jax.grad(unrolled, argnums=(0, 1, 2))(a, b, h0), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(T=st.integers(1, 12), cut=st.integers(0, 12), reverse=st.booleans(), form=st.sampled_from(FORMS))
def test_two_parts_joined_by_their_state_equal_the_whole(T, cut, reverse, form):
    cut = min(cut, T - 1)
    gate, candidate, h0 = inputs(T)

    def part(rows, h):
        return mingru_recurrence(gate[rows], candidate[rows], h, reverse=reverse, implementation=form)

    whole, last = part(slice(None), h0)
    if cut == 0:
        np.testing.assert_allclose(whole[0 if reverse else -1], last, rtol=1e-6)
        return
    parts = [slice(0, cut), slice(cut, None)]
    first, second = reversed(parts) if reverse else parts
    h_first, middle = part(first, h0)
    h_second, end = part(second, middle)
    joined = jnp.concatenate([h_second, h_first] if reverse else [h_first, h_second])
    np.testing.assert_allclose(joined, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_gate_passes_the_state_through_exactly(form):
    gate, candidate, h0 = inputs(9)
    gate = gate.at[4:].set(-1e9)
    h, last = mingru_recurrence(gate, candidate, h0, implementation=form)
    for t in range(4, 9):
        np.testing.assert_array_equal(h[t], h[3])
    np.testing.assert_array_equal(last, h[3])


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_are_scanned_in_float32(form):
    gate, candidate, _ = (x.astype(jnp.bfloat16) for x in inputs(400))
    h, last = mingru_recurrence(gate, candidate, implementation=form)
    want, _ = mingru_recurrence(gate.astype(jnp.float32), candidate.astype(jnp.float32), implementation="sequential")
    assert h.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    # One rounding of the result, not 400 of the state.
    np.testing.assert_allclose(h.astype(jnp.float32), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("candidate_fn", CANDIDATES)
def test_step_form_equals_parallel_form(candidate_fn: Candidate):
    gate, candidate, h = inputs(17)
    parallel, _ = mingru_recurrence(gate, candidate, h, candidate_fn=candidate_fn, implementation="associative")
    for t in range(17):
        h = mingru_step(gate[t], candidate[t], h, candidate_fn=candidate_fn)
        np.testing.assert_allclose(h, parallel[t], rtol=1e-5, atol=1e-6)


def log_space_mingru(gate, candidate):
    """The paper's log-space form (appendix B): h = exp(cumsum(log a) + logcumsumexp(log b - cumsum(log a)))."""
    log_a = -jax.nn.softplus(gate)
    log_g = jnp.where(candidate >= 0, jnp.log(jnp.maximum(candidate, 0) + 0.5), -jax.nn.softplus(-candidate))
    log_b = -jax.nn.softplus(-gate) + log_g
    total = jnp.cumsum(log_a, axis=0)
    return jnp.exp(total + jax.lax.cumlogsumexp(log_b - total, axis=0))


def test_linear_space_is_more_exact_than_the_log_space_of_the_paper():
    gate, candidate, _ = inputs(4000)
    want, _ = mingru_by_definition(gate, candidate, jnp.zeros((2, 3)), "g", False)

    def error(h):
        return float(np.max(np.abs(np.asarray(h, np.float64) - want)) / np.max(want))

    errors = {
        form: error(mingru_recurrence(gate, candidate, candidate_fn="g", implementation=form)[0]) for form in FORMS
    }
    log_space = error(log_space_mingru(gate, candidate))
    for form, value in {**errors, "log space": log_space}.items():  # the table of docs/numerics.md; needs pytest -s
        print(f"{form}: {value:.1e}")
    assert max(errors.values()) < 1e-6
    assert log_space > 100 * max(errors.values())


def test_each_implementation_is_really_used():
    gate, candidate, _ = inputs(8)

    def trace(form):
        program = jax.make_jaxpr(lambda g, c: mingru_recurrence(g, c, implementation=form)[0])(gate, candidate)
        return {eqn.primitive.name for eqn in equations(program)}

    assert "scan" not in trace("associative")
    assert "custom_vjp_call" in trace("associative")
    assert "scan" in trace("sequential")
    assert "custom_vjp_call" not in trace("sequential")
    assert "custom_vjp_call" in trace("fused")


def test_a_reverse_rule_of_our_own_keeps_no_array_of_full_size_but_gate_candidate_and_state():
    gate, candidate, h0 = inputs(16)

    def residuals(form):
        def forward(gate, candidate):
            return mingru_recurrence(gate, candidate, h0, candidate_fn="g", implementation=form)[0]

        _, vjp = jax.vjp(forward, gate, candidate)
        return sum(leaf.size == gate.size for leaf in jax.tree.leaves(vjp))

    assert residuals("fused") == 3
    assert residuals("associative") == 3
    assert residuals("sequential") > 3


@pytest.mark.parametrize("v", [-30.0, -1.0, 0.0, 2.0])
def test_g_is_positive_and_continuous(v):
    assert float(activate_candidate(jnp.float32(v), "g")) > 0
    below, above = (float(activate_candidate(jnp.float32(x), "g")) for x in (-1e-6, 1e-6))
    assert above == pytest.approx(below, abs=1e-5)
