"""From files to batches: what reading a recording costs by its format, and how long a device waits for the loader.

python benchmarks/bench_pipeline.py [--manifest data/an4/train.jsonl]

The recordings of the manifest are written as WAV, FLAC and Ogg Opus first, so that all formats hold the same speech.
Without a manifest, and without AN4 prepared, noise stands in, which FLAC cannot compress: its figure means little then.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2.data.manifest import Utterance

FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}
UTTERANCES = 200
RATES = (0.1, 0.3)
"""Audio hours a second that a device takes; two CPU cores train AN4's model at 0.05 (174 an hour, RESULTS.md)."""
AN4 = Path(__file__).parents[1] / "data/an4/train.jsonl"


def main() -> None:
    """Print the tables and write them all."""
    arguments = side_by_side.start("The pipeline, by format.", threads=2, manifest=True)
    if arguments.manifest is None and AN4.exists() and not arguments.small:
        arguments.manifest = AN4
    with tempfile.TemporaryDirectory() as folder:
        corpora = {name: encode(name, Path(folder), arguments) for name in FORMATS}
        results = [reading(corpora, arguments), loading(corpora, arguments)]
    side_by_side.save("pipeline", arguments, results)


def encode(name: str, folder: Path, arguments: argparse.Namespace) -> "list[Utterance]":
    """The recordings in one format."""
    import numpy as np
    import soundfile

    from jaxds2.audio import read_audio
    from jaxds2.data.manifest import Utterance
    from jaxds2.data.shards import Recordings, read_utterances

    count = 4 if arguments.small else UTTERANCES
    if arguments.manifest is None:
        rng = np.random.default_rng(0)
        waves = [rng.integers(-3000, 3000, rng.integers(16_000, 48_000)).astype(np.int16) for _ in range(count)]
        texts = ["noise"] * count
    else:
        found = read_utterances(arguments.manifest)[:count]
        with Recordings() as recordings:
            waves, texts = [read_audio(recordings.of(u)) for u in found], [u.text for u in found]
    utterances = []
    for i, (wave_S, text) in enumerate(zip(waves, texts, strict=True)):
        path = folder / f"{i}.{name}"
        soundfile.write(path, wave_S, 16_000, format=FORMATS[name][0], subtype=FORMATS[name][1])
        utterances.append(Utterance(f"{i}", path, len(wave_S) / 16_000, text, speaker=""))
    return utterances


def reading(corpora: "dict[str, list[Utterance]]", arguments: argparse.Namespace) -> dict[str, Any]:
    """All files of a format one after the other: bare libsndfile, ours with all its checks, ours with a new speed."""
    import soundfile

    from jaxds2.audio import change_speed, read_audio

    columns: dict[str, Callable[[], Any]] = {}
    for name, utterances in corpora.items():
        paths = [str(u.audio_filepath) for u in utterances]
        columns[f"libsndfile-{name}"] = lambda paths=paths: [soundfile.read(path, dtype="int16") for path in paths]
        columns[f"ours-{name}"] = lambda paths=paths: [read_audio(path) for path in paths]
        columns[f"ours-{name}-new-speed"] = lambda paths=paths: [change_speed(read_audio(p), 1.1) for p in paths]
    hours = sum(u.duration for u in corpora["wav"]) / 3600
    table = {
        name: row | {"audio hours a core-second": hours / (row["CPU ms"] / 1e3)}
        for name, row in side_by_side.rounds(columns, arguments.rounds).items()
    }
    title = f"reading {len(corpora['wav'])} recordings, {3600 * hours:.0f} s in all, from the page cache"
    print(side_by_side.table(title, table, base="libsndfile-wav"))
    return {"what": "reading", "columns": table}


def loading(corpora: "dict[str, list[Utterance]]", arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole batches as training gets them: how fast they come, and what share of its time a device waits for them.

    The device sleeps as long as its step would take, so all cores are the loader's, as beside an accelerator. How many
    cores keep one busy that takes an audio hour a second follows from the loader's own process time, in threads: other
    rates need as many times more or fewer.
    """
    table: dict[str, dict[str, float]] = {}
    epochs = 2 if arguments.small else 4
    for name, utterances in corpora.items():
        for workers in (0,) if arguments.small else (0, 1, 2):
            row = load(utterances, workers, epochs)
            for rate in (100.0,) if arguments.small else RATES:
                row[f"waits, % at {rate:g}"] = load(utterances, workers, epochs, rate)["waits, %"]
            if not workers:
                row["audio hours a core-second"] = row["audio hours a second"] * row["wall ms"] / row["CPU ms"]
                row["cores for 1 a second"] = 1 / row["audio hours a core-second"]
            table[f"ours-{name}-{workers}-workers"] = row
    title = (
        f"the loader, with speed perturbation, on {arguments.threads} core(s); share of its time that a device waits "
        "which takes so many audio hours a second"
    )
    print(side_by_side.table(title, table))
    return {"what": "loading", "columns": table}


def load(utterances: "Sequence[Utterance]", workers: int, epochs: int, rate: float | None = None) -> dict[str, float]:
    """Process time (without that of workers), clock, and hours of audio a second.

    With a `rate`, of a device that takes so many of them, and what share of the time it waits; without, of one that
    takes all. From the batch by which all workers have started to the last one, not to the end of the loader: grain's
    workers take a second to end, and training never waits for that.
    """
    import numpy as np

    from jaxds2.config import DataConfig
    from jaxds2.data.pipeline import load_batches
    from jaxds2.data.plan import BatchPlan

    durations_N = np.array([u.duration for u in utterances])
    labels_N = np.array([len(u.text) for u in utterances])
    data = DataConfig(batch_seconds=30.0, rows_multiple=1)
    plan = BatchPlan(durations_N, labels_N, digest="", data=data, seed=0, speed=0.1, sample_rate=16_000)
    steps = plan.steps_for_epochs(epochs)
    waited, hours = 0.0, 0.0
    with load_batches(utterances, plan, vocabulary=None, workers=workers) as batches:
        for _ in range(4 * workers + 1):  # more than the worker that started first has ready before the last one starts
            next(batches)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(batches).batch
            waited += time.perf_counter() - asked
            hours += int(batch.audio_lengths_B.sum()) / 16_000 / 3600
            if rate:
                time.sleep(max(0.0, begin + waited + hours / rate - time.perf_counter()))
        seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    figures = {"CPU ms": 1e3 * cpu, "wall ms": 1e3 * seconds, "audio hours a second": hours / seconds}
    return figures | ({"waits, %": 100 * waited / seconds} if rate else {})


if __name__ == "__main__":
    main()
