"""What disks and people do to a checkpoint, at places drawn from a generator."""

from pathlib import Path

import numpy as np


def flip_a_bit(rng: np.random.Generator, folder: Path) -> str:
    """Change one bit of a file below `folder`; returns the file's name."""
    path = _draw(rng, folder)
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return path.relative_to(folder).as_posix()


def truncate(rng: np.random.Generator, folder: Path) -> str:
    """Cut a file short; returns its name."""
    path = _draw(rng, folder)
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])
    return path.relative_to(folder).as_posix()


def delete(rng: np.random.Generator, folder: Path) -> str:
    """Delete a file; returns its name."""
    path = _draw(rng, folder, empty=True)
    path.unlink()
    return path.relative_to(folder).as_posix()


DAMAGES = (flip_a_bit, truncate, delete)


def _draw(rng: np.random.Generator, folder: Path, *, empty: bool = False) -> Path:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and (empty or p.stat().st_size))
    return files[rng.integers(len(files))]
