"""Log-probabilities of a manifest, kept so that they can be decoded again without the model."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxds2.files import write_whole

INDEX, ARRAY = "logprobs.json", "logprobs.npy"
SCHEMA_VERSION = 1

_NAMES = ("characters", "manifest", "manifest_sha256", "run", "checkpoint")
_KINDS: Mapping[str, type] = dict.fromkeys((*_NAMES, "sha256"), str) | {"checkpoint_step": int, "utterances": list}


class LogProbsError(ValueError):
    """Log-probabilities that cannot be used; its message is one line for the user."""


@dataclass(frozen=True)
class LogProbs:
    """What a model said of each utterance of a manifest."""

    ids: tuple[str, ...]
    """In the manifest's order."""
    log_probs: tuple[np.ndarray, ...]
    """log_probs_UV of each, float32."""
    characters: str
    """The model's alphabet."""
    manifest: str
    manifest_sha256: str
    run: str
    """The folder of the run."""
    checkpoint: str
    checkpoint_step: int

    def origin(self) -> dict[str, Any]:
        """All but the numbers."""
        names = ("characters", "manifest", "manifest_sha256", "run", "checkpoint", "checkpoint_step")
        return {name: getattr(self, name) for name in names}


def write_log_probs(folder: Path, saved: LogProbs) -> None:
    """Write `logprobs.npy`, the frames of all utterances one after the other, then its index `logprobs.json`.

    Raises:
      WriteError: a file cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate([np.zeros((0, len(saved.characters) + 1)), *saved.log_probs], dtype=np.float32))
    index = {
        "schema_version": SCHEMA_VERSION,
        **saved.origin(),
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "utterances": [{"id": i, "frames": len(frames)} for i, frames in zip(saved.ids, saved.log_probs, strict=True)],
    }
    write_whole(folder / ARRAY, buffer.getvalue())
    write_whole(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def read_log_probs(folder: Path) -> LogProbs:
    """Read what write_log_probs wrote.

    Raises:
      LogProbsError: no log-probabilities there, or damaged ones.
    """
    try:
        index: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        content = (folder / ARRAY).read_bytes()
    except FileNotFoundError:
        raise LogProbsError(
            f"{folder} holds no log-probabilities ({INDEX}, {ARRAY}); eval.py writes them with --save-logprobs"
        ) from None
    except (OSError, ValueError) as e:
        raise LogProbsError(f"{folder / INDEX}: cannot be read ({e})") from None
    version = index.get("schema_version") if isinstance(index, dict) else None
    if version != SCHEMA_VERSION:
        raise LogProbsError(
            f"{folder / INDEX}: schema version {version}, expected {SCHEMA_VERSION}; "
            f"write it again with --save-logprobs"
        )
    if not _is_index(index):
        raise LogProbsError(f"{folder / INDEX}: not as --save-logprobs writes it; write it again")
    if hashlib.sha256(content).hexdigest() != index["sha256"]:
        raise LogProbsError(
            f"{folder / ARRAY}: not the file that {INDEX} describes, or damaged; write both again with --save-logprobs"
        )
    frames = np.load(io.BytesIO(content), allow_pickle=False)
    ends = np.cumsum([u["frames"] for u in index["utterances"]], dtype=np.intp)
    if len(frames) != ends[-1:].sum():
        raise LogProbsError(
            f"{folder / INDEX}: names {ends[-1:].sum()} frames, {ARRAY} holds {len(frames)}; write both again with "
            f"--save-logprobs"
        )
    return LogProbs(
        ids=tuple(u["id"] for u in index["utterances"]),
        log_probs=tuple(np.split(frames, ends[:-1])) if len(ends) else (),
        **{name: index[name] for name in _NAMES},
        checkpoint_step=index["checkpoint_step"],
    )


def _is_index(index: Mapping[str, Any]) -> bool:
    return all(isinstance(index.get(name), kind) for name, kind in _KINDS.items()) and all(
        isinstance(u, dict) and isinstance(u.get("id"), str) and isinstance(u.get("frames"), int) and u["frames"] >= 0
        for u in index["utterances"]
    )


def check_same(saved: LogProbs, *, characters: str, ids: Sequence[str], manifest_sha256: str, where: str) -> None:
    """Refuse log-probabilities of another alphabet or another manifest.

    Args:
      saved: the log-probabilities.
      characters: the alphabet that they are to be read by.
      ids: of the manifest's utterances.
      manifest_sha256: of its bytes.
      where: the folder of the log-probabilities, for the message.

    Raises:
      LogProbsError: they are not what is asked for.
    """
    if saved.characters != characters:
        raise LogProbsError(
            f"{where}: log-probabilities over the alphabet {saved.characters!r}, the run's is {characters!r}: they are "
            f"another run's ({saved.run})"
        )
    if saved.manifest_sha256 != manifest_sha256 or saved.ids != tuple(ids):
        raise LogProbsError(
            f"{where}: log-probabilities of {saved.manifest} as it was (sha256 {saved.manifest_sha256[:12]}), this "
            f"manifest is another (sha256 {manifest_sha256[:12]}); write them again with --save-logprobs"
        )
