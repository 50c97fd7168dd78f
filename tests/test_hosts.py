"""Several processes: how they find each other, what they must agree on, and that together they train the same model."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from exactness import differences, recorded
from toy_runs import config, metrics

from jaxds2 import cli, hosts
from jaxds2.config import Config, ConfigError, save_config
from jaxds2.data.manifest import read_manifest, write_manifest
from jaxds2.evaluation.logprobs import read_log_probs
from jaxds2.hosts import Cluster, HostsError, agree, find_cluster, meet
from jaxds2.training.checkpoint import Checkpoints
from jaxds2.training.loop import FINISHED, STOPPED, train

ROOT = Path(__file__).parents[1]
SLURM = {
    "SLURM_JOB_ID": "4007",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "gpu[003,007-009],x1",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "JAXDS2_PROCESSES": "4", "JAXDS2_COORDINATOR": "train-0.train:5000"}


@pytest.mark.parametrize(
    ("environment", "flags", "found"),
    [
        ({}, {}, None),
        (SLURM, {}, Cluster("gpu003:55228", 16, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "n12,n13"}, {}, Cluster("n12:55228", 16, 3)),
        (SLURM | {"SLURM_STEP_NODELIST": "a-b.c"}, {}, Cluster("a-b.c:55228", 16, 3)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (KUBERNETES, {}, Cluster("train-0.train:5000", 4, 2)),
        ({"JOB_COMPLETION_INDEX": "2"}, {}, None),  # a job whose pods train alone
        (SLURM, {"coordinator": "localhost:1", "processes": 2, "process": 0}, Cluster("localhost:1", 2, 0)),
    ],
)
def test_the_processes_of_a_run_are_found(environment, flags, found):
    assert find_cluster(environment, **flags) == found


@pytest.mark.parametrize(
    ("environment", "flags", "says"),
    [
        ({}, {"processes": 2}, "belong together"),
        ({}, {"coordinator": "localhost", "processes": 2, "process": 0}, "'localhost', expected HOST:PORT"),
        ({}, {"coordinator": "localhost:1", "processes": 2, "process": 2}, "process 2 of 2"),
        ({}, {"coordinator": "localhost:1", "processes": 2, "process": -1}, "process -1 of 2"),
        ({"JAXDS2_PROCESSES": "4"}, {}, "JAXDS2_COORDINATOR and JOB_COMPLETION_INDEX is not set"),
        (KUBERNETES | {"JAXDS2_PROCESSES": "four"}, {}, "process 2 of four"),
    ],
)
def test_processes_named_in_part_or_wrongly_are_one_clear_line(environment, flags, says):
    with pytest.raises(ConfigError, match=says):
        find_cluster(environment, **flags)


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def meeting(processes: int, coming: list[int], timeout_s: float) -> dict[int, str]:
    """What those that come say in the end; nothing where all have met."""
    address, said, peers = free_address(), {}, {}

    def come(process: int) -> None:
        try:
            peers[process] = meet(Cluster(address, processes, process), timeout_s=timeout_s)
            said[process] = ""
        except HostsError as e:
            said[process] = str(e)

    threads = [threading.Thread(target=come, args=(process,)) for process in coming]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for peer in [peer for ends in peers.values() for peer in ends.values()]:
        peer.close()
    return said


def test_processes_meet_in_whatever_order_they_come():
    assert meeting(4, [2, 1, 3, 0], 30) == dict.fromkeys(range(4), "")


def test_a_process_that_never_comes_is_named_by_all_others():
    said = meeting(4, [0, 2], 1)
    assert all("after 1 s process 1, 3 had not come to localhost:" in line for line in said.values())
    assert "process 0 had not come" in meeting(2, [1], 0.5)[1]


def test_processes_that_differ_say_in_what(monkeypatch):
    agree({"code": "1"})
    monkeypatch.setattr(hosts, "gather", lambda facts: [facts, facts, facts | {"training.seed": "1"}])
    agree_on = {"code": "1", "training.seed": "0"}
    with pytest.raises(HostsError, match=r"different things: training\.seed is 0 on process 0 and 1 on process 2$"):
        agree(agree_on)


def test_what_a_process_does_not_even_name_differs(monkeypatch):
    """As the fields of the config do where one has another version of the code."""
    monkeypatch.setattr(hosts, "gather", lambda facts: [facts, {"code": "2", "data.new": 5}])
    named = (
        r"code is 1 on process 0 and 2 on.*data\.old is 3 on process 0 and absent on.*data\.new is absent on.*and 5 on"
    )
    with pytest.raises(HostsError, match=named):
        agree({"code": "1", "data.old": "3"})


def test_two_processes_with_different_runs_both_say_so_in_one_line(tones, tmp_path):
    save_config(config(tones), tmp_path / "config.json")
    program = (
        "import sys; from pathlib import Path; from jaxds2.config import read_config\n"
        "from jaxds2.hosts import Cluster, HostsError, join; from jaxds2.training.loop import train\n"
        "address, process, config, run = sys.argv[1:]\n"
        "try:\n"
        "    with join(Cluster(address, 2, int(process)), timeout_s=120):\n"
        "        train(read_config(Path(config)), Path(run), progress=False)\n"
        "except HostsError as e:\n"
        "    print(e)\n"
    )
    command = [sys.executable, "-c", program, free_address()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path / "config.json"), str(tmp_path / f"run-{i}")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    runs = [str(tmp_path / f"run-{i}") for i in range(2)]
    expected = (
        f"the processes were started on different things: run is {runs[0]} on process 0 and {runs[1]} on process 1"
    )
    assert [out.splitlines()[-1] for out, _ in said] == [expected] * 2, said  # the first may be gloo's
    assert not any("Traceback" in err for _, err in said)
    assert not any(Path(run).exists() for run in runs)


@pytest.fixture(scope="module")
def one(tones, tmp_path_factory) -> Path:
    """Six steps on one device that never stopped, with an evaluation after the third and at the end."""
    run = tmp_path_factory.mktemp("one") / "run"
    run.mkdir()
    run_config = config(tones, steps=6, eval_every=3, devices=1, ema_decay=0.0)
    with recorded(run_config, run / "draws.jsonl"):
        assert train(run_config, run, progress=False) == FINISHED
    return run


def train_in_two(settings: Config, folder: Path, *options: str) -> tuple[Path, str]:
    """On two processes, of which the second gets SIGTERM: the run, and what they said."""
    save_config(settings, folder / "config.json")
    command = [sys.executable, "launch/local.py", "--processes", "2", "--cpu-devices", "1", "--"]
    command += [sys.executable, "tests/stopped_process.py", str(folder / "config.json"), str(folder / "run"), *options]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == STOPPED, done.stdout + done.stderr
    return folder / "run", done.stdout


@pytest.fixture(scope="module")
def two(tones, tmp_path_factory) -> tuple[Path, str]:
    """The same on two processes, its state split; stopped after the third step."""
    settings = config(tones, steps=6, eval_every=3, ema_decay=0.0, fsdp=2)
    return train_in_two(settings, tmp_path_factory.mktemp("two"))


def test_a_signal_to_one_process_stops_all_after_the_same_step(two):
    run, said = two
    with Checkpoints(run / "checkpoints") as checkpoints:
        last = checkpoints.last()
    assert last is not None
    assert 3 <= last < 6
    assert f"[0] stopped by a signal to another process at step {last} of 6" in said
    assert f"[1] left at step {last} with 75" in said


def test_a_signal_to_one_process_in_an_evaluation_stops_all_with_the_step_saved(tones, tmp_path):
    settings = config(tones, steps=6, eval_every=3)
    many = dataclasses.replace(settings.data, dev=str(tones / "train.jsonl"))  # batches, so that it stops among them
    run, said = train_in_two(dataclasses.replace(settings, data=many), tmp_path, "--evaluating")
    assert "[0] stopped by a signal to another process at step 3 of 6" in said
    assert "[1] left at step 3 with 75" in said
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert (checkpoints.last(), checkpoints.wer(3)) == (3, None)


def test_only_the_first_process_reports(two):
    run, said = two
    assert "[1] stopped by" not in said
    assert (run / "train.log").read_text().count("parameters; 40 utterances") == 1
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_two_processes_evaluate_every_utterance_once(one, two):
    assert metrics(two[0])[3]["dev/wer"] == metrics(one)[3]["dev/wer"]
    assert metrics(two[0])[3]["dev/loss"] == pytest.approx(metrics(one)[3]["dev/loss"], rel=1e-4)
    counts = [line.split(": dev ")[1] for line in (one / "train.log").read_text().splitlines() if "step 3: dev" in line]
    assert counts[0] in (two[0] / "train.log").read_text()


def test_two_processes_stopped_and_one_with_two_devices_resumed_are_one_that_never_stopped(tones, one, two):
    """The same utterances and draws in every step; the rest within float32 (in float64: benchmarks/exactness.py)."""
    run, _ = two
    run_config = config(tones, steps=6, eval_every=3, ema_decay=0.0)
    with recorded(run_config, run / "draws.jsonl"):
        assert train(run_config, run, progress=False) == FINISHED
    found = differences(one, run)
    assert found["steps"] == 6
    assert found["other draws"] == 0
    assert found["losses"] < 1e-4
    assert found["parameters"] < 1e-2  # Adam's first steps take the sign of gradients that are rounding alone


def test_two_accumulated_batches_a_step_are_the_batches_of_two_steps(tones, one, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run_config = config(tones, steps=3, accumulate=2, devices=1, ema_decay=0.0)
    with recorded(run_config, run / "draws.jsonl"):
        assert train(run_config, run, progress=False) == FINISHED
    assert (run / "draws.jsonl").read_text() == (one / "draws.jsonl").read_text()
    assert max(metrics(run)) == 3


def test_a_score_by_two_processes_is_that_of_one(tones, one, tmp_path):
    """An odd number of utterances, so that a row is filler; each once, and every file as one process writes it."""
    utterances = [*read_manifest(tones / "dev.jsonl"), read_manifest(tones / "train.jsonl")[0]]
    write_manifest(tmp_path / "odd.jsonl", utterances)
    arguments = ["--run", str(one), "--manifest", str(tmp_path / "odd.jsonl"), "--nbest", "1", "--save-logprobs"]
    assert cli.evaluate([*arguments, "--name", "alone"]) == 0
    command = [sys.executable, "launch/local.py", "--processes", "2", "--cpu-devices", "1", "--"]
    command += [sys.executable, "eval.py", *arguments, "--name", "together"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("%WER") == 1
    alone, together = one / "eval/alone", one / "eval/together"
    reports = [json.loads((folder / "report.json").read_text()) for folder in (alone, together)]
    for report in reports:
        assert report.pop("rtfx") > 0
    assert reports[1] == reports[0]
    assert reports[1]["utterances"] == 7
    assert reports[1]["words"] == sum(len(u.text.split()) for u in utterances)
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())
    for name in ("utterances.jsonl", "recogs.txt", "errs.txt", "hyp.trn", "hyp.ctm"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    kept = [read_log_probs(folder) for folder in (alone, together)]
    assert kept[1].ids == kept[0].ids
    for a, b in zip(kept[0].log_probs, kept[1].log_probs, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-3)
