"""Where arrays live: the rule by which the training state is split, and which meshes there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxds2.config import ConfigError
from jaxds2.data.placement import MIN_SPLIT, data_mesh, split


@pytest.mark.parametrize(
    ("shape", "parts", "spec"),
    [
        ((160, 480), 2, PartitionSpec(None, "fsdp")),
        ((480, 160), 2, PartitionSpec("fsdp")),
        ((128, 128), 4, PartitionSpec(None, "fsdp")),
        ((3, 3, 32, 33), 4, PartitionSpec(None, None, "fsdp")),
        ((4097, 3), 2, PartitionSpec()),
        ((8, 8), 2, PartitionSpec()),
        ((), 2, PartitionSpec()),
        ((480, 160), 1, PartitionSpec()),
    ],
)
def test_the_largest_dimension_that_can_be_is_split(shape, parts, spec):
    assert split(shape, parts) == spec


@given(st.lists(st.integers(1, 300), max_size=4).map(tuple), st.integers(1, 8))
def test_what_is_split_is_split_evenly_and_in_one_dimension(shape, parts):
    dims = [dim for dim, axis in enumerate(split(shape, parts)) if axis is not None]
    assert len(dims) <= 1
    for dim in dims:
        assert shape[dim] % parts == 0
        assert all(shape[other] <= shape[dim] for other in range(len(shape)) if shape[other] % parts == 0)
    if parts > 1 and any(size % parts == 0 for size in shape) and np.prod(shape) >= MIN_SPLIT:
        assert dims


@pytest.mark.parametrize(
    ("devices", "rows", "fsdp", "says"),
    [
        (3, 6, 1, "this machine has 2"),
        (2, 3, 1, r"does not divide data\.rows_multiple=3"),
        (None, 4, 3, r"training\.fsdp=3 does not divide the number of devices, 2"),
        (1, 4, 2, r"training\.fsdp=2 does not divide the number of devices, 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_clear_line(devices, rows, fsdp, says):
    with pytest.raises(ConfigError, match=says):
        data_mesh(devices, rows_multiple=rows, fsdp=fsdp)


def test_the_mesh_takes_as_many_devices_as_divide_the_rows():
    assert [data_mesh(None, rows_multiple=rows).size for rows in (1, 2, 3, 8)] == [1, 2, 1, 2]
    assert dict(data_mesh(None, rows_multiple=4, fsdp=2).shape) == {"data": 1, "fsdp": 2}


@pytest.fixture(scope="module")
def sharded() -> dict:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "sharded_steps.py"],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(here.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_split_over_1_2_and_4_devices_trains_the_same(sharded, optimizer):
    whole = sharded["1"][optimizer]["losses"]
    assert whole[-1] != whole[0]
    for parts in ("2", "4"):
        np.testing.assert_allclose(sharded[parts][optimizer]["losses"], whole, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_split_state_really_is_split(sharded, optimizer, parts):
    shapes = sharded[str(parts)][optimizer]["shapes"]
    for name, (shape, shard) in shapes.items():
        assert np.prod(shard) == np.prod(shape) // (parts if any(split(tuple(shape), parts)) else 1), name
    own, whole = (sum(np.prod(pair[i]) for pair in shapes.values()) for i in (1, 0))
    assert own < (0.9 if parts > 1 else 1.1) * whole
    for owner in (".params", ".ema", ".opt_state"):
        kernels = [name for name in shapes if name.startswith(owner) and "output.kernel" in name]
        assert kernels
        assert all((shapes[name][0] != shapes[name][1]) == (parts > 1) for name in kernels)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_compiled_steps_hold_only_the_collectives_that_are_meant(sharded, optimizer):
    """The gradient: each split parameter is gathered once, and what is reported of rows; sums. The update: sums alone.

    AdamW's are of the norm to clip by; Muon's also of its matrix products, whose long side is the one that is split.
    """
    for parts, found in sharded.items():
        found = found[optimizer]
        kernels = sum(shape != shard for name, (shape, shard) in found["shapes"].items() if name.startswith(".params"))
        assert (kernels > 0) == (parts != "1")
        assert set(found["gradient"]) == {"all-gather", "all-reduce"}
        assert found["gradient"]["all-gather"] == kernels + 2  # index_B and infeasible_B
        assert set(found["update"]) == ({"all-reduce"} if kernels else set())
