"""Strict numerics for every test: two CPU devices, no implicit promotion of ranks or dtypes."""

import os
from pathlib import Path

# The suite compiles many small programs and runs each for a moment; this halves its time. Before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, settings

from jaxds2.data.manifest import Utterance, write_manifest

# A deadline would assert a time; and the same command is to find the same faults.
settings.register_profile("jaxds2", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxds2")

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def corpora() -> Path:
    """The folder of real corpora (an4/, mini_librispeech/) that JAXDS2_DATA names."""
    root = os.environ.get("JAXDS2_DATA")
    if not root:
        pytest.skip("JAXDS2_DATA does not name a folder with an4/ and mini_librispeech/")
    return Path(root)


TONES = {"a": 500.0, "b": 1000.0, "c": 2000.0, " ": 4000.0}


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that anything can learn: each character is a tone of 0.12 s, the space too. train.jsonl, dev.jsonl."""
    folder = tmp_path_factory.mktemp("tones")
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
    return folder
