"""Dual activations against quadrature, at the ends of their range, and under differentiation."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from jaxreg.kernels import dual_activations as duals
from tests.conformance import EXAMPLES, row

HERMITE = (0.3, -0.5, 0.2, 0.7)
SMOOTH = {
  "erf": duals.erf_dual(),
  "gelu": duals.gelu_dual(),
  "sine": duals.sine_dual(frequency=1.3, phase=0.4),
  "cosine": duals.cosine_dual(frequency=0.7),
  "exponential": duals.exponential_dual(rate=0.6),
  "gaussian": duals.gaussian_dual(rate=0.3),
  "cube": duals.monomial_dual(degree=3),
  "fourth": duals.monomial_dual(degree=4),
  "constant": duals.monomial_dual(degree=0),
  "hermite": duals.hermite_dual(HERMITE),
  "normalized": duals.normalize_dual(duals.gelu_dual()),
  "numerical": duals.numerical_dual(jnp.tanh, points=150, terms=90),
}
# name -> (dual, slopes left and right of zero)
BENT = {
  "relu": (duals.relu_dual(), (0.0, 1.0)),
  "leaky": (duals.leaky_relu_dual(negative_slope=0.2), (0.2, 1.0)),
  "abs": (duals.abs_dual(), (-1.0, 1.0)),
}
JUMPS = {"sign": (duals.sign_dual(), (-1.0, 1.0)), "step": (duals.step_dual(), (0.0, 1.0))}
ALL = {**SMOOTH, **{name: dual for name, (dual, _) in {**BENT, **JUMPS}.items()}}


def gauss_hermite(function, covariance, variance1, variance2, points=150):
  """`E[f(U) f(V)]` by quadrature in two dimensions."""
  nodes, weights = np.polynomial.hermite_e.hermegauss(points)
  weights = weights / weights.sum()
  rho = covariance / math.sqrt(variance1 * variance2)
  first = math.sqrt(variance1) * nodes[:, None] + 0 * nodes
  second = math.sqrt(variance2) * (rho * nodes[:, None] + math.sqrt(1 - rho**2) * nodes)
  return float(np.sum(weights[:, None] * weights * np.asarray(function(first)) * np.asarray(function(second))))


def by_angle(left, right, rho, radial):
  """`E[f(U) f(V)]` at unit variances for `f(r z) = r^k f(z)`: the radial moment times an integral over the angle."""
  of = lambda x: (left if x < 0 else right) * (abs(x) if radial == 2 else 1) * (-1 if radial == 2 and x < 0 else 1)
  shift = math.acos(rho)
  kinks = sorted({(base + k * math.pi) % (2 * math.pi) for base in (math.pi / 2, math.pi / 2 + shift) for k in (0, 1)})
  ends = [0.0, *kinks, 2 * math.pi]
  piece = lambda t: of(math.cos(t)) * of(math.cos(t - shift))
  total = sum(integrate.quad(piece, a, b, epsabs=1e-14)[0] for a, b in zip(ends, ends[1:], strict=False) if b > a)
  return total * radial / (2 * math.pi)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("arguments", [(0.4, 1.0, 1.0), (-0.9, 1.0, 1.0), (0.2, 0.7, 1.2), (-0.6, 0.5, 1.1)])
def test_smooth_activations_against_quadrature(x64, name, arguments):
  dual = SMOOTH[name]
  slope = lambda x: jax.vmap(jax.vmap(jax.grad(lambda z: 1.0 * dual.activation(z))))(jnp.asarray(x))
  expected = gauss_hermite(dual.activation, *arguments)
  np.testing.assert_allclose(dual.covariance(*arguments), expected, rtol=1e-10, atol=1e-10)
  if name != "constant":
    np.testing.assert_allclose(dual.derivative(*arguments), gauss_hermite(slope, *arguments), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("rho", [-1.0, -0.99, -0.3, 0.0, 0.5, 0.999, 1.0])
def test_kinked_activations_against_integrals(x64, name, rho):
  dual, (left, right) = BENT[name]
  np.testing.assert_allclose(dual.covariance(rho), by_angle(left, right, rho, 2), atol=1e-11)
  np.testing.assert_allclose(dual.derivative(rho), by_angle(left, right, rho, 1), atol=1e-11)
  scaled = dual.covariance(rho * 6.0, 4.0, 9.0)
  np.testing.assert_allclose(scaled, 6 * by_angle(left, right, rho, 2), atol=1e-10)
  np.testing.assert_allclose(dual.derivative(rho * 6.0, 4.0, 9.0), by_angle(left, right, rho, 1), atol=1e-11)


@pytest.mark.parametrize("name", JUMPS)
@pytest.mark.parametrize("rho", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_jumps_against_integrals(x64, name, rho):
  dual, (left, right) = JUMPS[name]
  np.testing.assert_allclose(dual.covariance(rho * 6.0, 4.0, 9.0), by_angle(left, right, rho, 1), atol=1e-11)
  assert float(dual.derivative(rho)) == 0


def test_high_precision_values(x64):
  """Closed forms evaluated with 50 digits."""
  import mpmath

  mpmath.mp.dps = 50
  c, a, b = mpmath.mpf("0.3"), mpmath.mpf("0.8"), mpmath.mpf("1.7")
  root = mpmath.sqrt(a * b)
  rho = c / root
  relu = root * (mpmath.sqrt(1 - rho**2) + rho * (mpmath.pi - mpmath.acos(rho))) / (2 * mpmath.pi)
  expected = {
    "relu": (relu, (mpmath.pi - mpmath.acos(rho)) / (2 * mpmath.pi)),
    "erf": (
      2 / mpmath.pi * mpmath.asin(2 * c / mpmath.sqrt((1 + 2 * a) * (1 + 2 * b))),
      4 / mpmath.pi / mpmath.sqrt((1 + 2 * a) * (1 + 2 * b) - 4 * c**2),
    ),
  }
  for name, (covariance, derivative) in expected.items():
    np.testing.assert_allclose(ALL[name].covariance(0.3, 0.8, 1.7), float(covariance), rtol=1e-13)
    np.testing.assert_allclose(ALL[name].derivative(0.3, 0.8, 1.7), float(derivative), rtol=1e-13)


@pytest.mark.parametrize("name", [name for name in ALL if name not in JUMPS])
def test_derivative_is_the_slope_in_the_covariance(x64, name):
  """Price's theorem, at the ends of the range too."""
  dual = ALL[name]
  for covariance in (-1.0, -0.5, 0.0, 0.5, 1.0):
    slope = jax.grad(lambda c: dual.covariance(c, 1.0, 1.0))(covariance)
    np.testing.assert_allclose(slope, dual.derivative(covariance), rtol=1e-9, atol=1e-9)


def test_numerical_dual_is_close_for_kinked_activations(x64):
  rho = jnp.linspace(-1, 1, 9)
  numerical, exact = duals.numerical_dual(jax.nn.relu, points=200, terms=200), duals.relu_dual()
  np.testing.assert_allclose(numerical.covariance(rho), exact.covariance(rho), atol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_finite_with_finite_gradients_at_equal_opposite_and_zero_inputs(dtype, name):
  dual = ALL[name]
  covariance = jnp.array([1.0, -1.0, 0.0, 0.0, 2.5, 1.0001, 0.99999994], dtype)
  variance1, variance2 = jnp.array([1, 1, 0, 0, 2.5, 1, 1], dtype), jnp.array([1, 1, 1, 0, 2.5, 1, 1], dtype)
  for moment in (dual.covariance, dual.derivative):
    total = lambda c, a, b, moment=moment: jnp.sum(moment(c, a, b))
    value, gradients = jax.value_and_grad(total, argnums=(0, 1, 2))(covariance, variance1, variance2)
    assert value.dtype == jnp.float32 and jnp.isfinite(value)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    second = jax.grad(lambda c, a, b, total=total: jnp.sum(jax.grad(total)(c, a, b)))(covariance, variance1, variance2)
    assert jnp.isfinite(second).all()


@pytest.mark.parametrize("name", ["relu", "abs", "leaky", "sign", "step", "erf", "gelu"])
def test_float32_is_exact_at_equal_and_opposite_inputs(name):
  """Rounding of the correlation by one unit must not become an error of its square root."""
  dual = ALL[name]
  variance = jnp.asarray(np.random.default_rng(0).uniform(0.1, 30, 200), jnp.float32)
  for sign in (1, -1):
    for moment in (dual.covariance, dual.derivative):
      with jax.enable_x64(True):
        exact = moment(*(np.asarray(x, np.float64) for x in (sign * variance, variance, variance)))
        exact = np.asarray(exact)
      got = moment(sign * variance * (1 - 1e-7), variance, variance)
      # At opposite inputs terms of the size of the variances cancel.
      assert np.all(np.abs(got - exact) <= 1e-6 * np.maximum(1, variance) * (1 if moment is dual.covariance else 4))


@pytest.mark.parametrize("dtype, rtol", [(np.float32, 3e-7), (np.float64, 4e-15)])
def test_angle_and_its_integral(x64, dtype, rtol):
  """Against 50 digits, from 0 to a right angle."""
  import mpmath

  u = np.concatenate([10.0 ** np.arange(-24, -1), np.linspace(0.02, 1, 50)]).astype(dtype)
  mpmath.mp.dps = 50
  angles = [mpmath.acos(1 - mpmath.mpf(float(x))) for x in u]
  integrals = [mpmath.sin(angle) - angle * mpmath.cos(angle) for angle in angles]
  np.testing.assert_allclose(duals._angle(jnp.asarray(u)), [float(x) for x in angles], rtol=rtol)
  np.testing.assert_allclose(duals._angle_integral(jnp.asarray(u)), [float(x) for x in integrals], rtol=rtol)


@pytest.mark.parametrize("name", [*BENT, *JUMPS])
@pytest.mark.parametrize("sign", [1, -1])
def test_complement_of_the_outputs(x64, name, sign):
  """From that of the inputs, `1 - |correlation|` of the outputs in float32 has all digits that float64 gives."""
  dual = ALL[name]
  u = 10.0 ** np.linspace(-12, -0.3, 40)
  moments = lambda dtype: dual.moments(*(np.asarray(x, dtype) for x in (sign * 6 * (1 - u), 4.0, 9.0, u)))
  covariance, _, left = moments(np.float64)
  own = float(dual.covariance(4.0, 4.0, 4.0)), float(dual.covariance(9.0, 9.0, 9.0))
  direct = 1 - np.abs(covariance) / math.sqrt(own[0] * own[1])
  np.testing.assert_allclose(left, direct, rtol=1e-10, atol=1e-15)
  np.testing.assert_allclose(moments(np.float32)[2], left, rtol=1e-6)


def test_large_arguments():
  for name in ("relu", "abs", "leaky", "erf", "gelu", "sine", "cosine", "gaussian", "sign", "step"):
    for covariance in (1e4, -1e4, 3e3):
      for moment in (ALL[name].covariance, ALL[name].derivative):
        value, gradient = jax.value_and_grad(lambda c, moment=moment: moment(c, 1e4, 1e4))(jnp.float32(covariance))
        assert jnp.isfinite(value) and jnp.isfinite(gradient), name


def test_relu_of_equal_inputs_is_half_the_variance():
  np.testing.assert_allclose(ALL["relu"].covariance(3.0, 3.0, 3.0), 1.5, rtol=1e-6)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), degree=st.integers(1, 5))
def test_hermite_duals_of_random_expansions(seed, degree):
  rng = np.random.default_rng(seed)
  coefficients = rng.normal(size=degree + 1)
  with jax.enable_x64(True):
    dual = duals.hermite_dual(coefficients)
    rho = rng.uniform(-1, 1)
    np.testing.assert_allclose(dual.covariance(rho), np.polyval(coefficients[::-1] ** 2, rho), rtol=1e-9, atol=1e-9)
    a, b = rng.uniform(0.2, 2, 2)
    c = rho * math.sqrt(a * b)
    exact = gauss_hermite(dual.activation, c, a, b, points=20)
    np.testing.assert_allclose(dual.covariance(c, a, b), exact, rtol=1e-8, atol=1e-8)
    t = 10.0 ** rng.uniform(-12, -0.3)
    normal = duals.hermite_dual(coefficients / np.linalg.norm(coefficients))
    np.testing.assert_allclose(normal.complement(t), 1 - normal.covariance(1 - t), rtol=1e-9, atol=1e-14)


def test_hermite_activation_is_numpys(x64):
  x = np.linspace(-3, 3, 7)
  weights = np.asarray(HERMITE) / np.sqrt(special.factorial(np.arange(4)))
  np.testing.assert_allclose(
    duals.hermite_activation(HERMITE)(x), np.polynomial.hermite_e.hermeval(x, weights), rtol=1e-12
  )
  assert duals.hermite_activation(HERMITE)(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


def test_traced_hyperparameters_and_vmap():
  frequencies = jnp.array([0.5, 2.0])
  got = jax.jit(jax.vmap(lambda f: duals.sine_dual(frequency=f).covariance(0.3)))(frequencies)
  np.testing.assert_allclose(got, [duals.sine_dual(frequency=float(f)).covariance(0.3) for f in frequencies], rtol=1e-6)
  slope = jax.grad(lambda s: duals.leaky_relu_dual(negative_slope=s).covariance(1.0))(0.5)
  np.testing.assert_allclose(slope, 0.5, rtol=1e-6)  # (1 + s^2) / 2


def test_bad_input():
  with pytest.raises(ValueError, match="degree must be"):
    duals.monomial_dual(degree=-1)
  with pytest.raises(ValueError, match="rate must lie in"):
    duals.gaussian_dual(rate=-1.0)
  with pytest.raises(ValueError, match="frequency must lie in"):
    duals.sine_dual(frequency=float("nan"))
  with pytest.raises(ValueError, match="coefficients must be"):
    duals.hermite_dual([])
  with pytest.raises(ValueError, match="points must be an integer in"):
    duals.numerical_dual(jnp.tanh, points=1)
  with pytest.raises(ValueError, match="terms must be an integer in"):
    duals.numerical_dual(jnp.tanh, points=8, terms=9)
  with pytest.raises(ValueError, match="dual must be"):
    duals.normalize_dual(jnp.tanh)
  with pytest.raises(ValueError, match="dual must be of a normalized activation, with value 1 .*, got 0.5"):
    duals.check_normalized_dual(duals.relu_dual())


def _dual(function, build=None, **options):
  """Both moments of `function(…)`, an activation, at the covariances of variables with variances 1.2 and 0.8."""

  def call(covariance, **hyperparameters):
    dual = (build or function)(**hyperparameters)
    return [moment(covariance, 1.2, 0.8) for moment in (dual.covariance, dual.derivative)]

  return row(
    function,
    lambda rng: (rng.uniform(-0.9, 0.9, 4),),
    call=call,
    extreme=lambda covariance: (np.resize([0.97, -0.97, 0.0], covariance.shape),),
    wide=True,
    options=options,
  )


ROWS = [
  _dual(duals.abs_dual),
  _dual(duals.cosine_dual, frequency=(0.5, 2.0)),
  _dual(duals.erf_dual),
  _dual(duals.exponential_dual, rate=(0.5, 1.5)),
  _dual(duals.gaussian_dual, rate=(0.2, 1.0)),
  _dual(duals.gelu_dual),
  _dual(duals.hermite_dual, lambda: duals.hermite_dual([0.0, 0.5, 0.5])),
  _dual(duals.leaky_relu_dual, negative_slope=(0.0, 0.5)),
  _dual(duals.monomial_dual, lambda: duals.monomial_dual(degree=3)),
  _dual(duals.numerical_dual, lambda: duals.numerical_dual(jnp.tanh, points=32, terms=8)),
  _dual(duals.relu_dual),
  _dual(duals.sign_dual),
  _dual(duals.sine_dual, frequency=(0.5, 2.0), phase=(0.0, 1.0)),
  _dual(duals.step_dual),
  row(
    duals.normalize_dual,
    lambda rng: (rng.uniform(-0.9, 0.9, 4),),
    call=lambda correlation: duals.normalize_dual(duals.relu_dual()).covariance(correlation),
    extreme=lambda correlation: (np.resize([0.97, -0.97, 0.0], correlation.shape),),
    wide=True,
  ),
  row(
    duals.hermite_activation,
    lambda rng: (rng.normal(size=EXAMPLES),),
    call=lambda inputs: duals.hermite_activation([0.5, 0.5, 0.2])(inputs),
    examples="any",
  ),
]


EXEMPT = {
  "DualActivation": "what the functions of this module make",
}
