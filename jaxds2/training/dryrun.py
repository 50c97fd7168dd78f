"""What a config will cost, before there is data or an accelerator: parameters, shapes, FLOPs and memory.

Nothing of the model is allocated. Shapes are exact; FLOPs follow a closed formula, which tests/test_dryrun.py holds to
XLA's own count; memory is an estimate and says so.
"""

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxds2.config import Config, ConfigError, ModelConfig
from jaxds2.data.manifest import manifest_digest
from jaxds2.data.plan import Bucket
from jaxds2.features import num_frames
from jaxds2.inference.recognizer import compute_dtype
from jaxds2.model.deepspeech2 import Params, create, output_lengths, subsampling_factor
from jaxds2.model.scan import choose
from jaxds2.text import Vocabulary
from jaxds2.training.optimizer import make_optimizer
from jaxds2.training.selection import num_updates, plan_batches, read_training_data

NORM_FLOPS, GELU_FLOPS, SCAN_FLOPS = 8, 10, 12
"""Elementwise operations, counted as one each: per element of a layer norm and of a GELU, and per state and frame of a
minGRU (gate, decay, input, and the recurrence itself)."""

TRAINING_FACTOR = 3
"""Training costs the forward pass and twice as much backward: gradients of the inputs and of the weights."""


@dataclass(frozen=True)
class DryRun:
    """The findings of `dry_run`."""

    name: str
    parameters: Mapping[str, int]
    """Number by part of the model."""
    frame_ms: float
    """Milliseconds per output frame."""
    subsampling_factor: int
    source: str
    """Where the durations come from: the manifests, or which histogram."""
    utterances: int
    hours: float
    """Hours of audio in an epoch."""
    left_out: Mapping[str, int]
    """Utterances left out of training, by reason."""
    buckets: tuple[Bucket, ...]
    sample_rate: int
    padding_share: float
    """Of the first epoch."""
    steps_per_epoch: float
    """Updates in the first epoch; with speed perturbation epochs differ by a few."""
    total_steps: int
    flops_per_audio_hour: Mapping[str, int]
    """Forward, by kind of layer, for an hour of audio without padding."""
    views: int
    """How often a step reads each utterance: twice with `training.consistency`."""
    activations: tuple[int, ...]
    """Bytes of `memory` that a batch of each shape needs; an estimate."""
    memory: Mapping[str, int]
    """Bytes by purpose, on one device that holds the whole batch, the largest; an estimate."""
    dtype: str
    """Compute dtype that `memory` assumes."""

    @property
    def training_flops_per_audio_hour(self) -> int:
        """Forward and backward, for an hour of audio without padding."""
        return self.views * TRAINING_FACTOR * sum(self.flops_per_audio_hour.values())

    @property
    def training_flops_per_step(self) -> float:
        """Forward and backward, padding included, in the mean over the first epoch."""
        padded_hours = self.hours / (1 - self.padding_share)
        return self.training_flops_per_audio_hour * padded_hours / self.steps_per_epoch

    def render(self) -> str:
        """The findings as text, for a terminal."""
        lines = [f"dry run of {self.name!r}", "", "parameters"]
        lines += [f"  {part:<14}{count:>14,}" for part, count in self.parameters.items()]
        lines += [f"  {'total':<14}{sum(self.parameters.values()):>14,}", ""]
        lines += [
            f"output frames     {1000 / self.frame_ms:.4g} per second, {self.frame_ms:g} ms each "
            f"(subsampling {self.subsampling_factor})",
            textwrap.fill(
                f"utterances        {self.utterances:,}, {self.hours:,.2f} h, from {self.source}",
                width=110,
                subsequent_indent=" " * 18,
                break_long_words=False,
                break_on_hyphens=False,
            ),
        ]
        lines += [f"  left out        {count:,} {reason}" for reason, count in self.left_out.items()]
        lines += ["", f"batch shapes      {'rows':>6}{'seconds':>10}{'labels':>8}{'activations':>14}"]
        lines += [
            f"{'':18}{b.rows:>6}{b.num_samples / self.sample_rate:>10.2f}{b.num_labels:>8}{_mib(count):>14}"
            for b, count in zip(self.buckets, self.activations, strict=True)
        ]
        lines += [
            f"padding           {100 * self.padding_share:.1f} %",
            f"steps             {self.steps_per_epoch:,.0f} per epoch, {self.total_steps:,} in all",
            "",
            "forward FLOPs per hour of audio (closed formula)",
        ]
        lines += [f"  {kind:<14}{_si(count):>10}" for kind, count in self.flops_per_audio_hour.items() if count]
        lines += [
            f"  {'total':<14}{_si(sum(self.flops_per_audio_hour.values())):>10}",
            f"training FLOPs (forward x {TRAINING_FACTOR}{', in two views' if self.views == 2 else ''})",
            f"  {'audio hour':<14}{_si(self.training_flops_per_audio_hour):>10}",
            f"  {'step, mean':<14}{_si(self.training_flops_per_step):>10}  with padding",
            f"  {'whole run':<14}{_si(self.training_flops_per_step * self.total_steps):>10}  with padding",
            "",
            f"memory on one device, largest batch, {self.dtype} compute (estimate: not compiled for a device)",
        ]
        lines += [f"  {purpose:<14}{_mib(count):>14}" for purpose, count in self.memory.items()]
        lines += [f"  {'total':<14}{_mib(sum(self.memory.values())):>14}"]
        return "\n".join(lines)


def _si(count: float) -> str:
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.4g} {prefix}"
    return f"{count:.4g}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def dry_run(config: Config) -> DryRun:
    """Find out what training this config means, without its data where a histogram of durations stands in.

    Raises:
      ConfigError: neither the manifests nor a usable histogram are there.
      ManifestError, ShardError, TextError, PlanError: a manifest cannot be used.
    """
    vocabulary = Vocabulary(config.data.characters)
    corpus = _read_corpus(config, vocabulary)
    if not len(corpus.durations):
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.left_out.items())
        raise ConfigError(f"nothing to train on in {corpus.source}: all utterances are left out ({reasons})")
    plan = plan_batches(config, corpus.durations, corpus.label_lengths, digest=corpus.digest)
    total_steps = num_updates(config, plan)
    dtype = np.dtype(compute_dtype(config))
    params = jax.eval_shape(lambda: create(config.features.n_mels, vocabulary.size, config.model, dtype=dtype)[1])
    activations = tuple(
        activation_bytes(config, b, itemsize=dtype.itemsize, num_classes=vocabulary.size) for b in plan.buckets
    )
    return DryRun(
        name=config.name,
        parameters=_count_parameters(params),
        frame_ms=subsampling_factor(config.model) * config.features.hop_ms,
        subsampling_factor=subsampling_factor(config.model),
        source=corpus.source,
        utterances=len(corpus.durations),
        hours=float(corpus.durations.sum()) / 3600,
        left_out=corpus.left_out,
        buckets=plan.buckets,
        sample_rate=config.features.sample_rate,
        padding_share=plan.padding_share(0),
        steps_per_epoch=plan.num_steps(0) / config.training.accumulate,
        total_steps=total_steps,
        flops_per_audio_hour=flops(
            config.model,
            config.features.n_mels,
            vocabulary.size,
            num_frames=num_frames(3600 * config.features.sample_rate, config.features),
            batch=1,
        ),
        views=2 if config.training.consistency else 1,
        activations=activations,
        memory=_memory(config, params, total_steps, max(activations)),
        dtype=dtype.name,
    )


@dataclass(frozen=True, eq=False)
class _Corpus:
    """What the batching plan is made of."""

    durations: np.ndarray
    """Seconds, float64 (N,)."""
    label_lengths: np.ndarray
    """int64 (N,)."""
    digest: str
    source: str
    left_out: Mapping[str, int]


def _read_corpus(config: Config, vocabulary: Vocabulary) -> _Corpus:
    if not config.data.train:
        raise ConfigError("data.train names no manifest; set it in the config, or with data.train=FILE")
    missing = [path for path in config.data.train if not Path(path).exists()]
    if not missing:
        return _from_manifests(config, vocabulary)
    if config.data.durations is None:
        raise ConfigError(
            f"no manifest {missing[0]}, and data.durations names no histogram in its place; write the manifest with "
            f"`jaxds2 prepare`, or set data.durations to a file of configs/durations/"
        )
    corpus = _from_histogram(Path(config.data.durations), config)
    return replace(corpus, source=f"{corpus.source}, since {missing[0]} is not there")


def _from_manifests(config: Config, vocabulary: Vocabulary) -> _Corpus:
    """The utterances that training would use."""
    kept, left_out = read_training_data(config, vocabulary, look=False)
    return _Corpus(
        np.array([u.duration for u in kept]),
        np.array([len(vocabulary.encode(u.text)) for u in kept], np.int64),
        manifest_digest(kept),
        f"the manifests {' '.join(config.data.train)}",
        {reason: len(ids) for reason, ids in left_out.items()},
    )


def _from_histogram(path: Path, config: Config) -> _Corpus:
    """Synthetic utterances: those of a bin are spread evenly over it; labels come at the corpus' mean rate.

    Raises:
      ConfigError: no such file, or not a histogram.
    """
    try:
        histogram: Any = json.loads(path.read_text(encoding="utf-8"))
        width, rate = float(histogram["seconds_per_bin"]), float(histogram["characters_per_second"])
        counts = [int(n) for n in histogram["counts"]]
        source = f"the histogram {path} ({histogram['corpus']}; {histogram['source']})"
    except FileNotFoundError:
        raise ConfigError(
            f"data.durations={path}: no such file; the shipped histograms are in configs/durations/"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"data.durations={path}: not a histogram of durations ({type(e).__name__}: {e})") from None
    if min(width, rate) <= 0 or min(counts, default=0) < 0 or not any(counts):
        raise ConfigError(
            f"data.durations={path}: seconds_per_bin and characters_per_second must be above 0, "
            f"and counts 0 or more but not all 0"
        )
    durations_N = np.concatenate([(i + (np.arange(n) + 0.5) / max(n, 1)) * width for i, n in enumerate(counts)])
    short_N, long_N = durations_N < config.data.min_duration, durations_N > config.data.max_duration
    left_out = {
        f"shorter than {config.data.min_duration:g} s": int(short_N.sum()),
        f"longer than {config.data.max_duration:g} s": int(long_N.sum()),
    }
    durations_N = durations_N[~(short_N | long_N)]
    labels_N = np.maximum(np.rint(durations_N * rate), 1).astype(np.int64)
    return _Corpus(durations_N, labels_N, "histogram", source, {why: n for why, n in left_out.items() if n})


def _count_parameters(params: Params) -> dict[str, int]:
    counts = {"front end": 0, "layers": 0, "head": 0}
    for name, leaf in params.items():
        part = {"front_end": "front end", "layers": "layers"}.get(name.partition(".")[0], "head")
        counts[part] += math.prod(leaf.shape)
    return counts


def flops(model: ModelConfig, num_mels: int, num_classes: int, num_frames: int, batch: int) -> dict[str, int]:
    """Floating-point operations of one forward pass, by kind of layer.

    A multiply-add counts 2. With K taps, C channels, F bins, U output frames, width D, state H and V classes, per row:

      convolution    2 K_t K_f C_in C_out T_out F_out, taps in the padding included
      projection     2 F C D U, from the last convolution to the width
      minGRU         per layer and direction 2 * 2 D H U (gate and candidate) and 2 H D U (output)
      scan           per layer and direction SCAN_FLOPS H U
      depthwise      per layer 2 K D U; the lookahead likewise
      feed-forward   per layer 2 * 2 D D_ff U
      head           2 D V U
      elementwise    every GELU, layer norm and residual; masks, dropout and biases are left out

    Args:
      model: the architecture.
      num_mels: mel bins F of the input.
      num_classes: output classes V, the blank included.
      num_frames: input frames T, padding included.
      batch: rows.
    """
    counts: dict[str, int] = dict.fromkeys(
        ("convolutions", "projection", "minGRU", "scan", "depthwise", "feed-forward", "lookahead", "head"), 0
    )
    elementwise, bins, channels, frames = 0, num_mels, 1, num_frames
    for out, (kernel_t, kernel_f), (stride_t, stride_f) in zip(
        model.conv_channels, model.conv_kernels, model.conv_strides, strict=True
    ):
        bins, frames = -(-bins // stride_f), -(-frames // stride_t)
        counts["convolutions"] += 2 * kernel_t * kernel_f * channels * out * frames * bins
        elementwise += GELU_FLOPS * frames * bins * out
        channels = out
    assert frames == output_lengths(num_frames, model)
    width, states = model.width, model.hidden * (2 if model.bidirectional else 1)
    counts["projection"] = 2 * bins * channels * width * frames
    counts["minGRU"] = model.layers * (2 * 2 * width * states + 2 * states * width) * frames
    counts["scan"] = model.layers * SCAN_FLOPS * states * frames
    counts["depthwise"] = model.layers * 2 * model.depthwise_kernel * width * frames
    counts["feed-forward"] = model.layers * 2 * 2 * width * model.feed_forward * frames
    counts["lookahead"] = 2 * (model.lookahead + 1) * width * frames if model.lookahead else 0
    counts["head"] = 2 * width * num_classes * frames
    elementwise += (model.layers + 1) * NORM_FLOPS * width * frames + model.layers * width * frames
    if model.feed_forward:
        elementwise += model.layers * (GELU_FLOPS * model.feed_forward + (NORM_FLOPS + 1) * width) * frames
    counts["elementwise"] = elementwise
    return {kind: batch * count for kind, count in counts.items()}


def _memory(config: Config, params: Params, total_steps: int, activations: int) -> dict[str, int]:
    """Bytes of a training step."""

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    optimizer = make_optimizer(config.optimizer, total_steps)
    return {
        "parameters": size(params),
        "EMA": size(params) if config.training.ema_decay else 0,
        "optimizer": size(jax.eval_shape(optimizer.init, params)),
        "gradients": size(params),
        "activations": activations,
    }


def activation_bytes(config: Config, bucket: Bucket, *, itemsize: int, num_classes: int) -> int:
    """What the backward pass of a batch needs of the forward pass, an estimate.

    Arrays alive at once, counted from what XLA allocates on a CPU for models of several sizes (within a third; a GPU's
    compiler fuses more): per frame 3 of the features and of the output of each convolution, 4 of width D; per layer 4 D
    (9 with a depthwise convolution), 6 of the states, 3 more in float32 under the associative scan, with a feed-forward
    block 4 D and 3 of its hidden width; the logits 3 times and the CTC lattice of 2 N + 1 states 4 times (the fused
    form of the loss needs less), in float32.

    Args:
      config: its features and model.
      bucket: the shape of the batch.
      itemsize: bytes of the compute dtype.
      num_classes: output classes V.
    """
    model = config.model
    frames = num_frames(bucket.num_samples, config.features)
    full, bins = 3 * frames * config.features.n_mels, config.features.n_mels
    compute = 0
    for channels, (stride_t, stride_f) in zip(model.conv_channels, model.conv_strides, strict=True):
        frames, bins = -(-frames // stride_t), -(-bins // stride_f)
        compute += 3 * frames * bins * channels
    states = model.hidden * (2 if model.bidirectional else 1)
    per_layer = (9 if model.depthwise_kernel else 4) * model.width + 6 * states
    if model.feed_forward:
        per_layer += 4 * model.width + 3 * model.feed_forward
    compute += frames * (4 * model.width + model.layers * per_layer)
    if choose(model.scan) == "associative":
        full += 3 * frames * model.layers * states
    full += frames * (3 * num_classes + 4 * (2 * bucket.num_labels + 1))
    rows = bucket.rows * (2 if config.training.consistency else 1)
    return rows * (4 * full + itemsize * compute)
