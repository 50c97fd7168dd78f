"""Manifests: one utterance a line, as JSON Lines.

A line holds `audio_filepath` (relative to the manifest, or absolute), `duration` in seconds, `text`, and may hold `id`
(default: the file's stem), `speaker`, and keys of other tools, which are ignored. The index of a folder of shards is a
manifest too: there `audio_filepath` is a shard and `shard_record` the number of the recording in it (data/shards.py).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxds2.audio import MAX_DURATION
from jaxds2.files import replacing

DURATION_TOLERANCE = 0.1
"""Seconds by which a file may differ from its declared duration: other tools round to a digit, and an MP3's header may
be an estimate; less than this is no lost word. Of a longer file the declared part is used."""


INDEX = "index.jsonl"
"""The manifest of a folder of shards; naming the folder names it."""

_MAX_RECORD = 2**31 - 1
_LINES_NAMED = 5
"""Bad lines that one error describes; the rest are counted."""


class ManifestError(ValueError):
    """A manifest that cannot be used; its message names the file and the line."""


@dataclass(frozen=True, slots=True)  # of which there may be ten million
class Utterance:
    """One transcribed recording."""

    id: str
    audio_filepath: Path
    """The recording, or the shard that holds it."""
    duration: float
    """Seconds, as declared by the manifest."""
    text: str
    speaker: str | None = None
    shard_record: int | None = None
    """Number of the recording in the shard; None: `audio_filepath` is the recording itself."""


def manifest_path(path: str | Path) -> Path:
    """The manifest that a path on the command line or in a config names: of a folder of shards, its index."""
    path = Path(path)
    return path / INDEX if path.is_dir() else path


def set_name(path: str | Path) -> str:
    """What a person calls the set: `test` of data/an4/test.jsonl, and of the shards in data/an4/shards/test."""
    path = manifest_path(path).absolute()
    return path.parent.name if path.name == INDEX else path.stem


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read and validate a manifest or the index of a folder of shards. The audio files themselves are not opened.

    Raises:
      ManifestError: no such file, an empty file, or bad lines, the first five in one message and the rest counted.
    """
    utterances, faults = scan_manifest(path)
    path = manifest_path(path)
    if len(faults) == 1:
        raise ManifestError(f"{path}:{faults[0]}")
    if faults:
        more = f" | and {len(faults) - _LINES_NAMED} more" if len(faults) > _LINES_NAMED else ""
        raise ManifestError(f"{path}: {len(faults)} bad lines: {' | '.join(faults[:_LINES_NAMED])}{more}")
    return utterances


def scan_manifest(path: str | Path) -> tuple[list[Utterance], list[str]]:
    """As read_manifest, but that bad lines are passed over and described: `line number: reason`.

    A bad line is not UTF-8, not JSON, lacks a key, has one of a wrong type or a duration that no audio file may have,
    or uses an id again.

    Raises:
      ManifestError: no such file, or an empty file.
    """
    folder, path = Path(path), manifest_path(path)
    utterances: list[Utterance] = []
    seen: dict[str, int] = {}
    shards: dict[str, Path] = {}
    faults: list[str] = []
    try:
        with path.open("rb") as lines:  # of text mode's, a text may hold characters that end lines
            for number, data in enumerate(lines, start=1):
                try:
                    line = data.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors put a mark first
                    if not line.strip():
                        continue
                    utterance = _parse_line(line, path, shards)
                except UnicodeDecodeError as e:
                    faults.append(f"{number}: not UTF-8 ({e.reason} at byte {e.start})")
                    continue
                except RecursionError:
                    faults.append(f"{number}: brackets nested too deeply")
                    continue
                except ManifestError as e:
                    faults.append(f"{number}: {e}")
                    continue
                if utterance.id in seen:
                    faults.append(
                        f"{number}: id {utterance.id!r} was already used in line {seen[utterance.id]}; give each line "
                        "an `id` of its own (default: the file's stem)"
                    )
                    continue
                seen.setdefault(utterance.id, number)
                utterances.append(utterance)
    except FileNotFoundError:
        if folder != path:
            raise ManifestError(
                f"{folder}: a folder without {INDEX}: no shards, or not all of them yet; name a manifest, or run "
                f"`jaxds2 shard MANIFEST --out {folder}` to its end"
            ) from None
        raise ManifestError(f"no manifest {path}; write one with `jaxds2 prepare`, see README") from None
    except OSError as e:
        raise ManifestError(f"{path}: cannot be read ({e})") from None
    if not utterances and not faults:
        raise ManifestError(f"{path}: holds no utterances")
    return utterances, faults


def _parse_line(line: str, path: Path, shards: dict[str, Path]) -> Utterance:
    """Raises ManifestError, its message without the place. `shards` holds paths that lines share, by name."""
    try:
        record: Any = json.loads(line)
    except ValueError as e:
        raise ManifestError(f"not JSON ({e})") from None
    if "\\u" in line:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ManifestError("holds one half of a surrogate pair, which is no character") from None
    if not isinstance(record, dict):
        raise ManifestError("expected an object with audio_filepath, duration and text")
    for key, kind in (("audio_filepath", str), ("duration", (int, float)), ("text", str)):
        if key not in record:
            raise ManifestError(f"missing key {key!r}; a line holds audio_filepath, duration (seconds) and text")
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            expected = "a number" if key == "duration" else "a string"
            raise ManifestError(f"{key} is {record[key]!r}, expected {expected}")
    if not 0 <= record["duration"] <= MAX_DURATION:  # nor NaN
        raise ManifestError(f"duration is {_shown(record['duration'])}, expected seconds, 0 to {MAX_DURATION:.0f}")
    if not record["audio_filepath"]:
        raise ManifestError("audio_filepath is empty")
    name, number, speaker = record["audio_filepath"], record.get("shard_record"), record.get("speaker")
    if number is None:
        audio = path.parent / name  # an absolute name stays as it is
    else:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= _MAX_RECORD:
            raise ManifestError(f"shard_record is {_shown(number)}, expected the number of a recording in a shard")
        if record.get("id") in (None, ""):
            raise ManifestError("missing key 'id', which a recording in a shard goes by")
        audio = shards.get(name) or shards.setdefault(name, path.parent / name)
    return Utterance(
        id=audio.stem if record.get("id") in (None, "") else str(record["id"]),
        audio_filepath=audio,
        duration=float(record["duration"]),
        text=record["text"],
        speaker=None if speaker is None else str(speaker),
        shard_record=number,
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 20 else text[:20] + "..."


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest, atomically: it is there whole or not at all.

    Audio below the manifest's folder is named relative to it, other audio by its absolute path.

    Raises:
      WriteError: it cannot be written.
    """
    path = Path(path)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for u in utterances:
            line = to_record(u, path.parent) | {"duration": round(u.duration, 6)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def to_record(utterance: Utterance, folder: Path) -> dict[str, Any]:
    """What the line of an utterance says in a manifest that lies in `folder`."""
    root, audio = os.path.abspath(folder), Path(os.path.abspath(utterance.audio_filepath))
    record = {
        "audio_filepath": str(audio.relative_to(root) if audio.is_relative_to(root) else audio),
        "duration": utterance.duration,
        "text": utterance.text,
        "id": utterance.id,
    }
    if utterance.speaker is not None:
        record["speaker"] = utterance.speaker
    if utterance.shard_record is not None:
        record["shard_record"] = utterance.shard_record
    return record


def manifest_digest(utterances: Sequence[Utterance]) -> str:
    """SHA-256 over id, duration and text in order: what the batching plan and a score depend on."""
    digest = hashlib.sha256()
    for u in utterances:
        digest.update(json.dumps([u.id, round(u.duration, 6), u.text], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
