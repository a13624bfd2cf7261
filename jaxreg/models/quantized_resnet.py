"""Residual networks of quantized layers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxreg.metrics.sizes import is_integer
from jaxreg.models.resnet import DEPTHS, ResNet
from jaxreg.quantization.layers import Precision, QConv, QDense

__all__ = ["quant_resnet"]


def quant_resnet(
  depth: int | Sequence[int],
  precision: Precision,
  *,
  classes: int,
  width: int = 64,
  bottleneck: bool = False,
  conv: Callable = QConv,
  dense: Callable = QDense,
  dtype: Any = None,
  axis_name: str | None = None,
  **options,
) -> ResNet:
  """A residual network all of whose convolutions, and whose output layer, are on few bits.

  Inputs of the first convolution have both signs, those of all others are non-negative; batch normalisation and the
  residual sums stay in floating point. The parameters are those of the same `ResNet` without quantization.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.quantization import PRECISIONS
  >>> model = quant_resnet((1, 1), PRECISIONS["W4A4, ends W8A8"], classes=10, width=4)
  >>> run = lambda key, images: model.init_with_output(key, images, train=False)
  >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((2, 8, 8, 1)))[0].shape
  (2, 10)

  Args:
    depth: 18, 34, 50, 101 or 152; or the blocks of each stage.
    precision: bits of all layers; may hold traced integers.
    classes: number of outputs.
    width: channels of the first stage.
    bottleneck: whether the blocks of given stages are bottlenecks; the usual depths bring their own kind.
    conv: module class of convolutions, with the fields of `QConv`.
    dense: module class of the output layer, with the fields of `QDense`.
    dtype: of the layers' computation, None for that of inputs and parameters.
    axis_name: mapped axis over which batch statistics and bounds are taken, or None.
    **options: other fields of `ResNet`.

  Returns:
    The network, a Flax module.

  Raises:
    ValueError: for another depth.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021.
  """
  if is_integer(depth):
    if depth not in DEPTHS:
      raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, or blocks per stage, got {depth}.")
    depth, bottleneck = DEPTHS[depth]
  shared = dict(dtype=dtype, axis_name=axis_name)
  inner = dict(weight_bits=precision.weights, act_bits=precision.activations, **shared)
  ends = dict(weight_bits=precision.end_weights, act_bits=precision.end_activations, **shared)
  return ResNet(
    stages=tuple(depth),
    classes=classes,
    width=width,
    bottleneck=bottleneck,
    axis_name=axis_name,
    conv=functools.partial(conv, **inner),
    stem=functools.partial(conv, signed=True, **ends),
    dense=functools.partial(dense, **ends),
    **options,
  )
