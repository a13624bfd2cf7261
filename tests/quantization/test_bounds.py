"""Calibration of activation bounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.quantization import bounds
from jaxreg.quantization.fake_quant import fake_quant_activation
from tests.conformance import CLASSES, draw_logits, row


@jax.jit
def compiled(inputs, state, rate, due):
  new = bounds.activation_bound_update(inputs, state=state, rate=rate)
  rules = {name: rule(new) for name, rule in bounds.BOUND_RULES.items()}
  freeze = functools.partial(bounds.freeze_bounds, new, when=due, per_tensor=False)
  frozen = {name: freeze(rule=rule) for name, rule in bounds.BOUND_RULES.items()}
  return rules, frozen, bounds.per_tensor_bounds(frozen["mean_of_max"])


def update(inputs, state, rate, due=False):
  """Bounds by all rules, the states that they freeze, and the first of these with one bound, in NumPy."""
  return jax.tree.map(np.asarray, compiled(inputs, state, np.float32(rate), due))


def start(channels):
  return bounds.BoundState(*np.zeros((5, channels), np.float32), np.full(channels, -1, np.float32))


def test_starts_with_nothing():
  assert all((a == b).all() for a, b in zip(bounds.activation_bound_init(3), start(3)))


def test_one_bound_for_all_channels_is_the_default():
  state = bounds.activation_bound_update(jnp.array([[2.0, 5.0]]), state=bounds.activation_bound_init(2), rate=1.0)
  assert bounds.freeze_bounds(state).bound.tolist() == [5.0, 5.0]
  assert bounds.freeze_bounds(state, per_tensor=False).bound.tolist() == [2.0, 5.0]
  assert bounds.freeze_bounds(state, when=False).bound.tolist() == [-1.0, -1.0]


def test_moving_average_of_the_maximum_is_not_corrected():
  batch = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]], np.float32)  # the second channel never fires
  state = start(2)
  for steps in range(1, 8):
    rules, frozen, _ = update(batch, state, 0.1)
    state = frozen["mean_of_max"]
    np.testing.assert_allclose(rules["mean_of_max"], [3 * (1 - 0.9**steps), 0], rtol=1e-6)
  np.testing.assert_allclose(state.mean[0], 2 * (1 - 0.9**7), rtol=1e-6)  # the zero is not counted
  assert state.bound.tolist() == [-1, -1]
  frozen = update(batch, state, 0.1, True)[1]["mean_of_max"]
  assert frozen.bound[0] > 0 and frozen.bound[1] == 0
  silent = jax.jit(lambda x: fake_quant_activation(x, bits=4, bound=frozen.bound, signed=False))(batch + 1e4)
  assert silent[0, 1] <= 1.2e-7


def test_rules():
  inputs = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
  expected = {
    "mean_of_max": np.abs(inputs).max(0),
    "scaled_mean_magnitude": 3 * np.abs(inputs).mean(0),
    "scaled_root_mean_square": 3 * np.sqrt(np.square(inputs).mean(0)),
    "mean_plus_deviation": np.abs(inputs.mean(0)) + 3 * inputs.std(0),
  }
  rules, frozen, shared = update(inputs, start(3), 1.0, True)
  assert rules.keys() == expected.keys()
  for name in expected:
    np.testing.assert_allclose(rules[name], expected[name], rtol=1e-5)
    np.testing.assert_allclose(frozen[name].bound, expected[name], rtol=1e-5)
  np.testing.assert_allclose(shared.bound, [expected["mean_of_max"].max()] * 3, rtol=1e-6)


def test_a_split_batch_is_the_whole():
  rng = np.random.default_rng(0)
  inputs = (rng.normal(size=(16, 3)) * (rng.uniform(size=(16, 1)) > 0.5)).astype(np.float32)
  whole = update(inputs, start(3), 0.1)[1]["mean_of_max"]
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  split = functools.partial(bounds.activation_bound_update, state=start(3), axis_name="devices")
  parts = jax.shard_map(
    split, mesh=mesh, in_specs=PartitionSpec("devices"), out_specs=PartitionSpec(), check_vma=False
  )  # fmt: skip
  for a, b in zip(jax.jit(parts)(inputs), whole):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.golden
@pytest.mark.usefixtures("x64")
def test_golden_31_quantized_resnet_bounds(golden):
  file, seen = golden("31-quantized_resnet"), 0
  for case, arrays, _ in file.cases():
    if "xs" not in arrays:
      continue
    meta, history = file.meta[case], []
    channels = arrays["xs"].shape[-1]
    state = start(channels)._replace(bound=np.full(channels, meta["initial_bound"], np.float32))
    for step, inputs in enumerate(arrays["xs"], 1):
      due = step == meta["updates"] if meta["bounds_updated_only_on_last_step"] else True
      state = update(inputs, state, meta["ema_coeff"], due)[1]["mean_of_max"]
      history.append(state.bound)
    expected = arrays["out_bounds_history"].reshape(len(history), channels)
    np.testing.assert_allclose(np.stack(history), expected, rtol=1e-5)
    names = {"mean_batch_maximum": "maximum", "mean_abs": "mean_magnitude", "mean_sq": "mean_square"}
    for theirs, ours in names.items():
      np.testing.assert_allclose(getattr(state, ours), arrays[f"out_{theirs}"].ravel(), rtol=1e-5)
    seen += 1
  assert seen


def test_bad_input():
  with pytest.raises(ValueError, match="channels"):
    bounds.activation_bound_init(0)
  with pytest.raises(ValueError, match="inputs must end in"):
    bounds.activation_bound_update(jnp.ones((4, 2)), state=start(3))
  with pytest.raises(ValueError, match="rate must lie in"):
    bounds.activation_bound_update(jnp.ones((4, 3)), state=start(3), rate=1.5)
  with pytest.raises(ValueError, match="inputs must be floating"):
    bounds.activation_bound_update(jnp.ones((4, 3), int), state=start(3))
  with pytest.raises(ValueError, match="factor must lie in"):
    bounds.scaled_mean_magnitude_bound(start(3), factor=-1)
  with pytest.raises(ValueError, match="tree of BoundState"):
    bounds.freeze_bounds({"a": jnp.ones(3)})


ROWS = [
  row(
    bounds.activation_bound_update,
    lambda rng: (draw_logits(rng), bounds.BoundState(*rng.uniform(size=(6, CLASSES)))),
    call=lambda x, state, rate: bounds.activation_bound_update(x, state=state, rate=rate),
    bad=(
      ("inputs", lambda x, state: (x[:, 1:], state)),
      ("inputs", lambda x, state: (x.astype(np.int32), state)),
    ),
    differentiable=False,
    wide=True,
    options=dict(rate=(0.0, 1.0)),
  ),
  *(
    row(
      function,
      lambda rng: (bounds.BoundState(*rng.uniform(size=(6, CLASSES))),),
      bad=(("BoundState", lambda state: (tuple(state),)),),
      differentiable=False,
      wide=True,
    )
    for function in (bounds.freeze_bounds, bounds.per_tensor_bounds)
  ),
]


EXEMPT = {
  "BOUND_RULES": "functions by name",
  "BoundState": "state, carried by activation_bound_update",
  "activation_bound_init": "builds a state from a Python integer",
  "mean_of_max_bound": "carried by freeze_bounds",
  "mean_plus_deviation_bound": "a formula of a state, compared with NumPy's in its tests",
  "scaled_mean_magnitude_bound": "a formula of a state, compared with NumPy's in its tests",
  "scaled_root_mean_square_bound": "a formula of a state, compared with NumPy's in its tests",
}
