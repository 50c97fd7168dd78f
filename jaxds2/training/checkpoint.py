"""Checkpoints of a run: each is there whole and verified, or not at all.

A checkpoint is a folder named by its step:

    state/      the arrays of the training state by their path (`params/head.kernel`), as orbax writes them
    MANIFEST    a line of JSON: format, step, dev WER, meta; shape, dtype and SHA-256 of each array (`leaves`); bytes
                and SHA-256 of each file (`files`). Then a line with the SHA-256 of that line (`head -1 | sha256sum`).

It is written under another name, read back and compared with what was to be saved; the manifest comes last; all of it
goes through to the disk, then the folder gets its name, and only then do older ones go. orbax by itself restores a
flipped bit without a word. See docs/adr/0007.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxds2.files import lacks_room, sync, write_whole

FORMAT = 2
"""Of the checkpoints that are written. Format 1 had no manifest; it is still read, and its arrays checked."""

KEPT = 2
"""The newest checkpoints that stay, so that there is one to go back to; the best by dev WER stays too."""

Leaves = dict[str, dict[str, Any]]
"""Path of an array in the state to its `shape`, `dtype` and `sha256`."""

_MANIFEST = "MANIFEST"
_UNFINISHED = ".partial"
"""Ends the name of a folder that is being written or deleted."""

# What orbax has to say to the user comes as CheckpointError; its log repeats it with a traceback.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
_log = logging.getLogger("jaxds2")
_unraisablehook = sys.unraisablehook


def _unraisablehook_without_orbax(unraisable: "sys.UnraisableHookArgs") -> None:
    """When one array cannot be written orbax closes its event loop; each other one would then print a traceback."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _unraisablehook(unraisable)


sys.unraisablehook = _unraisablehook_without_orbax


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or trusted; its message names the folder and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was saved; its message names the file or the array."""


class Checkpoints:
    """The checkpoints of one run: the two newest, and the best by dev WER.

    Saving goes on in a thread. A checkpoint is there whole or not at all, whenever the process is killed. Close this,
    or use it as a context manager, so that the last save is waited for. One process at a time may save (the run's lock
    sees to it); others may read.
    """

    def __init__(self, root: Path):
        """A run's `checkpoints` folder, which is made when the first checkpoint is saved."""
        self.root = root.absolute()
        self._shown = root
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._elsewhere: set[int] = set()
        """Steps that another process saves for this one."""
        logging.getLogger("asyncio").addFilter(_is_not_of_a_failed_save)

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

        Once it is verified, every checkpoint goes that is neither among the two newest nor the best.

        Args:
          step: steps taken.
          state: a pytree of arrays, on any devices. Of several processes all call this, and the first one writes.
          meta: anything that JSON can hold.
          wer: dev WER of this state; None, or not finite: it cannot become the best.

        Raises:
          CheckpointError: this save could not start, or the one before failed (disk full); older ones are intact.
        """
        self.wait()
        if step in self.steps():
            raise CheckpointError(f"{self._shown}: step {step} could not be saved, it is there already")
        arrays: dict[str, np.ndarray] = {}
        writes = jax.process_index() == 0
        for path, leaf in _flatten(state).items():
            whole = _whole(leaf)  # all take part, the others keep none
            if writes:
                # A copy: on a CPU a view would share the buffers that the next step is given to overwrite.
                arrays[path] = np.array(whole)
        if not writes:
            self._elsewhere.add(step)
            return
        manifest = {"format": FORMAT, "step": step, "wer": None, "meta": meta}
        if wer is not None and math.isfinite(wer):
            manifest["wer"] = wer
        self._saving = step, self._writer.submit(self._write, step, arrays, manifest)

    def _write(self, step: int, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
        folder = self.root / f"{step}{_UNFINISHED}"
        self._remove_unfinished()
        try:
            folder.mkdir(parents=True)
            with _orbax() as orbax:
                orbax.save(folder / "state", args=ocp.args.PyTreeSave(arrays))
            manifest["leaves"] = {path: _describe(path, array) for path, array in arrays.items()}
            self._read_arrays(folder, manifest["leaves"], arrays)
            manifest["files"] = _files(folder)
            (folder / _MANIFEST).write_bytes(_encode(manifest))
            for path in (folder, *folder.rglob("*")):
                sync(path)
            os.rename(folder, self.root / str(step))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # makes room again
            raise
        try:
            sync(self.root)
        except OSError as e:  # so older ones stay
            what = "is saved, but its name may not outlive a power cut"
            _log.warning("warning: %s: step %d %s (%s)", self._shown, step, what, _reason(e))
            return
        try:
            self._delete_old()
        except (OSError, CheckpointError) as e:
            _log.warning(
                "warning: %s: step %d is saved, but older checkpoints could not be deleted (%s)",
                self._shown,
                step,
                _reason(e),
            )

    def _remove_unfinished(self) -> None:
        """What a run left that was killed while it saved or deleted; nobody else is writing here."""
        for unfinished in (*self.root.glob(f"*{_UNFINISHED}"), *self.root.glob("*.orbax-checkpoint-tmp")):
            self._delete(unfinished)

    def _delete(self, unfinished: Path) -> None:
        """Delete what is no checkpoint any more. What cannot go is tried again by the next save."""
        try:
            shutil.rmtree(unfinished)
        except OSError as e:
            _log.warning("warning: %s: cannot be deleted (%s)", self._shown / unfinished.name, _reason(e))

    def _delete_old(self) -> None:
        wers: dict[int, float | None] = {}
        for step in self._on_disk():
            with contextlib.suppress(DamagedError):  # it may be the best: it stays
                wers[step] = self._manifest(step)["wer"]
        for step in wers.keys() - {*self._on_disk()[-KEPT:], _lowest(wers)}:
            unfinished = self.root / f"{step}{_UNFINISHED}"
            os.rename(self.root / str(step), unfinished)  # else a kill would leave half a checkpoint under its name
            self._delete(unfinished)

    def wait(self) -> None:
        """Wait until the save under way is on disk, verified.

        Raises:
          CheckpointError: it failed; older checkpoints are intact.
        """
        if self._saving is None:
            return
        step, writing = self._saving
        try:
            writing.result()
        except Exception as e:  # orbax names no exceptions of its own
            self._saving = None
            remedy = "make room" if lacks_room(OSError(_errno(e), "")) else "put that right"
            raise CheckpointError(
                f"{self._shown}: step {step} could not be saved ({_reason(e)}); older checkpoints are intact; "
                f"{remedy}, then resume with the same command"
            ) from e
        self._saving = None

    def settle(self) -> None:
        """Wait until the save under way is on disk, in every process. Raises CheckpointError as `wait` does."""
        self.wait()
        multihost_utils.sync_global_devices("saved")

    def raise_failure(self) -> None:
        """Raise CheckpointError as `wait` does if the save under way has failed, without waiting for it."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def close(self) -> None:
        """Wait for the save under way and release everything. Raises CheckpointError as `wait` does."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending, the one being saved included.

        Raises:
          CheckpointError: the folder cannot be read.
        """
        saving = () if self._saving is None else self._saving[:1]
        return sorted({*self._on_disk(), *saving, *self._elsewhere})

    def _on_disk(self) -> list[int]:
        try:
            return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdecimal())
        except FileNotFoundError:
            return []
        except OSError as e:
            raise CheckpointError(f"{self._shown}: cannot be read ({_reason(e)})") from e

    def last(self) -> int | None:
        """The newest step; None: there is no checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the lowest dev WER, the newest of equals; None: no checkpoint has a WER.

        Raises:
          DamagedError: of one that is damaged nobody knows the WER.
        """
        return _lowest({step: self.wer(step) for step in self.steps()})

    def wer(self, step: int) -> float | None:
        """The dev WER that a checkpoint was given; None: it has none. Raises CheckpointError as `read_meta` does."""
        self.wait()
        return self._manifest(step)["wer"]

    def rescore(self, step: int, wer: float) -> None:
        """Give a checkpoint without a WER its WER, so that it can be the best: for an evaluation that was interrupted.

        Raises:
          CheckpointError: it is damaged. WriteError: it cannot be written.
        """
        self.wait()
        if jax.process_index() == 0:
            manifest, folder = self._manifest(step), self.root / str(step)
            manifest |= {"format": FORMAT, "files": manifest["files"] or _files(folder), "wer": wer}
            write_whole(folder / _MANIFEST, _encode(manifest), durable=True)
        multihost_utils.sync_global_devices("rescored")

    def resolve(self, which: str | int) -> int:
        """The step that `best`, `last` or a number means.

        `last` is the newest that is whole, with a warning for each that is not. `best` is `last` where no checkpoint
        has a WER; it goes back to no other, nor does a number: that would be another model under the same name.

        Raises:
          CheckpointError: there is no such checkpoint.
        """
        self.wait()
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._shown}: no checkpoint yet; train this run first, or name another with --run")
        if which == "best" and (best := self.best()) is not None:
            return best
        if which in ("last", "best"):
            return self._newest_whole()
        if not str(which).isdecimal():
            raise CheckpointError(f"checkpoint {which!r}: expected best, last or a step ({_listed(steps)})")
        if int(which) not in steps:
            raise CheckpointError(f"{self._shown}: no checkpoint of step {which}; there is {_listed(steps)}")
        return int(which)

    def _newest_whole(self) -> int:
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except DamagedError as e:
                _log.warning("warning: %s", e)
            else:
                return step
        raise CheckpointError(f"{self._shown}: every checkpoint is damaged ({_listed(self.steps())})")

    def set_aside_damaged(self) -> list[str]:
        """Verify every checkpoint and rename those that are damaged, so that training goes on from one that is whole.

        Of several processes all call this, and the first one does it.

        Returns:
          A line for each that was renamed.

        Raises:
          CheckpointError: none is whole, or one was written by a newer version.
        """
        damaged: dict[int, DamagedError] = {}
        for step in self.steps() if jax.process_index() == 0 else ():
            try:
                self.verify(step)
            except DamagedError as e:
                damaged[step] = e
        if damaged and len(damaged) == len(self.steps()):
            raise CheckpointError(f"{damaged[max(damaged)]}; none is whole: to start again, delete {self._shown}")
        for step in damaged:
            aside = self.root / f"{step}.damaged"
            try:
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.root / str(step), aside)
            except OSError as e:
                raise CheckpointError(f"{damaged[step]}; it cannot be renamed ({_reason(e)})") from e
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        return [f"{error}; it is set aside as {step}.damaged" for step, error in damaged.items()]

    def verify(self, step: int) -> None:
        """Check every file of a checkpoint against its manifest.

        Raises:
          DamagedError: a file is missing, shorter or changed. CheckpointError: there is no such checkpoint, or it is of
            a newer version.
        """
        self.wait()
        manifest, folder = self._manifest(step), self.root / str(step)
        if not manifest["files"]:
            self._read_arrays(folder, manifest["leaves"], manifest["leaves"])
        for name, saved in manifest["files"].items():
            try:
                there = _sum(folder / name)
            except FileNotFoundError:
                raise self._damaged(folder, f"{name} is missing") from None
            except OSError as e:
                raise self._damaged(folder, f"{name} cannot be read, {_reason(e)}") from e
            if there["bytes"] != saved["bytes"]:
                raise self._damaged(folder, f"{name} has {there['bytes']} bytes of {saved['bytes']}")
            if there != saved:
                raise self._damaged(folder, f"{name} is not what was saved")

    def read_meta(self, step: int) -> dict[str, Any]:
        """What was saved as `meta`.

        Raises:
          CheckpointError: no such checkpoint, a damaged one, or of a newer version.
        """
        self.wait()
        return self._manifest(step)["meta"]

    def restore(self, step: int, template: Any) -> Any:
        """The state of a checkpoint, every bit checked.

        Args:
          step: see `resolve`.
          template: a pytree like the one saved, of arrays or of jax.ShapeDtypeStruct; the arrays returned have its
            structure and shardings (without one: the default device), whatever devices the checkpoint was written on.

        Raises:
          CheckpointError: no such checkpoint, a damaged one, of a newer version, or of another shape.
        """
        self.verify(step)
        wanted = _flatten(template)
        leaves: Leaves = self._manifest(step)["leaves"]
        for path in sorted(wanted.keys() | leaves.keys()):
            here = _signature(wanted[path].dtype, wanted[path].shape) if path in wanted else "absent"
            there = _signature(leaves[path]["dtype"], leaves[path]["shape"]) if path in leaves else "absent"
            if here != there:
                raise CheckpointError(
                    f"{self._shown / str(step)}: {path} is {there} in the checkpoint, {here} in this model; "
                    f"use the config that the run was trained with"
                )
        arrays = self._read_arrays(self.root / str(step), leaves, list(wanted))
        placed = [_place(arrays.pop(path), _sharding(leaf)) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(template), placed)

    def restore_weights(self, step: int) -> tuple[Any, Any | None]:
        """The parameters and their moving average (None where there is none), as nested dictionaries of numpy arrays.

        The optimizer's state is not read, and no template is needed.

        Raises:
          CheckpointError: no such checkpoint, a damaged one, or of a newer version.
        """
        self.verify(step)
        leaves: Leaves = self._manifest(step)["leaves"]
        weights = [path for path in leaves if path.startswith(("params/", "ema/"))]
        tree = _nest(self._read_arrays(self.root / str(step), leaves, weights))
        return tree["params"], tree.get("ema")

    def restore_params(self, step: int) -> Any:
        """The weights to evaluate, see `restore_weights`: the average where there is one, else the parameters."""
        params, ema = self.restore_weights(step)
        return params if ema is None else ema

    def _read_arrays(self, folder: Path, leaves: Leaves, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """The arrays of these paths, on the host. Raises DamagedError."""
        item = {path: jax.ShapeDtypeStruct(leaves[path]["shape"], leaves[path]["dtype"]) for path in paths}
        restore_args = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in item}
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        try:
            with _orbax() as orbax:
                arrays: dict[str, np.ndarray] = orbax.restore(folder / "state", args=args)
        except Exception as e:  # orbax names no exceptions of its own
            raise self._damaged(folder, _reason(e)) from e
        for path, array in arrays.items():
            if _describe(path, array) != leaves[path]:
                raise self._damaged(folder, f"{path} is not what was saved")
        return arrays

    def _manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a checkpoint, itself checked; never waits. Raises CheckpointError."""
        folder = self.root / str(step)
        if step not in (there := self._on_disk()):
            raise CheckpointError(f"{self._shown}: no checkpoint of step {step}; there is {_listed(there) or 'none'}")
        try:
            line, _, rest = (folder / _MANIFEST).read_bytes().partition(b"\n")
        except FileNotFoundError:
            if (folder / "leaves" / "metadata").is_file():
                return self._manifest_of_format_1(folder)
            raise self._damaged(folder, f"{_MANIFEST} is missing") from None
        except OSError as e:
            raise self._damaged(folder, f"{_MANIFEST} cannot be read, {_reason(e)}") from e
        if rest != _seal(line):
            raise self._damaged(folder, f"{_MANIFEST} is not what was saved")
        manifest = json.loads(line)
        if manifest["format"] > FORMAT:
            raise CheckpointError(
                f"{self._shown / str(step)}: of format {manifest['format']}, this jaxds2 reads up to {FORMAT}; use the "
                f"jaxds2 that wrote it, or a newer one"
            )
        if manifest["step"] != step:
            raise self._damaged(folder, f"{_MANIFEST} is that of step {manifest['step']}")
        return manifest

    def _manifest_of_format_1(self, folder: Path) -> dict[str, Any]:
        """What orbax wrote, an item a folder, before there were manifests."""
        try:
            leaves, meta = (json.loads((folder / item / "metadata").read_bytes()) for item in ("leaves", "meta"))
            metrics = folder / "metrics" / "metrics"
            wer = json.loads(metrics.read_bytes())["wer"] if metrics.exists() else None
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise self._damaged(folder, _reason(e)) from e
        return {"format": 1, "step": int(folder.name), "wer": wer, "meta": meta, "leaves": leaves, "files": {}}

    def _damaged(self, folder: Path, how: str) -> DamagedError:
        others = [step for step in self._on_disk() if str(step) != folder.name]
        also = f"there is also {_listed(others)}" if others else "there is no other, so train again or name another run"
        return DamagedError(f"{self._shown / folder.name}: damaged ({how}); {also}")


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


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below a folder but the manifest."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)
    return {p.relative_to(folder).as_posix(): _sum(p) for p in found}


def _sum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _encode(manifest: dict[str, Any]) -> bytes:
    line = json.dumps(manifest).encode()
    return line + b"\n" + _seal(line)


def _seal(line: bytes) -> bytes:
    return hashlib.sha256(line + b"\n").hexdigest().encode() + b"\n"


def _lowest(wers: dict[int, float | None]) -> int | None:
    """The step of the lowest WER, the newest of equals; None: there is no WER."""
    scored = [(wer, -step) for step, wer in wers.items() if wer is not None]
    return -min(scored)[1] if scored else None


def _signature(dtype: Any, shape: Any) -> str:
    return f"{np.dtype(dtype)}[{','.join(map(str, shape))}]"


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _orbax() -> ocp.Checkpointer:
    """orbax as it works for a process alone, though there may be others."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _is_not_of_a_failed_save(record: logging.LogRecord) -> bool:
    """False for a further error of a save that has failed.

    orbax writes several arrays at once and raises the first error, which is told in a line; the others would be logged
    with a stack trace, in the middle of whatever comes next.
    """
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, ValueError) and _errno(error))


def _whole(leaf: Any) -> Any:
    """An array as it is, put together where it is split over devices of several processes, in which all take part."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return leaf


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


def _errno(e: BaseException) -> int | None:
    """The operating system's number of an error, also in tensorstore's long way to say "No space left on device"."""
    if isinstance(e, OSError):
        return e.errno
    code = re.search(r"os_error_code='(\d+)'", str(e))
    return int(code[1]) if code else None


def _reason(e: BaseException) -> str:
    """What went wrong, in a few words."""
    if code := _errno(e):
        return os.strerror(code)
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
