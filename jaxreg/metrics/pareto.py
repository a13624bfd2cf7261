"""Which of several networks nobody would pass over: costs against accuracies."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_same_shape

__all__ = ["best_within_cost", "pareto_front"]


def pareto_front(costs: ArrayLike, values: ArrayLike) -> jax.Array:
  """Whether a point is on the Pareto front: no other one costs at most as much, is at least as good, and better in one.

  >>> import jax.numpy as jnp
  >>> pareto_front(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.7, 0.6])).tolist()
  [True, True, False]

  Args:
    costs: floating `[..., points]`, the less the better.
    values: floating `[..., points]`, the more the better.

  Returns:
    booleans `[..., points]`; of equal points all or none are on the front, and none whose cost or value is NaN.

  Raises:
    ValueError: when the arrays are not floating point or have different shapes.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (comparison).
  """
  _check(costs, values)
  # other[..., i, j]: how point j compares with point i.
  cheaper = jnp.expand_dims(costs, -2) - jnp.expand_dims(costs, -1)
  better = jnp.expand_dims(values, -2) - jnp.expand_dims(values, -1)
  dominated = (cheaper <= 0) & (better >= 0) & ((cheaper < 0) | (better > 0))
  return ~(jnp.any(dominated, axis=-1) | jnp.isnan(costs) | jnp.isnan(values))


def best_within_cost(costs: ArrayLike, values: ArrayLike, budgets: ArrayLike) -> jax.Array:
  """The best value among the points that cost no more than each budget, and -inf where there is none.

  One family of networks dominates another when this is at least the other's value at each of its costs.

  >>> import jax.numpy as jnp
  >>> best_within_cost(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.7]), jnp.array([0.5, 1.5, 9.0])).tolist()
  [-inf, 0.5, 0.699999988079071]

  Args:
    costs: floating `[..., points]`.
    values: floating `[..., points]`.
    budgets: floating `[..., budgets]`.

  Returns:
    `[..., budgets]`; NaN where the budget, a cost, or an affordable value is NaN.

  Raises:
    ValueError: when the arrays are not floating point or `costs` and `values` have different shapes.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (comparison).
  """
  _check(costs, values)
  check_float("budgets", budgets)
  affordable = jnp.expand_dims(costs, -2) <= jnp.expand_dims(budgets, -1)
  best = jnp.max(jnp.expand_dims(values, -2), axis=-1, initial=-jnp.inf, where=affordable)
  unknown = jnp.isnan(budgets) | jnp.any(jnp.isnan(costs), axis=-1, keepdims=True)
  return jnp.where(unknown, jnp.nan, best)


def _check(costs, values):
  check_float("costs", costs)
  check_float("values", values)
  check_same_shape(costs=costs, values=values)
