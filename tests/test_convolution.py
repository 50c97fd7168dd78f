"""The convolution's own reverse rule equals JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxds2.compiler import compiler_options
from jaxds2.model.convolution import Conv, convolve

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=15)
@given(sizes, st.tuples(*[st.sampled_from([1, 3, 5])] * 2), st.tuples(*[st.integers(1, 3)] * 2))
def test_values_and_gradients_equal_those_of_jax(size, kernel, strides):
    keys = jax.random.split(jax.random.key(7), 3)
    x_BTFC, kernel_KLCE = jax.random.normal(keys[0], (2, *size, 3)), jax.random.normal(keys[1], (*kernel, 3, 4))
    padding = tuple((k // 2, k // 2) for k in kernel)

    def of_jax(x_BTFC, kernel_KLCE):
        return lax.conv_general_dilated(
            x_BTFC, kernel_KLCE, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    expected, expected_gradients = jax.vjp(of_jax, x_BTFC, kernel_KLCE)
    y, gradients = jax.vjp(lambda x, kernel: convolve(x, kernel, strides, padding), x_BTFC, kernel_KLCE)
    assert isinstance(y, jax.Array)
    np.testing.assert_array_equal(y, expected)
    dy = jax.random.normal(keys[2], y.shape)
    for ours, theirs in zip(gradients(dy), expected_gradients(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_layer_equals_that_of_flax_on_the_same_weights():
    ours = Conv(2, 5, (3, 5), (2, 1), dtype=jnp.float32, rngs=nnx.Rngs(params=0))
    of_flax = nnx.Conv(
        2,
        5,
        kernel_size=(3, 5),
        strides=(2, 1),
        padding=((1, 1), (2, 2)),
        kernel_init=nnx.initializers.he_normal(),
        rngs=nnx.Rngs(params=0),
    )
    x_BTFC = jax.random.normal(jax.random.key(1), (2, 7, 6, 2))
    np.testing.assert_array_equal(ours(x_BTFC), of_flax(x_BTFC))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_and_their_gradients_are_float32_whatever_it_computes_in(dtype):
    layer = Conv(2, 3, (3, 3), (1, 2), dtype=dtype, rngs=nnx.Rngs(params=0))
    x_BTFC = jnp.ones((1, 4, 5, 2))
    assert layer(x_BTFC).dtype == dtype
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x_BTFC).astype(jnp.float32)))(layer)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_the_compiler_takes_our_options_on_a_cpu_and_none_elsewhere():
    options = compiler_options("cpu")
    doubled = jax.jit(lambda x: 2 * x, compiler_options=options)
    assert doubled(3.0) == 6.0
    assert options == {"xla_cpu_experimental_ynn_fusion_type": ""}
    assert compiler_options("cuda") is None
