"""Writing a file whole or not at all."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(ValueError):
    """A file that cannot be written; its message is one line that names the file and the reason."""


def write_whole(path: Path, data: str | bytes, *, durable: bool = False) -> None:
    """Write a file, text as UTF-8: it is there whole, or what was there before is untouched.

    Args:
      path: the file; its folders are made if they are not there.
      data: all of its content.
      durable: as `replacing`.

    Raises:
      WriteError: the system refuses, for example because the disk is full.
    """
    with replacing(path, durable=durable) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A name to write a file under in the block, which takes the place of `path` where the block ends.

    Where the block does not end, by whatever exception, what was written is removed and `path` is untouched. Its
    folders are made if they are not there.

    Args:
      path: the file.
      durable: also when the power fails: the old or the new content is there, and the new one once the block is left.
        Costs milliseconds; without it a file system may give the name to a file whose content it has yet to write.

    Raises:
      WriteError: the system refuses, in the block or here.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if durable:
                sync(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        if durable:
            sync(path.parent)
    except OSError as e:
        remedy = "; make room, then run the same command again" if lacks_room(e) else ""
        raise WriteError(f"{path}: cannot be written ({e.strerror or e}){remedy}") from None


def check_writable(folder: Path) -> None:
    """Find out before long work whether its files can be written: into a folder that is there, or is to be made.

    Args:
      folder: it is left as it is.

    Raises:
      WriteError: the system refuses.
    """
    try:
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise WriteError(f"{folder}: cannot be written ({e.strerror or e})") from None


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk where the file system can do so. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def lacks_room(error: OSError) -> bool:
    """Whether the disk is full, or a quota or a limit of the size of files reached."""
    return error.errno in _NO_ROOM
