"""Losses of pairs: loops over pairs, masks, chunks, devices, other libraries' values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxreg.losses import metric_learning as ml
from tests.conformance import CLASSES, EXAMPLES, row

pytestmark = pytest.mark.usefixtures("x64")

LOSSES = {
  "contrastive": functools.partial(ml.contrastive_loss, margin=0.3),
  "contrastive, means": functools.partial(ml.contrastive_loss, margin=0.3, reduction="mean"),
  "multi-similarity": functools.partial(ml.multi_similarity_loss, beta=18.0, gamma=75.0, margin=0.7),
  "binomial deviance": functools.partial(ml.pair_loss, form=ml.binomial_deviance_form()),
  "supcon": functools.partial(ml.supcon_loss, temperature=0.1),
  "lifted structure": functools.partial(ml.pair_loss, form=ml.lifted_structure_form(margin=0.5)),
  "nca": functools.partial(ml.pair_loss, form=ml.nca_form(temperature=0.2)),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(16, 6))), jnp.asarray([0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4, 4, 5, 5, 1])


def unit(x):
  return np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)


def brute_force(embeddings, labels, of_pairs):
  """`of_pairs(positive similarities, negative similarities)` of each anchor; 0 without positives."""
  z, labels = unit(embeddings), np.asarray(labels)
  values = []
  for i in range(len(z)):
    pairs = {True: [], False: []}
    for j in range(len(z)):
      if i != j:
        pairs[bool(labels[i] == labels[j])].append(z[i] @ z[j])
    values.append(of_pairs(np.array(pairs[True]), np.array(pairs[False])) if pairs[True] else 0.0)
  return np.array(values)


BY_LOOPS = {
  "contrastive": lambda p, n: -p.sum() + np.maximum(n - 0.3, 0).sum(),
  "contrastive, means": lambda p, n: -p.mean() + np.maximum(n - 0.3, 0).mean(),
  "multi-similarity": lambda p, n: (
    np.log1p(np.exp(-18 * (p - 0.7)).sum()) / 18 + np.log1p(np.exp(75 * (n - 0.7)).sum()) / 75
  ),
  "binomial deviance": lambda p, n: np.log1p(np.exp(-2 * (p - 0.5))).sum() + np.log1p(np.exp(40 * (n - 0.5))).sum(),
  "supcon": lambda p, n: np.mean([np.log(np.exp(np.r_[p, n] / 0.1).sum()) - s / 0.1 for s in p]),
  "lifted structure": lambda p, n: max(np.log(np.exp(-p).sum()) + np.log(np.exp(n - 0.5).sum()), 0),
  "nca": lambda p, n: -np.log(np.exp(p / 0.2).sum()) + np.log(np.exp(n / 0.2).sum()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_loop_over_pairs(name, batch):
  np.testing.assert_allclose(LOSSES[name](*batch), brute_force(*batch, BY_LOOPS[name]), rtol=1e-11, atol=1e-12)


def test_lone_anchors_count_as_in_pytorch_metric_learning(batch):
  """There an anchor without positives has the term of its negatives."""
  embeddings, labels = batch
  values = ml.multi_similarity_loss(embeddings, labels, lone_anchors=True)
  lone = np.asarray(labels) == 3
  z = unit(embeddings)
  negatives = np.delete(z @ z[lone][0], np.flatnonzero(lone))
  np.testing.assert_allclose(values[lone], np.log1p(np.exp(40 * (negatives - 0.5)).sum()) / 40, rtol=1e-12)
  np.testing.assert_allclose(values[~lone], ml.multi_similarity_loss(embeddings, labels)[~lone], rtol=1e-12)


@every_loss
def test_general_form_of_hard_labels(loss, batch):
  """The same loss from a matrix of similarities and relative labels 0 and 1."""
  embeddings, labels = batch
  forms = {
    "contrastive_loss": ml.contrastive_form, "multi_similarity_loss": ml.multi_similarity_form,
    "supcon_loss": ml.supcon_form,
  }  # fmt: skip
  keywords = dict(loss.keywords) if isinstance(loss, functools.partial) else {}
  name = (loss.func if isinstance(loss, functools.partial) else loss).__name__
  form = keywords["form"] if name == "pair_loss" else forms[name](**keywords)
  z = ml.normalized_embeddings(embeddings)
  same = (labels[:, None] == labels).astype(jnp.float64)
  others = ~jnp.eye(len(z), dtype=bool)
  values = ml.general_pair_loss(z @ z.T, same, form=form, where=others)
  has_positive = np.asarray((same * others).sum(1) > 0)
  np.testing.assert_allclose(values[has_positive], loss(embeddings, labels)[has_positive], rtol=1e-10, atol=1e-12)


def test_proxy_anchor_form():
  rng = np.random.default_rng(3)
  similarities, labels = rng.uniform(-1, 1, (3, 7)), np.array([0, 1, 1, 0, 0, 1, 0])  # the last proxy has no positives
  soft = (labels == np.arange(3)[:, None]).astype(float)
  values = ml.general_pair_loss(similarities, soft, form=ml.proxy_anchor_form(alpha=5.0, margin=0.1))
  for index in range(3):
    positive, negative = similarities[index][labels == index], similarities[index][labels != index]
    expected = np.log1p(np.exp(-5 * (positive - 0.1)).sum()) + np.log1p(np.exp(5 * (negative + 0.1)).sum())
    np.testing.assert_allclose(values[index], expected, rtol=1e-12)


def test_supcon_of_unique_labels_with_two_views_is_ntxent():
  rng = np.random.default_rng(1)
  embeddings, labels = jnp.asarray(rng.normal(size=(12, 5))), jnp.tile(jnp.arange(6), 2)
  ours = ml.supcon_loss(embeddings, labels, temperature=0.2).mean()
  np.testing.assert_allclose(ours, optax.losses.ntxent(embeddings, labels, temperature=0.2), rtol=1e-6)
  z = unit(embeddings)
  logits = z @ z.T / 0.2 - 1e9 * np.eye(12)
  log_softmax = np.asarray(jax.nn.log_softmax(logits))
  np.testing.assert_allclose(ours, -np.mean(log_softmax[np.arange(12), (np.arange(12) + 6) % 12]), rtol=1e-12)


@every_loss
def test_lengths_of_embeddings_do_not_count(loss, batch):
  embeddings, labels = batch
  scales = jnp.asarray(np.random.default_rng(2).uniform(1e-3, 1e3, (16, 1)))
  np.testing.assert_allclose(loss(scales * embeddings, labels), loss(embeddings, labels), rtol=1e-9, atol=1e-10)


@every_loss
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 100])
def test_chunks_give_the_same(loss, chunk_size, batch):
  embeddings, labels = batch
  total = lambda e, **options: (loss(e, labels, **options) * jnp.arange(1.0, 17)).sum()
  expected = jax.value_and_grad(total)(embeddings)
  actual = jax.jit(jax.value_and_grad(functools.partial(total, chunk_size=chunk_size)))(embeddings)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-11), actual, expected)


@every_loss
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_devices_give_the_values_and_gradients_of_one(loss, chunk_size, batch):
  embeddings, labels = batch
  labels = labels.at[2].set(-1)
  total = lambda e, y, **options: loss(e, y, **options).sum()
  expected = jax.value_and_grad(total)(embeddings, labels)
  split = lambda x: x.reshape(8, 2, *x.shape[1:])
  part = jax.value_and_grad(functools.partial(total, axis_name="devices", chunk_size=chunk_size))
  value, gradient = jax.pmap(part, axis_name="devices")(split(embeddings), split(labels))
  np.testing.assert_allclose(value.sum(), expected[0], rtol=1e-10)
  np.testing.assert_allclose(gradient.reshape(16, -1), expected[1], rtol=1e-9, atol=1e-11)
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  spec = PartitionSpec("devices")
  mapped = jax.shard_map(
    lambda e, y: jax.tree.map(lambda x: x[None] if x.ndim == 0 else x, part(e, y)),
    mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False,
  )  # fmt: skip
  value, gradient = jax.jit(mapped)(embeddings, labels)
  np.testing.assert_allclose(value.sum(), expected[0], rtol=1e-10)
  np.testing.assert_allclose(gradient, expected[1], rtol=1e-9, atol=1e-11)
  if chunk_size is None:
    place = lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    actual = jax.jit(jax.value_and_grad(total))(place(embeddings), place(labels))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), actual, expected)


@every_loss
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_what_does_not_count_is_as_if_it_were_not_there(loss, chunk_size, batch):
  embeddings, labels = batch
  out = np.zeros(16, bool)
  out[[1, 6, 9, 12]] = True
  where = ~out
  where[1] = True
  hidden = labels.at[1].set(-100)  # by its label; the others by the mask
  spoiled = jnp.where(out[:, None], jnp.nan, embeddings)
  total = lambda e, y, **options: (lambda v: (v.sum(), v))(loss(e, y, chunk_size=chunk_size, **options))
  (_, values), gradient = jax.value_and_grad(total, has_aux=True)(spoiled, hidden, where=where)
  (_, expected), slope = jax.value_and_grad(total, has_aux=True)(embeddings[~out], labels[~out])
  np.testing.assert_allclose(values[~out], expected, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(gradient[~out], slope, rtol=1e-9, atol=1e-12)
  assert not np.any(values[out]) and not np.any(gradient[out])


@every_loss
def test_nothing_to_compare(loss):
  """One class, no class twice, nothing that counts, one example: finite, and 0 where there is no positive."""
  embeddings = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
  for labels in ([0, 0, 0, 0], [0, 1, 2, 3], [-1, -1, -1, -1], [5, -1, -1, -1]):
    value, gradient = jax.value_and_grad(lambda e, y=labels: loss(e, np.array(y)).sum())(embeddings)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if labels[:2] != [0, 0]:
      assert value == 0 and not gradient.any()
  assert loss(embeddings[:1], jnp.array([0])).tolist() == [0]


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_finite_at_extremes(loss, dtype):
  """Equal, opposite, zero, tiny and huge embeddings."""
  rows = np.array([[1, 0], [1, 0], [-1, 0], [0, 0], [0, 0], [1e-7, 1e-7], [6e4, 6e4], [-6e4, 6e4]])
  labels = jnp.array([0, 1, 0, 1, 0, 1, 0, 1], jnp.uint8)
  value, gradient = jax.value_and_grad(lambda e: loss(e, labels).astype(jnp.float32).sum())(jnp.asarray(rows, dtype))
  assert np.isfinite(value) and np.isfinite(np.asarray(gradient, np.float32)).all() and gradient.dtype == dtype


def test_memory_of_chunks_grows_linearly():
  """A batch of 32,768 in chunks: the compiled program needs far less than one matrix of pairs."""
  size = 32_768
  shapes = jax.ShapeDtypeStruct((size, 16), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32)
  gradient = jax.grad(lambda e, y: ml.multi_similarity_loss(e, y, chunk_size=256).mean())
  memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.1 * 4 * size**2


def test_gradient_in_traced_hyperparameters(batch):
  total = lambda margin: ml.multi_similarity_loss(*batch, margin=margin).sum()
  step = 1e-6
  np.testing.assert_allclose(jax.grad(total)(0.5), (total(0.5 + step) - total(0.5 - step)) / (2 * step), rtol=1e-7)


def test_unnormalised_similarities(batch):
  embeddings, labels = batch
  unit_rows = ml.normalized_embeddings(embeddings)
  form = ml.contrastive_form(margin=0.2)
  np.testing.assert_allclose(
    ml.pair_loss(unit_rows, labels, form=form, normalize=False), ml.pair_loss(embeddings, labels, form=form), rtol=1e-12
  )


def test_bad_input(batch):
  embeddings, labels = batch
  with pytest.raises(ValueError, match="form must be a PairLossForm"):
    ml.pair_loss(embeddings, labels, form="contrastive")
  with pytest.raises(ValueError, match="reduction must be one of"):
    ml.pair_loss(embeddings, labels, form=ml.PairLossForm(ml.PairTerm(jnp.negative, "max"), ml.PairTerm(jnp.negative)))
  with pytest.raises(ValueError, match="reduction must be sum or mean"):
    ml.contrastive_form(reduction="max")
  with pytest.raises(ValueError, match="chunk_size must be positive"):
    ml.supcon_loss(embeddings, labels, chunk_size=0)
  with pytest.raises(ValueError, match="where must be boolean"):
    ml.supcon_loss(embeddings, labels, where=jnp.ones(16))
  with pytest.raises(ValueError, match="soft_labels must broadcast"):
    ml.general_pair_loss(jnp.ones((2, 3)), jnp.ones((3, 2)), form=ml.contrastive_form())


def draw_embeddings(rng):
  return rng.normal(size=(EXAMPLES, 6)), np.resize(np.arange(CLASSES), EXAMPLES).astype(np.int32)


BAD_EMBEDDINGS = (
  ("labels", lambda e, y, *rest: (e, y[1:], *rest)),
  ("labels", lambda e, y, *rest: (e, y[:, None], *rest)),
  ("labels", lambda e, y, *rest: (e, y * 1.0, *rest)),
  ("embeddings", lambda e, y, *rest: (e[0], y, *rest)),
  ("embeddings", lambda e, y, *rest: (e.astype(np.int32), y, *rest)),
)


def embedding_row(function, *, call=None, **options):
  """`function(embeddings, labels, **options)`, a value per anchor that depends on the whole batch."""
  return row(function, draw_embeddings, call=call, bad=BAD_EMBEDDINGS, examples="reduced", options=options)


ROWS = [
  embedding_row(ml.contrastive_loss, margin=(0.0, 0.5)),
  embedding_row(ml.contrastive_loss, margin=(0.0, 0.5), reduction="mean", chunk_size=3),
  embedding_row(ml.multi_similarity_loss, beta=(1.0, 20.0), gamma=(10.0, 80.0), margin=(0.2, 0.8)),
  embedding_row(ml.multi_similarity_loss, beta=(1.0, 20.0), chunk_size=5),
  embedding_row(ml.supcon_loss, temperature=(0.1, 1.0)),
  embedding_row(ml.supcon_loss, temperature=(0.1, 1.0), chunk_size=4),
  embedding_row(
    ml.pair_loss, call=lambda e, y, **options: ml.pair_loss(e, y, form=ml.lifted_structure_form(), **options)
  ),
  row(
    ml.general_pair_loss,
    lambda rng: (rng.uniform(-1, 1, (EXAMPLES, 6)), rng.uniform(size=(EXAMPLES, 6))),
    call=lambda s, y: ml.general_pair_loss(s, y, form=ml.multi_similarity_form()),
    extreme=lambda s, y: (np.resize([1.0, -1.0, 0.0], s.shape), np.resize([0.0, 1.0, 0.5, 1e-4], y.shape)),
    bad=(
      ("similarities", lambda s, y: (s.astype(np.int32), y)),
      ("similarities", lambda s, y: (s[0], y[0])),
      ("soft_labels", lambda s, y: (s, y[1:])),
      ("soft_labels", lambda s, y: (s, y.astype(np.int32))),
    ),
    examples="batch",
  ),
  row(
    ml.normalized_embeddings,
    lambda rng: (rng.normal(size=(EXAMPLES, 6)),),
    bad=(("embeddings", lambda e: (e.astype(np.int32),)), ("embeddings", lambda e: (e[0, 0],))),
    examples="any",
    wide=True,
  ),
]

_FORM = "functions of similarities, in rows and tests of the losses that they make"
EXEMPT = {
  "PairLossForm": "holds functions",
  "PairTerm": "holds functions",
  "binomial_deviance_form": _FORM,
  "contrastive_form": _FORM,
  "lifted_structure_form": _FORM,
  "multi_similarity_form": _FORM,
  "nca_form": _FORM,
  "proxy_anchor_form": _FORM,
  "supcon_form": _FORM,
}
