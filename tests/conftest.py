"""Strict numerics for every test: two CPU devices, no implicit promotion of ranks or dtypes."""

import os
from pathlib import Path

import jax
import pytest

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
