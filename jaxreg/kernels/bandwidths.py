"""Rules for the bandwidth of a Gaussian kernel, from the inputs alone; constants under differentiation.

With standardised inputs of d features distances are about `sqrt(2 d)`, so that `sqrt(d)` does as well as the median.
All take memory for the distances of all pairs: a random part of a large data set is enough.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, example_mask
from jaxreg.kernels.rbf import squared_distances
from jaxreg.metrics.norms import safe_sqrt

__all__ = ["median_bandwidth", "silverman_bandwidth", "ten_median_square_bandwidth"]

_LEAST_MEDIAN = 1e-2


def median_bandwidth(inputs: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """The median distance between two inputs.

  >>> import jax.numpy as jnp
  >>> median_bandwidth(jnp.array([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])).item()
  5.0

  Args:
    inputs: floating `[inputs, dimensions]`.
    where: boolean `[inputs]`: those that count.

  Returns:
    Scalar, float32 at least; 0 where more than half of the pairs are equal, or there is none.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Garreau, Jitkrittum, Kanagawa, "Large Sample Analysis of the Median Heuristic", arXiv 1707.07269, 2017,
    Section 1.
  """
  inputs, counted = _checked(inputs, where)
  return _median_of_pairs(inputs, counted, safe_sqrt)


def silverman_bandwidth(inputs: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Silverman's rule for density estimation, `deviation * (4 / ((d + 2) n)) ^ (1 / (d + 4))`.

  The squared deviation is the mean of the features' variances.

  >>> import jax.numpy as jnp
  >>> round(silverman_bandwidth(jnp.array([[-1.0], [1.0], [-1.0], [1.0]])).item(), 4)
  0.8027

  Args:
    inputs: floating `[inputs, dimensions]`.
    where: boolean `[inputs]`: those that count.

  Returns:
    Scalar, float32 at least; 0 of equal inputs, or of none.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Silverman, "Density Estimation for Statistics and Data Analysis", Chapman and Hall 1986, Section 4.3.2.
  """
  inputs, counted = _checked(inputs, where)
  count = jnp.maximum(jnp.sum(counted), 1).astype(inputs.dtype)
  mean = jnp.sum(inputs, axis=0) / count
  deviations = jnp.where(counted[:, None], inputs - mean, 0)
  dimensions = inputs.shape[1]
  variance = jnp.sum(deviations**2) / count / max(dimensions, 1)
  return safe_sqrt(variance) * (4 / ((dimensions + 2) * count)) ** (1 / (dimensions + 4))


def ten_median_square_bandwidth(inputs: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Ten times the median squared distance, as the code of the Cauchy-Schwarz information bottleneck has it.

  It is not in units of the inputs: of standardised ones it is so large that kernels see second moments only. Every
  input is counted twice there, so that a part of the distances is 0; medians below 0.01 are 0.01.

  >>> import jax.numpy as jnp
  >>> ten_median_square_bandwidth(jnp.array([[0.0], [1.0], [2.0], [3.0]])).item()
  10.0

  Args:
    inputs: floating `[inputs, dimensions]`.
    where: boolean `[inputs]`: those that count.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, official code. There the mean stands in for a median of 0.
  """
  inputs, counted = _checked(inputs, where)
  median = _median_of_pairs(jnp.concatenate([inputs, inputs]), jnp.concatenate([counted, counted]))
  return 10 * jnp.maximum(median, _LEAST_MEDIAN)


def _checked(inputs, where):
  """Constant inputs, float32 at least, 0 where they do not count; and which do."""
  check_float("inputs", inputs)
  inputs = as_array("inputs", inputs)
  if inputs.ndim != 2:
    raise ValueError(f"inputs must be [inputs, dimensions], got shape {inputs.shape}.")
  counted = example_mask(where, inputs.shape[:1])
  inputs = jax.lax.stop_gradient(inputs).astype(jnp.promote_types(inputs.dtype, jnp.float32))
  return jnp.where(counted[:, None], inputs, 0), counted


def _median_of_pairs(inputs, counted, function=lambda squares: squares):
  """The median of a function of the squared distances of the pairs that count, 0 without any; NaN when one is."""
  values = function(squared_distances(inputs, inputs))
  rows, columns = jnp.triu_indices(len(inputs), 1)
  if not len(rows):
    return jnp.zeros((), inputs.dtype)
  pairs = counted[rows] & counted[columns]
  ordered = jnp.sort(jnp.where(pairs, values[rows, columns], jnp.inf))
  count = jnp.sum(pairs)
  middle = (ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2 % len(ordered)]) / 2
  return jnp.where(jnp.any(jnp.isnan(inputs)), jnp.nan, jnp.where(count > 0, middle, 0))
