"""What the parts of the GPU suite share: the device and its data sheet, calls that wait for it, and the clock."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
FORMS: "tuple[Implementation, ...]" = ("associative", "fused", "sequential")
LOSSES: "tuple[Loss, ...]" = ("fused", "optax")


@dataclass(frozen=True)
class Suite:
    """What all parts share."""

    device: str
    rounds: int
    small: bool
    """Tiny shapes, only to see that it runs."""
    config: str
    """Config file of the real training run."""

    def peak(self, table: Mapping[str, float]) -> float | None:
        """This device's entry in a table of data sheets."""
        return next((value for name, value in table.items() if name in self.device), None)


def clock(columns: Mapping[str, Callable[[], Any]], count: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each call by the clock, the columns taking turns; two rounds before are not counted.

    A call returns when its device is done. One that fails, for want of memory say, is reported and left out.
    """
    times: dict[str, list[float]] = {name: [] for name in columns}
    failed = set()
    for number in range(count + 2):
        for name, call in columns.items():
            if name in failed:
                continue
            begin = time.perf_counter()
            try:
                call()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
                failed.add(name)
                continue
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: {"wall ms": statistics.median(values)} for name, values in times.items() if values}


def compiled(function: Callable[..., Any], *inputs: Any) -> tuple[Callable[[], Any], int]:
    """A call of a jitted function that waits for its end, and the bytes of its temporaries."""
    import jax

    step = jax.jit(function).lower(*inputs).compile()
    return lambda: jax.block_until_ready(step(*inputs)), side_by_side.temporaries(step)


def torch_cuda() -> Any:
    """torch and its device, the GPU where it has one; None without torch."""
    torch = side_by_side.torch_or_none(1)
    return None if torch is None else (torch, "cuda" if torch.cuda.is_available() else "cpu")


def waiting(torch: Any, device: str, step: Callable[[], Any]) -> Callable[[], Any]:
    """A call that returns when the device is done."""

    def call():
        value = step()
        if device == "cuda":
            torch.cuda.synchronize()
        return value

    return call
