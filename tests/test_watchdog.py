"""A run that does not move says where it waits, and one that moves says nothing."""

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jaxds2.config import DataConfig
from jaxds2.data.manifest import Utterance
from jaxds2.data.pipeline import load_batches
from jaxds2.data.plan import BatchPlan
from jaxds2.stacks import stacks_of
from jaxds2.text import Vocabulary
from jaxds2.training.watchdog import Watchdog


class Said:
    """Collects the lines; `wait` for the next of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._came = threading.Semaphore(0)

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._came.release()

    def wait(self) -> None:
        assert self._came.acquire(timeout=60)


def wait_for_a_loader_that_hangs(said: Said, stacks: Path) -> None:
    said.wait()
    deadline = time.monotonic() + 60  # the line comes before the file
    while not (stacks.exists() and "wait_for_a_loader_that_hangs" in stacks.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_names_where_each_thread_waits_once_for_each_halt(tmp_path: Path):
    said, stacks = Said(), tmp_path / "stacks.txt"
    with Watchdog(0.5, stacks, said) as watchdog:
        wait_for_a_loader_that_hangs(said, stacks)
        watchdog.beat()
        said.wait()
    assert "wait_for_a_loader_that_hangs" in stacks.read_text()
    assert len(said.lines) == stacks.read_text().count("nothing has moved for 0.5 s") == 2
    assert str(stacks) in said.lines[0]


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_it_is_silent_while_something_moves_or_where_it_is_off(tmp_path: Path, seconds: float):
    said = Said()
    with Watchdog(seconds, tmp_path / "stacks.txt", said) as watchdog:
        watchdog.beat()
    assert said.lines == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_does_not_end_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    said = Said()

    def fail(line: str) -> None:
        said(line)
        raise ValueError("disk full")

    with Watchdog(0.05, tmp_path / "gone/stacks.txt", fail) as watchdog:
        for _ in range(2):
            said.wait()
            watchdog.beat()
    assert "Thread 0x" in capfd.readouterr().err  # there at least


class StuckVocabulary(Vocabulary):
    """Reads a pipe into which nobody writes, as a disk that does not answer."""

    def __init__(self, pipe: Path):
        super().__init__("a")
        self.pipe = pipe

    def encode(self, text: str) -> list[int]:
        self.pipe.read_bytes()
        return super().encode(text)


def writing_end(pipe: Path) -> int:
    """Of a pipe that another process has opened."""
    for _ in range(1200):
        with contextlib.suppress(OSError):  # not yet
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    raise AssertionError("nobody reads the pipe")


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory")
def test_a_loader_worker_that_hangs_is_named_with_its_place(tmp_path: Path):
    said, pipe, recording = Said(), tmp_path / "pipe", tmp_path / "u.wav"
    os.mkfifo(pipe)
    soundfile.write(recording, np.ones(1600, np.int16), 16_000)
    plan = BatchPlan([0.1], [1], digest="", data=DataConfig(num_buckets=1), seed=0)
    utterances = [Utterance("u", recording, 0.1, "a")]
    workers: list[int | None] = []

    def let_go() -> None:
        end = writing_end(pipe)
        workers.extend(worker.pid for worker in multiprocessing.active_children())
        with Watchdog(0.05, tmp_path / "stacks.txt", said):
            said.wait()
        os.close(end)

    with load_batches(utterances, plan, vocabulary=StuckVocabulary(pipe), workers=1, stop_step=1) as batches:
        helper = threading.Thread(target=let_go)
        helper.start()
        assert next(batches).step == 0
        helper.join()
    ours, _, its = (tmp_path / "stacks.txt").read_text().partition(f"loader worker, process {workers[0]}:\n")
    assert "in test_a_loader_worker_that_hangs" in ours
    assert re.match(r"nothing has moved .* still waiting in _receive \(.*pipeline\.py:\d+\); ", said.lines[0])
    assert re.search(r'test_watchdog\.py", line \d+ in encode\n.*pipeline\.py", line \d+ in _load\n', its)


def test_a_process_that_is_still_starting_is_not_killed_by_the_question():
    with subprocess.Popen(["sleep", "600"]) as starting:
        says = stacks_of(starting.pid)
        assert starting.poll() is None
        starting.kill()
    assert says == ("it is still starting\n" if sys.platform == "linux" else "unknown on this system\n")
    if sys.platform == "linux":
        assert stacks_of(starting.pid) == "it is gone\n"
