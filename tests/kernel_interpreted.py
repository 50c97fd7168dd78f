"""A program, for a process of its own: the GPU kernel in interpret mode, and lowered for a GPU that is not there.

Prints one JSON object: the largest error by shape, and the programs that were lowered.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxds2.model import mosaic

SHAPES = ((1, 2, 128, "g"), (mosaic.TILE, 1, 128, "linear"), (2 * mosaic.TILE + 3, 1, 256, "g"))
"""(frames, rows, channels, candidate): no whole tile, nothing but whole tiles, both and two programs a row."""


def hopper(cores: int) -> use_abstract_mesh:
    """The device that the kernel is to be compiled for."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=cores)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def interpreted(shape) -> float:
    """The largest error."""
    plgpu: Any = mosaic_gpu  # these names are of jax 0.11
    with hopper(8), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=False)):
        return mosaic.probe(*shape)


def lowered(dtype) -> str:
    """The program for CUDA, both directions, forward and backward."""
    x = [jax.ShapeDtypeStruct((405, 4, 256), dtype)] * 2
    state = [jax.ShapeDtypeStruct((4, 256), jnp.float32)] * 2
    options = {"candidate_fn": "linear", "reverses": (False, True)}

    def both(gates, candidates, h0s, dhs, dh_lasts):
        hs, lasts = mosaic.forward(gates, candidates, h0s, **options)
        return lasts, mosaic.backward(gates, candidates, hs, h0s, dhs, dh_lasts, **options)

    with hopper(132):
        return jax.jit(both).trace(x, x, state, x, state).lower(lowering_platforms=("cuda",)).as_text()


if __name__ == "__main__":
    dtypes = (jnp.float32, jnp.bfloat16)
    kernels = {jnp.dtype(dtype).name: lowered(dtype).count("custom_call @mosaic_gpu") for dtype in dtypes}
    print(json.dumps({"errors": [interpreted(shape) for shape in SHAPES], "kernels": kernels}))
