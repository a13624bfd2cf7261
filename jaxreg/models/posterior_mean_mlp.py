"""The two-layer network of score estimation, whose hidden layer alone is trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["PosteriorMeanMLP"]


class PosteriorMeanMLP(nn.Module):
  """A ReLU network in the kernel parametrisation, `f^i(z) = width^-1/2 sum_r a_r^i relu(w_r . z)`, zero at the start.

  The signs a are drawn once and live in the collection `fixed`, not among the parameters; to train them as well,
  differentiate with respect to both collections. The second half of the neurons copies the first with opposite signs.
  Inputs should have a constant coordinate, as there is no bias.

  >>> import jax, jax.numpy as jnp
  >>> model, inputs = PosteriorMeanMLP(width=8, outputs=2), jnp.ones((3, 4))
  >>> variables = model.init(jax.random.key(0), inputs)
  >>> variables["params"]["weights"].shape, variables["fixed"]["signs"].shape
  ((8, 4), (2, 8))
  >>> bool((jnp.abs(model.apply(variables, inputs)) < 1e-6).all())
  True

  Attributes:
    width: number of neurons, even.
    outputs: number of outputs.

  Reference: Han, Razaviyayn, Xu, "Neural Network-Based Score Estimation in Diffusion Models: Optimization and
    Generalization", ICLR 2024, the network (its details unverified).
  """

  width: int
  outputs: int

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    if self.width < 2 or self.width % 2:
      raise ValueError(f"width must be a positive even number, got {self.width}.")
    weights = self.param("weights", _twice, (self.width, inputs.shape[-1]))
    signs = self.variable("fixed", "signs", lambda: _signs(self.make_rng("params"), self.outputs, self.width))
    hidden = nn.relu(inputs @ weights.T.astype(inputs.dtype))
    return hidden @ signs.value.T.astype(inputs.dtype) / jnp.sqrt(jnp.asarray(self.width, inputs.dtype))


def _twice(key, shape):
  half = jax.random.normal(key, (shape[0] // 2, shape[1]))
  return jnp.concatenate([half, half])


def _signs(key, outputs, width):
  half = jax.random.rademacher(key, (outputs, width // 2), jnp.float32)
  return jnp.concatenate([half, -half], axis=1)
