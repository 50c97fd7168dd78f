"""Training as a whole: it learns, it resumes to the bit, it refuses what it should, it names what it leaves out."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import delete, flip_a_bit

from jaxds2.audio import AudioError
from jaxds2.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    FeatureConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from jaxds2.data.manifest import read_manifest, write_manifest
from jaxds2.data.plan import BatchPlan
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.decoding.hypothesis import NOTHING
from jaxds2.evaluation.evaluate import EvaluationError, evaluate
from jaxds2.inference.recognizer import Recognizer
from jaxds2.inference.transcribe import transcribe
from jaxds2.text import Vocabulary
from jaxds2.training import loop
from jaxds2.training.checkpoint import CheckpointError, Checkpoints, digest
from jaxds2.training.compilation import OutOfMemoryError
from jaxds2.training.lock import LockError
from jaxds2.training.loop import FINISHED, STOPPED, TrainingError, train
from jaxds2.training.monitor import Monitor
from jaxds2.training.selection import read_training_data, training_plan
from jaxds2.training.watchdog import Watchdog

ROOT = Path(__file__).parents[1]


def config(tones: Path, *, steps: int = 8, **training) -> Config:
    return Config(
        name="tones",
        data=DataConfig(
            train=(str(tones / "train.jsonl"),),
            dev=str(tones / "dev.jsonl"),
            characters="abc ",
            batch_seconds=8.0,
            num_buckets=1,
            rows_multiple=2,
        ),
        features=FeatureConfig(n_mels=20),
        augment=AugmentConfig(speed=0.05, freq_masks=1, freq_mask_bins=3, time_masks=0),
        model=ModelConfig(
            conv_channels=(8,), conv_kernels=((3, 3),), conv_strides=((2, 2),), width=32, hidden=16, layers=1
        ),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=5),
        training=TrainingConfig(**{"steps": steps, "ema_decay": 0.5, "eval_every": 1000, "log_every": 1} | training),
    )


def run_digest(run_dir: Path) -> tuple[str, int]:
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        step = checkpoints.resolve("last")
        return digest(*checkpoints.restore_weights(step)), step


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    merged: dict[int, dict[str, float]] = {}
    for record in map(json.loads, lines):
        merged.setdefault(record["step"], {}).update(record)
    return merged


@pytest.fixture(scope="module")
def whole(tones, tmp_path_factory) -> Path:
    """A run of eight steps that never stopped; an epoch has more than two and fewer than eight."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train(config(tones), run_dir, progress=False) == FINISHED
    return run_dir


@pytest.fixture(scope="module")
def learnt(tones, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("learnt") / "run"
    assert train(config(tones, steps=250, eval_every=125), run_dir, progress=False) == FINISHED
    return run_dir


@pytest.mark.parametrize(("stop_at", "workers"), [(3, 0), (5, 2)])
def test_a_stopped_run_resumes_to_the_bit(tones, whole, tmp_path, monkeypatch, stop_at, workers):
    base = config(tones)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, workers=workers))
    advance = Monitor.advance

    def stop(self, step, **values):
        advance(self, step, **values)
        if step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "advance", stop)
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


def test_a_shape_that_was_not_compiled_ahead_gives_the_same_step(tones, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "shapes_ahead", lambda *_: [])
    assert train(config(tones), tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)


def test_a_step_makes_no_copy_that_was_not_asked_for(tones, tmp_path, monkeypatch):
    """Such a copy would wait for the device; here the batch stays on the host, where a jitted call would fetch it."""
    monkeypatch.setattr(loop, "place", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(config(tones), tmp_path / "run", progress=False)


def test_other_training_manifests_are_refused_on_resume(tones, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    write_manifest(tmp_path / "train.jsonl", read_manifest(tones / "train.jsonl")[1:])
    data = tmp_path / "data"
    shutil.copytree(tones, data)
    shutil.copy(tmp_path / "train.jsonl", data / "train.jsonl")
    changed = json.loads((tmp_path / "run/config.json").read_text())
    changed["data"] |= {"train": [str(data / "train.jsonl")], "dev": str(data / "dev.jsonl")}
    (tmp_path / "run/config.json").write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match="not those that it was started with"):
        train(config(data), tmp_path / "run", progress=False)


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


def test_weights_to_start_from_that_are_damaged_are_one_line(tones, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "trained")
    damaged = delete(np.random.default_rng(0), tmp_path / "trained/checkpoints/8")
    with pytest.raises(CheckpointError, match=rf"8: damaged \({re.escape(damaged)} is missing\); there is no other"):
        train(config(tones, init_from=str(tmp_path / "trained")), tmp_path / "run", progress=False)


def test_a_second_run_in_the_same_folder_is_refused_by_the_name_of_the_first(tones, whole, tmp_path):
    holder = (
        "import sys, time; from pathlib import Path; from jaxds2.training.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])) as lock: lock.take(); print('held', flush=True); time.sleep(600)"
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


def test_a_folder_that_cannot_be_written_is_one_line_before_the_first_step(tones, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(LockError, match=r"run/lock: cannot be written \(Read-only file system\)"):
            train(config(tones), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


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


def test_the_config_and_the_vocabulary_are_in_the_run_and_in_the_checkpoint(tones, whole):
    assert loop.read_config(whole / "config.json") == config(tones)
    with Checkpoints(whole / "checkpoints") as checkpoints:
        meta = checkpoints.read_meta(8)
    assert meta["characters"] == "abc "
    assert meta["config"]["model"]["width"] == 32


def test_a_finished_run_is_not_trained_again(tones, whole):
    before = run_digest(whole)
    assert train(config(tones), whole, progress=False) == FINISHED
    assert run_digest(whole) == before


def test_a_run_of_another_config_is_refused_by_the_fields_that_differ(tones, whole):
    other = dataclasses.replace(config(tones), optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=5))
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.02 -> 0\.5.*--run"):
        train(other, whole, progress=False)


def test_what_does_not_change_the_result_may_differ_on_resume(tones, whole):
    before = run_digest(whole)
    assert train(config(tones, log_every=3), whole, progress=False) == FINISHED
    assert run_digest(whole) == before


def test_tones_are_learnt_to_the_letter(tones, learnt):
    recognizer = Recognizer.load(learnt)
    dev = read_manifest(tones / "dev.jsonl")
    scores = evaluate(recognizer, dev, GreedyDecoder(recognizer.vocabulary), progress=False)
    assert scores.hyps == scores.refs
    assert scores.words.errors == 0
    assert scores.words.reference == sum(len(u.text.split()) for u in dev)


def test_metrics_hold_what_people_watch(learnt):
    last = metrics(learnt)[250]
    for name in (
        "loss",
        "learning_rate",
        "grad_norm",
        "skipped",
        "infeasible",
        "padding_share",
        "audio_hours_per_hour",
        "data_wait_share",
    ):
        assert f"train/{name}" in last
    assert {"dev/loss", "dev/wer", "dev/cer"} <= set(last)
    assert last["dev/wer"] == 0
    assert 0 < last["train/padding_share"] < 0.9
    shares = [line["train/data_wait_share"] for line in metrics(learnt).values() if "train/data_wait_share" in line]
    assert all(0 <= share < 1 for share in shares)
    assert any(shares)
    assert last["train/learning_rate"] < 1e-3


def test_transcribe_reads_any_file_and_reports_the_bad_one(tones, learnt, tmp_path):
    import soundfile

    recognizer = Recognizer.load(learnt)
    waveform, _ = soundfile.read(tones / "dev-00.wav")
    stereo = np.repeat(np.stack([waveform, waveform], axis=1), 2, axis=0)  # 32 kHz, two channels
    soundfile.write(tmp_path / "stereo.flac", stereo, 32_000)
    (tmp_path / "bad.wav").write_text("this is no audio")
    paths = [tmp_path / "stereo.flac", tmp_path / "bad.wav", tones / "dev-01.wav", tmp_path / "missing.wav"]
    texts = transcribe(recognizer, paths, GreedyDecoder(recognizer.vocabulary))
    refs = [u.text for u in read_manifest(tones / "dev.jsonl")]
    assert [t.path for t in texts] == paths
    assert texts[0].text == refs[0]
    assert texts[2].text == refs[1]
    assert "bad.wav" in str(texts[1].error)
    assert "missing.wav" in str(texts[3].error)


def test_a_manifest_with_a_bad_file_is_not_scored_on_the_rest(tones, learnt, tmp_path):
    dev = read_manifest(tones / "dev.jsonl")
    dev[1] = dataclasses.replace(dev[1], audio_filepath=tmp_path / "gone.wav")
    recognizer = Recognizer.load(learnt)
    with pytest.raises(EvaluationError, match=r"1 of 6 .*gone\.wav"):
        evaluate(recognizer, dev, lambda log_probs_UV: [NOTHING], progress=False)


def test_the_dev_loss_leaves_out_by_name_what_cannot_fit(tones, learnt):
    dev = read_manifest(tones / "dev.jsonl")
    recognizer = Recognizer.load(learnt)
    decode = GreedyDecoder(recognizer.vocabulary)
    clean = evaluate(recognizer, dev[1:], decode, with_loss=True, progress=False)
    dev[0] = dataclasses.replace(dev[0], text="ab" * 500)
    scores = evaluate(recognizer, dev, decode, with_loss=True, progress=False)
    assert scores.infeasible == [dev[0].id]
    assert clean.infeasible == []
    assert scores.loss == pytest.approx(clean.loss, rel=1e-3)


def test_bad_audio_in_training_is_counted_and_named(tones, tmp_path):
    utterances = read_manifest(tones / "train.jsonl")
    utterances[3] = dataclasses.replace(utterances[3], audio_filepath=tmp_path / "gone.wav")
    write_manifest(tmp_path / "train.jsonl", utterances)
    base = config(tones, steps=16)  # more than two epochs
    data = dataclasses.replace(base.data, train=(str(tmp_path / "train.jsonl"),), dev=None)
    assert train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False) == FINISHED
    times = metrics(tmp_path / "run")[16]["train/unreadable"]
    assert times >= 2
    log = (tmp_path / "run/train.log").read_text()
    assert log.count("gone.wav") == 1
    summary = f"left out: 1 utterance that could not be read, {times:.0f} times; train.log names it"
    assert log.splitlines()[-2].endswith(summary)


def test_a_corpus_that_was_moved_is_found_before_training(tones, tmp_path):
    utterances = read_manifest(tones / "train.jsonl")
    moved = [dataclasses.replace(u, audio_filepath=tmp_path / f"{u.id}.wav") for u in utterances]
    write_manifest(tmp_path / "train.jsonl", moved)
    base = config(tones)
    data = dataclasses.replace(base.data, train=(str(tmp_path / "train.jsonl"),))
    with pytest.raises(AudioError, match=r"train\.jsonl: its recordings cannot be opened: .*is the corpus where"):
        train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_training_stops_when_most_of_the_corpus_cannot_be_read(tones, tmp_path, monkeypatch):
    utterances = read_manifest(tones / "train.jsonl")
    gone = [dataclasses.replace(u, audio_filepath=tmp_path / "gone.wav") for u in utterances[1:]]
    write_manifest(tmp_path / "train.jsonl", [utterances[0], *gone])
    monkeypatch.setattr("jaxds2.training.step_report.MANY_UNREADABLE", 12)
    base = config(tones)
    data = dataclasses.replace(base.data, train=(str(tmp_path / "train.jsonl"),))
    with pytest.raises(TrainingError, match=r"1[2-9] of 1[2-9] utterances since the start could not be read, .*gone"):
        train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False)


@pytest.mark.parametrize("every", [3, 100])
def test_a_checkpoint_is_kept_every_so_many_steps(tones, tmp_path, monkeypatch, every):
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *a, **k: (saved.append(step), save(self, step, *a, **k))
    )
    base = config(tones, checkpoint_every=every)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, dev=None))
    assert train(base, tmp_path / "run", progress=False) == FINISHED
    assert saved == ([3, 6, 8] if every == 3 else [8])


def test_what_was_left_out_before_a_stop_is_still_counted_after_it(tones, tmp_path, monkeypatch):
    utterances = read_manifest(tones / "train.jsonl")
    gone = [dataclasses.replace(u, audio_filepath=tmp_path / "gone.wav") for u in utterances[:4]]
    write_manifest(tmp_path / "train.jsonl", gone + utterances[4:])
    base = config(tones)
    data = dataclasses.replace(base.data, train=(str(tmp_path / "train.jsonl"),), dev=None)
    assert train(dataclasses.replace(base, data=data), tmp_path / "whole", progress=False) == FINISHED
    advance = Monitor.advance

    def stop(self, step, **values):
        advance(self, step, **values)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "advance", stop)
        assert train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False) == STOPPED
    assert train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False) == FINISHED
    counts = [metrics(tmp_path / run)[8]["train/unreadable"] for run in ("whole", "run")]
    assert counts[0] == counts[1] > metrics(tmp_path / "run")[4]["train/unreadable"] > 0
    for run in ("whole", "run"):
        log = (tmp_path / run / "train.log").read_text()
        assert [log.count(f", {u.id}: ") for u in gone] == [1] * 4
        assert f"left out: 4 utterances that could not be read, {counts[0]:.0f} times; train.log names them" in log


@pytest.mark.parametrize(
    ("change", "says"), [({"text": "aéb"}, "é"), ({"audio_filepath": Path("gone.wav")}, "gone.wav")]
)
def test_a_bad_dev_manifest_is_found_before_training(tones, tmp_path, change, says):
    dev = read_manifest(tones / "dev.jsonl")
    write_manifest(tmp_path / "dev.jsonl", [dataclasses.replace(dev[0], **change), *dev[1:]])
    base = config(tones)
    data = dataclasses.replace(base.data, dev=str(tmp_path / "dev.jsonl"))
    with pytest.raises(ValueError, match=says):
        train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_named_by_reason(tones, tmp_path):
    base = config(tones)
    data = dataclasses.replace(base.data, max_duration=0.5, dev=None)
    assert train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False) == FINISHED
    log = (tmp_path / "run/train.log").read_text()
    long = [u.id for u in read_manifest(tones / "train.jsonl") if u.duration > 0.5]
    assert f"left out: {len(long)} longer than 0.5 s: {' '.join(long)}" in log


def test_nothing_left_to_train_on_is_one_clear_line(tones, tmp_path):
    base = config(tones)
    data = dataclasses.replace(base.data, max_duration=0.11)
    with pytest.raises(ConfigError, match=r"all 40 utterances are left out \(40 longer than 0\.11 s\)"):
        train(dataclasses.replace(base, data=data), tmp_path / "run", progress=False)


def test_diverging_stops_by_name_after_so_many_skipped_steps(tones, tmp_path, monkeypatch):
    base = config(tones, max_skipped=3)
    create = loop.create

    def poisoned(*args, **kwargs):
        apply, params = create(*args, **kwargs)
        return apply, params | {"head.bias": np.full_like(params["head.bias"], np.nan)}

    monkeypatch.setattr(loop, "create", poisoned)
    with pytest.raises(TrainingError, match=r"3 steps in a row .*train-\d\d"):
        train(base, tmp_path / "run", progress=False)
    assert run_digest(tmp_path / "run")[1] >= 3  # what there was is saved
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped[:3]] == [1, 2, 3]
    plan, ids = steps_of(base), [u.id for u in read_manifest(tones / "train.jsonl")]
    for line in skipped:
        assert line["loss"] is None
        assert line["ids"] == [ids[i] for i in plan.step(line["step"] - 1).indices_B if i >= 0]

    never = config(tones, max_skipped=0)
    assert train(never, tmp_path / "never", progress=False) == FINISHED
    lines = (tmp_path / "never/skipped.jsonl").read_text().splitlines()
    assert len(lines) == metrics(tmp_path / "never")[8]["train/skipped"] == 8


def steps_of(settings: Config) -> BatchPlan:
    vocabulary = Vocabulary(settings.data.characters)
    return training_plan(settings, read_training_data(settings, vocabulary)[0], vocabulary)


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


def test_the_first_step_takes_over_the_buffers_of_the_state_and_compiles_only_what_comes_up(
    tones, tmp_path, monkeypatch
):
    """A state that was not donated would lie in memory twice."""
    distribute, states = loop.distribute, []
    monkeypatch.setattr(loop, "distribute", lambda *args: states.append(distribute(*args)) or states[0])
    base = config(tones, steps=1)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, dev=None, num_buckets=3))
    assert train(base, tmp_path / "run", progress=False) == FINISHED
    leaves = [leaf for leaf in jax.tree.leaves(states[0]) if leaf.ndim]
    assert len(leaves) > 20
    assert all(leaf.is_deleted() for leaf in leaves)
    log = (tmp_path / "run/train.log").read_text()
    assert " 3 batch shapes, " in log
    assert re.search("compiled 1 of 3 batch shapes in .* s, those that come up in the next steps;", log)


def test_the_memory_of_the_largest_batch_is_said_before_the_first_step(tones, whole):
    lines = (whole / "train.log").read_text().splitlines()
    (said,) = [line for line in lines if "compiled" in line]
    assert re.search(r"a step needs up to \d+ MiB a device beside weights and optimizer, on batches of \d+ x \d", said)


def test_a_run_that_does_not_move_says_where_it_waits_and_goes_on(tones, whole, tmp_path, monkeypatch):
    """The third step waits until the line has come, as for a disk that does not answer."""
    advance, message, said = Monitor.advance, Monitor.message, threading.Event()
    enter, watchdogs = Watchdog.__enter__, []

    def watch(self):
        watchdogs.append(self)
        return enter(self)

    def slow(self, step, **values):
        advance(self, step, **values)
        if step == 3:
            said.clear()  # a slow machine may have said it of the compilation
            watchdogs[0].beat()
            assert said.wait(60)

    def listen(self, text):
        message(self, text)
        if "stacks.txt" in text:
            said.set()

    monkeypatch.setattr(Watchdog, "__enter__", watch)
    monkeypatch.setattr(Monitor, "advance", slow)
    monkeypatch.setattr(Monitor, "message", listen)
    assert train(config(tones, watchdog_seconds=1.0), tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)
    assert "in slow" in (tmp_path / "run/stacks.txt").read_text()


def test_init_from_keeps_the_body_and_renews_the_head_of_a_new_alphabet(tones, learnt, tmp_path):
    base = config(tones, steps=1, init_from=str(learnt))
    data = dataclasses.replace(base.data, characters="abcd ")
    assert train(dataclasses.replace(base, data=data), tmp_path / "new", progress=False) == FINISHED
    log = (tmp_path / "new/train.log").read_text()
    assert "new: head.bias head.kernel" in log
    wider = dataclasses.replace(base, model=dataclasses.replace(base.model, width=48))
    with pytest.raises(CheckpointError, match="same model"):
        train(wider, tmp_path / "wider", progress=False)
    assert not (tmp_path / "wider").exists()


def test_a_run_is_evaluated_on_whatever_devices_are_there(tones, learnt, tmp_path):
    shutil.copytree(learnt, tmp_path / "run")
    settings = json.loads((tmp_path / "run/config.json").read_text())
    settings["training"] |= {"devices": 64, "precision": "bfloat16"}
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    recognizer = Recognizer.load(tmp_path / "run")
    texts = transcribe(recognizer, [tones / "dev-00.wav"], GreedyDecoder(recognizer.vocabulary))
    assert texts[0].text == read_manifest(tones / "dev.jsonl")[0].text


def test_evaluating_a_folder_that_is_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"is .* a run"):
        Recognizer.load(tmp_path)
