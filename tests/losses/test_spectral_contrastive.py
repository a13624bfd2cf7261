"""The spectral contrastive loss: golden vectors, the sum over pairs, expectation, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import spectral_contrastive as sc
from tests.conformance import BAD_SAME_SHAPE, EXAMPLES, row

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def views():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(16, 4))), jnp.asarray(rng.normal(size=(16, 4)))


def loop(one, two):
  n = len(one)
  pairs = [[0 if i == j else (one[i] @ two[j]) ** 2 / (n - 1) for j in range(n)] for i in range(n)]
  return [-2 * one[i] @ two[i] + sum(pairs[i]) for i in range(n)]


@pytest.mark.golden
def test_golden_projection_head_losses(golden):
  for case, arrays, _ in golden("46-projection_head").cases("spec"):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10, err_msg=case)
    mean = lambda one, two: sc.spectral_contrastive_loss(one, two).mean()
    views = jnp.asarray(arrays["z1"]), jnp.asarray(arrays["z2"])
    value, gradients = jax.value_and_grad(mean, (0, 1))(*views)
    close(value, arrays["out_sample_loss"])
    close(gradients[0], arrays["grad_z1"])
    close(gradients[1], arrays["grad_z2"])
    layers = [jnp.asarray(arrays["W1"]), jnp.asarray(arrays["W2"])]
    population = functools.partial(
      sc.spectral_population_loss, covariance=arrays["cov"], positive_covariance=arrays["cov_pos"]
    )
    value, gradients = jax.value_and_grad(population)(layers)
    close(value, arrays["out_pop_loss"])
    close(gradients[0], arrays["grad_W1"])
    close(gradients[1], arrays["grad_W2"])


def test_equals_the_loop_over_pairs(views):
  np.testing.assert_allclose(sc.spectral_contrastive_loss(*views), loop(*views), rtol=1e-12)


def test_mean_is_an_unbiased_estimate_of_the_population_loss():
  """Gaussian views with known covariances; within three standard errors."""
  rng = np.random.default_rng(0)
  weights = jnp.asarray(0.5 * rng.normal(size=(2, 3)))
  shared, own = np.diag([1.0, 0.5, 2.0]), np.diag([0.3, 0.6, 0.1])

  def batch(key):
    keys = jax.random.split(key, 3)
    core = jax.random.normal(keys[0], (8, 3)) @ np.sqrt(shared)
    views = [(core + jax.random.normal(k, (8, 3)) @ np.sqrt(own)) @ weights.T for k in keys[1:]]
    return sc.spectral_contrastive_loss(*views).mean()

  values = jax.jit(jax.vmap(batch))(jax.random.split(jax.random.key(0), 20_000))
  error = values.std() / np.sqrt(len(values))
  assert abs(values.mean() - sc.spectral_population_loss(weights, shared + own, shared)) < 3 * error


def test_population_loss_ignores_rotations_of_the_output():
  rng = np.random.default_rng(0)
  weights, half = rng.normal(size=(3, 4)), rng.normal(size=(4, 4))
  rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
  options = half @ half.T + np.eye(4), half @ half.T
  one, two = (sc.spectral_population_loss(w, *options) for w in (weights, rotation @ weights))
  np.testing.assert_allclose(one, two, rtol=1e-12)
  np.testing.assert_allclose(sc.spectral_population_loss([weights, rotation], *options), one, rtol=1e-12)


def test_devices_and_masks(views):
  total = lambda one, two, **options: sc.spectral_contrastive_loss(one, two, **options).sum()
  expected = jax.value_and_grad(total, (0, 1))(*views)
  split = lambda x: x.reshape(8, 2, 4)
  part = jax.value_and_grad(functools.partial(total, axis_name="devices"), (0, 1))
  value, gradients = jax.pmap(part, axis_name="devices")(*map(split, views))
  np.testing.assert_allclose(value.sum(), expected[0], rtol=1e-12)
  for actual, gradient in zip(gradients, expected[1]):
    np.testing.assert_allclose(actual.reshape(16, 4), gradient, rtol=1e-10, atol=1e-12)
  out = np.arange(16) % 3 == 0
  spoiled = [jnp.where(out[:, None], jnp.nan, view) for view in views]
  value, gradient = jax.value_and_grad(total)(*spoiled, where=jnp.asarray(~out))
  np.testing.assert_allclose(value, total(*(view[~out] for view in views)), rtol=1e-12)
  assert np.isfinite(gradient).all() and not gradient[out].any()


def test_a_lone_input_has_no_pairs():
  assert sc.spectral_contrastive_loss(np.ones((1, 2)), np.ones((1, 2))).tolist() == [-4.0]


def test_bad_input():
  with pytest.raises(ValueError, match="weights must fit one another"):
    sc.spectral_population_loss([np.ones((2, 3)), np.ones((2, 3))], np.eye(3), np.eye(3))
  with pytest.raises(ValueError, match="covariance must have shape"):
    sc.spectral_population_loss(np.ones((2, 3)), np.eye(2), np.eye(2))


def _draw_population(rng):
  half = rng.normal(size=(5, 5))
  return rng.normal(size=(3, 5)), half @ half.T + np.eye(5), half @ half.T


ROWS = [
  row(
    sc.spectral_contrastive_loss,
    lambda rng: (rng.normal(size=(EXAMPLES, 4)), rng.normal(size=(EXAMPLES, 4))),
    bad=(
      *BAD_SAME_SHAPE,
      ("first", lambda a, b: (a.astype(np.int32), b)),
      ("second", lambda a, b: (a, b.astype(np.int32))),
      ("first", lambda a, b: (a[0], b[0])),
    ),
    examples="reduced",
  ),
  row(
    sc.spectral_population_loss,
    _draw_population,
    bad=(
      ("weights", lambda w, s, p: (w.astype(np.int32), s, p)),
      ("weights", lambda w, s, p: (w[0], s, p)),
      ("covariance", lambda w, s, p: (w, s.astype(np.int32), p)),
      ("shapes", lambda w, s, p: (w, s, p[1:])),
      ("positive_covariance", lambda w, s, p: (w, s, p.astype(np.int32))),
    ),
  ),
]
