"""Conformance rows of `losses.active_passive`."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.losses import active_passive
from tests.conformance import loss_row


def test_asymmetric_unhinged_at_large_powers():
  loss = lambda z, **options: active_passive.asymmetric_unhinged_loss(z, jnp.array([0]), **options)[0]
  even = jnp.zeros((1, 2), jnp.float32)
  np.testing.assert_allclose(loss(even, offset=1.5, q=100.0), (1 - 0.5**100) / 100, rtol=1e-5)
  far = jnp.array([[-3.0, 0.0]], jnp.float32)
  p = 1 / (1 + np.exp(3.0))
  np.testing.assert_allclose(loss(far, offset=1.001, q=13.0), ((1.001 - p) ** 13 - 0.001**13) / 13, rtol=1e-5)
  gradient = jax.grad(lambda z: loss(z, offset=1.001, q=13.0))(far)
  np.testing.assert_allclose(gradient[0, 1], (1.001 - p) ** 12 * p * (1 - p), rtol=1e-5)
  together = active_passive.nce_aul_loss(far, jnp.array([0]), active_weight=0.0, offset=1.001, q=13.0)
  np.testing.assert_allclose(together[0], loss(far, offset=1.001, q=13.0), rtol=1e-6)


ROWS = [
  loss_row(active_passive.asymmetric_generalized_cross_entropy_loss, offset=(0.0, 3.0), q=(0.5, 2.0)),
  loss_row(active_passive.asymmetric_unhinged_loss, offset=(1.1, 3.0), q=(0.5, 2.0)),
  loss_row(
    active_passive.nce_agce_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), offset=(0.5, 3.0), q=(0.5, 2.0)
  ),
  loss_row(
    active_passive.nce_aul_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), offset=(1.1, 3.0), q=(0.5, 2.0)
  ),
  loss_row(active_passive.nce_rce_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), log_zero=(-9.0, -4.0)),
  loss_row(active_passive.normalized_cross_entropy_loss),
]
