"""Everything that wants measuring on one GPU, in one command, in order of value.

python benchmarks/gpu.py --minutes 9

Each part runs in a process of its own with its share of the time that is left, so that one that hangs or crashes costs
no more than that. A part consists of blocks; its JSON is written after each. The same command goes on with the
blocks that are not there, then tries those that failed once more; `--only` names parts or blocks. Where torch is
missing its columns are.
`--small` runs everything in tiny shapes on any device, only to see that it runs; the training run then needs --config.

Exit code: 0 all is measured, 1 something failed, 75 the time is over and the same command goes on.
"""

import argparse
import datetime
import json
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_parts
import gpu_peer
import gpu_training
import side_by_side
from gpu_suite import ROOT, Suite

PARTS = (
    (gpu_kernels.kernel, 80),
    (gpu_kernels.forms, 40),
    (gpu_kernels.recurrence, 100),
    (gpu_kernels.ctc, 50),
    (gpu_training.step, 140),
    (gpu_peer.peer, 50),
    (gpu_training.trace, 40),
    (gpu_training.train, 60),
)
"""In order of value, each with its weight: about the seconds that it may take of nine minutes."""

DEVICE_SECONDS = 120
PACKAGES = (*side_by_side.PACKAGES, "flax", "jax-cuda12-plugin", "jax-cuda13-plugin")


def main() -> int:
    """Run what is not done, until the time is over."""
    parser = argparse.ArgumentParser(description="Measure on one GPU.")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, the start included (default: 9)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds over all columns (default: 10)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE, where DEVICE names the GPU")
    parser.add_argument("--config", help="config of the real run (default: configs/an4.py; with --small none)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these parts or blocks, kernel say")
    parser.add_argument("--small", action="store_true", help="tiny shapes, only to see that it runs")
    arguments = parser.parse_args()
    end = gpu_parts.now() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # so that the process of a part is ended too
    sys.path.insert(0, str(ROOT))
    try:
        kind, device = find_device()
    except (subprocess.SubprocessError, ValueError) as e:
        print(f"JAX finds no device: {e}", file=sys.stderr)
        return 1
    if kind == "cpu" and not arguments.small:
        print("JAX finds no GPU here; --small tries everything in tiny shapes on any device", file=sys.stderr)
        return 1
    suite = Suite(
        device=device,
        platform=kind,
        rounds=1 if arguments.small else arguments.rounds,
        small=arguments.small,
        config=arguments.config or (None if arguments.small else "configs/an4.py"),
    )
    names = gpu_parts.names_of([part for part, _ in PARTS], suite)
    if unknown := [name for name in arguments.only if name not in names]:
        parser.error(f"--only: there is no part or block {' '.join(unknown)}; there are {' '.join(names)}")
    folder = arguments.out or side_by_side.RESULTS / device.lower().replace(" ", "-")
    return gpu_parts.measure(
        PARTS, suite, folder, end, header(suite), kernel_fault=gpu_kernels.kernel_fault, only=arguments.only
    )


def find_device() -> tuple[str, str]:
    """Platform and name of JAX' first device, asked for in another process, since JAX takes most of a GPU's memory.

    Raises:
      SubprocessError: it does not start, or not in time. ValueError: it answers something else.
    """
    question = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind]))"
    done = subprocess.run(
        [sys.executable, "-c", question], check=True, stdout=subprocess.PIPE, text=True, timeout=DEVICE_SECONDS
    )
    kind, device = json.loads(done.stdout.splitlines()[-1] if done.stdout else "")
    return kind, device


def header(suite: Suite) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    from jaxds2.hosts import code_version

    return {
        "date": datetime.date.today().isoformat(),
        "device": suite.device,
        "python": platform.python_version(),
        "code": code_version(),
        "versions": side_by_side.versions(PACKAGES),
        "rounds": suite.rounds,
    }


if __name__ == "__main__":
    sys.exit(main())
