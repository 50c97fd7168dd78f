"""One process at a time works in a folder."""

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
    """A folder that another process works in, or that cannot be written; the message is one line."""


class FolderLock:
    """The right to write a folder, held from `take` to the end of the `with` block.

    The kernel gives it back when the process ends, however it ends; the file that it is on, FOLDER/lock, says who holds
    or held it, and stays.
    """

    def __init__(self, folder: Path, *, does: str, option: str):
        """Nothing is locked yet.

        Args:
          folder: made by `take` if it is not there.
          does: what a process does in it, for the messages: "trains".
          option: of the command line, which names the folder: "--run".
        """
        self._folder, self._does, self._option = folder, does, option
        self._file: TextIO | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> None:
        """Take the lock.

        Raises:
          LockError: another process has it, or the folder cannot be written.
        """
        path = self._folder / "lock"
        if self._folder.exists() and not self._folder.is_dir():
            raise LockError(f"{self._folder}: a file, not a folder; choose another with {self._option}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")  # not "w": what stands there may be another's
        except OSError as e:
            raise LockError(
                f"{path}: cannot be written ({os.strerror(e.errno or 0)}); make {self._folder} writable, or choose "
                f"another folder with {self._option}"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            raise LockError(
                f"{self._folder}: {owner} {self._does} here; stop it first, or choose another folder with "
                f"{self._option}"
            ) from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise LockError(f"{path}: cannot be locked ({os.strerror(e.errno or 0)})") from None
            _log.warning(
                "warning: %s: this file system has no locks; see that only one process %s here", path, self._does
            )
        with contextlib.suppress(OSError):  # on a full disk there is a lock without a name
            self._file.truncate(0)
            self._file.write(
                f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')},\n"
            )
            self._file.flush()
