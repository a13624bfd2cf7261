"""Shared test set-up: eight virtual CPU devices, the compilation cache, and the golden files."""

import gc
import itertools
import json
import os
import pathlib
import subprocess
import sys

import hypothesis
import jax
import numpy as np
import pytest

# Most of the suite's time is compilation, and most of that is LLVM's: do without its optimizations and XLA's newest
# emitters; XLA's own rewriting of programs stays. `XLA_FLAGS= make test` tests the fully optimized code.
_QUICK = "--xla_cpu_use_fusion_emitters=false"


def _are_known(flags: str) -> bool:
  """Whether this XLA knows the flags; a process that is given unknown ones ends."""
  program = [sys.executable, "-c", "import jax; jax.devices()"]
  return subprocess.run(program, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True).returncode == 0


if "XLA_FLAGS" not in os.environ:  # workers and programs that tests start inherit what stands in the environment
  os.environ["XLA_FLAGS"] = _QUICK if _are_known(_QUICK) else ""
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  jax.config.update("jax_disable_most_optimizations", True)

jax.config.update("jax_num_cpu_devices", 8)
# One cache for all workers and runs.
_CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# The same examples in every run, so that a failure belongs to the change that made it; new ones are drawn with
# `--hypothesis-profile=default`.
hypothesis.settings.register_profile("same_examples", derandomize=True)
hypothesis.settings.load_profile("same_examples")


def pytest_collection_finish(session):
  """Tracing makes millions of short-lived objects: searching all modules for cycles each time took a seventh."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 50, 100)


collect_ignore = ["training/worker.py"]  # a program, not a module
GOLDEN = pathlib.Path(os.environ.get("JAXREG_GOLDEN", pathlib.Path(__file__).parent / "golden"))


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed():
  """Compiled programs live in memory maps, of which Linux allows a process 65,530; beyond that it crashes anywhere."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def programs_of_a_large_module_are_freed():
  """The conformance table alone, whose tests share programs, would reach that limit."""
  yield
  if next(_FINISHED) % 20 == 0 and _memory_maps() > 20_000:
    jax.clear_caches()


_FINISHED = itertools.count(1)


def _memory_maps() -> int:
  maps = pathlib.Path("/proc/self/maps")
  return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture
def optimized():
  """LLVM's optimizations, for a test that otherwise runs longer than it compiles (convolutions, long loops)."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ)


class Golden:
  """The cases of one golden file: `cases()` yields (name, arrays by short name, meta of the case)."""

  def __init__(self, slug: str):
    path = GOLDEN / f"{slug}.npz"
    if not path.exists():
      pytest.fail(f"no golden file {path}")
    with np.load(path, allow_pickle=False) as file:
      self.arrays = {name: file[name] for name in file.files if name != "meta"}
      self.meta = json.loads(str(file["meta"]))

  def cases(self, prefix: str = ""):
    """Every prefix of the file (`case0`, `dist1`, …) that starts with `prefix`, in order of appearance."""
    names = dict.fromkeys(name.split("_", 1)[0] for name in self.arrays)
    for case in names:
      if case.startswith(prefix):
        arrays = {name.split("_", 1)[1]: value for name, value in self.arrays.items() if name.split("_", 1)[0] == case}
        described = self.meta.get("cases", {})
        if isinstance(described, list):  # of case0, case1, …
          described = {f"case{index}": entry for index, entry in enumerate(described)}
        yield case, arrays, described.get(case, {})


@pytest.fixture(scope="session")
def golden():
  """`golden("24-ldr")` opens that golden file."""
  return Golden


@pytest.fixture
def x64():
  """Runs the test in float64."""
  with jax.enable_x64(True):
    yield
