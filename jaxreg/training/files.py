"""Files that can be trusted: checksums, atomic replacement, JSON without bare NaN, one writer per folder."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import zlib
from typing import Any

import numpy as np

from jaxreg.training import mesh as mesh_lib

__all__ = ["FolderError", "crc", "dumps", "file_crc", "loads", "lock", "replace", "sync", "writing"]

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class FolderError(RuntimeError):
  """A folder cannot be written, or another process is writing to it."""


def dumps(value: Any, **options) -> str:
  """Strict JSON: a float that is not finite becomes the string "nan", "inf" or "-inf", which `loads` turns back."""

  def plain(value):
    if isinstance(value, dict):
      return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
      return [plain(each) for each in value]
    if isinstance(value, (np.generic, np.ndarray)):
      return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
      return str(value)
    return value

  return json.dumps(plain(value), allow_nan=False, **options)


def loads(text: str) -> Any:
  """The inverse of `dumps`."""

  def back(value):
    if isinstance(value, dict):
      return {name: back(each) for name, each in value.items()}
    if isinstance(value, list):
      return [back(each) for each in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value

  return back(json.loads(text))


def crc(data: bytes, start: int = 0) -> int:
  """CRC-32."""
  return zlib.crc32(data, start)


def file_crc(path: pathlib.Path) -> int:
  """CRC-32 of a file's content."""
  value = 0
  with open(path, "rb") as file:
    while block := file.read(1 << 22):
      value = crc(block, value)
  return value


def sync(path: pathlib.Path) -> None:
  """Forces a file or folder to disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a reader sees the old content or the new one, whenever the process dies."""
  temporary = path.with_name(f".{path.name}.writing")
  try:
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise


@contextlib.contextmanager
def writing(folder):
  """Turns an OSError (full disk, no such place) into a sentence that names the folder."""
  try:
    yield
  except OSError as error:
    raise FolderError(f"cannot write to the run's folder {folder}: {error}. What was saved is intact.") from error


@contextlib.contextmanager
def lock(folder):
  """Makes the folder, and holds it against other writers until the end; without a folder nothing is held.

  Raises:
    FolderError: when another process holds it, in every process of a run over several hosts.
  """
  if folder is None:
    yield
    return
  handle, problem = None, ""
  if mesh_lib.is_main():
    try:
      handle = _locked(pathlib.Path(folder))
    except OSError as error:
      problem = f"cannot write to the run's folder {folder}: {error}. What was saved is intact."
    if handle is None and not problem:
      problem = f"another process is writing to {folder}; wait for it, or choose another folder."
  failed = bool(mesh_lib.synchronize(np.int32(bool(problem))))
  try:
    if failed:
      raise FolderError(problem or f"process 0 cannot write to {folder}.")
    yield
  finally:
    if handle is not None:
      os.close(handle)


def _locked(folder: pathlib.Path) -> int | None:
  """A handle that holds the folder's lock, or None if another process holds it; the lock dies with its process."""
  folder.mkdir(parents=True, exist_ok=True)
  handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(handle)
    return None
  except OSError:
    os.close(handle)
    raise
  return handle
