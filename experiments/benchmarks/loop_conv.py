"""A training step of convolutions within one compiled loop: JAX's gradient against `loop_conv_general_dilated`."""

import jax
import jax.numpy as jnp

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg.layers.loop_conv import loop_conv_general_dilated

TITLE = "Training convolutions within one loop on a CPU: a step with JAX's gradient and with another one, float32"
CONVOLUTIONS = {"JAX": jax.lax.conv_general_dilated, "new": loop_conv_general_dilated}
# Batch, extents of the images, channels.
SHAPES = ((64, (28, 28), 4), (64, (28, 28), 16), (64, (14, 14), 32), (64, (7, 7), 64), (8, (16, 16, 16), 8))


def measure(options: Options):
  """Rows: one per shape."""
  rows = [_row(*shape, options) for shape in (((4, (8, 8), 4),) if options.quick else SHAPES)]
  notes = [
    "Four 3 × 3 (or 3 × 3 × 3) convolutions with ReLU, the last with twice the channels and stride 2, and gradient"
    " descent on the mean square of the output. `loop`: three steps in one `lax.scan`; `alone`: each step a call.",
  ]
  return rows, notes


def _row(batch: int, extents, channels: int, options: Options):
  space = len(extents)
  keys = jax.random.split(jax.random.key(0), 5)
  images = jax.random.normal(keys[0], (batch, *extents, channels))
  shapes = [(*(3,) * space, channels, channels)] * 3 + [(*(3,) * space, channels, 2 * channels)]
  kernels = [jax.random.normal(key, shape) / (3**space * channels) ** 0.5 for key, shape in zip(keys[1:], shapes)]
  runs, steps = {}, 3
  for name, conv in CONVOLUTIONS.items():
    step = _step(conv, images)
    runs[f"{name}, loop"] = jax.jit(lambda kernels, step=step: jax.lax.scan(step, kernels, length=steps)[0])
    runs[f"{name}, alone"] = jax.jit(lambda kernels, step=step: step(kernels, None)[0])
  seconds = interleaved(
    {name: lambda run=run: run(kernels) for name, run in runs.items()}, repeats=1 if options.quick else 2
  )
  milliseconds = {name: 1e3 * value / (steps if name.endswith("loop") else 1) for name, value in seconds.items()}
  return {
    "images": f"{batch} × {'×'.join(map(str, extents))}",
    "channels": channels,
    **{f"ms {name}": value for name, value in milliseconds.items()},
    "speed-up in the loop": milliseconds["JAX, loop"] / milliseconds["new, loop"],
  }


def _step(conv, images):
  numbers = ("NHWC", "HWIO", "NHWC") if images.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")

  def loss(kernels):
    hidden = images
    for kernel, stride in zip(kernels, (1, 1, 1, 2), strict=True):
      strides = (stride,) * (images.ndim - 2)
      hidden = jax.nn.relu(conv(hidden, kernel, strides, "SAME", dimension_numbers=numbers))
    return jnp.mean(hidden**2)

  def step(kernels, _):
    return jax.tree.map(lambda kernel, slope: kernel - 1e-3 * slope, kernels, jax.grad(loss)(kernels)), None

  return step
