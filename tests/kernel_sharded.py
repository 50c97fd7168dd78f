"""A program, for a process of its own with four CPU devices: the wrapper that keeps a kernel's rows on their devices.

The kernel's place is taken by a portable body. Prints one JSON object: collectives with and without the wrapper, and
the largest error.
"""

import json

import jax
import jax.numpy as jnp
import portable_kernel
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from jaxds2.data.placement import AXES, data_mesh
from jaxds2.model import scan

jax.config.update("jax_num_cpu_devices", 4)


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
    portable_kernel.install(setattr)
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
            "error": max(
                float(jnp.abs(jax.device_get(x) - y).max() / jnp.abs(y).max()) for x, y in zip(got, want, strict=True)
            ),
            "devices": len(got[0].sharding.device_set),
        }
    print(json.dumps(found))
