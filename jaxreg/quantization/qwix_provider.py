"""qwix as a second provider of quantized training: a whole Linen or NNX network without changing its layers."""

from typing import TypeVar

import jax.numpy as jnp

from jaxreg.extras import extra_needed
from jaxreg.metrics.sizes import static_integer

__all__ = ["qwix_quantized"]

Model = TypeVar("Model")


def qwix_quantized(
  model: Model,
  *inputs,
  weight_bits: int = 8,
  act_bits: int | None = 8,
  gradient_bits: int | None = None,
  layers: str = ".*",
) -> Model:
  """The network with every matrix product and convolution in low-precision integers, forward and backward, by qwix.

  Scales are those of qwix, the largest absolute value of each channel or example at every call; the straight-through
  gradient reaches weights and inputs. Parameters keep their names and shapes. Where bounds have to be learned or
  calibrated, where bits differ from layer to layer, or for the costs and integer inference of this library, use
  `QDense` and `QConv`; AQT's `aqt_dot_general` is for one Linen layer and has no convolution with a gradient.

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> model = qwix_quantized(nn.Dense(2), weight_bits=4)
  >>> jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((5, 3)))[0].shape
  (5, 2)

  Args:
    model: a Linen or NNX module.
    *inputs: example inputs of an NNX module; none for a Linen module.
    weight_bits: of the kernels, 2 to 8; static, as all arguments.
    act_bits: of the inputs of layers, 2 to 8; None leaves them in floating point. Up to 4 bits are
      int4 arrays, which XLA takes in matrix products, beside int8 too; in convolutions JAX wants both operands alike,
      and XLA on CPUs has none of int4: `QConv` computes those.
    gradient_bits: of the incoming gradients in the backward pass, 2 to 8; None leaves them in floating point.
    layers: a regular expression for the paths of the layers (`block/Dense_0`) that are quantized.

  Returns:
    A module of the same kind.

  Raises:
    ValueError: when bits are out of range, or inputs are given for a Linen module or missing for an NNX module.

  Reference: none; qwix, https://github.com/google/qwix, quantized training (`QtProvider`).
  """
  with extra_needed("quantization", "qwix_quantized"):
    import qwix

  def dtype(name, bits):
    if bits is None:
      return None
    bits = static_integer(name, bits, low=2, high=8)
    return {4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}")

  rule = qwix.QtRule(
    module_path=layers,
    weight_qtype=dtype("weight_bits", weight_bits),
    act_qtype=dtype("act_bits", act_bits),
    bwd_qtype=dtype("gradient_bits", gradient_bits),
  )
  return qwix.quantize_model(model, qwix.QtProvider([rule]), *inputs)
