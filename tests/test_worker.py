"""A worker leaves an interrupt to the process that started it, and does not outlive it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "jaxds2"
PARENT = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from jaxds2.worker import prepare_worker
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_worker)
worker = pool.submit(os.getpid).result()
os.kill(worker, signal.SIGINT)
assert pool.submit(os.getpid).result() == worker
pool.submit(os.system, "exec sleep 0.1")
print(worker, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_outlives_an_interrupt_but_not_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        try:
            parent.communicate(timeout=60)  # ends when the worker does: it has the other end of the pipe too
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise
    assert parent.returncode == -signal.SIGKILL


def test_every_process_that_is_started_to_work_is_prepared():
    starts = ("ProcessPoolExecutor(", "mp_prefetch(")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    starting = {name for name, text in texts.items() if any(start in text for start in starts)}
    assert starting == {"pipeline", "pool", "shards", "spoken"}
    assert [name for name in starting if "prepare_worker" not in texts[name]] == []
