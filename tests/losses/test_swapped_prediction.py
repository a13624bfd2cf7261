"""Swapped prediction: against the double loop, and what is constant."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import swapped_prediction
from jaxreg.losses.swapped_prediction import swapped_prediction_loss
from jaxreg.solvers import sinkhorn_assignment
from tests.conformance import CLASSES, EXAMPLES, draw_logits, row

pytestmark = pytest.mark.usefixtures("x64")
LOGITS = np.random.default_rng(0).normal(size=(4, 2, 6, 5))


@pytest.mark.parametrize("large", [1, 2, 4])
def test_all_pairs_of_different_views(large):
  targets = jax.nn.softmax(LOGITS[::-1][:large])
  expected = [
    optax.softmax_cross_entropy(LOGITS[other] / 0.2, targets[view])
    for view in range(large)
    for other in range(4)
    if other != view
  ]
  values = swapped_prediction_loss(LOGITS, targets, temperature=0.2)
  np.testing.assert_allclose(values, np.mean(expected, axis=0), rtol=1e-12)


def test_two_views_are_the_symmetric_cross_entropy():
  one, two = jax.nn.softmax(LOGITS[2]), jax.nn.softmax(LOGITS[3])
  values = swapped_prediction_loss(LOGITS[:2], jnp.stack([one, two]), temperature=1.0)
  expected = optax.softmax_cross_entropy(LOGITS[1], one) + optax.softmax_cross_entropy(LOGITS[0], two)
  np.testing.assert_allclose(values, expected / 2, rtol=1e-12)


def test_targets_are_constants():
  """Of one view with targets nothing comes back to it: neither through its assignment nor its prediction."""
  loss = lambda z: swapped_prediction_loss(z, sinkhorn_assignment(z[:1])).sum()
  gradient = jax.grad(loss)(LOGITS)
  assert not np.any(gradient[0]) and np.any(gradient[1])
  assert not np.any(jax.grad(lambda t: swapped_prediction_loss(LOGITS, t).sum())(jax.nn.softmax(LOGITS[:2])))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_finite_at_extremes(dtype):
  logits = (1e4 * jnp.sign(LOGITS)).astype(dtype)
  loss = lambda z: swapped_prediction_loss(z, jax.nn.one_hot(jnp.zeros((2, 2, 6), int), 5, dtype=dtype)).mean()
  value, gradient = jax.value_and_grad(loss)(logits)
  assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and value.dtype == gradient.dtype == dtype


def test_bad_input():
  targets = jax.nn.softmax(LOGITS)
  with pytest.raises(ValueError, match="targets must be .target views"):
    swapped_prediction_loss(LOGITS, targets[:2, :1])
  with pytest.raises(ValueError, match="at least one of at least two views"):
    swapped_prediction_loss(LOGITS[:1], targets[:1])
  with pytest.raises(ValueError, match="at least one of at least two views"):
    swapped_prediction_loss(LOGITS[:2], targets)
  with pytest.raises(ValueError, match="temperature must lie in"):
    swapped_prediction_loss(LOGITS, targets, temperature=0.0)


def _views(rng):
  logits = np.stack([draw_logits(rng) for _ in range(3)])
  return logits, rng.dirichlet(np.ones(CLASSES), (2, EXAMPLES))


ROWS = [
  row(
    swapped_prediction.swapped_prediction_loss,
    _views,
    bad=(
      ("targets", lambda z, y: (z, y[:, 1:])),
      ("targets", lambda z, y: (z, y.astype(np.int32))),
      ("logits", lambda z, y: (z.astype(np.int32), y)),
    ),
    options=dict(temperature=(0.1, 1.0)),
  ),
]
