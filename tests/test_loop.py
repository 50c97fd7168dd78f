"""Training as a whole: it learns, it refuses what it should, it names what it leaves out."""

import dataclasses
import errno
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import delete
from toy_runs import config, metrics, run_digest, steps_of

from jaxds2 import ctc_kernel
from jaxds2.audio import AudioError
from jaxds2.config import (
    ConfigError,
)
from jaxds2.data.manifest import read_manifest, write_manifest
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.evaluation.evaluate import evaluate
from jaxds2.inference.recognizer import Recognizer
from jaxds2.lock import LockError
from jaxds2.model import mingru_kernel
from jaxds2.text import TextError, Vocabulary
from jaxds2.training import loop
from jaxds2.training.checkpoint import CheckpointError, Checkpoints
from jaxds2.training.loop import FINISHED, TrainingError, train
from jaxds2.training.monitor import Monitor
from jaxds2.training.selection import read_training_data
from jaxds2.training.watchdog import Watchdog

NEEDED = r" batches of \d+ x \d\.\d\d s: a step needs \d+ MiB a device beside weights and optimizer$"


def test_a_shape_that_was_not_compiled_ahead_gives_the_same_step(tones, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "shapes_ahead", lambda *_: [])
    assert train(config(tones), tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)
    assert len(re.findall(NEEDED, (tmp_path / "run/train.log").read_text(), re.MULTILINE)) == 1


def test_a_step_makes_no_copy_that_was_not_asked_for(tones, tmp_path, monkeypatch):
    """Such a copy would wait for the device; here the batch stays on the host, where a jitted call would fetch it."""
    monkeypatch.setattr(loop, "place", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(config(tones), tmp_path / "run", progress=False)


def test_a_form_that_stands_in_for_a_kernel_is_named_in_training_and_when_the_run_is_loaded(
    tones, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(mingru_kernel, "stand_in", lambda *given: asked.append(given) or "no kernel here (too narrow)")
    monkeypatch.setattr(ctc_kernel, "stand_in", lambda platform: f"no kernel for CTC on a {platform}")
    train(config(tones, steps=1), tmp_path / "run", progress=False)
    log = (tmp_path / "run/train.log").read_text()
    assert "no kernel here (too narrow)" in log
    assert "no kernel for CTC on a cpu" in log
    capsys.readouterr()
    Recognizer.load(tmp_path / "run", "last")
    assert capsys.readouterr().err == "no kernel here (too narrow)\n"
    assert asked == [(16, "cpu")] * 2


def test_weights_to_start_from_that_are_damaged_are_one_line(tones, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "trained")
    damaged = delete(np.random.default_rng(0), tmp_path / "trained/checkpoints/8")
    with pytest.raises(CheckpointError, match=rf"8: damaged \({re.escape(damaged)} is missing\); there is no other"):
        train(config(tones, init_from=str(tmp_path / "trained")), tmp_path / "run", progress=False)


def test_a_folder_that_cannot_be_written_is_one_line_before_the_first_step(tones, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(LockError, match=r"run/lock: cannot be written \(Read-only file system\)"):
            train(config(tones), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_a_file_is_one_line(tones, tmp_path):
    (tmp_path / "run").write_text("notes")
    with pytest.raises(LockError, match=r"run: a file, not a folder; choose another with --run"):
        train(config(tones), tmp_path / "run", progress=False)
    assert (tmp_path / "run").read_text() == "notes"


def test_what_cannot_be_trained_on_is_named_by_its_manifest(tones, tmp_path):
    good, bad = tones / "train.jsonl", tmp_path / "other.jsonl"
    first = read_manifest(tones / "dev.jsonl")[0]
    settings = config(tones)
    both = dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=(str(good), str(bad))))
    write_manifest(bad, [dataclasses.replace(first, text="", id="empty")])
    kept, left_out = read_training_data(both, Vocabulary(settings.data.characters))
    assert len(kept) == len(read_manifest(good))
    assert left_out == {"empty text": ["empty"]}
    write_manifest(bad, [dataclasses.replace(first, text="\u00e9")])
    says = f"{re.escape(str(bad))}: utterance '{first.id}': .*; `jaxds2 check --config CONFIG {re.escape(str(bad))}`"
    with pytest.raises(TextError, match=says):
        read_training_data(both, Vocabulary(settings.data.characters))


def test_the_config_and_the_vocabulary_are_in_the_run_and_in_the_checkpoint(tones, whole):
    assert loop.read_config(whole / "config.json") == config(tones)
    with Checkpoints(whole / "checkpoints") as checkpoints:
        meta = checkpoints.read_meta(8)
    assert meta["characters"] == "abc "
    assert meta["config"]["model"]["width"] == 32


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
    with pytest.raises(TrainingError, match=r"3 steps in a row .*train-\d\d.*skipped\.jsonl in"):
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


def test_the_memory_of_each_batch_shape_is_in_the_log_before_the_first_step(tones, tmp_path, capsys):
    base = config(tones, steps=4)
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, dev=None, num_buckets=3))
    assert train(base, tmp_path / "run", progress=False) == FINISHED
    log = (tmp_path / "run/train.log").read_text()
    plan = steps_of(base)
    shapes = {plan.step(n).bucket for n in range(4)}
    before, compiled, _ = log.partition(f"compiled {len(shapes)} of 3 batch shapes")
    assert compiled
    assert len(re.findall(NEEDED, before, re.MULTILINE)) == len(shapes) > 1
    assert not re.search(NEEDED, capsys.readouterr().out, re.MULTILINE)


def test_the_memory_of_the_largest_batch_is_said_before_the_first_step(tones, whole):
    lines = (whole / "train.log").read_text().splitlines()
    (said,) = [line for line in lines if "compiled" in line]
    assert re.search(r"a step needs up to \d+ MiB a device beside weights and optimizer, on batches of \d+ x \d", said)


def test_a_run_that_does_not_move_says_where_it_waits_and_goes_on(tones, whole, tmp_path, monkeypatch):
    """The third step waits until the line and the file have come, as for a disk that does not answer."""
    advance, message, said = Monitor.advance, Monitor.message, threading.Event()
    stacks = tmp_path / "run/stacks.txt"
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
            deadline = time.monotonic() + 60
            while "in slow" not in (stacks.read_text() if stacks.exists() else ""):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def listen(self, text):
        message(self, text)
        if "stacks.txt" in text:
            said.set()

    monkeypatch.setattr(Watchdog, "__enter__", watch)
    monkeypatch.setattr(Monitor, "advance", slow)
    monkeypatch.setattr(Monitor, "message", listen)
    assert train(config(tones, watchdog_seconds=1.0), tmp_path / "run", progress=False) == FINISHED
    assert run_digest(tmp_path / "run") == run_digest(whole)


def test_a_manifest_that_does_not_come_is_said_on_standard_error_and_leaves_nothing_behind(
    tones, tmp_path, monkeypatch, capfd
):
    """There is no log yet, nor a folder; on processes other than the first there never is a log."""
    report, reported = Watchdog._report, threading.Event()

    def listen(self):
        report(self)
        reported.set()

    def read_a_dead_disk(*_):
        assert reported.wait(60)
        raise ConfigError("the disk is back")

    monkeypatch.setattr(Watchdog, "_report", listen)
    monkeypatch.setattr(loop, "read_training_data", read_a_dead_disk)
    with pytest.raises(ConfigError, match="the disk is back"):
        train(config(tones, watchdog_seconds=0.1), tmp_path / "run", progress=False)
    said = capfd.readouterr().err
    assert re.search(r"nothing has moved for 0\.1 s .*; still waiting in _train \(.*loop\.py:\d+\); ", said)
    assert "in read_a_dead_disk" in said
    assert not (tmp_path / "run").exists()


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
