"""CTC against brute force over all paths, in value and gradient, and its treatment of labels that cannot fit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ctc_float64 import float64_loss_and_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.ctc import consistency_loss, ctc_loss, feasible, forced_alignment, min_frames


def collapse(path):
    return tuple(k for k, _ in itertools.groupby(path) if k != 0)


def brute_force(logits_UV, label) -> float:
    """-log of the summed probability of every path that spells the label, in float64."""
    logits = np.asarray(logits_UV, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=logits.shape[0]):
        if collapse(path) == tuple(label):
            total += np.exp(sum(log_probs[t, k] for t, k in enumerate(path)))
    return -np.log(total)


LABELS = [[], [1], [2, 1], [1, 1], [1, 2, 1]]
FORMS = ["optax", "fused"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", LABELS)
def test_loss_equals_brute_force(label, form):
    logits = 2 * jax.random.normal(jax.random.key(len(label)), (1, 5, 3))
    labels = jnp.array([label + [0] * (4 - len(label))])
    loss = ctc_loss(logits, jnp.array([5]), labels, jnp.array([len(label)]), implementation=form)
    np.testing.assert_allclose(loss[0], brute_force(logits[0], label), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_a_column_of_labels_is_all_blanks(form):
    logits = jax.random.normal(jax.random.key(3), (2, 5, 3))
    arguments = jnp.array([5, 3]), jnp.zeros((2, 0), jnp.int32), jnp.zeros(2, jnp.int32)
    loss, grads = jax.value_and_grad(lambda x: jnp.sum(ctc_loss(x, *arguments, implementation=form)))(logits)
    want = brute_force(logits[0], []) + brute_force(logits[1, :3], [])
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    softmax_less_blank = jax.nn.softmax(logits) - jnp.array([1.0, 0.0, 0.0])[None, None]
    np.testing.assert_allclose(grads, softmax_less_blank.at[1, 3:].set(0.0), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("label", LABELS)
def test_gradient_equals_finite_differences_of_brute_force(label, form):
    logits = jax.random.normal(jax.random.key(7), (1, 4, 3))
    labels = jnp.array([label + [0] * (4 - len(label))])
    got = jax.grad(lambda x: ctc_loss(x, jnp.array([4]), labels, jnp.array([len(label)]), implementation=form)[0])(
        logits
    )[0]
    want = np.zeros((4, 3))
    base = np.asarray(logits[0], np.float64)
    for t, k in np.ndindex(4, 3):
        delta = np.zeros((4, 3))
        delta[t, k] = 1e-5
        want[t, k] = (brute_force(base + delta, label) - brute_force(base - delta, label)) / 2e-5
    np.testing.assert_allclose(got, want, atol=1e-4)


@functools.partial(jax.jit, static_argnames="form")
def loss_and_gradient(logits, lengths, labels, counts, *, form):
    weights = jnp.array([1.0, 2.0, 3.0, 4.0])

    def total(x):
        loss = ctc_loss(x, lengths, labels, counts, implementation=form)
        return jnp.sum(weights * loss), loss

    (_, loss), grads = jax.value_and_grad(total, has_aux=True)(logits)
    return loss, grads


@settings(max_examples=100)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 4), max_size=10)), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_both_forms_are_equal_whatever_the_lengths(rows, seed):
    logits = 3 * jax.random.normal(jax.random.key(seed), (4, 30, 5))
    labels = jnp.array([label + [0] * (10 - len(label)) for _, label in rows])
    lengths, counts = jnp.array([u for u, _ in rows]), jnp.array([len(label) for _, label in rows])
    loss, grads = loss_and_gradient(logits, lengths, labels, counts, form="fused")
    expected, expected_grads = loss_and_gradient(logits, lengths, labels, counts, form="optax")
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads, expected_grads, atol=2e-4)


@pytest.mark.parametrize(("form", "error"), [("optax", 3e-3), ("fused", 4e-6)])
@pytest.mark.parametrize("scale", [1.0, 8.0])  # as at the start of training, and peaky on the wrong labels
def test_the_gradient_of_long_utterances_against_float64(form, error, scale):
    logits = scale * jax.random.normal(jax.random.key(3), (3, 600, 29))
    labels = jax.random.randint(jax.random.key(4), (3, 150), 1, 29)
    lengths, counts = jnp.array([600, 411, 600]), jnp.array([150, 97, 5])
    args = lengths, labels, counts
    loss = ctc_loss(logits, *args, implementation=form)
    grads = jax.grad(lambda x: jnp.sum(ctc_loss(x, *args, implementation=form)))(logits)
    for b in range(3):
        label = np.asarray(labels[b, : counts[b]])
        want_loss, want = float64_loss_and_gradient(logits[b, : lengths[b]], label)
        np.testing.assert_allclose(loss[b], want_loss, rtol=1e-6)
        worst = np.abs(grads[b, : lengths[b]] - want).max()
        print(f"{form}, logits of scale {scale:g}, {lengths[b]} frames: gradient error {worst:.1e}")
        assert worst < error * scale
        np.testing.assert_array_equal(grads[b, lengths[b] :], 0)


def test_views_are_apart_by_half_the_divergence_of_each_from_the_other():
    logits = 2 * jax.random.normal(jax.random.key(0), (4, 6, 3))
    lengths = jnp.array([6, 6, 4, 4])
    want = []
    for first, second, frames in ((0, 1, 6), (2, 3, 4)):
        p, q = (np.asarray(jax.nn.softmax(logits[row, :frames]), np.float64) for row in (first, second))
        want.append(np.sum(p * np.log(p / q) + q * np.log(q / p)) / 2)
    np.testing.assert_allclose(consistency_loss(logits, lengths), want, rtol=1e-5)
    poisoned = logits.at[2:, 4:].set(jnp.nan)
    value, grads = jax.value_and_grad(lambda x: jnp.sum(consistency_loss(x, lengths)))(poisoned)
    np.testing.assert_allclose(value, sum(want), rtol=1e-5)
    np.testing.assert_array_equal(grads[2:, 4:], 0)
    # Towards the other view, which stands still: the gradient of a cross-entropy, halved.
    probs = jax.nn.softmax(logits[:2])
    np.testing.assert_allclose(grads[:2], (probs - probs[::-1]) / 2, atol=1e-6)


@settings(max_examples=200)
@given(label=st.lists(st.integers(1, 3), max_size=4), frames=st.integers(0, 6))
def test_feasible_is_what_some_path_can_spell(label, frames):
    spelt = (
        any(collapse(path) == tuple(label) for path in itertools.product(range(4), repeat=frames)) if frames else False
    )
    got = feasible(jnp.array([frames]), jnp.array([label + [0] * (5 - len(label))]), jnp.array([len(label)]))
    assert bool(got[0]) == spelt
    assert (min_frames(label) <= frames and frames > 0) == spelt


@pytest.mark.parametrize("form", FORMS)
def test_infeasible_rows_give_zero_and_no_gradient_and_leave_others_alone(form):
    logits = jax.random.normal(jax.random.key(0), (3, 4, 3))
    labels = jnp.array([[1, 1, 1], [1, 2, 0], [1, 0, 0]])
    frames, lengths = jnp.array([4, 4, 0]), jnp.array([3, 2, 1])
    loss, grads = jax.value_and_grad(lambda x: jnp.sum(ctc_loss(x, frames, labels, lengths, implementation=form)))(
        logits
    )
    np.testing.assert_allclose(loss, brute_force(logits[1], [1, 2]), rtol=1e-5)
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_array_equal(grads[2], 0)
    assert float(jnp.abs(grads[1]).max()) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_nan_in_the_padding_never_leaks(form):
    logits = jax.random.normal(jax.random.key(0), (2, 6, 3))
    labels, lengths, frames = jnp.array([[1, 2], [2, 0]]), jnp.array([2, 1]), jnp.array([4, 6])

    def loss(x):
        return jnp.sum(ctc_loss(x, frames, labels, lengths, implementation=form))

    poisoned = logits.at[0, 4:].set(jnp.nan)
    np.testing.assert_array_equal(loss(poisoned), loss(logits))
    np.testing.assert_array_equal(jax.grad(loss)(poisoned), jax.grad(loss)(logits))
    np.testing.assert_array_equal(jax.grad(loss)(logits)[0, 4:], 0)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_computed_in_float32(form):
    logits = (4 * jax.random.normal(jax.random.key(0), (1, 50, 5))).astype(jnp.bfloat16)
    labels = jnp.array([[1, 2, 3, 4, 1, 2]])
    args = jnp.array([50]), labels, jnp.array([6])
    got = ctc_loss(logits, *args, implementation=form)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, ctc_loss(logits.astype(jnp.float32), *args, implementation=form))


def spelling_paths(label, frames):
    """The lattice positions of every path that spells a label, by brute force: (frames,) each, -1 for the blank."""
    for path in itertools.product(range(-1, len(label)), repeat=frames):
        spelt = [n for n, _ in itertools.groupby(path) if n >= 0]
        classes = [label[n] if n >= 0 else 0 for n in path]
        if spelt == list(range(len(label))) and collapse(classes) == tuple(label):
            yield path


def best_path(logits_UV, label):
    """(log-probability, positions) of the most likely path that spells a label, in float64; None: there is none."""
    logits = np.asarray(logits_UV, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scored = [
        (sum(log_probs[u, label[n] if n >= 0 else 0] for u, n in enumerate(path)), path)
        for path in spelling_paths(label, len(logits))
    ]
    return max(scored, default=None)


aligned = jax.jit(forced_alignment)
ROWS = st.lists(st.tuples(st.integers(0, 6), st.lists(st.integers(1, 2), max_size=4)), min_size=3, max_size=3)


def batch_of(rows, seed, *, scale=2.0, frames=6, labels=4):
    logits = scale * jax.random.normal(jax.random.key(seed), (len(rows), frames, 3))
    padded = jnp.array([label + [0] * (labels - len(label)) for _, label in rows])
    return logits, jnp.array([u for u, _ in rows]), padded, jnp.array([len(label) for _, label in rows])


@settings(max_examples=60)
@given(ROWS, st.integers(0, 1000))
def test_the_alignment_is_the_best_of_all_paths(rows, seed):
    batch = batch_of(rows, seed)
    got = aligned(*batch)
    for b, (frames, label) in enumerate(rows):
        best = best_path(batch[0][b, :frames], label) if frames else None
        assert bool(got.feasible_B[b]) == (best is not None)
        if best is None:
            assert got.log_prob_B[b] == -np.inf
            np.testing.assert_array_equal(got.position_BU[b], -1)
        else:
            np.testing.assert_allclose(got.log_prob_B[b], best[0], rtol=1e-5)
            np.testing.assert_array_equal(got.position_BU[b, :frames], best[1])
            np.testing.assert_array_equal(got.position_BU[b, frames:], -1)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(1, 2), max_size=10)), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 2.0, 20.0]),
)
def test_the_best_path_is_no_likelier_than_all_paths_together(rows, seed, scale):
    batch = batch_of(rows, seed, scale=scale, frames=30, labels=10)
    got, loss = aligned(*batch), ctc_loss(*batch)
    for b in np.flatnonzero(got.feasible_B):
        assert got.log_prob_B[b] <= -loss[b] + 1e-5 * (1 + abs(loss[b]))
        # Nor is it less than the likelihood shared out among as many paths as there can be.
        assert got.log_prob_B[b] >= -loss[b] - rows[b][0] * np.log(3) - 1e-3
        path = [rows[b][1][n] if n >= 0 else 0 for n in got.position_BU[b, : rows[b][0]].tolist()]
        assert collapse(path) == tuple(rows[b][1])


def test_nothing_beyond_a_length_reaches_the_alignment():
    logits, frames, labels, lengths = batch_of([(6, [1, 2]), (4, [2]), (3, [2, 2, 2]), (0, [1])], 0)
    want = aligned(logits, frames, labels, lengths)
    assert want.feasible_B.tolist() == [True, True, False, False]
    beyond = jnp.arange(6)[None, :] >= frames[:, None]
    poisoned = jnp.where(beyond[..., None], jnp.nan, logits)
    unlabelled = jnp.where(jnp.arange(4)[None, :] >= lengths[:, None], jnp.array([[99, -1, 1, 2]]), labels)
    for got in (aligned(poisoned, frames, labels, lengths), aligned(logits, frames, unlabelled, lengths)):
        jax.tree.map(np.testing.assert_array_equal, got, want)
    wider = aligned(
        jnp.pad(poisoned, ((0, 0), (0, 5), (0, 0)), constant_values=jnp.nan),
        frames,
        jnp.pad(labels, ((0, 0), (0, 3)), constant_values=1),
        lengths,
    )
    np.testing.assert_array_equal(wider.position_BU[:, :6], want.position_BU)
    np.testing.assert_array_equal(wider.position_BU[:, 6:], -1)
    np.testing.assert_array_equal(wider.log_prob_B, want.log_prob_B)


def test_an_alignment_is_the_same_in_any_batch():
    rows = [(30, [1, 2, 2, 1]), (17, [2] * 8), (25, []), (9, [1, 1, 1, 1])]
    logits, frames, labels, lengths = batch_of(rows, 5, frames=30, labels=8)
    together = aligned(logits, frames, labels, lengths)
    for b in range(len(rows)):
        alone = aligned(logits[b : b + 1], frames[b : b + 1], labels[b : b + 1], lengths[b : b + 1])
        jax.tree.map(lambda x, y, b=b: np.testing.assert_array_equal(x[0], y[b]), alone, together)


def test_alignment_is_computed_in_float32():
    logits, *rest = batch_of([(30, [1, 2, 2, 1])], 1, frames=30)
    got = aligned(logits.astype(jnp.bfloat16), *rest)
    assert got.log_prob_B.dtype == jnp.float32
    want = aligned(logits.astype(jnp.bfloat16).astype(jnp.float32), *rest)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_long_alignment_finds_the_path_it_was_made_of():
    rng = np.random.default_rng(0)
    label = rng.integers(1, 29, 200)
    position = np.full(1000, -1)
    position[np.sort(rng.choice(500, 200, replace=False)) * 2] = np.arange(200)  # blanks between: any label may follow
    classes = np.where(position >= 0, label[position], 0)
    logits = 12 * np.eye(29, dtype=np.float32)[classes] + rng.standard_normal((1000, 29), np.float32)
    got = aligned(jnp.array(logits[None]), jnp.array([1000]), jnp.array(label[None]), jnp.array([200]))
    np.testing.assert_array_equal(got.position_BU[0], position)
