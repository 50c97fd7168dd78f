"""What a score leaves behind: report.json for programs, recogs.txt and errs.txt for reading."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxds2.data.manifest import manifest_path
from jaxds2.data.shards import read_utterances
from jaxds2.decoding.beam import BeamDecoder
from jaxds2.decoding.greedy import greedy_decode
from jaxds2.evaluation.evaluate import evaluate
from jaxds2.evaluation.metrics import align_words, count_character_edits, count_word_edits
from jaxds2.files import write_whole
from jaxds2.inference.recognizer import Recognizer

SCHEMA_VERSION = 1


def score_run(
    recognizer: Recognizer,
    manifest: Path,
    beam: BeamDecoder | None,
    *,
    folder: Path,
    checkpoint: str | int | None = None,
) -> dict[str, Any]:
    """Score a recognizer on a manifest, write the report, print WER, CER and speed.

    Args:
      recognizer: the model and its weights.
      manifest: what to score it on; a folder of shards too.
      beam: the decoder; None is greedy.
      folder: where the report goes; made if absent.
      checkpoint: how the weights were asked for, for the report.

    Returns:
      The content of report.json.

    Raises:
      ManifestError, ShardError: a bad manifest. EvaluationError: a recording that cannot be scored.
      WriteError: as write_report.
    """
    vocabulary = recognizer.vocabulary
    decode = beam.decode if beam else lambda log_probs_UV: greedy_decode(log_probs_UV, vocabulary)
    scores = evaluate(recognizer, read_utterances(manifest), decode)
    report = write_report(
        folder,
        ids=scores.ids,
        refs=scores.refs,
        hyps=scores.hyps,
        rtfx=scores.rtfx,
        manifest=str(manifest),
        manifest_sha256=hashlib.sha256(manifest_path(manifest).read_bytes()).hexdigest(),
        checkpoint=None if checkpoint is None else str(checkpoint),
        checkpoint_step=recognizer.step,
        decoder=beam.settings if beam else {"name": "greedy"},
    )
    print(scores.words.format("WER"))
    print(scores.characters.format("CER"))
    print(f"{scores.rtfx:.1f} times real time, step {recognizer.step}; written to {folder}")
    return report


def write_report(
    folder: Path,
    *,
    ids: Sequence[str],
    refs: Sequence[str],
    hyps: Sequence[str],
    rtfx: float,
    manifest: str,
    manifest_sha256: str,
    checkpoint: str | None,
    checkpoint_step: int,
    decoder: Mapping[str, Any],
) -> dict[str, Any]:
    """Write report.json, recogs.txt and errs.txt, each whole or not at all, utterances sorted by id.

    report.json is written last: where it stands, the others belong to it.

    Args:
      folder: made if absent.
      ids: one name per utterance.
      refs: normalised transcripts, in the order of ids.
      hyps: what was decoded, in the order of ids.
      rtfx: seconds of audio per second of the clock, without loading and compiling.
      manifest: path of the manifest, as it was given.
      manifest_sha256: of the manifest's bytes.
      checkpoint: how the weights were asked for (`best`, `last`, a step), where that is known.
      checkpoint_step: training step of the weights.
      decoder: every setting of the decoder.

    Returns:
      The content of report.json. `wer` and `cer` are fractions, null where errors stand against no reference at all.

    Raises:
      ValueError: ids, refs and hyps differ in number. WriteError: a file cannot be written.
    """
    rows = sorted(zip(ids, refs, hyps, strict=True))
    words, characters = count_word_edits(refs, hyps), count_character_edits(refs, hyps)
    report = {
        "schema_version": SCHEMA_VERSION,
        "wer": _fraction(words.rate),
        "cer": _fraction(characters.rate),
        "words": words.reference,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "substitutions": words.substitutions,
        "characters": characters.reference,
        "character_errors": characters.errors,
        "utterances": len(rows),
        "rtfx": rtfx,
        "manifest": manifest,
        "manifest_sha256": manifest_sha256,
        "checkpoint": checkpoint,
        "checkpoint_step": checkpoint_step,
        "decoder": dict(decoder),
    }
    summary = f"{words.format('WER')}\n{characters.format('CER')}\n"
    write_whole(folder / "recogs.txt", "".join(f"{i}: ref={ref}\n{i}: hyp={hyp}\n" for i, ref, hyp in rows))
    write_whole(folder / "errs.txt", summary + _errors(rows))
    write_whole(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return report


def _errors(rows: Sequence[tuple[str, str, str]]) -> str:
    """The alignment of each utterance, and every error with how often it was made."""
    alignments = align_words([ref for _, ref, _ in rows], [hyp for _, _, hyp in rows])
    wrong = sum(any(ref != hyp for ref, hyp in pairs) for pairs in alignments)
    lines = [f"{wrong} of {len(rows)} utterances with errors", ""]
    lines += ["UTTERANCES: (ref->hyp) substituted, (ref->*) deleted, (*->hyp) inserted"]
    for (i, _, _), pairs in zip(rows, alignments, strict=True):
        marked = (str(ref) if ref == hyp else f"({ref or '*'}->{hyp or '*'})" for ref, hyp in pairs)
        lines.append(" ".join([f"{i}:", *marked]))
    edits = Counter(pair for pairs in alignments for pair in pairs if pair[0] != pair[1])
    substitutions = {f"{ref} -> {hyp}": n for (ref, hyp), n in edits.items() if ref and hyp}
    deletions = {ref: n for (ref, hyp), n in edits.items() if ref and not hyp}
    insertions = {hyp: n for (ref, hyp), n in edits.items() if hyp and not ref}
    for title, counted in (
        ("SUBSTITUTIONS: count ref -> hyp", substitutions),
        ("DELETIONS: count ref", deletions),
        ("INSERTIONS: count hyp", insertions),
    ):
        lines += ["", title]
        lines += [f"{n} {what}" for what, n in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    return "\n".join(lines) + "\n"


def _fraction(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None
