"""The one form of logits and labels that the losses share; what it does in each of them is in the conformance tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg import losses
from jaxreg.losses.labelled_logits import labelled, narrowed, widened


def test_the_labels_class_always_takes_part():
  logits = jnp.array([[1.0, 2.0, 3.0]])
  batch = labelled(logits, jnp.array([2]), where=jnp.array([[True, True, False]]))
  assert batch.where.tolist() == [[True, True, True]] and batch.counted.tolist() == [True]
  empty = labelled(logits, jnp.array([2]), where=jnp.zeros((1, 3), bool))
  assert empty.counted.tolist() == [False]


@pytest.mark.parametrize("where", [np.ones((2, 3)), np.ones(2, bool), np.ones((4, 1), bool), "a text"])
def test_a_mask_that_does_not_fit_is_refused(where):
  with pytest.raises(ValueError, match="where must"):
    losses.brier_loss(jnp.zeros((2, 3)), jnp.zeros(2, int), where=where)


def test_a_mask_that_may_mean_examples_or_classes_is_refused():
  with pytest.raises(ValueError, match="may mean examples or classes"):
    losses.brier_loss(jnp.zeros((3, 3)), jnp.zeros(3, int), where=np.array([True, False, True]))
  rows = losses.brier_loss(jnp.zeros((3, 3)), jnp.zeros(3, int), where=np.array([[True], [False], [True]]))
  np.testing.assert_allclose(rows, [2 / 3, 0, 2 / 3], rtol=1e-6)


def test_float16_is_kept_finite_in_both_directions():
  wide, pull = jax.vjp(lambda x: 1e6 * widened(x), jnp.ones(2, jnp.float16))
  assert wide.dtype == jnp.float32
  gradient = pull(jnp.ones(2))[0]
  assert gradient.dtype == jnp.float16 and gradient.tolist() == [65504.0, 65504.0]
  values, pull = jax.vjp(lambda x: narrowed(x, jnp.float16), jnp.array([1e6, 3.0, jnp.inf]))
  assert values.tolist() == [65504.0, 3.0, np.inf]
  assert pull(jnp.ones(3, jnp.float16))[0].tolist() == [1.0, 1.0, 1.0]  # a value beyond the range is still trained


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_losses_of_float16_are_finite(scale, tau):
  rng = np.random.default_rng(0)
  logits, labels = jnp.asarray(scale * rng.normal(size=(6, 5)), jnp.float16), jnp.array([0, 1, 2, 3, 0, 1])
  for loss in (lambda z: losses.comp_sum_loss(z, labels, tau=tau), lambda z: losses.log_partition_penalty(z)):
    value, gradient = jax.value_and_grad(lambda z, loss=loss: loss(z).mean())(logits)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and gradient.dtype == jnp.float16


def test_ignored_examples_do_not_stop_forward_mode():
  labels = jnp.array([1, -100])
  loss = lambda z: losses.comp_sum_loss(z, labels)
  logits = jnp.array([[0.0, 1.0], [jnp.nan, 0.0]])
  np.testing.assert_allclose(jax.jacfwd(loss)(logits), jax.jacrev(loss)(logits), rtol=1e-6)


EXEMPT = {
  "Labelled": "what labelled returns",
  "labelled": "every loss of logits and integer labels starts with it; its tests are here",
}
