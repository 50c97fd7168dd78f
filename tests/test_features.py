import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxds2.config import FeatureConfig
from jaxds2.features import FIXED_MEAN, FIXED_STD, LOG_OFFSET, log_mel, mel_filterbank, num_frames

UTTERANCE = FeatureConfig()
FIXED = FeatureConfig(normalize="fixed")

_log_mel = jax.jit(log_mel, static_argnums=2)


def features_of(
    waveforms: list[np.ndarray], features: FeatureConfig, *, num_samples: int | None = None, padding: float = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Features of waveforms in one batch, the rows filled up to `num_samples` (default: the longest) with `padding`."""
    lengths_B = np.array([len(w) for w in waveforms], np.int32)
    width = num_samples or max(lengths_B)
    audio_BS = np.full((len(waveforms), width), padding, waveforms[0].dtype)
    for row, waveform in zip(audio_BS, waveforms, strict=True):
        row[: len(waveform)] = waveform
    features_BTF, feature_lengths_B = _log_mel(audio_BS, lengths_B, features)
    assert features_BTF.dtype == jnp.float32
    assert feature_lengths_B.dtype == jnp.int32
    assert features_BTF.shape == (len(waveforms), num_frames(width, features), features.n_mels)
    return np.asarray(features_BTF), np.asarray(feature_lengths_B)


def raw_log_mel(waveform_S: np.ndarray, features: FeatureConfig, num_samples: int | None = None) -> np.ndarray:
    """Our log-mel before normalisation, (frames, F)."""
    fixed = dataclasses.replace(features, normalize="fixed")
    features_BTF, lengths_B = features_of([waveform_S], fixed, num_samples=num_samples)
    return features_BTF[0, : lengths_B[0]] * FIXED_STD + FIXED_MEAN


def librosa_log_mel(waveform_S: np.ndarray, features: FeatureConfig) -> np.ndarray:
    power = librosa.feature.melspectrogram(
        y=waveform_S.astype(np.float32) / 32768,
        sr=features.sample_rate,
        n_fft=features.n_fft,
        win_length=features.window_length,
        hop_length=features.hop_length,
        n_mels=features.n_mels,
        center=False,
        power=2.0,
    )
    return np.log(power.T + np.float32(LOG_OFFSET))


def speech(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise whose loudness swells like syllables, int16."""
    envelope_S = np.sin(np.arange(num_samples) / 1500) ** 2
    noise_S = np.random.default_rng(seed).normal(0, 3000, num_samples)
    return (noise_S * envelope_S).astype(np.int16)


@pytest.mark.parametrize(
    ("num_samples", "frames"),
    [(0, 0), (1, 0), (351, 0), (352, 0), (511, 0), (512, 1), (671, 1), (672, 2), (831, 2), (832, 3), (16_000, 97)],
)
def test_number_of_frames(num_samples: int, frames: int) -> None:
    counted = num_frames(num_samples, UTTERANCE)
    assert type(counted) is int
    assert counted == frames
    for array in (np.array([num_samples]), np.array([num_samples], np.int32), jnp.array([num_samples], jnp.int32)):
        counted = num_frames(array, UTTERANCE)
        assert type(counted) is type(array)
        assert counted.dtype == array.dtype
        assert counted[0] == frames


@given(num_samples=st.integers(0, 3000), n_fft=st.integers(1, 600), hop_ms=st.integers(1, 40))
def test_number_of_frames_is_the_number_of_whole_frames(num_samples: int, n_fft: int, hop_ms: int) -> None:
    features = FeatureConfig(sample_rate=8000, n_fft=n_fft, window_ms=n_fft / 8, hop_ms=hop_ms)
    whole = 0
    if num_samples >= n_fft:  # librosa refuses less
        whole = librosa.util.frame(np.zeros(num_samples), frame_length=n_fft, hop_length=8 * hop_ms).shape[-1]
    assert num_frames(num_samples, features) == whole


@pytest.mark.parametrize(
    ("sample_rate", "n_fft", "n_mels"), [(16_000, 512, 80), (16_000, 401, 40), (8000, 256, 23), (1600, 512, 30)]
)
def test_filterbank_equals_librosa(sample_rate: int, n_fft: int, n_mels: int) -> None:
    features = FeatureConfig(sample_rate=sample_rate, n_fft=n_fft, n_mels=n_mels)
    expected = librosa.filters.mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels).T
    np.testing.assert_allclose(mel_filterbank(features), expected, rtol=1e-5, atol=1e-8)


def test_log_mel_equals_librosa_on_an4(corpora: Path) -> None:
    names = (corpora / "an4/etc/an4_train.fileids").read_text(encoding="utf-8").split()[::40]
    for name in names:
        waveform_S, _ = soundfile.read(corpora / f"an4/wav/{name}.wav", dtype="int16")
        ours = raw_log_mel(waveform_S, UTTERANCE, num_samples=160_000)
        np.testing.assert_allclose(ours, librosa_log_mel(waveform_S, UTTERANCE), rtol=0, atol=1e-4, err_msg=name)


def test_log_mel_equals_librosa_on_an4_with_digital_silence_inside(corpora: Path) -> None:
    name = (corpora / "an4/etc/an4_train.fileids").read_text(encoding="utf-8").split()[0]
    waveform_S, _ = soundfile.read(corpora / f"an4/wav/{name}.wav", dtype="int16")
    waveform_S[8000:16_000] = 0
    ours = raw_log_mel(waveform_S, UTTERANCE)
    assert np.isclose(ours, np.log(LOG_OFFSET)).all(axis=1).sum() > 40
    np.testing.assert_allclose(ours, librosa_log_mel(waveform_S, UTTERANCE), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("signal", "tolerance"),
    [
        ("silence", 1e-6),
        ("one step", 1e-6),
        ("syllables", 1e-4),
        ("noise", 1e-4),
        ("click", 1e-4),
        ("square wave", 1e-4),
        # All power in one bin, 120 dB above the offset: what a float32 FFT rounds off shows in the other bins.
        ("tone", 5e-4),
        ("constant", 5e-4),
    ],
)
def test_log_mel_equals_librosa_on_signals(signal: str, tolerance: float) -> None:
    time_S = np.arange(8000) / 16_000
    waveform_S = {
        "silence": np.zeros(8000),
        "one step": time_S > 0.25,
        "syllables": speech(8000),
        "noise": np.random.default_rng(0).uniform(-32_768, 32_767, 8000),
        "click": 32_767 * (np.arange(8000) == 4321),
        "square wave": 32_767 * np.sign(np.sin(2 * np.pi * 300 * time_S)),
        "tone": 32_767 * np.sin(2 * np.pi * 1234 * time_S),
        "constant": np.full(8000, -32_768),
    }[signal].astype(np.int16)
    ours = raw_log_mel(waveform_S, UTTERANCE)
    np.testing.assert_allclose(ours, librosa_log_mel(waveform_S, UTTERANCE), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "features",
    [
        FeatureConfig(n_mels=40, window_ms=32.0),
        FeatureConfig(n_mels=40, n_fft=401, window_ms=20.0625, hop_ms=7.0),  # odd, and no hop fits the window
        FeatureConfig(n_mels=20, n_fft=256, window_ms=5.0, hop_ms=12.5),  # gaps between the windows
        FeatureConfig(n_mels=20, sample_rate=8000, n_fft=256),
    ],
)
@pytest.mark.parametrize("num_samples", [512, 4001])
def test_log_mel_equals_librosa_for_any_window_and_hop(features: FeatureConfig, num_samples: int) -> None:
    waveform_S = speech(num_samples)
    ours = raw_log_mel(waveform_S, features)
    np.testing.assert_allclose(ours, librosa_log_mel(waveform_S, features), rtol=0, atol=1e-4)


def test_utterance_normalisation_equals_librosa_normalised() -> None:
    waveform_S = speech(20_000)
    ours_BTF, _ = features_of([waveform_S], UTTERANCE, num_samples=30_000)
    reference_TF = librosa_log_mel(waveform_S, UTTERANCE).astype(np.float64)
    reference_TF = (reference_TF - reference_TF.mean(axis=0)) / reference_TF.std(axis=0)
    np.testing.assert_allclose(ours_BTF[0, : len(reference_TF)], reference_TF, rtol=0, atol=1e-4)


def test_utterance_normalisation_gives_every_bin_mean_zero_and_variance_one() -> None:
    waveforms = [speech(n, seed=n) for n in (3000, 16_000, 9999)]
    features_BTF, lengths_B = features_of(waveforms, UTTERANCE)
    for x_TF, length in zip(features_BTF, lengths_B, strict=True):
        np.testing.assert_allclose(x_TF[:length].mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(x_TF[:length].std(axis=0), 1, atol=1e-4)


def test_utterance_normalisation_removes_the_gain() -> None:
    quiet_S = np.random.default_rng(0).integers(-1000, 1000, 8000, dtype=np.int16)
    quiet, _ = features_of([quiet_S], UTTERANCE)
    loud, _ = features_of([quiet_S * np.int16(30)], UTTERANCE)
    np.testing.assert_allclose(loud, quiet, rtol=0, atol=0.05)  # a gain of 30 is 6.8 in log power


def test_fixed_normalisation_of_a_frame_ignores_the_rest_of_the_utterance() -> None:
    waveform_S = speech(16_000)
    whole, _ = features_of([waveform_S], FIXED)
    part, _ = features_of([waveform_S[:8000]], FIXED)
    np.testing.assert_allclose(whole[:, : part.shape[1]], part, rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", [UTTERANCE, FIXED], ids=["utterance", "fixed"])
@pytest.mark.parametrize("num_samples", [0, 1, 511, 512, 700, 5000])
def test_short_and_silent_utterances_are_finite(num_samples: int, features: FeatureConfig) -> None:
    rows = [np.zeros(num_samples, np.int16), np.full(num_samples, 32_767, np.int16), speech(num_samples)]
    features_BTF, lengths_B = features_of(rows, features, num_samples=6000)
    assert set(lengths_B) == {num_frames(num_samples, features)}
    assert np.all(np.isfinite(features_BTF))
    assert not features_BTF[:, lengths_B[0] :].any()
    if features is UTTERANCE:
        np.testing.assert_allclose(features_BTF[0], 0, atol=1e-3)  # nothing stands out of silence


def test_a_batch_shorter_than_one_frame_has_no_frames() -> None:
    features_BTF, lengths_B = features_of([np.ones(300, np.int16)], UTTERANCE)
    assert features_BTF.shape == (1, 0, 80)
    assert lengths_B.tolist() == [0]


@pytest.mark.parametrize("features", [UTTERANCE, FIXED], ids=["utterance", "fixed"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_padding_does_not_leak(dtype: type, features: FeatureConfig) -> None:
    scale = 1 if dtype is np.int16 else 32_768
    waveforms = [(speech(n, seed=n) / scale).astype(dtype) for n in (4000, 4159, 4160, 9000, 0)]
    clean, _ = features_of(waveforms, features, num_samples=10_000)
    poison = -32_768 if dtype is np.int16 else np.nan
    poisoned, lengths_B = features_of(waveforms, features, num_samples=10_000, padding=poison)
    np.testing.assert_array_equal(poisoned, clean)
    for x_TF, length in zip(poisoned, lengths_B, strict=True):
        assert not x_TF[length:].any()


@pytest.mark.parametrize("features", [UTTERANCE, FIXED], ids=["utterance", "fixed"])
def test_an_utterance_has_the_same_features_in_any_batch(features: FeatureConfig) -> None:
    waveforms = [speech(n, seed=n) for n in (9000, 4000, 12_345)]
    together, lengths_B = features_of(waveforms, features, num_samples=16_000)
    for row, (waveform_S, length) in enumerate(zip(waveforms, lengths_B, strict=True)):
        alone, _ = features_of([waveform_S], features)
        assert alone.shape[1] == length
        np.testing.assert_allclose(together[row, :length], alone[0], rtol=0, atol=2e-5)


def test_rows_on_two_devices_need_no_communication() -> None:
    rows = PartitionSpec("data")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    audio_BS = np.stack([speech(4000, seed=i) for i in range(4)])
    lengths_B = np.array([4000, 3000, 2000, 0], np.int32)
    mapped = jax.shard_map(partial(log_mel, features=UTTERANCE), mesh=mesh, in_specs=rows, out_specs=rows)
    batch = jax.device_put((audio_BS, lengths_B), NamedSharding(mesh, rows))
    compiled = jax.jit(mapped).lower(*batch).compile()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective", str(compiled.as_text()))
    for two, one in zip(compiled(*batch), _log_mel(audio_BS, lengths_B, UTTERANCE), strict=True):
        assert len(two.sharding.device_set) == 2
        np.testing.assert_allclose(two, one, rtol=0, atol=2e-5)


def test_int16_equals_float32_in_unit_scale() -> None:
    waveform_S = speech(8000)
    int16, _ = features_of([waveform_S], UTTERANCE)
    float32, _ = features_of([waveform_S.astype(np.float32) / 32_768], UTTERANCE)
    np.testing.assert_array_equal(int16, float32)


def test_other_dtypes_of_audio_are_refused() -> None:
    with pytest.raises(TypeError, match="audio is int32, expected int16"):
        jax.eval_shape(
            partial(log_mel, features=UTTERANCE),
            jax.ShapeDtypeStruct((1, 1000), jnp.int32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )
