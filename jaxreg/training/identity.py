"""A run's identity: everything that its numbers depend on, written as `config.json` and compared before reuse.

Covered are the task's `config`, what `init`, `step` and `evaluate` compute (a hash of their traced programs, arrays
that they close over included), the values of the data, batch size, precision and accumulation, hyperparameters and
seeds, the steps between evaluations, the versions of jaxreg and JAX, and JAX's settings that change numbers. Not
covered: what a host callback does, the files that a stream reads (its name, split, size and seed are), devices, and
`predict`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from jaxreg.data.fingerprint import array_fingerprint
from jaxreg.training import files
from jaxreg.training import mesh as mesh_lib
from jaxreg.training.task import Task

__all__ = ["batch_shapes", "claim", "differences", "of_task", "settings"]

# Parameters of primitives that say where and under what name something runs, not what it computes.
_PLACEMENT = {"name", "mesh", "sharding", "shardings", "in_shardings", "out_shardings", "in_layouts", "out_layouts",
              "donated_invars", "keep_unused", "ctx_mesh", "source_info", "debug_info", "device"}  # fmt: skip
_SETTINGS = (
  "jax_enable_x64",
  "jax_threefry_partitionable",
  "jax_default_matmul_precision",
  "jax_numpy_dtype_promotion",
)


def of_task(task: Task, hparams: Mapping[str, Any], batch, stream=None) -> dict:
  """What the numbers of any run of this task depend on, as plain JSON values.

  Args:
    task: the task.
    hparams: name -> scalar, of which only the dtypes are read.
    batch: shapes of a global batch, as `batch_shapes` returns them.
    stream: the open stream of a task that reads one; its `identity` tells what it reads.
  """
  return {
    "config": _plain(task.config),
    "program": _program_hash(
      task, tuple(sorted((name, str(np.asarray(v).dtype)) for name, v in hparams.items())), batch
    ),
    "data": _arrays_identity(task) if stream is None else getattr(stream, "identity", "a stream"),
    **({} if task.held_out is None else {"held_out": _held_out_identity(task, hparams)}),
    "batch_size": task.batch_size,
    **{name: value for name, value in _plain(task.computation).items() if name != "type"},
    "versions": {name: importlib.metadata.version(name) for name in ("jaxreg", "jax")},
    "settings": settings(),
  }


def settings() -> dict[str, str]:
  """JAX's settings that change numbers."""
  return {name: str(getattr(jax.config, name)) for name in _SETTINGS}


def batch_shapes(task: Task, first=None) -> tuple:
  """Names, shapes and dtypes of a global batch, hashable; of a stream from its first batch."""
  if first is not None:
    return _shapes(first, task.batch_size, lambda dtype: dtype)
  size = task.batch_size or len(jax.tree.leaves(task.data)[0])
  ids = {"id": np.zeros(size, np.int32)}
  return _shapes({**task.data, **ids}, size, jax.dtypes.canonicalize_dtype)


def _shapes(batch: Mapping[str, Any], size: int, stored) -> tuple:
  return tuple(
    (name, _shapes(value, size, stored), "dict")
    if isinstance(value, Mapping)
    else (name, (size, *np.shape(value)[1:]), str(stored(np.asarray(value).dtype)))
    for name, value in sorted(batch.items())
  )


def as_structs(batch: tuple) -> dict[str, Any]:
  """The batch that `batch_shapes` describes."""
  return {
    name: as_structs(shape) if dtype == "dict" else jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    for name, shape, dtype in batch
  }


def claim(folder, identity: dict) -> None:
  """Writes the identity into an empty folder, or compares it with the one there.

  Raises:
    ValueError: when the folder belongs to another experiment; it names the fields and both values.
  """
  if folder is None:
    return
  path = pathlib.Path(folder) / "config.json"
  problem = ""
  if mesh_lib.is_main():
    problem = _compare_or_write(path, identity)
  if bool(mesh_lib.synchronize(np.int32(bool(problem)))):
    raise ValueError(problem or f"{folder} belongs to another run; process 0 says which.")


def _compare_or_write(path: pathlib.Path, identity: dict) -> str:
  if not path.exists():
    leftovers = [name for name in ("checkpoints", "trials") if (path.parent / name).exists()]
    if leftovers:
      return f"{path.parent} holds {leftovers[0]} without a config.json that says whose; choose another folder."
    with files.writing(path.parent):
      files.replace(path, (files.dumps(identity, indent=1, ensure_ascii=False) + "\n").encode())
    return ""
  try:
    saved = files.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    return f"{path} is damaged, so that nobody knows whose run {path.parent} holds; choose another folder."
  found = differences(saved, files.loads(files.dumps(identity)))
  if not found:
    return ""
  listed = "; ".join(f"{name} is {_short(old)} there and {_short(new)} here" for name, old, new in found[:4])
  return f"{path.parent} holds another run: {listed}. Choose another folder or delete it."


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
  """The fields in which two nested dicts differ, with both values."""
  if isinstance(old, dict) and isinstance(new, dict):
    names = list(dict.fromkeys([*old, *new]))
    inside = lambda key: f"{name}.{key}" if name else str(key)
    found = [d for key in names for d in differences(old.get(key), new.get(key), inside(key))]
    # The hash of a program differs along with the config that it is made from, and says less.
    return [d for d in found if d[0] != "program"] or found
  return [] if old == new else [(name, old, new)]


def _short(value) -> str:
  text = files.dumps(value, ensure_ascii=False)
  return text if len(text) <= 60 else f"{text[:57]}…"


def _plain(value):
  """A config as JSON values; what is not plain data is named by its type and place."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"type": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
  if isinstance(value, Mapping):
    return {str(name): _plain(each) for name, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(each) for each in value]
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return np.asarray(value).tolist()
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  return _place(value) if callable(value) else _without_addresses(repr(value))


def _place(function) -> str:
  return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _without_addresses(text: str) -> str:
  return re.sub(r" at 0x[0-9a-f]+", "", text)


@functools.lru_cache(maxsize=64)
def _arrays_identity(task: Task) -> dict:
  return {name: array_fingerprint(value) for name, value in task.data.items()}


def _held_out_identity(task: Task, hparams) -> dict:
  """Of held-out data that are read as a stream: what it reads, and what is measured of a batch."""
  stream = task.held_out.open()
  try:
    first = next(stream)
  finally:
    stream.close()
  shapes = jax.tree.map(lambda value: jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype), first)
  state = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)), dict(hparams))
  hasher = hashlib.sha256()
  _feed_jaxpr(hasher, jax.make_jaxpr(task.held_out.measure)(state, shapes, dict(hparams)))
  return {"data": getattr(stream, "identity", "a stream"), "program": hasher.hexdigest()[:16]}


@functools.lru_cache(maxsize=64)
def _program_hash(task: Task, dtypes: tuple, batch: tuple) -> str:
  hparams = {name: jax.ShapeDtypeStruct((), np.dtype(dtype)) for name, dtype in dtypes}
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(task.init, key, hparams)
  parts = [(task.init, (key, hparams)), (task.step, (state, as_structs(batch), hparams))]
  if task.evaluate is not None:
    parts.append((task.evaluate, (state, hparams)))
  hasher = hashlib.sha256()
  for function, arguments in parts:
    closed, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
    _feed(hasher, str(jax.tree.structure(out)))
    _feed_jaxpr(hasher, closed)
  return hasher.hexdigest()[:16]


def _feed_jaxpr(hasher, closed) -> None:
  """Feeds what a traced program computes: primitives, how they are wired, their parameters, constants by value."""
  jaxpr, constants = (closed.jaxpr, closed.consts) if isinstance(closed, jex.ClosedJaxpr) else (closed, ())
  numbers = {}
  number = lambda variable: numbers.setdefault(variable, len(numbers))
  for variable in (*jaxpr.constvars, *jaxpr.invars):
    _feed(hasher, number(variable), variable.aval.str_short())
  for constant in constants:
    _feed_array(hasher, constant)
  for equation in jaxpr.eqns:
    _feed(hasher, equation.primitive.name)
    for one in equation.invars:
      if isinstance(one, jex.Literal):
        _feed_array(hasher, one.val)
      else:
        _feed(hasher, number(one))
    for name, value in sorted(equation.params.items()):
      if name not in _PLACEMENT:
        _feed(hasher, name)
        _feed_parameter(hasher, value)
    for variable in equation.outvars:
      _feed(hasher, number(variable), variable.aval.str_short())
  for one in jaxpr.outvars:
    _feed_array(hasher, one.val) if isinstance(one, jex.Literal) else _feed(hasher, number(one))


def _feed_parameter(hasher, value) -> None:
  if isinstance(value, (jex.ClosedJaxpr, jex.Jaxpr)):
    _feed_jaxpr(hasher, value)
  elif isinstance(value, (list, tuple)):
    _feed(hasher, len(value))
    for each in value:
      _feed_parameter(hasher, each)
  elif isinstance(value, Mapping):
    for name, each in sorted(value.items(), key=lambda item: str(item[0])):
      _feed(hasher, name)
      _feed_parameter(hasher, each)
  elif isinstance(value, (np.ndarray, np.generic, jax.Array)):
    _feed_array(hasher, value)
  elif callable(value) and not isinstance(value, (type, np.dtype)):
    _feed(hasher, _place(value))
  else:
    _feed(hasher, _without_addresses(repr(value)))


def _feed_array(hasher, value) -> None:
  _feed(hasher, array_fingerprint(value))


def _feed(hasher, *values) -> None:
  hasher.update("|".join(map(str, values)).encode() + b";")
