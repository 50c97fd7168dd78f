"""A program, for a process of its own: the GPU kernels in interpret mode, and lowered for a GPU that is not there.

Prints one JSON object: the largest error by dtype and shape, what a step that asks for the kernels is told, and the
kernels in each program that was lowered.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jaxds2 import ctc_kernel, mosaic
from jaxds2.ctc import ctc_loss
from jaxds2.data.placement import AXES
from jaxds2.model import mingru_kernel, scan
from jaxds2.model.mingru_kernel import TILE

SHAPES = ((1, 2, 128, "g"), (TILE, 1, 128, "linear"), (2 * TILE + 3, 2, 256, "g"))
"""(frames, rows, channels, candidate): no whole tile, nothing but whole tiles, both and two programs a row."""


CTC_SHAPES = ((1, 2, 1), (ctc_kernel.BLOCK, 1, 0), (2 * ctc_kernel.BLOCK + 3, 3, 130))
"""(frames, rows, labels): less than a block, whole blocks, both and two columns a thread."""


def hopper(cores: int, *shape: int) -> use_abstract_mesh:
    """The device that the kernel is to be compiled for, and the mesh of so many that the training step names."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=cores)
    axes = AXES[: len(shape)]
    return use_abstract_mesh(AbstractMesh(shape, axes, (AxisType.Auto,) * len(shape), abstract_device=device))


def interpreted(function, *arguments, **options) -> Any:
    """function(*arguments), kernels interpreted; of a kernel's own probe the largest error."""
    plgpu: Any = mosaic_gpu  # these names are of jax 0.11
    with hopper(8), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return function(*arguments, **options)


def asked_for_in_a_step() -> list[str | None]:
    """What keeps the kernels from being used, asked while a training step is traced over a mesh."""
    recurrence, ctc = (functools.partial(interpreted, module.probe) for module in (mingru_kernel, ctc_kernel))
    found = []

    def step(x):
        with use_abstract_mesh(AbstractMesh((1, 1), AXES, (AxisType.Auto,) * 2)):
            found.append(mosaic.fault(recurrence, mingru_kernel.TOLERANCES))
            found.append(mosaic.fault(ctc, {"float32": ctc_kernel.TOLERANCE}))
        return x

    jax.jit(step)(1.0)
    return found


def loss_and_gradient() -> float:
    """Largest difference of CTC's gradient by the kernel from that by the loop, plus that of the loss."""
    logits_BUV = 3 * jax.random.normal(jax.random.key(0), (3, 27, 6))
    labels_BN = jax.random.randint(jax.random.key(1), (3, 9), 1, 6)
    given = jnp.array([27, 20, 16]), labels_BN, jnp.array([9, 4, 0])

    def both(logits_BUV):
        return jax.value_and_grad(lambda x: jnp.sum(ctc_loss(x, *given, implementation="fused")))(logits_BUV)

    want, (why_not, variables) = both(logits_BUV), (ctc_kernel.why_not, ctc_kernel.variables)
    calls = []
    ctc_kernel.why_not, ctc_kernel.variables = lambda labels: None, lambda *x: calls.append(x) or variables(*x)
    jax.clear_caches()  # else it might still be the loop that was traced
    got = interpreted(both, logits_BUV)
    ctc_kernel.why_not, ctc_kernel.variables = why_not, variables
    assert len(calls) == 1
    return float(sum(jnp.max(jnp.abs(x - y)) for x, y in zip(got, want, strict=True)))


def lowered(function, *inputs, mesh: tuple[int, ...]) -> dict[str, int]:
    """Kernels in the program for CUDA of a function; computations that each device does on its own rows."""
    with hopper(132, *mesh):
        program = jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    return {
        "kernels": program.count("custom_call @mosaic_gpu"),
        "on own rows": program.count("sdy.manual_computation("),
    }


def recurrence(dtype, *mesh: int) -> dict[str, int]:
    """Forward and backward of a layer."""

    def total(pre_TBE, bias_E, lengths_B):
        options: Any = {"candidate_fn": "linear", "reverses": (False, True), "implementation": "auto"}
        h_TBH, last_BH = scan.mingru_layer(pre_TBE, bias_E, lengths_B, **options)
        return jnp.sum(h_TBH.astype(jnp.float32) ** 2) + jnp.sum(last_BH**2)

    shapes = ((405, 8, 1024), dtype), ((1024,), jnp.float32), ((8,), jnp.int32)
    return lowered(jax.grad(total, (0, 1)), *(jax.ShapeDtypeStruct(*x) for x in shapes), mesh=mesh)


def ctc(*mesh: int) -> dict[str, int]:
    """Loss and gradient."""

    def total(*given):
        return jnp.sum(ctc_loss(*given, implementation="fused"))

    shapes = ((8, 405, 29), jnp.float32), ((8,), jnp.int32), ((8, 200), jnp.int32), ((8,), jnp.int32)
    return lowered(jax.grad(total), *(jax.ShapeDtypeStruct(*x) for x in shapes), mesh=mesh)


if __name__ == "__main__":
    errors = {
        "float32": [interpreted(mingru_kernel.probe, *shape) for shape in SHAPES],
        "bfloat16": [interpreted(mingru_kernel.probe, *SHAPES[-1], dtype=jnp.bfloat16)],
        "ctc": [interpreted(ctc_kernel.probe, *shape) for shape in CTC_SHAPES],
        "loss and gradient": loss_and_gradient(),
        "asked for in a step": asked_for_in_a_step(),
    }
    mingru_kernel.why_not = ctc_kernel.why_not = lambda width: None
    kernels = {
        "float32, bare": recurrence(jnp.float32),
        "bfloat16, 1 x 1": recurrence(jnp.bfloat16, 1, 1),
        "bfloat16, 2 x 2": recurrence(jnp.bfloat16, 2, 2),
        "ctc, bare": ctc(),
        "ctc, 2 x 2": ctc(2, 2),
    }
    print(json.dumps(errors | {"kernels": kernels}))
