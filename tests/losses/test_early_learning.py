"""ELR and ELR+: the card's exact tests, golden vectors, extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import early_learning as el
from tests.conformance import (
  BAD_LABELS,
  BAD_SAME_SHAPE,
  CLASSES,
  TABLE,
  draw_classification,
  draw_ids,
  draw_logits,
  draw_probabilities,
  extreme_logits,
  row,
  stateful_loss_row,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def batch():
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.integers(0, 4, 6)), jnp.asarray([5, 0, 9, 3, 7, 2])


def _state(seed=0, examples=10, classes=4):
  return el.ELRState(0.9 * jax.random.dirichlet(jax.random.key(seed), jnp.ones(classes), (examples,), jnp.float64))


@pytest.mark.golden
def test_golden_elr(golden):
  for case, arrays, meta in golden("12-elr").cases():
    state = el.elr_init(meta["num_examples"], meta["num_classes"], dtype=jnp.float64)
    options = {"momentum": meta["beta"], "weight": meta["lam"], "clip": meta["clamp"]}
    for step in range(meta["steps"]):
      part = {name: jnp.asarray(value[step]) for name, value in arrays.items() if not name.startswith("out_target")}

      def mean(logits, part=part, state=state, options=options, meta=meta, step=step):
        if meta["kind"] == "elr":
          values, new = el.elr_loss(logits, part["labels"], part["index"], state=state, **options)
        else:
          values, new = el.elr_plus_loss(
            logits, part["labels_soft"], part["ema_logits"], part["index"], state=state, permutation=part["perm"],
            coefficient=part["mix"], ramp=el.sigmoid_rampup(meta["first_iteration"] + step, length=meta["coef_step"]),
            reweight_labels=meta.get("reweight_labels", False), **options,
          )  # fmt: skip
        return values.mean(), new

      (value, state), gradient = jax.value_and_grad(mean, has_aux=True)(part["logits"])
      np.testing.assert_allclose(value, part["out_loss"], rtol=1e-10, atol=1e-10, err_msg=case)
      np.testing.assert_allclose(gradient, part["grad_logits"], rtol=1e-10, atol=1e-10, err_msg=case)
    np.testing.assert_allclose(state.targets, arrays["out_target_table"], rtol=1e-10, atol=1e-10, err_msg=case)


def test_weight_zero_is_cross_entropy(batch):
  logits, labels, ids = batch
  values, _ = el.elr_loss(logits, labels, ids, state=_state(), weight=0.0)
  np.testing.assert_allclose(values, optax.softmax_cross_entropy_with_integer_labels(logits, labels), atol=1e-14)


def test_targets_after_repeated_visits(batch):
  logits, labels, ids = batch
  state, p = el.elr_init(10, 4, dtype=jnp.float64), jax.nn.softmax(logits)
  for visits in range(1, 4):
    _, state = el.elr_loss(logits, labels, ids, state=state, momentum=0.8)
    np.testing.assert_allclose(state.targets[ids], (1 - 0.8**visits) * p, atol=1e-12)


def test_momentum_zero_still_treats_targets_as_constants(batch):
  logits, labels, ids = batch
  regularizer = lambda z: (el.elr_loss(z, labels, ids, state=_state(), momentum=0.0, weight=1.0)[0]
                           - optax.softmax_cross_entropy_with_integer_labels(z, labels)).sum()  # fmt: skip
  full = lambda z: jnp.log1p(-jnp.sum(jax.nn.softmax(z) ** 2, -1)).sum()
  np.testing.assert_allclose(2 * jax.grad(regularizer)(logits), jax.grad(full)(logits), atol=1e-12)


def test_gradient_formula(batch):
  logits, labels, ids = batch
  state = _state()
  _, new = el.elr_loss(logits, labels, ids, state=state)
  t, p = new.targets[ids], jax.nn.softmax(logits)
  inner = jnp.sum(p * t, -1, keepdims=True)
  g = -p / (1 - inner) * (t - inner)
  gradient = jax.grad(lambda z: el.elr_loss(z, labels, ids, state=state)[0].mean())(logits)
  np.testing.assert_allclose(gradient, (p - jax.nn.one_hot(labels, 4) + 3.0 * g) / 6, atol=1e-10)
  np.testing.assert_allclose(g.sum(-1), 0, atol=1e-12)
  frozen = lambda z: (optax.softmax_cross_entropy_with_integer_labels(z, labels)
                      + 3.0 * el.elr_regularizer(jax.nn.softmax(z), t)).mean()  # fmt: skip
  step = 1e-6 * jnp.ones_like(logits).at[0].set(0.0)
  numeric = frozen(logits + step) - frozen(logits - step)
  np.testing.assert_allclose(numeric, 2 * jnp.sum(gradient * step), atol=1e-12)


def test_special_targets(batch):
  logits, _, _ = batch
  gradient = lambda t: jax.grad(lambda z: el.elr_regularizer(jax.nn.softmax(z), t).sum())(logits)
  np.testing.assert_allclose(gradient(jnp.full((6, 4), 0.2)), 0, atol=1e-12)
  pull = gradient(jax.nn.one_hot(jnp.full(6, 2), 4, dtype=jnp.float64))
  np.testing.assert_allclose(pull[:, 2], -jax.nn.softmax(logits)[:, 2], atol=1e-12)
  extreme = jnp.zeros((1, 4)).at[0, 2].set(1e3)
  one_hot = jax.nn.one_hot(jnp.array([2]), 4, dtype=jnp.float64)
  value, slope = jax.value_and_grad(lambda z: el.elr_regularizer(jax.nn.softmax(z), one_hot).sum())(extreme)
  np.testing.assert_allclose(value, np.log(1e-4), rtol=1e-9)
  assert jnp.isfinite(slope).all()
  assert jnp.isfinite(el.elr_regularizer(one_hot, one_hot, clip=0.0)).all()


def test_only_the_rows_of_the_batch_change(batch):
  logits, labels, ids = batch
  state = _state()
  _, new = el.elr_loss(logits, labels, ids, state=state)
  others = np.setdiff1d(np.arange(10), ids)
  np.testing.assert_array_equal(new.targets[others], state.targets[others])
  assert (new.targets[ids] != state.targets[ids]).all()


def test_rampup():
  np.testing.assert_allclose([el.sigmoid_rampup(s, length=20) for s in (0, 20, 99)], [np.exp(-5), 1, 1], rtol=1e-6)
  assert el.sigmoid_rampup(0, length=0) == 1


def test_elr_plus_without_mixing_is_elr_with_the_teachers_targets(batch):
  logits, labels, ids = batch
  state = _state()
  values, new = el.elr_plus_loss(
    logits, jax.nn.one_hot(labels, 4, dtype=jnp.float64), 2 * logits, ids, state=state,
    permutation=jnp.roll(jnp.arange(6), 1), coefficient=1.0,
  )  # fmt: skip
  np.testing.assert_allclose(new.targets[ids], 0.7 * state.targets[ids] + 0.3 * jax.nn.softmax(2 * logits), atol=1e-12)
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  expected += 3.0 * el.elr_regularizer(jax.nn.softmax(logits), new.targets[ids])
  np.testing.assert_allclose(values, expected, atol=1e-12)


def test_reweighted_labels(batch):
  logits, labels, ids = batch
  soft = 0.9 * jax.nn.one_hot(labels, 4, dtype=jnp.float64) + 0.025
  arguments = dict(permutation=jnp.roll(jnp.arange(6), 1), coefficient=0.7, weight=0.0)
  _, new = el.elr_plus_loss(logits, soft, 2 * logits, ids, state=_state(), **arguments)
  values, _ = el.elr_plus_loss(logits, soft, 2 * logits, ids, state=_state(), reweight_labels=True, **arguments)
  targets = new.targets[ids]
  product = soft * (0.7 * targets + 0.3 * targets[arguments["permutation"]])
  expected = -jnp.sum(product / product.sum(1, keepdims=True) * jax.nn.log_softmax(logits), axis=1)
  np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_ramp_in_double_precision():
  assert el.sigmoid_rampup(1, length=3).dtype == jnp.float64
  np.testing.assert_allclose(el.sigmoid_rampup(1, length=3), np.exp(-5 * (2 / 3) ** 2), rtol=1e-15)


def test_candidates():
  state = el.ELRState(jnp.array([[0.2, 0.8], [0.9, 0.0]]))
  assert el.noisy_label_candidates(state, jnp.array([1, 1])).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_finite_at_extremes(batch, dtype, scale):
  logits, labels, ids = batch
  z = (jnp.sign(logits) * scale).astype(dtype)
  state = el.elr_init(10, 4, dtype=dtype)
  for _ in range(3):
    (value, state), gradient = jax.value_and_grad(
      lambda z, state=state: (lambda v, s: (v.mean(), s))(*el.elr_loss(z, labels, ids, state=state)), has_aux=True
    )(z)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and gradient.dtype == state.targets.dtype == dtype


def test_bad_input(batch):
  logits, labels, ids = batch
  with pytest.raises(ValueError, match="ids must be integers"):
    el.elr_loss(logits, labels, ids[:3], state=_state())
  with pytest.raises(ValueError, match="state must have targets for 4 classes"):
    el.elr_loss(logits, labels, ids, state=_state(classes=3))
  with pytest.raises(ValueError, match="momentum must lie in"):
    el.elr_loss(logits, labels, ids, state=_state(), momentum=1.5)
  with pytest.raises(ValueError, match="labels must"):
    el.elr_loss(logits, labels[:, None], ids, state=_state())


def _elr_surrogate(logits, results, labels, ids, state, *, momentum, weight):
  """The targets, which were just updated with these logits, are constants."""
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  targets = results[1].targets[ids]
  return cross_entropy + weight * jnp.log1p(-jnp.sum(jax.nn.softmax(logits) * targets, axis=-1))


def _elr_plus_surrogate(
  logits, results, soft_labels, teacher_logits, ids, state, *, coefficient, momentum, weight, ramp
):
  targets = results[1].targets[ids]
  targets = coefficient * targets + (1 - coefficient) * targets[jnp.arange(ids.size) ^ 1]
  cross_entropy = -jnp.sum(soft_labels * jax.nn.log_softmax(logits), axis=-1)
  return cross_entropy + ramp * weight * jnp.log1p(-jnp.sum(jax.nn.softmax(logits) * targets, axis=-1))


def _elr_plus(logits, soft_labels, teacher_logits, ids, state, **hyperparameters):
  # Partners are neighbours, so that they stay together when the batch is split over devices.
  return el.elr_plus_loss(
    logits, soft_labels, teacher_logits, ids, state=state, permutation=jnp.arange(ids.size) ^ 1, **hyperparameters
  )


ROWS = [
  row(
    el.elr_regularizer,
    lambda rng: (draw_probabilities(rng), 0.9 * draw_probabilities(rng)),
    extreme=lambda p, t: (np.resize(np.eye(CLASSES), p.shape), np.resize(np.eye(CLASSES)[[0, 2, 3]], t.shape)),
    bad=BAD_SAME_SHAPE,
    examples="any",
  ),
  stateful_loss_row(
    el.elr_loss,
    lambda rng: el.ELRState(0.5 * rng.dirichlet(np.ones(CLASSES), TABLE)),
    _elr_surrogate,
    momentum=(0.0, 0.9),
    weight=(0.0, 5.0),
  ),
  row(
    el.elr_plus_loss,
    lambda rng: (
      draw_logits(rng),
      draw_probabilities(rng),
      draw_logits(rng),
      draw_ids(rng),
      el.ELRState(0.5 * rng.dirichlet(np.ones(CLASSES), TABLE)),
    ),
    call=_elr_plus,
    extreme=lambda z, y, teacher, *rest: (*extreme_logits(z, y), *extreme_logits(teacher), *rest),
    bad=(
      ("shapes", lambda z, y, teacher, ids, s: (z, y[:1], teacher, ids, s)),
      ("shapes", lambda z, y, teacher, ids, s: (z, y, teacher[:1], ids, s)),
      ("ids", lambda z, y, teacher, ids, s: (z, y, teacher, ids[1:], s)),
      ("ids", lambda z, y, teacher, ids, s: (z, y, teacher, ids * 1.0, s)),
      ("logits", lambda z, *rest: (z.astype(np.int32), *rest)),
    ),
    examples="batch",
    surrogate=_elr_plus_surrogate,
    options=dict(coefficient=(0.5, 1.0), momentum=(0.0, 0.9), weight=(0.0, 5.0), ramp=(0.0, 1.0)),
  ),
  row(
    el.noisy_label_candidates,
    lambda rng: (draw_probabilities(rng), draw_classification(rng)[1]),
    call=lambda targets, labels: el.noisy_label_candidates(el.ELRState(targets), labels),
    bad=BAD_LABELS[:5],
    examples="any",
    differentiable=False,
    wide=True,
  ),
  row(
    el.sigmoid_rampup,
    lambda rng: (np.float64(rng.uniform(1, 4)),),
    call=lambda step, length: el.sigmoid_rampup(step, length=length),
    wide=True,
    options=dict(length=(5.0, 10.0)),
  ),
]


EXEMPT = {
  "ELRState": "state, carried by elr_loss",
  "elr_init": "builds the state that elr_loss's row starts from",
}
