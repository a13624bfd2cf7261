"""TCM: the card's exact tests, golden vectors, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import metric_learning
from jaxreg.losses import threshold_consistency as tc
from tests.conformance import EXAMPLES, row
from tests.losses.test_metric_learning import BAD_EMBEDDINGS, draw_embeddings

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  labels = jnp.asarray(rng.integers(0, 5, 24))
  return jnp.asarray(rng.normal(size=(5, 6))[labels] + 0.7 * rng.normal(size=(24, 6))), labels


def mean(embeddings, labels, **options):
  return tc.tcm_loss(embeddings, labels, **options).mean()


@pytest.mark.golden
def test_golden_tcm(golden):
  for case, arrays, _ in golden("43-tcm").cases("case"):
    margins = {"positive_margin": arrays["m_plus"], "negative_margin": arrays["m_minus"]}
    weights = {"positive_weight": arrays["lambda_plus"], "negative_weight": arrays["lambda_minus"]}
    embeddings, labels = jnp.asarray(arrays["embeddings"]), jnp.asarray(arrays["labels"])
    loss = functools.partial(mean, labels=labels, **margins, **weights)
    value, gradient = jax.value_and_grad(loss)(embeddings)
    np.testing.assert_allclose(value, arrays["out_loss"], rtol=1e-10, atol=1e-10, err_msg=case)
    np.testing.assert_allclose(gradient, arrays["grad_embeddings"], rtol=1e-10, atol=1e-10, err_msg=case)
    hard = tc.tcm_hard_pairs(embeddings, labels, **margins)
    assert (int(hard.positive), int(hard.negative)) == (arrays["num_hard_pos"], arrays["num_hard_neg"]), case


def loop(embeddings, labels, m_pos=0.9, m_neg=0.5):
  z = np.asarray(embeddings) / np.linalg.norm(embeddings, axis=1, keepdims=True)
  hard = {True: [], False: []}
  for i in range(len(z)):
    for j in range(i):
      s, same = z[i] @ z[j], bool(labels[i] == labels[j])
      distance = m_pos - s if same else s - m_neg
      if distance >= 0:
        hard[same].append(distance)
  return sum(np.mean(side) for side in hard.values() if side)


def test_equals_the_loop_over_unordered_pairs(batch):
  for margins in ((0.9, 0.5), (0.5, -0.2)):
    value = mean(*batch, positive_margin=margins[0], negative_margin=margins[1])
    np.testing.assert_allclose(value, loop(*batch, *margins), rtol=1e-12)


def test_invariances(batch):
  embeddings, labels = batch
  rng, expected = np.random.default_rng(1), mean(*batch)
  order = rng.permutation(24)
  rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  for changed in (
    (embeddings[order], labels[order]),
    (embeddings @ rotation, labels),
    (embeddings * rng.uniform(0.1, 9, (24, 1)), labels),
    (embeddings, (labels * 7 + 3) % 31),
  ):
    np.testing.assert_allclose(mean(*changed), expected, rtol=1e-12)


def test_no_hard_pairs_no_loss_and_no_gradient(batch):
  embeddings, labels = batch
  apart = 10.0 * jax.nn.one_hot(labels, 6, dtype=jnp.float64)
  for e, y in (
    (apart, labels),
    (apart[:1].repeat(4, 0), jnp.zeros(4, int)),
    (apart[:5] + jnp.eye(6)[:5], jnp.arange(5)),
  ):
    margins = dict(positive_margin=0.5, negative_margin=0.999)
    value, gradient = jax.value_and_grad(lambda e, y=y: mean(e, y, **margins))(e)
    assert value == 0 and not gradient.any() and np.isfinite(gradient).all()


def test_duplicating_the_batch_changes_nothing(batch):
  embeddings, labels = batch
  np.testing.assert_allclose(mean(jnp.tile(embeddings, (2, 1)), jnp.tile(labels, 2)), mean(*batch), rtol=1e-12)


def test_margins_at_the_ends_make_plain_means(batch):
  embeddings, labels = batch
  z = metric_learning.normalized_embeddings(embeddings)
  s, same = z @ z.T, labels[:, None] == labels
  positive, negative = same & ~np.eye(24, dtype=bool), ~same
  value = mean(*batch, positive_margin=1.0, negative_margin=-1.0, positive_weight=2.0, negative_weight=3.0)
  np.testing.assert_allclose(value, 2 * (1 - s)[positive].mean() + 3 * (s + 1)[negative].mean(), rtol=1e-12)


def test_gradient_in_similarities(batch):
  embeddings, labels = batch
  z = metric_learning.normalized_embeddings(embeddings)
  s, same = z @ z.T, labels[:, None] == labels
  positive, negative = same & ~np.eye(24, dtype=bool), ~same
  options = dict(positive_weight=2.0, negative_weight=3.0)
  total = lambda s: tc.tcm_from_similarities(s, positive, negative, **options).sum()
  value, gradient = jax.value_and_grad(total)(s)
  np.testing.assert_allclose(value, mean(*batch, **options), rtol=1e-12)
  hard_positive, hard_negative = positive & (s <= 0.9), negative & (s >= 0.5)
  expected = -2 * hard_positive / hard_positive.sum() + 3 * hard_negative / hard_negative.sum()
  np.testing.assert_allclose(gradient, expected, rtol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_chunks_and_devices_give_the_same(chunk_size, batch):
  embeddings, labels = batch
  labels = labels.at[3].set(-1)
  expected = jax.value_and_grad(mean)(embeddings, labels)
  chunked = jax.value_and_grad(functools.partial(mean, chunk_size=chunk_size))(embeddings, labels)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), chunked, expected)
  split = lambda x: x.reshape(8, 3, *x.shape[1:])
  part = jax.value_and_grad(functools.partial(mean, axis_name="devices", chunk_size=chunk_size))
  value, gradient = jax.pmap(part, axis_name="devices")(split(embeddings), split(labels))
  np.testing.assert_allclose(value.mean(), expected[0], rtol=1e-11)
  np.testing.assert_allclose(gradient.reshape(24, -1) / 8, expected[1], rtol=1e-10, atol=1e-13)
  counts = jax.pmap(functools.partial(tc.tcm_hard_pairs, axis_name="devices"), axis_name="devices")
  whole = tc.tcm_hard_pairs(embeddings, labels)
  for many, one in zip(counts(split(embeddings), split(labels)), whole):
    assert many.tolist() == [int(one)] * 8


def test_examples_that_do_not_count(batch):
  embeddings, labels = batch
  out = np.arange(24) % 5 == 0
  spoiled = jnp.where(out[:, None], jnp.nan, embeddings)
  value, gradient = jax.value_and_grad(mean)(spoiled, labels, where=jnp.asarray(~out))
  np.testing.assert_allclose(value, mean(embeddings[~out], labels[~out]), rtol=1e-12)
  assert np.isfinite(gradient).all() and not gradient[out].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision(dtype, batch):
  embeddings, labels = batch
  narrow = embeddings.astype(dtype)
  values = tc.tcm_loss(narrow, labels)
  assert values.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(values, np.float64), tc.tcm_loss(narrow.astype(jnp.float32), labels), rtol=2**-7, atol=2**-7
  )


def test_bad_input(batch):
  with pytest.raises(ValueError, match="positive_margin must lie in"):
    tc.tcm_loss(*batch, positive_margin=1.5)
  with pytest.raises(ValueError, match="negative_weight must lie in"):
    tc.tcm_loss(*batch, negative_weight=-1.0)
  with pytest.raises(ValueError, match="positive must be boolean"):
    tc.tcm_from_similarities(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones((2, 2), bool))


MARGINS = dict(positive_margin=(0.5, 0.9), negative_margin=(-0.2, 0.3))
WEIGHTS = dict(positive_weight=(0.0, 2.0), negative_weight=(0.5, 1.0))


def _draw_similarities(rng):
  positive = rng.uniform(size=(EXAMPLES, 6)) < 0.3
  return rng.uniform(-1, 1, (EXAMPLES, 6)), positive, ~positive


ROWS = [
  row(tc.tcm_loss, draw_embeddings, bad=BAD_EMBEDDINGS, examples="reduced", options=MARGINS | WEIGHTS),
  row(tc.tcm_loss, draw_embeddings, bad=BAD_EMBEDDINGS, examples="reduced", options=MARGINS | {"chunk_size": 5}),
  row(
    tc.tcm_from_similarities,
    _draw_similarities,
    extreme=lambda s, *masks: (np.resize([1.0, -1.0, 0.0], s.shape), *masks),
    bad=(
      ("similarities", lambda s, p, n: (s.astype(np.int32), p, n)),
      ("positive", lambda s, p, n: (s, p[1:], n)),
      ("negative", lambda s, p, n: (s, p, n * 1.0)),
    ),
    examples="reduced",
    options=MARGINS | WEIGHTS,
  ),
  row(
    tc.tcm_hard_pairs,
    draw_embeddings,
    bad=BAD_EMBEDDINGS,
    examples="reduced",
    differentiable=False,
    wide=True,
    options=MARGINS,
  ),
]

EXEMPT = {"HardPairs": "the result of tcm_hard_pairs"}
