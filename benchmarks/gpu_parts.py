"""The parts of the GPU suite, each in a process of its own and written to its file block by block.

A part is a function that names its blocks. Its file says which block is running, so whatever ends the process, a
crash, a hang or the end of the time, costs that block and no other, and is written down as its error.

    {"part": ..., "device": ..., "kernel": why it is not used or null, "running": null,
     "blocks": {"NAME": {"seconds": ..., ...} or {"seconds": ..., "error": ...}}}

A block that has `stopped` was stopped in time, saved what it had, and goes on in the next call.
"""

import faulthandler
import json
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_suite import Block, Suite, one_line

Part = Callable[[Suite], Mapping[str, Block]]

LEAST = 5.0
"""Seconds; with less, no process is started."""

LAST_WORDS = 1.0
"""Seconds before its end at which a process that still runs is ended by itself; after that it is killed."""

FAILED = 3
"""Exit code of a process that has written down why its block failed."""

now = time.monotonic
"""The clock of all deadlines; the same in all processes."""


def measure(
    parts: Sequence[tuple[Part, float]],
    suite: Suite,
    folder: Path,
    end: float,
    header: Mapping[str, Any],
    *,
    kernel_fault: Callable[[Mapping[str, Any], Sequence[str]], str | None],
    only: Sequence[str] = (),
) -> int:
    """Run all blocks that are not done: twice what was never tried, then once what failed, until the time is over.

    What failed of the first part is tried again first, since without it no other part uses the kernel.

    Args:
      parts: each with its weight, by which the time that is left is shared.
      suite: what they share.
      folder: for their files.
      end: by `now`; nothing runs after it.
      header: what each file begins with.
      kernel_fault: why not to use the kernel, by the blocks of the first part and the names of those it has not tried.
      only: names of parts or blocks; with none all are run.

    Returns:
      0: all are done. 1: some failed. 75: some are left.
    """
    paths = [folder / f"{number}-{part.__name__}.json" for number, (part, _) in enumerate(parts)]

    def current() -> Suite:
        blocks = read(paths[0])["blocks"]
        return replace(suite, kernel=kernel_fault(blocks, [name for name in parts[0][0](suite) if name not in blocks]))

    def due(number: int, failed_too: bool) -> list[str]:
        part = parts[number][0]
        known, names = read(paths[number])["blocks"], list(part(current()))
        if only and part.__name__ not in only:
            names = [name for name in names if name in only]
        left = [name for name in names if name not in known or "stopped" in known[name]]
        return left + [name for name in names if failed_too and "error" in known.get(name, {})]

    failed_before = any("error" in block for block in read(paths[0])["blocks"].values())
    for turn in range(3):
        for number, (part, weight) in enumerate(parts):
            names = due(number, turn == (0 if number == 0 and failed_before else 2))
            weights = [w for later, (_, w) in enumerate(parts) if later > number and due(later, turn == 2)]
            until = now() + (end - now()) * weight / (weight + sum(weights))
            while names and until - now() > LEAST:
                print(f"\n== {paths[number].stem}: {' '.join(names)}; {until - now():.0f} s", flush=True)
                names = attempt(part, replace(current(), until=until), paths[number], names, header)
    return report(paths, [due(number, failed_too=False) for number in range(len(parts))])


def names_of(parts: Sequence[Part], suite: Suite) -> list[str]:
    """What can be asked for by name: each part, followed by its blocks."""
    return [name for part in parts for name in (part.__name__, *part(suite))]


def report(paths: Sequence[Path], left: Sequence[Sequence[str]]) -> int:
    """Say what is done, what failed and what is left; the exit code."""
    print()
    failures = 0
    for path, names in zip(paths, left, strict=True):
        blocks = read(path)["blocks"]
        errors = {name: block["error"] for name, block in blocks.items() if "error" in block}
        failures += len(errors)
        done = len(blocks.keys() - errors.keys() - set(names))
        print(f"{path}: {done} done, {len(errors)} failed, {len(names)} left")
        for name, error in errors.items():
            print(f"  {name}: {error}")
    if failures:
        print("the same command tries again what failed, after what is left")
        return 1
    if any(left):
        print("the time is over; the same command goes on")
        return 75
    return 0


def attempt(part: Part, suite: Suite, path: Path, names: Sequence[str], header: Mapping[str, Any]) -> list[str]:
    """Run blocks in one process, which is killed at `suite.until`; what it leaves of them for the next process.

    A block that fails ends its process, since nobody knows in what state the device is.
    """
    # The name of the first block stands there from the start, to be blamed if the process does not even get there.
    common = {"part": part.__name__, **header, "kernel": suite.kernel, "running": names[0]}
    write(path, {**common, "blocks": read(path)["blocks"]})
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(part, suite, path, list(names)))
    begin = now()
    process.start()
    try:
        process.join(max(suite.until - now(), 0))
        code = process.exitcode
    finally:
        _kill(process)
    content = read(path)
    name, content["running"] = content.get("running"), None
    if name is None:
        return []
    if code != FAILED:  # else it has written down why
        late = code is None or (code == 1 and now() > suite.until - 2 * LAST_WORDS)
        what = "killed: it did not end in time" if late else f"its process ended with {_ending(code or 0)}"
        finish(content, name, {"seconds": now() - begin, "error": what})
        print(f"{name}: {what}", flush=True)
    write(path, content)
    return list(names[names.index(name) + 1 :])


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    """End a process and what it started, where it has not ended well by itself."""
    if process.pid is not None and process.exitcode != 0:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # nothing is left, or it has not made its group yet
            process.kill()
        process.join(10)  # one that waits for a driver may stay for longer


def _run(part: Part, suite: Suite, path: Path, names: Sequence[str]) -> None:
    """The process: one block after the other, until one fails or the time that is left is less than one has taken."""
    os.setpgid(0, 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    faulthandler.enable()
    # Says where it hangs and ends it, also where nobody is left to kill it.
    faulthandler.dump_traceback_later(max(suite.until - LAST_WORDS - now(), 0.1), exit=True)
    # Before jax starts: it would take three quarters of the memory, also of torch's and of what runs train.py.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if suite.platform != "cpu":  # as training does, so that a later process need not compile the same again
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxds2" / "compiled"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    blocks = part(suite)
    longest = 0.0
    for name in names:
        content = read(path)
        if suite.until - now() < longest:
            return
        content["running"] = name
        write(path, content)
        print(f"\n-- {name}")
        begin = now()
        try:
            result = blocks[name]()
        except Exception as e:
            traceback.print_exc()
            result = {"error": one_line(e)}
        longest = max(longest, now() - begin)
        finish(content, name, {"seconds": now() - begin, **result})
        if "error" in result:
            write(path, content)
            print(f"{name}: {result['error']}")
            sys.exit(FAILED)
        write(path, content | {"running": None})


def finish(content: dict[str, Any], name: str, result: Mapping[str, Any]) -> None:
    """Put a block's result in its place; one that is only an error leaves the numbers of an earlier try."""
    before = content["blocks"].pop(name, {})
    content["blocks"][name] = {**before, **result} if set(result) == {"seconds", "error"} else dict(result)


def read(path: Path) -> dict[str, Any]:
    """What is in a part's file; without blocks where it is not there or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content["blocks"], dict) else {"blocks": {}}
    except (OSError, ValueError, TypeError, KeyError):
        return {"blocks": {}}


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a part's file in one piece."""
    from jaxds2.files import write_whole

    write_whole(path, json.dumps(content, indent=1) + "\n")
