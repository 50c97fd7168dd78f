"""SIGTERM where there is nothing to save: at once, with 75, wherever the process is."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxds2.stop import STOPPED, StopSignal, leaving_on_sigterm

ROOT = Path(__file__).parents[1]
WHERE = {
    "python": "import time; time.sleep(600)",
    "a library that lets no handler run": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
}


def told_to_stop(process: subprocess.Popen[str], ready: str) -> str:
    """SIGTERM once it has said that it is ready; what it says of it."""
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == ready
        process.terminate()
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()


@pytest.mark.parametrize("where", WHERE)
def test_a_process_that_waits_leaves_with_75(where):
    program = (
        "from jaxds2.stop import leaving_on_sigterm\n"
        f"with leaving_on_sigterm('stopped'): print('in', flush=True); {WHERE[where]}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as waiting:
        said = told_to_stop(waiting, "in\n")
    assert (waiting.returncode, said) == (STOPPED, "SIGTERM: stopped\n")


def test_training_that_waits_for_another_process_leaves_with_75(tmp_path):
    program = (
        "import sys; from jaxds2 import hosts, cli; meet = hosts.meet\n"
        "def told(*args, **kwargs): print('meeting', flush=True); return meet(*args, **kwargs)\n"
        "hosts.meet = told\n"
        "sys.exit(cli.train(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "--config", str(ROOT / "configs/demo.py"), "--run", str(tmp_path / "run")]
    command += ["--coordinator", "localhost:1", "--processes", "2", "--process", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as waiting:
        told_to_stop(waiting, "meeting\n")
    assert waiting.returncode == STOPPED
    assert not (tmp_path / "run").exists()


def test_packing_that_is_stopped_leaves_with_75(tmp_path):
    program = (
        "import sys, time; from jaxds2 import cli; from jaxds2.data import shards\n"
        "shards.write_shards = lambda *args, **kwargs: print('packing', flush=True) or time.sleep(600)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    (tmp_path / "train.jsonl").touch()
    command = [sys.executable, "-c", program, "shard", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "shards")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as packing:
        said = told_to_stop(packing, "packing\n")
    assert (packing.returncode, said) == (STOPPED, "SIGTERM: stopped; the same command goes on\n")


def test_in_training_the_first_is_a_flag_and_the_second_is_obeyed():
    program = (
        "import signal, time; from jaxds2.stop import StopSignal, leaving_on_sigterm\n"
        "with leaving_on_sigterm('stopped'), StopSignal() as stop:\n"
        "    signal.raise_signal(signal.SIGTERM); print(stop(), flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as training:
        told_to_stop(training, "True\n")
    assert training.returncode == -signal.SIGTERM


def test_afterwards_it_is_what_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop()
    with leaving_on_sigterm("stopped"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
