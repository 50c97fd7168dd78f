"""Batches for a corpus of LibriSpeech's size, or any other: how much is padding, and how long the first one takes.

python benchmarks/bench_plan.py [--utterances 10000000]

No corpus is needed: durations and lengths of texts follow the histogram that configs/librispeech_960.py names, and of
the recordings only those of the first batch are written, as noise.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import side_by_side

if TYPE_CHECKING:
    from jaxds2.config import Config
    from jaxds2.data.plan import BatchPlan

ROOT = Path(__file__).parents[1]
SHAPES = (8, 12)
WORKERS = 2
EPOCHS = 3
INTERVAL_S = 0.1
"""Between two looks at the memory."""


def main() -> None:
    """Print the tables and write them."""
    arguments = side_by_side.start("Batches for a large corpus.", threads=2, utterances=281_241, planned=10_000_000)
    count, planned = (400, 4_000) if arguments.small else (arguments.utterances, arguments.planned)
    table, alone = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "train.jsonl"
        write_manifest(manifest, count)
        for shapes in SHAPES[:1] if arguments.small else SHAPES:
            # Planned once before, to know which recordings have to be there.
            in_new_process(write_first_batch, manifest, shapes)
            table[f"ours-{shapes}-shapes"] = in_new_process(first_batch, manifest, shapes, time.time())
            alone[f"ours-{shapes}-shapes"] = in_new_process(plan_alone, planned, shapes)
    title = f"{count} utterances, configs/librispeech_960.py, {WORKERS} loader workers, seconds since the process began"
    print(side_by_side.table(title, table))
    bars = []
    for name, row in table.items():
        bars.append(side_by_side.bar(f"first batch, {name}, seconds", row["first batch"], at_most=20))
        if "MiB, host" in row:
            bars.append(side_by_side.bar(f"memory of the host, {name}, MiB", row["MiB, host"], at_most=1024))
        over = row["padding %"] - row["least possible %"]
        bars.append(side_by_side.bar(f"padding over the least possible, {name}, points", over, at_most=0.5))
    print(side_by_side.table(f"the plan alone, {planned} utterances, seconds", alone))
    results = [{"what": "plan", "utterances": count, "columns": table, "bars": bars}]
    side_by_side.save("plan", arguments, [*results, {"what": "plan alone", "utterances": planned, "columns": alone}])


def in_new_process(function, *arguments: Any) -> Any:
    """Call it in an interpreter of its own, whose time and memory are then its own too."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_manifest(path: Path, count: int) -> None:
    """So many utterances whose durations are spread like LibriSpeech's, in no order."""
    import numpy as np
    import soundfile

    durations_N, characters_per_second = draw_durations(count)
    with path.open("w", encoding="utf-8") as file:
        for i, duration in enumerate(durations_N.tolist()):
            text = "word " * round(duration * characters_per_second / 5)
            line = {"audio_filepath": f"{i}.wav", "duration": round(duration, 4), "text": text.strip(), "id": f"{i}"}
            file.write(json.dumps(line) + "\n")
    soundfile.write(path.parent / "0.wav", np.zeros(1, np.int16), 16_000)  # what training looks for before it plans


def draw_durations(count: int) -> tuple[Any, float]:
    """So many durations, float64 seconds, and the characters spoken in a second."""
    import numpy as np

    histogram = json.loads((ROOT / "configs/durations/librispeech_960.json").read_text(encoding="utf-8"))
    width, counts = histogram["seconds_per_bin"], np.array(histogram["counts"])
    rng = np.random.default_rng(0)
    durations_N = (rng.choice(len(counts), count, p=counts / counts.sum()) + rng.random(count)) * width
    return durations_N, histogram["characters_per_second"]


def config_for(manifest: Path, shapes: int) -> "Config":
    """The recipe for 960 hours on another manifest."""
    from jaxds2.config import load_config

    overrides = [f"data.train=('{manifest}',)", f"data.num_buckets={shapes}", f"data.workers={WORKERS}"]
    return load_config(ROOT / "configs/librispeech_960.py", overrides)


def write_first_batch(manifest: Path, shapes: int) -> None:
    """The recordings of step 0."""
    import numpy as np
    import soundfile

    utterances, plan = plan_of(config_for(manifest, shapes))
    rng = np.random.default_rng(0)
    for index in plan.step(0).indices_B.tolist():
        if index >= 0:
            noise_S = rng.integers(-3000, 3000, int(plan.num_samples_N[index])).astype(np.int16)
            soundfile.write(utterances[index].audio_filepath, noise_S, plan.sample_rate, subtype="PCM_16")


def plan_of(config: "Config") -> tuple[list[Any], "BatchPlan"]:
    """What training reads and plans."""
    from jaxds2.text import Vocabulary
    from jaxds2.training.selection import read_training_data, training_plan

    vocabulary = Vocabulary(config.data.characters)
    utterances, _ = read_training_data(config, vocabulary)
    return utterances, training_plan(config, utterances, vocabulary)


def first_batch(manifest: Path, shapes: int, begin: float) -> dict[str, float]:
    """Seconds from `begin` to what training has before its first step, and the most memory held on the way there."""
    from jaxds2.data.pipeline import load_batches
    from jaxds2.text import Vocabulary
    from jaxds2.training import selection

    config = config_for(manifest, shapes)
    vocabulary = Vocabulary(config.data.characters)
    with most_memory() as most:
        imported = time.time()
        utterances, _ = selection.read_training_data(config, vocabulary)
        read = time.time()
        plan = selection.training_plan(config, utterances, vocabulary)
        planned = time.time()
        with load_batches(utterances, plan, vocabulary=vocabulary, workers=WORKERS) as batches:
            loaded = next(batches)
            done = time.time()
            time.sleep(2 * INTERVAL_S)  # one more look
    if loaded.failures:
        sys.exit(
            f"{len(loaded.failures)} recordings of the first batch could not be read: {': '.join(loaded.failures[0])}"
        )
    times = {"imported": imported, "read": read, "planned": planned, "first batch": done}
    return {name: moment - begin for name, moment in times.items()} | most | padding(plan, shapes)


@contextmanager
def most_memory() -> Iterator[dict[str, float]]:
    """The most MiB that this process and its children held at one time, looked at again and again; filled at the end.

    What they share counts once (Linux's proportional set size). Elsewhere it is left out.
    """
    most: dict[str, float] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(INTERVAL_S):
            sizes = [proportional_mib(pid) for pid in (os.getpid(), *map(int, children()))]
            if sum(sizes) > most.get("MiB, host", 0.0):
                most.update({"MiB, host": sum(sizes), "MiB, a worker": max(sizes[1:], default=0.0)})

    looking = threading.Thread(target=look, daemon=True)
    if Path("/proc/self/smaps_rollup").exists():
        looking.start()
    yield most
    over.set()
    if looking.ident:
        looking.join()


def children() -> list[str]:
    """The processes that this one started, whichever of its threads did."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended meanwhile
            found += (task / "children").read_text(encoding="ascii").split()
    return found


def proportional_mib(pid: int) -> float:
    """MiB of a process, what it shares divided by those who share it; 0 of one that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def padding(plan: "BatchPlan", shapes: int) -> dict[str, float]:
    """Percent of the samples of batches that are no audio, and how few any plan with as many shapes could have."""
    import numpy as np

    from jaxds2.data.plan import bucket_edges

    measured, least = [], []
    for epoch in range(EPOCHS):
        lengths_N = plan.lengths(epoch)
        edges_K = bucket_edges(lengths_N, shapes, max_points=4096)  # on the whole grid of 10 ms
        padded_N = edges_K[np.searchsorted(edges_K, lengths_N)]
        measured.append(100 * plan.padding_share(epoch))
        least.append(100 * (1 - lengths_N.sum() / padded_N.sum()))
    return {"padding %": float(np.mean(measured)), "least possible %": float(np.mean(least))}


def plan_alone(count: int, shapes: int) -> dict[str, float]:
    """Of durations that are there: seconds until all is planned, until the first batch, until one of the next epoch."""
    import numpy as np

    from jaxds2.training.selection import plan_batches

    config = config_for(Path("train.jsonl"), shapes)
    durations_N, characters_per_second = draw_durations(count)
    labels_N = np.rint(durations_N * characters_per_second).astype(np.int64)
    with most_memory() as most:
        begin = time.perf_counter()
        plan = plan_batches(config, durations_N, labels_N, digest="made up")
        planned = time.perf_counter()
        plan.step(0)
        first = time.perf_counter()
        plan.step(plan.steps_for_epochs(1))
        second = time.perf_counter()
    return {"planned": planned - begin, "first step": first - planned, "next epoch": second - first} | most


if __name__ == "__main__":
    main()
