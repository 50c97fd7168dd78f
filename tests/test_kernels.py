"""The GPU kernels without a GPU: interpreted, lowered, and split over devices. Each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import portable_kernel
import pytest
from flax import nnx

from jaxds2 import ctc_kernel, mosaic
from jaxds2.ctc import ctc_loss
from jaxds2.model import mingru_kernel, scan
from jaxds2.model.mingru import MinGRU, states
from jaxds2.model.mingru_kernel import CHANNELS


def run(program: str) -> dict:
    path = Path(__file__).with_name(program)
    environment = os.environ | {"PYTHONPATH": str(path.parents[1])}  # this checkout's package, whatever is installed
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(jax.__version_info__ < mosaic.MIN_JAX, reason="the kernels need jax 0.11 or later")
def test_the_kernels_equal_their_definitions_and_lower_for_cuda():
    found = run("kernel_interpreted.py")
    assert len(found["float32"]) == 3
    assert max(found["float32"]) < 2e-6
    assert len(found["bfloat16"]) == 1
    assert 0 < max(found["bfloat16"]) < 1e-2  # rounding alone
    assert len(found["ctc"]) == 3
    assert max(found["ctc"]) < 2e-5
    assert found["asked for in a step"] == [None, None]
    assert found["loss and gradient"] < 1e-5
    # Forward and backward, each for both directions; on a mesh of several devices both lie inside a shard_map.
    assert found["kernels"] == {
        "float32, bare": {"kernels": 2, "on own rows": 0},
        "bfloat16, 1 x 1": {"kernels": 2, "on own rows": 0},
        "bfloat16, 2 x 2": {"kernels": 2, "on own rows": 2},
        "ctc, bare": {"kernels": 1, "on own rows": 0},
        "ctc, 2 x 2": {"kernels": 1, "on own rows": 1},
    }


def test_a_kernel_keeps_its_rows_on_their_devices():
    """XLA, which cannot look into a kernel, would gather all rows everywhere: the bare one shows that it does."""
    found = run("kernel_sharded.py")
    assert found["wrapped"]["all-gather"] == 0
    assert found["bare"]["all-gather"] > 0
    assert found["wrapped"]["devices"] == 4
    assert max(way["error"] for way in found.values()) < 1e-6


def test_without_a_gpu_the_kernels_say_why_and_are_not_used():
    assert "it needs" in str(mingru_kernel.missing())
    assert not scan.has_kernel("auto", CHANNELS)
    x_TBE = jnp.ones((2, 1, 2 * CHANNELS))
    lengths_B = jnp.array([2])
    scan.mingru_layer(x_TBE, x_TBE[0, 0], lengths_B, candidate_fn="g", reverses=(True,), implementation="fused")
    assert "it needs" in str(ctc_kernel.why_not(5))
    logits_BUV = jnp.zeros((1, 3, 4))
    jax.grad(lambda x: ctc_loss(x, jnp.array([3]), jnp.ones((1, 1), int), lengths_B - 1, implementation="fused")[0])(
        logits_BUV
    )


@pytest.mark.parametrize("reverses", [(False,), (True,), (False, True)])
def test_a_layer_side_by_side_equals_its_directions_one_by_one(monkeypatch, reverses):
    """Through the kernel's own reverse rule, with a portable body; NaN in the padding must not get through either."""
    ways = [
        MinGRU(5, 4, candidate="g", gate_bias=0.5, implementation="auto", dtype=jnp.float32, rngs=nnx.Rngs(params=i))
        for i in range(len(reverses))
    ]
    for way in ways:  # biases that are not all the same
        for layer in (way.gate, way.candidate):
            assert layer.bias is not None
            layer.bias[...] = layer.bias[...] + jnp.arange(4.0)
    lengths_B = jnp.array([7, 4, 0])
    padded_UB1 = (jnp.arange(7)[:, None] >= lengths_B[None, :])[..., None]
    x_UBD = jnp.where(padded_UB1, jnp.nan, jax.random.normal(jax.random.key(0), (7, 3, 5)))
    h0_BH = jax.random.normal(jax.random.key(1), (3, 4 * len(reverses)))
    graphdef, params = nnx.split(ways)

    def both(params, x_UBD, h0_BH):
        def total(params, x_UBD, h0_BH):
            h_UBH, last_BH = states(nnx.merge(graphdef, params), x_UBD, lengths_B, h0_BH, reverses=reverses)
            return jnp.sum(jnp.sin(h_UBH)) + jnp.sum(last_BH**2), (h_UBH, last_BH)

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(params, jnp.where(padded_UB1, 0.0, x_UBD), h0_BH), (
            states(nnx.merge(graphdef, params), x_UBD, lengths_B, h0_BH, reverses=reverses)
        )

    want = both(params, x_UBD, h0_BH)
    portable_kernel.install(monkeypatch.setattr)
    got = both(params, x_UBD, h0_BH)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(got))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


def test_another_form_in_a_kernels_place_is_named_with_its_reason(monkeypatch):
    assert mingru_kernel.stand_in(CHANNELS, "cpu") is None
    assert ctc_kernel.stand_in("cpu") is None
    assert mingru_kernel.stand_in(100, "gpu") == (
        "no kernel for the recurrence here (it needs a multiple of 128 states a direction, these are 100); "
        "the associative form takes its place"
    )
    for module in (mingru_kernel, ctc_kernel):
        monkeypatch.setattr(module, "missing", lambda: "it needs a GPU, this is a tpu")
    assert "(it needs a GPU, this is a tpu)" in str(mingru_kernel.stand_in(256, "tpu"))
    assert ctc_kernel.stand_in("tpu") == (
        "no kernel for CTC here (it needs a GPU, this is a tpu); a loop takes its place"
    )
    for module in (mingru_kernel, ctc_kernel):
        monkeypatch.setattr(module, "missing", lambda: None)
    assert mingru_kernel.stand_in(256, "gpu") is None
    assert ctc_kernel.stand_in("gpu") is None


def test_a_kernel_takes_what_it_is_made_for_alone(monkeypatch):
    for module in (mingru_kernel, ctc_kernel):
        monkeypatch.setattr(module, "missing", lambda: None)
    assert scan.has_kernel("auto", 128)
    assert not scan.has_kernel("fused", 100)
    assert not scan.has_kernel("associative", 128)
    assert ctc_kernel.why_not(1023) is None
    assert "fewer than 1024 labels" in str(ctc_kernel.why_not(1024))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("found", [1e-3, jnp.nan, 1.0, RuntimeError("no such instruction\nat line 7")])
def test_a_fault_in_either_dtype_keeps_a_kernel_from_being_used(dtype, found):
    def error(dtype: str, faulty: str = dtype) -> float:
        if dtype != faulty:
            return 0.0
        if isinstance(found, Exception):
            raise found
        return found

    fault = mosaic.fault(error, {"float32": 1e-2, "bfloat16": 1e-2})
    if isinstance(found, Exception):
        assert fault == f"in {dtype}: RuntimeError: no such instruction"
    elif found == 1e-3:
        assert fault is None
    else:
        assert f"in {dtype} on this device" in str(fault)
