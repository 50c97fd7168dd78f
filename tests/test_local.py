"""The launcher of several processes on one machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch/local.py"
NUMBER = "import sys; i = int(sys.argv[sys.argv.index('--process') + 1]); "


def launched(program: str, *options: str) -> list[str]:
    return [sys.executable, str(LAUNCH), "--processes", "2", *options, "--", sys.executable, "-uc", program]


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 * i)", 75),
        ("sys.exit(3 if i else 75)", 3),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_the_exit_code_is_that_of_the_processes(program, code):
    assert subprocess.run(launched(NUMBER + program), check=False).returncode == code


def test_lines_carry_the_number_of_their_process():
    done = subprocess.run(launched(NUMBER + "print('I am', i)"), capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == ["[0] I am 0", "[1] I am 1"]


def test_when_one_fails_the_others_are_ended(tmp_path):
    program = NUMBER + (
        f"import os, time; open(r'{tmp_path}/' + str(os.getpid()), 'w'); i and sys.exit(4); time.sleep(9999)"
    )
    assert subprocess.run(launched(program, "--grace", "0.5"), check=False, timeout=120).returncode == 4
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


@pytest.mark.parametrize("before", [[], [signal.SIGUSR1]])
def test_a_signal_that_stops_reaches_all_processes_and_another_ends_none(tmp_path, before):
    program = NUMBER + (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        f"open(r'{tmp_path}/' + str(i), 'w'); time.sleep(99)"
    )
    child = subprocess.Popen(launched(program))
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    for number in [*before, signal.SIGTERM]:
        child.send_signal(number)
    assert child.wait() == 75
