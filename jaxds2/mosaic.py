"""Kernels for NVIDIA GPUs, in Pallas on Mosaic GPU: what they need, how they are built, and whether one works here.

Mosaic GPU changes from release to release, so ctc_kernel.py and model/mingru_kernel.py alone use it, and their kernels
only after they have been found to work; the portable forms are beside their callers.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import PartitionSpec

LANES = 128
"""Threads of a warpgroup, which is a program of a grid: each has one element of an array of so many."""
MIN_JAX = (0, 11)
MIN_CAPABILITY = 9.0


def lacking() -> str | None:
    """What the default device or JAX lacks for any kernel; None: nothing."""
    if jax.__version_info__[:2] < MIN_JAX:
        return f"it needs jax {'.'.join(map(str, MIN_JAX))} or later, this is {jax.__version__}"
    if jax.default_backend() != "gpu":
        return f"it needs a GPU, this is a {jax.default_backend()}"
    device = jax.local_devices()[0]
    if float(getattr(device, "compute_capability", 0.0)) < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY}, the {device.device_kind} has another"
    return None


def fault(error: Callable[..., float], tolerances: dict[str, float]) -> str | None:
    """What is wrong with a kernel, by its error in each dtype against what that may be; None: nothing.

    It is tried in a thread of its own, which knows nothing of the trace, the mesh and the guards of whoever asks.
    """
    for dtype, tolerance in tolerances.items():
        try:
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(error, dtype=dtype).result()
        except Exception as e:  # whatever an unstable API raises, training goes on without it
            return f"in {dtype}: {type(e).__name__}: {str(e).partition(chr(10))[0]}"
        if not found < tolerance:  # NaN too
            return f"it is off by {found:.1e} in {dtype} on this device"
    return None


def kernel(
    body: Callable[..., None],
    *,
    out_type: Sequence,
    grid: tuple[int, ...],
    names: tuple[str, ...],
    scratch: Sequence = (),
) -> Any:
    """`plgpu.kernel` as ours are built.

    Mosaic's own barriers, two around every store, are left out: a body has to call `commit_smem` after it has written
    what other threads read, and once more before a tile that has been read is given back. Its layout inference is left
    out too, which takes from seconds to a minute for our bodies, so arrays that a loop carries need `lanes`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    semantics: Any = plgpu.LoweringSemantics.Lane  # pyright: ignore[reportAttributeAccessIssue]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=names,
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, approx_math=True, lowering_semantics=semantics
        ),
    )


def lanes(x_L: jax.Array) -> jax.Array:
    """A constant of `LANES` elements with one in each thread, as loads have it and as a loop carries it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.layout_cast(x_L, plgpu.Layout.WG_STRIDED((LANES,), vec_size=1))


def on_own_rows(kernel: Callable[..., Any], *inputs: jax.Array) -> Any:
    """kernel(*inputs), each device on its own rows of arrays (T, B, D) and (B, D); arrays (D,) are whole on each.

    XLA cannot look into a kernel, so by itself it would gather all rows onto every device. The mesh is that of
    `jax.sharding.use_abstract_mesh`, rows are split over all of its axes; without one the kernel is simply called.

    Args:
      kernel: takes arrays and returns arrays of two or more dimensions; rows are independent.
      inputs: arrays, rows in the last dimension but one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return kernel(*inputs)

    def rows(x: jax.Array) -> PartitionSpec:
        return PartitionSpec(*(None,) * (x.ndim - 2), mesh.axis_names) if x.ndim > 1 else PartitionSpec()

    out_specs = jax.tree.map(rows, jax.eval_shape(kernel, *inputs))
    in_specs = tuple(map(rows, inputs))
    return jax.shard_map(kernel, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*inputs)
