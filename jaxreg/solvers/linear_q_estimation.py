"""Estimates of linear Q-functions from one trajectory, the covariances that they need, and exploration bonuses."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape

__all__ = [
  "dilated_bonus",
  "linear_q_estimate",
  "magnitude_reduced_q_estimate",
  "matrix_geometric_resampling",
  "quadratic_bonus",
  "ridge_inverse_covariance",
]


def ridge_inverse_covariance(features: ArrayLike, weights: ArrayLike, *, ridge: ArrayLike) -> jax.Array:
  """The inverse `(gamma I + sum_i w_i phi_i phi_i')^-1` of a regularized covariance of features.

  With simulated features and weights `1 / n` this is the alternative to `matrix_geometric_resampling`; with all
  features and a policy's occupancies it is exact.

  >>> import jax.numpy as jnp
  >>> ridge_inverse_covariance(jnp.eye(2), jnp.array([0.75, 0.0]), ridge=0.25).tolist()
  [[1.0, 0.0], [0.0, 4.0]]

  Args:
    features: floating `[samples, size]`.
    weights: non-negative `[samples]`.
    ridge: `gamma`, positive; may be traced.

  Returns:
    `[size, size]`, symmetric.

  Raises:
    ValueError: when shapes do not fit, features are not floating point, or `ridge` is not positive.

  Reference: Dai, Luo, Wei, Zimmert, "Refined Regret for Adversarial MDPs with Linear Function Approximation",
    ICML 2023, the estimate of the inverse covariance (Section 3).
  """
  _check_features(features, weights)
  check_hyperparameter("ridge", ridge, low=0, open_low=True)
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  wide = features.astype(dtype)
  covariance = jnp.einsum("ni,n,nj->ij", wide, weights.astype(dtype), wide)
  matrix = covariance + jnp.asarray(ridge, dtype) * jnp.eye(features.shape[-1], dtype=dtype)
  inverse = jnp.linalg.inv(matrix)
  return ((inverse + inverse.T) / 2).astype(features.dtype)


def matrix_geometric_resampling(features: ArrayLike, *, ridge: ArrayLike, step_size: ArrayLike = 0.5) -> jax.Array:
  """One estimate of `(gamma I + E[phi phi'])^-1` from a stream of features, `c sum_n prod_{i <= n} (I - c A_i)`.

  Here `A_i = gamma I + phi_i phi_i'` and the sum is over n from 0 to the number of samples.

  >>> import jax.numpy as jnp
  >>> estimate = matrix_geometric_resampling(jnp.ones((60, 1)), ridge=0.25, step_size=0.5)
  >>> round(float(estimate[0, 0]), 4)
  0.8

  Args:
    features: floating `[samples, size]`, independent, of norm at most 1.
    ridge: `gamma`, positive; may be traced.
    step_size: `c`, positive and at most `1 / (1 + gamma)`; may be traced.

  Returns:
    `[size, size]`, unbiased but for the tail of the sum.

  Raises:
    ValueError: when features are not floating point or a hyperparameter is outside its domain.

  Reference: Neu, Olkhovskaya, "Efficient and Robust Algorithms for Adversarial Linear Contextual Bandits", COLT 2020,
    the procedure MGR (Section 3.1).
  """
  _check_features(features)
  check_hyperparameter("ridge", ridge, low=0, open_low=True)
  check_hyperparameter("step_size", step_size, low=0, open_low=True, high=1)
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  shrink = 1 - jnp.asarray(step_size, dtype) * jnp.asarray(ridge, dtype)
  identity = jnp.eye(features.shape[-1], dtype=dtype)

  def multiply(carry, phi):
    product, total = carry
    product = shrink * product - step_size * jnp.outer(product @ phi, phi)
    return (product, total + product), None

  (_, total), _ = jax.lax.scan(multiply, (identity, identity), features.astype(dtype))
  return (step_size * total).astype(features.dtype)


def linear_q_estimate(
  features: ArrayLike, inverse_covariance: ArrayLike, played_features: ArrayLike, loss_to_go: ArrayLike
) -> jax.Array:
  """The standard estimate `phi' S phi_played G` of a Q-function, as large as `H / gamma` in either direction.

  >>> import jax.numpy as jnp
  >>> linear_q_estimate(jnp.eye(2), 2 * jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array(0.5)).tolist()
  [1.0, 0.0]

  Args:
    features: floating `[..., size]`, of the state-action pairs of a layer.
    inverse_covariance: `S`, `[size, size]`.
    played_features: `[size]`, of the pair that the trajectory visited.
    loss_to_go: `G`, scalar, the trajectory's losses from this layer on.

  Returns:
    `[...]`, with the mean `phi' S Sigma theta`.

  Raises:
    ValueError: when shapes do not fit or features are not floating point.

  Reference: Dai, Luo, Wei, Zimmert, "Refined Regret for Adversarial MDPs with Linear Function Approximation",
    ICML 2023, the estimator of Algorithm 1.
  """
  check_float("features", features)
  check_hyperparameter("loss_to_go", loss_to_go, shape=())
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  values = _weights(features, inverse_covariance, played_features) * jnp.asarray(loss_to_go, dtype)
  return values.astype(features.dtype)


def magnitude_reduced_q_estimate(
  features: ArrayLike,
  inverse_covariance: ArrayLike,
  played_features: ArrayLike,
  loss_to_go: ArrayLike,
  reference_features: ArrayLike,
  reference_weights: ArrayLike,
  *,
  high: ArrayLike,
  low: ArrayLike = 0.0,
) -> jax.Array:
  """An estimate of a Q-function with the standard one's mean that is never below `-max(|low|, high) / sqrt(gamma)`.

  With `g = phi' S phi_played` and its reference values `g_i` it is `g G - f(g) + sum_i w_i f(g_i)`, where
  `f(g) = high min(g, 0) + low max(g, 0)` is the least that `g G` may be. The paper's losses have `low = 0` and
  `high = H`; for symmetric ones `f(g) = -high |g|`.

  >>> import jax.numpy as jnp
  >>> features, uniform = jnp.array([[1.0], [-1.0]]), jnp.array([0.5, 0.5])
  >>> magnitude_reduced_q_estimate(features, jnp.eye(1), features[0], jnp.array(0.25), features, uniform,
  ...                              high=1.0).tolist()
  [-0.25, 0.25]

  Args:
    features: floating `[..., size]`, of the state-action pairs of a layer.
    inverse_covariance: `S`, `[size, size]`.
    played_features: `[size]`, of the pair that the trajectory visited.
    loss_to_go: `G`, scalar in [low, high], the trajectory's losses from this layer on.
    reference_features: `[samples, size]`, of pairs that the same policy visits, independent of the trajectory and of
      `S`; or all pairs.
    reference_weights: `[samples]`, summing to one: `1 / samples`; or the policy's occupancies.
    high: the largest possible loss to go, non-negative; may be traced.
    low: the smallest one, at most `high`; may be traced.

  Returns:
    `[...]`.

  Raises:
    ValueError: when shapes do not fit, features are not floating point, or `high` is negative.

  Reference: Dai, Luo, Wei, Zimmert, "Refined Regret for Adversarial MDPs with Linear Function Approximation",
    ICML 2023, the magnitude-reduced estimator of Algorithm 2.
  """
  check_float("features", features)
  check_float("reference_weights", reference_weights)
  _check_features(reference_features, reference_weights)
  if jnp.shape(reference_features)[-1] != jnp.shape(features)[-1]:
    raise ValueError(
      f"reference_features must be as long as features, {jnp.shape(features)[-1]}, got {jnp.shape(reference_features)}."
    )
  check_hyperparameter("loss_to_go", loss_to_go, shape=())
  check_hyperparameter("high", high, low=0, shape=())
  check_hyperparameter("low", low, shape=())
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  low, high = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
  least = lambda g: high * jnp.minimum(g, 0) + low * jnp.maximum(g, 0)
  played = _weights(features, inverse_covariance, played_features)
  references = jnp.einsum(
    "...i,ij,nj->...n", features.astype(dtype), inverse_covariance.astype(dtype), reference_features.astype(dtype)
  )
  mean = least(references) @ reference_weights.astype(dtype)
  return (played * jnp.asarray(loss_to_go, dtype) - least(played) + mean).astype(features.dtype)


def quadratic_bonus(
  features: ArrayLike, inverse_covariance: ArrayLike, policy: ArrayLike, *, scale: ArrayLike
) -> jax.Array:
  """The bonus `beta (|phi(s, a)|^2_S + sum_a' pi(a' | s) |phi(s, a')|^2_S)` of a layer for what is seldom seen.

  >>> import jax.numpy as jnp
  >>> quadratic_bonus(jnp.eye(2)[None], jnp.diag(jnp.array([1.0, 3.0])), jnp.array([[0.5, 0.5]]), scale=0.5).tolist()
  [[1.5, 2.5]]

  Args:
    features: floating `[..., actions, size]`.
    inverse_covariance: `S`, `[size, size]`.
    policy: probabilities `[..., actions]`.
    scale: `beta`, non-negative; may be traced.

  Returns:
    `[..., actions]`.

  Raises:
    ValueError: when shapes do not fit, features are not floating point, or `scale` is negative.

  Reference: Luo, Wei, Lee, "Policy Optimization in Adversarial MDPs: Improved Exploration via Dilated Bonuses",
    NeurIPS 2021, the bonus for linear Q-functions (Section 4).
  """
  check_float("features", features)
  if policy.shape != features.shape[:-1]:
    raise ValueError(
      f"policy must have the leading shape of features, expected {features.shape[:-1]}, got {policy.shape}."
    )
  _check_square(inverse_covariance, features.shape[-1])
  check_hyperparameter("scale", scale, low=0, shape=())
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  wide = features.astype(dtype)
  norms = jnp.einsum("...i,ij,...j->...", wide, inverse_covariance.astype(dtype), wide)
  mean = jnp.sum(norms * policy.astype(dtype), axis=-1, keepdims=True)
  return (jnp.asarray(scale, dtype) * (norms + mean)).astype(features.dtype)


def dilated_bonus(bonus: ArrayLike, transitions: ArrayLike, policy: ArrayLike) -> jax.Array:
  """Bonuses to come, each layer weighing a little more: `B_h = b_h + (1 + 1/H) E[B_{h+1}]`.

  >>> import jax.numpy as jnp
  >>> dilated_bonus(jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1, 1)), jnp.ones((2, 1, 1))).ravel().tolist()
  [2.5, 1.0]

  Args:
    bonus: `b`, floating `[layers, states, actions]`.
    transitions: probabilities `[layers, states, actions, next states]`.
    policy: probabilities `[layers, states, actions]`.

  Returns:
    `B`, `[layers, states, actions]`.

  Raises:
    ValueError: when shapes do not fit or the bonus is not floating point.

  Reference: Luo, Wei, Lee, "Policy Optimization in Adversarial MDPs: Improved Exploration via Dilated Bonuses",
    NeurIPS 2021, equation 3.
  """
  check_float("bonus", bonus)
  check_same_shape(bonus=bonus, policy=policy)
  if transitions.shape != (*bonus.shape, bonus.shape[1]):
    raise ValueError(f"transitions must have shape {(*bonus.shape, bonus.shape[1])}, got {transitions.shape}.")
  layers = bonus.shape[0]
  total, results = jnp.zeros_like(bonus[0]), []
  for layer in reversed(range(layers)):
    later = jnp.sum(total * policy[layer + 1], -1) if results else total[:, 0]
    total = bonus[layer] + (1 + 1 / layers) * transitions[layer] @ later
    results.append(total)
  return jnp.stack(results[::-1])


def _check_features(features, weights=None) -> None:
  check_float("features", features)
  if features.ndim != 2:
    raise ValueError(f"features must have shape [samples, size], got {features.shape}.")
  if weights is not None and weights.shape != features.shape[:1]:
    raise ValueError(f"weights must have one entry for each row of features, got {weights.shape} for {features.shape}.")


def _check_square(inverse_covariance, size) -> None:
  check_float("inverse_covariance", inverse_covariance)
  if inverse_covariance.shape != (size, size):
    raise ValueError(f"inverse_covariance must have shape {(size, size)}, got {inverse_covariance.shape}.")


def _weights(features, inverse_covariance, played_features) -> jax.Array:
  """`phi' S phi_played` in at least float32."""
  check_float("features", features)
  size = features.shape[-1]
  _check_square(inverse_covariance, size)
  check_float("played_features", played_features)
  if played_features.shape != (size,):
    raise ValueError(f"played_features must have shape {(size,)}, got {played_features.shape}.")
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  return features.astype(dtype) @ (inverse_covariance.astype(dtype) @ played_features.astype(dtype))
