"""Archives from the network: resumed after a break, verified, and unpacked without ever writing outside the target."""

import bz2
import contextlib
import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

TRIES = 5
"""Connections in a row that may bring nothing new before a download gives up."""
PAUSE = 2.0
"""Seconds before the second try; the third waits twice as long, and so on."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""

_BLOCK = 2**18
# Answers of a server that may be another one in a moment: timeout, too many requests, overload.
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_TAR_OPENERS = {".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.bz2": bz2.open}


class DownloadError(ValueError):
    """A file that cannot be fetched or unpacked; its message is one line for the user."""


def fetch(url: str, path: str | Path, *, checksum: str, progress: bool = True) -> None:
    """Download `url` to `path`, which is there whole and verified or not at all.

    What has arrived stays in `<path>.partial`; the next try, or the next call, goes on from there where the server
    knows ranges (RFC 9110, section 14) and starts over where it does not. A file that is there already is verified and
    not fetched again.

    Args:
      checksum: "md5:<hex>" or "sha256:<hex>".
      progress: whether to draw bars on stderr.

    Raises:
      DownloadError: the server refuses, breaks off `TRIES` times without bringing anything new, sends something else
        than `checksum` says, or the disk cannot take it.
    """
    path = Path(path)
    if path.exists():
        _verify(path, checksum, progress, f"delete {path} and run the same command again")
        return
    partial = path.with_name(path.name + ".partial")
    with _writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
    longest, tries = 0, 0
    while True:
        try:
            _receive(url, partial, progress)
            break
        except (OSError, HTTPException) as e:
            arrived = _size(partial)
            tries = 1 if arrived > longest else tries + 1
            longest = max(longest, arrived)
            if tries == TRIES:
                reason = getattr(e, "reason", None) or str(e) or type(e).__name__
                raise DownloadError(
                    f"{url}: gave up after {tries} tries ({reason}); {arrived} bytes are kept: run the same command "
                    f"again to go on, or put the file at {path} yourself"
                ) from None
            time.sleep(PAUSE * tries)
    try:
        _verify(partial, checksum, progress, "what arrived was deleted: run the same command again")
    except DownloadError:
        partial.unlink(missing_ok=True)
        raise
    with _writing(path):
        os.replace(partial, path)


def _receive(url: str, partial: Path, progress: bool) -> None:
    """Append what one connection brings to `partial`; OSError and HTTPException are worth another try."""
    start = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return  # nothing is left to send; the checksum tells whether that is the file
        if e.code in _PASSING:
            raise
        raise DownloadError(
            f"{url}: the server answers {e.code} {e.reason}; check the address, or fetch the file by other means and "
            f"put it at {partial.with_suffix('')}"
        ) from None
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        with _writing(partial):
            free = shutil.disk_usage(partial.parent).free
            if total is not None and total - start > free:
                raise DownloadError(
                    f"{partial}: not enough disk space ({total - start} bytes to come, {free} are free); make room or "
                    "choose another folder, then run the same command again"
                )
            file = partial.open("ab" if start else "wb", buffering=0)
        arrived = start
        with file, _bar(partial.stem, total, progress, start) as bar:
            while block := response.read(_BLOCK):
                with _writing(partial):
                    _write(file, block)
                arrived += len(block)
                bar.update(len(block))
        # http.client does not tell a connection that was closed too early from the end of the file.
        if total is not None and arrived < total:
            raise ConnectionError(f"the connection closed after {arrived} of {total} bytes")


def _write(file: BinaryIO, block: bytes) -> None:
    """Write all of `block` unbuffered, so that a full disk shows here and not on closing."""
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """The disk's errors are final; only the network's are tried again."""
    try:
        yield
    except OSError as e:
        raise DownloadError(
            f"{path}: cannot be written ({e.strerror or e}); make room or choose another folder, then run the same "
            "command again"
        ) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bar(name: str, total: int | None, progress: bool, initial: int = 0) -> tqdm:
    return tqdm(
        desc=name,
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=None if progress else True,
    )


def _verify(path: Path, checksum: str, progress: bool, advice: str) -> None:
    algorithm, _, expected = checksum.partition(":")
    if algorithm not in ("md5", "sha256") or not expected:
        raise DownloadError(f"checksum {checksum!r}: expected md5:<hex> or sha256:<hex>")
    digest = hashlib.new(algorithm)
    try:
        with path.open("rb") as file, _bar(f"verify {path.name}", path.stat().st_size, progress) as bar:
            while block := file.read(_BLOCK):
                digest.update(block)
                bar.update(len(block))
    except OSError as e:
        raise DownloadError(f"{path}: cannot be read ({e.strerror or e})") from None
    if digest.hexdigest() != expected.lower():
        raise DownloadError(f"{path}: {algorithm} is {digest.hexdigest()}, expected {expected}; {advice}")


def extract(archive: str | Path, out: str | Path, *, progress: bool = True) -> None:
    """Unpack a .tar.gz, .tgz, .tar.bz2 or .zip into `out`; nothing is ever written outside it.

    A member whose path or link target is absolute, holds `..` or leads outside, or that is neither file, folder nor
    link, is refused. Files that stand there are overwritten. A marker in `out` remembers an archive that was unpacked
    to its end, for `is_extracted`.

    Raises:
      DownloadError: a refused member (named), a damaged archive, or a disk that cannot take it.
    """
    archive, out = Path(archive), Path(out)
    unpack = _unpack_zip if archive.name.endswith(".zip") else _unpack_tar
    damaged = "is damaged or not complete; delete it and run the same command again"
    try:
        out.mkdir(parents=True, exist_ok=True)
        _marker(archive, out).unlink(missing_ok=True)
        unpack(archive, out, progress)
        _marker(archive, out).write_text(f"{archive.stat().st_size}\n", encoding="ascii")
    except tarfile.FilterError as e:
        raise DownloadError(f"{archive}: refused: {e}") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as e:
        raise DownloadError(f"{archive}: {damaged} ({e})") from None
    except OSError as e:
        if e.errno is None:  # damaged data, in the words of gzip and bz2
            raise DownloadError(f"{archive}: {damaged} ({e})") from None
        raise DownloadError(f"{archive}: cannot be unpacked into {out} ({e})") from None


def is_extracted(archive: str | Path, out: str | Path) -> bool:
    """Whether `extract` has unpacked this archive into `out` to its end. The archive may have been deleted since."""
    archive = Path(archive)
    try:
        unpacked_size = _marker(archive, Path(out)).read_text(encoding="ascii").strip()
    except OSError:
        return False
    return not archive.exists() or unpacked_size == str(archive.stat().st_size)


def _marker(archive: Path, out: Path) -> Path:
    return out / f".{archive.name}.extracted"


def _unpack_tar(archive: Path, out: Path, progress: bool) -> None:
    opener = next((o for suffix, o in _TAR_OPENERS.items() if archive.name.endswith(suffix)), None)
    if opener is None:
        raise DownloadError(f"{archive}: expected a name that ends in {', '.join(_TAR_OPENERS)} or .zip")
    if not hasattr(tarfile, "data_filter"):
        raise DownloadError("this Python cannot unpack an archive safely; use 3.11.4 or newer")
    # Decompressing outside tarfile, and to the end, makes a cut archive an error: tarfile itself takes one that ends
    # between two members for complete. A stream, since seeking back in compressed data is quadratic.
    with (
        archive.open("rb") as packed,
        opener(packed, "rb") as stream,
        tarfile.open(fileobj=stream, mode="r|") as members,
        _bar(f"unpack {archive.name}", archive.stat().st_size, progress) as bar,
    ):
        for member in members:
            _check_inside(archive, out, member.name)
            if member.issym() or member.islnk():
                _check_inside(archive, out, member.name, member.linkname)
            members.extract(member, out, filter="data")
            bar.update(packed.tell() - bar.n)
        while stream.read(_BLOCK):
            pass


def _unpack_zip(archive: Path, out: Path, progress: bool) -> None:
    with zipfile.ZipFile(archive) as members:
        total = sum(member.file_size for member in members.infolist())
        with _bar(f"unpack {archive.name}", total, progress) as bar:
            for member in members.infolist():
                _check_inside(archive, out, member.filename)
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise DownloadError(f"{archive}: refused: {member.filename!r} is neither a file nor a folder")
                members.extract(member, out)
                bar.update(member.file_size)


def _check_inside(archive: Path, out: Path, name: str, link: str | None = None) -> None:
    """Refuse a member, or the target of a link, that could lead out of `out`.

    With neither an absolute path nor a `..` anywhere, no chain of links inside the archive can lead out; resolving
    also catches a link that stood in `out` before.
    """
    target = PurePosixPath(name if link is None else link)
    if target.is_absolute() or ".." in target.parts or not (out / target).resolve().is_relative_to(out.resolve()):
        what = repr(name) if link is None else f"the link {name!r} to {link!r}"
        raise DownloadError(f"{archive}: refused: {what} would lead outside {out}")
