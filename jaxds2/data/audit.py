"""What is wrong with a manifest or with shards: every recording is decoded, every fault is counted and named.

Errors make training or a score wrong (`jaxds2 check` exits 1); warnings are for a person to look at.
"""

import hashlib
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jaxds2.audio import AudioError, EmptyAudioError, NonFiniteAudioError, read_audio
from jaxds2.config import FeatureConfig
from jaxds2.ctc import min_frames
from jaxds2.data.manifest import DURATION_TOLERANCE, ManifestError, Utterance, manifest_path, scan_manifest, set_name
from jaxds2.data.shards import Recordings, shard_faults
from jaxds2.text import Vocabulary

SILENT_RANGE = 2 * 33
"""Largest minus smallest sample below which a file is silent: 60 dB under full scale, measured so that a constant
offset does not hide silence. The quietest file of AN4 peaks at 1,124."""
CLIPPED_SHARE = 0.001
"""Share of samples at full scale above which a file is clipped. A file that was merely normalised touches full scale in
a sample or two; the worst of mini LibriSpeech has 0.00008."""
MAX_SPEAKING_RATE = 30.0
"""Characters per second that nobody says; the fastest of mini LibriSpeech has 23."""
RATE_SPREADS = 6.0
"""A speaking rate is an outlier this many robust standard deviations (1.4826 times the median absolute deviation of its
logarithm) from the manifest's median ..."""
RATE_FACTOR = 2.0
"""... if it is also this many times faster or slower: in a very regular corpus small differences are far out."""
SHOWN_PER_KIND = 20
"""Offenders of a kind that `render` lists; `to_dict` has all."""

ErrorKind = Literal[
    "bad line",
    "damaged shard",
    "unreadable",
    "empty",
    "non-finite",
    "wrong duration",
    "empty text",
    "outside the vocabulary",
    "infeasible",
    "speaker shared with test",
]
WarningKind = Literal["silent", "clipped", "speaking rate", "duplicate", "speaker shared", "text shared"]
_KINDS: tuple[ErrorKind | WarningKind, ...] = get_args(ErrorKind) + get_args(WarningKind)


@dataclass(frozen=True)
class Finding:
    """One fault."""

    kind: ErrorKind | WarningKind
    manifest: str
    utterance: str | None
    """Id, or None for a fault of the manifest as a whole."""
    detail: str

    @property
    def severity(self) -> Literal["error", "warning"]:
        """Decided by the kind."""
        return "error" if self.kind in get_args(ErrorKind) else "warning"


@dataclass(frozen=True)
class ManifestSummary:
    """Size of one manifest. Durations are those decoded, in seconds, over the readable utterances (0 without any)."""

    manifest: str
    utterances: int
    readable: int
    hours: float
    speakers: int
    """Distinct speakers; utterances without one are not counted."""
    words: int
    characters: int
    min_duration: float
    median_duration: float
    p95_duration: float
    max_duration: float


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in [edges[i], edges[i + 1]); the last bin has its right edge too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Audit:
    """The state of some manifests."""

    manifests: tuple[ManifestSummary, ...]
    speakers: int
    """Distinct speakers over all manifests."""
    durations: Histogram
    """Seconds."""
    speaking_rates: Histogram
    """Characters per second."""
    findings: tuple[Finding, ...]
    """Grouped by kind, errors first, then in the order of the manifests."""

    @property
    def utterances(self) -> int:
        """Number of utterances, unreadable ones included."""
        return sum(m.utterances for m in self.manifests)

    @property
    def hours(self) -> float:
        """Hours of readable audio."""
        return sum(m.hours for m in self.manifests)

    @property
    def errors(self) -> dict[str, int]:
        """Number of findings of each kind of error that occurred."""
        return dict(Counter(f.kind for f in self.findings if f.severity == "error"))

    @property
    def warnings(self) -> dict[str, int]:
        """Number of findings of each kind of warning that occurred."""
        return dict(Counter(f.kind for f in self.findings if f.severity == "warning"))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain types for JSON."""
        return {
            "passed": not self.errors,
            "utterances": self.utterances,
            "hours": self.hours,
            "speakers": self.speakers,
            "errors": self.errors,
            "warnings": self.warnings,
            "manifests": [vars(m) for m in self.manifests],
            "durations": vars(self.durations),
            "speaking_rates": vars(self.speaking_rates),
            "findings": [{"severity": f.severity, **vars(f)} for f in self.findings],
        }

    def render(self) -> str:
        """A page for a terminal: sizes, histograms, offenders (the first `SHOWN_PER_KIND` of each kind), verdict."""
        parts = [
            _render_summaries(self),
            _render_histogram("duration, s", self.durations),
            _render_histogram("speaking rate, characters/s", self.speaking_rates),
        ]
        for kind in _KINDS:
            if found := [f for f in self.findings if f.kind == kind]:
                parts.append(_render_findings(found))
        parts.append(self._verdict())
        return "\n\n".join(parts)

    def _verdict(self) -> str:
        def listed(noun: str, counts: dict[str, int]) -> str:
            total = sum(counts.values())
            kinds = f" ({', '.join(f'{n} {kind}' for kind, n in counts.items())})" if counts else ""
            return f"{total} {noun}{'' if total == 1 else 's'}{kinds}"

        verdict = "FAILED" if self.errors else "PASSED"
        return f"{verdict}: {listed('error', self.errors)}, {listed('warning', self.warnings)}"


@dataclass(frozen=True)
class _Waveform:
    """What is kept of a decoded file."""

    num_samples: int
    range: int
    clipped_share: float
    digest: bytes


@dataclass(frozen=True)
class _Entry:
    """An utterance, where it stands, and what decoding it gave."""

    manifest: str
    utterance: Utterance
    text: str
    """Normalised."""
    audio: _Waveform | AudioError
    duration: float
    """Seconds decoded; 0 when unreadable."""

    @property
    def rate(self) -> float | None:
        """Characters per second; None without audio or text."""
        return len(self.text) / self.duration if self.text and self.duration else None

    def finding(self, kind: ErrorKind | WarningKind, detail: str) -> Finding:
        return Finding(kind, self.manifest, self.utterance.id, detail)


def audit(
    manifests: Sequence[str | Path],
    *,
    vocabulary: Vocabulary,
    features: FeatureConfig,
    output_frames: Callable[[int], int],
    progress: bool = True,
) -> Audit:
    """Decode every utterance of some manifests and look for faults in each and between them.

    A manifest whose file stem contains `test` is a test manifest: no other may share a speaker with it. Texts are
    compared, counted and spelled as `vocabulary.normalize` leaves them.

    Args:
      manifests: paths; of folders of shards too, whose checksums are compared.
      vocabulary: the alphabet of the model.
      features: for the sampling rate.
      output_frames: frames that the CTC loss gets for a waveform of so many samples at `features.sample_rate`.
      progress: show a bar on stderr.

    Raises:
      ManifestError: a manifest cannot be read or is empty, or is given twice.
    """
    _check_distinct(manifests)
    scanned = {str(path): scan_manifest(path) for path in manifests}
    read = {manifest: utterances for manifest, (utterances, _) in scanned.items()}
    bad = [
        Finding("bad line", manifest, None, f"line {f}") for manifest, (_, faults) in scanned.items() for f in faults
    ]
    damaged = [
        Finding("damaged shard", manifest, None, fault)
        for manifest, utterances in read.items()
        for fault in shard_faults(manifest, utterances, checksums=True, progress=progress)
    ]
    listed = [(manifest, utterance) for manifest, utterances in read.items() for utterance in utterances]
    waveforms = _read_all([u for _, u in listed], features.sample_rate, progress)
    entries = [
        _Entry(
            manifest=manifest,
            utterance=utterance,
            text=vocabulary.normalize(utterance.text),
            audio=audio,
            duration=0.0 if isinstance(audio, AudioError) else audio.num_samples / features.sample_rate,
        )
        for (manifest, utterance), audio in zip(listed, waveforms, strict=True)
    ]
    by_manifest = {str(path): [e for e in entries if e.manifest == str(path)] for path in manifests}
    findings = [
        *bad,
        *damaged,
        *(f for e in entries for f in _check_audio(e)),
        *(f for e in entries for f in _check_label(e, vocabulary, output_frames)),
        *(f for group in by_manifest.values() for f in _check_rates(group)),
        *_check_duplicates(entries),
        *_check_shared_speakers(entries),
        *_check_shared_texts(entries),
    ]
    return Audit(
        manifests=tuple(_summarize(manifest, group) for manifest, group in by_manifest.items()),
        speakers=len({e.utterance.speaker for e in entries} - {None}),
        durations=_histogram([e.duration for e in entries if e.duration]),
        speaking_rates=_histogram([e.rate for e in entries if e.rate is not None]),
        findings=tuple(sorted(findings, key=lambda f: _KINDS.index(f.kind))),  # a stable sort
    )


def _check_distinct(manifests: Sequence[str | Path]) -> None:
    for path, times in Counter(manifest_path(p).resolve() for p in manifests).items():
        if times > 1:
            raise ManifestError(f"{path}: given {times} times, expected once")


def _is_test(manifest: str) -> bool:
    """Whether `test` is a word of its name: of `test-clean` and `an4_test`, but not of `latest`."""
    return "test" in re.split(r"[\W\d_]+", set_name(manifest).lower())


def _read_all(utterances: Sequence[Utterance], sample_rate: int, progress: bool) -> list[_Waveform | AudioError]:
    """In their order. Threads do: libsndfile, soxr, numpy and hashlib all release the interpreter's lock."""
    from tqdm import tqdm

    pool, recordings = ThreadPoolExecutor(os.cpu_count() or 1), Recordings()
    try:
        results = pool.map(lambda u: _read(recordings, u, sample_rate), utterances)
        return list(
            tqdm(results, total=len(utterances), desc="check", unit=" files", disable=None if progress else True)
        )
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
        recordings.close()


def _read(recordings: Recordings, utterance: Utterance, sample_rate: int) -> _Waveform | AudioError:
    try:
        waveform_S = read_audio(recordings.of(utterance), sample_rate=sample_rate)
    except AudioError as e:
        return e
    low, high = int(waveform_S.min()), int(waveform_S.max())
    full_scale = np.count_nonzero((waveform_S == 32767) | (waveform_S == -32768))
    return _Waveform(
        num_samples=len(waveform_S),
        range=high - low,
        clipped_share=full_scale / len(waveform_S),
        digest=hashlib.sha256(waveform_S.tobytes()).digest(),
    )


def _check_audio(entry: _Entry) -> Iterator[Finding]:
    match entry.audio:
        case EmptyAudioError():
            yield entry.finding("empty", str(entry.audio))
        case NonFiniteAudioError():
            yield entry.finding("non-finite", str(entry.audio))
        case AudioError():
            yield entry.finding("unreadable", str(entry.audio))
        case _Waveform(range=span, clipped_share=share):
            declared = entry.utterance.duration
            if abs(entry.duration - declared) > DURATION_TOLERANCE:
                detail = f"declared {declared:.2f} s, decoded {entry.duration:.2f} s"
                yield entry.finding("wrong duration", detail)
            if span < SILENT_RANGE:
                yield entry.finding("silent", f"all samples within {span} of 65,535 steps")
            if share > CLIPPED_SHARE:
                yield entry.finding("clipped", f"{share:.2%} of the samples at full scale")


def _check_label(entry: _Entry, vocabulary: Vocabulary, output_frames: Callable[[int], int]) -> Iterator[Finding]:
    if not entry.text:
        yield entry.finding("empty text", f"nothing to learn in {_short(entry.utterance.text)}")
    elif unknown := vocabulary.unknown(entry.text):
        yield entry.finding("outside the vocabulary", f"{unknown!r} in {_short(entry.text)}")
    elif isinstance(entry.audio, _Waveform):
        needed, frames = min_frames(vocabulary.encode(entry.text)), output_frames(entry.audio.num_samples)
        if needed > frames:
            detail = f"{needed} frames needed, {frames} there ({entry.duration:.2f} s): {_short(entry.text)}"
            yield entry.finding("infeasible", detail)


def _check_rates(entries: Sequence[_Entry]) -> Iterator[Finding]:
    timed = [(e, e.rate) for e in entries if e.rate is not None]
    if not timed:
        return
    logs = np.log([rate for _, rate in timed])
    median = np.median(logs)
    spread = 1.4826 * np.median(np.abs(logs - median))
    limit = max(RATE_SPREADS * spread, np.log(RATE_FACTOR))
    for (entry, rate), log in zip(timed, logs, strict=True):
        if rate > MAX_SPEAKING_RATE or abs(log - median) > limit:
            usual = f"median here {np.exp(median):.1f}"
            yield entry.finding("speaking rate", f"{rate:.1f} characters/s ({usual}): {_short(entry.text)}")


def _check_duplicates(entries: Sequence[_Entry]) -> Iterator[Finding]:
    """Each is reported where it occurs again. An id occurs twice only between manifests: reading one refuses it."""
    first_with_id: dict[str, _Entry] = {}
    first_with_audio: dict[bytes, _Entry] = {}
    for entry in entries:
        same_id = first_with_id.setdefault(entry.utterance.id, entry)
        if same_id is not entry:
            yield entry.finding("duplicate", f"same id in {same_id.manifest}")
        # All silence is alike, and reported as such.
        if isinstance(entry.audio, _Waveform) and entry.audio.range >= SILENT_RANGE:
            same_audio = first_with_audio.setdefault(entry.audio.digest, entry)
            if same_audio is not entry:
                yield entry.finding("duplicate", f"same audio as {same_audio.utterance.id} in {same_audio.manifest}")


def _check_shared_speakers(entries: Sequence[_Entry]) -> Iterator[Finding]:
    utterances_of: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        if entry.utterance.speaker is not None:
            utterances_of[entry.utterance.speaker][entry.manifest] += 1
    for speaker, counts in utterances_of.items():
        tests = [m for m in counts if _is_test(m)]
        others = [m for m in counts if not _is_test(m)]
        if tests and others:
            for manifest in others:
                detail = f"speaker {speaker}: {counts[manifest]} here, {_counted(counts, tests)}"
                yield Finding("speaker shared with test", manifest, None, detail)
        elif len(counts) > 1:
            first, *rest = counts
            detail = f"speaker {speaker}: {counts[first]} here, {_counted(counts, rest)}"
            yield Finding("speaker shared", first, None, detail)


def _check_shared_texts(entries: Sequence[_Entry]) -> Iterator[Finding]:
    utterances_with: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        if entry.text:
            utterances_with[entry.text][entry.manifest] += 1
    for text, counts in utterances_with.items():
        if len(counts) > 1:
            first, *rest = counts
            detail = f"{_short(text)}: {counts[first]} here, {_counted(counts, rest)}"
            yield Finding("text shared", first, None, detail)


def _counted(counts: Counter[str], manifests: Sequence[str]) -> str:
    return ", ".join(f"{counts[m]} in {m}" for m in manifests)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _summarize(manifest: str, entries: Sequence[_Entry]) -> ManifestSummary:
    durations = np.array([e.duration for e in entries if e.duration])
    quantiles = np.quantile(durations, [0, 0.5, 0.95, 1]) if len(durations) else np.zeros(4)
    low, median, p95, high = (float(q) for q in quantiles)
    return ManifestSummary(
        manifest=manifest,
        utterances=len(entries),
        readable=len(durations),
        hours=float(durations.sum()) / 3600,
        speakers=len({e.utterance.speaker for e in entries} - {None}),
        words=sum(len(e.text.split()) for e in entries),
        characters=sum(len(e.text) for e in entries),
        min_duration=low,
        median_duration=median,
        p95_duration=p95,
        max_duration=high,
    )


def _histogram(values: Sequence[float]) -> Histogram:
    """At most 12 bins, whose width is 1, 2 or 5 times a power of ten and whose edges are multiples of it."""
    if not values:
        return Histogram((), ())

    def place(value: float, width: float) -> int:
        return math.floor(round(value / width, 6))  # in floating point 1.0 // 0.1 is 9

    low, high = min(values), max(values)
    steps = [m * 10.0**k for k in range(-3, 6) for m in (1, 2, 5)]
    width = next((w for w in steps if place(high, w) - place(low, w) < 12), steps[-1])
    edges = np.round(np.arange(place(low, width), place(high, width) + 2) * width, 3)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)  # a rounded edge may just miss the extremes
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))


def _render_summaries(audit: Audit) -> str:
    header = ("manifest", "utterances", "hours", "speakers", "words", "characters", "min", "median", "95%", "max s")
    rows = [
        (
            m.manifest,
            f"{m.utterances}",
            f"{m.hours:.2f}",
            f"{m.speakers}",
            f"{m.words}",
            f"{m.characters}",
            *(f"{d:.2f}" for d in (m.min_duration, m.median_duration, m.p95_duration, m.max_duration)),
        )
        for m in audit.manifests
    ]
    if len(rows) > 1:
        words, characters = (str(sum(getattr(m, k) for m in audit.manifests)) for k in ("words", "characters"))
        total = (str(audit.utterances), f"{audit.hours:.2f}", str(audit.speakers), words, characters)
        rows.append(("all", *total, "", "", "", ""))
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (header, *rows)
    )


def _render_histogram(title: str, histogram: Histogram) -> str:
    if not histogram.counts:
        return f"{title}: nothing to count"
    labels = [f"{a:g} to {b:g}" for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)]
    width = max(map(len, labels))
    most = max(histogram.counts)
    lines = [
        f"  {label.rjust(width)}  {_bar(count / most)} {count}"
        for label, count in zip(labels, histogram.counts, strict=True)
    ]
    return "\n".join([title, *lines])


def _bar(share: float, width: int = 40) -> str:
    """A bar of `share` times `width` cells, in eighths of a cell; never invisible unless nothing is there."""
    eighths = max(round(share * width * 8), 1 if share else 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _render_findings(found: Sequence[Finding]) -> str:
    lines = [f"{found[0].severity}: {found[0].kind} ({len(found)})"]
    for f in found[:SHOWN_PER_KIND]:
        lines.append(f"  {f.manifest}{f': {f.utterance}' if f.utterance else ''}: {f.detail}")
    if len(found) > SHOWN_PER_KIND:
        lines.append(f"  ... and {len(found) - SHOWN_PER_KIND} more")
    return "\n".join(lines)
