"""Strong attacks: worst cases of linear models, budgets, one that sees through masked gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.adversarial import attacks, objectives, strong_attacks
from jaxreg.data import bundled
from tests.adversarial.test_attacks import _each_loss
from tests.conformance import EXAMPLES, row

KEY = jax.random.key(0)
SLOPE = jnp.array([1.0, -2.0, 0.5])


def _battery(inputs, labels, radius, **options):
  return strong_attacks.attack_battery(_logits, inputs, labels, KEY, radius=radius, steps=4, **options)


def _logits(inputs):
  return inputs @ jnp.eye(3, 5).astype(inputs.dtype) + 0.1 * jnp.sin(5 * inputs.sum(-1, keepdims=True))


ROWS = [
  row(
    strong_attacks.apgd,
    lambda rng: (rng.normal(size=(EXAMPLES, 3)),),
    # Of other losses the best of several points may hang on the last digit.
    call=lambda inputs, radius: strong_attacks.apgd(
      lambda x: x @ SLOPE.astype(x.dtype), inputs, KEY, radius=radius, steps=5
    ),
    bad=(("inputs", lambda inputs: (inputs.astype(np.int32),)),),
    differentiable=False,
    options=dict(radius=(0.1, 0.5)),
  ),
  row(
    strong_attacks.random_search_attack,
    lambda rng: (rng.normal(size=(EXAMPLES, 3)),),
    call=lambda inputs, radius, fraction: strong_attacks.random_search_attack(
      _each_loss, inputs, KEY, radius=radius, fraction=fraction, steps=5
    ),
    bad=(("inputs", lambda inputs: (inputs.astype(np.int32),)),),
    differentiable=False,
    options=dict(radius=(0.1, 0.5), fraction=(0.1, 0.9)),
  ),
  row(
    strong_attacks.attack_battery,
    lambda rng: (rng.normal(size=(EXAMPLES, 3)), rng.integers(0, 3, EXAMPLES).astype(np.int32)),
    call=_battery,
    bad=(
      ("inputs", lambda inputs, labels: (inputs.astype(np.int32), labels)),
      ("labels", lambda inputs, labels: (inputs, labels[1:])),
      ("labels", lambda inputs, labels: (inputs, labels * 1.0)),
    ),
    differentiable=False,
    wide=True,
    options=dict(radius=(0.0, 0.5)),
  ),
]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_worst_case(norm):
  rng = np.random.default_rng(0)
  weights, inputs = rng.normal(size=(8, 6)).astype(np.float32), rng.uniform(0.2, 0.8, (8, 6)).astype(np.float32)
  loss = lambda x: jnp.sum(x * weights, axis=-1)
  step = np.sign(weights) if norm == "linf" else weights / np.linalg.norm(weights, axis=-1, keepdims=True)
  found = strong_attacks.apgd(loss, inputs, KEY, radius=0.3, steps=40, norm=norm)
  np.testing.assert_allclose(found, inputs + 0.3 * step, atol=1e-3)
  if norm == "linf":
    within = strong_attacks.random_search_attack(loss, inputs, KEY, radius=0.3, steps=300, bounds=(0.0, 1.0))
    np.testing.assert_allclose(within, np.clip(inputs + 0.3 * step, 0, 1), atol=1e-6)


def test_checkpoints_are_those_of_the_paper():
  lengths = strong_attacks._checkpoint_lengths(100)
  np.testing.assert_array_equal(np.flatnonzero(lengths) + 1, [22, 41, 57, 70, 80, 87, 93, 99])
  np.testing.assert_array_equal(np.cumsum(lengths[lengths > 0]), np.flatnonzero(lengths) + 1)
  assert strong_attacks._checkpoint_lengths(1).tolist() == [1]


def test_the_best_point_is_returned_and_within_the_ball_and_bounds():
  inputs = jnp.asarray(np.random.default_rng(1).uniform(size=(16, 4)), jnp.float32)
  loss = lambda x: jnp.sum(jnp.sin(20 * x), axis=-1)
  for norm in ("linf", "l2"):
    options = dict(radius=0.4, norm=norm, bounds=(0.0, 1.0))
    found = strong_attacks.apgd(loss, inputs, KEY, steps=30, **options)
    size = jnp.abs(found - inputs).max(-1) if norm == "linf" else jnp.linalg.norm(found - inputs, axis=-1)
    assert size.max() <= 0.4 + 1e-6 and found.min() >= 0 and found.max() <= 1
    plain = attacks.pgd(loss, inputs, KEY, steps=30, step_size=0.4, **options)
    assert jnp.mean(loss(found)) > jnp.mean(loss(plain))


def test_until_stops_examples_where_they_succeed():
  inputs = jnp.array([[0.0, 0.0], [0.9, 0.0]])
  loss = lambda x: x[:, 0]
  options = dict(radius=2.0, step_size=0.25, steps=8, start_radius=0.0)
  found = attacks.pgd(loss, inputs, KEY, until=lambda x: loss(x) >= 1, **options)
  np.testing.assert_allclose(found, [[1.0, 0], [1.15, 0]], atol=1e-6)
  np.testing.assert_array_equal(
    attacks.pgd(loss, inputs, KEY, until=lambda x: loss(x) > 9, **options), attacks.pgd(loss, inputs, KEY, **options)
  )
  # A targeted attack is one with the loss towards its target.
  towards = attacks.pgd(lambda x: -((x[:, 0] - 0.5) ** 2), inputs, KEY, **options | {"step_size": 0.1})
  np.testing.assert_allclose(towards[:, 0], 0.5, atol=0.11)


@functools.cache
def _digits():
  data = bundled.digits()
  x = jnp.asarray(data["x"].reshape(len(data["x"]), -1), jnp.float32)
  return x / x.max(), jnp.asarray(data["y"])


def _trained(seed, radius, steps=200):
  """A small network by adversarial training, and its logits."""
  x, y = _digits()
  x, y = x[:1000], y[:1000]
  rng = np.random.default_rng(seed)
  params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in ((64, 32), (32, 10))]
  logits = lambda params, x: jax.nn.relu(x @ params[0]) @ params[1]
  losses = lambda params, x, y: optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
  tx = optax.adam(1e-2)

  def step(carry, key):
    params, state = carry
    at = jax.random.choice(key, len(x), (128,))
    options = dict(radius=radius, step_size=radius / 2, steps=4, bounds=(0.0, 1.0))
    attacked = attacks.pgd(lambda z: losses(params, z, y[at]), x[at], key, **options)
    updates, state = tx.update(jax.grad(lambda p: losses(p, attacked, y[at]).mean())(params), state)
    return (optax.apply_updates(params, updates), state), None

  keys = jax.random.split(jax.random.key(seed), steps)
  params = jax.jit(lambda c: jax.lax.scan(step, c, keys)[0][0])((params, tx.init(params)))
  return functools.partial(logits, params)


@pytest.mark.slow
def test_attacks_of_a_robust_network_are_not_masked():
  """Neither random search nor another network's adversarial examples find more than gradients do; of one whose logits
  are rounded, which has no gradients, random search finds far more, and `all` says so."""
  x, y = (part[1000:1300] for part in _digits())
  model, other = _trained(0, 0.1), _trained(1, 0.1)

  def checked(logits):
    found = strong_attacks.attack_battery(logits, x, y, KEY, radius=0.1, steps=20, restarts=2, bounds=(0.0, 1.0))
    losses = lambda z: optax.losses.softmax_cross_entropy_with_integer_labels(other(z), y)
    foreign = strong_attacks.apgd(losses, x, KEY, radius=0.1, steps=20, bounds=(0.0, 1.0))
    found["transfer"] = found["clean"] & (logits(foreign).argmax(-1) == y)
    return {name: float(value.mean()) for name, value in jax.tree.map(np.asarray, found).items()}

  honest, rounded = checked(model), checked(lambda z: jnp.round(4 * model(z)))
  assert 0.2 < honest["all"] < honest["clean"] - 0.1
  gradients = [honest[name] for name in ("pgd", "pgd_margin", "apgd", "apgd_ratio", "apgd_targeted")]
  assert max(gradients) - honest["all"] < 0.05
  assert honest["random_search"] >= min(gradients) and honest["transfer"] > min(gradients)
  assert rounded["apgd"] > rounded["random_search"] + 0.1 and rounded["all"] <= rounded["random_search"]


def test_bad_input():
  inputs, labels = jnp.ones((2, 3)), jnp.zeros(2, int)
  with pytest.raises(ValueError, match="restarts must be a positive integer"):
    _battery(inputs, labels, 0.1, restarts=0)
  with pytest.raises(ValueError, match="steps must be a positive integer"):
    strong_attacks.apgd(_each_loss, inputs, KEY, radius=0.1, steps=0)
  with pytest.raises(ValueError, match="one value per example"):
    strong_attacks.random_search_attack(lambda x: x, inputs, KEY, radius=0.1, steps=1)


def test_battery_of_two_classes_and_labels_that_are_none():
  found = strong_attacks.attack_battery(
    lambda x: jnp.stack([x[:, 0], -x[:, 0]], -1), jnp.array([[0.5], [0.05], [0.5]]), jnp.array([0, 0, -1]), KEY,
    radius=0.1, steps=3, norm="l2",
  )  # fmt: skip
  assert list(found) == ["clean", "pgd", "pgd_margin", "apgd", "apgd_ratio", "all"]
  np.testing.assert_array_equal(found["all"], [True, False, False])
  np.testing.assert_array_equal(found["clean"], [True, True, False])
  assert objectives.margin_objective(jnp.zeros((1, 2)), jnp.array([0])) == 0
