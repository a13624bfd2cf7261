"""The scaled residual does not see the length of a prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import scaled_residual
from jaxreg.losses.scaled_residual import scaled_residual_loss
from tests.conformance import BAD_SAME_SHAPE, CLASSES, draw_logits, extreme_logits, row


@jax.jit
def value_and_gradient(q, b):
  matrix = jnp.diag(jnp.arange(1, 7).astype(q.dtype))
  losses = lambda q: scaled_residual_loss(q, b, matvec=lambda v: matrix @ v)
  return losses(q), jax.grad(lambda q: losses(q).sum())(q)


def test_scale_invariance(x64):
  rng = np.random.default_rng(0)
  q, b = rng.normal(size=(2, 4, 6))
  value, gradient = value_and_gradient(q, b)
  for scale in (-5.0, 1e-3, 1e3):
    np.testing.assert_allclose(value_and_gradient(scale * q, b)[0], value, rtol=1e-10)
  radial = np.sum(gradient * q, 1)
  assert np.all(np.abs(radial) <= 1e-8 * np.linalg.norm(gradient, axis=1) * np.linalg.norm(q, axis=1))


def test_zero_prediction_and_bad_input():
  value, gradient = value_and_gradient(np.zeros((1, 6), np.float32), np.ones((1, 6), np.float32))
  np.testing.assert_array_equal(value, [6.0])
  assert np.isfinite(gradient).all()
  with pytest.raises(ValueError, match=r"\[batch"):
    scaled_residual_loss(jnp.ones(3), jnp.ones(3), matvec=lambda v: v)


ROWS = [
  row(
    scaled_residual.scaled_residual_loss,
    lambda rng: (draw_logits(rng), draw_logits(rng)),
    call=lambda q, b: scaled_residual.scaled_residual_loss(q, b, matvec=lambda v: v * jnp.arange(1, CLASSES + 1.0)),
    extreme=lambda q, b: (extreme_logits(q)[0], b),
    bad=(*BAD_SAME_SHAPE, ("predictions", lambda q, b: (q.astype(np.int32), b))),
    examples="batch",
  ),
]
