"""How long the gradient of seven layers takes to trace and to compile: forms of the recurrence, layers unrolled or not.

python benchmarks/bench_compile.py
"""

import argparse
import time
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2.model import scan

COLUMNS: dict[str, tuple["scan.Implementation", bool]] = {
    "fused": ("fused", False),
    "fused-scan-layers": ("fused", True),
    "sequential": ("sequential", False),
    "associative": ("associative", False),
    "associative-scan-layers": ("associative", True),
}
"""Name: form of the recurrence, and whether the layers are one loop."""


def main() -> None:
    """Print the table and write it."""
    arguments = side_by_side.start("Compilation, side by side.", threads=2, rounds=3)
    side_by_side.save("compile", arguments, [compare(1 if arguments.small else 7, arguments)])


def compare(layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile every form in turn, each time from a new trace, so that nothing is found in a cache."""
    import statistics

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COLUMNS}
    trace_and_compile(layers, *next(iter(COLUMNS.values())))  # imports and starts XLA, which no column is to pay for
    for number in range(arguments.rounds):
        for name in side_by_side.turned(list(COLUMNS), number):
            times[name].append(trace_and_compile(layers, *COLUMNS[name]))
    table = {
        name: {
            "CPU ms": statistics.median(compiling for _, compiling in pairs),
            "tracing, ms": statistics.median(tracing for tracing, _ in pairs),
        }
        for name, pairs in times.items()
    }
    title = f"compiling the gradient of {layers} bidirectional layers of 256, float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base="fused"))
    return {"what": "compile", "layers": layers, "columns": table}


def trace_and_compile(layers: int, form: "scan.Implementation", scan_layers: bool) -> tuple[float, float]:
    """Milliseconds of process time to trace, and to compile."""
    import jax
    import jax.numpy as jnp

    from jaxds2.config import ModelConfig
    from jaxds2.model.deepspeech2 import create

    apply, params = create(80, 29, ModelConfig(layers=layers, scan=form, scan_layers=scan_layers), dtype=jnp.float32)
    features_BTF, frames_B = jnp.zeros((4, 1000, 80)), jnp.full((4,), 1000, jnp.int32)

    def total(params, features_BTF, frames_B):
        return jnp.sum(apply(params, features_BTF, frames_B)[0])

    begin = time.process_time()
    lowered = side_by_side.jit(jax.grad(total)).lower(params, features_BTF, frames_B)
    traced = time.process_time()
    lowered.compile()
    return 1e3 * (traced - begin), 1e3 * (time.process_time() - traced)


if __name__ == "__main__":
    main()
