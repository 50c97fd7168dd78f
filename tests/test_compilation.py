"""Compiled programs are kept where that is safe."""

from pathlib import Path

import jax
import pytest

from jaxds2.training.compilation import keep_compiled


@pytest.fixture
def cache_dir(monkeypatch, tmp_path):
    """The cache folder that jax would use; what a test changes is undone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", before)


def test_an_accelerators_programs_are_kept_in_the_users_cache_folder(cache_dir, tmp_path):
    keep_compiled("gpu")
    assert Path(cache_dir()) == tmp_path / "jaxds2/compiled"


def test_a_cpus_programs_are_not_kept(cache_dir):
    keep_compiled("cpu")
    assert cache_dir() is None


def test_a_folder_that_the_user_chose_stays(cache_dir):
    jax.config.update("jax_compilation_cache_dir", "mine")
    keep_compiled("gpu")
    assert cache_dir() == "mine"
