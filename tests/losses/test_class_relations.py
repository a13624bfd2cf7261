"""Class-relation distillation: golden vectors with targets and total, the card's exact tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import class_relations, swapped_prediction_loss
from jaxreg.losses.class_relations import class_relation_kd_loss
from jaxreg.solvers import sinkhorn_assignment
from tests.conformance import draw_logits, extreme_logits, row

pytestmark = pytest.mark.usefixtures("x64")
KNOWN = 3
# Views, heads, examples, classes.
LOGITS = np.tanh(np.random.default_rng(0).normal(size=(2, 2, 6, 5)))
TEACHER = np.tanh(np.random.default_rng(1).normal(size=(2, 2, 6, KNOWN)))
UNLABELLED = np.broadcast_to([True, False, True, True, False, True], (2, 2, 6))


def _per_head(values, where):
  """The mean over views and the examples that count, `[heads]`."""
  return jnp.sum(values, axis=(0, 2)) / jnp.maximum(jnp.sum(where, axis=(0, 2)), 1)


@pytest.mark.golden
def test_golden_class_relation_kd(golden):
  names = []
  file = golden("35-class_relation_kd")
  assert file.meta.pop("cases") and file.meta["layout"].startswith("logits axes: (view, head, sample, class)")
  for name, arrays, _ in file.cases("case"):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10, err_msg=name)
    logits, frozen = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["old_logits_lab"])
    large, known = int(arrays["num_large_crops"]), int(arrays["num_labeled"])
    labelled = jnp.asarray(arrays["mask_lab"])
    where = jnp.broadcast_to(~labelled, logits[:large].shape[:-1])
    novel = sinkhorn_assignment(logits[:large, ..., known:], where=~labelled)
    one_hot = jax.nn.one_hot(arrays["labels"], logits.shape[-1])
    spread = jnp.concatenate([jnp.zeros((*novel.shape[:-1], known)), novel], axis=-1)
    targets = jnp.where(labelled[:, None], one_hot, spread)
    close(targets, arrays["sk_targets"][:large])

    def relation(z, large=large, frozen=frozen, where=where, arrays=arrays):
      options = dict(temperature=arrays["tau"], kd_temperature=arrays["kd_T"])
      return _per_head(class_relation_kd_loss(z[:large], frozen[:large], where=where, **options), where)

    def swapped(z, targets=targets, arrays=arrays):
      return swapped_prediction_loss(z, targets, temperature=arrays["tau"]).mean(-1)

    weighted = lambda z, relation=relation, arrays=arrays: arrays["alpha"] * relation(z).mean()
    total = lambda z, weighted=weighted, swapped=swapped: swapped(z).mean() + weighted(z)
    close(relation(logits), arrays["out_kd_per_head"])
    close(weighted(logits), arrays["out_kd_weighted"])
    close(swapped(logits), arrays["out_swapped_per_head"])
    close(total(logits), arrays["out_total"])
    close(jax.grad(total)(logits), arrays["grad_logits_total"])
    close(jax.grad(weighted)(logits), arrays["grad_logits_kd"])
  assert names


def test_weights_have_mean_one():
  scores = LOGITS / 0.4
  weights = class_relations._normalized_mass(jnp.asarray(scores), KNOWN, UNLABELLED, None)
  np.testing.assert_allclose(jnp.mean(weights, where=UNLABELLED), 1, atol=1e-12)
  mass = jax.nn.softmax(scores)[..., :KNOWN].sum(-1)
  np.testing.assert_allclose(weights, jnp.where(UNLABELLED, mass / jnp.mean(mass, where=UNLABELLED), 0), atol=1e-12)


def test_without_novel_classes_it_is_plain_distillation():
  gone = jnp.asarray(LOGITS).at[..., KNOWN:].set(-1e9)
  p, log_q = jax.nn.softmax(TEACHER / 0.4), jax.nn.log_softmax(LOGITS[..., :KNOWN] / 0.4)
  expected = -16 * jnp.sum(p * log_q, axis=-1)
  np.testing.assert_allclose(class_relation_kd_loss(gone, TEACHER), expected, rtol=1e-12)
  np.testing.assert_allclose(class_relation_kd_loss(LOGITS[..., :KNOWN], TEACHER), expected, rtol=1e-12)
  entropy = -16 * jnp.sum(p * jnp.log(p), axis=-1)
  divergence = class_relation_kd_loss(gone, TEACHER, divergence="kl")
  np.testing.assert_allclose(divergence, expected - entropy, rtol=1e-9)


def test_a_student_that_agrees():
  """No gradient with constant weights, or with the divergence; cross-entropy still moves the weights."""
  agrees = jnp.concatenate([TEACHER, LOGITS[..., KNOWN:]], axis=-1)
  gradient = lambda **options: jax.grad(lambda z: class_relation_kd_loss(z, TEACHER, **options).sum())(agrees)
  np.testing.assert_allclose(gradient(stop_weight_gradient=True), 0, atol=1e-12)
  np.testing.assert_allclose(gradient(divergence="kl"), 0, atol=1e-12)
  assert np.abs(gradient()).max() > 1e-2
  p = jax.nn.softmax(TEACHER / 0.4)
  weights = class_relations._normalized_mass(agrees / 0.4, KNOWN, jnp.ones_like(UNLABELLED), None)
  expected = -16 * weights * jnp.sum(p * jnp.log(p), axis=-1)
  np.testing.assert_allclose(class_relation_kd_loss(agrees, TEACHER), expected, rtol=1e-10)


def test_labelled_examples_and_the_teacher_have_no_gradient():
  loss = lambda z, teacher: class_relation_kd_loss(z, teacher, where=UNLABELLED).sum()
  gradient, on_teacher = jax.grad(loss, (0, 1))(jnp.asarray(LOGITS), jnp.asarray(TEACHER))
  assert not np.any(gradient[~UNLABELLED]) and np.any(gradient[UNLABELLED]) and not np.any(on_teacher)
  spoiled = jnp.where(UNLABELLED[..., None], LOGITS, jnp.nan), jnp.where(UNLABELLED[..., None], TEACHER, jnp.nan)
  np.testing.assert_allclose(loss(*spoiled), loss(LOGITS, TEACHER), rtol=1e-12)
  np.testing.assert_allclose(jax.grad(loss)(*spoiled), gradient, rtol=1e-12)


def test_the_order_of_novel_classes_does_not_matter():
  order = np.array([0, 1, 2, 4, 3])
  np.testing.assert_allclose(
    class_relation_kd_loss(LOGITS[..., order], TEACHER), class_relation_kd_loss(LOGITS, TEACHER), rtol=1e-12
  )
  equal_heads, teacher = jnp.stack([LOGITS[:, 0]] * 2, axis=1), jnp.stack([TEACHER[:, 0]] * 2, axis=1)
  values = class_relation_kd_loss(equal_heads, teacher)
  np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-12)


@pytest.mark.parametrize("divergence", class_relations.DIVERGENCES)
def test_nothing_unlabelled_and_everything(divergence):
  for where in (jnp.zeros_like(UNLABELLED), jnp.ones_like(UNLABELLED)):
    loss = lambda z, where=where: class_relation_kd_loss(z, TEACHER, divergence=divergence, where=where).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(LOGITS)
    assert np.isfinite(value) and np.isfinite(gradient).all() and (value == 0) == (not where.any())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_known_classes_without_mass(dtype):
  """Weights are relative: where no example has mass on known classes that a float could hold, they are still right."""
  logits = jnp.asarray(LOGITS).at[..., KNOWN:].add(1e4).astype(dtype)
  loss = lambda z: class_relation_kd_loss(z, TEACHER.astype(dtype)).astype(jnp.float32).mean()
  value, gradient = jax.value_and_grad(loss)(logits)
  assert value > 0 and jnp.isfinite(value) and jnp.isfinite(gradient).all() and gradient.dtype == dtype


def test_a_batch_split_over_devices_has_the_weights_of_the_whole():
  logits, teacher = jnp.tile(LOGITS, (1, 1, 4, 1)), jnp.tile(TEACHER, (1, 1, 4, 1))
  logits = logits * jnp.linspace(0.2, 1, 24)[:, None]
  expected, slope = jax.value_and_grad(lambda z: class_relation_kd_loss(z, teacher).sum())(logits)
  split = lambda x: jnp.moveaxis(x.reshape(2, 2, 8, 3, -1), 2, 0)

  def part(z, t):
    return class_relation_kd_loss(z, t, axis_name="devices").sum()

  values, gradients = jax.pmap(jax.value_and_grad(part), axis_name="devices")(split(logits), split(teacher))
  np.testing.assert_allclose(values.sum(), expected, rtol=1e-12)
  np.testing.assert_allclose(jnp.moveaxis(gradients, 0, 2).reshape(logits.shape), slope, rtol=1e-9, atol=1e-12)


def test_bad_input():
  with pytest.raises(ValueError, match="divergence must be one of"):
    class_relation_kd_loss(LOGITS, TEACHER, divergence="js")
  with pytest.raises(ValueError, match="teacher_logits must have 1 to 5 classes"):
    class_relation_kd_loss(LOGITS, jnp.ones((2, 2, 6, 7)))
  with pytest.raises(ValueError, match="kd_temperature must lie in"):
    class_relation_kd_loss(LOGITS, TEACHER, kd_temperature=0.0)
  with pytest.raises(ValueError, match="where must be boolean"):
    class_relation_kd_loss(LOGITS, TEACHER, where=UNLABELLED[0])


def _kd_row(divergence):
  return row(
    class_relation_kd_loss,
    lambda rng: (draw_logits(rng), draw_logits(rng)[:, :KNOWN]),
    extreme=lambda z, t: (*extreme_logits(z), *extreme_logits(t)),
    bad=(
      ("teacher_logits", lambda z, t: (z, t[1:])),
      ("teacher_logits", lambda z, t: (z[:, :2], t)),
      ("teacher_logits", lambda z, t: (z, t.astype(np.int32))),
      ("logits", lambda z, t: (z.astype(np.int32), t)),
    ),
    options=dict(temperature=(0.5, 1.0), kd_temperature=(1.0, 4.0), divergence=divergence),
  )


ROWS = [*map(_kd_row, class_relations.DIVERGENCES)]


EXEMPT = {"DIVERGENCES": "names"}
