"""Dynamically pruned convolutions at inference: what masks, gathering and batches cost, in time and multiplications."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg.pruning.gathered import gathered_conv, gathered_sizes

TITLE = "A convolution with pruned filters and channels: whole, masked, gathered"
KEPT = (0.2, 0.45, 0.7, 1.0)


def measure(options: Options):
  """Rows: milliseconds per image of each way, and the shares of multiplications asked for and done."""
  layers = [(64, 8)] if options.quick else [(64, 32), (256, 16), (512, 8)]
  batch = 2 if options.quick else 8
  rows = [row for channels, pixels in layers for row in _layer(channels, pixels, batch, options.repeats)]
  notes = [
    "One 3×3 convolution of `channels` filters and channels, float32; each image keeps its own random share of both."
    " `dense` computes the whole batch at once, with or without a multiplication by masks: a mask alone saves nothing."
    " `one dense` computes image by image (`jax.lax.map`) whole, `one gathered` image by image the smallest of four"
    " sizes that fits; their ratio is what pruning saves at batch one. `vmap gathered` is what not to do: the switch"
    " becomes a selection among all sixteen programs.",
    "`asked` is the share of multiplications of exactly the kept filters and channels, `done` that of the sizes chosen."
    " Masks are given; a head costs channels × (filters + pixels) operations more.",
  ]
  return rows, notes


def _layer(channels: int, pixels: int, batch: int, repeats: int) -> list[dict]:
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(batch, pixels, pixels, channels)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, channels, channels)) / np.sqrt(9 * channels), jnp.float32)
  return [_row(images, kernel, kept, repeats) for kept in KEPT]


def _row(images, kernel, kept: float, repeats: int) -> dict:
  batch, pixels, _, channels = images.shape
  count = round(kept * channels)
  rng = np.random.default_rng(1)
  masks = jnp.asarray([[rng.permutation(channels) < count for _ in range(2)] for _ in range(batch)], jnp.float32)
  inputs = images * masks[:, 1, None, None, :]
  dense, one_dense, one_gathered, all_gathered = _programs()
  functions = {
    "dense": lambda: dense(inputs, kernel, jnp.ones_like(masks)),
    "dense masked": lambda: dense(inputs, kernel, masks),
    "one dense": lambda: one_dense(inputs, kernel, masks),
    "one gathered": lambda: one_gathered(inputs, kernel, masks),
    "vmap gathered": lambda: all_gathered(inputs, kernel, masks),
  }
  expected = functions["dense masked"]()
  for name in ("one dense", "one gathered", "vmap gathered"):
    np.testing.assert_allclose(functions[name](), expected, atol=1e-4)
  seconds = interleaved(functions, repeats=repeats)
  size = min(size for size in gathered_sizes(channels) if size >= count)
  return {
    "channels": channels,
    "pixels": f"{pixels}×{pixels}",
    "batch": batch,
    "kept": kept,
    "asked": (count / channels) ** 2,
    "done": (size / channels) ** 2,
    **{f"{name} ms": 1e3 * value / batch for name, value in seconds.items()},
    "one gathered / one dense": seconds["one gathered"] / seconds["one dense"],
    "one gathered / dense": seconds["one gathered"] / seconds["dense"],
  }


@functools.cache
def _programs():
  def masked(images, kernel, masks):
    layout = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", **layout) * masks[:, 0, None, None, :]

  def one_by_one(images, kernel, masks):
    return jax.lax.map(lambda pair: masked(pair[0][None], kernel, pair[1][None])[0], (images, masks))

  def gather(kernel, pair):
    image, masks = pair
    return gathered_conv(image, kernel, output_mask=masks[0], input_mask=masks[1])

  mapped = lambda images, kernel, masks: jax.lax.map(functools.partial(gather, kernel), (images, masks))
  vmapped = lambda images, kernel, masks: jax.vmap(functools.partial(gather, kernel))((images, masks))
  return tuple(map(jax.jit, (masked, one_by_one, mapped, vmapped)))
