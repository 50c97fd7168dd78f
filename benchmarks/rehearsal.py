"""The whole way with many small files: prepare, shard, train on two processes, stop, resume, score.

    jaxds2 prepare demo --out data/demo
    python benchmarks/rehearsal.py --demo data/demo --out runs/rehearsal

Recordings of the demo corpus are copied, under other ids, into LibriSpeech's layout. Then come the commands that a user
would type, and what has to hold: nothing is lost on the way, a run that is stopped resumes on another number of
processes, shards give the same weights as files to the bit, two processes count what one counts. Exit code 1 where it
does not.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
JAXDS2 = (PYTHON, "-m", "jaxds2")
PER_CHAPTER = 50
SPLITS = {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"}


class Rehearsal:
    """Commands, one after the other, and the seconds that each takes."""

    def __init__(self, out: Path):
        self.out = out
        self.seconds: list[tuple[str, float]] = []

    def run(
        self, name: str, command: Sequence[str | Path], *, expected: int = 0, stop_after: Path | None = None
    ) -> str:
        """Run a command to its end, or to its stop: SIGTERM when metrics.jsonl `stop_after` has ten losses.

        Returns:
          What it wrote to standard output.
        """
        print(f"{name} ...", flush=True)
        begin = time.perf_counter()
        log = self.out / f"{name.replace(' ', '-').replace(',', '')}.log"
        with log.open("w") as lines:
            child = subprocess.Popen(
                [str(part) for part in command],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=lines,
                stderr=subprocess.STDOUT,
            )
            while child.poll() is None and stop_after is not None:
                if stop_after.exists() and stop_after.read_text(encoding="utf-8").count('"train/loss"') >= 10:
                    child.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.1)
            child.wait()
        self.seconds.append((name, time.perf_counter() - begin))
        text = log.read_text(encoding="utf-8", errors="replace")
        if child.returncode != expected:
            raise SystemExit(f"{text}\n{name}: exit code {child.returncode}, expected {expected}")
        return text


def together(processes: int, devices: int, *command: str | Path) -> list[str | Path]:
    """A command on so many processes with so many virtual CPU devices each."""
    flags = ["--processes", str(processes), "--cpu-devices", str(devices)]
    return [PYTHON, ROOT / "launch/local.py", *flags, "--", PYTHON, *command]


def lay_out(demo: Path, source: Path, counts: dict[str, int]) -> None:
    """Recordings of the demo corpus in LibriSpeech's layout, in turn until there are enough."""
    for name, split in SPLITS.items():
        lines = (demo / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        spoken = [json.loads(line) for line in lines]
        for start in range(0, counts[name], PER_CHAPTER):
            speaker, chapter = str(1000 + start // PER_CHAPTER // 4), str(start // PER_CHAPTER)
            folder = source / split / speaker / chapter
            folder.mkdir(parents=True)
            texts = []
            for i in range(start, min(start + PER_CHAPTER, counts[name])):
                record = spoken[i % len(spoken)]
                identifier = f"{speaker}-{chapter}-{i - start:04d}"
                shutil.copyfile(demo / record["audio_filepath"], folder / f"{identifier}.flac")
                texts.append(f"{identifier} {record['text'].upper()}\n")
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(texts), encoding="utf-8")


def require(holds: bool, law: str) -> None:
    """Leave with exit code 1 where a law does not hold."""
    if not holds:
        raise SystemExit(f"does not hold: {law}")
    print(f"  {law}")


def count_lines(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> int:
    """Run everything and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "data/demo", help="the demo corpus (default: data/demo)")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--files", type=int, default=2000, help="recordings to train on (default: 2000)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists() and any(out.iterdir()):
        parser.error("--out DIR: give an empty folder")
    if not (arguments.demo / "train.jsonl").exists():
        parser.error(f"no demo corpus in {arguments.demo}: jaxds2 prepare demo --out {arguments.demo}")
    out.mkdir(parents=True, exist_ok=True)
    counts = {"train": arguments.files, "dev": 60, "test": 128}
    rehearsal, manifests = Rehearsal(out), out / "manifests"
    lay_out(arguments.demo, out / "LibriSpeech", counts)
    rehearsal.run("prepare", [*JAXDS2, "prepare", "librispeech", "--source", out / "LibriSpeech", "--out", manifests])
    for name, split in SPLITS.items():
        require(count_lines(manifests / f"{split}.jsonl") == counts[name], f"all {counts[name]} of {split} are there")
    shards = manifests / "shards" / SPLITS["train"]
    rehearsal.run(
        "shard", [*JAXDS2, "shard", manifests / f"{SPLITS['train']}.jsonl", "--out", shards, "--shard-size", "10"]
    )
    require(count_lines(shards / "index.jsonl") == arguments.files, "the index of the shards has as many")
    config = ("--config", ROOT / "configs/demo.py")
    rehearsal.run("check", [*JAXDS2, "check", *config, shards, "--json", out / "check.json"])

    def train(run: Path, data: Path, *more: str) -> list[str | Path]:
        settings = [f"data.train={data}", f"data.dev={manifests / 'dev-clean.jsonl'}"]
        settings += [f"data.test={manifests / 'test-clean.jsonl'}", f"training.steps={arguments.steps}"]
        return [ROOT / "train.py", *config, "--run", run, *settings, "training.log_every=1", *more]

    whole, files, stopped = (out / name for name in ("whole", "files", "stopped"))
    rehearsal.run("train, one process, shards", [PYTHON, *train(whole, shards)])
    rehearsal.run("train, one process, files", [PYTHON, *train(files, manifests / f"{SPLITS['train']}.jsonl")])

    def digest(run: Path) -> str:
        return rehearsal.run(f"digest of {run.name}", [*JAXDS2, "digest", "--run", run]).split()[-2]

    require(digest(whole) == digest(files), "shards and files give the same weights, to the bit")
    rehearsal.run(
        "train, two processes, stopped",
        together(2, 1, *train(stopped, shards)),
        expected=75,
        stop_after=stopped / "metrics.jsonl",
    )
    rehearsal.run("resume, one process, two devices", together(1, 2, *train(stopped, shards)))

    def losses(run: Path) -> dict[int, float]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    one, other = losses(whole), losses(stopped)
    apart = max(abs(other.get(step, float("inf")) / loss - 1) for step, loss in one.items())
    require(apart < 1e-4, f"the losses of {len(one)} steps are those of one process that never stopped: {apart:.1e}")
    score = [ROOT / "eval.py", "--run", stopped, "--manifest", manifests / "test-clean.jsonl", "--no-html"]
    rehearsal.run("eval, two processes", together(2, 1, *score, "--name", "two"))
    rehearsal.run("eval, one process", [PYTHON, *score, "--name", "one"])
    two, alone = (json.loads((stopped / "eval" / name / "report.json").read_text()) for name in ("two", "one"))
    keys = ("words", "utterances", "insertions", "deletions", "substitutions")
    require(
        {k: two[k] for k in keys} == {k: alone[k] for k in keys},
        f"two processes count what one counts: {two['words']} words",
    )
    require(two["utterances"] == counts["test"], "each utterance once")
    width = max(len(name) for name, _ in rehearsal.seconds)
    for name, seconds in rehearsal.seconds:
        print(f"{name:<{width}}  {seconds:6.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
