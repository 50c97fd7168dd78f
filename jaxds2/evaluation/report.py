"""What a score leaves behind, for programs, for reading, for sclite and for a browser."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxds2.data.manifest import manifest_path
from jaxds2.data.shards import read_utterances
from jaxds2.decoding.hypothesis import Decoder
from jaxds2.evaluation.breakdown import (
    Confusions,
    ScoredUtterance,
    by_duration,
    by_length,
    by_speaker,
    confusions,
    score_utterances,
    worst_first,
)
from jaxds2.evaluation.evaluate import evaluate
from jaxds2.evaluation.metrics import sum_edits
from jaxds2.evaluation.page import Posteriors, build_page, collect_media, read_curve
from jaxds2.evaluation.sclite import Words, format_ctm, format_stm, format_trn
from jaxds2.evaluation.significance import LEVEL, REPLICATES, SEED, rate_intervals, resampling_units
from jaxds2.files import write_whole
from jaxds2.inference.recognizer import Recognizer, frame_seconds

SCHEMA_VERSION = 2
"""2 added intervals, breakdown, confusions, worst, utterances_with_errors and word_times; all of 1 is as it was."""

LISTED = 50
"""Confusions of each kind, and worst utterances, in report.json; errs.txt has them all."""
PRINTED = 5


def score_run(
    recognizer: Recognizer,
    manifest: Path,
    decoder: Decoder,
    *,
    folder: Path,
    checkpoint: str | int | None = None,
    run_dir: Path | None = None,
    page: bool = True,
) -> dict[str, Any]:
    """Score a recognizer on a manifest, write the report, print WER, CER and speed.

    Args:
      recognizer: the model and its weights.
      manifest: what to score it on; a folder of shards too.
      decoder: what turns log-probabilities into text.
      folder: where the report goes; made if absent.
      checkpoint: how the weights were asked for, for the report.
      run_dir: whose name and training curve the page shows.
      page: write report.html too.

    Returns:
      The content of report.json.

    Raises:
      ManifestError, ShardError: a bad manifest. EvaluationError: a recording that cannot be scored.
      WriteError: as write_report.
    """
    vocabulary, config = recognizer.vocabulary, recognizer.config
    utterances = read_utterances(manifest)
    posteriors: dict[str, Posteriors] = {}

    def keep(index: int, log_probs_UV: np.ndarray) -> None:
        if page:
            posteriors[utterances[index].id] = Posteriors.of(log_probs_UV, vocabulary)

    scores = evaluate(recognizer, utterances, decoder, keep=keep)
    seconds = frame_seconds(config)
    times = {
        i: [(w.text, w.start * seconds, w.end * seconds) for w in best.words]
        for i, (best, *_) in zip(scores.ids, scores.hypotheses, strict=True)
    }
    scored = score_utterances(
        scores.ids, [u.speaker for u in utterances], [u.duration for u in utterances], scores.refs, scores.hyps
    )
    by_id = {u.id: u for u in utterances}
    files = {u.id: u.audio_filepath for u in utterances if u.shard_record is None}

    def render(report: Mapping[str, Any]) -> str:
        media = collect_media([by_id[u.id] for u in worst_first(scored)], posteriors, config.features)
        curve = read_curve(run_dir / "metrics.jsonl") if run_dir else []
        run = run_dir.absolute().name if run_dir else ""
        return build_page(report, scored, audio=files, media=media, words=times, run=run, curve=curve)

    report = write_report(
        folder,
        scored,
        rtfx=scores.rtfx,
        manifest=str(manifest),
        manifest_sha256=hashlib.sha256(manifest_path(manifest).read_bytes()).hexdigest(),
        checkpoint=None if checkpoint is None else str(checkpoint),
        checkpoint_step=recognizer.step,
        decoder=decoder.settings,
        times=times,
        page=render if page else None,
    )
    print(scores.words.format("WER"))
    print(scores.characters.format("CER"))
    print(_interval_line(report))
    for line in _worst_lines(report):
        print(line)
    print(f"{scores.rtfx:.1f} times real time, step {recognizer.step}; written to {folder}")
    return report


def write_report(
    folder: Path,
    utterances: Sequence[ScoredUtterance],
    *,
    rtfx: float,
    manifest: str,
    manifest_sha256: str,
    checkpoint: str | None,
    checkpoint_step: int,
    decoder: Mapping[str, Any],
    times: Mapping[str, Words] | None = None,
    page: Callable[[Mapping[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Write the report's files, each whole or not at all, utterances sorted by id.

    report.json is written last: where it stands, the others belong to it. They are utterances.jsonl, which --compare
    reads; recogs.txt and errs.txt for reading; ref.trn, hyp.trn, ref.stm and hyp.ctm for sclite; report.html. Of these
    hyp.ctm and report.html are removed where an earlier score left them and this one has none.

    Args:
      folder: made if absent.
      utterances: of score_utterances.
      rtfx: seconds of audio per second of the clock, without loading and compiling.
      manifest: path of the manifest, as it was given.
      manifest_sha256: of the manifest's bytes.
      checkpoint: how the weights were asked for (`best`, `last`, a step), where that is known.
      checkpoint_step: training step of the weights.
      decoder: every setting of the decoder.
      times: (word, start, end) in seconds by id; hyp.ctm is written where every utterance has them.
      page: report.html of the content of report.json; None: no page.

    Returns:
      The content of report.json. Rates and the ends of intervals are fractions, null where errors stand against no
      reference at all.

    Raises:
      WriteError: a file cannot be written.
    """
    times = times or {}
    words, characters = sum_edits(u.words for u in utterances), sum_edits(u.characters for u in utterances)
    units = resampling_units([u.speaker for u in utterances])
    intervals = rate_intervals([[u.words for u in utterances], [u.characters for u in utterances]], units)
    found = confusions(utterances)
    report = {
        "schema_version": SCHEMA_VERSION,
        "wer": _fraction(words.rate),
        "wer_interval": [_fraction(end) for end in intervals[0]],
        "cer": _fraction(characters.rate),
        "cer_interval": [_fraction(end) for end in intervals[1]],
        "intervals": {
            "method": "bootstrap percentiles",
            "level": LEVEL,
            "replicates": REPLICATES,
            "seed": SEED,
            "resampled": units.kind,
            "units": units.count,
        },
        "words": words.reference,
        "insertions": words.insertions,
        "deletions": words.deletions,
        "substitutions": words.substitutions,
        "characters": characters.reference,
        "character_errors": characters.errors,
        "utterances": len(utterances),
        "utterances_with_errors": sum(u.words.errors > 0 for u in utterances),
        "rtfx": rtfx,
        "manifest": manifest,
        "manifest_sha256": manifest_sha256,
        "checkpoint": checkpoint,
        "checkpoint_step": checkpoint_step,
        "decoder": dict(decoder),
        "word_times": all(u.id in times for u in utterances),
        "breakdown": {
            "speaker": by_speaker(utterances),
            "words": by_length(utterances),
            "seconds": by_duration(utterances),
        },
        "confusions": {
            "substitutions": [list(row) for row in found.substitutions[:LISTED]],
            "deletions": [list(row) for row in found.deletions[:LISTED]],
            "insertions": [list(row) for row in found.insertions[:LISTED]],
        },
        "worst": [
            {"id": u.id, "errors": u.words.errors, "words": u.words.reference}
            for u in worst_first(utterances)[:LISTED]
            if u.words.errors
        ],
    }
    ids, speakers = [u.id for u in utterances], [u.speaker for u in utterances]
    refs, hyps = [u.ref for u in utterances], [u.hyp for u in utterances]
    durations = [u.duration for u in utterances]
    contents = {
        "utterances.jsonl": "".join(_line(u) for u in utterances),
        "recogs.txt": "".join(f"{u.id}: ref={u.ref}\n{u.id}: hyp={u.hyp}\n" for u in utterances),
        "errs.txt": f"{words.format('WER')}\n{characters.format('CER')}\n" + _errors(utterances, found),
        "ref.trn": format_trn(ids, speakers, refs),
        "hyp.trn": format_trn(ids, speakers, hyps),
        "ref.stm": format_stm(ids, speakers, durations, refs),
        "hyp.ctm": format_ctm(ids, [times[i] for i in ids]) if report["word_times"] else None,
        "report.html": page(report) if page else None,
        "report.json": json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_whole(folder / name, content)
    return report


def _line(u: ScoredUtterance) -> str:
    record = {
        "id": u.id,
        "speaker": u.speaker,
        "duration": u.duration,
        "ref": u.ref,
        "hyp": u.hyp,
        "words": u.words.reference,
        "word_errors": u.words.errors,
        "characters": u.characters.reference,
        "character_errors": u.characters.errors,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _interval_line(report: Mapping[str, Any]) -> str:
    def span(ends: Sequence[float | None]) -> str:
        return " to ".join("infinity" if end is None else f"{100 * end:.2f}" for end in ends)

    how = report["intervals"]
    return (
        f"{100 * how['level']:.0f} % intervals: WER {span(report['wer_interval'])}, CER {span(report['cer_interval'])} "
        f"(bootstrap, {how['replicates']} resamples of {how['units']} {how['resampled']})"
    )


def _worst_lines(report: Mapping[str, Any]) -> list[str]:
    """The most confused words and the worst utterances, in a line each, where there are any."""
    found = report["confusions"]
    edits = [(n, f"{ref} -> {hyp}") for ref, hyp, n in found["substitutions"]]
    edits += [(n, f"{word} -> *") for word, n in found["deletions"]]
    edits += [(n, f"* -> {word}") for word, n in found["insertions"]]
    most = sorted(edits, key=lambda item: (-item[0], item[1]))[:PRINTED]
    worst = report["worst"][:PRINTED]
    lines = ["most confused: " + ", ".join(f"{what} ({n})" for n, what in most)] if most else []
    if worst:
        lines.append("most errors in: " + ", ".join(f"{u['id']} ({u['errors']} of {u['words']})" for u in worst))
    return lines


def _errors(utterances: Sequence[ScoredUtterance], found: Confusions) -> str:
    """The alignment of each utterance, and every error with how often it was made."""
    wrong = sum(u.words.errors > 0 for u in utterances)
    lines = [f"{wrong} of {len(utterances)} utterances with errors", ""]
    lines += ["UTTERANCES: (ref->hyp) substituted, (ref->*) deleted, (*->hyp) inserted"]
    for u in utterances:
        marked = (str(ref) if ref == hyp else f"({ref or '*'}->{hyp or '*'})" for ref, hyp in u.pairs)
        lines.append(" ".join([f"{u.id}:", *marked]))
    for title, counted in (
        ("SUBSTITUTIONS: count ref -> hyp", [f"{n} {ref} -> {hyp}" for ref, hyp, n in found.substitutions]),
        ("DELETIONS: count ref", [f"{n} {word}" for word, n in found.deletions]),
        ("INSERTIONS: count hyp", [f"{n} {word}" for word, n in found.insertions]),
    ):
        lines += ["", title, *counted]
    return "\n".join(lines) + "\n"


def _fraction(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None
