"""Checkpoints of a run: written by orbax in the background, read back to the bit or refused.

A checkpoint holds three items: `state`, the arrays of the training state by their path (`params/head.kernel`,
`opt_state/1/0/mu/head.kernel`); `leaves`, the shape, dtype and SHA-256 of each, since orbax by itself restores a
flipped bit without a word; and `meta`, what one wants to know without loading any array.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

Leaves = dict[str, dict[str, Any]]
"""Path of an array in the state to its `shape`, `dtype` and `sha256`."""

# What orbax has to say to the user comes as CheckpointError; its log repeats it with a traceback.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or trusted; its message names the folder and what to do."""


class Checkpoints:
    """The checkpoints of one run: the last, and the best by dev WER.

    Saving is asynchronous. A checkpoint is there whole or not at all, whenever the process is killed. Close this, or
    use it as a context manager, so that the last save is waited for. One process at a time may save; others may read.
    """

    def __init__(self, root: Path):
        """Open a run's `checkpoints` folder, which is made when the first checkpoint is saved.

        Raises:
          CheckpointError: the folder cannot be read.
        """
        self.root = root.absolute()
        self._shown = root
        self._saving: int | None = None
        self._manager = self._open() if root.is_dir() else None

    def _open(self) -> ocp.CheckpointManager:
        def wer(metrics: dict[str, float]) -> float:
            return metrics["wer"]

        best = BestN(get_metric_fn=wer, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(1), best]), best_fn=wer, best_mode="min"
        )
        try:
            return ocp.CheckpointManager(self.root, options=options)
        except Exception as e:  # orbax names no exceptions of its own
            raise CheckpointError(f"{self._shown}: cannot be opened ({_reason(e)})") from e

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except CheckpointError as e:
            if error is None:
                raise
            error.add_note(str(e))

    def save(self, step: int, state: Any, *, meta: dict[str, Any], wer: float | None = None) -> None:
        """Start to save a checkpoint; return as soon as `state` may be donated.

        Once it is written, every older checkpoint but the best one is deleted.

        Args:
          step: steps taken.
          state: a pytree of arrays, on any devices. Of several processes all call this, and the first one writes.
          meta: anything that JSON can hold.
          wer: dev WER of this state; None, or not finite: it cannot become the best.

        Raises:
          CheckpointError: this save could not start, or the one before failed (disk full); older ones are intact.
        """
        self.wait()
        # A copy: on a CPU a view would share the buffers that the next step is given to overwrite.
        arrays = {path: _whole(leaf) for path, leaf in _flatten(state).items()}
        leaves = {path: _describe(path, array) for path, array in arrays.items()}
        if self._saving is None and jax.process_index() == 0:
            # Left by a run that was killed while it saved; only the first save knows that nobody is writing them.
            for unfinished in self.root.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished)
        if self._manager is None:
            self._manager = self._open()
        self._saving = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), leaves=ocp.args.JsonSave(leaves), meta=ocp.args.JsonSave(meta)
                ),
                metrics={"wer": wer} if wer is not None and math.isfinite(wer) else None,
                force=True,  # never skipped in silence
            )
        except Exception as e:
            raise self._failed_save(e) from e

    def wait(self) -> None:
        """Wait until the save under way is on disk.

        Raises:
          CheckpointError: it failed; older checkpoints are intact.
        """
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failed_save(e) from e

    def _failed_save(self, e: Exception) -> CheckpointError:
        assert self._manager is not None
        self._manager.reload()
        return CheckpointError(
            f"{self._shown}: step {self._saving} could not be saved ({_reason(e)}); older checkpoints are intact: "
            f"check the free disk space, then resume with the same command"
        )

    def close(self) -> None:
        """Wait for the save under way and release everything. Raises CheckpointError as `wait` does."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, the one being saved included."""
        return [] if self._manager is None else sorted(self._manager.all_steps())

    def last(self) -> int | None:
        """The newest step; None: there is no checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the lowest dev WER, the newest of equals; None: no checkpoint has a WER."""
        return None if self._manager is None else self._manager.best_step()

    def wer(self, step: int) -> float | None:
        """The dev WER that a checkpoint was given; None: it has none."""
        metrics = None if self._manager is None else self._manager.metrics(step)
        return metrics["wer"] if metrics else None

    def rescore(self, step: int, wer: float) -> None:
        """Give a checkpoint without a WER its WER, so that it can be the best: for an evaluation that was interrupted.

        Raises:
          CheckpointError: it cannot be written.
        """
        self.wait()
        assert self._manager is not None
        # As orbax lays out the metrics of a save, which it offers no way to add later.
        unfinished, metrics = self.root / str(step) / "metrics.partial", self.root / str(step) / "metrics"
        try:
            if jax.process_index() == 0:
                unfinished.mkdir(exist_ok=True)
                (unfinished / "metrics").write_text(json.dumps({"wer": wer}), encoding="utf-8")
                os.replace(unfinished, metrics)
        except OSError as e:
            raise CheckpointError(f"{self._shown / str(step)}: its WER could not be written ({_reason(e)})") from e
        multihost_utils.sync_global_devices("rescored")
        self._manager.reload()

    def resolve(self, which: str | int) -> int:
        """The step that `best`, `last` or a number means; `best` is the last where no checkpoint has a WER.

        Raises:
          CheckpointError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._shown}: no checkpoint yet; train this run first, or name another with --run")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.best()
            return steps[-1] if best is None else best
        if not str(which).isdecimal():
            raise CheckpointError(f"checkpoint {which!r}: expected best, last or a step ({_listed(steps)})")
        if int(which) not in steps:
            raise CheckpointError(f"{self._shown}: no checkpoint of step {which}; there is {_listed(steps)}")
        return int(which)

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was saved as `meta`. Raises CheckpointError: no such checkpoint, or a damaged one."""
        return self._read(step, meta=ocp.args.JsonRestore())["meta"]

    def restore(self, step: int, template: Any) -> Any:
        """The state of a checkpoint, every bit checked.

        Args:
          step: see `resolve`.
          template: a pytree like the one saved, of arrays or of jax.ShapeDtypeStruct; the arrays returned have its
            structure and shardings (without one: the default device), whatever devices the checkpoint was written on.

        Raises:
          CheckpointError: no such checkpoint, a damaged one, or one of another shape.
        """
        wanted = _flatten(template)
        leaves: Leaves = self._read(step, leaves=ocp.args.JsonRestore())["leaves"]
        for path in sorted(wanted.keys() | leaves.keys()):
            here = _signature(wanted[path].dtype, wanted[path].shape) if path in wanted else "absent"
            there = _signature(leaves[path]["dtype"], leaves[path]["shape"]) if path in leaves else "absent"
            if here != there:
                raise CheckpointError(
                    f"{self._shown / str(step)}: {path} is {there} in the checkpoint, {here} in this model; "
                    f"use the config that the run was trained with"
                )
        arrays = self._read_arrays(step, leaves, list(wanted))
        placed = [_place(arrays.pop(path), _sharding(leaf)) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(template), placed)

    def restore_weights(self, step: int) -> tuple[Any, Any | None]:
        """The parameters and their moving average (None where there is none), as nested dictionaries of numpy arrays.

        The optimizer's state is not read, and no template is needed.

        Raises:
          CheckpointError: no such checkpoint, or a damaged one.
        """
        leaves: Leaves = self._read(step, leaves=ocp.args.JsonRestore())["leaves"]
        weights = [path for path in leaves if path.startswith(("params/", "ema/"))]
        tree = _nest(self._read_arrays(step, leaves, weights))
        return tree["params"], tree.get("ema")

    def restore_params(self, step: int) -> Any:
        """The weights to evaluate, see `restore_weights`: the average where there is one, else the parameters."""
        params, ema = self.restore_weights(step)
        return params if ema is None else ema

    def _read_arrays(self, step: int, leaves: Leaves, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays of these paths, on the host. Raises CheckpointError."""
        restore_args = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths}
        item = {path: jax.ShapeDtypeStruct(leaves[path]["shape"], leaves[path]["dtype"]) for path in paths}
        arrays = self._read(step, state=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True))
        for path, array in arrays["state"].items():
            if _describe(path, array) != leaves[path]:
                raise self._damaged(step, f"{path} is not what was saved")
        return arrays["state"]

    def _read(self, step: int, **items: Any) -> dict[str, Any]:
        """Items of a checkpoint. Raises CheckpointError: no such checkpoint, or an item cannot be read."""
        self.resolve(step)
        self.wait()
        assert self._manager is not None
        for name in items:
            if not (self.root / str(step) / name).is_dir():
                raise self._damaged(step, f"{name} is missing")
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:
            raise self._damaged(step, _reason(e)) from e
        return {name: restored[name] for name in items}

    def _damaged(self, step: int, how: str) -> CheckpointError:
        others = [s for s in self.steps() if s != step]
        then = f"to go on from step {others[-1]}" if others else "to start again"
        return CheckpointError(f"{self._shown / str(step)}: damaged ({how}); delete this folder {then}")


def digest(params: Any, ema: Any | None) -> str:
    """SHA-256 over path, dtype, shape and little-endian bytes of every array, in the order of their paths, as hex."""
    arrays = _flatten({"params": params, "ema": ema})
    sha = hashlib.sha256()
    for path in sorted(arrays):
        _feed(sha, path, np.asarray(arrays[path]))
    return sha.hexdigest()


def _feed(sha: "hashlib._Hash", path: str, array: np.ndarray) -> None:
    sha.update(f"{path} {_signature(array.dtype, array.shape)}\n".encode())
    sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def _describe(path: str, array: np.ndarray) -> dict[str, Any]:
    sha = hashlib.sha256()
    _feed(sha, path, array)
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha.hexdigest()}


def _signature(dtype: Any, shape: Any) -> str:
    return f"{np.dtype(dtype)}[{','.join(map(str, shape))}]"


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _whole(leaf: Any) -> np.ndarray:
    """A copy of an array on the host, put together where it is split over devices of several processes."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their path, in the order of jax.tree.leaves."""
    flat = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _reason(e: BaseException) -> str:
    """What went wrong, in a few words."""
    if code := re.search(r"os_error_code='(\d+)'", str(e)):  # tensorstore's long way to say "No space left on device"
        return os.strerror(int(code[1]))
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
