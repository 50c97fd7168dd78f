"""What training says of its steps and scores: lines, curves and names."""

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.errors import JaxRuntimeError

from jaxds2.config import Config
from jaxds2.data.pipeline import LoadedBatch
from jaxds2.data.plan import BatchPlan
from jaxds2.evaluation.evaluate import Scores
from jaxds2.text import Vocabulary
from jaxds2.training.monitor import Monitor, alignment_picture
from jaxds2.training.optimizer import learning_rate_schedule
from jaxds2.training.step import BatchLoss, StepMetrics

MANY_UNREADABLE = 20
"""So many unreadable utterances, if they are more than half, mean that the corpus is not there."""


class TrainingError(ValueError):
    """Training cannot go on; the last good state is saved."""


class StepReport:
    """Turns the metrics of steps into lines, curves and names; it never waits for the step that is running."""

    def __init__(self, config: Config, plan: BatchPlan, ids: list[str], monitor: Monitor, total_steps: int):
        self.config = config
        self.plan = plan
        self.ids = ids
        self.monitor = monitor
        self.schedule = learning_rate_schedule(config.optimizer, total_steps)
        self.unread: list[tuple[Sequence[LoadedBatch], Sequence[BatchLoss], StepMetrics]] = []
        """Steps that have been started and whose metrics have not come yet, at most two."""
        self.starting: Sequence[LoadedBatch] = ()
        """The batches of the step that is being started; empty: none is."""
        self.losses: list[float] = []
        self.samples = self.padded_samples = 0
        self.infeasible = self.unreadable = 0
        self.left_out: dict[str, None] = {}
        """Ids of those that could not be read, which are named once, in the order in which they were found."""
        self.tried = self.failed = 0  # since this process began
        self.since = time.perf_counter()
        self.waited = 0.0

    def awaited(self, batches: Iterable[LoadedBatch]) -> Iterator[list[LoadedBatch]]:
        """The batches of each step; how long they were waited for counts in `train/data_wait_share`."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            group = list(itertools.islice(iterator, self.config.training.accumulate))
            self.waited += time.perf_counter() - begin
            if not group:
                return
            self.starting = group
            yield group

    def hold(self, group: Sequence[LoadedBatch], losses: Sequence[BatchLoss], metrics: StepMetrics) -> None:
        """Keep the metrics of a step that has been started, and report the step before, while this one runs.

        Args:
          group: the batches of the step.
          losses: of each of them.
          metrics: of the update.
        """
        self.unread.append((group, losses, metrics))
        self.starting = ()
        if len(self.unread) > 1:
            self._report_next()

    def flush(self) -> None:
        """Report the step that is held. Raises TrainingError, as `hold` does, after too many skipped steps in a row."""
        if self.unread:
            self._report_next()

    def failed_shape(self) -> tuple[int, ...] | None:
        """After an error of a device: the largest shape of an audio_BS of the first step that has not gone well.

        An error may come to light when a step's metrics are read, or when its weights go into the next one.
        None: all have gone well.
        """
        for group, _, metrics in self.unread:
            try:
                jax.block_until_ready(metrics)
            except JaxRuntimeError:
                return _largest_shape(group)
        return _largest_shape(self.starting) if self.starting else None

    def _report_next(self) -> None:
        group, device_losses, device_metrics = self.unread[0]
        losses, metrics = jax.device_get((device_losses, device_metrics))
        del self.unread[0]  # it has gone well, or ends training for another reason
        self._report(group, losses, metrics)

    def _report(self, group: Sequence[LoadedBatch], losses: Sequence[BatchLoss], metrics: StepMetrics) -> None:
        done = group[0].step // self.config.training.accumulate + 1
        for loaded, loss in zip(group, losses, strict=True):
            self._report_rows(done, loaded, loss)
        if metrics.finite:
            self.losses.append(float(metrics.loss))
        else:
            ids = [self.ids[i] for loss in losses for i in loss.index_B if i >= 0]
            names = " ".join(ids)
            self.monitor.message(f"step {done}: skipped, loss {metrics.loss}, gradient {metrics.grad_norm}: {names}")
            self.monitor.skipped(done, ids, loss=float(metrics.loss), grad_norm=float(metrics.grad_norm))
            if 0 < self.config.training.max_skipped <= metrics.skipped_in_row:
                raise TrainingError(
                    f"step {done}: {int(metrics.skipped_in_row)} steps in a row had a non-finite loss or gradient, the "
                    f"last on {names}; lower optimizer.learning_rate, or look at the utterances of these steps, which "
                    f"skipped.jsonl in the run's folder names, with `jaxds2 check`"
                )
        self.monitor.advance(done, loss=float(metrics.loss), skipped=int(metrics.skipped))
        if done % self.config.training.log_every == 0:
            self._log(done, metrics)

    def _report_rows(self, done: int, loaded: LoadedBatch, loss: BatchLoss) -> None:
        """Count what one batch of a step held, and name what was left out of it."""
        self.samples += int(loss.samples)
        self.padded_samples += loss.index_B.size * loaded.batch.audio_BS.shape[1]
        planned_B = self.plan.step(loaded.step).indices_B
        lost = [self.ids[i] for i in planned_B[(planned_B >= 0) & (loss.index_B < 0)]]
        why = dict(loaded.failures)
        reasons = {name: f"{name}: {why.get(name, 'another process names the reason')}" for name in lost}
        new = [name for name in lost if name not in self.left_out]
        self.left_out |= dict.fromkeys(new)
        self.tried += int(np.sum(planned_B >= 0))
        self.failed += len(lost)
        self.unreadable += len(lost)
        for name in new:
            self.monitor.message(f"step {done}: left out, now and whenever it comes up, {reasons[name]}")
            if jax.process_index() > 0 and name in why:
                print(f"step {done}: left out, {reasons[name]}", file=sys.stderr)
        if self.failed >= MANY_UNREADABLE and 2 * self.failed > self.tried:
            raise TrainingError(
                f"step {done}: {self.failed} of {self.tried} utterances since the start could not be read, the last "
                f"{reasons[lost[-1]] if lost else 'in an earlier step'}; `jaxds2 check` lists them"
            )
        if loss.infeasible_B.any():
            names = [self.ids[i] for i in loss.index_B[loss.infeasible_B]]
            self.infeasible += len(names)
            self.monitor.message(f"step {done}: left out of the loss, label longer than its frames: {' '.join(names)}")

    def summary(self) -> None:
        """Say how many utterances were left out, and how often."""
        if self.unreadable:
            utterances, times = len(self.left_out), self.unreadable
            self.monitor.message(
                f"left out: {utterances} utterance{'s' * (utterances != 1)} that could not be read, "
                f"{times} time{'s' * (times != 1)}; train.log names {'them' if utterances != 1 else 'it'}"
            )

    def _log(self, step: int, metrics: StepMetrics) -> None:
        now = time.perf_counter()
        seconds = self.samples / self.config.features.sample_rate
        learning_rate = float(np.asarray(self.schedule(step - 1 - int(metrics.skipped))))
        self.monitor.scalars(
            step,
            {
                "train/loss": float(np.mean(self.losses)) if self.losses else float("nan"),
                "train/learning_rate": learning_rate,
                "train/grad_norm": float(metrics.grad_norm),
                "train/skipped": int(metrics.skipped),
                "train/infeasible": self.infeasible,
                "train/unreadable": self.unreadable,
                "train/padding_share": 1 - self.samples / max(self.padded_samples, 1),
                "train/audio_hours_per_hour": seconds / (now - self.since),
                "train/data_wait_share": self.waited / (now - self.since),
                "train/epoch": self.plan.locate(step * self.config.training.accumulate)[0],
            },
        )
        self.losses.clear()
        self.samples = self.padded_samples = 0
        self.since, self.waited = now, 0.0

    def evaluation(self, step: int, scores: Scores, vocabulary: Vocabulary, *, took: float) -> None:
        """Report a score on the dev manifest; the seconds that it took do not count as training."""
        self.since += took
        values = {"dev/wer": scores.words.rate, "dev/cer": scores.characters.rate, "dev/loss": scores.loss or 0.0}
        self.monitor.scalars(step, values)
        self.monitor.message(f"step {step}: dev {scores.words.format('WER')}, {scores.characters.format('CER')}")
        if scores.infeasible:
            names = " ".join(scores.infeasible)
            self.monitor.message(f"step {step}: left out of the dev loss, label longer than its frames: {names}")
        self.monitor.sample_table(step, list(zip(scores.ids, scores.refs, scores.hyps, strict=True))[:8])
        self.monitor.figure(step, "dev/alignment", alignment_picture(scores.example, vocabulary))


def _largest_shape(group: Sequence[LoadedBatch]) -> tuple[int, ...]:
    return max((loaded.batch.audio_BS.shape for loaded in group), key=math.prod)
