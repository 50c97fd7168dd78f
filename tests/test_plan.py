"""Batching: everything once per epoch, everything fits its shape, the least padding, and no hidden state."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2.config import DataConfig, load_config
from jaxds2.data.manifest import Utterance
from jaxds2.data.plan import BatchPlan, Bucket, PlanError, bucket_edges, fewest_samples, select_utterances
from jaxds2.text import TextError, Vocabulary

ROOT = Path(__file__).parents[1]
RATE = 16_000
law = settings(max_examples=50)


@st.composite
def plans(draw, shuffle=None):
    """A plan with its label lengths."""
    durations = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=60).map(lambda x: [i * 0.005 for i in x]))
    labels = [draw(st.integers(0, 40)) for _ in durations]
    data = DataConfig(
        batch_seconds=draw(st.sampled_from([1.0, 10.0, 45.0])),
        num_buckets=draw(st.integers(1, 6)),
        rows_multiple=draw(st.sampled_from([1, 2, 3, 8])),
    )
    plan = BatchPlan(
        durations,
        labels,
        digest=draw(st.sampled_from(["a", "b"])),
        data=data,
        seed=draw(st.integers(0, 5)),
        speed=draw(st.sampled_from([0.0, 0.1, 0.4])),
        shuffle=draw(st.booleans()) if shuffle is None else shuffle,
    )
    return plan, np.array(labels), data


def steps_of(plan, epoch):
    first = plan.steps_for_epochs(epoch)
    return [plan.step(s) for s in range(first, first + plan.num_steps(epoch))]


def same(a, b):
    return (
        (a.step, a.epoch, a.bucket) == (b.step, b.epoch, b.bucket)
        and np.array_equal(a.indices_B, b.indices_B)
        and np.array_equal(a.speeds_B, b.speeds_B)
    )


@law
@given(plans(), st.integers(0, 3))
def test_every_utterance_comes_exactly_once_per_epoch(drawn, epoch):
    plan, labels, _ = drawn
    indices = np.concatenate([s.indices_B for s in steps_of(plan, epoch)])
    np.testing.assert_array_equal(np.sort(indices[indices >= 0]), np.arange(len(labels)))


@law
@given(plans(), st.integers(0, 3))
def test_audio_and_labels_fit_their_bucket(drawn, epoch):
    plan, labels, _ = drawn
    for s in steps_of(plan, epoch):
        rows = s.indices_B >= 0
        lengths = np.rint(plan.num_samples_N[s.indices_B[rows]] / s.speeds_B[rows])
        assert rows.any()
        assert lengths.max() <= s.bucket.num_samples
        assert labels[s.indices_B[rows]].max() <= s.bucket.num_labels


@law
@given(plans(), st.integers(0, 3))
def test_shapes_are_few_and_split_evenly(drawn, epoch):
    plan, labels, data = drawn
    steps = steps_of(plan, epoch)
    assert {s.bucket for s in steps} <= set(plan.buckets)
    assert len(plan.buckets) <= data.num_buckets
    for b in plan.buckets:
        assert b.rows % data.rows_multiple == 0
        assert b.num_samples % 160 == 0
        assert b.num_samples >= 0.1 * RATE
        assert b.num_labels % 8 == 0
        assert b.num_labels > 0
        # Within the seconds asked for, unless that would be less than one multiple of rows.
        assert b.rows == data.rows_multiple or b.rows * b.num_samples <= data.batch_seconds * RATE
        assert b.rows < len(labels) + data.rows_multiple
    for s in steps:
        assert s.indices_B.shape == s.speeds_B.shape == (s.bucket.rows,)


@law
@given(plans(), st.integers(0, 3))
def test_padding_share_is_that_of_the_batches(drawn, epoch):
    plan, _, _ = drawn
    audio, total = 0, 0
    for s in steps_of(plan, epoch):
        rows = s.indices_B >= 0
        audio += np.rint(plan.num_samples_N[s.indices_B[rows]] / s.speeds_B[rows]).sum()
        total += s.bucket.rows * s.bucket.num_samples
    assert plan.padding_share(epoch) == pytest.approx(1 - audio / total)


@law
@given(plans(), st.integers(0, 60))
def test_a_step_does_not_depend_on_the_steps_before(drawn, step):
    plan, labels, data = drawn
    fresh = BatchPlan(
        plan.num_samples_N / RATE,
        labels,
        digest=plan._digest,
        data=data,
        seed=plan._seed,
        speed=plan._speed,
        shuffle=plan._shuffle,
    )
    for s in range(step):
        plan.step(s)
    assert same(plan.step(step), fresh.step(step))


@law
@given(plans())
def test_locate_counts_steps_through_the_epochs(drawn):
    plan, _, _ = drawn
    expected = [(epoch, i) for epoch in range(3) for i in range(plan.num_steps(epoch))]
    assert [plan.locate(s) for s in range(plan.steps_for_epochs(3))] == expected
    assert [plan.step(s).epoch for s in range(plan.steps_for_epochs(3))] == [epoch for epoch, _ in expected]


@law
@given(plans(shuffle=False))
def test_unshuffled_batches_ascend_by_length(drawn):
    plan, _, _ = drawn
    widths = [s.bucket.num_samples for s in steps_of(plan, 0)]
    assert widths == sorted(widths)
    if not plan._speed:
        order = np.concatenate([s.indices_B[s.indices_B >= 0] for s in steps_of(plan, 0)])
        assert (np.diff(plan.num_samples_N[order]) >= 0).all()
        later = np.concatenate([s.indices_B[s.indices_B >= 0] for s in steps_of(plan, 2)])
        np.testing.assert_array_equal(order, later)


@pytest.mark.parametrize("speed", [0.0, 0.1])
def test_the_order_depends_on_digest_seed_and_epoch(speed):
    durations = np.random.default_rng(0).uniform(0.5, 6, 200)

    def order(digest="a", seed=0, epoch=0):
        plan = BatchPlan(durations, [5] * 200, digest=digest, data=DataConfig(), seed=seed, speed=speed)
        return np.concatenate([s.indices_B for s in steps_of(plan, epoch)]).tolist()

    assert order() == order()
    others = [order(digest="b"), order(seed=1), order(epoch=1), order(epoch=2)]
    assert len({tuple(o) for o in [order(), *others]}) == 5


def test_speed_changes_the_length_by_which_an_utterance_is_batched():
    plan = BatchPlan(np.linspace(1, 4, 100), [3] * 100, digest="", data=DataConfig(), seed=0, speed=0.3)
    speeds = np.concatenate([s.speeds_B[s.indices_B >= 0] for s in steps_of(plan, 0)])
    assert speeds.min() < 0.75
    assert speeds.max() > 1.25
    assert plan.buckets[-1].num_samples >= 4 * RATE / 0.7


@law
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5))
def test_edges_are_optimal(units, num_buckets):
    lengths = np.array(units) * 100 - 37

    def padding(edges):
        return (edges[np.searchsorted(edges, lengths)] - lengths).sum()

    edges = bucket_edges(lengths, num_buckets, grid=100)
    points = [u * 100 for u in sorted(set(units))]
    candidates = itertools.combinations(points[:-1], min(num_buckets, len(points)) - 1)
    assert padding(edges) == min(padding(np.array([*c, points[-1]])) for c in candidates)
    assert len(edges) == min(num_buckets, len(points))


@law
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(1, 4))
def test_edges_cover_all_lengths_on_a_grid_of_few_points(lengths, num_buckets):
    edges = bucket_edges(np.array(lengths), num_buckets, max_points=7)
    assert (np.diff(edges) > 0).all()
    assert edges[-1] >= max(lengths)
    assert (edges % 160 == 0).all()
    assert edges[-1] - max(lengths) < 160 * (max(lengths) // (160 * 7) + 1)


@pytest.mark.parametrize("num_buckets", [8, 12])
def test_padding_of_librispeech_is_within_half_a_point_of_the_least(num_buckets):
    """The least that so many shapes allow: edges of 10 ms fitted to each epoch's own lengths, and no filler rows."""
    config = load_config(ROOT / "configs/librispeech_960.py", [f"data.num_buckets={num_buckets}"])
    histogram = json.loads((ROOT / "configs/durations/librispeech_960.json").read_text(encoding="utf-8"))
    bins_N = np.repeat(np.arange(len(histogram["counts"])), histogram["counts"])
    durations_N = (bins_N + np.random.default_rng(0).random(len(bins_N))) * histogram["seconds_per_bin"]
    labels_N = np.rint(durations_N * histogram["characters_per_second"])
    plan = BatchPlan(durations_N, labels_N, digest="", data=config.data, seed=0, speed=config.augment.speed)
    for epoch in range(2):
        lengths_N = plan.lengths(epoch)
        edges_K = bucket_edges(lengths_N, num_buckets, max_points=4096)
        least = 1 - lengths_N.sum() / edges_K[np.searchsorted(edges_K, lengths_N)].sum()
        assert least <= plan.padding_share(epoch) <= least + 0.005


@law
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 9), st.sampled_from([2, 4, 5, 8])), min_size=1, max_size=6
    ).map(
        lambda x: [
            (count, 100 * sum(width for _, width, _ in x[: i + 1]), rows) for i, (count, _, rows) in enumerate(x)
        ]
    )
)
def test_leftovers_are_dealt_at_the_least_cost(drawn):
    counts = [count for count, _, _ in drawn]
    buckets = [Bucket(width, rows, 8) for _, width, rows in drawn]

    def samples(batches):
        return sum(n * b.rows * b.num_samples for n, b in zip(batches, buckets, strict=True))

    def deal(moves):
        batches, carried = [], 0
        for count, bucket, move in zip(counts, buckets, [*moves, False], strict=True):
            full, rest = divmod(count + carried, bucket.rows)
            carried = rest if move else 0
            batches.append(full + (rest > 0 and not move))
        return batches

    everything = itertools.product([False, True], repeat=len(buckets) - 1)
    assert samples(fewest_samples(counts, buckets)) == min(samples(deal(moves)) for moves in everything)


def test_a_plan_without_utterances_is_refused():
    with pytest.raises(PlanError, match="no utterances"):
        BatchPlan([], [], digest="", data=DataConfig(), seed=0)
    with pytest.raises(PlanError, match="2 durations, but 1 label"):
        BatchPlan([1.0, 2.0], [3], digest="", data=DataConfig(), seed=0)
    with pytest.raises(PlanError, match="step is -1"):
        BatchPlan([1.0], [3], digest="", data=DataConfig(), seed=0).step(-1)


def utterance(id, duration, text):
    return Utterance(id, Path(f"{id}.wav"), duration, text)


def select(*utterances, speed=0.0):
    return select_utterances(
        utterances,
        DataConfig(min_duration=0.1, max_duration=2.0),
        vocabulary=Vocabulary("ab "),
        output_frames=lambda samples: samples // 1600,  # 10 a second
        speed=speed,
    )


def test_what_cannot_be_trained_on_is_left_out_by_name_and_reason():
    kept, left_out = select(
        utterance("at the least", 0.1, "a"),
        utterance("short", 0.09, "a"),
        utterance("at the most", 2.0, "ab ab"),
        utterance("long", 2.1, "ab"),
        utterance("wordless", 1.0, " "),
        utterance("fits", 0.4, "aab"),
        utterance("one frame too few", 0.4, "aaba"),
        utterance("another", 0.3, "aab"),
    )
    assert [u.id for u in kept] == ["at the least", "at the most", "fits"]
    assert left_out == {
        "shorter than 0.1 s": ["short"],
        "longer than 2 s": ["long"],
        "empty text": ["wordless"],
        "label longer than its frames": ["one frame too few", "another"],
    }


def test_labels_must_fit_the_fastest_copy():
    assert select(utterance("x", 0.4, "abab"))[1] == {}
    assert select(utterance("x", 0.4, "abab"), speed=0.1)[1] == {"label longer than its frames": ["x"]}
    assert select(utterance("x", 0.45, "abab"), speed=0.1)[1] == {}


def test_a_character_outside_the_vocabulary_names_its_utterance():
    with pytest.raises(TextError, match=r"'u2'.*'c', outside the alphabet"):
        select(utterance("u1", 1.0, "ab"), utterance("u2", 1.0, "abc"))
