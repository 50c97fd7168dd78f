"""A run that does not move says where it waits, and one that moves says nothing."""

import threading
from pathlib import Path

import pytest

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


def wait_for_a_loader_that_hangs(said: Said) -> None:
    said.wait()


def test_it_names_where_each_thread_waits_once_for_each_halt(tmp_path: Path):
    said, stacks = Said(), tmp_path / "stacks.txt"
    with Watchdog(0.05, stacks, said) as watchdog:
        wait_for_a_loader_that_hangs(said)
        assert "wait_for_a_loader_that_hangs" in stacks.read_text()
        watchdog.beat()
        said.wait()
    assert len(said.lines) == stacks.read_text().count("nothing has moved for 0.05 s") == 2
    assert str(stacks) in said.lines[0]


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_it_is_silent_while_something_moves_or_where_it_is_off(tmp_path: Path, seconds: float):
    said = Said()
    with Watchdog(seconds, tmp_path / "stacks.txt", said) as watchdog:
        watchdog.beat()
    assert said.lines == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_does_not_end_it(tmp_path: Path):
    said = Said()

    def fail(line: str) -> None:
        said(line)
        raise ValueError("disk full")

    with Watchdog(0.05, tmp_path / "stacks.txt", fail) as watchdog:
        for _ in range(2):
            said.wait()
            watchdog.beat()
