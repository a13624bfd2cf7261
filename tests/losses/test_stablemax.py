import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.test_util import check_grads

from jaxreg.losses.stablemax import (
  log_stablemax,
  stablemax,
  stablemax_cross_entropy,
  stablemax_cross_entropy_with_soft_labels,
)
from tests.conformance import BAD_SAME_SHAPE, draw_logits, draw_probabilities, extreme_logits, loss_row, row, scores_row

EXTREME = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [0.0, -0.0, 1.0], [20.0, 0.0, 0.0]])


def remap(z):
  return np.sign(z) * np.log1p(np.abs(z))


@pytest.mark.golden
def test_golden_grokking_stability_stablemax(golden, x64):
  file = golden("40-grokking_stability")
  cases = [arrays for _, arrays, _ in file.cases() if "out_logstablemax" in arrays]
  assert cases
  for case in cases:
    logits, labels = jnp.asarray(case["logits"]), jnp.asarray(case["labels"])
    close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    close(stablemax(logits), case["out_s"] / case["out_s"].sum(axis=-1, keepdims=True))
    close(log_stablemax(logits), case["out_logstablemax"])
    close(stablemax_cross_entropy(logits, labels), case["out_loss_none"])
    mean, gradient = jax.value_and_grad(lambda z, y: stablemax_cross_entropy(z, y).mean())(logits, labels)
    close(mean, case["out_loss_mean"])
    close(gradient, case["grad_logits"])


def test_log_is_log_softmax_of_remapped_logits(x64):
  rng = np.random.default_rng(0)
  z = rng.normal(size=(40, 7)) * 10.0 ** rng.uniform(-5, 5, size=(40, 1))
  z[0] = [1e5, -1e5, 0, -0.0, 1, -1, 3]
  np.testing.assert_allclose(log_stablemax(jnp.asarray(z)), jax.nn.log_softmax(remap(z)), atol=1e-12)
  np.testing.assert_allclose(np.exp(log_stablemax(jnp.asarray(z))), stablemax(jnp.asarray(z)), atol=1e-12)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_slope_at_zero_is_one(zero, x64):
  # The other logit is constant, so d log q_0 / d z_0 = slope (1 - q_0), and q_0 = 1/2 here.
  gradient = jax.grad(lambda z: log_stablemax(jnp.stack([z, 0.0]))[0])(zero)
  assert gradient == 0.5
  assert jax.grad(lambda z: stablemax_cross_entropy(jnp.stack([z, 0.0]), jnp.array(0)))(zero) == -0.5


def test_gradient_formula(x64):
  rng = np.random.default_rng(1)
  z, y = jnp.asarray(rng.normal(size=(30, 6)) * 10.0 ** rng.uniform(-3, 4, size=(30, 1))), rng.integers(0, 6, 30)
  formula = (stablemax(z) - jax.nn.one_hot(y, 6)) / (1 + jnp.abs(z))
  naive = jax.grad(lambda z: -jnp.take_along_axis(log_stablemax(z), y[:, None], -1).sum())(z)
  ours = jax.grad(lambda z: stablemax_cross_entropy(z, y).sum())(z)
  np.testing.assert_allclose(ours, formula, atol=1e-12)
  np.testing.assert_allclose(naive, formula, atol=1e-12)


def test_value_and_gradient_survive_where_softmax_collapses():
  z, y = jnp.array([20.0, 0.0, 0.0]), jnp.array(0)
  value, gradient = jax.value_and_grad(optax.softmax_cross_entropy_with_integer_labels)(z, y)
  assert value == 0 and gradient[0] == 0
  value, gradient = jax.value_and_grad(stablemax_cross_entropy)(z, y)
  assert value > 0 and (gradient != 0).all()


def test_confident_predictions_keep_relative_accuracy():
  z, y = np.array([1e4, -1e4, -1e4]), 0
  value, gradient = jax.value_and_grad(stablemax_cross_entropy)(jnp.asarray(z, jnp.float32), jnp.array(y))
  rest = 2 / (1 + 1e4) ** 2
  np.testing.assert_allclose(value, np.log1p(rest), rtol=1e-5)
  np.testing.assert_allclose(gradient[0], -rest / (1 + rest) / (1 + 1e4), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [1.0, -1.0, 1e4, None])
def test_finite(dtype, value):
  z = jnp.asarray(EXTREME if value is None else np.full((2, 3), value), dtype)
  y = jnp.zeros(len(z), jnp.int32)
  soft = jnp.full(z.shape, 1 / 3, dtype)
  losses = (
    lambda z: stablemax_cross_entropy(z, y),
    lambda z: stablemax_cross_entropy_with_soft_labels(z, soft),
    stablemax,
    log_stablemax,
  )
  for loss in losses:
    assert loss(z).dtype == dtype
    assert jnp.isfinite(loss(z)).all()
    gradient = jax.grad(lambda z, loss=loss: loss(z).astype(jnp.float32).sum())(z)
    assert gradient.dtype == dtype and jnp.isfinite(gradient).all()


# Beyond 2^125 the reciprocals that XLA multiplies with in place of division are subnormal and flushed to zero.
finite_float32 = arrays(np.float32, (2, 4), elements=st.floats(-(2.0**120), 2.0**120, width=32))


@settings(max_examples=30, deadline=None)
@given(finite_float32, st.integers(0, 3))
def test_any_finite_logits(z, y):
  labels = jnp.full(2, y)
  value, gradient = _value_and_grad(z, labels)
  assert np.isfinite(value).all() and (value >= 0).all() and np.isfinite(gradient).all()
  np.testing.assert_allclose(np.asarray(stablemax(z)).sum(axis=-1), 1, rtol=1e-5)
  reference = np.log(np.exp(remap(z.astype(np.float64))).sum(-1)) - remap(z.astype(np.float64))[:, y]
  np.testing.assert_allclose(value, reference, rtol=2e-5, atol=2e-5)


@jax.jit
def _value_and_grad(z, labels):
  return stablemax_cross_entropy(z, labels), jax.grad(lambda z: stablemax_cross_entropy(z, labels).sum())(z)


def test_soft_labels_agree_with_integer_ones(x64):
  rng = np.random.default_rng(2)
  z, y = jnp.asarray(rng.normal(size=(5, 4)) * 10), rng.integers(0, 4, 5)
  soft = stablemax_cross_entropy_with_soft_labels(z, jax.nn.one_hot(y, 4))
  np.testing.assert_allclose(soft, stablemax_cross_entropy(z, y), atol=1e-12)


def test_axis_and_where(x64):
  rng = np.random.default_rng(3)
  z, y = jnp.asarray(rng.normal(size=(3, 5, 2)) * 4), jnp.asarray(rng.integers(0, 3, (3, 2)))
  kept = jnp.arange(5)[:, None] < 3
  losses = (
    (stablemax_cross_entropy, y),
    (stablemax_cross_entropy_with_soft_labels, jax.nn.one_hot(y, 5, axis=1)),
  )
  for loss, targets in losses:
    sliced = targets if targets is y else targets[:, :3]
    total = lambda z, targets, loss=loss, **options: loss(z, targets, axis=1, **options).sum()
    found, gradient = jax.value_and_grad(total)(z, targets, where=kept)
    expected, expected_gradient = jax.value_and_grad(total)(z[:, :3], sliced)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(gradient[:, :3], expected_gradient, atol=1e-12)
    assert (gradient[:, 3:] == 0).all()
  np.testing.assert_allclose(stablemax(z, axis=1, where=kept)[:, :3], stablemax(z[:, :3], axis=1), atol=1e-12)
  assert (stablemax(z, axis=1, where=kept)[:, 3:] == 0).all()
  assert (log_stablemax(z, axis=1, where=kept)[:, 3:] == -np.inf).all()
  nothing = jnp.zeros(z.shape, bool)
  assert jnp.isfinite(stablemax_cross_entropy(z, y, axis=1, where=nothing)).all()
  assert (stablemax(z, axis=1, where=nothing) == 0).all()


def test_transformations(x64):
  rng = np.random.default_rng(4)
  z, y = jnp.asarray(rng.normal(size=(8, 4))), jnp.asarray(rng.integers(0, 4, 8))
  expected = stablemax_cross_entropy(z, y)
  np.testing.assert_allclose(jax.jit(stablemax_cross_entropy)(z, y), expected, rtol=1e-12)
  np.testing.assert_allclose(jax.vmap(stablemax_cross_entropy)(z, y), expected, rtol=1e-12)
  np.testing.assert_allclose(jax.pmap(stablemax_cross_entropy)(z, y), expected, rtol=1e-12)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = jax.sharding.PartitionSpec("data")
  mapped = jax.shard_map(jax.grad(lambda z, y: stablemax_cross_entropy(z, y).sum()), mesh=mesh, in_specs=specs,
                         out_specs=specs, check_vma=False)  # fmt: skip
  np.testing.assert_allclose(mapped(z, y), jax.grad(lambda z: stablemax_cross_entropy(z, y).sum())(z), rtol=1e-12)
  check_grads(lambda z: stablemax_cross_entropy(z, y), (z,), order=2, rtol=1e-5)


def test_labels_of_a_small_integer_type():
  z = jnp.zeros((1, 300)).at[0, 5].set(3.0)
  assert stablemax_cross_entropy(z, jnp.array([5], jnp.int8)) == stablemax_cross_entropy(z, jnp.array([5]))


def test_bad_input():
  z = jnp.zeros((4, 3))
  with pytest.raises(ValueError, match="labels must have the shape"):
    stablemax_cross_entropy(z, jnp.zeros((4, 1), jnp.int32))
  with pytest.raises(ValueError, match="labels must be integer"):
    stablemax_cross_entropy(z, jnp.zeros(4))
  with pytest.raises(ValueError, match="equal shapes"):
    stablemax_cross_entropy_with_soft_labels(z, jnp.zeros((1, 3)))
  with pytest.raises(ValueError, match="floating"):
    stablemax(jnp.zeros(3, jnp.int32))


ROWS = [
  scores_row(stablemax),
  scores_row(log_stablemax),
  loss_row(stablemax_cross_entropy),
  row(
    stablemax_cross_entropy_with_soft_labels,
    lambda rng: (draw_logits(rng), draw_probabilities(rng)),
    extreme=extreme_logits,
    bad=(
      *BAD_SAME_SHAPE,
      ("logits", lambda z, y: (z.astype(np.int32), y)),
      ("labels", lambda z, y: (z, y.astype(np.int32))),
    ),
    examples="any",
  ),
]
