"""Kernels of fully connected networks of infinite width and growing depth on the sphere, and their limits.

Activations are normalized: the dual maps 1 to 1, and the kernels are functions of the correlation alone. Three numbers
decide what the classifier `sign(y^T K(X, X)^-1 K(X, x))` becomes with infinite depth: the dual's value and slope at 0
and its slope at 1. `deep_votes` has the classifiers themselves.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape
from jaxreg.kernels.dual_activations import (
  DualActivation,
  check_normalized_dual,
  correlation_complement,
  hermite_dual,
  normalize_dual,
  sine_dual,
)
from jaxreg.kernels.infinite_width import angle_complement, check_matrices, with_diagonal
from jaxreg.metrics.norms import normalized_rows
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "deep_nngp",
  "deep_ntk",
  "depth_taxonomy",
  "koenigs",
  "log_deep_kernels",
  "optimal_dual",
  "sine_sphere_dual",
  "singularity_exponent",
  "solve_sine_frequency",
  "sphere_complement",
  "sphere_gram",
]


def sphere_gram(inputs1: ArrayLike, inputs2: ArrayLike | None = None) -> jax.Array:
  """Inner products of the inputs scaled to unit norm, within [-1, 1].

  >>> import jax.numpy as jnp
  >>> sphere_gram(jnp.array([[3.0, 4.0], [0.0, 2.0]])).round(4)[0, 0].item()
  1.0

  Args:
    inputs1: floating `[inputs1, features]`; a row of zeros stays zero.
    inputs2: floating `[inputs2, features]`, or None for `inputs1` with itself, whose diagonal is exactly 1.

  Returns:
    `[inputs1, inputs2]`, float32 at least.

  Raises:
    ValueError: when the inputs are not matrices of the same number of features.

  Reference: Radhakrishnan, Belkin, Uhler, "Wide and Deep Neural Networks Achieve Optimality for Classification",
    PNAS 2023, inputs on the sphere.
  """
  check_matrices(inputs1, inputs2)
  dtype = jnp.promote_types(inputs1.dtype if inputs2 is None else jnp.result_type(inputs1, inputs2), jnp.float32)
  first = normalized_rows(inputs1.astype(dtype))
  second = first if inputs2 is None else normalized_rows(inputs2.astype(dtype))
  gram = jnp.clip(jnp.matmul(first, second.T, precision="highest"), -1, 1)
  return with_diagonal(gram, jnp.ones(len(first), dtype)) if inputs2 is None else gram


def sphere_complement(inputs1: ArrayLike, inputs2: ArrayLike | None = None) -> jax.Array:
  """`1 - |correlation|` of the inputs scaled to unit norm, with all its digits also for close inputs.

  In float32 the correlation of close inputs has lost it; tangent kernels depend on its root.

  >>> import jax.numpy as jnp
  >>> complement = sphere_complement(jnp.array([[1.0, 0.0], [1.0, 1e-5]]))
  >>> f"{complement[0, 1]:.2e}", complement[0, 0].item()
  ('5.00e-11', 0.0)

  Args:
    inputs1: floating `[inputs1, features]`; a row of zeros stays zero.
    inputs2: floating `[inputs2, features]`, or None for `inputs1` with itself, whose diagonal is exactly 0.

  Returns:
    `[inputs1, inputs2]`, float32 at least.

  Raises:
    ValueError: when the inputs are not matrices of the same number of features.

  Reference: none (half the squared distance of unit vectors).
  """
  check_matrices(inputs1, inputs2)
  dtype = jnp.promote_types(inputs1.dtype if inputs2 is None else jnp.result_type(inputs1, inputs2), jnp.float32)
  first = normalized_rows(inputs1.astype(dtype))
  if inputs2 is not None:
    return angle_complement(first, normalized_rows(inputs2.astype(dtype)))
  return with_diagonal(angle_complement(first, first), jnp.zeros(len(first), dtype))


def deep_nngp(
  correlation: ArrayLike, *, depth: int, dual: DualActivation, complement: ArrayLike | None = None
) -> jax.Array:
  """The NNGP kernel on the sphere, the dual iterated `depth` times: `S_0 = xi`, `S_l = dual(S_(l-1))`.

  >>> import jax.numpy as jnp
  >>> print(deep_nngp(jnp.array([0.5, 1.0]), depth=2, dual=optimal_dual(1)).round(3))
  [0.127 1.   ]

  Args:
    correlation: floating `[...]` in [-1, 1].
    depth: static; number of hidden layers. Beyond about 50 compute in float64, or use `log_deep_kernels`.
    dual: static; of a normalized activation.
    complement: floating `[...]`, `1 - |correlation|` where it is known with more digits (`sphere_complement`), or None.

  Returns:
    `[...]`, float32 at least; exactly 1 at correlation 1.

  Raises:
    ValueError: when an argument does not fit or `dual` is not of a normalized activation.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the NNGP recursion.
  """
  value, left, depth = _start(correlation, complement, depth, dual)
  return jax.lax.fori_loop(0, depth, lambda _, kernels: _layer(dual, *kernels)[:2], (value, left))[0]


def deep_ntk(
  correlation: ArrayLike, *, depth: int, dual: DualActivation, complement: ArrayLike | None = None
) -> jax.Array:
  """The neural tangent kernel on the sphere: `K_0 = xi`, `K_l = S_l + K_(l-1) dual'(S_(l-1))`.

  >>> import jax.numpy as jnp
  >>> float(deep_ntk(jnp.array(1.0), depth=2, dual=optimal_dual(2)))  # 1 + 2 + 4
  7.0

  Args:
    correlation: floating `[...]` in [-1, 1].
    depth: static; number of hidden layers. Beyond about 50 compute in float64, or use `log_deep_kernels`.
    dual: static; of a normalized activation.
    complement: floating `[...]`, `1 - |correlation|` where it is known with more digits (`sphere_complement`), or None.

  Returns:
    `[...]`, float32 at least; `sum_{i <= depth} dual'(1)^i` at correlation 1.

  Raises:
    ValueError: when an argument does not fit or `dual` is not of a normalized activation.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the NTK recursion.
  """
  value, left, depth = _start(correlation, complement, depth, dual)

  def step(_, kernels):
    *nngp, ntk = kernels
    after, left, slope = _layer(dual, *nngp)
    return after, left, after + ntk * slope

  return jax.lax.fori_loop(0, depth, step, (value, left, value))[2]


def _start(correlation, complement, depth, dual):
  """The correlation in float32 at least with its complement, 0 where it is 1 up to rounding, and the depth."""
  check_float("correlation", correlation)
  depth = static_integer("depth", depth, low=0)
  check_normalized_dual(dual)
  dtype = jnp.promote_types(jnp.result_type(correlation), jnp.float32)
  value = jnp.clip(jnp.asarray(correlation, dtype), -1, 1)
  if complement is not None:
    check_float("complement", complement)
    check_same_shape(correlation=correlation, complement=complement)
    left = jnp.clip(jnp.asarray(complement, dtype), 0, 1)
    return jnp.where((left == 0) & (value > 0), 1, value), left, depth
  left = correlation_complement(value, *jnp.ones((2, *value.shape), dtype))
  return jnp.where((left == 0) & (value > 0), 1, value), left, depth


def _layer(dual, value, left):
  """One layer's correlation, its complement, and the slope of the dual; 1 stays exactly 1."""
  one = jnp.ones((), value.dtype)
  if dual.moments is None:
    after, slope, complement = dual.covariance(value), dual.derivative(value), None
  else:
    after, slope, complement = dual.moments(value, one, one, left)
  if dual.complement is not None:
    near = value > 0.5
    after = jnp.where(near, 1 - dual.complement(jnp.where(near, left, 0.25)), after)
  equal = (left == 0) & (value > 0)
  after = jnp.where(equal, 1, jnp.clip(after, -1, 1))
  if complement is None:
    complement = correlation_complement(after, jnp.ones_like(after), jnp.ones_like(after))
    if dual.complement is not None:
      complement = jnp.where(near & (after >= 0), dual.complement(jnp.where(near, left, 0.25)), complement)
  return after, jnp.where(equal, 0, complement), slope


def log_deep_kernels(
  log_correlation: ArrayLike, *, depth: int, coefficients: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
  """Logarithms of the NNGP and the neural tangent kernel on the sphere, for a Hermite expansion, without underflow.

  With the powers' weights `p_k = coefficients_k^2`, scaled to sum to 1, the recursions are `log S' = log sum_k p_k S^k`
  and `log K' = log(S' + K sum_k k p_k S^(k-1))`.

  >>> import jax.numpy as jnp
  >>> nngp, ntk = log_deep_kernels(jnp.log(jnp.array(0.5)), depth=8, coefficients=[0.0, 0.0, 0.0, 1.0])
  >>> round(float(nngp / jnp.log(0.5)))  # 0.5^(3^8)
  6561

  Args:
    log_correlation: floating `[...]`, at most 0; logarithms of non-negative correlations.
    depth: static; number of hidden layers.
    coefficients: static; numbers, those of `hermite_activation`.

  Returns:
    (log NNGP, log NTK), `[...]`, float32 at least.

  Raises:
    ValueError: when an argument does not fit or all coefficients are zero.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the NNGP and NTK recursions.
  """
  check_float("log_correlation", log_correlation)
  depth = static_integer("depth", depth, low=0)
  squares = np.square(np.asarray(coefficients, np.float64))
  if squares.ndim != 1 or not np.isfinite(squares).all() or not squares.sum() > 0:
    raise ValueError(f"coefficients must be finite numbers, not all zero, got {coefficients!r}.")
  squares = squares / squares.sum()
  start = jnp.asarray(log_correlation, jnp.promote_types(jnp.result_type(log_correlation), jnp.float32))
  slopes = np.arange(len(squares)) * squares
  if not slopes.any():  # a constant activation
    return jnp.where(depth > 0, jnp.zeros_like(start), start), jnp.where(depth > 0, jnp.zeros_like(start), start)

  def step(_, logs):
    nngp, ntk = logs
    after = _log_series(nngp, squares)
    return after, jnp.logaddexp(after, ntk + _log_series(nngp, slopes[1:]))

  return jax.lax.fori_loop(0, depth, step, (start, start))


def _log_series(log_x, weights):
  """`log sum_k weights_k x^k`; near `x = 1` as the total's logarithm plus that of `1 - …`, without cancellation."""
  powers = [k for k, weight in enumerate(weights) if weight > 0]
  total = weights.sum()
  finite = jnp.maximum(log_x, jnp.finfo(log_x.dtype).min / (2 * len(weights)))
  far = jax.nn.logsumexp(jnp.stack([math.log(weights[k]) + k * finite for k in powers]), axis=0)
  near = jnp.maximum(log_x, -0.5)
  close = math.log(total) + jnp.log1p(sum(weights[k] / total * jnp.expm1(k * near) for k in powers))
  return jnp.where(log_x > -0.5, close, far)


def koenigs(correlation: ArrayLike, dual: DualActivation, *, iterations: int = 200) -> jax.Array:
  """The singular kernel `psi(xi) = lim_L dual^(L)(xi) / dual'(0)^L` of infinite depth, for `dual(0) = 0 < dual'(0)`.

  It solves `psi(dual(xi)) = dual'(0) psi(xi)` with `psi'(0) = 1`, and behaves like `(1 - xi)^(-a / 2)` near 1, `a`
  being the `singularity_exponent`. With `dual.complement` it keeps its relative accuracy up to there.

  >>> import jax.numpy as jnp
  >>> round(0.02 * float(koenigs(jnp.array(0.99), optimal_dual(2))), 3)
  1.201

  Args:
    correlation: floating `[...]` in (-1, 1]; infinite at 1.
    dual: static; of a normalized activation with zero mean and a linear part.
    iterations: static; number of iterations.

  Returns:
    `[...]`, float32 at least.

  Raises:
    ValueError: when `iterations` does not fit or `dual` is not of such an activation.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the singular-kernel limit; Koenigs, "Recherches sur les intégrales
    de certaines équations fonctionnelles", 1884.
  """
  value, left, iterations = _start(correlation, None, iterations, dual)
  check_normalized_dual(dual, zero_mean=True)
  one = (left == 0) & (value > 0)
  value = jnp.where(one, 0.5, value)  # where it is infinite, the gradient is 0 and not NaN
  slope = dual.derivative(jnp.zeros((), value.dtype))
  tiny = jnp.finfo(value.dtype).tiny ** 0.4  # whose square, in the ratio's gradient, does not vanish
  complement = dual.complement or (lambda t: 1 - dual.covariance(1 - t))

  def step(_, carry):
    s, t, psi = carry
    near = t < 0.5
    left = complement(jnp.where(near, t, 0.25))
    after = jnp.where(near, 1 - left, dual.covariance(s))
    usable = jnp.abs(s) > tiny
    ratio = jnp.where(usable, after / (slope * jnp.where(usable, s, 1)), 1)  # 1 is its limit at 0
    return after, jnp.where(near, left, 1 - after), psi * ratio

  psi = jax.lax.fori_loop(0, iterations, step, (value, 1 - value, value))[2]
  return jnp.where(one, jnp.inf, psi)


def singularity_exponent(dual: DualActivation) -> jax.Array:
  """The exponent `a = -2 log dual'(0) / log dual'(1)` with which the limiting kernel grows, `|x - x'|^-a`.

  The vote of that kernel is consistent for every distribution on a sphere of dimension `a`.

  >>> round(float(singularity_exponent(optimal_dual(4))), 4)
  4.0

  Args:
    dual: of a normalized activation with zero mean.

  Returns:
    Scalar, float32 or, where enabled, float64.

  Raises:
    ValueError: when `dual` is not of a normalized activation with zero mean and a linear part.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the order of the singularity; Devroye, Gyorfi, Krzyzak, "The
    Hilbert Kernel Regression Estimate", Journal of Multivariate Analysis 1998.
  """
  check_normalized_dual(dual, zero_mean=True)
  one = jnp.ones((), jnp.result_type(float))
  return -2 * jnp.log(dual.derivative(0 * one)) / jnp.log(dual.derivative(one))


def depth_taxonomy(dual: DualActivation, *, tolerance: float = 1e-5) -> str:
  """What the classifier of a normalized activation becomes with infinite depth.

  With `A^2 = dual(0)`, `A'^2 = dual'(0)`, `B' = dual'(1)`: `"1nn"` for A = A' = 0, `"singular"` for A = 0, A' != 0,
  `"majority"` for A != 0, B' >= 1, else `"degenerate"` (the kernel becomes constant); so is a linear activation.

  >>> from jaxreg.kernels.dual_activations import hermite_dual, relu_dual
  >>> depth_taxonomy(normalize_dual(relu_dual())), depth_taxonomy(hermite_dual([0, 0, 0, 1]))
  ('majority', '1nn')

  Args:
    dual: static; of a normalized activation with fixed hyperparameters.
    tolerance: static; what counts as zero.

  Returns:
    The rule's name.

  Raises:
    ValueError: when the activation is not normalized.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the taxonomy of infinitely wide and deep networks.
  """
  check_normalized_dual(dual)
  with jax.ensure_compile_time_eval():
    mean, linear, slope = map(float, (dual.covariance(0.0), dual.derivative(0.0), dual.derivative(1.0)))
  if mean <= tolerance:
    if slope <= 1 + tolerance:
      return "degenerate"
    return "1nn" if linear <= tolerance else "singular"
  return "majority" if slope >= 1 - tolerance else "degenerate"


def optimal_dual(dimension: int) -> DualActivation:
  """An activation, with its dual, whose infinitely deep classifier is consistent on the sphere of some dimension.

  For dimension 1 it is `(h_1 + h_7) / sqrt 2` in orthonormal Hermite polynomials, else
  `2^(-d/4) (h_1 + h_3) + sqrt(1 - 2^(1 - d/2)) h_2`; the singularity exponent is d.

  >>> optimal_dual(2).covariance(0.5).tolist()  # (xi + xi^3) / 2
  0.3125

  Args:
    dimension: static; positive, that of the sphere: the number of features less one.

  Returns:
    The dual activation; its `activation` is the function for a network.

  Raises:
    ValueError: when `dimension` is not a positive integer.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, activations that achieve optimality.
  """
  dimension = static_integer("dimension", dimension, low=1)
  return hermite_dual(optimal_coefficients(dimension))


def optimal_coefficients(dimension: int) -> list[float]:
  """The Hermite coefficients of the activation of `optimal_dual`."""
  if dimension == 1:
    return [0.0, math.sqrt(0.5), 0.0, 0.0, 0.0, 0.0, 0.0, math.sqrt(0.5)]
  edge = 2 ** (-dimension / 4)
  return [0.0, edge, math.sqrt(1 - 2 ** (1 - dimension / 2)), edge]


def sine_sphere_dual(q: ArrayLike) -> DualActivation:
  """The normalized sine `sin(sqrt(q) z) / sqrt(exp(-q) sinh q)` with the dual `sinh(q xi) / sinh q`.

  >>> round(float(singularity_exponent(sine_sphere_dual(2.676))), 3)
  2.0

  Args:
    q: positive scalar; may be traced.

  Returns:
    The dual activation.

  Raises:
    ValueError: when `q` is not positive.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the sine activation of the experiments.
  """
  check_hyperparameter("q", q, low=0, open_low=True, shape=())
  dual = normalize_dual(sine_dual(frequency=q**0.5))

  def complement(t):
    q_ = jnp.asarray(q, jnp.result_type(t))
    # 2 cosh(q - q t / 2) sinh(q t / 2) / sinh q, each over its exponential
    return -(1 + jnp.exp(-q_ * (2 - t))) * jnp.expm1(-q_ * t) / -jnp.expm1(-2 * q_)

  return DualActivation(dual.activation, dual.covariance, dual.derivative, complement)


def solve_sine_frequency(exponent: float) -> float:
  """The `q` at which `sine_sphere_dual` has a given singularity exponent.

  >>> round(solve_sine_frequency(4.0), 4)
  6.1354

  Args:
    exponent: static; greater than 1, the exponent at `q = 0`.

  Returns:
    `q`.

  Raises:
    ValueError: when `exponent` is not greater than 1.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the sine activation of the experiments.
  """
  check_hyperparameter("exponent", exponent, low=1, open_low=True)
  low, high = 1e-3, 1.0
  while _sine_exponent(high) < exponent:
    high *= 2
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if _sine_exponent(middle) < exponent else (low, middle)
  return (low + high) / 2


def _sine_exponent(q):
  log_sinh = q + math.log1p(-math.exp(-2 * q)) - math.log(2)
  return -2 * (math.log(q) - log_sinh) / (math.log(q) - math.log(math.tanh(q)))
