"""The GPU kernel without a GPU: interpreted, lowered, and split over devices. Each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxds2.model import mosaic
from jaxds2.model.scan import mingru_recurrence


def run(program: str) -> dict:
    path = Path(__file__).with_name(program)
    environment = os.environ | {"PYTHONPATH": str(path.parents[1])}  # this checkout's package, whatever is installed
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(jax.__version_info__ < mosaic.MIN_JAX, reason="the kernel needs jax 0.11 or later")
def test_the_kernel_equals_the_definition_and_lowers_for_cuda():
    found = run("kernel_interpreted.py")
    assert len(found["errors"]) == 3
    assert max(found["errors"]) < 2e-6
    assert found["kernels"] == {"float32": 2, "bfloat16": 2}  # forward and backward, each for both directions


def test_a_kernel_keeps_its_rows_on_their_devices():
    """XLA, which cannot look into a kernel, would gather all rows everywhere: the bare one shows that it does."""
    found = run("kernel_sharded.py")
    assert found["wrapped"]["all-gather"] == 0
    assert found["bare"]["all-gather"] > 0
    assert found["wrapped"]["devices"] == 4
    assert max(way["error"] for way in found.values()) < 1e-6


def test_without_a_gpu_the_kernel_says_why_and_is_not_used():
    assert "it needs" in str(mosaic.missing())
    x = jax.numpy.ones((2, 1, mosaic.CHANNELS))
    assert not mosaic.serves(x)
    mingru_recurrence(x, x, implementation="fused")
