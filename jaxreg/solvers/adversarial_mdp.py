"""Finite-horizon MDPs with linear Q-functions and changing losses, and policy optimization by regularized leaders.

Layers are numbered from 0; all of them have the same numbers of states and actions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape
from jaxreg.metrics.sizes import static_integer
from jaxreg.solvers import linear_q_estimation

__all__ = [
  "EpisodeResult",
  "LinearMDP",
  "best_policy_in_hindsight",
  "exact_visits",
  "linear_mdp",
  "occupancy",
  "optimize_policy",
  "policy_values",
  "simulated_visits",
]


class LinearMDP(NamedTuple):
  """An MDP whose losses, the learner knows, are linear in features."""

  features: jax.Array  # [layers, states, actions, size]
  transitions: jax.Array  # [layers, states, actions, next states], probabilities; the last layer's are not used
  start: jax.Array  # [states], probabilities of the first state


class EpisodeResult(NamedTuple):
  """What one episode, or each of many along a leading axis, says for the regret."""

  value: jax.Array  # expected loss of the policy that was played, exact
  least_estimate: jax.Array  # smallest entry of the estimated Q-functions


def linear_mdp(features: ArrayLike, measures: ArrayLike, start: ArrayLike) -> LinearMDP:
  """The MDP with transitions `P_h(s' | s, a) = phi_h(s, a)' mu_h(s')`.

  >>> import jax.numpy as jnp
  >>> mdp = linear_mdp(jnp.full((1, 2, 3, 2), 0.5), jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.array([1.0, 0.0]))
  >>> mdp.transitions[0, 0, 0].tolist()
  [0.5, 0.5]

  Args:
    features: `phi`, probabilities `[layers, states, actions, size]`.
    measures: `mu`, probabilities `[layers, size, next states]`.
    start: probabilities `[states]`.

  Returns:
    The `LinearMDP`; losses that are linear in the features give it linear Q-functions.

  Raises:
    ValueError: when shapes do not fit or features are not floating point.

  Reference: Jin, Yang, Wang, Jordan, "Provably Efficient Reinforcement Learning with Linear Function Approximation",
    COLT 2020, Assumption A.
  """
  check_float("features", features)
  layers, states, _, size = features.shape
  if measures.shape != (layers, size, states):
    raise ValueError(f"measures must have shape {(layers, size, states)}, got {measures.shape}.")
  if start.shape != (states,):
    raise ValueError(f"start must have shape {(states,)}, got {start.shape}.")
  return LinearMDP(features, jnp.einsum("hsad,hdt->hsat", features, measures), start)


def occupancy(mdp: LinearMDP, policy: ArrayLike) -> jax.Array:
  """How often a policy visits each state and action of each layer.

  >>> import jax.numpy as jnp
  >>> mdp = LinearMDP(jnp.ones((1, 1, 2, 1)), jnp.ones((1, 1, 2, 1)), jnp.ones(1))
  >>> occupancy(mdp, jnp.array([[[0.25, 0.75]]])).tolist()
  [[[0.25, 0.75]]]

  Args:
    mdp: the `LinearMDP`.
    policy: probabilities `[layers, states, actions]`.

  Returns:
    `[layers, states, actions]`, summing to one in each layer.

  Raises:
    ValueError: when the policy does not fit.

  Reference: none.
  """
  _check_fits("policy", mdp, policy)
  states, visits = mdp.start, []
  for layer in range(policy.shape[0]):
    visits.append(states[:, None] * policy[layer])
    states = jnp.einsum("sa,sat->t", visits[-1], mdp.transitions[layer])
  return jnp.stack(visits)


def policy_values(mdp: LinearMDP, losses: ArrayLike, policy: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """A policy's expected losses to go, `Q_h(s, a)` and `V_h(s)`.

  >>> import jax.numpy as jnp
  >>> mdp = LinearMDP(jnp.ones((2, 1, 2, 1)), jnp.ones((2, 1, 2, 1)), jnp.ones(1))
  >>> q, v = policy_values(mdp, jnp.ones((2, 1, 2)), jnp.full((2, 1, 2), 0.5))
  >>> v.ravel().tolist()
  [2.0, 1.0]

  Args:
    mdp: the `LinearMDP`.
    losses: floating `[layers, states, actions]`.
    policy: probabilities `[layers, states, actions]`.

  Returns:
    `Q`, `[layers, states, actions]`, and `V`, `[layers, states]`.

  Raises:
    ValueError: when losses or policy do not fit.

  Reference: none.
  """
  _check_fits("losses", mdp, losses)
  _check_fits("policy", mdp, policy)
  later, q, v = jnp.zeros_like(losses[0, :, 0]), [], []
  for layer in reversed(range(losses.shape[0])):
    q.append(losses[layer] + mdp.transitions[layer] @ later)
    later = jnp.sum(q[-1] * policy[layer], -1)
    v.append(later)
  return jnp.stack(q[::-1]), jnp.stack(v[::-1])


def best_policy_in_hindsight(mdp: LinearMDP, total_losses: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """The policy of least total loss over many episodes; one for the sum of the losses, as transitions do not change.

  >>> import jax.numpy as jnp
  >>> mdp = LinearMDP(jnp.ones((1, 1, 2, 1)), jnp.ones((1, 1, 2, 1)), jnp.ones(1))
  >>> policy, value = best_policy_in_hindsight(mdp, jnp.array([[[3.0, 2.0]]]))
  >>> policy.tolist(), float(value)
  ([[[0.0, 1.0]]], 2.0)

  Args:
    mdp: the `LinearMDP`.
    total_losses: floating `[layers, states, actions]`, summed over the episodes.

  Returns:
    The deterministic policy `[layers, states, actions]`, and its total loss, a scalar.

  Raises:
    ValueError: when the losses do not fit.

  Reference: none.
  """
  _check_fits("total_losses", mdp, total_losses)
  later, policy = jnp.zeros_like(total_losses[0, :, 0]), []
  for layer in reversed(range(total_losses.shape[0])):
    q = total_losses[layer] + mdp.transitions[layer] @ later
    policy.append(jax.nn.one_hot(q.argmin(-1), q.shape[-1], dtype=q.dtype))
    later = q.min(-1)
  return jnp.stack(policy[::-1]), mdp.start @ later


def exact_visits(mdp: LinearMDP, policy: ArrayLike, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """All features and how often a policy visits them: what infinitely many simulated trajectories would give.

  >>> import jax, jax.numpy as jnp
  >>> mdp = LinearMDP(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 2, 1)), jnp.ones(1))
  >>> features, weights = exact_visits(mdp, jnp.array([[[0.25, 0.75]]]), jax.random.key(0))
  >>> features.shape, weights.tolist()
  ((1, 2, 3), [[0.25, 0.75]])

  Args:
    mdp: the `LinearMDP`.
    policy: probabilities `[layers, states, actions]`.
    key: not used.

  Returns:
    Features `[layers, states * actions, size]` and weights `[layers, states * actions]`, summing to one.

  Raises:
    ValueError: when the policy does not fit.

  Reference: none.
  """
  del key
  layers, size = mdp.features.shape[0], mdp.features.shape[-1]
  return mdp.features.reshape(layers, -1, size), occupancy(mdp, policy).reshape(layers, -1)


def simulated_visits(
  mdp: LinearMDP, policy: ArrayLike, key: jax.Array, *, trajectories: int
) -> tuple[jax.Array, jax.Array]:
  """Features along simulated trajectories of a policy.

  >>> import jax, jax.numpy as jnp
  >>> mdp = LinearMDP(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 2, 1)), jnp.ones(1))
  >>> simulate = jax.jit(lambda key: simulated_visits(mdp, jnp.array([[[0.25, 0.75]]]), key, trajectories=4))
  >>> features, weights = simulate(jax.random.key(0))
  >>> features.shape, weights[0].tolist()
  ((1, 4, 3), [0.25, 0.25, 0.25, 0.25])

  Args:
    mdp: the `LinearMDP`.
    policy: probabilities `[layers, states, actions]`.
    key: threefry key.
    trajectories: static, at least 1.

  Returns:
    Features `[layers, trajectories, size]` and weights `[layers, trajectories]`, summing to one.

  Raises:
    ValueError: when the policy does not fit or `trajectories` is not positive.

  Reference: none.
  """
  _check_fits("policy", mdp, policy)
  trajectories = static_integer("trajectories", trajectories, low=1)
  states, actions = jax.vmap(lambda key: _trajectory(mdp, policy, key))(jax.random.split(key, trajectories))
  features = jax.vmap(lambda table, s, a: table[s, a])(mdp.features, states.T, actions.T)
  return features, jnp.full(features.shape[:-1], 1 / trajectories, features.dtype)


def optimize_policy(
  mdp: LinearMDP,
  losses: ArrayLike,
  key: jax.Array,
  *,
  leader: Callable,
  estimate: Callable,
  ridge: ArrayLike,
  bonus_scale: ArrayLike = 0.0,
  visits: Callable = exact_visits,
  observe: Callable | None = None,
  cumulative: ArrayLike | None = None,
) -> tuple[jax.Array, EpisodeResult]:
  """Policy optimization with a simulator: in every state a regularized leader of estimated Q-functions less bonuses.

  Each episode plays `pi = leader(L)`, estimates its Q-function from the losses along one trajectory, and adds
  `Q - B` to `L`. Log-barrier and standard estimate are the paper's Algorithm 1, negative entropy and the
  magnitude-reduced estimate its Algorithm 2.

  >>> import functools, jax, jax.numpy as jnp
  >>> from jaxreg.solvers.follow_the_regularized_leader import ftrl_log_barrier
  >>> mdp = LinearMDP(jnp.eye(2)[None, None], jnp.ones((1, 1, 2, 1)), jnp.ones(1))
  >>> losses = jnp.tile(jnp.array([0.9, 0.1]), (200, 1, 1, 1))
  >>> standard = lambda *a: linear_q_estimation.linear_q_estimate(*a[:4])
  >>> leader = functools.partial(ftrl_log_barrier, learning_rate=0.2)
  >>> cumulative, episodes = jax.jit(lambda key: optimize_policy(
  ...   mdp, losses, key, leader=leader, estimate=standard, ridge=0.01))(jax.random.key(0))
  >>> bool(leader(cumulative)[0, 0, 1] > 0.8), episodes.value.shape
  (True, (200,))

  Args:
    mdp: the `LinearMDP`.
    losses: floating `[episodes, layers, states, actions]`, mean losses, chosen beforehand.
    key: threefry key.
    leader: `[layers, states, actions] -> [layers, states, actions]`, from cumulative losses to a policy.
    estimate: `(features, inverse_covariance, played_features, loss_to_go, visited features, their weights) ->
      [states, actions]`, of one layer: `magnitude_reduced_q_estimate`, or `linear_q_estimate` of the first four.
    ridge: `gamma`, added to covariances, positive; may be traced.
    bonus_scale: `beta` of the bonuses, non-negative; may be traced.
    visits: `(mdp, policy, key) -> (features, weights)`, the simulator; called twice in an episode.
    observe: `(key, mean loss) -> loss` that the learner sees; by default the mean.
    cumulative: `L` to start from, `[layers, states, actions]`; default zero.

  Returns:
    The cumulative losses after the last episode, and an `EpisodeResult` of arrays `[episodes]`.

  Raises:
    ValueError: when losses do not fit or a hyperparameter is outside its domain.

  Reference: Dai, Luo, Wei, Zimmert, "Refined Regret for Adversarial MDPs with Linear Function Approximation",
    ICML 2023, Algorithms 1 and 2.
  """
  check_float("losses", losses)
  if losses.ndim != 4:
    raise ValueError(f"losses must have shape [episodes, layers, states, actions], got {losses.shape}.")
  _check_fits("losses", mdp, losses[0])
  check_hyperparameter("ridge", ridge, low=0, open_low=True)
  check_hyperparameter("bonus_scale", bonus_scale, low=0)
  mdp = jax.tree.map(jnp.asarray, mdp)

  def episode(cumulative, inputs):
    loss, key = inputs
    play, see, first, second = jax.random.split(key, 4)
    policy = leader(cumulative)
    states, actions = _trajectory(mdp, policy, play)
    layers = jnp.arange(states.size)
    seen = loss[layers, states, actions]
    if observe is not None:
      seen = jax.vmap(observe)(jax.random.split(see, states.size), seen)
    to_go = jnp.cumsum(seen[::-1])[::-1]
    # Drawn apart: the magnitude is reduced without bias only if the reference is independent of the covariance.
    inverses = jax.vmap(lambda f, w: linear_q_estimation.ridge_inverse_covariance(f, w, ridge=ridge))(
      *visits(mdp, policy, first)
    )
    played = mdp.features[layers, states, actions]
    q = jax.vmap(estimate)(mdp.features, inverses, played, to_go, *visits(mdp, policy, second))
    bonuses = jax.vmap(lambda f, s, p: linear_q_estimation.quadratic_bonus(f, s, p, scale=bonus_scale))
    bonus = linear_q_estimation.dilated_bonus(bonuses(mdp.features, inverses, policy), mdp.transitions, policy)
    value = mdp.start @ policy_values(mdp, loss, policy)[1][0]
    return cumulative + q - bonus, EpisodeResult(value, q.min())

  cumulative = jnp.zeros_like(losses[0]) if cumulative is None else cumulative
  return jax.lax.scan(episode, cumulative, (losses, jax.random.split(key, losses.shape[0])))


def _check_fits(name: str, mdp: LinearMDP, array) -> None:
  check_float(name, array)
  check_same_shape(**{name: array, "features without the last axis": mdp.features[..., 0]})


def _trajectory(mdp: LinearMDP, policy: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """States and actions `[layers]` of one trajectory."""
  mdp, policy = jax.tree.map(jnp.asarray, (mdp, policy))  # which a traced state may index
  states, actions = [], []
  probabilities = mdp.start
  for layer in range(policy.shape[0]):
    one, two = jax.random.split(jax.random.fold_in(key, layer))
    states.append(_draw(one, probabilities))
    actions.append(_draw(two, policy[layer, states[-1]]))
    probabilities = mdp.transitions[layer, states[-1], actions[-1]]
  return jnp.stack(states), jnp.stack(actions)


def _draw(key: jax.Array, probabilities: jax.Array) -> jax.Array:
  """An index with the given probability, by inversion of the distribution function."""
  total = jnp.cumsum(probabilities)
  return jnp.sum(jax.random.uniform(key, (), total.dtype) * total[-1] >= total[:-1])
