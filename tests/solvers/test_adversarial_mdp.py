"""Linear MDPs: golden values, unbiased estimates and their range, bonuses, and a learner that learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.solvers import adversarial_mdp as mdps
from jaxreg.solvers import linear_q_estimation as estimation
from jaxreg.solvers.follow_the_regularized_leader import ftrl_entropy
from tests.conformance import row, unchanged


@jax.jit
def quantities(features, measures, start, losses, policy, ridge, scale, trajectory):
  """All that the golden file has, in one program."""
  mdp = mdps.linear_mdp(features, measures, start)
  visited, weights = mdps.exact_visits(mdp, policy, jax.random.key(0))
  q, v = mdps.policy_values(mdp, losses, policy)
  inverse = jax.vmap(lambda f, w: estimation.ridge_inverse_covariance(f, w, ridge=ridge))(visited, weights)
  bonus = jax.vmap(lambda f, s, p: estimation.quadratic_bonus(f, s, p, scale=scale))(features, inverse, policy)
  states, actions, to_go = trajectory
  played = features[jnp.arange(states.size), states, actions]
  reduced = functools.partial(estimation.magnitude_reduced_q_estimate, high=float(features.shape[0]))
  return {
    "P": mdp.transitions,
    "occupancy": weights.reshape(policy.shape),
    "Q": q,
    "V": v,
    "Sigma": jnp.einsum("hni,hn,hnj->hij", visited, weights, visited),
    "Sigma_inv": inverse,
    "bonus_b": bonus,
    "dilated_B": estimation.dilated_bonus(bonus, mdp.transitions, policy),
    "Qhat_standard": jax.vmap(estimation.linear_q_estimate)(features, inverse, played, to_go),
    "Qhat_magnitude_reduced": jax.vmap(reduced)(features, inverse, played, to_go, visited, weights),
  }


def start_of(states, first=0):
  return np.eye(states)[first]


@pytest.mark.golden
def test_golden_18_adversarial_mdp_processes(golden, x64):
  file = golden("18-adversarial_mdp")
  for case, arrays, _ in file.cases():
    if "phi" not in arrays:
      continue
    meta = file.meta["cases"][case.removeprefix("case")]
    phi = arrays["phi"]
    losses = np.einsum("hsad,hd->hsa", phi, arrays["theta_loss"])
    trajectory = arrays["traj_s"], arrays["traj_a"], arrays["traj_loss_to_go"]
    start = start_of(phi.shape[1], meta["start_state"])
    got = quantities(phi, arrays["mu"], start, losses, arrays["pi"], meta["gamma"], meta["beta"], trajectory)
    for name, value in got.items():
      np.testing.assert_allclose(value, arrays[f"out_{name}"], rtol=1e-9, atol=1e-12, err_msg=name)
    q = np.einsum("hsad,hd->hsa", phi, arrays["out_theta_Q"])  # linear Q-functions, as the estimates need
    np.testing.assert_allclose(got["Q"], q, rtol=1e-9)
    expected = np.einsum("hsai,hij,hjk,hk->hsa", phi, got["Sigma_inv"], got["Sigma"], arrays["out_theta_Q"])
    np.testing.assert_allclose(expected, arrays["out_expected_Qhat"], rtol=1e-9)


class Layer:
  """One layer's features, policy and exact covariance, in NumPy, and the estimates of every pair that may be played."""

  def __init__(self, features, policy, ridge):
    self.features, self.weights = features, policy
    self.inverse = estimation.ridge_inverse_covariance(jnp.asarray(features), jnp.asarray(policy), ridge=ridge)

  def estimates(self, to_go, low, high):
    standard = jax.vmap(lambda phi, g: estimation.linear_q_estimate(self.features, self.inverse, phi, g))
    reduced = jax.vmap(
      lambda phi, g: estimation.magnitude_reduced_q_estimate(
        self.features, self.inverse, phi, g, self.features, self.weights, low=low, high=high
      )
    )
    return standard(self.features, to_go), reduced(self.features, to_go)


@pytest.fixture(scope="module")
def layer():
  with jax.enable_x64(True):
    random = np.random.default_rng(0)
    yield Layer(random.normal(size=(6, 3)) / 2, random.dirichlet(np.ones(6)), 0.05)


def test_estimates_have_the_same_mean_and_the_reduced_one_is_bounded(layer, x64):
  theta = np.array([0.3, -0.2, 0.5])
  q = layer.features @ theta
  inverse = np.asarray(layer.inverse)
  sigma = layer.features.T @ (layer.weights[:, None] * layer.features)
  expected = layer.features @ inverse @ sigma @ theta
  norms = np.sqrt(np.einsum("ni,ij,nj->n", layer.features, inverse, layer.features))
  for low, high in ((0.0, 3.0), (-2.0, 2.0)):
    for estimate in layer.estimates(q, low, high):  # means are linear in the loss to go
      np.testing.assert_allclose(layer.weights @ np.asarray(estimate), expected, rtol=1e-10, atol=1e-10)
    for to_go in (low, 0.7, high):
      reduced = np.asarray(layer.estimates(np.full(6, to_go), low, high)[1])
      assert (reduced >= -high * norms * (1 + 1e-9)).all()


def test_unbiased_without_ridge(layer, x64):
  q = layer.features @ np.array([0.3, -0.2, 0.5])
  exact = Layer(layer.features, layer.weights, 1e-13)
  for estimate in exact.estimates(q, 0.0, 3.0):
    np.testing.assert_allclose(layer.weights @ np.asarray(estimate), q, atol=1e-8)


def test_range_on_the_stress_instance(x64):
  """A policy that has nearly stopped exploring: the standard estimate is below -1 / sqrt(gamma), the other is not."""
  ridge = 1 / 1024
  stress = Layer(np.array([[1.0, 0.0], [0.7, 0.7], [0.7, -0.7]]), np.array([0.9998, 1e-4, 1e-4]), ridge)
  standard, reduced = stress.estimates(np.ones(3), -1.0, 1.0)
  standard = np.minimum(standard, -standard)  # losses of either sign
  assert standard.min() < -1 / np.sqrt(ridge) < np.min(reduced)


def test_tabular_features_give_importance_weights(x64):
  policy = np.array([0.5, 0.3, 0.2])
  standard, reduced = Layer(np.eye(3), policy, 0.1).estimates(np.array([0.4, 1.0, 0.7]), 0.0, 1.0)
  np.testing.assert_allclose(standard, np.diag([0.4, 1.0, 0.7] / (policy + 0.1)), rtol=1e-12)
  np.testing.assert_allclose(reduced, standard, rtol=1e-12, atol=1e-15)


def test_dilated_bonus_of_a_constant(x64):
  layers = 4
  transitions = np.random.default_rng(0).dirichlet(np.ones(3), (layers, 3, 2))
  policy = np.full((layers, 3, 2), 0.5)
  bonus = jax.jit(estimation.dilated_bonus)
  assert not np.any(bonus(np.zeros((layers, 3, 2)), transitions, policy))
  total = bonus(np.full((layers, 3, 2), 0.3), transitions, policy)
  np.testing.assert_allclose(total[0], 0.3 * ((1 + 1 / layers) ** layers - 1) * layers, rtol=1e-12)


def random_mdp(seed, layers=3, states=4, actions=3, size=3):
  random = np.random.default_rng(seed)
  features = random.dirichlet(np.full(size, 0.3), (layers, states, actions))
  measures = random.dirichlet(np.full(states, 0.3), (layers, size))
  return features, measures, start_of(states), random


def test_occupancies_values_and_the_best_policy(x64):
  features, measures, start, random = random_mdp(0)
  mdp = mdps.linear_mdp(*map(jnp.asarray, (features, measures, start)))
  losses, policy = random.uniform(size=(3, 4, 3)), random.dirichlet(np.ones(3), (3, 4))
  losses, policy = jnp.asarray(losses), jnp.asarray(policy)

  @jax.jit
  def compare(losses, policy):
    best, value = mdps.best_policy_in_hindsight(mdp, losses)
    at = lambda policy: mdps.policy_values(mdp, losses, policy)[1][0] @ mdp.start
    return mdps.occupancy(mdp, policy), at(policy), at(best), value

  visits, value, best, found = compare(losses, policy)
  np.testing.assert_allclose(visits.sum((1, 2)), 1, rtol=1e-12)
  np.testing.assert_allclose(jnp.sum(visits * losses), value, rtol=1e-12)
  np.testing.assert_allclose(best, found, rtol=1e-12)
  for seed in range(20):
    other = np.eye(3)[np.random.default_rng(seed).integers(0, 3, (3, 4))]
    assert compare(losses, jnp.asarray(other))[1] >= found - 1e-12


def test_matrix_geometric_resampling_is_the_inverse_in_the_mean(x64):
  random = np.random.default_rng(0)
  support = random.normal(size=(5, 3))
  support /= np.linalg.norm(support, axis=1, keepdims=True)
  samples = support[random.integers(0, 5, (300, 2000))]
  estimates = jax.jit(jax.vmap(lambda x: estimation.matrix_geometric_resampling(x, ridge=0.1)))(samples)
  exact = np.linalg.inv(0.1 * np.eye(3) + support.T @ support / 5)
  error = np.asarray(estimates).std(0) / np.sqrt(300)
  assert (np.abs(np.asarray(estimates).mean(0) - exact) < 3 * error).all()


def test_learning_with_a_simulator():
  features, measures, start, random = random_mdp(1)
  mdp = mdps.linear_mdp(*(jnp.asarray(x, jnp.float32) for x in (features, measures, start)))
  theta = random.uniform(size=(3, 3)).astype(np.float32)
  losses = jnp.tile(jnp.asarray(np.einsum("hsad,hd->hsa", features, theta), jnp.float32), (400, 1, 1, 1))

  @jax.jit
  @jax.vmap
  def learn(key):
    return mdps.optimize_policy(
      mdp,
      losses,
      key,
      leader=functools.partial(ftrl_entropy, learning_rate=0.05),
      estimate=functools.partial(estimation.magnitude_reduced_q_estimate, high=3.0),
      ridge=0.05,
      bonus_scale=1e-3,
      visits=functools.partial(mdps.simulated_visits, trajectories=16),
    )[1].value

  _, best = mdps.best_policy_in_hindsight(mdp, losses[0])
  regret = np.asarray(learn(jax.random.split(jax.random.key(0), 4))).mean(0) - float(best)
  assert regret[-50:].mean() < 0.6 * regret[:50].mean() and regret.min() > -1e-5


def test_simulated_visits_are_those_of_the_policy():
  features, measures, start, random = random_mdp(2)
  mdp = mdps.linear_mdp(*(jnp.asarray(x, jnp.float32) for x in (features, measures, start)))
  policy = jnp.asarray(random.dirichlet(np.ones(3), (3, 4)), jnp.float32)
  simulate = jax.jit(lambda key: mdps.simulated_visits(mdp, policy, key, trajectories=4000))
  visited, weights = simulate(jax.random.key(0))
  exact, occupancies = mdps.exact_visits(mdp, policy, jax.random.key(0))
  mean = lambda f, w: jnp.einsum("hni,hn->hi", f, w)
  np.testing.assert_allclose(mean(visited, weights), mean(exact, occupancies), atol=5 / np.sqrt(4000))


def test_bad_input():
  ones = jnp.ones
  with pytest.raises(ValueError, match="measures must have shape"):
    mdps.linear_mdp(ones((1, 2, 2, 3)), ones((1, 2, 2)), ones(2))
  with pytest.raises(ValueError, match="start must have shape"):
    mdps.linear_mdp(ones((1, 2, 2, 3)), ones((1, 3, 2)), ones(3))
  mdp = mdps.LinearMDP(ones((1, 2, 2, 3)), ones((1, 2, 2, 2)), ones(2))
  with pytest.raises(ValueError, match="equal shapes"):
    mdps.occupancy(mdp, ones((1, 2, 3)))
  with pytest.raises(ValueError, match="policy must be floating"):
    mdps.policy_values(mdp, ones((1, 2, 2)), ones((1, 2, 2), int))
  with pytest.raises(ValueError, match="trajectories must be a positive integer"):
    mdps.simulated_visits(mdp, ones((1, 2, 2)), jax.random.key(0), trajectories=0)
  with pytest.raises(ValueError, match="losses must have shape"):
    mdps.optimize_policy(mdp, ones((1, 2, 2)), jax.random.key(0), leader=None, estimate=None, ridge=1.0)
  with pytest.raises(ValueError, match="ridge must lie"):
    estimation.ridge_inverse_covariance(ones((4, 2)), ones(4), ridge=0.0)
  with pytest.raises(ValueError, match="weights must have one entry"):
    estimation.ridge_inverse_covariance(ones((4, 2)), ones(3), ridge=1.0)
  with pytest.raises(ValueError, match="step_size must lie"):
    estimation.matrix_geometric_resampling(ones((4, 2)), ridge=1.0, step_size=2.0)
  with pytest.raises(ValueError, match="played_features must have shape"):
    estimation.linear_q_estimate(ones((4, 2)), ones((2, 2)), ones(3), ones(()))
  with pytest.raises(ValueError, match="inverse_covariance must have shape"):
    estimation.linear_q_estimate(ones((4, 2)), ones((3, 3)), ones(2), ones(()))
  with pytest.raises(ValueError, match="high must lie"):
    estimation.magnitude_reduced_q_estimate(
      ones((4, 2)), ones((2, 2)), ones(2), ones(()), ones((4, 2)), ones(4), high=-1
    )
  with pytest.raises(ValueError, match="scale must lie"):
    estimation.quadratic_bonus(ones((1, 2, 3)), ones((3, 3)), ones((1, 2)), scale=-1)
  with pytest.raises(ValueError, match="inverse_covariance must have shape"):
    estimation.quadratic_bonus(ones((3, 4, 2)), jnp.eye(3), ones((3, 4)), scale=1.0)
  with pytest.raises(ValueError, match="policy must have the leading shape"):
    estimation.quadratic_bonus(ones((1, 2, 3)), ones((3, 3)), ones((2,)), scale=1)
  with pytest.raises(ValueError, match="transitions must have shape"):
    estimation.dilated_bonus(ones((1, 2, 2)), ones((1, 2, 2)), ones((1, 2, 2)))


def _problem(dtype):
  """Two layers of three states with two actions, and features of size two."""
  rng = np.random.default_rng(0)
  arrays = (rng.dirichlet(np.ones(2), (2, 3, 2)), rng.dirichlet(np.ones(3), (2, 2)), rng.dirichlet(np.ones(3)))
  return mdps.linear_mdp(*(jnp.asarray(array, dtype) for array in arrays))


def _policy(rng):
  return rng.dirichlet(np.ones(2), (2, 3))


ROWS = [
  row(
    mdps.occupancy,
    lambda rng: (_policy(rng),),
    call=lambda policy: mdps.occupancy(_problem(policy.dtype), policy),
    extreme=unchanged,
  ),
  row(
    mdps.policy_values,
    lambda rng: (rng.normal(size=(2, 3, 2)), _policy(rng)),
    call=lambda losses, policy: list(mdps.policy_values(_problem(policy.dtype), losses, policy)),
  ),
  row(
    mdps.exact_visits,
    lambda rng: (_policy(rng),),
    call=lambda policy: list(mdps.exact_visits(_problem(policy.dtype), policy, jax.random.key(0))),
    extreme=unchanged,
  ),
  row(
    mdps.best_policy_in_hindsight,
    lambda rng: (rng.normal(size=(2, 3, 2)),),
    call=lambda losses: mdps.best_policy_in_hindsight(_problem(losses.dtype), losses)[1],
    differentiable=False,
  ),
]


EXEMPT = {
  "EpisodeResult": "result of optimize_policy",
  "LinearMDP": "what linear_mdp makes",
  "linear_mdp": "holds its arguments, in every row here",
  "optimize_policy": "simulates episodes with functions of the caller; the golden file carries it",
  "simulated_visits": "draws; its tests compare them with the exact ones",
}
