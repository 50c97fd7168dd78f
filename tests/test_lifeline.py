"""The lines between the processes of a run: who has failed, and why, and that all end."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxds2.lifeline import FAILED, LOST, Lifeline
from jaxds2.training.loop import STOPPED

ROOT = Path(__file__).parents[1]


def lines(processes: int) -> list[Lifeline]:
    """The ends of each, of connections that are open."""
    peers: list[dict[int, socket.socket]] = [{} for _ in range(processes)]
    with socket.create_server(("localhost", 0)) as server:
        for number in range(1, processes):
            peers[number][0] = socket.create_connection(server.getsockname())
            peers[0][number] = server.accept()[0]
    return [Lifeline(number, ends, grace_s=60) for number, ends in enumerate(peers)]


def test_all_hear_which_process_failed_and_why():
    zero, one, two = lines(3)
    with zero, one, two:
        assert zero.failure() is None
        one.tell("the disk\nis gone")
        assert zero.failure(30) == two.failure(30) == "process 1 failed: the disk is gone"
        assert zero.code == two.code == FAILED == 1


def test_a_process_that_is_gone_without_a_word_is_named_and_the_others_may_start_again():
    zero, one, two = lines(3)
    with zero, one:
        with two:
            pass
        for end in (zero, one):
            assert (end.failure(30) or "").startswith("process 2 failed: killed, out of memory, or")
            assert end.code == LOST == STOPPED


def test_an_error_stays_one_though_those_that_leave_are_gone_too():
    zero, one, two = lines(3)
    with zero, two:
        with one:
            one.tell("the disk is gone")
        assert two.failure(30)
        assert zero.failure(30)
        two.__exit__()
        assert zero.code == two.code == FAILED


def test_nobody_is_done_before_all_are():
    ends, found = lines(3), {}
    with ends[0], ends[1], ends[2]:
        threads = [threading.Thread(target=lambda n=n: found.update({n: ends[n].finish()})) for n in (0, 2)]
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert not found
        assert ends[1].finish() is None
        for thread in threads:
            thread.join()
        assert found == {0: None, 2: None}


def test_one_that_does_not_come_to_its_end_is_named_to_all_and_nobody_waits_for_ever():
    zero, one, two = lines(3)
    with zero, one, two:
        found: dict[int, str | None] = {}
        done = threading.Thread(target=lambda: found.update({2: two.finish(latest_s=30)}))
        done.start()
        says = "process 1 failed: it has not come to its end 0.2 s after process 0 did"
        assert zero.finish(latest_s=0.2) == one.failure(30) == says
        done.join()
        assert found == {2: says}


def test_process_0_that_does_not_come_to_its_end_is_named_too():
    zero, one = lines(2)
    with zero, one:
        assert one.finish(latest_s=0.1) == "process 0 failed: it has not come to its end 0.2 s after process 1 did"
        assert zero.failure(30) == "process 0 failed: it has not come to its end 0.2 s after process 1 did"


def test_a_failure_is_heard_by_those_that_are_at_their_end():
    zero, one = lines(2)
    with zero, one:
        heard = threading.Thread(target=zero.tell, args=("late",))
        heard.start()
        assert one.finish() == "process 0 failed: late"
        one.__exit__()
        heard.join()


@pytest.mark.parametrize(
    ("other", "code", "why"),
    [("b.sendall(b'failed 1 no disk\\n')", FAILED, "no disk"), ("b.close()", LOST, "killed, out of memory")],
)
def test_a_process_that_still_waits_after_the_grace_is_ended(other, code, why):
    program = (
        "import socket, time; from jaxds2.lifeline import Lifeline\n"
        "s = socket.create_server(('localhost', 0)); a = socket.create_connection(s.getsockname()); b = s.accept()[0]\n"
    )
    program += f"with Lifeline(0, {{1: a}}, grace_s=0.1): {other}; time.sleep(9999)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert done.stderr.startswith(f"error: process 1 failed: {why}")
    assert done.stderr.endswith("; process 0 cannot go on alone\n")


@pytest.mark.parametrize(
    ("how", "fails", "codes", "says"),
    [
        ("error", 1, [1, 1], "[0] error: process 1 failed: the disk of this host is gone; process 0 cannot go on"),
        ("error", 0, [1, 1], "[1] error: process 0 failed: the disk of this host is gone; process 1 cannot go on"),
        ("kill", 1, [STOPPED, 137], "[0] error: process 1 failed: killed, out of memory, or its host or network is"),
    ],
)
def test_when_one_process_fails_the_others_end_with_a_line_that_names_it(how, fails, codes, says):
    leave = '"$@"; code=$?; echo "left with $code"; exit $code'
    command = [sys.executable, "launch/local.py", "--processes", "2", "--cpu-devices", "1", "--grace", "100", "--"]
    done = subprocess.run(
        [*command, "bash", "-c", leave, "bash", sys.executable, "tests/failing_process.py", how, str(fails)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=90,  # the launcher would end the others after 100
        check=False,
    )
    assert [f"[{i}] left with {code}" in done.stdout for i, code in enumerate(codes)] == [True, True], done.stdout
    assert done.returncode == codes[fails]
    assert says in done.stdout
    assert done.stdout.count("error: ") == (1 if how == "kill" else 2)
    assert "Traceback" not in done.stdout
