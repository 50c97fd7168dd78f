"""Texts of a manifest forced on its recordings: where words and characters are spoken, and which texts do not match.

Utterances that cannot be aligned are named and do not keep the others from coming out.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from tqdm import tqdm

from jaxds2.ctc import forced_alignment, min_frames
from jaxds2.data.manifest import Utterance, to_record
from jaxds2.data.shards import read_utterances
from jaxds2.decoding.alignment import Span, TextAlignment, Word, format_textgrid
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.evaluation.sclite import format_ctm
from jaxds2.files import WriteError, replacing, write_whole
from jaxds2.inference.recognizer import Recognizer, frame_seconds

MIN_SCORE = -1.0
"""Utterances below this are listed: nats per character by which the audio would rather be read as something else. The
mean over a long text hides a single wrong word; the words' own scores show it (RESULTS.md says what is found out)."""
PRINTED = 5

_TIERS = ("words", "characters")

_align_batch = jax.jit(forced_alignment)


class AlignmentError(ValueError):
    """A manifest of which nothing can be aligned."""


@dataclass(frozen=True, eq=False)
class AlignedUtterance:
    """An utterance, its text as the model spells it, and where that stands."""

    utterance: Utterance
    alignment: TextAlignment
    heard: str
    """What the model reads without knowing the text."""


def align_run(recognizer: Recognizer, manifest: Path, *, folder: Path, min_score: float = MIN_SCORE) -> int:
    """Align a manifest, write what came out, print what did not, and which texts do not match.

    The files, by id: alignments.jsonl, words.ctm, characters.ctm, textgrids/ID.TextGrid, and with the reasons
    mismatches.tsv and failed.txt. alignments.jsonl is a manifest too. TextGrids of an earlier call are removed.

    Args:
      recognizer: the model and its weights.
      manifest: what to align; a folder of shards too.
      folder: where the files go; made if absent.
      min_score: utterances that score lower are listed as mismatches (see TextAlignment.score).

    Returns:
      How many utterances could not be aligned.

    Raises:
      ManifestError, ShardError: a bad manifest. AlignmentError: no utterance has a text.
      WriteError: a file cannot be written; this is found out before the work begins.
    """
    utterances = read_utterances(manifest)
    seconds = frame_seconds(recognizer.config)
    names = ("alignments.jsonl", "words.ctm", "characters.ctm")
    with ExitStack() as stack:
        files = [stack.enter_context(replacing(folder / name)) for name in names]
        lines, words_ctm, characters_ctm = (
            stack.enter_context(partial.open("w", encoding="utf-8", newline="\n")) for partial in files
        )
        aligned, failed = align(recognizer, utterances)
        _remove_textgrids(folder)
        for a in tqdm(aligned, "write", unit="utt", leave=False, disable=None, delay=2):
            identifier, duration = a.utterance.id, a.utterance.duration
            words = a.alignment.words(seconds, duration)
            characters = [c for word in words for c in word.characters]
            lines.write(json.dumps(_record(a, words, folder), ensure_ascii=False) + "\n")
            words_ctm.write(format_ctm([identifier], [[_row(word.span) for word in words]]))
            characters_ctm.write(format_ctm([identifier], [[_row(c) for c in characters]]))
            tiers = tuple(zip(_TIERS, ([word.span for word in words], characters), strict=True))
            write_whole(_textgrid(folder, identifier), format_textgrid(tiers, duration))
    mismatches = sorted((a for a in aligned if a.alignment.score < min_score), key=lambda a: a.alignment.score)
    rows = [f"{a.alignment.score:.3f}\t{a.utterance.id}\t{a.utterance.text}\t{a.heard}\n" for a in mismatches]
    write_whole(folder / "mismatches.tsv", "score\tid\ttext\theard\n" + "".join(rows))
    write_whole(folder / "failed.txt", "".join(f"{identifier}: {why}\n" for identifier, why in failed.items()))
    _print(aligned, mismatches, failed, folder, min_score)
    return len(failed)


def align(
    recognizer: Recognizer, utterances: Sequence[Utterance], *, progress: bool = True
) -> tuple[list[AlignedUtterance], dict[str, str]]:
    """Force each utterance's text on its audio.

    Args:
      recognizer: the model and its weights.
      utterances: their texts are normalised by the model's vocabulary.
      progress: show a bar.

    Returns:
      The aligned utterances, and id -> reason of those that could not be aligned, both sorted by id.

    Raises:
      AlignmentError: no utterance has a text.
    """
    vocabulary = recognizer.vocabulary
    texts = [vocabulary.normalize(u.text) for u in utterances]
    if not any(texts):
        raise AlignmentError(
            f"none of {len(utterances)} utterances has a text, so there is nothing to align; "
            f"`jaxds2 transcribe` reads audio that has none"
        )
    failed: dict[str, str] = {}
    spelt: list[Utterance] = []
    for u, text in zip(utterances, texts, strict=True):
        if not text:
            failed[u.id] = "has no text"
        elif unknown := vocabulary.unknown(text):
            failed[u.id] = f"its text has {unknown!r}, outside the alphabet {vocabulary.characters!r}"
        else:
            spelt.append(dataclasses.replace(u, text=text))
    aligned: list[AlignedUtterance] = []
    greedy = GreedyDecoder(vocabulary)
    with tqdm(total=len(spelt), desc="align", unit="utt", leave=False, disable=None if progress else True) as bar:
        for batch, output, failures in recognizer.run(spelt, recognizer.plan(spelt), with_labels=True) if spelt else ():
            failed |= dict(failures)
            alignment = jax.device_get(
                _align_batch(output.log_probs_BUV, output.logit_lengths_B, batch.labels_BN, batch.label_lengths_B)
            )
            for row, index in enumerate(batch.index_B.tolist()):
                if index < 0:
                    continue
                u, frames = spelt[index], int(output.logit_lengths_B[row])
                if alignment.feasible_B[row]:
                    log_probs_UV = np.asarray(output.log_probs_BUV[row, :frames])
                    spans = TextAlignment.of(log_probs_UV, alignment.position_BU[row, :frames], u.text, vocabulary)
                    aligned.append(AlignedUtterance(u, spans, greedy(log_probs_UV)[0].text))
                else:
                    needs, where = min_frames(vocabulary.encode(u.text)), f"{u.audio_filepath}, {u.duration:.3f} s"
                    failed[u.id] = f"its text needs {needs} frames, its audio has {frames} ({where})"
            bar.update(int((batch.index_B >= 0).sum()) + len(failures))
    return sorted(aligned, key=lambda a: a.utterance.id), dict(sorted(failed.items()))


def _record(aligned: AlignedUtterance, words: Sequence[Word], folder: Path) -> dict[str, Any]:
    """A line of alignments.jsonl."""

    def timed(key: str, s: Span) -> dict[str, Any]:
        return {key: s.text, "start": round(s.start, 6), "end": round(s.end, 6), "score": float(f"{s.score:.4g}")}

    spoken = [timed("word", w.span) | {"characters": [timed("character", c) for c in w.characters]} for w in words]
    return to_record(aligned.utterance, folder) | {"score": round(aligned.alignment.score, 4), "words": spoken}


def _row(span: Span) -> tuple[str, float, float, float]:
    return span.text, span.start, span.end, span.score


def _textgrid(folder: Path, utterance_id: str) -> Path:
    """Named by the id, in which what no file system takes is written as %XX."""
    name = re.sub(r"[\x00-\x1f/\\:*?\"<>|%]", lambda match: quote(match[0], safe=""), utterance_id)
    return folder / "textgrids" / f"{name}.TextGrid"


def _remove_textgrids(folder: Path) -> None:
    """Those of an earlier call, which are known by their tiers; what else lies there stays.

    Raises:
      WriteError: the system refuses.
    """
    names = [f'name = "{tier}"'.encode() for tier in _TIERS]
    for path in (folder / "textgrids").glob("*.TextGrid"):
        try:
            content = path.read_bytes()
            if all(name in content for name in names):
                path.unlink()
        except OSError as e:
            raise WriteError(f"{path}: of an earlier alignment, cannot be removed ({e.strerror or e})") from None


def _print(
    aligned: Sequence[AlignedUtterance],
    mismatches: Sequence[AlignedUtterance],
    failed: dict[str, str],
    folder: Path,
    min_score: float,
) -> None:
    """Counts, the first of each list, and where the rest is."""
    for identifier, why in list(failed.items())[:PRINTED]:
        print(f"error: {identifier}: {why}", file=sys.stderr)
    if len(failed) > PRINTED:
        print(f"error: {len(failed) - PRINTED} more, see {folder / 'failed.txt'}", file=sys.stderr)
    for a in mismatches[:PRINTED]:
        print(f"mismatch: {a.utterance.id}: {a.alignment.score:.2f}, text {a.utterance.text!r}, heard {a.heard!r}")
    if len(mismatches) > PRINTED:
        print(f"mismatch: {len(mismatches) - PRINTED} more, see {folder / 'mismatches.tsv'}")
    words = sum(len(a.utterance.text.split()) for a in aligned)
    print(
        f"aligned {len(aligned)} of {len(aligned) + len(failed)} utterances, {words} words; "
        f"{len(mismatches)} score below {min_score:g}: their text may not match; written to {folder}"
    )
