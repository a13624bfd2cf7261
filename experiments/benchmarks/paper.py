"""Memory per device of every `paper` preset's real step, compiled for eight devices without running."""

import json
import os
import subprocess
import sys
import time

import jax

from experiments.benchmarks import Options
from experiments.harness import full_scale, registry
from jaxreg.training import data_mesh
from jaxreg.training.program import needed_bytes

TITLE = "`paper` presets: the step of `fit` compiled at full shape for eight devices"


def measure(options: Options):
  """Rows: one per preset, with its size and what XLA says that it needs."""
  names = full_scale.recipes()[: 1 if options.quick else None]
  # In a process of its own, as the number of devices is fixed when JAX starts.
  child = subprocess.run(
    [sys.executable, "-m", "experiments.benchmarks.paper", *names],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE, text=True, check=True,
  )  # fmt: skip
  rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
  return rows, ["XLA's memory analysis for CPU devices; layouts, and so the temporaries, differ on accelerators."]


def _row(name: str) -> dict:
  module = registry.recipe(name)
  config = registry.preset(module, "paper")
  task = module.cell(config).task
  began = time.perf_counter()
  compiled = full_scale.compile_step(task, module.paper_batch(config), data_mesh(jax.devices()))
  params = jax.eval_shape(lambda: task.init(jax.random.key(0), task.hparams)).params
  return {
    "recipe": name,
    "batch": task.batch_size,
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "GiB per device": needed_bytes(compiled) / 2**30,
    "compile s": time.perf_counter() - began,
  }


if __name__ == "__main__":
  for recipe_name in sys.argv[1:]:
    print(json.dumps(_row(recipe_name)), flush=True)
