"""EnsLoss: derivatives of random calibrated losses, and the mixture of fixed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxreg.losses import calibrated_ensemble
from jaxreg.losses.binary_margin import MARGIN_LOSSES
from jaxreg.losses.calibrated_ensemble import ensloss, ensloss_derivatives, inverse_box_cox
from tests.conformance import BAD_LABELS, BAD_SAME_SHAPE, EXAMPLES, draw_binary, row

OFFSET = 1e-6
derivatives = jax.jit(ensloss_derivatives)
seeds = st.integers(0, 2**32 - 1)


@functools.partial(jax.jit, static_argnames="axis_name")
def mean_and_gradient(logits, labels, noise, box_cox=0.0, axis_name=None):
  return jax.value_and_grad(lambda z: ensloss(z, labels, noise=noise, box_cox=box_cox, axis_name=axis_name).mean())(
    logits
  )


def batch(seed, size=16):
  rng = np.random.default_rng(seed)
  return rng.normal(size=size) * 3, rng.integers(0, 2, size), rng.normal(size=size)


@pytest.mark.golden
def test_golden_ensloss(golden, x64):
  for _, case, _ in golden("09-ensloss").cases():
    logits, labels = jnp.asarray(case["logits"]), jnp.asarray(case["labels"])
    sign = 2 * labels - 1
    noise, box_cox = jnp.asarray(case["noise"]), jnp.asarray(case["lam"])
    d = derivatives(sign * logits, noise=noise, box_cox=box_cox)
    np.testing.assert_allclose(d, case["out_derivative"], rtol=0, atol=1e-12)
    for shape in ((-1,), (-1, 1)):
      value, gradient = mean_and_gradient(logits.reshape(shape), labels, noise, box_cox)
      np.testing.assert_allclose(value, case["out_loss"], rtol=0, atol=1e-12)
      np.testing.assert_allclose(gradient, case["grad_logits"].reshape(shape), rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(-1, 1), st.floats(0.1, 2), st.floats(0, 3), st.sampled_from([0.1, 3.0, 1e4]))
def test_shape_of_the_derivatives(seed, box_cox, clamp, tail_power, scale):
  rng = np.random.default_rng(seed)
  margins, noise = jnp.float32(scale * rng.normal(size=16)), jnp.float32(rng.normal(size=16))
  d = derivatives(margins, noise=noise, box_cox=box_cox, clamp=clamp, tail_power=tail_power)
  # A power other than 1 may be off by a rounding between neighbours.
  steps = np.diff(np.asarray(d, np.float64)[np.argsort(margins)])
  assert (steps >= -1e-6 * clamp).all()
  assert (d <= -OFFSET).all() and (d >= -(clamp + OFFSET) * (1 + 1e-6)).all()
  exact = derivatives(margins, noise=noise, box_cox=box_cox, clamp=clamp)
  assert calibrated_ensemble.is_calibrated_derivative(margins, exact)


def test_property_checker():
  check = lambda m, d: bool(calibrated_ensemble.is_calibrated_derivative(jnp.float32(m), jnp.float32(d)))
  assert check([-1, 0, 1], [-1, -0.5, 0])
  assert check([0, 0, 1], [-0.1, -1, 0])  # ties, in either order
  assert not check([-1, 0, 1], [-0.1, -0.5, -0.7])  # concave
  assert not check([-1, 0, 1], [-1, 0, 0])  # flat at 0
  assert not check([-1, 0, 1], [-1, -0.5, 0.1])  # rising
  assert not check([-1, 0, np.nan], [-1, -0.5, 0]) and not check([-1, 0, 1], [-1, -0.5, np.nan])
  for loss in ("logistic", "hinge", "exponential"):
    slope = jax.vmap(jax.grad(lambda m, loss=loss: MARGIN_LOSSES[loss](m, jnp.int32(1))))
    margins = jnp.linspace(-3, 0.9, 40)
    assert check(margins, slope(margins))
  margins = jnp.linspace(-3, 3, 40)
  assert not check(margins, jax.vmap(jax.grad(lambda m: MARGIN_LOSSES["focal"](m, jnp.int32(1))))(margins))


def test_gradient_is_label_times_derivative(x64):
  logits, labels, noise = batch(0)
  sign = 2 * labels - 1
  d = ensloss_derivatives(sign * logits, noise=noise)
  _, gradient = mean_and_gradient(logits, labels, noise)
  np.testing.assert_array_equal(gradient, sign * d / 16)
  # No tangent of d enters: the derivative along any direction is that of the linear function with d held.
  direction = np.cos(np.arange(16.0))
  _, slope = jax.jvp(lambda z: ensloss(z, labels, noise=noise), (jnp.asarray(logits),), (jnp.asarray(direction),))
  np.testing.assert_array_equal(slope, d * (sign * direction))
  assert not np.any(jax.jacobian(lambda m: ensloss_derivatives(m, noise=noise))(sign * logits))
  assert jax.grad(lambda b: ensloss_derivatives(sign * logits, noise=noise, box_cox=b).sum())(0.3) == 0


def test_permuting_examples_permutes_derivatives(x64):
  logits, labels, noise = batch(1)
  order = np.random.default_rng(2).permutation(16)
  value, gradient = mean_and_gradient(logits, labels, noise)
  moved_value, moved_gradient = mean_and_gradient(logits[order], labels[order], noise)
  np.testing.assert_array_equal(moved_gradient, gradient[order])
  np.testing.assert_allclose(moved_value, value, rtol=1e-13)
  shuffled, _ = mean_and_gradient(logits, labels, noise[order])  # the order of the noise means nothing
  np.testing.assert_array_equal(shuffled, value)


def test_limits_of_the_noise(x64):
  margins = jnp.linspace(-3, 3, 8)
  np.testing.assert_allclose(derivatives(margins, noise=jnp.full(8, -800.0)), -OFFSET, rtol=1e-12)
  logits, labels, _ = batch(3)
  logits = np.tanh(logits)  # margins below 1
  _, gradient = mean_and_gradient(logits, labels, np.full(16, 50.0))
  hinge = jax.grad(lambda z: MARGIN_LOSSES["hinge"](z, labels).mean())(logits)
  np.testing.assert_allclose(gradient, hinge - OFFSET * (2 * labels - 1) / 16, rtol=1e-12)


def test_tail(x64):
  one = lambda **options: ensloss_derivatives(jnp.array([4.0]), noise=jnp.zeros(1), **options)
  np.testing.assert_allclose(one(), [-1 / 4 - OFFSET], rtol=1e-14)
  np.testing.assert_allclose(one(tail_power=2.0), [-1 / 16 - OFFSET], rtol=1e-14)
  np.testing.assert_allclose(one(clamp=0.5, offset=0.0, tail_power=0.0), [-0.5], rtol=1e-14)


def test_inverse_box_cox(x64):
  e = jnp.linspace(-3, 3, 61)
  for small in (1e-3, -1e-3, 1e-6, 1e-12, 1e-300):
    error = np.abs(inverse_box_cox(e, box_cox=jnp.float64(small)) / jnp.exp(e) - 1)
    np.testing.assert_array_less(error, abs(small) * e**2 + 1e-12)
  np.testing.assert_allclose(inverse_box_cox(e, box_cox=1.0), np.maximum(1 + e, 0), rtol=1e-12)
  np.testing.assert_allclose(inverse_box_cox(e, box_cox=0.5), np.maximum(1 + e / 2, 0) ** 2, rtol=1e-12)
  below = inverse_box_cox(e, box_cox=-0.7)[e < 1 / 0.7]
  np.testing.assert_allclose(below, (1 - 0.7 * e[e < 1 / 0.7]) ** (-1 / 0.7), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("box_cox", [-1.0, -0.05, 0.0, 1e-38, 0.05, 1.0])
def test_inverse_box_cox_is_finite(dtype, box_cox):
  values = jnp.array([-1e4, -20, -1, 0, 1, 19.9, 20, 1e4], dtype)
  for power in (box_cox, jnp.float32(box_cox)):
    value, slope = jax.vmap(jax.value_and_grad(lambda e, power=power: inverse_box_cox(e, box_cox=power)))(values)
    assert value.dtype == dtype and (value >= 0).all()
    assert jnp.isfinite(value).all() and jnp.isfinite(slope).all()


def test_half_of_the_draws_are_clamped():
  d = derivatives(jnp.full(100_000, -1.0), jax.random.key(0))
  assert abs(np.mean(d <= -1) - 0.5) <= 0.005


def test_keys():
  logits, labels, _ = batch(4)
  one = ensloss(logits, labels, jax.random.key(1))
  np.testing.assert_array_equal(one, ensloss(logits, labels, jax.random.key(1)))
  assert not np.array_equal(one, ensloss(logits, labels, jax.random.key(2)))
  np.testing.assert_array_equal(one, ensloss(logits, labels, noise=jax.random.normal(jax.random.key(1), (16,))))


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_split_over_devices_is_the_whole_batch(mapping):
  """Also when every device has a key of its own, as in a task: the first one counts."""
  logits, labels, noise = (jnp.asarray(x) for x in batch(5))
  logits, noise = jnp.float32(logits), jnp.float32(noise)
  keys = jax.random.split(jax.random.key(3), 8)

  def part(logits, labels, noise, key):
    options = {"axis_name": "devices"}
    by_noise = jax.value_and_grad(lambda z: ensloss(z, labels, noise=noise, **options).sum())(logits)
    by_key = jax.value_and_grad(lambda z: ensloss(z, labels, key[0], **options).sum())(logits)
    mixed = calibrated_ensemble.random_margin_loss_mixture(logits, labels, key[0], **options)
    return jax.tree.map(jnp.atleast_1d, (by_noise, by_key, mixed))

  if mapping == "pmap":
    split = lambda x: x.reshape(8, -1, *x.shape[1:])
    results = jax.pmap(part, axis_name="devices")(*map(split, (logits, labels, noise, keys)))
    results = jax.tree.map(lambda x: x.reshape(-1), results)
  else:
    spec = PartitionSpec("devices")
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    results = jax.jit(mapped)(logits, labels, noise, keys)
  whole = lambda **options: jax.value_and_grad(lambda z: ensloss(z, labels, **options).sum())(logits)
  for (value, gradient), (total, expected) in zip(results, (whole(noise=noise), whole(key=keys[0]))):
    # The same draws; vectorised code may round the last digits of a block differently.
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(value.sum(), total, rtol=1e-5)
  expected = calibrated_ensemble.random_margin_loss_mixture(logits, labels, keys[0])
  np.testing.assert_allclose(results[2], expected, rtol=1e-6)


def test_sharded_jit():
  logits, labels, noise = batch(6)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  placed = jax.device_put((logits, labels, noise), NamedSharding(mesh, PartitionSpec("data")))
  value, gradient = mean_and_gradient(*placed)
  expected = mean_and_gradient(logits, labels, noise)
  np.testing.assert_allclose(value, expected[0], rtol=1e-6)
  np.testing.assert_array_equal(gradient, expected[1])


def test_mixture_draws_every_loss():
  logits, labels, _ = (jnp.asarray(x) for x in batch(8))
  draw = jax.jit(lambda key: calibrated_ensemble.random_margin_loss_mixture(logits, labels, key))
  drawn = np.asarray([draw(jax.random.key(seed)) for seed in range(40)])
  for name in ("logistic", "hinge", "exponential", "squared_hinge"):
    assert np.isclose(drawn, MARGIN_LOSSES[name](logits, labels), rtol=1e-5).all(axis=1).any(), name
  assert len(np.unique(drawn, axis=0)) == 4


def test_bad_input_is_refused():
  logits, labels, noise = batch(9)
  key = jax.random.key(0)
  for bad, named in (
    (lambda: ensloss(logits[:, None], labels[:, None], key), r"logits must be \[batch\]"),
    (lambda: ensloss(logits, labels[:, None], key), "labels must have the shape"),
    (lambda: ensloss(logits[None], labels, key), "labels must have the shape"),
    (lambda: ensloss(logits, labels[:1], key), "labels must have the shape"),
    (lambda: ensloss(logits, 1.0 * labels, key), "labels must be integers"),
    (lambda: ensloss(labels, labels, key), "logits must be floating"),
    (lambda: ensloss(logits, labels), "exactly one of key and noise"),
    (lambda: ensloss(logits, labels, key, noise=noise), "exactly one of key and noise"),
    (lambda: ensloss(logits, labels, noise=noise[1:]), "noise"),
    (lambda: ensloss(logits, labels, key, clamp=0.0), "clamp"),
    (lambda: ensloss(logits, labels, key, offset=-1.0), "offset"),
    (lambda: ensloss(logits, labels, key, tail_power=-1.0), "tail_power"),
    (lambda: ensloss(logits, labels, key, box_cox=float("inf")), "box_cox"),
    (lambda: ensloss_derivatives(logits[None], key), "margins must have one axis"),
    (lambda: calibrated_ensemble.random_margin_loss_mixture(logits, labels, key, losses=("ramp",)), "losses"),
  ):
    with pytest.raises(ValueError, match=named):
      bad()


def _ensloss(logits, labels, noise, **hyperparameters):
  """The values, and the derivatives, which are constants in the gradient."""
  values = calibrated_ensemble.ensloss(logits, labels, noise=noise, **hyperparameters)
  margins = (2 * labels - 1) * logits
  return values, calibrated_ensemble.ensloss_derivatives(margins, noise=noise, **hyperparameters)


def test_examples_that_do_not_count_take_part_in_no_ranking():
  rng = np.random.default_rng(0)
  logits, labels, noise = rng.normal(size=6), np.array([0, 1, 1, 0, 1, 0]), rng.normal(size=6)
  where = np.array([True, False, True, True, False, True])
  kept = np.flatnonzero(where)
  expected = calibrated_ensemble.ensloss(logits[kept], labels[kept], noise=noise[kept])
  spoiled = np.where(where, logits, np.nan)
  masked = lambda z: calibrated_ensemble.ensloss(z, labels, noise=noise, where=where)
  np.testing.assert_allclose(masked(spoiled)[kept], expected, rtol=1e-6)
  ignored = calibrated_ensemble.ensloss(spoiled, np.where(where, labels, 255), noise=noise)
  np.testing.assert_array_equal(ignored, masked(spoiled))
  gradient = jax.grad(lambda z: masked(z).sum())(jnp.asarray(spoiled))
  assert np.isfinite(gradient).all() and not np.any(gradient[~where])
  derivatives = calibrated_ensemble.ensloss_derivatives(spoiled, noise=noise, where=where)
  assert derivatives[1] == 0 and calibrated_ensemble.is_calibrated_derivative(logits[kept], derivatives[kept])


ROWS = [
  row(
    calibrated_ensemble.ensloss,
    lambda rng: (*draw_binary(rng), rng.normal(size=EXAMPLES)),
    call=_ensloss,
    bad=BAD_LABELS,
    surrogate=lambda z, results, labels, noise, **_: (2 * labels - 1) * z * results[1],
    options=dict(box_cox=(-1.0, 1.0), clamp=(0.5, 2.0), tail_power=(0.0, 2.0), offset=(1e-6, 0.1)),
  ),
  row(
    calibrated_ensemble.ensloss_derivatives,
    lambda rng: (draw_binary(rng)[0], rng.normal(size=EXAMPLES)),
    call=lambda margins, noise, **options: calibrated_ensemble.ensloss_derivatives(margins, noise=noise, **options),
    bad=(
      ("noise", lambda m, noise: (m, noise[:1])),
      ("margins", lambda m, noise: (m[:, None], noise)),
      ("margins", lambda m, noise: (m.astype(np.int32), noise)),
    ),
    differentiable=False,
    options=dict(box_cox=(-1.0, 1.0), clamp=(0.5, 2.0), tail_power=(0.0, 2.0), offset=(1e-6, 0.1)),
  ),
  row(
    calibrated_ensemble.inverse_box_cox,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=(("values", lambda values: (values.astype(np.int32),)),),
    options=dict(box_cox=(0.0, 1.0)),
  ),
  row(
    calibrated_ensemble.is_calibrated_derivative,
    lambda rng: (draw_binary(rng)[0], -np.abs(rng.normal(size=EXAMPLES))),
    bad=(*BAD_SAME_SHAPE, ("margins", lambda m, d: (m.astype(np.int32), d))),
    differentiable=False,
    wide=True,
  ),
  row(
    calibrated_ensemble.random_margin_loss_mixture,
    lambda rng: (*draw_binary(rng), rng.integers(0, 2**32, 2, np.uint32)),
    bad=BAD_LABELS,
  ),
]
