"""MinGRU: one set of weights that trains in parallel over time and runs step by step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxds2.model import scan
from jaxds2.model.cell import Candidate
from jaxds2.model.linear import Linear, matmul


class MinGRU(nnx.Module):
    """Minimal GRU (Feng et al. 2024, arXiv 2410.01201): gate and candidate see only the input, never the state.

    Parameters are float32; the two matmuls run in `dtype`, the recurrence in float32.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        candidate: Candidate,
        gate_bias: float,
        implementation: scan.Implementation,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        # Two matmuls: faster than one of twice the width that is then split.
        self.gate = Linear(width, hidden, bias=gate_bias, dtype=dtype, rngs=rngs)
        self.candidate = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.hidden = hidden
        self.candidate_fn: Candidate = candidate
        self.implementation: scan.Implementation = implementation

    def __call__(
        self, x_UBD: jax.Array, lengths_B: jax.Array, h0_BH: jax.Array | None = None, *, reverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """The parallel form.

        Args:
          x_UBD: input frames; what stands beyond an utterance's length is ignored.
          lengths_B: valid frames of each utterance, int32.
          h0_BH: state before the first frame in scan order; None is zero.
          reverse: run from the last frame to the first.

        Returns:
          h_UBH in the compute dtype, constant beyond an utterance's length (the state is frozen there), and the last
          state in scan order h_BH, float32: forwards that is the state after the last valid frame.
        """
        return states((self,), x_UBD, lengths_B, h0_BH, reverses=(reverse,))

    def pre_activations(self, x_UBD: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """gate_UBH and candidate_UBH of the input, such that the state is frozen beyond an utterance's length."""
        valid_UB1 = (jnp.arange(x_UBD.shape[0])[:, None] < lengths_B[None, :])[..., None]
        gate_UBH, candidate_UBH = self.gate(x_UBD), self.candidate(x_UBD)
        return (
            jnp.where(valid_UB1, gate_UBH, jnp.asarray(scan.FROZEN, gate_UBH.dtype)),
            jnp.where(valid_UB1, candidate_UBH, jnp.zeros((), candidate_UBH.dtype)),  # 0 * NaN would still be NaN
        )

    def step(self, x_BD: jax.Array, h_BH: jax.Array) -> jax.Array:
        """The step form: one frame in, the new state out (float32), which is also the layer's output for that frame."""
        return scan.mingru_step(self.gate(x_BD), self.candidate(x_BD), h_BH, candidate_fn=self.candidate_fn)

    def initial_state(self, batch_size: int) -> jax.Array:
        """The state before the first frame, zeros_BH in float32."""
        return jnp.zeros((batch_size, self.hidden), jnp.float32)


def states(
    ways: Sequence[MinGRU],
    x_UBD: jax.Array,
    lengths_B: jax.Array,
    h0_BH: jax.Array | None = None,
    *,
    reverses: tuple[bool, ...],
) -> tuple[jax.Array, jax.Array]:
    """The parallel form of a layer of one direction or more; see MinGRU.__call__.

    Args:
      ways: a MinGRU for each direction, all of the same width and form.
      x_UBD: input frames.
      lengths_B: valid frames of each utterance.
      h0_BH: the directions' states before the first frame in scan order, side by side; None is zero.
      reverses: for each direction whether it runs from the last frame to the first.

    Returns:
      h_UBH, the states of the first direction and then those of the next, and the last states in scan order, h_BH.
    """
    first = ways[0]
    options: Any = {"candidate_fn": first.candidate_fn, "implementation": first.implementation, "reverses": reverses}
    if scan.has_kernel(first.implementation, first.hidden):  # which takes and makes them side by side
        layers = [layer for way in ways for layer in (way.gate, way.candidate)]
        kernel_DE = jnp.concatenate([layer.kernel[...] for layer in layers], axis=1)
        bias_E = jnp.concatenate([layer.bias[...] for layer in layers if layer.bias is not None])
        return scan.mingru_layer(matmul(x_UBD, kernel_DE.astype(x_UBD.dtype)), bias_E, lengths_B, h0_BH, **options)
    gates, candidates = zip(*(way.pre_activations(x_UBD, lengths_B) for way in ways), strict=True)
    h0s = (None,) * len(ways) if h0_BH is None else jnp.split(h0_BH, len(ways), axis=-1)
    hs, lasts = scan.mingru_recurrences(gates, candidates, h0s, **options)
    return jnp.concatenate(hs, axis=-1), jnp.concatenate(lasts, axis=-1)
