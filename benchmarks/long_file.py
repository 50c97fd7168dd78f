"""A file of an hour against its utterances one by one: word errors, memory, time.

    python benchmarks/long_file.py --run runs/an4 --test data/an4/test.jsonl
    python benchmarks/long_file.py --run runs/an4 --test data/an4/dev.jsonl --minutes 0.3 --files 40

The utterances of a test set, shuffled anew each time round, follow each other with pauses of 0.3 to 2 s until the file
is long enough. Between them is digital silence, or noise of each level in --noise, as a quiet room has it. With --files
it is many files; those of up to 30 s are given to the model whole where they hold no long pause. The peak of resident
memory is that of `jaxds2 transcribe` on the files, in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from jaxds2.audio import read_audio
from jaxds2.data.manifest import Utterance
from jaxds2.data.shards import Recordings, read_utterances
from jaxds2.decoding.greedy import GreedyDecoder
from jaxds2.evaluation.evaluate import evaluate
from jaxds2.evaluation.metrics import EditCounts, count_word_edits
from jaxds2.inference.recognizer import Recognizer

PAUSES = (0.3, 2.0)
"""Seconds, uniform."""
SEED = 0


def main() -> None:
    """Print the table and, with --json, write its numbers."""
    parser = argparse.ArgumentParser(description="A file of an hour against its utterances one by one.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--checkpoint", default="best")
    parser.add_argument("--test", type=Path, required=True, help="manifest, or a folder of shards")
    parser.add_argument("--minutes", type=float, default=60.0, help="of a file (default: 60)")
    parser.add_argument("--files", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0, 3, 30], help="standard deviations in the pauses, of 32768"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    recognizer = Recognizer.load(arguments.run, arguments.checkpoint)
    utterances = read_utterances(arguments.test)
    alone = evaluate(recognizer, utterances, GreedyDecoder(recognizer.vocabulary))
    figures: dict[str, dict[str, float]] = {}
    header = ("pauses", "minutes", "words", "WER alone", "WER of file", "points", "peak MiB", "seconds")
    print("".join(f"{name:>13}" for name in header))
    for noise in arguments.noise:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{number}.wav") for number in range(arguments.files)]
            length, rate = arguments.minutes * 60, recognizer.config.features.sample_rate
            orders = [write_long(path, utterances, length, noise, rate, SEED + n) for n, path in enumerate(paths)]
            texts, peak_mib, seconds = transcribe(arguments.run, arguments.checkpoint, paths)
        one_by_one = count_word_edits(
            [alone.refs[i] for order in orders for i in order], [alone.hyps[i] for order in orders for i in order]
        )
        in_one = count_word_edits([" ".join(alone.refs[i] for i in order) for order in orders], texts)
        row = {
            "noise": noise,
            "minutes": arguments.minutes,
            "files": arguments.files,
            "words": one_by_one.reference,
            "wer_alone": wer(one_by_one),
            "wer_file": wer(in_one),
            "points": wer(in_one) - wer(one_by_one),
            "peak_mib": peak_mib,
            "seconds": seconds,
        }
        figures[f"noise {noise:g}"] = row
        name = f"noise {noise:g}" if noise else "silence"
        print(
            f"{name:>13}{arguments.minutes:>13g}{row['words']:>13}{row['wer_alone']:>13.2f}{row['wer_file']:>13.2f}"
            f"{row['points']:>+13.2f}{peak_mib:>13.0f}{seconds:>13.1f}",
            flush=True,
        )
    if arguments.json:
        record = {"benchmark": "long_file", "run": str(arguments.run), "test": str(arguments.test), "results": figures}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def wer(edits: EditCounts) -> float:
    """Percent."""
    return 100 * (edits.insertions + edits.deletions + edits.substitutions) / edits.reference


def write_long(
    path: Path, utterances: Sequence[Utterance], seconds: float, noise: float, rate: int, seed: int
) -> list[int]:
    """Write the file, a WAV, and return which utterances it holds, in their order; it ends with a whole one."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    written = 0
    recordings = Recordings()
    with soundfile.SoundFile(path, "w", rate, 1, subtype="PCM_16") as file:
        while written < seconds * rate:
            for i in rng.permutation(len(utterances)).tolist():
                pause_S = noise * rng.standard_normal(round(rng.uniform(*PAUSES) * rate))
                for part_S in (
                    read_audio(recordings.of(utterances[i]), sample_rate=rate),
                    np.rint(pause_S).astype(np.int16),
                ):
                    file.write(part_S)
                    written += len(part_S)
                order.append(i)
                if written >= seconds * rate:
                    break
    recordings.close()
    return order


def transcribe(run: Path, checkpoint: str, paths: Sequence[Path]) -> tuple[list[str], float, float]:
    """Text of each file, MiB at the peak and seconds of the command."""
    out = paths[0].parent / "texts"
    command = [sys.executable, __file__, "--one", "transcribe", "--run", str(run), "--checkpoint", checkpoint]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", str(out), *map(str, paths)], stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    return [(out / f"{path.stem}.txt").read_text().strip() for path in paths], float(done.stdout), seconds


def one(arguments: Sequence[str]) -> int:
    """The command in this process, and then its peak of resident memory in MiB, on a line."""
    from jaxds2 import cli

    code = cli.main(arguments)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        sys.exit(one(sys.argv[2:]))
    main()
