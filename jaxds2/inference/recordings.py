"""The recordings that a command line names: files, what is in folders, and standard input."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from jaxds2.config import ConfigError
from jaxds2.files import WriteError

STANDARD_INPUT = "-"
EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".snd", ".caf", ".w64", ".sph")
"""Files of a folder whose names end so, in either case, are recordings."""


@dataclass(frozen=True)
class Recording:
    """A recording to read."""

    name: str
    """What it is called on the command line, or in its folder."""
    path: Path
    """Where it is."""
    stem: Path
    """Of the files that are written for it, relative and without an extension: as it lies in its folder."""


@contextlib.contextmanager
def find_recordings(arguments: Sequence[Path], stdin: TextIO) -> Iterator[tuple[list[Recording], list[str]]]:
    """The recordings for the block, in order, those of a folder sorted, and a line for each that cannot be had.

    Hidden files of folders, and links to folders in them, are left out. What comes from standard input is kept in a
    temporary file until the block ends.

    Args:
      arguments: files, folders or `-`; a file need not exist.
      stdin: whose bytes `-` stands for.

    Raises:
      ConfigError: `-` twice, or standard input is a terminal. WriteError: no room to keep it.
    """
    names = [str(path) for path in arguments]
    if names.count(STANDARD_INPUT) > 1:
        raise ConfigError("- stands for standard input, which can be read once; it is named twice")
    found: list[Recording] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="jaxds2-") as folder:
        for name, path in zip(names, arguments, strict=True):
            if name == STANDARD_INPUT:
                found.append(Recording("standard input", _keep(stdin, Path(folder)), Path("stdin")))
            elif path.is_dir():
                inside, wrong = _walk(path)
                found += inside
                faults += wrong
            else:
                found.append(Recording(name, path, Path(path.stem)))
        yield found, faults


def check_names(recordings: Sequence[Recording]) -> None:
    """Refuse recordings whose transcripts would overwrite each other.

    Raises:
      ConfigError: two would go by one name.
    """
    seen: dict[str, Recording] = {}
    for r in recordings:
        other = seen.setdefault(str(r.stem).casefold(), r)  # some file systems do not tell A from a
        if other is not r:
            raise ConfigError(
                f"{other.name} and {r.name} would both be written to {r.stem}.*; "
                f"name the folder that holds both, or write them to folders of their own"
            )


def _walk(folder: Path) -> tuple[list[Recording], list[str]]:
    found: list[Recording] = []
    faults: list[str] = []
    unreadable: list[OSError] = []
    for place, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix.lower() in EXTENSIONS and not name.startswith("."):
                found.append(Recording(str(path), path, path.relative_to(folder).with_suffix("")))
    faults += [f"{e.filename}: cannot be read ({e.strerror})" for e in unreadable]
    if not found and not faults:
        faults.append(f"{folder}: holds no audio files (by their extension: {' '.join(EXTENSIONS)})")
    return found, faults


def _keep(stdin: TextIO, folder: Path) -> Path:
    if stdin.isatty():
        raise ConfigError("- stands for standard input, which is a terminal; pipe a recording into it: ... < FILE")
    kept = folder / "stdin"
    try:
        with kept.open("wb") as file:
            shutil.copyfileobj(stdin.buffer, file)
    except OSError as e:
        raise WriteError(f"standard input cannot be kept in {folder} ({e.strerror}); set TMPDIR") from None
    return kept
