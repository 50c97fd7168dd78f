"""A program, for a process of its own with four CPU devices: the wrapper that keeps a kernel's rows on their devices.

The kernel's place is taken by a portable body that works row by row, as the kernel's grid does, so that XLA can look
into it as little. Prints one JSON object: collectives with and without the wrapper, and the largest error.
"""

import json

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from jaxds2.data.placement import AXES, data_mesh
from jaxds2.model import mingru_kernel, scan

jax.config.update("jax_num_cpu_devices", 4)


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


def both(pre_TBE, bias_E, lengths_B, implementation: scan.Implementation = "fused"):
    """States and gradients of a layer's recurrence."""

    def total(pre_TBE, bias_E):
        options = {"candidate_fn": "linear", "reverses": (False, True), "implementation": implementation}
        h_TBH, last_BH = scan.mingru_layer(pre_TBE, bias_E, lengths_B, **options)
        return jnp.sum(h_TBH**2) + jnp.sum(last_BH), h_TBH

    (_, h_TBH), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(pre_TBE, bias_E)
    return h_TBH, *grads


if __name__ == "__main__":
    mesh = data_mesh(4, rows_multiple=4, fsdp=2)
    pre_TBE = jax.random.normal(jax.random.key(0), (6, 8, 12))
    bias_E, lengths_B = jnp.linspace(-1, 1, 12), jnp.array([6, 3, 0, 6, 1, 5, 6, 2])
    want = both(pre_TBE, bias_E, lengths_B, implementation="sequential")
    mingru_kernel.forward, mingru_kernel.backward, mingru_kernel.why_not = forward, backward, lambda width: None
    specs = PartitionSpec(None, AXES), PartitionSpec(), PartitionSpec(AXES)
    inputs = zip((pre_TBE, bias_E, lengths_B), specs, strict=True)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in inputs]
    found = {}
    for name, context in (("wrapped", mesh.abstract_mesh), ("bare", None)):
        with use_abstract_mesh(context) if context else use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            compiled = jax.jit(lambda *x: both(*x)).lower(*placed).compile()
        got = compiled(*placed)
        found[name] = {
            "all-gather": str(compiled.as_text()).count("all-gather("),
            "error": max(float(jnp.abs(jax.device_get(x) - y).max()) for x, y in zip(got, want, strict=True)),
            "devices": len(got[0].sharding.device_set),
        }
    print(json.dumps(found))
