"""Gram matrices of kernels of infinite width: seconds and memory, on Fashion-MNIST or random images of its shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import Options
from experiments.benchmarks.timing import fastest
from jaxreg.data import MissingDataError, fashion_mnist
from jaxreg.kernels.convolutional import convolution, global_average_pool, image_patches, image_state
from jaxreg.kernels.dual_activations import relu_dual
from jaxreg.kernels.gram import tiled_gram
from jaxreg.kernels.infinite_width import activate, dense, fully_connected

TITLE = "Gram matrices of neural tangent kernels, ReLU, float32"
DEPTHS = (3, 10)
TILE = 5  # images on either side of a tile of the convolutional kernel


def measure(options: Options):
  """Rows: one per kernel, with seconds, memory and pairs of images a second."""
  count, conv_count = (200, 8) if options.quick else (2000, 200)
  images, source = _images(count)
  rows = [
    _row(f"fully connected, {depth} hidden layers", functools.partial(_dense, depth), images[:count], options)
    for depth in DEPTHS
  ]
  # Symmetric tiles are computed once; one repetition, as it takes many seconds.
  few = Options(repeats=1, quick=options.quick)
  rows.append(_row("convolutional, global average pooling", _convolutional, images[:conv_count], few))
  notes = [
    f"{source}. Fully connected: one matrix product, then elementwise layers. Convolutional: two 3 x 3 layers,"
    f" the first with stride 2, ReLU after each, on all {14**4:,} pairs of 14 x 14 positions, in tiles of {TILE} x"
    f" {TILE} images, the symmetric half only.",
  ]
  return rows, notes


def _images(count):
  try:
    images = fashion_mnist()[0]["x"][:count].reshape(-1, 28, 28, 1)
    return np.asarray(images, np.float32), "Fashion-MNIST"
  except MissingDataError:
    return np.random.default_rng(0).uniform(size=(count, 28, 28, 1)).astype(np.float32), "random images"


def _dense(depth, images):
  inputs = images.reshape(len(images), -1)
  return fully_connected(inputs, depth=depth, dual=relu_dual(), weight_variance=2.0).ntk


def _convolutional(images):
  return tiled_gram(_convolutional_tile, images, tile=min(TILE, len(images) // 2))


def _convolutional_tile(images1, images2):
  patches1, patches2 = (x if x is None else image_patches(x, size=3, stride=2) for x in (images1, images2))
  state = activate(dense(image_state(patches1, patches2), weight_variance=2.0), relu_dual())
  state = activate(convolution(state, size=3, weight_variance=2.0), relu_dual())
  return dense(global_average_pool(state)).ntk


def _row(name, kernel, images, options):
  compiled = jax.jit(kernel).lower(jnp.asarray(images)).compile()
  seconds = fastest(compiled, jnp.asarray(images), repeats=2 if options.quick else options.repeats)
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return {
    "kernel": name,
    "images": len(images),
    "seconds": seconds,
    "temporary MiB": temporary / 2**20,
    "pairs a second": len(images) ** 2 / seconds,
  }
