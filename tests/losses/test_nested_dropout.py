"""The exact expectation of nested dropout's loss: a loop over cut-offs, Monte Carlo, ignored labels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.layers.nested_dropout import keep_leading_channels, nested_cutoff_probabilities, sample_cutoff
from jaxreg.losses.nested_dropout import expected_nested_cross_entropy_loss
from tests.conformance import CLASSES, EXAMPLES, row

CHANNELS = 6


def _problem(seed=0, channels=CHANNELS):
  rng = np.random.default_rng(seed)
  features, kernel = rng.normal(size=(EXAMPLES, channels)), rng.normal(size=(channels, CLASSES))
  return features, kernel, rng.integers(0, CLASSES, EXAMPLES)


def test_equals_the_loop_over_cutoffs(x64):
  features, kernel, labels = _problem()
  p = nested_cutoff_probabilities(CHANNELS, sigma=3.0)
  loop = sum(
    p[k - 1] * optax.softmax_cross_entropy_with_integer_labels(features[:, :k] @ kernel[:k], labels)
    for k in range(1, CHANNELS + 1)
  )
  values = expected_nested_cross_entropy_loss(features, kernel, labels, probabilities=p)
  np.testing.assert_allclose(values, loop, rtol=1e-12)


def test_is_the_mean_over_drawn_cutoffs(x64):
  features, kernel, labels = _problem(1)
  p = nested_cutoff_probabilities(CHANNELS, sigma=3.0)

  def loss(key):
    kept = keep_leading_channels(features, sample_cutoff(key, p))
    return optax.softmax_cross_entropy_with_integer_labels(kept @ kernel, labels).mean()

  draws = np.asarray(jax.vmap(loss)(jax.random.split(jax.random.key(0), 4000)))
  exact = expected_nested_cross_entropy_loss(features, kernel, labels, probabilities=p).mean()
  assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws))


def test_ignored_labels(x64):
  features, kernel, labels = _problem(2)
  labels[3], features[3] = 255, np.nan
  p = np.full(CHANNELS, 1 / CHANNELS)
  loss = lambda features, kernel: expected_nested_cross_entropy_loss(features, kernel, labels, probabilities=p).sum()
  value, (slope, kernel_slope) = jax.value_and_grad(loss, (0, 1))(jnp.asarray(features), jnp.asarray(kernel))
  assert np.isfinite(value) and np.isfinite(slope).all() and np.isfinite(kernel_slope).all()
  np.testing.assert_array_equal(slope[3], 0)


def test_bad_shapes_are_refused():
  features, kernel, labels = _problem()
  for bad in ({"probabilities": np.ones(3)}, {"kernel": kernel[1:]}):
    arguments = {"kernel": kernel, "probabilities": np.ones(CHANNELS), **bad}
    with pytest.raises(ValueError, match="got shapes"):
      expected_nested_cross_entropy_loss(features, labels=labels, **arguments)


ROWS = [
  row(
    expected_nested_cross_entropy_loss,
    lambda rng: (
      rng.normal(size=(EXAMPLES, CHANNELS)),
      rng.normal(size=(CHANNELS, CLASSES)),
      rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
    ),
    call=lambda features, kernel, labels: expected_nested_cross_entropy_loss(
      features, kernel, labels, probabilities=jnp.full(CHANNELS, 1 / CHANNELS, features.dtype)
    ),
    extreme=lambda features, *rest: (1e4 * np.sign(features), *rest),
    bad=(
      ("labels", lambda h, v, y: (h, v, y[1:])),
      ("labels", lambda h, v, y: (h, v, y.astype(np.float32))),
      ("features", lambda h, v, y: (h.astype(np.int32), v, y)),
      ("kernel", lambda h, v, y: (h, v[0], y)),
    ),
  ),
]
