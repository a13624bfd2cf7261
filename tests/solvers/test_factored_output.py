"""The factored output: its steps are dense SGD's, at a cost that does not know the number of classes."""

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxreg.losses import spherical
from jaxreg.losses.spherical import SphericalStatistics
from jaxreg.solvers import factored_output as fo
from tests.conformance import row, unchanged

CLASSES, FEATURES, EXAMPLES = 40, 5, 6


def random_state(rng, classes=CLASSES, features=FEATURES):
  """Weights in a factored form that is far from the initial one, and not centred."""
  factor, mixing = rng.normal(size=(classes, features)), rng.normal(size=(features, features)) + 2 * np.eye(features)
  return factored(factor, mixing, rng.normal(size=features))


def factored(factor, mixing, shift):
  weights = factor @ mixing + shift
  leaves = (factor, mixing, np.linalg.inv(mixing), shift, weights.T @ weights, weights.sum(0))
  return fo.FactoredState(*map(jnp.asarray, leaves), jnp.int32(0))


def check_state(state, weights, tolerance=1e-10):
  """All parts of the state agree with the weights."""
  close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
  close(fo.factored_weights(state), weights)
  close(state.gram, weights.T @ weights)
  close(state.total, weights.sum(0))
  close(state.mixing @ state.mixing_inverse, np.eye(len(state.gram)))


def dense_loss(loss, weights, inputs, labels):
  """The loss of all logits, for targets of one or several classes."""
  logits = inputs @ weights.T
  target = jnp.take_along_axis(logits, labels.reshape(len(inputs), -1), axis=1).reshape(labels.shape)
  return loss(SphericalStatistics(target, logits.sum(-1), jnp.square(logits).sum(-1))).mean()


def several_labels(statistics):
  """A loss of three labels per example that depends on every statistic."""
  deviation = jnp.sqrt(statistics.square_total / CLASSES - (statistics.total / CLASSES) ** 2)
  standardized = (statistics.target - statistics.total[:, None] / CLASSES) / deviation[:, None]
  return jax.nn.softplus(-standardized).sum(-1) + 0.01 * statistics.total**2 / CLASSES


z = functools.partial(spherical.z_loss_from_statistics, classes=CLASSES)
LOSSES = {
  "z": (z, 1),
  "taylor": (functools.partial(spherical.taylor_softmax_from_statistics, classes=CLASSES), 1),
  "squared": (spherical.one_hot_squared_error_from_statistics, 1),
  "several": (several_labels, 3),
}


@functools.cache
def steps(name):
  """The factored and the dense step of a loss, jitted."""
  loss = LOSSES[name][0]

  def dense(weights, inputs, labels, rate):
    value, (on_weights, on_inputs) = jax.value_and_grad(functools.partial(dense_loss, loss), (0, 1))(
      weights, inputs, labels
    )
    return value, on_inputs, weights - rate * on_weights

  return jax.jit(fo.factored_value_and_grad(loss, stabilize_every=20)), jax.jit(dense)


def draw(rng, name, examples=EXAMPLES):
  inputs = jnp.asarray(rng.normal(size=(examples, FEATURES)))
  count = LOSSES[name][1]
  # Few classes, so that most batches have duplicates; different ones within a row.
  labels = np.stack([rng.permutation(4)[:count] for _ in range(examples)])
  return inputs, jnp.asarray(labels[:, 0] if count == 1 else labels)


@pytest.mark.golden
def test_golden_10_z_loss(golden, x64):
  for name, case, meta in golden("10-z_loss").cases():
    if meta["kind"] != "spherical_update":  # the loss's: tests/losses/test_spherical.py
      continue
    state, inputs, labels = factored(case["V"], case["U"], case["omega"]), jnp.asarray(case["H"]), case["target_idx"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10, err_msg=name)
    close(fo.factored_weights(state), case["W"])
    statistics = fo.factored_statistics(state, inputs, jnp.asarray(labels))
    for actual, expected in zip(statistics, ("out_A", "out_s", "out_q")):
      close(actual, case[expected])
    cotangents = SphericalStatistics(*(jnp.asarray(case[key]) for key in ("grad_A", "grad_s", "grad_q")))
    new, gradient = fo.factored_sgd_step(
      state, inputs, jnp.asarray(labels), cotangents, learning_rate=float(case["eta"])
    )  # fmt: skip
    close(gradient, case["out_grad_H"])
    check_state(new, case["out_W_new"])
    close(new.gram, case["out_Q_new"])
    close(new.total, case["out_wbar_new"])


@pytest.mark.parametrize("name", LOSSES)
def test_fifty_steps_are_dense_sgd(name, x64):
  """With stabilization on the way; to 1e-10 after every single step."""
  rng = np.random.default_rng(0)
  state = random_state(rng)
  weights = fo.factored_weights(state)
  own, dense = steps(name)
  for _ in range(50):
    inputs, labels = draw(rng, name)
    value, gradient, state = own(state, inputs, labels, 0.03)
    expected_value, expected_gradient, weights = dense(weights, inputs, labels, 0.03)
    np.testing.assert_allclose(value, expected_value, rtol=1e-10)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
    check_state(state, weights)
  assert int(state.step) == 50


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rate=st.floats(0, 0.02), examples=st.sampled_from([1, 3, 6, 12]))
def test_any_step_is_dense_sgd(seed, rate, examples):
  """Fewer and more examples than features take different inverses."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(seed)
    state, (inputs, labels) = random_state(rng), draw(rng, "squared", examples)
    # The squared error's step is stable for rate * 2 * |h|^2 < 1; the inverse mixing is as accurate as U is regular.
    inputs = inputs / jnp.maximum(jnp.linalg.norm(inputs, axis=-1, keepdims=True), 1)
    new = steps("squared")[0](state, inputs, labels, rate)[2]
    weights = steps("squared")[1](fo.factored_weights(state), inputs, labels, rate)[2]
    condition = np.linalg.cond(state.mixing)
    check_state(new, weights, 1e-12 * max(condition**2, 100))


def test_float32_keeps_to_dense_sgd_over_many_steps():
  """Also when the layer starts with logits whose mean is far above their deviation, once it is centred."""
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype != jnp.int32 else x, random_state(rng))
  state = state._replace(shift=state.shift + 1e3, total=state.total + CLASSES * 1e3)
  state = fo.unfactorize(fo.center_factored(state))
  weights = fo.factored_weights(state)
  own, dense = steps("z")
  for _ in range(200):
    inputs, labels = draw(rng, "z")
    inputs = inputs.astype(jnp.float32)
    value, _, state = own(state, inputs, labels, 0.1)
    expected, _, weights = dense(weights, inputs, labels, 0.1)
  np.testing.assert_allclose(value, expected, rtol=1e-3)
  np.testing.assert_allclose(fo.factored_weights(state), weights, atol=1e-3)
  np.testing.assert_allclose(state.gram, weights.T @ weights, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("outside", [0, 1, 2, 4])
def test_stabilize(outside, x64):
  """None, some (up to a third), and too many singular values outside; rows in several blocks, directions too."""
  rng = np.random.default_rng(0)
  features = 6
  left, right = (np.linalg.qr(rng.normal(size=(features, features)))[0] for _ in range(2))
  values = np.linspace(0.8, 1.5, features)
  values[:outside] = np.resize([0.1, 30.0, 1e-3], outside)
  state = factored(rng.normal(size=(5000, features)), left * values @ right, rng.normal(size=features))
  new = jax.jit(fo.stabilize_factored)(state)
  weights = fo.factored_weights(state)
  check_state(new, weights, 1e-9)  # sums over 5,000 classes
  np.testing.assert_allclose(fo.factored_weights(new), weights, atol=1e-10)
  singular = np.linalg.svd(new.mixing)[1]
  assert ((singular >= 0.5 - 1e-12) & (singular <= 2 + 1e-12)).all()
  if 3 * outside > features:
    np.testing.assert_allclose(new.mixing, np.eye(features), atol=1e-12)
  if outside == 0:
    np.testing.assert_array_equal(new.factor, state.factor)


def test_stabilize_more_directions_than_a_block(x64):
  rng = np.random.default_rng(0)
  features = 72
  left, right = (np.linalg.qr(rng.normal(size=(features, features)))[0] for _ in range(2))
  values = np.where(np.arange(features) < 20, 0.1, 1.0)
  state = factored(rng.normal(size=(100, features)), left * values @ right, np.zeros(features))
  new = jax.jit(fo.stabilize_factored)(state)
  check_state(new, fo.factored_weights(state), 1e-9)
  np.testing.assert_allclose(np.linalg.svd(new.mixing)[1], 1, rtol=1e-9)


def test_unfactorize(x64):
  state = random_state(np.random.default_rng(0))
  drifted = state._replace(gram=state.gram + 1, total=state.total + 1)
  new = jax.jit(fo.unfactorize)(drifted)
  check_state(new, fo.factored_weights(state))
  np.testing.assert_array_equal(new.mixing, np.eye(FEATURES))
  np.testing.assert_array_equal(new.shift, 0)


def test_decay_and_centring(x64):
  state = random_state(np.random.default_rng(0))
  weights = fo.factored_weights(state)
  check_state(fo.decay_factored(state, rate=0.1), 0.9 * weights)
  check_state(fo.center_factored(state), weights - weights.mean(0))


def test_z_loss_keeps_centred_weights_centred(x64):
  rng = np.random.default_rng(0)
  state = fo.factored_init(jax.random.key(0), CLASSES, FEATURES, scale=1.0, dtype=jnp.float64)
  for _ in range(20):
    _, _, state = steps("z")[0](state, *draw(rng, "z"), 0.1)
  np.testing.assert_allclose(state.total, 0, atol=1e-12)
  check_state(state, fo.factored_weights(state))


def test_donated_weights_are_changed_in_place():
  """The compiled step has no second array of their size; also through stabilization."""
  classes, features, loss = 100_000, 8, functools.partial(spherical.z_loss_from_statistics, classes=100_000)
  state = fo.factored_init(jax.random.key(0), classes, features, scale=1.0)
  inputs, labels = jnp.ones((4, features)), jnp.array([1, 2, 2, 99_999])
  step = jax.jit(fo.factored_value_and_grad(loss, stabilize_every=2), donate_argnums=0)
  memory = step.lower(state, inputs, labels, 0.1).compile().memory_analysis()
  size = state.factor.nbytes
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < size / 2, "a copy of the weights"
  pointer, old = state.factor.unsafe_buffer_pointer(), state.factor
  for _ in range(2):
    _, _, state = step(state, inputs, labels, 0.1)
  assert old.is_deleted() and state.factor.unsafe_buffer_pointer() == pointer
  change = functools.partial(jax.jit, donate_argnums=0)
  for function in (fo.unfactorize, fo.stabilize_factored):
    assert change(function).lower(state).compile().memory_analysis().temp_size_in_bytes < size / 2


def test_a_batch_split_over_devices_is_the_whole(x64):
  rng = np.random.default_rng(0)
  state, (inputs, labels) = random_state(rng), draw(rng, "z", 16)
  expected = steps("z")[0](state, inputs, labels, 0.1)
  step = fo.factored_value_and_grad(z, axis_name="devices")

  def part(state, inputs, labels):
    value, gradient, new = step(state, inputs, labels, 0.1)
    return jax.lax.pmean(value, "devices"), gradient / 8, jax.tree.map(lambda leaf: leaf[None], new)

  split, whole = PartitionSpec("devices"), PartitionSpec()
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
  mapped = jax.jit(
    jax.shard_map(part, mesh=mesh, in_specs=(whole, split, split), out_specs=(whole, split, split), check_vma=False)
  )
  value, gradient, new = mapped(state, inputs, labels)
  blocks = [leaf.reshape(8, 2, *leaf.shape[1:]) for leaf in (inputs, labels)]
  values, gradients, news = jax.pmap(part, axis_name="devices", in_axes=(None, 0, 0))(state, *blocks)
  for actual in (
    (value, gradient, new),
    (values[0], gradients.reshape(gradient.shape), jax.tree.map(lambda x: x[:, 0], news)),
  ):
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-10, atol=1e-12)
    for leaf, one in zip(actual[2], expected[2]):
      np.testing.assert_allclose(leaf, np.broadcast_to(one, leaf.shape), rtol=1e-10, atol=1e-12)


def test_vmapped_trials_are_the_loop(x64):
  rngs = [np.random.default_rng(seed) for seed in range(3)]
  trials = [(random_state(rng), *draw(rng, "z")) for rng in rngs]
  # Due for stabilization in one of the trials only.
  trials = [(state._replace(step=jnp.int32(17 + i)), *rest) for i, (state, *rest) in enumerate(trials)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trials)
  step = lambda *arguments: steps("z")[0](*arguments, 0.1)
  for index, trial in enumerate(trials):
    one, mapped = step(*trial), jax.tree.map(lambda leaf, index=index: leaf[index], jax.vmap(step)(*stacked))
    chex.assert_trees_all_close(mapped, one, rtol=1e-9, atol=1e-10)


def test_bfloat16_inputs():
  state = fo.factored_init(jax.random.key(0), CLASSES, FEATURES, scale=1.0)
  inputs = 1e4 * jnp.asarray(np.random.default_rng(0).normal(size=(EXAMPLES, FEATURES)), jnp.bfloat16)
  step = jax.jit(fo.factored_value_and_grad(z))
  value, gradient, new = step(state, inputs, jnp.arange(EXAMPLES), 0.1)
  assert gradient.dtype == jnp.bfloat16 and jnp.isfinite(gradient).all() and jnp.isfinite(value)
  assert all(jnp.isfinite(leaf).all() for leaf in new)
  zeros = step(state, jnp.zeros_like(inputs), jnp.arange(EXAMPLES), 0.1)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(zeros))


def test_bad_input():
  state = fo.factored_init(jax.random.key(0), CLASSES, FEATURES)
  inputs, labels = jnp.ones((EXAMPLES, FEATURES)), jnp.arange(EXAMPLES)
  for arguments, named in (
    ((inputs[:, :2], labels), "inputs must have the shape"),
    ((inputs[0], labels), "inputs must have the shape"),
    ((inputs.astype(int), labels), "inputs must be floating"),
    ((inputs, labels[:2]), "labels must have the shape"),
    ((inputs, labels * 1.0), "labels must be integer"),
  ):
    with pytest.raises(ValueError, match=named):
      fo.factored_statistics(state, *arguments)
  statistics = fo.factored_statistics(state, inputs, labels)
  with pytest.raises(ValueError, match="cotangents.total must have shape"):
    fo.factored_sgd_step(state, inputs, labels, statistics._replace(total=jnp.ones(2)), learning_rate=0.1)
  with pytest.raises(ValueError, match="learning_rate must lie in"):
    fo.factored_sgd_step(state, inputs, labels, statistics, learning_rate=-1.0)
  with pytest.raises(ValueError, match="loss must return a value per example"):
    fo.factored_value_and_grad(lambda s: z(s).mean())(state, inputs, labels, 0.1)
  with pytest.raises(ValueError, match="stabilize_every must lie in"):
    fo.factored_value_and_grad(z, stabilize_every=0)
  with pytest.raises(ValueError, match="rate must lie in"):
    fo.decay_factored(state, rate=1.0)
  with pytest.raises(ValueError, match="low must lie in"):
    fo.stabilize_factored(state, low=0.0)
  with pytest.raises(ValueError, match="dtype must be"):
    fo.factored_init(jax.random.key(0), CLASSES, FEATURES, dtype=jnp.bfloat16)


def seconds_of_steps(classes, factored_layer, features=64, examples=32):
  """The fastest of some steps; of few for the slow ones."""
  loss = functools.partial(spherical.z_loss_from_statistics, classes=classes)
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.normal(size=(examples, features)), jnp.float32)
  labels = jnp.asarray(rng.integers(0, classes, examples))
  state = fo.factored_init(jax.random.key(0), classes, features, scale=0.1)
  if factored_layer:
    step = jax.jit(fo.factored_value_and_grad(loss), donate_argnums=0)
  else:
    state = state.factor

    def dense(weights, inputs, labels, rate):
      mean = lambda weights, inputs: spherical.z_loss(inputs @ weights.T, labels).mean()
      value, (on_weights, on_inputs) = jax.value_and_grad(mean, (0, 1))(weights, inputs)
      return value, on_inputs, weights - rate * on_weights

    step = jax.jit(dense, donate_argnums=0)
  best, ends = np.inf, time.monotonic() + 3
  for repeat in range(60):
    began = time.perf_counter()
    _, _, state = jax.block_until_ready(step(state, inputs, labels, 0.1))
    best = min(best, time.perf_counter() - began) if repeat else best
    if repeat > 3 and time.monotonic() > ends:
      break
  return best


@pytest.mark.slow
def test_cost_does_not_depend_on_the_number_of_classes():
  """The fastest of many calls, and a second chance: the machine may be busy."""
  for _ in range(3):
    with threadpoolctl.threadpool_limits(1, user_api="blas"):  # its threads wait for each other on a busy machine
      own, dense = ([seconds_of_steps(2**log, kind) for log in (12, 18)] for kind in (True, False))
    if own[1] < 2 * own[0] and dense[1] > 20 * dense[0]:
      return
  pytest.fail(f"factored {own}, dense {dense} seconds")


def state_of(factor):
  """A state with this factor, of a dtype that it may have."""
  factor = factor.astype(jnp.promote_types(factor.dtype, jnp.float32))
  eye, zeros = jnp.eye(FEATURES, dtype=factor.dtype), jnp.zeros(FEATURES, factor.dtype)
  return fo.FactoredState(factor, eye, eye, zeros, factor.T @ factor, factor.sum(0), jnp.int32(0))


def _factored(function, call, **options):
  """`call(state, inputs)`, floating results for a batch of inputs."""
  return row(
    function,
    lambda rng: (rng.normal(size=(6, FEATURES)) / 2, rng.normal(size=(CLASSES, FEATURES))),
    call=lambda inputs, factor, **options: call(state_of(factor), inputs, **options),
    extreme=unchanged,
    differentiable=function is fo.factored_statistics,
    wide=True,
    options=options,
  )


_LABELS = np.arange(6) % CLASSES


ROWS = [
  _factored(fo.factored_weights, lambda state, inputs: fo.factored_weights(state)),
  _factored(fo.center_factored, lambda state, inputs: fo.center_factored(state)),
  _factored(fo.decay_factored, lambda state, inputs, rate: fo.decay_factored(state, rate=rate), rate=(0.0, 0.9)),
  _factored(
    fo.stabilize_factored,
    lambda state, inputs: fo.factored_weights(fo.stabilize_factored(fo.decay_factored(state, rate=0.9))),
  ),
  _factored(fo.unfactorize, lambda state, inputs: fo.unfactorize(state)),
  _factored(fo.factored_statistics, lambda state, inputs: fo.factored_statistics(state, inputs, _LABELS)),
  _factored(
    fo.factored_sgd_step,
    lambda state, inputs, learning_rate: fo.factored_sgd_step(
      state, inputs, _LABELS, SphericalStatistics(*jnp.ones((3, 6), state.gram.dtype)), learning_rate=learning_rate
    )[0],
    learning_rate=(0.0, 0.01),
  ),
  _factored(
    fo.factored_value_and_grad,
    lambda state, inputs: fo.factored_value_and_grad(z)(state, inputs, _LABELS, 0.01)[0],
  ),
]


EXEMPT = {
  "FactoredState": "what the functions of this module carry",
  "factored_init": "draws; its tests look at the weights",
}
