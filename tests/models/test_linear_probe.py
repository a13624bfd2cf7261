"""Naive Bayes and logistic regression on features: closed forms, streaming, golden vectors, scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from jaxreg.models import linear_probe
from jaxreg.models.linear_probe import gaussian_stats, merge_stats, probe_logits, stats_to_linear

CLASSES, FEATURES = 4, 3
stats_of = jax.jit(gaussian_stats, static_argnames="num_classes")
fit_logistic = jax.jit(linear_probe.logistic_probe, static_argnames="num_classes")


def draw(seed, examples=40, classes=CLASSES, features=FEATURES):
  rng = np.random.default_rng(seed)
  labels = np.concatenate([np.arange(classes), rng.integers(0, classes, examples - classes)])
  means = rng.normal(size=(classes, features))
  return jnp.asarray(means[labels] + rng.normal(size=(examples, features))), jnp.asarray(labels)


def close(first, second, **tolerance):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    np.testing.assert_allclose(a, b, **tolerance)


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
  _, variance = linear_probe._prior_and_variance(both, eps, 0.0, "empirical")
  np.testing.assert_allclose(variance, case["out_pooled_var2"], rtol=0, atol=1e-9)
  scores = linear_probe.gaussian_scores(both, case["X_test"], eps=eps)
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
    for a, b in zip(merge_stats(one, linear_probe.empty_stats(CLASSES, FEATURES, jnp.float64)), one):
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
  scores, logits = linear_probe.gaussian_scores(stats, features), probe_logits(stats_to_linear(stats), features)
  np.testing.assert_array_equal(scores.argmax(-1), logits.argmax(-1))
  difference = scores - logits
  np.testing.assert_allclose(difference, difference[:, :1] + np.zeros(CLASSES), atol=1e-10)
  np.testing.assert_allclose(jax.nn.softmax(scores), jax.nn.softmax(logits), atol=1e-10)


def test_equal_variances_are_nearest_centroids(x64):
  rng = np.random.default_rng(2)
  c, mean, count = 1.7, rng.normal(size=(3, 5)), np.array([10.0, 20.0, 30.0])
  # Squares that pool to the variance c of every feature, unequal between the classes.
  share = rng.dirichlet(np.ones(3), 5).T
  stats = linear_probe.GaussianStats(count, mean, jnp.asarray(c * count.sum() * share))
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
    _, variance = linear_probe._prior_and_variance(stats, 1e-3, floor, "empirical")
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


def test_head(x64):
  features, labels = draw(7)
  head = linear_probe.NaiveBayesHead(features=FEATURES, classes=CLASSES)
  variables = head.init(jax.random.key(0), features)
  apply = lambda variables, x, y, method: head.apply(variables, x, y, method=method, mutable=["stats"])[1]
  streamed = apply(variables, features[:13], labels[:13], "partial_fit")
  streamed = apply(streamed, features[13:], labels[13:], "partial_fit")
  fitted = apply(streamed, features, labels, "fit")
  close(streamed, fitted, rtol=1e-6)  # the head keeps float32 until it is fitted
  stats = gaussian_stats(features, labels, num_classes=CLASSES)
  np.testing.assert_allclose(head.apply(fitted, features), linear_probe.gaussian_scores(stats, features), rtol=1e-6)
  close(head.apply(fitted, method="linear"), stats_to_linear(stats), rtol=1e-6)
  gradient = jax.grad(lambda x: head.apply(fitted, x)[:, 0].sum())(features)
  variance = 1 / np.asarray(stats_to_linear(stats).weights / stats.mean)[0]
  np.testing.assert_allclose(gradient, (stats.mean[0] - features) / variance, rtol=1e-6)

  def episode(x, y):  # support set and queries of a task; the gradient reaches the support's features too
    fitted = head.apply(variables, x[:20], y[:20], method="fit", mutable=["stats"])[1]
    logits = head.apply(fitted, x[20:])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[20:, None], 1))

  tasks = jnp.stack([features, features + 0.1]), jnp.stack([labels, labels])
  losses, gradients = jax.vmap(jax.value_and_grad(episode))(*tasks)
  assert np.isfinite(losses).all() and np.abs(gradients[:, :20]).max() > 0
  np.testing.assert_allclose(losses[0], episode(features, labels), rtol=1e-9)


@pytest.mark.parametrize("strength", [0.1, 1.0, 20.0])
def test_logistic_probe_is_optimal(strength, x64):
  from sklearn.linear_model import LogisticRegression

  features, labels = draw(8)
  probe = fit_logistic(features, labels, num_classes=CLASSES, l2=1 / strength)
  gradient = jax.grad(objective)(probe, features, labels, 1 / strength)
  assert np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradient)) < 1e-6
  np.testing.assert_allclose(probe.weights.sum(0), 0, atol=1e-12)
  reference = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(features, labels)
  np.testing.assert_allclose(probe.weights, reference.coef_ - reference.coef_.mean(0), atol=1e-4)
  np.testing.assert_allclose(probe.bias, reference.intercept_ - reference.intercept_.mean(), atol=1e-4)


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
    *stats_to_linear(stats),
    *linear_probe.minmax_scaling(features),
    *fit_logistic(features, labels, num_classes=4),
    linear_probe.gaussian_scores(stats, features),
    jax.grad(lambda x: linear_probe.gaussian_scores(stats, x).astype(jnp.float32).sum())(features),
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
    (lambda: merge_stats(stats, linear_probe.empty_stats(3, FEATURES)), "shapes"),
    (lambda: stats_to_linear(stats, prior="flat"), "prior"),
    (lambda: stats_to_linear(stats, eps=-1.0), "eps"),
    (lambda: stats_to_linear(stats, relative_floor=float("nan")), "relative_floor"),
    (lambda: probe_logits(stats_to_linear(stats), features[:, :2]), "features"),
    (lambda: linear_probe.logistic_probe(features, labels, num_classes=CLASSES, l2=-1.0), "l2"),
    (lambda: linear_probe.minmax_scale(linear_probe.minmax_scaling(features), features[:, :1]), "features"),
  ):
    with pytest.raises(ValueError, match=named):
      bad()
