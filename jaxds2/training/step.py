"""One step of training and of evaluation, as pure functions of (state, batch)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxds2.augment import STREAMS, add_noise, spec_augment, utterance_keys
from jaxds2.config import AugmentConfig, FeatureConfig
from jaxds2.ctc import Implementation, consistency_loss, ctc_loss, feasible
from jaxds2.data.pipeline import Batch
from jaxds2.features import log_mel
from jaxds2.model.deepspeech2 import Apply, Params

_DROPOUT, _SECOND_VIEW = STREAMS, STREAMS + 1  # streams of an utterance's key; augment.py has those below


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array
    """Steps taken, int32."""
    params: Params
    ema: Params | None
    """Exponential moving average of the parameters, which evaluation uses."""
    opt_state: Any
    skipped: jax.Array
    """Steps skipped so far for a non-finite loss or gradient, int32."""
    skipped_in_row: jax.Array
    """Of these, those since the last good step, int32."""

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation, *, ema_decay: float) -> "TrainState":
        """The state before the first step."""
        ema = jax.tree.map(jnp.copy, params) if ema_decay else None
        # An array each, since a donated buffer may be passed only once.
        return cls(jnp.int32(0), params, ema, optimizer.init(params), jnp.int32(0), jnp.int32(0))

    @property
    def eval_params(self) -> Params:
        """The weights to evaluate: the average where there is one."""
        return self.params if self.ema is None else self.ema


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """What one training step reports; scalars are float32 or int32."""

    loss: jax.Array
    """Nats per label over the batches of the step."""
    grad_norm: jax.Array
    finite: jax.Array
    """Whether the step was taken, bool."""
    skipped: jax.Array
    skipped_in_row: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch, and what is reported of its rows."""

    mean: "MeanLoss"
    index_B: jax.Array
    """As in the batch, -1 where a recording could not be read; int32."""
    infeasible_B: jax.Array
    """Rows left out because their label does not fit their frames, bool."""
    samples: jax.Array
    """Samples of audio, int32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanLoss:
    """A loss over all labels of the utterances that count: of a batch, or of several."""

    loss: jax.Array
    """Nats per label, float32."""
    labels: jax.Array
    """int32."""


GradientStep = Callable[[Params, Batch], tuple[Params, BatchLoss]]
UpdateStep = Callable[[TrainState, Params, MeanLoss], tuple[TrainState, StepMetrics]]
LogMel = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make_gradient_step(
    apply: Apply,
    features: FeatureConfig,
    augment: AugmentConfig,
    *,
    mesh: Mesh,
    seed: int,
    ctc: Implementation = "fused",
    fast_random: bool = False,
    consistency: float = 0.0,
) -> GradientStep:
    """The first half of a training step, to be jitted: (params, batch) to (gradient, loss).

    It is compiled once for each batch shape, the update only once, because that does not see the batch.

    The loss is the sum of the utterances' negative log-likelihoods over the number of their labels, so that neither the
    number of devices nor filler rows nor the bucket's length changes an utterance's weight.

    With a `consistency` above 0 each utterance is read in two views that differ in SpecAugment and dropout; its loss is
    the mean of theirs, and `consistency` times how far apart they are read.

    Parameters that are split over the mesh's axis `fsdp` are gathered first. The gradient is to be given their sharding
    by jit's out_shardings, so that it is summed and split again in one go.

    With `fast_random` dropout's bits come from the device's own generator; see docs/numerics.md for what that gives up.
    """
    log_mel_of_mesh = _sharded_log_mel(mesh, features)

    def loss_fn(params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, BatchLoss]:
        features_BTF, feature_lengths_B = _features(batch, log_mel_of_mesh, augment, keys_B)
        labels_BN, label_lengths_B = batch.labels_BN, batch.label_lengths_B
        if consistency:  # two neighbouring rows of every row, so that both views are on one device
            second_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, _SECOND_VIEW)
            keys_B = jnp.stack([keys_B, second_B], axis=1).reshape(-1)
            features_BTF, feature_lengths_B, labels_BN, label_lengths_B = (
                jnp.repeat(x, 2, axis=0) for x in (features_BTF, feature_lengths_B, labels_BN, label_lengths_B)
            )
        features_BTF = spec_augment(features_BTF, feature_lengths_B, keys_B, augment)
        dropout_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, _DROPOUT)
        if fast_random:
            data_B2 = jax.random.key_data(dropout_keys_B)
            dropout_keys_B = jax.random.wrap_key_data(jnp.concatenate([data_B2, data_B2], axis=1), impl="rbg")
        logits_BUV, logit_lengths_B = apply(params, features_BTF, feature_lengths_B, dropout_keys_B=dropout_keys_B)
        present_B = batch.index_B >= 0
        loss_B = ctc_loss(logits_BUV, logit_lengths_B, labels_BN, label_lengths_B, implementation=ctc)
        if consistency:
            loss_B = jnp.mean(loss_B.reshape(-1, 2), axis=1) + consistency * consistency_loss(
                logits_BUV, logit_lengths_B
            )
            logit_lengths_B = logit_lengths_B[::2]
        usable_B = present_B & feasible(logit_lengths_B, batch.labels_BN, batch.label_lengths_B)
        labels = jnp.sum(jnp.where(usable_B, batch.label_lengths_B, 0))
        loss = jnp.sum(jnp.where(usable_B, loss_B, 0.0)) / jnp.maximum(labels, 1).astype(jnp.float32)
        return loss, BatchLoss(
            MeanLoss(loss, labels), batch.index_B, present_B & ~usable_B, jnp.sum(batch.audio_lengths_B)
        )

    def gradient_step(params: Params, batch: Batch) -> tuple[Params, BatchLoss]:
        params = _gathered(params, mesh)
        keys_B = utterance_keys(seed, batch.epoch, batch.index_B)
        with use_abstract_mesh(mesh.abstract_mesh):  # which the kernel of the recurrence, forth and back, asks for
            return jax.grad(loss_fn, has_aux=True)(params, batch, keys_B)

    return gradient_step


def accumulate(grads: Params, mean: MeanLoss, more_grads: Params, more: MeanLoss) -> tuple[Params, MeanLoss]:
    """Gradient and loss of the union of two batches from those of each, to be jitted with the first two donated.

    A mean over labels is not the mean of means: each batch weighs as much as it has labels.
    """
    labels = mean.labels + more.labels
    share = more.labels.astype(jnp.float32) / jnp.maximum(labels, 1).astype(jnp.float32)

    def blend(a: jax.Array, b: jax.Array) -> jax.Array:
        return a + share * (b - a)

    return jax.tree.map(blend, grads, more_grads), MeanLoss(blend(mean.loss, more.loss), labels)


def make_update_step(optimizer: optax.GradientTransformation, *, ema_decay: float) -> UpdateStep:
    """The second half, to be jitted with its state donated: (state, gradient, loss) to (state, metrics).

    A step whose loss or gradient is not finite leaves everything as it was, except the counts.
    """

    def update_step(state: TrainState, grads: Params, mean: MeanLoss) -> tuple[TrainState, StepMetrics]:
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(mean.loss) & jnp.isfinite(grad_norm)

        with jax.numpy_dtype_promotion("standard"):  # our own code is tested under strict promotion; optax's is not
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Early on the average follows quickly, so that it does not remember the random start.
            steps = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + steps) / (10 + steps))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + (~finite).astype(jnp.int32),
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        metrics = StepMetrics(
            loss=mean.loss,
            grad_norm=grad_norm,
            finite=finite,
            skipped=new_state.skipped,
            skipped_in_row=new_state.skipped_in_row,
        )
        return new_state, metrics

    return update_step


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvalOutput:
    """What the model makes of one batch."""

    log_probs_BUV: jax.Array
    logit_lengths_B: jax.Array
    loss_B: jax.Array
    """Nats of each utterance; 0 where there is no label that fits."""
    feasible_B: jax.Array
    """Whether the label fits its frames, bool."""


def make_eval_step(apply: Apply, features: FeatureConfig, *, mesh: Mesh) -> Callable[[Params, Batch], EvalOutput]:
    """The evaluation step, to be jitted: no augmentation, no dropout."""
    log_mel_of_mesh = _sharded_log_mel(mesh, features)

    def eval_step(params: Params, batch: Batch) -> EvalOutput:
        params = _gathered(params, mesh)
        features_BTF, feature_lengths_B = log_mel_of_mesh(batch.audio_BS, batch.audio_lengths_B)
        with use_abstract_mesh(mesh.abstract_mesh):
            logits_BUV, logit_lengths_B = apply(params, features_BTF, feature_lengths_B)
        loss_B = ctc_loss(logits_BUV, logit_lengths_B, batch.labels_BN, batch.label_lengths_B)
        feasible_B = feasible(logit_lengths_B, batch.labels_BN, batch.label_lengths_B)
        return EvalOutput(jax.nn.log_softmax(logits_BUV, axis=-1), logit_lengths_B, loss_B, feasible_B)

    return eval_step


def _gathered(params: Params, mesh: Mesh) -> Params:
    """Parameters whole on each device, where XLA by itself might split the matmuls instead."""
    return jax.lax.with_sharding_constraint(params, NamedSharding(mesh, PartitionSpec()))


def _sharded_log_mel(mesh: Mesh, features: FeatureConfig) -> LogMel:
    """log_mel of a batch split over the mesh: XLA by itself would gather it whole on each device for the FFT."""
    rows = PartitionSpec(mesh.axis_names)
    return jax.shard_map(partial(log_mel, features=features), mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows))


def _features(
    batch: Batch, log_mel_of_mesh: LogMel, augment: AugmentConfig, keys_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-mel features of a training batch, with noise and without SpecAugment."""
    audio_BS = batch.audio_BS
    if augment.noise_snr_db is not None:
        audio_BS = add_noise(audio_BS, batch.audio_lengths_B, keys_B, augment.noise_snr_db)
    return log_mel_of_mesh(audio_BS, batch.audio_lengths_B)


def to_tree(state: TrainState) -> dict[str, Any]:
    """The state as a dictionary, the form that a checkpoint stores."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
