"""Properties of a representation as a whole."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float
from jaxreg.metrics.norms import scaled

__all__ = ["effective_rank"]


def effective_rank(features: ArrayLike) -> jax.Array:
  """The exponential of the entropy of the singular values: how many dimensions a representation uses.

  >>> import jax.numpy as jnp, numpy as np
  >>> print(np.asarray(effective_rank(jnp.diag(jnp.array([3.0, 3.0, 0.0])))).round(3))
  2.0

  Args:
    features: floating `[examples, features]`; centre them first if their mean is not to count.

  Returns:
    Scalar in [1, features], float32 at least; 0 of zeros, NaN of NaN.

  Raises:
    ValueError: when the features are no floating matrix.

  Reference: Roy, Vetterli, "The Effective Rank: A Measure of Effective Dimensionality", EUSIPCO 2007.
  """
  features = as_array("features", features)
  check_float("features", features)
  if features.ndim != 2:
    raise ValueError(f"features must be [examples, features], got shape {features.shape}.")
  features, _ = scaled(features)
  spoiled = jnp.any(jnp.isnan(features))
  values = jnp.linalg.svd(jnp.where(spoiled, 0, features), compute_uv=False)
  total = jnp.sum(values)
  shares = values / jnp.where(total == 0, 1, total)
  rank = jnp.exp(-jnp.sum(jax.scipy.special.xlogy(shares, shares)))
  return jnp.where(spoiled, jnp.nan, jnp.where(total == 0, 0, rank))
