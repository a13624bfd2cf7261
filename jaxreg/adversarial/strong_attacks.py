"""Attacks without a step size to choose, without gradients, and a battery of them: robust is what withstands all."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxreg.adversarial.attacks import check_attack, in_unit_ball, moved, pgd, projected, steepest
from jaxreg.adversarial.objectives import dlr_objective, margin_objective
from jaxreg.checks import as_array, check_hyperparameter, check_integer_labels
from jaxreg.metrics.sizes import static_integer

__all__ = ["apgd", "attack_battery", "random_search_attack"]

_MOMENTUM = 0.75
_ENOUGH = 0.75


class _Search(NamedTuple):
  """The state of `apgd`; everything per example."""

  offset: jax.Array  # [batch, ...]
  before: jax.Array  # the offset of the step before
  gradient: jax.Array  # at the offset
  value: jax.Array  # [batch], the objective there
  best: jax.Array  # the best offset
  best_gradient: jax.Array
  best_value: jax.Array
  step_size: jax.Array
  rises: jax.Array  # steps that raised the objective since the last checkpoint
  halved: jax.Array  # whether the last checkpoint halved the step size
  best_then: jax.Array  # the best value at the last checkpoint


def apgd(
  loss_of_inputs: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  key: jax.Array,
  *,
  radius: ArrayLike,
  steps: int,
  norm: str = "linf",
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array:
  """Projected gradient ascent with momentum that chooses its step size for every example, and returns the best point.

  Steps begin at twice the radius. At checkpoints that lie closer and closer the step size is halved, and the search
  goes on from the best point, where fewer than three quarters of the steps since the last one raised the loss, or where
  neither the step size nor the best value has changed since.

  >>> import jax, jax.numpy as jnp
  >>> loss = lambda x: -jnp.sum((x - 0.25) ** 2, axis=-1)
  >>> found = apgd(loss, jnp.zeros((1, 2)), jax.random.key(0), radius=1.0, steps=40)
  >>> jnp.allclose(found, 0.25, atol=0.01).item()
  True

  Args:
    loss_of_inputs: `[batch, ...] -> [batch]`, each example's loss, such as cross-entropy or `dlr_objective`; closes
      over the model and the labels.
    inputs: floating `[batch, ...]`, within `bounds`.
    key: of the random start.
    radius: of the ball, non-negative scalar in units of the inputs; may be traced.
    steps: number of gradient steps, at least 1; static.
    norm: `linf` or `l2`, over all axes but the first; static.
    bounds: as in `pgd`.

  Returns:
    The attacked inputs, `[batch, ...]`, constant under differentiation: of all points visited the one of largest loss.

  Raises:
    ValueError: as `pgd`.

  Reference: Croce, Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
    Attacks", ICML 2020, Algorithm 1, momentum 0.75, rho 0.75 and its checkpoints.
  """
  check_attack(loss_of_inputs, inputs, norm=norm, bounds=bounds, radius=radius)
  steps = static_integer("steps", steps, low=1)
  inputs = jax.lax.stop_gradient(jnp.asarray(inputs))
  noise = in_unit_ball(key, inputs, norm)
  radius = jnp.asarray(radius, noise.dtype)
  onto = lambda offset: projected(inputs, offset, radius, norm, bounds)
  each = lambda values: values.reshape(-1, *[1] * (inputs.ndim - 1))
  start = onto(noise * radius)
  value, gradient = _value_and_gradient(loss_of_inputs, inputs, start)
  none = jnp.zeros(value.shape, jnp.int32)
  state = _Search(
    offset=start, before=start, gradient=gradient, value=value, best=start, best_gradient=gradient, best_value=value,
    step_size=jnp.full(value.shape, 2 * radius), rises=none, halved=none > 0, best_then=value,
  )  # fmt: skip
  lengths = jnp.asarray(_checkpoint_lengths(steps))

  def step(index, state):
    inertia = jnp.where(index == 0, 1.0, _MOMENTUM).astype(start.dtype)
    tried = onto(state.offset + each(state.step_size) * steepest(state.gradient, norm))
    ahead = state.offset + inertia * (tried - state.offset) + (1 - inertia) * (state.offset - state.before)
    ahead = onto(ahead)
    value, gradient = _value_and_gradient(loss_of_inputs, inputs, ahead)
    better = value > state.best_value
    state = state._replace(
      offset=ahead,
      before=state.offset,
      gradient=gradient,
      value=value,
      best=jnp.where(each(better), ahead, state.best),
      best_gradient=jnp.where(each(better), gradient, state.best_gradient),
      best_value=jnp.where(better, value, state.best_value),
      rises=state.rises + (value > state.value),
    )
    length = lengths[index]
    return jax.tree.map(lambda new, old: jnp.where(length > 0, new, old), _checked(state, length, each), state)

  return moved(inputs, jax.lax.fori_loop(0, steps, step, state).best)


def random_search_attack(
  objective_of_inputs: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  key: jax.Array,
  *,
  radius: ArrayLike,
  steps: int,
  fraction: ArrayLike = 0.2,
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array:
  """An attack that uses no gradient: from a random corner of the cube, random entries change their side if that helps.

  Where it finds examples that gradient attacks do not, gradients are masked: the model is not robust but hard to attack
  by them.

  >>> import jax, jax.numpy as jnp
  >>> loss = lambda x: x @ jnp.array([1.0, -2.0])
  >>> random_search_attack(loss, jnp.zeros((1, 2)), jax.random.key(0), radius=0.5, steps=30, fraction=0.5).tolist()
  [[0.5, -0.5]]

  Args:
    objective_of_inputs: `[batch, ...] -> [batch]`, what is to become large, such as `margin_objective`.
    inputs: floating `[batch, ...]`, within `bounds`.
    key: of the start and the proposals.
    radius: of the cube, non-negative scalar in units of the inputs; may be traced.
    steps: number of proposals, at least 0; static.
    fraction: of the entries, the probability of each to be proposed anew, scalar in [0, 1]; halved after each quarter
      of the steps; may be traced.
    bounds: as in `pgd`.

  Returns:
    The attacked inputs, `[batch, ...]`, constant under differentiation.

  Raises:
    ValueError: as `pgd`.

  Reference: Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a Query-efficient Black-box Adversarial Attack via
    Random Search", ECCV 2020, Algorithm 1, with single entries in place of squares.
  """
  check_attack(objective_of_inputs, inputs, bounds=bounds, radius=radius)
  check_hyperparameter("fraction", fraction, low=0, high=1, shape=())
  steps = static_integer("steps", steps, low=0)
  inputs = jax.lax.stop_gradient(jnp.asarray(inputs))
  wide = jnp.promote_types(inputs.dtype, jnp.float32)
  fraction = jnp.asarray(fraction, wide)
  radius = jnp.asarray(radius, wide) + 0 * fraction  # of which a NaN would go unseen
  corner = lambda key: jnp.where(jax.random.bernoulli(key, shape=inputs.shape), radius, -radius)
  onto = lambda offset: projected(inputs, offset, radius, "linf", bounds)
  value_at = lambda offset: jnp.asarray(objective_of_inputs(moved(inputs, offset)))
  start_key, key = jax.random.split(key)
  start = onto(corner(start_key))

  def step(index, carry):
    offset, value = carry
    which, side = jax.random.split(jax.random.fold_in(key, index))
    chance = fraction * 2.0 ** -(4 * index // max(steps, 1)).astype(wide)
    tried = jnp.where(jax.random.uniform(which, inputs.shape, wide) < chance, onto(corner(side)), offset)
    found = value_at(tried)
    better = (found > value).reshape(-1, *[1] * (inputs.ndim - 1))
    return jnp.where(better, tried, offset), jnp.maximum(found, value)

  return moved(inputs, jax.lax.fori_loop(0, steps, step, (start, value_at(start)))[0])


def attack_battery(
  logits_of_inputs: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  labels: ArrayLike,
  key: jax.Array,
  *,
  radius: ArrayLike,
  steps: int,
  restarts: int = 1,
  targets: int = 3,
  norm: str = "linf",
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
) -> dict[str, jax.Array]:
  """Which examples stay classified correctly under several attacks, and under all of them together.

  The attacks are projected gradients on cross-entropy and on the margin (steps of an eighth of the radius in linf, of a
  quarter in l2), `apgd` on cross-entropy and on the ratio of logit differences (the margin below three classes), each
  from `restarts` starts; `apgd` towards each of the `targets` classes that come after the best; and, in linf,
  `random_search_attack` with four proposals for each step. Memory does not grow with steps, restarts or targets.

  >>> import jax, jax.numpy as jnp
  >>> weights = jnp.array([[1.0, 0.0], [0.0, 1.0]])
  >>> inputs = jnp.array([[0.5, 0.4], [0.9, 0.1]])
  >>> correct = attack_battery(lambda x: x @ weights, inputs, jnp.array([0, 0]), jax.random.key(0), radius=0.1, steps=5)
  >>> list(correct), correct["clean"].tolist(), correct["all"].tolist()
  (['clean', 'pgd', 'pgd_margin', 'apgd', 'apgd_ratio', 'random_search', 'all'], [True, True], [False, True])

  Args:
    logits_of_inputs: `[batch, ...] -> [batch, classes]`.
    inputs: floating `[batch, ...]`, within `bounds`.
    labels: integers `[batch]`; an example whose label is no class is never correct.
    key: of the random starts.
    radius: of the ball, non-negative scalar in units of the inputs; may be traced.
    steps: of each attack, at least 1; static.
    restarts: at least 1; static.
    targets: number of targeted attacks, at least 0; static; at most the number of wrong classes, none below four.
    norm: `linf` or `l2`; static.
    bounds: as in `pgd`.

  Returns:
    Booleans `[batch]` by the attack's name; `clean` without an attack, `all` the minimum of all.

  Raises:
    ValueError: as `pgd`, or when labels do not fit the logits.

  Reference: Croce, Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
    Attacks", ICML 2020: the battery follows its idea; it is not AutoAttack itself, whose FAB and Square attacks it
    lacks.
  """
  restarts, targets = static_integer("restarts", restarts, low=1), static_integer("targets", targets, low=0)
  inputs, labels = as_array("inputs", inputs), as_array("labels", labels)
  check_attack(lambda x: jnp.max(logits_of_inputs(x), axis=-1), inputs, norm=norm, bounds=bounds, radius=radius)
  clean_logits = jnp.asarray(logits_of_inputs(inputs))
  check_integer_labels(clean_logits, labels)
  classes = clean_logits.shape[-1]
  against = lambda objective: lambda x: objective(logits_of_inputs(x), labels)
  ball = dict(radius=radius, norm=norm, bounds=bounds)
  small = dict(step_size=jnp.asarray(radius) / (8 if norm == "linf" else 4), steps=steps, **ball)
  cross_entropy = against(optax.losses.softmax_cross_entropy_with_integer_labels)
  margin, ratio = against(margin_objective), against(dlr_objective if classes > 2 else margin_objective)
  attacks = {
    "pgd": (restarts, lambda key, _: pgd(cross_entropy, inputs, key, **small)),
    "pgd_margin": (restarts, lambda key, _: pgd(margin, inputs, key, **small)),
    "apgd": (restarts, lambda key, _: apgd(cross_entropy, inputs, key, steps=steps, **ball)),
    "apgd_ratio": (restarts, lambda key, _: apgd(ratio, inputs, key, steps=steps, **ball)),
  }
  if classes >= 4 and targets:
    order = jnp.argsort(-jnp.where(jnp.arange(classes) == labels[:, None], -jnp.inf, clean_logits), axis=-1)
    towards = lambda rank: lambda x: dlr_objective(logits_of_inputs(x), labels, targets=order[:, rank])
    rivals = min(targets, classes - 1)
    attacks["apgd_targeted"] = (rivals, lambda key, i: apgd(towards(i), inputs, key, steps=steps, **ball))
  if norm == "linf":
    search = dict(radius=radius, bounds=bounds, steps=4 * steps)
    attacks["random_search"] = (1, lambda key, _: random_search_attack(margin, inputs, key, **search))
  right = lambda x: jnp.argmax(logits_of_inputs(x), axis=-1) == labels
  correct = {"clean": jnp.argmax(clean_logits, axis=-1) == labels}
  for number, (name, (times, attack)) in enumerate(attacks.items()):
    own = jax.random.fold_in(key, number)
    once = lambda i, still, own=own, attack=attack: still & right(attack(jax.random.fold_in(own, i), i))
    correct[name] = jax.lax.fori_loop(0, times, once, correct["clean"])
  return {**correct, "all": jnp.all(jnp.stack(list(correct.values())), axis=0)}


def _value_and_gradient(loss_of_inputs, inputs, offset):
  loss = lambda x: (jnp.sum(values := jnp.asarray(loss_of_inputs(x))), values)
  gradient, values = jax.grad(loss, has_aux=True)(moved(inputs, offset))
  return jax.lax.stop_gradient((values.astype(offset.dtype), gradient.astype(offset.dtype)))


def _checkpoint_lengths(steps: int) -> np.ndarray:
  """`[steps]`: after which steps there is a checkpoint, as the number of steps since the one before; else 0."""
  percents = [0, 22]
  while percents[-1] < 100:
    percents.append(percents[-1] + max(percents[-1] - percents[-2] - 3, 6))
  lengths, last = np.zeros(steps, np.int32), 0
  for percent in percents[1:]:
    at = -(-percent * steps // 100)
    if last < at <= steps:
      lengths[at - 1], last = at - last, at
  return lengths


def _checked(state, length, each):
  """The state after a checkpoint."""
  few = state.rises < _ENOUGH * length
  stuck = ~state.halved & (state.best_value <= state.best_then)
  halve = few | stuck
  back = lambda new, old: jnp.where(each(halve), new, old)
  return state._replace(
    offset=back(state.best, state.offset),
    before=back(state.best, state.before),
    gradient=back(state.best_gradient, state.gradient),
    value=jnp.where(halve, state.best_value, state.value),
    step_size=jnp.where(halve, state.step_size / 2, state.step_size),
    rises=jnp.zeros_like(state.rises),
    halved=halve,
    best_then=state.best_value,
  )
