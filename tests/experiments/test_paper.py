"""`paper` presets: the real step compiles at full shape on a virtual mesh; ten small steps run from a generated set."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.harness import full_scale, registry
from jaxreg.data import write_tfds
from jaxreg.training import data_mesh, fit

every_recipe = pytest.mark.parametrize("name", full_scale.recipes())


@pytest.fixture
def programs_stay_out_of_the_cache():
  """Writing executables of this size to the compilation cache has crashed the process inside of XLA."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  yield
  jax.config.update(name, before)


@every_recipe
def test_step_compiles_at_full_shape(name, record_property, programs_stay_out_of_the_cache):
  module = registry.recipe(name)
  config = registry.preset(module, "paper")
  task, batch = module.build(config), module.paper_batch(config)
  assert callable(task.data), "a paper preset reads a stream"
  assert all(shape.shape[0] == task.batch_size for shape in batch.values())
  compiled = full_scale.compile_step(task, batch, data_mesh(jax.devices()))
  needed = full_scale.device_bytes(compiled)
  record_property("bytes_per_device", needed)
  print(f"{name}: {needed / 2**30:.2f} GiB per device")
  assert 0 < needed < 80 * 2**30  # what one H100 or two TPU v4 chips hold


@every_recipe
def test_ten_reduced_steps_from_a_generated_set(name, tmp_path):
  module = registry.recipe(name)
  config = dataclasses.replace(module.reduced(registry.preset(module, "paper")), data_dir=str(tmp_path / "sets"))
  for dataset, splits in module.paper_sets(config).items():
    write_tfds(dataset, splits, data_dir=tmp_path / "sets")
  task = module.build(config)
  stream = task.data()
  first = next(stream)
  stream.close()
  shapes = {key: (value.shape, value.dtype) for key, value in first.items()}
  assert shapes == {key: (spec.shape, spec.dtype) for key, spec in module.paper_batch(config).items()}
  result = fit(task, steps=10, log_every=5, progress=False, mesh=data_mesh(jax.devices()))
  assert [row["step"] for row in result.rows] == [5, 10]
  assert all(np.isfinite(row["loss"]) for row in result.rows)
