"""Arrays that XLA's CPU compiler is made to write to memory."""

import jax
import jax.numpy as jnp


def stored(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x as it is; on a CPU also written to memory here, its gradient likewise.

    XLA's CPU compiler computes what looks cheap again in each place that reads it: a residual stream is a sum, so every
    layer would add up all layers before it, several times over; what is also transposed would be computed in the
    transposed order, far slower than a copy (docs/performance.md). It removes barriers before it decides that, but
    keeps a branch that it cannot foresee.

    Args:
      x: anything.
      weight: a scalar that is only known at run time, the same on all devices, and finite unless training has failed.
    """

    def branch(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.isfinite(weight), lambda x: x, jnp.negative, x)

    return jax.lax.platform_dependent(x, weight, cpu=branch, default=lambda x, _: x)
