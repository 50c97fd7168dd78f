"""Where arrays live: the rows of a batch split over all devices, the training state over the axis `fsdp`."""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxds2.config import ConfigError
from jaxds2.data.pipeline import Batch

Tree = TypeVar("Tree")

AXES = ("data", "fsdp")
"""Axes of the mesh. Rows are split over both; parameters, their average and the optimizer's state over the second."""

MIN_SPLIT = 2**12
"""Elements; a smaller array is kept whole on each device, since gathering it costs more than it takes."""


def data_mesh(num_devices: int | None, *, rows_multiple: int, fsdp: int = 1) -> Mesh:
    """The mesh of all processes' devices, with the axes `data` and `fsdp`.

    The devices of a process are neighbours in it, so that the rows of a batch on one process are one piece.

    Args:
      num_devices: how many of each process' devices; None is all, or the most that divide the rows of every batch.
      rows_multiple: what the rows of every batch are a multiple of.
      fsdp: over how many devices parameters and optimizer state are split.

    Raises:
      ConfigError: fewer devices are there, or the rows or the parameters cannot be split evenly.
    """
    processes, there = jax.process_count(), jax.local_device_count()

    def fits(n: int) -> bool:
        return rows_multiple % (n * processes) == 0 and n * processes % fsdp == 0

    if num_devices is None:
        num_devices = max(filter(fits, range(1, there + 1)), default=there)
    if num_devices > there:
        raise ConfigError(f"training.devices={num_devices}: this machine has {there}")
    total = num_devices * processes
    by = f"training.devices={num_devices}" + (f" on each of {processes} processes" if processes > 1 else "")
    if rows_multiple % total:
        raise ConfigError(
            f"{by} does not divide data.rows_multiple={rows_multiple}; "
            f"set data.rows_multiple={total} or another multiple of it"
        )
    if total % fsdp:
        raise ConfigError(
            f"training.fsdp={fsdp} does not divide the number of devices, {total} ({by}); set it to a divisor"
        )
    devices = [d for p in range(processes) for d in jax.local_devices(process_index=p)[:num_devices]]
    return Mesh(np.array(devices).reshape(-1, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)


def rows_of(mesh: Mesh) -> NamedSharding:
    """The sharding of what has a row for each utterance of a batch."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def place(batch: Batch, mesh: Mesh) -> Batch:
    """A batch on the mesh's devices, its rows split evenly.

    Args:
      batch: this process' rows, on the host.
      mesh: see `data_mesh`.

    Returns:
      The rows of all processes, in the order of the processes.
    """
    rows, whole = rows_of(mesh), NamedSharding(mesh, PartitionSpec())
    shardings = {f.name: rows if f.name.endswith(("_B", "_BS", "_BN")) else whole for f in dataclasses.fields(batch)}
    with jax.transfer_guard("allow"):  # JAX takes this way of putting arrays for one that nobody asked for
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_process_local_data(sharding, x), batch, Batch(**shardings)
        )


def own_rows(tree: Tree) -> Tree:
    """This process' rows of arrays that are split as `place` splits them, on the host."""

    def rows(x: jax.Array) -> np.ndarray:
        shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate(jax.device_get([shard.data for shard in shards]))

    return jax.tree.map(rows, tree)


def split(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    """How an array of the training state lies on `fsdp`: its largest dimension that `parts` divides is split, the last
    of equals; an array that is small, or has no such dimension, is whole on each device."""
    dims = [dim for dim, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not dims or math.prod(shape) < MIN_SPLIT:
        return PartitionSpec()
    largest = max(dims, key=lambda dim: (shape[dim], dim))
    return PartitionSpec(*[None] * largest, "fsdp")


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a training state by the rule of `split`."""
    return jax.tree.map(lambda x: NamedSharding(mesh, split(np.shape(x), mesh.shape["fsdp"])), tree)


def distribute(tree: Tree, shardings: Any) -> Tree:
    """A pytree that each process holds whole, on the mesh's devices; `shardings` is a pytree alike, or one for all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.array(x)  # device_put would compare it between all processes, array by array
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """A pytree with a copy on each of the mesh's devices."""
    return distribute(tree, NamedSharding(mesh, PartitionSpec()))
