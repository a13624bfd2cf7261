"""Sinkhorn's algorithm with a fixed number of steps, in the log domain."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = ["sinkhorn_plan", "sinkhorn_potentials"]


def sinkhorn_potentials(
  cost: ArrayLike,
  row_marginal: ArrayLike,
  column_marginal: ArrayLike,
  *,
  epsilon: ArrayLike,
  steps: int,
  row_potential: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Potentials of entropic transport, `min <T, C> + epsilon sum T (log T - 1)`, after `steps` alternating updates.

  A step fits the columns, then the rows. The plan `exp((f + g - C) / epsilon)` has the rows' masses after every step,
  the columns' in the limit. Rows and columns without mass have the potential `-inf` and no part in the plan.

  >>> import jax.numpy as jnp
  >>> half = jnp.array([0.5, 0.5])
  >>> f, g = sinkhorn_potentials(jnp.array([[0.0, 1.0], [1.0, 0.0]]), half, half, epsilon=0.1, steps=10)
  >>> round(float(f[0] + g[0]), 3)
  -0.069

  Args:
    cost: C, floating `[..., m, n]`.
    row_marginal: a, floating `[..., m]`, non-negative.
    column_marginal: b, floating `[..., n]`, non-negative, of the same mass.
    epsilon: positive, in units of the cost; a scalar or `[...]`; may be traced.
    steps: static, at least 1.
    row_potential: f to start from, `[..., m]`; by default 0.

  Returns:
    The potentials f, `[..., m]`, and g, `[..., n]`, in float32 or float64.

  Raises:
    ValueError: when shapes or dtypes do not fit, `epsilon` is not positive or `steps` less than 1.

  Reference: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS 2013, Algorithm 1.
  """
  _check(cost, row_marginal, column_marginal, row_potential)
  check_hyperparameter("epsilon", epsilon, low=0, open_low=True)
  check_hyperparameter("steps", steps, low=1)
  dtype = jnp.promote_types(jnp.result_type(cost), jnp.float32)
  cost, a, b = (jnp.asarray(array, dtype) for array in (cost, row_marginal, column_marginal))
  epsilon = jnp.asarray(epsilon, dtype)[..., None]
  f = jnp.zeros(cost.shape[:-1], dtype) if row_potential is None else jnp.asarray(row_potential, dtype)

  def fitted(mass, potential, axis):
    scores = (jnp.expand_dims(potential, -2 if axis == -1 else -1) - cost) / epsilon[..., None]
    return jnp.where(mass <= 0, -jnp.inf, epsilon * (_log(mass) - jax.nn.logsumexp(scores, axis)))

  def step(f, _):
    g = fitted(b, f, -2)
    return fitted(a, g, -1), g

  f, g = jax.lax.scan(step, f, None, length=steps)
  return f, g[-1]


def sinkhorn_plan(
  cost: ArrayLike, row_marginal: ArrayLike, column_marginal: ArrayLike, *, epsilon: ArrayLike, steps: int
) -> jax.Array:
  """The plan `exp((f + g - C) / epsilon)` of `sinkhorn_potentials`, differentiable through its steps.

  >>> import jax.numpy as jnp
  >>> half = jnp.array([0.5, 0.5])
  >>> plan = sinkhorn_plan(jnp.array([[0.0, 1.0], [1.0, 0.0]]), half, half, epsilon=0.5, steps=3)
  >>> round(float(plan[0, 0]), 3), round(float(plan[0, 1]), 3)
  (0.44, 0.06)

  Args:
    cost, row_marginal, column_marginal, epsilon, steps: as in `sinkhorn_potentials`.

  Returns:
    `[..., m, n]`, whose rows have the mass of `row_marginal`, and whose columns nearly that of `column_marginal`.

  Raises:
    ValueError: as in `sinkhorn_potentials`.

  Reference: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS 2013, Algorithm 1.
  """
  f, g = sinkhorn_potentials(cost, row_marginal, column_marginal, epsilon=epsilon, steps=steps)
  scores = f[..., :, None] + g[..., None, :] - jnp.asarray(cost, f.dtype)
  return jnp.exp(scores / jnp.asarray(epsilon, f.dtype)[..., None, None])


def _log(mass):
  return jnp.log(jnp.where(mass <= 0, 1, mass))


def _check(cost, row_marginal, column_marginal, row_potential) -> None:
  check_float("cost", cost)
  shape = jnp.shape(cost)
  if len(shape) < 2:
    raise ValueError(f"cost must have the shape [..., m, n], got {shape}.")
  rows, columns = shape[:-1], (*shape[:-2], shape[-1])
  named = (("row_marginal", row_marginal, rows), ("column_marginal", column_marginal, columns))
  for name, array, expected in (*named, ("row_potential", row_potential, rows)):
    if array is not None:
      check_float(name, array)
      if jnp.shape(array) != expected:
        raise ValueError(f"{name} must have the shape {expected} for costs of shape {shape}, got {jnp.shape(array)}.")
