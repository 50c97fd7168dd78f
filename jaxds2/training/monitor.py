"""What a person sees of a training run: a bar and lines in the terminal, curves and pictures in TensorBoard.

A run's folder gets `metrics.jsonl` (the scalars, one step a line), `skipped.jsonl` (the steps that were skipped),
`train.log` (the lines) and `tensorboard/`.
"""

import colorsys
import contextlib
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, SupportsFloat

import numpy as np
from tqdm import tqdm

from jaxds2.files import lacks_room, write_whole
from jaxds2.text import BLANK_ID, Vocabulary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tensorboardX import SummaryWriter


class MonitorError(ValueError):
    """A run's folder that cannot be written; the message is one line that says how to go on."""


class Monitor:
    """Reports a training run. Close it, or use it as a context manager, so that everything is written.

    Whatever reports raises MonitorError where it cannot be written: TensorBoard's part, which a thread writes, at the
    next report or when the monitor is closed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        progress: bool = True,
        silent: bool = False,
    ):
        """Start to report.

        What a stopped run had reported beyond `resume_step` is taken back, so that every step is there once.

        Args:
          run_dir: folder of the run; made if it is not there.
          total_steps: where the bar ends.
          resume_step: step of the checkpoint that training goes on from; 0: from the start.
          progress: show the bar.
          silent: write and print nothing, since another process reports this run.

        Raises:
          MonitorError, WriteError: the folder cannot be written.
        """
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import register_writer_factory

        self._run_dir = run_dir
        self._silent = silent
        self._quiet = False
        """An error is under way already; a second one would hide it."""
        first_step = resume_step + 1 if resume_step else 0
        self._events = _EventFile()
        register_writer_factory(_EventFile.PREFIX, self._events)
        with self._writing():
            if not silent:
                run_dir.mkdir(parents=True, exist_ok=True)
                _drop_steps_from(first_step, run_dir / "metrics.jsonl")
                _drop_steps_from(first_step, run_dir / "skipped.jsonl")
            nowhere = Path(os.devnull)
            self._metrics = (nowhere if silent else run_dir / "metrics.jsonl").open("a", encoding="utf-8")
            self._skipped = nowhere if silent else run_dir / "skipped.jsonl"
            self._train_log = (nowhere if silent else run_dir / "train.log").open("a", encoding="utf-8")
            # Without the suffix, a second start within one second would overwrite the file of the first.
            self._tensorboard = SummaryWriter(
                f"{_EventFile.PREFIX}:{run_dir / 'tensorboard'}",
                purge_step=first_step,
                filename_suffix=f".{time.time_ns()}",
                flush_secs=10,
                write_to_disk=not silent,
            )
        # Where the bar goes to a file, every refresh stays there for good.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=total_steps,
            initial=resume_step,
            desc=run_dir.name,
            unit="step",
            file=sys.stderr,
            disable=silent or not progress,
            dynamic_ncols=True,
            mininterval=interval,
            maxinterval=max(interval, 10.0),
            smoothing=0.05,
        )
        self._step = resume_step
        self._shown: dict[str, str] = {}

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._quiet = self._quiet or error is not None
        self.close()

    def close(self) -> None:
        """Write what is not written yet and leave the bar as it stands.

        Raises:
          MonitorError: that failed, and no error before has said so.
        """
        self._bar.close()
        self._tensorboard.close()
        failures = [self._events.failure] if self._events.failure else []
        for file in (self._metrics, self._train_log):
            try:
                file.close()
            except OSError as e:
                failures.append(e)
        if failures and not self._quiet:
            raise self._error(failures[0])

    def _error(self, failure: OSError) -> MonitorError:
        self._quiet = True
        remedy = "make room" if lacks_room(failure) else "put that right"
        return MonitorError(
            f"{self._run_dir}: cannot be written ({failure.strerror or failure}); {remedy}, then resume with the same "
            f"command"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise self._error(e) from None

    def _board(self) -> "SummaryWriter":
        """TensorBoard's writer, unless its thread has failed."""
        if self._events.failure:
            raise self._error(self._events.failure)
        return self._tensorboard

    def advance(self, step: int, **values: float) -> None:
        """Move the bar to `step` and show values beside it, such as loss=1.5; one not given keeps its last value."""
        self._shown |= {name: f"{value:.3g}" for name, value in values.items()}
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._step)
        self._step = step

    def preparing(self, what: str, done: int, total: int) -> None:
        """Show beside the bar how far something is that comes before the steps; its time is not counted as theirs."""
        left = f"{what} {done + 1} of {total}" if done < total else ""
        self._bar.set_postfix_str(left, refresh=sys.stderr.isatty())
        self._bar.unpause()

    def message(self, text: str, *, shown: str | None = None) -> None:
        """Print text to standard output without breaking the bar, and append it to `train.log` with the time.

        `shown` is printed in place of a text that is too long to read.
        """
        if self._silent:
            return
        with tqdm.external_write_mode(file=sys.stdout):
            print(text if shown is None else shown, flush=True)
        self.log(text)

    def log(self, text: str) -> None:
        """Append text to `train.log` with the time, and print nothing."""
        with self._writing():
            self._train_log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._train_log.flush()

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write named numbers to `metrics.jsonl` and TensorBoard.

        The line is {"step": int, "time": seconds since 1970, name: number, ...}. JSON knows neither NaN nor infinity:
        they are written as null.
        """
        numbers = {name: float(value) for name, value in values.items()}
        with self._writing():
            self._metrics.write(_line({"step": step, "time": round(time.time(), 3), **numbers}))
            self._metrics.flush()
        for name, value in numbers.items():
            self._board().add_scalar(name, value, step)

    def skipped(self, step: int, ids: Sequence[str], *, loss: float, grad_norm: float) -> None:
        """Append to `skipped.jsonl` a step that was not taken.

        The line is {"step": from 1, "ids": utterances of its batch, "loss": number, "grad_norm": number}; what is not
        finite is null.
        """
        with self._writing(), self._skipped.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, "ids": list(ids), "loss": loss, "grad_norm": grad_norm}))

    def text(self, step: int, name: str, markdown: str) -> None:
        """Show Markdown in TensorBoard."""
        self._board().add_text(name, markdown, step)

    def sample_table(self, step: int, rows: Iterable[tuple[str, str, str]]) -> None:
        """Show (id, reference, hypothesis) rows in TensorBoard."""
        lines = ["| id | reference | hypothesis |", "|---|---|---|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        self.text(step, "dev/samples", "\n".join(lines))

    def figure(self, step: int, name: str, figure: "Figure") -> None:
        """Show a matplotlib figure in TensorBoard."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            # Of an alphabet that the font does not have; the box drawn instead says it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            canvas.draw()
        pixels_HWC = np.asarray(canvas.buffer_rgba())[..., :3]
        self._board().add_image(name, pixels_HWC, step, dataformats="HWC")


class _EventFile:
    """The file that tensorboardX writes from a thread of its own, and the factory by which it opens that file.

    An exception, as on a full disk, would end the thread; its queue would fill, and the next report wait for ever. So
    the first failure is kept in `failure` for the thread that trains, and what comes after it is dropped.
    """

    PREFIX = "jaxds2"
    """Before a path and a colon, by which tensorboardX knows whose factory opens it."""

    _file: BinaryIO

    def __init__(self) -> None:
        self.failure: OSError | None = None

    def directory_check(self, path: str) -> None:
        os.makedirs(path.partition(":")[2], exist_ok=True)

    def open(self, path: str) -> "_EventFile":
        self._file = Path(path.partition(":")[2]).open("wb")  # noqa: SIM115 - tensorboardX closes it
        return self

    def write(self, data: bytes) -> None:
        self._attempt(lambda: self._file.write(data))

    def flush(self) -> None:
        self._attempt(self._sync)

    def close(self) -> None:
        self._attempt(self._file.close)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.failure:
            return
        try:
            action()
        except OSError as e:
            self.failure = e
            # Else Python would try the last bytes once more when it exits, and complain.
            with contextlib.suppress(OSError):
                self._file.close()


def _line(values: Mapping[str, Any]) -> str:
    """A line of JSON, which knows neither NaN nor infinity: null."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _drop_steps_from(first_step: int, path: Path) -> None:
    """Remove lines of `first_step` and later, and the line that a killed run may have left half written."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue
        if step < first_step:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


_ROW_FRAMES = 160
"""Output frames in a row of an alignment picture: about 6 s at 25 frames a second."""


def alignment_picture(log_probs_UV: np.ndarray, vocabulary: Vocabulary) -> "Figure":
    """Where in an utterance the model writes which character.

    Args:
      log_probs_UV: log-probabilities of one utterance, blank first, without padding.
      vocabulary: names of the classes.

    Returns:
      Over time, in as many rows as it takes: the probability of the blank (grey) and of each character that is the
      likeliest in some frame, its name above its peaks. A space is written as ␣.
    """
    from matplotlib.figure import Figure

    probs_UV = np.exp(np.asarray(log_probs_UV, np.float32))
    num_frames = len(probs_UV)
    rows = max(1, math.ceil(num_frames / _ROW_FRAMES))
    figure = Figure(figsize=(13.0, 2.3 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for row, axes in enumerate(panels):
        _draw_probabilities(axes, probs_UV, vocabulary)
        start = row * _ROW_FRAMES
        axes.set_xlim(start, start + min(_ROW_FRAMES, max(num_frames, 1)))
    panels[-1].set_xlabel("output frame")
    return figure


def _draw_probabilities(axes: "Axes", probs_UV: np.ndarray, vocabulary: Vocabulary) -> None:
    frames_U = np.arange(len(probs_UV)) + 0.5
    best_U = probs_UV.argmax(axis=1).tolist() if len(probs_UV) else []

    def color(label: int) -> tuple[float, float, float]:
        # Hues a golden section apart: neighbours in the alphabet look different.
        return colorsys.hsv_to_rgb(label * 0.618 % 1, 0.85, 0.75) if label != BLANK_ID else (0.8, 0.8, 0.8)

    for label in sorted({BLANK_ID, *best_U}):
        axes.plot(frames_U, probs_UV[:, label], color=color(label), linewidth=1.2)
        axes.fill_between(frames_U, probs_UV[:, label], color=color(label), alpha=0.25, linewidth=0)
    for label, stretch in itertools.groupby(range(len(best_U)), key=best_U.__getitem__):
        if label == BLANK_ID:
            continue
        peak = max(stretch, key=probs_UV[:, label].__getitem__)
        name = vocabulary.decode([label]).replace(" ", "␣")
        axes.text(
            frames_U[peak], 1.03, name, color=color(label), fontweight="bold", ha="center", va="bottom", clip_on=True
        )
    axes.set(ylim=(0, 1.2), yticks=(0, 0.5, 1), ylabel="probability")
    axes.spines[["top", "right"]].set_visible(False)
