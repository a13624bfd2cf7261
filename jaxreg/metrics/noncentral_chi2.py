"""The noncentral chi-square distribution in log space: its lower tail without underflow, with derivatives."""

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, logsumexp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = ["log_gammainc", "noncentral_chi2_logcdf", "noncentral_chi2_logpdf"]

# Terms of the Poisson mixture around its largest one; enough for eight deviations at noncentrality 2,000 (cdf, whose
# terms spread like a Poisson variable) and at 1e5 for x times noncentrality (pdf, whose terms spread less).
_CDF_TERMS, _PDF_TERMS = 512, 128


def noncentral_chi2_logpdf(x: ArrayLike, *, df: ArrayLike, nc: ArrayLike) -> jax.Array:
  """Log density of the noncentral chi-square distribution, `log sum_j Poisson(j; nc / 2) chi2(x; df + 2 j)`.

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

  Reference: Johnson, Kotz, Balakrishnan, "Continuous Univariate Distributions", volume 2, Wiley 1995, chapter 29.
  """
  x, df, nc, dtype = _checked(x, df, nc)
  return _logpdf(x, df, nc).astype(dtype)


@jax.jit
def _logpdf(x, df, nc):
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
  deep tail it is `-nc / 2 + (df / 2) log(x / 2) - log Gamma(df / 2 + 1)`.

  >>> import jax.numpy as jnp
  >>> print(f"{noncentral_chi2_logcdf(jnp.array(0.05), df=50.0, nc=10.0):.2f}")
  -155.24

  Args:
    x: floating `[...]`, positive.
    df: positive degrees of freedom, broadcasting against `x`; may be traced.
    nc: non-negative noncentrality, broadcasting against `x`; may be traced; up to some 2,000.

  Returns:
    `[...]`, at most 0, in the dtype of `x`.

  Raises:
    ValueError: when `x` is not floating point or a parameter lies outside its domain.

  Reference: Johnson, Kotz, Balakrishnan, "Continuous Univariate Distributions", volume 2, Wiley 1995, chapter 29.
  """
  x, df, nc, dtype = _checked(x, df, nc)
  return _logcdf(x, df, nc).astype(dtype)


@jax.jit
def _logcdf(x, df, nc):
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
