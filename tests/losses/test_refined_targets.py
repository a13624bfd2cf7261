"""PS-KD: the card's exact tests, golden vectors, the table of predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import refined_targets as ps
from tests.conformance import CLASSES, TABLE, draw_classification, draw_probabilities, row, stateful_loss_row, unchanged

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def batch():
  rng = np.random.default_rng(1)
  return jnp.asarray(2 * rng.normal(size=(6, 4))), jnp.asarray(rng.integers(0, 4, 6)), jnp.asarray([5, 0, 9, 3, 7, 2])


def _state(seed=0, examples=10, classes=4):
  return ps.PSKDState(jax.random.dirichlet(jax.random.key(seed), jnp.ones(classes), (examples,), jnp.float64))


def _mean_and_gradient(logits, labels, ids, state, alpha):
  def mean(z):
    values, new = ps.ps_kd_loss(z, labels, ids, state=state, alpha=alpha)
    return values.mean(), new

  return jax.value_and_grad(mean, has_aux=True)(logits)


@pytest.mark.golden
def test_golden_ps_kd(golden):
  file = golden("26-ps_kd")
  assert file.meta["reduction"] == "mean over batch, sum over classes"
  settings = dict(enumerate(file.meta.pop("cases")))
  names = []
  for name, arrays, _ in file.cases("case"):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10, err_msg=name)
    logits, labels = jnp.asarray(arrays["logits"]), jnp.asarray(arrays["labels"])
    first = settings[int(name.removeprefix("case"))].get("first", False)
    alpha = ps.ps_kd_alpha(arrays["epoch"], final=arrays["alpha_T"], epochs=arrays["total_epochs"])
    close(alpha, arrays["alpha_t"])
    close(ps.ps_kd_targets(labels, arrays["prev_probs"], alpha=alpha), arrays["soft_targets"])
    ids = jnp.arange(len(labels))[::-1]
    known = ps.PSKDState(jnp.asarray(arrays["prev_probs"])[::-1])
    unvisited = ps.ps_kd_init(*logits.shape, dtype=jnp.float64)
    for state in (known, unvisited) if first else (known,):
      (value, new), gradient = _mean_and_gradient(logits, labels, ids, state, alpha)
      close(value, arrays["out_loss"])
      close(gradient, arrays["grad_logits"])
      close(new.predictions[ids], arrays["new_probs"])
  assert names


def test_no_alpha_and_one_hot_predictions_are_cross_entropy(batch):
  logits, labels, ids = batch
  cross_entropy = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
  one_hot = ps.PSKDState(jnp.zeros((10, 4)).at[ids, labels].set(1.0))
  for state, alpha in ((_state(), 0.0), (one_hot, 0.7), (ps.ps_kd_init(10, 4), 0.7)):
    (value, _), gradient = _mean_and_gradient(logits, labels, ids, state, alpha)
    np.testing.assert_allclose(value, cross_entropy(logits), atol=1e-12)
    np.testing.assert_allclose(gradient, jax.grad(cross_entropy)(logits), atol=1e-12)


def test_uniform_predictions_are_label_smoothing(batch):
  logits, labels, ids = batch
  values, _ = ps.ps_kd_loss(logits, labels, ids, state=ps.PSKDState(jnp.full((10, 4), 0.25)), alpha=0.3)
  smooth = optax.smooth_labels(jax.nn.one_hot(labels, 4, dtype=jnp.float64), 0.3)
  np.testing.assert_allclose(values, optax.softmax_cross_entropy(logits, smooth), atol=1e-12)


def test_gradients(batch):
  logits, labels, ids = batch
  targets = 0.4 * jax.nn.one_hot(labels, 4, dtype=jnp.float64) + 0.6 * _state().predictions[ids]
  _, gradient = _mean_and_gradient(logits, labels, ids, _state(), 0.6)
  np.testing.assert_allclose(gradient, (jax.nn.softmax(logits) - targets) / 6, atol=1e-12)
  on_table = jax.grad(lambda state: ps.ps_kd_loss(logits, labels, ids, state=state, alpha=0.6)[0].sum())(_state())
  on_predictions = jax.grad(lambda b: ps.ps_kd_targets(labels, b, alpha=0.6).sum())(_state().predictions[:6])
  assert not np.any(on_table.predictions) and not np.any(on_predictions)


def test_a_teacher_that_agrees_shrinks_the_gradient(batch):
  logits, labels, ids = batch
  state = ps.PSKDState(jnp.zeros((10, 4)).at[ids].set(jax.nn.softmax(logits)))
  _, gradient = _mean_and_gradient(logits, labels, ids, state, 0.6)
  expected = 0.4 * (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 4)) / 6
  np.testing.assert_allclose(gradient, expected, atol=1e-12)


def test_examples_that_became_harder_weigh_more():
  """The gradient's 1-norm relative to cross-entropy's is `1 - alpha * error before / error now`, where signs allow."""
  rng, alpha = np.random.default_rng(0), 0.6
  now, before = rng.dirichlet(np.ones(5), 500), rng.dirichlet(np.ones(5), 500)
  target = alpha * before + (1 - alpha) * np.eye(5)[0]
  derivative = now - target
  allowed = (derivative[:, 0] <= 0) & (derivative[:, 1:] >= 0).all(1)
  assert allowed.sum() > 10
  gradient = lambda alpha: jax.grad(
    lambda z: ps.ps_kd_loss(
      z, jnp.zeros(500, int), jnp.arange(500), state=ps.PSKDState(jnp.asarray(before)), alpha=alpha
    )[0].sum()
  )(jnp.log(now))
  ratio = jnp.abs(gradient(alpha)).sum(1) / jnp.abs(gradient(0.0)).sum(1)
  expected = 1 - alpha * (1 - before[:, 0]) / (1 - now[:, 0])
  np.testing.assert_allclose(ratio[allowed], expected[allowed], rtol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_finite_at_extremes(batch, dtype):
  logits, labels, ids = batch
  z = (1e4 * jnp.sign(logits)).astype(dtype)
  state = ps.ps_kd_init(10, 4, dtype=dtype)
  for _ in range(3):
    (value, state), gradient = _mean_and_gradient(z, labels, ids, state, 0.8)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and gradient.dtype == state.predictions.dtype == dtype


def test_the_table_holds_the_predictions_from_before_the_update():
  rng = np.random.default_rng(0)
  inputs, labels = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32), jnp.asarray(rng.integers(0, 4, 6))
  weights, state = jnp.zeros((3, 4), jnp.float32), ps.ps_kd_init(6, 4)
  traces = []

  @jax.jit
  def step(weights, state, ids, index):
    traces.append(None)
    alpha = ps.ps_kd_alpha(index, final=0.8, epochs=2, steps_per_epoch=3)

    def mean(weights):
      values, new = ps.ps_kd_loss(inputs[ids] @ weights, labels[ids], ids, state=state, alpha=alpha)
      return values.mean(), new

    gradient, new = jax.grad(mean, has_aux=True)(weights)
    return weights - gradient, new

  for epoch in range(2):
    for index in range(3):
      ids = jnp.array([2 * index, 2 * index + 1])
      expected = jax.nn.softmax(inputs[ids] @ weights)
      before, (weights, state) = state, step(weights, state, ids, 3 * epoch + index)
      np.testing.assert_allclose(state.predictions[ids], expected, atol=1e-6)
      others = np.setdiff1d(np.arange(6), ids)
      np.testing.assert_array_equal(state.predictions[others], before.predictions[others])
  assert len(traces) == 1  # not one program for each alpha


def test_schedule():
  alpha = lambda epoch, **options: float(ps.ps_kd_alpha(epoch, final=0.8, epochs=300, **options))
  np.testing.assert_allclose([alpha(0), alpha(299), alpha(1000)], [0.8 / 300, 0.8, 0.8], rtol=1e-14)
  np.testing.assert_allclose([alpha(step, steps_per_epoch=7) for step in (0, 6, 7)], [0.8 / 300, 0.8 / 300, 1.6 / 300])
  assert alpha(-5) == 0
  assert ps.ps_kd_alpha(jnp.arange(3), epochs=3).dtype == jnp.float64
  with pytest.raises(ValueError, match="epochs must lie in"):
    ps.ps_kd_alpha(0, epochs=0)


def test_a_table_in_bfloat16_gives_targets_of_sum_one(batch):
  logits, labels, ids = batch
  narrow = ps.PSKDState(_state().predictions.astype(jnp.bfloat16))
  wide = ps.ps_kd_loss(logits, labels, ids, state=_state(), alpha=0.8)[0]
  values, new = ps.ps_kd_loss(logits, labels, ids, state=narrow, alpha=0.8)
  np.testing.assert_allclose(values, wide, rtol=1e-2)
  assert new.predictions.dtype == jnp.bfloat16
  targets = ps.ps_kd_targets(labels, narrow.predictions.astype(jnp.float32)[ids], alpha=0.8)
  np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
  # Shifting all logits changes nothing then.
  shifted = ps.ps_kd_loss(logits + 100, labels, ids, state=narrow, alpha=0.8)[0]
  np.testing.assert_allclose(shifted, values, rtol=1e-6)


def test_bad_input(batch):
  logits, labels, ids = batch
  with pytest.raises(ValueError, match="state must have predictions of 4 classes"):
    ps.ps_kd_loss(logits, labels, ids, state=_state(classes=3), alpha=0.5)
  with pytest.raises(ValueError, match="alpha must lie in"):
    ps.ps_kd_loss(logits, labels, ids, state=_state(), alpha=1.5)
  with pytest.raises(ValueError, match="predictions must have the shape"):
    ps.ps_kd_targets(labels, jnp.ones((5, 4)), alpha=0.5)
  with pytest.raises(ValueError, match="labels must be integer"):
    ps.ps_kd_targets(labels * 1.0, jnp.ones((6, 4)), alpha=0.5)


ROWS = [
  stateful_loss_row(
    ps.ps_kd_loss,
    lambda rng: ps.PSKDState(rng.dirichlet(np.ones(CLASSES), TABLE)),
    None,
    alpha=(0.0, 1.0),
  ),
  row(
    ps.ps_kd_targets,
    lambda rng: (draw_classification(rng)[1], draw_probabilities(rng)),
    extreme=unchanged,
    bad=(
      ("predictions", lambda y, b: (y, b[1:])),
      ("predictions", lambda y, b: (y, b[..., 0])),
      ("predictions", lambda y, b: (y, b.astype(np.int32))),
      ("labels", lambda y, b: (y.astype(np.float32), b)),
    ),
    examples="any",
    differentiable=False,
    options=dict(alpha=(0.0, 1.0)),
  ),
  row(
    ps.ps_kd_alpha,
    lambda rng: (np.int32(rng.integers(0, 50)),),
    differentiable=False,
    wide=True,
    options=dict(final=(0.0, 1.0), epochs=(5, 10), steps_per_epoch=(1, 8)),
  ),
]


EXEMPT = {
  "PSKDState": "state, carried by ps_kd_loss",
  "ps_kd_init": "builds the state that ps_kd_loss's row starts from",
}
