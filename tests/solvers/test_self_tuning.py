"""Self-tuning: transformations, perturbations, which gradients flow, and what each kind of step changes."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.layers.best_response import BestResponseDense
from jaxreg.layers.per_example_noise import per_example_dropout
from jaxreg.solvers import self_tuning
from jaxreg.solvers.self_tuning import Hyperparameter
from tests.conformance import EXAMPLES, row, unchanged

SPACE = (
  Hyperparameter("rate", init=0.05, low=0.0, high=0.9),
  Hyperparameter("length", init=4.0, low=0.0, high=25.0, discrete=True),
  Hyperparameter("weight", init=2.0, low=1.0, per_example=False, scale=1.0, response_input=jax.nn.softplus),
  Hyperparameter("limit", init=-2.0, high=-1.0),
  Hyperparameter("log_ridge", init=-3.0, response_input=jax.nn.sigmoid),
)
LAYER = BestResponseDense(3)


def test_start_is_the_given_values(x64):
  tuning = self_tuning.tuning_init(SPACE)
  values = self_tuning.constrain_hyperparameters(SPACE, tuning.position)
  for spec in SPACE:
    # A discrete value may come back a rounding error below itself, and is then rounded down.
    np.testing.assert_allclose(values[spec.name], spec.init, rtol=1e-12, atol=1.0 if spec.discrete else 0.0)
  np.testing.assert_allclose(jax.nn.softplus(tuning.raw_scale), [spec.scale for spec in SPACE], rtol=1e-12)
  seen = self_tuning.response_inputs(SPACE, tuning.position)
  np.testing.assert_allclose(seen[:2], tuning.position[:2])
  np.testing.assert_allclose(seen[2], 1.0, rtol=1e-12)
  np.testing.assert_allclose(seen[4], 1 / (1 + math.exp(3)), rtol=1e-12)


@given(share=st.floats(1e-6, 1 - 1e-6), low=st.floats(-100, 100), width=st.floats(1e-3, 100))
@settings(max_examples=20, deadline=None)
def test_constraining_inverts_unconstraining(share, low, width):
  high, value = low + width, low + share * width
  spaces = {(low, high): value, (low, math.inf): low + 50 * share, (-math.inf, high): high - 50 * share}
  for (low, high), value in spaces.items():
    spec = Hyperparameter("x", init=value, low=low, high=high)
    position = self_tuning._unconstrain(np.float64(value), low, high, np)
    assert np.isfinite(position)
    # In NumPy, as compiling for every draw is slow; the compiled one is tested above and below.
    if math.isinf(spec.high):
      back = low + np.logaddexp(0, position)
    elif math.isinf(spec.low):
      back = high - np.logaddexp(0, position)
    else:
      back = low + (high - low) / (1 + np.exp(-position))
    np.testing.assert_allclose(back, value, rtol=1e-9, atol=1e-9)


def test_bounds_and_inverses_at_the_ends(x64):
  positions = jnp.array([[-50.0] * 5, [50.0] * 5])
  values = self_tuning.constrain_hyperparameters(SPACE, positions)
  for spec in SPACE:
    assert np.isfinite(values[spec.name]).all()
    assert (values[spec.name] >= spec.low).all() and (values[spec.name] <= spec.high).all()
  for value in (1e-6, 50.0):
    position = self_tuning.unconstrain_hyperparameter(jnp.array(value), low=0.0)
    np.testing.assert_allclose(jax.nn.softplus(position), value, rtol=1e-12)
    assert np.isfinite(self_tuning.unconstrain_hyperparameter(jnp.float32(value), low=0.0))


def test_entropy_gradient_and_extremes(x64):
  raw = jnp.array([-30.0, -1.0, 0.0, 0.5, 30.0])
  gradient = jax.jit(jax.grad(self_tuning.perturbation_entropy))
  np.testing.assert_allclose(gradient(raw), jax.nn.sigmoid(raw) / jax.nn.softplus(raw), rtol=1e-12)
  expected = np.sum(np.log(np.logaddexp(0, np.asarray(raw)) * np.sqrt(2 * np.pi * np.e)))
  np.testing.assert_allclose(self_tuning.perturbation_entropy(raw), expected, rtol=1e-12)
  np.testing.assert_allclose(gradient(jnp.array([-1e4, 1e4])), [1, 1e-4], rtol=1e-10)
  assert np.isfinite(self_tuning.perturbation_entropy(jnp.array([-1e4, 1e4], jnp.bfloat16)))


def test_perturbations(x64):
  tuning, examples = self_tuning.tuning_init(SPACE), 4000
  draws = self_tuning.perturb_hyperparameters(jax.random.key(0), SPACE, tuning, examples=examples)
  errors = (draws - tuning.position) / jax.nn.softplus(tuning.raw_scale)
  own = np.array([spec.per_example for spec in SPACE])
  np.testing.assert_array_equal(draws[:, ~own], np.broadcast_to(draws[0, ~own], draws[:, ~own].shape))
  np.testing.assert_allclose(np.var(errors[:, own], 0), 1, atol=3 * np.sqrt(2 / examples))
  np.testing.assert_allclose(np.mean(errors[:, own], 0), 0, atol=3 / np.sqrt(examples))


def test_ridge_gate_identity():
  rng, n = np.random.default_rng(0), 12
  x, y, log_ridge = rng.normal(size=(n, 5)), rng.normal(size=n), 0.7
  ridge = np.linalg.solve(x.T @ x / n + np.exp(log_ridge) * np.eye(5), x.T @ y / n)
  _, s, rows = np.linalg.svd(x, full_matrices=False)
  gates = 1 / (1 + np.exp(log_ridge - np.log(s**2 / n)))
  ordinary = np.linalg.lstsq(x, y, rcond=None)[0]
  np.testing.assert_allclose(rows.T @ (gates * (rows @ ordinary)), ridge, rtol=1e-10, atol=1e-12)


def train_loss(params, seen, hyperparameters, batch, key):
  inputs = per_example_dropout(key, batch["x"], rate=hyperparameters["rate"])
  outputs = LAYER.apply({"params": params}, inputs, seen)
  return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])


def valid_loss(params, seen, batch):
  outputs = LAYER.apply({"params": params}, batch["x"], seen)
  return optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"])


def tuner(**changes):
  options = {
    "optimizer": optax.sgd(0.1, momentum=0.9), "position_optimizer": optax.adam(0.01),
    "scale_optimizer": optax.adam(0.01),
  }  # fmt: skip
  return self_tuning.self_tuner(SPACE, train_loss, valid_loss, **{**options, **changes})


def batches(count):
  rng = np.random.default_rng(1)
  return {"x": jnp.asarray(rng.normal(size=(count, 6, 4))), "y": jnp.asarray(rng.integers(0, 3, (count, 6)))}


TUNER = tuner()
cycle = jax.jit(TUNER.cycle)
step = jax.jit(TUNER.valid_step)


@functools.cache
def start():
  params = LAYER.init(jax.random.key(0), jnp.ones((1, 4)), jnp.ones(len(SPACE)))["params"]
  return TUNER.init(params, self_tuning.tuning_init(SPACE))


def changed(old, new):
  return [
    not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
  ]  # fmt: skip


def test_each_step_changes_its_own_part_only_and_a_cycle_is_its_steps():
  state, key = start(), jax.random.key(3)
  train, valid = batches(2), batches(1)
  one = lambda tree, index: jax.tree.map(lambda leaf: leaf[index], tree)
  train_key, valid_key = jax.random.split(key)
  expected, train_step = state, jax.jit(TUNER.train_step)
  for index, step_key in enumerate(jax.random.split(train_key, 2)):
    expected, _ = train_step(expected, one(train, index), step_key)
  assert all(changed(state.params, expected.params))
  for name in ("tuning", "position_opt_state", "scale_opt_state"):
    assert not any(changed(getattr(state, name), getattr(expected, name)))
  after, _ = step(expected, one(valid, 0), jax.random.split(valid_key, 1)[0])
  for name in ("params", "opt_state"):
    assert not any(changed(getattr(expected, name), getattr(after, name)))
  assert all(changed(expected.tuning, after.tuning))
  whole, losses = cycle(state, train, valid, key)
  assert np.isfinite(losses).all()
  chex.assert_trees_all_close(whole, after, rtol=1e-5, atol=1e-6)


def test_hyperparameters_are_moved_through_the_gates_only():
  state, batch = start(), jax.tree.map(lambda leaf: leaf[0], batches(1))
  closed = {**state.params, **{name: 0 * state.params[name] for name in ("kernel_gate", "bias_gate")}}
  moved, _ = step(state._replace(params=closed), batch, jax.random.key(0))
  np.testing.assert_array_equal(moved.tuning.position, state.tuning.position)
  # The scale is then moved by the entropy alone, which widens the perturbation.
  assert (moved.tuning.raw_scale > state.tuning.raw_scale).all()
  # Discrete ones too have a gradient, as the network sees the unconstrained value.
  assert all(changed(*(list(s.tuning.position) for s in (state, step(state, batch, jax.random.key(0))[0]))))


def test_fixed_scales_mean_no_perturbation_in_validation_steps():
  fixed, batch = tuner(scale_optimizer=None), jax.tree.map(lambda leaf: leaf[0], batches(1))
  state = fixed.init(start().params, start().tuning)
  valid_step = jax.jit(fixed.valid_step)
  (first, loss), (second, _) = (valid_step(state, batch, jax.random.key(seed)) for seed in (0, 1))
  assert not any(changed(first, second))
  assert not changed(first.tuning.raw_scale, state.tuning.raw_scale)[0]
  seen = self_tuning.response_inputs(SPACE, state.tuning.position)
  np.testing.assert_allclose(loss, np.mean(valid_loss(state.params, seen, batch)), rtol=1e-6)


def test_gradients_are_averaged_over_devices():
  """Without perturbation of the validation step, two devices with half a batch each are one device with all of it."""
  fixed, batch = tuner(scale_optimizer=None, axis_name="data"), jax.tree.map(lambda leaf: leaf[0], batches(1))
  state = fixed.init(start().params, start().tuning)
  halves = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), batch)
  options = {"axis_name": "data", "in_axes": (None, 0, None), "devices": jax.devices()[:2]}
  split, loss = jax.pmap(fixed.valid_step, **options)(state, halves, jax.random.key(0))
  alone, expected = jax.jit(tuner(scale_optimizer=None).valid_step)(state, batch, jax.random.key(0))
  np.testing.assert_allclose(loss, [expected] * 2, rtol=1e-6)
  np.testing.assert_allclose(split.tuning.position, [alone.tuning.position] * 2, rtol=1e-6)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: Hyperparameter("x", init=1.0, low=0.0, high=1.0), "init must lie in .0.0, 1.0., got 1.0"),
    (lambda: Hyperparameter("x", init=1.0, low=2.0, high=1.0), "high must lie in"),
    (lambda: Hyperparameter("x", init=float("nan")), "init must lie in"),
    (lambda: Hyperparameter("x", init=1.0, scale=0.0), "scale must lie in"),
    (lambda: self_tuning.tuning_init([]), "space must be hyperparameters with different names"),
    (lambda: self_tuning.tuning_init([SPACE[0]] * 2), "space must be hyperparameters with different names"),
    (lambda: self_tuning.constrain_hyperparameters(SPACE, jnp.ones((2, 3))), "position must have shape"),
    (lambda: self_tuning.response_inputs(SPACE, jnp.ones(5, int)), "position must be floating"),
    (lambda: self_tuning.unconstrain_hyperparameter(1.5, low=0.0, high=1.0), "value must lie in"),
    (lambda: self_tuning.perturbation_entropy(jnp.ones(2, int)), "raw_scale must be floating"),
    (lambda: tuner(entropy_weight=-1.0), "entropy_weight must lie in"),
  ],
)
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def bounds(meta, name):
  low, high = meta["ranges"][name]
  return -math.inf if low is None else low, math.inf if high is None else high


@pytest.mark.golden
def test_golden_05_stn_transformations(golden, x64):
  functions = {"identity": lambda x: x, "softplus": jax.nn.softplus, "sigmoid": jax.nn.sigmoid}
  check, seen = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), 0
  file = golden("05-stn")
  for case, arrays, _ in file.cases():
    meta = file.meta["cases"][case.removeprefix("case")]
    if "ranges" not in meta:
      continue
    seen += 1
    space = []
    for name in meta["ranges"]:
      low, high = bounds(meta, name)
      init = low + 1 if math.isinf(high) else (low + high) / 2
      see, discrete = functions[meta["hnet_fcn"][name]], name in meta["discrete"]
      space.append(Hyperparameter(name, init=init, low=low, high=high, discrete=discrete, response_input=see))

    # The range is in the name: out_s_logit_0_09 is that of (0, 0.9).
    (logit,) = (name for name in arrays if name.startswith("out_s_logit_"))
    low, high = (float(f"{word[0]}.{word[1:]}0") for word in logit.split("_")[-2:])

    @jax.jit
    def compute(position, raw, sigma, p, space=space, low=low, high=high):
      values = lambda position: jnp.stack(list(self_tuning.constrain_hyperparameters(space, position).values()), -1)
      return {
        "out_hparam": values(position),
        "grad_htensor_of_sum_hparam": jax.grad(lambda position: values(position).sum())(position),
        "out_hnet": self_tuning.response_inputs(space, position),
        "out_entropy": self_tuning.perturbation_entropy(raw),
        "grad_hscale_entropy": jax.grad(self_tuning.perturbation_entropy)(raw),
        "out_inv_softplus": self_tuning.unconstrain_hyperparameter(sigma, low=0.0),
        "logit": self_tuning.unconstrain_hyperparameter(p, low=low, high=high),
      }

    for name, value in compute(*(jnp.asarray(arrays[name]) for name in ("htensor", "hscale", "sigma", "p"))).items():
      check(value, arrays[logit if name == "logit" else name])
  assert seen


_SPACE = (self_tuning.Hyperparameter("rate", 0.3, low=0.0, high=1.0), self_tuning.Hyperparameter("decay", 0.1, low=0.0))


ROWS = [
  row(
    self_tuning.constrain_hyperparameters,
    lambda rng: (rng.normal(size=(EXAMPLES, 2)),),
    call=lambda position: self_tuning.constrain_hyperparameters(_SPACE, position),
    extreme=unchanged,
  ),
  row(
    self_tuning.response_inputs,
    lambda rng: (rng.normal(size=(EXAMPLES, 2)),),
    call=lambda position: self_tuning.response_inputs(_SPACE, position),
    extreme=unchanged,
  ),
  row(self_tuning.perturbation_entropy, lambda rng: (rng.normal(size=3),), extreme=unchanged),
  row(
    self_tuning.unconstrain_hyperparameter,
    lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES),),
    extreme=unchanged,
    examples="any",
    options=dict(low=0.0, high=1.0),
  ),
]


EXEMPT = {
  "Hyperparameter": "names and bounds",
  "SelfTuner": "functions of self_tuner",
  "SelfTuningState": "state of self_tuner",
  "Tuning": "state of self_tuner",
  "perturb_hyperparameters": "draws; its tests compare the distributions",
  "self_tuner": "a training loop around functions of the caller; the golden file carries it",
  "tuning_init": "builds a state",
}
