"""Logistic regression and scaling of features; golden vectors of both probes, scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.metrics import gaussian_probe, linear_probe
from jaxreg.metrics.gaussian_probe import gaussian_stats, merge_stats, stats_to_linear
from jaxreg.metrics.linear_probe import probe_logits
from tests.conformance import row

CLASSES, FEATURES = 4, 3
fit_logistic = jax.jit(linear_probe.logistic_probe, static_argnames="num_classes")


def draw(seed, examples=40, classes=CLASSES, features=FEATURES):
  rng = np.random.default_rng(seed)
  labels = np.concatenate([np.arange(classes), rng.integers(0, classes, examples - classes)])
  means = rng.normal(size=(classes, features))
  return jnp.asarray(means[labels] + rng.normal(size=(examples, features))), jnp.asarray(labels)


def close(first, second, **tolerance):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    np.testing.assert_allclose(1.0 * a, 1.0 * b, **tolerance)


@pytest.mark.golden
def test_golden_generative_linear_probe(golden, x64):
  for _, case, meta in golden("15-generative_linear_probe").cases():
    {"gaussian_nb_tied_diag": check_naive_bayes, "logistic_l2_lbfgs": check_logistic}[meta["kind"]](case, meta)


def check_naive_bayes(case, meta):
  classes, eps = meta["K"], meta["val_epsilon"]
  first = gaussian_stats(case["X1"], case["y1"], num_classes=classes)
  check_stats(first, case, "1", eps)
  both = merge_stats(first, gaussian_stats(case["X2"], case["y2"], num_classes=classes))
  check_stats(both, case, "2", eps)
  _, variance = gaussian_probe._prior_and_variance(both, eps, 0.0, "empirical")
  np.testing.assert_allclose(variance, case["out_pooled_var2"], rtol=0, atol=1e-9)
  scores = gaussian_probe.gaussian_scores(both, case["X_test"], eps=eps)
  np.testing.assert_allclose(scores, case["out_joint_scores2"], rtol=0, atol=1e-9)
  accuracy = np.mean(np.asarray(scores).argmax(-1) == case["y_test"])
  np.testing.assert_allclose(accuracy, case["out_score2"], rtol=0, atol=1e-9)


def check_stats(stats, case, block, eps):
  np.testing.assert_allclose(stats.mean, case[f"out_means{block}"], rtol=0, atol=1e-9)
  variances = stats.squares / stats.count[:, None] + eps
  np.testing.assert_allclose(variances, case[f"out_vars{block}"], rtol=0, atol=1e-9)
  np.testing.assert_allclose(stats.count / stats.count.sum(), case[f"out_prior{block}"], rtol=0, atol=1e-9)
  predicted = probe_logits(stats_to_linear(stats, eps=eps), case["X_test"]).argmax(-1)
  np.testing.assert_array_equal(predicted, case[f"out_pred{block}"])


def check_logistic(case, meta):
  strength, classes = meta["C"], case["out_W"].shape[0]
  probe = fit_logistic(case["X"], case["y"], num_classes=classes, l2=1 / strength, tolerance=1e-10)
  # 1e-7, not 1e-9: the card's tolerance for an iterative solver.
  np.testing.assert_allclose(probe.weights, case["out_W"], rtol=0, atol=1e-7)
  np.testing.assert_allclose(probe.bias, case["out_b_centered"], rtol=0, atol=1e-7)
  logits = probe_logits(probe, case["X"])
  np.testing.assert_allclose(logits - logits.mean(-1, keepdims=True), case["out_logits_centered"], rtol=0, atol=1e-7)
  value = strength * objective(probe, case["X"], case["y"], 1 / strength)
  np.testing.assert_allclose(value, case["out_objective"], rtol=0, atol=1e-7)


def objective(probe, features, labels, l2):
  logits = probe_logits(probe, features)
  own = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
  return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - own) + l2 / 2 * jnp.sum(probe.weights**2)


@pytest.mark.parametrize("strength", [0.1, 1.0, 20.0])
def test_logistic_probe_is_optimal(strength, x64):
  from sklearn.linear_model import LogisticRegression

  features, labels = draw(8)
  probe = fit_logistic(features, labels, num_classes=CLASSES, l2=1 / strength)
  assert gradient_norm(probe, features, labels, 1 / strength) < 1e-6
  np.testing.assert_allclose(probe.weights.sum(0), 0, atol=1e-12)
  reference = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(features, labels)
  np.testing.assert_allclose(probe.weights, reference.coef_ - reference.coef_.mean(0), atol=1e-4)
  np.testing.assert_allclose(probe.bias, reference.intercept_ - reference.intercept_.mean(), atol=1e-4)


def gradient_norm(probe, features, labels, l2):
  gradient = jax.grad(lambda probe: objective(probe, features, labels, l2))(probe._replace(converged=None))
  return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient))))


@pytest.mark.parametrize("l2", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["scales", "shifted", "correlated", "constant", "digits", "more features"])
def test_logistic_probe_converges_on_badly_scaled_features(kind, l2, x64):
  """The objective was 0.04 above scikit-learn's, and the gradient 2e-8 whatever was asked for."""
  from sklearn.datasets import load_digits
  from sklearn.linear_model import LogisticRegression

  features, labels = (np.asarray(x) for x in draw(8, examples=200, features=6))
  if kind == "scales":
    features = features * 10.0 ** np.arange(-3, 3)
  elif kind == "shifted":
    features = features + 1e3
  elif kind == "correlated":
    features = features + 300 * features[:, :1]
  elif kind == "constant":
    features = np.concatenate([features, np.full((200, 1), 7.0), np.zeros((200, 1))], 1)
  elif kind == "more features":
    features = np.random.default_rng(0).normal(size=(200, 300)) * np.geomspace(0.01, 10, 300)
  else:
    features, labels = (x[:300] for x in load_digits(return_X_y=True))
  probe = fit_logistic(features, labels, num_classes=labels.max() + 1, l2=l2, tolerance=1e-9)
  assert probe.converged
  # Evaluating the gradient in the original coordinates has rounding of its own.
  rounding = 1e-15 * np.abs(features).max() * np.sum(np.abs(features)) * (1 + np.abs(probe.weights).max())
  assert gradient_norm(probe, features, labels, l2) < 1e-9 + rounding
  reference = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=3000).fit(features, labels)
  theirs = linear_probe.LinearProbe(*(jnp.asarray(x) for x in (reference.coef_, reference.intercept_)))
  values = [float(objective(each, features, labels, l2)) for each in (probe, theirs)]
  assert values[0] <= values[1] + 1e-10 * abs(values[1])
  single = fit_logistic(np.float32(features), labels, num_classes=labels.max() + 1, l2=l2)
  assert single.converged and single.weights.dtype == jnp.float32
  assert float(objective(jax.tree.map(jnp.float64, single), features, labels, l2)) <= values[0] * (1 + 1e-4) + 1e-3


def test_logistic_probe_says_whether_it_has_converged(x64):
  features, labels = draw(8)
  assert not fit_logistic(features, labels, num_classes=CLASSES, max_iterations=1).converged
  assert fit_logistic(features, labels, num_classes=CLASSES, max_iterations=30).converged
  # What no float64 reaches: the end is what it resolves.
  probe = fit_logistic(features, labels, num_classes=CLASSES, tolerance=0.0)
  assert probe.converged and gradient_norm(probe, features, labels, 1.0) < 1e-12
  assert not fit_logistic(features * jnp.nan, labels, num_classes=CLASSES).converged


def test_logistic_probe_is_above_naive_bayes_in_likelihood(x64):
  features, labels = draw(9)
  fitted = fit_logistic(features, labels, num_classes=CLASSES, l2=1e-6)
  bayes = stats_to_linear(gaussian_stats(features, labels, num_classes=CLASSES))
  assert objective(fitted, features, labels, 0.0) <= objective(bayes, features, labels, 0.0)


def test_logistic_probe_masked_mapped_and_in_float32(x64):
  features, labels = draw(10)
  where = jnp.arange(40) < 25
  one = fit_logistic(features[:25], labels[:25], num_classes=CLASSES)
  close(fit_logistic(features, labels, num_classes=CLASSES, where=where), one, atol=1e-7)
  close(fit_logistic(jnp.float32(features[:25]), labels[:25], num_classes=CLASSES), one, atol=1e-3)
  fits = jax.vmap(lambda l2: fit_logistic(features[:25], labels[:25], num_classes=CLASSES, l2=l2))(
    jnp.array([1.0, 0.1])
  )
  close(jax.tree.map(lambda leaf: leaf[0], fits), one, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extremes_are_finite(dtype):
  features = jnp.array([[1e4, -1e4, 0.0], [1e4, 1e4, 0.0], [-1e4, 0.0, 0.0], [0.0, 1e-4, 0.0]], dtype)
  labels = jnp.array([0, 1, 1, 2])
  stats = gaussian_stats(features, labels, num_classes=4)
  for leaf in (
    *stats,
    *jax.tree.leaves(stats_to_linear(stats)),
    *linear_probe.minmax_scaling(features),
    *fit_logistic(features, labels, num_classes=4),
    gaussian_probe.gaussian_scores(stats, features),
    jax.grad(lambda x: gaussian_probe.gaussian_scores(stats, x).astype(jnp.float32).sum())(features),
    jax.grad(lambda x: stats_to_linear(gaussian_stats(x, labels, num_classes=4)).weights.sum())(features),
  ):
    assert jnp.isfinite(leaf).all()


def test_scaling_is_that_of_the_subset():
  from sklearn.preprocessing import MinMaxScaler

  rng = np.random.default_rng(11)
  features = np.float32(rng.normal(size=(20, 4)))
  features[:8, 2] = 5.0  # constant in the subset
  where = jnp.arange(20) < 8
  scaled = linear_probe.minmax_scale(linear_probe.minmax_scaling(features, where=where), features)
  np.testing.assert_allclose(scaled, MinMaxScaler().fit(features[:8]).transform(features), atol=1e-5)
  nothing = linear_probe.minmax_scaling(features, where=jnp.zeros(20, bool))
  np.testing.assert_array_equal(linear_probe.minmax_scale(nothing, features), features)


def test_bad_input_is_refused():
  features, labels = (np.asarray(x) for x in draw(12))
  features = np.float32(features)
  stats = gaussian_stats(features, labels, num_classes=CLASSES)
  for bad, named in (
    (lambda: gaussian_stats(features[0], labels, num_classes=CLASSES), "features"),
    (lambda: gaussian_stats(features.astype(int), labels, num_classes=CLASSES), "features"),
    (lambda: gaussian_stats(features, labels[:1], num_classes=CLASSES), "labels"),
    (lambda: gaussian_stats(features, 1.0 * labels, num_classes=CLASSES), "labels"),
    (lambda: gaussian_stats(features, labels, num_classes=CLASSES, where=np.ones(3, bool)), "where"),
    (lambda: merge_stats(stats, gaussian_probe.empty_stats(3, FEATURES)), "shapes"),
    (lambda: stats_to_linear(stats, prior="flat"), "prior"),
    (lambda: stats_to_linear(stats, eps=-1.0), "eps"),
    (lambda: stats_to_linear(stats, relative_floor=float("nan")), "relative_floor"),
    (lambda: probe_logits(stats_to_linear(stats), features[:, :2]), "features"),
    (lambda: linear_probe.logistic_probe(features, labels, num_classes=CLASSES, l2=-1.0), "l2"),
    (lambda: linear_probe.minmax_scale(linear_probe.minmax_scaling(features), features[:, :1]), "features"),
  ):
    with pytest.raises(ValueError, match=named):
      bad()


def test_accuracy_does_not_depend_on_the_representations_scale():
  rng = np.random.default_rng(0)
  features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
  features[np.arange(60), labels] += 1.5
  train, test = (features[:40], labels[:40]), (features[40:], labels[40:])
  accuracy = lambda scale: linear_probe.linear_probe_accuracy(
    100 + scale * train[0], train[1], 100 + scale * test[0], test[1], num_classes=3
  )
  mean, deviation = train[0].mean(0), (train[0] - train[0].mean(0)).std()
  probe = linear_probe.logistic_probe((train[0] - mean) / deviation, train[1], num_classes=3)
  expected = np.mean(probe_logits(probe, (test[0] - mean) / deviation).argmax(-1) == test[1])
  with jax.enable_x64(True):
    for scale in (1e-3, 1.0, 1e3):
      np.testing.assert_allclose(accuracy(scale), expected, atol=0.051)  # one of twenty may sit on the boundary
  assert np.isnan(linear_probe.linear_probe_accuracy(np.nan * train[0], train[1], *test, num_classes=3))


ROWS = [
  row(
    probe_logits,
    lambda rng: (rng.normal(size=(16, FEATURES)), rng.normal(size=(CLASSES, FEATURES)), rng.normal(size=CLASSES)),
    call=lambda features, weights, bias: probe_logits(linear_probe.LinearProbe(weights, bias), features),
    bad=(("features", lambda features, weights, bias: (features[:, 1:], weights, bias)),),
  ),
  row(
    linear_probe.minmax_scaling,
    lambda rng: (rng.normal(size=(16, FEATURES)),),
    bad=(("features", lambda features: (features[0],)), ("features", lambda features: (features.astype(np.int32),))),
    wide=True,
  ),
  row(
    linear_probe.minmax_scale,
    lambda rng: (rng.normal(size=(16, FEATURES)), rng.normal(size=FEATURES), rng.uniform(0.5, 2, FEATURES)),
    call=lambda features, minimum, width: linear_probe.minmax_scale(
      linear_probe.MinMaxScaling(minimum, width), features
    ),
    bad=(("features", lambda features, minimum, width: (features[:, 1:], minimum, width)),),
  ),
]


EXEMPT = {
  "LinearProbe": "weights and bias, of logistic_probe and stats_to_linear",
  "MinMaxScaling": "result of minmax_scaling",
  "linear_probe_accuracy": "logistic_probe's, of features that are tested to be scaled",
  "logistic_probe": "iterates until it is near enough: mapping moves it more than rounding",
}
