"""A trained model, ready to turn recordings into log-probabilities."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxds2.compiler import compiler_options
from jaxds2.config import Config, read_config
from jaxds2.data.manifest import Utterance, manifest_digest
from jaxds2.data.pipeline import Batch, filler_batch, load_batches
from jaxds2.data.placement import data_mesh, own_rows, place, replicate, rows_of
from jaxds2.data.plan import BatchPlan
from jaxds2.features import num_frames
from jaxds2.model import mingru_kernel, scan
from jaxds2.model.deepspeech2 import Params, create, output_lengths, subsampling_factor
from jaxds2.text import Vocabulary
from jaxds2.training.checkpoint import Checkpoints
from jaxds2.training.compilation import free_bytes, is_out_of_memory, out_of_memory_recognizing
from jaxds2.training.step import EvalOutput, make_eval_step

WORTH_WORKERS = 100
"""Batches from which on it is worth a second or two to start loader processes."""


def compute_dtype(config: Config) -> jax.typing.DTypeLike:
    """The dtype that training.precision stands for on the default device."""
    precision = config.training.precision
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def output_frames(num_samples, config: Config):
    """Output frames U of a waveform of S samples at the config's rate (int or array)."""
    return output_lengths(num_frames(num_samples, config.features), config.model)


def frame_seconds(config: Config) -> float:
    """From the start of one output frame to that of the next, in seconds; the first starts with the recording."""
    return subsampling_factor(config.model) * config.features.hop_length / config.features.sample_rate


@dataclass(frozen=True)
class Recognizer:
    """The model of a run with one set of weights.

    `eval_step` is jitted once and shared by the recognizers of a training run, whose weights change.
    """

    config: Config
    vocabulary: Vocabulary
    mesh: Mesh
    eval_step: Callable[[Params, Batch], EvalOutput]
    params: Params
    step: int
    """Training step that the weights are from."""

    @classmethod
    def load(cls, run_dir: Path, checkpoint: str | int = "best") -> "Recognizer":
        """Load a run's averaged weights where it has them, else its weights.

        Args:
          run_dir: folder of a run of train.py.
          checkpoint: `best`, `last` or a step.

        Raises:
          ConfigError: not a run. CheckpointError: no such checkpoint, or a damaged one.
        """
        config = read_config(run_dir / "config.json")
        with Checkpoints(run_dir / "checkpoints") as checkpoints:
            step = checkpoints.resolve(checkpoint)
            params = checkpoints.restore_params(step)
        vocabulary = Vocabulary(config.data.characters)
        if config.training.precision == "bfloat16":  # this machine's devices may not compute in it
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="auto"))
        # Its batches are planned anew, so any number of processes can share them.
        mesh = data_mesh(None, rows_multiple=math.lcm(config.data.rows_multiple, jax.process_count()))
        apply, _ = create(config.features.n_mels, vocabulary.size, config.model, dtype=compute_dtype(config))
        platform = mesh.devices.flat[0].platform
        fused = scan.choose(config.model.scan) == "fused"
        if fused and (line := mingru_kernel.stand_in(config.model.hidden, platform)):
            print(line, file=sys.stderr)
        options = compiler_options(platform)
        eval_step = make_eval_step(apply, config.features, mesh=mesh)
        eval_step = jax.jit(eval_step, out_shardings=rows_of(mesh), compiler_options=options)
        return cls(config, vocabulary, mesh, eval_step, replicate(params, mesh), step)

    def plan(self, utterances: Sequence[Utterance]) -> BatchPlan:
        """Batches that hold every utterance exactly once, of similar lengths together."""
        return BatchPlan(
            np.array([u.duration for u in utterances]),
            np.array([len(u.text) for u in utterances]),
            digest=manifest_digest(utterances),
            # Rows for the devices that are here, so that one file is not computed eight times.
            data=dataclasses.replace(self.config.data, rows_multiple=self.mesh.size),
            seed=0,
            sample_rate=self.config.features.sample_rate,
            shuffle=False,
        )

    def warm_up(self, plan: BatchPlan) -> None:
        """Compile for every batch shape of a plan."""
        for bucket in plan.buckets:
            self.emit(filler_batch(bucket.share(jax.process_count())))

    def run(
        self,
        utterances: Sequence[Utterance],
        plan: BatchPlan,
        *,
        with_labels: bool,
        on_first: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[Batch, EvalOutput, tuple[tuple[str, str], ...]]]:
        """The model's output for each batch of the first epoch of a plan; of several processes each has its rows.

        Args:
          utterances: what the plan was made of.
          plan: see `plan`.
          with_labels: encode the transcripts too, for the loss or to align them.
          on_first: called when the loader has started and the first batch is there.

        Yields:
          The batch, its index_B into utterances, the output on the host, and id and reason of each that failed.
        """
        vocabulary = self.vocabulary if with_labels else None
        steps = plan.num_steps(0)
        workers = self.config.data.workers if steps >= WORTH_WORKERS else 0
        with load_batches(
            utterances,
            plan,
            vocabulary=vocabulary,
            stop_step=steps,
            workers=workers,
            process=jax.process_index(),
            processes=jax.process_count(),
        ) as batches:
            for number, loaded in enumerate(batches):
                if number == 0:
                    on_first()
                yield loaded.batch, self.emit(loaded.batch), loaded.failures

    def emit(self, batch: Batch) -> EvalOutput:
        """The model's output for this process' rows of a batch, on the host.

        Raises:
          OutOfMemoryError: the device has too little memory for it.
        """
        try:
            return own_rows(self.eval_step(self.params, place(batch, self.mesh)))
        except jax.errors.JaxRuntimeError as e:
            if not is_out_of_memory(e):
                raise
            free = free_bytes(self.mesh)
            raise out_of_memory_recognizing(self.config, batch.audio_BS.shape, free=free) from e
