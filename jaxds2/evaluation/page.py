"""report.html: a score to look at in a browser, in one file that needs no network.

Every utterance and its alignment is in the page as JSON, and rows are drawn as they are scrolled to. Sound and pictures
are large, so they go to the worst utterances first, up to a budget in bytes; the page says which have none.
"""

import base64
import io
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxds2.audio import AudioError, read_audio
from jaxds2.config import FeatureConfig
from jaxds2.data.manifest import Utterance
from jaxds2.data.shards import Recordings
from jaxds2.evaluation.breakdown import ScoredUtterance, confusions
from jaxds2.features import log_mel
from jaxds2.text import BLANK_ID, Vocabulary

AUDIO_BYTES = 32 << 20
"""Of base64 that sound may take: a bit over two hours of speech as MP3, which every browser plays."""

LOSSLESS_SECONDS = 900.0
"""Sets of up to so many seconds get their sound as FLAC, longer ones as MP3 of 25 kbit/s, a fifth of that. Opus
would be a third of MP3, but takes four times as long to encode: minutes for a test set."""

PICTURE_BYTES = 16 << 20
"""Of base64 that pictures may take: about 1,000 utterances of 7 s."""

TABLE_ROWS = 200
"""Confused words shown in each table; the page says how many there are."""

_LEVELS = 32
_SHOWN_PROBABILITY = 0.1
_MEL_BANDS = 40
_MEL_FRAMES = 2
_PAD_SECONDS = 4.0
# Dark violet to pale yellow, evenly brighter: where a picture is printed in grey it still reads.
_COLORS = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))


@dataclass(frozen=True)
class Posteriors:
    """What the model thought of one utterance, small enough to keep for all of them."""

    labels: list[str]
    """Names of the classes that are at least once likely, the blank last."""
    levels_RU: np.ndarray
    """Their probabilities over the output frames, uint8 from 0 to 31."""

    @classmethod
    def of(cls, log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> "Posteriors":
        """Reduce log_probs_UV of one utterance."""
        probs_UV = np.exp(np.asarray(log_probs_UV, np.float32))
        likely = [int(v) for v in np.flatnonzero(probs_UV.max(axis=0, initial=0.0) >= _SHOWN_PROBABILITY)]
        rows = [v for v in likely if v != BLANK_ID] + [BLANK_ID]
        names = [vocabulary.decode([v]).replace(" ", "␣") or "blank" for v in rows]
        return cls(names, np.rint(probs_UV[:, rows].T * (_LEVELS - 1)).astype(np.uint8))


@dataclass(frozen=True)
class Media:
    """Sound and pictures of one utterance, as data URLs; empty where the budget is spent."""

    audio: str
    mel: str
    """Log-mel over time, low bands at the bottom."""
    posteriors: str
    labels: list[str]
    """Of the rows of `posteriors`."""


def collect_media(
    utterances: Sequence[Utterance],
    posteriors: Mapping[str, Posteriors],
    features: FeatureConfig,
    *,
    audio_bytes: int = AUDIO_BYTES,
    picture_bytes: int = PICTURE_BYTES,
) -> dict[str, Media]:
    """Sound and pictures of the first utterances, until both budgets are spent.

    Args:
      utterances: the most wanted first.
      posteriors: of each, by its id.
      features: the log-mel analysis.
      audio_bytes: of base64, for all sounds.
      picture_bytes: of base64, for all pictures.
    """
    # Not normalised bin by bin: a picture is to show which are loud.
    mel_of = jax.jit(partial(log_mel, features=replace(features, normalize="fixed")))
    encode = _flac if sum(u.duration for u in utterances) <= LOSSLESS_SECONDS else _mp3
    media: dict[str, Media] = {}
    with Recordings() as recordings:
        for u in tqdm(utterances, desc="sound and pictures", unit="utt", leave=False, delay=3, disable=None):
            if audio_bytes <= 0 and picture_bytes <= 0:
                break
            try:
                waveform_S = read_audio(recordings.of(u), sample_rate=features.sample_rate)
            except AudioError:
                continue  # gone or changed since it was scored; the page has its row all the same
            sound = encode(waveform_S, features.sample_rate) if audio_bytes > 0 else ""
            mel = probabilities = ""
            if picture_bytes > 0:
                levels_RU = posteriors[u.id].levels_RU
                mel = _png(_mel_levels(waveform_S, mel_of, features))
                probabilities = _png(levels_RU)
            audio_bytes -= len(sound)
            picture_bytes -= len(mel) + len(probabilities)
            media[u.id] = Media(sound, mel, probabilities, posteriors[u.id].labels)
    return media


def read_curve(path: Path) -> list[tuple[int, float]]:
    """(step, WER on the dev manifest) of a run's metrics.jsonl; empty where there is none."""
    points = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the line that a killed run may have left half written
        if isinstance(values, dict) and isinstance(values.get("dev/wer"), float):
            points.append((int(values["step"]), values["dev/wer"]))
    return points


def build_page(
    report: Mapping[str, Any],
    utterances: Sequence[ScoredUtterance],
    *,
    audio: Mapping[str, Path],
    media: Mapping[str, Media],
    words: Mapping[str, Sequence[tuple[str, float, float]]],
    run: str = "",
    curve: Sequence[tuple[int, float]] = (),
) -> str:
    """The page.

    Args:
      report: the content of report.json.
      utterances: all of them.
      audio: the recording of each by its id, for those whose sound is not in the page.
      media: sound and pictures by id.
      words: (word, start, end) in seconds by id, where they are known.
      run: its name, for the title.
      curve: (step, WER) during training.

    Returns:
      HTML, whole and self-contained.
    """
    found = confusions(utterances)
    data = {
        "report": dict(report),
        "run": run,
        "curve": list(curve),
        "totals": {kind: len(rows) for kind, rows in asdict(found).items()},
        "confusions": {kind: rows[:TABLE_ROWS] for kind, rows in asdict(found).items()},
        "withAudio": sum(bool(m.audio) for m in media.values()),
        "compressed": any(m.audio.startswith("data:audio/mpeg") for m in media.values()),
        "withPictures": sum(bool(m.mel) for m in media.values()),
        "utterances": [_row(u, audio.get(u.id), words.get(u.id)) for u in utterances],
    }
    numbers = {u.id: number for number, u in enumerate(utterances)}
    scripts = "\n".join(
        f'<script type="application/json" id="m{numbers[i]}">{_json(asdict(m))}</script>' for i, m in media.items()
    )
    template = files("jaxds2.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    head, data_mark, rest = template.partition("/*DATA*/")
    middle, media_mark, tail = rest.partition("<!--MEDIA-->")
    if not (data_mark and media_mark):
        raise RuntimeError("page.html lacks a place for the data or the media")
    return "".join((head, _json(data), middle, scripts, tail))


def _row(u: ScoredUtterance, audio: Path | None, words: Sequence[tuple[str, float, float]] | None) -> dict[str, Any]:
    return {
        "id": u.id,
        "speaker": u.speaker,
        "seconds": round(u.duration, 3),
        "words": u.words.reference,
        "errors": u.words.errors,
        "characters": u.characters.reference,
        "characterErrors": u.characters.errors,
        # A right word is itself, an error [ref, hyp] with null for what is not there.
        "pairs": [ref if ref == hyp else [ref, hyp] for ref, hyp in u.pairs],
        "audio": None if audio is None else audio.absolute().as_uri(),
        "times": None if words is None else [[word, round(start, 3), round(end, 3)] for word, start, end in words],
    }


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _mel_levels(
    waveform_S: np.ndarray, mel_of: Callable[..., tuple[jax.Array, jax.Array]], features: FeatureConfig
) -> np.ndarray:
    """(bands, columns) uint8 from 0 to 31: the features averaged over a few frames and bins, low bands last."""
    # A few lengths, so that few programs are compiled.
    step = int(_PAD_SECONDS * features.sample_rate)
    padded_S = np.zeros(max(1, math.ceil(len(waveform_S) / step)) * step, np.int16)
    padded_S[: len(waveform_S)] = waveform_S
    features_1TF, lengths_1 = mel_of(padded_S[None], np.array([len(waveform_S)], np.int32))
    features_TF = np.asarray(features_1TF)[0, : int(np.asarray(lengths_1)[0])]
    features_CF = _means(features_TF, math.ceil(len(features_TF) / _MEL_FRAMES))
    features_CF = _means(features_CF.T, min(_MEL_BANDS, features.n_mels)).T
    low, high = np.quantile(features_CF, (0.02, 0.995))
    scaled_CF = np.clip((features_CF - low) / max(high - low, 1e-6), 0, 1)
    return np.rint(scaled_CF.T[::-1] * (_LEVELS - 1)).astype(np.uint8)


def _means(x_TF: np.ndarray, groups: int) -> np.ndarray:
    """The rows averaged in so many groups of neighbours, as equal as they can be."""
    edges = np.arange(groups + 1) * len(x_TF) // groups
    return np.add.reduceat(x_TF, edges[:-1]) / np.diff(edges)[:, None]


def _png(levels_HW: np.ndarray) -> str:
    """A data URL of a picture whose pixels are 0 to 31, one byte each, from dark to bright."""
    height, width = levels_HW.shape
    places = np.linspace(0, len(_COLORS) - 1, _LEVELS)
    palette_L3 = np.stack([np.interp(places, range(len(_COLORS)), c) for c in np.array(_COLORS).T], axis=1)
    lines = np.zeros((height, width + 1), np.uint8)  # each line after its filter, none
    lines[:, 1:] = levels_HW
    chunks = (
        (b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 3, 0, 0, 0))),
        (b"PLTE", np.rint(palette_L3).astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _flac(waveform_S: np.ndarray, sample_rate: int) -> str:
    """A data URL of a waveform, int16."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, waveform_S, sample_rate, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _mp3(waveform_S: np.ndarray, sample_rate: int) -> str:
    """The same, smaller; as FLAC where this libsndfile (before 1.1) writes no MP3."""
    import soundfile

    if "MP3" not in soundfile.available_formats():
        return _flac(waveform_S, sample_rate)
    buffer = io.BytesIO()
    options: Any = {"compression_level": 0.9, "bitrate_mode": "VARIABLE"}
    soundfile.write(buffer, waveform_S, sample_rate, format="MP3", subtype="MPEG_LAYER_III", **options)
    return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
