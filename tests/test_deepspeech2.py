"""The whole model: lengths flow through every layer, padding never leaks, the same output in any batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jaxprs import equations

from jaxds2.config import ModelConfig
from jaxds2.model.deepspeech2 import DeepSpeech2, DepthwiseConv, Dropout, create, output_lengths, subsampling_factor

SMALL = ModelConfig(
    conv_channels=(4, 6),
    conv_kernels=((3, 3), (5, 3)),
    conv_strides=((2, 2), (2, 1)),
    width=16,
    layers=2,
    hidden=8,
    feed_forward=24,
    dropout=0.3,
)
STREAMING = dataclasses.replace(SMALL, bidirectional=False, lookahead=3, depthwise_kernel=4, feed_forward=0)
MODELS = {"bidirectional": SMALL, "streaming": STREAMING}
F, V, T = 12, 7, 37
X_BTF = jax.random.normal(jax.random.key(0), (3, T, F))
LENGTHS_B = jnp.array([T, 22, 1])


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]


@given(T=st.integers(0, 300), strides=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_output_lengths_is_what_the_convolutions_make(T, strides):
    n = len(strides)
    pairs = tuple((s, 1) for s in strides)
    config = ModelConfig(conv_channels=(1,) * n, conv_kernels=((5, 3),) * n, conv_strides=pairs)
    frames = T
    for stride in strides:
        frames = (frames + 2 * (5 // 2) - 5) // stride + 1 if frames else 0
    assert output_lengths(T, config) == frames
    assert subsampling_factor(config) == np.prod(strides)


def test_shapes_and_lengths(model):
    apply, params = create(F, V, model, dtype=jnp.float32)
    logits_BUV, lengths_B = jax.jit(apply)(params, X_BTF, LENGTHS_B)
    assert logits_BUV.shape == (3, output_lengths(T, model), V)
    assert logits_BUV.dtype == jnp.float32
    np.testing.assert_array_equal(lengths_B, output_lengths(LENGTHS_B, model))


def test_nan_in_the_padding_never_leaks_into_outputs_or_gradients(model):
    apply, params = create(F, V, model, dtype=jnp.float32)
    poisoned = jnp.where((jnp.arange(T)[None] < LENGTHS_B[:, None])[..., None], X_BTF, jnp.nan)

    @jax.jit
    def loss(params, features_BTF):
        logits_BUV, lengths_B = apply(params, features_BTF, LENGTHS_B)
        valid_BU = jnp.arange(logits_BUV.shape[1])[None] < lengths_B[:, None]
        return jnp.sum(jnp.where(valid_BU[..., None], logits_BUV, 0.0) ** 2), logits_BUV

    (want, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params, X_BTF)
    (got, poisoned_logits), poisoned_gradient = jax.value_and_grad(loss, has_aux=True)(params, poisoned)
    np.testing.assert_array_equal(got, want)
    assert bool(jnp.isfinite(poisoned_logits).all())
    assert bool(jnp.isfinite(logits).all())
    for name in params:
        np.testing.assert_array_equal(poisoned_gradient[name], gradient[name], err_msg=name)


def test_an_utterance_gets_the_same_logits_in_any_batch(model):
    apply, params = create(F, V, model, dtype=jnp.float32)
    together, _ = jax.jit(apply)(params, X_BTF, LENGTHS_B)
    for row, length in enumerate(LENGTHS_B.tolist()):
        alone, frames = jax.jit(apply)(params, X_BTF[row : row + 1, :length], jnp.array([length]))
        np.testing.assert_allclose(together[row, : frames[0]], alone[0], rtol=1e-4, atol=1e-5)


def test_a_streaming_model_sees_no_further_than_its_lookahead():
    apply, params = create(F, V, STREAMING, dtype=jnp.float32)
    lengths_B = jnp.array([T])
    base, _ = apply(params, X_BTF[:1], lengths_B)
    # Output u of this front end ends at input 4u + 5 (kernels 3 and 5, strides 2 and 2), and sees 3 outputs more.
    changed, _ = apply(params, X_BTF[:1].at[:, 30:].add(1.0), lengths_B)
    unchanged = [u for u in range(base.shape[1]) if 4 * (u + 3) + 5 < 30]
    np.testing.assert_array_equal(changed[0, unchanged], base[0, unchanged])
    assert not np.array_equal(changed[0, unchanged[-1] + 1], base[0, unchanged[-1] + 1])


def test_a_filler_row_is_harmless(model):
    apply, params = create(F, V, model, dtype=jnp.float32)
    logits_BUV, lengths_B = apply(params, X_BTF, jnp.array([T, 22, 0]))
    assert lengths_B[2] == 0
    assert bool(jnp.isfinite(logits_BUV).all())
    full, _ = apply(params, X_BTF, LENGTHS_B)
    np.testing.assert_array_equal(logits_BUV[:2], full[:2])


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("right", [0, 3])
def test_depthwise_convolution_by_definition(left, right):
    conv = DepthwiseConv(4, left=left, right=right, rngs=nnx.Rngs(0))
    x_UBD = np.asarray(jax.random.normal(jax.random.key(1), (9, 2, 4)))
    kernel_KD = np.asarray(conv.kernel_KD[...])
    want = np.zeros_like(x_UBD)
    for u in range(9):
        for k in range(left + 1 + right):
            if 0 <= u + k - left < 9:
                want[u] += kernel_KD[k] * x_UBD[u + k - left]
    np.testing.assert_allclose(conv(jnp.asarray(x_UBD)), want, rtol=1e-5, atol=1e-6)


def test_dropout_is_one_mask_over_time_keyed_by_the_utterance_alone():
    keys_B = jax.random.split(jax.random.key(0), 3)
    x_UBD = jnp.ones((6, 3, 400))
    y_UBD = Dropout.draw(0.25, keys_B, places=2, width=400)(x_UBD)
    np.testing.assert_array_equal(y_UBD, jnp.broadcast_to(y_UBD[:1], y_UBD.shape))
    alone_UBD = Dropout.draw(0.25, keys_B[1:2], places=2, width=400)(x_UBD[:, :1])
    np.testing.assert_array_equal(alone_UBD[:, 0], y_UBD[:, 1])
    assert not np.array_equal(y_UBD[0, 0], y_UBD[0, 1])
    np.testing.assert_allclose(np.unique(y_UBD), [0, 1 / 0.75], rtol=1e-6)
    assert float(jnp.mean(y_UBD == 0)) == pytest.approx(0.25, abs=0.05)


def test_every_place_of_dropout_has_its_own_mask_and_none_when_evaluating():
    dropout = Dropout.draw(0.5, jax.random.split(jax.random.key(0), 2), places=2, width=50)
    x_UBD = jnp.ones((1, 2, 50))
    assert not np.array_equal(dropout(x_UBD), dropout(x_UBD))
    np.testing.assert_array_equal(Dropout.draw(0.5, None, places=2, width=50)(x_UBD), x_UBD)


@pytest.mark.parametrize("feed_forward", [0, 8])
def test_every_branch_is_dropped_once(feed_forward):
    model = dataclasses.replace(SMALL, feed_forward=feed_forward, dropout=0.999)
    apply, params = create(F, V, model, dtype=jnp.float32)
    keys_B = jax.random.split(jax.random.key(0), 3)
    logits_BUV, _ = jax.jit(apply)(params, X_BTF, LENGTHS_B, dropout_keys_B=keys_B)
    # With next to everything dropped the residual stream is zero and only the head's bias is left.
    np.testing.assert_allclose(logits_BUV, jnp.broadcast_to(params["head.bias"], logits_BUV.shape), atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_in_one_loop_equal_layers_one_by_one(model, dropout):
    keys_B = jax.random.split(jax.random.key(0), 3) if dropout else None
    values, gradients = [], []
    for scan_layers in (False, True):
        form = dataclasses.replace(model, dropout=dropout, scan_layers=scan_layers)
        apply, params = create(F, V, form, dtype=jnp.float32)

        def loss(params, apply=apply):
            return jnp.mean(jnp.square(apply(params, X_BTF, LENGTHS_B, dropout_keys_B=keys_B)[0]))

        loops = [e for e in equations(jax.make_jaxpr(loss)(params)) if e.primitive.name == "scan"]
        assert any(e.params["length"] == model.layers for e in loops) == scan_layers
        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        values.append(value)
        gradients.append(gradient)
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6)
    for name, want in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], want, atol=1e-6 * float(jnp.abs(want).max()), rtol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only XLA's CPU compiler sums the residual stream again")
def test_no_loop_of_a_compiled_gradient_sums_more_of_the_residual_stream_in_a_deeper_model():
    def most_arrays_read_by_one_loop(layers: int) -> int:
        model = ModelConfig(width=64, hidden=32, layers=layers)  # a smaller one shows no growth
        apply, params = create(F, V, model, dtype=jnp.float32)
        keys_B = jax.random.split(jax.random.key(1), len(LENGTHS_B))
        loss = jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, X_BTF, LENGTHS_B, dropout_keys_B=keys_B)[0])))
        compiled = jax.jit(loss).lower(params).compile().as_text()
        assert compiled is not None
        return max(line.count("param_") for line in compiled.splitlines() if line.startswith("%fused_computation"))

    assert most_arrays_read_by_one_loop(5) == most_arrays_read_by_one_loop(2)


def test_split_and_merged_equals_the_module():
    apply, params = create(F, V, SMALL, dtype=jnp.float32, seed=3)
    module = DeepSpeech2(F, V, SMALL, dtype=jnp.float32, rngs=nnx.Rngs(params=3))
    np.testing.assert_array_equal(apply(params, X_BTF, LENGTHS_B)[0], module(X_BTF, LENGTHS_B)[0])
    assert all(value.dtype == jnp.float32 for value in params.values())
    assert params["layers.1.forward.gate.kernel"].shape == (16, 8)


def test_matmuls_take_bfloat16_while_scan_and_parameters_stay_float32():
    model = dataclasses.replace(SMALL, scan="associative")
    apply, params = create(F, V, model, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm promotes its bfloat16 input on its own
        jaxpr = jax.make_jaxpr(apply)(params, X_BTF, LENGTHS_B)
    assert all(value.dtype == jnp.float32 for value in params.values())
    seen = {"dot_general": set(), "conv_general_dilated": set(), "reduce_sum": set()}

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in seen:
                seen[eqn.primitive.name] |= {v.aval.dtype.name for v in eqn.invars}
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jaxpr.jaxpr)
    assert seen["dot_general"] == {"bfloat16"}
    assert seen["conv_general_dilated"] == {"bfloat16"}
    assert seen["reduce_sum"] == {"float32"}  # the sums of the norms
