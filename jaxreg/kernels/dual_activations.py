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
from jaxreg.kernels.spectral import horner
from jaxreg.metrics.norms import safe_sqrt
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
  """

  activation: Callable
  covariance: Callable
  derivative: Callable
  complement: Callable | None = None


def _dual(activation, covariance, derivative, complement=None) -> DualActivation:
  return DualActivation(activation, _moment(covariance), _moment(derivative), complement)


def _moment(formula):
  """Lets a formula of three float32 or float64 arrays take anything, unit variances by default."""

  def moment(covariance, variance1=1.0, variance2=1.0):
    dtype = jnp.promote_types(jnp.result_type(covariance, variance1, variance2), jnp.float32)
    return formula(*(jnp.asarray(x, dtype) for x in (covariance, variance1, variance2)))

  return moment


def _correlation(covariance, variance1, variance2):
  """The correlation and the product of standard deviations; what rounding cannot tell from +-1 is exactly that."""
  scale = safe_sqrt(variance1) * safe_sqrt(variance2)
  zero = scale == 0
  rho = jnp.where(zero, 0, covariance / jnp.where(zero, 1, scale))
  near = jnp.abs(rho) >= 1 - 4 * jnp.finfo(rho.dtype).eps
  # The gradient passes: the moments have one at +-1.
  return rho + jax.lax.stop_gradient(jnp.where(near, jnp.sign(rho) - rho, 0)), scale


# `(arcsin(x) / x - 1) / x^2` as a polynomial in x^2 up to 1/4, fitted at Chebyshev nodes; its error is 1e-9 x^2.
ARCSIN = (0.166666663, 0.0750009879, 0.0445980254, 0.0311162187, 0.0170776104, 0.0338061104)


@jax.custom_jvp
def _arcsin(x):
  if x.dtype != jnp.float32:
    return jnp.arctan2(x, jnp.sqrt((1 - x) * (1 + x)))
  # Kernels spend their time here, and a polynomial is many times faster than arctan2 on a CPU.
  size = jnp.abs(x)
  large = size > 0.5
  square = jnp.where(large, (1 - size) / 2, size * size)
  root = jnp.where(large, jnp.sqrt(square), size)
  small = root + root * square * horner(square, ARCSIN)
  return jnp.sign(x) * jnp.where(large, math.pi / 2 - 2 * small, small)


@_arcsin.defjvp
def _arcsin_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  square = (1 - x) * (1 + x)
  inside = square > 0
  # The slope is infinite at +-1; zero there is what keeps gradients of kernels at equal inputs finite.
  return _arcsin(x), tangent * jnp.where(inside, jax.lax.rsqrt(jnp.where(inside, square, 1)), 0)


@jax.custom_jvp
def _absolute_moment(rho):
  """`E|U V|` at unit variances."""
  return 2 / math.pi * (jnp.sqrt((1 - rho) * (1 + rho)) + rho * _arcsin(rho))


@_absolute_moment.defjvp
def _absolute_moment_jvp(primals, tangents):
  (rho,), (tangent,) = primals, tangents
  return _absolute_moment(rho), 2 / math.pi * _arcsin(rho) * tangent


def _piecewise_linear(activation, negative, positive):
  """The dual of `negative * min(x, 0) + positive * max(x, 0)`, a linear part plus a multiple of the absolute value."""

  def parts(dtype):
    low, high = jnp.asarray(negative, dtype), jnp.asarray(positive, dtype)
    return jnp.square((low + high) / 2), jnp.square((high - low) / 2)

  def covariance(c, a, b):
    linear, bent = parts(c.dtype)
    rho, scale = _correlation(c, a, b)
    return linear * c + bent * scale * _absolute_moment(rho)

  def derivative(c, a, b):
    linear, bent = parts(c.dtype)
    return linear + bent * 2 / math.pi * _arcsin(_correlation(c, a, b)[0])

  return _dual(activation, covariance, derivative)


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
  covariance = lambda c, a, b: 2 / math.pi * _arcsin(_correlation(c, a, b)[0])
  return _dual(jnp.sign, covariance, _zero)


def step_dual() -> DualActivation:
  """The dual of `1[x > 0]`, `1/4 + arcsin(rho) / (2 pi)`; the slope counts as zero.

  >>> [round(float(step_dual().covariance(rho)), 4) for rho in (-1.0, 0.0, 1.0)]
  [0.0, 0.25, 0.5]

  Returns:
    The dual activation.

  Reference: Cho, Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, Section 2, degree 0.
  """
  covariance = lambda c, a, b: 0.25 + _arcsin(_correlation(c, a, b)[0]) / (2 * math.pi)
  return _dual(lambda x: (x > 0).astype(jnp.result_type(x)), covariance, _zero)


def _zero(covariance, variance1, variance2):
  return jnp.zeros(jnp.broadcast_shapes(covariance.shape, variance1.shape, variance2.shape), covariance.dtype)


def erf_dual() -> DualActivation:
  """The dual of the error function: `2/pi arcsin(2 c / sqrt((1 + 2 a) (1 + 2 b)))` for variances a, b, covariance c.

  >>> round(float(erf_dual().covariance(1.0)), 4)
  0.4646

  Returns:
    The dual activation.

  Reference: Williams, "Computing with Infinite Networks", NeurIPS 1996, Section 3.1.
  """

  def covariance(c, a, b):
    # arcsin(x / sqrt(x^2 + D)) = arctan(x / sqrt D), which stays accurate at large variances.
    return 2 / math.pi * jnp.arctan2(2 * c, jnp.sqrt(_determinant(2 * c, 2 * a, 2 * b)))

  def derivative(c, a, b):
    return 4 / math.pi * jax.lax.rsqrt(_determinant(2 * c, 2 * a, 2 * b))

  return _dual(jax.lax.erf, covariance, derivative)


def _determinant(c, a, b):
  """`det(I + S)` for the covariance matrix S, a sum of what is not negative."""
  rho, _ = _correlation(c, a, b)
  return 1 + a + b + a * b * ((1 - rho) * (1 + rho))


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

  def pieces(c, a, b):
    determinant = _determinant(c, a, b)
    both = 0.25 + jnp.arctan2(c, jnp.sqrt(determinant)) / (2 * math.pi)
    return both, jax.lax.rsqrt(determinant) / (2 * math.pi), determinant

  def covariance(c, a, b):
    both, density, determinant = pieces(c, a, b)
    # Without the difference of large numbers in the formula above.
    return c * both + density * ((a / (1 + a)) * (b / (1 + b)) * determinant + (c / (1 + a)) * (c / (1 + b)))

  def derivative(c, a, b):
    both, density, determinant = pieces(c, a, b)
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

  def with_phase(c, a, b, phase):
    mean, sign = (a + b) / 2, jnp.where(c < 0, -1, 1)  # of zero it is 1, so that the gradient there is right
    size = sign * c
    odd = sign * jnp.exp(size - mean) * -jnp.expm1(-2 * size) / 2
    return odd + jnp.square(jnp.sin(jnp.asarray(phase, c.dtype))) * jnp.exp(-c - mean)

  def covariance(c, a, b):
    square = jnp.square(jnp.asarray(frequency, c.dtype))
    return with_phase(square * c, square * a, square * b, phase)

  def derivative(c, a, b):
    square = jnp.square(jnp.asarray(frequency, c.dtype))
    return square * with_phase(square * c, square * a, square * b, phase + math.pi / 2)

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
  covariance = lambda c, a, b: jnp.exp(jnp.square(jnp.asarray(rate, c.dtype)) * ((a + b) / 2 + c))
  derivative = lambda c, a, b: jnp.square(jnp.asarray(rate, c.dtype)) * covariance(c, a, b)
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

  def determinant(c, a, b):
    twice = 2 * jnp.asarray(rate, c.dtype)
    return twice, _determinant(twice * c, twice * a, twice * b)

  def derivative(c, a, b):
    twice, d = determinant(c, a, b)
    return twice * (twice * c / d) * jax.lax.rsqrt(d)

  return _dual(
    lambda x: jnp.exp(-rate * jnp.square(x)), lambda c, a, b: jax.lax.rsqrt(determinant(c, a, b)[1]), derivative
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
  return _dual(lambda x: x**degree, _isserlis(degree), lambda c, a, b: degree**2 * lower(c, a, b))


def _isserlis(degree):
  def moment(c, a, b):
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

  return lambda c, a, b: horner(c, [on(a, j) * on(b, j) for j in range(order)]) + _zero(c, a, b)


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

    def of(c, a, b):
      rho, _ = _correlation(c, a, b)
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
    return lambda c, a, b: moment(c, a, b) / dual.covariance(jnp.ones((), c.dtype))

  def activation(x):
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    return (dual.activation(x) / jnp.sqrt(dual.covariance(jnp.ones((), dtype)))).astype(jnp.result_type(x))

  return _dual(activation, divided(dual.covariance), divided(dual.derivative))


def check_dual(dual) -> None:
  """Raises ValueError unless `dual` is a `DualActivation`."""
  if not isinstance(dual, DualActivation):
    raise ValueError(f"dual must be a DualActivation such as relu_dual(), got {dual!r}.")
