"""Closed forms of a linear head: against automatic differentiation, masks, sizes, and broadcasting environments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.regularizers import linear_head
from tests.conformance import row

ENVIRONMENTS, BATCH, FEATURES = 3, 7, 4


def draw(rng, classes=3, shape=(ENVIRONMENTS, BATCH)):
  features = rng.normal(size=(*shape, FEATURES))
  labels = rng.integers(0, max(classes, 2), shape).astype(np.int32)
  return features, labels, draw_head(rng, classes)


def draw_head(rng, classes=3):
  return {"kernel": rng.normal(size=(FEATURES, classes)), "bias": rng.normal(size=classes)}


def mean_loss(head, features, labels):
  logits = features @ head["kernel"] + head.get("bias", 0)
  if logits.shape[-1] == 1:
    return optax.sigmoid_binary_cross_entropy(logits[..., 0], labels).mean()
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def spoiled_head(spoil):
  return lambda x, *rest: (x, *rest[:-1], spoil(rest[-1]))


BAD_HEAD = (
  ("head", spoiled_head(lambda head: {"bias": head["bias"]})),
  ("head", spoiled_head(lambda head: {**head, "scale": head["bias"]})),
  ("head", spoiled_head(lambda head: {**head, "kernel": head["kernel"][1:]})),
  ("head", spoiled_head(lambda head: {**head, "bias": head["bias"][1:]})),
  ("head", spoiled_head(lambda head: {**head, "bias": head["bias"].astype(np.int32)})),
  ("head", spoiled_head(lambda head: head["kernel"])),
)
BAD_LABELS = (
  ("features", lambda x, *rest: (x.astype(np.int32), *rest)),
  ("features", lambda x, y, head: (x[0, 0], y, head)),
  ("labels", lambda x, y, head: (x, y[1:], head)),
  ("labels", lambda x, y, head: (x, y * 1.0, head)),
  *BAD_HEAD,
)
ROWS = [
  row(linear_head.head_gradient, draw, bad=BAD_LABELS),
  row(linear_head.head_gradient_variance, draw, bad=BAD_LABELS),
  row(linear_head.head_gradient_square_norms, draw, bad=BAD_LABELS),
  row(
    linear_head.head_hessian_product,
    lambda rng: (draw(rng)[0], draw_head(rng), draw_head(rng)),
    bad=(
      ("features", lambda x, *rest: (x[0, 0], *rest)),
      ("direction", lambda x, h, u: (x, h, {"kernel": u["kernel"]})),
      ("direction", lambda x, h, u: (x, h, {**u, "kernel": u["kernel"][1:]})),
      ("direction", lambda x, h, u: (x, h, u["kernel"])),
    ),
  ),
  row(linear_head.head_hessian_diagonal, lambda rng: (draw(rng)[0], draw_head(rng)), bad=BAD_HEAD),
]


def assert_trees(found, expected, **options):
  options = {"rtol": 1e-12, "atol": 1e-12, **options}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), found, expected)


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["moderate", "saturated"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_closed_forms_are_the_derivatives(classes, scale, x64):
  rng = np.random.default_rng(0)
  features, labels, head = draw(rng, classes)
  head = jax.tree.map(lambda x: jnp.asarray(scale * x), head)
  direction = draw_head(rng, classes)

  @jax.jit
  def both(features, labels):
    gradient = jax.grad(mean_loss)
    own = lambda f: functools.partial(gradient, features=features, labels=labels)
    _, product = jax.jvp(own(None), (head,), (direction,))
    each = jax.vmap(lambda x, y: gradient(head, x[None], y[None]))(features, labels)
    norms = jax.tree.map(lambda g: jnp.mean(jnp.sum(g.reshape(len(g), -1) ** 2, axis=1)), each)
    expected = own(None)(head), product, jax.tree.map(lambda g: jnp.var(g, axis=0), each), norms
    hessian = jax.hessian(mean_loss)(head, features, labels)
    diagonal = {
      "kernel": jnp.einsum("kckc->kc", hessian["kernel"]["kernel"]),
      "bias": jnp.diag(hessian["bias"]["bias"]),
    }
    found = (
      linear_head.head_gradient(features, labels, head),
      linear_head.head_hessian_product(features, head, direction),
      linear_head.head_gradient_variance(features, labels, head),
      linear_head.head_gradient_square_norms(features, labels, head),
      linear_head.head_hessian_diagonal(features, head),
    )
    return found, (*expected, diagonal)

  for environment in range(ENVIRONMENTS):
    assert_trees(*both(features[environment], labels[environment]))


def test_environments_broadcast(x64):
  rng = np.random.default_rng(1)
  features, labels, head = draw(rng)
  own = {"kernel": rng.normal(size=(ENVIRONMENTS, FEATURES, 3)), "bias": rng.normal(size=(ENVIRONMENTS, 3))}
  for function in (linear_head.head_gradient, linear_head.head_gradient_variance):
    assert_trees(function(features, labels, head), jax.vmap(lambda x, y, f=function: f(x, y, head))(features, labels))
  product = jax.vmap(lambda x, u: linear_head.head_hessian_product(x, head, u))(features, own)
  assert_trees(linear_head.head_hessian_product(features, head, own), product)
  centred = functools.partial(linear_head.head_gradient_variance, head=head)
  expected = jax.vmap(lambda x, y, m: centred(x, y, center=m))(features, labels, own)
  assert_trees(centred(features, labels, center=own), expected)


def test_identities_of_the_softmax_head(x64):
  rng = np.random.default_rng(2)
  features, labels, head = draw(rng, shape=(BATCH,))
  gradient = linear_head.head_gradient(features, labels, head)
  norm, slope = jax.value_and_grad(lambda h: optax.global_norm(linear_head.head_gradient(features, labels, h)))(head)
  product = linear_head.head_hessian_product(features, head, gradient)
  assert_trees(product, jax.tree.map(lambda g: norm * g, slope))
  for tree in (gradient, product):
    assert_trees(jax.tree.map(lambda x: x.sum(-1), tree), {"kernel": np.zeros(FEATURES), "bias": np.zeros(())})
  one, two = draw_head(rng), draw_head(rng)
  inner = lambda u, v: optax.tree.vdot(u, linear_head.head_hessian_product(features, head, v))
  np.testing.assert_allclose(inner(one, two), inner(two, one), rtol=1e-12)
  assert inner(one, one) >= 0


def test_variance_about_another_centre(x64):
  rng = np.random.default_rng(3)
  features, labels, head = draw(rng, shape=(BATCH,))
  center = draw_head(rng)
  each = jax.vmap(lambda x, y: jax.grad(mean_loss)(head, x[None], y[None]))(features, labels)
  expected = jax.tree.map(lambda g, m: jnp.mean((g - m) ** 2, axis=0), each, center)
  assert_trees(linear_head.head_gradient_variance(features, labels, head, center=center), expected)
  # About zero it sums to the squared norms.
  zero = jax.tree.map(np.zeros_like, head)
  total = jax.tree.map(jnp.sum, linear_head.head_gradient_variance(features, labels, head, center=zero))
  assert_trees(total, linear_head.head_gradient_square_norms(features, labels, head))
  alone = linear_head.head_gradient_variance(features[:1], labels[:1], head)
  assert_trees(alone, zero)


def test_small_variance_beside_a_large_mean():
  rng = np.random.default_rng(4)
  features = np.asarray(1000 + rng.normal(size=(BATCH, FEATURES)), np.float32)
  head = {"kernel": np.zeros((FEATURES, 2), np.float32)}
  found = linear_head.head_gradient_variance(features, np.zeros(BATCH, np.int32), head)["kernel"]
  expected = np.var(np.asarray(features, float) / 2, axis=0)
  np.testing.assert_allclose(found, np.stack([expected, expected], axis=1), rtol=1e-4)


def test_what_does_not_count_is_not_read():
  rng = np.random.default_rng(5)
  features, labels, head = draw(rng)
  head = jax.tree.map(np.float32, head)
  mask = np.ones((ENVIRONMENTS, BATCH), bool)
  mask[:, 5:] = False
  mask[2] = False  # an environment without examples
  spoiled, outside = np.where(mask[..., None], features, np.nan).astype(np.float32), np.where(mask, labels, -100)

  def all_of(features, labels, where):
    unlabelled = mask[: len(features), : features.shape[1]]  # what depends on no label
    total = jax.tree.map(
      lambda *leaves: jnp.stack([jnp.sum(jnp.sin(leaf), axis=range(1, leaf.ndim)) for leaf in leaves]),
      linear_head.head_gradient(features, labels, head, where=where),
      linear_head.head_gradient_variance(features, labels, head, where=where, center=head),
      linear_head.head_gradient_square_norms(features, labels, head, where=where),
      linear_head.head_hessian_product(features, head, head, where=unlabelled),
      linear_head.head_hessian_diagonal(features, head, where=unlabelled),
    )
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, total)), total

  kept = features[:2, :5].astype(np.float32)
  (_, expected), slope = jax.value_and_grad(all_of, has_aux=True)(kept, labels[:2, :5], None)
  for given, where in ((labels, mask), (outside, None)):
    (_, found), gradient = jax.value_and_grad(all_of, has_aux=True)(spoiled, given, where)
    assert_trees(jax.tree.map(lambda x: x[:, :2], found), expected, rtol=1e-5, atol=1e-6)
    assert not any(np.any(leaf[:, 2]) for leaf in jax.tree.leaves(found))
    np.testing.assert_allclose(gradient[:2, :5], slope, rtol=1e-4, atol=1e-5)
    assert np.isfinite(gradient).all() and not np.any(gradient[~mask])


def test_a_head_without_bias_and_narrow_labels(x64):
  features, labels, head = draw(np.random.default_rng(6), shape=(BATCH,))
  head = {"kernel": head["kernel"]}
  found = linear_head.head_gradient(features, labels.astype(np.uint8), head)
  assert_trees(found, jax.grad(mean_loss)(head, features, labels))
