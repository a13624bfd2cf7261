"""Softmax-like losses over many classes: peak memory and time of an output layer and its loss, in three forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import Options
from experiments.benchmarks.timing import fastest
from jaxreg import losses

TITLE = "Large outputs: value and gradients of an output layer and its loss, float32"
FEATURES = 128
# name -> (plain form, chunked form)
LOSSES = {
  "cross-entropy": (losses.comp_sum_loss, losses.chunked_comp_sum_loss),
  "comp_sum tau=1.5": tuple(
    functools.partial(loss, tau=1.5) for loss in (losses.comp_sum_loss, losses.chunked_comp_sum_loss)
  ),
  "stablemax": (losses.stablemax_cross_entropy, losses.chunked_stablemax_cross_entropy),
  "ldr_kl": (losses.ldr_kl_loss, losses.chunked_ldr_kl_loss),
  "ldr_kl l1_mean": tuple(
    functools.partial(loss, normalize="l1_mean") for loss in (losses.ldr_kl_loss, losses.chunked_ldr_kl_loss)
  ),
}


def measure(options: Options):
  """Rows: one per loss and form, with the memory beyond parameters, inputs and gradients, and milliseconds."""
  batch, classes = (32, 2000) if options.quick else (1024, 100_000)
  rows = [row for name in LOSSES for row in _measure(name, batch, classes, options)]
  notes = [
    f"[{batch}, {classes}] logits of {FEATURES} features; one such array takes {batch * classes * 4 / 2**20:.0f} MiB."
    " Temporary memory is what XLA allots to a device beyond arguments and results.",
    "Plain: the loss of `features @ kernel`. Sharded: the same function under `jit`, the kernel's classes split over"
    f" {jax.device_count()} devices. Chunked: 8,192 classes at a time, their logits computed twice (three times with a"
    " normalisation).",
  ]
  return rows, notes


def _measure(name: str, batch: int, classes: int, options: Options):
  plain, chunked = LOSSES[name]
  rng = np.random.default_rng(0)
  features = rng.normal(size=(batch, FEATURES)).astype(np.float32)
  kernel = (rng.normal(size=(FEATURES, classes)) / np.sqrt(FEATURES)).astype(np.float32)
  labels = rng.integers(0, classes, batch).astype(np.int32)
  mesh = Mesh(np.asarray(jax.devices()), ("model",), axis_types=(AxisType.Auto,))
  split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "model"), ()))

  def of_layer(layer, labels):
    return plain(layer.features @ layer.kernel, labels)

  for form, loss, place in (
    ("plain", of_layer, lambda x: jax.device_put(x)),
    ("sharded", of_layer, lambda x: jax.device_put(x, split if x.shape == kernel.shape else whole)),
    ("chunked", chunked, lambda x: jax.device_put(x)),
  ):
    layer = losses.OutputLayer(place(features), place(kernel))
    step = jax.jit(jax.value_and_grad(lambda layer, labels, loss=loss: jnp.mean(loss(layer, labels))))
    compiled = step.lower(layer, place(labels)).compile()
    seconds = fastest(compiled, layer, place(labels), repeats=2 if options.quick else options.repeats)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    yield {"loss": name, "form": form, "temporary MiB per device": temporary / 2**20, "ms": 1e3 * seconds}
