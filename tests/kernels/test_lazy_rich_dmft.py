"""Dynamical mean-field theory of the committee machine, against closed forms and simulated networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.kernels.committee_machine import committee, committee_risk, committee_statistics
from jaxreg.kernels.lazy_rich_dmft import committee_dmft

# One compiled program for all tests.
solve = functools.partial(committee_dmft, neurons=3, steps=6, samples=1024)


@pytest.mark.parametrize("scale, curvature", [(1.0, 0.5), (2.0, 0.25), (0.5, 1.0)])
def test_losses_at_the_start(scale, curvature):
  theory = solve(jax.random.key(0), kappa=1.0, output_scale=scale, curvature=curvature)
  gain = scale * curvature
  expected = (1 - gain) ** 2 / 4 + (1 + gain**2 / 3) / 2 + scale**2 / 3
  np.testing.assert_allclose(theory.test_loss[0], expected, rtol=1e-6)
  assert abs(theory.train_loss[0] - expected) < 6 * theory.train_error[0]
  np.testing.assert_allclose(theory.covariance[0, 0], np.eye(3), atol=1e-6)
  np.testing.assert_array_equal(theory.overlap[0], 0)


def test_no_gap_between_training_and_test_with_infinitely_many_examples():
  theory = solve(jax.random.key(1), kappa=1e5, output_scale=1.0, curvature=0.5, learning_rate=0.3 / 1e5)
  np.testing.assert_allclose(theory.train_loss, theory.test_loss, atol=6 * np.max(theory.train_error) + 1e-3)
  assert theory.test_loss[-1] < 0.8 * theory.test_loss[0]


@functools.partial(jax.jit, static_argnames=("features", "examples", "neurons", "steps"))
def simulate(key, *, features, examples, neurons, steps, output_scale, curvature, learning_rate):
  """Losses `[2, steps + 1]` of one network of finite dimension, and the final overlap with the teacher."""
  keys = jax.random.split(key, 3)
  inputs = jax.random.normal(keys[0], (examples, features)) / features**0.5
  teacher = jax.random.normal(keys[1], (features,))
  teacher = teacher * features**0.5 / jnp.linalg.norm(teacher)
  options = {"output_scale": output_scale, "curvature": curvature}
  error = lambda weights: committee(weights, inputs, **options) - (inputs @ teacher) ** 2 / 2

  def advance(weights, _):
    test = sum(committee_risk(committee_statistics(weights), teacher, **options))
    gradient = jax.grad(lambda w: jnp.sum(error(w) ** 2) / 2)(weights)
    losses = jnp.stack([jnp.mean(error(weights) ** 2), test])
    return weights - learning_rate * neurons / output_scale**2 * gradient, losses

  weights = jax.random.normal(keys[2], (neurons, features))
  return jax.lax.scan(advance, weights, None, length=steps + 1)[1].T


def test_networks_approach_the_theory():
  options = {"output_scale": 0.8, "curvature": 0.6, "learning_rate": 0.2}
  theory = solve(jax.random.key(2), kappa=1.5, **options)
  keys = jax.random.split(jax.random.key(3), 12)
  runs = jnp.stack([simulate(key, features=1000, examples=1500, neurons=3, steps=6, **options) for key in keys])
  mean, error = runs.mean(0), runs.std(0, ddof=1) / len(keys) ** 0.5
  for losses, errors, simulated, spread in (
    (theory.train_loss, theory.train_error, mean[0], error[0]),
    (theory.test_loss, theory.test_error, mean[1], error[1]),
  ):
    # Five standard errors of both, and 1 % for the finite dimension.
    bound = 5 * np.hypot(errors, spread) + 0.01 * np.asarray(losses)
    assert (np.abs(losses - simulated) < bound).all()
  assert theory.train_loss[-1] < 0.8 * theory.test_loss[-1]  # the memory is what makes them differ


def test_order_parameters_are_covariances():
  theory = solve(jax.random.key(4), kappa=2.0, curvature=0.5, learning_rate=0.15)
  blocks = np.asarray(theory.covariance)
  np.testing.assert_allclose(blocks, blocks.transpose(1, 0, 3, 2), atol=1e-6)
  # With the teacher they form the covariance of one Gaussian vector.
  overlap = np.asarray(theory.overlap).reshape(1, -1)
  size = overlap.size
  joint = np.block([[np.eye(1), overlap], [overlap.T, blocks.transpose(0, 2, 1, 3).reshape(size, size)]])
  assert np.linalg.eigvalsh(joint)[0] > -1e-2


def test_scales_can_be_mapped_and_traced():
  scales = jnp.array([0.5, 1.0])
  call = lambda scale: solve(jax.random.key(5), kappa=1.0, output_scale=scale, curvature=0.5).test_loss
  mapped = jax.jit(jax.vmap(call), compiler_options={"xla_backend_optimization_level": 0})(scales)
  np.testing.assert_allclose(mapped, [call(scale) for scale in scales], rtol=1e-3)


def test_bad_input():
  for options in (
    {"kappa": 0.0},
    {"output_scale": -1.0},
    {"curvature": float("nan")},
    {"learning_rate": 0.0},
    {"samples": 10},
    {"replicates": 1},
    {"neurons": 0},
    {"steps": 0},
  ):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
      committee_dmft(jax.random.key(0), **{"kappa": 1.0, "neurons": 2, "steps": 5, **options})


EXEMPT = {
  "CommitteeDMFT": "result of committee_dmft",
  "committee_dmft": "a Monte Carlo simulation; its tests compare it with networks",
}
