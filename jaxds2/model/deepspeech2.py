"""Deep Speech 2 (Amodei et al. 2015, arXiv 1512.02595) with minGRU layers in place of its recurrent ones.

Convolutions over time and frequency, a linear layer, N pre-norm residual minGRU layers (bidirectional, or
unidirectional with the paper's lookahead convolution), a CTC head. Every layer knows the lengths: what stands in the
padding, NaN included, never reaches a valid frame, so an utterance gets the same log-probabilities in any batch.
"""

from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxds2.config import ModelConfig
from jaxds2.model.convolution import Conv
from jaxds2.model.linear import Linear
from jaxds2.model.mingru import MinGRU, states
from jaxds2.model.stored import stored

Count = TypeVar("Count", int, np.ndarray, jax.Array)

Params = dict[str, jax.Array]
"""Parameters by their path in the model, e.g. `layers.0.forward.gate.kernel`, all float32."""


def output_lengths(num_frames: Count, model: ModelConfig) -> Count:
    """Output frames U of an input of T frames: each convolution of time stride s makes ceil(T / s)."""
    for stride, _ in model.conv_strides:
        num_frames = -(-num_frames // stride)
    return num_frames


def subsampling_factor(model: ModelConfig) -> int:
    """Input frames per output frame."""
    return int(np.prod([stride for stride, _ in model.conv_strides]))


def _mask(x_UBD: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Zero beyond each utterance's length."""
    valid_UB1 = (jnp.arange(x_UBD.shape[0])[:, None] < lengths_B[None, :])[..., None]
    return jnp.where(valid_UB1, x_UBD, jnp.zeros((), x_UBD.dtype))


class Dropout:
    """Dropout with one mask for all frames of an utterance, drawn from that utterance's own key.

    The mask does not depend on the batch around the utterance, nor on the number of devices.
    """

    def __init__(self, scales_PBD: jax.Array | None):
        """Drop with given masks: 0 or 1 / (1 - rate) for each place P where it is applied; None: no dropout."""
        self.scales_PBD = scales_PBD
        self.place = 0

    @classmethod
    def draw(cls, rate: float, keys_B: jax.Array | None, *, places: int, width: int) -> "Dropout":
        """Draw the masks.

        Args:
          rate: share of the channels that are dropped.
          keys_B: one random key per utterance; None: no dropout.
          places: how often it will be applied; every place has masks of its own.
          width: channels D.
        """
        if keys_B is None or rate == 0:
            return cls(None)
        # All places at once: XLA takes a second to compile each call of threefry on a CPU.
        keep_BPD = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (places, width)))(keys_B)
        return cls(jnp.swapaxes(jnp.where(keep_BPD, 1 / (1 - rate), 0.0), 0, 1))

    def __call__(self, x_UBD: jax.Array) -> jax.Array:
        """Drop whole channels of x and scale the rest by 1 / (1 - rate)."""
        if self.scales_PBD is None:
            return x_UBD
        scale_BD, self.place = self.scales_PBD[self.place], self.place + 1
        return x_UBD * scale_BD.astype(x_UBD.dtype)[None]

    def left(self, layers: int) -> jax.Array | None:
        """The masks that have not been used, split evenly over so many layers: scales_LPBD."""
        if self.scales_PBD is None:
            return None
        left_PBD = self.scales_PBD[self.place :]
        return left_PBD.reshape(layers, -1, *left_PBD.shape[1:])


class FrontEnd(nnx.Module):
    """Convolutions over (time, frequency), GELU after each, and a linear layer to the model's width."""

    def __init__(self, num_mels: int, model: ModelConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        channels = (1, *model.conv_channels)
        self.convs = nnx.List(
            Conv(channels[i], channels[i + 1], kernel, stride, dtype=dtype, rngs=rngs)
            for i, (kernel, stride) in enumerate(zip(model.conv_kernels, model.conv_strides, strict=True))
        )
        bins = num_mels
        for _, stride in model.conv_strides:
            bins = -(-bins // stride)
        self.linear = Linear(bins * channels[-1], model.width, dtype=dtype, rngs=rngs)
        self.time_strides = tuple(stride for stride, _ in model.conv_strides)

    def __call__(self, features_BTF: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log-mel features to x_UBD (time-major) and its lengths_B."""

        def mask(x_BTFC: jax.Array, lengths_B: jax.Array) -> jax.Array:
            valid_BT = jnp.arange(x_BTFC.shape[1])[None, :] < lengths_B[:, None]
            return jnp.where(valid_BT[:, :, None, None], x_BTFC, jnp.zeros((), x_BTFC.dtype))

        x_BTFC = mask(features_BTF[..., None], lengths_B)
        for conv, stride in zip(self.convs, self.time_strides, strict=True):
            lengths_B = -(-lengths_B // stride)
            # A window at the utterance's edge sees zeros there, as it would in a batch of its own.
            x_BTFC = mask(jax.nn.gelu(conv(x_BTFC), approximate=True), lengths_B)
        x_UBFC = jnp.swapaxes(stored(x_BTFC, self.linear.kernel[0, 0]), 0, 1)
        return _mask(self.linear(x_UBFC.reshape(*x_UBFC.shape[:2], -1)), lengths_B), lengths_B


class DepthwiseConv(nnx.Module):
    """A filter over time per channel, y_t = sum_k w_k x_{t + k - left}: `left` frames of past, `right` of future.

    With left = 0 it is the lookahead ("row") convolution of Deep Speech 2, section 3.6. It starts near the identity.
    """

    def __init__(self, width: int, *, left: int, right: int, rngs: nnx.Rngs):
        noise_KD = 0.1 * jax.random.normal(rngs.params(), (left + 1 + right, width))
        self.kernel_KD = nnx.Param(noise_KD.at[left].add(1.0))
        self.left = left
        self.right = right

    def __call__(self, x_UBD: jax.Array) -> jax.Array:
        """x_UBD, zero in its padding, to y_UBD."""
        padded = jnp.pad(x_UBD, ((self.left, self.right), (0, 0), (0, 0)))
        kernel_KD = self.kernel_KD[...].astype(x_UBD.dtype)
        shifted = (padded[k : k + x_UBD.shape[0]] * kernel_KD[k][None, None] for k in range(kernel_KD.shape[0]))
        return sum(shifted, start=jnp.zeros_like(x_UBD))


class FeedForward(nnx.Module):
    """W_out gelu(W_in norm(x)), frame by frame."""

    def __init__(self, model: ModelConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(model.width, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.inner = Linear(model.width, model.feed_forward, dtype=dtype, rngs=rngs)
        self.outer = Linear(model.feed_forward, model.width, dtype=dtype, rngs=rngs)

    def __call__(self, x_UBD: jax.Array) -> jax.Array:
        """x_UBD to the block's output, without the residual."""
        return self.outer(jax.nn.gelu(self.inner(self.norm(x_UBD)), approximate=True))


class RecurrentLayer(nnx.Module):
    """x + W [forward; backward](depthwise(norm(x))), then optionally x + feed_forward(norm(x))."""

    def __init__(self, model: ModelConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        def mingru() -> MinGRU:
            return MinGRU(
                model.width,
                model.hidden,
                candidate=model.candidate,
                gate_bias=model.gate_bias,
                implementation=model.scan,
                dtype=dtype,
                rngs=rngs,
            )

        self.norm = nnx.LayerNorm(model.width, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        right = model.depthwise_kernel // 2 if model.bidirectional else 0
        left = model.depthwise_kernel - 1 - right
        self.depthwise = DepthwiseConv(model.width, left=left, right=right, rngs=rngs) if left >= 0 else None
        self.forward = mingru()
        self.backward = mingru() if model.bidirectional else None
        states = model.hidden * (2 if model.bidirectional else 1)
        self.output = Linear(states, model.width, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(model, dtype=dtype, rngs=rngs) if model.feed_forward else None

    def __call__(self, x_UBD: jax.Array, lengths_B: jax.Array, dropout: Dropout) -> jax.Array:
        """x_UBD to x_UBD; frames beyond lengths_B are zero on the way in and out."""
        y_UBD = _mask(self.norm(x_UBD), lengths_B)
        if self.depthwise is not None:
            y_UBD = self.depthwise(y_UBD)
        if self.backward is not None:
            h_UBH, _ = states((self.forward, self.backward), y_UBD, lengths_B, reverses=(False, True))
        else:
            h_UBH, _ = self.forward(y_UBD, lengths_B)
        x_UBD = x_UBD + dropout(self.output(h_UBH))
        if self.feed_forward is not None:
            x_UBD = x_UBD + dropout(self.feed_forward(x_UBD))
        return _mask(x_UBD, lengths_B)


class DeepSpeech2(nnx.Module):
    """The whole recogniser: log-mel features in, CTC logits out.

    Args:
      num_mels: mel bins F of the input.
      num_classes: output classes V, the blank included.
      model: the architecture.
      dtype: compute dtype of the matmuls and of the residual stream; parameters are float32.
      rngs: stream `params` draws the initial weights.
    """

    def __init__(
        self, num_mels: int, num_classes: int, model: ModelConfig, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        self.front_end = FrontEnd(num_mels, model, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(RecurrentLayer(model, dtype=dtype, rngs=rngs) for _ in range(model.layers))
        right = model.lookahead
        self.lookahead = DepthwiseConv(model.width, left=0, right=right, rngs=rngs) if right else None
        self.norm = nnx.LayerNorm(model.width, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)
        self.head = Linear(model.width, num_classes, dtype=dtype, rngs=rngs)
        self.scan_layers = model.scan_layers
        self.dropout_rate = model.dropout
        self.width = model.width
        self.dtype = dtype

    def __call__(
        self, features_BTF: jax.Array, lengths_B: jax.Array, *, dropout_keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Apply the model.

        Args:
          features_BTF: float32 features; anything may stand beyond an utterance's length.
          lengths_B: valid frames, int32; 0 marks a filler row.
          dropout_keys_B: one random key per utterance; None: no dropout.

        Returns:
          logits_BUV in float32, finite in the padding too but meaningless there, and logit_lengths_B, int32.
        """
        places = 1 + sum(1 if layer.feed_forward is None else 2 for layer in self.layers)
        dropout = Dropout.draw(self.dropout_rate, dropout_keys_B, places=places, width=self.width)
        x_UBD, lengths_B = self.front_end(features_BTF.astype(self.dtype), lengths_B)
        x_UBD = dropout(x_UBD)
        if self.scan_layers:
            x_UBD = self._scan_layers(x_UBD, lengths_B, dropout)
        else:
            assert self.norm.scale is not None
            for layer in self.layers:
                x_UBD = stored(layer(x_UBD, lengths_B, dropout), self.norm.scale[0])
        if self.lookahead is not None:
            x_UBD = self.lookahead(x_UBD)
        logits_UBV = self.head(self.norm(x_UBD))
        return jnp.swapaxes(logits_UBV, 0, 1).astype(jnp.float32), lengths_B

    def _scan_layers(self, x_UBD: jax.Array, lengths_B: jax.Array, dropout: Dropout) -> jax.Array:
        """All layers as one loop over their stacked weights: XLA compiles a layer once, however many there are."""
        graphdef = nnx.graphdef(self.layers[0])
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in self.layers))

        def body(x_UBD: jax.Array, layer: tuple[nnx.State, jax.Array | None]) -> tuple[jax.Array, None]:
            state, scales_PBD = layer
            return nnx.merge(graphdef, state)(x_UBD, lengths_B, Dropout(scales_PBD)), None

        return jax.lax.scan(body, x_UBD, (stacked, dropout.left(len(self.layers))))[0]


class Apply(Protocol):
    """The model as a pure function; see DeepSpeech2.__call__."""

    def __call__(
        self,
        params: Params,
        features_BTF: jax.Array,
        lengths_B: jax.Array,
        *,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """logits_BUV and logit_lengths_B of features_BTF."""
        ...


def create(
    num_mels: int, num_classes: int, model: ModelConfig, *, dtype: jax.typing.DTypeLike, seed: int = 0
) -> tuple[Apply, Params]:
    """Build a model and split it into a pure function and its initial parameters."""
    module = DeepSpeech2(num_mels, num_classes, model, dtype=dtype, rngs=nnx.Rngs(params=seed))
    graphdef, state = nnx.split(module)
    paths = {".".join(map(str, path)): path for path in nnx.to_flat_state(state).paths}
    params: Params = {name: leaf[...] for name, leaf in zip(paths, nnx.to_flat_state(state).leaves, strict=True)}

    def apply(
        params: Params,
        features_BTF: jax.Array,
        lengths_B: jax.Array,
        *,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        state = nnx.traversals.unflatten_mapping({path: params[name] for name, path in paths.items()})
        return nnx.merge(graphdef, state)(features_BTF, lengths_B, dropout_keys_B=dropout_keys_B)

    return apply, params
