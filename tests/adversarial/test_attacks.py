"""Attacks: the closed-form worst case of linear models, constraints, and use inside transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from jaxreg.adversarial import attacks
from tests.conformance import EXAMPLES, row

BATCH, FEATURES = 8, 6


@pytest.fixture
def linear():
  """A loss linear in the inputs, with a different gradient for every example."""
  rng = np.random.default_rng(0)
  weights = jnp.asarray(rng.normal(size=(BATCH, FEATURES)), jnp.float32)
  inputs = jnp.asarray(rng.uniform(0.2, 0.8, (BATCH, FEATURES)), jnp.float32)
  return weights, inputs


def _loss(weights):
  return lambda x: jnp.sum(x * weights, axis=-1)


def test_linear_worst_case_linf(linear):
  weights, inputs = linear
  worst = inputs + 0.1 * jnp.sign(weights)
  np.testing.assert_allclose(attacks.fgsm(_loss(weights), inputs, radius=0.1), worst, atol=1e-6)
  for start_radius in (None, 0.0, 0.001):
    found = attacks.pgd(
      _loss(weights), inputs, jax.random.key(0), radius=0.1, step_size=0.03, steps=8, start_radius=start_radius
    )
    np.testing.assert_allclose(found, worst, atol=1e-6)


def test_linear_worst_case_linf_with_active_bounds(linear):
  weights, inputs = linear
  worst = jnp.clip(inputs + 0.5 * jnp.sign(weights), 0, 1)
  assert jnp.any(worst == 1) and jnp.any(worst == 0)
  options = {"radius": 0.5, "bounds": (0.0, 1.0)}
  np.testing.assert_allclose(attacks.fgsm(_loss(weights), inputs, **options), worst, atol=1e-6)
  found = attacks.pgd(_loss(weights), inputs, jax.random.key(0), step_size=0.2, steps=6, **options)
  np.testing.assert_allclose(found, worst, atol=1e-6)


def test_linear_worst_case_l2(linear):
  weights, inputs = linear
  worst = inputs + 0.4 * weights / jnp.linalg.norm(weights, axis=-1, keepdims=True)
  np.testing.assert_allclose(attacks.fgsm(_loss(weights), inputs, radius=0.4, norm="l2"), worst, atol=1e-6)
  # On the sphere the angle to the gradient shrinks by a constant factor a step.
  found = attacks.pgd(_loss(weights), inputs, jax.random.key(0), radius=0.4, step_size=0.4, steps=40, norm="l2")
  np.testing.assert_allclose(found, worst, atol=1e-5)


def test_l2_attack_of_images_stays_in_ball_and_box():
  rng = np.random.default_rng(1)
  images = jnp.asarray(rng.uniform(size=(4, 3, 3, 2)), jnp.float32)
  target = jnp.asarray(rng.normal(size=(4, 3, 3, 2)), jnp.float32)
  loss = lambda x: jnp.sum((x - target) ** 2, axis=(1, 2, 3))
  options = {"radius": 0.7, "step_size": 0.2, "steps": 10, "norm": "l2", "bounds": (0.0, 1.0)}
  found = attacks.pgd(loss, images, jax.random.key(3), **options)
  assert jnp.all(jnp.linalg.norm((found - images).reshape(4, -1), axis=1) <= 0.7 + 1e-6)
  assert jnp.all((found >= -1e-6) & (found <= 1 + 1e-6))
  assert jnp.all(loss(found) > loss(images))


@functools.partial(jax.jit, static_argnames=("norm", "steps"))
def _offset(inputs, key, radius, start_radius, *, norm, steps):
  options = {"step_size": 0.7, "steps": steps, "norm": norm, "bounds": (-1.0, 1.0), "start_radius": start_radius}
  return attacks.pgd(lambda x: jnp.sum(jnp.sin(5 * x), axis=-1), inputs, key, radius=radius, **options) - inputs


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["linf", "l2"]), st.floats(0.0, 2.0), st.floats(0.0, 3.0))
def test_start_and_steps_obey_ball_and_bounds(seed, norm, radius, start_radius):
  inputs = jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (4, 3)), jnp.float32)
  for steps in (0, 2):
    offset = _offset(inputs, jax.random.key(seed), radius, start_radius, norm=norm, steps=steps)
    size = jnp.abs(offset).max(-1) if norm == "linf" else jnp.linalg.norm(offset, axis=-1)
    assert jnp.all(size <= radius + 1e-5)
    assert jnp.all(jnp.abs(inputs + offset) <= 1 + 1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_start_fills_the_ball(norm):
  inputs = jnp.zeros((4000, 3))
  start = attacks.pgd(
    lambda x: x[:, 0], inputs, jax.random.key(0), radius=2.0, step_size=0.0, steps=0, norm=norm, start_radius=1.0
  )
  length = jnp.abs(start).max(-1) if norm == "linf" else jnp.linalg.norm(start, axis=-1)
  # A ball of three dimensions has an eighth of its volume within half of the radius: four standard errors.
  assert abs(float(jnp.mean(length < 0.5)) - 0.125) < 4 * np.sqrt(0.125 * 0.875 / 4000)
  np.testing.assert_allclose(start.mean(0), np.zeros(3), atol=4 * 0.6 / np.sqrt(4000))
  assert length.max() <= 1 + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("slope", [0.0, 1e-30, 1e30])
def test_finite_whatever_the_gradient(norm, dtype, slope):
  inputs = jnp.ones((2, 3), dtype)
  loss = lambda x: jnp.sum(x * jnp.asarray(slope, dtype), axis=-1)
  attacked = attacks.fgsm(loss, inputs, radius=0.5, norm=norm)
  assert attacked.dtype == dtype and jnp.isfinite(attacked).all()
  expected = 1 + (slope > 0) * (0.5 if norm == "linf" else 0.5 / np.sqrt(3))
  np.testing.assert_allclose(np.asarray(attacked, np.float32), expected, rtol=1e-2)
  moved = attacks.pgd(loss, inputs, jax.random.key(0), radius=0.5, step_size=0.2, steps=3, norm=norm)
  assert jnp.isfinite(moved).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_constant_under_differentiation(norm, linear):
  weights, inputs = linear

  def objective(weights, inputs, attack):
    loss = lambda x: jnp.sum(jnp.tanh(x @ weights.T), axis=-1)
    return jnp.sum(loss(attack(loss, inputs)))

  attack = lambda loss, x: attacks.pgd(loss, x, jax.random.key(0), radius=0.1, step_size=0.05, steps=3, norm=norm)
  found = attack(lambda x: jnp.sum(jnp.tanh(x @ weights.T), axis=-1), inputs)
  gradient = jax.jit(jax.grad(objective, argnums=(0, 1)), static_argnums=2)(weights, inputs, attack)
  expected = jax.grad(objective)(weights, inputs, lambda loss, x: found)
  np.testing.assert_allclose(gradient[0], expected, atol=1e-5)
  np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_under_transformations(norm, linear):
  weights, inputs = linear

  def one(weights, inputs, key, radius):
    options = {"radius": radius, "step_size": radius / 2, "steps": 3, "norm": norm, "bounds": (0.0, 1.0)}
    return attacks.pgd(_loss(weights), inputs, key, **options)

  # Eight trials of one example each, with radii and keys of their own.
  trials = (
    weights[:, None],
    inputs[:, None],
    jax.random.split(jax.random.key(0), BATCH),
    jnp.linspace(0.0, 0.5, BATCH),
  )
  each = jnp.stack([one(*(leaf[index] for leaf in trials)) for index in range(BATCH)])
  np.testing.assert_allclose(jax.jit(jax.vmap(one))(*trials), each, atol=1e-6)
  np.testing.assert_allclose(jax.pmap(one)(*trials), each, atol=1e-6)
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    jax.vmap(one), mesh=mesh, in_specs=PartitionSpec("devices"), out_specs=PartitionSpec("devices"), check_vma=False
  )
  np.testing.assert_allclose(jax.jit(mapped)(*trials), each, atol=1e-6)


def test_bad_input(linear):
  weights, inputs = linear
  key = jax.random.key(0)
  good = {"radius": 0.1, "step_size": 0.1, "steps": 1}
  for change, message in (
    ({"radius": -1.0}, "radius must lie in"),
    ({"step_size": float("nan")}, "step_size must lie in"),
    ({"start_radius": -1.0}, "start_radius must lie in"),
    ({"steps": -1}, "steps must be a non-negative int"),
    ({"norm": "l1"}, "norm must be one of linf, l2"),
    ({"bounds": (0.0,)}, "bounds must be a pair"),
  ):
    with pytest.raises(ValueError, match=message):
      attacks.pgd(_loss(weights), inputs, key, **{**good, **change})
  with pytest.raises(ValueError, match="one value per example"):
    attacks.pgd(lambda x: jnp.sum(x), inputs, key, **good)
  with pytest.raises(ValueError, match="inputs must be floating point"):
    attacks.fgsm(_loss(weights), inputs.astype(int), radius=0.1)


def _each_loss(inputs):
  return jnp.sum(jnp.sin(3 * inputs), axis=-1)


ROWS = [
  *(
    row(
      attacks.fgsm,
      lambda rng: (rng.normal(size=(EXAMPLES, 3)),),
      call=lambda inputs, radius, norm=norm: attacks.fgsm(_each_loss, inputs, radius=radius, norm=norm),
      bad=(("inputs", lambda inputs: (inputs.astype(np.int32),)),),
      examples="batch",
      differentiable=False,
      options=dict(radius=(0.0, 0.5)),
    )._replace(label=f"attacks.fgsm-{norm}")
    for norm in ("linf", "l2")
  ),
  row(
    attacks.pgd,
    lambda rng: (rng.normal(size=(EXAMPLES, 3)),),
    call=lambda inputs, radius, step_size: attacks.pgd(
      _each_loss, inputs, jax.random.key(0), radius=radius, step_size=step_size, steps=3, start_radius=0.0
    ),
    bad=(("inputs", lambda inputs: (inputs.astype(np.int32),)),),
    examples="batch",
    differentiable=False,
    options=dict(radius=(0.1, 0.5), step_size=(0.05, 0.1)),
  ),
  row(
    attacks.pgd_survival,
    lambda rng: (rng.normal(size=(EXAMPLES, 3)),),
    call=lambda inputs, radius, step_size: attacks.pgd_survival(
      lambda x: x.sum(-1),
      lambda x: x.sum(-1) < 0.1,
      inputs,
      jax.random.key(0),
      radius=radius,
      step_size=step_size,
      steps=3,
    ),
    bad=(("inputs", lambda inputs: (inputs.astype(np.int32),)),),
    differentiable=False,
    options=dict(radius=(0.1, 0.5), step_size=(0.05, 0.1)),
  ),
]


def test_survival_is_counted_along_pgd(linear):
  weights, inputs = linear
  key, options = jax.random.key(1), dict(radius=0.3, step_size=0.1, norm="l2", bounds=(0.0, 1.0))
  loss = _loss(weights)
  right = lambda x: loss(x) < loss(inputs) + 0.1
  attacked, survived = jax.jit(lambda x: attacks.pgd_survival(loss, right, x, key, steps=5, **options))(inputs)
  np.testing.assert_allclose(attacked, attacks.pgd(loss, inputs, key, steps=5, **options), atol=1e-6)
  path = [attacks.pgd(loss, inputs, key, steps=steps, **options) for steps in range(5)]
  np.testing.assert_array_equal(survived, np.sum([right(x) for x in path], axis=0))
  assert 0 < survived.sum() < 5 * BATCH
  with pytest.raises(ValueError, match="is_correct must return one value per example"):
    attacks.pgd_survival(loss, lambda x: x > 0, inputs, key, steps=5, **options)
