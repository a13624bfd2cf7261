"""Metrix: the card's exact tests, golden vectors, selection of pairs, devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import metric_learning as ml
from jaxreg.losses import metric_mixup as mm
from tests.conformance import EXAMPLES, row, unchanged
from tests.losses.test_metric_learning import BAD_EMBEDDINGS, draw_embeddings

pytestmark = pytest.mark.usefixtures("x64")
FORMS = {
  "contrastive": lambda m, beta, gamma: ml.contrastive_form(margin=m),
  "multi_similarity": lambda m, beta, gamma: ml.multi_similarity_form(beta=beta, gamma=gamma, margin=m),
  "binomial": lambda m, beta, gamma: ml.binomial_deviance_form(beta=beta, gamma=gamma, margin=m),
}
MULTI_SIMILARITY = ml.multi_similarity_form(beta=18.0, gamma=75.0, margin=0.77)


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  labels = jnp.asarray([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8])  # the last two are alone
  return jnp.asarray(rng.normal(size=(9, 6))[labels] + 0.5 * rng.normal(size=(16, 6))), labels


@pytest.fixture
def pairs(batch):
  return mm.select_mix_pairs(jax.random.key(0), *batch, negatives=3)


def of_flat_pairs(embeddings, anchor, first, second, coefficient, form):
  """The mixed loss of each example as the anchor, of pairs given as lists."""
  z = ml.normalized_embeddings(embeddings)
  mixed = ml.normalized_embeddings(mm.mix(z[first], z[second], coefficient=coefficient))
  similarities = z @ mixed.T
  where = jnp.arange(len(z))[:, None] == anchor
  soft = jnp.full(similarities.shape, coefficient)
  return ml.general_pair_loss(similarities, soft, form=form, where=where), similarities[anchor, jnp.arange(len(anchor))]


@pytest.mark.golden
def test_golden_metrix_general(golden):
  file = golden("48-metrix")
  weight = float(re.search(r"weight w=([\d.]+\d)", file.meta["note"])[1])
  for case, arrays, _ in file.cases("gen"):
    embeddings, labels = jnp.asarray(arrays["embeddings"]), jnp.asarray(arrays["labels"])
    indices = [jnp.asarray(arrays[name]) for name in ("anchor", "first", "second")]
    coefficient = jnp.asarray(arrays["lam"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9, err_msg=case)
    for name in (key.removeprefix("out_total_") for key in arrays if key.startswith("out_total_")):
      form = FORMS[name](arrays["m"], arrays["beta"], arrays["gamma"])

      def total(embeddings, form=form, labels=labels, indices=indices, coefficient=coefficient):
        clean = ml.pair_loss(embeddings, labels, form=form, lone_anchors=True)
        mixed, similarities = of_flat_pairs(embeddings, *indices, coefficient, form)
        return jnp.mean(clean + weight * mixed), (clean, mixed, similarities)

      (value, (clean, mixed, similarities)), gradient = jax.value_and_grad(total, has_aux=True)(embeddings)
      close(similarities, arrays["mixed_similarity"])
      close(clean, arrays[f"out_clean_{name}"])
      close(mixed, arrays[f"out_mixed_{name}"])
      close(value, arrays[f"out_total_{name}"])
      close(gradient, arrays[f"grad_total_{name}"])


@pytest.mark.golden
def test_golden_metrix_official(golden):
  file = golden("48-metrix")
  said = re.search(r"weight ([\d.]+), neg_margin ([\d.]+)", " ".join(file.meta["functions"]))
  options = {"weight": float(said[1]), "margin": float(said[2])}
  for case, arrays, _ in file.cases("off"):
    inputs = [jnp.asarray(arrays[name]) for name in ("labels", "anchor", "first", "second")]
    loss = functools.partial(mm.official_contrastive_metrix_loss, coefficient=jnp.asarray(arrays["lam"]), **options)
    embeddings = jnp.asarray(arrays["embeddings"])
    found = loss(embeddings, *inputs)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8, err_msg=case)
    names = {"positive": "pos_loss", "negative": "neg_loss", "mixed": "mixed", "clean": "clean_contrastive"}
    for field, name in (names | {"total": "total"}).items():
      close(getattr(found, field), arrays[f"out_{name}"])
    for field in ("total", "mixed"):
      close(jax.grad(lambda e, f=field, g=loss, i=inputs: getattr(g(e, *i), f))(embeddings), arrays[f"grad_{field}"])
    z = ml.normalized_embeddings(embeddings)
    _, anchor, first, second = inputs
    vectors = ml.normalized_embeddings(mm.mix(z[first], z[second], coefficient=jnp.asarray(arrays["lam"])))
    close(jnp.linalg.norm(z[anchor] - vectors, axis=1), arrays["pair_distance"])


def test_selected_pairs(batch):
  """Hardest negatives by rows that leave out the anchor's class; a positive of it; only anchors that the mode names."""
  embeddings, labels = batch
  z = np.asarray(ml.normalized_embeddings(embeddings))
  found = {mode: mm.select_mix_pairs(jax.random.key(1), *batch, mode=mode, negatives=3) for mode in mm.MIXING_MODES}
  for i in range(16):
    negatives = [j for j in range(16) if labels[j] != labels[i]]
    hardest = sorted(negatives, key=lambda j: -z[i] @ z[j])[:3]
    positives = [j for j in range(16) if labels[j] == labels[i] and j != i]
    for mode, pairs in found.items():
      lone = not positives
      exists = {"positive_negative": not lone, "anchor_negative": True, "lone_anchor_negative": lone}[mode]
      assert pairs.where[i].tolist() == [exists] * 3
      if exists:
        assert pairs.second[i].tolist() == hardest
        assert pairs.first[i] in (positives if mode == "positive_negative" else [i])


def test_every_positive_is_drawn_sometimes():
  labels = jnp.array([0, 0, 0, 0, 1])
  embeddings = jax.random.normal(jax.random.key(0), (5, 3))
  draw = lambda key: mm.select_mix_pairs(key, embeddings, labels, negatives=1).first[0]
  drawn = jax.vmap(draw)(jax.random.split(jax.random.key(1), 300))
  counts = np.bincount(drawn, minlength=5)
  assert counts[0] == counts[4] == 0 and min(counts[1:4]) > 60


def test_all_negatives_and_what_does_not_count(batch):
  embeddings, labels = batch
  where = jnp.arange(16) != 3
  pairs = mm.select_mix_pairs(jax.random.key(0), embeddings.at[3].set(jnp.nan), labels.at[5].set(-1), where=where)
  assert pairs.second.shape == (16, 15)
  exists = np.asarray(pairs.where)
  assert not exists[[3, 5]].any() and not exists[[2, 4]].any()  # whose only positives do not count
  assert not np.isin(np.asarray(pairs.second)[exists], [3, 5]).any()
  assert exists[0].sum() == 12  # 16 without two of its class and two that do not count


def test_only_the_first_or_the_second_at_the_ends_of_the_coefficient(batch, pairs):
  """At 1 the mixed term is that of (repeated) positives alone, at 0 that of negatives alone."""
  z = ml.normalized_embeddings(batch[0])
  value = lambda coefficient: (
    mm.metrix_loss(*batch, pairs, coefficient=coefficient, form=MULTI_SIMILARITY, weight=1.0)
    - mm.metrix_loss(*batch, pairs, coefficient=coefficient, form=MULTI_SIMILARITY, weight=0.0)
  )
  exists = np.asarray(pairs.where).any(1)
  s_first = np.sum(z * z[pairs.first], 1)
  s_second = np.einsum("af,anf->an", z, z[pairs.second])
  positive = np.where(exists, np.log1p(3 * np.exp(-18 * (s_first - 0.77))) / 18, 0)
  negative = np.where(exists, np.log1p(np.exp(75 * (s_second - 0.77)).sum(1)) / 75, 0)
  np.testing.assert_allclose(value(1.0), positive, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(value(0.0), negative, rtol=1e-9, atol=1e-12)
  for coefficient in (0.0, 1.0):
    slope = jax.grad(
      lambda e, c: mm.metrix_loss(e, batch[1], pairs, coefficient=c, form=MULTI_SIMILARITY).sum(), (0, 1)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope(batch[0], coefficient)))


def test_additive_losses_are_affine_in_the_label():
  s, soft = jnp.linspace(-0.9, 0.9, 5)[None], jnp.array([[0.1, 0.9, 0.4, 0.0, 1.0]])
  at = lambda form, share: ml.general_pair_loss(s, share * soft + (1 - share) * (1 - soft), form=form)[0]
  for form, affine in ((ml.contrastive_form(), 1), (ml.binomial_deviance_form(), 1), (MULTI_SIMILARITY, 0)):
    middle = (at(form, 1.0) + at(form, 0.0)) / 2
    assert bool(abs(at(form, 0.5) - middle) < 1e-12) == bool(affine)


def test_sign_of_the_gradient_flips_at_the_positivity_threshold():
  beta, gamma, margin = 18.0, 75.0, 0.77
  additive = ml.PairLossForm(
    ml.PairTerm(lambda s: jnp.exp(-beta * (s - margin)) / beta),
    ml.PairTerm(lambda s: jnp.exp(gamma * (s - margin)) / gamma),
  )
  for share in (0.1, 0.5, 0.7):
    threshold = mm.positivity_threshold(share, margin=margin, beta=beta, gamma=gamma)
    slope = jax.grad(
      lambda s, share=share: ml.general_pair_loss(s[None, None], jnp.full((1, 1), share), form=additive)[0]
    )
    assert slope(threshold - 1e-8) < 0 < slope(threshold + 1e-8)
  assert mm.positivity_threshold(0.5, margin=margin, beta=beta, gamma=gamma) == margin


def test_threshold_of_the_true_form():
  """With the logarithms: the sums of the anchor, the mixed example among them, shift it."""
  beta, gamma, margin, share = 2.0, 5.0, 0.5, 0.3
  others, labels = jnp.array([0.2, 0.6, -0.1]), jnp.array([1.0, 0.0, 0.0])
  form = ml.multi_similarity_form(beta=beta, gamma=gamma, margin=margin)

  def slope(s):
    value = lambda s: ml.general_pair_loss(jnp.append(others, s)[None], jnp.append(labels, share)[None], form=form)[0]
    return jax.grad(value)(s)

  low, high = -5.0, 5.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if slope(middle) < 0 else (low, middle)
  s, y = jnp.append(others, low), jnp.append(labels, share)
  sums = jnp.sum(y * jnp.exp(-beta * (s - margin))), jnp.sum((1 - y) * jnp.exp(gamma * (s - margin)))
  threshold = mm.positivity_threshold(
    share, margin=margin, beta=beta, gamma=gamma, positive_sum=sums[0], negative_sum=sums[1]
  )
  np.testing.assert_allclose(threshold, low, rtol=1e-9)


def test_swapping_both_examples_and_the_coefficient_changes_nothing():
  rng = np.random.default_rng(0)
  z, first, second = (ml.normalized_embeddings(rng.normal(size=(4, 3))) for _ in range(3))
  similarity = lambda v: jnp.sum(z * ml.normalized_embeddings(v), axis=1, keepdims=True)
  y, other, share = jnp.ones((4, 1)), jnp.zeros((4, 1)), 0.3
  one = ml.general_pair_loss(
    similarity(mm.mix(first, second, coefficient=share)), mm.mix(y, other, coefficient=share), form=MULTI_SIMILARITY
  )
  two = ml.general_pair_loss(
    similarity(mm.mix(second, first, coefficient=1 - share)),
    mm.mix(other, y, coefficient=1 - share),
    form=MULTI_SIMILARITY,
  )
  np.testing.assert_allclose(one, two, rtol=1e-12)


def test_lengths_of_embeddings_do_not_count(batch, pairs):
  scales = np.random.default_rng(0).uniform(0.1, 10, (16, 1))
  loss = functools.partial(mm.metrix_loss, labels=batch[1], pairs=pairs, coefficient=0.4, form=MULTI_SIMILARITY)
  np.testing.assert_allclose(loss(scales * batch[0]), loss(batch[0]), rtol=1e-9)


def test_duplicated_mixtures_double_the_contrastive_loss(batch, pairs):
  double = mm.MixPairs(pairs.first, jnp.tile(pairs.second, (1, 2)), jnp.tile(pairs.where, (1, 2)))
  mixed = lambda p: (
    mm.metrix_loss(*batch, p, coefficient=0.4, form=ml.contrastive_form(), weight=1.0) - ml.contrastive_loss(*batch)
  )
  np.testing.assert_allclose(mixed(double), 2 * mixed(pairs), rtol=1e-10, atol=1e-12)


def test_hidden_layers_are_mixed_by_the_callers_function(batch, pairs):
  """Of a head that is linear without bias, mixing before it differs from mixing normalised outputs; by hand."""
  hidden, labels = batch
  weights = jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)))
  head = lambda h: jnp.tanh(h) @ weights
  mixed = lambda first, second: head(mm.mix(hidden[first][:, None], hidden[second], coefficient=0.3))
  values = mm.metrix_loss(head(hidden), labels, pairs, coefficient=0.3, form=MULTI_SIMILARITY, mixed=mixed)
  z = ml.normalized_embeddings(head(hidden))
  for i in range(16):
    total = ml.multi_similarity_loss(head(hidden), labels, beta=18.0, gamma=75.0, margin=0.77)[i]
    vectors = [
      ml.normalized_embeddings(head(0.3 * hidden[pairs.first[i]] + 0.7 * hidden[j]))
      for j, exists in zip(pairs.second[i], pairs.where[i])
      if exists
    ]
    if vectors:
      s = jnp.stack(vectors) @ z[i]
      total += 0.4 * ml.general_pair_loss(s[None], jnp.full((1, len(s)), 0.3), form=MULTI_SIMILARITY)[0]
    np.testing.assert_allclose(values[i], total, rtol=1e-10)


def test_gradients_reach_anchor_and_both_mixed_examples(batch, pairs):
  value = lambda e: mm.metrix_loss(e, batch[1], pairs, coefficient=0.3, form=ml.contrastive_form())[0]
  clean = lambda e: ml.contrastive_loss(e, batch[1])[0]
  moved = np.abs(jax.grad(value)(batch[0]) - jax.grad(clean)(batch[0])).max(1) > 1e-9
  assert set(np.flatnonzero(moved)) == {0, int(pairs.first[0]), *map(int, pairs.second[0])}


def test_devices_give_the_values_and_gradients_of_one(batch):
  embeddings, labels = batch
  options = dict(coefficient=0.3, form=MULTI_SIMILARITY)
  pairs = mm.select_mix_pairs(jax.random.key(0), *batch, negatives=3)  # no class has a choice of positives
  total = lambda e, y, p, **k: mm.metrix_loss(e, y, p, **options, **k).sum()
  expected = jax.value_and_grad(total)(embeddings, labels, pairs)
  split = lambda x: x.reshape(8, 2, *x.shape[1:])

  def part(e, y):
    chosen = mm.select_mix_pairs(jax.random.key(0), e, y, negatives=3, axis_name="devices")
    return chosen, jax.value_and_grad(total)(e, y, chosen, axis_name="devices")

  chosen, (value, gradient) = jax.pmap(part, axis_name="devices")(split(embeddings), split(labels))
  flat = jax.tree.map(lambda x: x.reshape(16, *x.shape[2:]), chosen)
  jax.tree.map(np.testing.assert_array_equal, flat, pairs)
  np.testing.assert_allclose(value.sum(), expected[0], rtol=1e-10)
  np.testing.assert_allclose(gradient.reshape(16, -1), expected[1], rtol=1e-9, atol=1e-11)


def test_finite_in_float32_at_extreme_similarities():
  form = ml.multi_similarity_form(beta=17.97, gamma=75.66, margin=0.77)
  rows = jnp.asarray([[1, 0], [-1, 0], [1, 0], [-1, 0], [1, 1e-4], [0, 0]], jnp.float32)
  labels = jnp.array([0, 0, 1, 1, 2, 3])
  pairs = mm.select_mix_pairs(jax.random.key(0), rows, labels)
  for coefficient in (0.0, 1e-6, 0.5, 1.0):
    loss = lambda e, c=coefficient: mm.metrix_loss(e, labels, pairs, coefficient=c, form=form).sum()
    value, gradient = jax.value_and_grad(loss)(rows)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bad_input(batch, pairs):
  with pytest.raises(ValueError, match="mode must be one of"):
    mm.select_mix_pairs(jax.random.key(0), *batch, mode="positive_positive")
  with pytest.raises(ValueError, match="negatives must be positive"):
    mm.select_mix_pairs(jax.random.key(0), *batch, negatives=0)
  with pytest.raises(ValueError, match="coefficient must lie in"):
    mm.metrix_loss(*batch, pairs, coefficient=1.5, form=MULTI_SIMILARITY)
  with pytest.raises(ValueError, match="pairs must be those of"):
    mm.metrix_loss(batch[0][:4], batch[1][:4], pairs, coefficient=0.5, form=MULTI_SIMILARITY)
  with pytest.raises(ValueError, match="mixed must give embeddings"):
    mm.metrix_loss(*batch, pairs, coefficient=0.5, form=MULTI_SIMILARITY, mixed=lambda first, second: jnp.ones((2, 2)))


def _draw_pairs(rng):
  embeddings, labels = draw_embeddings(rng)
  negatives = (np.arange(EXAMPLES)[:, None] + [1, 2, 3]) % EXAMPLES
  positives = (np.arange(EXAMPLES) + 5) % EXAMPLES
  return embeddings, labels, mm.MixPairs(positives, negatives, negatives % 4 > 0)


def _draw_flat(rng):
  embeddings, labels = draw_embeddings(rng)
  return embeddings, labels, *(rng.integers(0, EXAMPLES, 9).astype(np.int32) for _ in range(3))


def _metrix(embeddings, labels, pairs, **options):
  return mm.metrix_loss(embeddings, labels, pairs, form=MULTI_SIMILARITY, **options)


ROWS = [
  row(
    mm.metrix_loss,
    _draw_pairs,
    call=_metrix,
    bad=BAD_EMBEDDINGS,
    examples="reduced",
    options=dict(coefficient=(0.0, 1.0), weight=(0.0, 1.0)),
  ),
  row(
    mm.select_mix_pairs,
    draw_embeddings,
    call=lambda e, y: mm.select_mix_pairs(jax.random.key(0), e, y, negatives=3),
    bad=BAD_EMBEDDINGS,
    examples="reduced",
    differentiable=False,
    wide=True,
  ),
  row(
    mm.mix,
    lambda rng: (rng.normal(size=(EXAMPLES, 6)), rng.normal(size=(EXAMPLES, 6))),
    bad=(
      ("first", lambda a, b: (a.astype(np.int32), b)),
      ("second", lambda a, b: (a, b.astype(np.int32))),
    ),
    examples="any",
    options=dict(coefficient=(0.0, 1.0)),
  ),
  row(
    mm.official_contrastive_metrix_loss,
    _draw_flat,
    bad=(
      *BAD_EMBEDDINGS,
      ("anchor", lambda e, y, a, *rest: (e, y, a * 1.0, *rest)),
      ("shapes", lambda e, y, a, *rest: (e, y, a[1:], *rest)),
    ),
    options=dict(coefficient=(0.1, 0.9), margin=(0.5, 1.5), weight=(0.2, 1.0)),
  ),
  row(
    mm.positivity_threshold,
    lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES),),
    extreme=unchanged,
    bad=(("coefficient", lambda c: (c.astype(np.int32),)),),
    examples="any",
    wide=True,
    options=dict(margin=(0.2, 0.8), beta=(1.0, 20.0), gamma=(20.0, 80.0)),
  ),
]

EXEMPT = {
  "MIXING_MODES": "names",
  "MixPairs": "the result of select_mix_pairs",
  "OfficialMetrixLoss": "the result of official_contrastive_metrix_loss",
}
