"""Losses that tolerate wrong labels: the cards' definitions, symmetry, limits, and behaviour at extremes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import rel_entr, softmax

from jaxreg import losses
from jaxreg.losses import active_passive, comp_sum, hinge, symmetric
from jaxreg.losses.comp_sum import generalized_cross_entropy_loss
from jaxreg.losses.label_dro import ldr_kl_loss
from tests.conformance import loss_row


def _nce(p, y):
  return np.log(p[y]) / np.log(p).sum()


def _agce(p, y, offset, q):
  return ((offset + 1) ** q - (offset + p[y]) ** q) / q


def _aul(p, y, offset, q):
  return ((offset - p[y]) ** q - (offset - 1) ** q) / q


def _jensen_shannon(p, y, label_weight):
  e = np.eye(len(p))[y]
  m = label_weight * e + (1 - label_weight) * p
  divergence = label_weight * rel_entr(e, m).sum() + (1 - label_weight) * rel_entr(p, m).sum()
  return divergence / -((1 - label_weight) * np.log(1 - label_weight))


def _robust_log(p, y, alpha):
  others = np.delete(p, y)
  return np.log((alpha + 1) / alpha) - np.log(alpha + p[y]) + np.log(alpha + others).mean()


# name -> (hyperparameters, the definition for one example in terms of p = softmax(z) and z)
LOSSES = {
  "truncated_generalized_cross_entropy_loss": (
    {"q": 0.7, "threshold": 0.3},
    lambda p, z, y, q, threshold: (1 - max(p[y], threshold) ** q) / q,
  ),
  "symmetric_cross_entropy_loss": (
    {"balance": 0.3, "log_zero": -4.0},
    lambda p, z, y, balance, log_zero: -(1 - balance) * np.log(p[y]) - balance * log_zero * (1 - p[y]),
  ),
  "mean_absolute_error_loss": ({}, lambda p, z, y: np.abs(p - np.eye(len(p))[y]).sum()),
  "brier_loss": ({}, lambda p, z, y: ((p - np.eye(len(p))[y]) ** 2).sum()),
  "jensen_shannon_loss": (
    {"label_weight": 0.3},
    lambda p, z, y, label_weight: _jensen_shannon(p, y, label_weight),
  ),
  "normalized_cross_entropy_loss": ({}, lambda p, z, y: _nce(p, y)),
  "reverse_cross_entropy_loss": ({"log_zero": -9.0}, lambda p, z, y, log_zero: -log_zero * np.delete(p, y).sum()),
  "asymmetric_generalized_cross_entropy_loss": (
    {"offset": 0.6, "q": 1.7},
    lambda p, z, y, offset, q: _agce(p, y, offset, q),
  ),
  "asymmetric_unhinged_loss": ({"offset": 1.5, "q": 0.9}, lambda p, z, y, offset, q: _aul(p, y, offset, q)),
  "nce_rce_loss": (
    {"active_weight": 5.0, "passive_weight": 0.1, "log_zero": -9.0},
    lambda p, z, y, active_weight, passive_weight, log_zero: (
      active_weight * _nce(p, y) - passive_weight * log_zero * (1 - p[y])
    ),
  ),
  "nce_agce_loss": (
    {"active_weight": 5.0, "passive_weight": 2.0, "offset": 3.0, "q": 1.5},
    lambda p, z, y, active_weight, passive_weight, offset, q: (
      active_weight * _nce(p, y) + passive_weight * _agce(p, y, offset, q)
    ),
  ),
  "nce_aul_loss": (
    {"active_weight": 5.0, "passive_weight": 2.0, "offset": 6.0, "q": 1.5},
    lambda p, z, y, active_weight, passive_weight, offset, q: (
      active_weight * _nce(p, y) + passive_weight * _aul(p, y, offset, q)
    ),
  ),
  "crammer_singer_loss": (
    {"margin": 0.7},
    lambda p, z, y, margin: max(0, margin + np.delete(z, y).max() - z[y]),
  ),
  "weston_watkins_loss": (
    {"margin": 0.7},
    lambda p, z, y, margin: np.maximum(margin + np.delete(z, y) - z[y], 0).sum() / len(z),
  ),
  "robust_log_loss": ({"alpha": 0.1}, lambda p, z, y, alpha: _robust_log(p, y, alpha)),
}
RNG = np.random.default_rng(0)
LOGITS, LABELS = 2 * RNG.normal(size=(8, 5)), RNG.integers(0, 5, 8)


@functools.cache
def compiled(name):
  """One compiled loss with all its hyperparameters traced."""
  loss = getattr(losses, name)
  return jax.jit(lambda logits, labels, hparams: loss(logits, labels, **hparams))


@functools.cache
def compiled_gradient(name):
  loss = getattr(losses, name)
  return jax.jit(jax.grad(lambda logits, labels, hparams: loss(logits, labels, **hparams).sum(dtype=jnp.float32)))


def test_every_loss_is_tested():
  here = {name for module in (active_passive, hinge, symmetric) for name in module.__all__}
  assert set(LOSSES) == here | {"truncated_generalized_cross_entropy_loss"}


@pytest.mark.parametrize("name", LOSSES)
def test_definition_jit_and_vmap(name, x64):
  hparams, definition = LOSSES[name]
  expected = [definition(softmax(z), z, y, **hparams) for z, y in zip(LOGITS, LABELS)]
  loss = getattr(losses, name)
  np.testing.assert_allclose(loss(LOGITS, LABELS, **hparams), expected, rtol=1e-12, atol=1e-14)
  np.testing.assert_allclose(compiled(name)(LOGITS, LABELS, hparams), expected, rtol=1e-12, atol=1e-14)
  mapped = jax.vmap(lambda z, y: loss(z, y, **hparams))(LOGITS, LABELS)
  np.testing.assert_allclose(mapped, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_values(name, x64):
  hparams, _ = LOSSES[name]
  gradient = compiled_gradient(name)(jnp.asarray(LOGITS), LABELS, hparams)
  step = 1e-6
  differences = np.zeros_like(LOGITS)
  for k in range(LOGITS.shape[1]):
    shift = step * np.eye(LOGITS.shape[1])[k]
    up, down = compiled(name)(LOGITS + shift, LABELS, hparams), compiled(name)(LOGITS - shift, LABELS, hparams)
    differences[:, k] = (up - down) / (2 * step)
  np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)
  np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-12)  # every loss here is invariant to a common shift


@pytest.mark.parametrize("name", LOSSES)
def test_class_axis_and_class_mask(name, x64):
  hparams, _ = LOSSES[name]
  loss = getattr(losses, name)
  expected = loss(LOGITS, LABELS, **hparams)
  np.testing.assert_allclose(loss(LOGITS.T, LABELS, axis=0, **hparams), expected, rtol=1e-12)
  padded = jnp.concatenate([LOGITS, jnp.full((8, 2), 9.0)], axis=-1)
  value, gradient = jax.value_and_grad(lambda z: loss(z, LABELS, where=jnp.arange(7) < 5, **hparams).sum())(padded)
  np.testing.assert_allclose(value, expected.sum(), rtol=1e-12)
  assert np.all(np.isfinite(gradient)) and np.all(gradient[:, 5:] == 0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_at_extremes(name, dtype):
  rows = [[1e4, -1e4, 0, 0], [-1e4, 1e4, 1e4, 1e4], [0, 0, 0, 0], [-1e4, -1e4, -1e4, -1e4], [1e4, 1e4, 1e4, 1e4]]
  logits = jnp.asarray(np.repeat(rows, 4, axis=0), dtype)
  labels = np.tile(np.arange(4), len(rows))
  hparams, _ = LOSSES[name]
  values, gradient = compiled(name)(logits, labels, hparams), compiled_gradient(name)(logits, labels, hparams)
  assert values.dtype == gradient.dtype == logits.dtype
  assert np.all(np.isfinite(values)) and np.all(np.isfinite(gradient))
  assert np.all(values >= -1e-6)


@pytest.mark.parametrize("name", LOSSES)
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(data=strategies.data())
def test_properties(name, data):
  hparams, _ = LOSSES[name]
  elements = strategies.floats(-1e4, 1e4, width=32)
  logits = data.draw(arrays.arrays(np.float32, (3, 4), elements=elements))
  labels = data.draw(arrays.arrays(np.int32, (3,), elements=strategies.integers(0, 3)))
  values, gradient = compiled(name)(logits, labels, hparams), compiled_gradient(name)(logits, labels, hparams)
  assert np.all(np.isfinite(values)) and np.all(np.isfinite(gradient)) and np.all(values >= -1e-6)
  permuted = compiled(name)(logits[:, ::-1], 3 - labels, hparams)  # class names carry no meaning
  np.testing.assert_allclose(permuted, values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_close(name):
  hparams, _ = LOSSES[name]
  logits = jnp.asarray(LOGITS, jnp.bfloat16)
  exact = compiled(name)(logits.astype(jnp.float32), LABELS, hparams)
  np.testing.assert_allclose(compiled(name)(logits, LABELS, hparams).astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", ["jensen_shannon_loss", "nce_agce_loss", "robust_log_loss"])
def test_eight_devices(name):
  hparams, _ = LOSSES[name]
  logits = jnp.asarray(LOGITS, jnp.float32)
  expected = compiled(name)(logits, LABELS, hparams)
  loss = functools.partial(getattr(losses, name), **hparams)
  np.testing.assert_allclose(jax.pmap(loss)(logits[:, None], LABELS[:, None])[:, 0], expected, rtol=1e-6)
  sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
  placed = jax.device_put((logits, LABELS), sharding)
  np.testing.assert_allclose(compiled(name)(*placed, hparams), expected, rtol=1e-6)


@pytest.mark.parametrize(
  "name, total",
  [
    ("mean_absolute_error_loss", lambda classes: 2 * (classes - 1)),
    ("normalized_cross_entropy_loss", lambda classes: 1),
    ("reverse_cross_entropy_loss", lambda classes: 9 * (classes - 1)),
    ("nce_rce_loss", lambda classes: 5 + 0.1 * 9 * (classes - 1)),
    ("robust_log_loss", lambda classes: classes * np.log(1.1 / 0.1)),
  ],
)
def test_symmetric_losses_sum_to_a_constant(name, total, x64):
  """The sum over labels does not depend on the logits: what makes a loss robust to uniform noise."""
  hparams, _ = LOSSES[name]
  classes = LOGITS.shape[1]
  values = [compiled(name)(LOGITS, np.full(len(LOGITS), y), hparams) for y in range(classes)]
  np.testing.assert_allclose(sum(values), total(classes), rtol=1e-12)


def test_truncation(x64):
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.1, 0.1, 0.8]]))
  labels = jnp.zeros(3, jnp.int32)
  loss = comp_sum.truncated_generalized_cross_entropy_loss
  for q in (0.0, 0.05, 0.7, 1.0):
    full = generalized_cross_entropy_loss(logits, labels, q=q)
    np.testing.assert_allclose(loss(logits, labels, q=q, threshold=0.0), full, rtol=1e-12)
    bound = generalized_cross_entropy_loss(jnp.zeros((3, 2)), labels, q=q)  # at p_y = 1/2
    np.testing.assert_allclose(loss(logits, labels, q=q, threshold=0.5), jnp.minimum(full, bound), rtol=1e-12)
    gradient = jax.grad(lambda z, q=q: loss(z, labels, q=q, threshold=0.5).sum())(logits)
    assert np.all(gradient[1:] == 0) and np.all(gradient[0] != 0)
  slope = jax.grad(lambda q: loss(logits, labels, q=q, threshold=0.2).sum())(0.0)
  beyond = jax.grad(lambda q: loss(logits, labels, q=q, threshold=0.2).sum())(1e-6)
  np.testing.assert_allclose(slope, beyond, rtol=1e-4)


def test_relations_between_losses(x64):
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
  miss = symmetric.mean_absolute_error_loss(LOGITS, LABELS) / 2
  close = functools.partial(np.testing.assert_allclose, rtol=1e-10)
  agce, aul = active_passive.asymmetric_generalized_cross_entropy_loss, active_passive.asymmetric_unhinged_loss
  close(agce(LOGITS, LABELS, offset=0, q=0.7), generalized_cross_entropy_loss(LOGITS, LABELS, q=0.7))
  close(agce(LOGITS, LABELS, offset=2.0, q=1), miss)
  close(aul(LOGITS, LABELS, offset=2.0, q=1), miss)
  close(symmetric.symmetric_cross_entropy_loss(LOGITS, LABELS, balance=0), cross_entropy)
  close(symmetric.symmetric_cross_entropy_loss(LOGITS, LABELS, balance=1, log_zero=-4), 4 * miss)
  close(symmetric.reverse_cross_entropy_loss(LOGITS, LABELS), -np.log(1e-4) * miss)
  largest = hinge.crammer_singer_loss(LOGITS, LABELS, margin=1)
  close(largest, optax.losses.multiclass_hinge_loss(LOGITS, LABELS))
  close(largest, ldr_kl_loss(LOGITS, LABELS, temperature=0.0, margin=1.0))
  np.testing.assert_allclose(symmetric.jensen_shannon_loss(LOGITS, LABELS, label_weight=1e-9), cross_entropy, rtol=1e-6)
  # The limit at weight one is approached like 1 / log(1 - weight).
  near_one = symmetric.jensen_shannon_loss(LOGITS, LABELS, label_weight=1 - 1e-15)
  np.testing.assert_allclose(near_one, miss, atol=0.06)


def test_generalized_cross_entropy_gradient_without_offset_is_finite():
  logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
  loss = lambda z: active_passive.asymmetric_generalized_cross_entropy_loss(
    z, jnp.array([1, 1]), offset=0.0, q=0.5
  ).sum()
  assert np.all(np.isfinite(jax.grad(loss)(logits)))


def test_jensen_shannon_keeps_its_digits_for_small_weights():
  logits = jnp.asarray(LOGITS, jnp.float32)
  value = symmetric.jensen_shannon_loss(logits, LABELS, label_weight=1e-5)
  np.testing.assert_allclose(value, [_jensen_shannon(softmax(z), y, 1e-5) for z, y in zip(LOGITS, LABELS)], rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_do_not_fit_are_refused(name):
  loss = getattr(losses, name)
  with pytest.raises(ValueError, match="labels must have the shape"):
    loss(jnp.zeros((4, 3)), jnp.zeros((4, 1), jnp.int32))
  with pytest.raises(ValueError, match="labels must be integer"):
    loss(jnp.zeros((4, 3)), jnp.zeros(4))
  with pytest.raises(ValueError, match="logits must be floating"):
    loss(jnp.zeros((4, 3), jnp.int32), jnp.zeros(4, jnp.int32))


@pytest.mark.parametrize(
  "name, hparams",
  [
    ("truncated_generalized_cross_entropy_loss", {"q": 1.5}),
    ("truncated_generalized_cross_entropy_loss", {"threshold": 1.0}),
    ("symmetric_cross_entropy_loss", {"balance": -0.1}),
    ("symmetric_cross_entropy_loss", {"log_zero": 4.0}),
    ("jensen_shannon_loss", {"label_weight": 0.0}),
    ("jensen_shannon_loss", {"label_weight": 1.0}),
    ("reverse_cross_entropy_loss", {"log_zero": 1.0}),
    ("asymmetric_generalized_cross_entropy_loss", {"offset": -1.0}),
    ("asymmetric_generalized_cross_entropy_loss", {"q": 0.0}),
    ("asymmetric_unhinged_loss", {"offset": 1.0}),
    ("nce_rce_loss", {"active_weight": -1.0}),
    ("nce_agce_loss", {"passive_weight": float("nan")}),
    ("nce_aul_loss", {"offset": 0.5}),
    ("crammer_singer_loss", {"margin": -1.0}),
    ("weston_watkins_loss", {"margin": np.float32(-1)}),
    ("robust_log_loss", {"alpha": 0.0}),
  ],
)
def test_hyperparameters_outside_their_domain_are_refused(name, hparams):
  with pytest.raises(ValueError, match=f"{next(iter(hparams))} must lie in"):
    getattr(losses, name)(jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32), **hparams)


ROWS = [
  loss_row(symmetric.brier_loss),
  loss_row(symmetric.jensen_shannon_loss, label_weight=(0.1, 0.9)),
  loss_row(symmetric.mean_absolute_error_loss),
  loss_row(symmetric.reverse_cross_entropy_loss, log_zero=(-9.0, -4.0)),
  loss_row(symmetric.robust_log_loss, alpha=(0.01, 1.0)),
  loss_row(symmetric.symmetric_cross_entropy_loss, balance=(0.0, 1.0), log_zero=(-9.0, -4.0)),
]
