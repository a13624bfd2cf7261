"""The Z-loss and its siblings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.losses import spherical
from jaxreg.losses.spherical import SphericalStatistics, z_loss
from tests.conformance import (
  BAD_LOGITS,
  CLASSES,
  EXAMPLES,
  draw_classification,
  draw_logits,
  extreme_logits,
  loss_row,
  row,
)

# Dense form and form in the statistics of each member.
MEMBERS = {
  "z": (z_loss, lambda s, classes: spherical.z_loss_from_statistics(s, classes=classes)),
  "z sharp": (
    lambda o, y: z_loss(o, y, sharpness=2.5, location=3.0),
    lambda s, classes: spherical.z_loss_from_statistics(s, classes=classes, sharpness=2.5, location=3.0),
  ),
  "taylor": (
    spherical.taylor_softmax_loss,
    lambda s, classes: spherical.taylor_softmax_from_statistics(s, classes=classes),
  ),
  "spherical": (
    lambda o, y: spherical.spherical_softmax_loss(o, y, epsilon=0.1),
    lambda s, classes: spherical.spherical_softmax_from_statistics(s, classes=classes, epsilon=0.1),
  ),
  "squared": (
    spherical.one_hot_squared_error_loss,
    lambda s, classes: spherical.one_hot_squared_error_from_statistics(s),
  ),
}
exact_z_loss = jax.jit(functools.partial(z_loss, epsilon=0.0))
every_member = pytest.mark.parametrize("dense, from_statistics", MEMBERS.values(), ids=MEMBERS)


@pytest.fixture
def batch(x64):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(6, 7)) * 2 + 1), jnp.asarray(rng.integers(0, 7, 6))


def standardized(logits, labels):
  z = (logits - logits.mean(-1, keepdims=True)) / logits.std(-1, keepdims=True)
  return z, jnp.take_along_axis(z, labels[:, None], 1)


@pytest.mark.golden
def test_golden_10_z_loss(golden, x64):
  for name, case, meta in golden("10-z_loss").cases():
    if meta["kind"] != "z_loss":  # the factored layer's: tests/layers/test_factored_output.py
      continue
    labels, options = case["labels"], {"sharpness": meta["a"], "location": meta["b"], "epsilon": meta["eps"]}
    loss = lambda o, labels=labels, options=options: z_loss(o, labels, **options)
    np.testing.assert_allclose(loss(case["logits"]), case["out_loss"], rtol=1e-10, atol=1e-10, err_msg=name)
    gradient = jax.grad(lambda o, loss=loss: loss(o).sum())(jnp.asarray(case["logits"]))
    np.testing.assert_allclose(gradient, case["grad_logits"], rtol=1e-10, atol=1e-10, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_shift_and_scale_invariance(seed, scale, shift):
  with jax.enable_x64(True):
    rng = np.random.default_rng(seed)
    logits, labels = jnp.asarray(rng.normal(size=(4, 6))), jnp.asarray(rng.integers(0, 6, 4))
    loss = exact_z_loss(logits, labels)
    np.testing.assert_allclose(exact_z_loss(scale * logits, labels), loss, rtol=1e-10)
    np.testing.assert_allclose(exact_z_loss(logits + shift, labels), loss, rtol=1e-10)
    z, own = standardized(logits, labels)
    np.testing.assert_allclose(exact_z_loss(-scale * logits, labels), jax.nn.softplus(own[:, 0]), rtol=1e-10)
    assert (jnp.abs(z) <= np.sqrt(5) * (1 + 1e-12)).all()


@pytest.mark.parametrize("sharpness, location", [(1.0, 0.0), (2.5, 3.0), (0.3, 28.0)])
def test_gradient_and_its_two_orthogonalities(batch, x64, sharpness, location):
  logits, labels = batch
  total = jax.jit(lambda o: z_loss(o, labels, sharpness=sharpness, location=location, epsilon=0.0).sum())
  gradient = jax.grad(total)(logits)
  z, own = standardized(logits, labels)
  classes = logits.shape[-1]
  slope = -jax.nn.sigmoid(sharpness * (location - own)) / logits.std(-1, keepdims=True)
  expected = slope * (jax.nn.one_hot(labels, classes) - 1 / classes - own * z / classes)
  np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-12)
  np.testing.assert_allclose((logits * gradient).sum(-1), 0, atol=1e-12)
  direction = jnp.asarray(np.random.default_rng(1).normal(size=logits.shape))
  numeric = (total(logits + 1e-6 * direction) - total(logits - 1e-6 * direction)) / 2e-6
  np.testing.assert_allclose(jnp.sum(gradient * direction), numeric, rtol=1e-7)


@pytest.mark.parametrize("height", [1e-3, 1.0, 50.0, 1e4])
def test_one_logit_above_the_rest_reaches_the_largest_value(height, x64):
  logits = jnp.zeros((1, 10)).at[0, 3].set(height)
  loss = z_loss(logits, jnp.array([3]), epsilon=0.0)
  np.testing.assert_allclose(loss, np.log1p(np.exp(-3.0)), rtol=1e-10)


def test_limits_of_the_sharpness(batch, x64):
  logits, labels = batch
  _, own = standardized(logits, labels)
  hinge = jnp.maximum(0, 1.5 - own[:, 0])
  np.testing.assert_allclose(z_loss(logits, labels, sharpness=1e3, location=1.5), hinge, atol=1e-3)
  gradient = jax.grad(lambda o: z_loss(o, labels, sharpness=1e-4, location=1.5).sum())(logits)
  linear = jax.grad(lambda o: -standardized(o, labels)[1].sum() / 2)(logits)
  np.testing.assert_allclose(gradient, linear, rtol=1e-3, atol=1e-6)


@every_member
def test_statistics_give_the_dense_loss_and_gradient(batch, x64, dense, from_statistics):
  logits, labels = batch
  other = lambda o: from_statistics(spherical.spherical_statistics(o, labels), o.shape[-1])
  np.testing.assert_allclose(other(logits), dense(logits, labels), rtol=1e-10)
  expected = jax.grad(lambda o: dense(o, labels).sum())(logits)
  np.testing.assert_allclose(jax.grad(lambda o: other(o).sum())(logits), expected, rtol=1e-9, atol=1e-11)


@every_member
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extremes(dense, from_statistics, dtype):
  patterns = [[1, -1, 0], [0, 0, 0], [1, 1, 1], [0.1, 0.1, 0.1], [-1, -1, 1], [1 + 1e-7, 1, 1], [0, 0, 1]]
  logits = jnp.asarray(1e4 * np.array(patterns), dtype)
  both = (dense, lambda o, y: from_statistics(spherical.spherical_statistics(o, y), 3))
  for loss in both:
    mean = jax.jit(jax.value_and_grad(lambda o, y, loss=loss: loss(o, y).astype(jnp.float32).mean()))
    for label in range(3):
      value, gradient = mean(logits, jnp.full(len(patterns), label))
      assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["z", "taylor", "spherical"])
def test_no_overflow_of_squares(name):
  dense = MEMBERS[name][0]
  logits, labels = 1e30 * jnp.array([[1.0, -1.0, 0.5], [1.0, 1.0, 1.0]]), jnp.array([1, 0])
  value, gradient = jax.value_and_grad(lambda o: dense(o, labels).sum())(logits)
  assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_equal_logits_have_a_loss_and_no_gradient():
  logits, labels = jnp.full((1, 1000), 0.1), jnp.array([7])
  value, gradient = jax.value_and_grad(lambda o: z_loss(o, labels).sum())(logits)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  np.testing.assert_array_equal(gradient, 0)


def test_variance_from_statistics_keeps_the_label_in_range():
  """With a mean far above the deviation, float32 statistics tell nothing of the variance, not even its sign."""
  logits = 1e4 + jnp.asarray(np.random.default_rng(0).normal(size=(20, 50)), jnp.float32)
  labels = jnp.arange(20)
  loss = spherical.z_loss_from_statistics(spherical.spherical_statistics(logits, labels), classes=50, epsilon=0.0)
  bound = np.sqrt(49.0)
  assert (loss >= np.log1p(np.exp(-bound)) * 0.999).all() and (loss <= np.log1p(np.exp(bound)) * 1.001).all()


def test_squared_error_at_zero_logits_has_its_gradient():
  zeros = SphericalStatistics(jnp.zeros(1), jnp.zeros(1), jnp.zeros(1))
  gradient = jax.grad(lambda s: spherical.one_hot_squared_error_from_statistics(s).sum())(zeros)
  assert [float(x[0]) for x in gradient] == [-2.0, 0.0, 1.0]


def test_log_partition_penalty(batch, x64):
  logits, _ = batch
  np.testing.assert_allclose(
    spherical.log_partition_penalty(logits), np.log(np.exp(logits).sum(-1)) ** 2, rtol=1e-10
  )  # fmt: skip
  masked = spherical.log_partition_penalty(logits, where=jnp.arange(7) < 4)
  np.testing.assert_allclose(masked, spherical.log_partition_penalty(logits[:, :4]), rtol=1e-12)


def test_bad_input(batch):
  logits, labels = batch
  for options, named in (
    ({"sharpness": 0.0}, "sharpness"),
    ({"epsilon": -1.0}, "epsilon"),
    ({"location": np.nan}, "loc"),
  ):
    with pytest.raises(ValueError, match=named):
      z_loss(logits, labels, **options)
  with pytest.raises(ValueError, match="epsilon must lie in"):
    spherical.spherical_softmax_loss(logits, labels, epsilon=0.0)
  with pytest.raises(ValueError, match="labels must be integer"):
    spherical.taylor_softmax_loss(logits, labels.astype(float))
  statistics = spherical.spherical_statistics(logits, labels)
  with pytest.raises(ValueError, match="classes must lie in"):
    spherical.z_loss_from_statistics(statistics, classes=0)
  with pytest.raises(ValueError, match="shapes"):
    spherical.z_loss_from_statistics(statistics._replace(total=jnp.zeros(3)), classes=7)


def statistics_loss(function, **options):
  """`function(statistics, **options)` of the label's logit, the logits' sum and their square sum."""

  def arguments(rng):
    logits, labels = draw_classification(rng)
    return logits[np.arange(EXAMPLES), labels], logits.sum(-1), np.square(logits).sum(-1)

  def extreme(target, *rest):
    logits, labels = extreme_logits(np.zeros((EXAMPLES, CLASSES)), np.arange(EXAMPLES) % CLASSES)
    return logits[np.arange(EXAMPLES), labels], logits.sum(-1), np.square(logits).sum(-1)

  call = lambda *statistics, **options: function(spherical.SphericalStatistics(*statistics), **options)
  bad = (
    ("shapes", lambda target, total, squares: (target, total[:1], squares)),
    ("target", lambda target, total, squares: (target.astype(np.int32), total, squares)),
  )
  return row(function, arguments, call=call, extreme=extreme, bad=bad, examples="any", options=options)


def test_not_a_number_stays_one():
  logits, labels = jnp.full((1, 3), jnp.nan), jnp.array([0])
  assert np.isnan(spherical.z_loss(logits, labels)).all()
  statistics = spherical.SphericalStatistics(*(jnp.array([jnp.nan]),) * 3)
  for loss in (
    spherical.z_loss_from_statistics,
    spherical.taylor_softmax_from_statistics,
    spherical.spherical_softmax_from_statistics,
  ):
    assert np.isnan(loss(statistics, classes=3)).all()
  assert np.isnan(spherical.one_hot_squared_error_from_statistics(statistics)).all()


ROWS = [
  row(
    spherical.log_partition_penalty,
    lambda rng: (draw_logits(rng),),
    extreme=extreme_logits,
    bad=BAD_LOGITS,
    examples="any",
  ),
  loss_row(spherical.one_hot_squared_error_loss),
  loss_row(spherical.spherical_softmax_loss, epsilon=(0.1, 1.0)),
  loss_row(spherical.taylor_softmax_loss),
  loss_row(spherical.z_loss, sharpness=(0.5, 3.0), location=(-1.0, 3.0), epsilon=(0.0, 0.1)),
  statistics_loss(spherical.one_hot_squared_error_from_statistics),
  statistics_loss(spherical.spherical_softmax_from_statistics, classes=CLASSES, epsilon=(0.1, 1.0)),
  statistics_loss(spherical.taylor_softmax_from_statistics, classes=CLASSES),
  statistics_loss(
    spherical.z_loss_from_statistics, classes=CLASSES, sharpness=(0.5, 3.0), location=(-1.0, 3.0), epsilon=(0.0, 0.1)
  ),
]


EXEMPT = {
  "SphericalStatistics": "what the rows of functions of statistics build",
  "spherical_statistics": "three sums; the tests of the losses compare it with the dense forms",
}
