"""Closed forms of linear networks under the spectral contrastive loss: what each layer makes of the features."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape

__all__ = ["SpectralOptimum", "feature_share", "feature_weights", "layer_gram", "spectral_optimum"]


class SpectralOptimum(NamedTuple):
  """The minimum of the population loss.

  Attributes:
    gram: `[inputs, inputs]`, `W^T W` of the best linear map W.
    loss: scalar, the smallest loss.
  """

  gram: jax.Array
  loss: jax.Array


def spectral_optimum(
  covariance: ArrayLike, positive_covariance: ArrayLike, *, rank: int | None = None
) -> SpectralOptimum:
  """The best linear map of the spectral contrastive loss: `W^T W = S^-1 S+ S^-1`, or its best part of given rank.

  The loss is minus the sum of the largest squared eigenvalues of `S^-1/2 S+ S^-1/2`, as many as the rank. Directions in
  which the data do not vary are left out (pseudo-inverse).

  >>> import jax.numpy as jnp
  >>> optimum = spectral_optimum(jnp.diag(jnp.array([1.0, 2.0])), jnp.diag(jnp.array([0.5, 0.5])), rank=1)
  >>> optimum.gram.round(3).tolist(), round(optimum.loss.item(), 3)
  ([[0.5, 0.0], [0.0, 0.0]], -0.25)

  Args:
    covariance: S, floating `[inputs, inputs]`, symmetric and positive semi-definite, of one view.
    positive_covariance: S+, of the same shape, between two views of an input, positive semi-definite.
    rank: static; the number of outputs, if smaller than that of inputs.

  Returns:
    `SpectralOptimum`, float32 at least.

  Raises:
    ValueError: when shapes or dtypes do not fit or `rank` is out of range.

  Reference: Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for Representation
    Learning", ICLR 2024, the linear model.
  """
  covariance, positive_covariance = (
    _matrix("covariance", covariance),
    _matrix("positive_covariance", positive_covariance),
  )
  check_same_shape(covariance=covariance, positive_covariance=positive_covariance)
  size = covariance.shape[0]
  rank = size if rank is None else rank
  check_hyperparameter("rank", rank, low=1, high=size)
  values, vectors = jnp.linalg.eigh(covariance)
  varies = values > jnp.max(values) * size * jnp.finfo(values.dtype).eps
  inverse = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, values, 1)), 0)
  inverse = jnp.where(jnp.isnan(values), jnp.nan, inverse)
  root = _product(vectors * inverse, vectors.T)
  whitened = _product(root, positive_covariance, root)
  correlations, directions = jnp.linalg.eigh((whitened + whitened.T) / 2)
  # Ascending; what is negative, if S+ is not positive semi-definite, no Gram matrix can have.
  kept = jnp.where(jnp.arange(size) >= size - rank, jnp.maximum(correlations, 0), 0)
  gram = _product(root, directions * kept, directions.T, root)
  return SpectralOptimum((gram + gram.T) / 2, -jnp.sum(jnp.square(kept)))


def layer_gram(gram: ArrayLike, *, layer: ArrayLike, depth: ArrayLike) -> jax.Array:
  """`G^(l / L)`, the Gram matrix of the first l of L balanced layers whose product has the Gram matrix G.

  Gradient flow from a small initialisation balances layers; so does weight decay.

  >>> import jax.numpy as jnp, numpy as np
  >>> print(np.asarray(layer_gram(jnp.diag(jnp.array([4.0, 9.0])), layer=1, depth=2)).round(3))
  [[2. 0.]
   [0. 3.]]

  Args:
    gram: floating `[inputs, inputs]`, symmetric and positive semi-definite.
    layer: l, in [1, depth]; may be traced, as `depth`.
    depth: L, at least 1.

  Returns:
    `[inputs, inputs]`, float32 at least.

  Raises:
    ValueError: when the shape does not fit or a number is out of range.

  Reference: Xue et al., ICLR 2024, the weights of features layer by layer.
  """
  gram = _matrix("gram", gram)
  power = _power(layer, depth, gram.dtype)
  values, vectors = jnp.linalg.eigh(gram)
  positive = values > 0
  powers = jnp.where(positive, jnp.where(positive, values, 1) ** power, 0)
  powers = jnp.where(jnp.isnan(values), jnp.nan, powers)
  return _product(vectors * powers, vectors.T)


def feature_weights(
  strength: ArrayLike, kept: ArrayLike, *, noise: ArrayLike, layer: ArrayLike, depth: ArrayLike
) -> jax.Array:
  """The weights of independent features after l of L linear layers, `(q phi / (phi^2 + s^2))^(l / L)`.

  After the last layer small where augmentation destroys a feature (q near 0) and where it is much weaker or much
  stronger than the noise; layers before weigh features more evenly.

  >>> import jax.numpy as jnp, numpy as np
  >>> weights = feature_weights(jnp.array([2.0, 0.5]), jnp.array([1.0, 0.5]), noise=0.5, layer=2, depth=2)
  >>> print(np.asarray(weights).round(3))
  [0.471 0.5  ]

  Args:
    strength: phi, positive; floating `[...]`, the size of each feature.
    kept: q, in [0, 1], of the same shape: the correlation of a feature between two views, as a coefficient.
    noise: s, the standard deviation of the noise on each feature in a view, non-negative scalar.
    layer: l, in [1, depth]; may be traced, as the others.
    depth: L, at least 1.

  Returns:
    `[...]`, float32 at least.

  Raises:
    ValueError: when shapes or dtypes do not fit or a number is out of range.

  Reference: Xue et al., ICLR 2024, the three scenarios of mismatched features.
  """
  strength, kept = as_array("strength", strength), as_array("kept", kept)
  check_float("strength", strength)
  check_float("kept", kept)
  check_same_shape(strength=strength, kept=kept)
  check_hyperparameter("noise", noise, low=0, shape=())
  dtype = jnp.promote_types(jnp.result_type(strength, kept), jnp.float32)
  strength, kept, noise = strength.astype(dtype), kept.astype(dtype), jnp.asarray(noise, dtype)
  weight = kept / (strength + noise * (noise / strength))  # no square leaves the range
  zero = weight == 0
  return jnp.where(zero, 0, jnp.where(zero, 1, weight) ** _power(layer, depth, dtype))


def feature_share(
  strength: ArrayLike, kept: ArrayLike, *, noise: ArrayLike, layer: ArrayLike, depth: ArrayLike
) -> jax.Array:
  """Each feature's fraction of the representation's signal after l of L layers, `w^2 phi^2` over its sum.

  >>> import jax.numpy as jnp, numpy as np
  >>> for layer in (1, 2):
  ...   share = feature_share(jnp.array([2.0, 0.5]), jnp.ones(2), noise=0.5, layer=layer, depth=2)
  ...   print(np.asarray(share).round(2))
  [0.88 0.12]
  [0.78 0.22]

  Args:
    strength: as in `feature_weights`, as the rest; features on the last axis.
    kept: of the same shape.
    noise: non-negative scalar.
    layer: in [1, depth].
    depth: at least 1.

  Returns:
    `[..., features]`, of sum 1, float32 at least.

  Raises:
    ValueError: when shapes or dtypes do not fit or a number is out of range.

  Reference: Xue et al., ICLR 2024, the weights of features layer by layer.
  """
  weights = feature_weights(strength, kept, noise=noise, layer=layer, depth=depth)
  size = jnp.max(jnp.abs(weights), axis=-1, keepdims=True)
  strength = as_array("strength", strength).astype(weights.dtype)
  strength = strength / jnp.max(jnp.abs(strength), axis=-1, keepdims=True)
  signal = jnp.square(weights / jnp.where(size == 0, 1, size) * strength)
  total = jnp.sum(signal, axis=-1, keepdims=True)
  return signal / jnp.where(total == 0, 1, total)


def _power(layer, depth, dtype):
  check_hyperparameter("depth", depth, low=1, shape=())
  check_hyperparameter("layer", layer, low=1, shape=())
  if isinstance(layer, int) and isinstance(depth, int) and layer > depth:
    raise ValueError(f"layer must be at most depth = {depth}, got {layer}.")
  return jnp.asarray(layer, dtype) / jnp.asarray(depth, dtype)


def _matrix(name, value):
  value = as_array(name, value)
  check_float(name, value)
  if value.ndim != 2 or value.shape[0] != value.shape[1]:
    raise ValueError(f"{name} must be a square matrix, got shape {value.shape}.")
  return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _product(*matrices):
  product = matrices[0]
  for matrix in matrices[1:]:
    product = jnp.matmul(product, matrix, precision="highest")
  return product
