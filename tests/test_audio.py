import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxds2 import audio
from jaxds2.audio import (
    MAX_AMPLITUDE,
    AudioError,
    AudioInfo,
    EmptyAudioError,
    EncodedAudio,
    NonFiniteAudioError,
    change_speed,
    probe_audio,
    read_audio,
    read_blocks,
)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    """Every value of int16 may occur, the extremes do."""
    waveform_S = np.random.default_rng(seed).integers(-32768, 32768, num_samples).astype(np.int16)
    waveform_S[:2] = -32768, 32767
    return waveform_S


def tone(hz: float, rate: int, seconds: float = 1.0, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def peak_hz(waveform_S: np.ndarray, rate: int = 16_000) -> float:
    spectrum = np.abs(np.fft.rfft(waveform_S * np.hanning(len(waveform_S))))
    return float(np.argmax(spectrum)) * rate / len(waveform_S)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "au", "w64", "caf"])
def test_pcm16_mono_at_the_target_rate_comes_back_bit_for_bit(tmp_path: Path, suffix: str):
    waveform_S = noise(16_001)
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, waveform_S, 16_000, subtype="PCM_16")
    read_S = read_audio(path)
    assert read_S.dtype == np.int16
    np.testing.assert_array_equal(read_S, waveform_S)
    assert probe_audio(path) == AudioInfo(16_000, 1, 16_001, 16_001 / 16_000)


FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_24"),
    "opus": ("OGG", "OPUS"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same two seconds of stereo at 24 kHz in each format."""
    path = tmp_path_factory.mktemp("formats") / "a"
    encoded = {}
    for name, (container, subtype) in FORMATS.items():
        soundfile.write(path, noise(96_000).reshape(-1, 2) // 4, 24_000, format=container, subtype=subtype)
        encoded[name] = path.read_bytes()
    return encoded


def outcome(read, source: Path | EncodedAudio) -> tuple[object, ...]:
    """What came back, or which error and what it says."""
    try:
        found = read(source)
    except AudioError as e:
        return type(e), str(e)
    return (found.tobytes(),) if isinstance(found, np.ndarray) else (found,)


def assert_alike(folder: Path, name: str, content: bytes) -> bool:
    """The file and its bytes in memory give the same; whether they give a waveform."""
    path = folder / f"alike.{name}"
    path.write_bytes(content)
    for read in (probe_audio, read_audio):
        from_memory = outcome(read, EncodedAudio(str(path), content))
        assert outcome(read, path) == from_memory
    return len(from_memory) == 1


@pytest.mark.parametrize("name", [*FORMATS, "empty", "text"])
def test_a_file_in_memory_decodes_as_on_disk(files: dict[str, bytes], tmp_path: Path, name: str):
    content = files.get(name, b"" if name == "empty" else b"not audio at all")
    assert assert_alike(tmp_path, name, content) == (name in FORMATS)


def test_what_only_the_name_says_is_known_in_memory_too(files: dict[str, bytes], tmp_path: Path):
    assert assert_alike(tmp_path, "mp3", bytes(200) + files["mp3"])
    assert not assert_alike(tmp_path, "wav", bytes(200) + files["mp3"])


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_in_memory_is_refused_as_on_disk(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    name = data.draw(st.sampled_from(list(FORMATS)))
    content = bytearray(files[name][: data.draw(st.integers(1, len(files[name])))])
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert_alike(tmp_path_factory.getbasetemp(), name, bytes(content))


def test_blocks_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 1000)
    waveform_SC = noise(2 * 10_001).reshape(-1, 2)
    soundfile.write(tmp_path / "a.wav", waveform_SC, 16_000)
    in_blocks_S = read_audio(tmp_path / "a.wav")
    monkeypatch.undo()
    np.testing.assert_array_equal(in_blocks_S, read_audio(tmp_path / "a.wav"))
    assert len(in_blocks_S) == 10_001


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8000, 1)])
def test_a_file_in_blocks_is_the_file_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, channels: int
):
    soundfile.write(tmp_path / "a.wav", noise(6 * rate * channels + channels).reshape(-1, channels), rate)
    whole_S = read_audio(tmp_path / "a.wav")
    monkeypatch.setattr(audio, "_STREAMED_SAMPLES", 10_007)
    pieces = list(read_blocks(tmp_path / "a.wav"))
    assert len(pieces) > 5
    np.testing.assert_array_equal(np.concatenate(pieces), whole_S)
    cut(tmp_path / "a.wav", 0.9)
    with pytest.raises(AudioError, match="truncated"):
        list(read_blocks(tmp_path / "a.wav"))


def test_what_is_read_in_blocks_may_be_as_long_as_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audio, "MAX_DECODED_SAMPLES", 15_000)
    soundfile.write(tmp_path / "a.wav", noise(16_000), 16_000)
    with pytest.raises(AudioError, match="cut it into pieces"):
        probe_audio(tmp_path / "a.wav")
    assert probe_audio(tmp_path / "a.wav", streamed=True).num_samples == 16_000
    assert sum(map(len, read_blocks(tmp_path / "a.wav"))) == 16_000
    monkeypatch.setattr(audio, "MAX_STREAMED_DURATION", 0.5)
    for read in (lambda path: probe_audio(path, streamed=True), lambda path: list(read_blocks(path))):
        with pytest.raises(AudioError, match=r"at most 0\.5 s are read: cut it into pieces"):
            read(tmp_path / "a.wav")


def test_channels_are_averaged(tmp_path: Path):
    waveform_SC = noise(3 * 4000).reshape(-1, 3)
    soundfile.write(tmp_path / "a.wav", waveform_SC, 16_000)
    exact_S = np.rint(waveform_SC.astype(np.float64).mean(axis=1))
    # The mean of three is never half way between two integers, so float32 rounds as float64 does.
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), exact_S)


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_resampling_keeps_the_pitch_level_and_duration_of_a_tone(tmp_path: Path, rate: int):
    num_samples = rate + 7
    soundfile.write(tmp_path / "a.wav", tone(1000, rate, num_samples / rate), rate)
    waveform_S = read_audio(tmp_path / "a.wav")
    assert len(waveform_S) == int(np.floor(num_samples * 16_000 / rate + 0.5))
    assert peak_hz(waveform_S) == pytest.approx(1000, abs=1.1)
    expected_S = 32768 * tone(1000, 16_000, len(waveform_S) / 16_000)
    middle = slice(1000, -1000)
    np.testing.assert_allclose(waveform_S[middle], expected_S[middle], atol=8)


def test_resampling_leaves_no_alias(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", tone(11_000, 44_100), 44_100)  # would fold down to 5 kHz
    assert np.abs(read_audio(tmp_path / "a.wav")[500:-500]).max() <= 1


def test_24_bits_are_rounded_to_16_not_truncated(tmp_path: Path):
    waveform_S = noise(1000).astype(np.int32)
    fine_S = np.clip(waveform_S * 256 + 200, -(2**23), 2**23 - 1)  # 200 / 256 of a step above each 16-bit value
    soundfile.write(tmp_path / "a.wav", fine_S << 8, 16_000, subtype="PCM_24")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), np.minimum(waveform_S + 1, 32767))


def test_float_beyond_full_scale_is_clipped_not_wrapped(tmp_path: Path):
    values_S = np.array([0.0, 0.5, 1.0, 1.7, -1.0, -3.0, 30_000.0, -MAX_AMPLITUDE], np.float32)
    soundfile.write(tmp_path / "a.wav", values_S, 16_000, subtype="FLOAT")
    expected_S = [0, 16384, 32767, 32767, -32768, -32768, 32767, -32768]
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), expected_S)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_non_finite_sample_is_named(tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audio, "_BLOCK_SAMPLES", 1000)
    values_SC = np.zeros((5000, 2), np.float32)
    values_SC[3210, 1] = value
    soundfile.write(tmp_path / "a.wav", values_SC, 16_000, subtype="FLOAT")
    with pytest.raises(NonFiniteAudioError, match=r"sample 3210 is .*expected a number"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff", "au", "w64", "caf", "rf64", "ogg", "mp3"])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(64_000) // 4, 16_000)
    assert len(read_audio(path)) == 64_000
    cut(path, share)
    with pytest.raises(AudioError, match=r"truncated|malformed"):
        read_audio(path)


def test_a_truncated_opus_file_is_refused(tmp_path: Path):
    soundfile.write(tmp_path / "a.opus", noise(64_000) // 4, 16_000, format="OGG", subtype="OPUS")
    cut(tmp_path / "a.opus", 0.7)
    with pytest.raises(AudioError, match=r"a\.opus: truncated: the last page"):
        read_audio(tmp_path / "a.opus")


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_only_an_mp3_may_decode_a_little_shorter_than_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(16_000) // 4, 16_000)
    whole_S = read_audio(path)
    decode = soundfile.SoundFile.read

    def short_by(missing: int):
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: decode(*args, **kwargs)[:-missing])

    short_by(1600)
    if suffix == "mp3":
        np.testing.assert_array_equal(read_audio(path), whole_S[:-1600])
    short_by(1601 if suffix == "mp3" else 1)
    with pytest.raises(AudioError, match="truncated: the header announces 16000 samples"):
        read_audio(path)


def test_a_wav_written_into_a_pipe_is_read_whole(tmp_path: Path):
    waveform_S = noise(1000)
    path = tmp_path / "a.wav"
    soundfile.write(path, waveform_S, 16_000)
    header = bytearray(path.read_bytes())
    for size in (0xFFFFFFFF, 0x7FFFF000):
        header[40:44] = struct.pack("<I", size)
        path.write_bytes(header)
        np.testing.assert_array_equal(read_audio(path), waveform_S)


def forge_flac_length(path: Path, num_samples: int) -> None:
    """STREAMINFO stands at byte 8; the 36 bits of its sample count end at byte 26."""
    data = bytearray(path.read_bytes())
    data[21] = data[21] & 0xF0 | num_samples >> 32
    data[22:26] = struct.pack(">I", num_samples & 0xFFFFFFFF)
    path.write_bytes(data)


def test_a_header_that_announces_an_absurd_size_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(16_000), 16_000)
    forge_flac_length(path, 2**36 - 1)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_args, **_kwargs: pytest.fail("decoded"))
    for function in (probe_audio, read_audio):
        with pytest.raises(AudioError, match=r"announces 4294967\.3 s .*channels: 1.*cut it into pieces"):
            function(path)
    forge_flac_length(path, 0)
    with pytest.raises(AudioError, match="does not say how long"):
        read_audio(path)


def test_many_channels_count_towards_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audio, "MAX_DECODED_SAMPLES", 7999)
    soundfile.write(tmp_path / "mono.wav", noise(4000), 16_000)
    soundfile.write(tmp_path / "stereo.wav", noise(8000).reshape(-1, 2), 16_000)
    assert len(read_audio(tmp_path / "mono.wav")) == 4000
    with pytest.raises(AudioError, match="channels: 2"):
        read_audio(tmp_path / "stereo.wav")


def test_max_duration_is_the_callers_choice(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", noise(16_000), 16_000)
    assert len(read_audio(tmp_path / "a.wav", max_duration=1.0)) == 16_000
    with pytest.raises(AudioError, match=r"announces 1\.0 s .*at most 0\.99 s"):
        read_audio(tmp_path / "a.wav", max_duration=0.99)


@pytest.mark.parametrize("rate", [1, 2_000_000])
def test_an_impossible_rate_is_refused(tmp_path: Path, rate: int):
    soundfile.write(tmp_path / "a.wav", noise(100), rate)
    with pytest.raises(AudioError, match=f"says {rate} Hz"):
        read_audio(tmp_path / "a.wav")


def test_empty_files_are_refused(tmp_path: Path):
    (tmp_path / "zero_bytes.wav").touch()
    soundfile.write(tmp_path / "header_only.wav", np.zeros(0, np.int16), 16_000)
    soundfile.write(tmp_path / "one_sample.wav", np.zeros(1, np.int16), 48_000)
    for name in ("zero_bytes", "header_only", "one_sample"):
        with pytest.raises(EmptyAudioError, match=rf"{name}\.wav: "):
            read_audio(tmp_path / f"{name}.wav")
    with pytest.raises(EmptyAudioError, match="holds no samples"):
        probe_audio(tmp_path / "header_only.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "raw"])
def test_a_misnamed_file_is_refused(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    path.write_text("This is a letter, not a recording.\n" * 100)
    with pytest.raises(AudioError, match=rf"a\.{suffix}: not an audio file"):
        read_audio(path)


def test_audio_with_a_wrong_suffix_is_read_for_what_it_is(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", noise(100), 16_000, format="FLAC")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav"), noise(100))


def test_missing_file_and_directory_are_refused(tmp_path: Path):
    with pytest.raises(AudioError, match="no such file"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="not a file"):
        read_audio(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", noise(100), 16_000)
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(AudioError, match="cannot be read"):
        read_audio(tmp_path / "a.wav")


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), position=st.integers(0, 10**6), byte=st.integers(0, 255), keep=st.floats(0, 1))
def test_a_damaged_file_gives_samples_or_an_audio_error(
    tmp_path_factory: pytest.TempPathFactory, seed: int, position: int, byte: int, keep: float
):
    path = tmp_path_factory.getbasetemp() / f"damaged{('.wav', '.flac', '.ogg')[seed % 3]}"
    soundfile.write(path, noise(2000, seed), 16_000)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data[: max(1, int(len(data) * min(1.0, 2 * keep)))])
    try:
        waveform_S = read_audio(path, max_duration=600)
    except AudioError as e:
        assert str(e).startswith(f"{path}: ")  # noqa: PT017
        assert "\n" not in str(e)  # noqa: PT017
    else:
        assert waveform_S.dtype == np.int16
        assert len(waveform_S)


@settings(max_examples=200)
@given(num_samples=st.integers(0, 3000), speed=st.floats(0.5, 1.5))
def test_changed_speed_has_exactly_the_length_that_the_plan_counts_on(num_samples: int, speed: float):
    changed_S = change_speed(np.full(num_samples, 1000, np.int16), speed)
    assert changed_S.shape == (round(num_samples / speed),)
    assert changed_S.dtype == np.int16


@pytest.mark.parametrize("num_out", [899, 900, 901])
def test_resampling_gives_exactly_the_samples_asked_for(num_out: int):
    """soxr rounds half up where Python rounds half to even; whatever it gives, the length is ours."""
    assert audio._resample(np.ones(1000, np.float32), 1.0, 0.9, num_out).shape == (num_out,)


@pytest.mark.parametrize("speed", [0.9, 1.1, 1.2345])
def test_speed_raises_the_pitch_and_shortens_by_the_same_factor(speed: float):
    waveform_S = (32768 * tone(1000, 16_000, 2.0)).astype(np.int16)
    changed_S = change_speed(waveform_S, speed)
    assert len(changed_S) == round(32_000 / speed)
    assert peak_hz(changed_S) == pytest.approx(1000 * speed, abs=1.1)
    np.testing.assert_array_equal(changed_S, change_speed(waveform_S, speed))


def test_speed_1_changes_nothing_and_shares_nothing():
    waveform_S = noise(1000)
    changed_S = change_speed(waveform_S, 1.0)
    np.testing.assert_array_equal(changed_S, waveform_S)
    assert not np.shares_memory(changed_S, waveform_S)


def test_speed_clips_what_the_filter_overshoots():
    square_S = np.where(np.arange(4000) // 40 % 2, 32767, -32768).astype(np.int16)
    changed_S = change_speed(square_S, 0.9)
    time_S = np.arange(len(changed_S)) * 0.9
    inside_S = (time_S % 40 > 2) & (time_S % 40 < 38) & (time_S < 3990)
    high_S = time_S // 40 % 2 == 1
    assert changed_S[inside_S & high_S].min() > 20_000  # a wrapped overshoot would be near -32768
    assert changed_S[inside_S & ~high_S].max() < -20_000
    assert changed_S.max() == 32767
    assert changed_S.min() == -32768


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_an_impossible_speed_is_refused(speed: float):
    with pytest.raises(ValueError, match="speed is"):
        change_speed(noise(10), speed)


def test_an4_comes_back_bit_for_bit(corpora: Path):
    paths = sorted(corpora.glob("an4/wav/an4test_clstk/*/*.wav"))
    assert len(paths) == 130
    for path in paths[::10]:
        np.testing.assert_array_equal(read_audio(path), np.frombuffer(path.read_bytes()[44:], "<i2"))


def test_librispeech_opus_is_speech_of_the_announced_length(corpora: Path):
    paths = sorted(corpora.glob("mini_librispeech/**/*.opus"))
    assert paths
    for path in paths[:: len(paths) // 5]:
        info, waveform_S = probe_audio(path), read_audio(path)
        assert len(waveform_S) == int(np.floor(info.duration * 16_000 + 0.5))
        assert 100 < np.sqrt(np.mean(np.square(waveform_S, dtype=np.float64))) < 10_000
