"""Any audio file that libsndfile reads -> one int16 mono waveform, rounded and clipped exactly once.

The header is checked before anything is decoded, and what was decoded is checked against the header: libsndfile itself
returns the part that is left of a truncated file without an error.
"""

import io
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import soundfile

MAX_DURATION = 4 * 3600.0
"""Seconds that a file may announce; at 16 kHz such a waveform takes 460 MB."""
MAX_DECODED_SAMPLES = 2**30
"""Samples over all channels that a file may announce: 3.1 hours of 48 kHz stereo. Silence in FLAC is some 3,000 times
smaller than its samples, so the size of a file says nothing about the memory that it takes."""
MAX_STREAMED_DURATION = 24 * 3600.0
"""Seconds that a file may announce that is read block by block, with any number of channels."""
SAMPLE_RATES = (1_000, 1_000_000)
"""Lowest and highest sampling rate in Hz that can be real; outside it the header is damaged."""
LOSSY_TOLERANCE = 0.1
"""Seconds by which an MP3 may decode shorter than announced: without a Xing header its length is an estimate. Every
other format, Ogg included, must decode to the sample."""

MAX_AMPLITUDE = 2.0**20
"""Full scale is 1. A float file may exceed it (samples in the range of integers reach 2**15, and are clipped), but
beyond this, as with NaN and infinity, the data are damaged."""

_QUALITY = "HQ"
# change_speed of 16 s at 16 kHz, CPU milliseconds: QQ 1.9, LQ 2.6, MQ 2.7, HQ 2.9, VHQ 3.8; reading the same utterance
# takes 5.6 from FLAC and 32 from Opus. A lower quality would save nothing that anyone notices, and would cut the band.
_BLOCK_SAMPLES = 2**22
_STREAMED_SAMPLES = 2**19
# libsndfile's log on a file that ends before its data chunk does: WAV, AIFF, AU, W64, RF64.
_CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: *(\d+) \(should be (\d+)\)", re.MULTILINE)
# A WAV that was written into a pipe announces about 2 or 4 GiB, since its writer could not go back to fill in the size.
_STREAMED_BYTES = 0x7FFF_0000
_OGG_HEADER_BYTES = 27
_OGG_LARGEST_PAGE = _OGG_HEADER_BYTES + 255 + 255 * 255


class AudioError(ValueError):
    """An audio file that cannot be used; its message is one line that names the file."""


class NonFiniteAudioError(AudioError):
    """An audio file with samples that are NaN, infinite or absurdly large."""


class EmptyAudioError(AudioError):
    """An audio file without samples."""


@dataclass(frozen=True)
class EncodedAudio:
    """An audio file that was read already, from a shard: it decodes as the file did."""

    name: str
    """What errors call it; ends as the file's own name does."""
    content: bytes
    """The whole file."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class AudioInfo:
    """What the header of an audio file announces."""

    sample_rate: int
    """Hz."""
    channels: int
    num_samples: int
    """Per channel, at `sample_rate`."""
    duration: float
    """Seconds."""


def probe_audio(
    audio: str | Path | EncodedAudio, *, max_duration: float = MAX_DURATION, streamed: bool = False
) -> AudioInfo:
    """Read the header of an audio file; nothing is decoded.

    Args:
      audio: as for `read_audio`.
      max_duration: seconds.
      streamed: it is for `read_blocks`, which takes any number of samples that last `MAX_STREAMED_DURATION`.

    Raises:
      AudioError: no such file, not audio, no samples, cut short (as far as the headers show), or larger than
        `max_duration` seconds or `MAX_DECODED_SAMPLES`.
    """
    with _open(_source(audio), MAX_STREAMED_DURATION if streamed else max_duration, streamed=streamed) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames, file.frames / file.samplerate)


def read_audio(
    audio: str | Path | EncodedAudio, *, sample_rate: int = 16_000, max_duration: float = MAX_DURATION
) -> np.ndarray:
    """Decode an audio file to a waveform.

    Channels are averaged, another rate is resampled (soxr HQ), and the result is rounded to the nearest integer and
    clipped, once: a 16-bit mono file at `sample_rate` comes back bit for bit.

    Args:
      audio: any file that libsndfile reads, in whatever rate, number of channels and sample format.
      sample_rate: of the result, in Hz.
      max_duration: seconds; a longer file is refused before it is decoded.

    Returns:
      waveform_S, int16, with S = num_samples * sample_rate / rate of the file, rounded half up.

    Raises:
      AudioError: as `probe_audio`, and: fewer samples than the header announces (by more than `LOSSY_TOLERANCE` for
        MP3), damaged data, a sample that is NaN, infinite or above `MAX_AMPLITUDE`.
        An Ogg, MP3 or NIST file that was cut exactly between two of its pages or frames looks whole and shorter; only
        a manifest's declared duration can tell.
    """
    source = _source(audio)
    with _open(source, max_duration) as file:
        rate = file.samplerate
        mono_S = np.empty(file.frames, np.float32)
        decoded = 0
        for block_S in _decode(source, file, _BLOCK_SAMPLES):
            mono_S[decoded : decoded + len(block_S)] = block_S
            decoded += len(block_S)
        mono_S = mono_S[:decoded]
    if rate != sample_rate:
        mono_S = _resample(mono_S, rate, sample_rate, _num_resampled(len(mono_S), rate, sample_rate))
    if not len(mono_S):
        raise EmptyAudioError(f"{audio}: too short: not one sample at {sample_rate} Hz")
    return _to_int16(mono_S)


def read_blocks(audio: str | Path | EncodedAudio, *, sample_rate: int = 16_000) -> Iterator[np.ndarray]:
    """Decode an audio file of up to `MAX_STREAMED_DURATION` piece by piece; joined, they are `read_audio`'s waveform.

    Args:
      audio, sample_rate: as for `read_audio`.

    Yields:
      int16 (S,), each of about `_STREAMED_SAMPLES` samples of the file; S may be 0.

    Raises:
      AudioError: as `read_audio`; what is damaged or missing is found where it is reached.
    """
    import soxr

    source = _source(audio)
    with _open(source, MAX_STREAMED_DURATION, streamed=True) as file:
        rate = file.samplerate
        stream = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32", quality=_QUALITY)
        decoded = given = 0
        for block_S in _decode(source, file, _STREAMED_SAMPLES):
            decoded += len(block_S)
            if rate != sample_rate:
                block_S = stream.resample_chunk(block_S)[: _num_resampled(decoded, rate, sample_rate) - given]
            given += len(block_S)
            yield _to_int16(block_S)
    if rate != sample_rate:
        left = _num_resampled(decoded, rate, sample_rate) - given
        tail_S = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:left]
        given += left
        yield _to_int16(np.pad(tail_S, (0, left - len(tail_S))))
    if not given:
        raise EmptyAudioError(f"{audio}: too short: not one sample at {sample_rate} Hz")


def change_speed(waveform_S: np.ndarray, speed: float) -> np.ndarray:
    """Resample a waveform so that it plays `speed` times as fast (and as high), as Ko et al., Audio Augmentation, 2015.

    Args:
      waveform_S: int16.
      speed: above 0; 1.1 makes it shorter.

    Returns:
      int16 of exactly round(S / speed) samples. The same input gives the same output.
    """
    if not speed > 0:
        raise ValueError(f"speed is {speed}, must be above 0")
    if speed == 1 or not len(waveform_S):
        return waveform_S.copy()
    scaled_S = waveform_S.astype(np.float32) / 32768
    return _to_int16(_resample(scaled_S, speed, 1.0, round(len(waveform_S) / speed)))


def _source(audio: str | Path | EncodedAudio) -> Path | EncodedAudio:
    return audio if isinstance(audio, EncodedAudio) else Path(audio)


def _open(source: Path | EncodedAudio, max_duration: float, *, streamed: bool = False) -> "soundfile.SoundFile":
    import soundfile

    _check_bytes(source)
    try:
        file = soundfile.SoundFile(source) if isinstance(source, Path) else _open_encoded(source)
    except (soundfile.SoundFileError, TypeError) as e:  # TypeError: a name that libsndfile takes for headerless data
        raise AudioError(
            f"{source}: not an audio file that libsndfile reads ({_reason(e)}); convert it to FLAC or WAV"
        ) from None
    try:
        _check_header(source, file, max_duration, streamed)
    except AudioError:
        file.close()
        raise
    return file


class _Memory(io.BytesIO):
    """Answers a seek to before its start with -1, as a file does; an exception would not get through to libsndfile."""

    _refused = False

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            self._refused = True
            return -1

    def tell(self) -> int:
        """soundfile asks after every seek."""
        refused, self._refused = self._refused, False
        return -1 if refused else super().tell()


def _open_encoded(source: EncodedAudio) -> "soundfile.SoundFile":
    import soundfile

    try:
        return soundfile.SoundFile(_Memory(source.content))
    except soundfile.SoundFileError as refusal:
        # Some MP3 files begin with what only their name tells libsndfile to skip. Once open, a file needs no name.
        try:
            with tempfile.NamedTemporaryFile(suffix=Path(source.name).suffix) as named:
                named.write(source.content)
                named.flush()
                return soundfile.SoundFile(named.name)
        except OSError:  # no room for it
            raise refusal from None


def _check_bytes(source: Path | EncodedAudio) -> None:
    if isinstance(source, Path):
        if not source.exists():
            raise AudioError(f"{source}: no such file; correct its path")
        if not source.is_file():
            raise AudioError(f"{source}: not a file; name a recording")
    try:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source.content) as f:
            head = f.read(4)
            whole = head != b"OggS" or _last_ogg_page_is_whole(f)
    except OSError as e:
        raise AudioError(f"{source}: cannot be read ({e.strerror})") from None
    if not head:
        raise EmptyAudioError(f"{source}: the file is empty (0 bytes); fetch or record it again")
    if not whole:
        raise AudioError(f"{source}: truncated: the last page of the Ogg stream is cut off; fetch the file again")


def _last_ogg_page_is_whole(f: BinaryIO) -> bool:
    """RFC 3533, section 6: a page is a header, its table of segment sizes, and the segments."""
    size = f.seek(0, 2)
    f.seek(max(0, size - _OGG_LARGEST_PAGE))
    tail = f.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < _OGG_HEADER_BYTES:
        return False
    table = page[_OGG_HEADER_BYTES : _OGG_HEADER_BYTES + page[26]]
    return len(table) == page[26] and len(page) >= _OGG_HEADER_BYTES + len(table) + sum(table)


def _check_header(
    source: Path | EncodedAudio, file: "soundfile.SoundFile", max_duration: float, streamed: bool
) -> None:
    rate, channels, frames = file.samplerate, file.channels, file.frames
    if frames <= 0:
        raise EmptyAudioError(f"{source}: holds no samples; fetch or record it again")
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        low, high = SAMPLE_RATES
        raise AudioError(
            f"{source}: the header says {rate} Hz, expected {low} to {high}: damaged? Fetch it again, or resample it"
        )
    if frames >= 2**62:  # libsndfile's SF_COUNT_MAX
        raise AudioError(f"{source}: the header does not say how long it is; convert it to a file that does")
    if frames / rate > max_duration or (frames * channels > MAX_DECODED_SAMPLES and not streamed):
        most = "" if streamed else f" and {MAX_DECODED_SAMPLES} samples over all channels"
        raise AudioError(
            f"{source}: the header announces {frames / rate:.1f} s ({frames} samples, channels: {channels}), at most "
            f"{max_duration:g} s{most} are read: cut it into pieces"
        )
    for declared, present in _CUT_SHORT.findall(file.extra_info):
        # One byte is the padding of an odd chunk.
        if int(present) + 1 < int(declared) < _STREAMED_BYTES:
            raise AudioError(
                f"{source}: truncated: the header announces {declared} bytes, {present} are there; fetch the file again"
            )


def _decode(source: Path | EncodedAudio, file: "soundfile.SoundFile", block_samples: int) -> Iterator[np.ndarray]:
    """float32, full scale 1, block by block so that many channels never stand in memory at once."""
    import soundfile

    announced = file.frames
    decoded = 0
    try:
        while decoded < announced:
            block_SC = file.read(max(1, block_samples // file.channels), dtype="float32", always_2d=True)
            if not len(block_SC):
                break
            block_SC = block_SC[: announced - decoded]
            _check_amplitude(source, block_SC, decoded)
            decoded += len(block_SC)
            yield block_SC[:, 0] if file.channels == 1 else block_SC.mean(axis=1)
    except soundfile.SoundFileError as e:
        where = f"after {decoded} of {announced} samples"
        raise AudioError(f"{source}: damaged or truncated {where} ({_reason(e)}); fetch it again") from None
    tolerance = int(LOSSY_TOLERANCE * file.samplerate) if file.format in ("MP3", "MPEG") else 0
    if decoded == 0:
        raise EmptyAudioError(f"{source}: holds no samples; fetch or record it again")
    if decoded < announced - tolerance:
        raise AudioError(
            f"{source}: truncated: the header announces {announced} samples, {decoded} could be decoded; fetch it again"
        )


def _check_amplitude(source: Path | EncodedAudio, block_SC: np.ndarray, first_sample: int) -> None:
    if max(block_SC.max(), -block_SC.min()) <= MAX_AMPLITUDE:  # false for NaN
        return
    sample, channel = np.argwhere(~(np.abs(block_SC) <= MAX_AMPLITUDE))[0]
    value = block_SC[sample, channel]
    raise NonFiniteAudioError(
        f"{source}: sample {first_sample + sample} is {value}, expected a number from -1 to 1; "
        f"export it again, as 16-bit PCM"
    )


def _num_resampled(num_in: int, rate_in: int, rate_out: int) -> int:
    """Samples at another rate, rounded half up."""
    return (2 * num_in * rate_out + rate_in) // (2 * rate_in)


def _resample(x_S: np.ndarray, rate_in: float, rate_out: float, num_out: int) -> np.ndarray:
    """float32 -> float32 of exactly `num_out` samples; soxr may be one off, which costs its last sample or adds a 0."""
    import soxr

    y_S = soxr.resample(x_S, rate_in, rate_out, quality=_QUALITY)[:num_out]
    return np.pad(y_S, (0, num_out - len(y_S)))


def _to_int16(x_S: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x_S * np.float32(32768)), -32768, 32767).astype(np.int16)


def _reason(error: Exception) -> str:
    """libsndfile's own words, without the file name that our message has already."""
    text = re.sub(r"^Error opening '.*': ", "", str(error))
    return " ".join(text.removeprefix("Error : ").rstrip(".").split()) or type(error).__name__
