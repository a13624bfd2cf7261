"""Self-distillation of kernel ridge regression: recursion, closed forms, limit, best weight; the driver."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxreg.kernels import self_distillation as distill
from jaxreg.kernels.gradient_flow import kernel_eigensystem, kernel_regression
from jaxreg.kernels.rbf import rbf_kernel
from tests.conformance import BAD_SAME_SHAPE, EXAMPLES, EXTREME, draw_logits, row, unchanged

regression = jax.jit(distill.self_distilled_regression, static_argnames="rounds")
spectral = jax.jit(distill.self_distilled_coefficients)
ridge_regression = jax.jit(kernel_regression)
optimal_target_weight = jax.jit(distill.optimal_target_weight)
distillation_filter = jax.jit(distill.distillation_filter)
# The toy problem: a noisy sine at eleven points, errors against the sine at 101 points, rounds 1 to 6 and the limit.
TOY = {
  0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
  0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
  0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250),
}


def problem(n=50, outputs=2, seed=0):
  rng = np.random.default_rng(seed)
  gram = rbf_kernel(jnp.asarray(rng.normal(size=(n, 2))), jnp.asarray(rng.normal(size=(n, 2))), gamma=1.0)
  return gram @ gram.T / 10, jnp.asarray(rng.normal(size=(n, outputs)))


def file_of(golden):
  file = golden("14-self_distillation")
  file.meta.pop("cases", None)  # a list of texts, in which is nothing that the arrays do not have
  return file


@pytest.mark.golden
def test_golden_14_self_distillation(golden, x64):
  names = []
  for name, arrays, _ in file_of(golden).cases("case"):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9, err_msg=name)
    x, targets, at = jnp.asarray(arrays["X"]), jnp.asarray(arrays["Y"]), jnp.asarray(arrays["x_eval"])[:, None]
    hyperparameters = dict(ridge=jnp.asarray(arrays["lambd"]), target_weight=jnp.asarray(arrays["alpha"]))
    count = int(arrays["steps"])
    gram, cross = (rbf_kernel(points, x, gamma=arrays["gamma"]) for points in (x, at))
    close(gram, arrays["K"])
    rounds = regression(gram, targets, rounds=count, **hyperparameters)
    close(rounds.fitted, arrays["out_train_targets"][1:])
    predictions = cross @ rounds.coefficients
    close(predictions, arrays["out_eval_preds"])
    eigen = kernel_eigensystem(gram)
    close(eigen.values[::-1], arrays["eigvals"])
    filters = _filters(arrays["eigvals"], **hyperparameters, rounds=np.array([*range(1, count + 1), np.inf]))
    close(filters[:-1], arrays["out_B_diag"])
    close(filters[-1], arrays["out_B_limit_diag"])
    limit = cross @ spectral(eigen, targets, rounds=jnp.inf, **hyperparameters)
    close(limit, arrays["out_eval_limit"])
    if "out_mse_vs_sine" in arrays:
      errors = (jnp.concatenate([predictions, limit[None]]) - jnp.sin(2 * jnp.pi * at)) ** 2
      close(errors.mean((1, 2)), arrays["out_mse_vs_sine"])
  assert names


@pytest.mark.golden
@pytest.mark.parametrize("weight", TOY)
def test_golden_14_self_distillation_toy_table(golden, x64, weight):
  """The inputs are the golden file's, the table is the card's; only for the file that it was computed from."""
  arrays = next(file_of(golden).cases("case"))[1]
  x, targets = jnp.asarray(arrays["X"]), jnp.asarray(arrays["Y"])
  if "out_mse_vs_sine" not in arrays or round(float(arrays["out_mse_vs_sine"][0]), 5) != TOY[weight][0]:
    pytest.skip("another problem")
  at = jnp.asarray(arrays["x_eval"])[:, None]
  gram, cross = (rbf_kernel(points, x, gamma=80.0) for points in (x, at))
  coefficients = regression(gram, targets, ridge=0.2, target_weight=weight, rounds=6)[1]
  limit = spectral(kernel_eigensystem(gram), targets, ridge=0.2, target_weight=weight, rounds=jnp.inf)
  errors = (cross @ jnp.concatenate([coefficients, limit[None]]) - jnp.sin(2 * jnp.pi * at)) ** 2
  np.testing.assert_allclose(errors.mean((1, 2)), TOY[weight], atol=5e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_recursion_polynomial_and_spectral_form_agree(x64, weight):
  gram, targets = problem()
  rounds = regression(gram, targets, ridge=0.2, target_weight=weight, rounds=10)
  smoother = np.asarray(gram @ jnp.linalg.inv(gram + 0.2 * jnp.eye(50)))
  power = lambda exponent: np.linalg.matrix_power(smoother, exponent)
  eigen = kernel_eigensystem(gram)
  for t in range(1, 11):
    polynomial = weight * sum(((1 - weight) ** i * power(i) for i in range(t - 1)), np.zeros_like(smoother))
    polynomial = (polynomial + (1 - weight) ** (t - 1) * power(t - 1)) @ smoother @ targets
    np.testing.assert_allclose(rounds.fitted[t - 1], polynomial, atol=1e-10)
    np.testing.assert_allclose(gram @ rounds.coefficients[t - 1], polynomial, atol=1e-10)
    coefficients = spectral(eigen, targets, ridge=0.2, target_weight=weight, rounds=t)
    np.testing.assert_allclose(coefficients, rounds.coefficients[t - 1], atol=1e-10)
    kept = distillation_filter(eigen.values, ridge=0.2, target_weight=weight, rounds=t)
    np.testing.assert_allclose(eigen.vectors * kept @ eigen.vectors.T @ targets, polynomial, atol=1e-10)


def test_without_a_teacher_and_without_ground_truth(x64):
  gram, targets = problem()
  ridge = gram @ ridge_regression(gram, targets, ridge=0.2)
  rounds = regression(gram, targets, ridge=0.2, target_weight=1.0, rounds=6).fitted
  np.testing.assert_allclose(rounds, np.broadcast_to(ridge, rounds.shape), atol=1e-12)
  rounds = regression(gram, targets, ridge=0.2, target_weight=0.0, rounds=6).fitted
  smoother = np.asarray(gram @ jnp.linalg.inv(gram + 0.2 * jnp.eye(50)))
  for t in range(1, 7):
    np.testing.assert_allclose(rounds[t - 1], np.linalg.matrix_power(smoother, t) @ targets, atol=1e-11)


def test_the_limit_is_amplified_ridge_reached_geometrically(x64):
  gram, targets = problem()
  amplified = distill.effective_ridge(0.2, 0.3)
  limit = gram @ ridge_regression(gram, targets, ridge=amplified)
  fitted = regression(gram, targets, ridge=0.2, target_weight=0.3, rounds=200).fitted
  np.testing.assert_allclose(fitted[-1], limit, atol=1e-8)
  values = kernel_eigensystem(gram).values
  kept = distill.distillation_filter(values, ridge=0.2, target_weight=0.3, rounds=jnp.inf)
  np.testing.assert_allclose(kept, values / (values + amplified), rtol=1e-14, atol=0)
  errors = jnp.linalg.norm((fitted - limit).reshape(200, -1), axis=1)[:12]
  assert (errors[1:] / errors[:-1]).max() <= 0.7 * values[-1] / (values[-1] + 0.2) + 1e-9
  assert distill.effective_ridge(0.2, 0.0) == jnp.inf


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), ridge=st.floats(-3, 1).map(lambda e: 10**e), weight=st.floats(0, 1))
def test_filters_fall_and_never_sharpen_less_than_the_first(seed, ridge, weight):
  with jax.enable_x64(True):
    values = 10 ** np.sort(np.random.default_rng(seed).uniform(-4, 2, 8))
    b = np.asarray(_filters(values, ridge=ridge, target_weight=weight, rounds=np.arange(1.0, 13.0)))
    ratio = b[:, 1:] / b[:, :-1]
  live = b[:, :-1] > 1e-280  # ratios of what has underflown say nothing
  assert (np.diff(b, axis=0) <= 1e-12 * b[:-1]).all()
  assert (b >= 0).all() and (b[0] < 1).all()
  assert (ratio >= ratio[0] * (1 - 1e-9))[live].all()
  np.testing.assert_allclose(b[0], values / (values + ridge), rtol=1e-12)
  if weight == 0:
    assert (np.diff(ratio, axis=0) > 0)[live[1:]].all()


@jax.jit
def _filters(values, *, ridge, target_weight, rounds):
  call = functools.partial(distill.distillation_filter, values, ridge=ridge, target_weight=target_weight)
  return jax.vmap(lambda t: call(rounds=t))(rounds)


def test_one_weight_per_round(x64):
  gram, targets = problem(9)
  weights = [0.9, 0.2, -0.3, 1.5]  # the first without effect, the last two beyond [0, 1]
  fitted = distill.self_distilled_regression(gram, targets, ridge=0.2, target_weight=weights, rounds=4).fitted
  previous = np.asarray(targets)
  for weight, got in zip(weights, fitted):
    previous = gram @ ridge_regression(gram, weight * targets + (1 - weight) * previous, ridge=0.2)
    np.testing.assert_allclose(got, previous, atol=1e-12)


def validation(seed=0):
  rng = np.random.default_rng(seed)
  x, at = jnp.asarray(rng.uniform(size=(30, 1))), jnp.asarray(rng.uniform(size=(40, 1)))
  noisy = jnp.sin(6 * x) + jnp.asarray(rng.normal(size=(30, 1)))
  return rbf_kernel(x, x, gamma=50.0), rbf_kernel(at, x, gamma=50.0), noisy, jnp.sin(6 * at)


def kernel_round(gram, targets, ridge, index, teacher, weight):
  """Fitted values and coefficients of one round, for the driver."""
  mixed = targets if teacher is None else weight * targets + (1 - weight) * teacher[0]
  coefficients = ridge_regression(gram, mixed, ridge=ridge)
  return gram @ coefficients, coefficients


def best_weight(gram, cross, targets, truth, ridge, models, **bounds):
  first, distilled = models[0][1], kernel_round(gram, targets, ridge, 0, models[-1], 0.0)[1]
  return optimal_target_weight(cross @ first, cross @ distilled, truth, **bounds)


def test_best_weight_is_stationary_and_beats_a_grid(x64):
  gram, cross, targets, truth = validation()
  models = [kernel_round(gram, targets, 0.1, 0, None, 1.0)]
  error = jax.jit(lambda w: jnp.mean((cross @ kernel_round(gram, targets, 0.1, 1, models[0], w)[1] - truth) ** 2))
  free = best_weight(gram, cross, targets, truth, 0.1, models, low=-jnp.inf, high=jnp.inf)
  np.testing.assert_allclose(jax.grad(error)(free), 0, atol=1e-8)
  clipped = best_weight(gram, cross, targets, truth, 0.1, models)
  assert clipped == np.clip(free, 0, 1)
  assert error(clipped) <= jax.vmap(error)(jnp.linspace(0, 1, 101)).min() + 1e-15


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_best_weights_are_never_worse_than_no_teacher(x64, ridge):
  gram, cross, targets, truth = validation(1)
  models = distill.iterated_distillation(
    functools.partial(kernel_round, gram, targets, ridge),
    rounds=5,
    target_weight=functools.partial(best_weight, gram, cross, targets, truth, ridge),
  )
  errors = np.array([jnp.mean((cross @ coefficients - truth) ** 2) for _, coefficients in models])
  assert (errors <= errors[0] + 1e-12).all()


def test_best_weight_of_equal_predictions_and_of_small_differences():
  ones = jnp.ones((2, 3))
  assert distill.optimal_target_weight(ones, ones, 0 * ones) == 1
  assert distill.optimal_target_weight(ones, ones, 0 * ones, high=0.5) == 0.5
  small = 1e-30 * ones
  np.testing.assert_allclose(distill.optimal_target_weight(small, 0 * ones, 0.25 * small), 0.25, rtol=1e-6)
  gradient = jax.grad(lambda g: distill.optimal_target_weight(g, ones, 2 * ones))(ones)
  assert jnp.isfinite(gradient).all()


def test_driver_equals_the_recursion(x64):
  gram, targets = problem(9)
  train = functools.partial(kernel_round, gram, targets, 0.2)
  for weights in (0.4, [1.0, 0.3, 0.0, 0.7]):
    expected = distill.self_distilled_regression(gram, targets, ridge=0.2, target_weight=weights, rounds=4)
    models = distill.iterated_distillation(train, rounds=4, target_weight=weights)
    np.testing.assert_allclose([fitted for fitted, _ in models], expected.fitted, atol=1e-12)
    np.testing.assert_allclose([coefficients for _, coefficients in models], expected.coefficients, atol=1e-11)


def test_singular_gram_in_float32():
  rng = np.random.default_rng(0)
  x = np.repeat(rng.normal(size=(10, 2)), 3, axis=0).astype(np.float32)
  gram, targets = rbf_kernel(x, x, gamma=1.0), jnp.asarray(rng.normal(size=30), jnp.float32)
  exact = np.asarray(gram, np.float64)
  exact = np.linalg.matrix_power(exact @ np.linalg.inv(exact + 0.05 * np.eye(30)), 3) @ np.asarray(targets, np.float64)

  def third(gram, ridge):
    return regression(gram, targets, ridge=ridge, target_weight=0.0, rounds=3).fitted[-1]

  fitted = third(gram, 0.05)
  np.testing.assert_allclose(fitted, exact, atol=1e-3)
  gradients = jax.grad(lambda gram, ridge: third(gram, ridge).sum(), (0, 1))(gram, 0.05)
  assert all(jnp.isfinite(gradient).all() for gradient in gradients)
  closed = spectral(kernel_eigensystem(gram), targets, ridge=0.05, target_weight=0.0, rounds=3)
  np.testing.assert_allclose(gram @ closed, exact, atol=1e-3)


def test_differentiable_in_kernel_ridge_and_weight(x64):
  gram, targets = problem(6)

  def value(scale, ridge, weight):
    fitted = distill.self_distilled_regression(scale * gram, targets, ridge=ridge, target_weight=weight, rounds=4)[0]
    return jnp.sum(fitted[-1] ** 2)

  check_grads(value, (1.0, 0.3, 0.4), order=1, modes=["rev"])


@pytest.mark.parametrize("rounds", [1, 2, 5, jnp.inf])
def test_filter_gradients_are_right_at_the_ends(x64, rounds):
  """At weights 0 and 1, where one-sided differences are taken, and at vanishing and huge eigenvalues."""
  values = jnp.array([0.0, 1e-30, 1e-3, 1.0, 1e4])
  call = lambda w, values=values: distillation_filter(values, ridge=0.5, target_weight=w, rounds=rounds)
  for weight, step in ((0.0, 1e-6), (0.4, 1e-6), (1.0, -1e-6)):
    if weight == 0 and rounds == jnp.inf:
      continue  # the limit is not smooth there: it is d alpha / (alpha d + ridge)
    slope = jax.jvp(call, (weight,), (1.0,))[1]
    numeric = (call(weight + step) - call(weight)) / step
    np.testing.assert_allclose(slope, numeric, atol=1e-9, rtol=5e-2 if weight == 0 else 1e-4)
  for weight in (0.0, 0.4, 1.0):
    slopes = jax.grad(lambda v, weight=weight: call(weight, v).sum())(values)
    assert jnp.isfinite(slopes).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_filter_is_finite_in_narrow_types(dtype):
  values = jnp.array([0.0, 1e-38, 1e-10, 1.0, 1e4], dtype)
  for rounds in (1, 3, jnp.inf):
    for weight in (0.0, 0.5, 1.0):
      call = lambda v, w, t=rounds: distill.distillation_filter(v, ridge=1e-2, target_weight=w, rounds=t)
      both = jax.jit(lambda *a, call=call: (call(*a), jax.grad(lambda *a: call(*a).astype(float).sum(), (0, 1))(*a)))
      result, gradients = both(values, weight)
      assert result.dtype == dtype and jnp.isfinite(result).all()
      assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_ridges_and_weights_are_mapped(x64):
  gram, targets = problem(6)
  ridges, weights = jnp.array([0.1, 1.0, 3.0]), jnp.array([0.0, 0.5, 1.0])
  call = lambda r, w: regression(gram, targets, ridge=r, target_weight=w, rounds=3).fitted
  mapped = jax.vmap(call)(ridges, weights)
  for index in range(3):
    np.testing.assert_allclose(mapped[index], call(ridges[index], weights[index]), atol=1e-12)


def test_bad_input():
  gram, targets = jnp.eye(3), jnp.ones(3)
  options = dict(ridge=0.1, target_weight=0.5, rounds=2)
  for changes, message in (
    (dict(ridge=0.0), "ridge must lie in"),
    (dict(ridge=float("nan")), "ridge must lie in"),
    (dict(rounds=0), "rounds must be at least 1"),
    (dict(target_weight=[0.1, 0.2, 0.3]), "one number per round"),
    (dict(target_weight=float("nan")), "target_weight must lie in"),
  ):
    with pytest.raises(ValueError, match=message):
      distill.self_distilled_regression(gram, targets, **{**options, **changes})
  with pytest.raises(ValueError, match="gram must be a square"):
    distill.self_distilled_regression(gram[:2], targets, **options)
  with pytest.raises(ValueError, match="targets must be"):
    distill.self_distilled_regression(gram, targets[:2], **options)
  for function in (distill.distillation_filter, distill.coefficient_filter):
    for changes, message in ((dict(rounds=0), "rounds"), (dict(target_weight=1.1), "target_weight"), ({}, "eigenv")):
      with pytest.raises(ValueError, match=message):
        function(targets if changes else jnp.ones(3, int), **{**options, **changes})
  with pytest.raises(ValueError, match="ridge"):
    distill.effective_ridge(-1.0, 0.5)
  with pytest.raises(ValueError, match="equal shapes"):
    distill.optimal_target_weight(targets, targets, targets[:2])
  with pytest.raises(ValueError, match="one number per round, expected 3, got 2"):
    distill.iterated_distillation(lambda *_: 0, rounds=3, target_weight=[0.1, 0.2])


def _filter(function):
  """`function(eigenvalues, …)`, elementwise."""
  return row(
    function,
    lambda rng: (rng.uniform(0.1, 3, EXAMPLES),),
    extreme=lambda eigenvalues: (np.resize([0.0, EXTREME], eigenvalues.shape),),
    bad=(("eigenvalues", lambda eigenvalues: (eigenvalues.astype(np.int32),)),),
    examples="any",
    options=dict(ridge=(0.5, 2.0), target_weight=(0.1, 0.9), rounds=(2.0, 4.0)),
  )


def _kernel_and_targets(rng):
  factor = rng.normal(size=(5, 5))
  return rng.normal(size=5), factor @ factor.T


ROWS = [
  _filter(distill.coefficient_filter),
  _filter(distill.distillation_filter),
  row(
    distill.effective_ridge,
    lambda rng: (rng.uniform(0.5, 2, EXAMPLES), rng.uniform(0.1, 0.9, EXAMPLES)),
    extreme=unchanged,
    examples="any",
    wide=True,
  ),
  row(
    distill.optimal_target_weight,
    lambda rng: (draw_logits(rng), draw_logits(rng), draw_logits(rng)),
    bad=(*BAD_SAME_SHAPE,),
    wide=True,
  ),
  row(
    distill.self_distilled_coefficients,
    _kernel_and_targets,
    call=lambda targets, gram, **options: distill.self_distilled_coefficients(
      kernel_eigensystem(gram), targets, **options
    ),
    wide=True,
    options=dict(ridge=(0.5, 2.0), target_weight=(0.1, 0.9), rounds=(2.0, 4.0)),
  ),
  row(
    distill.self_distilled_regression,
    _kernel_and_targets,
    call=lambda targets, gram, **options: distill.self_distilled_regression(gram, targets, rounds=3, **options),
    wide=True,
    options=dict(ridge=(0.5, 2.0), target_weight=(0.1, 0.9)),
  ),
]


EXEMPT = {
  "DistillationRounds": "result of self_distilled_regression",
  "iterated_distillation": "repeats a function of the caller, whatever it returns",
}
