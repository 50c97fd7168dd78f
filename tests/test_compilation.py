"""Compiled programs are kept where that is safe; memory that is too small is told with what would fit."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxds2.config import Config, DataConfig, TrainingConfig
from jaxds2.training.compilation import free_bytes, keep_compiled, out_of_memory


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


GIB = 2**30
CONFIG = Config("tiny", data=DataConfig(batch_seconds=160, rows_multiple=8), training=TrainingConfig(steps=1))


@pytest.mark.parametrize(
    ("needed", "free", "says"),
    [
        (
            8 * GIB,
            4 * GIB,
            "; a step needs 8192 MiB a device beside .*, 4096 MiB are free; .* with 72$",
        ),
        (8 * GIB, 16 * GIB, ", 16384 MiB are free; .* again with 120$"),  # it should fit and does not
        (8 * GIB, None, " optimizer; .* again with 80$"),
        (None, 6 * GIB, "; 6144 MiB are free; .* again with 80$"),
        (None, None, "; data.batch_seconds is 160: start again with 80$"),
    ],
)
def test_out_of_memory_names_the_batch_and_what_would_fit(needed, free, says):
    message = str(out_of_memory(CONFIG, (16, 160_000), needed=needed, free=free))
    assert re.search("^out of memory on batches of 16 x 10.00 s.*" + says, message)


def test_a_batch_of_the_fewest_rows_is_not_made_smaller_by_fewer_seconds():
    message = str(out_of_memory(CONFIG, (8, 160_000), needed=GIB, free=GIB))
    assert message.endswith("; data.rows_multiple=8 allows no fewer rows: lower data.max_duration")


def test_rows_are_counted_over_all_processes(monkeypatch):
    """Each of two has half of the 16 rows; 8 would be allowed."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message = str(out_of_memory(CONFIG, (8, 160_000), needed=None, free=None))
    assert message == "out of memory on batches of 16 x 10.00 s; data.batch_seconds is 160: start again with 80"
    assert str(out_of_memory(CONFIG, (4, 160_000), needed=None, free=None)).endswith("lower data.max_duration")


def test_out_of_memory_beside_the_batches_names_none():
    message = str(out_of_memory(CONFIG, None, needed=None, free=GIB))
    assert message.startswith("out of memory between two steps; 1024 MiB are free; data.batch_seconds is 160")


def test_a_process_asks_its_own_device_what_is_free():
    class Elsewhere:
        def memory_stats(self) -> dict[str, int]:
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: only supported for addressable devices")

    here = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7, "bytes_in_use": 3})
    mesh: Any = SimpleNamespace(devices=np.array([Elsewhere(), here]), local_devices=[here])
    assert free_bytes(mesh) == 4
