"""Losses of attacked logits: golden values, and the chain of bounds from mistakes to the smooth loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.adversarial.attacks import pgd
from jaxreg.losses import adversarial, comp_sum
from tests.conformance import BAD_LABELS, draw_classification, elementwise_row, extreme_logits, loss_row, row

pytestmark = pytest.mark.usefixtures("x64")
SMOOTH = jax.jit(adversarial.smooth_adversarial_comp_sum_loss)
MARGIN = jax.jit(adversarial.adversarial_margin_comp_sum_loss)


@pytest.mark.golden
def test_golden_03_comp_sum_adversarial(golden):
  for _, arrays, meta in golden("03-comp_sum").cases():
    names = ("logits", "logits_adv", "labels")
    logits, attacked, labels = (jnp.asarray(arrays[name]) for name in names)
    tau, rho, nu = meta["tau"], meta["rho"], meta["nu"]
    close = lambda actual, name: np.testing.assert_allclose(actual, arrays[name], rtol=1e-10, atol=1e-12)
    loss = lambda z, moved: SMOOTH(z, moved, labels, tau=tau, rho=rho, nu=nu)
    close(loss(logits, attacked), "out_smooth_adv_loss")
    gradients = jax.grad(lambda *both: loss(*both).sum(), argnums=(0, 1))(logits, attacked)
    close(gradients[0], "grad_smooth_adv_logits")
    close(gradients[1], "grad_smooth_adv_logits_adv")
    close(adversarial.margin_shift_norm(logits, attacked, labels), "out_margin_shift_norm")
    close(MARGIN(attacked, labels, tau=tau, rho=rho), "out_rho_margin_loss_at_adv")


def test_rho_margin():
  margins = jnp.array([-2.0, 0.0, 0.5, 1.0, 3.0])
  np.testing.assert_allclose(adversarial.rho_margin(margins), [1, 1, 0.5, 0, 0])
  np.testing.assert_allclose(adversarial.rho_margin(margins, rho=4.0), [1, 1, 0.875, 0.75, 0.25])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 2.5), st.floats(0.2, 3.0), st.floats(0.0, 5.0))
def test_smooth_loss_bounds_margin_loss_bounds_mistakes(seed, tau, rho, distance):
  rng = np.random.default_rng(seed)
  with jax.enable_x64(True):
    logits = jnp.asarray(2 * rng.normal(size=(16, 5)))
    attacked = logits + distance * rng.normal(size=(16, 5))
    labels = jnp.asarray(rng.integers(0, 5, 16))
    margin = MARGIN(attacked, labels, tau=tau, rho=rho)
    smooth = SMOOTH(logits, attacked, labels, tau=tau, rho=rho, nu=2 / rho)  # sqrt(classes - 1) / rho
    mistakes = attacked.argmax(-1) != labels
    one = comp_sum.comp_sum_outer(jnp.ones(()), tau=tau)
    assert jnp.all(smooth >= margin - 1e-9)
    assert jnp.all(margin >= one * mistakes - 1e-9)


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0, 2.0])
def test_smooth_loss_bounds_the_margin_loss_at_the_attack(tau):
  rng = np.random.default_rng(0)
  weights, labels = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.integers(0, 4, 32))
  inputs = jnp.asarray(rng.normal(size=(32, 6)))
  model = lambda x: jnp.tanh(x) @ weights
  shift = lambda x: adversarial.margin_shift_norm(model(inputs), model(x), labels)
  found = pgd(shift, inputs, jax.random.key(0), radius=0.3, step_size=0.1, steps=10)
  smooth = SMOOTH(model(inputs), model(found), labels, tau=tau, rho=1.0, nu=np.sqrt(3))
  other = inputs + jnp.asarray(rng.uniform(-0.3, 0.3, inputs.shape))
  for attacked in (found, inputs, other):
    own = SMOOTH(model(inputs), model(attacked), labels, tau=tau, rho=1.0, nu=np.sqrt(3))
    assert jnp.all(own >= MARGIN(model(attacked), labels, tau=tau, rho=1.0) - 1e-12)
  assert jnp.all(smooth >= MARGIN(model(found), labels, tau=tau, rho=1.0) - 1e-12)
  # The attack moves the margins further than a random point of the ball does.
  assert jnp.all(shift(found) > shift(other))


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0, 2.0])
def test_without_an_attack_it_is_the_comp_sum_loss(tau):
  rng = np.random.default_rng(0)
  logits, labels = jnp.asarray(rng.normal(size=(6, 5))), jnp.asarray(rng.integers(0, 5, 6))
  plain = lambda z: comp_sum.comp_sum_loss(z, labels, tau=tau)
  smooth = lambda z: adversarial.smooth_adversarial_comp_sum_loss(z, z, labels, tau=tau)
  np.testing.assert_allclose(smooth(logits), plain(logits), atol=2e-6)  # the square root of epsilon
  for gradient in (jax.grad(lambda z: smooth(z).sum()), jax.grad(lambda z: SMOOTH(logits, z, labels, tau=tau).sum())):
    assert jnp.isfinite(gradient(logits)).all()
  np.testing.assert_allclose(
    jax.grad(lambda z: smooth(z).sum())(logits), jax.grad(lambda z: plain(z).sum())(logits), atol=1e-12
  )


def test_trades():
  rng = np.random.default_rng(0)
  logits, attacked = jnp.asarray(rng.normal(size=(2, 6, 5)))
  labels = jnp.asarray(rng.integers(0, 5, 6))
  p, q = jax.nn.softmax(logits), jax.nn.softmax(attacked)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels) + 6 * jnp.sum(p * jnp.log(p / q), -1)
  np.testing.assert_allclose(adversarial.trades_loss(logits, attacked, labels), expected, rtol=1e-12)
  unweighted = adversarial.trades_loss(logits, attacked, labels, weight=0.0)
  np.testing.assert_allclose(unweighted, optax.softmax_cross_entropy_with_integer_labels(logits, labels), rtol=1e-12)


def test_bad_input():
  logits, labels = jnp.zeros((3, 4)), jnp.zeros(3, int)
  for function in (adversarial.smooth_adversarial_comp_sum_loss, adversarial.trades_loss):
    with pytest.raises(ValueError, match="equal shapes"):
      function(logits, logits[:1], labels)
    with pytest.raises(ValueError, match="adversarial_logits must be floating"):
      function(logits, logits.astype(int), labels)
  with pytest.raises(ValueError, match="rho must lie in"):
    adversarial.adversarial_margin_comp_sum_loss(logits, labels, rho=0.0)
  with pytest.raises(ValueError, match="nu must lie in"):
    adversarial.smooth_adversarial_comp_sum_loss(logits, logits, labels, nu=-1.0)
  with pytest.raises(ValueError, match="weight must lie in"):
    adversarial.trades_loss(logits, logits, labels, weight=-1.0)


def attacked_loss(function, **options):
  """`function(logits, adversarial_logits, labels, **options)`, as a loss with an attack that turns logits around."""
  call = lambda logits, labels, **keywords: function(logits, -0.5 * logits, labels, **keywords)
  return row(
    function, draw_classification, call=call, extreme=extreme_logits, bad=BAD_LABELS, examples="any", options=options
  )


ROWS = [
  loss_row(adversarial.adversarial_margin_comp_sum_loss, tau=(0.5, 2.5), rho=(0.5, 3.0)),
  elementwise_row(adversarial.rho_margin, "margins", extreme=(-1e4, 0.0, 1e4), rho=(0.5, 3.0)),
  attacked_loss(adversarial.margin_shift_norm, epsilon=(1e-12, 1e-3)),
  attacked_loss(
    adversarial.smooth_adversarial_comp_sum_loss,
    tau=(0.5, 2.5),
    rho=(0.5, 3.0),
    nu=(0.0, 2.0),
    epsilon=(1e-12, 1e-3),
  ),
  attacked_loss(adversarial.trades_loss, weight=(0.0, 6.0)),
]
