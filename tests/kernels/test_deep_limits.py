"""Infinitely wide and deep networks on the sphere: kernels, singular limits, and the classifiers they become."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.kernels import deep_limits as limits
from jaxreg.kernels import deep_votes
from jaxreg.kernels import dual_activations as duals
from jaxreg.kernels.gradient_flow import kernel_classify, kernel_regression
from tests.conformance import EXAMPLES, EXTREME, row


def hermite(degree):
  return duals.hermite_dual([0.0] * degree + [1.0])


def power(*squares):
  """The dual with the power series `squares`."""
  return duals.hermite_dual(np.sqrt(squares))


@functools.cache
def of_name(name):
  """The activation that the official code calls by this name."""
  kind, _, argument = name.partition("_")
  if kind == "sine":
    return limits.sine_sphere_dual(float(argument))
  if kind == "hermite":
    return hermite(int(argument))
  if argument == "opt":  # the code counts features
    return limits.optimal_dual(int(kind.removesuffix("d")) - 1)
  return duals.normalize_dual({"erf": duals.erf_dual, "relu": duals.relu_dual}[kind]())


LISTED = ("2d_opt", "3d_opt", "5d_opt", "9d_opt", "sine_1", "sine_2.676", "sine_13.8258", "erf", "hermite_3")


@pytest.fixture
def points():
  """Twenty training and ten test points on the orthant of a sphere, with unequal classes."""
  rng = np.random.default_rng(3)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  targets = np.where(np.arange(20) < 13, 1.0, -1.0)
  return unit(rng.uniform(size=(20, 3))), unit(rng.uniform(size=(10, 3))), rng.permutation(targets)


def predictions(gram, cross, targets, ridge=0.0):
  return np.asarray(kernel_classify(cross, kernel_regression(gram, targets, ridge=ridge)))


@pytest.mark.parametrize("name", LISTED)
def test_dual_is_the_moment_of_the_activation(x64, name):
  dual = of_name(name)
  nodes, weights = np.polynomial.hermite_e.hermegauss(120)
  weights = weights / weights.sum()
  for rho in (-0.7, 0.0, 0.4, 0.9):
    second = rho * nodes[:, None] + math.sqrt(1 - rho**2) * nodes
    values = np.asarray(dual.activation(jnp.asarray(nodes)))[:, None] * dual.activation(jnp.asarray(second))
    np.testing.assert_allclose(np.sum(weights[:, None] * weights * values), dual.covariance(rho), atol=1e-10)
  np.testing.assert_allclose(dual.covariance(1.0), 1, rtol=1e-12)


def test_singularity_exponents(x64):
  for dimension in (1, 2, 4, 8):
    assert abs(limits.singularity_exponent(limits.optimal_dual(dimension)) - dimension) < 1e-12
  for q, exponent in ((2.676, 2), (6.13539, 4), (13.8258, 8), (1, 1.186)):
    got = limits.singularity_exponent(limits.sine_sphere_dual(float(q)))
    np.testing.assert_allclose(got, exponent, atol=1e-4 if q != 1 else 1e-3)
    if q != 1:
      np.testing.assert_allclose(limits.solve_sine_frequency(exponent), q, rtol=2e-4)
  for exponent in (1.01, 2.0, 100.0):
    q = limits.solve_sine_frequency(exponent)
    np.testing.assert_allclose(limits.singularity_exponent(limits.sine_sphere_dual(q)), exponent, rtol=1e-9)
  np.testing.assert_allclose(limits.singularity_exponent(of_name("erf")), 0.888, atol=1e-3)


@pytest.mark.parametrize("name", ["3d_opt", "relu", "hermite_3", "erf"])
def test_diagonal_of_the_tangent_kernel(x64, name):
  dual = of_name(name)
  slope = float(dual.derivative(1.0))
  for depth in (0, 1, 7):
    exact = depth + 1 if abs(slope - 1) < 1e-9 else (slope ** (depth + 1) - 1) / (slope - 1)
    np.testing.assert_allclose(limits.deep_ntk(jnp.ones(1), depth=depth, dual=dual), exact, rtol=1e-11)
    assert limits.deep_nngp(jnp.ones(1), depth=depth, dual=dual) == 1


@pytest.mark.parametrize("name", ["2d_opt", "3d_opt", "9d_opt", "sine_2.676", "erf"])
def test_koenigs_functional_equation(x64, name):
  dual = of_name(name)
  psi = jax.jit(lambda xi: limits.koenigs(xi, dual))
  xi = jnp.array([1e-3, 0.1, 0.5, 0.9, 0.999])
  slope = dual.derivative(0.0)
  np.testing.assert_allclose(psi(dual.covariance(xi)), slope * psi(xi), rtol=1e-10)
  np.testing.assert_allclose(psi(jnp.array([1e-9])) / 1e-9, 1, rtol=1e-7)
  np.testing.assert_allclose(jax.grad(lambda z: psi(z[None])[0])(jnp.float64(1e-9)), 1, rtol=1e-7)
  assert psi(jnp.zeros(1)) == 0 and jnp.isinf(psi(jnp.ones(1)))
  # Near 1 it grows with the exponent, up to log-periodic oscillation.
  t = 2.0 ** -jnp.arange(20.0, 36.0)
  exponent = limits.singularity_exponent(dual) / 2
  scaled = psi(1 - t) * t**exponent
  assert float(scaled.max() / scaled.min()) < 1.01 + 0.5 * (name == "2d_opt")


def test_koenigs_value(x64):
  psi = limits.koenigs(jnp.float64(0.99), limits.optimal_dual(2))
  np.testing.assert_allclose(0.02 * psi, 1.2012, atol=1e-3)


def test_log_kernels_equal_the_plain_ones(x64):
  xi = jnp.array([0.0, 0.01, 0.3, 0.7, 0.99, 1 - 1e-9, 1.0])
  cases = [np.sqrt(c) for c in ((0, 0.5, 0, 0.5), (0, 0, 0.2, 0.8), (0.2, 0, 0, 0.8))]
  for coefficients in cases:
    dual = duals.hermite_dual(coefficients)
    for depth in (1, 3, 6):
      nngp, ntk = limits.log_deep_kernels(jnp.log(xi), depth=depth, coefficients=coefficients)
      np.testing.assert_allclose(jnp.exp(nngp), limits.deep_nngp(xi, depth=depth, dual=dual), rtol=1e-10)
      np.testing.assert_allclose(jnp.exp(ntk), limits.deep_ntk(xi, depth=depth, dual=dual), rtol=1e-10)
  gradient = jax.grad(
    lambda s: jnp.sum(limits.log_deep_kernels(s, depth=3, coefficients=cases[0])[1], where=jnp.isfinite(s))
  )
  assert jnp.isfinite(gradient(jnp.log(xi[1:]))).all()


def test_taxonomy():
  assert limits.depth_taxonomy(hermite(3)) == "1nn"
  assert limits.depth_taxonomy(limits.optimal_dual(4)) == "singular"
  assert limits.depth_taxonomy(limits.sine_sphere_dual(2.0)) == "singular"
  assert limits.depth_taxonomy(duals.normalize_dual(duals.erf_dual())) == "singular"
  assert limits.depth_taxonomy(duals.normalize_dual(duals.relu_dual())) == "majority"
  assert limits.depth_taxonomy(power(0.2, 0, 0, 0.8)) == "majority"
  assert limits.depth_taxonomy(power(0.5, 0.4, 0.1)) == "degenerate"
  assert limits.depth_taxonomy(hermite(1)) == "degenerate"
  assert jax.jit(lambda x: x + len(limits.depth_taxonomy(hermite(3))))(1) == 4
  with pytest.raises(ValueError, match="dual must be of a normalized"):
    limits.depth_taxonomy(duals.relu_dual())


def test_deep_cubic_network_is_the_nearest_neighbor_rule(x64, points):
  train, test, targets = points
  gram, cross = limits.sphere_gram(jnp.asarray(train)), limits.sphere_gram(jnp.asarray(test), jnp.asarray(train))
  kernel = lambda xi: limits.log_deep_kernels(jnp.log(xi), depth=8, coefficients=[0, 0, 0, 1.0])
  nearest = deep_votes.nearest_neighbor_vote(cross, jnp.asarray(targets))
  for which in (0, 1):
    log_gram, log_cross = kernel(gram)[which], kernel(cross)[which]
    # The diagonals and the rows of the cross kernel may be scaled at will.
    gram_ = jnp.exp(log_gram - log_gram[0, 0])
    got = predictions(gram_, jnp.exp(log_cross - log_cross.max(1, keepdims=True)), jnp.asarray(targets))
    np.testing.assert_array_equal(got, nearest)


@pytest.mark.parametrize(
  "dual, depth",
  [
    (power(0.2, 0, 0, 0.8), 150),
    (duals.normalize_dual(duals.relu_dual()), 1000),
    (power(0.25, 0.5, 0.25), 30_000),
  ],
)
def test_majority_limit(x64, points, dual, depth):
  train, test, targets = (jnp.asarray(x) for x in points)
  gram, cross = limits.sphere_gram(train), limits.sphere_gram(test, train)
  kernel = jax.jit(functools.partial(limits.deep_ntk, depth=depth, dual=dual))
  majority = deep_votes.majority_vote(cross, targets)
  np.testing.assert_array_equal(predictions(kernel(gram), kernel(cross), targets), np.sign(majority))


def test_degenerate_case_needs_a_ridge(x64, points):
  train, test, targets = (jnp.asarray(x) for x in points)
  dual = power(0.5, 0.4, 0.1)
  kernel = lambda xi: limits.deep_ntk(xi, depth=60, dual=dual)
  gram, cross = kernel(limits.sphere_gram(train)), kernel(limits.sphere_gram(test, train))
  np.testing.assert_allclose(gram, 1 / (1 - 0.6), rtol=1e-6)
  assert (predictions(gram, cross, targets, ridge=1e-3) == 1).all()


@pytest.mark.parametrize("name", ["3d_opt", "2d_opt", "erf"])
def test_signs_approach_the_singular_vote(x64, points, name):
  """With growing depth the signs of both kernels' classifiers become those of the vote."""
  train, test, targets = (jnp.asarray(x) for x in points)
  dual = of_name(name)
  gram, cross = limits.sphere_gram(train), limits.sphere_gram(test, train)
  vote = deep_votes.singular_vote(cross, targets, dual)
  sure = np.abs(vote) > 1e-6
  for kernel, depth in ((limits.deep_nngp, 60), (limits.deep_ntk, 100)):
    # NTK off the diagonal falls as L A'^(2L), and its diagonal grows.
    got = predictions(kernel(gram, depth=depth, dual=dual), kernel(cross, depth=depth, dual=dual), targets)
    np.testing.assert_array_equal(got[sure], np.sign(vote)[sure])


def test_permutation_and_rotation_leave_predictions_unchanged(x64, points):
  train, test, targets = (jnp.asarray(x) for x in points)
  dual = limits.optimal_dual(2)

  def predict(train, test, targets):
    kernel = lambda xi: limits.deep_nngp(xi, depth=12, dual=dual)
    coefficients = kernel_regression(kernel(limits.sphere_gram(train)), targets)
    return kernel(limits.sphere_gram(test, train)) @ coefficients

  expected = predict(train, test, targets)
  order = np.random.default_rng(0).permutation(len(train))
  np.testing.assert_allclose(predict(train[order], test, targets[order]), expected, rtol=1e-9, atol=1e-12)
  rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
  np.testing.assert_allclose(predict(train @ rotation, test @ rotation, targets), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.golden
def test_golden_21_wide_deep_kernels(x64, golden):
  file = golden("21-wide_deep_kernels")
  known = {}  # later cases use the inputs of earlier ones
  for case, arrays, _ in file.cases():
    known |= {name: jnp.asarray(value) for name, value in arrays.items() if not name.startswith("out_")}
    wanted = {name: name.removeprefix("out_").split("__") for name in arrays if name.startswith("out_")}
    extra = {"pred": (file.meta.get(f"{case}_depth"),)}

    @jax.jit
    def compute(known, wanted=wanted, extra=extra):  # in one program, which compiles faster
      return {name: GOLDEN[kind][0](known, *rest, *extra.get(kind, ())) for name, (kind, *rest) in wanted.items()}

    for name, got in compute(known).items():
      # The official ReLU tangent kernel does not clip: the card's tolerance.
      rtol = 1e-8 if name.startswith("out_ntk__relu") else GOLDEN[wanted[name][0]][1]
      np.testing.assert_allclose(got, arrays[name], rtol=rtol, atol=1e-14 * (rtol == 1e-10), err_msg=name)


def golden_kernel(kernel, known, activation, depth):
  xi = limits.sphere_gram(known["X"], known["Z"])
  return kernel(xi, depth=int(depth.removeprefix("L")), dual=of_name(activation))


def golden_prediction(known, activation, depth):
  kernel = functools.partial(limits.deep_nngp, depth=depth, dual=of_name(activation))
  coefficients = kernel_regression(kernel(limits.sphere_gram(known["X"])), known["y"][:, 0])
  return kernel(limits.sphere_gram(known["Z"], known["X"])) @ coefficients


def golden_hilbert_sum(known):
  exponent = known["X"].shape[1] - 1
  xi = limits.sphere_gram(known["Z"], known["X"])
  total = jnp.sum((2 - 2 * xi) ** (-exponent / 2), 1)  # ours is the weighted mean
  return total * deep_votes.hilbert_vote(xi, known["y"][:, 0], exponent=exponent)


# kind of array -> (what computes it, relative tolerance)
GOLDEN = {
  "dual": (lambda known, name: of_name(name).covariance(known["xi"]), 1e-10),
  "ddual": (lambda known, name: of_name(name).derivative(known["xi"]), 1e-10),
  "nngp": (functools.partial(golden_kernel, limits.deep_nngp), 1e-10),
  "ntk": (functools.partial(golden_kernel, limits.deep_ntk), 1e-10),
  "pred": (golden_prediction, 1e-8),
  "hilbert_sum": (golden_hilbert_sum, 1e-8),
  "koenigs": (lambda known, name: limits.koenigs(known["xi"], of_name(name)), 1e-12),
  "exponent": (lambda known, name: limits.singularity_exponent(of_name(name)), 1e-12),
}


def test_float32_and_bfloat16_are_finite():
  xi = jnp.array([1.0, -1.0, 0.0, 0.5, 0.99999994])
  for dual in (of_name("relu"), of_name("3d_opt"), of_name("sine_2.676"), hermite(3)):
    for kernel in (limits.deep_nngp, limits.deep_ntk):
      for x in (xi, xi.astype(jnp.bfloat16)):
        value, gradient = jax.value_and_grad(lambda x, k=kernel, d=dual: k(x, depth=6, dual=d).sum())(x)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_unnormalized_activations_are_refused():
  """One check for all that need a dual with value 1 at 1."""
  calls = {
    "value 1 at correlation 1": (
      lambda dual: limits.deep_nngp(jnp.array([1.0, 0.999999]), depth=3, dual=dual),
      lambda dual: limits.deep_ntk(jnp.array([1.0, 0.5]), depth=3, dual=dual),
      lambda dual: limits.koenigs(jnp.array([0.5]), dual),
      lambda dual: deep_votes.singular_vote(jnp.full((1, 2), 0.5), jnp.array([1.0, -1.0]), dual),
      limits.singularity_exponent,
      limits.depth_taxonomy,
    )
  }
  for message, functions in calls.items():
    for function in functions:
      for dual in (duals.relu_dual(), duals.gelu_dual(), duals.erf_dual()):
        with pytest.raises(ValueError, match=message):
          function(dual)
        with pytest.raises(ValueError, match=message):
          jax.jit(lambda _, f=function, d=dual: f(d) and 0)(0)
  gelu = duals.normalize_dual(duals.gelu_dual())  # whose mean is not zero
  for function in (lambda dual: limits.koenigs(jnp.array([0.5]), dual), limits.singularity_exponent):
    for dual in (gelu, hermite(3)):
      with pytest.raises(ValueError, match="dual must be of an activation with zero mean and a linear part"):
        function(dual)
  traced = jax.jit(lambda q: limits.koenigs(jnp.array([0.5]), limits.sine_sphere_dual(q)))(2.676)
  np.testing.assert_allclose(traced, limits.koenigs(jnp.array([0.5]), limits.sine_sphere_dual(2.676)), rtol=1e-5)


def test_depth_may_be_a_numpy_integer():
  xi, dual = jnp.array([0.3, 0.999]), limits.optimal_dual(2)
  for kernel in (limits.deep_nngp, limits.deep_ntk):
    np.testing.assert_array_equal(kernel(xi, depth=np.int64(3), dual=dual), kernel(xi, depth=3, dual=dual))


@pytest.mark.parametrize("name", ["relu", "3d_opt", "sine_2.676", "erf"])
def test_close_points_in_float32(name):
  """With the complement of the inputs kernels are those of float64, also where the correlation is 1 up to rounding."""
  rng = np.random.default_rng(0)
  inputs = np.concatenate([np.ones((20, 3)) + 1e-4 * rng.normal(size=(20, 3)), rng.normal(size=(5, 3))])
  inputs = inputs.astype(np.float32)
  dual = of_name(name)

  @jax.jit
  def kernels(x):
    xi, left = limits.sphere_gram(x), limits.sphere_complement(x)
    return [kernel(xi, depth=6, dual=dual, complement=left) for kernel in (limits.deep_nngp, limits.deep_ntk)]

  got = kernels(jnp.asarray(inputs))
  with jax.enable_x64(True):
    exact = [np.asarray(kernel) for kernel in kernels(inputs.astype(np.float64))]
  for a, b in zip(got, exact, strict=True):
    np.testing.assert_allclose(a, b, rtol=3e-6, atol=2e-6)


def test_mapped_over_pairs(points):
  train = jnp.asarray(points[0], jnp.float32)
  dual = limits.optimal_dual(2)
  xi = limits.sphere_gram(train)
  whole = limits.deep_ntk(xi, depth=5, dual=dual)
  each = jax.jit(jax.vmap(lambda x: limits.deep_ntk(x, depth=5, dual=dual)))(xi.reshape(-1))
  np.testing.assert_allclose(each.reshape(20, 20), whole, rtol=1e-6)


def test_bad_input():
  xi, targets = jnp.ones((2, 3)), jnp.ones(3)
  dual = limits.optimal_dual(2)
  for message, call in (
    ("dimension must be", lambda: limits.optimal_dual(0)),
    ("q must lie in", lambda: limits.sine_sphere_dual(0.0)),
    ("exponent must lie in", lambda: limits.solve_sine_frequency(1.0)),
    ("exponent must lie in", lambda: deep_votes.hilbert_vote(xi, targets, exponent=-1.0)),
    ("correlation must be \\[inputs", lambda: deep_votes.hilbert_vote(xi, jnp.ones(2), exponent=1.0)),
    ("targets must be floating", lambda: deep_votes.majority_vote(xi, jnp.ones(3, int))),
    ("correlation must be floating", lambda: limits.deep_nngp(jnp.ones(2, int), depth=1, dual=dual)),
    ("depth must be", lambda: limits.deep_ntk(xi, depth=1.5, dual=dual)),
    ("dual must be", lambda: limits.koenigs(xi, "relu")),
    ("coefficients must be", lambda: limits.log_deep_kernels(-xi, depth=1, coefficients=[0.0])),
    ("inputs1 must be", lambda: limits.sphere_gram(targets)),
    ("inputs1 must be", lambda: limits.sphere_complement(targets)),
    ("arrays must have equal", lambda: limits.deep_ntk(xi, depth=1, dual=dual, complement=targets)),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def _of_correlations(function, call, **options):
  """`function(correlation, …)`, elementwise."""
  return row(
    function,
    lambda rng: (rng.uniform(-0.9, 0.9, EXAMPLES),),
    call=call,
    extreme=lambda correlation: (np.resize([0.99, -0.99, 0.0], correlation.shape),),
    examples="any",
    wide=True,
    options=options,
  )


ROWS = [
  _of_correlations(
    limits.deep_nngp, lambda x: limits.deep_nngp(x, depth=3, dual=duals.normalize_dual(duals.relu_dual()))
  ),
  _of_correlations(
    limits.deep_ntk, lambda x: limits.deep_ntk(x, depth=3, dual=duals.normalize_dual(duals.relu_dual()))
  ),
  _of_correlations(limits.koenigs, lambda x: limits.koenigs(x, limits.optimal_dual(2), iterations=30)),
  _of_correlations(limits.optimal_dual, lambda x: limits.optimal_dual(2).covariance(x)),
  _of_correlations(limits.sine_sphere_dual, lambda x, q: limits.sine_sphere_dual(q).covariance(x), q=(1.0, 3.0)),
  row(
    limits.singularity_exponent,
    lambda rng: (np.float64(rng.normal()),),
    call=lambda factor, q: factor * limits.singularity_exponent(limits.sine_sphere_dual(q)),
    wide=True,
    options=dict(q=(1.0, 3.0)),
  ),
  row(
    limits.log_deep_kernels,
    lambda rng: (rng.uniform(-2, -0.1, EXAMPLES),),
    call=lambda logs: list(limits.log_deep_kernels(logs, depth=3, coefficients=[0.0, 0.0, 0.0, 1.0])),
    extreme=lambda logs: (np.resize([-EXTREME, -1e-3], logs.shape),),
    wide=True,
  ),
  row(
    limits.sphere_complement,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3))),
    bad=(("inputs", lambda x, y: (x.astype(np.int32), y)), ("features", lambda x, y: (x, y[:, 1:]))),
    wide=True,
  ),
  row(
    limits.sphere_gram,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3))),
    bad=(("inputs", lambda x, y: (x.astype(np.int32), y)), ("features", lambda x, y: (x, y[:, 1:]))),
    wide=True,
  ),
]


EXEMPT = {
  "depth_taxonomy": "names the limit of a fixed activation",
  "solve_sine_frequency": "of a Python number",
}
