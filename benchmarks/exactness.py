"""Is training on several processes and devices the same training? Runs it each way and compares, here, on CPUs.

    jaxds2 prepare demo --out data/demo
    python benchmarks/exactness.py --out runs/exactness

One process with one device against two with two each: the utterances and the random draws of every step, the losses in
float32, the parameters at the end in float64. Then two processes, of which one gets SIGTERM, and one with four devices
that resumes, against the one that never stopped. Exit code 1 where a bound is broken.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BOUND_FLOAT64, BOUND_FLOAT32, FIRST = 1e-8, 1e-4, 50
"""Relative differences of the parameters at the end, by their global norm, and of each of the first losses."""

SIGNALLED = "signalled"
"""File of a run that was stopped: when SIGTERM came, in seconds since 1970."""


@contextlib.contextmanager
def recorded(config: Any, path: Path) -> Iterator[None]:
    """Inside, training writes to `path` a line for each batch: the utterance in each row and a checksum of its draws.

    The draws are made anew from the batch as it lies on the devices: the masks of SpecAugment and of dropout.
    """
    import jax
    import jax.numpy as jnp

    from jaxds2.augment import spec_augment, utterance_keys
    from jaxds2.features import num_frames
    from jaxds2.model.deepspeech2 import Dropout
    from jaxds2.training import loop, step

    def checksum(x: Any) -> Any:
        """(B, ...) to (B,) uint32, which tells where the zeros are."""
        zeros = (x == 0).reshape(x.shape[0], -1).astype(jnp.uint32)
        weights = jnp.arange(zeros.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
        return jnp.sum(zeros * weights[None], axis=1, dtype=jnp.uint32)

    def draws(batch: Any) -> Any:
        keys_B = utterance_keys(config.training.seed, batch.epoch, batch.index_B)
        rows, samples = batch.audio_BS.shape
        lengths_B = num_frames(batch.audio_lengths_B, config.features)
        ones_BTF = jnp.ones((rows, num_frames(samples, config.features), config.features.n_mels))
        masks_BTF = spec_augment(ones_BTF, lengths_B, keys_B, config.augment)
        dropout_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step._DROPOUT)
        dropout = Dropout.draw(
            config.model.dropout, dropout_keys_B, places=1 + config.model.layers, width=config.model.width
        )
        scales_PBD = dropout.scales_PBD if dropout.scales_PBD is not None else jnp.ones((1, rows, 1))
        return batch.index_B, checksum(masks_BTF), checksum(jnp.swapaxes(scales_PBD, 0, 1))

    place = loop.place
    compiled: dict[Any, Any] = {}
    with path.open("a", encoding="utf-8") as lines:

        def place_and_record(batch: Any, mesh: Any) -> Any:
            placed = place(batch, mesh)
            if mesh not in compiled:
                compiled[mesh] = jax.jit(draws, out_shardings=jax.NamedSharding(mesh, jax.P()))
            with jax.transfer_guard("allow"):
                found = [x.tolist() for x in jax.device_get(compiled[mesh](placed))]
            lines.write(json.dumps([int(batch.epoch), *found]) + "\n")
            return placed

        loop.place = place_and_record
        try:
            yield
        finally:
            loop.place = place


@contextlib.contextmanager
def stopped_at(at: int, *, process: int, note: Path | None = None) -> Iterator[None]:
    """Inside, training's process of this number gets SIGTERM when it has reported this step; `note` gets the time."""
    import jax

    from jaxds2.training.monitor import Monitor

    advance = Monitor.advance

    def advance_and_stop(self: Monitor, step: int, **values: float) -> None:
        advance(self, step, **values)
        if step == at and jax.process_index() == process:
            if note is not None:
                note.write_text(str(time.time()), encoding="utf-8")
            signal.raise_signal(signal.SIGTERM)

    Monitor.advance = advance_and_stop
    try:
        yield
    finally:
        Monitor.advance = advance


def in_float64() -> None:
    """From here on this process computes in float64 where the code says float32. For this comparison only."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
    from jaxds2.training import loop

    loop.compute_dtype = lambda config: jnp.dtype("float64")


def differences(a: Path, b: Path) -> dict[str, float]:
    """How far two runs are apart: steps with other utterances or draws, losses, parameters at the end."""
    import numpy as np

    from jaxds2.training.checkpoint import Checkpoints

    drawn = [(run / "draws.jsonl").read_text(encoding="utf-8").splitlines() for run in (a, b)]
    losses, params = [], []
    for run in (a, b):
        lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses.append({line["step"]: line["train/loss"] for line in lines if "train/loss" in line})
        with Checkpoints(run / "checkpoints") as checkpoints:
            params.append(checkpoints.restore_weights(checkpoints.resolve("last"))[0])
    first = sorted(losses[0])[:FIRST]
    squares = [sum(float(np.sum(np.square(x, dtype=np.float64))) for x in tree.values()) for tree in params]
    apart = sum(float(np.sum(np.square(params[0][n] - params[1][n], dtype=np.float64))) for n in params[0])
    return {
        "steps": len(drawn[0]),
        "other draws": sum(x != y for x, y in zip(*drawn, strict=False)) + abs(len(drawn[0]) - len(drawn[1])),
        "losses": max(abs(losses[1].get(s, float("inf")) / losses[0][s] - 1) for s in first),
        "parameters": (apart / squares[0]) ** 0.5,
    }


def work(arguments: argparse.Namespace) -> int:
    """One process of one run."""
    from jaxds2.config import load_config
    from jaxds2.hosts import Cluster, join

    with join(Cluster(arguments.coordinator, arguments.processes, arguments.process)):
        if arguments.float64:
            in_float64()
        from jaxds2.training.loop import train

        config = load_config(arguments.config, arguments.overrides)
        arguments.run.mkdir(parents=True, exist_ok=True)
        path = arguments.run / "draws.jsonl" if arguments.process == 0 else Path(os.devnull)
        note, last = arguments.run / SIGNALLED, arguments.processes - 1
        with recorded(config, path), stopped_at(arguments.stop_at, process=last, note=note):
            return train(config, arguments.run, progress=False)


def launch(arguments: argparse.Namespace, name: str, processes: int, devices: int, *extra: str) -> Path:
    """A run of so many processes, to its end or to its stop."""
    run = arguments.out / name
    command = [sys.executable, str(ROOT / "launch/local.py"), "--processes", str(processes)]
    command += ["--cpu-devices", str(devices), "--", sys.executable, __file__, "--config", str(arguments.config)]
    command += [*extra, "--run", str(run), f"training.steps={arguments.steps}", "training.log_every=1"]
    command += ["data.dev=None", *arguments.overrides]
    print(f"{name}: {processes} process(es) with {devices} device(s) {' '.join(extra)}", flush=True)
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    expected = 75 if "--stop-at" in extra else 0
    if done.returncode != expected:
        raise SystemExit(f"{done.stdout}\n{name}: exit code {done.returncode}, expected {expected}")
    if expected:
        took = time.time() - float((run / SIGNALLED).read_text(encoding="utf-8"))
        print(f"{name}: all had saved and left {took:.1f} s after SIGTERM to one of them")
    return run


def main() -> int:
    """Run and compare, or be one process of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/demo.py")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="an empty folder for the runs")
    for name, kind in (("--run", Path), ("--coordinator", str), ("--processes", int), ("--process", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--stop-at", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--float64", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args()
    if arguments.run is not None:
        return work(arguments)
    if arguments.out is None or (arguments.out.exists() and any(arguments.out.iterdir())):
        parser.error("--out DIR: give an empty folder")
    one32 = launch(arguments, "float32-1x1", 1, 1)
    two32 = launch(arguments, "float32-2x2", 2, 2)
    one64 = launch(arguments, "float64-1x1", 1, 1, "--float64")
    two64 = launch(arguments, "float64-2x2", 2, 2, "--float64")
    launch(arguments, "float64-resumed", 2, 2, "--float64", "--stop-at", str(arguments.steps // 2))
    resumed = launch(arguments, "float64-resumed", 1, 4, "--float64")
    good = True
    for name, a, b, key, bound in (
        ("1x1 against 2x2, float32", one32, two32, "losses", BOUND_FLOAT32),
        ("1x1 against 2x2, float64", one64, two64, "parameters", BOUND_FLOAT64),
        ("1x1 against 2x2 stopped and 1x4 resumed, float64", one64, resumed, "parameters", BOUND_FLOAT64),
    ):
        found = differences(a, b)
        good &= found["other draws"] == 0 and found[key] <= bound
        print(
            f"{name}: {found['steps']} steps, {found['other draws']} with other utterances or draws; largest "
            f"relative difference of the first {FIRST} losses {found['losses']:.1e}, of the parameters "
            f"{found['parameters']:.1e} "
            f"(bound: {key} {bound:g})"
        )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
