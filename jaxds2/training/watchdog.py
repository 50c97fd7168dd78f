"""Where a run waits when nothing moves: on a dead disk, a stuck loader, a device that does not answer."""

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jaxds2.stacks import own_stacks, place_of_main_thread, stacks_of


class Watchdog:
    """Writes where each thread of this process and of its loader workers waits when nothing has moved for a while.

    Then it goes on waiting. It could end the process only from outside the thread that hangs, in the middle of whatever
    that one writes; a file system that comes back lets the run go on; and whoever schedules the run has a limit of
    their own. What it adds is the reason.
    """

    def __init__(self, seconds: float, stacks: Path, say: Callable[[str], None]):
        """Watch inside a `with` block.

        Args:
          seconds: without a `beat` after which it writes, once; 0: never.
          stacks: the file to append to; what cannot be written there goes to standard error.
          say: gets a line that names the place and the file; may be set again, to something better.
        """
        self._seconds, self._stacks, self.say = seconds, stacks, say
        self._last_beat = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Something has moved: a step, a batch of an evaluation, a compilation."""
        self._last_beat = time.monotonic()

    def _watch(self) -> None:
        reported = None
        while not self._ended.wait(self._seconds / 10):
            beat = self._last_beat
            if beat != reported and time.monotonic() - beat >= self._seconds:
                reported = beat
                self._report()

    def _report(self) -> None:
        # First the line, from memory alone: what hangs may be the disk that everything else lies on.
        with contextlib.suppress(OSError, ValueError):  # a folder that cannot be written: the run will say so itself
            self.say(
                f"nothing has moved for {self._seconds:g} s (training.watchdog_seconds); still waiting in "
                f"{place_of_main_thread()}; all threads and loader workers: {self._stacks}"
            )
        found = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} nothing has moved for {self._seconds:g} s\n"]
        with contextlib.suppress(OSError):  # no room for a temporary file
            found.append(own_stacks())
        for worker in multiprocessing.active_children():
            if worker.pid is not None:
                found.append(f"\nloader worker, process {worker.pid}:\n{stacks_of(worker.pid)}")
        try:
            with self._stacks.open("a", encoding="utf-8") as file:
                file.writelines(found)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                print("".join(found), file=sys.stderr)
