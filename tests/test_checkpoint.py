"""What was saved comes back to the bit, or is refused in one line."""

import asyncio
import errno
import gc
import hashlib
import json
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from damage import DAMAGES
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxds2.training.checkpoint import FORMAT, CheckpointError, Checkpoints, DamagedError, digest

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


def test_of_several_processes_only_the_first_copies_the_state_to_its_host(tmp_path: Path, monkeypatch):
    """That all take part in gathering what is split is in tests/test_hosts.py."""
    copied = []

    class Leaf:
        def __array__(self, dtype=None, copy=None):
            copied.append(self)
            return np.zeros(3, np.float32)

    state = {"params": {"w": Leaf(), "b": Leaf()}, "ema": None}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, meta={})
        checkpoints.wait()
        assert copied == [state["params"]["b"], state["params"]["w"]]
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        checkpoints.save(2, state, meta={})
        assert len(copied) == 2
        assert checkpoints.last() == 2  # saved by the first
    assert os.listdir(tmp_path) == ["1"]


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
        [0.3, 0.1, 0.2, 0.2, 0.3],
    ],
)
def test_exactly_the_two_newest_and_the_best_survive(tmp_path: Path, wers: list[float | None]):
    steps = [10 * (i + 1) for i in range(len(wers))]
    scored = [(wer, -step) for wer, step in zip(wers, steps, strict=True) if wer is not None and np.isfinite(wer)]
    best = -min(scored)[1] if scored else None
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, wer in zip(steps, wers, strict=True):
            checkpoints.save(step, {"params": {"w": jnp.float32(step)}}, meta={}, wer=wer)
            assert checkpoints.last() == step
    expected = sorted({*steps[-2:]} | ({best} if best else set()))
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder of checkpoints of three steps, 10, 20 (the best) and 30, and the state in each of them."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (10_000,)), "b": jnp.ones(3)}, "ema": None}
    with Checkpoints(folder) as checkpoints:
        for step, wer in ((10, None), (20, 0.1), (30, 0.2)):
            checkpoints.save(step, state, meta={"step": step}, wer=wer)
        checkpoints.save(40, state, meta={})
        checkpoints.wait()
    shutil.rmtree(folder / "40")
    return folder, state


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_anywhere_is_named_and_nothing_damaged_is_restored(saved, tmp_path: Path, damage, seed: int, caplog):
    """The full counts are in `make stress`."""
    folder, state = saved
    shutil.copytree(folder, tmp_path / "checkpoints")
    name = damage(np.random.default_rng(seed), tmp_path / "checkpoints" / "30")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for restore in (lambda: checkpoints.restore(30, state), lambda: checkpoints.restore_params(30)):
            with pytest.raises(DamagedError, match=rf"30: damaged \({re.escape(name)} .*\); there is also 20$") as e:
                restore()
            assert "\n" not in str(e.value)
        assert checkpoints.resolve("last") == 20
        assert [r.getMessage() for r in caplog.records] == [f"warning: {e.value}"]
        assert checkpoints.set_aside_damaged() == [f"{e.value}; it is set aside as 30.damaged"]
        assert (checkpoints.last(), bits(checkpoints.restore(20, state))) == (20, bits(state))
        checkpoints.save(30, state, meta={})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["20", "30", "30.damaged"]


def test_best_goes_back_to_no_other_model(saved, tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    (largest,) = [p for p in (tmp_path / "checkpoints/20").rglob("*") if p.is_file() and p.stat().st_size > 30_000]
    largest.unlink()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.resolve("best") == 20
        with pytest.raises(DamagedError, match=r"20: damaged \(state/.* is missing\); there is also 30$"):
            checkpoints.restore_params(20)
        (tmp_path / "checkpoints/20/MANIFEST").unlink()  # nobody knows that it is the best any more
        with pytest.raises(DamagedError, match=r"20: damaged \(MANIFEST is missing\)"):
            checkpoints.resolve("best")


def test_where_every_checkpoint_is_damaged_nothing_starts_anew_and_nothing_is_renamed(saved, tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    for step in ("20", "30"):
        (tmp_path / "checkpoints" / step / "MANIFEST").write_text("{}")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(CheckpointError, match=r"30: damaged .*none is whole: to start again, delete "):
            checkpoints.set_aside_damaged()
        with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(20, 30\)"):
            checkpoints.resolve("last")
        assert checkpoints.steps() == [20, 30]


def test_a_checkpoint_of_a_newer_version_is_one_line_and_no_damage(saved, tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/30/MANIFEST"
    line = json.dumps({"format": FORMAT + 1, "arrays": "elsewhere"}) + "\n"
    path.write_text(line + hashlib.sha256(line.encode()).hexdigest() + "\n")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for use in (lambda: checkpoints.restore_params(30), lambda: checkpoints.resolve("last"), checkpoints.best):
            with pytest.raises(CheckpointError, match=rf"30: of format {FORMAT + 1}, this jaxds2 reads up to") as e:
                use()
            assert not isinstance(e.value, DamagedError)
        with pytest.raises(CheckpointError, match="or a newer one"):
            checkpoints.set_aside_damaged()
        assert checkpoints.steps() == [20, 30]


def test_a_checkpoint_is_that_of_its_step(saved, tmp_path: Path):
    shutil.copytree(saved[0] / "20", tmp_path / "50")
    with pytest.raises(DamagedError, match="MANIFEST is that of step 20"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.read_meta(50)


def test_checkpoints_without_a_manifest_are_read_as_they_were(tmp_path: Path):
    """Format 1: items and a score as orbax lays them out; only the arrays are summed."""
    w = np.random.default_rng(0).standard_normal(5_000, np.float32)
    state = {"params": {"w": w}, "ema": None}
    sha = hashlib.sha256(b"params/w float32[5000]\n" + w.tobytes()).hexdigest()
    leaves = {"params/w": {"shape": [5_000], "dtype": "float32", "sha256": sha}}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave({"params/w": w}),
        leaves=ocp.args.JsonSave(leaves),
        meta=ocp.args.JsonSave({"epoch": 3}),
    )
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["wer"])
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(10, args=args, metrics={"wer": 0.5})
        manager.save(20, args=args)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.set_aside_damaged() == []
        assert (checkpoints.best(), checkpoints.last(), checkpoints.read_meta(10)) == (10, 20, {"epoch": 3})
        assert bits(checkpoints.restore(20, state)) == bits(state)
        checkpoints.rescore(20, 0.4)
        assert (checkpoints.best(), checkpoints.resolve("last")) == (20, 20)
        (data,) = [p for p in (tmp_path / "10/state").rglob("*") if p.is_file() and p.stat().st_size > 10_000]
        data.write_bytes(bytes(b ^ 1 for b in data.read_bytes()))
        assert ["10: damaged" in line for line in checkpoints.set_aside_damaged()] == [True]


def test_older_checkpoints_go_only_when_the_new_one_is_verified(tmp_path: Path, monkeypatch):
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (10_000,))}, "ema": None}
    write = ocp.Checkpointer.save

    def write_badly(self, folder, **kwargs):
        write(self, folder, **kwargs)
        (data,) = [p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size > 30_000]
        content = bytearray(data.read_bytes())
        content[20_000] ^= 4
        data.write_bytes(content)

    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state, meta={})
        checkpoints.wait()
        monkeypatch.setattr(ocp.Checkpointer, "save", write_badly)
        checkpoints.save(30, state, meta={})
        with pytest.raises(CheckpointError, match=r"step 30 could not be saved .*older checkpoints are intact"):
            checkpoints.wait()
        assert [bits(checkpoints.restore(step, state)) == bits(state) for step in (10, 20)] == [True, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EROFS, "put that right"), (errno.ENOSPC, "make room"), (errno.EDQUOT, "make room")]
)
@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_what_the_system_refuses_is_one_line_with_its_remedy(saved, tmp_path: Path, monkeypatch, number, remedy, call):
    shutil.copytree(saved[0], tmp_path / "checkpoints")

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), "somewhere")

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(*((Path, "mkdir") if call == "mkdir" else (os, call)), refuse)
            checkpoints.save(40, saved[1], meta={})
            with pytest.raises(CheckpointError, match=rf"step 40 .*\({os.strerror(number)}\); .*; {remedy}, then"):
                checkpoints.wait()
        assert checkpoints.resolve("last") == 30
        assert bits(checkpoints.restore(30, saved[1])) == bits(saved[1])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["20", "30"]


def test_what_a_killed_save_left_is_no_checkpoint_and_goes_with_the_next_save(saved, tmp_path: Path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    shutil.copytree(saved[0] / "30", tmp_path / "checkpoints" / "40.partial")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [20, 30]
        checkpoints.save(40, saved[1], meta={})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["20", "30", "40"]


def refuse_old_name(monkeypatch):
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda source, to: rename(source, to) if Path(source).name != "10" else refuse())


def test_further_errors_of_a_failed_save_are_not_told_with_a_trace(tmp_path: Path, caplog):
    """As orbax leaves them: tasks that have failed and that nobody asks."""

    async def fail(what: str) -> None:
        raise ValueError(what)

    async def leave(what: str) -> None:
        task = asyncio.get_running_loop().create_task(fail(what))
        await asyncio.sleep(0)
        del task

    with Checkpoints(tmp_path / "checkpoints"):
        asyncio.run(leave("OUT_OF_RANGE: Failed to write 56812 bytes: File too large [os_error_code='27']"))
        gc.collect()
        assert caplog.messages == []
        asyncio.run(leave("another"))
        gc.collect()
        assert len(caplog.messages) == 1


def refuse_to_delete(monkeypatch):
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **k: refuse() if Path(path).name == "10.partial" else rmtree(path)
    )


def refuse_to_sync_names(monkeypatch):
    monkeypatch.setattr(
        "jaxds2.training.checkpoint.sync", lambda path: refuse() if path.name == "checkpoints" else None
    )


def refuse():
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "somewhere")


NOT_DELETED = (
    r"checkpoints: step {step} is saved, but older checkpoints could not be deleted \(Device or resource busy\)"
)

NOT_SYNCED = r"checkpoints: step {step} is saved, but its name may not outlive a power cut \(Device or resource busy\)"


@pytest.mark.parametrize(
    ("refusal", "warnings"),
    [
        (refuse_old_name, [NOT_DELETED.format(step=30), NOT_DELETED.format(step=40)]),
        (refuse_to_sync_names, [NOT_SYNCED.format(step=30), NOT_SYNCED.format(step=40)]),
        (refuse_to_delete, [r"checkpoints/10.partial: cannot be deleted \(Device or resource busy\)"] * 2),
    ],
)
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning_and_no_failed_save(
    tmp_path: Path, monkeypatch, caplog, refusal, warnings
):
    state = {"params": {"w": jnp.float32(1)}, "ema": None}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state, meta={})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            refusal(patch)
            for step in (30, 40):
                checkpoints.save(step, state, meta={})
            checkpoints.wait()
        assert len(caplog.messages) == len(warnings)
        assert all(re.search(f"^warning: .*{w}$", m) for w, m in zip(warnings, caplog.messages, strict=True))
        assert bits(checkpoints.restore(40, state)) == bits(state)
        checkpoints.save(50, state, meta={})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["40", "50"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_so_is_its_score(tmp_path: Path, monkeypatch):
    synced, done = set(), []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record(name):
        def move(source, target):
            source = Path(source)
            if source.parent == tmp_path or source.name == "MANIFEST.partial":
                below = [source, *source.rglob("*")]
                done.append((name, Path(target).name, all(p.stat().st_ino in synced for p in below)))
                synced.clear()
            (rename if name == "rename" else replace)(source, target)

        return move

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record("rename"))
    monkeypatch.setattr(os, "replace", record("replace"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, make_state(), meta={})
        checkpoints.wait()
        assert synced == {tmp_path.stat().st_ino}  # its name too, before older ones go
        checkpoints.rescore(10, 0.5)
        assert synced == {(tmp_path / "10").stat().st_ino}
    assert done == [("rename", "10", True), ("replace", "MANIFEST", True)]


@pytest.fixture
def full_disk():
    """Writes of more than 64 KiB to a file fail, as on a full disk, once the returned function is called with True."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_full(full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16 if full else soft, hard))

    yield set_full
    set_full(False)


@pytest.mark.parametrize("found_by", ["wait", "close", "save"])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    tmp_path: Path, full_disk, found_by: str, caplog, capfd
):
    # Many arrays: those that are still being written when one has failed must not speak either.
    state = {"params": {f"w{i}": jax.random.normal(jax.random.key(i), (100_000,)) for i in range(20)}, "ema": None}
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
    with pytest.raises(CheckpointError, match=r"step 20 could not be saved \(File too large\); .* intact; make room"):
        then[found_by]()
    assert checkpoints.steps() == [10]
    full_disk(False)
    checkpoints.close()
    assert not caplog.records  # no traceback in the log of orbax
    assert capfd.readouterr() == ("", "")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [10]
        assert bits(checkpoints.restore(10, state)) == bits(state)
        checkpoints.save(20, state, meta={})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20]


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


def test_the_manifest_has_the_sums_of_the_arrays_and_of_the_files(tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.float32(1)}}, meta={})
    line, seal, end = (tmp_path / "1" / "MANIFEST").read_text().split("\n")
    assert (seal, end) == (hashlib.sha256(line.encode() + b"\n").hexdigest(), "")
    manifest = json.loads(line)
    expected = hashlib.sha256(b"params/w float32[]\n" + bytes([0, 0, 0x80, 0x3F])).hexdigest()
    assert manifest["leaves"] == {"params/w": {"shape": [], "dtype": "float32", "sha256": expected}}
    there = {p.relative_to(tmp_path / "1").as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    del there["MANIFEST"]
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in there.items()}
    assert manifest["files"] == sums
