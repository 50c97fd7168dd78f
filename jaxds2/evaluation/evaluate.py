"""Score a recogniser on a manifest."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from tqdm import tqdm

from jaxds2.data.manifest import Utterance
from jaxds2.decoding.hypothesis import Decode, Hypothesis
from jaxds2.decoding.pool import Pool
from jaxds2.evaluation.metrics import EditCounts, count_character_edits, count_word_edits
from jaxds2.hosts import gather
from jaxds2.inference.recognizer import Recognizer
from jaxds2.text import Vocabulary

DecodePool = Pool[np.ndarray, list[Hypothesis]]


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
    """The best text of each."""
    hypotheses: list[list[Hypothesis]]
    """All that the decoder gave, best first."""
    words: EditCounts
    characters: EditCounts
    loss: float | None
    """Nats per label over the utterances whose label fits; None where the labels were not needed."""
    infeasible: list[str]
    """Ids that the loss leaves out, since their label does not fit their frames."""
    audio_seconds: float
    wall_seconds: float
    example: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """log_probs_UV of the first of the utterances that this process decoded, to look at; empty where they were there
    before."""

    @property
    def rtfx(self) -> float:
        """Seconds of audio per second of the clock, without compiling the model and starting the loader."""
        return self.audio_seconds / self.wall_seconds


def evaluate(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    decode: Decode,
    *,
    pool: DecodePool | None = None,
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
      decode: log-probabilities to hypotheses.
      pool: decodes in `decode`'s place, with processes that each have one like it.
      with_loss: also the CTC loss, which needs references that the vocabulary can spell.
      warm_up: compile every batch shape before the clock starts, which it does when the first batch is there.
      progress: show a bar.
      should_stop: polled at each batch.
      keep: called with each utterance's index and its log_probs_UV, before it is decoded.

    Raises:
      EvaluationError: no utterance has a reference, a recording could not be read, or is too short for one frame.
      Interrupted: should_stop() said so.
    """
    vocabulary = recognizer.vocabulary
    refs = references_of(utterances, vocabulary)
    plan = recognizer.plan(utterances)
    if warm_up:
        recognizer.warm_up(plan)
    order: list[int] = []
    failed: list[str] = []
    losses: list[tuple[int, float | None]] = []
    """Index and nats, None where the label does not fit."""
    examples: list[tuple[int, np.ndarray]] = []
    start = time.perf_counter()

    def start_clock() -> None:
        nonlocal start
        start = time.perf_counter()

    def emitted() -> Iterator[np.ndarray]:
        for batch, output, failures in recognizer.run(utterances, plan, with_labels=with_loss, on_first=start_clock):
            if should_stop():
                raise Interrupted
            failed.extend(f"{identifier}: {why}" for identifier, why in failures)
            for row, index in enumerate(batch.index_B.tolist()):
                if index < 0:
                    continue
                log_probs_UV = np.asarray(output.log_probs_BUV[row, : output.logit_lengths_B[row]])
                if not len(log_probs_UV):
                    failed.append(_too_short(utterances[index]))
                    continue
                keep(index, log_probs_UV)
                losses.append((index, float(output.loss_B[row]) if output.feasible_B[row] else None))
                if not examples or index < examples[0][0]:
                    examples[:] = [(index, log_probs_UV)]
                order.append(index)
                yield log_probs_UV

    own = -(-len(utterances) // jax.process_count())
    decoded = list(zip(order, _decode_all(emitted(), decode, pool, own, progress), strict=False))
    decoded, failed, losses = (
        [one for part in parts for one in part] for parts in zip(*gather((decoded, failed, losses)), strict=True)
    )
    wall_seconds = time.perf_counter() - start
    found = dict(decoded)
    if len(found) < len(decoded):
        raise EvaluationError(f"{len(decoded) - len(found)} utterances were decoded twice: a fault of the plan")
    scores = _scores(utterances, refs, found, failed, wall_seconds)
    if examples:
        scores = replace(scores, example=examples[0][1])
    if not with_loss:
        return scores
    losses.sort()
    fitting = [(nats, len(refs[index])) for index, nats in losses if nats is not None]
    return replace(
        scores,
        loss=sum(nats for nats, _ in fitting) / max(sum(labels for _, labels in fitting), 1),
        infeasible=[utterances[index].id for index, nats in losses if nats is None],
    )


def evaluate_log_probs(
    log_probs: Sequence[np.ndarray],
    utterances: Sequence[Utterance],
    vocabulary: Vocabulary,
    decode: Decode,
    *,
    pool: DecodePool | None = None,
    progress: bool = True,
    keep: Callable[[int, np.ndarray], None] = lambda index, log_probs_UV: None,
) -> Scores:
    """As evaluate, of log-probabilities that are there already.

    Args:
      log_probs: log_probs_UV of each utterance.
      utterances: references are normalised by the vocabulary.
      vocabulary: of the log-probabilities.
      decode, pool, progress, keep: as for evaluate.

    Raises:
      EvaluationError: no utterance has a reference, or one has no frames.
    """
    refs = references_of(utterances, vocabulary)
    failed = [_too_short(u) for u, frames in zip(utterances, log_probs, strict=True) if not len(frames)]
    for index, log_probs_UV in enumerate(log_probs):
        keep(index, log_probs_UV)
    start = time.perf_counter()
    decoded = _decode_all([] if failed else log_probs, decode, pool, len(utterances), progress)
    wall_seconds = time.perf_counter() - start
    return _scores(utterances, refs, dict(enumerate(decoded)), failed, wall_seconds)


def references_of(utterances: Sequence[Utterance], vocabulary: Vocabulary) -> list[str]:
    """The normalised text of each utterance.

    Raises:
      EvaluationError: none has any.
    """
    refs = [vocabulary.normalize(u.text) for u in utterances]
    if not any(refs):
        raise EvaluationError(
            f"none of {len(utterances)} utterances has a reference text, so there is nothing to score against; "
            f"`jaxds2 transcribe` reads audio that has none"
        )
    return refs


def _too_short(u: Utterance) -> str:
    return f"{u.id}: too short for one frame ({u.audio_filepath}, {u.duration:.3f} s)"


def _decode_all(
    log_probs: Iterable[np.ndarray], decode: Decode, pool: DecodePool | None, total: int, progress: bool
) -> list[list[Hypothesis]]:
    results = pool.map(log_probs) if pool else map(decode, log_probs)
    return list(
        tqdm(results, total=total, desc="evaluate", unit="utt", disable=None if progress else True, leave=False)
    )


def _scores(
    utterances: Sequence[Utterance],
    refs: list[str],
    found: Mapping[int, list[Hypothesis]],
    failed: Sequence[str],
    wall_seconds: float,
) -> Scores:
    """Scores without a loss, of all utterances or of none."""
    if failed:
        shown = "; ".join(failed[:3]) + ("; ..." if len(failed) > 3 else "")
        raise EvaluationError(f"{len(failed)} of {len(utterances)} recordings cannot be scored: {shown}")
    if sorted(found) != list(range(len(utterances))):
        raise EvaluationError(f"{len(found)} of {len(utterances)} utterances were decoded: a fault of the plan")
    hypotheses = [found[i] for i in range(len(utterances))]
    texts = [best.text for best, *_ in hypotheses]
    words, spoken = count_word_edits(refs, texts), sum(len(ref.split()) for ref in refs)
    if words.reference != spoken:
        raise EvaluationError(f"{words.reference} of {spoken} words of the references were counted: a fault of ours")
    return Scores(
        ids=[u.id for u in utterances],
        refs=refs,
        hyps=texts,
        hypotheses=hypotheses,
        words=words,
        characters=count_character_edits(refs, texts),
        loss=None,
        infeasible=[],
        audio_seconds=sum(u.duration for u in utterances),
        wall_seconds=wall_seconds,
    )
