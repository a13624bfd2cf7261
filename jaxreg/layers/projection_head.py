"""Projection heads between an encoder and a contrastive loss, dropped after training."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter

__all__ = ["FixedReweightingHead", "MLPProjectionHead", "WithHead", "symmetric_relu"]


def symmetric_relu(inputs: ArrayLike, *, threshold: ArrayLike) -> jax.Array:
  """`relu(x - b) - relu(-x - b)`: zero between -b and b, the identity at b = 0.

  >>> import jax.numpy as jnp
  >>> symmetric_relu(jnp.array([-2.0, 0.5, 3.0]), threshold=1.0).tolist()
  [-1.0, 0.0, 2.0]

  Args:
    inputs: floating `[...]`.
    threshold: b, a scalar of either sign; may be traced, and trained.

  Returns:
    `[...]`, of the inputs' dtype.

  Raises:
    ValueError: when `inputs` are not floating point or `threshold` is no scalar.

  Reference: Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for Representation
    Learning", ICLR 2024, the non-linear model (experiment code of an author).
  """
  inputs = as_array("inputs", inputs)
  check_float("inputs", inputs)
  check_hyperparameter("threshold", threshold, shape=())
  bound = jnp.asarray(threshold, inputs.dtype)
  return jax.nn.relu(inputs - bound) - jax.nn.relu(-inputs - bound)


class FixedReweightingHead(nn.Module):
  """Multiplies feature i by `kappa^-i`, i from 0; no parameters. The encoder learns to put what the loss needs first.

  Nothing should stand between it and the loss that undoes it (batch normalisation, a bias); the normalisation in the
  loss is meant to act after it.

  >>> import jax, jax.numpy as jnp
  >>> FixedReweightingHead(kappa=2.0).apply({}, jnp.ones((1, 3))).tolist()
  [[1.0, 0.5, 0.25]]

  Attributes:
    kappa: at least 1, where 1 changes nothing. Of many features the last ones vanish: a bound on the width.

  Reference: Xue, Gan, Ni, Joshi, Mirzasoleiman, ICLR 2024, the fixed re-weighting head.
  """

  kappa: float

  @nn.compact
  def __call__(self, features: ArrayLike) -> jax.Array:
    check_hyperparameter("kappa", self.kappa, low=1, shape=())
    features = jnp.asarray(features)
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    exponents = -jnp.arange(features.shape[-1], dtype=dtype) * jnp.log(jnp.asarray(self.kappa, dtype))
    return (features * jnp.exp(exponents)).astype(features.dtype)


class MLPProjectionHead(nn.Module):
  """Dense, activation, dense; or one that starts as the identity, for fine-tuning.

  >>> import jax, jax.numpy as jnp
  >>> head = MLPProjectionHead(hidden=4, features=4, identity_init=True)
  >>> variables = head.init(jax.random.key(0), jnp.ones((1, 4)))
  >>> head.apply(variables, jnp.arange(4.0)[None]).tolist()
  [[0.0, 1.0, 2.0, 3.0]]

  Attributes:
    hidden: width of the hidden layer.
    features: number of outputs.
    identity_init: whether the kernels start as identities and the activation is `symmetric_relu` with a trained
      threshold, 0 at first; the number of inputs, `hidden` and `features` must then be equal.
    activation: between the layers, unless `identity_init`.

  Reference: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
    ICML 2020, Section 4.2; the identity is that of Xue et al., ICLR 2024 (experiment code of an author).
  """

  hidden: int
  features: int
  identity_init: bool = False
  activation: Callable[[jax.Array], jax.Array] = nn.relu

  @nn.compact
  def __call__(self, features: ArrayLike) -> jax.Array:
    if not self.identity_init:
      hidden = self.activation(nn.Dense(self.hidden, name="hidden")(features))
      return nn.Dense(self.features, name="out")(hidden)
    if not features.shape[-1] == self.hidden == self.features:
      raise ValueError(
        "inputs, hidden and features must be equally many for identity_init, got"
        f" {features.shape[-1]}, {self.hidden}, {self.features}."
      )
    identity = lambda key, shape, dtype=jnp.float32: jnp.eye(shape[0], dtype=dtype)
    hidden = nn.Dense(self.hidden, kernel_init=identity, name="hidden")(features)
    threshold = self.param("threshold", nn.initializers.zeros, ())
    hidden = symmetric_relu(hidden, threshold=threshold)
    return nn.Dense(self.features, kernel_init=identity, name="out")(hidden)


class WithHead(nn.Module):
  """An encoder and a projection head on it; gives the representations before and after the head.

  >>> import jax, jax.numpy as jnp
  >>> model = WithHead(nn.Dense(3), FixedReweightingHead(kappa=2.0))
  >>> variables = model.init(jax.random.key(0), jnp.ones((2, 5)))
  >>> before, after = model.apply(variables, jnp.ones((2, 5)))
  >>> bool(jnp.allclose(after, before * jnp.array([1.0, 0.5, 0.25])))
  True

  Attributes:
    encoder: module; what is kept.
    head: module, or None for none: the loss then sees the encoder's own output.

  Reference: Xue, Gan, Ni, Joshi, Mirzasoleiman, ICLR 2024.
  """

  encoder: nn.Module
  head: nn.Module | None = None

  def __call__(self, inputs: ArrayLike, *arguments, **keywords) -> tuple[jax.Array, jax.Array]:
    before = self.encoder(inputs, *arguments, **keywords)
    return before, before if self.head is None else self.head(before)
