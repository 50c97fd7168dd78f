"""The linear layer's own reverse rule equals JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.model.linear import Linear, matmul


@settings(max_examples=20)
@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=3), D=st.integers(1, 9), E=st.integers(1, 9))
def test_values_and_gradients_equal_those_of_jax(rows, D, E):
    keys = jax.random.split(jax.random.key(D + 10 * E), 3)
    x, dy = jax.random.normal(keys[0], (*rows, D)), jax.random.normal(keys[1], (*rows, E))
    kernel_DE = jax.random.normal(keys[2], (D, E))
    y, gradients = jax.vjp(matmul, x, kernel_DE)
    expected, of_jax = jax.vjp(jnp.matmul, x, kernel_DE)
    np.testing.assert_array_equal(y, expected)
    for ours, theirs in zip(gradients(dy), of_jax(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_layer_equals_that_of_flax_on_the_same_weights():
    ours = Linear(6, 4, dtype=jnp.float32, rngs=nnx.Rngs(params=0), bias=-2.0)
    theirs = nnx.Linear(6, 4, rngs=nnx.Rngs(params=0))
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
    assert ours.bias is not None
    np.testing.assert_array_equal(ours.bias[...], jnp.full(4, -2.0))
    x = jax.random.normal(jax.random.key(1), (3, 2, 6))
    np.testing.assert_array_equal(ours(x), theirs(x) - 2.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_their_gradients_are_float32_whatever_it_computes_in(dtype):
    layer = Linear(6, 4, dtype=dtype, rngs=nnx.Rngs(params=0))
    x = jnp.ones((3, 2, 6))
    assert layer(x).dtype == dtype
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32)))(layer)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
