"""Losses of bags: the identity that relates them, gradients, symmetries, and the golden finite samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import aggregate
from tests.conformance import CLASSES, EXAMPLES, draw_logits, draw_probabilities, extreme_logits, row

LOSSES = (aggregate.bag_squared_loss, aggregate.instance_squared_loss, aggregate.within_bag_spread)


def bags(shape=(5, 3), seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=shape[0]))


def classes(shape=(5, 3, 4), seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(2 * rng.normal(size=shape)), jnp.asarray(rng.dirichlet(np.ones(shape[-1]), shape[0]))


@pytest.mark.golden
def test_golden_aggregate_losses(golden, x64):
  for name, arrays, meta in golden("06-aggregate").cases():
    if meta["kind"] != "finite_sample":
      continue
    predictions, targets, rho = arrays["preds"], arrays["bag_mean_y"], arrays["rho"]
    mean = lambda loss, **options: lambda f, y: jnp.mean(loss(f, y, **options))
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, err_msg=name)
    close(mean(aggregate.bag_squared_loss)(predictions, targets), arrays["out_bag_loss"])
    close(mean(aggregate.instance_squared_loss)(predictions, targets), arrays["out_instance_loss"])
    close(jnp.mean(aggregate.within_bag_spread(predictions)), arrays["out_regularizer"])
    value, slope = jax.value_and_grad(mean(aggregate.interpolated_bag_squared_loss, rho=rho))(predictions, targets)
    close(value, arrays["out_interp_loss"])
    close(slope, arrays["grad_interp_preds"])


def test_instance_level_loss_is_bag_level_loss_and_spread(x64):
  f, y = bags()
  spread = aggregate.within_bag_spread(f)
  np.testing.assert_allclose(aggregate.instance_squared_loss(f, y), aggregate.bag_squared_loss(f, y) + spread, 1e-12)
  pairs = jnp.square(f[:, :, None] - f[:, None, :]).sum((1, 2)) / (2 * f.shape[1] ** 2)
  np.testing.assert_allclose(spread, pairs, rtol=1e-12)
  for rho, loss in ((0.0, aggregate.bag_squared_loss), (1.0, aggregate.instance_squared_loss)):
    np.testing.assert_allclose(aggregate.interpolated_bag_squared_loss(f, y, rho=rho), loss(f, y), rtol=1e-12)


def test_bags_of_one_example(x64):
  f, y = bags((6, 1))
  expected = (f[:, 0] - y) ** 2
  for rho in (0.0, 0.3, 2.0):
    np.testing.assert_allclose(aggregate.interpolated_bag_squared_loss(f, y, rho=rho), expected, rtol=1e-12)
  assert (aggregate.within_bag_spread(f) == 0).all()
  z, t = classes((6, 1, 4))
  np.testing.assert_allclose(
    aggregate.bag_cross_entropy_loss(z, t), aggregate.instance_cross_entropy_loss(z, t), rtol=1e-12
  )


@pytest.mark.parametrize("rho", [0.0, 0.4, 3.0])
def test_gradient(rho, x64):
  f, y = bags()
  mean = f.mean(1, keepdims=True)
  gradient = jax.grad(lambda f: aggregate.interpolated_bag_squared_loss(f, y, rho=rho).mean())(f)
  np.testing.assert_allclose(gradient, 2 / f.size * ((mean - y[:, None]) + rho * (f - mean)), rtol=1e-10, atol=1e-14)
  of_bag = jax.grad(lambda f: aggregate.bag_squared_loss(f, y).mean())(f)
  np.testing.assert_allclose(gradient.sum(1), of_bag.sum(1), rtol=1e-10)


def test_order_within_and_of_bags_does_not_matter(x64):
  f, y = bags()
  inner, outer = np.array([2, 0, 1]), np.array([4, 1, 0, 3, 2])
  for loss in (aggregate.bag_squared_loss, aggregate.instance_squared_loss):
    np.testing.assert_allclose(loss(f[:, inner], y), loss(f, y), rtol=1e-12)
    np.testing.assert_allclose(loss(f[outer], y[outer]), loss(f, y)[outer], rtol=1e-12)


def test_bags_of_different_sizes_count_their_own_examples(x64):
  f, y = bags()
  where = np.arange(3) < np.array([3, 2, 1, 2, 3])[:, None]
  for loss in (aggregate.bag_squared_loss, aggregate.instance_squared_loss):
    got = loss(jnp.where(where, f, 1e6), y, where=where)
    np.testing.assert_allclose(got, [loss(f[i, : n.sum()], y[i]) for i, n in enumerate(where)], rtol=1e-12)
  z, t = classes()
  for loss in (aggregate.bag_cross_entropy_loss, aggregate.instance_cross_entropy_loss):
    got = loss(jnp.where(where[..., None], z, 50.0), t, where=where)
    np.testing.assert_allclose(got, [loss(z[i, : n.sum()], t[i]) for i, n in enumerate(where)], rtol=1e-12)


def test_classification_averages_probabilities_and_obeys_jensen(x64):
  z, t = classes()
  bag = aggregate.bag_cross_entropy_loss(z, t)
  np.testing.assert_allclose(bag, -jnp.sum(t * jnp.log(jax.nn.softmax(z).mean(1)), -1), rtol=1e-12)
  assert (bag <= aggregate.instance_cross_entropy_loss(z, t)).all()


def test_hopeless_logits_have_finite_gradients():
  z = jnp.array([[[1e4, -1e4], [1e4, -1e4]]])
  for loss in (aggregate.bag_cross_entropy_loss, aggregate.instance_cross_entropy_loss):
    for t in ([[0.5, 0.5]], [[0.0, 1.0]], [[1.0, 0.0]]):
      value, gradient = jax.value_and_grad(lambda z: loss(z, jnp.array(t)).sum())(z)
      assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def bag_loss(function, **options):
  """`function(predictions, targets, **options)`, a value per bag."""
  bags = lambda rng: (draw_logits(rng), rng.normal(size=EXAMPLES))
  return row(function, bags, extreme=extreme_logits, bad=_BAD_BAGS, examples="any", options=options)


def bag_cross_entropy(function, **options):
  """`function(logits, targets, **options)` with the logits of two examples a bag."""
  bags = lambda rng: (2 * rng.normal(size=(EXAMPLES, 2, CLASSES)), draw_probabilities(rng))
  extreme = lambda z, t: (extreme_logits(z.reshape(-1, CLASSES))[0].reshape(z.shape), t)
  return row(function, bags, extreme=extreme, bad=_BAD_BAGS, examples="any", options=options)


_BAD_BAGS = (
  ("targets", lambda x, y: (x, y[1:])),
  ("targets", lambda x, y: (x, y[:1])),
  ("targets", lambda x, y: (x, y.astype(np.int32))),
  ("predictions|logits", lambda x, y: (x.astype(np.int32), y)),
)


@pytest.mark.parametrize("hidden", [np.nan, np.inf])
def test_empty_bags_and_what_is_under_the_mask(hidden):
  rng = np.random.default_rng(0)
  where = np.array([[True, True, False], [False] * 3])
  for name in aggregate.__all__:
    loss, classes = getattr(aggregate, name), "entropy" in name
    predictions = rng.normal(size=(2, 3, 4) if classes else (2, 3))
    targets = () if name == "within_bag_spread" else (jnp.full((2, 4), 0.25) if classes else jnp.ones(2),)
    options = {"rho": 0.3} if "interpolated" in name else {}
    mask = where[..., None] if classes else where
    total = lambda f, loss=loss, t=targets, o=options: loss(f, *t, where=where, **o).sum()
    value, gradient = jax.value_and_grad(total)(jnp.where(mask, predictions, hidden))
    np.testing.assert_allclose(value, loss(predictions[:1, :2], *(t[:1] for t in targets), **options).sum(), rtol=1e-6)
    assert np.isfinite(gradient).all() and not np.any(np.where(mask, 0, gradient))


ROWS = [
  bag_loss(aggregate.bag_squared_loss),
  bag_loss(aggregate.instance_squared_loss),
  bag_loss(aggregate.interpolated_bag_squared_loss, rho=(0.0, 2.0)),
  bag_cross_entropy(aggregate.bag_cross_entropy_loss),
  bag_cross_entropy(aggregate.instance_cross_entropy_loss),
  bag_cross_entropy(aggregate.interpolated_bag_cross_entropy_loss, rho=(0.0, 1.0)),
  row(
    aggregate.within_bag_spread,
    lambda rng: (draw_logits(rng),),
    extreme=extreme_logits,
    bad=(("predictions", lambda x: (x.astype(np.int32),)),),
    examples="any",
  ),
]
