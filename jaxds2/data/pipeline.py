"""Plan -> batches: grain decodes whole steps ahead of the training loop, in threads or in processes.

The element of grain's source is a whole step, so the order is the plan's, whatever the number of workers, and the state
of the loader is the number of the next step.
"""

import gc
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxds2.audio import AudioError, change_speed, read_audio
from jaxds2.data.manifest import DURATION_TOLERANCE, Utterance
from jaxds2.data.plan import BatchPlan, Bucket
from jaxds2.data.shards import Recordings
from jaxds2.data.strings import SharedStrings
from jaxds2.stacks import offer_stacks
from jaxds2.text import Vocabulary
from jaxds2.worker import prepare_worker

_NO_RECORD = -1
"""In place of a shard's record: the file is the recording itself."""

Array = Any
"""np.ndarray on the host, jax.Array on devices and while tracing."""


class PipelineError(ValueError):
    """A batch could not be made: a fault in the loader or the death of a worker, not one bad recording."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Batch:
    """What the device gets: a pytree of static shape per bucket. A filler row has index -1 and no samples or labels."""

    audio_BS: Array
    """int16, zero beyond each length."""
    audio_lengths_B: Array
    """int32 samples."""
    labels_BN: Array
    """int32 label ids, zero beyond each length."""
    label_lengths_B: Array
    """int32."""
    index_B: Array
    """int32 position in the list of utterances: the row's identity for augmentation keys and reports; -1 for filler."""
    epoch: Array
    """int32 scalar."""


def filler_batch(bucket: Bucket, epoch: int = 0) -> Batch:
    """A batch of a bucket's shape in which every row is filler."""
    return Batch(
        audio_BS=np.zeros((bucket.rows, bucket.num_samples), np.int16),
        audio_lengths_B=np.zeros(bucket.rows, np.int32),
        labels_BN=np.zeros((bucket.rows, bucket.num_labels), np.int32),
        label_lengths_B=np.zeros(bucket.rows, np.int32),
        index_B=np.full(bucket.rows, -1, np.int32),
        epoch=np.array(epoch, np.int32),
    )


@dataclass(frozen=True, eq=False)
class LoadedBatch:
    """A batch, or a process' rows of it, and what only the host needs to know.

    Not a pytree, so that it cannot slip into a compiled function.
    """

    step: int
    batch: Batch
    failures: tuple[tuple[str, str], ...]
    """Id and reason of each utterance that became filler because its audio could not be used."""


@contextmanager
def load_batches(
    utterances: Sequence[Utterance],
    plan: BatchPlan,
    *,
    vocabulary: Vocabulary | None,
    start_step: int = 0,
    stop_step: int | None = None,
    workers: int = 0,
    prefetch: int = 4,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Iterator[LoadedBatch]]:
    """Batches of steps `start_step` to `stop_step - 1`, in order; decoding starts at once, in the background.

    `with load_batches(...) as batches:` ends the threads or processes at the end of the block, whatever happens in it.
    With workers the script must guard its entry by `if __name__ == "__main__"`, as they are spawned.

    Args:
      utterances: the list that `plan` was made of.
      plan: which of them stand in which step.
      vocabulary: spells the texts; None leaves the labels empty.
      start_step: first step.
      stop_step: None: without end.
      workers: processes; 0 decodes in two threads of this process. The batches are the same.
      prefetch: steps that are decoded ahead, by each worker.
      process: read this one's rows only, where the rows of each batch are split evenly over `processes`.
      processes: how many read; they divide the rows of every bucket.

    Raises:
      PipelineError: on entry, if `utterances` is not the list of `plan`; by the iterator, if a step cannot be made
        (a text outside the vocabulary, say) or a worker dies.
    """
    # grain takes a second to import and only this function needs it.
    import grain
    from absl import flags

    if len(utterances) != len(plan.num_samples_N):
        raise PipelineError(f"{len(utterances)} utterances, but the plan was made of {len(plan.num_samples_N)}")
    read = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=prefetch)
    with (
        Recordings() as recordings,
        closing(_Steps(utterances, plan, vocabulary, recordings, start_step, stop_step, process, processes)) as steps,
    ):
        dataset = grain.MapDataset.source(steps).to_iter_dataset(read)
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which only an absl application parses
            options = grain.MultiprocessingOptions(num_workers=workers)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
            # grain starts workers only when somebody waits for an element: here a thread that is one ahead.
            dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=1)
        iterator = iter(dataset)
        batches = _receive(iterator)
        try:
            iterator.start_prefetch()
            yield batches
        finally:
            batches.close()
            iterator.close()
            # What was read ahead must give back its shared memory now, not at the exit of the interpreter, which fails
            # and warns of leaks. grain's own references to it end in cycles, by way of the traceback of its
            # StopIteration.
            del batches, iterator
            if workers:
                gc.collect()


def _receive(steps: Iterator[tuple[int, Batch, tuple[tuple[str, str], ...]]]) -> Generator[LoadedBatch, None, None]:
    try:
        for step, batch, failures in steps:
            yield LoadedBatch(step, jax.tree.map(_own, batch), failures)
    except PipelineError:
        raise
    except RuntimeError as e:  # grain's, when a worker was killed
        raise PipelineError(f"a loader worker died; out of memory, or /dev/shm too small for the batches? ({e})") from e


def _own(x: np.ndarray) -> np.ndarray:
    """A worker's array lies in shared memory, which is small in containers: copy it out, so that it is free again."""
    return x if type(x) is np.ndarray else np.array(x)


def _start_worker(index: int, count: int) -> None:
    """Leave signals to the training process, which saves and closes us, and say where we wait; but never outlive it."""
    del index, count
    prepare_worker()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    offer_stacks()


class _Steps:
    """grain's source: element `index` is the whole batch of step `start` + `index`."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        plan: BatchPlan,
        vocabulary: Vocabulary | None,
        recordings: Recordings,
        start: int,
        stop: int | None,
        process: int,
        processes: int,
    ):
        self._process, self._processes = process, processes
        self._plan, self._vocabulary, self._recordings = plan, vocabulary, recordings
        # What a worker is handed is small however many utterances there are: these are shared, the rest are numbers.
        self._ids = SharedStrings(u.id for u in utterances)
        self._files = SharedStrings(str(u.audio_filepath) for u in utterances)
        self._texts = SharedStrings(() if vocabulary is None else (u.text for u in utterances))
        records = (_NO_RECORD if u.shard_record is None else u.shard_record for u in utterances)
        self._shard_records_N = np.fromiter(records, np.int32, len(utterances))
        self._start, self._stop = start, sys.maxsize if stop is None else stop

    def close(self) -> None:
        """Let go of what is shared; no worker may start after this."""
        for strings in (self._ids, self._files, self._texts):
            strings.close()

    def __len__(self) -> int:
        return max(0, self._stop - self._start)

    def __getitem__(self, index: int) -> tuple[int, Batch, tuple[tuple[str, str], ...]]:
        """A pytree, of which grain hands over the arrays in shared memory.

        Pickled arrays of megabytes would clog the pipe between the processes: a worker that dies in the middle of one
        leaves the training process waiting for the rest.
        """
        step = self._start + int(index)
        try:
            return self._load(step)
        except Exception as e:
            # An exception that cannot be pickled would vanish in the worker, and the training loop would wait for ever.
            raise PipelineError(f"step {step}: {type(e).__name__}: {e}") from e

    def _load(self, step: int) -> tuple[int, Batch, tuple[tuple[str, str], ...]]:
        plan = self._plan.step(step)
        bucket = plan.bucket.share(self._processes)
        batch = filler_batch(bucket, plan.epoch)
        own = slice(self._process * bucket.rows, (self._process + 1) * bucket.rows)
        failures = []
        for row, (index, speed) in enumerate(
            zip(plan.indices_B[own].tolist(), plan.speeds_B[own].tolist(), strict=True)
        ):
            if index < 0:
                continue
            try:
                waveform_S = self._read(index, speed)
            except AudioError as e:
                failures.append((self._ids[index], str(e)))
                continue
            label_N = [] if self._vocabulary is None else self._vocabulary.encode(self._texts[index])
            batch.audio_BS[row, : len(waveform_S)] = waveform_S
            batch.audio_lengths_B[row] = len(waveform_S)
            batch.labels_BN[row, : len(label_N)] = label_N
            batch.label_lengths_B[row] = len(label_N)
            batch.index_B[row] = index
        return step, batch, tuple(failures)

    def _read(self, index: int, speed: float) -> np.ndarray:
        """The waveform of an utterance at its speed, int16, no longer than the plan expects."""
        rate, declared = self._plan.sample_rate, int(self._plan.num_samples_N[index])
        record = int(self._shard_records_N[index])
        recording = self._recordings.find(
            self._files[index], None if record == _NO_RECORD else record, self._ids[index]
        )
        waveform_S = read_audio(recording, sample_rate=rate)
        if abs(len(waveform_S) - declared) > DURATION_TOLERANCE * rate:
            raise AudioError(
                f"{recording}: lasts {len(waveform_S) / rate:.2f} s, the manifest declares "
                f"{declared / rate:.2f} s: truncated, or another file? `jaxds2 check` lists all such files"
            )
        waveform_S = waveform_S[:declared]
        return waveform_S if speed == 1 else change_speed(waveform_S, speed)
