"""FTRL: optimality, closed forms, gradients, and the bound that only the log-barrier has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.solvers import follow_the_regularized_leader
from jaxreg.solvers.follow_the_regularized_leader import ftrl_entropy, ftrl_log_barrier
from tests.conformance import draw_logits, extreme_logits, row

barrier = jax.jit(lambda losses, rate: ftrl_log_barrier(losses, learning_rate=rate))


@pytest.mark.golden
def test_golden_18_adversarial_mdp_leaders(golden, x64):
  file = golden("18-adversarial_mdp")
  for case, arrays, _ in file.cases():
    if "out_p_logbarrier" in arrays:
      rate, losses = file.meta["cases"][case.removeprefix("case")]["eta"], jnp.asarray(arrays["cum_loss"])
      policy = barrier(losses, rate)
      np.testing.assert_allclose(policy, arrays["out_p_logbarrier"], rtol=1e-9, atol=1e-12)
      multiplier = 1 / np.asarray(policy)[:, 0] - rate * arrays["cum_loss"][:, 0]
      # Of the size of the scaled losses, to whose rounding the multiplier is known.
      np.testing.assert_allclose(
        multiplier, arrays["out_lambda"], rtol=1e-9, atol=1e-12 * rate * np.abs(losses).max()
      )  # fmt: skip
      entropy = ftrl_entropy(losses, learning_rate=rate)
      np.testing.assert_allclose(entropy, arrays["out_p_hedge"], rtol=1e-9, atol=1e-12)
      jacobian = jax.vmap(jax.jacobian(lambda x, rate=rate: ftrl_log_barrier(x, learning_rate=rate)))(losses)
      np.testing.assert_allclose(jacobian, arrays["jac_p_logbarrier"], rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e3, 1e8, 1e11]), st.floats(1e-3, 10))
def test_optimality(seed, scale, rate):
  with jax.enable_x64(True):
    losses = scale * np.random.default_rng(seed).normal(size=(5, 6))
    policy = np.asarray(barrier(losses, rate))
    np.testing.assert_allclose(policy.sum(-1), 1, rtol=1e-12)
    assert (policy > 0).all()
    gaps = rate * (losses - losses.min(-1, keepdims=True))
    slack = 1 / policy - gaps
    np.testing.assert_allclose(slack, slack[:, :1] + 0 * slack, rtol=1e-8, atol=1e-8 * gaps.max())


def test_closed_forms_and_gradients(x64):
  np.testing.assert_allclose(barrier(jnp.full(7, -3e9), 0.5), np.full(7, 1 / 7), rtol=1e-14)
  gaps = np.array([-50.0, -1.0, 0.0, 0.1, 4.0, 1e5])
  first = barrier(jnp.stack([gaps, 0 * gaps], 1), 2.0)[:, 0]
  delta = 2 * gaps
  np.testing.assert_allclose(first, 2 / (delta + 2 + np.hypot(delta, 2)), rtol=1e-9)
  losses = jnp.asarray(np.random.default_rng(0).normal(size=5))
  jacobian = jax.jit(jax.jacobian(barrier))(losses, 0.7)
  steps = [(barrier(losses + 1e-5 * e, 0.7) - barrier(losses - 1e-5 * e, 0.7)) / 2e-5 for e in np.eye(5)]
  np.testing.assert_allclose(jacobian, np.stack(steps, 1), atol=1e-9)
  np.testing.assert_allclose(jacobian.sum(1), 0, atol=1e-14)


def test_bound_for_arbitrary_losses(x64):
  """Regret over the allowed `sum eta sum_a p c^2` stays below one for the log-barrier, not for entropy."""
  random = np.random.default_rng(0)
  sequences = random.normal(size=(40, 30, 4)) * 10.0 ** random.uniform(-2, 6, size=(40, 1, 1))
  sequences[:20] = -np.abs(sequences[:20])
  rates = 10.0 ** random.uniform(-6, 0, size=40)
  comparators = random.dirichlet(np.ones(4), size=40)

  @jax.jit
  def play(losses, rate):
    def step(total, loss):
      return total + loss, ftrl_log_barrier(total, learning_rate=rate)

    return jax.lax.scan(step, jnp.zeros(4), losses)[1]

  for losses, rate, comparator in zip(sequences, rates, comparators):
    policies = np.asarray(play(losses, rate))
    regret = np.sum((policies - comparator) * losses)
    allowed = -(np.log(comparator).sum() + 4 * np.log(4)) / rate + rate * np.sum(policies * losses**2)
    assert regret <= allowed
  # One step of exponential weights from p with one very negative loss breaks the bound.
  rate, p, c = 1.0, np.array([np.exp(-10), 1 - np.exp(-10)]), np.array([-20.0, 0.0])
  stability = p @ c + np.log(p @ np.exp(-rate * c)) / rate
  np.testing.assert_allclose(stability / (rate * p @ c**2), 551, rtol=0.1)


def test_masked_actions_and_bad_input():
  losses, where = jnp.array([[0.3, -9.0, 1.0]]), jnp.array([True, False, True])
  for leader in (ftrl_log_barrier, ftrl_entropy):
    some = leader(losses[:, ::2], learning_rate=0.5)
    policy = leader(losses, learning_rate=0.5, where=where)
    np.testing.assert_allclose(policy[:, ::2], some, rtol=1e-6)
    assert policy[0, 1] == 0
    with pytest.raises(ValueError, match="learning_rate must lie"):
      leader(losses, learning_rate=-1.0)
    with pytest.raises(ValueError, match="cumulative_losses must be floating"):
      leader(jnp.ones(3, int), learning_rate=1.0)


ROWS = [
  *(
    row(
      function,
      lambda rng: (draw_logits(rng),),
      extreme=extreme_logits,
      bad=(("cumulative_losses", lambda x: (x.astype(np.int32),)),),
      examples="any",
      options={"learning_rate": (0.1, 1.0)},
    )
    for function in (follow_the_regularized_leader.ftrl_entropy, follow_the_regularized_leader.ftrl_log_barrier)
  ),
]
