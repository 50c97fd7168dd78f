"""Strings of a whole corpus, held once in memory for all processes that read them."""

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable
from typing import BinaryIO

_ERRORS = "surrogateescape"
"""How file names that are not UTF-8 stand in strings."""


class SharedStrings:
    """A list of strings that a process is handed for the price of a file's name.

    Ten million texts, as Python strings in each of a dozen loader workers, would be tens of gigabytes; here they are
    UTF-8 in a file that all map. On Linux the file has no name in any folder, so that nothing is left behind however
    the processes end. It lives until `close` in the process that made it; whoever was handed it before may go on.
    """

    def __init__(self, strings: Iterable[str]):
        """Write them, one pass."""
        self._file, self._path = _new_file()
        ends, end = array("q"), 0
        for string in strings:
            end += self._file.write(string.encode(errors=_ERRORS))
            ends.append(end)
        self._file.write(bytes(-end % ends.itemsize))  # so that the numbers behind are aligned
        self._file.write(ends.tobytes())
        self._file.flush()
        self._open(len(ends))

    def _open(self, count: int) -> None:
        self._count = count
        with open(self._path, "rb") as file:
            # An empty file cannot be mapped, and is not looked into.
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if count else b"")
        self._ends = self._bytes[len(self._bytes) - 8 * count :].cast("q")

    def __reduce__(self) -> tuple[object, ...]:
        return _open, (self._path, self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(f"string {index} of {self._count}")
        start = self._ends[index - 1] if index else 0
        return str(self._bytes[start : self._ends[index]], "utf-8", _ERRORS)

    def close(self) -> None:
        """Let go of the file; strings read from here later are an error of the caller."""
        self._file.close()


def _open(path: str, count: int) -> SharedStrings:
    """What another process gets."""
    strings = SharedStrings.__new__(SharedStrings)
    strings._path = path
    strings._open(count)
    return strings


def _new_file() -> tuple[BinaryIO, str]:
    """An open file, and the path by which other processes of this user open it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("strings")
        return os.fdopen(descriptor, "wb"), f"/proc/{os.getpid()}/fd/{descriptor}"
    file = tempfile.NamedTemporaryFile("wb")  # noqa: SIM115  closed by SharedStrings.close
    return file, file.name  # type: ignore[return-value]
