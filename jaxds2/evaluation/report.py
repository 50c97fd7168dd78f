"""What a score leaves behind, for programs, for reading, for sclite and for a browser."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxds2 import hosts
from jaxds2.config import Config
from jaxds2.data.manifest import Utterance, manifest_path
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
from jaxds2.evaluation.evaluate import DecodePool, Scores, evaluate, evaluate_log_probs
from jaxds2.evaluation.logprobs import LogProbs, check_same, write_log_probs
from jaxds2.evaluation.metrics import sum_edits
from jaxds2.evaluation.page import Posteriors, build_page, collect_media, read_curve
from jaxds2.evaluation.sclite import Words, format_ctm, format_stm, format_trn
from jaxds2.evaluation.significance import LEVEL, REPLICATES, SEED, rate_intervals, resampling_units
from jaxds2.files import check_writable, write_whole
from jaxds2.inference.recognizer import Recognizer, frame_seconds
from jaxds2.text import Vocabulary

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
    pool: DecodePool | None = None,
    list_hypotheses: bool = False,
    save_log_probs: bool = False,
) -> dict[str, Any]:
    """Score a recognizer on a manifest, write the report, print WER, CER and speed.

    Of several processes all call this, each decodes its part, and the first writes and prints.

    Args:
      recognizer: the model and its weights.
      manifest: what to score it on; a folder of shards too.
      decoder: what turns log-probabilities into text.
      folder: where the report goes; made if absent.
      checkpoint: how the weights were asked for, for the report.
      run_dir: whose name and training curve the page shows.
      page: write report.html too.
      pool: processes that decode in the decoder's place.
      list_hypotheses: write nbest.jsonl too.
      save_log_probs: keep the log-probabilities in the folder too, for `score_log_probs`.

    Returns:
      The content of report.json; nothing in the processes that write none.

    Raises:
      ManifestError, ShardError: a bad manifest. EvaluationError: a recording that cannot be scored.
      HostsError: the processes were started on different things.
      WriteError: as write_report; that nothing can be written there at all is found out before the work begins.
    """
    if jax.process_index() == 0:
        check_writable(folder)
    scored = _Scored.read(manifest, recognizer.config, recognizer.vocabulary, page=page)
    if line := replaced(folder, decoder.settings, recognizer.step):
        print(line, file=sys.stderr)
    log_probs: dict[int, np.ndarray] = {}

    def keep(index: int, log_probs_UV: np.ndarray) -> None:
        scored.keep(index, log_probs_UV)
        if save_log_probs:
            log_probs[index] = log_probs_UV

    first = jax.process_index() == 0
    facts = {"code": hosts.code_version(), "jax": jax.__version__, "step of the checkpoint": recognizer.step}
    facts |= {
        "digest of the manifest": scored.digest,
        "decoder": decoder.settings,
        "html": page,
        "kept": save_log_probs,
    }
    hosts.agree(facts)
    scores = evaluate(recognizer, scored.utterances, decoder, pool=pool, progress=first, keep=keep)
    for others in hosts.gather(log_probs):
        log_probs.update(others)
    for others in hosts.gather(scored.posteriors or {}):
        (scored.posteriors or {}).update(others)
    if not first:
        return {}
    if save_log_probs:
        saved = LogProbs(
            ids=tuple(scores.ids),
            log_probs=tuple(log_probs[i] for i in range(len(scores.ids))),
            characters=recognizer.vocabulary.characters,
            manifest=str(manifest),
            manifest_sha256=scored.digest,
            run=str(run_dir or ""),
            checkpoint=str(checkpoint or recognizer.step),
            checkpoint_step=recognizer.step,
        )
        write_log_probs(folder, saved)
    return scored.report(
        scores,
        decoder,
        folder=folder,
        run_dir=run_dir,
        list_hypotheses=list_hypotheses,
        checkpoint=None if checkpoint is None else str(checkpoint),
        checkpoint_step=recognizer.step,
    )


def score_log_probs(
    saved: LogProbs,
    where: Path,
    config: Config,
    decoder: Decoder,
    *,
    manifest: Path,
    folder: Path,
    run_dir: Path,
    page: bool = True,
    pool: DecodePool | None = None,
    list_hypotheses: bool = False,
) -> dict[str, Any]:
    """As score_run, of log-probabilities that are there already, without the model.

    Args:
      saved: the log-probabilities.
      where: the folder they were read from.
      config: of the run they are said to be of.
      manifest: what they are said to be of.
      decoder, folder, run_dir, page, pool, list_hypotheses: as for score_run.

    Raises:
      LogProbsError: they are of another alphabet or another manifest. The rest as score_run.
    """
    check_writable(folder)
    scored = _Scored.read(manifest, config, Vocabulary(saved.characters), page=page)
    ids = [u.id for u in scored.utterances]
    check_same(saved, characters=config.data.characters, ids=ids, manifest_sha256=scored.digest, where=str(where))
    if line := replaced(folder, decoder.settings, saved.checkpoint_step):
        print(line, file=sys.stderr)
    scores = evaluate_log_probs(
        saved.log_probs, scored.utterances, scored.vocabulary, decoder, pool=pool, keep=scored.keep
    )
    return scored.report(
        scores,
        decoder,
        folder=folder,
        run_dir=run_dir,
        list_hypotheses=list_hypotheses,
        checkpoint=saved.checkpoint,
        checkpoint_step=saved.checkpoint_step,
        log_probs=str(where),
    )


def replaced(folder: Path, decoder: Mapping[str, Any], checkpoint_step: int) -> str | None:
    """A line on scores in a folder that others would replace; None: there are none, or of the same model and settings.

    Args:
      folder: where a report may lie.
      decoder: the settings of the decoder that is to be scored.
      checkpoint_step: of the weights that are to be scored.
    """
    path = folder / "report.json"
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        before = dict(there["decoder"]) | {"checkpoint step": there["checkpoint_step"]}
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path} cannot be read and is replaced"
    after = json.loads(json.dumps(dict(decoder))) | {"checkpoint step": checkpoint_step}
    names = [name for name in before | after if name != "sources" and before.get(name) != after.get(name)]
    changes = ", ".join(f"{name} {before.get(name)} -> {after.get(name)}" for name in names)
    return f"the scores of {when} in {folder} are replaced ({changes}); --name keeps both" if changes else None


@dataclass(frozen=True)
class _Scored:
    """A manifest that is being scored, and what the page is to show of it."""

    manifest: Path
    config: Config
    vocabulary: Vocabulary
    utterances: list[Utterance]
    digest: str
    posteriors: dict[str, Posteriors] | None
    """By id; None where there is to be no page."""

    @classmethod
    def read(cls, manifest: Path, config: Config, vocabulary: Vocabulary, *, page: bool) -> "_Scored":
        utterances = read_utterances(manifest)
        digest = hashlib.sha256(manifest_path(manifest).read_bytes()).hexdigest()
        return cls(manifest, config, vocabulary, utterances, digest, {} if page else None)

    def keep(self, index: int, log_probs_UV: np.ndarray) -> None:
        if self.posteriors is not None:
            self.posteriors[self.utterances[index].id] = Posteriors.of(log_probs_UV, self.vocabulary)

    def report(
        self,
        scores: Scores,
        decoder: Decoder,
        *,
        folder: Path,
        run_dir: Path | None,
        list_hypotheses: bool,
        checkpoint: str | None,
        checkpoint_step: int,
        log_probs: str | None = None,
    ) -> dict[str, Any]:
        """Write it and print its main lines."""
        utterances, posteriors = self.utterances, self.posteriors
        seconds = frame_seconds(self.config)
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
            media = collect_media([by_id[u.id] for u in worst_first(scored)], posteriors or {}, self.config.features)
            curve = read_curve(run_dir / "metrics.jsonl") if run_dir else []
            run = run_dir.absolute().name if run_dir else ""
            return build_page(report, scored, audio=files, media=media, words=times, run=run, curve=curve)

        report = write_report(
            folder,
            scored,
            rtfx=scores.rtfx,
            manifest=str(self.manifest),
            manifest_sha256=self.digest,
            checkpoint=checkpoint,
            checkpoint_step=checkpoint_step,
            decoder=decoder.settings,
            log_probs=log_probs,
            times=times,
            hypotheses=_hypotheses(scores, seconds) if list_hypotheses else None,
            page=None if posteriors is None else render,
        )
        print(scores.words.format("WER"))
        print(scores.characters.format("CER"))
        print(_interval_line(report))
        for line in _worst_lines(report):
            print(line)
        print(f"{scores.rtfx:.1f} times real time, step {checkpoint_step}; written to {folder}")
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
    log_probs: str | None = None,
    times: Mapping[str, Words] | None = None,
    hypotheses: str | None = None,
    page: Callable[[Mapping[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Write the report's files, each whole or not at all, utterances sorted by id.

    report.json is written last: where it stands, the others belong to it. They are utterances.jsonl, which --compare
    reads; recogs.txt and errs.txt for reading; ref.trn, hyp.trn, ref.stm and hyp.ctm for sclite; report.html;
    nbest.jsonl. Of these
    hyp.ctm, report.html and nbest.jsonl are removed where an earlier score left them and this one has none.

    Args:
      folder: made if absent.
      utterances: of score_utterances.
      rtfx: seconds of audio per second of the clock; see Scores.rtfx.
      manifest: path of the manifest, as it was given.
      manifest_sha256: of the manifest's bytes.
      checkpoint: how the weights were asked for (`best`, `last`, a step), where that is known.
      checkpoint_step: training step of the weights.
      decoder: every setting of the decoder.
      log_probs: the folder of the log-probabilities that were decoded, where no model was run.
      times: (word, start, end) in seconds by id; hyp.ctm is written where every utterance has them.
      hypotheses: nbest.jsonl; None: there is none.
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
        **({"log_probs": log_probs} if log_probs else {}),
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
        "nbest.jsonl": hypotheses,
        "report.html": page(report) if page else None,
        "report.json": json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, content in contents.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_whole(folder / name, content)
    return report


def _hypotheses(scores: Scores, frame_seconds: float) -> str:
    """A line for each utterance: every hypothesis, best first, with its scores and words, in seconds."""
    lines = []
    for i, found in sorted(zip(scores.ids, scores.hypotheses, strict=True), key=lambda pair: pair[0]):
        listed = [
            {
                "text": h.text,
                "total": h.total,
                "acoustic": h.acoustic,
                "lm": h.lm,
                "words": [
                    {
                        "word": w.text,
                        "start": round(w.start * frame_seconds, 6),
                        "end": round(w.end * frame_seconds, 6),
                        "confidence": round(w.confidence, 6),
                    }
                    for w in h.words
                ],
            }
            for h in found
        ]
        lines.append(json.dumps({"id": i, "hypotheses": listed}, ensure_ascii=False) + "\n")
    return "".join(lines)


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
