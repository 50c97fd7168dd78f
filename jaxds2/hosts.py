"""Several processes, one or more on each host, that train one model: who they are, what they agree on, when they stop.

With one process everything here answers at once and nothing is sent.
"""

import atexit
import contextlib
import hashlib
import os
import pickle
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxds2
from jaxds2.config import ConfigError
from jaxds2.lifeline import GRACE, Lifeline

JOIN_TIMEOUT = 300
"""Seconds that processes wait for each other at the start."""
PORT = 55_221
"""Where process 0 listens under SLURM, plus the last digits of the job's number."""


class HostsError(ValueError):
    """Processes that did not find each other, or that were started on different things."""


@dataclass(frozen=True)
class Cluster:
    """One process among those of a run."""

    coordinator: str
    """HOST:PORT where process 0 listens."""
    processes: int
    process: int
    """This one, from 0."""


def find_cluster(
    environment: Mapping[str, str],
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Cluster | None:
    """The processes that this one belongs to; None: it is alone.

    They are named by the three arguments, all or none; or by the variables of a Kubernetes Indexed Job,
    JOB_COMPLETION_INDEX with JAXDS2_COORDINATOR and JAXDS2_PROCESSES (launch/kubernetes.yaml sets them); or by those of
    a SLURM step of more than one task (`srun`).

    Raises:
      ConfigError: they are named in part, or contradict each other.
    """
    given = (coordinator, processes, process)
    if given != (None, None, None):
        if coordinator is None or processes is None or process is None:
            raise ConfigError("--coordinator HOST:PORT, --processes N and --process I belong together; give all three")
        return _checked("the command line", coordinator, processes, process)
    if "JAXDS2_PROCESSES" in environment or "JAXDS2_COORDINATOR" in environment:
        names = ("JAXDS2_COORDINATOR", "JAXDS2_PROCESSES", "JOB_COMPLETION_INDEX")
        if absent := [name for name in names if name not in environment]:
            raise ConfigError(f"{', '.join(names)} belong together; {' and '.join(absent)} is not set")
        return _checked("JAXDS2_... and JOB_COMPLETION_INDEX", *(environment[name] for name in names))
    if "SLURM_STEP_NODELIST" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        # The first host of node001, node001,host2, node[001-003] or node[001,007-009],host2.
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
        host = "".join(part or "" for part in first.groups()) if first else ""
        port = PORT + int(environment.get("SLURM_JOB_ID", "0")) % 1000
        return _checked("SLURM", f"{host}:{port}", environment["SLURM_NTASKS"], environment.get("SLURM_PROCID", ""))
    return None


def _checked(source: str, coordinator: str, processes: str | int, process: str | int) -> Cluster:
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"{source}: coordinator {coordinator!r}, expected HOST:PORT of process 0")
    if not (str(processes).isdecimal() and str(process).isdecimal() and int(process) < int(processes)):
        raise ConfigError(
            f"{source}: process {process} of {processes}; expected a number from 0 to one less than theirs"
        )
    return Cluster(coordinator, int(processes), int(process))


@contextlib.contextmanager
def join(cluster: Cluster, *, timeout_s: float = JOIN_TIMEOUT) -> Iterator[None]:
    """Find the other processes; to be entered before anything asks JAX for a device.

    Inside, all end together: the block is left when all have come to its end, and an error in one ends all the others
    within seconds, each with one line that says which failed and why. They leave with 1, but with 75,
    stopped and resumable, where that one is gone without a word.

    Raises:
      HostsError: some had not come when the time was over, and it names them; or another process failed.
    """
    # Where one is missing, jax.distributed waits beyond its timeout, or ends the process with a stack trace.
    with Lifeline(cluster.process, meet(cluster, timeout_s=timeout_s)) as lifeline:
        try:
            jax.config.update("jax_enable_preemption_service", False)  # training has signal handlers of its own
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process,
                cluster_detection_method="deactivate",
                shutdown_timeout_seconds=60,
            )
            yield
            failure = lifeline.finish()
        except BaseException as e:
            ours = isinstance(e, OSError) or type(e).__module__.startswith("jaxds2.")
            # When another is gone, a sum over the devices may fail here, with a trace of JAX's about a connection.
            failure = lifeline.failure(GRACE) if isinstance(e, RuntimeError | ValueError) and not ours else None
            lifeline.tell(failure or (str(e) if ours else f"{type(e).__name__}: {e}"))
            code = 2 if isinstance(e, ConfigError) else 130 if isinstance(e, KeyboardInterrupt) else 1
            _leave_without_waiting(code)
            if failure is None:
                raise
        if failure is not None:
            _leave_without_waiting(lifeline.code)
            raise HostsError(f"{failure}; process {cluster.process} cannot go on alone")


def _leave_without_waiting(code: int) -> None:
    """At its exit jax.distributed waits for the others, and ends the process with a stack trace where one is gone."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the last that is registered is called first


def meet(cluster: Cluster, *, timeout_s: float) -> dict[int, socket.socket]:
    """Wait until all processes have come to the coordinator's address; they tell process 0 their numbers.

    Returns:
      The open connections: of process 0 one to each other by its number, of another the one to process 0.

    Raises:
      HostsError: some had not come when the time was over; it names them.
    """
    deadline = time.monotonic() + timeout_s
    host, _, port = cluster.coordinator.rpartition(":")
    absent, peers = (
        _wait_for_others(cluster, int(port), deadline)
        if cluster.process == 0
        else _report(cluster, host, port, deadline)
    )
    if absent:
        raise HostsError(
            f"process {cluster.process} of {cluster.processes}: after {timeout_s:g} s process {', '.join(absent)} had "
            f"not come to {cluster.coordinator}; look at its output, and whether that address is reached from there"
        )
    return peers


def _wait_for_others(cluster: Cluster, port: int, deadline: float) -> tuple[list[str], dict[int, socket.socket]]:
    """Process 0: the numbers of those that do not come, and the connections of those that do, if all do."""
    come: dict[str, socket.socket] = {}
    wanted = [str(number) for number in range(1, cluster.processes)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port), backlog=cluster.processes))
        while (absent := [number for number in wanted if number not in come]) and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # nobody came, or somebody else who says nothing
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                caller = stack.enter_context(server.accept()[0])
                caller.settimeout(5)
                come[caller.recv(64).decode(errors="replace").strip()] = caller
        server.close()  # whoever hears that all are there finds jax.distributed at this address
        for caller in come.values():
            with contextlib.suppress(OSError):  # it gave up already
                caller.sendall(f"absent {' '.join(absent)}\n".encode())
        if absent:
            return absent, {}
        # Kept: those of the others. What strangers left open is closed.
        return [], {int(number): come[number].dup() for number in wanted}


def _report(cluster: Cluster, host: str, port: str, deadline: float) -> tuple[list[str], dict[int, socket.socket]]:
    """Another process: the numbers of those that do not come, by the word of process 0; or the connection to it."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=left) as caller:
            caller.sendall(f"{cluster.process}\n".encode())
            caller.settimeout(left + 5)  # process 0 answers when its own time is over
            answer = b""
            while not answer.endswith(b"\n") and (more := caller.recv(1)):  # what follows is the lifeline's
                answer += more
            if answer.startswith(b"absent"):
                absent = answer.decode().split()[1:]
                return absent, {} if absent else {0: caller.dup()}
        time.sleep(0.2)
    return ["0"], {}


def gather(record: Any) -> list[Any]:
    """What every process has to say, in their order; all call this. `record` is anything that can be pickled."""
    if jax.process_count() == 1:
        return [record]
    own = np.frombuffer(pickle.dumps(record), np.uint8)
    sizes_P = multihost_utils.process_allgather(np.array([own.size]))[:, 0]
    padded = np.zeros(int(sizes_P.max()), np.uint8)
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes_P.tolist(), strict=True)]


def agree(facts: Mapping[str, Any]) -> None:
    """Make sure that all processes say the same; all of them call this. What one does not name at all differs too.

    Raises:
      HostsError: in all of them; it says in what they differ.
    """
    first, *others = gather(dict(facts))
    differing = [
        f"{name} is {first.get(name, 'absent')} on process 0 and {other.get(name, 'absent')} on process {i}"
        for i, other in enumerate(others, start=1)
        for name in dict.fromkeys((*first, *other))
        if name not in first or name not in other or other[name] != first[name]
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise HostsError(f"the processes were started on different things: {'; '.join(differing[:3])}{more}")


def code_version() -> str:
    """The version of this package, and a checksum of its source."""
    sha = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{jaxds2.__version__} ({sha.hexdigest()[:12]})"


class SharedStop:
    """Whether any process was asked to stop: in the same call the same answer in all of them, which all call it alike.

    The flags are summed on the devices, behind the step that is running, and a call returns the sum of the call before:
    so nobody waits, and all stop after the same step, one later than the one that was asked.
    """

    def __init__(self, asked: Callable[[], bool]):
        """Start with `asked`, which says whether this process was."""
        self._asked = asked
        self._stopping = False
        self._before: jax.Array | None = None
        if jax.process_count() > 1:
            devices = [jax.local_devices(process_index=p)[0] for p in range(jax.process_count())]
            mesh = Mesh(np.array(devices), ("process",))
            self._flags = NamedSharding(mesh, PartitionSpec("process"))
            self._sum = jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self) -> bool:
        """Whether to stop."""
        if jax.process_count() == 1:
            return self._asked()
        if not self._stopping:
            flag = np.array([self._asked()], np.int32)
            before, self._before = self._before, self._sum(jax.make_array_from_process_local_data(self._flags, flag))
            self._stopping = before is not None and bool(jax.device_get(before))
        return self._stopping
