"""The spectral contrastive loss of two views, and its value for a linear network in terms of covariances."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_same_shape, example_mask
from jaxreg.losses.labelled_logits import narrowed, widened

__all__ = ["spectral_contrastive_loss", "spectral_population_loss"]


def spectral_contrastive_loss(
  first: ArrayLike, second: ArrayLike, *, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
  """`-2 z_i . z'_i + mean over j != i of (z_i . z'_j)^2`, for views z and z' of the same inputs, as they are.

  By the second moments of the second views, without a matrix of pairs: time and memory grow linearly with the batch.

  >>> import jax.numpy as jnp
  >>> first, second = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 1.0], [0.0, 1.0]])
  >>> spectral_contrastive_loss(first, second).tolist()
  [-2.0, 0.0]

  Args:
    first: floating `[batch, features]`, embeddings of one augmentation of each input.
    second: of the same shape, embeddings of another.
    where: boolean `[batch]`, the inputs that count.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch: an input's pairs are then with those
      of all devices.

  Returns:
    `[batch]`, the loss of each input; the mean is an unbiased estimate of the population's. A lone input has no pairs.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: HaoChen, Wei, Gaidon, Ma, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive
    Loss", NeurIPS 2021, equation 6.
  """
  first, second = as_array("first", first), as_array("second", second)
  check_float("first", first)
  check_float("second", second)
  check_same_shape(first=first, second=second)
  if first.ndim != 2:
    raise ValueError(f"first must be [batch, features], got shape {first.shape}; use vmap for more.")
  dtype = jnp.result_type(first, second)
  counted = example_mask(where, first.shape[:1])
  one, two = (jnp.where(counted[:, None], widened(view), 0) for view in (first, second))
  moments, size = jnp.matmul(two.T, two, precision="highest"), jnp.sum(counted)
  if axis_name is not None:
    moments, size = jax.lax.psum((moments, size), axis_name)
  own = jnp.sum(one * two, axis=-1)
  others = jnp.sum(jnp.matmul(one, moments, precision="highest") * one, axis=-1) - jnp.square(own)
  values = -2 * own + others / jnp.maximum(size - 1, 1)
  return narrowed(jnp.where(counted, values, 0), dtype)


def spectral_population_loss(
  weights: ArrayLike | Sequence[ArrayLike], covariance: ArrayLike, positive_covariance: ArrayLike
) -> jax.Array:
  """The expected spectral contrastive loss of a linear network `f(x) = W x` on centred data.

  `-2 tr(G S+) + tr(G S G S)` with `G = W^T W`, S the covariance of a view and S+ that between two views of an input.

  >>> import jax.numpy as jnp
  >>> spectral_population_loss(jnp.eye(2), jnp.eye(2), 0.5 * jnp.eye(2)).item()
  0.0

  Args:
    weights: floating `[outputs, inputs]`; or the list of the layers' matrices, the first layer first.
    covariance: floating `[inputs, inputs]`, symmetric.
    positive_covariance: floating `[inputs, inputs]`, symmetric.

  Returns:
    Scalar.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for Representation
    Learning", ICLR 2024, the linear model.
  """
  layers = list(weights) if isinstance(weights, (list, tuple)) else [weights]
  layers = [as_array("weights", layer) for layer in layers]
  covariance = as_array("covariance", covariance)
  positive_covariance = as_array("positive_covariance", positive_covariance)
  for name, value in (*(("weights", layer) for layer in layers), ("covariance", covariance)):
    check_float(name, value)
    if value.ndim != 2:
      raise ValueError(f"{name} must be a matrix, got shape {value.shape}.")
  check_float("positive_covariance", positive_covariance)
  check_same_shape(covariance=covariance, positive_covariance=positive_covariance)
  dtype = jnp.result_type(*layers, covariance, positive_covariance)
  covariance, positive_covariance = widened(covariance), widened(positive_covariance)
  product = widened(layers[0])
  for layer in layers[1:]:
    if layer.shape[1] != product.shape[0]:
      raise ValueError(f"weights must fit one another, got {layer.shape} after {product.shape}.")
    product = jnp.matmul(widened(layer), product, precision="highest")
  if covariance.shape != (product.shape[1],) * 2:
    raise ValueError(f"covariance must have shape {(product.shape[1],) * 2}, got {covariance.shape}.")
  outputs = lambda matrix: jnp.matmul(jnp.matmul(product, matrix, precision="highest"), product.T, precision="highest")
  aligned, spread = jnp.trace(outputs(positive_covariance)), outputs(covariance)
  return narrowed(-2 * aligned + jnp.sum(spread * spread.T), dtype)
