"""Augmentation of training utterances; every draw is keyed by (seed, epoch, utterance).

Speed is drawn on the host, because the loader resamples; noise and SpecAugment run on the device. Each function is
written for one utterance and mapped over the batch: neither the neighbours nor the padding touch what is drawn for it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxds2.config import AugmentConfig

# Random streams. The first two keep this module's draws apart from others that start at the same seed.
_SPEED_STREAM, _DEVICE_STREAM = 1, 2
_SNR, _NOISE, _WARP, _FREQ_MASKS, _TIME_MASKS = range(5)
STREAMS = 5
"""Streams of an utterance's key that this module draws from, counted from 0; those of others begin here."""


def draw_speeds(seed: int, epoch: int, num_utterances: int, spread: float) -> np.ndarray:
    """Speed factors of one epoch, on the host.

    Entry i depends on (seed, epoch, i) only, so a manifest that grows keeps the speeds of its first utterances. The raw
    Philox stream is used because numpy promises that it never changes, unlike its distributions.

    Args:
      seed: 0 or more.
      epoch: 0 or more.
      num_utterances: N, the length of the manifest.
      spread: largest relative change of speed, in [0, 1).

    Returns:
      (N,) float64, uniform in [1 - spread, 1 + spread); all ones where spread is 0.
    """
    philox = np.random.Philox(np.random.SeedSequence([seed, epoch, _SPEED_STREAM]))
    uniform_N = (philox.random_raw(num_utterances) >> np.uint64(11)) * 2.0**-53
    return 1.0 + spread * (2.0 * uniform_N - 1.0)


def utterance_keys(seed: int, epoch: int | jax.Array, index_B: jax.Array) -> jax.Array:
    """One random key for each utterance of a batch.

    Args:
      seed: the run's seed.
      epoch: scalar.
      index_B: (B,) int32, places in the list of utterances to train on; filler rows may hold anything.

    Returns:
      (B,) typed keys; always threefry, whose draws are the same under vmap and whatever the sharding.
    """
    stream = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _DEVICE_STREAM)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(stream, epoch), index_B)


def add_noise(
    audio_BS: jax.Array, audio_lengths_B: jax.Array, keys_B: jax.Array, snr_db: tuple[float, float]
) -> jax.Array:
    """Add white noise at a signal-to-noise ratio drawn uniformly for each utterance.

    The signal's power is that of the whole utterance; digital silence stays silent. Threefry draws sample s from
    (key, s) alone (`jax_threefry_partitionable`, JAX's default), so the noise is the same in any bucket. A sample may
    still differ by one int16 step there, because the power is summed in another order.

    Args:
      audio_BS: (B, S) int16; anything beyond the lengths.
      audio_lengths_B: (B,) int32, in samples.
      keys_B: (B,) from `utterance_keys`.
      snr_db: lowest and highest ratio, in decibels.

    Returns:
      (B, S) int16, rounded and clipped; 0 beyond the lengths.
    """
    return jax.vmap(partial(_add_noise, snr_db=snr_db))(audio_BS, audio_lengths_B, keys_B)


def _add_noise(audio_S: jax.Array, length: jax.Array, key: jax.Array, snr_db: tuple[float, float]) -> jax.Array:
    inside_S = jnp.arange(audio_S.size) < length
    signal_S = jnp.where(inside_S, audio_S.astype(jnp.float32), 0.0)
    power = jnp.sum(jnp.square(signal_S)) / jnp.maximum(length, 1).astype(jnp.float32)
    snr = jax.random.uniform(jax.random.fold_in(key, _SNR), minval=snr_db[0], maxval=snr_db[1])
    scale = jnp.sqrt(power) * 10.0 ** (-snr / 20.0)
    noisy_S = signal_S + scale * jax.random.normal(jax.random.fold_in(key, _NOISE), audio_S.shape)
    return jnp.where(inside_S, jnp.clip(jnp.round(noisy_S), -32768.0, 32767.0), 0.0).astype(jnp.int16)


def spec_augment(
    features_BTF: jax.Array, feature_lengths_B: jax.Array, keys_B: jax.Array, augment: AugmentConfig
) -> jax.Array:
    """Warp the mel axis, then mask bands of bins and stretches of frames with 0, the mean of normalised features.

    The masks are SpecAugment's (Park et al. 2019, arXiv 1904.08779): widths uniform from 0 to the widest, both ends
    included, then places uniform over all that fit; masks may overlap. The widest time mask is a share of the
    utterance's own length. The mel warp resembles another vocal tract length (Jaitly and Hinton 2013); it stands in for
    the paper's time warp.

    Args:
      features_BTF: (B, T, F) float32, normalised.
      feature_lengths_B: (B,) int32, in frames; 0 for filler rows.
      keys_B: (B,) from `utterance_keys`.
      augment: which augmentations, how strong.

    Returns:
      (B, T, F) float32; 0 beyond the lengths.
    """
    return jax.vmap(partial(_spec_augment, augment=augment))(features_BTF, feature_lengths_B, keys_B)


def _spec_augment(features_TF: jax.Array, length: jax.Array, key: jax.Array, augment: AugmentConfig) -> jax.Array:
    num_frames, num_bins = features_TF.shape
    if augment.mel_warp:
        warp_key = jax.random.fold_in(key, _WARP)
        factor = jax.random.uniform(warp_key, minval=1.0 - augment.mel_warp, maxval=1.0 + augment.mel_warp)
        features_TF = jnp.matmul(features_TF, _warp_matrix(factor, num_bins), precision=jax.lax.Precision.HIGHEST)
    # Whole numbers as float32, which is what they are multiplied with.
    span = length.astype(jnp.float32)
    widest_span = jnp.floor(augment.time_mask_fraction * span)
    widest_band = min(augment.freq_mask_bins, num_bins)
    masked_F = _masks(jax.random.fold_in(key, _FREQ_MASKS), augment.freq_masks, widest_band, num_bins, num_bins)
    masked_T = _masks(jax.random.fold_in(key, _TIME_MASKS), augment.time_masks, widest_span, span, num_frames)
    masked_T |= jnp.arange(num_frames) >= length
    return jnp.where(masked_T[:, None] | masked_F[None, :], 0.0, features_TF)


def _warp_matrix(factor: jax.Array, num_bins: int) -> jax.Array:
    """(F, F): features @ matrix moves bin i to i * factor, linearly interpolated; the last bin fills what is left."""
    bins_F = jnp.arange(num_bins, dtype=jnp.float32)
    source_F = jnp.minimum(bins_F / factor, num_bins - 1.0)
    return jnp.maximum(1.0 - jnp.abs(bins_F[:, None] - source_F[None, :]), 0.0)


def _masks(key: jax.Array, count: int, widest: int | jax.Array, length: int | jax.Array, size: int) -> jax.Array:
    """(size,) bool, true inside any of `count` masks, each of 0 to `widest` places within the first `length`."""
    width_M1, start_M1 = jax.random.uniform(key, (2, count, 1))  # a fifth of the threefry that two randint cost
    width_M1 = jnp.floor(width_M1 * (widest + 1))
    start_M1 = jnp.floor(start_M1 * (length - width_M1 + 1))
    place_1P = jnp.arange(size, dtype=jnp.float32)[None, :]
    return jnp.any((start_M1 <= place_1P) & (place_1P < start_M1 + width_M1), axis=0)
