"""Step -> utterances: length buckets, shuffling, epochs; a pure function of (manifest digest, seed, step).

A batch has one of a few static shapes, so that XLA compiles a few programs, and each shape holds about the same seconds
of audio. Nothing here knows of hosts, devices or workers: the plan of a step is the same on all of them, and one
integer, the step, is all that a checkpoint has to remember.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxds2.augment import draw_speeds
from jaxds2.config import DataConfig
from jaxds2.data.manifest import Utterance
from jaxds2.text import TextError, Vocabulary

_EDGE_GRID = 160
"""Bucket edges are multiples of this many samples, 10 ms at 16 kHz."""
_EDGE_POINTS = 512
"""At most this many candidate edges; beyond it the grid is made coarser (40 ms for 20 s: 0.2 % of padding)."""
_LABEL_GRID = 8
_MIN_WIDTH_S = 0.1
"""Seconds; no batch is narrower, so that even a clip of one sample yields frames."""
_SPEEDS_FOR_EDGES = 5
"""Edges are fitted to the lengths at this many speeds over the range, its ends included."""


class PlanError(ValueError):
    """Utterances that cannot be planned into batches."""


@dataclass(frozen=True)
class Bucket:
    """The static shape of a batch: audio of `rows` x `num_samples`, labels of `rows` x `num_labels`."""

    num_samples: int
    rows: int
    num_labels: int

    def share(self, processes: int) -> "Bucket":
        """The shape of the rows that each of so many processes reads."""
        return replace(self, rows=self.rows // processes)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The batch of one step."""

    step: int
    epoch: int
    bucket: Bucket
    indices_B: np.ndarray
    """int64 positions in the list of utterances; -1 for a row that is filler."""
    speeds_B: np.ndarray
    """float64 speed factors, 1 for filler."""


def select_utterances(
    utterances: Sequence[Utterance],
    data: DataConfig,
    *,
    vocabulary: Vocabulary,
    output_frames: Callable[[np.ndarray], np.ndarray],
    speed: float,
    sample_rate: int = 16_000,
) -> tuple[list[Utterance], dict[str, list[str]]]:
    """Choose what can be trained on.

    Args:
      utterances: of the training manifests, in order.
      data: its `min_duration` and `max_duration` are inclusive bounds.
      vocabulary: spells the texts.
      output_frames: numbers of samples (N,) -> numbers of frames (N,) that the model's CTC head sees.
      speed: largest relative change of speed; labels must fit even the fastest copy of an utterance.
      sample_rate: of the waveforms, in Hz.

    Returns:
      What is kept, in order, and the ids of what is left out, by reason.

    Raises:
      TextError: a text that would be kept has a character outside the vocabulary.
    """
    from tqdm import tqdm

    from jaxds2.ctc import min_frames  # brings optax, which the loader's workers need not import

    fastest_N = _perturb(num_samples([u.duration for u in utterances], sample_rate), 1 + speed)
    frames_N = np.asarray(output_frames(fastest_N))
    kept: list[Utterance] = []
    left_out: dict[str, list[str]] = {}
    both = zip(utterances, frames_N.tolist(), strict=True)
    for u, frames in tqdm(both, "selecting utterances", len(utterances), leave=False, delay=2, disable=None):
        if u.duration < data.min_duration:
            reason = f"shorter than {data.min_duration:g} s"
        elif u.duration > data.max_duration:
            reason = f"longer than {data.max_duration:g} s"
        elif not u.text.strip():
            reason = "empty text"
        else:
            _require_spelling(u, vocabulary)
            if min_frames(u.text) <= frames:  # a label a character
                kept.append(u)
                continue
            reason = "label longer than its frames"
        left_out.setdefault(reason, []).append(u.id)
    return kept, left_out


def _require_spelling(utterance: Utterance, vocabulary: Vocabulary) -> None:
    try:
        vocabulary.require(utterance.text)
    except TextError as e:
        raise TextError(f"utterance {utterance.id!r}: {e}") from None


def num_samples(durations_s_N: Sequence[float] | np.ndarray, sample_rate: int) -> np.ndarray:
    """Seconds -> samples, int64 (N,)."""
    return np.rint(np.asarray(durations_s_N, np.float64) * sample_rate).astype(np.int64)


def _perturb(num_samples_N: np.ndarray, speeds: np.ndarray | float) -> np.ndarray:
    """Samples after a change of speed, as `jaxds2.audio.change_speed` rounds them (half to even)."""
    return np.rint(num_samples_N / speeds).astype(np.int64)


def bucket_edges(
    lengths_N: np.ndarray, num_buckets: int, *, grid: int = _EDGE_GRID, max_points: int = _EDGE_POINTS
) -> np.ndarray:
    """Bucket edges that minimise the total padding of the lengths, each padded to the next edge.

    Exact dynamic programming in O(num_buckets * points^2) over the occupied points of a grid: the best way to cover
    points 0 to j by k buckets is the best way to cover 0 to i - 1 by k - 1, and one bucket from i to j, for the best i.

    Args:
      lengths_N: positive integers, in samples.
      num_buckets: at most this many edges; fewer where there are fewer points.
      grid: edges are multiples of this.
      max_points: where the longest length has more grid points than this, the grid is made coarser by a whole factor.

    Returns:
      int64, ascending; the last is at least the longest length.
    """
    step = grid * int(-(-lengths_N.max() // (grid * max_points)))
    points_P, counts_P = np.unique(-(-lengths_N // step), return_counts=True)
    below_P = np.concatenate([[0], np.cumsum(counts_P)])
    # Summed widths of one bucket over points i to j; the summed lengths are the same for any edges.
    cost_PP = points_P[None, :] * (below_P[None, 1:] - below_P[:-1, None]).astype(np.float64)
    cost_PP[np.tril_indices(len(points_P), -1)] = np.inf
    best_P, first_points = cost_PP[0], []
    for _ in range(min(num_buckets, len(points_P)) - 1):
        total_PP = np.concatenate([[np.inf], best_P[:-1]])[:, None] + cost_PP
        first_points.append(total_PP.argmin(axis=0))
        best_P = total_PP.min(axis=0)
    ends = [len(points_P) - 1]
    for first_P in reversed(first_points):
        ends.append(int(first_P[ends[-1]]) - 1)
    return points_P[ends[::-1]] * step


@dataclass(frozen=True, eq=False)
class _Epoch:
    """Utterances in the order of their buckets, and the slice of that order which each batch takes."""

    order_N: np.ndarray
    speeds_N: np.ndarray
    batches: list[tuple[int, int, int]]
    """(bucket, start, stop), in the order of the steps."""


class BatchPlan:
    """Which utterances stand in the batch of which step, for every step there will ever be.

    Every utterance comes exactly once per epoch, in the bucket of its length at this epoch's speed. The utterances that
    do not fill a last batch of their bucket either leave filler rows in it or move up to the next bucket, whichever
    costs fewer samples over the epoch; so filler is rare but in the widest bucket.
    """

    def __init__(
        self,
        durations_s_N: Sequence[float] | np.ndarray,
        label_lengths_N: Sequence[int] | np.ndarray,
        *,
        digest: str,
        data: DataConfig,
        seed: int,
        speed: float = 0.0,
        sample_rate: int = 16_000,
        shuffle: bool = True,
    ):
        """Fit the buckets.

        Args:
          durations_s_N: seconds, as declared by the manifest.
          label_lengths_N: numbers of labels.
          digest: of the manifest; with `seed` and the epoch the key of the order.
          data: `batch_seconds`, `num_buckets`, `rows_multiple`.
          seed: 0 or more.
          speed: largest relative change of speed, drawn anew for each epoch.
          sample_rate: in Hz.
          shuffle: False: by length, the same in every epoch; for evaluation.

        Raises:
          PlanError: no utterances, or not as many labels as durations.
        """
        self.num_samples_N = num_samples(durations_s_N, sample_rate)
        self.sample_rate = sample_rate
        labels_N = np.asarray(label_lengths_N, np.int64)
        if self.num_samples_N.shape != labels_N.shape:
            raise PlanError(f"{len(self.num_samples_N)} durations, but {len(labels_N)} label lengths")
        if not len(labels_N):
            raise PlanError("no utterances to make batches of: the manifest is empty, or all of them were left out")
        self._digest, self._seed, self._speed, self._shuffle = digest, seed, speed, shuffle
        speeds = np.linspace(1 - speed, 1 + speed, _SPEEDS_FOR_EDGES if speed else 1)
        lengths = np.concatenate([_perturb(self.num_samples_N, s) for s in speeds])
        self._edges_K = bucket_edges(np.maximum(lengths, round(_MIN_WIDTH_S * sample_rate)), data.num_buckets)
        shortest_N = _perturb(self.num_samples_N, 1 + speed)
        self.buckets = tuple(
            Bucket(
                num_samples=width,
                rows=_rows(width, data, len(labels_N), sample_rate),
                # Whatever may be this short may stand here: shorter utterances move up. Static over all epochs.
                num_labels=_round_up(max(1, labels_N[shortest_N <= width].max(initial=0)), _LABEL_GRID),
            )
            for width in self._edges_K.tolist()
        )
        # Both caches hold what is computed from the key alone, and are read with one look: safe in threads.
        self._num_batches: dict[int, tuple[int, ...]] = {}
        self._epochs: dict[int, _Epoch] = {}

    def num_steps(self, epoch: int) -> int:
        """Batches in an epoch; with speed perturbation epochs differ by a few."""
        return sum(self._batches_per_bucket(epoch))

    def steps_for_epochs(self, num_epochs: int) -> int:
        """Batches in epochs 0 to num_epochs - 1."""
        return sum(self.num_steps(epoch) for epoch in range(num_epochs))

    def padding_share(self, epoch: int) -> float:
        """Share of the samples of an epoch's batches that is no audio: the ends of rows, and filler rows."""
        sizes = [n * b.rows * b.num_samples for n, b in zip(self._batches_per_bucket(epoch), self.buckets, strict=True)]
        return 1 - float(self.lengths(epoch).sum()) / sum(sizes)

    def lengths(self, epoch: int) -> np.ndarray:
        """Samples of every utterance at its speed in an epoch, int64 (N,)."""
        return _perturb(self.num_samples_N, self._speeds(epoch))

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number within that epoch."""
        if step < 0:
            raise PlanError(f"step is {step}, must be 0 or more")
        epoch = 0
        while step >= (n := self.num_steps(epoch)):
            epoch, step = epoch + 1, step - n
        return epoch, step

    def step(self, step: int) -> StepPlan:
        """The batch of a step, counted from 0 over all epochs."""
        number, i = self.locate(step)
        epoch = self._epoch(number)
        k, start, stop = epoch.batches[i]
        indices_B = np.full(self.buckets[k].rows, -1, np.int64)
        indices_B[: stop - start] = epoch.order_N[start:stop]
        speeds_B = np.where(indices_B < 0, 1.0, epoch.speeds_N[indices_B])
        return StepPlan(step, number, self.buckets[k], indices_B, speeds_B)

    def _speeds(self, epoch: int) -> np.ndarray:
        return draw_speeds(self._seed, epoch, len(self.num_samples_N), self._speed)

    def _bucket_of(self, lengths_N: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._edges_K, lengths_N)

    def _count(self, bucket_N: np.ndarray) -> np.ndarray:
        return np.bincount(bucket_N, minlength=len(self.buckets))

    def _batches_per_bucket(self, epoch: int) -> tuple[int, ...]:
        epoch = epoch if self._speed else 0  # without perturbation all epochs have the same lengths
        if epoch not in self._num_batches:
            counts_K = self._count(self._bucket_of(self.lengths(epoch)))
            self._num_batches[epoch] = fewest_samples(counts_K.tolist(), self.buckets)
        return self._num_batches[epoch]

    def _epoch(self, epoch: int) -> _Epoch:
        found = self._epochs.get(epoch)
        if found is None:
            found = self._plan_epoch(epoch)
            # The last epoch stays as well: readers ahead of the training loop straddle the border.
            kept = {number: plan for number, plan in self._epochs.items() if number == epoch - 1}
            self._epochs = kept | {epoch: found}
        return found

    def _plan_epoch(self, epoch: int) -> _Epoch:
        speeds_N = self._speeds(epoch)
        bucket_N = self._bucket_of(self.lengths(epoch))
        key = hashlib.sha256(f"{self._digest} {self._seed} {epoch}".encode()).digest()
        philox = np.random.Philox(key=int.from_bytes(key[:16], "little"))
        # Sorting raw Philox words, since numpy may change its permutations but never these.
        ranks_N = philox.random_raw(len(bucket_N)) if self._shuffle else self.num_samples_N
        order_N = np.lexsort((ranks_N, bucket_N))
        # In this order what moves up from a bucket is followed by the utterances of the next, so batches are slices.
        ends_K = np.cumsum(self._count(bucket_N)).tolist()
        batches, start = [], 0
        for k, (n, end) in enumerate(zip(self._batches_per_bucket(epoch), ends_K, strict=True)):
            for _ in range(n):
                stop = min(start + self.buckets[k].rows, end)
                batches.append((k, start, stop))
                start = stop
        if self._shuffle:
            batches = [batches[i] for i in np.argsort(philox.random_raw(len(batches)), kind="stable")]
        return _Epoch(order_N, speeds_N, batches)


def fewest_samples(counts: Sequence[int], buckets: Sequence[Bucket]) -> tuple[int, ...]:
    """Batches to make in each bucket, ascending, so that the epoch has the fewest samples, padding included.

    What does not fill a batch of its bucket is either batched with filler rows or moved up to the next bucket; both are
    tried for every bucket.

    Args:
      counts: utterances of each bucket's length.
      buckets: ascending by width.
    """

    @functools.cache
    def best(k: int, carried: int) -> tuple[int, tuple[int, ...]]:
        if k == len(buckets):
            return 0, ()
        full, rest = divmod(counts[k] + carried, buckets[k].rows)
        choices = [(full + (rest > 0), 0)]
        if rest and k + 1 < len(buckets):
            choices.append((full, rest))
        options = []
        for n, moved_up in choices:
            samples, following = best(k + 1, moved_up)
            options.append((n * buckets[k].rows * buckets[k].num_samples + samples, (n, *following)))
        return min(options)

    return best(0, 0)[1]


def _rows(width: int, data: DataConfig, num_utterances: int, sample_rate: int) -> int:
    """Rows of about `batch_seconds`, at least one multiple, and no more than all the utterances need."""
    multiple = data.rows_multiple
    rows = int(data.batch_seconds * sample_rate / width) // multiple * multiple
    return min(max(rows, multiple), _round_up(num_utterances, multiple))


def _round_up(value: int, multiple: int) -> int:
    return -(-int(value) // multiple) * multiple
