"""The GPU kernel without a GPU: interpreted, lowered, and split over devices. Each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from jax.sharding import use_abstract_mesh

from jaxds2.data.placement import data_mesh
from jaxds2.model import mosaic, scan
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
    assert len(found["float32"]) == 3
    assert max(found["float32"]) < 2e-6
    assert len(found["bfloat16"]) == 1
    assert 0 < max(found["bfloat16"]) < 1e-2  # rounding alone
    # Forward and backward, each for both directions; on a mesh of several devices both lie inside the shard_map.
    assert found["kernels"] == {
        "float32, bare": {"kernels": 2, "on own rows": 0},
        "bfloat16, 1 x 1": {"kernels": 2, "on own rows": 0},
        "bfloat16, 2 x 2": {"kernels": 2, "on own rows": 2},
    }


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


def test_another_form_in_the_kernels_place_is_named_with_its_reason(monkeypatch):
    assert mosaic.stand_in(mosaic.CHANNELS, "cpu") is None
    assert mosaic.stand_in(100, "gpu") == (
        "model.scan=fused: no kernel here (it needs a multiple of 128 states a direction, these are 100); "
        "the associative form takes its place"
    )
    monkeypatch.setattr(mosaic, "missing", lambda: "it needs a GPU, this is a tpu")
    assert "(it needs a GPU, this is a tpu)" in str(mosaic.stand_in(256, "tpu"))
    monkeypatch.setattr(mosaic, "missing", lambda: None)
    assert mosaic.stand_in(256, "gpu") is None
    assert not mosaic.serves(jax.numpy.ones((2, 1, 100)))
    assert not mosaic.serves(jax.numpy.ones((0, 1, 128)))
    assert mosaic.serves(jax.numpy.ones((2, 1, 128)))


def portable(form: Callable[..., tuple]):
    """The contract of a pass of the kernel, by the portable pass of scan.py."""

    def run(*kinds, candidate_fn, reverses):
        return list(map(list, scan._each_way(form, *kinds, reverses, candidate_fn=candidate_fn)))

    return run


def test_the_kernel_is_tried_outside_of_the_mesh_of_the_step_that_asks_for_it(monkeypatch):
    meshes = []
    forward = portable(scan._scan_mingru)

    def noted(*kinds, **options):
        meshes.append(jax.sharding.get_abstract_mesh().axis_names)
        return forward(*kinds, **options)

    monkeypatch.setattr(mosaic, "forward", noted)
    monkeypatch.setattr(mosaic, "backward", portable(scan._scan_mingru_gradient))

    def step(x):
        with use_abstract_mesh(data_mesh(2, rows_multiple=2).abstract_mesh):
            assert mosaic.fault() is None
        return x

    jax.jit(step)(1.0)
    assert meshes == [()] * len(mosaic.TOLERANCES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [None, jax.numpy.nan, 1.0, RuntimeError("no such instruction\nat line 7")])
def test_a_fault_in_either_dtype_keeps_the_kernel_from_being_used(monkeypatch, dtype, fault):
    forward, backward = portable(scan._scan_mingru), portable(scan._scan_mingru_gradient)

    def broken(gates, *kinds, **options):
        dgates, dcandidates, dh0s = backward(gates, *kinds, **options)
        if fault is None or gates[0].dtype != dtype:
            return dgates, dcandidates, dh0s
        if isinstance(fault, Exception):
            raise fault
        return [x.at[3, 1, 2].set(fault) for x in dgates], dcandidates, dh0s

    monkeypatch.setattr(mosaic, "forward", forward)
    monkeypatch.setattr(mosaic, "backward", broken)
    found = mosaic.fault()
    if fault is None:
        assert found is None
    elif isinstance(fault, Exception):
        assert found == f"in {dtype}: RuntimeError: no such instruction"
    else:
        assert f"in {dtype} on this device" in str(found)
