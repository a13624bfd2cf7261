"""Comp-sum losses and generalized cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import comp_sum

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(6, 5)) * 2), jnp.asarray(rng.integers(0, 5, 6))


def test_named_members(batch):
  logits, labels = batch
  p = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], 1)[:, 0]
  loss = lambda tau: comp_sum.comp_sum_loss(logits, labels, tau=tau)
  np.testing.assert_allclose(loss(0.0), 1 / p - 1, rtol=1e-12)
  np.testing.assert_allclose(loss(1.0), optax.softmax_cross_entropy_with_integer_labels(logits, labels), rtol=1e-12)
  np.testing.assert_allclose(loss(2.0), 1 - p, rtol=1e-12)
  np.testing.assert_allclose(
    comp_sum.generalized_cross_entropy_loss(logits, labels, q=0.7), (1 - p**0.7) / 0.7, rtol=1e-12
  )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1 - 1e-9, 1.0, 1 + 1e-9, 1.5, 2.0, 3.0])
def test_gradient_and_continuity(batch, tau):
  logits, labels = batch
  s = jax.nn.softmax(logits)
  own = jnp.take_along_axis(s, labels[:, None], 1)
  gradient = jax.grad(lambda z: comp_sum.comp_sum_loss(z, labels, tau=jnp.float64(tau)).sum())(logits)
  np.testing.assert_allclose(gradient, own ** (tau - 1) * (s - jax.nn.one_hot(labels, 5)), rtol=1e-9, atol=1e-12)
  slope = jax.grad(lambda t: comp_sum.comp_sum_loss(logits, labels, tau=t).sum())(jnp.float64(tau))
  h = 1e-4
  numeric = comp_sum.comp_sum_loss(logits, labels, tau=tau + h) - comp_sum.comp_sum_loss(
    logits, labels, tau=max(tau - h, 0)
  )
  np.testing.assert_allclose(slope, numeric.sum() / (h + min(h, tau)), rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7, 2.0])
def test_finite_at_extremes(dtype, tau):
  logits = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype)
  for label in range(3):
    mean = lambda z, label=label: comp_sum.comp_sum_loss(z, jnp.array([label, label]), tau=tau).mean()
    value, gradient = jax.value_and_grad(mean)(logits)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_masked_classes(batch):
  logits, labels = batch
  labels = labels % 4
  got = comp_sum.comp_sum_loss(logits, labels, tau=1.5, where=jnp.arange(5) < 4)
  np.testing.assert_allclose(got, comp_sum.comp_sum_loss(logits[:, :4], labels, tau=1.5), rtol=1e-12)
  np.testing.assert_allclose(comp_sum.comp_sum_loss(logits.T, labels, tau=1.5, axis=0),
                             comp_sum.comp_sum_loss(logits, labels, tau=1.5), rtol=1e-12)  # fmt: skip


def test_bad_input(batch):
  logits, labels = batch
  with pytest.raises(ValueError, match="tau must lie in"):
    comp_sum.comp_sum_loss(logits, labels, tau=-1)
  with pytest.raises(ValueError, match="q must lie in"):
    comp_sum.generalized_cross_entropy_loss(logits, labels, q=1.5)
  with pytest.raises(ValueError, match="labels must be integer"):
    comp_sum.comp_sum_loss(logits, labels.astype(float))
