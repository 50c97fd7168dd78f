"""Being told to stop: what can be resumed leaves with 75, which launchers take for `start me again`."""

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

    def __enter__(self) -> "StopSignal":
        _end_of_leaving()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

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
def leaving_on_sigterm(says: str) -> Iterator[None]:
    """Where there is nothing to save, SIGTERM ends the process at once, with 75, wherever it is; it `says` so.

    Before training it may be waiting for other processes in a library that lets no handler of Python's run for minutes,
    so a thread is told of the signal. Where training begins, `StopSignal` takes its place for good.
    """
    seen, see = os.pipe()
    os.set_blocking(see, False)

    def leave() -> None:
        while number := os.read(seen, 1):
            if number[0] == signal.SIGTERM:
                print(f"SIGTERM: {says}", file=sys.stderr, flush=True)
                os._exit(STOPPED)
        os.close(seen)

    signal.signal(signal.SIGTERM, _noted)
    signal.set_wakeup_fd(see, warn_on_full_buffer=False)
    threading.Thread(target=leave, name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        _end_of_leaving()
        os.close(see)


def _noted(number: int, _: FrameType | None) -> None:
    """Does nothing: without a handler Python would not write the number of the signal to the pipe."""


def _end_of_leaving() -> None:
    if signal.getsignal(signal.SIGTERM) is _noted:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
