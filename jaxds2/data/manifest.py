"""Manifests: one utterance a line, as JSON Lines.

A line holds `audio_filepath` (relative to the manifest, or absolute), `duration` in seconds, `text`, and may hold `id`
(default: the file's stem), `speaker`, and keys of other tools, which are ignored.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxds2.audio import MAX_DURATION
from jaxds2.files import write_whole

DURATION_TOLERANCE = 0.1
"""Seconds by which a file may differ from its declared duration: other tools round to a digit, and an MP3's header may
be an estimate; less than this is no lost word. Of a longer file the declared part is used."""


_LINES_NAMED = 5
"""Bad lines that one error describes; the rest are counted."""


class ManifestError(ValueError):
    """A manifest that cannot be used; its message names the file and the line."""


@dataclass(frozen=True)
class Utterance:
    """One transcribed recording."""

    id: str
    audio_filepath: Path
    duration: float
    """Seconds, as declared by the manifest."""
    text: str
    speaker: str | None = None


def read_manifest(path: str | Path) -> list[Utterance]:
    """Read and validate a manifest. The audio files themselves are not opened.

    Raises:
      ManifestError: no such file, an empty file, or bad lines, the first five in one message and the rest counted: not
        JSON, a missing key, a wrong type, a duration that no audio file may have, an id twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would split a text at U+2028
    except FileNotFoundError:
        raise ManifestError(f"no manifest {path}; write one with `jaxds2 prepare`, see README") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ManifestError(f"{path}: cannot be read ({e})") from None
    utterances: list[Utterance] = []
    seen: dict[str, int] = {}
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            utterance = _parse_line(line, path)
        except RecursionError:
            faults.append(f"{number}: brackets nested too deeply")
            continue
        except ManifestError as e:
            faults.append(f"{number}: {e}")
            continue
        if utterance.id in seen:
            faults.append(f"{number}: id {utterance.id!r} was already used in line {seen[utterance.id]}")
        seen.setdefault(utterance.id, number)
        utterances.append(utterance)
    if len(faults) == 1:
        raise ManifestError(f"{path}:{faults[0]}")
    if faults:
        more = f" | and {len(faults) - _LINES_NAMED} more" if len(faults) > _LINES_NAMED else ""
        raise ManifestError(f"{path}: {len(faults)} bad lines: {' | '.join(faults[:_LINES_NAMED])}{more}")
    if not utterances:
        raise ManifestError(f"{path}: holds no utterances")
    return utterances


def _parse_line(line: str, path: Path) -> Utterance:
    """Raises ManifestError, its message without the place."""
    try:
        record: Any = json.loads(line)
    except ValueError as e:
        raise ManifestError(f"not JSON ({e})") from None
    if not isinstance(record, dict):
        raise ManifestError("expected an object with audio_filepath, duration and text")
    for key, kind in (("audio_filepath", str), ("duration", (int, float)), ("text", str)):
        if key not in record:
            raise ManifestError(f"missing key {key!r}; a line holds audio_filepath, duration (seconds) and text")
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            expected = "a number" if key == "duration" else "a string"
            raise ManifestError(f"{key} is {record[key]!r}, expected {expected}")
    if not 0 <= record["duration"] <= MAX_DURATION:  # nor NaN
        given = str(record["duration"])
        shown = given if len(given) <= 20 else given[:20] + "..."
        raise ManifestError(f"duration is {shown}, expected seconds, 0 to {MAX_DURATION:.0f}")
    if not record["audio_filepath"]:
        raise ManifestError("audio_filepath is empty")
    audio = Path(record["audio_filepath"])
    speaker = record.get("speaker")
    return Utterance(
        id=str(record.get("id") or audio.stem),
        audio_filepath=audio if audio.is_absolute() else path.parent / audio,
        duration=float(record["duration"]),
        text=record["text"],
        speaker=None if speaker is None else str(speaker),
    )


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest, atomically: it is there whole or not at all.

    Audio below the manifest's folder is named relative to it, other audio by its absolute path.

    Raises:
      WriteError: it cannot be written.
    """
    path = Path(path)
    root = Path(os.path.abspath(path.parent))
    lines: list[str] = []
    for u in utterances:
        audio = Path(os.path.abspath(u.audio_filepath))
        name = audio.relative_to(root) if audio.is_relative_to(root) else audio
        record = {"audio_filepath": str(name), "duration": round(u.duration, 6), "text": u.text, "id": u.id}
        if u.speaker is not None:
            record["speaker"] = u.speaker
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def manifest_digest(utterances: Sequence[Utterance]) -> str:
    """SHA-256 over id, duration and text in order: what the batching plan and a score depend on."""
    digest = hashlib.sha256()
    for u in utterances:
        digest.update(json.dumps([u.id, round(u.duration, 6), u.text], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
