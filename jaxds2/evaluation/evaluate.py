"""Score a recogniser on a manifest."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from tqdm import tqdm

from jaxds2.data.manifest import Utterance
from jaxds2.evaluation.metrics import EditCounts, count_character_edits, count_word_edits
from jaxds2.hosts import gather
from jaxds2.inference.recognizer import Recognizer

Decode = Callable[[np.ndarray], str]
"""log_probs_UV of one utterance to its text."""


class EvaluationError(ValueError):
    """A manifest that could not be scored whole; nothing is scored on part of it."""


class Interrupted(Exception):  # noqa: N818
    """Evaluation was asked to stop."""


@dataclass(frozen=True)
class Scores:
    """What a recogniser made of a manifest, in the manifest's order."""

    ids: list[str]
    refs: list[str]
    hyps: list[str]
    words: EditCounts
    characters: EditCounts
    loss: float | None
    """Nats per label over the utterances whose label fits; None where the labels were not needed."""
    infeasible: list[str]
    """Ids that the loss leaves out, since their label does not fit their frames."""
    audio_seconds: float
    wall_seconds: float
    example: np.ndarray
    """log_probs_UV of the first of the utterances that this process decoded, to look at."""

    @property
    def rtfx(self) -> float:
        """Seconds of audio per second of the clock, without loading and compiling the model."""
        return self.audio_seconds / self.wall_seconds


def evaluate(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    decode: Decode,
    *,
    with_loss: bool = False,
    warm_up: bool = True,
    progress: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    keep: Callable[[int, np.ndarray], None] = lambda index, log_probs_UV: None,
) -> Scores:
    """Decode every utterance once and count its edits.

    Of several processes each decodes its rows of every batch; all of them get the same scores.

    Args:
      recognizer: the model and its weights.
      utterances: references are normalised by the model's vocabulary.
      decode: log-probabilities to text.
      with_loss: also the CTC loss, which needs references that the vocabulary can spell.
      warm_up: compile every batch shape before the clock starts.
      progress: show a bar.
      should_stop: polled at each batch.
      keep: called after each decode with the utterance's index and its log_probs_UV.

    Raises:
      EvaluationError: no utterance has a reference, a recording could not be read, or is too short for one frame.
      Interrupted: should_stop() said so.
    """
    refs = [recognizer.vocabulary.normalize(u.text) for u in utterances]
    if not any(refs):
        raise EvaluationError(
            f"none of {len(utterances)} utterances has a reference text, so there is nothing to score against; "
            f"`jaxds2 transcribe` reads audio that has none"
        )
    plan = recognizer.plan(utterances)
    if warm_up:
        recognizer.warm_up(plan)
    decoded: list[tuple[int, str, float | None]] = []
    """Index, text, and nats, None where the label does not fit."""
    failed: list[str] = []
    first, example = len(utterances), np.zeros((0, recognizer.vocabulary.size), np.float32)
    start = time.perf_counter()
    with tqdm(
        total=len(utterances), desc="evaluate", unit="utt", disable=None if progress else True, leave=False
    ) as bar:
        for index_B, output, failures in recognizer.run(utterances, plan, with_labels=with_loss):
            if should_stop():
                raise Interrupted
            failed += failures
            for row, index in enumerate(index_B.tolist()):
                if index < 0:
                    continue
                log_probs_UV = np.asarray(output.log_probs_BUV[row, : output.logit_lengths_B[row]])
                if not len(log_probs_UV):
                    u = utterances[index]
                    failed.append(f"{u.id}: too short for one frame ({u.audio_filepath}, {u.duration:.3f} s)")
                    continue
                nats = float(output.loss_B[row]) if output.feasible_B[row] else None
                decoded.append((index, decode(log_probs_UV), nats))
                keep(index, log_probs_UV)
                if index < first:
                    first, example = index, log_probs_UV
                bar.update(jax.process_count())  # the others are as far
    everyone = gather((decoded, failed))
    decoded, failed = ([one for part in parts for one in part] for parts in zip(*everyone, strict=True))
    wall_seconds = time.perf_counter() - start
    if failed:
        shown = "; ".join(failed[:3]) + ("; ..." if len(failed) > 3 else "")
        raise EvaluationError(f"{len(failed)} of {len(utterances)} recordings cannot be scored: {shown}")
    decoded.sort(key=lambda of: of[0])
    if [index for index, _, _ in decoded] != list(range(len(utterances))):
        raise EvaluationError(
            f"{len(decoded)} texts of {len(utterances)} utterances, one each was expected: a fault of the plan"
        )
    texts = [text for _, text, _ in decoded]
    fitting = [(nats, len(ref)) for (_, _, nats), ref in zip(decoded, refs, strict=True) if nats is not None]
    return Scores(
        ids=[u.id for u in utterances],
        refs=refs,
        hyps=texts,
        words=count_word_edits(refs, texts),
        characters=count_character_edits(refs, texts),
        loss=sum(nats for nats, _ in fitting) / max(sum(n for _, n in fitting), 1) if with_loss else None,
        infeasible=[utterances[index].id for index, _, nats in decoded if nats is None] if with_loss else [],
        audio_seconds=sum(u.duration for u in utterances),
        wall_seconds=wall_seconds,
        example=example,
    )
