"""Dual activations: the covariance of an activation's outputs, and of its slopes, for jointly Gaussian inputs.

For `(U, V)` Gaussian with zero mean, variances `variance1`, `variance2` and covariance `covariance`, a
`DualActivation` holds `E[phi(U) phi(V)]` and `E[phi'(U) phi'(V)]` as functions of the three. At unit variances they are
functions of the correlation alone, the second being the derivative of the first.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, dtype_of
from jaxreg.metrics.norms import safe_sqrt
from jaxreg.metrics.polynomials import horner
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "DualActivation",
  "abs_dual",
  "cosine_dual",
  "erf_dual",
  "exponential_dual",
  "gaussian_dual",
  "gelu_dual",
  "hermite_activation",
  "hermite_dual",
  "leaky_relu_dual",
  "monomial_dual",
  "normalize_dual",
  "numerical_dual",
  "relu_dual",
  "sign_dual",
  "sine_dual",
  "step_dual",
]


@dataclasses.dataclass(frozen=True, eq=False)
class DualActivation:
  """An activation with its Gaussian moments in closed form.

  The functions broadcast their arguments and compute in float32 at least. With the default unit variances they are the
  dual activation and its derivative, as functions of the correlation.

  Attributes:
    activation: `x -> phi(x)`, elementwise.
    covariance: `(covariance, variance1=1.0, variance2=1.0) -> E[phi(U) phi(V)]`.
    derivative: `(covariance, variance1=1.0, variance2=1.0) -> E[phi'(U) phi'(V)]`.
    complement: `t -> 1 - E[phi(U) phi(V)]` at unit variances and correlation `1 - t`, exact for small `t`; or None.
    moments: `(covariance, variance1, variance2, complement) -> (E[phi(U) phi(V)], E[phi'(U) phi'(V)], complement)`, as
      `covariance` and `derivative`, from `1 - |correlation|` besides, of which covariance and variances keep few digits
      where it is small; gives the same of the outputs, or None where it has no better form than its definition. None
      when only the functions above are known.
  """

  activation: Callable
  covariance: Callable
  derivative: Callable
  complement: Callable | None = None
  moments: Callable | None = None


def _dual(activation, covariance, derivative, complement=None, after=None) -> DualActivation:
  """From formulas of covariance, variances and `1 - |correlation|`; `after` is the outputs' `1 - |correlation|`."""

  def moments(c, a, b, u):
    c, a, b, u = _wide(c, a, b, u)
    return covariance(c, a, b, u), derivative(c, a, b, u), None if after is None else after(c, u)

  return DualActivation(activation, _moment(covariance), _moment(derivative), complement, moments)


def _moment(formula):
  """Lets a formula of float32 or float64 arrays take anything, unit variances by default."""

  def moment(covariance, variance1=1.0, variance2=1.0):
    c, a, b = _wide(covariance, variance1, variance2)
    return formula(c, a, b, correlation_complement(c, a, b))

  return moment


def _wide(*values):
  dtype = jnp.promote_types(jnp.result_type(*values), jnp.float32)
  return tuple(jnp.asarray(value, dtype) for value in values)


def correlation_complement(covariance, variance1, variance2):
  """`1 - |correlation|`, 1 beside a variance of zero; what rounding cannot tell from 0 is exactly that."""
  scale = safe_sqrt(variance1) * safe_sqrt(variance2)
  zero = scale == 0
  u = 1 - jnp.where(zero, 0, jnp.where(covariance < 0, -covariance, covariance) / jnp.where(zero, 1, scale))
  # The gradient passes: the moments have one at +-1.
  return u - jax.lax.stop_gradient(jnp.where(u <= 4 * jnp.finfo(u.dtype).eps, u, 0))


# In float32 `arccos(1 - u) / sqrt(2 u)` and `(sin - angle cos) / (u sqrt(2 u))` of that angle as polynomials on [0, 1],
# fitted at Chebyshev nodes with relative errors below 1e-8; a polynomial is many times faster than arctan2 on a CPU.
_ANGLE = (
  1.0,
  0.0833333275,
  0.0187507163,
  0.00556594029,
  0.00200804304,
  0.00030094033,
  0.0010342819,
  -0.000650398908,
  0.000377876272,
)
_INTEGRAL = (
  0.666666667,
  0.0333333368,
  0.00535681837,
  0.00124504183,
  0.000317247206,
  0.00018075095,
  -5.68552551e-05,
  6.37702149e-05,
)
# The same as power series for float64, `sum_k binomial(2 k, k) / ((2 k + 1) 8^k) u^k` and its integral.
_SERIES = tuple(math.comb(2 * k, k) / ((2 * k + 1) * 8.0**k) / (k + 1.5) for k in range(16))


@jax.custom_jvp
def _angle(u):
  """`arccos(1 - u)` for `0 <= u <= 1`: the angle of two variables to the nearer of equal and opposite."""
  root = jnp.sqrt(jnp.maximum(2 * u, 0))
  if u.dtype == jnp.float32:
    return root * horner(u, _ANGLE)
  return 2 * jnp.arcsin(root / 2)


@_angle.defjvp
def _angle_jvp(primals, tangents):
  (u,), (tangent,) = primals, tangents
  square = u * (2 - u)
  inside = square > 0
  # The slope is infinite at 0; zero there is what keeps gradients of kernels at equal inputs finite.
  return _angle(u), tangent * jnp.where(inside, jax.lax.rsqrt(jnp.where(inside, square, 1)), 0)


@jax.custom_jvp
def _angle_integral(u):
  """The integral of `_angle`, `sin(angle) - angle cos(angle)`, with all its digits where it is small."""
  root = jnp.sqrt(jnp.maximum(2 * u, 0))
  if u.dtype == jnp.float32:
    return root * u * horner(u, _INTEGRAL)
  small = u < 0.1
  far = jnp.where(small, 0.5, u)
  direct = jnp.sqrt(far * (2 - far)) - 2 * jnp.arcsin(jnp.sqrt(far / 2)) * (1 - far)
  return jnp.where(small, root * u * horner(jnp.where(small, u, 0), _SERIES), direct)


@_angle_integral.defjvp
def _angle_integral_jvp(primals, tangents):
  return _angle_integral(*primals), _angle(*primals) * tangents[0]


def _piecewise_linear(activation, negative, positive):
  """The dual of `negative * min(x, 0) + positive * max(x, 0)`, as sums of what is small where they are.

  With the angle to the nearer of equal and opposite, `1 - u` its cosine and `q = sin - angle cos`, the moment of equal
  inputs is `same = (negative^2 + positive^2) / 2` times the variance, of opposite ones `-negative * positive` times it.
  """

  def parts(dtype):
    low, high = jnp.asarray(negative, dtype), jnp.asarray(positive, dtype)
    return (jnp.square(low) + jnp.square(high)) / 2, low * high, jnp.square(high - low) / (2 * math.pi)

  def covariance(c, a, b, u):
    same, product, bent = parts(c.dtype)
    scale = safe_sqrt(a) * safe_sqrt(b)
    return c * jnp.where(c < 0, product, same) + bent * scale * _angle_integral(u)

  def derivative(c, a, b, u):
    same, product, bent = parts(c.dtype)
    bend = bent * _angle(u)
    return jnp.where(c < 0, product + bend, same - bend) + _zero(c, a, b)

  def after(c, u):
    same, product, bent = parts(c.dtype)
    bend = bent * _angle_integral(u)
    opposite = bend - product * (1 - u)  # the moment over the variance where the correlation is negative
    away, half = math.pi * bent, math.pi * bent + 2 * product  # (positive -+ negative)^2 / 2
    near = jnp.where(opposite < 0, away + product * u + bend, half - product * u - bend)
    left = jnp.where(c < 0, near, same * u - bend)
    constant = same == 0
    return jnp.where(constant, 1, left / jnp.where(constant, 1, same))

  return _dual(activation, covariance, derivative, after=after)


def relu_dual() -> DualActivation:
  """The dual of `max(x, 0)`: the arc-cosine kernels of degree 1 and 0.

  At unit variances `(sqrt(1 - rho^2) + rho (pi - arccos rho)) / (2 pi)` and `(pi - arccos rho) / (2 pi)`.

  >>> dual = relu_dual()
  >>> [round(float(dual.covariance(rho)), 4) for rho in (-1.0, 0.0, 1.0)]
  [0.0, 0.1592, 0.5]

  Returns:
    The dual activation.

  Reference: Cho, Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, Section 2.
  """
  return _piecewise_linear(jax.nn.relu, 0.0, 1.0)


def leaky_relu_dual(*, negative_slope: ArrayLike = 0.01) -> DualActivation:
  """The dual of `max(x, 0) + negative_slope min(x, 0)`.

  >>> round(float(leaky_relu_dual(negative_slope=0.5).covariance(1.0)), 4)
  0.625

  Args:
    negative_slope: scalar; may be traced.

  Returns:
    The dual activation.

  Raises:
    ValueError: when `negative_slope` is not a number.

  Reference: Cho, Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, Section 2 (by linearity).
  """
  check_hyperparameter("negative_slope", negative_slope)
  return _piecewise_linear(lambda x: jnp.where(x > 0, x, negative_slope * x), negative_slope, 1.0)


def abs_dual() -> DualActivation:
  """The dual of `|x|`, at unit variances `2 (sqrt(1 - rho^2) + rho arcsin rho) / pi`.

  >>> round(float(abs_dual().covariance(0.0)), 4)
  0.6366

  Returns:
    The dual activation.

  Reference: Cho, Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, Section 2 (by linearity).
  """
  return _piecewise_linear(jnp.abs, -1.0, 1.0)


def sign_dual() -> DualActivation:
  """The dual of the sign, `2 arcsin(rho) / pi`; the slope counts as zero, as in automatic differentiation.

  >>> round(float(sign_dual().covariance(0.5)), 4)
  0.3333

  Returns:
    The dual activation.

  Reference: Cho, Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, Section 2, degree 0.
  """
  covariance = lambda c, a, b, u: jnp.where(c < 0, -1, 1) * (1 - 2 / math.pi * _angle(u))
  return _dual(jnp.sign, covariance, _zero, after=lambda c, u: 2 / math.pi * _angle(u))


def step_dual() -> DualActivation:
  """The dual of `1[x > 0]`, `1/4 + arcsin(rho) / (2 pi)`; the slope counts as zero.

  >>> [round(float(step_dual().covariance(rho)), 4) for rho in (-1.0, 0.0, 1.0)]
  [0.0, 0.25, 0.5]

  Returns:
    The dual activation.

  Reference: Cho, Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, Section 2, degree 0.
  """
  part = lambda u: _angle(u) / (2 * math.pi)
  covariance = lambda c, a, b, u: jnp.where(c < 0, part(u), 0.5 - part(u))
  after = lambda c, u: jnp.where(c < 0, 1 - 2 * part(u), 2 * part(u))
  return _dual(lambda x: (x > 0).astype(jnp.result_type(x)), covariance, _zero, after=after)


def _zero(covariance, variance1, variance2, complement=None):
  return jnp.zeros(jnp.broadcast_shapes(covariance.shape, variance1.shape, variance2.shape), covariance.dtype)


def erf_dual() -> DualActivation:
  """The dual of the error function: `2/pi arcsin(2 c / sqrt((1 + 2 a) (1 + 2 b)))` for variances a, b, covariance c.

  >>> round(float(erf_dual().covariance(1.0)), 4)
  0.4646

  Returns:
    The dual activation.

  Reference: Williams, "Computing with Infinite Networks", NeurIPS 1996, Section 3.1.
  """

  def covariance(c, a, b, u):
    # arcsin(x / sqrt(x^2 + D)) = arctan(x / sqrt D), which stays accurate at large variances.
    return 2 / math.pi * jnp.arctan2(2 * c, jnp.sqrt(_determinant(2 * a, 2 * b, u)))

  def derivative(c, a, b, u):
    return 4 / math.pi * jax.lax.rsqrt(_determinant(2 * a, 2 * b, u))

  return _dual(jax.lax.erf, covariance, derivative)


def _determinant(a, b, u):
  """`det(I + S)` for the covariance matrix S, a sum of what is not negative."""
  return 1 + a + b + a * b * (u * (2 - u))


def gelu_dual() -> DualActivation:
  """The dual of `x Phi(x)` with the normal distribution function Phi (not its tanh approximation).

  With variances a, b, covariance c, `D = (1 + a) (1 + b) - c^2`, `F = E[Phi(U) Phi(V)]` and `N = 1 / (2 pi sqrt D)` it
  is `c F + N (a b + c^2 (1 - a b) / ((1 + a) (1 + b)))`.

  >>> round(float(gelu_dual().covariance(1.0)), 4)
  0.4252

  Returns:
    The dual activation.

  Reference: Tsuchida, Pearce, van der Heide, Roosta, Gallagher, "Avoiding Kernel Fixed Points: Computing with ELU and
    GELU Infinite Networks", AAAI 2021 (derived anew by Gaussian integration by parts).
  """

  def pieces(c, a, b, u):
    determinant = _determinant(a, b, u)
    both = 0.25 + jnp.arctan2(c, jnp.sqrt(determinant)) / (2 * math.pi)
    return both, jax.lax.rsqrt(determinant) / (2 * math.pi), determinant

  def covariance(c, a, b, u):
    both, density, determinant = pieces(c, a, b, u)
    # Without the difference of large numbers in the formula above.
    return c * both + density * ((a / (1 + a)) * (b / (1 + b)) * determinant + (c / (1 + a)) * (c / (1 + b)))

  def derivative(c, a, b, u):
    both, density, determinant = pieces(c, a, b, u)
    return both + c * density * (1 / (1 + a) + 1 / (1 + b) + 1 / determinant)

  return _dual(lambda x: jax.nn.gelu(x, approximate=False), covariance, derivative)


def sine_dual(*, frequency: ArrayLike = 1.0, phase: ArrayLike = 0.0) -> DualActivation:
  """The dual of `sin(frequency x + phase)`, for frequency 1 `exp(-(a + b) / 2) (sinh c + sin(phase)^2 exp(-c))`.

  >>> round(float(sine_dual().covariance(1.0)), 4)
  0.4323

  Args:
    frequency: scalar; may be traced.
    phase: scalar, radians; may be traced.

  Returns:
    The dual activation.

  Raises:
    ValueError: when an argument is not a number.

  Reference: Rahimi, Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007, Section 3.
  """
  check_hyperparameter("frequency", frequency)
  check_hyperparameter("phase", phase)
  activation = lambda x: jnp.sin(frequency * x + phase)

  def with_phase(c, a, b, u, phase):
    sign = jnp.where(c < 0, -1, 1)  # of zero it is 1, so that the gradient there is right
    size = sign * c
    first, second = safe_sqrt(a), safe_sqrt(b)
    # exp(size - (a + b) / 2), whose exponent is a difference of large numbers
    near = jnp.exp(-jnp.where(u > 0.25, (a + b) / 2 - size, jnp.square(first - second) / 2 + first * second * u))
    odd = sign * near * -jnp.expm1(-2 * size) / 2
    even = near * jnp.where(c < 0, 1, jnp.exp(-2 * size))  # exp(-c - (a + b) / 2)
    return odd + jnp.square(jnp.sin(jnp.asarray(phase, c.dtype))) * even

  def covariance(c, a, b, u):
    square = jnp.square(jnp.asarray(frequency, c.dtype))
    return with_phase(square * c, square * a, square * b, u, phase)

  def derivative(c, a, b, u):
    square = jnp.square(jnp.asarray(frequency, c.dtype))
    return square * with_phase(square * c, square * a, square * b, u, phase + math.pi / 2)

  return _dual(activation, covariance, derivative)


def cosine_dual(*, frequency: ArrayLike = 1.0) -> DualActivation:
  """The dual of `cos(frequency x)`, for frequency 1 `exp(-(a + b) / 2) cosh(c)`.

  >>> round(float(cosine_dual().covariance(1.0)), 4)
  0.5677

  Args:
    frequency: scalar; may be traced.

  Returns:
    The dual activation.

  Raises:
    ValueError: when `frequency` is not a number.

  Reference: Rahimi, Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007, Section 3.
  """
  return sine_dual(frequency=frequency, phase=math.pi / 2)


def exponential_dual(*, rate: ArrayLike = 1.0) -> DualActivation:
  """The dual of `exp(rate x)`: `exp(rate^2 (a + b + 2 c) / 2)`.

  >>> round(float(exponential_dual().covariance(-1.0)), 4)
  1.0

  Args:
    rate: scalar; may be traced.

  Returns:
    The dual activation; infinite where the exponential leaves the dtype's range.

  Raises:
    ValueError: when `rate` is not a number.

  Reference: Daniely, Frostig, Singer, "Toward Deeper Understanding of Neural Networks", NeurIPS 2016, Table 1.
  """
  check_hyperparameter("rate", rate)
  covariance = lambda c, a, b, u: jnp.exp(jnp.square(jnp.asarray(rate, c.dtype)) * ((a + b) / 2 + c))
  derivative = lambda c, a, b, u: jnp.square(jnp.asarray(rate, c.dtype)) * covariance(c, a, b, u)
  return _dual(lambda x: jnp.exp(rate * x), covariance, derivative)


def gaussian_dual(*, rate: ArrayLike = 0.5) -> DualActivation:
  """The dual of `exp(-rate x^2)`: `1 / sqrt(D)` with `D = (1 + 2 rate a) (1 + 2 rate b) - 4 rate^2 c^2`.

  >>> round(float(gaussian_dual().covariance(1.0)), 4)
  0.5774

  Args:
    rate: non-negative scalar; may be traced.

  Returns:
    The dual activation.

  Raises:
    ValueError: when `rate` is negative.

  Reference: Williams, "Computing with Infinite Networks", NeurIPS 1996, Section 3.2 (at fixed centre).
  """
  check_hyperparameter("rate", rate, low=0)

  def determinant(a, b, u):
    twice = 2 * jnp.asarray(rate, a.dtype)
    return twice, _determinant(twice * a, twice * b, u)

  def derivative(c, a, b, u):
    twice, d = determinant(a, b, u)
    return twice * (twice * c / d) * jax.lax.rsqrt(d)

  return _dual(
    lambda x: jnp.exp(-rate * jnp.square(x)), lambda c, a, b, u: jax.lax.rsqrt(determinant(a, b, u)[1]), derivative
  )


def monomial_dual(*, degree: int) -> DualActivation:
  """The dual of `x^degree`: `sum_j (k!)^2 / (j! m!^2 4^m) c^j (a b)^m` over `j + 2 m = k = degree`.

  >>> round(float(monomial_dual(degree=2).covariance(1.0)), 4)  # the fourth moment
  3.0

  Args:
    degree: static; non-negative integer.

  Returns:
    The dual activation.

  Raises:
    ValueError: when `degree` is not a non-negative integer.

  Reference: Isserlis, "On a Formula for the Product-Moment Coefficient of any Order of a Normal Frequency Distribution
    in any Number of Variables", Biometrika 1918.
  """
  degree = static_integer("degree", degree, low=0)
  lower = _isserlis(degree - 1) if degree else _zero
  return _dual(lambda x: x**degree, _isserlis(degree), lambda c, a, b, u: degree**2 * lower(c, a, b, u))


def _isserlis(degree):
  def moment(c, a, b, u):
    total = _zero(c, a, b)
    for m in range(degree // 2 + 1):
      j = degree - 2 * m
      weight = math.factorial(degree) ** 2 / (math.factorial(j) * math.factorial(m) ** 2 * 4**m)
      total += weight * c**j * (a**m * b**m)
    return total

  return moment


def hermite_activation(coefficients: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
  """The polynomial `sum_k coefficients_k h_k(x)` in the orthonormal probabilists' Hermite polynomials.

  `h_0 = 1`, `h_1 = x`, `h_2 = (x^2 - 1) / sqrt 2`; they are orthonormal under the standard normal distribution.

  >>> round(float(hermite_activation([0.0, 0.0, 2**0.5])(3.0)), 4)
  8.0

  Args:
    coefficients: static; numbers, `coefficients[k]` of `h_k`.

  Returns:
    `x -> phi(x)`, elementwise, with the dtype of `x`; an activation for Flax modules.

  Raises:
    ValueError: when there are no coefficients or one is not finite.

  Reference: Radhakrishnan, Belkin, Uhler, "Wide and Deep Neural Networks Achieve Optimality for Classification",
    PNAS 2023, Hermite expansions of activations.
  """
  coefficients = _coefficients(coefficients)

  def activation(x):
    dtype = jnp.result_type(x, float) if jnp.issubdtype(dtype_of("x", x), jnp.integer) else jnp.result_type(x)
    wide = jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))
    previous, current, total = jnp.zeros_like(wide), jnp.ones_like(wide), jnp.zeros_like(wide)
    for k, coefficient in enumerate(coefficients):
      total += coefficient * current
      previous, current = current, (wide * current - math.sqrt(k) * previous) / math.sqrt(k + 1)
    return total.astype(dtype)

  return activation


def hermite_dual(coefficients: Sequence[float]) -> DualActivation:
  """The dual of a Hermite expansion, at unit variances the power series `sum_k coefficients_k^2 rho^k`.

  At other variances it is `sum_j b_j(a) b_j(b) c^j` with
  `b_j(v) = sum_m coefficients_(j + 2 m) sqrt((j + 2 m)! / j!) / (m! 2^m) (v - 1)^m`.

  >>> dual = hermite_dual([0.0, 0.6, 0.8])
  >>> round(float(dual.covariance(0.5)), 4), round(float(dual.derivative(1.0)), 4)
  (0.34, 1.64)

  Args:
    coefficients: static; numbers, those of `hermite_activation`.

  Returns:
    The dual activation.

  Raises:
    ValueError: when there are no coefficients or one is not finite.

  Reference: Daniely, Frostig, Singer, "Toward Deeper Understanding of Neural Networks", NeurIPS 2016, Section 4.
  """
  coefficients = _coefficients(coefficients)
  slopes = [math.sqrt(k) * c for k, c in enumerate(coefficients)][1:] or [0.0]
  complement = _complement(np.square(coefficients))
  return _dual(hermite_activation(coefficients), _mehler(coefficients), _mehler(slopes), complement)


def _coefficients(values):
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or not array.size or not np.isfinite(array).all():
    raise ValueError(f"coefficients must be a non-empty list of finite numbers, got {values!r}.")
  return array.tolist()


def _mehler(coefficients):
  """The moment of a Hermite expansion at any variances; polynomials in the variances first, where they are small."""
  order = len(coefficients)

  def on(variance, j):
    terms = [
      coefficients[k] * math.sqrt(math.factorial(k) / math.factorial(j)) / (math.factorial(m) * 2**m)
      for m, k in enumerate(range(j, order, 2))
    ]
    return horner(variance - 1, terms)

  return lambda c, a, b, u: horner(c, [on(a, j) * on(b, j) for j in range(order)]) + _zero(c, a, b)


def _complement(squares):
  """`1 - sum_k squares_k (1 - t)^k` as a polynomial in t, without the cancellation at small t."""
  terms = [0.0 if abs(1 - squares.sum()) < 1e-14 * len(squares) else 1 - squares.sum()]
  for j in range(1, len(squares)):
    terms.append(-((-1.0) ** j) * math.fsum(p * math.comb(k, j) for k, p in enumerate(squares)))
  return lambda t: horner(t, terms)


def numerical_dual(activation: Callable, *, points: int = 128, terms: int = 64) -> DualActivation:
  """The dual of any activation, from Hermite coefficients by Gauss-Hermite quadrature.

  With `alpha_k(v) = E[phi(sqrt(v) Z) h_k(Z)]` it is `sum_k alpha_k(a) alpha_k(b) rho^k` over `k < terms`; the slope's
  in the same way from the derivative of `phi`. The error falls exponentially for analytic activations (tanh, softplus,
  swish: below 1e-12 at moderate variances), and as a power of `terms` for those with kinks, near `rho = +-1`.

  >>> import jax
  >>> dual = numerical_dual(jax.nn.gelu)
  >>> abs(float(dual.covariance(0.3) - numerical_dual(jax.nn.gelu, points=64, terms=40).covariance(0.3))) < 1e-6
  True

  Args:
    activation: static; `x -> phi(x)`, elementwise and differentiable by JAX.
    points: static; quadrature points, 2 to 200.
    terms: static; number of coefficients, at most `points`.

  Returns:
    The dual activation.

  Raises:
    ValueError: when `points` or `terms` is out of range.

  Reference: Daniely, Frostig, Singer, "Toward Deeper Understanding of Neural Networks", NeurIPS 2016, Section 4.
  """
  points = static_integer("points", points, low=2, high=200)
  terms = static_integer("terms", terms, low=1, high=points)
  nodes, weights = np.polynomial.hermite_e.hermegauss(points)
  weights = weights / weights.sum()
  basis = [np.ones(points), nodes]
  for k in range(1, terms):
    basis.append((nodes * basis[k] - math.sqrt(k) * basis[k - 1]) / math.sqrt(k + 1))
  projection = weights[:, None] * np.stack(basis[:terms], 1)  # [points, terms]

  def slope(x):
    return jax.jvp(activation, (x,), (jnp.ones_like(x),))[1]

  def moment(function):
    def coefficients(variance):
      values = function(safe_sqrt(variance)[..., None] * jnp.asarray(nodes, variance.dtype))
      matrix = jnp.asarray(projection[:, ::-1], variance.dtype)  # the highest power first
      return jnp.einsum("...p,pk->k...", values, matrix, precision="highest")

    def of(c, a, b, u):
      rho = jnp.where(c < 0, u - 1, 1 - u)
      step = lambda total, pair: (total * rho + pair[0] * pair[1], None)
      return jax.lax.scan(step, _zero(c, a, b), (coefficients(a), coefficients(b)))[0]

    return of

  return _dual(activation, moment(activation), moment(slope))


def normalize_dual(dual: DualActivation) -> DualActivation:
  """The dual of `phi / sqrt(E[phi(Z)^2])`, so that `E[phi(U) phi(V)] = 1` at unit variances and correlation 1.

  >>> round(float(normalize_dual(erf_dual()).covariance(1.0)), 5)
  1.0

  Args:
    dual: static; of an activation with a positive second moment.

  Returns:
    The dual activation.

  Raises:
    ValueError: when `dual` is not a dual activation.

  Reference: Daniely, Frostig, Singer, "Toward Deeper Understanding of Neural Networks", NeurIPS 2016, normalized
    activations.
  """
  check_dual(dual)

  def divided(moment):
    return lambda *arguments: moment(*arguments) / _second_moment(dual, jnp.result_type(*arguments))

  def moments(c, a, b, u):
    covariance, derivative, after = dual.moments(c, a, b, u)
    square = _second_moment(dual, covariance.dtype)
    return covariance / square, derivative / square, after

  def activation(x):
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    return (dual.activation(x) / jnp.sqrt(_second_moment(dual, dtype))).astype(jnp.result_type(x))

  return DualActivation(
    activation, divided(dual.covariance), divided(dual.derivative), moments=dual.moments and moments
  )


def _second_moment(dual, dtype):
  """`E[phi(Z)^2]`."""
  return dual.covariance(jnp.ones((), jnp.promote_types(dtype, jnp.float32)))


def check_dual(dual) -> None:
  """Raises ValueError unless `dual` is a `DualActivation`."""
  if not isinstance(dual, DualActivation):
    raise ValueError(f"dual must be a DualActivation such as relu_dual(), got {dual!r}.")


def check_normalized_dual(dual, *, zero_mean: bool = False) -> None:
  """Raises ValueError unless `dual` maps 1 to 1, and 0 to 0 with a positive slope where `zero_mean`.

  Hyperparameters that are traced pass unread.
  """
  check_dual(dual)
  with jax.ensure_compile_time_eval():
    values = dual.covariance(1.0), dual.covariance(0.0), dual.derivative(0.0)
    if isinstance(values[0], jax.core.Tracer):
      return
    one, mean, slope = map(float, values)
  if not abs(one - 1) <= 1e-5:
    raise ValueError(
      f"dual must be of a normalized activation, with value 1 at correlation 1, got {one}; see normalize_dual."
    )
  if zero_mean and not (abs(mean) <= 1e-5 and slope > 0):
    raise ValueError(
      "dual must be of an activation with zero mean and a linear part, with value 0 and a positive slope at correlation"
      f" 0, got {mean} and {slope}."
    )
