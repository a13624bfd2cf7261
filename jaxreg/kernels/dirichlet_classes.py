"""Two classes on the non-negative part of a sphere, from Dirichlet distributions, with their Bayes rule."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = ["dirichlet_sphere", "dirichlet_sphere_log_odds"]


def dirichlet_sphere(
  key: jax.Array, count: int, *, concentrations: ArrayLike | Sequence[Sequence[float]], prior: ArrayLike = 0.4
) -> tuple[jax.Array, jax.Array]:
  """Inputs on the unit sphere, Dirichlet samples divided by their norm, and their classes.

  >>> import jax
  >>> inputs, labels = dirichlet_sphere(jax.random.key(0), 5, concentrations=[[1.0, 2.0], [2.0, 1.0]])
  >>> inputs.shape, labels.shape
  ((5, 2), (5,))

  Args:
    key: random key.
    count: static; number of examples.
    concentrations: positive `[2, features]`, of class 0 and class 1; may be traced.
    prior: probability of class 1, in [0, 1]; may be traced.

  Returns:
    (inputs `[count, features]` of unit norm, labels `[count]`, int32 0 or 1).

  Raises:
    ValueError: when an argument is out of range.

  Reference: Radhakrishnan, Belkin, Uhler, "Wide and Deep Neural Networks Achieve Optimality for Classification",
    PNAS 2023, the experiments on synthetic data.
  """
  concentrations = _check(concentrations, prior)
  if count < 1:
    raise ValueError(f"count must be positive, got {count}.")
  label_key, input_key = jax.random.split(key)
  labels = jax.random.bernoulli(label_key, prior, (count,)).astype(jnp.int32)
  log_gamma = jax.random.loggamma(input_key, concentrations[labels])
  gamma = jnp.exp(log_gamma - jnp.max(log_gamma, -1, keepdims=True))  # small concentrations underflow otherwise
  return gamma / jnp.linalg.norm(gamma, axis=-1, keepdims=True), labels


def dirichlet_sphere_log_odds(
  inputs: ArrayLike, *, concentrations: ArrayLike | Sequence[Sequence[float]], prior: ArrayLike = 0.4
) -> jax.Array:
  """The log-odds of class 1 given an input of `dirichlet_sphere`; the Bayes rule is its sign.

  The map from the simplex to the sphere is one to one, so that the odds are those of the two Dirichlet densities.

  >>> import jax.numpy as jnp
  >>> odds = dirichlet_sphere_log_odds(jnp.array([[0.6, 0.8]]), concentrations=[[1.0, 2.0], [2.0, 1.0]], prior=0.5)
  >>> round(float(jnp.exp(odds[0])), 4)
  0.75

  Args:
    inputs: floating `[..., features]`, non-negative.
    concentrations: positive `[2, features]`, of class 0 and class 1; may be traced.
    prior: probability of class 1, in [0, 1]; may be traced.

  Returns:
    `[...]`, float32 at least.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the experiments on synthetic data (the rule: derived anew).
  """
  concentrations = _check(concentrations, prior)
  check_float("inputs", inputs)
  if jnp.shape(inputs)[-1:] != concentrations.shape[1:]:
    raise ValueError(f"inputs must have {concentrations.shape[1]} features, got shape {jnp.shape(inputs)}.")
  dtype = jnp.promote_types(inputs.dtype, jnp.float32)
  alpha = jnp.asarray(concentrations, dtype)
  wide = inputs.astype(dtype)
  floor = jnp.finfo(dtype).tiny * 1e8  # leaves room for the gradient
  logs = jnp.log(jnp.where(wide > floor, wide, floor)) - jnp.log(jnp.sum(wide, -1, keepdims=True))
  log_norm = jax.scipy.special.gammaln(alpha.sum(-1)) - jax.scipy.special.gammaln(alpha).sum(-1)
  densities = jnp.matmul(logs, (alpha - 1).T, precision="highest") + log_norm
  prior = jnp.asarray(prior, dtype)
  return densities[..., 1] - densities[..., 0] + jnp.log(prior) - jnp.log1p(-prior)


def _check(concentrations, prior):
  check_hyperparameter("prior", prior, low=0, high=1)
  if not isinstance(concentrations, jax.Array):
    concentrations = np.asarray(concentrations, np.float64)
    check_hyperparameter("concentrations", concentrations, low=0, open_low=True)
  if concentrations.ndim != 2 or concentrations.shape[0] != 2:
    raise ValueError(f"concentrations must be [2, features], got shape {concentrations.shape}.")
  return jnp.asarray(concentrations, jnp.result_type(float))
