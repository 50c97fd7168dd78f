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
from jaxds2.model import mosaic, scan

jax.config.update("jax_num_cpu_devices", 4)


def row_by_row(form, kinds):
    """form(row of every array) for each row in turn, the results put together again."""
    rows = kinds[0][0].shape[-2]

    def one(row):
        own = [[lax.dynamic_slice_in_dim(x, row, 1, axis=x.ndim - 2) for x in kind] for kind in kinds]
        return form(*own)

    outs = lax.map(one, jnp.arange(rows))
    return jax.tree.map(lambda x: jnp.moveaxis(x[..., 0, :], 0, -2), outs)


def forward(gates, candidates, h0s, *, candidate_fn, reverses):
    """The contract of mosaic.forward."""

    def form(*kinds):
        return list(map(list, scan._each_way(scan._scan_mingru, *kinds, reverses, candidate_fn=candidate_fn)))

    return row_by_row(form, (gates, candidates, h0s))


def backward(gates, candidates, hs, h0s, dhs, dh_lasts, *, candidate_fn, reverses):
    """The contract of mosaic.backward."""

    def form(*kinds):
        return list(map(list, scan._each_way(scan._scan_mingru_gradient, *kinds, reverses, candidate_fn=candidate_fn)))

    return row_by_row(form, (gates, candidates, hs, h0s, dhs, dh_lasts))


def both(gate_TBD, candidate_TBD, implementation: scan.Implementation = "fused"):
    """States and gradients of a recurrence."""

    def total(gate_TBD, candidate_TBD):
        h_TBD, last_BD = scan.mingru_recurrence(gate_TBD, candidate_TBD, implementation=implementation)
        return jnp.sum(h_TBD**2) + jnp.sum(last_BD), h_TBD

    (_, h_TBD), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(gate_TBD, candidate_TBD)
    return h_TBD, *grads


if __name__ == "__main__":
    mesh = data_mesh(4, rows_multiple=4, fsdp=2)
    inputs = jax.random.normal(jax.random.key(0), (2, 6, 8, 3))
    want = both(*inputs, implementation="sequential")
    mosaic.forward, mosaic.backward, mosaic.serves = forward, backward, lambda gate: True
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, AXES))) for x in inputs]
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
