"""The multilayer perceptron."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from jax.typing import ArrayLike

__all__ = ["MLP"]


class MLP(nn.Module):
  """Dense layers with an activation between them; inputs are flattened.

  >>> import jax, jax.numpy as jnp
  >>> model = MLP((64, 10))
  >>> params = model.init(jax.random.key(0), jnp.zeros((2, 8, 8)))["params"]
  >>> model.apply({"params": params}, jnp.zeros((2, 8, 8))).shape
  (2, 10)

  Attributes:
    features: widths of all layers, the outputs last.
    activation: applied after every layer but the last.
    use_bias: whether layers have a bias.
    kernel_init: initializer of the kernels.
  """

  features: Sequence[int]
  activation: Callable[[jax.Array], jax.Array] = nn.relu
  use_bias: bool = True
  kernel_init: Callable = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    hidden = inputs.reshape(inputs.shape[0], -1)
    for index, width in enumerate(self.features):
      hidden = nn.Dense(width, use_bias=self.use_bias, kernel_init=self.kernel_init)(hidden)
      if index < len(self.features) - 1:
        hidden = self.activation(hidden)
    return hidden
