"""Finished trials of a sweep: in memory, and in pieces on disk whose names are the checksums of their content."""

import io
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxreg.training import files
from jaxreg.training import mesh as mesh_lib

__all__ = ["Archive", "trial_keys"]


def trial_keys(hparams: Mapping[str, np.ndarray], seeds: np.ndarray) -> list[tuple]:
  """What distinguishes the trials of one experiment: values of all hyperparameters, exactly, and the seed."""
  names = sorted(hparams)
  return [
    (int(seed), *(hparams[name][index].tobytes() for name in names)) for index, seed in enumerate(np.asarray(seeds))
  ]


class Archive:
  """Finished trials by key; each is a dict of arrays.

  With a folder, every `add` writes one file `trials/piece-<CRC-32 of its content>.npz`. A file whose content does not
  have the checksum in its name is named in a warning, and its trials count as not run. A process that dies leaves
  whole pieces only. Who may write is settled before, by the folder's lock and its `config.json`.

  Args:
    folder: the sweep's folder, or None.
    engine: trials of another engine do not count as finished; `auto` takes those of any.
    fields: arrays that a trial must have to count as finished.
  """

  def __init__(self, folder, engine: str = "auto", fields: tuple[str, ...] = ()):
    self._trials: dict[tuple, dict[str, np.ndarray]] = {}
    self._folder = None if folder is None else pathlib.Path(folder) / "trials"
    if self._folder is None:
      return
    if mesh_lib.is_main():
      with files.writing(folder):
        self._folder.mkdir(parents=True, exist_ok=True)
    for name in self._good_files():
      content = (self._folder / name).read_bytes()
      with np.load(io.BytesIO(content), allow_pickle=False) as piece:
        arrays = dict(_loaded(name, piece[name]) for name in piece.files)
      if set(fields) <= set(arrays) and engine in ("auto", str(arrays["engine"][0])):
        self._remember(arrays)

  def _good_files(self) -> list[str]:
    """Only the main process decides which files are good; the others read those."""
    names = sorted(path.name for path in self._folder.glob("piece-*.npz"))
    count = int(mesh_lib.synchronize(np.int64(len(names))))
    good = np.zeros(count, np.int64)
    if mesh_lib.is_main():
      for index, name in enumerate(names):
        if f"piece-{files.file_crc(self._folder / name):08x}.npz" == name:
          good[index] = 1
        else:
          path = self._folder / name
          warnings.warn(f"{path} does not have the bytes that were written; its trials run again.", stacklevel=3)
          path.unlink()
    good = np.asarray(mesh_lib.synchronize(good)) if count else good
    return [name for name, ok in zip(names, good) if ok]

  def _remember(self, arrays: Mapping[str, np.ndarray]) -> None:
    hparams = {name[7:]: value for name, value in arrays.items() if name.startswith("hparam/")}
    results = {name: value for name, value in arrays.items() if not name.startswith("hparam/") and name != "seed"}
    for index, key in enumerate(trial_keys(hparams, arrays["seed"])):
      self._trials.setdefault(key, {name: value[index] for name, value in results.items()})

  def __contains__(self, key: tuple) -> bool:
    return key in self._trials

  def add(self, hparams: Mapping[str, np.ndarray], seeds: np.ndarray, engine: str, results: Mapping[str, Any]) -> None:
    """Keeps finished trials.

    Args:
      hparams: name -> `[trials]`.
      seeds: `[trials]`.
      engine: what trained them.
      results: name -> `[trials, …]`.

    Raises:
      FolderError: when the folder cannot be written.
    """
    arrays = {f"hparam/{name}": np.asarray(value) for name, value in hparams.items()}
    arrays |= {"seed": np.asarray(seeds), "engine": np.full(len(seeds), engine)}
    arrays |= {name: np.asarray(value) for name, value in results.items()}
    self._remember(arrays)
    if self._folder is not None and mesh_lib.is_main():
      buffer = io.BytesIO()
      np.savez(buffer, **dict(_stored(name, value) for name, value in arrays.items()))
      content = buffer.getvalue()
      with files.writing(self._folder.parent):
        files.replace(self._folder / f"piece-{files.crc(content):08x}.npz", content)

  def collect(self, keys: list[tuple]) -> dict[str, np.ndarray]:
    """The results of these trials, `[trials, …]`."""
    chosen = [self._trials[key] for key in keys]
    names = [name for name in chosen[0] if all(name in trial for trial in chosen)]  # some may have kept parameters
    return {name: np.stack([trial[name] for trial in chosen]) for name in names}


def _stored(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
  """An array as NumPy can write it: bfloat16 and its like as bytes, with the dtype in the name."""
  if value.dtype.kind != "V":
    return name, value
  return f"{name}|{value.dtype}", np.ascontiguousarray(value)[..., None].view(np.uint8)


def _loaded(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
  name, mark, dtype = name.partition("|")
  return name, value.view(np.dtype(dtype))[..., 0] if mark else value
