"""Being told to stop: training saves everything and leaves with 75, which launchers take for `start me again`."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOPPED = 75
"""Exit code: stopped, and the same command goes on (EX_TEMPFAIL of sysexits.h)."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> "StopSignal":
        self._wakeup = signal.set_wakeup_fd(-1)  # of `leaving_on_sigterm`, whose place this takes
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        self.received = signal.Signals(number).name
        print(
            f"\n{self.received}: stopping when this step or compilation ends, then saving; once more to stop at once",
            file=sys.stderr,
        )

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Before training there is nothing to save: SIGTERM ends the process at once, with 75, wherever it is.

    It may be waiting for other processes in a library that lets no handler of Python's run for minutes, so a thread
    is told of the signal. Inside the block `StopSignal` takes its place.
    """
    seen, see = os.pipe()
    os.set_blocking(see, False)

    def leave() -> None:
        while number := os.read(seen, 1):
            if number[0] == signal.SIGTERM:
                print("SIGTERM: stopped before training; the same command starts again", file=sys.stderr, flush=True)
                os._exit(STOPPED)
        os.close(seen)

    # Without a handler, one that does nothing, Python would not write the signal's number to the pipe.
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup = signal.set_wakeup_fd(see, warn_on_full_buffer=False)
    threading.Thread(target=leave, name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(see)
