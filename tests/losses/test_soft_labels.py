"""Losses of integer labels under soft ones, checked against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg import losses
from jaxreg.losses.soft_labels import expected_loss
from tests.conformance import BAD_SAME_SHAPE, draw_logits, draw_probabilities, extreme_logits, row


def draw():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.integers(0, 4, 6)), jnp.asarray(rng.permutation(6))


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7])
def test_closed_forms(tau, x64):
  logits, labels, _ = draw()
  smooth = optax.smooth_labels(jax.nn.one_hot(labels, 4, dtype=jnp.float64), 0.1)
  expected = losses.comp_sum_loss_with_soft_labels(logits, smooth, tau=tau)
  np.testing.assert_allclose(expected_loss(losses.comp_sum_loss, logits, smooth, tau=tau), expected, rtol=1e-12)
  stable = losses.stablemax_cross_entropy_with_soft_labels(logits, smooth)
  np.testing.assert_allclose(expected_loss(losses.stablemax_cross_entropy, logits, smooth), stable, rtol=1e-12)


LOSSES = ("ldr_kl_loss", "nce_rce_loss", "jensen_shannon_loss", "crammer_singer_loss", "z_loss", "brier_loss")


@pytest.mark.parametrize("name", LOSSES)
def test_mixup(name, x64):
  logits, labels, partners = draw()
  loss, hard = getattr(losses, name), jax.nn.one_hot(labels, 4, dtype=jnp.float64)
  mixed = 0.7 * hard + 0.3 * hard[partners]
  closed = lambda z: 0.7 * loss(z, labels) + 0.3 * loss(z, labels[partners])
  np.testing.assert_allclose(expected_loss(loss, logits, mixed), closed(logits), rtol=1e-12)
  gradient = jax.grad(lambda z: expected_loss(loss, z, mixed).sum())(logits)
  np.testing.assert_allclose(gradient, jax.grad(lambda z: closed(z).sum())(logits), rtol=1e-10, atol=1e-14)


ROWS = [
  row(
    expected_loss,
    lambda rng: (draw_logits(rng), draw_probabilities(rng)),
    call=lambda logits, soft, **options: expected_loss(losses.comp_sum_loss, logits, soft, **options),
    extreme=extreme_logits,
    bad=BAD_SAME_SHAPE,
    examples="any",
    options=dict(tau=(1.0, 2.5)),
  ),
]
