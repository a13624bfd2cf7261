"""Heads of domains: golden vectors of the official code, the card's exact tests, masks and devices."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.losses import domain_heads
from tests.conformance import CLASSES, EXAMPLES, row

HEADS = 3


def _heads(rng):
  return 2 * rng.normal(size=(HEADS, EXAMPLES, CLASSES))


def _labels(rng, high):
  return rng.integers(0, high, EXAMPLES).astype(np.int32)


_BAD = (("head_logits", lambda z, *rest: (z.astype(np.int32), *rest)), ("head_logits", lambda z, *rest: (z[0], *rest)))

ROWS = [
  row(
    domain_heads.domain_heads_loss,
    lambda rng: (_heads(rng), _labels(rng, CLASSES), _labels(rng, HEADS - 1)),
    bad=(
      *_BAD,
      ("labels", lambda z, y, d: (z, y[1:], d)),
      ("labels", lambda z, y, d: (z, y * 1.0, d)),
      ("domains", lambda z, y, d: (z, y, d[1:])),
      ("domains", lambda z, y, d: (z, y, d * 1.0)),
    ),
  ),
  row(
    domain_heads.domain_mean,
    lambda rng: (rng.normal(size=EXAMPLES), _labels(rng, 3)),
    bad=(("values", lambda v, d: (v.astype(np.int32), d)), ("domains", lambda v, d: (v, d[1:]))),
    options=dict(num_domains=3),
  ),
  row(domain_heads.head_entropies, lambda rng: (_heads(rng)[0],), bad=_BAD[:1], examples="any"),
  *(
    row(
      domain_heads.weights_by_entropy,
      lambda rng: (_heads(rng),),
      bad=_BAD,
      differentiable=False,
      options=dict(mode=mode, exponent=(0.0, 3.0)),
    )
    for mode in domain_heads.MODES
  ),
  *(
    row(
      domain_heads.nearest_domain_weights,
      lambda rng: (rng.normal(size=(EXAMPLES, 4)), rng.normal(size=(HEADS, 4))),
      bad=(("features", lambda x, c: (x.astype(np.int32), c)), ("centroids", lambda x, c: (x, c[:, 1:]))),
      differentiable=False,
      options=dict(metric=metric, exponent=(0.0, 3.0)),
    )
    for metric in domain_heads.METRICS
  ),
  row(
    domain_heads.mixed_head_probabilities,
    lambda rng: (_heads(rng), rng.dirichlet(np.ones(HEADS), EXAMPLES).T),
    bad=(*_BAD, ("weights", lambda z, w: (z, w[1:]))),
  ),
  row(
    domain_heads.adaptation_loss,
    lambda rng: (_heads(rng),),
    # No example's confidence is near the threshold, so that no rounding makes it count.
    extreme=lambda z: (1e4 * np.sign(z),),
    bad=_BAD,
    options=dict(threshold=(0.0, 0.1), pseudo_labels="own"),
  ),
]


def _logits(case, features):
  return jnp.einsum("hck,bk->hbc", case["heads_W"], features) + case["heads_b"][:, None]


@pytest.mark.golden
def test_golden_30_drm_training(golden, x64):
  for name, case, _ in golden("30-drm").cases():
    num_domains = json.loads(str(case["hp"]))["num_domains"]
    domains = range(num_domains)
    features = [case[f"train_feat{i}"] for i in domains]
    labels = np.concatenate([case[f"train_label{i}"] for i in domains])
    ids = np.concatenate([np.full(len(features[i]), i, np.int32) for i in domains])

    def objective(parameters, features, labels=labels, ids=ids, num_domains=num_domains):
      values = domain_heads.domain_heads_loss(_logits(parameters, features), labels, ids)
      return domain_heads.domain_mean(values, ids, num_domains=num_domains)

    parameters = {key: case[key] for key in ("heads_W", "heads_b")}
    value, gradients = jax.value_and_grad(objective, argnums=(0, 1))(parameters, np.concatenate(features))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14, err_msg=name)
    close(value, case["train_out_loss"])
    close(gradients[0]["heads_W"], case["train_grad_W"])
    close(gradients[0]["heads_b"], case["train_grad_b"])
    close(gradients[1], np.concatenate([case[f"train_grad_feat{i}"] for i in domains]))


@pytest.mark.golden
def test_golden_30_drm_selection(golden, x64):
  for name, case, _ in golden("30-drm").cases():
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14, err_msg=name)
    features = case["test_feat"]
    logits = _logits(case, features)
    close(domain_heads.head_entropies(logits), case["head_entropy"])
    of = lambda weights, logits=logits: jnp.sum(weights[..., None] * logits[: len(weights)], axis=0)
    close(of(domain_heads.weights_by_entropy(logits)), case["batch_select_out_logits"])
    centroids = case["bank"].mean(1)
    for metric in ("l1", "l2"):
      chosen = domain_heads.nearest_domain_weights(features, centroids, metric=metric)
      close(of(chosen), case[f"bank_p{metric[1]}_hard_out_logits"])
    # The official code takes the least similar domain: the most similar one of the opposite features; and its mixture
    # weighs by the cosines themselves.
    opposite = domain_heads.nearest_domain_weights(-features, centroids, metric="cosine")
    close(of(opposite), case["bank_cosine_hard_out_logits"])
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit(centroids) @ unit(features).T
    weights = np.append(cosines / cosines.sum(0), np.zeros((1, len(features))), axis=0)
    close(domain_heads.mixed_head_probabilities(logits, weights), case["bank_cosine_mix_out_probs"])


@pytest.mark.golden
def test_golden_30_drm_adaptation(golden, x64):
  for name, case, _ in golden("30-drm").cases():
    for combination in json.loads(str(case["hp"]))["combos"]:
      close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14, err_msg=f"{name} {combination}")
      stem, exponent = f"tta{combination['index']}", combination["gamma"]
      logits = _logits(case, case["test_feat"])
      if exponent < 0:
        weights = domain_heads.weights_by_entropy(logits, mode="example")
      else:  # the global head is in the weights and not in the sum
        weights = domain_heads.weights_by_entropy(logits, mode="mixture", exponent=exponent).at[-1].set(0)
      close(domain_heads.mixed_head_probabilities(logits, weights), case[f"{stem}_out_probs"])
      source = {"own": "own", "last": "global", "uniform": "mean", "drm": "mixed"}[combination["label"]]
      options = dict(threshold=combination["beta"], pseudo_labels=source, double_softmax=True)
      options |= {"weights": weights} if source == "mixed" else {}
      loss = lambda p, options=options, x=case["test_feat"]: domain_heads.adaptation_loss(_logits(p, x), **options)
      gradient = jax.grad(loss)({key: case[key] for key in ("heads_W", "heads_b")})
      close(gradient["heads_W"], case[f"{stem}_grad_W"])
      close(gradient["heads_b"], case[f"{stem}_grad_b"])


def test_equal_heads_predict_alike_in_every_mode(x64):
  one = np.random.default_rng(0).normal(size=(1, EXAMPLES, CLASSES))
  logits = np.repeat(one, HEADS, axis=0)
  for mode in domain_heads.MODES:
    mixed = domain_heads.mixed_head_probabilities(logits, domain_heads.weights_by_entropy(logits, mode=mode))
    np.testing.assert_allclose(mixed, jax.nn.softmax(one[0]), rtol=1e-12)


def test_one_domain_with_equal_heads_is_cross_entropy(x64):
  rng = np.random.default_rng(1)
  features, labels = rng.normal(size=(EXAMPLES, 4)), _labels(rng, CLASSES)
  kernel = rng.normal(size=(4, CLASSES))
  ids = np.zeros(EXAMPLES, np.int32)

  def of_heads(kernels, features):
    values = domain_heads.domain_heads_loss(features @ kernels, labels, ids)
    return domain_heads.domain_mean(values, ids, num_domains=1)

  plain = lambda kernel, x: optax.softmax_cross_entropy_with_integer_labels(x @ kernel, labels).mean()
  value, gradient = jax.value_and_grad(of_heads, (0, 1))(jnp.stack([kernel, kernel]), features)
  expected, slope = jax.value_and_grad(plain, (0, 1))(kernel, features)
  np.testing.assert_allclose(value, expected, rtol=1e-12)
  np.testing.assert_allclose(gradient[0], jnp.stack([slope[0], slope[0]]) / 2, rtol=1e-10, atol=1e-14)
  np.testing.assert_allclose(gradient[1], slope[1], rtol=1e-10, atol=1e-14)


def test_limits_of_the_mixture(x64):
  logits = _heads(np.random.default_rng(2))
  mixture = functools.partial(domain_heads.weights_by_entropy, logits, mode="mixture")
  np.testing.assert_allclose(mixture(exponent=0.0), 1 / HEADS, rtol=1e-12)
  np.testing.assert_allclose(mixture(exponent=1e6), domain_heads.weights_by_entropy(logits, mode="example"), atol=1e-12)
  np.testing.assert_allclose(mixture(exponent=2.0).sum(0), 1, rtol=1e-12)


def test_entropies_at_their_ends():
  certain = 1e4 * np.eye(CLASSES, dtype=np.float32)
  np.testing.assert_array_equal(domain_heads.head_entropies(certain), 0)
  np.testing.assert_allclose(
    domain_heads.head_entropies(np.full((2, CLASSES), -1e4, np.float32)), np.log(CLASSES), rtol=1e-6
  )
  sure = np.stack([certain, np.zeros_like(certain)])
  np.testing.assert_allclose(domain_heads.weights_by_entropy(sure, mode="mixture")[0], 1, rtol=1e-6)
  assert np.isfinite(jax.grad(lambda z: jnp.sum(domain_heads.head_entropies(z)))(certain)).all()


def test_order_of_heads_and_examples(x64):
  rng = np.random.default_rng(3)
  logits = _heads(rng)
  heads, examples = rng.permutation(HEADS), rng.permutation(EXAMPLES)
  for mode in domain_heads.MODES:
    weights = domain_heads.weights_by_entropy(logits, mode=mode)
    np.testing.assert_allclose(domain_heads.weights_by_entropy(logits[heads], mode=mode), weights[heads], rtol=1e-12)
    np.testing.assert_allclose(
      domain_heads.weights_by_entropy(logits[:, examples], mode=mode), weights[:, examples], rtol=1e-12
    )


def test_adaptation_takes_confident_examples_only_and_constant_labels(x64):
  rng = np.random.default_rng(4)
  kernels, features = rng.normal(size=(HEADS, 4, CLASSES)), rng.normal(size=(EXAMPLES, 4))
  loss = lambda k, x, **options: domain_heads.adaptation_loss(x @ k, **options)
  for source in ("own", "global", "mean"):
    none = jax.grad(loss)(kernels, features, threshold=1.1, pseudo_labels=source)
    np.testing.assert_array_equal(none, 0)
    some = functools.partial(loss, threshold=0.4, pseudo_labels=source)
    frozen = jax.grad(lambda k, f=some: f(k, jax.lax.stop_gradient(features)))(kernels)
    assert np.any(frozen)
  # Against the labels and the confidences written out.
  probabilities = jax.nn.softmax(features @ kernels)
  labels, sure = probabilities.argmax(-1), probabilities.max(-1) >= 0.4

  def written(k):
    each = optax.softmax_cross_entropy_with_integer_labels(features @ k, labels)
    return sum(each[h][sure[h]].mean() for h in range(HEADS) if sure[h].any())

  gradient = jax.grad(lambda k: loss(k, features, threshold=0.4))(kernels)
  np.testing.assert_allclose(gradient, jax.grad(written)(kernels), rtol=1e-10, atol=1e-14)


def test_what_does_not_count_is_not_read():
  rng = np.random.default_rng(5)
  logits = _heads(rng).astype(np.float32)
  labels, ids = _labels(rng, CLASSES), _labels(rng, HEADS - 1)
  mask = np.arange(EXAMPLES) % 4 > 0
  spoiled = np.where(mask[:, None], logits, np.nan)
  outside = np.where(mask, labels, -100)
  value, gradient = jax.value_and_grad(lambda z: jnp.sum(domain_heads.domain_heads_loss(z, outside, ids)))(spoiled)
  assert np.isfinite(value) and np.isfinite(gradient).all() and not np.any(gradient[:, ~mask])
  foreign = np.where(mask, ids, 9)
  values = domain_heads.domain_heads_loss(logits, labels, foreign)
  assert not np.any(values[~mask])
  expected = domain_heads.domain_mean(values[mask], ids[mask], num_domains=2)
  hidden = jnp.where(mask, values, jnp.nan)
  np.testing.assert_allclose(domain_heads.domain_mean(hidden, ids, num_domains=2, where=mask), expected, rtol=1e-6)
  np.testing.assert_allclose(domain_heads.domain_mean(hidden, foreign, num_domains=2), expected, rtol=1e-6)
  assert domain_heads.domain_mean(hidden, ids, num_domains=2, where=np.zeros_like(mask)) == 0
  masked = functools.partial(domain_heads.adaptation_loss, threshold=0.3, where=mask)
  value, gradient = jax.value_and_grad(masked)(spoiled)
  np.testing.assert_allclose(value, domain_heads.adaptation_loss(logits[:, mask], threshold=0.3), rtol=1e-6)
  assert np.isfinite(gradient).all() and not np.any(gradient[:, ~mask])
  chosen = domain_heads.weights_by_entropy(spoiled, where=mask)
  np.testing.assert_array_equal(chosen[:, mask], domain_heads.weights_by_entropy(logits[:, mask]))


def test_mean_over_domains_of_a_batch_split_over_devices(x64):
  rng = np.random.default_rng(6)
  values, ids = rng.normal(size=EXAMPLES), _labels(rng, 3)
  expected = domain_heads.domain_mean(values, ids, num_domains=3)
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  part = functools.partial(domain_heads.domain_mean, num_domains=3, axis_name="devices")
  spec = PartitionSpec("devices")
  split = jax.shard_map(part, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec(), check_vma=False)
  np.testing.assert_allclose(jax.jit(split)(values, ids), expected, rtol=1e-12)


def test_wrong_options_are_refused():
  logits = np.zeros((2, 3, 4), np.float32)
  with pytest.raises(ValueError, match="mode must be one of"):
    domain_heads.weights_by_entropy(logits, mode="best")
  with pytest.raises(ValueError, match="pseudo_labels must be one of"):
    domain_heads.adaptation_loss(logits, threshold=0.1, pseudo_labels="last")
  with pytest.raises(ValueError, match="weights must be given"):
    domain_heads.adaptation_loss(logits, threshold=0.1, pseudo_labels="mixed")
  with pytest.raises(ValueError, match="metric must be one of"):
    domain_heads.nearest_domain_weights(np.ones((1, 2), np.float32), np.ones((2, 2), np.float32), metric="l3")
