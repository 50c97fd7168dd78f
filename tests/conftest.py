"""Strict numerics for every test: two CPU devices, no implicit promotion of ranks or dtypes."""

import os
import tempfile
from pathlib import Path

# The suite compiles many small programs and runs each for a moment; this halves its time. Before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from hypothesis import HealthCheck, settings
from tones import write_tones

# A deadline would assert a time; and the same command is to find the same faults.
settings.register_profile("jaxds2", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxds2")

# Tests train the same tiny models over and over. A folder for each process: jax does not write its files atomically.
COMPILED = tempfile.TemporaryDirectory(prefix="jaxds2-compiled-")
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

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


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus of tones.py: train.jsonl, dev.jsonl."""
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder)
    return folder


@pytest.fixture(scope="session")
def whole(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that never stopped; an epoch has more than two and fewer than eight."""
    return _train(tmp_path_factory.mktemp("whole") / "run", tones)


@pytest.fixture(scope="session")
def learnt(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt the tones."""
    return _train(tmp_path_factory.mktemp("learnt") / "run", tones, steps=250, eval_every=125)


def _train(run_dir: Path, tones: Path, **training: int) -> Path:
    from toy_runs import config

    from jaxds2.training.loop import FINISHED, train

    assert train(config(tones, **training), run_dir, progress=False) == FINISHED
    return run_dir
