"""Where the threads of a process wait: of this one, and of one that it has started, even when all of them hang."""

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

_NAME = "jaxds2-stacks"
_HAS_FILES_IN_MEMORY = hasattr(os, "memfd_create")
_SILENCE = 5
"""Looks at an answer that find no more of it, after which it is taken for whole."""


def place_of_main_thread() -> str:
    """The innermost function of this package in which the main thread is: `name (FILE:LINE)`."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    # From within outwards, and without the source, which may lie on the disk that hangs.
    calls = [(frame.f_code, line) for frame, line in traceback.walk_stack(frame)] if frame else []
    ours = [(code, line) for code, line in calls if Path(code.co_filename).is_relative_to(Path(__file__).parent)]
    code, line = next(iter(ours or calls), (None, 0))
    return f"{code.co_name} ({code.co_filename}:{line})" if code else "an unknown place"


def own_stacks() -> str:
    """The stack of each thread of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def offer_stacks() -> None:
    """Let the process that started this one ask for its stacks; where the system has no files in memory, do nothing.

    SIGUSR1 is the question: it is answered without the interpreter, whatever that waits for. The answer is written to
    a file in memory, which the other finds by its name, and which says that the signal no longer kills.
    """
    if _HAS_FILES_IN_MEMORY:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1, file=os.memfd_create(_NAME), all_threads=True)


def stacks_of(pid: int, *, wait_s: float = 2.0) -> str:
    """The stacks of a process that has called `offer_stacks`; else a line that says why there are none.

    Args:
      pid: its number.
      wait_s: for the answer.
    """
    if not _HAS_FILES_IN_MEMORY:
        return "unknown on this system\n"
    answer = b""
    try:
        path = next((p for p in Path(f"/proc/{pid}/fd").iterdir() if _is_answer(p)), None)
        if path is None:
            return "it is still starting\n"
        with path.open("rb", buffering=0) as file:
            file.seek(0, os.SEEK_END)
            os.kill(pid, signal.SIGUSR1)
            deadline, silent = time.monotonic() + wait_s, 0
            while time.monotonic() < deadline and silent < _SILENCE:
                time.sleep(0.05)
                more = file.read()
                answer, silent = answer + more, silent + 1 if answer and not more else 0
    except (FileNotFoundError, ProcessLookupError):
        return "it is gone\n"
    except OSError as e:
        return f"unknown: {e.strerror or e}\n"
    return answer.decode(errors="replace") or "no answer: it waits in the kernel, as for a disk that is gone\n"


def _is_answer(descriptor: Path) -> bool:
    with contextlib.suppress(OSError):  # closed meanwhile
        return os.readlink(descriptor).startswith(f"/memfd:{_NAME} ")
    return False
