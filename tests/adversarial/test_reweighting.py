"""Weights of adversarial training: golden vectors, the card's exact tests, masks, and batches split over devices."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from jaxreg.adversarial.reweighting import (
  LogMeanExpState,
  gairat_weights,
  kl_dro_loss,
  kl_dro_weights,
  log_mean_exp_init,
  log_mean_exp_update,
  mail_weights,
)
from tests.conformance import BAD_LABELS, EXAMPLES, draw_classification, extreme_logits, row

NAN = np.nan
LOSSES = np.random.default_rng(0).exponential(size=16)


def _cases(golden):
  """(name, arrays, hyperparameters) of every case."""
  for name, arrays, _ in golden("22-doubly_robust_at").cases():
    yield name, arrays, json.loads(str(arrays["hp"]))


@pytest.mark.golden
def test_golden_doubly_robust_at_objective(golden, x64):
  names = []
  for name, arrays, hp in _cases(golden):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-12, err_msg=name)
    for losses, kind in ((arrays["losses"], "dro"), (arrays["barrier_out_adv_loss"], "outer")):
      value, gradient = jax.value_and_grad(kl_dro_loss)(losses, temperature=hp["r"])
      weights = kl_dro_weights(losses, temperature=hp["r"])
      close(value, arrays[f"{kind}_out_obj"])
      close(weights, arrays[f"{kind}_out_weights"])
      close(gradient, arrays[f"{kind}_out_weights"])
    weights = kl_dro_weights(arrays["losses"], temperature=hp["r"])
    divergence = jnp.sum(jnp.where(weights > 0, weights * jnp.log(jnp.where(weights > 0, weights, 1)), 0))
    close(divergence + np.log(weights.size), arrays["dro_out_kl"])
  assert names


@pytest.mark.golden
def test_golden_doubly_robust_at_tracker(golden, x64):
  names = []
  for name, arrays, hp in _cases(golden):
    names.append(name)
    options = dict(temperature=hp["r"], rate=hp["eta"])
    plain = corrected = log_mean_exp_init()
    for step, (losses, previous) in enumerate(zip(arrays["track_losses"], arrays["track_losses_prev_params"])):
      close = lambda got, want, step=step: np.testing.assert_allclose(got, want[step], rtol=1e-8, err_msg=name)
      weights, plain = log_mean_exp_update(losses, plain, **options)
      # The file's corrected means are those without a floor, and none of them is negative.
      _, corrected = log_mean_exp_update(losses, corrected, previous_losses=previous, floor=1e-9, **options)
      close(plain.log_mean, arrays["track_out_logu"])
      close(corrected.log_mean, arrays["track_out_logu_corrected"])
      close(weights, arrays["track_out_step_weights"])
  assert names


@pytest.mark.golden
def test_golden_doubly_robust_at_baselines(golden, x64):
  names = []
  for name, arrays, hp in _cases(golden):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-12, err_msg=name)
    for form in ("tanh", "sigmoid", "discrete"):
      options = dict(steps=hp["gairat_num_steps"], scale=hp["gairat_lambda"], form=form)
      close(gairat_weights(arrays["gairat_kappa"], **options), arrays[f"gairat_{form}_out_weights"])
    found = mail_weights(arrays["mail_logits"], arrays["mail_labels"], bias=hp["mail_bias"], slope=hp["mail_slope"])
    close(found, arrays["mail_out_weights"])
    close(3 * jax.nn.sigmoid(hp["mail_slope"] * (arrays["mail_out_pm"] + hp["mail_bias"])), found)
  assert names


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_loss_is_the_maximum_over_the_simplex(temperature, x64):
  losses = jnp.asarray(LOSSES)
  objective = lambda w: w @ losses - temperature * jnp.sum(w * jnp.log(w.size * w))
  value = kl_dro_loss(losses, temperature=temperature)

  def ascend(w, _):  # mirror ascent, with a step at which the distance halves
    w = w * jnp.exp(0.5 / temperature * jax.grad(objective)(w))
    return w / w.sum(), None

  found = jax.lax.scan(ascend, jnp.full(losses.shape, 1 / losses.size), None, length=100)[0]
  np.testing.assert_allclose(value, objective(found), rtol=1e-8)
  others = np.random.default_rng(1).dirichlet(np.ones(losses.size), 100)
  assert max(objective(w) for w in others) < value
  gradient = jax.grad(kl_dro_loss)(losses, temperature=temperature)
  np.testing.assert_allclose(gradient, jax.nn.softmax(losses / temperature), rtol=1e-12)
  np.testing.assert_allclose(kl_dro_weights(losses, temperature=temperature), gradient, rtol=1e-12)
  # Its derivative in the temperature: minus the divergence of the weights from uniform ones.
  slope = jax.grad(lambda r: kl_dro_loss(losses, temperature=r))(temperature)
  np.testing.assert_allclose(slope, -jnp.sum(gradient * jnp.log(losses.size * gradient)), rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_of_the_temperature(dtype, x64):
  losses = jnp.asarray(LOSSES, dtype)
  np.testing.assert_allclose(kl_dro_loss(losses, temperature=1e6), losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(kl_dro_loss(losses, temperature=1e-6), losses.max(), rtol=1e-5)
  np.testing.assert_allclose(kl_dro_weights(losses, temperature=1e6), 1 / losses.size, rtol=1e-5)
  # To the next order, half of the variance over the temperature.
  rest = kl_dro_loss(jnp.asarray(LOSSES), temperature=1e3) - LOSSES.mean()
  np.testing.assert_allclose(rest, LOSSES.var() / 2e3, rtol=1e-2)
  large = losses.at[3].set(1e3)
  value, gradient = jax.value_and_grad(kl_dro_loss)(large, temperature=1e-2)
  np.testing.assert_allclose(value, 1e3 - 1e-2 * np.log(losses.size), rtol=1e-6)
  np.testing.assert_array_equal(gradient, np.arange(losses.size) == 3)
  np.testing.assert_allclose(kl_dro_weights(large, temperature=1e-2), gradient, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-300, 300), st.floats(0.05, 50))
def test_a_constant_shifts_the_loss_and_leaves_the_weights(seed, constant, temperature):
  with jax.enable_x64(True):
    losses = np.random.default_rng(seed).exponential(size=8)
    shifted = _value_and_weights(losses + constant, temperature)
    value, weights = _value_and_weights(losses, temperature)
    np.testing.assert_allclose(shifted[0], value + constant, rtol=1e-10, atol=1e-10)
    # The shifted losses are rounded to 300 * 2^-53, which the temperature divides: 1e-12 of the weights.
    np.testing.assert_allclose(shifted[1], weights, rtol=1e-11)


@jax.jit
def _value_and_weights(losses, temperature):
  return kl_dro_loss(losses, temperature=temperature), kl_dro_weights(losses, temperature=temperature)


def test_many_losses_of_which_one_counts_keep_their_digits():
  losses = jnp.zeros(100_000).at[5].set(100.0)
  # One rounding of the logarithm of 100,000.
  np.testing.assert_allclose(kl_dro_loss(losses, temperature=1.0), 100 - np.log(1e5), rtol=1e-6)


def _naive(batches, before, rate, temperature, floor=1.0):
  u, means = None, []
  for losses, old in zip(batches, before):
    g, g_old = np.exp(losses / temperature).mean(), np.exp(old / temperature).mean()
    u = g if u is None else max((1 - rate) * (u + g - g_old) + rate * g, floor * rate * g)
    means.append(u)
  return np.array(means)


@pytest.mark.parametrize("rate", [0.1, 0.9, 1.0])
def test_tracker_in_logarithms_is_the_naive_one(rate, x64):
  rng = np.random.default_rng(0)
  batches = rng.exponential(size=(12, 8))
  options = dict(temperature=0.7, rate=rate)

  def track(state, losses, previous=None):
    weights, state = log_mean_exp_update(losses, state, previous_losses=previous, **options)
    return state, (state.log_mean, weights)

  run = lambda *inputs: jax.lax.scan(lambda state, x: track(state, *x), log_mean_exp_init(), inputs)[1]
  # Without a correction, which previous losses equal to the current ones do not make either.
  plain = _naive(batches, batches, rate, 0.7)
  for log_means, weights in (run(batches), run(batches, batches)):
    np.testing.assert_allclose(log_means, np.log(plain), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(weights, np.exp(batches / 0.7) / (8 * plain[:, None]), rtol=1e-11)
  # With one, and once with previous losses so large that the corrected mean would be negative.
  before = batches + 0.1 * rng.normal(size=batches.shape)
  before[5] += 9
  for options["floor"] in (1.0, 0.25):
    log_means, weights = run(batches, before)
    expected = _naive(batches, before, rate, 0.7, options["floor"])
    np.testing.assert_allclose(log_means, np.log(expected), rtol=1e-10)
    lowest = rate * np.exp(batches[5] / 0.7).mean() * (options["floor"] if rate < 1 else 1)
    np.testing.assert_allclose(expected[5], lowest, rtol=1e-12)
    assert weights.max() <= 1 / (options["floor"] * rate) + 1e-9
  if rate == 1:
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(weights[3], kl_dro_weights(batches[3], temperature=0.7), rtol=1e-11)


def test_tracker_of_losses_whose_exponentials_overflow():
  state = log_mean_exp_init()
  for size in (1e4, -1e4, 1e4):
    losses = jnp.array([size, size + 1, 0.0])
    for previous in (None, losses - 3):
      weights, new = log_mean_exp_update(losses, state, temperature=0.5, rate=0.1, previous_losses=previous)
      assert np.isfinite(weights).all() and np.isfinite(new.log_mean)
      assert weights.max() <= 10 * (1 + 1e-5)
    state = new


def test_tracker_is_constant_under_differentiation_and_the_step_is_plain_at_large_temperature(x64):
  inputs = np.random.default_rng(0).normal(size=(16, 3))
  losses_of = lambda w: jnp.tanh(inputs @ w) ** 2 + 0.1 * (inputs @ w)
  w = jnp.array([0.3, -0.2, 0.5])

  def weighted(w, temperature):
    losses = losses_of(w)
    weights, _ = log_mean_exp_update(losses, log_mean_exp_init(), temperature=temperature, rate=0.9)
    return jnp.sum(weights * losses)

  plain = jax.grad(lambda w: losses_of(w).mean())(w)
  np.testing.assert_allclose(jax.grad(weighted)(w, 1e8), plain, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(lambda w: kl_dro_loss(losses_of(w), temperature=1e8))(w), plain, rtol=1e-6)
  robust = jax.grad(lambda w: kl_dro_loss(losses_of(w), temperature=0.2))(w)
  np.testing.assert_allclose(jax.grad(weighted)(w, 0.2), robust, rtol=1e-10)
  slope = jax.grad(lambda t: weighted(w, t))(0.2)
  assert slope == 0


@pytest.mark.parametrize("form", ["tanh", "sigmoid", "discrete"])
def test_gairat_weights(form):
  survived = jnp.array([0, 3, 7, 10, 10])
  weights = gairat_weights(survived, steps=10, form=form)
  np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)
  assert jnp.all(jnp.diff(weights[:4]) < 0) and weights[3] == weights[4]
  np.testing.assert_array_equal(gairat_weights(survived + 90 * (survived == 10), steps=10, form=form), weights)
  # Even where none of the weights could be told from zero.
  hopeless = gairat_weights(jnp.array([10, 10]), steps=10, scale=-1e4, form=form)
  np.testing.assert_allclose(hopeless, 1)
  where = jnp.array([True, True, False, True, False])
  masked = gairat_weights(survived, steps=10, form=form, where=where)
  np.testing.assert_allclose(masked[where], gairat_weights(survived[where], steps=10, form=form), rtol=1e-6)
  assert not masked[~where].any()


def test_mail_weights():
  rng = np.random.default_rng(0)
  logits, labels = 3 * rng.normal(size=(50, 4)), rng.integers(0, 4, 50)
  weights = mail_weights(logits, labels)
  assert jnp.all((weights > 0) & (weights < 3))
  np.testing.assert_array_equal(jax.grad(lambda z: mail_weights(z, labels).sum())(jnp.asarray(logits)), 0)
  logits[::5], labels[::5] = NAN, np.resize([-1, 4, 255, -100], 10)
  masked = mail_weights(logits, labels)
  assert not masked[::5].any()
  np.testing.assert_array_equal(masked[1::5], weights[1::5])


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
def test_nothing_comes_from_under_the_mask(spoil, x64):
  where = np.arange(16) % 3 > 0
  spoiled = jnp.where(where, LOSSES, spoil)
  for call in (kl_dro_loss, kl_dro_weights):
    total = lambda losses, where=None, call=call: jnp.sum(jnp.sin(call(losses, temperature=0.5, where=where)))
    value, gradient = jax.value_and_grad(total)(spoiled, where)
    expected, slope = jax.value_and_grad(total)(jnp.asarray(LOSSES[where]))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(gradient[where], slope, rtol=1e-10, atol=1e-14)
    assert not gradient[~where].any()
  state = LogMeanExpState(jnp.asarray(1.5))
  options = dict(temperature=0.5, rate=0.3)
  weights, new = log_mean_exp_update(spoiled, state, where=where, previous_losses=spoiled, **options)
  expected, after = log_mean_exp_update(LOSSES[where], state, previous_losses=LOSSES[where], **options)
  np.testing.assert_allclose(weights[where], expected, rtol=1e-10)
  np.testing.assert_allclose(new.log_mean, after.log_mean, rtol=1e-10)
  assert not weights[~where].any()
  # A batch without examples.
  none = np.zeros(16, bool)
  weights, same = log_mean_exp_update(spoiled, state, where=none, **options)
  assert not weights.any() and same.log_mean == 1.5
  assert log_mean_exp_update(spoiled, log_mean_exp_init(), where=none, **options)[1].log_mean == -np.inf
  assert kl_dro_loss(spoiled, temperature=0.5, where=none) == 0
  assert not kl_dro_weights(spoiled, temperature=0.5, where=none).any()


def _of_part(losses, where, axis_name=None):
  """All that couples examples, and the gradient of the objective in a parameter."""
  options = dict(where=where, axis_name=axis_name)
  objective = lambda scale: kl_dro_loss(scale * losses, temperature=0.5, **options)
  value, slope = jax.value_and_grad(objective)(jnp.asarray(1.5, losses.dtype))
  slope = slope if axis_name is None else jax.lax.pmean(slope, axis_name)
  weights = kl_dro_weights(losses, temperature=0.5, **options)
  state = LogMeanExpState(jnp.asarray(1.5, losses.dtype))
  tracked, state = log_mean_exp_update(
    losses, state, temperature=0.5, rate=0.3, previous_losses=0.9 * losses, **options
  )  # fmt: skip
  survived = jnp.floor(2 * losses).astype(jnp.int32)
  hard = gairat_weights(survived, steps=6, **options)
  return (weights, tracked, hard), (value, slope, state)


def test_a_batch_split_over_devices_is_the_whole(x64):
  losses, where = jnp.asarray(LOSSES), jnp.arange(16) % 5 > 0
  where = where.at[2:4].set(False)  # one of the devices has no example
  each, whole = jax.jit(_of_part)(losses, where)
  part = functools.partial(_of_part, axis_name="devices")
  blocks = (losses.reshape(8, 2), where.reshape(8, 2))
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  mapped = jax.shard_map(
    lambda *block: jax.tree.map(lambda leaf: leaf[None], part(*block)),
    mesh=mesh,
    in_specs=PartitionSpec("devices"),
    out_specs=PartitionSpec("devices"),
    check_vma=False,
  )
  for found, same in (jax.pmap(part, axis_name="devices")(*blocks), jax.jit(mapped)(losses, where)):
    for a, b in zip(found, each):
      np.testing.assert_allclose(a.reshape(16), b, rtol=1e-10)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(whole)):
      np.testing.assert_allclose(a, np.full(8, b), rtol=1e-10)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: kl_dro_loss(LOSSES, temperature=0.0), "temperature must lie in"),
    (lambda: kl_dro_weights(LOSSES, temperature=np.ones(16)), "temperature must be a scalar"),
    (lambda: kl_dro_loss(LOSSES, temperature=1.0, where=np.ones(3, bool)), "where must be boolean"),
    (lambda: log_mean_exp_update(LOSSES, 0.0, temperature=1.0, rate=0.5), "state must be LogMeanExpState"),
    (lambda: log_mean_exp_update(LOSSES, log_mean_exp_init(), temperature=1.0, rate=0.0), "rate must lie in"),
    (
      lambda: log_mean_exp_update(
        LOSSES, log_mean_exp_init(), temperature=1.0, rate=0.5, previous_losses=LOSSES[:1]
      ),
      "equal shapes",
    ),
    (lambda: gairat_weights(LOSSES, steps=10), "steps_survived must be integers"),
    (lambda: gairat_weights(np.arange(3), steps=1), "steps must be an integer of at least 2"),
    (lambda: gairat_weights(np.arange(3), steps=4, form="linear"), "form must be one of"),
    (lambda: mail_weights(np.zeros((3, 2)), np.zeros(3, int), slope=-1.0), "slope must lie in"),
  ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def _draw_losses(rng):
  return (rng.exponential(size=EXAMPLES),)


BAD_LOSSES = (("losses", lambda losses, *rest: (losses.astype(np.int32), *rest)),)

ROWS = [
  row(kl_dro_loss, _draw_losses, bad=BAD_LOSSES, options=dict(temperature=(0.5, 2.0))),
  # Losses of which none takes nearly all of the weight: the gradient is then a difference of nearly equal numbers, and
  # bfloat16's rounding of what comes back through the weights is all that is left of it.
  row(
    kl_dro_weights,
    lambda rng: (rng.uniform(size=EXAMPLES),),
    bad=BAD_LOSSES,
    options=dict(temperature=(0.5, 2.0)),
  ),
  row(
    log_mean_exp_update,
    lambda rng: (*_draw_losses(rng), LogMeanExpState(np.asarray(1.0 + rng.uniform()))),
    bad=BAD_LOSSES,
    examples="batch",
    differentiable=False,
    options=dict(temperature=(0.5, 2.0), rate=(0.1, 1.0)),
  ),
  *(
    row(
      gairat_weights,
      lambda rng: (rng.integers(0, 11, EXAMPLES).astype(np.int32),),
      bad=(("steps_survived", lambda survived: (survived * 1.0,)),),
      extreme=lambda survived: (1000 * survived,),
      differentiable=False,
      wide=True,
      options=dict(steps=10, scale=(-2.0, 1.0), form=form),
    )
    for form in ("tanh", "sigmoid", "discrete")
  ),
  row(
    mail_weights,
    draw_classification,
    extreme=extreme_logits,
    bad=BAD_LABELS,
    examples="any",
    differentiable=False,
    options=dict(bias=(-0.5, 0.5), slope=(1.0, 10.0)),
  ),
]

EXEMPT = {
  "LogMeanExpState": "state, carried by log_mean_exp_update",
  "log_mean_exp_init": "builds the state that log_mean_exp_update's row starts from",
}
