"""What the benchmarks share: pinned threads, interleaved rounds, a table with ratios, JSON.

Machines are noisy, so nothing here is compared between runs: all columns of a table are timed in turn, round by round,
in one process, by the time that the process used (user and system) and by the clock.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "librosa", "soundfile", "torch", "torchaudio")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def start(
    description: str, *, threads: int = 1, rounds: int = 10, manifest: bool = False, **counts: int
) -> argparse.Namespace:
    """Read the options that every benchmark has and pin this process. Call it before jax or torch are imported.

    With `manifest` there is an option for one, else None; `counts` are further options, whole numbers with a default.
    `commit` and `load_average` say, for the JSON, what is measured and how busy the machine is before.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds", type=_at_least_one, default=rounds, help=f"rounds over all columns (default: {rounds})"
    )
    parser.add_argument("--threads", type=_at_least_one, default=threads, help=f"cores to use (default: {threads})")
    parser.add_argument("--small", action="store_true", help="tiny shapes, only to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/DATE-DEVICE-NAME.json")
    if manifest:
        parser.add_argument("--manifest", type=Path, metavar="FILE", help="recordings to read (default: made up)")
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=_at_least_one, default=default, help=f"(default: {default})")
    arguments = parser.parse_args()
    arguments.commit, arguments.load_average = _commit(), os.getloadavg() if hasattr(os, "getloadavg") else None
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"  # process time says nothing of an accelerator
    sys.path.insert(0, str(ROOT))
    from jaxds2.allocator import keep_pages

    keep_pages()  # for every column alike
    return arguments


def rounds(columns: Mapping[str, Callable[[], Any]], count: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each call, by process time and by the clock, and its peak memory, measured afterwards.

    One round before is not counted. The columns take turns, and each round begins with another one. On one thread the
    first figure says more, because other processes hardly touch it; on several the second does, because a library
    whose threads spin while they wait looks slower than it is by the first.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    for number in range(count + 1):
        for name in turned(list(columns), number):
            begin = time.process_time(), time.perf_counter()
            columns[name]()
            end = time.process_time(), time.perf_counter()
            if number:
                times[name].append((1e3 * (end[0] - begin[0]), 1e3 * (end[1] - begin[1])))
    medians = {
        name: {
            "CPU ms": statistics.median(cpu for cpu, _ in pairs),
            "wall ms": statistics.median(wall for _, wall in pairs),
        }
        for name, pairs in times.items()
    }
    for name, call in columns.items():
        if (mebibytes := peak_mib(call)) is not None:
            medians[name]["peak MiB"] = mebibytes
    return medians


def turned(names: Sequence[str], number: int) -> list[str]:
    """The names in the order of a round, so that no column always follows the same pause or the same end of a round."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def peak_mib(call: Callable[[], Any]) -> float | None:
    """The most memory that a call takes beside what is held before it, its results included; None but on Linux.

    By the process's own peak, set back before: a process for each column would count the libraries that it imports,
    which are larger than most of what is compared here.
    """
    time.sleep(0.1)  # JAX's threads free the temporaries of the last call shortly after its result is there
    try:
        # What earlier calls freed is kept (`keep_pages`) and would be taken again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _held_at_most_mib()
    call()
    return max(0.0, _held_at_most_mib() - before)


def _held_at_most_mib() -> float:
    """The process's peak since it was last set back."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def torch_or_none(threads: int) -> Any:
    """torch with so many threads; None, and a line that says what to install, where it is missing."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        missing("torch", extra="bench")
        return None
    torch.set_num_threads(threads)
    return torch


@functools.cache
def missing(package: str, *, extra: str) -> None:
    """Say, once, what would bring the columns of a package that is not there."""
    print(f"{package} is not installed, so its columns are missing: pip install -e '.[{extra}]', or make bench")


def jit(function: Callable[..., Any], *, donate_argnums: Sequence[int] = ()) -> Any:
    """`jax.jit` with the options that train.py compiles with, so that what is timed is what trains.

    Arrays go in as arguments: XLA may compute ahead with one that the function closes over, which torch cannot.
    """
    import jax

    from jaxds2.compiler import compiler_options

    options = compiler_options(jax.default_backend())
    return jax.jit(function, donate_argnums=donate_argnums, compiler_options=options)


def temporaries(compiled: Any) -> int:
    """Bytes that a compiled JAX function needs beside its inputs and outputs."""
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def error(value: Any, exact: Any) -> float | str:
    """Largest difference over the largest exact value."""
    import numpy as np

    difference = float(np.abs(np.asarray(value) - exact).max() / np.abs(exact).max())
    return difference if math.isfinite(difference) else "not finite"


def table(
    title: str, rows: Mapping[str, Mapping[str, float | str]], *, base: str | None = None, by: str = "CPU ms"
) -> str:
    """Rows of numbers; with `base`, the name of a row, a column `x`: each number of the column `by` over that row's."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = ["", *columns, *(["x"] if base else [])]
    lines = [head]
    for name, row in rows.items():
        cells = [_cell(row.get(column, "")) for column in columns]
        if base:
            cells.append(f"{float(row[by]) / float(rows[base][by]):.2f}")
        lines.append([name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    body = (
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return f"\n{title}\n" + "\n".join(body)


def ratio_bar(
    rows: Mapping[str, Mapping[str, float | str]], name: str, base: str, *, by: str = "CPU ms", at_least: float
) -> list[dict[str, Any]]:
    """The bar that a row's figure is so many times that of row `base`; none where a row is missing."""
    if name not in rows or base not in rows:
        return []
    return [bar(f"{by}, {name} over {base}", float(rows[name][by]) / float(rows[base][by]), at_least=at_least)]


def bar(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """Print a goal of the project, and whether a figure meets it; what is printed, for the JSON."""
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    goal = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    print(f"bar: {what}: {value:.3g}, {goal}: {'met' if met else 'missed'}")
    return {"bar": what, "value": value, "goal": goal, "met": met}


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def save(name: str, arguments: argparse.Namespace, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the results with the versions and the machine they are from; tiny shapes only where --json says so."""
    if arguments.small and arguments.json is None:
        return
    path = arguments.json or RESULTS / f"{datetime.date.today().isoformat()}-cpu-{name}.json"
    content = {
        "benchmark": name,
        "commit": arguments.commit,
        "device": "cpu",
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": versions(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "load average at start": arguments.load_average,
        "results": list(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Of the packages that the figures depend on; None for one that is missing."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """The one that is checked out, `-dirty` behind it where files differ; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
