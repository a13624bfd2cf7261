"""The noncentral chi-square distribution in log space: its lower tail without underflow, with derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logsumexp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.polynomials import horner

__all__ = ["log_gammainc", "noncentral_chi2_logcdf", "noncentral_chi2_logpdf"]

# Terms of the Poisson mixture around its largest one, and points of the integral where the mixture is too wide. Where
# the terms are used they are enough for eight deviations.
_CDF_TERMS, _PDF_TERMS, _POINTS = 160, 128, 64


def noncentral_chi2_logpdf(x: ArrayLike, *, df: ArrayLike, nc: ArrayLike) -> jax.Array:
  """Log density of the noncentral chi-square distribution, `log sum_j Poisson(j; nc / 2) chi2(x; df + 2 j)`.

  By the series around its largest term, or, where `(df / 2 - 1)^2 + x nc` is large, by Debye's expansion of the Bessel
  function in it. The error is below 1e-12 plus 1e-13 of the value in float64, and in float32 some 1e-6 of it plus what
  the arguments' rounding makes of it, at noncentralities and degrees of freedom from 0 to 1e8.

  >>> import jax.numpy as jnp
  >>> print(f"{noncentral_chi2_logpdf(jnp.array(1e-3), df=50.0, nc=10.0):.2f}")
  -242.90

  Args:
    x: floating `[...]`, positive.
    df: positive degrees of freedom, broadcasting against `x`; may be traced.
    nc: non-negative noncentrality, broadcasting against `x`; may be traced.

  Returns:
    `[...]`, in the dtype of `x`.

  Raises:
    ValueError: when `x` is not floating point or a parameter lies outside its domain.

  Reference: Johnson, Kotz, Balakrishnan, "Continuous Univariate Distributions", volume 2, Wiley 1995, chapter 29;
    Abramowitz, Stegun, "Handbook of Mathematical Functions", 1964, formula 9.7.7.
  """
  x, df, nc, dtype = _checked(x, df, nc)
  return _logpdf(x, df, nc).astype(dtype)


@jax.jit
def _logpdf(x, df, nc):
  nu = df / 2 - 1
  radius = jnp.sqrt(jnp.square(nu) + x * nc)
  far = radius > _far(x.dtype)
  # Either form is computed where it holds, the other at arguments that do no harm.
  near = jnp.where(far, 1, jnp.stack([x, df, nc]))
  uniform = _uniform_logpdf(*jnp.where(far, jnp.stack([x, df, nc]), jnp.full((3, *x.shape), 1e3, x.dtype)))
  return jnp.where(far, uniform, _series_logpdf(*near))


def _far(dtype):
  """The `sqrt((df / 2 - 1)^2 + x nc)` beyond which the uniform expansions have the digits of the dtype."""
  return 40.0 if dtype == jnp.float32 else 150.0


# Debye's polynomials `U_k(p) / nu^k` as polynomials in p^2 over `(nu^2 + z^2)^(k / 2)`, k = 1 ... 6.
_DEBYE = (
  (3 / 24, -5 / 24),
  (81 / 1152, -462 / 1152, 385 / 1152),
  (30375 / 414720, -369603 / 414720, 765765 / 414720, -425425 / 414720),
  (4465125 / 39813120, -94121676 / 39813120, 349922430 / 39813120, -446185740 / 39813120, 185910725 / 39813120),
  (
    1519035525 / 6688604160,
    -49286948607 / 6688604160,
    284499769554 / 6688604160,
    -614135872350 / 6688604160,
    566098157625 / 6688604160,
    -188699385875 / 6688604160,
  ),
  (
    2757049477875 / 4815794995200,
    -127577298354750 / 4815794995200,
    1050760774457901 / 4815794995200,
    -3369032068261860 / 4815794995200,
    5104696716244125 / 4815794995200,
    -3685299006138750 / 4815794995200,
    1023694168371875 / 4815794995200,
  ),
)


def _exponent(x, df, nc):
  """The density's exponent at its saddle point, `-nc y^2 / 2 - nu (y - log(1 + y))`, y and `sqrt(nu^2 + x nc)`.

  With `nu = df / 2 - 1`; `1 / (1 + y)` is `1 - 2 s` at the saddle point s of the cumulants with `df - 2`.
  """
  nu = df / 2 - 1
  radius = jnp.sqrt(jnp.square(nu) + x * nc)
  # One of the two forms of the root that do not cancel; `nu + nc + radius` is positive.
  y = (x - nc - 2 * nu) / (nu + nc + radius)
  small = jnp.abs(y) < 0.1
  close, away = jnp.where(small, y, 0), jnp.where(small, 1, y)
  bend = jnp.where(small, jnp.square(close) * horner(close, _LOG_BEND), away - jnp.log1p(away))
  return -nc * jnp.square(y) / 2 - nu * bend, y, radius


# `(y - log(1 + y)) / y^2` at small y.
_LOG_BEND = tuple((-1.0) ** k / (k + 2) for k in range(17))


def _uniform_logpdf(x, df, nc):
  """By Debye's expansion of the Bessel function in the density, uniform in degrees of freedom and noncentrality."""
  exponent, _, radius = _exponent(x, df, nc)
  square = jnp.square((df / 2 - 1) / radius)
  inverse = 1 / jnp.maximum(radius, 8)  # nearer to 0 only where the density vanishes
  corrections = horner(inverse, (1.0, *(horner(square, row) for row in _DEBYE)))
  return exponent - jnp.log(8 * jnp.pi * radius) / 2 + jnp.log(corrections)


def _series_logpdf(x, df, nc):
  half = df / 2
  product = x * nc / 4
  # The largest term, where the ratio of successive ones, product / (j (df / 2 - 1 + j)), passes 1.
  excess = half - 1
  peak = (-excess + jnp.sqrt(excess**2 + 4 * product)) / 2
  start = _window_start(peak, _PDF_TERMS)
  steps = start[..., None] + jnp.arange(1, _PDF_TERMS, dtype=x.dtype)
  ratios = jnp.log(product)[..., None] - jnp.log(steps) - jnp.log(half[..., None] - 1 + steps)
  first = start * jnp.log(product) - gammaln(start + 1) - gammaln(half + start)
  terms = jnp.concatenate([jnp.zeros_like(first)[..., None], jnp.cumsum(ratios, -1)], -1)
  return first + logsumexp(terms, axis=-1) + (half - 1) * jnp.log(x / 2) - jnp.log(2.0) - (x + nc) / 2


def noncentral_chi2_logcdf(x: ArrayLike, *, df: ArrayLike, nc: ArrayLike) -> jax.Array:
  """Log probability of at most x, `log sum_j Poisson(j; nc / 2) P(df / 2 + j, x / 2)`.

  P is the regularised lower incomplete gamma function. Exact to rounding also where the probability underflows: in the
  deep tail it is `-nc / 2 + (df / 2) log(x / 2) - log Gamma(df / 2 + 1)`. Where `(df / 2 - 1)^2 + x nc` is large, it is
  a quadrature of the density over one of the tails; the relative error is below 1e-11 in float64, and in
  float32 some 1e-6 plus what the arguments' rounding makes of it, at noncentralities and degrees of freedom from 0 to
  1e8.

  >>> import jax.numpy as jnp
  >>> print(f"{noncentral_chi2_logcdf(jnp.array(0.05), df=50.0, nc=10.0):.2f}")
  -155.24

  Args:
    x: floating `[...]`, positive.
    df: positive degrees of freedom, broadcasting against `x`; may be traced.
    nc: non-negative noncentrality, broadcasting against `x`; may be traced.

  Returns:
    `[...]`, at most 0, in the dtype of `x`.

  Raises:
    ValueError: when `x` is not floating point or a parameter lies outside its domain.

  Reference: Johnson, Kotz, Balakrishnan, "Continuous Univariate Distributions", volume 2, Wiley 1995, chapter 29;
    Abramowitz, Stegun, "Handbook of Mathematical Functions", 1964, formula 9.7.7.
  """
  x, df, nc, dtype = _checked(x, df, nc)
  return _logcdf(x, df, nc).astype(dtype)


@jax.jit
def _logcdf(x, df, nc):
  far = jnp.square(df / 2 - 1) + x * nc > _far(x.dtype) ** 2
  near = jnp.where(far, 1, jnp.stack([x, df, nc]))
  integral = _integral_logcdf(*jnp.where(far, jnp.stack([x, df, nc]), jnp.full((3, *x.shape), 1e3, x.dtype)))
  return jnp.where(far, integral, _series_logcdf(*near))


def _integral_logcdf(x, df, nc):
  """By Gauss's quadrature of the density of the root, from x to the side on which there is less.

  That density is log-concave with a second derivative near -1 or below it, so that a tail has a known length.
  """
  nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
  nodes, weights = (jnp.asarray(array, x.dtype) for array in ((nodes + 1) / 2, weights / 2))
  root = jnp.sqrt(x)
  lower = x < df + nc
  _, y, _ = _exponent(x, df, nc)
  slope = jnp.maximum(jnp.where(lower, -1, 1) * root * y / (1 + y), 0)
  depth = 42.0 if x.dtype == jnp.float64 else 24.0  # of the integrand's logarithm at the end
  length = 2 * depth / (slope + jnp.sqrt(jnp.square(slope) + 2 * depth))
  length = jax.lax.stop_gradient(jnp.where(lower, jnp.minimum(length, root), length))[..., None]
  points = root[..., None] + jnp.where(lower, -1, 1)[..., None] * length * nodes
  logs = _uniform_logpdf(jnp.square(points), df[..., None], nc[..., None]) + jnp.log(2 * points * length * weights)
  total = logsumexp(logs, axis=-1)
  upper = jnp.log1p(-jnp.exp(jnp.where(lower, -1, jnp.minimum(total, -1e-3))))
  return jnp.minimum(jnp.where(lower, total, upper), 0)


def _series_logcdf(x, df, nc):
  half = df / 2
  # Far below the mean the gamma functions, not the Poisson weights, decide which term is largest.
  peak = jnp.minimum((-half + jnp.sqrt(half**2 + x * nc)) / 2, nc / 2)
  count = _window_start(peak, _CDF_TERMS)[..., None] + jnp.arange(_CDF_TERMS, dtype=x.dtype)
  weights = count * jnp.log(nc / 2)[..., None] - gammaln(count + 1)
  terms = weights + log_gammainc(half[..., None] + count, jnp.broadcast_to(x[..., None] / 2, count.shape))
  return jnp.minimum(logsumexp(terms, axis=-1) - nc / 2, 0)


def _checked(x, df, nc):
  check_float("x", x)
  check_hyperparameter("df", df, low=0, open_low=True)
  check_hyperparameter("nc", nc, low=0)
  dtype = jnp.result_type(x)
  wide = jnp.promote_types(dtype, jnp.float32)
  x, df, nc = jnp.broadcast_arrays(*(jnp.asarray(value, wide) for value in (x, df, nc)))
  return x, df, nc + 1e-30, dtype  # so that at 0 the logarithm and the derivative are finite


def _window_start(peak, terms: int):
  """The first of `terms` indices around the largest term."""
  return jax.lax.stop_gradient(jnp.maximum(jnp.floor(peak) - terms // 2, 0))


@jax.custom_jvp
def log_gammainc(a: ArrayLike, z: ArrayLike) -> jax.Array:
  """Log of the regularised lower incomplete gamma function `P(a, z)`, with derivatives in both arguments, once.

  Below `z = a + 1` by the series `z^a exp(-z) / Gamma(a + 1) (1 + z / (a + 1) + …)`, whose log does not underflow.

  >>> import jax.numpy as jnp
  >>> print(f"{log_gammainc(jnp.array(100.0), jnp.array(0.01)):.1f}")
  -824.3

  Args:
    a: floating `[...]`, positive.
    z: floating `[...]`, positive.

  Returns:
    `[...]`.

  Raises:
    ValueError: when the arguments are not floating point.

  Reference: Abramowitz, Stegun, "Handbook of Mathematical Functions", 1964, formula 6.5.29.
  """
  return _log_gammainc(a, z)[0]


@log_gammainc.defjvp
def _log_gammainc_jvp(primals, tangents):
  a, z = primals
  value, by_a = _log_gammainc(a, z)
  # The density over the probability.
  by_z = jnp.exp((a - 1) * jnp.log(z) - z - gammaln(a) - value)
  return value, by_a * tangents[0] + by_z * tangents[1]


@jax.jit
def _log_gammainc(a, z):
  """The value and its derivative in `a`."""
  check_float("a", a)
  check_float("z", z)
  low = z < a + 1
  ones = jnp.ones_like(z)
  small, upper = jnp.where(low, z, a / 2), jnp.where(low, a + 2, z)
  total, slope = _series(a, small)
  series = a * jnp.log(small) - small - gammaln(a + 1) + jnp.log(total)
  series_slope = jnp.log(small) - jax.lax.digamma(a + 1) + slope / total
  complement = jax.lax.igammac(a * ones, upper)
  rest = jnp.log1p(-complement)
  rest_slope = jax.lax.igamma_grad_a(a * ones, upper) / jnp.maximum(1 - complement, jnp.finfo(z.dtype).tiny)
  return jnp.where(low, series, rest), jnp.where(low, series_slope, rest_slope)


def _series(a, z):
  """`1 + sum_r z^r / ((a + 1) … (a + r))` and its derivative in `a`, until the terms no longer count."""
  precision = jnp.finfo(z.dtype).eps / 4

  def unfinished(carry):
    _, total, term, _, _ = carry
    return jnp.any(term > precision * total)

  def add(carry):
    r, total, term, slope, term_slope = carry
    factor = z / (a + r)
    term, term_slope = term * factor, factor * (term_slope - term / (a + r))
    return r + 1, total + term, term, slope + term_slope, term_slope

  zeros = jnp.zeros_like(z)
  _, total, _, slope, _ = jax.lax.while_loop(unfinished, add, (1, zeros + 1, zeros + 1, zeros, zeros))
  return total, slope
