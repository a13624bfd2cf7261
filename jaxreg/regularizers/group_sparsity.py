"""Group sparsity: the k-group envelope (WGSEF) and the group lasso, with their proximal operators.

`values` and `groups` are as `regularizers.groups` describes: integer ids, the same for all entries of a group.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, dtype_of
from jaxreg.metrics.norms import safe_sqrt
from jaxreg.regularizers.groups import common_dtype, number_of_groups, scale_groups, squared_norms

__all__ = ["group_lasso", "prox_group_lasso", "prox_wgsef", "wgsef", "wgsef_conjugate", "wgsef_minimizer"]


def wgsef(values, groups, *, k: ArrayLike, weights=None, num_groups: int | None = None) -> jax.Array:
  """Weighted group sparse envelope: the convex envelope of half the squared norm on "at most `k` groups are non-zero".

  With `b_j = sqrt(d_j) ||x_j||` sorted downwards it is `(sum_{j <= n} b_j^2 + (k - n) T^2) / 2`, where
  `T = sum_{j > n} b_j / (k - n)` and `n < k` is the number of groups above `T`; equally the minimum over `u` in [0, 1]
  with `sum u <= k` of `sum_j b_j^2 / (2 u_j)`. `k = 1` is half the squared group lasso, `k = num_groups` ridge. Its
  gradient `d_j x_j / u_j` is taken as 0 at zero groups; second derivatives are not supported. Gradient descent on it
  makes groups small but not zero: that needs `prox_wgsef`.

  >>> import jax.numpy as jnp
  >>> values, groups = jnp.array([3.0, 4.0, 1.0]), jnp.array([0, 0, 1])
  >>> [float(wgsef(values, groups, k=k)) for k in (1, 2)]
  [18.0, 13.0]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as `regularizers.groups` describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    weights: `[num_groups]` positive `d_j`, for example group sizes; all 1 when None.
    num_groups: static; number of groups, needed when `groups` is traced and `weights` is None.

  Returns:
    Scalar in the dtype of `values`.

  Raises:
    ValueError: when `k` is not a positive integer, a weight is not positive, or ids do not fit the values.

  Reference: Refael, Arbel, Huleihel, "Learning k-Level Structured Sparse Neural Networks Using Group Envelope
    Regularization", arXiv 2212.12921; the placement of the weights is unverified. Unweighted and without groups: Beck,
    Refael, "Sparse Regularization via Bidualization", Journal of Global Optimization 2022.
  """
  _check_k(k)
  num_groups = number_of_groups(groups, weights, num_groups)
  squared = _weights(weights, num_groups) * squared_norms(values, groups, num_groups)
  # The value is a minimum over u, so its gradient is the one at fixed u.
  share = jax.lax.stop_gradient(_envelope_minimizer(jnp.sqrt(squared), k))
  zero = share == 0
  value = jnp.sum(jnp.where(zero, 0, squared / jnp.where(zero, 1, share))) / 2
  return value.astype(common_dtype(values))


def wgsef_minimizer(values, groups, *, k: ArrayLike, weights=None, num_groups: int | None = None) -> jax.Array:
  """The minimiser `u_j = min(1, b_j / T)` of the envelope's variational form: how far each group is kept.

  It sums to `min(k, number of non-zero groups)`. No gradient flows through it.

  >>> import jax.numpy as jnp
  >>> wgsef_minimizer(jnp.array([4.0, 1.0, 1.0]), jnp.arange(3), k=2).tolist()
  [1.0, 0.5, 0.5]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as `regularizers.groups` describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    `[num_groups]` float32 (float64 for float64 values) in [0, 1], 0 exactly at zero groups.

  Raises:
    ValueError: as `wgsef`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the variational form.
  """
  _check_k(k)
  num_groups = number_of_groups(groups, weights, num_groups)
  squared = _weights(weights, num_groups) * squared_norms(values, groups, num_groups)
  return jax.lax.stop_gradient(_envelope_minimizer(jnp.sqrt(squared), k))


def wgsef_conjugate(values, groups, *, k: ArrayLike, weights=None, num_groups: int | None = None) -> jax.Array:
  """Convex conjugate of `wgsef`: half the sum of the `k` largest `||y_j||^2 / d_j`.

  >>> import jax.numpy as jnp
  >>> float(wgsef_conjugate(jnp.array([3.0, -1.0, 2.0]), jnp.arange(3), k=2))
  6.5

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as `regularizers.groups` describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    Scalar in the dtype of `values`.

  Raises:
    ValueError: as `wgsef`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the conjugate of the k-group model.
  """
  _check_k(k)
  num_groups = number_of_groups(groups, weights, num_groups)
  squared = squared_norms(values, groups, num_groups) / _weights(weights, num_groups)
  largest_first = jnp.sort(squared)[::-1]  # NaN, which sorts last, is then among the largest
  return (jnp.sum(jnp.where(jnp.arange(num_groups) < k, largest_first, 0)) / 2).astype(common_dtype(values))


def prox_wgsef(values, groups, *, k: ArrayLike, lam: ArrayLike, weights=None, num_groups: int | None = None):
  """Proximal operator of `lam * wgsef`, `z_j = y_j u_j / (u_j + lam d_j)`.

  Here `u_j = clip(tau a_j - lam d_j, 0, 1)` with `a_j = sqrt(d_j) ||y_j||` and the `tau` at which they sum to `k`; all
  `u_j` are 1 when at most `k` groups are non-zero. Weak groups become exactly zero. `tau` is bracketed by bisection
  over the sorted breakpoints and then solved on its linear piece, so that derivatives in `values`, `lam` and `weights`
  are exact wherever the operator is differentiable.

  >>> import jax.numpy as jnp
  >>> prox_wgsef(jnp.array([4.0, -4.0, 0.5]), jnp.arange(3), k=2, lam=1.0).tolist()
  [2.0, -2.0, 0.0]

  Args:
    values: floating array, or pytree of arrays: the point `y`.
    groups: integer ids, as `regularizers.groups` describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    lam: non-negative strength; in a proximal step the learning rate times the penalty's strength; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    The proximal point, with the structure, shapes and dtypes of `values`.

  Raises:
    ValueError: as `wgsef`, and when `lam` is negative.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the proximal operator of WGSEF.
  """
  _check_k(k)
  check_hyperparameter("lam", lam, low=0)
  num_groups = number_of_groups(groups, weights, num_groups)
  if num_groups == 0:
    return values
  weights = _weights(weights, num_groups)
  norms = safe_sqrt(weights * squared_norms(values, groups, num_groups))
  cost = weights.astype(norms.dtype) * lam
  share = _prox_minimizer(norms, cost, k)
  total = share + cost
  zero = total == 0
  return scale_groups(values, groups, jnp.where(zero, 0, share / jnp.where(zero, 1, total)))


def group_lasso(values, groups, *, weights=None, num_groups: int | None = None) -> jax.Array:
  """Group lasso penalty `sum_j sqrt(d_j) ||x_j||`, with gradient 0 at zero groups.

  >>> import jax.numpy as jnp
  >>> float(group_lasso(jnp.array([3.0, 4.0, 1.0]), jnp.array([0, 0, 1])))
  6.0

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as `regularizers.groups` describes.
    weights: `[num_groups]` positive `d_j`, for example group sizes; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    Scalar in the dtype of `values`.

  Raises:
    ValueError: when a weight is not positive or ids do not fit the values.

  Reference: Yuan, Lin, "Model Selection and Estimation in Regression with Grouped Variables", JRSS B 2006, equation
    2.1.
  """
  num_groups = number_of_groups(groups, weights, num_groups)
  squared = _weights(weights, num_groups) * squared_norms(values, groups, num_groups)
  return jnp.sum(safe_sqrt(squared)).astype(common_dtype(values))


def prox_group_lasso(values, groups, *, lam: ArrayLike, weights=None, num_groups: int | None = None):
  """Proximal operator of `lam * group_lasso`, the block soft threshold `y_j max(0, 1 - lam sqrt(d_j) / ||y_j||)`.

  >>> import jax.numpy as jnp
  >>> prox_group_lasso(jnp.array([3.0, 4.0, 1.0]), jnp.array([0, 0, 1]), lam=2.5).tolist()
  [1.5, 2.0, 0.0]

  Args:
    values: floating array, or pytree of arrays: the point `y`.
    groups: integer ids, as `regularizers.groups` describes.
    lam: non-negative strength; in a proximal step the learning rate times the penalty's strength; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    The proximal point, with the structure, shapes and dtypes of `values`.

  Raises:
    ValueError: when `lam` is negative, a weight is not positive, or ids do not fit the values.

  Reference: Parikh, Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 2014, Section 6.5.1.
  """
  check_hyperparameter("lam", lam, low=0)
  num_groups = number_of_groups(groups, weights, num_groups)
  norms = safe_sqrt(squared_norms(values, groups, num_groups))
  threshold = lam * jnp.sqrt(_weights(weights, num_groups)).astype(norms.dtype)
  dead = norms <= threshold
  return scale_groups(values, groups, jnp.where(dead, 0, 1 - threshold / jnp.where(dead, 1, norms)))


def _envelope_minimizer(b, k):
  """`u` of the envelope: `b` in units of the threshold `T`, capped at 1."""
  k = jnp.minimum(k, b.size)
  largest_first = -jnp.sort(-b)
  tail = jnp.cumsum(largest_first[::-1])[::-1]
  rank = jnp.arange(b.size)
  # Group number i + 1 lies above the T that the groups from it onwards would share.
  above = (rank < k - 1) & (largest_first * (k - rank) > tail)
  n = jnp.sum(above)
  threshold = jnp.sum(jnp.where(rank >= n, largest_first, 0)) / (k - n).astype(b.dtype)
  zero = threshold == 0
  share = jnp.minimum(b / jnp.where(zero, 1, threshold), 1)
  return jnp.where(zero, (b > 0).astype(b.dtype), share)


def _prox_minimizer(norms, cost, k):
  """`u_j = clip(tau a_j - l_j, 0, 1)` summing to `k`, for weighted norms `a` and costs `l`.

  Where at most `k` groups are non-zero, those have `u = 1`; with fewer than `k`, zero groups have it too, for a zero
  group that moves is then kept.
  """
  few = jnp.sum(norms > 0) <= k
  capped, active = _pieces(jax.lax.stop_gradient(norms), jax.lax.stop_gradient(cost), k)
  slope = jnp.sum(jnp.where(active, norms, 0))
  level = k - jnp.sum(capped) + jnp.sum(jnp.where(active, cost, 0))
  tau = level / jnp.where(slope > 0, slope, 1)
  share = jnp.where(capped, 1, jnp.where(active, tau * norms - cost, 0))
  everything = jnp.where(norms > 0, 1, jnp.sum(norms > 0) < k).astype(norms.dtype)
  # The threshold of all groups is not known when one of the norms is not.
  return jnp.where(jnp.isnan(jnp.sum(norms)), jnp.nan, jnp.where(few, everything, jnp.clip(share, 0, 1)))


def _pieces(norms, cost, k):
  """Which groups are at the cap and which between the bounds, on the linear piece where the sum crosses `k`."""
  safe = jnp.where(norms > 0, norms, 1)
  enters = jnp.where(norms > 0, cost / safe, jnp.inf)
  leaves = jnp.where(norms > 0, (1 + cost) / safe, jnp.inf)
  breakpoints = jnp.sort(jnp.concatenate([enters, leaves]))

  def reaches(tau):
    return jnp.sum(jnp.where(norms > 0, jnp.clip(tau * safe - cost, 0, 1), 0)) >= k

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) // 2
    reached = reaches(breakpoints[middle])
    return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

  last = breakpoints.size - 1
  # Sums evaluated afresh at each probe, because running sums over the breakpoints lose small groups beside large ones.
  low, high = jax.lax.fori_loop(0, last.bit_length() + 1, halve, (jnp.int32(0), jnp.int32(last)))
  capped = leaves <= breakpoints[low]
  active = (enters <= breakpoints[low]) & ~capped & (leaves >= breakpoints[high])
  return capped, active


def _check_k(k):
  if not jnp.issubdtype(dtype_of("k", k), jnp.integer):
    raise ValueError(f"k must be an integer, got dtype {jnp.result_type(k)}.")
  check_hyperparameter("k", k, low=1)


def _weights(weights, num_groups):
  if weights is None:
    return jnp.ones(num_groups, jnp.float32)
  check_hyperparameter("weights", weights, low=0, open_low=True)
  if jnp.shape(weights) != (num_groups,):
    raise ValueError(f"weights must have one entry per group, expected {(num_groups,)}, got {jnp.shape(weights)}.")
  return jnp.asarray(weights)
