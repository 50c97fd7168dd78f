"""The process keeps the pages that it frees."""

import subprocess
import sys

import pytest

from jaxds2 import allocator

_FREE_AND_TAKE_AGAIN = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from jaxds2.allocator import keep_pages
if sys.argv[1] == "keep":
    assert keep_pages()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def take(_):
    np.ones(100_000_000, np.uint8)
with ThreadPoolExecutor(1) as thread:  # as XLA does, in a thread of its own
    list(thread.map(take, range(1)))
    before = faults()
    list(thread.map(take, range(4)))
    print(faults() - before)
"""


def page_faults(mode: str) -> int:
    """Pages mapped by taking 100 MB four times, after it has been taken and freed once."""
    out = subprocess.run(
        [sys.executable, "-c", _FREE_AND_TAKE_AGAIN, mode], capture_output=True, text=True, check=True, timeout=60
    )
    return int(out.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_pages_are_used_again():
    assert page_faults("default") > 4 * 100_000_000 / (2 << 20)  # even in huge pages
    assert page_faults("keep") < 100


def test_only_where_jax_has_nothing_but_cpus(monkeypatch):
    monkeypatch.setattr(allocator, "entry_points", lambda *, group: [f"{group}: xla_cuda13"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert not allocator.on_cpus()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert allocator.on_cpus()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(allocator, "entry_points", lambda *, group: [])
    assert allocator.on_cpus()
