"""Checkpoints that can be trusted: orbax writes the arrays, and a manifest written last says what each file must hold.

Layout of a run's folder: `checkpoints/<step>/{params,extra,rest}/` (orbax), `checkpoints/<step>/manifest.json` with the
step, the structure of the state, its dtypes and shapes, and the size and CRC-32 of every file. A checkpoint without a
manifest was never finished; one whose files differ from it is damaged (orbax alone restores a flipped byte silently).
Both are passed over for the one before, and cleared when the next one is written.

Orbax's CheckpointManager is not used: its retention counts directories, so that a damaged checkpoint would push out a
good one, and its metadata cannot be written after the checksums of what it finalised.
"""

import contextlib
import json
import pathlib
import shutil
import warnings
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxreg.extras import extra_needed
from jaxreg.training import files, structure
from jaxreg.training import mesh as mesh_lib
from jaxreg.training.task import TrainState

with extra_needed("training", "jaxreg.training"):
  import orbax.checkpoint as ocp

__all__ = ["CheckpointError", "clear_after", "defect", "latest", "load_params", "predict", "restore", "save", "steps"]

_PARTS = ("params", "extra", "rest")


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or none can be read."""


def steps(folder) -> list[int]:
  """The step numbers of all checkpoints in a run's folder, good or not, ascending."""
  root = pathlib.Path(folder) / "checkpoints"
  return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit()) if root.is_dir() else []


def save(
  folder, state: TrainState, *, rows: list[dict] | None = None, position: bytes | None = None, keep: int = 3
) -> None:
  """Writes the state at its step; earlier checkpoints stay intact if that fails.

  Args:
    folder: the run's folder, the same for all processes.
    state: global arrays.
    rows: the rows of metrics up to this step, returned by `restore`.
    position: the position in the data stream, the same in all processes, if one is read.
    keep: how many good checkpoints to keep, at least 1; older ones are deleted once this one is complete.

  Raises:
    CheckpointError: when the folder cannot be written (full disk, no such place).
    ValueError: when `keep` is below 1.
  """
  if keep < 1:
    raise ValueError(f"keep must be at least 1, got {keep}.")
  step = int(state.step)
  path = _path(folder, step)
  try:
    if mesh_lib.is_main():
      _delete(path)
      path.mkdir(parents=True)
    _barrier(f"make {step}")
    structures = {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      for name, tree in _parts(state).items():
        shape, leaves = structure.encode(tree)
        structures[name] = {"structure": shape, "leaves": [structure.describe(leaf) for leaf in leaves]}
        stored = _stored(leaves)
        if stored:
          checkpointer.save(path.absolute() / name, args=ocp.args.StandardSave(stored))
    _barrier(f"written {step}")
    if mesh_lib.is_main():
      if position is not None:
        (path / "position").write_bytes(position)
      (path / "rows.json").write_text(files.dumps(rows or []), encoding="utf-8")
      _write_manifest(path, step, structures)
      _retain(folder, step, keep)
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
  if not path.is_dir():
    return "there is none"
  try:
    manifest = _read_manifest(path)
    expected, number = manifest["files"], manifest["step"]
  except FileNotFoundError:
    return "it was not finished"
  except (OSError, ValueError, KeyError, TypeError):
    return "its manifest is damaged"
  if number != step:
    return f"it is the one of step {number} under another name"
  for name, (size, crc) in expected.items():
    file = path / name
    if not file.is_file():
      return f"{name} is missing"
    if file.stat().st_size != size:
      return f"{name} has {file.stat().st_size} bytes instead of {size}"
    if files.file_crc(file) != crc:
      return f"{name} does not have the bytes that were written"
  return None


def clear_after(folder, step: int | None) -> None:
  """Deletes the checkpoints after a step: damaged or unfinished ones that `latest` passed over."""
  if mesh_lib.is_main():
    for number in steps(folder):
      if step is None or number > step:
        _delete(_path(folder, number))


def restore(folder, step: int, like: TrainState, *, cast: bool = False) -> tuple[TrainState, list[dict], bytes | None]:
  """Reads a checkpoint into the structure, shapes and shardings of `like`, on any number of devices.

  Args:
    folder: the run's folder.
    step: which checkpoint; see `latest`.
    like: a state of global arrays (or `jax.ShapeDtypeStruct` with shardings) in the wanted layout.
    cast: whether arrays of another dtype are converted; else they are refused.

  Returns:
    The state, and the rows and the stream position (or None) that were given to `save`.

  Raises:
    CheckpointError: when the checkpoint is damaged or does not fit; it names the array.
  """
  path = _checked(folder, step)
  saved = _read_manifest(path)["parts"]
  fields = {}
  for name, tree in _parts(like).items():
    fields |= _restore_part(path, name, tree, saved[name], cast)
  position = path / "position"
  rows = files.loads((path / "rows.json").read_text(encoding="utf-8"))
  return TrainState(**fields), rows, position.read_bytes() if position.exists() else None


def load_params(folder, step: int | None = None, *, field: str = "params", dtype=None) -> Any:
  """Reads the parameters alone, as NumPy arrays in the structure that was saved, without building the task.

  NamedTuples come back as their own class where it is imported already; nodes of classes that only JAX's registry
  knows come back as dicts.

  Args:
    folder: the run's folder.
    step: which checkpoint; the newest good one by default.
    field: `params`, or `extra` for what is not differentiated.
    dtype: what floating-point arrays are cast to; None keeps them.

  Raises:
    CheckpointError: when there is no good checkpoint, or the one asked for is damaged.
  """
  if field not in ("params", "extra"):
    raise ValueError(f"field must be params or extra, got {field!r}.")
  saved, leaves = _load_part(folder, step, field)
  if dtype is not None:
    floating = lambda leaf: not structure.is_key(leaf) and jax.numpy.issubdtype(leaf.dtype, np.floating)
    leaves = [leaf.astype(dtype) if floating(leaf) else leaf for leaf in leaves]
  return structure.decode(saved["structure"], leaves)[field]


def _load_part(folder, step: int | None, name: str) -> tuple[dict, list]:
  """What the manifest says of a part of the state, and its leaves as NumPy arrays or arrays of typed keys."""
  step = latest(folder) if step is None else step
  if step is None:
    raise CheckpointError(f"no good checkpoint in {folder}.")
  path = _checked(folder, step)
  saved = _read_manifest(path)["parts"][name]
  stored = {}
  if any(0 not in shape for _, shape in saved["leaves"]):
    with ocp.PyTreeCheckpointer() as checkpointer:
      item = checkpointer.metadata((path / name).absolute()).item_metadata
      arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item.tree)
      stored = checkpointer.restore((path / name).absolute(), restore_args=arguments)
  return saved, [_loaded(stored.get(str(index)), *kind) for index, kind in enumerate(saved["leaves"])]


def predict(task, folder, inputs, *, step: int | None = None):
  """The task's predictions for `inputs` with the parameters of a checkpoint.

  Args:
    task: the task that was trained.
    folder: the run's folder, or `<folder>/best`.
    inputs: as `task.predict` takes them.
    step: which checkpoint; the newest good one by default.

  Raises:
    CheckpointError: when there is no good checkpoint or it does not fit the task.
    ValueError: when the task does not say how to predict.
  """
  if task.predict is None:
    raise ValueError("this task does not say how to predict.")
  step = latest(folder) if step is None else step
  like = jax.eval_shape(lambda: task.init(jax.random.key(0), dict(task.hparams)))
  parts = {}
  for name, wanted in (("params", like.params), ("extra", like.extra)):
    saved, leaves = _load_part(folder, step, name)
    shape, expected = structure.encode({name: wanted})
    _compare(name, shape, list(map(structure.describe, expected)), saved["structure"], saved["leaves"], cast=False)
    parts[name] = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
  return jax.jit(task.predict)(TrainState(np.int32(0), None, **parts), inputs)


def _restore_part(path, name: str, tree, saved: dict, cast: bool):
  shape, leaves = structure.encode(tree)
  described = [structure.describe(leaf) for leaf in leaves]
  _compare(name, shape, described, saved["structure"], saved["leaves"], cast)
  wanted = [ocp.utils.to_shape_dtype_struct(structure.array_of(leaf)) for leaf in leaves]
  abstract = {
    str(index): leaf if described[index][0] in structure.KEYS else _with_dtype(leaf, saved["leaves"][index][0])
    for index, leaf in enumerate(wanted)
    if 0 not in leaf.shape
  }
  stored = {}
  if abstract:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
      stored = checkpointer.restore(path.absolute() / name, args=ocp.args.StandardRestore(abstract))
  restored = []
  for index, (leaf, old) in enumerate(zip(wanted, leaves)):
    array = stored.get(str(index))
    if array is None:
      array = jax.device_put(np.zeros(leaf.shape, leaf.dtype), getattr(leaf, "sharding", None))
    restored.append(structure.like(old, array.astype(leaf.dtype) if array.dtype != leaf.dtype else array))
  return jax.tree.unflatten(jax.tree.structure(tree), restored)


def _with_dtype(leaf: jax.ShapeDtypeStruct, dtype: str):
  return jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype), sharding=leaf.sharding)


def _compare(name, shape, leaves, saved_shape, saved_leaves, cast: bool) -> None:
  """Refuses a checkpoint that does not fit, with the place and both sides."""
  plain = lambda value: json.loads(json.dumps(value))
  if _without_classes(plain(shape)) != _without_classes(plain(saved_shape)):
    raise CheckpointError(f"the checkpoint's {name} have another structure than this task's.")
  for index, (new, old) in enumerate(zip(leaves, saved_leaves)):
    same = list(new[1]) == list(old[1]) if cast else list(new) == list(old)
    if not same:
      place = _place(shape, index, len(leaves))
      raise CheckpointError(
        f"{place} is {old[0]}{list(old[1])} in the checkpoint and {new[0]}{list(new[1])} in this task."
        + (" Restore with cast=True to convert it." if list(new[1]) == list(old[1]) else "")
      )


def _without_classes(shape):
  """A structure without the names of NamedTuples' modules: a class may have moved."""
  if isinstance(shape, dict):
    return {k: v[1:] if k == "namedtuple" else _without_classes(v) for k, v in shape.items()}
  return [_without_classes(each) for each in shape] if isinstance(shape, list) else shape


def _place(shape, index: int, count: int) -> str:
  tree = structure.decode(shape, list(range(count)))
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if leaf == index:
      return jax.tree_util.keystr(path, simple=True, separator="/")
  return f"array {index}"


def _loaded(array, kind: str, shape):
  if array is None:
    return np.zeros(shape, np.dtype(kind))
  return jax.random.wrap_key_data(array, impl=structure.KEYS[kind]) if kind in structure.KEYS else array


def _parts(state: TrainState) -> dict[str, dict]:
  """What is stored apart, so that parameters can be read alone."""
  fields = state._asdict()
  return {name: {name: fields.pop(name)} for name in ("params", "extra")} | {"rest": fields}


def _stored(leaves: list) -> dict[str, Any]:
  """What orbax stores: it knows no arrays without entries, whose shape the manifest has."""
  arrays = {str(index): structure.array_of(leaf) for index, leaf in enumerate(leaves)}
  return {name: array for name, array in arrays.items() if 0 not in np.shape(array)}


def _checked(folder, step: int) -> pathlib.Path:
  problem = defect(folder, step)
  if problem is not None:
    raise CheckpointError(f"the checkpoint of step {step} in {folder} cannot be read: {problem}.")
  return _path(folder, step)


def _path(folder, step: int) -> pathlib.Path:
  return pathlib.Path(folder) / "checkpoints" / f"{step:09d}"


def _retain(folder, newest: int, keep: int) -> None:
  """Deletes what is damaged, and all but the newest good checkpoints; the one just written is known to be good."""
  good = 0
  for step in reversed(steps(folder)):
    whole = step == newest or (step < newest and defect(folder, step) is None)
    good += whole
    if not whole or good > keep:
      _delete(_path(folder, step))


def _delete(path: pathlib.Path) -> None:
  with contextlib.suppress(OSError):
    (path / "manifest.json").unlink()  # first, so that a half-deleted checkpoint counts as unfinished
  shutil.rmtree(path, ignore_errors=True)


def _write_manifest(path: pathlib.Path, step: int, parts: dict) -> None:
  written = sorted(file for file in path.rglob("*") if file.is_file())
  listed = {str(file.relative_to(path)): [file.stat().st_size, files.file_crc(file)] for file in written}
  body = json.dumps({"step": step, "parts": parts, "files": listed})
  for file in written:
    files.sync(file)
  files.replace(path / "manifest.json", f"{files.crc(body.encode())}\n{body}".encode())


def _read_manifest(path: pathlib.Path) -> dict:
  crc, _, body = (path / "manifest.json").read_text(encoding="utf-8").partition("\n")
  if int(crc) != files.crc(body.encode()):
    raise ValueError("damaged manifest")
  return json.loads(body)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
