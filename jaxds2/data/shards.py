"""A manifest and its recordings, packed into a few large files.

    index.jsonl                 the manifest: each line names a shard, and the number of its recording there
    shards.json                 what the folder holds: sizes and checksums
    shard-00000.arrayrecord     recordings, in the order of the manifest, each with its line of it
    lock                        who packs here, or did last; nobody else reads it

A recording is the bytes of its file, as they were. Which ones stand in which shard depends on the manifest, the sizes
of the files and the size of a shard alone, so that packing can stop anywhere and go on, with any number of processes,
and ends in the same bytes. The index is written last: where it is, everything is.

Starting a run reads the index, and asks for the sizes of the shards; no shard is opened before a recording is needed.
"""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import stat
import struct
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxds2.audio import AudioError, EncodedAudio
from jaxds2.data.manifest import INDEX, Utterance, manifest_digest, manifest_path, read_manifest, to_record
from jaxds2.files import replacing, write_whole
from jaxds2.lock import FolderLock
from jaxds2.worker import prepare_worker

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordReader
    from tqdm import tqdm

SHARD_BYTES = 256_000_000
"""Default size of a shard: LibriSpeech's 960 hours are 240 of them, so that there is work for every process and a day's
transfer that breaks off loses seconds; ten million recordings are no more files than a folder holds with ease."""
CONTENTS = "shards.json"
VERSION = 1
OPEN_SHARDS = 64
"""Shards that a process keeps open, of the 1,024 files that it may open on most systems. Opening one takes 0.1 ms."""

_SUFFIX = ".arrayrecord"
_NAMED = 5
_STAT_THREADS, _STAT_BLOCK = 8, 10_000
# One recording a chunk, so that it is read alone. Encoded audio does not become smaller.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32_768
_HEADER = struct.Struct("<I")

Result = TypeVar("Result")


class ShardError(ValueError):
    """Shards that cannot be written or read as a whole; the message is one line that names the folder or the file."""


@dataclass(frozen=True)
class Shard:
    """A finished shard, as `shards.json` lists it."""

    name: str
    records: int
    size: int
    """Bytes of the file."""
    sha256: str


@dataclass(frozen=True)
class Contents:
    """`shards.json`: what a folder of shards holds, or will when it is finished."""

    version: int
    manifest_digest: str
    """See `manifest_digest`; the index has the same."""
    source_digest: str
    """SHA-256 over what was packed: the lines of the manifest, and the sizes of the audio files."""
    shard_bytes: int
    """Largest sum of the audio files in a shard."""
    index_sha256: str | None
    """None: not all shards are there yet."""
    shards: tuple[Shard, ...]


class Recordings:
    """Where an utterance's recording lies -> the recording: a file as it is, or the bytes of one out of a shard.

    Shards are opened when they are needed, `OPEN_SHARDS` of them at most, by each process for itself: what is pickled
    is empty. Threads may share it.
    """

    def __init__(self) -> None:
        self._readers: OrderedDict[str, ArrayRecordReader] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def __reduce__(self) -> tuple[type["Recordings"], tuple[()]]:
        return Recordings, ()

    def __enter__(self) -> "Recordings":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; a thread that still reads one, or opens one yet, closes it when it is done."""
        with self._lock:
            self._closed = True
            self._readers.clear()

    def of(self, utterance: Utterance) -> Path | EncodedAudio:
        """The recording of an utterance. Raises AudioError, as `find`."""
        return self.find(utterance.audio_filepath, utterance.shard_record, utterance.id)

    def find(self, path: str | Path, record: int | None, utterance_id: str) -> Path | EncodedAudio:
        """The recording at a place.

        Args:
          path: the audio file, or the shard.
          record: number of the record in the shard; None: `path` is an audio file, which is not looked at here.
          utterance_id: whose recording this should be.

        Raises:
          AudioError: the shard is missing, truncated or damaged, or its record is that of another utterance.
        """
        if record is None:
            return Path(path)
        reader = self._reader(str(path))
        if record >= reader.num_records():
            raise AudioError(f"{path}: holds {reader.num_records()} records, number {record} is asked for: {_NOT_OURS}")
        try:
            (packed,) = reader.read([record])
        except RuntimeError as e:
            raise AudioError(
                f"{path}: record {record} is damaged ({_reason(e)}); copy or pack the shard again"
            ) from None
        try:
            line, content = _unpack(packed)
            found_id, name = line["id"], line["file"]
        except (struct.error, ValueError, KeyError, TypeError):
            raise AudioError(f"{path}: record {record} is no recording of `jaxds2 shard`") from None
        if found_id != utterance_id:
            raise AudioError(f"{path}: record {record} is {found_id!r}, {utterance_id!r} is asked for: {_NOT_OURS}")
        return EncodedAudio(f"{path}[{record}]/{name}", content)

    def _reader(self, path: str) -> "ArrayRecordReader":
        with self._lock:
            reader = self._readers.pop(path, None) or _open(path)
            if not self._closed:
                self._readers[path] = reader
                if len(self._readers) > OPEN_SHARDS:
                    self._readers.popitem(last=False)
        return reader


_NOT_OURS = "a shard of another manifest? `jaxds2 check` compares the checksums"


def _open(path: str) -> "ArrayRecordReader":
    from array_record.python.array_record_module import ArrayRecordReader

    if not os.path.isfile(path):
        raise AudioError(f"{path}: no such shard")
    try:
        reader = ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
        if not reader.ok():
            reader.close()  # raises what is wrong
    except RuntimeError as e:
        raise AudioError(f"{path}: truncated or damaged ({_reason(e)}); copy or pack the shard again") from None
    return reader


def _pack(line: Mapping[str, Any], content: bytes) -> bytes:
    """A record: the length of its line in JSON, the line, the audio file."""
    encoded = json.dumps(line, ensure_ascii=False).encode()
    return _HEADER.pack(len(encoded)) + encoded + content


def _unpack(packed: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = _HEADER.unpack_from(packed)
    end = _HEADER.size + length
    return json.loads(packed[_HEADER.size : end]), packed[end:]


def read_utterances(path: str | Path) -> list[Utterance]:
    """The utterances of a manifest or of a folder of shards, of which the sizes are checked.

    Raises:
      ManifestError: as `read_manifest`.
      ShardError: a shard is missing or of another size than it was written with, or the index is not that of shards.
    """
    utterances = read_manifest(path)
    if faults := shard_faults(path, utterances):
        raise ShardError(f"{'; '.join(faults[:_NAMED])}{_and_more(faults)}")
    return utterances


def shard_faults(
    path: str | Path, utterances: Iterable[Utterance], *, checksums: bool = False, progress: bool = False
) -> list[str]:
    """What is wrong with the shards that utterances lie in, a line each.

    Args:
      path: the manifest that the utterances were read from, or its folder.
      utterances: those without a `shard_record` are passed over.
      checksums: also read every shard and compare its SHA-256.
      progress: show a bar while doing so.
    """
    from tqdm import tqdm

    last_record: dict[Path, int] = {}
    for u in utterances:
        if u.shard_record is not None:
            last_record[u.audio_filepath] = max(u.shard_record, last_record.get(u.audio_filepath, 0))
    faults: list[str] = []
    contents: dict[Path, Contents] = {}
    for folder in dict.fromkeys(shard.parent for shard in last_record):
        try:
            contents[folder] = _read_contents(folder)
        except ShardError as e:
            faults.append(str(e))
    index = manifest_path(path)
    if index.name == INDEX and index.parent in contents and _sha256(index) != contents[index.parent].index_sha256:
        faults.append(
            f"{index}: is not the index that was written with the shards in {index.parent}: of another manifest, or "
            f"changed since; write it again with `jaxds2 shard`"
        )
    known = {folder / s.name: s for folder, c in contents.items() for s in c.shards}
    shards = [shard for shard in last_record if shard.parent in contents]
    for shard in tqdm(shards, "checksums", unit=" shards", disable=None if progress and checksums and shards else True):
        if shard not in known or known[shard].records <= last_record[shard]:
            faults.append(f"{shard}: {shard.parent / CONTENTS} knows of no record {last_record[shard]} in it")
        elif fault := _fault(shard, known[shard], checksums):
            faults.append(fault)
    return faults


def _fault(path: Path, expected: Shard, checksum: bool) -> str | None:
    again = "copy it again, or pack it again with `jaxds2 shard`"
    try:
        if (size := path.stat().st_size) != expected.size:
            return f"{path}: {size} bytes, expected {expected.size}: truncated, or of another manifest; {again}"
        if checksum and (found := _sha256(path)) != expected.sha256:
            return f"{path}: SHA-256 is {found[:12]}..., expected {expected.sha256[:12]}...: damaged; {again}"
    except FileNotFoundError:
        return f"{path}: no such shard; {again}"
    except OSError as e:
        return f"{path}: cannot be read ({e.strerror or e})"
    return None


def partition(sizes: Sequence[int], shard_bytes: int) -> list[tuple[int, int]]:
    """Recordings to shards, in order: each shard takes what fits, and one recording at least.

    Args:
      sizes: bytes of each recording.
      shard_bytes: largest sum of a shard.

    Returns:
      (start, stop) of each shard.
    """
    ranges, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > shard_bytes:
            ranges.append((start, i))
            start, total = i, 0
        total += size
    if sizes:
        ranges.append((start, len(sizes)))
    return ranges


def write_shards(
    manifest: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Pack a manifest and its recordings into `out`.

    Where an earlier call stopped, or was killed, this one goes on: shards that stand there are verified by their
    checksums and kept, a damaged one is packed again and named on stderr.

    Args:
      manifest: path; its recordings are read as files and not decoded.
      out: the folder, for this manifest alone.
      shard_bytes: a shard ends before its recordings exceed this; a larger recording has a shard of its own.
      workers: processes; None: as many as there are cores. The bytes do not depend on it.
      progress: show bars on stderr.

    Returns:
      The index.

    Raises:
      ManifestError: as `read_manifest`.
      ShardError: a recording cannot be read (none is left out: there is no index then), `out` holds something else, or
        a process died.
      LockError: another process packs into `out`, or it cannot be written.
      WriteError: `out` cannot be written.
    """
    manifest, out = Path(manifest), Path(out)
    if shard_bytes < 1:
        raise ShardError(f"shards of {shard_bytes} bytes: must be 1 or more")
    if workers is not None and workers < 1:
        raise ShardError(f"workers is {workers}, must be 1 or more")
    utterances = read_manifest(manifest)
    if any(u.shard_record is not None for u in utterances):
        raise ShardError(
            f"{manifest}: its recordings are in shards already; give the manifest that they were packed from"
        )
    sizes = _sizes(manifest, utterances, progress)
    ours = Contents(
        version=VERSION,
        manifest_digest=manifest_digest(utterances),
        source_digest=_source_digest(utterances, sizes),
        shard_bytes=shard_bytes,
        index_sha256=None,
        shards=(),
    )
    _look(out, ours, manifest)  # a folder of something else gets no lock either
    with FolderLock(out, does="packs", option="--out") as lock:
        lock.take()
        contents = _claim(out, ours, manifest)
        _fill(out, contents, utterances, sizes, workers or os.cpu_count() or 1, progress)
    return out / INDEX


def _fill(
    out: Path, contents: Contents, utterances: Sequence[Utterance], sizes: Sequence[int], workers: int, progress: bool
) -> None:
    """The shards that are missing or damaged, and the index. Raises ShardError, WriteError."""
    ranges = partition(sizes, contents.shard_bytes)
    finished = _verified(out, contents, workers, progress)
    kept = len(finished)
    names = [f"shard-{number:05}{_SUFFIX}" for number in range(len(ranges))]
    missing = {
        name: (out / name, utterances[start:stop], sizes[start:stop])
        for name, (start, stop) in zip(names, ranges, strict=True)
        if name not in finished
    }
    failures: list[str] = []
    with _bar("pack", sum(sum(task[2]) for task in missing.values()), progress and bool(missing)) as bar:
        for name, (shard, failed) in _in_processes(_write_shard, missing, workers):
            failures += failed
            if shard is not None:
                finished[name] = shard
                contents = replace(contents, shards=tuple(finished[n] for n in names if n in finished))
                _write_contents(out, contents)
            bar.update(sum(missing[name][2]))
    if failures:
        raise ShardError(
            f"{out}: {len(failures)} of {len(utterances)} recordings could not be packed: "
            f"{'; '.join(failures[:_NAMED])}{_and_more(failures)}; {len(finished)} of {len(names)} shards are there, "
            f"and no index yet: bring the recordings back, then run the same command again"
        )
    _write_index(out, contents, utterances, names, ranges)
    hours, size = sum(u.duration for u in utterances) / 3600, sum(s.size for s in finished.values())
    _say(
        f"{out}: {len(utterances)} utterances, {hours:.2f} hours; shards: {len(names)}, {size / 1e6:.1f} MB, "
        f"{len(names) - kept} packed now"
    )


def _sizes(manifest: Path, utterances: Sequence[Utterance], progress: bool) -> list[int]:
    """Bytes of each audio file. Raises ShardError: they are not all there; names them."""
    from tqdm import tqdm

    def look(u: Utterance) -> int | str:
        try:
            status = os.stat(u.audio_filepath)
        except OSError as e:
            return f"{u.audio_filepath}: {e.strerror or e}"
        return status.st_size if stat.S_ISREG(status.st_mode) else f"{u.audio_filepath}: not a file"

    found: list[int | str] = []
    with (
        ThreadPoolExecutor(_STAT_THREADS) as pool,  # on a network each look takes a while
        tqdm(
            desc="sizes", total=len(utterances), unit=" files", disable=None if progress else True, leave=False
        ) as bar,
    ):
        for start in range(0, len(utterances), _STAT_BLOCK):
            found += pool.map(look, utterances[start : start + _STAT_BLOCK])
            bar.update(len(found) - start)
    if missing := [fault for fault in found if isinstance(fault, str)]:
        raise ShardError(
            f"{manifest}: {len(missing)} of {len(utterances)} recordings cannot be packed: "
            f"{'; '.join(missing[:_NAMED])}{_and_more(missing)}; bring them back, or take their lines out of it"
        )
    return [size for size in found if isinstance(size, int)]


def _source_digest(utterances: Sequence[Utterance], sizes: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for u, size in zip(utterances, sizes, strict=True):
        digest.update(json.dumps([u.id, u.duration, u.text, u.speaker, size]).encode() + b"\n")
    return digest.hexdigest()


def _look(out: Path, ours: Contents, manifest: Path) -> Contents | None:
    """What is in `out` already, which is ours; None: nothing. Raises ShardError: it is not ours."""
    if not (out / CONTENTS).exists():
        if strange := next((p for p in (out / INDEX, *out.glob(f"*{_SUFFIX}*")) if p.exists()), None):
            raise ShardError(
                f"{strange}: is there, but no {CONTENTS} that says what it is; choose another folder as --out"
            )
        return None
    theirs = _read_contents(out)
    other = "choose another folder as --out, or delete this one"
    if theirs.manifest_digest != ours.manifest_digest:
        raise ShardError(f"{out}: holds shards of another manifest than {manifest}; {other}")
    if theirs.shard_bytes != ours.shard_bytes:
        raise ShardError(
            f"{out}: holds shards of {theirs.shard_bytes / 1e6:g} MB, not {ours.shard_bytes / 1e6:g}; {other}"
        )
    if theirs.source_digest != ours.source_digest:
        raise ShardError(
            f"{out}: the audio files or speakers of {manifest} have changed since it was packed there; {other}"
        )
    return theirs


def _claim(out: Path, ours: Contents, manifest: Path) -> Contents:
    """What is in `out`, which is ours, or will be from now on. Raises as `_look`, and WriteError."""
    if (there := _look(out, ours, manifest)) is not None:
        return there
    _write_contents(out, ours)
    return ours


def _read_contents(folder: Path) -> Contents:
    path = folder / CONTENTS
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            raise ShardError(f"{path}: of version {stored['version']}, this jaxds2 reads {VERSION}")
        return Contents(**{**stored, "shards": tuple(Shard(**s) for s in stored["shards"])})
    except FileNotFoundError:
        raise ShardError(f"{path}: missing; copy it together with the shards, or pack them again") from None
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ShardError(f"{path}: cannot be read ({e}); copy it again, or pack the shards again") from None


def _write_contents(folder: Path, contents: Contents) -> None:
    write_whole(folder / CONTENTS, json.dumps(asdict(contents), indent=1) + "\n")


def _verified(out: Path, contents: Contents, workers: int, progress: bool) -> dict[str, Shard]:
    """The finished shards that are as they were written, by name."""
    tasks = {s.name: (out / s.name, s, True) for s in contents.shards}
    intact: dict[str, Shard] = {}
    with _bar("verify", sum(s.size for s in contents.shards), progress and bool(tasks)) as bar:
        for name, fault in _in_processes(_fault, tasks, workers):
            shard = tasks[name][1]
            if fault is None:
                intact[name] = shard
            else:
                _say(f"{fault.partition(';')[0]}; packed again")
            bar.update(shard.size)
    return intact


def _write_shard(path: Path, utterances: Sequence[Utterance], sizes: Sequence[int]) -> tuple[Shard | None, list[str]]:
    """The shard, or what is wrong with the recordings for which there is none. Raises WriteError."""
    failures: list[str] = []
    with contextlib.suppress(_UnfinishedError), replacing(path) as partial, _writing(partial) as write:
        for u, size in zip(utterances, sizes, strict=True):
            try:
                content = u.audio_filepath.read_bytes()
            except OSError as e:
                failures.append(f"{u.audio_filepath}: {e.strerror or e}")
                continue
            if len(content) != size:
                failures.append(f"{u.audio_filepath}: {len(content)} bytes, {size} when packing began")
                continue
            line = {"id": u.id, "duration": u.duration, "text": u.text, "speaker": u.speaker}
            write(_pack(line | {"file": u.audio_filepath.name}, content))
        if failures:
            raise _UnfinishedError
    if failures:
        return None, failures
    return Shard(path.name, len(utterances), path.stat().st_size, _sha256(path)), []


class _UnfinishedError(Exception):
    """Leaves a block whose file is not to be."""


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Takes the records of a shard. Raises OSError, which array_record reports without its number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    try:
        try:
            yield writer.write
        finally:
            writer.close()
    except RuntimeError as e:
        reasons = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
        number = next((n for n in reasons if os.strerror(n) in str(e)), None)
        raise OSError(number, os.strerror(number) if number else _reason(e)) from None


def _write_index(
    out: Path,
    contents: Contents,
    utterances: Sequence[Utterance],
    names: Sequence[str],
    ranges: Sequence[tuple[int, int]],
) -> None:
    """First the checksum of the index in `shards.json`, last the index; nothing where both are there."""
    index = out / INDEX
    if contents.index_sha256 is not None and index.is_file() and _sha256(index) == contents.index_sha256:
        return
    digest = hashlib.sha256()
    with replacing(index) as partial, partial.open("wb") as file:
        for name, (start, stop) in zip(names, ranges, strict=True):
            for number, u in enumerate(utterances[start:stop]):
                # To the last digit of the duration: the plan is to be that of the manifest.
                record = to_record(replace(u, audio_filepath=out / name, shard_record=number), out)
                line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
                digest.update(line)
                file.write(line)
        file.flush()
        _write_contents(out, replace(contents, index_sha256=digest.hexdigest()))


def _in_processes(
    function: Callable[..., Result], tasks: Mapping[str, tuple[Any, ...]], workers: int
) -> Iterator[tuple[str, Result]]:
    """The results of `function(*task)`, by the names of the tasks, as they come; in this process if one is enough."""
    if min(workers, len(tasks)) < 2:
        for name, task in tasks.items():
            yield name, function(*task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, prepare_worker)
    try:
        futures = {pool.submit(function, *task): name for name, task in tasks.items()}
        for done in as_completed(futures):
            yield futures[done], done.result()
    except BrokenProcessPool:
        raise ShardError("a process died (killed, or out of memory?); run the same command again to go on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bar(what: str, size: int, shown: bool) -> "tqdm":
    from tqdm import tqdm

    return tqdm(desc=what, total=size, unit="B", unit_scale=True, disable=None if shown else True)


def _reason(error: Exception) -> str:
    """array_record's words, of which the first sentence says what, and the others where in its own structure."""
    return " ".join(str(error).partition(";")[0].split())


def _and_more(faults: Sequence[str]) -> str:
    return f"; and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""


def _say(line: str) -> None:
    print(line, file=sys.stderr)
