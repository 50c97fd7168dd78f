"""What was saved comes back to the bit, or is refused in one line."""

import hashlib
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxds2.training.checkpoint import CheckpointError, Checkpoints, digest

OPTIMIZERS = {
    "adamw": optax.adamw(optax.constant_schedule(1e-3), mask=lambda tree: jax.tree.map(lambda p: p.ndim >= 2, tree)),
    "muon": optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.muon(1e-3)),
}


def replicated(num_devices: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:num_devices]), ("data",)), PartitionSpec())


def make_state(optimizer: str = "adamw", *, ema: bool = True, width: int = 5, seed: int = 0) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "layers.0.kernel": jax.random.normal(keys[0], (3, width)),
        "head.bias": jax.random.normal(keys[1], (width,)).astype(jnp.bfloat16),
    }
    opt_state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), OPTIMIZERS[optimizer].init(params))
    return {
        "step": jnp.int32(7),
        "params": params,
        "ema": jax.tree.map(lambda p: p + jnp.ones((), p.dtype), params) if ema else None,
        "opt_state": opt_state,
    }


def bits(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()), tree)


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_restored_state_equals_saved_state_to_the_bit(tmp_path: Path, optimizer: str, ema: bool):
    state = make_state(optimizer, ema=ema)
    state["params"]["layers.0.kernel"] = state["params"]["layers.0.kernel"].at[0, 0].set(jnp.nan)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state, meta={})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(7, make_state(optimizer, ema=ema, seed=1))
    assert bits(restored) == bits(state)  # dictionaries, tuples and namedtuples of optax compare with their leaves


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}}
    expected = bits(state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda w: w * 0 - 1, s), donate_argnums=0).lower(state).compile()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, meta={})
        template = overwrite(state)
        assert state["params"]["w"].is_deleted()  # the buffer was given away: the save holds on to none
        assert bits(checkpoints.restore(1, template)) == expected


@pytest.mark.parametrize(("saved_on", "restored_on"), [(2, 1), (1, 2), (2, 2)])
def test_restored_arrays_have_the_shardings_of_the_template(tmp_path: Path, saved_on: int, restored_on: int):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, jax.device_put(state, replicated(saved_on)), meta={})
        sharding = replicated(restored_on)
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)
        restored = checkpoints.restore(7, template)
    assert bits(restored) == bits(state)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize(
    "wers",
    [
        [None, None, None],
        [0.5, 0.4, 0.6, 0.7],
        [0.5, None, None],
        [None, 0.5, None],
        [0.5, 0.5, 0.6],  # of equals the newer is kept
        [float("nan"), 0.5, float("nan")],
        [0.3, 0.2, 0.1],
    ],
)
def test_exactly_last_and_best_survive(tmp_path: Path, wers: list[float | None]):
    steps = [10 * (i + 1) for i in range(len(wers))]
    scored = [(wer, -step) for wer, step in zip(wers, steps, strict=True) if wer is not None and np.isfinite(wer)]
    best = -min(scored)[1] if scored else None
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, wer in zip(steps, wers, strict=True):
            checkpoints.save(step, {"params": {"w": jnp.float32(step)}}, meta={}, wer=wer)
            assert checkpoints.last() == step
    expected = sorted({steps[-1]} | ({best} if best else set()))
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == expected
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.steps(), checkpoints.last(), checkpoints.best()) == (expected, steps[-1], best)
        assert checkpoints.resolve("last") == steps[-1]
        assert checkpoints.resolve("best") == (steps[-1] if best is None else best)
        assert checkpoints.resolve(steps[-1]) == checkpoints.resolve(str(steps[-1])) == steps[-1]
        assert checkpoints.restore_params(expected[0])["w"] == expected[0]


def test_meta_is_read_without_the_state(tmp_path: Path):
    meta = {"characters": "abcé' ", "epoch": 3, "wer": None, "config": {"model": {"conv_channels": [32, 32]}}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, make_state(), meta=meta)
        checkpoints.wait()
        shutil.rmtree(tmp_path / "7" / "state")
        assert checkpoints.read_meta(7) == meta


@pytest.mark.parametrize("ema", [True, False])
def test_weights_need_no_template_and_no_optimizer(tmp_path: Path, ema: bool):
    state = make_state("muon", ema=ema)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, jax.device_put(state, replicated(2)), meta={})
        params, average = checkpoints.restore_weights(7)
        assert bits(params) == bits(state["params"])
        assert bits(average) == bits(state["ema"])
        assert bits(checkpoints.restore_params(7)) == bits(state["ema"] if ema else state["params"])
        assert digest(params, average) == digest(state["params"], state["ema"])
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((params, average)))


def test_nested_parameters_keep_their_nesting(tmp_path: Path):
    params = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "scale": jnp.float32(2)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, {"params": params, "ema": None}, meta={})
        assert bits(checkpoints.restore_params(7)) == bits(params)


def changed(state: dict[str, Any], name: str, leaf: Any) -> dict[str, Any]:
    params = {**state["params"], name: leaf}
    return {**state, "params": {k: v for k, v in params.items() if v is not None}}


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        (
            "head.bias",
            jnp.zeros(6, jnp.bfloat16),
            r"params/head.bias is bfloat16\[5\] in .* bfloat16\[6\] in this model",
        ),
        ("head.bias", jnp.zeros(5), r"params/head.bias is bfloat16\[5\] in .* float32\[5\] in this model"),
        ("head.bias", None, r"params/head.bias is bfloat16\[5\] in .* absent in this model"),
        ("head.scale", jnp.zeros(5), r"params/head.scale is absent in the checkpoint, float32\[5\] in this model"),
    ],
)
def test_another_model_is_refused_by_the_name_of_its_array(tmp_path: Path, name: str, leaf: Any, message: str):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, meta={})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(7, changed(state, name, leaf))


def test_a_run_without_checkpoints_says_so_and_nothing_is_made(tmp_path: Path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (checkpoints.steps(), checkpoints.last(), checkpoints.best()) == ([], None, None)
        for which in ("best", "last", 7):
            with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint yet; train this run first"):
                checkpoints.resolve(which)
    assert not (tmp_path / "checkpoints").exists()


def test_a_step_that_is_not_there_lists_those_that_are(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(), meta={}, wer=0.5)
        checkpoints.save(20, make_state(), meta={})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 30; there is 10, 20$"):
            checkpoints.resolve(30)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 30"):
            checkpoints.restore_params(30)
        with pytest.raises(CheckpointError, match=r"'newest': expected best, last or a step \(10, 20\)"):
            checkpoints.resolve("newest")


def largest_file(root: Path) -> Path:
    return max((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(checkpoint: Path) -> None:
    path = largest_file(checkpoint / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    largest_file(checkpoint / "state").write_bytes(b"")


def delete_data(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "state" / "ocdbt.process_0")


def delete_item(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "leaves")


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def write_nonsense(checkpoint: Path) -> None:
    (checkpoint / "leaves" / "metadata").write_text("{")


DAMAGES = [flip_a_bit, truncate, delete_data, delete_item, empty, write_nonsense]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, damage, caplog):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (10_000,))}, "ema": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, state, meta={}, wer=0.1)
        checkpoints.save(20, state, meta={}, wer=0.2)
    damage(tmp_path / "20")
    with Checkpoints(tmp_path) as checkpoints:
        for restore in (lambda: checkpoints.restore(20, state), lambda: checkpoints.restore_params(20)):
            with pytest.raises(CheckpointError, match=r"20: damaged .*; delete this folder to go on from step 10") as e:
                restore()
            assert "\n" not in str(e.value)
        assert bits(checkpoints.restore(10, state)) == bits(state)
    assert not caplog.records


def test_an_unreadable_score_is_one_line(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(), meta={}, wer=0.1)
    (tmp_path / "10" / "metrics" / "metrics").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        Checkpoints(tmp_path)


@pytest.fixture
def full_disk():
    """Writes of more than 64 KiB to a file fail, as on a full disk, once the returned function is called with True."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_full(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if full else soft, hard))

    yield set_full
    set_full(False)


@pytest.mark.parametrize("found_by", ["wait", "close", "save"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path, full_disk, found_by: str, caplog):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (100_000,))}, "ema": None}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, state, meta={})
    checkpoints.wait()
    full_disk(True)
    checkpoints.save(20, state, meta={})
    then = {
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "save": lambda: checkpoints.save(30, state, meta={}),
    }
    with pytest.raises(CheckpointError, match=r"step 20 could not be saved \(File too large\); older checkpoints"):
        then[found_by]()
    assert checkpoints.steps() == ([] if found_by == "close" else [10])
    full_disk(False)
    checkpoints.close()
    assert not caplog.records  # no traceback in the log of orbax

    leftover = [p.name for p in tmp_path.iterdir() if not p.name.isdecimal()]
    assert leftover, "the law below has nothing to check"
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [10]
        assert bits(checkpoints.restore(10, state)) == bits(state)
        checkpoints.save(40, state, meta={})
    assert [p.name for p in tmp_path.iterdir()] == ["40"]


def test_a_failed_save_does_not_hide_the_error_before_it(tmp_path: Path, full_disk):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (100_000,))}}

    def train() -> None:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(10, state, meta={})
            raise RuntimeError("loss is not finite")

    full_disk(True)
    with pytest.raises(RuntimeError, match="loss is not finite") as e:
        train()
    assert any("step 10 could not be saved" in note for note in e.value.__notes__)


def test_saving_a_step_twice_is_refused(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(), meta={})
        with pytest.raises(CheckpointError, match="step 10 could not be saved"):
            checkpoints.save(10, make_state(), meta={})


def test_digest_follows_its_definition():
    params = {"a.b": jnp.array([1.0, -2.0], jnp.float32), "a": {"w": jnp.array([[3]], jnp.int32)}}
    ema = {"b": jnp.array([1.5, 0.25], jnp.bfloat16)}
    sha = hashlib.sha256()
    sha.update(b"ema/b bfloat16[2]\n" + bytes([0xC0, 0x3F, 0x80, 0x3E]))
    sha.update(b"params/a.b float32[2]\n" + bytes([0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0]))
    sha.update(b"params/a/w int32[1,1]\n" + bytes([3, 0, 0, 0]))
    assert digest(params, ema) == sha.hexdigest()
    assert digest(dict(reversed(params.items())), ema) == sha.hexdigest()
    assert digest(params, None) != sha.hexdigest()


def test_written_hashes_are_those_of_the_arrays(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.float32(1)}}, meta={})
    leaves = json.loads((tmp_path / "1" / "leaves" / "metadata").read_text())
    expected = hashlib.sha256(b"params/w float32[]\n" + bytes([0, 0, 0x80, 0x3F])).hexdigest()
    assert leaves == {"params/w": {"shape": [], "dtype": "float32", "sha256": expected}}
