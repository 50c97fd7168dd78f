"""Loading: rows hold the audio and labels of their utterances, and the batches depend on nothing but the plan."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import fields, replace

import jax
import numpy as np
import pytest
import soundfile

from jaxds2.audio import change_speed
from jaxds2.config import DataConfig
from jaxds2.data.manifest import Utterance
from jaxds2.data.pipeline import DURATION_TOLERANCE, PipelineError, load_batches
from jaxds2.data.plan import BatchPlan
from jaxds2.text import Vocabulary

VOCABULARY = Vocabulary("ab ")
RATE = 16_000


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    found = []
    for i in range(11):
        samples = 3000 + 701 * i
        path = folder / f"u{i}.wav"
        soundfile.write(path, rng.integers(-30_000, 30_000, samples, dtype=np.int16), RATE)
        found.append(Utterance(f"u{i}", path, samples / RATE, "ab "[i % 3] + "b" * i))
    return found


def make_plan(utterances, *, speed=0.0, shuffle=True):
    data = DataConfig(batch_seconds=1.5, num_buckets=3, rows_multiple=2)
    lengths = [len(u.text) for u in utterances]
    durations = [u.duration for u in utterances]
    return BatchPlan(durations, lengths, digest="d", data=data, seed=3, speed=speed, shuffle=shuffle)


def load(utterances, plan, **options):
    options = {"vocabulary": VOCABULARY, "stop_step": plan.steps_for_epochs(1)} | options
    with load_batches(utterances, plan, **options) as batches:
        return list(batches)


def same(a, b):
    return (a.step, a.failures) == (b.step, b.failures) and all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in ((getattr(a.batch, f.name), getattr(b.batch, f.name)) for f in fields(a.batch))
    )


@pytest.mark.parametrize("speed", [0.0, 0.2])
def test_rows_hold_the_audio_and_labels_of_their_utterances(utterances, speed):
    plan = make_plan(utterances, speed=speed)
    seen = []
    for s, loaded in enumerate(load(utterances, plan, stop_step=plan.steps_for_epochs(2))):
        expected, batch = plan.step(s), loaded.batch
        assert (loaded.step, loaded.failures, int(batch.epoch)) == (s, (), expected.epoch)
        assert batch.audio_BS.shape == (expected.bucket.rows, expected.bucket.num_samples)
        assert batch.labels_BN.shape == (expected.bucket.rows, expected.bucket.num_labels)
        assert [getattr(batch, f.name).dtype for f in fields(batch)] == [np.int16] + [np.int32] * 5
        np.testing.assert_array_equal(batch.index_B, expected.indices_B)
        for row, (i, factor) in enumerate(zip(expected.indices_B, expected.speeds_B, strict=True)):
            audio = np.zeros(0, np.int16)
            text = ""
            if i >= 0:
                audio = change_speed(soundfile.read(utterances[i].audio_filepath, dtype="int16")[0], factor)
                text = utterances[i].text
                seen.append(int(i))
            padding = batch.audio_BS.shape[1] - len(audio)
            np.testing.assert_array_equal(batch.audio_BS[row], np.pad(audio, (0, padding)))
            assert batch.audio_lengths_B[row] == len(audio)
            label = VOCABULARY.encode(text)
            assert batch.label_lengths_B[row] == len(label)
            assert batch.labels_BN[row].tolist() == label + [0] * (batch.labels_BN.shape[1] - len(label))
    assert Counter(seen) == dict.fromkeys(range(len(utterances)), 2)


def test_workers_start_before_anybody_asks_for_a_batch(utterances):
    """While the first steps are compiled they read already."""
    with load_batches(utterances, make_plan(utterances), vocabulary=VOCABULARY, workers=2):
        deadline = time.monotonic() + 60
        while len(multiprocessing.active_children()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_loading_from_a_step_continues_the_batches(utterances):
    plan = make_plan(utterances, speed=0.2)
    stop = plan.steps_for_epochs(2)
    whole = load(utterances, plan, stop_step=stop)
    rest = load(utterances, make_plan(utterances, speed=0.2), start_step=3, stop_step=stop)
    assert len(whole) == stop == len(rest) + 3
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert load(utterances, plan, start_step=stop, stop_step=stop) == []


def test_loading_without_a_stop_goes_on(utterances):
    plan = make_plan(utterances)
    with load_batches(utterances, plan, vocabulary=VOCABULARY) as batches:
        steps = [next(batches).step for _ in range(plan.steps_for_epochs(3) + 1)]
    assert steps == list(range(plan.steps_for_epochs(3) + 1))


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(utterances, workers, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "none")  # a worker that starts a JAX backend fails; the accelerator is not its
    damaged = [
        *utterances[:4],
        replace(utterances[4], audio_filepath=utterances[4].audio_filepath / "x"),
        *utterances[5:],
    ]
    plan = make_plan(damaged, speed=0.2)
    stop = plan.steps_for_epochs(2)
    in_process = load(damaged, plan, stop_step=stop)
    assert sum(len(x.failures) for x in in_process) == 2
    in_workers = load(damaged, plan, stop_step=stop, workers=workers)
    assert all(same(a, b) for a, b in zip(in_process, in_workers, strict=True))
    assert multiprocessing.active_children() == []


def test_unusable_audio_becomes_filler_and_is_named(utterances, tmp_path):
    whole, waveform = utterances[7], np.ones(round(utterances[7].duration * RATE), np.int16)
    off = round(DURATION_TOLERANCE * RATE)
    for name, samples in (("longer", 2 * off), ("shorter", -2 * off), ("a bit longer", off), ("a bit shorter", -off)):
        changed = np.resize(waveform, len(waveform) + samples)
        soundfile.write(tmp_path / f"{name}.wav", changed, RATE)
    (tmp_path / "text.wav").write_text("not audio")
    files = ["longer", "shorter", "a bit longer", "a bit shorter", "text", "missing"]
    bad = [replace(whole, id=f"bad: {name}", audio_filepath=tmp_path / f"{name}.wav") for name in files]
    everything = utterances + bad
    plan = make_plan(everything)
    loaded = load(everything, plan)

    failures = dict(f for x in loaded for f in x.failures)
    failures = {name.removeprefix("bad: "): why for name, why in failures.items()}
    assert sorted(failures) == ["longer", "missing", "shorter", "text"]
    assert f"the manifest declares {whole.duration:.2f} s" in failures["longer"]
    assert all(str(tmp_path / f"{name}.wav") in message for name, message in failures.items())
    samples = {}
    for s, x in enumerate(loaded):
        gone = x.batch.index_B < 0
        planned = plan.step(s).indices_B
        names = {everything[i].id for i in planned[gone] if i >= 0}
        assert names == {name for name, _ in x.failures}
        np.testing.assert_array_equal(x.batch.index_B[~gone], planned[~gone])
        for field in (x.batch.audio_BS, x.batch.audio_lengths_B, x.batch.labels_BN, x.batch.label_lengths_B):
            assert not np.asarray(field)[gone].any()
        samples |= {everything[i].id: int(n) for i, n in zip(x.batch.index_B, x.batch.audio_lengths_B, strict=True)}
    assert samples["bad: a bit longer"] == len(waveform)
    assert samples["bad: a bit shorter"] == len(waveform) - off


def test_scoring_needs_no_vocabulary(utterances):
    foreign = [replace(u, text="no such letters") for u in utterances]
    loaded = load(foreign, make_plan(foreign, shuffle=False), vocabulary=None)
    assert not any(np.asarray(x.batch.label_lengths_B).any() for x in loaded)
    assert sum(int((np.asarray(x.batch.index_B) >= 0).sum()) for x in loaded) == len(foreign)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_the_loader_is_raised_not_swallowed(utterances, workers):
    foreign = [*utterances[:-1], replace(utterances[-1], text="z")]
    with pytest.raises(PipelineError, match=r"step \d+: TextError: 'z' has 'z'"):
        load(foreign, make_plan(foreign), workers=workers)


def test_leaving_the_block_ends_the_workers(utterances):
    with load_batches(utterances, make_plan(utterances), vocabulary=VOCABULARY, workers=1) as batches:
        assert next(batches).step == 0
        assert len(multiprocessing.active_children()) == 1
    assert multiprocessing.active_children() == []


def test_a_worker_ignores_interrupts_and_its_death_is_raised(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.ones(3 * RATE, np.int16), RATE)
    found = [Utterance(f"u{i}", path, 3.0, "a") for i in range(8)]
    data = DataConfig(batch_seconds=24, num_buckets=1)  # 0.8 MB: more than the pipe to the worker holds
    plan = BatchPlan([3.0] * 8, [1] * 8, digest="", data=data, seed=0)
    with load_batches(found, plan, vocabulary=VOCABULARY, workers=1) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        # The training process gets them too: it saves first, and goes on loading until it has.
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
        assert [next(batches).step for _ in range(20)] == list(range(1, 21))
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(PipelineError, match="a loader worker died"):
            list(batches)


def test_another_list_than_the_plans_is_refused(utterances):
    with pytest.raises(PipelineError, match="10 utterances, but the plan was made of 11"):
        load(utterances[:-1], make_plan(utterances))


def test_one_trace_per_bucket(utterances):
    missing = [replace(utterances[0], audio_filepath=utterances[0].audio_filepath / "x"), *utterances[1:]]
    plan = make_plan(missing)
    traced = []

    @jax.jit
    def total(batch):
        traced.append(batch.audio_BS.shape)
        return batch.audio_lengths_B.sum() + batch.epoch

    loaded = load(missing, plan, stop_step=plan.steps_for_epochs(3))
    for x in loaded:
        assert int(total(x.batch)) == int(np.asarray(x.batch.audio_lengths_B).sum()) + int(x.batch.epoch)
    assert {len(x.failures) for x in loaded} == {0, 1}
    assert len(traced) == len({(b.batch.audio_BS.shape) for b in loaded}) > 1


def test_an4_comes_as_it_was_recorded(corpora):
    paths = sorted((corpora / "an4" / "wav" / "an4_clstk").rglob("*.wav"))[:40]
    found = [Utterance(p.stem, p, soundfile.info(p).duration, "a") for p in paths]
    data = DataConfig(batch_seconds=20, num_buckets=4, rows_multiple=2)
    plan = BatchPlan([u.duration for u in found], [1] * 40, digest="", data=data, seed=0)
    rows = 0
    for x in load(found, plan):
        for row, i in enumerate(np.asarray(x.batch.index_B).tolist()):
            if i >= 0:
                recorded = soundfile.read(found[i].audio_filepath, dtype="int16")[0]
                np.testing.assert_array_equal(x.batch.audio_BS[row, : len(recorded)], recorded)
                assert x.batch.audio_lengths_B[row] == len(recorded)
                rows += 1
    assert rows == 40
