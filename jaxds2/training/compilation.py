"""The gradient step compiled for each batch shape before the first step."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.stages import Wrapped

from jaxds2.data.pipeline import filler_batch
from jaxds2.data.placement import place
from jaxds2.data.plan import BatchPlan, Bucket
from jaxds2.model.deepspeech2 import Params
from jaxds2.training.monitor import Monitor
from jaxds2.training.step import GradientStep

LOOK_AHEAD = 1000
"""Batch shapes that occur in this many coming steps are compiled before the first."""


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
    gradient_step: Wrapped,
    params: Params,
    mesh: Mesh,
    buckets: Sequence[Bucket],
    monitor: Monitor,
    should_stop: Callable[[], bool],
) -> dict[tuple[int, ...], GradientStep]:
    """The gradient step compiled for each batch shape, by the shape of this process' audio_BS; fewer after a stop."""
    if not buckets:
        return {}
    compiled: dict[tuple[int, ...], GradientStep] = {}
    temporaries: list[int] = []
    start = time.perf_counter()
    for done, bucket in enumerate(bucket.share(jax.process_count()) for bucket in buckets):
        if should_stop():
            break
        monitor.preparing("compiling batch shape", done, len(buckets))
        executable = gradient_step.lower(params, place(filler_batch(bucket), mesh)).compile()
        compiled[bucket.rows, bucket.num_samples] = executable
        if (memory := executable.memory_analysis()) is not None:
            temporaries.append(memory.temp_size_in_bytes)
    monitor.preparing("", len(buckets), len(buckets))
    needs = f"; a step needs up to {max(temporaries, default=0) / 2**20:.0f} MiB a device beside weights and optimizer"
    monitor.message(
        f"compiled {len(compiled)} of {len(buckets)} batch shapes in {time.perf_counter() - start:.0f} s"
        f"{needs if temporaries else ''}"
    )
    return compiled
