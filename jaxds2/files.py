"""Writing a file whole or not at all."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(ValueError):
    """A file that cannot be written; its message is one line that names the file and the reason."""


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8: it is there whole, or what was there before is untouched.

    Args:
      path: the file; its folders are made if they are not there.
      data: all of its content.

    Raises:
      WriteError: the system refuses, for example because the disk is full.
    """
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under in the block, which takes the place of `path` where the block ends.

    Where the block does not end, by whatever exception, what was written is removed and `path` is untouched. Its
    folders are made if they are not there.

    Raises:
      WriteError: the system refuses, in the block or here.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as e:
        remedy = "; make room, then run the same command again" if lacks_room(e) else ""
        raise WriteError(f"{path}: cannot be written ({e.strerror or e}){remedy}") from None


def lacks_room(error: OSError) -> bool:
    """Whether the disk is full, or a quota or a limit of the size of files reached."""
    return error.errno in _NO_ROOM
