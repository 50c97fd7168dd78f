"""Everything that wants measuring on one GPU, in one command, in order of value.

python benchmarks/gpu.py --minutes 9

Each part writes its JSON as soon as it is done, and is left out where that file is already there, so that a second
call goes on where the first one stopped. Where torch is missing its columns are. `--small` runs everything in tiny
shapes on any device, only to see that it runs.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_training
import side_by_side
from gpu_suite import ROOT, Suite

PARTS: tuple[Callable[[Suite], Any], ...] = (
    gpu_kernels.forms,
    gpu_kernels.recurrence,
    gpu_kernels.ctc,
    gpu_training.step,
    gpu_training.peer,
    gpu_training.trace,
    gpu_training.train,
)
"""In order of value."""


def main() -> None:
    """Run the parts that are not done, until the time is over."""
    parser = argparse.ArgumentParser(description="Measure on one GPU.")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part is begun after this time (default: 9)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds over all columns (default: 10)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE, where DEVICE names the GPU")
    parser.add_argument("--config", default="configs/an4.py", help="config of the real run (default: configs/an4.py)")
    parser.add_argument("--small", action="store_true", help="tiny shapes, only to see that it runs")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import jax

    device = jax.devices()[0].device_kind
    suite = Suite(device, 1 if arguments.small else arguments.rounds, arguments.small, arguments.config)
    folder = arguments.out or side_by_side.RESULTS / device.lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for number, part in enumerate(PARTS, 1):
        path = folder / f"{number}-{part.__name__}.json"
        if path.exists():
            print(f"{path} is there; delete it to measure that part again")
            continue
        left = arguments.minutes - (time.perf_counter() - begin) / 60
        if left <= 0:
            print(f"{arguments.minutes:g} minutes are over before part {path.stem}; the same command goes on with it")
            break
        print(f"\n== {path.stem}", flush=True)
        started = time.perf_counter()
        result = part(suite)
        content = header(suite) | {"part": part.__name__, "seconds": time.perf_counter() - started, "results": result}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def header(suite: Suite) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": suite.device,
        "python": platform.python_version(),
        "versions": side_by_side.versions(),
        "rounds": suite.rounds,
    }


if __name__ == "__main__":
    main()
