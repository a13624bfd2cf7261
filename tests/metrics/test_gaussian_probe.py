"""Gaussian naive Bayes: streaming, its linear form, invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from jaxreg.metrics import gaussian_probe
from jaxreg.metrics.gaussian_probe import gaussian_stats, merge_stats, stats_to_linear
from jaxreg.metrics.linear_probe import probe_logits
from tests.conformance import draw_logits, row
from tests.metrics.test_linear_probe import CLASSES, FEATURES, close, draw

stats_of = jax.jit(gaussian_stats, static_argnames="num_classes")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 39), st.sampled_from([0.0, 1.0, 100.0]))
def test_streaming_in_any_order_is_the_whole(seed, cut, offset):
  with jax.enable_x64(True):
    rng = np.random.default_rng(seed)
    features, labels = draw(seed)
    features = features + offset
    whole = stats_of(features, labels, num_classes=CLASSES)
    order = np.argsort(labels, stable=True) if seed % 2 else rng.permutation(40)  # sorted: classes miss from blocks
    part = lambda ids: stats_of(features, labels, where=jnp.zeros(40, bool).at[ids].set(True), num_classes=CLASSES)
    one, two, three = part(order[:cut]), part(order[cut : cut + 5]), part(order[cut + 5 :])
    tolerance = dict(rtol=1e-12, atol=1e-12 * max(offset**2, 1))
    close(merge_stats(merge_stats(one, two), three), whole, **tolerance)
    close(merge_stats(one, merge_stats(two, three)), whole, **tolerance)
    for a, b in zip(merge_stats(one, two), merge_stats(two, one)):
      np.testing.assert_array_equal(a, b)
    for a, b in zip(merge_stats(one, gaussian_probe.empty_stats(CLASSES, FEATURES, jnp.float64)), one):
      np.testing.assert_allclose(a, b, rtol=1e-14)


def test_associative_scan(x64):
  features, labels = draw(0)
  blocks = jax.vmap(lambda x, y: gaussian_stats(x, y, num_classes=CLASSES))(
    features.reshape(8, 5, -1), labels.reshape(8, 5)
  )
  running = jax.lax.associative_scan(merge_stats_batched, blocks)
  whole = gaussian_stats(features, labels, num_classes=CLASSES)
  close(jax.tree.map(lambda leaf: leaf[-1], running), whole, rtol=1e-12, atol=1e-12)


merge_stats_batched = jax.vmap(merge_stats)


def test_linear_form_is_the_quadratic_form(x64):
  features, labels = draw(1)
  stats = gaussian_stats(features, labels, num_classes=CLASSES)
  scores, logits = gaussian_probe.gaussian_scores(stats, features), probe_logits(stats_to_linear(stats), features)
  np.testing.assert_array_equal(scores.argmax(-1), logits.argmax(-1))
  difference = scores - logits
  np.testing.assert_allclose(difference, difference[:, :1] + np.zeros(CLASSES), atol=1e-10)
  np.testing.assert_allclose(jax.nn.softmax(scores), jax.nn.softmax(logits), atol=1e-10)


def test_equal_variances_are_nearest_centroids(x64):
  rng = np.random.default_rng(2)
  c, mean, count = 1.7, rng.normal(size=(3, 5)), np.array([10.0, 20.0, 30.0])
  # Squares that pool to the variance c of every feature, unequal between the classes.
  share = rng.dirichlet(np.ones(3), 5).T
  stats = gaussian_probe.GaussianStats(count, mean, jnp.asarray(c * count.sum() * share))
  features = rng.normal(size=(50, 5))
  distance = ((features[:, None] - mean) ** 2).sum(-1) - 2 * c * np.log(count / count.sum())
  logits = probe_logits(stats_to_linear(stats, eps=0.0), features)
  np.testing.assert_array_equal(logits.argmax(-1), distance.argmin(-1))
  uniform = probe_logits(stats_to_linear(stats, eps=0.0, prior="uniform"), features)
  np.testing.assert_array_equal(uniform.argmax(-1), ((features[:, None] - mean) ** 2).sum(-1).argmin(-1))


def test_weights_converge_at_the_square_root_rate(x64):
  variance, mean = jnp.array([0.5, 1.0, 2.0]), jnp.array([[0.0, 1.0, -1.0], [1.0, 0.0, 2.0]])

  def error(key, examples):
    choose, noise = jax.random.split(key)
    labels = jax.random.randint(choose, (examples,), 0, 2)
    features = mean[labels] + jnp.sqrt(variance) * jax.random.normal(noise, (examples, 3))
    weights = stats_to_linear(gaussian_stats(features, labels, num_classes=2)).weights
    return jnp.sqrt(jnp.mean((weights - mean / variance) ** 2))

  keys = jax.random.split(jax.random.key(0), 50)
  few, many = (np.mean(jax.vmap(functools.partial(error, examples=size))(keys)) for size in (100, 1600))
  np.testing.assert_allclose(few / many, 4, rtol=0.25)  # 16 times the examples; a mean of 50 errors varies by 10 %


def test_shift_scale_and_duplicates(x64):
  features, labels = draw(3)
  logits = lambda x: probe_logits(stats_to_linear(gaussian_stats(x, labels, num_classes=CLASSES), eps=0.0), x)
  odds = lambda z: z - z[:, :1]
  moved = features.at[:, 1].mul(-3.0).at[:, 1].add(7.0)
  np.testing.assert_allclose(odds(logits(moved)), odds(logits(features)), atol=1e-9)
  prior = np.log(np.bincount(labels) / 40)
  doubled = logits(jnp.concatenate([features, features], axis=1))
  evidence = lambda z: odds(z - prior)
  np.testing.assert_allclose(evidence(doubled), 2 * evidence(logits(features)), atol=1e-9)


def test_pooled_variance_is_the_residual_mean_square(x64):
  features, labels = draw(4)
  stats = gaussian_stats(features, labels, num_classes=CLASSES)
  residual = features - stats.mean[labels]
  for floor, expected in ((0.0, np.mean(residual**2, axis=0) + 1e-3), (10.0, None)):
    _, variance = gaussian_probe._prior_and_variance(stats, 1e-3, floor, "empirical")
    expected = 10 * np.mean(variance / 10) * np.ones(FEATURES) if expected is None else expected
    np.testing.assert_allclose(variance, expected, rtol=1e-12)


def test_absent_class_is_never_predicted():
  features, labels = jnp.array([[0.0], [1.0], [5.0]]), jnp.array([0, 0, 2])
  for prior in ("empirical", "uniform"):
    probe = stats_to_linear(gaussian_stats(features, labels, num_classes=4), prior=prior)
    logits = probe_logits(probe, jnp.linspace(-1e3, 1e3, 101)[:, None])
    assert np.isfinite(logits).all() and set(np.unique(logits.argmax(-1))) <= {0, 2}


def test_large_means_do_not_cancel():
  """In float32, with a deviation of 1 at a mean of 1e4: moments would lose everything."""
  features, labels = draw(5, examples=400)
  shifted = jnp.float32(features + 1e4)
  stats = gaussian_stats(shifted, labels, num_classes=CLASSES)
  exact = np.stack([np.var(np.float64(shifted)[np.asarray(labels) == k], axis=0) for k in range(CLASSES)])
  np.testing.assert_allclose(stats.squares / stats.count[:, None], exact, rtol=1e-3)


@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_statistics_over_devices(mapping):
  features, labels = draw(6)
  features = jnp.float32(features)
  part = lambda x, y: gaussian_stats(x, y, num_classes=CLASSES, axis_name="devices")
  if mapping == "pmap":
    stats = jax.pmap(part, axis_name="devices")(features.reshape(8, 5, -1), labels.reshape(8, 5))
    stats = jax.tree.map(lambda leaf: leaf[3], stats)
  else:
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    split, whole = PartitionSpec("devices"), PartitionSpec()
    mapped = jax.shard_map(part, mesh=mesh, in_specs=(split, split), out_specs=whole, check_vma=False)
    stats = jax.jit(mapped)(features, labels)
  close(stats, gaussian_stats(features, labels, num_classes=CLASSES), rtol=1e-5, atol=1e-5)


def _fitted(rng):
  return rng.normal(size=(9, FEATURES)), np.resize(np.arange(CLASSES, dtype=np.int32), 9)


def _of_statistics(function, **options):
  """`function(statistics, …)` as a function of the features."""
  call = lambda features, labels, **options: function(gaussian_stats(features, labels, num_classes=CLASSES), **options)
  return row(function, _fitted, call=call, wide=True, options=options)


_BAD_EXAMPLES = (
  ("features", lambda x, y: (x[0], y)),
  ("features", lambda x, y: (x.astype(np.int32), y)),
  ("labels", lambda x, y: (x, y[:1])),
  ("labels", lambda x, y: (x, 1.0 * y)),
)


ROWS = [
  row(gaussian_stats, _fitted, bad=_BAD_EXAMPLES, wide=True, options=dict(num_classes=CLASSES)),
  _of_statistics(stats_to_linear, eps=(0.01, 0.1), relative_floor=(0.0, 0.1)),
  _of_statistics(
    merge_stats,
  )._replace(
    call=lambda features, labels: merge_stats(
      gaussian_stats(features[:5], labels[:5], num_classes=CLASSES),
      gaussian_stats(features[5:], labels[5:], num_classes=CLASSES),
    )
  ),
  row(
    gaussian_probe.gaussian_scores,
    lambda rng: (draw_logits(rng)[:, :FEATURES], *_fitted(rng)),
    call=lambda features, x, y, **options: gaussian_probe.gaussian_scores(
      gaussian_stats(x, y, num_classes=CLASSES), features, **options
    ),
    bad=(("features", lambda features, x, y: (features[:, 1:], x, y)),),
    options=dict(eps=(0.01, 0.1), relative_floor=(0.0, 0.1)),
  ),
]


EXEMPT = {
  "GaussianStats": "result of gaussian_stats",
  "empty_stats": "zeros of a shape",
}
