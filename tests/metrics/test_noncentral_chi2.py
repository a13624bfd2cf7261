"""The noncentral chi-square distribution in log space, against scipy where it does not underflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxreg.metrics.noncentral_chi2 import log_gammainc, noncentral_chi2_logcdf, noncentral_chi2_logpdf
from tests.conformance import EXAMPLES, EXTREME, row

pytestmark = pytest.mark.usefixtures("x64")
logcdf, logpdf = jax.jit(noncentral_chi2_logcdf), jax.jit(noncentral_chi2_logpdf)
PARAMETERS = np.array([(3.0, 0.5), (10.0, 5.0), (30.0, 20.0), (0.7, 2.0), (200.0, 100.0), (1.0, 1e-3)])
X = np.geomspace(0.5, 400, 24)


@pytest.mark.parametrize("function, reference", [(logcdf, stats.ncx2.logcdf), (logpdf, stats.ncx2.logpdf)])
def test_scipy(function, reference):
  df, nc = PARAMETERS.T[:, :, None]
  expected = reference(X, df, nc)
  moderate = expected > -100  # scipy loses the tail
  np.testing.assert_allclose(
    np.where(moderate, function(X + 0 * df, df=df, nc=nc), 0), np.where(moderate, expected, 0), atol=1e-10, rtol=1e-10
  )


def test_central():
  df = np.full(X.shape, 5.0)
  np.testing.assert_allclose(logcdf(X, df=df, nc=0 * df), log_gammainc(df / 2, X / 2), atol=1e-14)
  np.testing.assert_allclose(logpdf(X, df=df, nc=0 * df), stats.chi2.logpdf(X, df), rtol=1e-12)
  np.testing.assert_allclose(log_gammainc(df / 2, X / 2), stats.chi2.logcdf(X, df), rtol=1e-12, atol=1e-15)


def test_deep_tail_law():
  """The value's expansion, and its slope df / 2 in log x."""
  df, nc = jnp.array([1.0, 50.0, 400.0]), jnp.array([3.0, 10.0, 0.0])
  x = jnp.full(3, 1e-6)
  expected = -nc / 2 + df / 2 * jnp.log(x / 2) - jax.scipy.special.gammaln(df / 2 + 1)
  np.testing.assert_allclose(logcdf(x, df=df, nc=nc), expected, atol=1e-5)
  slope = jax.grad(lambda log: logcdf(jnp.exp(log), df=df, nc=nc).sum())(jnp.log(x))
  np.testing.assert_allclose(slope, df / 2, atol=1e-3)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(function, point):
  return jax.value_and_grad(lambda t: function(t[0], df=t[1], nc=t[2]))(point)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 60), st.floats(0.5, 60), st.floats(0.1, 60))
def test_derivatives(x, df, nc):
  with jax.enable_x64(True):
    point = jnp.array([x, df, nc])
    for function in (noncentral_chi2_logcdf, noncentral_chi2_logpdf):
      value, gradient = value_and_gradient(function, point)
      assert function is noncentral_chi2_logpdf or value <= 0
      for index in range(3):
        step = jnp.zeros(3).at[index].set(1e-5 * point[index])
        ahead, behind = (value_and_gradient(function, point + s * step)[0] for s in (1, -1))
        numeric = (ahead - behind) / (2e-5 * point[index])
        np.testing.assert_allclose(gradient[index], numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_is_finite(dtype):
  x = jnp.array([1e-4, 1.0, 1e4], dtype)
  df, nc = jnp.array([1e-2, 5.0, 1e3], jnp.float32)[:, None], jnp.float32(3.0)
  for function in (noncentral_chi2_logcdf, noncentral_chi2_logpdf):
    values, gradient = jax.value_and_grad(lambda x, function=function: function(x + 0 * df.astype(dtype), df=df, nc=nc)
                                          .sum())(x)  # fmt: skip
    assert values.dtype == dtype and jnp.isfinite(values) and jnp.isfinite(gradient).all()


def test_bad_input():
  for function in (noncentral_chi2_logcdf, noncentral_chi2_logpdf):
    with pytest.raises(ValueError, match="x must be floating"):
      function(jnp.ones(2, int), df=1.0, nc=1.0)
    with pytest.raises(ValueError, match="df must lie in"):
      function(jnp.ones(2), df=0.0, nc=1.0)
    with pytest.raises(ValueError, match="nc must lie in"):
      function(jnp.ones(2), df=1.0, nc=float("nan"))
  with pytest.raises(ValueError, match="a must be floating"):
    log_gammainc(jnp.ones(2, int), jnp.ones(2))


ROWS = [
  row(
    log_gammainc,
    lambda rng: (rng.uniform(1, 5, EXAMPLES), rng.uniform(0.5, 5, EXAMPLES)),
    call=lambda z, a: log_gammainc(a, z),
    extreme=lambda z, a: (np.resize([EXTREME, 1e-3], z.shape), a),
    examples="any",
  ),
  *(
    row(
      function,
      lambda rng: (rng.uniform(0.5, 9, EXAMPLES),),
      extreme=lambda x: (np.resize([500.0, 1e-3], x.shape),),
      bad=(("x", lambda x: (x.astype(np.int32),)),),
      examples="any",
      options=dict(df=(2.0, 6.0), nc=(0.5, 4.0)),
    )
    for function in (noncentral_chi2_logcdf, noncentral_chi2_logpdf)
  ),
]
