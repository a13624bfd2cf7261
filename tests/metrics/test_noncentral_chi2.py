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


# x, df, nc, log density and log probability by mpmath: Bessel functions with 40 digits, and quadrature of them. From
# both sides of where the expansions begin, in both tails, at noncentralities up to 1e8.
EXACT = np.array([
  (10000.0, 3, 10000.0, -6.217255899752709, -0.7011580274926774),
  (10200.0, 3.5, 10000.0, -6.709857681084096, -0.17781111303662153),
  (9000.0, 50, 10000.0, -20.65260772626714, -17.12350633987869),
  (101000.0, 5, 100000.0, -8.607372022341853, -0.059859685044915546),
  (101300.0, 5, 100000.0, -9.46097958024341, -0.020763113067159233),
  (102000.0, 100, 100000.0, -11.850836655716213, -0.0013919190291851603),
  (90000.0, 1, 100000.0, -138.98606313704087, -135.37961918281067),
  (500, 2, 10000.0, -3019.400289417369, -3019.952366021756),
  (1.0, 3, 10000.0, -4906.717255899753, -4910.629480863994),
  (1000.0, 1000.0, 0.001, -4.719556429869659, -0.6813406980932496),
  (900, 1000.0, 0, -7.294453742875483, -4.535901797272455),
  (1200, 1000.0, 10, -12.776467651855727, -3.3993752285143e-05),
  (100, 300, 50, -84.69253052011318, -84.77231104891494),
  (100, 5, 80, -4.2600514651293775, -0.2223144557346678),
  (60, 5, 80, -4.6794467012904954, -2.5892546003161305),
  (140, 2, 150, -4.185522101279927, -1.1273756414914065),
  (150, 1, 120, -4.953324710825364, -0.103147356327917),
  (5, 0.5, 2000, -904.1694419892195, -906.4186435392153),
  (2500, 0.5, 2000, -19.484094056073268, -6.32225324303357e-08),
  (30, 10, 20, -3.233040987697734, -0.6210088095195128),
  (99950000.0, 2, 100000000.0, -13.948082547456174, -5.082671820396743),
  (100050000.0, 2, 100000000.0, -13.946770047306734, -0.006235420626857703),
  (100000002.0, 2, 100000000.0, -10.822426094490801, -0.6931072871279413),
  (0.05, 50, 10, -149.0309839580573, -155.2448225160229),
  (300, 290, 0.5, -4.210811687254582, -0.41289899090694515),
  (10, 400, 1, -543.836172820681, -546.806781818447),
  (150.0, 150, 150, -22.078918533385234, -20.92411363901235),
  (151, 3, 150, -4.118233927888632, -0.7262723346003386),
  (170, 3, 150, -4.430209134099626, -0.2722140577180009),
  (200, 3, 150, -5.912322603925016, -0.03508715375615578),
  (40, 2, 40, -3.4533603192075883, -0.7585162116757257),
  (41, 3, 40, -3.4596119781884123, -0.7583721782510975),
  (60, 3, 40, -4.466730585158024, -0.1059920566201966),
])  # fmt: skip


def test_forty_digits():
  x, df, nc, density, probability = EXACT.T
  np.testing.assert_allclose(logpdf(x, df=df, nc=nc), density, rtol=1e-13, atol=2e-13)
  np.testing.assert_allclose(logcdf(x, df=df, nc=nc), probability, rtol=5e-12)


def test_forty_digits_in_float32():
  """Errors of a few units of rounding of the value and of what the arguments' own rounding makes of it."""
  x, df, nc, density, probability = EXACT.T
  single = [np.asarray(value, np.float32) for value in (x, df, nc)]
  spread = np.sqrt(2 * df + 4 * nc)
  own = 1e-7 * (df + nc) / spread * np.maximum(1, np.abs(x - df - nc) / spread)
  for function, exact in ((logpdf, density), (logcdf, probability)):
    error = np.abs(function(single[0], df=single[1], nc=single[2]) - exact)
    assert (error <= 1e-5 + 2e-6 * np.abs(exact) + 4 * own * np.minimum(1, np.abs(exact))).all()


@pytest.mark.parametrize("nc", [1e4, 1e6])
def test_gradients_at_large_noncentralities(nc):
  """Those that a fit follows: against differences, on both sides of the mean."""
  for share in (-4.0, 0.0, 2.0):
    point = jnp.array([nc + 3 + share * (4 * nc) ** 0.5, 3.0, nc])
    for function in (noncentral_chi2_logcdf, noncentral_chi2_logpdf):
      _, gradient = value_and_gradient(function, point)
      for index, size in enumerate((nc**0.5, 1.0, nc**0.5)):
        step = jnp.zeros(3).at[index].set(1e-3 * size)
        ahead, behind = (value_and_gradient(function, point + s * step)[0] for s in (1, -1))
        np.testing.assert_allclose(gradient[index], (ahead - behind) / (2e-3 * size), rtol=1e-4, atol=1e-8)


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
