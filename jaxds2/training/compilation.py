"""The gradient step compiled for each batch shape before the first step, and the memory that it takes."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped

from jaxds2.config import Config
from jaxds2.data.pipeline import Batch, filler_batch
from jaxds2.data.placement import place
from jaxds2.data.plan import BatchPlan, Bucket
from jaxds2.model.deepspeech2 import Params

if TYPE_CHECKING:
    from jaxds2.training.monitor import Monitor  # brings tqdm and TensorBoard, which recognizing needs neither of

LOOK_AHEAD = 1000
"""Batch shapes that occur in this many coming steps are compiled before the first."""


class OutOfMemoryError(ValueError):
    """The device has too little memory for a batch; the message says which, and what would fit."""


def keep_compiled(platform: str) -> None:
    """Keep compiled programs in the user's cache folder, so that a second start finds them.

    Not on CPUs, where XLA may refuse a program of its own, or run one for a processor that this machine does not have.
    A folder that the user has chosen (JAX_COMPILATION_CACHE_DIR) stays.
    """
    if platform != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxds2" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def shapes_ahead(plan: BatchPlan, first_step: int, stop_step: int) -> list[Bucket]:
    """The batch shapes that the coming steps have, in the order in which they are needed."""
    coming = range(first_step, min(stop_step, first_step + LOOK_AHEAD))
    return list(dict.fromkeys(plan.step(step).bucket for step in coming))


def compile_ahead(
    config: Config,
    gradient_step: Wrapped,
    params: Params,
    mesh: Mesh,
    buckets: Sequence[Bucket],
    monitor: "Monitor",
    should_stop: Callable[[], bool],
    *,
    planned: int,
) -> dict[tuple[int, ...], Compiled]:
    """The gradient step compiled for each of `buckets`, by the shape of this process' audio_BS; fewer after a stop.

    `planned` batch shapes are there in all.

    Raises:
      OutOfMemoryError: there is too little memory to compile one.
    """
    if not buckets:
        return {}
    compiled: dict[tuple[int, ...], Compiled] = {}
    needed: dict[tuple[int, ...], int] = {}
    start = time.perf_counter()
    for done, bucket in enumerate(bucket.share(jax.process_count()) for bucket in buckets):
        if should_stop():
            break
        monitor.preparing("compiling batch shape", done, len(buckets))
        shape = bucket.rows, bucket.num_samples
        compiled[shape] = compile_shape(config, gradient_step, params, filler_batch(bucket), mesh, monitor)
        if (temporaries := temporary_bytes(compiled[shape])) is not None:
            needed[shape] = temporaries
    monitor.preparing("", len(buckets), len(buckets))
    message = f"compiled {len(compiled)} of {planned} batch shapes in {time.perf_counter() - start:.0f} s"
    if len(compiled) == len(buckets) < planned:
        message += ", those that come up in the next steps"
    if needed:
        most = max(needed, key=needed.__getitem__)
        message += (
            f"; a step needs up to {_mib(needed[most])} a device beside weights and optimizer, on "
            f"{_describe(config, most)}"
        )
    monitor.message(message)
    return compiled


def compile_shape(
    config: Config, gradient_step: Wrapped, params: Params, batch: Batch, mesh: Mesh, monitor: "Monitor"
) -> Compiled:
    """The gradient step compiled for the shape of this process' `batch`; `train.log` gets what it needs, in a line.

    Raises:
      OutOfMemoryError: there is too little memory to compile it.
    """
    shape = batch.audio_BS.shape
    try:
        compiled = gradient_step.lower(params, place(batch, mesh)).compile()
    except JaxRuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise out_of_memory(config, shape, needed=None, free=free_bytes(mesh)) from e
    if (temporaries := temporary_bytes(compiled)) is not None:
        monitor.log(
            f"{_describe(config, shape)}: a step needs {_mib(temporaries)} a device beside weights and optimizer"
        )
    return compiled


def temporary_bytes(executable: Compiled | None) -> int | None:
    """What a step needs on each device beside its inputs and outputs; None: the compiler did not say."""
    memory = None if executable is None else executable.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def free_bytes(mesh: Mesh) -> int | None:
    """What is free on a device of this process; None: it does not say, as on a CPU."""
    statistics = mesh.local_devices[0].memory_stats() or {}  # those of other processes raise an error
    return statistics["bytes_limit"] - statistics["bytes_in_use"] if "bytes_limit" in statistics else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether XLA could not allocate something."""
    return "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(
    config: Config, shape: tuple[int, ...] | None, *, needed: int | None, free: int | None
) -> OutOfMemoryError:
    """What to say when a step on a batch has run out of memory.

    The temporaries are proportional to the seconds in a batch. A tenth of what is free is left for fragments.

    Args:
      config: the whole configuration.
      shape: of this process' audio_BS; None: all steps went well, it was something beside them.
      needed: see `temporary_bytes`.
      free: see `free_bytes`.
    """
    known = "" if needed is None else f"; a step needs {_mib(needed)} a device beside weights and optimizer"
    known += "" if free is None else f", {_mib(free)} are free" if known else f"; {_mib(free)} are free"
    if shape is not None and shape[0] * jax.process_count() <= config.data.rows_multiple:
        remedy = f"data.rows_multiple={config.data.rows_multiple} allows no fewer rows: lower data.max_duration"
    else:
        share = min(0.9 * free / needed, 0.75) if free is not None and needed else 0.5
        fitting = config.data.batch_seconds * share
        remedy = f"data.batch_seconds is {config.data.batch_seconds:g}: start again with {fitting:.3g}"
    what = "between two steps" if shape is None else f"on {_describe(config, shape)}"
    return OutOfMemoryError(f"out of memory {what}{known}; {remedy}")


def out_of_memory_recognizing(config: Config, shape: tuple[int, ...], *, free: int | None) -> OutOfMemoryError:
    """What to say when a batch has not been recognized for lack of memory; arguments as of `out_of_memory`."""
    known = "" if free is None else f"; {_mib(free)} are free"
    return OutOfMemoryError(
        f"out of memory recognizing {_describe(config, shape)}{known}; leave out the longest recordings, or use a "
        f"device with more memory (data.batch_seconds is {config.data.batch_seconds:g})"
    )


def _describe(config: Config, shape: tuple[int, ...]) -> str:
    """The batches of all processes, as a dry run and the config have them."""
    return f"batches of {shape[0] * jax.process_count()} x {shape[1] / config.features.sample_rate:.2f} s"


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
