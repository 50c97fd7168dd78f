"""The training step: forms agree, devices agree, precision is where it should be, nothing bad is learnt."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations

from jaxds2 import augment
from jaxds2.augment import add_noise, spec_augment, utterance_keys
from jaxds2.config import AugmentConfig, FeatureConfig, ModelConfig, OptimizerConfig
from jaxds2.ctc import Implementation, ctc_loss
from jaxds2.data.pipeline import Batch
from jaxds2.data.placement import data_mesh, place, replicate
from jaxds2.features import log_mel
from jaxds2.model.deepspeech2 import create
from jaxds2.training import step as step_module
from jaxds2.training.optimizer import learning_rate_schedule, make_optimizer
from jaxds2.training.step import TrainState, accumulate, make_eval_step, make_gradient_step, make_update_step

FEATURES = FeatureConfig(n_mels=20)
AUGMENT = AugmentConfig(freq_mask_bins=4, mel_warp=0.05)
MODEL = ModelConfig(conv_channels=(4, 4), width=16, hidden=8, layers=2, dropout=0.1, scan="sequential")
OPTIMIZER = OptimizerConfig(warmup_steps=2, learning_rate=1e-2)
V = 6


def batch(rows: int = 4, seed: int = 0, epoch: int = 0, samples: int = 12_000) -> Batch:
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(samples // 2, samples, rows).astype(np.int32)
    audio_BS = rng.integers(-8000, 8000, (rows, samples)).astype(np.int16)
    audio_BS[np.arange(samples)[None] >= lengths_B[:, None]] = 0
    labels_BN = rng.integers(1, V, (rows, 5)).astype(np.int32)
    label_lengths_B = rng.integers(1, 5, rows).astype(np.int32)
    index_B = np.arange(rows, dtype=np.int32)
    return Batch(audio_BS, lengths_B, labels_BN, label_lengths_B, index_B, np.int32(epoch))


@functools.cache
def setup(
    model: ModelConfig = MODEL,
    *,
    dtype=jnp.float32,
    ema_decay=0.9,
    optimizer=OPTIMIZER,
    total_steps=60,
    devices=1,
    ctc: Implementation = "optax",
    fast_random=False,
    consistency=0.0,
):
    """The state before the first step, and a step: two programs, as in training, of which the first takes long to
    compile and is shared."""
    params, gradient_step = gradient(
        model=model, dtype=dtype, devices=devices, ctc=ctc, fast_random=fast_random, consistency=consistency
    )
    tx = make_optimizer(optimizer, total_steps)
    state = TrainState.create(params, tx, ema_decay=ema_decay)
    update_step = jax.jit(make_update_step(tx, ema_decay=ema_decay))

    def step(state, batch):
        grads, loss = gradient_step(state.params, batch)
        return update_step(state, grads, loss.mean)

    return state, step


@functools.cache
def gradient(
    *,
    model=MODEL,
    dtype=jnp.float32,
    devices=1,
    ctc: Implementation = "optax",
    fast_random=False,
    consistency=0.0,
    augment=AUGMENT,
):
    """Parameters, and the first half of a step."""
    apply, params = create(FEATURES.n_mels, V, model, dtype=dtype)
    mesh = data_mesh(devices, rows_multiple=4)
    gradient_step = make_gradient_step(
        apply, FEATURES, augment, mesh=mesh, seed=0, ctc=ctc, fast_random=fast_random, consistency=consistency
    )
    return params, jax.jit(gradient_step)


def run(state, step, steps=5, dtype_promotion="strict", **kwargs):
    losses = []
    with jax.numpy_dtype_promotion(dtype_promotion):
        for s in range(steps):
            state, metrics = step(state, batch(seed=s, **kwargs))
            losses.append(float(metrics.loss))
    return state, np.array(losses)


@pytest.fixture(scope="module")
def sequential():
    return run(*setup())


def trace(state, step):
    """The program of one training step."""
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm promotes its bfloat16 input on its own
        return jax.make_jaxpr(step)(state, batch())


def carries(eqn):
    """The avals that one pass of a loop hands to the next."""
    body = eqn.params["jaxpr" if eqn.primitive.name == "scan" else "body_jaxpr"]
    inside = [v.aval for v in getattr(body, "jaxpr", body).outvars]
    # What a scan stacks has one more dimension outside; its parameters are named differently from jax to jax.
    return [aval for aval, v in zip(inside, eqn.outvars, strict=True) if aval.shape == v.aval.shape]


def form_in(program) -> str:
    """The form of the recurrence that a training step contains, told by what its scans over states (B, H) stack."""
    scans = [
        eqn
        for eqn in equations(program)
        if eqn.primitive.name == "scan" and [aval.shape for aval in carries(eqn)] == [(4, MODEL.hidden)]
    ]
    if not scans:
        return "associative"
    passes = 2 * MODEL.layers  # a layer has two directions
    assert len(scans) == 2 * passes  # forwards, and back for the gradient
    stacked = [len(eqn.outvars) - 1 for eqn in scans]
    # JAX's own derivative of a scan keeps more than the states; ours keeps these alone.
    return "fused" if stacked[:passes] == [1] * passes else "sequential"


@pytest.mark.parametrize("scan", ["sequential", "associative", "fused", "auto"])
def test_each_form_of_the_scan_is_really_trained(scan):
    auto = "fused" if jax.default_backend() == "cpu" else "associative"
    assert form_in(trace(*setup(dataclasses.replace(MODEL, scan=scan)))) == (auto if scan == "auto" else scan)


@pytest.mark.parametrize("scan", ["associative", "fused"])  # auto is one of these, by the test above
def test_five_steps_under_each_form_of_the_scan_are_equal(scan, sequential):
    state, losses = run(*setup(dataclasses.replace(MODEL, scan=scan)))
    np.testing.assert_allclose(losses, sequential[1], rtol=1e-4)
    for name, value in state.params.items():
        np.testing.assert_allclose(value, sequential[0].params[name], atol=2e-3, err_msg=name)


def test_five_steps_under_each_form_of_the_loss_are_equal(sequential):
    state, losses = run(*setup(ctc="fused"))
    np.testing.assert_allclose(losses, sequential[1], rtol=1e-4)
    for name, value in state.params.items():
        np.testing.assert_allclose(value, sequential[0].params[name], atol=2e-3, err_msg=name)


@pytest.mark.parametrize("ctc", ["optax", "fused"])
def test_each_form_of_the_loss_is_really_trained(ctc):
    """optax's scan over frames is differentiated into a second; ours is one loop, over blocks of frames."""
    loops = [e for e in equations(trace(*setup(ctc=ctc))) if e.primitive.name == "scan"]
    recurrences = [e for e in loops if [aval.shape for aval in carries(e)] == [(4, MODEL.hidden)]]
    lengths = Counter(e.params["length"] for e in loops) - Counter(e.params["length"] for e in recurrences)
    frames = recurrences[0].params["length"]
    assert lengths == (Counter({frames: 2}) if ctc == "optax" else Counter([-(-frames // 8), 8]))


def test_training_lowers_the_loss(sequential):
    state, step = setup()
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_follows_float32_within_5_percent_of_loss(sequential):
    # flax's LayerNorm promotes its bfloat16 input on its own, so promotion is not strict here.
    _, losses = run(*setup(dtype=jnp.bfloat16), dtype_promotion="standard")
    np.testing.assert_allclose(losses, sequential[1], rtol=0.05)


def matmuls(program) -> Counter:
    """How often a program multiplies or convolves what: (primitive, operands like `float32[4,72]`)."""
    return Counter(
        (eqn.primitive.name, tuple(str(v.aval).split("{")[0] for v in eqn.invars))  # without its sharding
        for eqn in equations(program)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    )


def float32_matmuls_by_design() -> Counter:
    """Those of the features, of the mel warp, and of the loss with its gradient."""

    def features(batch):
        features_BTF, lengths_B = log_mel(batch.audio_BS, batch.audio_lengths_B, FEATURES)
        return spec_augment(features_BTF, lengths_B, utterance_keys(0, batch.epoch, batch.index_B), AUGMENT)

    def loss(logits_BUV, batch):
        return jnp.sum(ctc_loss(logits_BUV, batch.label_lengths_B, batch.labels_BN, batch.label_lengths_B))

    apply, params = create(FEATURES.n_mels, V, MODEL, dtype=jnp.float32)
    features_BTF = jax.eval_shape(features, batch())
    logits_BUV = jax.eval_shape(apply, params, features_BTF, batch().audio_lengths_B)[0]
    with jax.numpy_dtype_promotion("standard"):
        return matmuls(jax.make_jaxpr(features)(batch())) + matmuls(
            jax.make_jaxpr(jax.value_and_grad(loss))(logits_BUV, batch())
        )


@pytest.mark.parametrize("scan", ["sequential", "associative", "fused"])
def test_in_bfloat16_every_matmul_of_the_model_and_no_other_takes_bfloat16(scan):
    state, step = setup(dataclasses.replace(MODEL, scan=scan), dtype=jnp.bfloat16)
    found = matmuls(trace(state, step))
    in_bfloat16 = Counter()
    in_float32 = Counter()
    for (name, operands), count in found.items():
        dtypes = {operand.split("[")[0] for operand in operands}
        assert len(dtypes) == 1, (name, operands)
        if dtypes == {"bfloat16"}:
            in_bfloat16[name] += count
        else:
            in_float32[name, operands] += count
    assert in_float32 == float32_matmuls_by_design()
    kernels = Counter(value.ndim for name, value in state.params.items() if name.endswith(".kernel"))
    # Each is used forwards, for its own gradient and for its input's. A convolution's own is written twice: for CPUs,
    # and for the rest; its input's is written for the features too, which XLA drops.
    assert in_bfloat16 == {"dot_general": 3 * kernels[2], "conv_general_dilated": 4 * kernels[4]}


@pytest.mark.parametrize("scan", ["sequential", "associative", "fused"])
def test_in_bfloat16_every_loop_over_time_the_loss_and_the_state_are_float32(scan):
    state, step = setup(dataclasses.replace(MODEL, scan=scan), dtype=jnp.bfloat16)
    loops = [eqn for eqn in equations(trace(state, step)) if eqn.primitive.name in ("scan", "while")]
    carried = [aval for eqn in loops for aval in carries(eqn) if jnp.issubdtype(aval.dtype, jnp.floating)]
    assert {str(aval.dtype) for aval in carried} == {"float32"}
    # The forward pass of CTC and its gradient are among them: (B, N + 1) blanks and (B, N) labels.
    assert [aval.shape for aval in carried].count((4, 6)) == 2
    assert [aval.shape for aval in carried].count((4, 5)) == 2
    with jax.numpy_dtype_promotion("standard"):
        new_state, metrics = jax.eval_shape(step, state, batch())
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32
    for tree in (new_state.params, new_state.ema, new_state.opt_state):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert dtypes == {jnp.dtype("float32")}


LOSSES = [("optax", 0.0), ("fused", 0.0), ("optax", 0.2)]
"""Form of CTC, and weight of the consistency of two views."""


@pytest.mark.parametrize(("ctc", "consistency"), LOSSES)
def test_two_devices_and_one_lose_the_same_over_fifty_steps(ctc, consistency):
    losses = {}
    for devices in (1, 2):
        mesh = data_mesh(devices, rows_multiple=4)
        state, step = setup(devices=devices, ctc=ctc, consistency=consistency)
        state = replicate(state, mesh)
        losses[devices] = []
        for s in range(50):
            state, metrics = step(state, place(batch(seed=s), mesh))
            losses[devices].append(float(metrics.loss))
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)


def test_two_devices_and_one_draw_the_same():
    @jax.jit
    def augmented(batch):
        keys_B = utterance_keys(0, batch.epoch, batch.index_B)
        noisy_BS = add_noise(batch.audio_BS, batch.audio_lengths_B, keys_B, (0.0, 20.0))
        # What was not masked stays 1 or nearly so under the mel warp.
        ones_BTF = jnp.ones((*batch.index_B.shape, 72, FEATURES.n_mels))
        return noisy_BS, spec_augment(ones_BTF, batch.audio_lengths_B // 160, keys_B, AUGMENT)

    one, two = (augmented(place(batch(epoch=3), data_mesh(devices, rows_multiple=4))) for devices in (1, 2))
    assert len(two[1].sharding.device_set) == 2
    assert 0 < np.mean(np.asarray(one[1]) == 0) < 1
    for from_one, from_two in zip(one, two, strict=True):
        np.testing.assert_array_equal(from_two, from_one)


@pytest.mark.parametrize(("ctc", "consistency"), LOSSES)
def test_the_compiled_step_reduces_gradients_over_devices(ctc, consistency):
    programs = {}
    for devices in (1, 2):
        mesh = data_mesh(devices, rows_multiple=4)
        params, step = gradient(devices=devices, ctc=ctc, consistency=consistency)
        programs[devices] = str(step.lower(replicate(params, mesh), place(batch(), mesh)).compile().as_text())
    assert "all-reduce" in programs[2]
    assert "all-gather" not in programs[2]  # each device works on its own rows, the FFT included
    assert "all-reduce" not in programs[1]


@pytest.mark.parametrize("consistency", [0.0, 0.2])
def test_a_filler_row_changes_nothing(consistency):
    state, step = setup(consistency=consistency)
    full = batch(rows=4)
    padded = Batch(
        *(
            np.concatenate([x, np.zeros_like(x[:2])]) if np.ndim(x) else x
            for x in (full.audio_BS, full.audio_lengths_B, full.labels_BN, full.label_lengths_B)
        ),
        index_B=np.concatenate([full.index_B, np.full(2, -1, np.int32)]),
        epoch=full.epoch,
    )
    state_full, metrics_full = step(state, full)
    state_padded, metrics_padded = step(state, padded)
    np.testing.assert_allclose(metrics_padded.loss, metrics_full.loss, rtol=1e-5)
    params, gradient_step = gradient(consistency=consistency)
    of_full, of_padded = (gradient_step(params, x)[1] for x in (full, padded))
    assert int(of_padded.mean.labels) == int(of_full.mean.labels) == full.label_lengths_B.sum()
    assert int(of_padded.samples) == full.audio_lengths_B.sum()
    assert not of_padded.infeasible_B.any()
    for name, value in state_full.params.items():
        # Adam's first step is a sign: compare where the gradient is not rounding noise.
        difference = np.abs(np.asarray(value) - np.asarray(state_padded.params[name]))
        assert np.quantile(difference, 0.9) < 1e-4, name


def test_consistent_views_cost_their_mean_loss_and_how_far_they_are_apart():
    """Without augmentation and dropout both views are one, so that the loss is that of a single view."""
    model, none = dataclasses.replace(MODEL, dropout=0.0), AugmentConfig(freq_masks=0, time_masks=0)

    def loss(augment, consistency):
        params, gradient_step = gradient(model=model, augment=augment, consistency=consistency)
        return gradient_step(params, batch())

    grads, one = loss(none, 0.0)
    grads_twice, same = loss(none, 7.0)
    np.testing.assert_allclose(same.mean.loss, one.mean.loss, rtol=1e-6)
    for name, value in grads.items():
        np.testing.assert_allclose(grads_twice[name], value, atol=1e-5 * float(jnp.abs(value).max()), err_msg=name)
    little, much = (float(loss(AUGMENT, weight)[1].mean.loss) for weight in (0.2, 2.0))
    assert little < much


def test_the_streams_of_an_utterances_key_are_apart():
    streams = [value for name, value in vars(augment).items() if name in ("_SNR", "_NOISE", "_WARP")]
    streams += [augment._FREQ_MASKS, augment._TIME_MASKS, step_module._DROPOUT, step_module._SECOND_VIEW]
    assert sorted(streams) == list(range(7))


@pytest.mark.parametrize("consistency", [0.0, 0.2])
def test_a_label_that_cannot_fit_is_named_and_left_out(consistency):
    params, gradient_step = gradient(consistency=consistency)
    good = batch()
    bad = dataclasses.replace(good, audio_lengths_B=good.audio_lengths_B.copy(), labels_BN=good.labels_BN.copy())
    bad.audio_lengths_B[2] = 900  # 3 frames in, 1 out
    bad.label_lengths_B[2] = 4
    grads, loss = gradient_step(params, bad)
    np.testing.assert_array_equal(loss.infeasible_B, [False, False, True, False])
    assert int(loss.mean.labels) == np.delete(bad.label_lengths_B, 2).sum()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, loss)))


def parts_of(whole: Batch, sizes: list[int]) -> list[Batch]:
    """A batch cut into batches of so many rows."""
    ends = np.cumsum(sizes)
    return [
        jax.tree.map(lambda x, a=end - rows, b=end: x[a:b] if np.ndim(x) else x, whole)
        for end, rows in zip(ends, sizes, strict=True)
    ]


@pytest.mark.parametrize("sizes", [[4, 4], [2, 4, 2], [2, 2, 2, 2]])
def test_accumulated_batches_are_one_batch_of_their_union(sizes):
    """However many labels each has, and one of them none that fits: the mean of all labels, not of the batches."""
    params, gradient_step = gradient()
    whole = batch(rows=8)
    whole.label_lengths_B[:4] = 1
    whole.audio_lengths_B[0] = 900  # 3 frames in, 1 out
    whole.label_lengths_B[0] = 4
    want, want_loss = gradient_step(params, whole)
    (grads, loss), *rest = (gradient_step(params, part) for part in parts_of(whole, sizes))
    mean = loss.mean
    for more, loss in rest:
        grads, mean = jax.jit(accumulate)(grads, mean, more, loss.mean)
    np.testing.assert_allclose(mean.loss, want_loss.mean.loss, rtol=1e-5)
    assert int(mean.labels) == int(want_loss.mean.labels)
    for name, value in want.items():
        np.testing.assert_allclose(grads[name], value, atol=1e-5 * float(jnp.abs(value).max()), err_msg=name)


def test_an_accumulated_batch_that_is_not_finite_spoils_the_step_and_an_empty_one_changes_nothing():
    params, gradient_step = gradient()
    grads, loss = gradient_step(params, batch())
    empty = dataclasses.replace(batch(), label_lengths_B=np.zeros(4, np.int32), index_B=np.full(4, -1, np.int32))
    for pair in ((grads, loss), gradient_step(params, empty)), (gradient_step(params, empty), (grads, loss)):
        (some, first), (more, second) = pair
        both, mean = accumulate(some, first.mean, more, second.mean)
        np.testing.assert_allclose(mean.loss, loss.mean.loss, rtol=1e-6)
        np.testing.assert_allclose(both["head.bias"], grads["head.bias"], rtol=1e-6)
    bad = dataclasses.replace(loss.mean, loss=jnp.float32(jnp.nan))
    assert np.isnan(accumulate(grads, loss.mean, grads, bad)[1].loss)


def test_a_non_finite_step_is_skipped_and_counted():
    state, step = setup()
    poisoned = {name: jnp.full_like(p, jnp.nan) if name == "head.bias" else p for name, p in state.params.items()}
    state = dataclasses.replace(state, params=poisoned)
    new, metrics = step(state, batch())
    assert not bool(metrics.finite)
    assert int(new.step) == 1
    assert (int(new.skipped), int(new.skipped_in_row)) == (1, 1)
    for old, kept in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(new.opt_state), strict=True):
        np.testing.assert_array_equal(old, kept)
    good = dataclasses.replace(new, params=setup()[0].params)
    after, metrics = step(good, batch())
    assert bool(metrics.finite)
    assert (int(after.skipped), int(after.skipped_in_row)) == (1, 0)


def test_augmentation_and_dropout_change_with_the_epoch_and_not_with_the_batch():
    state, step = setup(total_steps=1)
    losses = [float(step(state, batch(epoch=epoch))[1].loss) for epoch in (0, 1, 0)]
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def generators(program) -> set[str]:
    """Which generators a program draws random bits with."""
    return {str(eqn.invars[0].aval).split("[")[0] for eqn in equations(program) if eqn.primitive.name == "random_bits"}


def test_dropout_draws_with_threefry_unless_told_otherwise():
    assert generators(trace(*setup())) == {"key<fry>"}
    assert generators(trace(*setup(fast_random=True))) == {"key<fry>", "key<rbg>"}


def test_dropout_with_the_devices_own_generator_trains():
    _, losses = run(*setup(fast_random=True))
    assert np.isfinite(losses).all()
    assert not np.array_equal(losses, run(*setup())[1])


def test_the_average_follows_the_weights():
    state, step = setup(ema_decay=0.5)
    new, _ = step(state, batch())
    for name, value in new.params.items():
        # After the first step the decay is 1/10.
        np.testing.assert_allclose(new.ema[name], 0.1 * state.params[name] + 0.9 * value, rtol=1e-5, atol=1e-7)
    assert setup(ema_decay=0.0)[0].ema is None


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_optimizer_takes_a_step_of_about_the_learning_rate(name):
    optimizer = OptimizerConfig(name=name, learning_rate=1e-2, warmup_steps=0, weight_decay=0.0)
    state, step = setup(optimizer=optimizer, total_steps=100)
    new, _ = step(state, batch())
    kernel = "layers.0.output.kernel"
    rms = float(jnp.sqrt(jnp.mean((new.params[kernel] - state.params[kernel]) ** 2)))
    assert 1e-3 < rms < 2e-2


def test_the_learning_rate_warms_up_and_decays_to_zero():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=10), 100)
    rates = [float(np.asarray(schedule(step))) for step in (0, 10, 55, 100)]
    np.testing.assert_allclose(rates, [0, 1e-3, 5e-4, 0], atol=1e-9)


def test_evaluation_is_the_same_in_any_batch():
    apply, params = create(FEATURES.n_mels, V, MODEL, dtype=jnp.float32)
    step = jax.jit(make_eval_step(apply, FEATURES, mesh=data_mesh(1, rows_multiple=1)))
    together = step(params, batch())
    for row in range(4):
        alone = step(params, jax.tree.map(lambda x, row=row: x[row : row + 1] if np.ndim(x) else x, batch()))
        frames = int(alone.logit_lengths_B[0])
        np.testing.assert_allclose(
            together.log_probs_BUV[row, :frames], alone.log_probs_BUV[0, :frames], rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(together.loss_B[row], alone.loss_B[0], rtol=1e-4)
