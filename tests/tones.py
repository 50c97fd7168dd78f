"""A corpus that anything can learn: each character is a tone of 0.12 s, the space too."""

from pathlib import Path

import numpy as np
import soundfile

from jaxds2.data.manifest import Utterance, write_manifest

TONES = {"a": 500.0, "b": 1000.0, "c": 2000.0, " ": 4000.0}


def write_tones(folder: Path) -> None:
    """Write train.jsonl, of 40 utterances, and dev.jsonl, of 6, with their recordings."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("dev", 6)):
        utterances = []
        for i in range(count):
            words = ["".join(rng.choice(list("abc"), rng.integers(1, 4))) for _ in range(rng.integers(1, 3))]
            text = " ".join(words)
            waveform = [0.01 * rng.standard_normal(800)]
            for c in text:
                t = np.arange(1920) / 16_000
                tone = 0.3 * np.sin(2 * np.pi * TONES[c] * t)
                waveform += [tone + 0.01 * rng.standard_normal(t.size), 0.01 * rng.standard_normal(640)]
            samples = np.concatenate(waveform)
            path = folder / f"{name}-{i:02}.wav"
            soundfile.write(path, samples, 16_000, subtype="PCM_16")
            utterances.append(Utterance(path.stem, path, len(samples) / 16_000, text, speaker=f"{name}-speaker"))
        write_manifest(folder / f"{name}.jsonl", utterances)
