import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxds2.augment import add_noise, draw_speeds, spec_augment, utterance_keys
from jaxds2.config import AugmentConfig

OFF = AugmentConfig(freq_masks=0, time_masks=0)
WARP = dataclasses.replace(OFF, mel_warp=0.2)
FREQ = dataclasses.replace(OFF, freq_masks=1, freq_mask_bins=5)
TIME = dataclasses.replace(OFF, time_masks=1, time_mask_fraction=0.25)
ALL = AugmentConfig(mel_warp=0.2, freq_masks=1, freq_mask_bins=5, time_masks=1, time_mask_fraction=0.25)

# Shapes that nearly all tests share, since what takes time is compiling.
SOUNDS, SAMPLES = 8, 8000
BATCH, FRAMES, BINS = 3000, 60, 12

_add_noise = jax.jit(add_noise)
_spec_augment = jax.jit(spec_augment, static_argnums=3)
_utterance_keys = jax.jit(utterance_keys)


def keys(indices: Sequence[int], *, seed: int = 0, epoch: int = 0) -> jax.Array:
    return _utterance_keys(seed, epoch, np.array(indices, np.int32))


def noisy(
    waveforms: Sequence[np.ndarray],
    indices: Sequence[int],
    snr_db: tuple[float, float],
    *,
    shape: tuple[int, int] = (SOUNDS, SAMPLES),
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray:
    """The waveforms with noise, out of a batch with filler rows and garbage in the padding."""
    audio_BS = np.full(shape, 12_345, np.int16)
    lengths_B, index_B = np.zeros(shape[0], np.int32), np.full(shape[0], -1)
    for row, (waveform_S, index) in enumerate(zip(waveforms, indices, strict=True)):
        audio_BS[row, : len(waveform_S)], lengths_B[row], index_B[row] = waveform_S, len(waveform_S), index
    out_BS = np.asarray(_add_noise(audio_BS, lengths_B, keys(index_B.tolist(), seed=seed, epoch=epoch), snr_db))
    assert out_BS.dtype == np.int16
    for row, length in zip(out_BS, lengths_B, strict=True):
        assert not row[length:].any(), "the padding is no longer silent"
    return out_BS[: len(waveforms)]


def augmented(
    rows: Sequence[np.ndarray],
    augment: AugmentConfig,
    *,
    indices: Sequence[int] = range(BATCH),
    shape: tuple[int, int] = (BATCH, FRAMES),
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray:
    """The utterances (frames, BINS) augmented, out of a batch with filler rows and NaN in the padding."""
    features_BTF = np.full((*shape, BINS), np.nan, np.float32)
    lengths_B, index_B = np.zeros(shape[0], np.int32), np.full(shape[0], -1)
    for row, (utterance_TF, index) in enumerate(zip(rows, indices, strict=False)):
        features_BTF[row, : len(utterance_TF)], lengths_B[row], index_B[row] = utterance_TF, len(utterance_TF), index
    keys_B = keys(index_B.tolist(), seed=seed, epoch=epoch)
    out_BTF = np.asarray(_spec_augment(features_BTF, lengths_B, keys_B, augment))
    assert out_BTF.dtype == np.float32
    assert not out_BTF[np.arange(shape[1]) >= lengths_B[:, None]].any(), "the padding is no longer zero"
    return out_BTF[: len(rows)]


def speech(num_samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1000, num_samples).astype(np.int16)


def normalized(num_frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_frames, BINS)).astype(np.float32)


def ones(num_frames: int = FRAMES) -> np.ndarray:
    return np.ones((num_frames, BINS), np.float32)


def runs(masked_BP: np.ndarray) -> np.ndarray:
    """Number of stretches of true in each row."""
    edges = np.diff(masked_BP.astype(int), axis=1, prepend=0)
    return (edges == 1).sum(axis=1)


def check_one_uniform_mask(masked_BP: np.ndarray, widest: int) -> None:
    """Each row holds one mask of uniform width, uniform over the places where it fits."""
    size = masked_BP.shape[1]
    assert runs(masked_BP).max() <= 1
    widths = np.bincount(masked_BP.sum(axis=1), minlength=widest + 1) / len(masked_BP)
    np.testing.assert_allclose(widths, 1 / (widest + 1), atol=0.04)
    # A mask of width w has size - w + 1 places; place p lies in as many of them as fit around it.
    hits_WP = [[min(p + 1, size - p, w, size - w + 1) / (size - w + 1) for p in range(size)] for w in range(widest + 1)]
    np.testing.assert_allclose(masked_BP.mean(axis=0), np.mean(hits_WP, axis=0), atol=0.05)


# Speed


def test_speeds_fill_their_range_evenly() -> None:
    speeds = draw_speeds(0, 0, 20_000, 0.1)
    assert speeds.dtype == np.float64
    assert speeds.min() >= 0.9
    assert speeds.max() < 1.1
    shares, _ = np.histogram(speeds, bins=10, range=(0.9, 1.1))
    np.testing.assert_allclose(shares / len(speeds), 0.1, atol=0.01)


def test_no_spread_leaves_the_speed_alone() -> None:
    np.testing.assert_array_equal(draw_speeds(3, 4, 7, 0.0), np.ones(7))
    assert draw_speeds(3, 4, 0, 0.1).shape == (0,)


def test_speeds_of_the_first_utterances_do_not_change_when_the_manifest_grows() -> None:
    grown = draw_speeds(1, 2, 1000, 0.1)
    for n in (1, 2, 3, 5, 999):
        np.testing.assert_array_equal(draw_speeds(1, 2, n, 0.1), grown[:n])


def test_speeds_are_keyed_by_seed_and_epoch() -> None:
    draws = [draw_speeds(seed, epoch, 100, 0.1) for seed in range(4) for epoch in range(4)]
    assert len(np.unique(np.concatenate(draws))) == 1600


def test_speeds_are_the_same_on_every_version_of_numpy() -> None:
    expected = [1.092911880426069, 0.9760199288761585, 1.0479703992369602]
    np.testing.assert_array_equal(draw_speeds(0, 0, 3, 0.1), expected)


# Keys


def test_every_seed_epoch_and_utterance_has_its_own_key() -> None:
    found = [jax.random.key_data(keys(range(-1, 50), seed=s, epoch=e)) for s in range(3) for e in range(3)]
    assert len(np.unique(np.concatenate(found), axis=0)) == 9 * 51


def test_a_key_does_not_depend_on_the_rest_of_the_batch_nor_on_jit() -> None:
    together = jax.random.key_data(keys([7, -1, 3], seed=5, epoch=6))
    for row, index in enumerate((7, -1, 3)):
        alone = jax.random.key_data(utterance_keys(5, 6, jnp.array([index], jnp.int32)))
        np.testing.assert_array_equal(alone[0], together[row])


def test_keys_are_threefry_whatever_the_default() -> None:
    with jax.default_prng_impl("rbg"):
        other = utterance_keys(0, 0, jnp.array([1, 2], jnp.int32))
    np.testing.assert_array_equal(jax.random.key_data(other), jax.random.key_data(keys([1, 2])))


# Noise


@pytest.mark.parametrize("snr_db", [(10.0, 20.0), (15.0, 15.0)])
def test_noise_has_the_ratio_that_was_asked_for(snr_db: tuple[float, float]) -> None:
    clean_BS = np.stack([speech(seed=i) // (1 + i) for i in range(SOUNDS)])
    ratios = []
    for epoch in range(4):
        noise_BS = noisy(list(clean_BS), range(SOUNDS), snr_db, epoch=epoch).astype(float) - clean_BS
        ratios += list(10 * np.log10(np.square(clean_BS * 1.0).mean(axis=1) / np.square(noise_BS).mean(axis=1)))
    assert min(ratios) > snr_db[0] - 0.2
    assert max(ratios) < snr_db[1] + 0.2
    assert max(ratios) - min(ratios) >= 0.7 * (snr_db[1] - snr_db[0])


def test_noise_is_white_and_independent_of_the_signal() -> None:
    clean_S = speech()
    noise_S = noisy([clean_S], [0], (0.0, 0.0))[0].astype(float) - clean_S
    bands = np.square(np.abs(np.fft.rfft(noise_S)))[1:].reshape(8, -1).mean(axis=1)
    np.testing.assert_allclose(bands / bands.mean(), 1.0, atol=0.2)
    assert abs(np.corrcoef(noise_S, clean_S)[0, 1]) < 0.04


def test_noise_does_not_depend_on_neighbours_nor_on_padding() -> None:
    together = noisy([speech(n, seed=n) for n in (4000, 3000, 5001)], [3, 1, 4], (5.0, 10.0))[2, :5001]
    alone = noisy([speech(5001, seed=5001)], [4], (5.0, 10.0), shape=(1, 5001))[0]
    difference = np.abs(together.astype(int) - alone)
    assert difference.max() <= 1  # one rounding of the power away
    assert difference.mean() < 0.01


def test_noise_leaves_digital_silence_and_fillers_silent() -> None:
    assert not noisy([np.zeros(1000, np.int16), np.zeros(0, np.int16)], [0, -1], (0.0, 0.0)).any()


def test_noise_on_full_scale_audio_clips_and_never_wraps() -> None:
    loud_S = np.repeat(np.array([32_767, -32_768], np.int16), 500)
    out_S = noisy([loud_S], [0], (20.0, 20.0))[0, :1000]
    assert np.all(np.sign(out_S) == np.sign(loud_S))
    assert out_S.max() == 32_767
    assert out_S.min() == -32_768


def test_noise_is_keyed_by_seed_epoch_and_utterance() -> None:
    clean, snr = [speech()], (5.0, 5.0)
    outputs = [noisy(clean, [0], snr), noisy(clean, [1], snr), noisy(clean, [0], snr, seed=1)]
    outputs.append(noisy(clean, [0], snr, epoch=1))
    assert len({out.tobytes() for out in outputs}) == 4
    np.testing.assert_array_equal(noisy(clean, [0], snr), outputs[0])


# SpecAugment


def test_nothing_asked_for_changes_nothing() -> None:
    x_TF = normalized()
    np.testing.assert_array_equal(augmented([x_TF], OFF)[0], x_TF)


@pytest.mark.parametrize(("freq_mask_bins", "widest"), [(5, 5), (1000, BINS)])
def test_a_frequency_mask_is_a_band_of_uniform_width_and_place(freq_mask_bins: int, widest: int) -> None:
    masked_BTF = augmented([ones(2)] * BATCH, dataclasses.replace(FREQ, freq_mask_bins=freq_mask_bins))[:, :2] == 0
    np.testing.assert_array_equal(masked_BTF[:, 0], masked_BTF[:, 1])  # the same band in all frames
    check_one_uniform_mask(masked_BTF[:, 0], widest)


@pytest.mark.parametrize(
    ("fraction", "widest_of_length"), [(0.25, {31: 7, 4: 1, 3: 0}), (1.0, {10: 10, 1: 1})], ids=["quarter", "whole"]
)
def test_a_time_mask_is_a_share_of_the_own_length(fraction: float, widest_of_length: dict[int, int]) -> None:
    lengths = list(widest_of_length)
    rows = [ones(lengths[i % len(lengths)]) for i in range(BATCH)]
    out_BTF = augmented(rows, dataclasses.replace(TIME, time_mask_fraction=fraction))
    np.testing.assert_array_equal(out_BTF, np.broadcast_to(out_BTF[:, :, :1], out_BTF.shape))  # all bins of a frame
    for i, (length, widest) in enumerate(widest_of_length.items()):
        check_one_uniform_mask(out_BTF[i :: len(lengths), :length, 0] == 0, widest)


def test_the_number_of_masks_is_the_number_asked_for() -> None:
    augment = dataclasses.replace(OFF, freq_masks=3, freq_mask_bins=2, time_masks=2, time_mask_fraction=0.1)
    masked_BTF = augmented([ones()] * BATCH, augment) == 0
    assert set(runs(np.all(masked_BTF, axis=1))) == {0, 1, 2, 3}
    assert set(runs(np.all(masked_BTF, axis=2))) == {0, 1, 2}


def test_mel_warp_stretches_by_a_factor_drawn_evenly() -> None:
    ramp_F = np.arange(BINS, dtype=np.float32)
    out_BF = augmented([ramp_F[None]] * BATCH, WARP)[:, 0]
    factor_B = 8 / out_BF[:, 8]  # bin 8 shows what was at 8 / factor
    np.testing.assert_allclose(out_BF, np.minimum(ramp_F / factor_B[:, None], BINS - 1), atol=1e-4)
    shares, _ = np.histogram(factor_B, bins=5, range=(0.8 - 1e-5, 1.2 + 1e-5))
    np.testing.assert_allclose(shares / BATCH, 0.2, atol=0.04)


def test_mel_warp_keeps_a_flat_spectrum() -> None:
    np.testing.assert_allclose(augmented([ones()] * BATCH, WARP), 1, rtol=1e-6)


def test_an_utterance_is_augmented_alike_in_any_batch_and_padding() -> None:
    together = augmented([normalized(n, seed=n) for n in (50, 33, 41)], ALL, indices=[3, 1, 4])[2, :41]
    alone = augmented([normalized(41, seed=41)], ALL, indices=[4], shape=(1, 41))[0]
    assert np.any(alone == 0)
    np.testing.assert_array_equal(together == 0, alone == 0)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("augment", [WARP, FREQ, TIME], ids=["warp", "freq", "time"])
def test_spec_augment_is_keyed_by_seed_epoch_and_utterance(augment: AugmentConfig) -> None:
    rows = [normalized()] * 100
    outputs = [augmented(rows, augment, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (1, 0), (0, 1))]
    for different in (outputs[1], outputs[2], np.roll(outputs[0], 1, axis=0)):
        equal_B = np.all(outputs[0] == different, axis=(1, 2))
        assert equal_B.mean() < 0.2  # two masks may well be of width 0
    np.testing.assert_array_equal(augmented(rows, augment), outputs[0])


def test_augmentations_are_drawn_apart() -> None:
    rows = [ones()] * BATCH
    warp_BTF, freq_BTF, time_BTF, all_BTF = (augmented(rows, augment) for augment in (WARP, FREQ, TIME, ALL))
    np.testing.assert_allclose(all_BTF, warp_BTF * freq_BTF * time_BTF, rtol=1e-6)
    width_BK = [(freq_BTF == 0).all(axis=1).sum(axis=1), (time_BTF == 0).all(axis=2).sum(axis=1)]
    ramp_BTF = augmented([np.arange(BINS, dtype=np.float32)[None]] * BATCH, WARP)
    correlation = np.corrcoef([*width_BK, ramp_BTF[:, 0, 8]])
    np.testing.assert_allclose(correlation, np.eye(3), atol=0.08)


def test_two_devices_draw_what_one_draws() -> None:
    def step(audio_BS, lengths_B, features_BTF, frames_B, index_B):
        keys_B = utterance_keys(0, 3, index_B)
        return add_noise(audio_BS, lengths_B, keys_B, (5.0, 10.0)), spec_augment(features_BTF, frames_B, keys_B, ALL)

    batch = (
        np.stack([speech(2000, seed=i) for i in range(4)]),
        np.array([2000, 1500, 800, 0], np.int32),
        np.stack([normalized(50, seed=i) for i in range(4)]),
        np.array([50, 30, 20, 0], np.int32),
        np.array([5, 2, 9, -1], np.int32),
    )
    rows = NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    sharded = jax.device_put(batch, rows)
    compiled = jax.jit(step).lower(*sharded).compile()
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective", str(compiled.as_text()))
    one, two = jax.jit(step)(*batch), compiled(*sharded)
    assert len(two[0].sharding.device_set) == 2
    np.testing.assert_allclose(one[0], two[0], rtol=0, atol=1)
    np.testing.assert_allclose(one[1], two[1], rtol=0, atol=1e-6)
