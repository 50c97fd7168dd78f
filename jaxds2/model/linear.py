"""A linear layer whose reverse rule reads both operands as they lie in memory."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Linear(nnx.Linear):
    """y = x W + b with float32 parameters, computed in `dtype`.

    Args:
      width_in: D, the last dimension of x.
      width_out: E, the last dimension of y.
      dtype: of the matmul and of y.
      rngs: stream `params` draws the initial weights.
      bias: initial value of b.
    """

    def __init__(
        self, width_in: int, width_out: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs, bias: float = 0.0
    ):
        super().__init__(
            width_in,
            width_out,
            dtype=dtype,
            param_dtype=jnp.float32,
            bias_init=nnx.initializers.constant(bias),
            dot_general=_dot_general,
            rngs=rngs,
        )


def _dot_general(x: jax.Array, kernel_DE: jax.Array, dimension_numbers: Any, **_: Any) -> jax.Array:
    """What nnx.Linear asks for: x @ kernel."""
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())), dimension_numbers
    return matmul(x, kernel_DE)


@jax.custom_vjp
def matmul(x: jax.Array, kernel_DE: jax.Array) -> jax.Array:
    """x (..., D) times kernel (D, E).

    The reverse rule of `jax.numpy.matmul` makes the kernel's gradient as (E, D) and transposes it, for which XLA's CPU
    compiler first copies the output's gradient, transposed, for each kernel; this one makes x^T dy as it stands
    (docs/performance.md).
    """
    return jnp.matmul(x, kernel_DE)


def _matmul_fwd(x: jax.Array, kernel_DE: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel_DE), (x, kernel_DE)


def _matmul_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel_DE = saved
    rows = tuple(range(x.ndim - 1))
    dx = lax.dot_general(dy, kernel_DE, (((dy.ndim - 1,), (1,)), ((), ())))
    return dx, lax.dot_general(x, dy, ((rows, rows), ((), ())))


matmul.defvjp(_matmul_fwd, _matmul_bwd)
