"""Mixup: the mixed arrays are what the returned coefficient and permutation say."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from jaxreg.data.mixing import mixup
from jaxreg.losses.early_learning import sigmoid_rampup

INPUTS = np.random.default_rng(0).normal(size=(6, 4, 4, 2)).astype(np.float32)
TARGETS = np.eye(3, dtype=np.float32)[[0, 1, 2, 2, 1, 0]]


@functools.partial(jax.jit, static_argnums=(2,))
def mixed(key, alpha, at_least_half):
  return mixup(key, INPUTS, TARGETS, alpha=alpha, at_least_half=at_least_half)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  seed=strategies.integers(0, 2**31 - 1),
  alpha=strategies.sampled_from([0.0, 1e-6, 1e-3, 0.2, 1.0, 8.0, 1e4]),
  at_least_half=strategies.booleans(),
)
def test_mixture_permutation_and_coefficient(seed, alpha, at_least_half):
  inputs, targets, coefficient, permutation = mixed(jax.random.key(seed), alpha, at_least_half)
  assert coefficient.shape == () and (0.5 if at_least_half else 0) <= coefficient <= 1
  assert sorted(permutation.tolist()) == list(range(len(INPUTS)))
  l, partner = np.float32(coefficient), np.asarray(permutation)
  np.testing.assert_allclose(inputs, l * INPUTS + (1 - l) * INPUTS[partner], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(targets, l * TARGETS + (1 - l) * TARGETS[partner], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)


def test_elr_coefficient_is_at_least_half_and_ramp_ends():
  """Card 12, exact test 8 (the limit l = 1 is in test_early_learning)."""
  _, _, coefficients, _ = jax.vmap(lambda key: mixed(key, 1.0, True))(jax.random.split(jax.random.key(0), 500))
  assert np.all((coefficients >= 0.5) & (coefficients <= 1))
  np.testing.assert_allclose(sigmoid_rampup(0, length=40), np.exp(-5), rtol=1e-6)
  np.testing.assert_allclose(sigmoid_rampup(40, length=40), 1)


def test_alpha_zero_mixes_nothing():
  inputs, targets, coefficient, _ = mixed(jax.random.key(1), 0.0, False)
  assert coefficient == 1
  np.testing.assert_array_equal(inputs, INPUTS)
  np.testing.assert_array_equal(targets, TARGETS)


def test_coefficient_has_the_beta_distribution():
  keys = jax.random.split(jax.random.key(0), 4000)
  coefficients = jax.vmap(lambda key: mixed(key, 2.0, False)[2])(keys)
  # Beta(2, 2): mean 1/2, variance 1/20; four standard errors.
  np.testing.assert_allclose(coefficients.mean(), 0.5, atol=4 * np.sqrt(0.05 / 4000))
  np.testing.assert_allclose(coefficients.var(), 0.05, rtol=0.1)


def test_permutation_and_coefficient_do_not_share_randomness():
  """Fixing the key's coefficient must not fix the permutation: they come from two halves of the key."""
  outcomes = [mixed(jax.random.key(seed), 1.0, True) for seed in range(8)]
  assert len({tuple(outcome[3].tolist()) for outcome in outcomes}) > 1
  assert len({float(outcome[2]) for outcome in outcomes}) == 8


def test_bfloat16_mixes_in_float32():
  inputs = jnp.asarray(INPUTS, jnp.bfloat16)
  result, _, coefficient, permutation = mixup(jax.random.key(3), inputs, TARGETS, alpha=1.0)
  wide = inputs.astype(jnp.float32)
  expected = coefficient * wide + (1 - coefficient) * wide[permutation]
  assert result.dtype == jnp.bfloat16 and coefficient.dtype == jnp.float32
  np.testing.assert_allclose(result.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


def test_sweep_over_alpha_and_devices():
  alphas, keys = jnp.array([0.0, 0.2, 1.0, 4.0, 0.5, 2.0, 1.0, 1.0]), jax.random.split(jax.random.key(0), 8)
  one = lambda key, alpha: mixup(key, INPUTS, TARGETS, alpha=alpha)
  alone = [one(key, alpha) for key, alpha in zip(keys, alphas)]
  for mapped in (jax.vmap(one)(keys, alphas), jax.pmap(one)(keys, alphas)):
    for i, outcome in enumerate(alone):
      for got, expected in zip(mapped, outcome):
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_the_inputs():
  def total(inputs):
    return mixup(jax.random.key(0), inputs, TARGETS, alpha=1.0)[0].sum()

  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(INPUTS)), 1, rtol=1e-5)


@pytest.mark.parametrize(
  "inputs, targets, alpha, message",
  [
    (INPUTS.astype(np.int32), TARGETS, 1.0, "inputs must be floating"),
    (INPUTS, np.arange(6), 1.0, "targets must be floating"),
    (INPUTS, TARGETS[:5], 1.0, "share a leading batch axis"),
    (np.float32(1), TARGETS, 1.0, "share a leading batch axis"),
    (INPUTS, TARGETS, -1.0, "alpha must lie in"),
  ],
)
def test_bad_input_is_refused(inputs, targets, alpha, message):
  with pytest.raises(ValueError, match=message):
    mixup(jax.random.key(0), inputs, targets, alpha=alpha)


EXEMPT = {
  "mixup": "draws in the inputs' precision; its tests say how it mixes",
}
