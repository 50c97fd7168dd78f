"""A program: one process of several that wait for each other, HOW I --coordinator ...; process I fails instead."""

import argparse
import os
import signal

from jaxds2.cli import run
from jaxds2.data.pipeline import PipelineError
from jaxds2.hosts import Cluster, gather, join


def work(arguments: argparse.Namespace) -> int:
    with join(Cluster(arguments.coordinator, arguments.processes, arguments.process), timeout_s=120):
        gather("here")
        if arguments.process == arguments.fails:
            if arguments.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if arguments.how == "fault":
                raise TypeError("a fault of ours")
            if arguments.how == "error":
                raise PipelineError("the disk of this host is gone")
        gather("here still")
        return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("how")
    parser.add_argument("fails", type=int)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.set_defaults(call=work, usage="")
    raise SystemExit(run(parser, None))
