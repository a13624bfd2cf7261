"""Adversarial MDPs: regret of order sqrt(K) by a log-barrier, or by an estimate that is never very negative.

Regrets on a stress instance, on contextual bandits whose losses switch, and on random linear MDPs; `run` learns one of
these. The card's larger setting has 5 layers, 100 states, 20 actions, 20 features, 2^17 episodes and 256 seeds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell
from jaxreg.solvers import adversarial_mdp as mdps
from jaxreg.solvers.follow_the_regularized_leader import ftrl_entropy, ftrl_log_barrier
from jaxreg.solvers.linear_q_estimation import linear_q_estimate, magnitude_reduced_q_estimate
from jaxreg.training import Task, TrainState, grid

CARD = "18-adversarial_mdp"
LEADERS = {"entropy": ftrl_entropy, "log_barrier": ftrl_log_barrier}
BONUS = 0.002
EARLY = 16  # the first episodes of an MDP are one in so many of all
ADDED = (
  "added after the log-barrier, the paper's Algorithm 1, had been seen in the figure, with the conditions that the"
  " magnitude-reduced estimates were given"
)
METHODS = ("reduced", "standard", "old tuning", "log-barrier")  # on the stress instance


@dataclasses.dataclass(frozen=True)
class Config:
  """The three comparisons, and the MDP that `run` learns.

  Attributes:
    leader: `entropy` or `log_barrier`.
    layers: of the MDP.
    states: in each layer.
    actions: in each state.
    size: of the features.
    episodes: of the MDP.
    runs: MDPs drawn for each seed of `measure`.
    stress_episodes: ascending numbers of episodes on the stress instance, over which growth is estimated.
    stress_runs: repetitions on the stress instance for each seed.
    bandit_episodes: of the contextual bandit.
    bandit_runs: bandits drawn for each seed.
  """

  leader: str = "entropy"
  layers: int = 3
  states: int = 8
  actions: int = 4
  size: int = 5
  episodes: int = 4096
  runs: int = 20
  stress_episodes: tuple[int, ...] = (1024, 4096, 16384)
  stress_runs: int = 100
  bandit_episodes: int = 8192
  bandit_runs: int = 40

  def __post_init__(self):
    if self.leader not in LEADERS:
      raise ValueError(f"leader must be one of {', '.join(LEADERS)}, got {self.leader!r}.")


PRESETS = {
  "smoke": Config(episodes=64, runs=2, stress_episodes=(16, 64, 256), stress_runs=8, bandit_episodes=64, bandit_runs=2),
  "cpu": Config(),
}


def tuned(actions: int, size: int, episodes: int, ridge: float | None = None) -> dict[str, float]:
  """Learning rate and ridge of regret sqrt(K): `sqrt(log A / (d K))`, `d / K`."""
  return {"learning_rate": np.sqrt(np.log(actions) / (size * episodes)), "ridge": ridge or size / episodes}


def tuned_before(actions: int, size: int, episodes: int) -> dict[str, float]:
  """Those of regret K^(2/3), which keep `eta H / gamma` below one."""
  return {"learning_rate": np.sqrt(np.log(actions) / size) * episodes ** (-2 / 3), "ridge": episodes ** (-1 / 3)}


def standard(features, inverse, played, to_go, *reference):
  """The standard estimate, which needs no reference."""
  del reference
  return linear_q_estimate(features, inverse, played, to_go)


def random_process(config: Config, seed: int):
  """Features and measures of a linear MDP, and the parameters of its episodes' losses, `[episodes, layers, size]`."""
  random = np.random.default_rng(seed)
  features = random.dirichlet(np.full(config.size, 0.3), (config.layers, config.states, config.actions))
  measures = random.dirichlet(np.full(config.states, 0.3), (config.layers, config.size))
  base = random.uniform(0.2, 0.8, (config.layers, config.size))
  theta = base + 0.2 * random.normal(size=(config.episodes, *base.shape))
  return features, measures, np.clip(theta, 0, 1)


def process_and_losses(features, measures, theta) -> tuple[mdps.LinearMDP, jax.Array]:
  """The MDP, which starts in state 0, and its losses `[episodes, layers, states, actions]`."""
  start = jnp.zeros(measures.shape[-1], features.dtype).at[0].set(1)
  return mdps.linear_mdp(features, measures, start), jnp.einsum("hsad,khd->khsa", features, theta)


def task(config: Config) -> Task:
  """One episode a step, of losses drawn beforehand; hyperparameters are those of `optimize_policy`."""
  parts = [np.asarray(part, np.float32) for part in random_process(config, 0)]
  mdp, losses = jax.device_get(jax.jit(process_and_losses)(*parts))
  total = losses.mean(0)
  estimate = functools.partial(magnitude_reduced_q_estimate, high=float(config.layers))

  def leader(hparams):
    return functools.partial(LEADERS[config.leader], learning_rate=hparams["learning_rate"])

  def value(policy, losses):
    return mdps.policy_values(mdp, losses, policy)[1][0] @ mdp.start

  def init(key, hparams):
    cumulative = jnp.zeros(losses.shape[1:])
    return TrainState.create(key, {"cumulative": cumulative, "policy": leader(hparams)(cumulative)})

  def step(state, batch, hparams):
    cumulative, episodes = mdps.optimize_policy(
      jax.tree.map(jnp.asarray, mdp), batch["x"], state.step_key(), leader=leader(hparams), estimate=estimate,
      ridge=hparams["ridge"], bonus_scale=hparams["bonus_scale"], cumulative=state.params["cumulative"],
    )  # fmt: skip
    # What the leader makes of the losses is what prediction needs.
    params = {"cumulative": cumulative, "policy": leader(hparams)(cumulative)}
    return state.advance(params=params), {"loss": episodes.value.mean()}

  def evaluate(state, hparams):
    del hparams
    best = mdps.best_policy_in_hindsight(mdp, jnp.asarray(total))[1]
    return {"regret_per_episode": value(state.params["policy"], jnp.asarray(total)) - best}

  return Task(
    init,
    step,
    data={"x": losses},
    batch_size=1,
    hparams={**tuned(config.actions, config.size, config.episodes), "bonus_scale": 0.0},
    evaluate=evaluate,
    predict=lambda state, inputs: jax.vmap(functools.partial(value, state.params["policy"]))(inputs),
    config=config,
  )


def cell(config: Config) -> Cell:
  """One run; learning rates around the tuned one × bonuses vary."""
  rate = tuned(config.actions, config.size, config.episodes)["learning_rate"]
  at = grid(learning_rate=[rate / 4, rate, 4 * rate], bonus_scale=[0.0, BONUS])
  return Cell(task(config), config.episodes, at, eval_every=config.episodes // 4)


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Regrets of the three comparisons, `[seeds, repetitions]`."""
  del trained
  with jax.enable_x64(True):
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    return _stress(config, keys) | _bandits(config, keys) | _processes(config, keys, seeds)


def _seeds_in_turn(function, inputs, options: dict):
  """`function(input, **options)` for `[seeds, repetitions]` inputs and `[settings]` options; `[settings, seeds, ...]`.

  The settings and repetitions of a seed run together, in one program for all settings.
  """
  options = {name: jnp.asarray(values, jnp.float64) for name, values in options.items()}
  repeated = jax.vmap(lambda input, options: function(input, **options), in_axes=(0, None))
  settings = jax.vmap(repeated, in_axes=(None, 0))
  results = jax.jit(lambda inputs: jax.lax.map(lambda some: settings(some, options), inputs))(inputs)
  return jax.tree.map(lambda x: np.asarray(x).swapaxes(0, 1), results)


def _stacked(settings: list[dict]) -> dict[str, np.ndarray]:
  return {name: np.array([setting[name] for setting in settings]) for name in settings[0]}


def _stress(config: Config, keys) -> dict[str, np.ndarray]:
  """One state, three actions, losses of one and minus one: where the standard estimate is very negative."""
  features = jnp.array([[1.0, 0.0], [0.7, 0.7], [0.7, -0.7]])
  mdp = mdps.LinearMDP(features[None, None], jnp.ones((1, 1, 3, 1)), jnp.ones(1))
  means = features @ jnp.array([-0.5, 0.0])
  counts = config.stress_episodes
  losses = jnp.tile(means, (max(counts), 1, 1, 1))

  def learn(leader, estimate):
    def regret(key, *, count, learning_rate, ridge):
      episodes = _episodes(mdp, losses, key, leader, estimate, learning_rate, ridge, _sign)
      played = jnp.arange(len(losses)) < count  # a run with the tuning for fewer episodes is cut off there
      least = jnp.min(episodes.least_estimate, where=played, initial=jnp.inf)
      return jnp.sum(episodes.value - means.min(), where=played), least

    return regret

  new = [{"count": n, **tuned(3, 2, n, ridge=1 / n)} for n in counts]
  old = [{"count": n, **tuned_before(3, 2, n)} for n in counts]
  double = [{**setting, "learning_rate": 2 * setting["learning_rate"]} for setting in new]
  reduced = functools.partial(magnitude_reduced_q_estimate, low=-1.0, high=1.0)
  keys = jax.vmap(lambda key: jax.random.split(key, config.stress_runs))(keys)
  measured = {}
  for leader, estimate, settings in (
    (ftrl_entropy, standard, {"standard": new, "old tuning": old}),
    (ftrl_entropy, reduced, {"reduced": new}),
    (ftrl_log_barrier, standard, {"log-barrier": double}),
  ):
    labels = [f"stress {name} {setting['count']}" for name, some in settings.items() for setting in some]
    regrets, least = _seeds_in_turn(learn(leader, estimate), keys, _stacked(sum(settings.values(), [])))
    measured |= dict(zip(labels, regrets)) | {f"{name} least": x.min(1) for name, x in zip(labels, least)}
  return measured


def _bandits(config: Config, keys) -> dict[str, np.ndarray]:
  """Four contexts, six actions, losses of one and minus one whose parameters change after half of the episodes."""
  count = config.bandit_episodes
  reduced = functools.partial(magnitude_reduced_q_estimate, low=-1.0, high=1.0)
  new, old = tuned(6, 3, count, ridge=1 / count), tuned_before(6, 3, count)

  def unit(key, *shape):
    vectors = jax.random.normal(key, (*shape, 3))
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

  def learn(estimate):
    def regret(key, *, learning_rate, ridge):
      one, two, play = jax.random.split(key, 3)
      features = unit(one, 1, 4, 6)
      mdp = mdps.LinearMDP(features, jnp.full((1, 4, 6, 4), 0.25), jnp.full(4, 0.25))
      losses = jnp.repeat(jnp.einsum("hsad,pd->phsa", features, 0.5 * unit(two, 2)), count // 2, axis=0)
      episodes = _episodes(mdp, losses, play, ftrl_entropy, estimate, learning_rate, ridge, _sign)
      return episodes.value.sum() - mdps.best_policy_in_hindsight(mdp, losses.sum(0))[1]

    return regret

  keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 1), config.bandit_runs))(keys)
  standards = _seeds_in_turn(learn(standard), keys, _stacked([new, old]))
  measured = {"bandit reduced": _seeds_in_turn(learn(reduced), keys, _stacked([new]))[0]}
  return measured | {"bandit standard": standards[0], "bandit old tuning": standards[1]}


def _processes(config: Config, keys, seeds) -> dict[str, np.ndarray]:
  """Random linear MDPs: regrets of the whole run and of its first sixteenth, and of the uniform policy."""
  count, first = config.episodes, config.episodes // EARLY
  reduced = functools.partial(magnitude_reduced_q_estimate, high=float(config.layers))

  def learn(estimate):
    def regrets(inputs, **options):
      key, parts = inputs
      mdp, losses = process_and_losses(*parts)
      values = _episodes(mdp, losses, key, ftrl_entropy, estimate, **options).value
      best = lambda n: mdps.best_policy_in_hindsight(mdp, losses[:n].sum(0))[1]
      uniform = jnp.full(losses.shape[1:], 1 / config.actions)
      still = mdps.policy_values(mdp, losses.sum(0), uniform)[1][0] @ mdp.start
      return values.sum() - best(count), values[:first].sum() - best(first), still - best(count)

    return regrets

  new, old = tuned(config.actions, config.size, count), tuned_before(config.actions, config.size, count)
  keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2), config.runs))(keys)
  drawn = [[random_process(config, 1000 * seed + run) for run in range(config.runs)] for seed in seeds]
  inputs = keys, tuple(np.array([[parts[i] for parts in row] for row in drawn]) for i in range(3))
  bonuses = _stacked([{**new, "bonus_scale": 0.0}, {**new, "bonus_scale": BONUS}])
  whole, start, uniform = _seeds_in_turn(learn(reduced), inputs, bonuses)
  before = _seeds_in_turn(learn(standard), inputs, _stacked([old]))[0]
  return {
    "mdp reduced": whole[0],
    "mdp reduced with bonus": whole[1],
    "mdp old tuning": before[0],
    "mdp uniform": uniform[0],
    "mdp reduced first": start[0],
  }


def _episodes(mdp, losses, key, leader, estimate, learning_rate, ridge, observe=None, bonus_scale=0.0):
  leader = functools.partial(leader, learning_rate=learning_rate)
  return mdps.optimize_policy(
    mdp, losses, key, leader=leader, estimate=estimate, ridge=ridge, bonus_scale=bonus_scale, observe=observe
  )[1]


def _sign(key, mean):
  """One or minus one with the given mean."""
  return jnp.where(jax.random.uniform(key) < (1 + mean) / 2, 1.0, -1.0)


def growth(config: Config, summary, name: str) -> np.ndarray:
  """Exponents of the growth of the mean regret with the number of episodes on the stress instance, `[seeds]`."""
  counts = config.stress_episodes
  means = np.stack([summary[f"stress {name} {count}"].mean(1) for count in counts])
  # By sums, and not by LAPACK, whose last bits depend on the machine and would change the record.
  centred = np.log(counts)[:, None] - np.log(counts).mean()
  return (centred * np.log(np.maximum(means, 1e-9))).sum(0) / (centred**2).sum()


def _tail(values) -> np.ndarray:
  return np.quantile(values, 0.95, axis=1)


def claims(config: Config) -> tuple[Claim, ...]:
  """On the stress instance, on bandits and on MDPs."""
  *earlier, most = config.stress_episodes
  counts = f"{', '.join(f'{count:,}' for count in earlier)} and {most:,}"
  stress = f"stress instance, {config.stress_runs} repetitions for each seed, {most:,} episodes"
  mdp = f"{config.runs} linear MDPs of {config.layers} layers for each seed"
  last = lambda s, name: s[f"stress {name} {most}"]
  means = lambda one, other: lambda s: s[one].mean(1) / s[other].mean(1)
  fitted = f"exponent fitted to mean regrets of {{}} at {counts} episodes of the stress instance"
  exponent = fitted.format("magnitude-reduced estimates")
  return (
    Claim(
      "tail",
      "With a tiny ridge, exponential weights are sometimes far off with standard estimates, but not with"
      " magnitude-reduced ones",
      f"95th percentile of the regret, standard over magnitude-reduced; {stress}",
      lambda s: _tail(last(s, "standard")) / _tail(last(s, "reduced")),
      at_least=1.8,
    ),
    Claim(
      "spread",
      "With a tiny ridge, the regret of exponential weights varies much less with magnitude-reduced than with standard"
      " estimates",
      f"standard deviation of the regret, standard over magnitude-reduced; {stress}",
      lambda s: last(s, "standard").std(1) / last(s, "reduced").std(1),
      at_least=3.0,
    ),
    Claim(
      "growth_above",
      "The regret of magnitude-reduced estimates grows hardly slower than the square root of the number of episodes",
      exponent,
      lambda s: growth(config, s, "reduced"),
      at_least=0.4,
    ),
    Claim(
      "growth_below",
      "The regret of magnitude-reduced estimates grows hardly faster than the square root of the number of episodes",
      exponent,
      lambda s: growth(config, s, "reduced"),
      at_most=0.7,
    ),
    Claim(
      "old_tuning",
      "The tuning for regret K^(2/3), which standard estimates needed, costs a multiple of magnitude-reduced estimates'"
      " regret",
      f"mean regret of standard estimates so tuned over that of magnitude-reduced ones; {stress}",
      means(f"stress old tuning {most}", f"stress reduced {most}"),
      at_least=2.5,
    ),
    Claim(
      "barrier_growth",
      "The regret of a log-barrier with standard estimates grows hardly faster than the square root of the number of"
      " episodes",
      fitted.format("the log-barrier"),
      lambda s: growth(config, s, "log-barrier"),
      at_most=0.7,
      amended=ADDED,
    ),
    Claim(
      "barrier_spread",
      "With a tiny ridge, the regret with standard estimates varies much less for a log-barrier than for exponential"
      " weights",
      f"standard deviation of the regret, exponential weights over the log-barrier; {stress}",
      lambda s: last(s, "standard").std(1) / last(s, "log-barrier").std(1),
      at_least=3.0,
      amended=ADDED,
    ),
    Claim(
      "barrier_old_tuning",
      "The tuning for regret K^(2/3) costs a multiple of the log-barrier's regret",
      f"mean regret of exponential weights so tuned over that of the log-barrier; {stress}",
      means(f"stress old tuning {most}", f"stress log-barrier {most}"),
      at_least=2.5,
      amended=ADDED,
    ),
    Claim(
      "bandit",
      "Magnitude-reduced estimates have less regret than the tuning for K^(2/3) on a benign contextual bandit whose"
      " losses switch",
      "mean regret of magnitude-reduced estimates over that of standard ones tuned for K^(2/3);"
      f" {config.bandit_runs} bandits for each seed, {config.bandit_episodes:,} episodes",
      means("bandit reduced", "bandit old tuning"),
      at_most=0.75,
    ),
    Claim(
      "mdp",
      f"Exponential weights of magnitude-reduced estimates learn an MDP of {config.layers} layers",
      f"mean regret over the uniform policy's, the larger of bonus 0 and {BONUS:g}; {mdp}, {config.episodes:,}"
      " episodes",
      lambda s: np.maximum(s["mdp reduced"].mean(1), s["mdp reduced with bonus"].mean(1)) / s["mdp uniform"].mean(1),
      at_most=0.65,
    ),
    Claim(
      "mdp_sublinear",
      "The regret per episode of magnitude-reduced estimates falls in an MDP",
      f"mean regret per episode of {config.episodes:,} episodes over that of the first {config.episodes // EARLY:,};"
      f" {mdp}",
      lambda s: s["mdp reduced"].mean(1) / s["mdp reduced first"].mean(1) / EARLY,
      at_most=0.7,
    ),
    Claim(
      "mdp_old_tuning",
      "Magnitude-reduced estimates have less regret in an MDP than standard ones tuned for K^(2/3)",
      "mean regret of standard estimates tuned for K^(2/3) over that of magnitude-reduced ones;"
      f" {mdp}, {config.episodes:,} episodes",
      means("mdp old tuning", "mdp reduced"),
      at_least=1.4,
    ),
  )


NOTES = (
  "Reported, not gated: on the benign bandit standard estimates with the same small ridge do as well as"
  " magnitude-reduced ones; the log-barrier with twice the learning rate on the stress instance.",
)
DEVIATIONS = (
  "The paper's theoretical learning rate with its fourth power of the horizon hardly learns in so few episodes and is"
  " not used.",
  "The algorithm without a simulator is out of scope.",
)


def figure(config: Config, summary, path) -> None:
  """Growth on the stress instance beside the bounds, the regrets there, and those of bandits and MDPs."""
  picture, (left, middle, right) = plots.panels(3, width=4.8)
  counts = np.array(config.stress_episodes)
  for name in METHODS:
    means = np.stack([summary[f"stress {name} {count}"].mean(1) for count in counts], axis=1)
    plots.curves(left, counts, {f"{name}: exponent {growth(config, summary, name).mean():.2f}": means}, marker="o")
  anchor = np.mean(summary[f"stress reduced {counts[0]}"])
  for power, style, label in ((1 / 2, ":", "1/2"), (2 / 3, "--", "2/3")):
    left.plot(counts, anchor * (counts / counts[0]) ** power, "k" + style, label=f"bound's growth, {label}")
  left.set(xscale="log", yscale="log", xlabel="episodes", ylabel="mean regret", title="stress instance")
  left.set_xticks(counts, [f"{count:,}" for count in counts])
  left.minorticks_off()
  left.legend(frameon=False, fontsize=8)
  regrets = [summary[f"stress {name} {counts[-1]}"].ravel() for name in METHODS]
  middle.boxplot(regrets, tick_labels=METHODS, flierprops={"markersize": 2})
  middle.set(ylabel="regret", title=f"stress instance, {counts[-1]:,} episodes, all repetitions")
  names = [name for name in summary if name.startswith(("bandit", "mdp")) and not name.endswith("first")]
  labels = [name.replace("with bonus", "bonus").replace(" ", "\n") for name in names]
  colors = ["C0" if name.startswith("bandit") else "C2" for name in names]
  plots.bars(right, {label: summary[name].mean(1) for label, name in zip(labels, names)}, colors=colors)
  right.tick_params(axis="x", labelsize=8)
  right.set(ylabel="mean regret", title="bandits and MDPs")
  plots.save(picture, path)
