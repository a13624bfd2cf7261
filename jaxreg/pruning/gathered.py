"""Convolutions that leave out pruned filters and zero channels: gathered, computed small, scattered.

What XLA can save and what it cannot: shapes are static, so that multiplying by a mask saves nothing, and numbers of
filters that depend on the input are only possible as a choice between a few sizes, compiled beforehand (`lax.switch`).
The cost is that of the smallest size that fits, in filters and in input channels, and so falls in steps. Only a real
branch saves: under `vmap` a switch with an index per example becomes a selection among all of its branches, which
costs more than the dense layer. Examples therefore go one at a time (`jax.lax.map`), which gives up what a batch saves,
and on accelerators most of their parallelism. `experiments.benchmarks.ftwt` measures what remains.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float
from jaxreg.pruning.dynamic_pruning import NORM_EPSILON, MaskedConv, MaskHead

__all__ = ["gathered_conv", "gathered_masked_conv", "gathered_sizes"]

FRACTIONS = (0.25, 0.5, 0.75, 1.0)


def gathered_sizes(channels: int, fractions: Sequence[float] = FRACTIONS) -> tuple[int, ...]:
  """The numbers of channels among which `gathered_conv` chooses the smallest that fits.

  >>> gathered_sizes(24), gathered_sizes(3)
  ((6, 12, 18, 24), (1, 2, 3))

  Args:
    channels: of the layer.
    fractions: in (0, 1], with 1 among them.

  Returns:
    Increasing sizes, the last one `channels`.

  Raises:
    ValueError: when a fraction is outside (0, 1] or 1 is missing.

  Reference: none.
  """
  if not fractions or not all(0 < fraction <= 1 for fraction in fractions) or max(fractions) != 1:
    raise ValueError(f"fractions must lie in (0, 1] and contain 1, got {tuple(fractions)}.")
  return tuple(sorted({-int(-channels * fraction // 1) for fraction in fractions}))


def gathered_conv(
  image: ArrayLike,
  kernel: ArrayLike,
  *,
  output_mask: ArrayLike,
  input_mask: ArrayLike,
  strides: int = 1,
  padding="SAME",
  fractions: Sequence[float] = FRACTIONS,
) -> jax.Array:
  """The convolution of one image restricted to some input channels and filters, at about the cost of these.

  >>> import jax, jax.numpy as jnp
  >>> image, kernel = jnp.ones((4, 4, 8)), jnp.ones((3, 3, 8, 8))
  >>> mask = jnp.arange(8) < 3
  >>> gathered_conv(image, kernel, output_mask=mask, input_mask=mask, fractions=(0.5, 1.0))[1, 1].tolist()
  [27.0, 27.0, 27.0, 0.0, 0.0, 0.0, 0.0, 0.0]

  Args:
    image: floating `[height, width, channels]`; see the module on batches.
    kernel: floating `[k, k, channels, filters]`.
    output_mask: `[filters]`, boolean or zeros and ones: which filters to compute.
    input_mask: `[channels]`, likewise: which channels to read; the others count as zero.
    strides: in pixels; static.
    padding: `SAME`, `VALID` or a pair of pixels per dimension; static.
    fractions: of filters and of channels for which a program is compiled, static: the square of their number.

  Returns:
    `[height', width', filters]`, zero where the output mask is.

  Raises:
    ValueError: when shapes do not fit or a fraction is out of range.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022: the computation that its masks allow; the realisation is ours.
  """
  _check(image, kernel, output_mask, input_mask)
  outputs, inputs = _chosen(output_mask, fractions), _chosen(input_mask, fractions)

  def branch(size_out: int, size_in: int):
    def compute(image, kernel):
      out, into = outputs.order[:size_out], inputs.order[:size_in]
      # What was gathered to fill the size is zero, whatever it was.
      read, computed = inputs.on[into], outputs.on[out]
      part = jnp.where(read, jnp.take(image, into, axis=-1), 0)
      weights = jnp.take(jnp.take(kernel, into, axis=2), out, axis=3)
      result = _conv(part, jnp.where(read[:, None] & computed, weights, 0), strides, padding)
      return jnp.zeros((*result.shape[:2], kernel.shape[-1]), result.dtype).at[..., out].set(result)

    return compute

  branches = [branch(size_out, size_in) for size_out in outputs.sizes for size_in in inputs.sizes]
  return jax.lax.switch(outputs.index * len(inputs.sizes) + inputs.index, branches, image, kernel)


def gathered_masked_conv(
  layer: MaskedConv, variables, image: ArrayLike, input_mask: ArrayLike, *, fractions: Sequence[float] = FRACTIONS
) -> tuple[jax.Array, jax.Array]:
  """What a trained `MaskedConv` computes of one image at inference, with its pruned filters left out.

  Normalisation and activation run over all filters, zeros included; they cost one multiplication each.

  >>> import functools, jax, jax.numpy as jnp
  >>> from jaxreg.pruning.dynamic_pruning import mass_mask
  >>> layer, image = MaskedConv(filters=8), jax.random.normal(jax.random.key(0), (6, 6, 3))
  >>> dense = functools.partial(layer.apply, target=functools.partial(mass_mask, mass=0.9), train=False)
  >>> variables = layer.init(jax.random.key(1), image[None], target=functools.partial(mass_mask, mass=0.9), train=False)
  >>> output, mask = gathered_masked_conv(layer, variables, image, jnp.ones(3), fractions=(0.5, 1.0))
  >>> bool(jnp.allclose(output, dense(variables, image[None])[0], atol=1e-5))
  True

  Args:
    layer: the module, with one group.
    variables: its `params` and `batch_stats`.
    image: floating `[height, width, channels]`, the output of the layer before.
    input_mask: `[channels]`, the mask of the layer before, or ones.
    fractions: as in `gathered_conv`.

  Returns:
    The masked output `[height', width', filters]`, and the mask `[filters]` for the next layer.

  Raises:
    ValueError: when the layer has groups or shapes do not fit.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, inference with predicted masks; the realisation is ours.
  """
  if layer.groups != 1:
    raise ValueError(f"layer must have one group, got {layer.groups}.")
  params, stats = variables["params"], variables["batch_stats"]["norm"]
  logits = MaskHead(layer.filters, layer.pool).apply({"params": params["head"]}, image[None])[0]
  mask = (logits > 0).astype(image.dtype)
  hidden = gathered_conv(
    image, params["conv"]["kernel"], output_mask=mask, input_mask=input_mask, strides=layer.strides,
    padding=layer.padding, fractions=fractions,
  )  # fmt: skip
  scale = params["norm"]["scale"] * jax.lax.rsqrt(stats["var"] + NORM_EPSILON)
  return layer.activation((hidden - stats["mean"]) * scale + params["norm"]["bias"]) * mask, mask


class _Chosen(NamedTuple):
  on: jax.Array  # whether a channel is in the mask
  order: jax.Array  # channels, those of the mask first
  index: jax.Array  # of the smallest size that holds them
  sizes: tuple[int, ...]


def _chosen(mask, fractions) -> _Chosen:
  sizes = gathered_sizes(len(mask), fractions)
  on = jnp.asarray(mask) > 0
  index = jnp.searchsorted(jnp.asarray(sizes), jnp.sum(on))
  return _Chosen(on, jnp.argsort(~on), index, sizes)


def _conv(image, kernel, strides, padding):
  padding = padding if isinstance(padding, str) else list(padding)
  return jax.lax.conv_general_dilated(
    image[None], kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )[0]


def _check(image, kernel, output_mask, input_mask):
  check_float("image", image)
  if jnp.ndim(image) != 3 or jnp.ndim(kernel) != 4 or jnp.shape(kernel)[2] != jnp.shape(image)[-1]:
    raise ValueError(
      "kernel must be [k, k, channels, filters] for an image [height, width, channels], got"
      f" {jnp.shape(kernel)} and {jnp.shape(image)}."
    )
  for name, mask, count in (
    ("output_mask", output_mask, jnp.shape(kernel)[3]),
    ("input_mask", input_mask, jnp.shape(kernel)[2]),
  ):
    if jnp.shape(mask) != (count,):
      raise ValueError(f"{name} must have shape ({count},), got {jnp.shape(mask)}.")
