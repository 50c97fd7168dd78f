"""A run cannot be broken by stopping it: kills, damage and full disks, at seeded random moments. `make stress`.

Every run that was killed or that ran out of disk is resumed by the same command and must end in the parameters of the
run that never stopped, to the bit; damage of a checkpoint must be named, and the checkpoint before it be used.
Prints a line for each case and a table; exit code 1 if any failed. Not a part of `make test`: it takes minutes.
"""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # it compiles for longer than it trains

from damage import delete, flip_a_bit, truncate  # noqa: E402
from tones import write_tones  # noqa: E402

from jaxds2.training.checkpoint import Checkpoints, DamagedError, digest  # noqa: E402

STEPS, SAVE_EVERY = 120, 10
SMALL_FILES = 1 << 16
"""Bytes: more than metrics.jsonl and the log hold, less than a checkpoint's arrays."""

CONFIG = """
from jaxds2.config import *

def get_config():
    return Config(
        data=DataConfig(
            train=({train!r},), characters="abc ", batch_seconds=8.0, num_buckets=1, rows_multiple=2, min_duration=0.0
        ),
        features=FeatureConfig(n_mels=20),
        model=ModelConfig(
            conv_channels=(8,), conv_kernels=((3, 3),), conv_strides=((2, 2),), width=64, hidden=32, layers=1
        ),
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup_steps=5),
        training=TrainingConfig(steps={steps}, checkpoint_every={every}, log_every=1, ema_decay=0.5),
    )
"""


class Failed(Exception):  # noqa: N818 - a case that failed, not an error
    """A law does not hold, or a kill did not land where it should."""


class Runs:
    """The folder that all of it happens in, and the command that trains in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._count = 0
        (folder / "tones").mkdir()
        write_tones(folder / "tones")
        text = CONFIG.format(train=str(folder / "tones" / "train.jsonl"), steps=STEPS, every=SAVE_EVERY)
        (folder / "config.py").write_text(text, encoding="utf-8")
        self.whole = folder / "whole"
        self.finish(self.whole)
        self.digest = self.digest_of(self.whole)

    def new(self) -> Path:
        """A folder for a run."""
        self._count += 1
        return self.folder / f"run{self._count}"

    @contextmanager
    def training(self, run: Path) -> Iterator[subprocess.Popen[str]]:
        """A process that trains; killed at the end of the block if it still does."""
        command = [sys.executable, "train.py", "--config", str(self.folder / "config.py"), "--run", str(run)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def finish(self, run: Path) -> None:
        """Train to the end."""
        with self.training(run) as process:
            errors = process.communicate()[1]
        if process.returncode:
            raise Failed(f"exit code {process.returncode}: {errors.strip().splitlines()[-1:]}")

    def resume(self, run: Path) -> str:
        """Train to the end; the digest must be that of the run that never stopped. Says where it went on."""
        with Checkpoints(run / "checkpoints") as checkpoints:
            step = checkpoints.last() or 0
            if step:
                checkpoints.verify(step)
        self.finish(run)
        if self.digest_of(run) != self.digest:
            raise Failed(f"resumed at step {step}, it ended in other parameters")
        return f"resumed at step {step}, same digest"

    def digest_of(self, run: Path) -> str:
        with Checkpoints(run / "checkpoints") as checkpoints:
            return digest(*checkpoints.restore_weights(STEPS))


def steps_done(run: Path) -> int:
    """Lines in metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        if process.poll() is not None:
            raise Failed(f"it ended, with {process.returncode}, before the moment came")
        time.sleep(0.0005)


def kill_in_training(runs: Runs, rng: random.Random) -> str:
    """SIGKILL between two steps or in one."""
    run, moment = runs.new(), rng.randrange(1, STEPS - SAVE_EVERY)
    with runs.training(run) as process:
        wait_for(lambda: steps_done(run) >= moment, process)
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = steps_done(run)
    if process.returncode != -signal.SIGKILL or not moment <= done < STEPS:
        raise Failed(f"the kill did not land in training: exit code {process.returncode}, {done} steps done")
    return f"after step {done}, " + runs.resume(run)


def kill_in_save(runs: Runs, rng: random.Random) -> str:
    """SIGKILL while a checkpoint is being written: it has no name yet."""
    step = SAVE_EVERY * rng.randrange(1, STEPS // SAVE_EVERY)
    longest = 0.05
    for _ in range(8):
        run = runs.new()
        partial = run / "checkpoints" / f"{step}.partial"
        with runs.training(run) as process:
            wait_for(partial.exists, process)
            time.sleep(rng.uniform(0, longest))
            process.send_signal(signal.SIGKILL)
            process.wait()
        if partial.exists() and not (run / "checkpoints" / str(step)).exists():
            written = sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
            return f"of step {step}, {written} bytes written, " + runs.resume(run)
        longest /= 2  # the save had ended before
    raise Failed(f"no kill landed in the save of step {step}")


def fill_the_disk(runs: Runs, rng: random.Random) -> str:
    """From some step on no file can be longer than SMALL_FILES: the next save fails, in one line."""
    run, moment = runs.new(), rng.randrange(1, STEPS - 2 * SAVE_EVERY)
    with runs.training(run) as process:
        wait_for(lambda: steps_done(run) >= moment, process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SMALL_FILES, SMALL_FILES))
        errors = process.communicate()[1]
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    if process.returncode != 1 or len(said) != 1 or "Traceback" in errors:
        raise Failed(f"exit code {process.returncode}: {errors.strip().splitlines()[-3:]}")
    if not (found := re.search(r"step (\d+) could not be saved \(File too large\)", said[0])):
        raise Failed(f"it was not the save that failed: {said[0]}")
    return f"in the save of step {found[1]}, " + runs.resume(run)


def damage_with(damage: Callable[[np.random.Generator, Path], str]) -> Callable[[Runs, random.Random], str]:
    """Damage the newest checkpoint of the run that never stopped, in a copy."""

    def case(runs: Runs, rng: random.Random) -> str:
        copy = runs.new()
        shutil.copytree(runs.whole / "checkpoints", copy)
        name = damage(np.random.default_rng(rng.randrange(2**32)), copy / str(STEPS))
        with Checkpoints(copy) as checkpoints:
            try:
                checkpoints.restore_weights(STEPS)
            except DamagedError as e:
                if f"({name} " not in str(e):
                    raise Failed(f"{name} was damaged, but it says: {e}") from None
            else:
                raise Failed(f"{name} was damaged, and it was restored in silence")
            if not checkpoints.set_aside_damaged() or checkpoints.last() != STEPS - SAVE_EVERY:
                raise Failed("the checkpoint before it is not the one that is used")
            checkpoints.restore_weights(STEPS - SAVE_EVERY)
        shutil.rmtree(copy)
        return f"{name}: named, step {STEPS - SAVE_EVERY} used"

    return case


CASES: dict[str, tuple[int, Callable[[Runs, random.Random], str]]] = {
    "SIGKILL in training": (20, kill_in_training),
    "SIGKILL in a save": (20, kill_in_save),
    "bit flipped": (50, damage_with(flip_a_bit)),
    "file cut short": (20, damage_with(truncate)),
    "file deleted": (20, damage_with(delete)),
    "disk full in a save": (5, fill_the_disk),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, damage and fill up training runs; every one must recover.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each kind (default: 1, all)")
    arguments = parser.parse_args()
    begin, held = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        runs = Runs(Path(folder))
        print(f"the run that never stopped: {STEPS} steps, digest {runs.digest[:12]}", flush=True)
        for kind, (most, case) in CASES.items():
            count = max(1, round(arguments.share * most))
            held[kind] = [0, count]
            for i in range(count):
                try:
                    outcome = case(runs, random.Random(f"{arguments.seed} {kind} {i}"))
                    held[kind][0] += 1
                except Failed as e:
                    outcome = f"FAILED: {e}"
                print(f"{kind} {i + 1} of {count}: {outcome}", flush=True)
    print(f"\n{'':<22}{'cases':>7}{'held':>7}")
    for kind, (good, count) in held.items():
        print(f"{kind:<22}{count:>7}{good:>7}")
    print(f"seed {arguments.seed}, {(time.perf_counter() - begin) / 60:.1f} minutes")
    return 0 if all(good == count for good, count in held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
