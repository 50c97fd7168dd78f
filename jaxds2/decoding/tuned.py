"""RUN/decoding.json: settings that `jaxds2 lm tune` found, and how they meet those of the command line."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxds2.decoding.hypothesis import DecoderError
from jaxds2.decoding.settings import BeamSettings
from jaxds2.files import write_whole

FILE = "decoding.json"
SETTINGS: tuple[str, ...] = ("alpha", "beta", "beam_width", "beam_prune_logp", "token_min_logp", "blank_threshold")
"""What may be tuned."""

BLANK_THRESHOLD: float | None = None
"""Where nobody says otherwise."""


def defaults() -> dict[str, Any]:
    """Of SETTINGS."""
    beam = asdict(BeamSettings())
    return {name: BLANK_THRESHOLD if name == "blank_threshold" else beam[name] for name in SETTINGS}


def settle(
    explicit: Mapping[str, Any], run_dir: Path | None, backend: str, lm: Path | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The value of each of SETTINGS and where it is from: the command line, the tuned file, or the defaults.

    Args:
      explicit: what the command line says; None where it says nothing.
      run_dir: whose decoding.json to look into.
      backend: the settings tuned for another are not used.
      lm: nor are those tuned with another language model.

    Raises:
      DecoderError: a decoding.json that cannot be read.
    """
    tuned = _tuned(run_dir, backend, lm) if run_dir and lm else {}
    values, sources = defaults(), dict.fromkeys(SETTINGS, "default")
    for name in SETTINGS:
        if explicit.get(name) is not None:
            values[name], sources[name] = explicit[name], "command line"
        elif name in tuned:
            values[name], sources[name] = tuned[name], FILE
    return values, sources


def unused(run_dir: Path | None, backend: str, lm: Path | None) -> str | None:
    """A line on settings that were tuned with another language model or for other back ends; None: there are none.

    Raises:
      DecoderError: as read_tuned.
    """
    content = read_tuned(run_dir) if run_dir else {}
    if run_dir is None or not content or (lm is not None and _tuned(run_dir, backend, lm)):
        return None
    entry = content.get(backend)
    if entry is None:
        others = " and ".join(content)
        return f"{run_dir / FILE}: its settings were tuned for {others}; for {backend} the defaults hold"
    here = f"with {lm}, which is another," if lm else "without one"
    return f"{run_dir / FILE}: its settings were tuned with {entry.get('lm')}; for a search {here} the defaults hold"


def read_tuned(run_dir: Path) -> dict[str, Any]:
    """The file's content by back end; empty where there is none.

    Raises:
      DecoderError: it cannot be read.
    """
    path = run_dir / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise DecoderError(f"{path}: cannot be read ({e}); delete it or tune again") from None
    keys = {"lm_sha256": str, "settings": dict}
    if not isinstance(content, dict) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in keys.items())
        for entry in content.values()
    ):
        raise DecoderError(f"{path}: expected settings by back end; delete it or tune again")
    for entry in content.values():
        for name, value in entry["settings"].items():
            if not _fits(name, value):
                raise DecoderError(f"{path}: {name} {json.dumps(value)}: expected a number; delete it or tune again")
    return content


def _fits(name: str, value: Any) -> bool:
    """Is it of the type of the setting? Whether it is in its range is said by whoever uses it."""
    if value is None:
        return name == "blank_threshold"
    return type(value) is int or (type(value) is float and name != "beam_width")


def write_tuned(run_dir: Path, backend: str, entry: Mapping[str, Any]) -> Path:
    """Put what was found for a back end into the file, beside what stands there for others.

    Raises:
      WriteError: it cannot be written. DecoderError: as read_tuned.
    """
    path = run_dir / FILE
    content = read_tuned(run_dir) | {backend: dict(entry)}
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def _tuned(run_dir: Path, backend: str, lm: Path) -> Mapping[str, Any]:
    entry = read_tuned(run_dir).get(backend)
    if entry is None or not lm.is_file():
        return {}
    with lm.open("rb") as f:
        same = hashlib.file_digest(f, "sha256").hexdigest() == entry["lm_sha256"]
    return entry["settings"] if same else {}
