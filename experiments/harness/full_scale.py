"""`paper` presets: their real step compiled at full shape on a virtual mesh, and run at reduced width.

A recipe may name a preset `paper` when it also defines

- `paper_batch(config) -> dict`: one global batch of its stream as `jax.ShapeDtypeStruct`, `"id"` included;
- `reduced(config) -> Config`: the same structure at a small width and batch;
- `paper_sets(config) -> dict`: data set name -> splits of small random arrays, as `jaxreg.data.write_tfds` takes them,
  with the real set's schema, the held-out split among them;

and its `Config` has a field `data_dir: str | None = None`, TFDS's folder. `cell` does not touch the disk: `task.data`
opens the stream when `fit` calls it, and `task.held_out` another split. tests/experiments/recipe_checks.py compiles
every such step, takes ten reduced ones from a generated set and evaluates on its held-out split.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.harness import registry
from jaxreg.training import Task, hparams
from jaxreg.training.program import abstract_state, compiled_chunk

__all__ = ["compile_step", "recipes"]


def recipes() -> list[str]:
  """Names of the recipes that have a `paper` preset."""
  return [name for name, entry in registry.entries().items() if "paper" in entry.presets]


def compile_step(task: Task, batch: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> jax.stages.Compiled:
  """`fit`'s program for one step, compiled for the mesh from shapes alone.

  Args:
    task: what to train.
    batch: shapes `[batch_size, ...]` of one global batch.
    mesh: with the axes `data` and `model`.

  Returns:
    The compiled program; `jaxreg.training.program.needed_bytes` says what it needs.
  """
  sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
  stacked = {n: jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=sharding) for n, x in batch.items()}
  arguments = abstract_state(task, mesh), stacked, hparams.merge(task), np.int32(1)
  return compiled_chunk(task, mesh, 1).lower(*arguments).compile()
