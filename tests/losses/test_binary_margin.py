"""Margin losses of binary classifiers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import binary_margin
from jaxreg.losses.binary_margin import MARGIN_LOSSES
from tests.conformance import BAD_LABELS, draw_binary, row
from tests.losses.test_calibrated_ensemble import batch


def test_margin_losses(x64):
  logits, labels, _ = batch(7)
  m = (2 * labels - 1) * logits
  expected = {
    "logistic": np.log1p(np.exp(-m)),
    "hinge": np.maximum(1 - m, 0),
    "exponential": np.exp(-m),
    "squared_hinge": np.maximum(1 - m, 0) ** 2,
    "focal": optax.sigmoid_focal_loss(logits, labels, alpha=None, gamma=2.0),
  }
  assert set(expected) == set(MARGIN_LOSSES)
  for name, loss in MARGIN_LOSSES.items():
    np.testing.assert_allclose(loss(logits, labels), expected[name], rtol=1e-10)
    np.testing.assert_array_equal(loss(logits[:, None], labels), loss(logits, labels))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_margin_losses_are_finite(name, dtype):
  logits, labels = jnp.array([1e4, -1e4, 0, 90, -90, -70], dtype), jnp.array([1, 1, 1, 0, 0, 1])
  loss = lambda z: MARGIN_LOSSES[name](z, labels).sum()
  value, gradient = jax.value_and_grad(loss)(logits)
  assert value.dtype == dtype and jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_focal_loss_at_gamma_zero_is_logistic():
  logits, labels = jnp.array([30.0, -30.0, 1e4]), jnp.array([1, 1, 1])
  focal = lambda z: binary_margin.binary_focal_loss(z, labels, gamma=jnp.float32(0)).sum()
  logistic = lambda z: MARGIN_LOSSES["logistic"](z, labels).sum()
  for a, b in zip(jax.value_and_grad(focal)(logits), jax.value_and_grad(logistic)(logits)):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)


def binary_loss(function, **options):
  """`function(logits, labels, **options)` with one logit per example."""
  return row(function, draw_binary, bad=BAD_LABELS, examples="any", options=options)


ROWS = [
  binary_loss(binary_margin.binary_exponential_loss),
  binary_loss(binary_margin.binary_focal_loss, gamma=(0.0, 3.0)),
  binary_loss(binary_margin.binary_hinge_loss),
  binary_loss(binary_margin.binary_logistic_loss),
  binary_loss(binary_margin.binary_squared_hinge_loss),
]


EXEMPT = {
  "MARGIN_LOSSES": "functions by name, each of them a row",
}
