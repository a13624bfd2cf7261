"""Checkpoints that can be trusted: orbax writes the arrays, and a manifest written last says what each file must hold.

Layout of a run's folder: `checkpoints/<step>/{params,extra,rest}/` (orbax) and `checkpoints/<step>/manifest.json` with
the size and CRC-32 of every file. A checkpoint without a manifest was never finished; one whose files differ from it is
damaged (orbax alone restores a flipped byte silently). Both are passed over for the one before.
"""

import json
import os
import pathlib
import shutil
import warnings
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxreg.training import mesh as mesh_lib
from jaxreg.training.task import TrainState

__all__ = ["CheckpointError", "defect", "latest", "load_params", "predict", "restore", "save", "steps"]


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or none can be read."""


def steps(folder) -> list[int]:
  """The step numbers of all checkpoints in a run's folder, good or not, ascending."""
  root = pathlib.Path(folder) / "checkpoints"
  return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit()) if root.is_dir() else []


def save(folder, state: TrainState, *, info: dict | None = None, position: bytes | None = None, keep: int = 3) -> None:
  """Writes the state at its step; earlier checkpoints stay intact if that fails.

  Args:
    folder: the run's folder, the same for all processes.
    state: global arrays.
    info: anything JSON-serialisable, returned by `restore`.
    position: the position in the data stream, the same in all processes, if one is read.
    keep: how many checkpoints to keep; older ones are deleted once this one is complete.

  Raises:
    CheckpointError: when the folder cannot be written (full disk, no such place).
  """
  step = int(state.step)
  path = _path(folder, step)
  try:
    if mesh_lib.is_main():
      shutil.rmtree(path, ignore_errors=True)
      path.mkdir(parents=True)
    _barrier(f"make {step}")
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      for name, tree in _items(state).items():
        checkpointer.save(path.absolute() / name, args=ocp.args.StandardSave(_plain_keys(tree)))
    _barrier(f"written {step}")
    if mesh_lib.is_main():
      if position is not None:
        (path / "position").write_bytes(position)
      _write_manifest(path, info or {})
      good = [number for number in steps(folder) if (_path(folder, number) / "manifest.json").exists()]
      for number in good[:-keep]:
        shutil.rmtree(_path(folder, number), ignore_errors=True)
    _barrier(f"kept {step}")
  except (OSError, ValueError, RuntimeError) as error:  # orbax reports a full disk as ValueError or RuntimeError
    if mesh_lib.is_main():
      shutil.rmtree(path, ignore_errors=True)
    raise CheckpointError(
      f"cannot write the checkpoint of step {step} to {path}: {error}. Earlier checkpoints are intact."
    ) from error


def latest(folder) -> int | None:
  """The newest good checkpoint's step, agreed by all processes; warns about each damaged one that it passes over."""
  found = -1
  if mesh_lib.is_main():
    for step in reversed(steps(folder)):
      problem = defect(folder, step)
      if problem is None:
        found = step
        break
      warnings.warn(f"passing over the checkpoint of step {step} in {folder}: {problem}.", stacklevel=2)
  found = int(mesh_lib.synchronize(np.int64(found)))
  return None if found < 0 else found


def defect(folder, step: int) -> str | None:
  """What is wrong with a checkpoint, or None if every file is what was written."""
  path = _path(folder, step)
  try:
    expected = _read_manifest(path)["files"]
  except FileNotFoundError:
    return "it was not finished"
  except (OSError, ValueError, KeyError, TypeError):
    return "its manifest is damaged"
  for name, (size, crc) in expected.items():
    file = path / name
    if not file.is_file():
      return f"{name} is missing"
    if file.stat().st_size != size:
      return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if _file_crc(file) != crc:
      return f"{name} does not have the bytes that were written"
  return None


def restore(folder, step: int, like: TrainState) -> tuple[TrainState, dict, bytes | None]:
  """Reads a checkpoint into the shapes and shardings of `like`, on any number of devices.

  Args:
    folder: the run's folder.
    step: which checkpoint; see `latest`.
    like: a state of global arrays (or `jax.ShapeDtypeStruct` with shardings) in the wanted layout.

  Returns:
    The state, and the `info` and the stream position (or None) that were given to `save`.
  """
  path = _path(folder, step)
  fields = like._asdict()
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    for name, tree in _items(like).items():
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _plain_keys(tree))
      try:
        plain = checkpointer.restore(path.absolute() / name, args=ocp.args.StandardRestore(abstract))
      except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / name} does not fit this task: {error}") from error
      fields |= jax.tree.map(lambda leaf, old: jax.random.wrap_key_data(leaf) if _is_key(old) else leaf, plain, tree)
  position = path / "position"
  return TrainState(**fields), _read_manifest(path)["info"], position.read_bytes() if position.exists() else None


def load_params(folder, step: int | None = None, *, field: str = "params") -> Any:
  """Reads the parameters alone, as NumPy arrays in nested dicts, without building the task.

  Args:
    folder: the run's folder.
    step: which checkpoint; the newest good one by default.
    field: `params`, or `extra` for what is not differentiated.

  Raises:
    CheckpointError: when there is no good checkpoint.
  """
  step = latest(folder) if step is None else step
  if step is None:
    raise CheckpointError(f"no good checkpoint in {folder}.")
  path = (_path(folder, step) / field).absolute()
  if not path.exists():
    return {}
  with ocp.PyTreeCheckpointer() as checkpointer:
    item = checkpointer.metadata(path).item_metadata
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item.tree)
    return checkpointer.restore(path, restore_args=arguments)[field]


def predict(task, folder, inputs, *, step: int | None = None):
  """The task's predictions for `inputs` with the parameters of a checkpoint (the newest good one by default)."""
  if task.predict is None:
    raise ValueError("this task does not say how to predict.")
  params, extra = load_params(folder, step), load_params(folder, step, field="extra")
  return jax.jit(task.predict)(TrainState(np.int32(0), None, params, extra), inputs)


def _items(state: TrainState) -> dict[str, dict]:
  """What is stored apart, so that parameters can be read alone; orbax stores no empty tree."""
  fields = state._asdict()
  items = {name: {name: fields.pop(name)} for name in ("params", "extra")} | {"rest": fields}
  return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _path(folder, step: int) -> pathlib.Path:
  return pathlib.Path(folder) / "checkpoints" / f"{step:09d}"


def _is_key(leaf) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain_keys(tree):
  def plain(leaf):
    if not _is_key(leaf):
      return leaf
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(jax.random.key_data, leaf)

  return jax.tree.map(plain, tree)


def _write_manifest(path: pathlib.Path, info: dict) -> None:
  files = sorted(file for file in path.rglob("*") if file.is_file())
  listed = {str(file.relative_to(path)): [file.stat().st_size, _file_crc(file)] for file in files}
  body = json.dumps({"info": info, "files": listed})
  for file in files:
    _sync(file)
  temporary = path / "manifest.tmp"
  temporary.write_text(f"{_crc(body.encode())}\n{body}")
  _sync(temporary)
  os.replace(temporary, path / "manifest.json")
  _sync(path)


def _read_manifest(path: pathlib.Path) -> dict:
  crc, _, body = (path / "manifest.json").read_text().partition("\n")
  if int(crc) != _crc(body.encode()):
    raise ValueError("damaged manifest")
  return json.loads(body)


def _sync(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _crc(data: bytes, start: int = 0) -> int:
  return zlib.crc32(data, start)


def _file_crc(path: pathlib.Path) -> int:
  value = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 22):
      value = _crc(block, value)
  return value


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
