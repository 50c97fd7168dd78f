"""The files for SLURM, Kubernetes and Docker, as far as they can be checked where none of them is."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from jaxds2.config import load_config
from jaxds2.hosts import JOIN_TIMEOUT, Cluster, find_cluster
from jaxds2.training.loop import STOPPED

ROOT = Path(__file__).parents[1]
BATCH = ROOT / "launch/slurm.sbatch"


def submit(tmp_path: Path, code: int, *arguments: str) -> tuple[int, list[list[str]]]:
    """The exit code of the batch script, and what it calls of a SLURM in which `srun` ends with `code`."""
    for name, status in (("srun", code), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> "$CALLS"\necho >> "$CALLS"\nexit {status}\n')
        program.chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_JOB_ID": "4007",
    }
    done = subprocess.run(["bash", str(BATCH), *arguments], env=environment, timeout=60, check=False)
    return done.returncode, [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("code", [0, 1, 2, STOPPED, 137])
def test_slurm_queues_again_what_was_stopped_and_nothing_else(tmp_path, code):
    status, calls = submit(tmp_path, code, "configs/an4.py")
    assert status == code
    assert [call[0] for call in calls] == ["srun", "scontrol"][: 2 if code == STOPPED else 1]
    assert calls[1:] == ([["scontrol", "requeue", "4007"]] if code == STOPPED else [])


def test_slurm_hands_over_the_config_and_the_overrides_as_they_are(tmp_path):
    _, (call,) = submit(tmp_path, 0, "my config.py", "training.steps=5", "data.characters=ab c")
    command = call.index("python")
    expected = ["python", "train.py", "--config", "my config.py", "training.steps=5", "data.characters=ab c"]
    assert call[command:] == expected


def test_slurm_lets_all_processes_save_before_any_is_killed(tmp_path):
    """A process that left with 75 must not make SLURM kill one that still saves; and there is time for that."""
    _, (call,) = submit(tmp_path, 0, "configs/an4.py")
    assert "--kill-on-bad-exit=0" in call
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", BATCH.read_text(), flags=re.MULTILINE))
    signal, _, seconds = options["signal"].partition("@")
    assert (signal, int(seconds) >= 60) == ("TERM", True)  # without `B:`, so that it reaches the processes
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"


@pytest.mark.parametrize(
    "command",
    [["shellcheck", str(BATCH)], ["kubernetes-validate", "--strict", str(ROOT / "launch/kubernetes.yaml")]],
    ids=lambda command: command[0],
)
def test_the_files_are_sound_by_programs_made_for_it(command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not on the PATH")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def kubernetes() -> tuple[dict, dict]:
    """The service and the job."""
    yaml = pytest.importorskip("yaml", reason="Kubernetes' file is read by PyYAML")
    service, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    assert (service["kind"], service["apiVersion"]) == ("Service", "v1")
    assert (job["kind"], job["apiVersion"]) == ("Job", "batch/v1")
    return service, job


def test_the_pods_find_each_other(kubernetes):
    service, job = kubernetes
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completionMode"] == "Indexed"
    # Pod 0 has the host name JOB-0, in the domain of a service without an address of its own, also before it is ready.
    name = job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] in (None, "None")
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    found = [find_cluster(environment | {"JOB_COMPLETION_INDEX": str(i)}) for i in range(spec["completions"])]
    address = f"{name}-0.{pod['subdomain']}:55221"
    assert found == [Cluster(address, spec["completions"], i) for i in range(spec["parallelism"])]


def test_a_pod_that_was_stopped_is_made_anew_and_not_counted(kubernetes):
    spec = kubernetes[1]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # a failure policy of pods wants it
    rules = spec["podFailurePolicy"]["rules"]
    codes = {rule["onExitCodes"]["values"][0]: rule for rule in rules if "onExitCodes" in rule}
    assert {code: rule["action"] for code, rule in codes.items()} == {STOPPED: "Ignore", 2: "FailJob"}
    for rule in codes.values():
        assert rule["onExitCodes"]["operator"] == "In"
        assert rule["onExitCodes"]["containerName"] == container["name"]
    disruption = {"type": "DisruptionTarget", "status": "True"}
    assert {"action": "Ignore", "onPodConditions": [disruption]} in rules
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_a_failure_in_all_pods_counts_once_however_many_they_are(kubernetes):
    """When one fails all leave, each with a code of its own; one fault would use up a limit over all of them."""
    spec = kubernetes[1]["spec"]
    assert spec["backoffLimitPerIndex"] >= 1
    assert "backoffLimit" not in spec
    assert spec["maxFailedIndexes"] == 0  # the others would wait for one that is not made anew


def test_the_pods_wait_for_one_that_comes_from_another_node(kubernetes):
    (container,) = kubernetes[1]["spec"]["template"]["spec"]["containers"]
    args = container["args"]
    assert all(isinstance(value, str) for value in args)
    assert int(args[args.index("--join-timeout") + 1]) > JOIN_TIMEOUT


def test_data_and_run_of_the_pods_lie_on_the_volume_that_all_see(kubernetes):
    pod = kubernetes[1]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert sorted(mounts.values()) == sorted(volume["name"] for volume in pod["volumes"])
    assert "/dev/shm" in mounts
    (home,) = [value for name, value in instructions() if name == "WORKDIR"]
    args = container["args"]
    config = load_config(ROOT / args[args.index("--config") + 1], [a for a in args if "=" in a])
    needed = [*config.data.train, config.data.dev, *config.data.test, args[args.index("--run") + 1]]
    (shared,) = [
        path
        for path, name in mounts.items()
        for volume in pod["volumes"]
        if volume["name"] == name and "persistentVolumeClaim" in volume
    ]
    assert all((Path(home) / path).is_relative_to(shared) for path in needed)


def test_every_gpu_of_the_pods_has_rows(kubernetes):
    (container,) = kubernetes[1]["spec"]["template"]["spec"]["containers"]
    args = container["args"]
    config = load_config(ROOT / args[args.index("--config") + 1], [a for a in args if "=" in a])
    gpus = kubernetes[1]["spec"]["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.data.rows_multiple % gpus == 0


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "launch/Dockerfile").read_text().replace("\\\n", " ")
    parts = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, value.strip()) for name, _, value in parts]


def found_in(pattern: str, text: str) -> str:
    found = re.fullmatch(pattern, text)
    assert found, text
    return found[1]


def test_the_image_has_a_python_that_the_project_takes_and_extras_that_it_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (base,) = [value for name, value in instructions() if name == "FROM"]
    minor = int(found_in(r"python:3\.(\d+)-slim", base))
    assert minor >= int(found_in(r">=3\.(\d+).*", project["requires-python"]))
    (install,) = [shlex.split(value)[-1] for name, value in instructions() if name == "RUN"]
    extras = found_in(r"\.\[(.+)\]", install).split(",")
    assert set(extras) == {"cuda13", "lm"} <= set(project["optional-dependencies"])


def test_the_image_holds_what_it_copies_and_signals_reach_python():
    sources = [source for name, value in instructions() if name == "COPY" for source in value.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert {"jaxds2", "configs", "train.py", "eval.py", "pyproject.toml"} <= set(sources)
    (entry,) = [ast.literal_eval(value) for name, value in instructions() if name == "ENTRYPOINT"]
    assert entry == ["python", "train.py"]  # a list: no shell between, which would keep SIGTERM
