"""Small-loss selection and co-teaching: the card's exact tests, golden vectors, edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.layers.nested_dropout import keep_leading_channels
from jaxreg.losses import small_loss
from jaxreg.losses.comp_sum import generalized_cross_entropy_loss
from tests.conformance import (
  BAD_LABELS,
  EXAMPLES,
  draw_classification,
  draw_logits,
  extreme_logits,
  row,
)


def _logits(arrays, net, inputs, kept):
  """Those of one of the file's two networks, with the first channels only."""
  hidden = jax.nn.relu(inputs @ arrays[f"W{net}"] + arrays[f"b{net}"])
  return keep_leading_channels(hidden, kept) @ arrays[f"V{net}"]


@pytest.mark.golden
def test_golden_nested_dropout_coteaching(golden, x64):
  """Each half batch is scored by one network and trains the other; and the original exchange on one batch."""
  for case, arrays, meta in golden("07-nested_dropout").cases("case"):
    arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
    inputs, labels = [arrays["x1"], arrays["x2"]], [arrays["y1"], arrays["y2"]]
    scores = []
    for net, (x, y) in enumerate(zip(inputs, labels), 1):
      logits = _logits(arrays, net, x, arrays["val_k_kept"])
      each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      np.testing.assert_allclose(logits, arrays[f"out_logits{net}"], rtol=1e-9, atol=1e-12, err_msg=case)
      np.testing.assert_allclose(each, arrays[f"out_ce_each{net}"], rtol=1e-9, atol=1e-12, err_msg=case)
      chosen = small_loss.small_loss_indices(each, count=int(arrays["out_n_remember"]))
      np.testing.assert_array_equal(chosen, arrays[f"out_sel{net}"], err_msg=case)
      weights = small_loss.small_loss_weights(each, forget_rate=meta["forget"])
      np.testing.assert_array_equal(np.flatnonzero(weights), np.sort(chosen), err_msg=case)
      scores.append(each)

    def losses(params, arrays=arrays, inputs=inputs, labels=labels, scores=scores, meta=meta):
      def mean(net, half):
        logits = _logits({**arrays, **params}, net, inputs[half], arrays["k_kept"])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[half])
        return small_loss.select_small_losses(each, scores[half], forget_rate=meta["forget"]).mean()

      values = mean(1, 1), mean(2, 0)
      return sum(values), values

    params = {f"{name}{net}": arrays[f"{name}{net}"] for name in "WbV" for net in (1, 2)}
    (_, values), gradients = jax.value_and_grad(losses, has_aux=True)(params)
    np.testing.assert_allclose(values, [arrays["out_loss1"], arrays["out_loss2"]], rtol=1e-9, err_msg=case)
    for name, gradient in gradients.items():
      np.testing.assert_allclose(gradient, arrays[f"grad_{name}"], rtol=1e-9, atol=1e-12, err_msg=f"{case} {name}")

    whole = [_logits(arrays, net, inputs[0], arrays[f"V{net}"].shape[0]) for net in (1, 2)]
    exchanged = small_loss.coteaching_loss(*whole, labels[0], forget_rate=meta["forget"])
    expected = [arrays["out_orig_loss1"], arrays["out_orig_loss2"]]
    np.testing.assert_allclose([values.mean() for values in exchanged], expected, rtol=1e-9, err_msg=case)


@pytest.mark.golden
def test_golden_nested_dropout_forget_rates(golden, x64):
  for case, arrays, _ in golden("07-nested_dropout").cases("sched"):
    epochs, rate, gradual, exponent = arrays["epochs_f_ngradual_exponent"]
    schedule = small_loss.forget_rate_schedule(forget_rate=rate, num_gradual=int(gradual), exponent=exponent)
    rates = jax.jit(jax.vmap(schedule))(jnp.arange(int(epochs)))
    np.testing.assert_allclose(rates, arrays["out_forget"], rtol=1e-12, atol=1e-15, err_msg=case)


def test_schedule_of_one_gradual_epoch_starts_at_zero():
  schedule = small_loss.forget_rate_schedule(forget_rate=0.3, num_gradual=1)
  np.testing.assert_allclose([schedule(0), schedule(1)], [0, 0.3])


def test_nothing_forgotten_is_cross_entropy(x64):
  rng = np.random.default_rng(0)
  first, second, labels = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), rng.integers(0, 4, 9)
  for logits, values in zip(
    (first, second), small_loss.coteaching_loss(first, second, labels, forget_rate=0.0), strict=True
  ):
    np.testing.assert_allclose(values, optax.softmax_cross_entropy_with_integer_labels(logits, labels), rtol=1e-14)


def test_equal_networks_get_the_truncated_mean(x64):
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(size=(10, 4)), rng.integers(0, 4, 10)
  each = np.sort(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
  for values in small_loss.coteaching_loss(logits, logits, labels, forget_rate=0.3):
    np.testing.assert_allclose(values.mean(), each[:7].mean(), rtol=1e-14)


def test_no_gradient_through_the_selection(x64):
  rng = np.random.default_rng(2)
  first, second, labels = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), rng.integers(0, 4, 9)
  first_loss = lambda other: small_loss.coteaching_loss(first, other, labels, forget_rate=0.4)[0].mean()
  np.testing.assert_array_equal(jax.grad(first_loss)(jnp.asarray(second)), 0)


def test_how_many_are_kept():
  values = jnp.arange(10.0)
  kept = lambda rate, **options: float(small_loss.small_loss_weights(values, forget_rate=rate, **options).sum())
  # In Python int((1 - 0.9) * 10) is 0, and int((1 - 0.8) * 10) is 1.
  assert [kept(rate) for rate in (0.0, 0.25, 0.3, 0.8, 0.9, 1.0)] == [10, 7, 7, 1, 1, 1]
  traced = jax.jit(lambda rate: small_loss.small_loss_weights(values, forget_rate=rate).sum())
  assert [float(traced(rate)) for rate in (0.0, 0.25, 0.3, 0.9, 1.0)] == [10, 7, 7, 1, 1]
  assert kept(0.5, where=jnp.arange(10) >= 6) == 2
  # A Python rate is exact with a mask, too: in float32 (1 - 0.7) * 10 is 3.0000001 and (1 - 0.9) * 10 is 1.0000002.
  counted = jnp.arange(12) < 10
  masked = lambda rate: small_loss.small_loss_weights(jnp.arange(12.0), forget_rate=rate, where=counted).sum()
  assert [float(masked(rate)) for rate in (0.0, 0.25, 0.3, 0.7, 0.8, 0.9)] == [10, 7, 7, 3, 1, 1]


def test_what_does_not_count_is_not_selected():
  values, where = jnp.array([jnp.nan, -5.0, 2.0, jnp.inf, 1.0]), jnp.array([True, False, True, True, True])
  weights = lambda rate: small_loss.small_loss_weights(values, forget_rate=rate, where=where).tolist()
  assert weights(0.5) == [0, 0, 1, 0, 1]
  assert weights(0.0) == [1, 0, 1, 1, 1]
  assert small_loss.small_loss_weights(values, forget_rate=0.5, where=jnp.zeros(5, bool)).tolist() == [0] * 5


def test_ignored_labels_and_masked_nan_reach_nothing(x64):
  rng = np.random.default_rng(3)
  first, second, labels = rng.normal(size=(6, 4)), rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
  part = small_loss.coteaching_loss(first[:4], second[:4], labels[:4], forget_rate=0.5)
  spoiled, labels[4] = first.copy(), -100
  spoiled[4:] = np.nan
  where = np.arange(6) != 5

  def total(logits):
    return [values.sum() for values in small_loss.coteaching_loss(logits, second, labels, forget_rate=0.5, where=where)]

  np.testing.assert_allclose(total(jnp.asarray(spoiled)), [values.sum() for values in part], rtol=1e-12)
  gradient = jax.grad(lambda logits: sum(total(logits)))(jnp.asarray(spoiled))
  assert np.isfinite(gradient).all() and (gradient[4:] == 0).all()


def test_any_loss_of_the_library(x64):
  rng = np.random.default_rng(4)
  first, second, labels = rng.normal(size=(8, 4)), rng.normal(size=(8, 4)), rng.integers(0, 4, 8)
  values, _ = small_loss.coteaching_loss(
    first, second, labels, forget_rate=0.25, loss=lambda z, y: generalized_cross_entropy_loss(z, y, q=0.5)
  )
  each, scores = (generalized_cross_entropy_loss(z, labels, q=0.5) for z in (first, second))
  np.testing.assert_allclose(values.mean(), each[np.argsort(scores)[:6]].mean(), rtol=1e-14)


def test_selected_losses_of_halves(x64):
  """Their mean is that of the examples kept; what is masked, NaN there and the scores get no gradient."""
  rng = np.random.default_rng(6)
  values, scores, where = rng.normal(size=10), rng.normal(size=10), np.arange(10) < 8
  values[8:], scores[9] = np.nan, np.nan
  mean = lambda v, s: small_loss.select_small_losses(v, s, forget_rate=0.25, where=where).sum() / where.sum()
  kept = np.argsort(scores[:8])[:6]
  np.testing.assert_allclose(mean(values, scores), values[kept].mean(), rtol=1e-12)
  slopes = jax.grad(mean, (0, 1))(jnp.asarray(values), jnp.asarray(scores))
  np.testing.assert_allclose(slopes[0], np.isin(np.arange(10), kept) / 6, rtol=1e-12)
  np.testing.assert_array_equal(slopes[1], 0)
  nothing = small_loss.select_small_losses(values, scores, forget_rate=0.25, where=np.zeros(10, bool))
  np.testing.assert_array_equal(nothing, 0)


def test_selection_over_devices_is_that_of_the_whole_batch():
  rng = np.random.default_rng(5)
  values, where = rng.normal(size=32).astype(np.float32), rng.uniform(size=32) < 0.8
  whole = small_loss.small_loss_weights(values, forget_rate=0.4, where=where)
  select = lambda v, w: small_loss.small_loss_weights(v, forget_rate=0.4, where=w, axis_name="batch")
  parts = jax.pmap(select, axis_name="batch")(values.reshape(8, 4), where.reshape(8, 4))
  np.testing.assert_array_equal(parts.reshape(-1), whole)
  first, second = rng.normal(size=(2, 32, 4)).astype(np.float32)
  labels = rng.integers(0, 4, 32)
  together = small_loss.coteaching_loss(first, second, labels, forget_rate=0.4)
  split = jax.pmap(
    lambda a, b, y: small_loss.coteaching_loss(a, b, y, forget_rate=0.4, axis_name="batch"), axis_name="batch"
  )(first.reshape(8, 4, 4), second.reshape(8, 4, 4), labels.reshape(8, 4))
  for one, other in zip(split, together):
    np.testing.assert_allclose(one.reshape(-1), other, rtol=1e-5)


def test_bad_schedules_and_counts_are_refused():
  with pytest.raises(ValueError, match="num_gradual"):
    small_loss.forget_rate_schedule(forget_rate=0.2, num_gradual=-1)
  with pytest.raises(ValueError, match="forget_rate"):
    small_loss.forget_rate_schedule(forget_rate=1.2, num_gradual=1)
  with pytest.raises(ValueError, match="count"):
    small_loss.small_loss_indices(jnp.ones(3), count=4)


BAD_SCORES = (
  ("values", lambda values: (values.astype(np.int32),)),
  ("values", lambda values: (values[None],)),
)
ROWS = [
  row(
    small_loss.small_loss_weights,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=BAD_SCORES,
    differentiable=False,
    options=dict(forget_rate=(0.1, 0.9)),
  ),
  row(
    small_loss.small_loss_indices,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=BAD_SCORES,
    differentiable=False,
    wide=True,
    options=dict(count=5),
  ),
  row(
    small_loss.select_small_losses,
    lambda rng: (rng.normal(size=EXAMPLES), rng.normal(size=EXAMPLES)),
    bad=(
      ("values", lambda values, scores: (values.astype(np.int32), scores)),
      ("shapes", lambda values, scores: (values, scores[1:])),
    ),
    options=dict(forget_rate=(0.1, 0.9)),
  ),
  row(
    small_loss.coteaching_loss,
    lambda rng: (draw_logits(rng), draw_logits(rng), draw_classification(rng)[1]),
    extreme=lambda z, other, y: (*extreme_logits(z), other, y),
    bad=(
      *((name, lambda z, o, y, bad=bad: (lambda z, y: (z, o, y))(*bad(z, y))) for name, bad in BAD_LABELS[:5]),
      ("shapes", lambda z, other, y: (z, other[:, 1:], y)),
    ),
    options=dict(forget_rate=(0.1, 0.9)),
  ),
]
EXEMPT = {"forget_rate_schedule": "builds a schedule; tested against the golden file"}
