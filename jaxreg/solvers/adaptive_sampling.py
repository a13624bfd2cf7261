"""Adversarial adaptive sampling of collocation points: a density maximises the residual that a solution minimises.

With `r` the residual of a differential equation: `min_u max_p E_p[r^2] - beta int |grad p|^2` over densities p.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape

__all__ = [
  "Derivatives",
  "OptimalAdversary",
  "aas_pinn_loss",
  "aas_sampler_loss",
  "das_cross_entropy_loss",
  "laplacian",
  "log_density_and_score",
  "normalize_squared_residuals",
  "optimal_adversary_1d",
  "sample_in_box",
  "tanh_network_derivatives",
]

LOG_LOW, LOG_HIGH = -23.025851, 5.0  # of densities


def aas_pinn_loss(
  residual: Callable,
  points: ArrayLike,
  *,
  boundary_residual: Callable | None = None,
  boundary_points: ArrayLike | None = None,
  boundary_weight: ArrayLike = 1.0,
) -> jax.Array:
  """`mean r(x)^2 + boundary_weight mean r_b(x_b)^2` at points of the adversary, which are constants.

  There is no importance weight: the objective is the integral weighted by the adversary's density.

  >>> float(aas_pinn_loss(lambda x: x[:, 0], jnp.array([[1.0], [3.0]])))
  5.0

  Args:
    residual: `[n, d] -> [n]`.
    points: floating `[n, d]`.
    boundary_residual: `[m, d] -> [m]`; None when the solution meets the boundary condition by construction.
    boundary_points: floating `[m, d]`.
    boundary_weight: non-negative; may be traced.

  Returns:
    A scalar.

  Raises:
    ValueError: when points are not floating point, the boundary's residual lacks its points, or the weight is negative.

  Reference: Tang, Zhai, Wan, Yang, "Adversarial Adaptive Sampling: Unify PINN and Optimal Transport for the
    Approximation of PDEs", ICLR 2024, the minimisation step.
  """
  check_float("points", points)
  check_hyperparameter("boundary_weight", boundary_weight, low=0)
  if (boundary_residual is None) != (boundary_points is None):
    raise ValueError("boundary_residual and boundary_points must be given together, got only one of them.")
  loss = jnp.mean(jnp.square(residual(jax.lax.stop_gradient(points))))
  if boundary_residual is not None:
    loss += boundary_weight * jnp.mean(jnp.square(boundary_residual(jax.lax.stop_gradient(boundary_points))))
  return loss


def aas_sampler_loss(
  log_density: ArrayLike,
  score: ArrayLike,
  squared_residuals: ArrayLike,
  old_log_density: ArrayLike,
  *,
  smoothness: ArrayLike,
  baseline: ArrayLike = 0.0,
) -> jax.Array:
  """The adversary's loss at points drawn from p': `-(r^2 - baseline) p / p' + smoothness |grad p|^2 / p'`.

  Where `p = p'`, the first term's gradient is `-(r^2 - baseline) grad log p`. Log densities are clipped to [-23, 5].

  >>> ones = jnp.ones(2)
  >>> aas_sampler_loss(0 * ones, jnp.zeros((2, 3)), jnp.array([1.0, 3.0]), 0 * ones, smoothness=0.1).tolist()
  [-1.0, -3.0]

  Args:
    log_density: `log p`, floating `[n]`.
    score: `grad_x log p`, floating `[n, d]`; see `log_density_and_score`.
    squared_residuals: non-negative, floating `[n]`; taken as constant. See `normalize_squared_residuals`.
    old_log_density: `log p'` of the density that the points were drawn from, floating `[n]`; taken as constant.
    smoothness: beta, non-negative; may be traced. Near 0 the density collapses on the largest residual, large values
      keep it uniform.
    baseline: subtracted from the squared residuals to lower the gradient's variance, such as their mean; may be
      traced.

  Returns:
    `[n]`.

  Raises:
    ValueError: when shapes do not fit, `smoothness` is negative or `baseline` not a number.

  Reference: Tang, Zhai, Wan, Yang, "Adversarial Adaptive Sampling: Unify PINN and Optimal Transport for the
    Approximation of PDEs", ICLR 2024, the maximisation step (derived; details unverified).
  """
  check_float("log_density", log_density)
  check_same_shape(
    log_density=log_density, squared_residuals=squared_residuals, old_log_density=old_log_density,
  )  # fmt: skip
  if jnp.ndim(score) != jnp.ndim(log_density) + 1 or jnp.shape(score)[:-1] != jnp.shape(log_density):
    raise ValueError(f"score must have shape {(*jnp.shape(log_density), 'd')}, got {jnp.shape(score)}.")
  check_hyperparameter("smoothness", smoothness, low=0, shape=jnp.shape(log_density))
  check_hyperparameter("baseline", baseline, shape=jnp.shape(log_density))
  constants = jax.lax.stop_gradient((squared_residuals - baseline, old_log_density))
  log_density, score, gain, old = (_wide(array) for array in (log_density, score, *constants))
  new, old = jnp.clip(log_density, LOG_LOW, LOG_HIGH), jnp.clip(old, LOG_LOW, LOG_HIGH)
  ratio = jnp.exp(new - old)
  losses = ratio * (smoothness * jnp.exp(new) * jnp.sum(score**2, axis=-1) - gain)
  return losses.astype(squared_residuals.dtype)


def das_cross_entropy_loss(
  log_density: ArrayLike, squared_residuals: ArrayLike, old_log_density: ArrayLike
) -> jax.Array:
  """`-(r^2 / p') log p` at points drawn from p': of deep adaptive sampling, which fits p to the squared residuals.

  >>> das_cross_entropy_loss(jnp.array([-1.0]), jnp.array([2.0]), jnp.array([0.0])).tolist()
  [2.0]

  Args:
    log_density: `log p`, floating `[n]`.
    squared_residuals: non-negative, floating `[n]`; taken as constant.
    old_log_density: `log p'` of the density that the points were drawn from, floating `[n]`; taken as constant.

  Returns:
    `[n]`.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Tang, Wan, Yang, "DAS-PINNs: A Deep Adaptive Sampling Method for Solving High-Dimensional Partial
    Differential Equations", JCP 2023, the cross-entropy of the sampler.
  """
  check_float("log_density", log_density)
  check_same_shape(
    log_density=log_density, squared_residuals=squared_residuals, old_log_density=old_log_density,
  )  # fmt: skip
  target, old = (_wide(array) for array in jax.lax.stop_gradient((squared_residuals, old_log_density)))
  new = jnp.clip(_wide(log_density), LOG_LOW, LOG_HIGH)
  return (-target * jnp.exp(-jnp.clip(old, LOG_LOW, LOG_HIGH)) * new).astype(squared_residuals.dtype)


def normalize_squared_residuals(
  squared_residuals: ArrayLike, old_log_density: ArrayLike, *, volume: ArrayLike
) -> jax.Array:
  """Squared residuals divided by an estimate of their mean over the domain, `mean(r^2 / p') / volume`.

  They span many orders of magnitude while training; with this the smoothness of the adversary has no unit.

  >>> normalize_squared_residuals(jnp.array([1.0, 3.0]), jnp.zeros(2), volume=1.0).tolist()
  [0.5, 1.5]

  Args:
    squared_residuals: non-negative, floating `[n]`.
    old_log_density: `log p'` of the density that the points were drawn from, floating `[n]`.
    volume: of the domain, positive; may be traced.

  Returns:
    `[n]`.

  Raises:
    ValueError: when shapes do not fit or `volume` is not positive.

  Reference: none.
  """
  check_float("squared_residuals", squared_residuals)
  check_same_shape(squared_residuals=squared_residuals, old_log_density=old_log_density)
  check_hyperparameter("volume", volume, low=0, open_low=True)
  wide = _wide(squared_residuals)
  mean = jnp.mean(wide * jnp.exp(-jnp.clip(_wide(old_log_density), LOG_LOW, LOG_HIGH)), axis=-1, keepdims=True) / volume
  tiny = jnp.finfo(wide.dtype).tiny
  return (wide / jnp.maximum(mean, tiny)).astype(squared_residuals.dtype)


def log_density_and_score(log_density: Callable, points: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """`log p` and `grad_x log p` at points, both differentiable in what `log_density` closes over.

  >>> log_density_and_score(lambda x: -jnp.sum(x**2, -1), jnp.array([[1.0, 2.0]]))[1].tolist()
  [[-2.0, -4.0]]

  Args:
    log_density: `[n, d] -> [n]`, whose values depend on their own point only.
    points: floating `[n, d]`; taken as constant.

  Returns:
    `[n]` and `[n, d]`.

  Raises:
    ValueError: when points are not floating point.

  Reference: none.
  """
  check_float("points", points)
  values, pull = jax.vjp(log_density, jax.lax.stop_gradient(points))
  return values, pull(jnp.ones_like(values))[0]


class OptimalAdversary(NamedTuple):
  """The maximiser of the adversary's objective, `[n]`, and the objective there."""

  density: jax.Array
  objective: jax.Array


def optimal_adversary_1d(
  points: ArrayLike, coefficients: ArrayLike, *, level: ArrayLike, smoothness: ArrayLike
) -> OptimalAdversary:
  """The best adversary on [0, 1] of the squared residual `level + sum_j a_j cos(j pi x)`, in closed form.

  The density is `1 + sum_j a_j / (2 beta (j pi)^2) cos(j pi x)` and the objective `level + sum_j a_j^2 / (8 beta (j
  pi)^2)`, where that density is positive.

  >>> adversary = optimal_adversary_1d(jnp.array([0.5]), jnp.array([1.0]), level=2.0, smoothness=1.0)
  >>> round(float(adversary.density[0]), 6), round(float(adversary.objective), 4)
  (1.0, 2.0127)

  Args:
    points: floating `[n]`.
    coefficients: `a_1, a_2, ...`, floating `[k]`.
    level: mean of the squared residual; may be traced.
    smoothness: beta, positive; may be traced.

  Returns:
    `density` and `objective`.

  Raises:
    ValueError: when an argument is not floating point or `smoothness` is not positive.

  Reference: Tang, Zhai, Wan, Yang, "Adversarial Adaptive Sampling: Unify PINN and Optimal Transport for the
    Approximation of PDEs", ICLR 2024, the optimality condition of the smoothed objective (derived).
  """
  check_float("points", points)
  check_float("coefficients", coefficients)
  check_hyperparameter("smoothness", smoothness, low=0, open_low=True)
  frequency = jnp.pi * jnp.arange(1, len(coefficients) + 1)
  amplitudes = coefficients / (2 * smoothness * frequency**2)
  density = 1 + jnp.cos(points[:, None] * frequency) @ amplitudes
  return OptimalAdversary(density, level + jnp.sum(coefficients * amplitudes) / 4)


def laplacian(function: Callable) -> Callable:
  """The Laplacian of a function of one point, forward over reverse.

  >>> float(laplacian(lambda x: jnp.sum(x**3))(jnp.array([1.0, 2.0])))
  18.0

  Args:
    function: `[d] -> scalar`, twice differentiable (a network of rectifiers is not).

  Returns:
    The function `[d] -> scalar`.

  Reference: none.
  """

  def of_point(point):
    slope = jax.grad(function)
    second = lambda direction: jnp.vdot(direction, jax.jvp(slope, (point,), (direction,))[1])
    return jnp.sum(jax.vmap(second)(jnp.eye(len(point), dtype=point.dtype)))

  return of_point


class Derivatives(NamedTuple):
  """Values of a function at points, `[n]`, its gradients, `[n, d]`, and its Laplacians, `[n]`."""

  value: jax.Array
  gradient: jax.Array
  laplacian: jax.Array


def tanh_network_derivatives(params: Mapping[str, Mapping[str, ArrayLike]], points: ArrayLike) -> Derivatives:
  """Value, gradient and Laplacian of a network of tanh layers, carried through the layers in one forward pass.

  With gradients of the parameters it is an order of magnitude faster on a CPU than nested automatic differentiation.

  >>> params = {"Dense_0": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([0.5])}}
  >>> [array.tolist() for array in tanh_network_derivatives(params, jnp.array([[1.0]]))]
  [[2.5], [[2.0]], [0.0]]

  Args:
    params: of `jaxreg.models.MLP` with the activation tanh and one output: `Dense_0`, `Dense_1`, ... with `kernel` and
      `bias`.
    points: floating `[n, d]`.

  Returns:
    `value`, `gradient` and `laplacian`.

  Raises:
    ValueError: when points do not fit the first layer, or the last layer has more than one output.

  Reference: Li, Ye, Jiang et al., "A Computational Framework for Neural Network-Based Variational Monte Carlo with
    Forward Laplacian", Nature Machine Intelligence 2024.
  """
  check_float("points", points)
  layers = [params[f"Dense_{index}"] for index in range(len(params))]
  inputs, outputs = layers[0]["kernel"].shape[0], layers[-1]["kernel"].shape[-1]
  if jnp.ndim(points) != 2 or jnp.shape(points)[1] != inputs:
    raise ValueError(f"points must have shape [n, {inputs}], got {jnp.shape(points)}.")
  if outputs != 1:
    raise ValueError(f"the last layer must have one output, got {outputs}.")
  # A list of directions and not an array of them: XLA multiplies plain matrices far faster than it contracts two axes.
  slopes = [jnp.broadcast_to(row, points.shape) for row in jnp.eye(inputs, dtype=points.dtype)]
  values, curvatures = points, jnp.zeros_like(points)
  for index, layer in enumerate(layers):
    kernel = layer["kernel"]
    values, curvatures = values @ kernel + layer["bias"], curvatures @ kernel
    slopes = [slope @ kernel for slope in slopes]
    if index < len(layers) - 1:
      values = jnp.tanh(values)
      first = 1 - values**2
      curvatures = first * (curvatures - 2 * values * sum(slope**2 for slope in slopes))
      slopes = [first * slope for slope in slopes]
  return Derivatives(values[:, 0], jnp.concatenate(slopes, -1), curvatures[:, 0])


def sample_in_box(key: jax.Array, sample: Callable, count: int, *, low: float, high: float) -> jax.Array:
  """Draws of a density that lie in a box; if a quarter more draws leave too few, the rest is projected onto its border.

  >>> sample = lambda key, count: jax.random.uniform(key, (count, 2), maxval=1.1)
  >>> bool(sample_in_box(jax.random.key(0), sample, 8, low=0.0, high=1.0).max() <= 1)
  True

  Args:
    key: threefry key.
    sample: `(key, count) -> [count, d]`.
    count: static.
    low: lower bound in every coordinate.
    high: upper bound.

  Returns:
    `[count, d]`, constant.

  Raises:
    ValueError: when `high` is not above `low`.

  Reference: Tang, Wan, Yang, "DAS-PINNs: A Deep Adaptive Sampling Method for Solving High-Dimensional Partial
    Differential Equations", JCP 2023; as in the authors' code.
  """
  check_hyperparameter("high", high, low=low, open_low=True)
  draws = jax.lax.stop_gradient(sample(key, count + -(-count // 4)))
  outside = jnp.any((draws < low) | (draws > high), axis=-1)
  return jnp.clip(draws[jnp.argsort(outside, stable=True)[:count]], low, high)


def _wide(array):
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))
