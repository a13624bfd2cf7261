"""Comp-sum losses and generalized cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import comp_sum
from tests.conformance import (
  BAD_SAME_SHAPE,
  draw_logits,
  draw_probabilities,
  elementwise_row,
  extreme_logits,
  loss_row,
  row,
)

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
  near = [comp_sum.comp_sum_loss(logits, labels, tau=at) for at in (1 - 1e-6, 1.0, 1 + 1e-6)]
  np.testing.assert_allclose(near, [near[1]] * 3, rtol=1e-5)
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


@pytest.mark.golden
def test_golden_03_comp_sum(golden):
  for _, arrays, meta in golden("03-comp_sum").cases():
    logits, labels = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["labels"])
    loss = lambda z: comp_sum.comp_sum_loss(z, labels, tau=meta["tau"])
    # Absolute, because some gradients are of the order of 1e-26.
    np.testing.assert_allclose(loss(logits), arrays["out_loss"], rtol=1e-10, atol=1e-12)
    gradient = jax.grad(lambda z: loss(z).sum())(logits)
    np.testing.assert_allclose(gradient, arrays["grad_logits"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_outer_function_of_the_sum_of_exponentials(batch, tau):
  logits, labels = batch
  others = jnp.arange(5) != labels[:, None]
  own = jnp.take_along_axis(logits, labels[:, None], 1)
  total = jnp.sum(jnp.exp(logits - own), axis=1, where=others)
  value = comp_sum.comp_sum_outer(total, tau=tau)
  np.testing.assert_allclose(value, comp_sum.comp_sum_loss(logits, labels, tau=tau), rtol=1e-11)
  slope = jax.grad(lambda u: comp_sum.comp_sum_outer(u, tau=tau).sum())(total)
  np.testing.assert_allclose(slope, (1 + total) ** -tau, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_soft_labels(batch, tau):
  logits, labels = batch
  hard = comp_sum.comp_sum_loss_with_soft_labels(logits, jax.nn.one_hot(labels, 5), tau=tau)
  np.testing.assert_allclose(hard, comp_sum.comp_sum_loss(logits, labels, tau=tau), rtol=1e-12)
  weights = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(5), 6))
  each = [comp_sum.comp_sum_loss(logits, jnp.full(6, k), tau=tau) for k in range(5)]
  soft = comp_sum.comp_sum_loss_with_soft_labels(logits, weights, tau=jnp.full(6, tau))
  np.testing.assert_allclose(soft, jnp.sum(weights * jnp.stack(each, 1), 1), rtol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_shift_invariance(batch, tau):
  logits, labels = batch
  logits = jnp.round(logits * 64) / 64  # so that adding the constant does not round
  loss = lambda z: comp_sum.comp_sum_loss(z, labels, tau=tau)
  np.testing.assert_array_equal(loss(logits + 256.0), loss(logits))


def test_gradient_of_a_hopeless_example():
  """A label of probability 1e-40 has a finite gradient, that of the formula."""
  logits, labels = jnp.array([[0.0, 92.1, 0.0]]), jnp.array([0])
  for tau in (1.0, 1.5, 2.0):
    gradient = jax.grad(lambda z, tau=tau: comp_sum.comp_sum_loss(z, labels, tau=tau).sum())(logits)
    s = jax.nn.softmax(logits)
    np.testing.assert_allclose(gradient, s[0, 0] ** (tau - 1) * (s - jax.nn.one_hot(labels, 3)), atol=1e-15)


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
  with pytest.raises(ValueError, match="equal shapes"):
    comp_sum.comp_sum_loss_with_soft_labels(logits, jnp.ones(5))
  with pytest.raises(ValueError, match="values must be floating"):
    comp_sum.comp_sum_outer(labels, tau=1.0)


def test_derivatives_in_the_parameter_next_to_cross_entropy():
  logits, labels = jnp.array([[-3.0, 0.0, 1.0]], jnp.float32), jnp.array([0])
  slope = lambda tau: jax.grad(lambda t: comp_sum.comp_sum_loss(logits, labels, tau=t)[0])(jnp.float32(tau))
  # -nll^2 / 2 at 1, from 50 digits elsewhere.
  for tau, expected in ((1 - 1e-6, -9.3595991), (1.0, -9.3595721), (1 + 1e-6, -9.3595451), (1.0003, -9.3514771)):
    np.testing.assert_allclose(slope(tau), expected, rtol=3e-6)
  for loss in (comp_sum.generalized_cross_entropy_loss, comp_sum.truncated_generalized_cross_entropy_loss):
    options = {} if loss is comp_sum.generalized_cross_entropy_loss else {"threshold": 0.0}
    at = lambda q, loss=loss, options=options: loss(logits, labels, q=q, **options)[0]
    np.testing.assert_allclose(jax.grad(at)(jnp.float32(1e-6)), -9.3595451, rtol=3e-6)


ROWS = [
  loss_row(comp_sum.comp_sum_loss, tau=(0.5, 2.5)),
  loss_row(comp_sum.generalized_cross_entropy_loss, q=(0.0, 1.0)),
  row(
    comp_sum.comp_sum_loss_with_soft_labels,
    lambda rng: (draw_logits(rng), draw_probabilities(rng)),
    extreme=extreme_logits,
    bad=BAD_SAME_SHAPE,
    examples="any",
    options=dict(tau=(0.5, 2.5)),
  ),
  elementwise_row(comp_sum.comp_sum_outer, "values", extreme=(0.0, 1e4), tau=(0.5, 2.5)),
  loss_row(comp_sum.truncated_generalized_cross_entropy_loss, q=(0.0, 1.0), threshold=(0.0, 0.5)),
]
