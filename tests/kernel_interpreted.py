"""A program, for a process of its own: the GPU kernel in interpret mode, and lowered for a GPU that is not there.

Prints one JSON object: the largest error by dtype and shape, and the kernels in each program that was lowered.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jaxds2.data.placement import AXES
from jaxds2.model import mosaic, scan

SHAPES = ((1, 2, 128, "g"), (mosaic.TILE, 1, 128, "linear"), (2 * mosaic.TILE + 3, 1, 256, "g"))
"""(frames, rows, channels, candidate): no whole tile, nothing but whole tiles, both and two programs a row."""


def hopper(cores: int, *shape: int) -> use_abstract_mesh:
    """The device that the kernel is to be compiled for, and the mesh of so many that the training step names."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=cores)
    axes = AXES[: len(shape)]
    return use_abstract_mesh(AbstractMesh(shape, axes, (AxisType.Auto,) * len(shape), abstract_device=device))


def interpreted(shape, dtype) -> float:
    """The largest error."""
    plgpu: Any = mosaic_gpu  # these names are of jax 0.11
    with hopper(8), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=False)):
        return mosaic.probe(*shape, dtype=dtype)


def lowered(dtype, *shape: int) -> dict[str, int]:
    """Kernels in the program for CUDA of a layer's both directions, forward and backward; those inside a shard_map."""
    x = jax.ShapeDtypeStruct((405, 8, 256), dtype)
    options: Any = {"candidate_fn": "linear", "reverses": (False, True), "implementation": "fused"}

    def total(gate, v):
        hs, lasts = scan.mingru_recurrences((gate, gate), (v, v), (None, None), **options)
        return sum(jnp.sum(h.astype(jnp.float32) ** 2) for h in (*hs, *lasts))

    with hopper(132, *shape):
        program = jax.jit(jax.grad(total, (0, 1))).trace(x, x).lower(lowering_platforms=("cuda",)).as_text()
    kernel = "custom_call @mosaic_gpu"
    parts = program.split("manual_computation")
    return {"kernels": program.count(kernel), "on own rows": sum(kernel in part for part in parts[1:])}


if __name__ == "__main__":
    errors = {
        "float32": [interpreted(shape, jnp.float32) for shape in SHAPES],
        "bfloat16": [interpreted(SHAPES[-1], jnp.bfloat16)],
    }
    mosaic.serves = lambda gate_TBD: True
    kernels = {
        "float32, bare": lowered(jnp.float32),
        "bfloat16, 1 x 1": lowered(jnp.bfloat16, 1, 1),
        "bfloat16, 2 x 2": lowered(jnp.bfloat16, 2, 2),
    }
    print(json.dumps(errors | {"kernels": kernels}))
