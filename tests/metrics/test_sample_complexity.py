"""Sample curves of linear probes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.metrics import gaussian_probe, linear_probe, sample_complexity
from jaxreg.metrics.sample_complexity import min_samples_to, probe_sample_curve
from tests.conformance import EXAMPLES, EXTREME, row


def bayes(features, labels, where):
  return gaussian_probe.stats_to_linear(gaussian_probe.gaussian_stats(features, labels, num_classes=3, where=where))


def logistic(features, labels, where):
  return linear_probe.logistic_probe(features, labels, num_classes=3, where=where)


def problem():
  rng = np.random.default_rng(0)
  labels = np.resize([0, 1, 2, 2, 2], 90)
  features = np.float32(rng.normal(size=(90, 4)) + 2 * np.eye(3, 4)[labels])
  return features[:60], labels[:60], features[60:], labels[60:]


def test_every_class_in_every_subset():
  labels = jnp.asarray(np.resize([0, 1, 2, 2, 2, 2, 2, 2], 40))
  for seed in range(20):
    places = np.asarray(sample_complexity._places(jax.random.key(seed), labels, 3))
    assert sorted(places) == list(range(40))
    assert sorted(np.asarray(labels)[places < 3]) == [0, 1, 2]


def test_curve_is_that_of_fits_to_the_subsets():
  features, labels, tests, test_labels = problem()
  key, sizes = jax.random.key(0), np.array([5, 30])
  heads = {"bayes": bayes, "logistic": logistic}
  fits = {name: jax.jit(fit) for name, fit in heads.items()}
  run = jax.jit(
    lambda sizes: probe_sample_curve(
      key, features, labels, tests, test_labels, sizes=sizes, heads=heads, num_classes=3, repeats=2
    )
  )
  curve = run(jnp.asarray(sizes))
  for index, part in enumerate(jax.random.split(key, 4)):
    repeat, column = divmod(index, 2)
    places = np.asarray(sample_complexity._places(part, jnp.asarray(labels), 3))
    taken = places < sizes[column]
    scaling = linear_probe.minmax_scaling(features[taken])
    inputs, targets = linear_probe.minmax_scale(scaling, features[taken]), labels[taken]
    for name in heads:
      probe = fits[name](inputs, targets, np.ones(len(targets), bool))
      logits = linear_probe.probe_logits(probe, linear_probe.minmax_scale(scaling, tests))
      np.testing.assert_allclose(curve[name][repeat, column], np.mean(logits.argmax(-1) != test_labels), atol=1e-6)
  assert curve["bayes"].shape == (2, 2) and curve["logistic"][:, 1].mean() < curve["logistic"][:, 0].mean()


def test_test_labels_do_not_reach_the_fit():
  """Every prediction is right under exactly one of three shifts of the test labels, if it is the same under all."""
  features, labels, tests, test_labels = problem()
  options = dict(sizes=[10], heads={"bayes": bayes}, num_classes=3, repeats=3)
  curve = lambda shift: probe_sample_curve(
    jax.random.key(1), features, labels, tests, (test_labels + shift) % 3, **options
  )
  np.testing.assert_allclose(sum(curve(shift)["bayes"] for shift in range(3)), 2, rtol=1e-6)


def test_min_samples():
  sizes = jnp.array([4, 8, 16])
  errors = jnp.array([[0.3, 0.2, 0.1], [0.1, 0.3, 0.05], [0.3, 0.3, 0.3], [jnp.nan, 0.15, 0.3]])
  np.testing.assert_array_equal(min_samples_to(errors, sizes, target=0.2), [16, 4, np.inf, 8])
  np.testing.assert_array_equal(
    min_samples_to(errors, sizes, target=jnp.array([0.25, 0.06, 1.0, 0.1])), [8, 16, 4, np.inf]
  )


def test_bad_input_is_refused():
  features, labels, tests, test_labels = problem()
  curve = lambda *arrays, **options: probe_sample_curve(
    jax.random.key(0), *arrays, **{**dict(sizes=[10], heads={"bayes": bayes}, num_classes=3), **options}
  )
  for bad, named in (
    (lambda: curve(features, labels[1:], tests, test_labels), "labels"),
    (lambda: curve(features, labels, tests[:, :2], test_labels), "test_features"),
    (lambda: curve(features, labels, tests, 1.0 * test_labels), "test_labels"),
    (lambda: curve(features, labels, tests, test_labels, sizes=[2]), "sizes"),
    (lambda: curve(features, labels, tests, test_labels, sizes=[61]), "sizes"),
    (lambda: curve(features, labels, tests, test_labels, sizes=[10.0]), "sizes"),
    (lambda: curve(features, labels, tests, test_labels, repeats=0), "repeats"),
    (lambda: min_samples_to(jnp.zeros((2, 3)), jnp.arange(2), target=0.1), "sizes"),
    (lambda: min_samples_to(jnp.zeros(3), jnp.arange(3), target=float("nan")), "target"),
  ):
    with pytest.raises(ValueError, match=named):
      bad()


def _features(rng):
  """Few enough digits that sums, and so the order of the classes, are the same in every precision."""
  labels = np.resize(np.arange(3, dtype=np.int32), EXAMPLES)
  return np.round(4 * rng.normal(size=(EXAMPLES, 2)) + 8 * np.eye(3, 2)[labels]), labels


def _sample_curve(*arrays):
  def fit(features, labels, where):
    return gaussian_probe.stats_to_linear(gaussian_probe.gaussian_stats(features, labels, num_classes=3, where=where))

  options = dict(sizes=np.array([6, 12]), heads={"bayes": fit}, num_classes=3, repeats=2)
  return sample_complexity.probe_sample_curve(jax.random.key(0), *arrays, **options)


ROWS = [
  row(
    sample_complexity.min_samples_to,
    lambda rng: (np.sort(rng.uniform(0, 0.5, (EXAMPLES, 6)))[:, ::-1], np.arange(4, 10, dtype=np.int32)),
    extreme=lambda errors, sizes: (np.minimum(np.abs(EXTREME * errors), EXTREME * (sizes < 9)), sizes),
    bad=(
      ("errors", lambda errors, sizes: (errors.astype(np.int32), sizes)),
      ("sizes", lambda errors, sizes: (errors, sizes[1:])),
      ("sizes", lambda errors, sizes: (errors, sizes[:1])),
    ),
    differentiable=False,
    wide=True,
    options=dict(target=(0.6, 0.7)),
  ),
  row(
    sample_complexity.probe_sample_curve,
    lambda rng: (*_features(rng), *_features(rng)),
    call=_sample_curve,
    bad=(
      ("features", lambda x, y, *tests: (x.astype(np.int32), y, *tests)),
      ("labels", lambda x, y, *tests: (x, y[:1], *tests)),
      ("test_features", lambda x, y, tests, labels: (x, y, tests[:, :1], labels)),
      ("test_labels", lambda x, y, tests, labels: (x, y, tests, labels * 1.0)),
    ),
    differentiable=False,
    wide=True,
  ),
]
