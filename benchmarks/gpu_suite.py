"""What the parts of the GPU suite share: the device and its data sheet, calls that wait for it, the clock, memory."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2.ctc import Implementation as Loss
    from jaxds2.model.scan import Implementation

ROOT = Path(__file__).parents[1]
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by the data sheets, by a part of the device's name."""
PEAK_BYTES = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}
"""Bytes per second of the GPU's memory, likewise."""
LOSSES: "tuple[Loss, ...]" = ("fused", "optax")
MIB = 2**20

Block = Callable[[], dict[str, Any]]
"""A piece of a part that is measured and written as one; a result with the key `error` has failed."""


@dataclass(frozen=True)
class Suite:
    """What all parts share."""

    device: str
    platform: str
    rounds: int
    small: bool
    """Tiny shapes, only to see that it runs."""
    config: str | None
    """Config file of the real training run; None: there is none."""
    kernel: str | None = None
    """Why the fused kernel is not used; None: it has passed its part."""
    until: float = inf
    """When the process of the part is killed, by time.monotonic()."""

    def peak(self, table: Mapping[str, float]) -> float | None:
        """This device's entry in a table of data sheets."""
        return next((value for name, value in table.items() if name in self.device), None)

    def forms(self, width: int, *of: "Implementation") -> "tuple[Implementation, ...]":
        """Those forms of the recurrence that run what they name: `fused` is the kernel, or on a CPU one pass."""
        from jaxds2.model.mingru_kernel import CHANNELS

        kernel = self.platform == "cpu" or (self.kernel is None and width % CHANNELS == 0)
        return tuple(form for form in of if form != "fused" or kernel)


@dataclass(frozen=True)
class Column:
    """A call that returns when its device is done, and the bytes that it needs, inputs and outputs included."""

    call: Callable[[], Any]
    needs: int | None = None
    peak: Callable[[], int | None] = lambda: None
    """Makes a call; the most bytes that were in use meanwhile, None where that cannot be told."""


def timed(
    title: str, builders: Mapping[str, Callable[[], Column]], suite: Suite, *, base: str | None = None
) -> dict[str, Any]:
    """Columns by name, with those that failed and why; also printed, beside `base` where that is there.

    Raises:
      RuntimeError: all failed.
    """
    table, errors = clock(builders, suite.rounds)
    base = base if base in table else None
    print(side_by_side.table(title, table, base=base, by="wall ms"), flush=True)
    found: dict[str, Any] = {"title": title, "columns": table}
    if errors:
        found["error"] = "; ".join(f"{name}: {error}" for name, error in errors.items())
        if not table:
            raise RuntimeError(found["error"])
    return found


def clock(
    builders: Mapping[str, Callable[[], Column]], count: int
) -> tuple[dict[str, dict[str, float | str]], dict[str, str]]:
    """Median milliseconds of each column's call by the clock, and the errors of those that failed.

    The columns take turns; two calls before are not counted, the second of which is asked for its memory. A column that
    fails, for want of memory say, is left out from there on.
    """
    columns: dict[str, Column] = {}
    times: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    errors: dict[str, str] = {}

    def one(name: str, number: int) -> None:
        if number == -2:
            columns[name] = builders[name]()
            columns[name].call()
        elif number == -1:
            peaks[name] = columns[name].peak()
        else:
            begin = time.perf_counter()
            columns[name].call()
            times.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))

    for number in range(-2, count):
        for name in builders:
            if name not in errors:
                try:
                    one(name, number)
                except Exception as e:
                    errors[name] = one_line(e)
                    columns.pop(name, None)
                    times.pop(name, None)
    table: dict[str, dict[str, float | str]] = {}
    for name, values in times.items():
        table[name] = {"wall ms": statistics.median(values)}
        for key, value in (("needs, MiB", columns[name].needs), ("peak, MiB", peaks[name])):
            if value is not None:
                table[name][key] = value / MIB
    return table, errors


def one_line(error: Exception) -> str:
    """Its type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def compiled(function: Callable[..., Any], *inputs: Any) -> Column:
    """A jitted function on its inputs."""
    import jax

    step = jax.jit(function).lower(*inputs).compile()
    return jax_column(lambda: step(*inputs), step)


def jax_column(call: Callable[[], Any], *programs: Any) -> Column:
    """A call that runs these compiled programs."""
    import jax

    def most() -> int:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    def finished() -> Any:
        return jax.block_until_ready(call())

    def peak() -> int | None:
        before = most()
        finished()
        return after if (after := most()) > before else None  # None: an earlier moment of this process took more

    return Column(finished, needs(*programs), peak)


def needs(*programs: Any) -> int | None:
    """Bytes of the largest program's inputs, outputs and temporaries; None: nobody says."""
    found = [p.memory_analysis() for p in programs]
    if not found or None in found:
        return None
    return max(
        m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes for m in found
    )


def torch_columns(names: Sequence[str], builder: Callable[[Any, str, str], Column]) -> dict[str, Callable[[], Column]]:
    """A builder for each name, which is given torch, its device and the name; none where torch is not installed.

    One that cannot be imported is an error of these columns alone.
    """
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed, so its columns are missing")
        return {}
    return {name: lambda name=name: builder(*torch_device(), name) for name in names}


def torch_device() -> tuple[Any, str]:
    """torch and its device, the GPU where it has one. Without TF32, as JAX has to be told too."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch, "cuda" if torch.cuda.is_available() else "cpu"


def torch_column(torch: Any, device: str, step: Callable[[], Any]) -> Column:
    """A step of torch."""

    def call() -> Any:
        value = step()
        if device == "cuda":
            torch.cuda.synchronize()
        return value

    def peak() -> int | None:
        if device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()

    return Column(call, None, peak)


def named(names: Sequence[str], builder: Callable[[Any], Column]) -> dict[str, Callable[[], Column]]:
    """A builder for each name, which it is given."""
    return {name: lambda name=name: builder(name) for name in names}
