"""One process at a time trains in a run's folder."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

_log = logging.getLogger("jaxds2")


class LockError(ValueError):
    """A run's folder that another process trains in, or that cannot be written; the message is one line."""


class RunLock:
    """The right to write a run's folder, held from `take` to the end of the `with` block.

    The kernel gives it back when the process ends, however it ends; the file that it is on, RUN/lock, says who holds or
    held it, and stays.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._file: TextIO | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Take the lock; the folder is made if it is not there.

        Raises:
          LockError: another process has it, or the folder cannot be written.
        """
        path = self._run_dir / "lock"
        if self._run_dir.exists() and not self._run_dir.is_dir():
            raise LockError(f"{self._run_dir}: a file, not a folder; choose another with --run")
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")  # not "w": what stands there may be another's
        except OSError as e:
            raise LockError(
                f"{path}: cannot be written ({os.strerror(e.errno or 0)}); make {self._run_dir} writable, or choose "
                f"another folder with --run"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            raise LockError(
                f"{self._run_dir}: {owner} trains here; stop it first, or choose another folder with --run"
            ) from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise LockError(f"{path}: cannot be locked ({os.strerror(e.errno or 0)})") from None
            _log.warning("warning: %s: this file system has no locks; see that only one process trains here", path)
        with contextlib.suppress(OSError):  # on a full disk there is a lock without a name
            self._file.truncate(0)
            self._file.write(
                f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')},\n"
            )
            self._file.flush()
