"""Derivatives of functions of symmetric matrices, at equal, close and different eigenvalues."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxreg.kernels import gradient_flow as flow
from jaxreg.kernels import hypothesis_space as space
from jaxreg.kernels import self_distillation as distill
from jaxreg.kernels import spectral
from jaxreg.kernels.score_kernels import kernel_descent_path

RNG = np.random.default_rng(0)
Y = np.array([1.0, -1.0, 0.5, 2.0])
ONE, TWO = ((lambda a: a + a.T)(RNG.normal(size=(4, 4))) for _ in range(2))  # directions
U = RNG.normal(size=4)
ROTATION = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
MATRICES = {
  "equal": np.eye(4),
  "pairs": ROTATION @ np.diag([1.0, 1.0, 2.0, 2.0]) @ ROTATION.T,
  "close": np.diag([1.0, 1 + 1e-7, 1 + 1e-4, 3.0]),
  "singular": np.diag([1.0, 1.0, 2.0, 0.0]),
  "different": ROTATION @ np.diag([0.3, 1.0, 1.7, 3.0]) @ ROTATION.T,
}


def after_flow(gram, *, time, ridge):
  matrix = gram + ridge * np.eye(4)
  # The integral of exp(-A s) from 0 to the time, from the exponential of a block matrix: it need not be invertible.
  block = np.block([[-matrix, np.eye(4)], [np.zeros((4, 8))]])
  return scipy.linalg.expm(block * time)[:4, 4:] @ Y


def after_descent(gram, *, steps, learning_rate):
  coefficients = np.zeros(4)
  for _ in range(steps):
    coefficients = coefficients - learning_rate * (gram @ coefficients - Y)
  return coefficients


def after_rounds(gram, *, rounds):
  fitted = Y
  for index in range(rounds):
    weight = 0.2 if index else 1.0
    coefficients = np.linalg.solve(gram + 0.3 * np.eye(4), weight * Y + (1 - weight) * fitted)
    fitted = gram @ coefficients
  return coefficients


def of(function):
  return lambda gram, **options: function(flow.kernel_eigensystem(gram), jnp.asarray(Y, gram.dtype), **options)


KINDS = {
  "flow": of(flow.gradient_flow_coefficients),
  "descent": of(flow.gradient_descent_coefficients),
  "rounds": of(functools.partial(distill.self_distilled_coefficients, ridge=0.3, target_weight=0.2)),
  "path": lambda gram, learning_rate: kernel_descent_path(
    gram, gram, jnp.asarray(Y, gram.dtype), learning_rate=learning_rate, steps=jnp.array([1, 4])
  ).test[1],
}
CASES = {
  "flow": ("flow", dict(time=1.3, ridge=0.0), lambda g: after_flow(g, time=1.3, ridge=0)),
  "flow with a ridge": ("flow", dict(time=1.3, ridge=0.2), lambda g: after_flow(g, time=1.3, ridge=0.2)),
  "limit of the flow": ("flow", dict(time=np.inf, ridge=0.1), lambda g: np.linalg.solve(g + 0.1 * np.eye(4), Y)),
  "descent": ("descent", dict(steps=5.0, learning_rate=0.3), lambda g: after_descent(g, steps=5, learning_rate=0.3)),
  "one step": ("descent", dict(steps=1.0, learning_rate=1.0), lambda g: after_descent(g, steps=1, learning_rate=1.0)),
  "to zero": ("descent", dict(steps=3.0, learning_rate=1.0), lambda g: after_descent(g, steps=3, learning_rate=1.0)),
  "two rounds": ("rounds", dict(rounds=2.0), lambda g: after_rounds(g, rounds=2)),
  "three rounds": ("rounds", dict(rounds=3.0), lambda g: after_rounds(g, rounds=3)),
  "path": ("path", dict(learning_rate=0.3), lambda g: g @ after_descent(g, steps=4, learning_rate=0.3)),
}  # fmt: skip


@functools.cache
def program(kind):
  """First derivatives in forward and reverse mode, second ones in three mixtures of both, contracted with U."""

  def evaluate(gram, options):
    function = lambda g: jnp.vdot(KINDS[kind](g, **options), jnp.asarray(U, g.dtype))
    along = lambda f, direction: lambda g: jax.jvp(f, (g,), (jnp.asarray(direction, g.dtype),))[1]
    inner = lambda f, direction: lambda g: jnp.vdot(jax.grad(f)(g), jnp.asarray(direction, g.dtype))
    first = [mode(function, ONE)(gram) for mode in (along, inner)]
    modes = (along, along), (along, inner), (inner, inner)
    return jnp.stack(first), jnp.stack([outer(mode(function, ONE), TWO)(gram) for outer, mode in modes])

  return jax.jit(evaluate)


def derivatives(case, gram):
  kind, options, _ = CASES[case]
  return program(kind)(gram, {name: jnp.asarray(value, gram.dtype) for name, value in options.items()})


def differences(case, matrix):
  function = lambda g: CASES[case][2](g) @ U
  h = 1e-5
  first = (function(matrix + h * ONE) - function(matrix - h * ONE)) / (2 * h)
  h = 1e-3
  corners = [s * t * function(matrix + h * (s * ONE + t * TWO)) for s in (1, -1) for t in (1, -1)]
  return first, sum(corners) / (4 * h**2)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives(case, matrix, x64):
  first, second = derivatives(case, jnp.asarray(MATRICES[matrix]))
  expected = differences(case, MATRICES[matrix])
  np.testing.assert_allclose(first, [expected[0]] * 2, rtol=1e-7, atol=1e-8)
  np.testing.assert_allclose(second, [expected[1]] * 3, rtol=2e-3, atol=2e-4)  # differences are not better


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_in_float32(case, matrix):
  narrow = derivatives(case, jnp.asarray(MATRICES[matrix], jnp.float32))
  with jax.enable_x64(True):
    wide = derivatives(case, jnp.asarray(np.float32(MATRICES[matrix]), jnp.float64))
  np.testing.assert_allclose(narrow[0], wide[0], rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(narrow[1], wide[1], rtol=2e-3, atol=2e-3)


def test_derivatives_in_targets_times_and_ridges(x64):
  """Mixed with the matrix, whose eigenvalues are equal."""

  def total(gram, y, time, ridge):
    c = flow.gradient_flow_coefficients(flow.kernel_eigensystem(gram), y, time=time, ridge=ridge)
    return jnp.vdot(c, jnp.asarray(U))

  point = (jnp.eye(4), jnp.asarray(Y), jnp.asarray(1.3), jnp.asarray(0.2))
  near = (jnp.diag(jnp.array([1.0, 1 + 1e-3, 1 + 2e-3, 1 - 1e-3])), *point[1:])
  hessian = jax.jit(jax.hessian(total, argnums=(0, 1, 2, 3)))
  for row, expected in zip(hessian(*point), hessian(*near), strict=True):
    for a, b in zip(row, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-2, atol=5e-3)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.hessian(total))(*point)))


def test_gradients_without_the_matrix_are_those_of_values_and_vectors(x64):
  gram = jnp.asarray(MATRICES["different"])
  system = flow.kernel_eigensystem(gram)
  total = lambda s: jnp.vdot(flow.gradient_flow_coefficients(s, jnp.asarray(Y), time=1.3), jnp.asarray(U))
  plain = jax.grad(lambda g: total(flow.kernel_eigensystem(g)._replace(gram=None)))(gram)
  exact = jax.grad(lambda g: total(flow.kernel_eigensystem(g)))(gram)
  np.testing.assert_allclose(plain, exact, rtol=1e-9, atol=1e-12)
  assert total(system) == total(system._replace(gram=None))


HYPOTHESES = {
  "errors": lambda posterior, targets: jnp.sum(
    space.hypothesis_errors(posterior, targets, jnp.asarray(np.random.default_rng(1).normal(size=targets.shape + (3,))))
  ),
  "moments": lambda posterior, targets: sum(space.error_moments(space.error_law(posterior, targets))),
  "saddlepoint": lambda posterior, targets: space.saddlepoint_inductive_bias(space.error_law(posterior, targets), 0.3),
}


@pytest.mark.parametrize("matrix", ["equal", "pairs", "different"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("case", HYPOTHESES)
def test_laws_of_errors_at_equal_eigenvalues(case, outputs, matrix, x64):
  means = jnp.asarray(np.random.default_rng(outputs).normal(size=(4, outputs)))
  function = jax.jit(lambda c, means: HYPOTHESES[case](space.HypothesisPosterior(means, c), 0 * means))
  covariance, h = jnp.asarray(MATRICES[matrix]), 1e-5
  to_covariance, to_means = jax.grad(function, (0, 1))(covariance, means)
  expected = (function(covariance + h * ONE, means) - function(covariance - h * ONE, means)) / (2 * h)
  np.testing.assert_allclose(jnp.vdot(to_covariance, ONE), expected, rtol=1e-7)
  expected = (function(covariance, means + h) - function(covariance, means - h)) / (2 * h)
  np.testing.assert_allclose(jnp.sum(to_means), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 1.0])
def test_divided_differences_are_accurate_in_float32(gap):
  values = np.float32([0.5, 0.5 + gap])
  for function, exact in (
    (lambda x: flow._flow_filter(x, 0.0, jnp.float32(3.0)), lambda x: -math.expm1(-3 * x) / x),
    (jnp.exp, math.exp),
    (lambda x: 1 / x, lambda x: 1 / x),
  ):
    got = spectral.divided_differences(function, jnp.asarray(values))[0, 1]
    a, b = float(values[0]), max(float(values[1]), 0.5 + 1e-6)
    np.testing.assert_allclose(got, (exact(b) - exact(a)) / (b - a), rtol=1e-5)


def test_whole_powers_have_derivatives_at_zero():
  for exponent, expected in ((0.0, [1, 0, 0]), (1.0, [0, 1, 0]), (2.0, [0, 0, 2]), (3.0, [0, 0, 0])):
    power = lambda base, exponent=exponent: spectral.whole_power(base, jnp.float32(exponent))
    assert [float(f(0.0)) for f in (power, jax.grad(power), jax.grad(jax.grad(power)))] == expected
  assert spectral.whole_power(jnp.float32(-0.5), jnp.float32(3)) == -0.125
  for base, complement in ((0.999, 0.001), (0.3, 0.7), (-0.5, 1.5)):
    power, rest = spectral.powers(jnp.float32(base), jnp.float32(complement), jnp.float32(3))
    np.testing.assert_allclose([power, rest], [base**3, 1 - base**3], rtol=1e-6)


def test_the_rotation_of_equal_eigenvectors(x64):
  columns = jnp.asarray(RNG.normal(size=(4, 2)))
  values, vectors = spectral.aligned_eigh(jnp.asarray(MATRICES["pairs"]), columns)
  np.testing.assert_allclose(values, [1, 1, 2, 2], rtol=1e-12)
  np.testing.assert_allclose(vectors @ jnp.diag(values) @ vectors.T, MATRICES["pairs"], atol=1e-12)
  inside = vectors.T @ columns
  products = inside @ inside.T
  assert abs(products[0, 1]) < 1e-12 and abs(products[2, 3]) < 1e-12
