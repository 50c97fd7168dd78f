"""A program: one process of several that train, CONFIG.json RUN --coordinator ...; the last gets SIGTERM at step 3, or
with --evaluating in its first evaluation.
"""

import argparse
import contextlib
import signal
from pathlib import Path

import jax
from exactness import recorded, stopped_at

from jaxds2.config import read_config
from jaxds2.data import placement
from jaxds2.hosts import Cluster, join
from jaxds2.training import loop
from jaxds2.training.checkpoint import Checkpoints
from jaxds2.training.loop import train


@contextlib.contextmanager
def stopped_in_evaluation(*, process: int):
    """Inside, this process of training gets SIGTERM as an evaluation begins."""
    evaluate = loop.evaluate

    def stopped(*args, **kwargs):
        if jax.process_index() == process:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    loop.evaluate = stopped
    try:
        yield
    finally:
        loop.evaluate = evaluate


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--evaluating", action="store_true")
    arguments = parser.parse_args()
    last = arguments.processes - 1
    stopped = stopped_in_evaluation(process=last) if arguments.evaluating else stopped_at(3, process=last)
    with join(Cluster(arguments.coordinator, arguments.processes, arguments.process), timeout_s=120):
        config = read_config(arguments.config)
        arguments.run.mkdir(exist_ok=True)
        placement.MIN_SPLIT = 64  # so that even this model is split
        draws = arguments.run / ("draws.jsonl" if arguments.process == 0 else "draws-of-another.jsonl")
        with recorded(config, draws), stopped:
            code = train(config, arguments.run, progress=False)
        with Checkpoints(arguments.run / "checkpoints") as checkpoints:
            print(f"left at step {checkpoints.last()} with {code}", flush=True)
    raise SystemExit(code)
