"""Gradient flow and descent under a fixed kernel, kernel regression and classification."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxreg.kernels import gradient_flow as flow
from jaxreg.kernels.dual_activations import relu_dual
from jaxreg.kernels.infinite_width import fully_connected
from tests.conformance import EXAMPLES, row, unchanged

FEATURES = np.random.default_rng(0).normal(size=(6, 4))
TARGETS = np.random.default_rng(1).normal(size=(6, 2))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("features", [FEATURES, FEATURES.T])
def test_flow_is_the_solution_of_the_differential_equation(x64, features, ridge):
  """In the weights of a linear model, whose kernel is singular in the first case."""
  inputs, targets = features[:, :4], TARGETS[: len(features), 0]
  eigen = flow.kernel_eigensystem(jnp.asarray(inputs @ inputs.T))
  field = lambda _, theta: inputs.T @ (targets - inputs @ theta) - ridge * theta
  for time in (0.0, 0.1, 2.0):
    exact = integrate.solve_ivp(field, (0, time), np.zeros(inputs.shape[1]), rtol=1e-10, atol=1e-12).y[:, -1]
    got = inputs.T @ np.asarray(flow.gradient_flow_coefficients(eigen, jnp.asarray(targets), time=time, ridge=ridge))
    np.testing.assert_allclose(got, exact, atol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("rate", [1e-4, 0.05, 0.1])
def test_descent_is_descent(x64, ridge, rate):
  eigen = flow.kernel_eigensystem(jnp.asarray(FEATURES @ FEATURES.T))
  theta = np.zeros((4, 2))
  for step in range(6):
    got = flow.gradient_descent_coefficients(eigen, jnp.asarray(TARGETS), steps=step, learning_rate=rate, ridge=ridge)
    np.testing.assert_allclose(FEATURES.T @ got, theta, rtol=1e-9, atol=1e-12)
    theta = theta + rate * (FEATURES.T @ (TARGETS - FEATURES @ theta) - ridge * theta)


def test_infinite_time(x64):
  gram = jnp.asarray(FEATURES @ FEATURES.T)  # of rank 4
  eigen, targets = flow.kernel_eigensystem(gram), jnp.asarray(TARGETS)
  least_norm = np.linalg.lstsq(FEATURES, TARGETS, rcond=None)[0]
  for call in (
    lambda **options: flow.gradient_flow_coefficients(eigen, targets, time=jnp.inf, **options),
    lambda **options: flow.gradient_descent_coefficients(eigen, targets, steps=jnp.inf, learning_rate=0.01, **options),
  ):
    np.testing.assert_allclose(FEATURES.T @ call(), least_norm, rtol=1e-9)
    np.testing.assert_allclose(call(ridge=0.2), flow.kernel_regression(gram, targets, ridge=0.2), rtol=1e-9)
  # Coefficients without effect grow with time, and so does the rounding of their product with the inputs.
  late = flow.gradient_flow_coefficients(eigen, targets, time=1e6)
  np.testing.assert_allclose(FEATURES.T @ late, least_norm, rtol=1e-7)


def test_small_learning_rates_approach_the_flow(x64):
  eigen = flow.kernel_eigensystem(jnp.asarray(FEATURES @ FEATURES.T))
  exact = flow.gradient_flow_coefficients(eigen, jnp.asarray(TARGETS), time=0.7)
  near = flow.gradient_descent_coefficients(eigen, jnp.asarray(TARGETS), steps=7e6, learning_rate=1e-7)
  np.testing.assert_allclose(near, exact, rtol=1e-4)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**31), time=st.floats(0, 10))
def test_training_error_falls(seed, time):
  rng = np.random.default_rng(seed)
  features, targets = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=6).astype(np.float32)
  gram = jnp.asarray(features @ features.T)
  eigen = flow.kernel_eigensystem(gram)
  error = lambda t: float(
    jnp.sum((gram @ flow.gradient_flow_coefficients(eigen, jnp.asarray(targets), time=t) - targets) ** 2)
  )
  assert error(time + 1) <= error(time) * (1 + 1e-3) + 1e-4


def test_under_transformations():
  gram, targets = jnp.asarray(FEATURES @ FEATURES.T, jnp.float32), jnp.asarray(TARGETS, jnp.float32)
  eigen = flow.kernel_eigensystem(gram)
  times = jnp.array([0.0, 0.5, jnp.inf])
  mapped = jax.jit(jax.vmap(lambda t: flow.gradient_flow_coefficients(eigen, targets, time=t)))(times)
  for index, time in enumerate(times.tolist()):
    np.testing.assert_allclose(
      mapped[index], flow.gradient_flow_coefficients(eigen, targets, time=time), rtol=1e-4, atol=1e-5
    )
  for time in times.tolist():
    gradient = jax.grad(
      lambda t, r: flow.gradient_flow_coefficients(eigen, targets, time=t, ridge=r).sum(), argnums=(0, 1)
    )
    assert all(jnp.isfinite(g) for g in gradient(time, 0.1))
  assert flow.kernel_regression(gram.astype(jnp.bfloat16), targets, ridge=1.0).dtype == jnp.float32


def test_classification_heads(x64):
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(30, 2))
  labels = jnp.asarray((np.arctan2(inputs[:, 1], inputs[:, 0]) // 2.1 + 2).astype(np.int32) % 3)
  distance = np.sum((inputs[:, None] - inputs) ** 2, -1)
  gram = jnp.asarray(np.exp(-distance * 4))
  targets = flow.class_targets(labels, num_classes=3, dtype=jnp.float64)
  np.testing.assert_allclose(targets.sum(1), 0, atol=1e-12)
  coefficients = flow.kernel_regression(gram, targets)
  np.testing.assert_array_equal(flow.kernel_classify(gram, coefficients), labels)  # it interpolates
  signs = jnp.where(labels == 0, 1.0, -1.0)
  two = flow.class_targets((labels == 0).astype(jnp.int32), num_classes=2, dtype=jnp.float64)
  cross = gram[:7] * 3
  by_sign = flow.kernel_classify(cross, flow.kernel_regression(gram, signs, ridge=0.1))
  by_class = flow.kernel_classify(cross, flow.kernel_regression(gram, two, ridge=0.1))
  np.testing.assert_array_equal(by_sign, 2 * by_class - 1)


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1e-3, 1e-2, 1e-1])
def test_predictions_on_a_line_in_float32(ridge):
  """A sine at 200 points by a ReLU network, relative to the mean diagonal: off by 8.7 before at a ridge of 1e-4."""
  line, others = np.linspace(-10 * np.pi, 10 * np.pi, 200)[:, None], np.linspace(-30, 30, 57)[:, None]
  options = {"depth": 2, "dual": relu_dual(), "weight_variance": 2.25, "bias_variance": 0.0025}

  @jax.jit
  def predict(line, targets, others):
    gram, cross = fully_connected(line, **options).ntk, fully_connected(others, line, **options).ntk
    absolute = ridge * jnp.trace(gram) / len(targets)
    late = {"time": jnp.inf, "ridge": absolute}
    flow_ = flow.gradient_flow_coefficients(flow.kernel_eigensystem(gram), targets, **late)
    return cross @ flow.kernel_regression(gram, targets, ridge=absolute), cross @ flow_

  arrays = [np.asarray(x, np.float32) for x in (line, np.sin(line[:, 0]), others)]
  single = predict(*map(jnp.asarray, arrays))
  with jax.enable_x64(True):
    exact = [np.asarray(x) for x in predict(*(x.astype(np.float64) for x in arrays))]
  # Without a ridge the smallest eigenvalues count, whose rounding depends on how the program was compiled: errors of
  # 0.02 to 0.07 were seen.
  np.testing.assert_allclose(single, exact, atol=0.05 if ridge else 0.2)


def test_small_eigenvalues_keep_their_digits():
  """Of a definite matrix, far below the rounding of the largest one; of a singular one what is rounding is left out."""
  rng = np.random.default_rng(0)
  scale = np.geomspace(1, 1e-4, 30)
  root = np.linalg.qr(rng.normal(size=(30, 30)))[0] * 1e-3 + np.eye(30)
  gram = (scale[:, None] * (root @ root.T) * scale).astype(np.float32)
  exact = np.linalg.eigvalsh(gram.astype(np.float64))
  system = jax.jit(flow.kernel_eigensystem)(jnp.asarray(gram))
  np.testing.assert_allclose(system.values, exact, rtol=2e-2)
  np.testing.assert_allclose(jnp.linalg.norm(system.vectors, axis=0), 1, rtol=1e-5)
  rebuilt = (system.vectors * system.values) @ system.vectors.T
  np.testing.assert_allclose(rebuilt, gram, atol=1e-6)
  twice = jnp.asarray(np.tile(gram[:10, :10], (2, 2)))  # every input twice
  targets = jnp.asarray(np.tile(rng.normal(size=10), 2), jnp.float32)
  fit = twice @ flow.gradient_flow_coefficients(flow.kernel_eigensystem(twice), targets, time=jnp.inf)
  assert jnp.isfinite(fit).all()


def test_bad_input():
  gram = jnp.eye(3)
  eigen = flow.kernel_eigensystem(gram)
  for message, call in (
    ("gram must be a square", lambda: flow.kernel_eigensystem(jnp.ones((2, 3)))),
    ("gram must be floating", lambda: flow.kernel_regression(jnp.ones((2, 2), int), jnp.ones(2))),
    ("residuals must be \\[3\\]", lambda: flow.gradient_flow_coefficients(eigen, jnp.ones(2), time=1.0)),
    ("time must lie in", lambda: flow.gradient_flow_coefficients(eigen, jnp.ones(3), time=-1.0)),
    ("ridge must lie in", lambda: flow.gradient_flow_coefficients(eigen, jnp.ones(3), time=1.0, ridge=-1.0)),
    ("steps must lie in", lambda: flow.gradient_descent_coefficients(eigen, jnp.ones(3), steps=-1, learning_rate=0.1)),
    (
      "learning_rate must",
      lambda: flow.gradient_descent_coefficients(eigen, jnp.ones(3), steps=1, learning_rate=float("nan")),
    ),
    ("targets must be \\[3\\]", lambda: flow.kernel_regression(gram, jnp.ones((2, 3)))),
    ("num_classes must be", lambda: flow.class_targets(jnp.zeros(3, int), num_classes=1)),
    ("labels must be integer", lambda: flow.class_targets(jnp.zeros(3), num_classes=2)),
    ("cross must be", lambda: flow.kernel_classify(jnp.ones(3), jnp.ones(3))),
    ("coefficients must be", lambda: flow.kernel_classify(gram, jnp.ones(2))),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def _residuals(rng):
  factor = rng.normal(size=(6, 6))
  return rng.normal(size=6), factor @ factor.T + np.eye(6)


def _coefficients(function, **options):
  """`function(eigensystem, residuals, …)` as a function of the residuals."""
  call = lambda residuals, gram, **options: function(flow.kernel_eigensystem(gram), residuals, **options)
  bad = (("residuals", lambda residuals, gram: (residuals[1:], gram)),)
  return row(function, _residuals, call=call, bad=bad, wide=True, options=options)


ROWS = [
  _coefficients(flow.gradient_descent_coefficients, steps=(1.0, 9.0), learning_rate=(0.001, 0.01), ridge=(0.0, 1.0)),
  _coefficients(flow.gradient_flow_coefficients, time=(0.1, 2.0), ridge=(0.0, 1.0)),
  row(
    flow.kernel_regression,
    _residuals,
    call=lambda targets, gram, **options: flow.kernel_regression(gram, targets, **options),
    bad=(
      ("gram", lambda targets, gram: (targets, gram[1:])),
      ("targets", lambda targets, gram: (targets[1:], gram)),
    ),
    wide=True,
    options=dict(ridge=(0.0, 1.0)),
  ),
  row(
    flow.kernel_classify,
    lambda rng: (rng.normal(size=(4, 6)), rng.normal(size=(6, 3))),
    bad=(("coefficients", lambda cross, coefficients: (cross, coefficients[1:])),),
    differentiable=False,
    wide=True,
  ),
  row(
    flow.class_targets,
    lambda rng: (rng.integers(0, 3, EXAMPLES).astype(np.int32),),
    extreme=unchanged,
    bad=(("labels", lambda labels: (labels * 1.0,)),),
    differentiable=False,
    wide=True,
    options=dict(num_classes=3),
  ),
]


EXEMPT = {
  "Eigensystem": "result of kernel_eigensystem",
  "kernel_eigensystem": "eigenvectors, up to their sign; the rows of the coefficients carry it",
}
