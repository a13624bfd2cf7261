"""Score estimation by kernels: infinite and finite width, descent in closed form, early stopping."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.kernels.score_kernels import (
  early_stopping_step,
  finite_score_ntk,
  kernel_descent_path,
  score_ntk,
  score_output_kernel,
)
from jaxreg.models.posterior_mean_mlp import PosteriorMeanMLP
from tests.conformance import row, unchanged

RNG = np.random.default_rng(0)
Z, OTHERS = RNG.normal(size=(8, 3)), RNG.normal(size=(5, 3))
TARGETS = RNG.normal(size=(8, 2))


def network(weights, signs, inputs):
  return jax.nn.relu(inputs @ weights.T) @ signs.T / np.sqrt(weights.shape[0])


@functools.partial(jax.jit, static_argnames="steps")
def descend(weights, signs, inputs, targets, rate, steps):
  """Full-batch gradient descent: the final weights, and losses before and weights after every step."""
  loss = lambda w: 0.5 * jnp.sum((network(w, signs, inputs) - targets) ** 2)
  optimizer = optax.sgd(rate)

  def step(carry, _):
    weights, state = carry
    value, gradient = jax.value_and_grad(loss)(weights)
    updates, state = optimizer.update(gradient, state)
    weights = optax.apply_updates(weights, updates)
    return (weights, state), (value, weights)

  (weights, _), history = jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)
  return weights, history


_ntk = jax.jit(score_ntk)
_finite = jax.jit(finite_score_ntk)


@jax.jit
def _path(gram, cross, targets, rate, steps):
  return kernel_descent_path(gram, cross, targets, learning_rate=rate, steps=steps)


@pytest.mark.golden
def test_golden_29_score_ntk(golden, x64):
  cases = [arrays for _, arrays, _ in golden("29-score_ntk").cases()]
  find = lambda key: next({k: jnp.asarray(v) for k, v in arrays.items()} for arrays in cases if key in arrays)
  # Parallel inputs, where the arccos has an infinite slope, are as exact as the square root of rounding.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9)
  kernel, net, path, steps, rule = (find(key) for key in ("Zt", "W", "steps", "out_W", "sigmas"))
  z, at, targets, rate = kernel["Z"], kernel["Zt"], path["Y"], path["eta"]
  close(_ntk(z, at), kernel["out_ntk"])
  close(jax.jit(score_output_kernel)(z, at), kernel["out_nngp"])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
  close(network(net["W"], net["a"], z), net["out_f"])
  close(_finite(net["W"], net["a"], z, z), net["out_ntk"])
  found = _path(_ntk(z, z), _ntk(at, z), targets, rate, path["steps"])
  # Training inputs are parallel to others: the kernel's tolerance, of the size of the predictions.
  for got, want in ((found.train, path["out_train"]), (found.test, path["out_test"])):
    np.testing.assert_allclose(got, want, atol=1e-7 * np.abs(want).max())
  _, (losses, weights) = descend(net["W"], net["a"], z, targets, rate, steps["out_loss"].size)
  close(losses, steps["out_loss"])
  close(weights, steps["out_W"])
  stop = lambda sigma: early_stopping_step(
    rule["eigs"], noise=sigma, learning_rate=rule["eta"], longest=int(rule["Tmax"])
  )
  stops = jax.jit(jax.vmap(stop))(rule["sigmas"])
  np.testing.assert_array_equal(stops, rule["out_T"])


def test_infinite_width_is_the_mean_over_neurons(x64):
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(100_000, 3)))
  active = (weights @ Z.T > 0)[:, :, None] & (weights @ OTHERS.T > 0)[:, None, :]
  each = active * (Z @ OTHERS.T)
  error = each.std(0) / np.sqrt(100_000)
  assert (np.abs(each.mean(0) - score_ntk(Z, OTHERS)) <= 3 * error + 1e-12).mean() > 0.95
  assert (np.abs(each.mean(0) - score_ntk(Z, OTHERS)) <= 5 * error + 1e-12).all()
  signs = jnp.asarray(np.random.default_rng(2).choice([-1.0, 1.0], size=(2, 100_000)))
  finite = _finite(weights, signs, Z, OTHERS)
  np.testing.assert_allclose(finite[..., 0, 0], each.mean(0), rtol=1e-10, atol=1e-12)
  assert (np.abs(finite[..., 0, 1]) <= 5 * np.abs(Z @ OTHERS.T) / np.sqrt(100_000)).all()


def test_finite_width_is_the_jacobians_product(x64):
  weights, signs = jnp.asarray(RNG.normal(size=(6, 3))), jnp.asarray(RNG.choice([-1.0, 1.0], size=(2, 6)))
  jacobian = jax.jit(jax.jacrev(network))
  left, right = jacobian(weights, signs, jnp.asarray(Z)), jacobian(weights, signs, jnp.asarray(OTHERS))
  expected = jnp.einsum("nirp,mkrp->nmik", left, right)
  np.testing.assert_allclose(_finite(weights, signs, Z, OTHERS), expected, atol=1e-12)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3))
def test_homogeneous_and_zero_at_opposite_inputs(seed, scale):
  with jax.enable_x64(True):
    z, others = np.random.default_rng(seed).normal(size=(2, 4, 3))
    kernel = _ntk(z, others)
    np.testing.assert_allclose(_ntk(scale * z, others), scale * kernel, rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(jnp.diagonal(_ntk(z, -z)), 0, atol=1e-12)
    np.testing.assert_allclose(jnp.diagonal(_ntk(z, z)), np.sum(z**2, 1) / 2, rtol=1e-12)
    gram = np.asarray(_ntk(z, z))
    assert np.linalg.eigvalsh(gram).min() >= -1e-7 * np.trace(gram)


def test_gradients_are_finite_at_parallel_and_zero_inputs():
  inputs = jnp.array([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1e4, -1e4]])
  for kernel in (score_ntk, score_output_kernel):
    values, gradient = jax.jit(jax.value_and_grad(lambda z, kernel=kernel: kernel(z, inputs).sum()))(inputs)
    assert jnp.isfinite(values).all() and jnp.isfinite(gradient).all()


def test_path_is_the_loop(x64):
  gram, cross = np.asarray(_ntk(Z, Z)), np.asarray(_ntk(OTHERS, Z))
  rate = 0.9 / np.linalg.eigvalsh(gram).max()
  steps = np.array([0, 1, 2, 7, 50])
  path = _path(gram, cross, TARGETS, rate, steps)
  train, test = np.zeros_like(TARGETS), np.zeros((5, 2))
  for step in range(51):
    if step in steps:
      index = list(steps).index(step)
      np.testing.assert_allclose(path.train[index], train, atol=1e-8)
      np.testing.assert_allclose(path.test[index], test, atol=1e-8)
    residuals = train - TARGETS
    train, test = train - rate * gram @ residuals, test - rate * cross @ residuals
  many = _path(gram, cross, TARGETS, rate, np.arange(300))
  losses = np.sum((many.train - TARGETS) ** 2, (1, 2))
  assert (np.diff(losses) < 0).all()
  limit = _path(gram, cross, TARGETS, rate, np.array([np.inf]))
  np.testing.assert_allclose(limit.train[0], TARGETS, atol=1e-8)


def test_wide_networks_follow_the_kernel():
  """The gap falls at least by half from width 64 to 1024 (the root of the width would give a quarter)."""
  rng = np.random.default_rng(3)
  z, at = jnp.asarray(rng.normal(size=(2, 20, 4)), jnp.float32).at[..., 3].set(1)
  targets = jnp.asarray(rng.normal(size=(20, 2)), jnp.float32)

  @jax.jit
  def exact():
    gram = score_ntk(z, z)
    rate = 0.5 / jnp.linalg.eigvalsh(gram)[-1]
    cross = score_ntk(at, z)
    return rate, kernel_descent_path(gram, cross, targets, learning_rate=rate, steps=jnp.array([50])).test[0]

  rate, expected = exact()

  def gap(width):
    def one(key):
      variables = PosteriorMeanMLP(width, 2).init(key, z)
      weights, signs = variables["params"]["weights"], variables["fixed"]["signs"]
      final, _ = descend(weights, signs, z, targets, rate, 50)
      return jnp.mean((network(final, signs, at) - expected) ** 2)

    return jnp.sqrt(jnp.mean(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 8))))

  assert gap(1024) <= gap(64) / 2


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0.01, 5.0), power=st.integers(-6, 6))
def test_stopping_rule(seed, noise, power):
  """Earlier under more noise, indifferent to the kernel's scale, and the first excess of a plain search."""
  with jax.enable_x64(True):
    eigenvalues = 10 ** np.random.default_rng(seed).uniform(-4, 0, 12)
    stop = int(_stop(eigenvalues, noise, 0.5))
    assert int(_stop(eigenvalues, 1.5 * noise, 0.5)) <= stop
    # Powers of 4 scale without rounding; with others a step on the boundary may move.
    assert int(_stop(4.0**power * eigenvalues, 2.0**power * noise, 0.5 / 4.0**power)) == stop
  tau = 0.5 * np.arange(1, 1001)
  complexity = np.sqrt(np.minimum(eigenvalues, 1 / tau[:, None]).mean(1))
  ratio = complexity * 2 * np.e * noise * tau
  assert stop == 1000 or ratio[stop] > 1 - 1e-9
  assert stop == 0 or ratio[stop - 1] <= 1 + 1e-9


@jax.jit
def _stop(eigenvalues, noise, rate):
  return early_stopping_step(eigenvalues, noise=noise, learning_rate=rate, longest=1000)


def test_bad_input():
  with pytest.raises(ValueError, match="inputs and others must be matrices"):
    score_ntk(Z, OTHERS[:, :2])
  with pytest.raises(ValueError, match="others must be floating"):
    score_output_kernel(Z, OTHERS.astype(int))
  with pytest.raises(ValueError, match=r"signs must be \[outputs, 8\]"):
    finite_score_ntk(Z, np.ones((2, 5)), Z, Z)
  gram = jnp.eye(8)
  with pytest.raises(ValueError, match=r"cross must be \[inputs, 8\]"):
    kernel_descent_path(gram, jnp.ones((3, 7)), TARGETS, learning_rate=0.1, steps=np.array([1]))
  with pytest.raises(ValueError, match=r"steps must be \[steps\]"):
    kernel_descent_path(gram, gram, TARGETS, learning_rate=0.1, steps=3)
  with pytest.raises(ValueError, match="learning_rate"):
    kernel_descent_path(gram, gram, TARGETS, learning_rate=-0.1, steps=np.array([1]))
  options = dict(noise=1.0, learning_rate=0.1, longest=10)
  for changes in (dict(noise=0.0), dict(learning_rate=float("nan")), dict(longest=0)):
    with pytest.raises(ValueError, match=next(iter(changes))):
      early_stopping_step(np.ones(3), **{**options, **changes})
  with pytest.raises(ValueError, match=r"eigenvalues must be \[examples\]"):
    early_stopping_step(np.ones((3, 3)), **options)


def _two_sets(rng):
  return rng.normal(size=(4, 3)), rng.normal(size=(5, 3))


ROWS = [
  row(score_ntk, _two_sets, bad=(("inputs", lambda x, y: (x.astype(np.int32), y)),), wide=True),
  row(score_output_kernel, _two_sets, bad=(("inputs", lambda x, y: (x.astype(np.int32), y)),), wide=True),
  row(
    finite_score_ntk,
    lambda rng: (*_two_sets(rng), rng.normal(size=(6, 3)), np.sign(rng.normal(size=(2, 6)))),
    call=lambda x, y, weights, signs: finite_score_ntk(weights, signs, x, y),
    wide=True,
  ),
  row(
    kernel_descent_path,
    lambda rng: (rng.normal(size=4), np.eye(4) + 0.1, rng.normal(size=(3, 4))),
    call=lambda targets, gram, cross, learning_rate: kernel_descent_path(
      gram, cross, targets, learning_rate=learning_rate, steps=jnp.array([0, 3, 9])
    ),
    wide=True,
    options=dict(learning_rate=(0.01, 0.1)),
  ),
  row(
    early_stopping_step,
    lambda rng: (np.sort(rng.uniform(0.01, 1, 6)),),
    call=lambda eigenvalues, **options: early_stopping_step(eigenvalues, longest=50, **options),
    extreme=unchanged,
    differentiable=False,
    wide=True,
    options=dict(noise=(0.5, 2.0), learning_rate=(0.1, 0.5)),
  ),
]


EXEMPT = {
  "DescentPath": "result of kernel_descent_path",
}
