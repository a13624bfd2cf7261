"""Devices and hosts: meshes, global arrays, and what several processes have to agree on."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["data_mesh", "gather", "is_main", "replicate", "shard", "split_processes", "synchronize", "trial_mesh"]


def data_mesh(devices: Sequence[jax.Device] | None = None, *, model: int = 1) -> Mesh:
  """A mesh with axes `data` and `model`; by default all devices, but one only for a single process on a CPU.

  Virtual CPU devices share the same cores, so that splitting one small batch over them costs more than it saves.
  """
  if devices is None:
    lone_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    devices = jax.devices()[:1] if lone_cpu else jax.devices()
  return Mesh(np.asarray(devices).reshape(-1, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def trial_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the one axis `trial` over all devices of all processes."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), ("trial",), axis_types=(AxisType.Auto,))


def is_main() -> bool:
  """Whether this process is the one that writes logs and shows progress."""
  return jax.process_index() == 0


def replicate(tree, mesh: Mesh):
  """Puts host arrays that are equal in all processes on every device of the mesh."""
  return shard(tree, mesh, PartitionSpec())


def shard(tree, mesh: Mesh, spec: PartitionSpec):
  """Makes global arrays from host arrays that are equal in all processes, each device taking its part."""
  sharding = NamedSharding(mesh, spec)

  def put(leaf):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

  return jax.tree.map(put, tree)


def split_processes(tree, mesh: Mesh, spec: PartitionSpec):
  """Makes global arrays from host arrays of which every process holds its own part."""
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree)


def gather(tree):
  """NumPy copies of global arrays, whole in every process."""
  if jax.process_count() == 1:
    return jax.tree.map(np.asarray, tree)
  return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def synchronize(value):
  """The main process's `value` (a NumPy array or number) in every process."""
  if jax.process_count() == 1:
    return value
  return multihost_utils.broadcast_one_to_all(np.asarray(value))
