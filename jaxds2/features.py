"""Log-mel features, computed on the device from padded waveforms. `librosa.feature.melspectrogram` is the reference.

Frames lie wholly inside the utterance (librosa's `center=False`), so no frame depends on the padding and a streaming
client can compute the same frames as they fill.
"""

from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxds2.config import FeatureConfig

LOG_OFFSET = 1e-6
"""Added to the mel power before the logarithm, for waveforms in [-1, 1]; digital silence becomes log(1e-6) = -13.8.
A quarter of the mel powers in AN4 and mini LibriSpeech, mostly pauses, lie below it. A smaller offset would let the
rounding of a float32 FFT through: the largest difference from librosa is 7e-5 on AN4 and 1e-4 on mini LibriSpeech,
which is louder; with 2**-24 it is 1.2e-4 on AN4."""

FIXED_MEAN = -9.68
"""Mean of log-mel features (natural logarithm, default FeatureConfig) over all bins and frames of the training sets of
AN4 (-10.16 alone) and mini LibriSpeech (-9.61 alone)."""
FIXED_STD = 3.65
"""Standard deviation of the same values (3.42 and 3.67 alone)."""

_VARIANCE_OFFSET = 1e-5  # a bin that never changes becomes 0, not 0 / 0

Count = TypeVar("Count", bound=int | np.integer | np.ndarray | jax.Array)


def num_frames(num_samples: Count, features: FeatureConfig) -> Count:
    """Frames of a waveform: one for every hop at which `n_fft` samples still fit, so none below `n_fft` samples.

    Takes and gives an int, or an array of signed integers (numpy or JAX).
    """
    frames: Any = 1 + (num_samples - features.n_fft) // features.hop_length
    return (frames + abs(frames)) // 2  # max(0, frames) for ints and arrays alike


@cache
def mel_filterbank(features: FeatureConfig) -> np.ndarray:
    """Triangular filters of equal area, equally spaced on Slaney's mel scale from 0 Hz to half the sample rate.

    The scale is linear below 1 kHz (15 mel there) and logarithmic above (27 mel for a factor of 6.4), as in M. Slaney,
    Auditory Toolbox, 1998, and in `librosa.filters.mel`.

    Returns:
      (n_fft // 2 + 1, F) float32, read-only; `power @ filterbank` is the mel spectrum.
    """
    knee_hz, knee_mel, log_step = 1000.0, 15.0, np.log(6.4) / 27.0
    nyquist = features.sample_rate / 2
    nyquist_mel = knee_mel * nyquist / knee_hz
    if nyquist > knee_hz:
        nyquist_mel = knee_mel + np.log(nyquist / knee_hz) / log_step
    mel = np.linspace(0.0, nyquist_mel, features.n_mels + 2)
    edges = np.where(mel < knee_mel, mel * knee_hz / knee_mel, knee_hz * np.exp(log_step * (mel - knee_mel)))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    hz = np.fft.rfftfreq(features.n_fft, 1 / features.sample_rate)[:, None]
    triangles = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre))
    filterbank = (np.maximum(triangles, 0.0) * 2.0 / (high - low)).astype(np.float32)
    filterbank.flags.writeable = False
    return filterbank


def log_mel(audio_BS: jax.Array, audio_lengths_B: jax.Array, features: FeatureConfig) -> tuple[jax.Array, jax.Array]:
    """Normalised log-mel features of a batch.

    A periodic Hann window in the middle of `n_fft` samples, power spectrum, Slaney's filterbank, log(mel + LOG_OFFSET),
    then `features.normalize`. What lies beyond an utterance's length, NaN included, changes nothing.

    XLA does not partition an FFT: with rows on several devices call this inside `jax.shard_map`, or the frames of the
    whole batch are gathered and transformed on every device.

    Args:
      audio_BS: (B, S) int16, or float32 in [-1, 1].
      audio_lengths_B: (B,) int32, in samples; 0 for filler rows.
      features: the analysis.

    Returns:
      features_BTF (B, num_frames(S), F) float32, 0 beyond the lengths, and feature_lengths_B (B,) int32.

    Raises:
      TypeError: audio of another dtype.
    """
    if audio_BS.dtype == jnp.int16:
        audio_BS = audio_BS.astype(jnp.float32) / 32768.0
    elif audio_BS.dtype != jnp.float32:
        raise TypeError(f"log_mel: audio is {audio_BS.dtype}, expected int16, or float32 in [-1, 1]")
    feature_lengths_B = num_frames(audio_lengths_B, features)
    log_mel_BTF = jnp.log(_mel_power(audio_BS, features) + LOG_OFFSET)
    if features.normalize == "utterance":
        return _normalize_utterance(log_mel_BTF, feature_lengths_B), feature_lengths_B
    normalized_BTF = (log_mel_BTF - FIXED_MEAN) / FIXED_STD
    return jnp.where(_inside(log_mel_BTF, feature_lengths_B), normalized_BTF, 0.0), feature_lengths_B


def _mel_power(audio_BS: jax.Array, features: FeatureConfig) -> jax.Array:
    starts_T = np.arange(num_frames(audio_BS.shape[1], features), dtype=np.int32) * features.hop_length
    if starts_T.size == 0:  # a slice may not be longer than the audio
        return jnp.zeros((audio_BS.shape[0], 0, features.n_mels), jnp.float32)
    # One gather of whole frames: on a CPU faster than an index for each sample, or hops laid side by side.
    frame_at = partial(jax.lax.dynamic_slice_in_dim, audio_BS, slice_size=features.n_fft, axis=1)
    frames_BTN = jax.vmap(frame_at, out_axes=1)(starts_T) * _window(features)[None, None, :]
    # On a CPU core several times as fast as the DFT by matmul, with a third of its rounding error.
    spectrum_BTK = jnp.fft.rfft(frames_BTN)
    power_BTK = jnp.square(spectrum_BTK.real) + jnp.square(spectrum_BTK.imag)
    return jnp.matmul(power_BTK, mel_filterbank(features), precision=jax.lax.Precision.HIGHEST)


def _window(features: FeatureConfig) -> np.ndarray:
    """(n_fft,) float32, a periodic Hann window with zeros on both sides, as librosa places it."""
    length = features.window_length
    window_N = np.zeros(features.n_fft, np.float32)
    first = (features.n_fft - length) // 2
    window_N[first : first + length] = np.sin(np.pi * np.arange(length) / length) ** 2
    return window_N


def _inside(x_BTF: jax.Array, lengths_B: jax.Array) -> jax.Array:
    return (jnp.arange(x_BTF.shape[1])[None, :] < lengths_B[:, None])[..., None]


def _normalize_utterance(x_BTF: jax.Array, lengths_B: jax.Array) -> jax.Array:
    inside_BT1 = _inside(x_BTF, lengths_B)
    count_B11 = jnp.maximum(lengths_B, 1).astype(jnp.float32)[:, None, None]
    mean_B1F = jnp.sum(jnp.where(inside_BT1, x_BTF, 0.0), axis=1, keepdims=True) / count_B11
    centred_BTF = jnp.where(inside_BT1, x_BTF - mean_B1F, 0.0)
    variance_B1F = jnp.sum(jnp.square(centred_BTF), axis=1, keepdims=True) / count_B11
    return centred_BTF * jax.lax.rsqrt(variance_B1F + _VARIANCE_OFFSET)
