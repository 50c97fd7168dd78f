"""A convolution over (time, frequency) whose reverse rule transposes arrays that lie in memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxds2.model.stored import stored

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv(nnx.Conv):
    """A convolution with float32 parameters, computed in `dtype`, and padded by half a kernel on every side.

    Args:
      channels_in: C of x_BTFC.
      channels_out: of the output.
      kernel: of odd size, over (time, frequency).
      strides: over (time, frequency).
      dtype: of the convolution and of its output.
      rngs: stream `params` draws the initial weights.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: tuple[int, int],
        strides: tuple[int, int],
        *,
        dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            channels_in,
            channels_out,
            kernel_size=kernel,
            strides=strides,
            padding=tuple((k // 2, k // 2) for k in kernel),
            kernel_init=nnx.initializers.he_normal(),
            dtype=dtype,
            param_dtype=jnp.float32,
            conv_general_dilated=_conv_general_dilated,
            rngs=rngs,
        )


def _conv_general_dilated(x_BTFC: jax.Array, kernel_KLCE: jax.Array, strides: Any, padding: Any, **_: Any) -> jax.Array:
    """What nnx.Conv asks for."""
    return convolve(x_BTFC, kernel_KLCE, tuple(strides), tuple(map(tuple, padding)))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
    x_BTFC: jax.Array, kernel_KLCE: jax.Array, strides: tuple[int, int], padding: tuple[tuple[int, int], ...]
) -> jax.Array:
    """x (B, T, F, C) convolved with a kernel (K, L, C, E) over T and F.

    The kernel's gradient is a convolution too, of x with the output's gradient, over the batch. XLA's CPU compiler
    transposes both for it, and computes what x was made of again in that order; here they are stored first.
    """
    return lax.conv_general_dilated(x_BTFC, kernel_KLCE, strides, padding, dimension_numbers=_LAYOUT)


def _convolve_fwd(x_BTFC, kernel_KLCE, strides, padding):
    x_BTFC = stored(x_BTFC, kernel_KLCE[0, 0, 0, 0])
    return convolve(x_BTFC, kernel_KLCE, strides, padding), (x_BTFC, kernel_KLCE)


def _convolve_bwd(strides, padding, saved, dy_BTFE):
    x_BTFC, kernel_KLCE = saved
    plain = partial(lax.conv_general_dilated, window_strides=strides, padding=padding, dimension_numbers=_LAYOUT)
    (dx_BTFC,) = jax.linear_transpose(lambda x: plain(x, kernel_KLCE), x_BTFC)(dy_BTFE)

    def transposed(x_BTFC, dy_BTFE, kernel_KLCE):
        weight = kernel_KLCE[0, 0, 0, 0]
        x_CTFB, dy_TFBE = stored(x_BTFC.transpose(3, 1, 2, 0), weight), stored(dy_BTFE.transpose(1, 2, 0, 3), weight)
        # What the last window leaves of the padded input on the right is not read.
        used = [
            (low, k - n - low + s * (m - 1))
            for (low, _), k, n, m, s in zip(
                padding, kernel_KLCE.shape, x_BTFC.shape[1:3], dy_BTFE.shape[1:3], strides, strict=False
            )
        ]
        return lax.conv_general_dilated(
            x_CTFB, dy_TFBE, (1, 1), used, rhs_dilation=strides, dimension_numbers=("NHWC", "HWIO", "HWNC")
        )

    def as_jax(x_BTFC, dy_BTFE, kernel_KLCE):
        return jax.linear_transpose(lambda kernel: plain(x_BTFC, kernel), kernel_KLCE)(dy_BTFE)[0]

    return dx_BTFC, lax.platform_dependent(x_BTFC, dy_BTFE, kernel_KLCE, cpu=transposed, default=as_jax)


convolve.defvjp(_convolve_fwd, _convolve_bwd)
