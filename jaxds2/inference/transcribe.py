"""Audio files to text."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jaxds2.audio import AudioError, probe_audio, read_blocks
from jaxds2.data.manifest import Utterance
from jaxds2.data.pipeline import filler_batch
from jaxds2.data.plan import Bucket
from jaxds2.decoding.hypothesis import Decode, Hypothesis
from jaxds2.files import check_writable, write_whole
from jaxds2.inference.formats import render
from jaxds2.inference.recognizer import Recognizer, frame_seconds
from jaxds2.inference.recordings import Recording
from jaxds2.inference.transcript import Transcript, decode_stretch, join
from jaxds2.inference.windows import LONG_PAUSE_SECONDS, PAUSE_SECONDS, WINDOW_SECONDS, Grid, Window, cut, holds_pause

HALVINGS = 3
"""Windows have this many static shapes below the longest, each half as long as the next."""
BATCH_SECONDS = 120.0
"""Of a batch of windows, unless the run's own batches are shorter."""
WAIT_SECONDS = 600.0
"""So much of long files may be read before all windows that wait for a full batch are run, at the end of a file."""

Keep = Callable[[int, Transcript], None]


def transcribe_run(
    recognizer: Recognizer,
    recordings: Sequence[Recording],
    decode: Decode,
    *,
    forms: Sequence[str] = ("txt",),
    word_times: bool = False,
    folder: Path | None = None,
    pause: float = PAUSE_SECONDS,
    faults: Sequence[str] = (),
) -> int:
    """Transcribe recordings, and print the transcripts in their order, or write each as soon as it is there.

    Args:
      recognizer: the model and its weights.
      recordings: what to transcribe.
      decode: log-probabilities to hypotheses.
      forms: formats to write, see formats.render; only one where it is printed.
      word_times: see formats.render.
      folder: where the files go, `stem.form`; None prints.
      pause: see transcribe.
      faults: what went wrong before, printed as errors too.

    Returns:
      How many recordings have no transcript, the faults included.

    Raises:
      WriteError: a file cannot be written; that none can be is found out before the work begins.
    """
    if folder is not None:
        check_writable(folder)
    for line in faults:
        _report(line)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    several = len(recordings) > 1
    done: dict[int, Transcript] = {}
    printed = 0

    def keep(position: int, transcript: Transcript) -> None:
        nonlocal printed
        done[position] = transcript
        if folder is not None and transcript.error is None:
            stem, name = folder / recordings[position].stem, recordings[position].name
            for form in forms:
                write_whole(
                    stem.with_name(f"{stem.name}.{form}"), render(transcript, form, name=name, word_times=word_times)
                )
        while printed in done:
            t, r = done[printed], recordings[printed]
            printed += 1
            if t.error is not None:
                _report(t.error.replace(str(r.path), r.name))
            elif folder is None:
                text = render(t, forms[0], name=r.name, word_times=word_times)
                with tqdm.external_write_mode(sys.stdout):
                    print(f"{r.name}: {text}" if several and forms[0] == "txt" else text, end="", flush=True)

    transcripts = transcribe(recognizer, [r.path for r in recordings], decode, pause=pause, progress=True, keep=keep)
    failed = len(faults) + sum(t.error is not None for t in transcripts)
    if several or faults or folder is not None:
        good = [t for t in transcripts if t.error is None]
        where = "" if folder is None else f"; written to {folder}"
        seconds, silence = sum(t.duration for t in good), sum(t.silence for t in good)
        left_out = f", {silence:.1f} s of it left out as silence" if silence else ""
        print(
            f"transcribed {len(good)} of {len(transcripts)} files, {seconds:.1f} s of audio{left_out}{where}",
            file=sys.stderr,
        )
    return failed


def _report(line: str) -> None:
    with tqdm.external_write_mode(sys.stderr):
        print(f"error: {line}", file=sys.stderr)


def transcribe(
    recognizer: Recognizer,
    paths: Sequence[Path],
    decode: Decode,
    *,
    pause: float = PAUSE_SECONDS,
    progress: bool = False,
    keep: Keep = lambda position, transcript: None,
) -> list[Transcript]:
    """Transcribe files of any rate, channel count and format that libsndfile reads, several at a time.

    A file of up to WINDOW_SECONDS without a long pause is one utterance. Any other is cut where it is silent
    (windows.cut), and only some windows of it are ever in memory. A file that cannot be read does not keep the others
    from coming out.

    Args:
      recognizer: the model and its weights.
      paths: audio files; the transcripts come in this order.
      decode: log-probabilities to hypotheses; of a long file the best of each stretch of speech is taken.
      pause: seconds of silence that part the stretches of a file that is cut.
      progress: show a bar.
      keep: called with each file's position and its transcript, as soon as that is there.
    """
    config = recognizer.config
    transcripts = [Transcript(path, frame_seconds=frame_seconds(config)) for path in paths]
    short: list[Utterance] = []
    long: list[int] = []

    def finish(position: int, **found) -> None:
        transcripts[position] = dataclasses.replace(transcripts[position], **found)
        keep(position, transcripts[position])

    rate, pauses = config.features.sample_rate, Grid.of(config, max(pause, LONG_PAUSE_SECONDS))
    hidden = None if progress else True
    for position, path in enumerate(tqdm(paths, "look for pauses", leave=False, delay=2, disable=hidden)):
        try:
            duration = probe_audio(path, streamed=True).duration
        except AudioError as e:
            finish(position, error=str(e))
            continue
        transcripts[position] = dataclasses.replace(transcripts[position], duration=duration)
        if duration > WINDOW_SECONDS or _holds_pause(path, rate, pauses):
            long.append(position)
        else:
            short.append(Utterance(id=str(position), audio_filepath=path, duration=duration, text=""))
    total = sum(t.duration for t in transcripts if t.error is None)
    with tqdm(total=round(total), desc="transcribe", unit="s", leave=False, disable=hidden) as bar:
        for position, found in _short(recognizer, short, decode):
            finish(position, **found)
            bar.update(round(transcripts[position].duration))
        files = [(position, paths[position], transcripts[position].duration) for position in long]
        for position, found in _Long(recognizer, decode, Grid.of(config, pause), bar.update).transcribe(files):
            finish(position, **found)
    return transcripts


def _holds_pause(path: Path, rate: int, grid: Grid) -> bool:
    try:
        return holds_pause(read_blocks(path, sample_rate=rate), grid)
    except AudioError:
        return False  # which is said where the file is read to be transcribed


def _short(recognizer: Recognizer, utterances: Sequence[Utterance], decode: Decode) -> Iterator[tuple[int, dict]]:
    """Position and the fields of the transcript of each file that the model is given whole."""
    if not utterances:
        return
    for batch, output, failures in recognizer.run(utterances, recognizer.plan(utterances), with_labels=False):
        for row, index in enumerate(batch.index_B.tolist()):
            if index < 0:
                continue
            u = utterances[index]
            log_probs_UV = np.asarray(output.log_probs_BUV[row, : output.logit_lengths_B[row]])
            if len(log_probs_UV):
                yield int(u.id), {"hypotheses": tuple(decode(log_probs_UV))}
            else:
                yield int(u.id), {"error": f"{u.audio_filepath}: too short for one frame ({u.duration:.3f} s)"}
        for identifier, why in failures:
            yield int(identifier), {"error": why}


@dataclass
class _Open:
    """A long file of which windows are on their way."""

    duration: float
    parts: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)
    """Kept log_probs_UV of windows, by stretch and part, of stretches that are not complete."""
    counts: dict[int, int] = field(default_factory=dict)
    """Parts of each stretch that has been read to its end."""
    first: dict[int, int] = field(default_factory=dict)
    """First frame of each stretch."""
    borders: dict[int, list[int]] = field(default_factory=dict)
    """Of each stretch that is not complete."""
    hypotheses: dict[int, Hypothesis] = field(default_factory=dict)
    """Of complete stretches."""
    frames: int = 0
    read: bool = False
    """To its end."""


class _Long:
    """Long files: their windows wait until a batch of their shape is full, whichever file they are of."""

    def __init__(self, recognizer: Recognizer, decode: Decode, grid: Grid, update: Callable[[float], object]):
        config = recognizer.config
        self._recognizer, self._decode, self._grid, self._update = recognizer, decode, grid, update
        self._rate = config.features.sample_rate
        self._frame_seconds = frame_seconds(config)
        seconds, mesh = min(config.data.batch_seconds, BATCH_SECONDS), recognizer.mesh.size
        self._buckets: list[Bucket] = []
        for halvings in range(HALVINGS, -1, -1):
            num_samples = -(-self._grid.window * self._grid.stride // 2**halvings)
            rows = max(1, int(seconds * self._rate / num_samples) // mesh) * mesh
            self._buckets.append(Bucket(num_samples, rows, 1))
        self._waiting: dict[Bucket, list[tuple[int, Window]]] = {bucket: [] for bucket in self._buckets}
        self._open: dict[int, _Open] = {}

    def transcribe(self, files: Sequence[tuple[int, Path, float]]) -> Iterator[tuple[int, dict]]:
        """Position and the fields of the transcript of each of (position, path, seconds)."""
        read = 0.0
        for position, path, duration in files:
            file = self._open[position] = _Open(duration)
            try:
                for window in cut(read_blocks(path, sample_rate=self._rate), self._grid):
                    self._await(position, window)
            except AudioError as e:
                del self._open[position]
                yield position, {"error": str(e)}
            file.read = True
            read += duration
            if read >= WAIT_SECONDS:
                self._flush()
                read = 0.0
            yield from self._complete()
        self._flush()
        yield from self._complete()

    def _await(self, position: int, window: Window) -> None:
        file = self._open[position]
        file.parts.setdefault(window.stretch, {})
        file.first.setdefault(window.stretch, window.first)
        file.borders.setdefault(window.stretch, []).extend(window.borders)
        if window.last:
            file.counts[window.stretch] = window.part + 1
        bucket = next(b for b in self._buckets if len(window.waveform_S) <= b.num_samples)
        self._waiting[bucket].append((position, window))
        if len(self._waiting[bucket]) == bucket.rows:
            self._run(bucket)

    def _flush(self) -> None:
        for bucket, waiting in self._waiting.items():
            if waiting:
                self._run(bucket)

    def _run(self, bucket: Bucket) -> None:
        batch, rows = filler_batch(bucket), self._waiting[bucket]
        for row, (_, window) in enumerate(rows):
            batch.audio_BS[row, : len(window.waveform_S)] = window.waveform_S
            batch.audio_lengths_B[row] = len(window.waveform_S)
            batch.index_B[row] = row
        output = self._recognizer.emit(batch)
        self._waiting[bucket] = []
        for row, (position, window) in enumerate(rows):
            if position in self._open:
                start, stop = window.keep
                frames = int(output.logit_lengths_B[row])
                # A copy, or the whole batch would stay in memory.
                kept_UV = np.array(output.log_probs_BUV[row, start : frames if stop is None else stop])
                self._take(self._open[position], window, kept_UV)

    def _take(self, file: _Open, window: Window, kept_UV: np.ndarray) -> None:
        stretch = window.stretch
        file.frames += len(kept_UV)
        file.parts[stretch][window.part] = kept_UV
        if len(file.parts[stretch]) == file.counts.get(stretch):
            parts = file.parts.pop(stretch)
            log_probs_UV = np.concatenate([parts[part] for part in sorted(parts)])
            first = file.first[stretch]
            file.hypotheses[stretch] = decode_stretch(
                log_probs_UV,
                self._decode,
                self._recognizer.vocabulary,
                borders=[border - first for border in file.borders.pop(stretch) if border - first < len(log_probs_UV)],
                longest=self._grid.window,
            )
        self._update(round(len(kept_UV) * self._frame_seconds, 3))

    def _complete(self) -> Iterator[tuple[int, dict]]:
        """Files that are read and decoded to their end."""
        for position, file in list(self._open.items()):
            if file.read and not file.parts:
                del self._open[position]
                pieces = [(file.first[stretch], file.hypotheses[stretch]) for stretch in sorted(file.hypotheses)]
                heard = file.frames * self._frame_seconds
                self._update(max(0.0, round(file.duration - heard, 3)))
                yield position, {"hypotheses": (join(pieces),), "silence": max(0.0, file.duration - heard)}
