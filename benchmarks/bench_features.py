"""Log-mel of 16 kHz audio: ours, librosa's and torchaudio's, side by side; and how far each is from float64.

python benchmarks/bench_features.py
"""

import argparse
from collections.abc import Callable
from typing import Any

import side_by_side

SHAPES = ((16, 16), (64, 2))
"""(utterances, seconds of each)."""
SMALL = ((2, 1),)


def main() -> None:
    """Print a table for each shape and write them all."""
    arguments = side_by_side.start("Log-mel, side by side.")
    results = [compare(*shape, arguments) for shape in (SMALL if arguments.small else SHAPES)]
    side_by_side.save("features", arguments, results)


def compare(rows: int, seconds: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time every column on one shape: 80 bins, windows of 25 ms every 10 ms, the logarithm included."""
    import numpy as np

    rng = np.random.default_rng(0)
    audio_BS = (rng.standard_normal((rows, 16_000 * seconds)) * 3000).astype(np.int16)
    wave_BS = audio_BS.astype(np.float32) / 32768
    columns = {"ours": ours(audio_BS)} | librosa_column(wave_BS) | torchaudio_column(wave_BS, arguments.threads)
    exact = float64_log_mel(wave_BS)
    medians = side_by_side.rounds(columns, arguments.rounds)
    table = {
        name: medians[name]
        | {
            "audio hours a second": rows * seconds / 3.6 / medians[name]["CPU ms"],
            "error": float(np.abs(np.asarray(call()) - exact).max()),
        }
        for name, call in columns.items()
    }
    title = f"log-mel, {rows} utterances of {seconds} s, float32, threads: {arguments.threads}"
    print(side_by_side.table(title, table, base="ours"))
    bars = [
        bar for peer in ("librosa", "torchaudio") for bar in side_by_side.ratio_bar(table, peer, "ours", at_least=1.6)
    ]
    return {"shape": [rows, seconds], "columns": table, "bars": bars}


def ours(audio_BS) -> Callable[[], Any]:
    """Our features, the normalisation by a constant included and taken back for the comparison."""
    import jax
    import jax.numpy as jnp

    from jaxds2.config import FeatureConfig
    from jaxds2.features import FIXED_MEAN, FIXED_STD, log_mel

    features = FeatureConfig(normalize="fixed")
    inputs = jnp.asarray(audio_BS), jnp.full(len(audio_BS), audio_BS.shape[1], jnp.int32)

    def unnormalized(audio_BS, lengths_B):
        return log_mel(audio_BS, lengths_B, features)[0] * FIXED_STD + FIXED_MEAN

    compiled = side_by_side.jit(unnormalized).lower(*inputs).compile()
    return lambda: jax.block_until_ready(compiled(*inputs))


def librosa_column(wave_BS) -> dict[str, Callable[[], Any]]:
    """librosa's filterbank energies, all utterances at once; empty where it is missing."""
    try:
        import librosa
    except ImportError:
        side_by_side.missing("librosa", extra="bench")
        return {}
    import numpy as np

    from jaxds2.features import LOG_OFFSET

    def call():
        mel_BFT = librosa.feature.melspectrogram(
            y=wave_BS, sr=16_000, n_fft=512, win_length=400, hop_length=160, center=False, n_mels=80
        )
        return np.log(np.swapaxes(mel_BFT, 1, 2) + LOG_OFFSET)

    return {"librosa": call}


def torchaudio_column(wave_BS, threads: int) -> dict[str, Callable[[], Any]]:
    """torchaudio's transform; empty where it is missing."""
    torch = side_by_side.torch_or_none(threads)
    if torch is None:
        return {}
    try:
        import torchaudio  # pyright: ignore[reportMissingImports]
    except ImportError:
        side_by_side.missing("torchaudio", extra="bench-audio")
        return {}
    from jaxds2.features import LOG_OFFSET

    wave = torch.from_numpy(wave_BS)
    transform = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, win_length=400, hop_length=160, center=False, n_mels=80, norm="slaney", mel_scale="slaney"
    )

    def call():
        with torch.inference_mode():
            return torch.log(transform(wave).transpose(1, 2) + LOG_OFFSET).numpy()

    return {"torchaudio": call}


def float64_log_mel(wave_BS) -> Any:
    """By definition: window, power spectrum, filterbank, logarithm."""
    import numpy as np

    from jaxds2.config import FeatureConfig
    from jaxds2.features import LOG_OFFSET, mel_filterbank

    window_N = np.zeros(512)
    window_N[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    starts_T = np.arange((wave_BS.shape[1] - 512) // 160 + 1) * 160
    filters = np.asarray(mel_filterbank(FeatureConfig()), np.float64)
    rows = []
    for wave_S in wave_BS.astype(np.float64):
        frames_TN = wave_S[starts_T[:, None] + np.arange(512)] * window_N
        rows.append(np.log(np.abs(np.fft.rfft(frames_TN)) ** 2 @ filters + LOG_OFFSET))
    return np.stack(rows)


if __name__ == "__main__":
    main()
