"""Attacks with a log-barrier: golden vectors, closed forms, and total derivatives against those of solved attacks."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.adversarial import kl_dro_loss
from jaxreg.adversarial.barrier import fast_bat_loss, implicit_adversarial_loss, log_barrier_attack
from tests.conformance import EXAMPLES, row, unchanged

RADIUS, BARRIER = 0.2, 0.3


def _linear_loss(labels):
  """Cross-entropy of a softmax-linear model, `loss_fn(params, inputs)`."""

  def loss_fn(params, inputs):
    logits = inputs @ params["W"].T + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

  return loss_fn


@pytest.fixture
def problem(x64):
  """A softmax-linear model, its loss, and inputs of which one holds an exact 0 and an exact 1."""
  rng = np.random.default_rng(0)
  params = {"W": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=3))}
  inputs = jnp.asarray(rng.uniform(size=(5, 4))).at[0, :2].set(jnp.array([0.0, 1.0]))
  return params, _linear_loss(jnp.array([0, 1, 2, 0, 1])), inputs


def _solved(loss_of_inputs, inputs, *, radius, key=None, **options):
  """The attack's minimiser to ten digits: Adam, whose steps shrink to 1e-11 of the radius and with them the error."""
  steps = 4000
  optimizer = optax.adam(optax.exponential_decay(0.1 * radius, steps, 1e-10))
  return log_barrier_attack(loss_of_inputs, inputs, key, radius=radius, steps=steps, optimizer=optimizer, **options)


def _box(inputs, radius):
  return jnp.maximum(-radius, -inputs), jnp.minimum(radius, 1 - inputs)


def _lower_objective(loss_fn, params, inputs, radius, barrier):
  """What the attack on one example minimises."""
  low, high = _box(inputs, radius)
  walls = lambda offset: -barrier * jnp.sum(jnp.log(high - offset) + jnp.log(offset - low))
  return lambda offset: walls(offset) - loss_fn(params, (inputs + offset)[None])[0]


@pytest.mark.golden
def test_golden_doubly_robust_at_attack(golden, x64):
  names = []
  for name, arrays, _ in golden("22-doubly_robust_at").cases():
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10, err_msg=name)
    hp = json.loads(str(arrays["hp"]))
    params = {"W": jnp.asarray(arrays["W"]), "b": jnp.asarray(arrays["b"])}
    loss_fn, inputs = _linear_loss(arrays["y"]), jnp.asarray(arrays["x"])
    options = dict(radius=hp["eps"], barrier=hp["barrier_c"])
    offset = _solved(functools.partial(loss_fn, params), inputs, **options)
    close(offset, arrays["barrier_out_delta"])
    for hessian, kind in (("full", "hyper_exact"), ("diagonal", "hyper_diag"), ("none", "partial")):
      losses = functools.partial(
        implicit_adversarial_loss,
        loss_fn,
        inputs=inputs,
        offset=offset,
        hessian=hessian,
        tolerance=1e-13,
        **options,
      )
      close(losses(params), arrays["barrier_out_adv_loss"])
      for leaf, gradient in jax.jit(jax.jacrev(losses))(params).items():
        close(gradient, arrays[f"{kind}_grad_{leaf}"])
      if hessian == "full":
        outer = lambda params, losses=losses, hp=hp: kl_dro_loss(losses(params), temperature=hp["r"])
        for leaf, gradient in jax.jit(jax.grad(outer))(params).items():
          close(gradient, arrays[f"outer_exact_grad_{leaf}"])
  assert names


@pytest.mark.parametrize("noise", [None, 3])
def test_minimiser_is_stationary_interior_and_stable(noise, problem):
  params, loss_fn, inputs = problem
  key = None if noise is None else jax.random.key(noise)
  loss_fn = lambda params, x: _linear_loss(jnp.zeros(len(x), int))(params, x)
  offset = _solved(functools.partial(loss_fn, params), inputs, key=key, radius=RADIUS, barrier=BARRIER)
  low, high = _box(inputs, RADIUS)
  assert jnp.all((offset > low) & (offset < high))
  assert low[0, 0] == 0 and high[0, 1] == 0 and offset[0, 0] > 0 > offset[0, 1]

  def slope_and_curvature(point, found):
    objective = _lower_objective(loss_fn, params, point, RADIUS, BARRIER)
    return jax.grad(objective)(found), jax.hessian(objective)(found)

  slopes, curvatures = jax.jit(jax.vmap(slope_and_curvature))(inputs, offset)
  np.testing.assert_allclose(slopes, 0, atol=1e-8)
  assert np.linalg.eigvalsh(curvatures).min() > 0


@pytest.mark.parametrize("slope", [-3.0, 0.01, 40.0])
def test_closed_form_of_a_linear_loss(slope, x64):
  loss_fn = lambda theta, x: slope * theta * x[:, 0]
  theta, inputs = 0.7, jnp.array([[0.5]])
  at = lambda theta: (-BARRIER + jnp.sqrt(BARRIER**2 + (slope * theta * RADIUS) ** 2)) / (slope * theta)
  options = dict(radius=RADIUS, barrier=BARRIER)
  offset = _solved(functools.partial(loss_fn, theta), inputs, **options)
  np.testing.assert_allclose(offset[0, 0], at(theta), rtol=1e-7)
  total = jax.grad(lambda theta: slope * theta * (0.5 + at(theta)))(theta)
  for hessian in ("diagonal", "full"):
    loss = lambda theta, hessian=hessian: implicit_adversarial_loss(
      loss_fn, theta, inputs, at(jnp.full((1, 1), 0.7)), hessian=hessian, **options
    )[0]
    np.testing.assert_allclose(jax.grad(loss)(theta), total, rtol=1e-10)


def _total_derivative(loss_fn, params, inputs, hessian, **options):
  offset = _solved(functools.partial(loss_fn, params), inputs, **options)
  losses = lambda params: implicit_adversarial_loss(
    loss_fn, params, inputs, offset, hessian=hessian, tolerance=1e-12, **options
  )
  return jax.jit(jax.jacrev(losses))(params)


def _differences(loss_fn, params, inputs, direction, **options):
  """How the losses at solved attacks change with the parameters along a direction."""

  @jax.jit
  def losses(params):
    return loss_fn(params, inputs + _solved(functools.partial(loss_fn, params), inputs, **options))

  step = 1e-5
  ahead, behind = (losses(jax.tree.map(lambda p, d, h=h: p + h * d, params, direction)) for h in (step, -step))
  return (ahead - behind) / (2 * step)


def _along(jacobian, direction):
  return sum(jax.tree.leaves(jax.tree.map(lambda j, d: jnp.tensordot(j, d, d.ndim), jacobian, direction)))


def test_full_hessian_gives_the_total_derivative(problem):
  params, loss_fn, inputs = problem
  options = dict(radius=RADIUS, barrier=BARRIER)
  jacobian = _total_derivative(loss_fn, params, inputs, "full", **options)
  partial = _total_derivative(loss_fn, params, inputs, "none", **options)
  rng = np.random.default_rng(1)
  for _ in range(3):
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    expected = _differences(loss_fn, params, inputs, direction, **options)
    np.testing.assert_allclose(_along(jacobian, direction), expected, rtol=1e-5)
    assert np.abs(_along(partial, direction) - expected).max() > 1e-2


def test_diagonal_hessian_is_off_by_the_curvature_of_the_loss(problem):
  params, loss_fn, inputs = problem
  labels = jnp.array([0, 1, 2, 0, 1])

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
  def reference(point, offset, label, barrier):
    """The responses with dense matrices, the terms they add to the gradient, and the ratio of the curvatures."""
    own = lambda params, x: _linear_loss(label[None])(params, x[None])[0]
    x = point + offset
    slope, bent = jax.grad(own, 1)(params, x), jax.hessian(own, 1)(params, x)
    low, high = _box(point, RADIUS)
    walls = barrier * ((high - offset) ** -2 + (offset - low) ** -2)
    mixed = jax.jacrev(jax.grad(own, 1))(params, x)
    responses = jnp.linalg.solve(jnp.diag(walls) - bent, slope), slope / walls
    terms = [jax.tree.map(lambda leaf, v=v: jnp.tensordot(v, leaf, 1), mixed) for v in responses]
    return responses, terms, jnp.linalg.norm(bent, 2) / walls.min()

  differences = []
  for barrier in (3.0, 30.0):
    options = dict(radius=RADIUS, barrier=barrier)
    offset = _solved(functools.partial(loss_fn, params), inputs, **options)
    full, diagonal, partial = (
      _total_derivative(loss_fn, params, inputs, hessian, **options) for hessian in ("full", "diagonal", "none")
    )
    responses, terms, ratio = reference(inputs, offset, labels, barrier)
    for term, total in zip(terms, (full, diagonal)):
      for leaf in params:
        np.testing.assert_allclose(total[leaf], partial[leaf] + term[leaf], rtol=1e-9, atol=1e-12)
    error, size = (np.linalg.norm(v, axis=1) for v in (responses[0] - responses[1], responses[1]))
    assert np.all(ratio < 1) and np.all(error <= ratio / (1 - ratio) * size + 1e-12)
    differences.append(max(jnp.abs(full[leaf] - diagonal[leaf]).max() for leaf in full))
  # Of second order in one over the barrier, to the relative size of the next order.
  np.testing.assert_allclose(differences[0] / differences[1], 100, rtol=0.1)


def test_diagonal_hessian_is_exact_for_a_piecewise_linear_loss(x64):
  rng = np.random.default_rng(0)
  params = {"in": jnp.asarray(rng.normal(size=(4, 6))), "out": jnp.asarray(rng.normal(size=6))}
  inputs = jnp.asarray(rng.uniform(size=(5, 4)))
  loss_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
  # Strong enough that no step of the attack crosses a kink, as the comparison with solved attacks shows.
  options = dict(radius=0.05, barrier=0.5)
  full, diagonal = (_total_derivative(loss_fn, params, inputs, hessian, **options) for hessian in ("full", "diagonal"))
  for leaf in params:
    np.testing.assert_allclose(diagonal[leaf], full[leaf], rtol=1e-10, atol=1e-12)
  direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
  expected = _differences(loss_fn, params, inputs, direction, **options)
  np.testing.assert_allclose(_along(diagonal, direction), expected, rtol=1e-5)


def test_at_large_temperature_the_step_is_plain_adversarial_training(problem):
  params, loss_fn, inputs = problem
  options = dict(radius=RADIUS, barrier=BARRIER)
  offset = _solved(functools.partial(loss_fn, params), inputs, **options)
  robust = lambda params: kl_dro_loss(
    implicit_adversarial_loss(loss_fn, params, inputs, offset, hessian="none", **options), temperature=1e8
  )
  plain = lambda params: loss_fn(params, inputs + offset).mean()
  for a, b in zip(jax.tree.leaves(jax.grad(robust)(params)), jax.tree.leaves(jax.grad(plain)(params))):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_a_small_barrier_reaches_the_corner_that_the_gradient_points_to(x64):
  weights, inputs = jnp.array([1.0, -2.0]), jnp.array([[0.5, 0.05]])
  offset = _solved(lambda x: x @ weights, inputs, radius=0.1, barrier=1e-6)
  low, high = _box(inputs, 0.1)
  # The projection keeps a thousandth of each box's width.
  np.testing.assert_allclose(offset, jnp.where(weights > 0, high, low), atol=1e-3 * 0.2 + 1e-9)
  assert jnp.all((offset > low) & (offset < high))


def test_start_noise_fills_the_box(x64):
  inputs = jnp.full((4000, 1), 0.05)
  start = lambda key: log_barrier_attack(
    lambda x: x[:, 0], inputs, key, radius=0.1, barrier=0.1, steps=0, optimizer=optax.sgd(0.1)
  )
  np.testing.assert_allclose(start(None), 0.025, rtol=1e-12)
  drawn = start(jax.random.key(0))
  assert drawn.min() > -0.05 and drawn.max() < 0.1 and drawn.min() < -0.049 and drawn.max() > 0.099
  np.testing.assert_allclose(drawn.mean(), 0.025, atol=4 * 0.15 / np.sqrt(12 * 4000))


def test_fast_bat_is_the_plain_gradient_where_the_walls_hold_and_moves_elsewhere(problem):
  params, loss_fn, inputs = problem
  low, high = _box(inputs, RADIUS)
  rng = np.random.default_rng(2)
  offset = jnp.asarray(rng.choice([0.0, 0.3, 1.0], size=inputs.shape)) * (high - low) + low
  losses = lambda params: fast_bat_loss(loss_fn, params, inputs, offset, radius=RADIUS, curvature=8.0)
  np.testing.assert_array_equal(losses(params), loss_fn(params, inputs + offset))
  slope = jax.grad(lambda x: loss_fn(params, x).sum())(inputs + offset)
  moves = (offset > low + 1e-7) & (offset < high - 1e-7)
  assert moves.any() and not moves.all()
  response = jnp.where(moves, slope, 0) / 8.0
  cross = lambda params: jnp.sum(jax.grad(lambda x: loss_fn(params, x).sum())(inputs + offset) * response)
  expected = jax.tree.map(
    jnp.add, jax.grad(lambda params: loss_fn(params, inputs + offset).sum())(params), jax.grad(cross)(params)
  )
  found = jax.grad(lambda params: losses(params).sum())(params)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
  still = jax.grad(lambda params: fast_bat_loss(loss_fn, params, inputs, high, radius=RADIUS, curvature=8.0).sum())
  plain = jax.grad(lambda params: loss_fn(params, inputs + high).sum())
  for a, b in zip(jax.tree.leaves(still(params)), jax.tree.leaves(plain(params))):
    np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("hessian", ["diagonal", "full", "none"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_boxes_without_width_and_extreme_losses_are_finite(hessian, dtype):
  inputs = jnp.asarray([[0.0, 1.0, 0.5]], dtype)
  for size in (0.0, 1e-20, 1e4):
    loss_fn = lambda scale, x, size=size: jnp.sum(x * jnp.asarray(size, x.dtype) * scale, axis=-1)
    for radius in (0.0, 0.25):
      options = dict(radius=radius, barrier=0.1)
      attack = functools.partial(log_barrier_attack, functools.partial(loss_fn, jnp.ones((), dtype)), inputs)
      offset = attack(steps=5, optimizer=optax.adam(0.1), **options)
      assert offset.dtype == dtype and (radius > 0 or not offset.any())
      losses = lambda scale, loss_fn=loss_fn, offset=offset, options=options: implicit_adversarial_loss(
        loss_fn, scale, inputs, offset, hessian=hessian, **options
      )
      value, gradient = jax.value_and_grad(lambda scale: losses(scale).sum())(jnp.ones((), dtype))
      assert np.isfinite(offset.astype(float)).all() and np.isfinite(float(value)) and np.isfinite(float(gradient))


def test_constant_in_inputs_offset_and_hyperparameters(problem):
  params, loss_fn, inputs = problem
  offset = jnp.full(inputs.shape, 0.01)

  def total(inputs, offset, radius, barrier, hessian):
    options = dict(radius=radius, barrier=barrier)
    attacked = log_barrier_attack(
      functools.partial(loss_fn, params), inputs, steps=3, optimizer=optax.sgd(0.01), **options
    )
    losses = implicit_adversarial_loss(loss_fn, params, inputs, offset, hessian=hessian, **options)
    return losses.sum() + attacked.sum()

  for hessian in ("diagonal", "full", "none"):
    gradients = jax.grad(total, argnums=(0, 1, 2, 3))(inputs, offset, RADIUS, BARRIER, hessian)
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize("hessian", ["diagonal", "full"])
def test_a_batch_split_over_devices_is_the_whole(hessian, x64):
  rng = np.random.default_rng(0)
  params, inputs = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.uniform(size=(16, 4)))
  loss_fn = lambda params, x: jax.nn.logsumexp(x @ params, axis=-1) - x @ params[:, 0]

  def step(inputs, axis_name=None):
    options = dict(radius=RADIUS, barrier=BARRIER)
    offset = log_barrier_attack(
      functools.partial(loss_fn, params), inputs, steps=20, optimizer=optax.adam(0.02), **options
    )
    objective = lambda params: kl_dro_loss(
      implicit_adversarial_loss(loss_fn, params, inputs, offset, hessian=hessian, tolerance=1e-12, **options),
      temperature=0.3,
      axis_name=axis_name,
    )
    value, gradient = jax.value_and_grad(objective)(params)
    return offset, (value, gradient if axis_name is None else jax.lax.pmean(gradient, axis_name))

  offset, (value, gradient) = jax.jit(step)(inputs)
  part = functools.partial(step, axis_name="devices")
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  specs = dict(in_specs=PartitionSpec("devices"), out_specs=(PartitionSpec("devices"), PartitionSpec()))
  mapped = jax.shard_map(part, mesh=mesh, check_vma=False, **specs)
  found, same = jax.pmap(part, axis_name="devices")(inputs.reshape(8, 2, 4))
  for offsets, (values, gradients) in (
    (found.reshape(16, 4), jax.tree.map(lambda leaf: leaf[3], same)),
    jax.jit(mapped)(inputs),
  ):
    np.testing.assert_allclose(offsets, offset, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(values, value, rtol=1e-9)
    np.testing.assert_allclose(gradients, gradient, rtol=1e-8, atol=1e-12)


def test_bad_input_is_refused():
  inputs, loss = jnp.full((2, 3), 0.5), lambda x: jnp.sum(x, axis=-1)
  good = dict(radius=0.1, barrier=0.1, steps=1, optimizer=optax.sgd(0.1))
  for change, message in (
    ({"radius": -1.0}, "radius must lie in"),
    ({"radius": np.ones(3)}, "radius must be a scalar"),
    ({"barrier": 0.0}, "barrier must lie in"),
    ({"steps": -1}, "steps must be a non-negative int"),
    ({"optimizer": 0.1}, "optimizer must be an optax transformation"),
    ({"bounds": (0.0,)}, "bounds must be a pair"),
  ):
    with pytest.raises(ValueError, match=message):
      log_barrier_attack(loss, inputs, **{**good, **change})
  with pytest.raises(ValueError, match="one value per example"):
    log_barrier_attack(lambda x: jnp.sum(x), inputs, **good)
  loss_fn = lambda params, x: jnp.sum(x, axis=-1) * params
  for change, message in (
    ({"hessian": "exact"}, "hessian must be one of diagonal, full, none"),
    ({"barrier": -1.0}, "barrier must lie in"),
    ({"tolerance": -1.0}, "tolerance must lie in"),
    ({"offset": jnp.zeros(3)}, "equal shapes"),
    ({"offset": jnp.zeros((2, 3), int)}, "offset must be floating point"),
  ):
    options = {"offset": jnp.zeros((2, 3)), "radius": 0.1, "barrier": 0.1, **change}
    with pytest.raises(ValueError, match=message):
      implicit_adversarial_loss(loss_fn, 1.0, inputs, **options)
  with pytest.raises(ValueError, match="curvature must lie in"):
    fast_bat_loss(loss_fn, 1.0, inputs, inputs, radius=0.1, curvature=0.0)


def _each_loss(scale, inputs):
  return jnp.sum(jnp.sin(3 * inputs), axis=-1) * scale


def _draw(rng):
  return (rng.uniform(0.1, 0.9, (EXAMPLES, 3)),)


def _draw_with_offset(rng):
  return (*_draw(rng), rng.uniform(-0.05, 0.05, (EXAMPLES, 3)))


_BAD = (("inputs", lambda inputs, *rest: (inputs.astype(np.int32), *rest)),)
_BAD_OFFSET = (*_BAD, ("shapes", lambda inputs, offset: (inputs, offset[1:])))
_scale = lambda inputs: jnp.ones((), inputs.dtype)

ROWS = [
  row(
    log_barrier_attack,
    _draw,
    call=lambda inputs, radius, barrier: log_barrier_attack(
      functools.partial(_each_loss, _scale(inputs)),
      inputs,
      radius=radius,
      barrier=barrier,
      steps=3,
      optimizer=optax.sgd(0.001),
    ),
    extreme=unchanged,  # inputs lie within bounds
    bad=_BAD,
    examples="batch",
    differentiable=False,
    options=dict(radius=(0.1, 0.2), barrier=(0.5, 1.0)),
  ),
  # The derivative in the parameters, which is not the value's, has tests above.
  *(
    row(
      implicit_adversarial_loss,
      _draw_with_offset,
      call=lambda inputs, offset, radius, barrier, hessian=hessian: implicit_adversarial_loss(
        _each_loss, _scale(inputs), inputs, offset, radius=radius, barrier=barrier, hessian=hessian
      ),
      extreme=unchanged,
      bad=_BAD_OFFSET,
      examples="batch",
      differentiable=False,
      options=dict(radius=(0.1, 0.2), barrier=(1.0, 2.0)),
    )._replace(label=f"barrier.implicit_adversarial_loss-{hessian}")
    for hessian in ("diagonal", "full", "none")
  ),
  row(
    fast_bat_loss,
    _draw_with_offset,
    call=lambda inputs, offset, radius, curvature: fast_bat_loss(
      _each_loss, _scale(inputs), inputs, offset, radius=radius, curvature=curvature
    ),
    extreme=unchanged,
    bad=_BAD_OFFSET,
    examples="batch",
    differentiable=False,
    options=dict(radius=(0.1, 0.2), curvature=(1.0, 10.0)),
  ),
]
