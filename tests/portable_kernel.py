"""What the GPU kernel of the recurrence does, by a portable form, to take its place where there is no GPU.

It works row by row, as the kernel's grid does, so that XLA can look into it as little.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxds2.model import mingru_kernel, scan


def install(setattr: Callable[[object, str, object], None]) -> None:
    """Have mingru_kernel use it, by `setattr` or a monkeypatch's."""
    setattr(mingru_kernel, "forward", forward)
    setattr(mingru_kernel, "backward", backward)
    setattr(mingru_kernel, "why_not", lambda width: None)


def row_by_row(form, *inputs):
    """form(row of every array) for each row in turn, the results put together again."""

    def one(row):
        return form(*(x if x.ndim < 2 else lax.dynamic_slice_in_dim(x, row, 1, axis=x.ndim - 2) for x in inputs))

    outs = lax.map(one, jnp.arange(inputs[0].shape[-2]))
    return jax.tree.map(lambda x: jnp.moveaxis(x[..., 0, :], 0, -2), outs)


def portable(pre_TBE, bias_E, lengths_B1, h0_BH, *, candidate_fn, reverses):
    """The contract of mingru_kernel.forward."""
    options = {"candidate_fn": candidate_fn, "reverses": reverses, "implementation": "sequential"}
    return scan.mingru_layer(pre_TBE, bias_E, lengths_B1[:, 0], h0_BH, **options)


def forward(*inputs, **options):
    """The same, row by row."""
    return row_by_row(lambda *own: portable(*own, **options), *inputs)


def backward(pre_TBE, bias_E, lengths_B1, h_TBH, h0_BH, dh_TBH, dh_last_BH, **options):
    """The contract of mingru_kernel.backward, row by row."""

    def form(*own):
        pre_TBE, bias_E, lengths_B1, h0_BH, *cotangents = own
        _, pull = jax.vjp(lambda pre, bias, h0: portable(pre, bias, lengths_B1, h0, **options), pre_TBE, bias_E, h0_BH)
        dpre_TBE, dbias_E, dh0_BH = pull(tuple(cotangents))
        return dpre_TBE, dbias_E[None], dh0_BH

    return row_by_row(form, pre_TBE, bias_E, lengths_B1, h0_BH, dh_TBH, dh_last_BH)
