"""A run that stopped, however it stopped, goes on from its last good state and ends in the same bits."""

import dataclasses
import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import flip_a_bit
from exactness import stopped_at
from toy_runs import config, metrics, run_digest, steps_of

from jaxds2.config import (
    ConfigError,
    OptimizerConfig,
)
from jaxds2.data.manifest import read_manifest, write_manifest
from jaxds2.data.shards import write_shards
from jaxds2.inference.recognizer import Recognizer
from jaxds2.lock import LockError
from jaxds2.training import loop
from jaxds2.training.checkpoint import CheckpointError, Checkpoints
from jaxds2.training.compilation import OutOfMemoryError
from jaxds2.training.loop import FINISHED, STOPPED, train
from jaxds2.training.monitor import Monitor
from jaxds2.training.step_report import StepReport

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("stop_at", "workers"), [(3, 0), (5, 2)])
def test_a_stopped_run_resumes_to_the_bit(tones, whole, tmp_path, stop_at, workers):
    base = config(tones)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, workers=workers))
    with stopped_at(stop_at, process=0):
        assert train(base, tmp_path / "run", progress=False) == STOPPED
    assert stop_at <= run_digest(tmp_path / "run")[1] < 8
    assert train(base, tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)
    for step, values in metrics(whole).items():
        assert metrics(tmp_path / "run")[step]["train/loss"] == values["train/loss"]


@pytest.mark.parametrize("shape", [0, 1])
def test_a_stop_while_it_compiles_loses_nothing(tones, whole, tmp_path, monkeypatch, shape):
    """Before the first step there is nothing to save: the run starts as if for the first time."""
    preparing = Monitor.preparing

    def stop(self, what, done, total):
        preparing(self, what, done, total)
        if done == shape:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "preparing", stop)
        assert train(config(tones), tmp_path / "run", progress=False) == STOPPED
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        assert checkpoints.last() is None
    assert train(config(tones), tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)


def test_a_stop_while_it_saves_waits_for_the_save(tones, whole, tmp_path, monkeypatch):
    """The signal comes when the folder of step 2 is written and has no name yet; the save of step 4 waits for it."""
    rename = os.rename

    def stop(source, target):
        if Path(target).name == "2":
            os.kill(os.getpid(), signal.SIGTERM)
        rename(source, target)

    settings = config(tones, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("jaxds2.training.checkpoint.os.rename", stop)
        assert train(settings, tmp_path / "run", progress=False) == STOPPED
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        checkpoints.verify(2)
        assert checkpoints.last() in (2, 3, 4)
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))
    assert train(settings, tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)


def test_a_run_stopped_while_it_evaluates_makes_up_for_it(tones, whole, tmp_path, monkeypatch):
    plan = loop.evaluate

    def stopped(*args, should_stop, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return plan(*args, should_stop=should_stop, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopped)
        assert train(config(tones), tmp_path / "run", progress=False) == STOPPED
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        assert (checkpoints.last(), checkpoints.best()) == (8, None)
    for _ in range(2):  # the second time there is nothing left to make up for
        assert train(config(tones), tmp_path / "run", progress=False) == FINISHED
        with Checkpoints(tmp_path / "run/checkpoints") as checkpoints, Checkpoints(whole / "checkpoints") as unstopped:
            assert checkpoints.best() == unstopped.best() == 8
            assert checkpoints.wer(8) == unstopped.wer(8)
        assert metrics(tmp_path / "run")[8]["dev/wer"] == metrics(whole)[8]["dev/wer"]
    assert run_digest(tmp_path / "run") == run_digest(whole)


def test_what_was_left_out_before_a_stop_is_still_counted_after_it(tones, tmp_path):
    utterances = read_manifest(tones / "train.jsonl")
    gone = [dataclasses.replace(u, audio_filepath=tmp_path / "gone.wav") for u in utterances[:4]]
    write_manifest(tmp_path / "train.jsonl", gone + utterances[4:])
    base = config(tones)
    data = dataclasses.replace(base.data, train=(str(tmp_path / "train.jsonl"),), dev=None)
    assert train(dataclasses.replace(base, data=data), tmp_path / "whole", progress=False) == FINISHED
    with stopped_at(4, process=0):
        assert train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False) == STOPPED
    assert train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False) == FINISHED
    counts = [metrics(tmp_path / run)[8]["train/unreadable"] for run in ("whole", "run")]
    assert counts[0] == counts[1] > metrics(tmp_path / "run")[4]["train/unreadable"] > 0
    for run in ("whole", "run"):
        log = (tmp_path / run / "train.log").read_text()
        assert [log.count(f", {u.id}: ") for u in gone] == [1] * 4
        assert f"left out: 4 utterances that could not be read, {counts[0]:.0f} times; train.log names them" in log


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tones, tmp_path, monkeypatch, caplog):
    short = config(tones, checkpoint_every=3)  # at steps 3, 6 and 8, of which the last two stay
    assert train(short, tmp_path / "run", progress=False) == FINISHED
    whole = run_digest(tmp_path / "run")
    damaged = flip_a_bit(np.random.default_rng(1), tmp_path / "run/checkpoints/8")
    assert run_digest(tmp_path / "run")[1] == 6
    assert "8: damaged" in caplog.text
    with pytest.raises(CheckpointError, match=rf"8: damaged \({re.escape(damaged)} is not what was saved\)"):
        Recognizer.load(tmp_path / "run", 8)
    assert train(short, tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == whole
    log = (tmp_path / "run/train.log").read_text()
    assert f"8: damaged ({damaged} is not what was saved); there is also 6; it is set aside as 8.damaged" in log
    assert "resumed at step 6" in log


def test_a_save_that_fails_ends_the_run_in_one_line_and_leaves_the_last_good_state(tones, whole, tmp_path, monkeypatch):
    rename = os.rename

    def refuse(source, target):
        if Path(target).name == "4":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("jaxds2.training.checkpoint.os.rename", refuse)
        with pytest.raises(CheckpointError, match=r"step 4 .*\(Read-only file system\); .*intact; put that"):
            train(config(tones, checkpoint_every=2), tmp_path / "run", progress=False)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    assert train(config(tones, checkpoint_every=2), tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)


def test_out_of_memory_is_one_line_that_names_the_batch_and_leaves_the_last_checkpoint(
    tones, whole, tmp_path, monkeypatch
):
    """Injected: the compiled step says what XLA says."""
    compile_ahead, calls, fails_at = loop.compile_ahead, itertools.count(), 3

    class Exhausted:
        def __init__(self, step):
            self._step, self.memory_analysis = step, step.memory_analysis

        def __call__(self, *args):
            if next(calls) == fails_at:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4770354232 bytes.")
            return self._step(*args)

    def compile_exhausted(*args, **kwargs):
        return {shape: Exhausted(step) for shape, step in compile_ahead(*args, **kwargs).items()}

    settings = config(tones, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "compile_ahead", compile_exhausted)
        bucket = steps_of(settings).step(fails_at).bucket
        names = rf"batches of {bucket.rows} x {bucket.num_samples / 16_000:.2f} s; a step needs \d+ MiB"
        with pytest.raises(OutOfMemoryError, match=rf"{names} .*data.batch_seconds is 8: start again with 4$"):
            train(settings, tmp_path / "run", progress=False)
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints:
        assert checkpoints.last() == 2
    assert train(settings, tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)


EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 4770354232 bytes."


class Poisoned:
    """What a device gives back when it runs out of memory after the step has been started: reading it fails."""

    def block_until_ready(self):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    def __array__(self, *_):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)


@pytest.mark.parametrize("surfaces", ["when it is read", "when the next step starts", "at the end"])
def test_out_of_memory_that_surfaces_late_names_the_batch_of_its_own_step(tones, tmp_path, monkeypatch, surfaces):
    settings = config(tones)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, num_buckets=3, dev=None))
    plan = steps_of(settings)
    fails_at = next(n for n in range(1, 20) if plan.step(n).bucket != plan.step(n + 1).bucket)
    steps = fails_at + (1 if surfaces == "at the end" else 2)
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, steps=steps))
    hold, place = StepReport.hold, loop.place
    started = itertools.count()

    def poison(self, group, losses, metrics):
        if group[0].step == fails_at:
            metrics = dataclasses.replace(metrics, loss=Poisoned())
        hold(self, group, losses, metrics)

    def refuse_poison(batch, mesh):
        if next(started) == fails_at + 1 and surfaces == "when the next step starts":
            raise jax.errors.JaxRuntimeError(EXHAUSTED)
        return place(batch, mesh)

    monkeypatch.setattr(StepReport, "hold", poison)
    monkeypatch.setattr(loop, "place", refuse_poison)
    bucket = plan.step(fails_at).bucket
    names = rf"^out of memory on batches of {bucket.rows} x {bucket.num_samples / 16_000:.2f} s; "
    with pytest.raises(OutOfMemoryError, match=names):
        train(settings, tmp_path / "run", progress=False)


def test_out_of_memory_in_an_evaluation_is_one_line_and_what_was_trained_is_saved(tones, whole, tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_eval_step", lambda *_, **__: exhausted)
        with pytest.raises(OutOfMemoryError, match=r"^out of memory recognizing batches of \d+ x .*longest recordings"):
            train(config(tones), tmp_path / "run", progress=False)
    assert run_digest(tmp_path / "run") == run_digest(whole)


def test_out_of_memory_while_saving_is_one_line(tones, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr(Checkpoints, "save", exhausted)
    with pytest.raises(CheckpointError, match=r"checkpoints: step 2 could not be saved, out of memory; older ones are"):
        train(config(tones, checkpoint_every=2), tmp_path / "run", progress=False)


def test_a_finished_run_is_not_trained_again(tones, whole):
    before = run_digest(whole)
    assert train(config(tones), whole, progress=False) == FINISHED
    assert run_digest(whole) == before


def test_a_run_of_another_config_is_refused_by_the_fields_that_differ(tones, whole):
    other = dataclasses.replace(config(tones), optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=5))
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.02 -> 0\.5.*--run"):
        train(other, whole, progress=False)


def test_what_does_not_change_the_result_may_differ_on_resume(tones, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert train(config(tones, log_every=3), tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)


@pytest.mark.parametrize("which", ["train", "dev"])
def test_other_manifests_are_refused_on_resume(tones, whole, tmp_path, which):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(tones, tmp_path / "data")
    write_manifest(tmp_path / f"data/{which}.jsonl", read_manifest(tones / f"{which}.jsonl")[1:])
    kept = (tmp_path / "run/config.json").read_bytes()
    for _ in range(2):  # nothing of it is taken for what the run was started with
        with pytest.raises(ConfigError, match=f"the {which}.* not what it was started with"):
            train(config(tmp_path / "data"), tmp_path / "run", progress=False)
    assert (tmp_path / "run/config.json").read_bytes() == kept


def test_a_checkpoint_that_knows_no_digest_wants_the_very_manifest(tones, whole, tmp_path, monkeypatch):
    """As those from before it was written down."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(tones, tmp_path / "data")
    read_meta = Checkpoints.read_meta
    older = lambda self, step: {k: v for k, v in read_meta(self, step).items() if k != "dev_digest"}  # noqa: E731
    monkeypatch.setattr(Checkpoints, "read_meta", older)
    with pytest.raises(ConfigError, match="the dev manifest is not what it was started with"):
        train(config(tmp_path / "data"), tmp_path / "run", progress=False)
    assert train(config(tones), tmp_path / "run", progress=False) == FINISHED


def test_manifests_may_be_packed_into_shards_or_moved_on_resume(tones, tmp_path):
    with stopped_at(3, process=0):
        assert train(config(tones), tmp_path / "run", progress=False) == STOPPED
    base = config(tones)
    write_shards(tones / "train.jsonl", tmp_path / "shards/train", workers=1)
    shutil.copytree(tones, tmp_path / "data")
    data = dataclasses.replace(base.data, train=(str(tmp_path / "shards/train"),), dev=str(tmp_path / "data/dev.jsonl"))
    assert train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False) == FINISHED
    assert train(base, tmp_path / "whole", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(tmp_path / "whole")


def test_a_second_run_in_the_same_folder_is_refused_by_the_name_of_the_first(tones, whole, tmp_path):
    holder = (
        "import sys, time; from pathlib import Path; from jaxds2.lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1]), does='trains', option='--run') as lock:\n"
        "    lock.take(); print('held', flush=True); time.sleep(600)"
    )
    shutil.copytree(whole, tmp_path / "run")
    command = [sys.executable, "-c", holder, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "held\n"
            with pytest.raises(LockError, match=rf"run: process {first.pid} on .* trains here; stop it first"):
                train(config(tones), tmp_path / "run", progress=False)
            assert run_digest(tmp_path / "run") == run_digest(whole)  # reading needs no lock
        finally:
            first.kill()
    assert train(config(tones), tmp_path / "run", progress=False) == FINISHED  # the kernel has given it back
    assert "resumed at step 8, the last: nothing is left to train" in (tmp_path / "run/train.log").read_text()
