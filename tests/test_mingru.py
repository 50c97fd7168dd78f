"""One set of weights: the parallel form over a batch equals the step form, frame by frame."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxds2.model.cell import Candidate
from jaxds2.model.mingru import MinGRU
from jaxds2.model.scan import Implementation


def layer(candidate: Candidate = "linear", implementation: Implementation = "associative", gate_bias=0.0) -> MinGRU:
    return MinGRU(
        5,
        4,
        candidate=candidate,
        gate_bias=gate_bias,
        implementation=implementation,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


X_UBD = jax.random.normal(jax.random.key(0), (13, 3, 5))
LENGTHS_B = jnp.array([13, 7, 1])


@pytest.mark.parametrize("candidate", ["linear", "g"])
@pytest.mark.parametrize("implementation", ["associative", "sequential", "fused"])
def test_parallel_equals_step(candidate: Candidate, implementation: Implementation):
    mingru = layer(candidate, implementation)
    h_UBH, last_BH = mingru(X_UBD, LENGTHS_B)
    state_BH = mingru.initial_state(3)
    for t in range(13):
        state_BH = jnp.where((t < LENGTHS_B)[:, None], mingru.step(X_UBD[t], state_BH), state_BH)
        np.testing.assert_allclose(h_UBH[t], state_BH, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last_BH, state_BH, rtol=1e-5, atol=1e-6)


def test_reverse_starts_at_the_last_valid_frame():
    mingru = layer()
    h_UBH, _ = mingru(X_UBD, LENGTHS_B, reverse=True)
    for row, length in enumerate(LENGTHS_B.tolist()):
        own_UH, _ = mingru(X_UBD[:length, row][::-1, None], jnp.array([length]))
        np.testing.assert_allclose(h_UBH[:length, row], own_UH[::-1, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["associative", "sequential", "fused"])
def test_nan_in_the_padding_never_leaks(reverse, implementation: Implementation):
    mingru = layer(implementation=implementation)
    graphdef, params = nnx.split(mingru)
    valid_UB1 = (jnp.arange(13)[:, None] < LENGTHS_B[None, :])[..., None]

    def loss(params, x_UBD):
        h_UBH, _ = nnx.merge(graphdef, params)(x_UBD, LENGTHS_B, reverse=reverse)
        return jnp.sum(jnp.where(valid_UB1, h_UBH, 0.0) ** 2)

    clean = jnp.where(valid_UB1, X_UBD, 0.0)
    poisoned = jnp.where(valid_UB1, X_UBD, jnp.nan)
    np.testing.assert_array_equal(loss(params, poisoned), loss(params, clean))


def test_gate_bias_is_the_initial_bias_of_the_gate_alone():
    mingru = layer(gate_bias=-2.0)
    biases = {path[0]: leaf for path, leaf in nnx.to_flat_state(nnx.split(mingru)[1]) if path[1] == "bias"}
    np.testing.assert_array_equal(biases["gate"][...], -2.0)
    np.testing.assert_array_equal(biases["candidate"][...], 0.0)
