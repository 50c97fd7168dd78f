"""Start a command as several processes on this machine: a single host, or a test of several.

    python launch/local.py --processes 2 -- python train.py --config configs/demo.py

Each gets `--coordinator`, `--processes` and `--process`, and its lines are printed with its number. SIGINT and SIGTERM
are passed on to all. When one fails the others are ended. Exit code: that of the first that failed; 75 where any was
stopped and can be resumed; else 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import threading
import time
from typing import IO

STOPPED = 75


def main(argv: list[str] | None = None) -> int:
    """Run, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--cpu-devices", type=int, metavar="D", help="CPUs only: devices of each process")
    parser.add_argument("--port", type=int, help="where process 0 listens (default: a free one)")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds that the others have after a failure")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command or arguments.processes < 1:
        parser.error("give a command after --, and at least one process")
    environment = dict(os.environ)
    if arguments.cpu_devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(arguments.cpu_devices)}
    together = ["--coordinator", f"localhost:{arguments.port or free_port()}", "--processes", str(arguments.processes)]
    children: list[subprocess.Popen[str]] = []

    def pass_on(number: int, _: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nobody handles it, so it would end them unsaved
    for i in range(arguments.processes):
        child = subprocess.Popen(
            [*command, *together, "--process", str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C comes once, from here
        )
        children.append(child)
    readers = [threading.Thread(target=prefix, args=(i, child.stdout)) for i, child in enumerate(children)]
    for reader in readers:
        reader.start()
    code = wait(children, arguments.grace)
    for reader in readers:
        reader.join()
    return code


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def prefix(number: int, lines: IO[str] | None) -> None:
    """Print what a process says."""
    for line in lines or ():
        print(f"[{number}] {line}", end="", flush=True)


def wait(children: list[subprocess.Popen[str]], grace: float) -> int:
    """Wait for all; once one has failed, for `grace` seconds."""
    failed: int | None = None
    deadline = float("inf")
    while None in (codes := [child.poll() for child in children]):  # asked one by one, all of them
        bad = next((code for code in codes if code not in (None, 0, STOPPED)), None)
        if failed is None and bad is not None:
            failed, deadline = bad, time.monotonic() + grace
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)
    codes = [child.returncode for child in children]
    if failed is None:
        failed = next((code for code in codes if code not in (0, STOPPED)), None)
    if failed is not None:
        return failed if failed > 0 else 128 - failed
    return STOPPED if STOPPED in codes else 0


if __name__ == "__main__":
    raise SystemExit(main())
