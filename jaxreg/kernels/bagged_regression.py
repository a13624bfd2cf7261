"""Linear regression from bag means: the interpolating estimator, its risk in high dimension, and the best bag size."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.kernels.spectral import apply_function

__all__ = [
  "aggregate_fixed_point",
  "aggregate_risk",
  "effective_noise",
  "interpolated_ridge",
  "optimal_bag_size",
  "optimal_instance_bag_size",
  "optimal_rho",
]


def interpolated_ridge(
  features: ArrayLike, bag_means: ArrayLike, *, rho: ArrayLike, ridge: ArrayLike = 0.0
) -> jax.Array:
  """The linear predictor that minimises the mean `interpolated_bag_squared_loss` plus `ridge |theta|^2`.

  Of several minimisers (at `rho = 0` with fewer bags than dimensions) it is the one of least norm.

  >>> import jax, jax.numpy as jnp
  >>> features = jax.random.normal(jax.random.key(0), (20, 3, 2))
  >>> theta = interpolated_ridge(features, features.mean(1) @ jnp.array([1.0, -2.0]), rho=0.0)
  >>> print(theta.round(3))
  [ 1. -2.]

  Args:
    features: floating `[bags, bag_size, dimensions]`.
    bag_means: floating `[bags]`, mean responses.
    rho: non-negative weight of the within-bag spread; may be traced.
    ridge: non-negative; may be traced.

  Returns:
    `[dimensions]`.

  Raises:
    ValueError: when shapes do not fit or a weight is negative.

  Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate Responses: Instance Level versus Bag
    Level Loss Functions", ICLR 2024, the interpolating estimator.
  """
  check_float("features", features)
  check_hyperparameter("rho", rho, low=0)
  check_hyperparameter("ridge", ridge, low=0)
  if jnp.ndim(features) != 3 or jnp.shape(bag_means) != jnp.shape(features)[:1]:
    raise ValueError(
      "features must be [bags, bag_size, dimensions] and bag_means [bags],"
      f" got shapes {jnp.shape(features)} and {jnp.shape(bag_means)}."
    )
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  return _solution(*(jnp.asarray(x, dtype) for x in (features, bag_means, rho, ridge)))


@jax.custom_jvp
def _solution(features, bag_means, rho, ridge):
  bags, size, dimensions = features.shape
  means = features.mean(1)
  rows = jnp.concatenate(
    [
      means / jnp.sqrt(bags),
      (features - means[:, None]).reshape(-1, dimensions) * jnp.sqrt(rho / (bags * size)),
      jnp.sqrt(ridge) * jnp.eye(dimensions, dtype=features.dtype),
    ]
  )
  right = jnp.zeros(rows.shape[0], features.dtype).at[:bags].set(bag_means / jnp.sqrt(bags))
  return _least_squares(rows, right)


@_solution.defjvp
def _solution_jvp(primals, tangents):
  # Roots of the weights have no derivative at 0; the normal equations are linear in the weights.
  return _solution(*primals), jax.jvp(_by_normal_equations, primals, tangents)[1]


def _by_normal_equations(features, bag_means, rho, ridge):
  """The same solution, less exact, with derivatives of all orders, those of the least-norm one among them."""
  bags, size, dimensions = features.shape
  means = features.mean(1)
  inner = (features - means[:, None]).reshape(-1, dimensions)
  normal = means.T @ means / bags + rho * (inner.T @ inner) / (bags * size)
  normal = normal + ridge * jnp.eye(dimensions, dtype=features.dtype)
  values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(normal))
  noise = dimensions * jnp.finfo(values.dtype).eps * values[-1]
  values = jnp.where(values <= noise, 0, values)
  return apply_function(_inverse, normal, values, vectors, means.T @ bag_means / bags)


def _inverse(values):
  zero = values == 0
  return jnp.where(zero, 0, 1 / jnp.where(zero, 1, values))


def _least_squares(rows, right):
  """The least-norm solution: by normal equations, which square the condition number, where that does no harm."""
  factor = jnp.linalg.cholesky(rows.T @ rows)
  diagonal = jnp.diagonal(factor)
  good = jnp.square(jnp.min(diagonal) / jnp.max(diagonal)) > 1e-3  # False when the factor is not a number

  def normal(factor):
    solve = lambda residual: jax.scipy.linalg.cho_solve((factor, True), rows.T @ residual)
    first = solve(right)
    return first + solve(right - rows @ first)  # one refinement

  safe = jnp.where(good, factor, jnp.eye(rows.shape[1], dtype=rows.dtype))
  return jax.lax.cond(good, lambda: normal(safe), lambda: jnp.linalg.lstsq(rows, right)[0])


def aggregate_fixed_point(aspect: ArrayLike, bag_size: ArrayLike, rho: ArrayLike) -> jax.Array:
  """The positive G with `delta = G / (1 + G) + (k - 1) rho G / (1 + rho G)`, `delta = k aspect`, of the risk's limit.

  It is infinite at `rho = 0` with `delta >= 1`.

  >>> round(float(aggregate_fixed_point(0.5, 1, 0.3)), 4)  # psi / (1 - psi) for single examples
  1.0

  Args:
    aspect: the paper's psi in (0, 1), dimensions per example.
    bag_size: k, at least 1, may be fractional.
    rho: non-negative.

  Returns:
    G, of the broadcast shape.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Javanmard et al., ICLR 2024, asymptotic risk of the interpolating estimator (derived anew for Gaussian
    features; the paper's parametrisation may differ).
  """
  check_hyperparameter("aspect", aspect, low=0, high=1, open_low=True, open_high=True)
  check_hyperparameter("bag_size", bag_size, low=1)
  check_hyperparameter("rho", rho, low=0)
  aspect, size, rho = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.result_type(float)) for x in (aspect, bag_size, rho)))
  delta = size * aspect
  square, linear = rho * (size - delta), 1 + (size - 1) * rho - delta * (1 + rho)
  root = jnp.sqrt(linear**2 + 4 * square * delta)
  # Of the two forms of the root the one that adds what has the same sign.
  positive = linear > 0
  small = 2 * delta / jnp.where(positive, linear + root, 1)
  large = (root - linear) / jnp.where(square == 0, 1, 2 * square)
  return jnp.where(positive, small, jnp.where(square == 0, jnp.where(jnp.isnan(root), jnp.nan, jnp.inf), large))


def aggregate_risk(
  aspect: ArrayLike,
  bag_size: ArrayLike,
  rho: ArrayLike,
  *,
  noise: ArrayLike = 1.0,
  signal: ArrayLike = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """Squared bias and variance of `interpolated_ridge` as examples and dimensions grow in proportion.

  For isotropic Gaussian features their sum is the limit of `E |theta - truth|^2`. `rho = 0` is the least-norm bag-level
  estimator, which for more dimensions than bags differs from the limit of small `rho`.

  >>> bias, variance = aggregate_risk(0.1, 4, 1.0)
  >>> round(float(bias), 4), round(float(variance), 4)
  (0.5833, 0.0278)

  Args:
    aspect: the paper's psi in (0, 1), dimensions per example.
    bag_size: k, at least 1, may be fractional.
    rho: non-negative.
    noise: variance of the responses' noise.
    signal: squared norm of the true coefficients.

  Returns:
    (squared bias, variance), of the broadcast shape.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Javanmard et al., ICLR 2024, asymptotic risk; see `aggregate_fixed_point`.
  """
  check_hyperparameter("noise", noise, low=0)
  check_hyperparameter("signal", signal, low=0)
  fixed = aggregate_fixed_point(aspect, bag_size, rho)
  aspect, size, rho = jnp.broadcast_arrays(*(jnp.asarray(x, fixed.dtype) for x in (aspect, bag_size, rho)))
  delta = size * aspect
  least_norm = jnp.isinf(fixed)
  g = jnp.where(least_norm, 1, fixed)
  bag, spread = 1 / (1 + g), 1 / (1 + rho * g)
  slope = bag**2 + (size - 1) * rho * spread**2
  variance = g * bag**2 / slope
  # (1 - rho g^2) / ((1 + g)^2 (1 + rho g)^2), without g^2, which may overflow.
  part = (bag**2 - rho * (g * bag) ** 2) * spread**2
  bias = (size - 1) * rho * g * (spread - part / slope) / delta
  above = jnp.where(least_norm & (delta > 1), delta, 2)
  bias = jnp.where(least_norm, 1 - 1 / above, bias)
  variance = jnp.where(least_norm, jnp.where(delta > 1, 1 / (above - 1), jnp.inf), variance)
  return signal * bias, noise * variance


def effective_noise(noise: ArrayLike, *, clip: ArrayLike, epsilon: ArrayLike, bag_size: ArrayLike) -> jax.Array:
  """The variance of single responses that acts like the Laplace noise on bag means: `noise + 8 clip^2 / (k epsilon^2)`.

  Clipping itself is taken to change nothing.

  >>> float(effective_noise(1.0, clip=2.0, epsilon=1.0, bag_size=4))
  9.0

  Args:
    noise: variance of the responses' noise.
    clip: bound of a response.
    epsilon: privacy parameter.
    bag_size: examples per bag.

  Returns:
    The variance.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Javanmard et al., ICLR 2024, the label-private mechanism.
  """
  check_hyperparameter("noise", noise, low=0)
  check_hyperparameter("clip", clip, low=0)
  check_hyperparameter("epsilon", epsilon, low=0, open_low=True)
  check_hyperparameter("bag_size", bag_size, low=1)
  return noise + 8 * jnp.square(jnp.asarray(clip, jnp.result_type(float)) / epsilon) / bag_size


def optimal_rho(
  aspect: ArrayLike,
  bag_size: ArrayLike,
  *,
  noise: ArrayLike = 1.0,
  signal: ArrayLike = 1.0,
  low: float = 1e-6,
  high: float = 1e3,
) -> jax.Array:
  """The weight in [low, high] with the least asymptotic risk, by bisection of the slope in its logarithm.

  >>> round(float(optimal_rho(0.1, 4)), 3)
  0.134

  Args:
    aspect: the paper's psi in (0, 1), dimensions per example; a scalar (use `vmap` for more).
    bag_size: k, at least 1.
    noise: variance of the responses' noise.
    signal: squared norm of the true coefficients.
    low: static; smallest weight.
    high: static; largest weight.

  Returns:
    Scalar.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Javanmard et al., ICLR 2024, tuning of the interpolating estimator.
  """
  check_hyperparameter("low", low, low=0, open_low=True)
  check_hyperparameter("high", high, low=low, open_low=True)
  risk = lambda log_rho: sum(aggregate_risk(aspect, bag_size, jnp.exp(log_rho), noise=noise, signal=signal))
  slope = jax.grad(lambda log_rho: jnp.sum(risk(log_rho)))

  def halve(_, ends):
    left, right = ends
    middle = (left + right) / 2
    rising = slope(middle) > 0
    return jnp.where(rising, left, middle), jnp.where(rising, middle, right)

  ends = tuple(jnp.log(jnp.asarray(end, jnp.result_type(float))) for end in (low, high))
  return jnp.exp(sum(jax.lax.fori_loop(0, 60, halve, ends)) / 2)


def optimal_bag_size(
  aspect: ArrayLike,
  *,
  rho: ArrayLike,
  clip: ArrayLike,
  epsilon: ArrayLike,
  largest: int,
  noise: ArrayLike = 1.0,
  signal: ArrayLike = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """The bag size in 1 … `largest` with the least risk under label privacy, at a fixed number of examples.

  >>> size, risk = optimal_bag_size(0.3, rho=1.0, clip=2.0, epsilon=1.0, largest=50)
  >>> int(size), round(float(risk), 3)
  (25, 0.977)

  Args:
    aspect: the paper's psi in (0, 1), dimensions per example; a scalar (use `vmap` for more).
    rho: weight of the spread, the same for all sizes.
    clip: bound of a response.
    epsilon: privacy parameter of the Laplace mechanism.
    largest: static; largest bag size.
    noise: variance of the responses' noise.
    signal: squared norm of the true coefficients.

  Returns:
    (bag size, risk), scalars.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Javanmard et al., ICLR 2024, the optimal bag size.
  """
  if largest < 1:
    raise ValueError(f"largest must be positive, got {largest}.")
  sizes = jnp.arange(1, largest + 1)
  total = functools.partial(effective_noise, noise, clip=clip, epsilon=epsilon)(bag_size=sizes)
  risks = sum(aggregate_risk(aspect, sizes, rho, noise=total, signal=signal))
  best = jnp.argmin(risks)
  return sizes[best], risks[best]


def optimal_instance_bag_size(
  aspect: ArrayLike,
  *,
  clip: ArrayLike,
  epsilon: ArrayLike,
  noise: ArrayLike = 1.0,
  signal: ArrayLike = 1.0,
) -> jax.Array:
  """The bag size at which the instance-level risk under label privacy is stationary, a real number not clipped to 1.

  With `a = psi / (1 - psi)` it is `2 (signal (1 - a) + 8 a clip^2 / epsilon^2) / (2 signal - a (signal + noise))`, the
  best size where numerator and denominator are positive.

  >>> float(optimal_instance_bag_size(0.3, clip=2.0, epsilon=1.0).round(2))
  25.0

  Args:
    aspect: the paper's psi in (0, 1), dimensions per example.
    clip: bound of a response.
    epsilon: privacy parameter of the Laplace mechanism.
    noise: variance of the responses' noise.
    signal: squared norm of the true coefficients.

  Returns:
    The size.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Javanmard et al., ICLR 2024, the optimal bag size.
  """
  check_hyperparameter("aspect", aspect, low=0, high=1, open_low=True, open_high=True)
  check_hyperparameter("clip", clip, low=0)
  check_hyperparameter("epsilon", epsilon, low=0, open_low=True)
  check_hyperparameter("noise", noise, low=0)
  check_hyperparameter("signal", signal, low=0)
  ratio = jnp.asarray(aspect, jnp.result_type(float)) / (1 - aspect)
  privacy = 8 * jnp.square(jnp.asarray(clip, ratio.dtype) / epsilon)
  return 2 * (signal * (1 - ratio) + ratio * privacy) / (2 * signal - ratio * (signal + noise))
