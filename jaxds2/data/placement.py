"""Where arrays live: batches split by rows over the devices, everything else on each of them."""

import dataclasses
from typing import TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxds2.config import ConfigError
from jaxds2.data.pipeline import Batch

Tree = TypeVar("Tree")


def data_mesh(num_devices: int | None, *, rows_multiple: int) -> Mesh:
    """A one-axis mesh, `data`, over the local devices.

    Args:
      num_devices: how many of them; None is all, or the most that divide the rows of every batch.
      rows_multiple: what the rows of every batch are a multiple of.

    Raises:
      ConfigError: fewer devices are there, or the rows cannot be split evenly.
    """
    devices = jax.local_devices()
    if num_devices is None:
        num_devices = max(n for n in range(1, len(devices) + 1) if rows_multiple % n == 0)
    if num_devices > len(devices):
        raise ConfigError(f"training.devices={num_devices}: this machine has {len(devices)}")
    if rows_multiple % num_devices:
        raise ConfigError(
            f"training.devices={num_devices} does not divide data.rows_multiple={rows_multiple}; "
            f"set data.rows_multiple={num_devices} or another multiple of it"
        )
    return jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:num_devices])


def place(batch: Batch, mesh: Mesh) -> Batch:
    """A batch on the mesh's devices, its rows split evenly."""
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    shardings = {f.name: rows if f.name.endswith(("_B", "_BS", "_BN")) else whole for f in dataclasses.fields(batch)}
    return jax.device_put(batch, Batch(**shardings))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """A pytree with a copy on each of the mesh's devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
