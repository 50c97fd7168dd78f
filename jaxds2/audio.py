"""Any audio file that libsndfile reads -> one int16 mono waveform, rounded and clipped exactly once.

The header is checked before anything is decoded, and what was decoded is checked against the header: libsndfile itself
returns the part that is left of a truncated file without an error.
"""

import re
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
class AudioInfo:
    """What the header of an audio file announces."""

    sample_rate: int
    """Hz."""
    channels: int
    num_samples: int
    """Per channel, at `sample_rate`."""
    duration: float
    """Seconds."""


def probe_audio(path: str | Path, *, max_duration: float = MAX_DURATION) -> AudioInfo:
    """Read the header of an audio file; nothing is decoded.

    Raises:
      AudioError: no such file, not audio, no samples, cut short (as far as the headers show), or larger than
        `max_duration` seconds or `MAX_DECODED_SAMPLES`.
    """
    with _open(Path(path), max_duration) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames, file.frames / file.samplerate)


def read_audio(path: str | Path, *, sample_rate: int = 16_000, max_duration: float = MAX_DURATION) -> np.ndarray:
    """Decode an audio file to a waveform.

    Channels are averaged, another rate is resampled (soxr HQ), and the result is rounded to the nearest integer and
    clipped, once: a 16-bit mono file at `sample_rate` comes back bit for bit.

    Args:
      path: any file that libsndfile reads, in whatever rate, number of channels and sample format.
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
    path = Path(path)
    with _open(path, max_duration) as file:
        rate = file.samplerate
        mono_S = _decode_mono(path, file)
    if rate != sample_rate:
        mono_S = _resample(mono_S, rate, sample_rate, (2 * len(mono_S) * sample_rate + rate) // (2 * rate))
    if not len(mono_S):
        raise EmptyAudioError(f"{path}: too short: not one sample at {sample_rate} Hz")
    return _to_int16(mono_S)


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


def _open(path: Path, max_duration: float) -> "soundfile.SoundFile":
    import soundfile

    _check_bytes(path)
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, TypeError) as e:  # TypeError: a name that libsndfile takes for headerless data
        raise AudioError(f"{path}: not an audio file that libsndfile reads ({_reason(path, e)})") from None
    try:
        _check_header(path, file, max_duration)
    except AudioError:
        file.close()
        raise
    return file


def _check_bytes(path: Path) -> None:
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if not path.is_file():
        raise AudioError(f"{path}: not a file")
    try:
        with path.open("rb") as f:
            head = f.read(4)
            whole = head != b"OggS" or _last_ogg_page_is_whole(f)
    except OSError as e:
        raise AudioError(f"{path}: cannot be read ({e.strerror})") from None
    if not head:
        raise EmptyAudioError(f"{path}: the file is empty (0 bytes)")
    if not whole:
        raise AudioError(f"{path}: truncated: the last page of the Ogg stream is cut off; fetch the file again")


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


def _check_header(path: Path, file: "soundfile.SoundFile", max_duration: float) -> None:
    rate, channels, frames = file.samplerate, file.channels, file.frames
    if frames <= 0:
        raise EmptyAudioError(f"{path}: holds no samples")
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        low, high = SAMPLE_RATES
        raise AudioError(f"{path}: the header says {rate} Hz, expected {low} to {high}: damaged?")
    if frames >= 2**62:  # libsndfile's SF_COUNT_MAX
        raise AudioError(f"{path}: the header does not say how long it is; convert it to a file that does")
    if frames / rate > max_duration or frames * channels > MAX_DECODED_SAMPLES:
        raise AudioError(
            f"{path}: the header announces {frames / rate:.1f} s ({frames} samples, channels: {channels}), at most "
            f"{max_duration:g} s and {MAX_DECODED_SAMPLES} samples over all channels are read: cut it into pieces"
        )
    for declared, present in _CUT_SHORT.findall(file.extra_info):
        # One byte is the padding of an odd chunk.
        if int(present) + 1 < int(declared) < _STREAMED_BYTES:
            raise AudioError(
                f"{path}: truncated: the header announces {declared} bytes, {present} are there; fetch the file again"
            )


def _decode_mono(path: Path, file: "soundfile.SoundFile") -> np.ndarray:
    """float32, full scale 1, block by block so that many channels never stand in memory at once."""
    import soundfile

    announced = file.frames
    mono_S = np.empty(announced, np.float32)
    decoded = 0
    try:
        while decoded < announced:
            block_SC = file.read(max(1, _BLOCK_SAMPLES // file.channels), dtype="float32", always_2d=True)
            if not len(block_SC):
                break
            _check_amplitude(path, block_SC, decoded)
            block_S = block_SC[:, 0] if file.channels == 1 else block_SC.mean(axis=1)
            mono_S[decoded : decoded + len(block_S)] = block_S
            decoded += len(block_S)
    except soundfile.SoundFileError as e:
        where = f"after {decoded} of {announced} samples"
        raise AudioError(f"{path}: damaged or truncated {where} ({_reason(path, e)})") from None
    tolerance = int(LOSSY_TOLERANCE * file.samplerate) if file.format in ("MP3", "MPEG") else 0
    if decoded == 0:
        raise EmptyAudioError(f"{path}: holds no samples")
    if decoded < announced - tolerance:
        raise AudioError(f"{path}: truncated: the header announces {announced} samples, {decoded} could be decoded")
    return mono_S[:decoded]


def _check_amplitude(path: Path, block_SC: np.ndarray, first_sample: int) -> None:
    if max(block_SC.max(), -block_SC.min()) <= MAX_AMPLITUDE:  # false for NaN
        return
    sample, channel = np.argwhere(~(np.abs(block_SC) <= MAX_AMPLITUDE))[0]
    value = block_SC[sample, channel]
    raise NonFiniteAudioError(f"{path}: sample {first_sample + sample} is {value}, expected a number from -1 to 1")


def _resample(x_S: np.ndarray, rate_in: float, rate_out: float, num_out: int) -> np.ndarray:
    """float32 -> float32 of exactly `num_out` samples; soxr may be one off, which costs its last sample or adds a 0."""
    import soxr

    y_S = soxr.resample(x_S, rate_in, rate_out, quality=_QUALITY)[:num_out]
    return np.pad(y_S, (0, num_out - len(y_S)))


def _to_int16(x_S: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x_S * np.float32(32768)), -32768, 32767).astype(np.int16)


def _reason(path: Path, error: Exception) -> str:
    """libsndfile's own words, without the file name that our message has already."""
    text = str(error).removeprefix(f"Error opening {str(path)!r}: ")
    return " ".join(text.removeprefix("Error : ").rstrip(".").split()) or type(error).__name__
