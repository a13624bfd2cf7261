"""Losses with a teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.losses import distillation
from jaxreg.losses.distillation import self_distillation_squared_loss
from jaxreg.losses.symmetric import brier_loss
from jaxreg.regularizers.unsquared_norm import unsquared_norm_penalty
from tests.conformance import taught_loss_row

pytestmark = pytest.mark.usefixtures("x64")
LOGITS, TEACHER = 2 * np.random.default_rng(0).normal(size=(2, 6, 5))
LABELS = np.random.default_rng(1).integers(0, 5, 6)


@pytest.mark.golden
def test_golden_14_self_distillation_loss(golden):
  names = []
  for name, arrays, _ in _file(golden).cases("dl"):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-15, err_msg=name)
    params = [jnp.asarray(arrays[key]) for key in arrays if key.startswith("param")]

    def data(logits, arrays=arrays):
      labels, teacher = jnp.asarray(arrays["labels"]), jnp.asarray(arrays["teacher_logits"])
      return self_distillation_squared_loss(logits, teacher, labels, target_weight=arrays["alpha"]).mean()

    def loss(logits, params, data=data, arrays=arrays):
      value = data(logits)
      return value + arrays["reg_coef"] * unsquared_norm_penalty(params), value

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, value), (logits_gradient, gradients) = both(jnp.asarray(arrays["student_logits"]), params)
    close(value, arrays["out_data_loss"])
    close(total, arrays["out_loss"])
    close(logits_gradient, arrays["grad_student_logits"])
    for key, gradient in zip((key for key in arrays if key.startswith("param")), gradients):
      close(gradient, arrays[f"grad_{key}"])
  assert names


def _file(golden):
  file = golden("14-self_distillation")
  file.meta.pop("cases", None)  # a list of texts, in which is nothing that the arrays do not have
  return file


def test_ends_of_the_weight():
  loss = lambda z, weight: self_distillation_squared_loss(z, TEACHER, LABELS, target_weight=weight)
  np.testing.assert_allclose(loss(LOGITS, 1.0), brier_loss(jnp.asarray(LOGITS), LABELS) / 5, rtol=1e-12)
  np.testing.assert_allclose(loss(TEACHER, 0.0), 0, atol=1e-15)
  each = self_distillation_squared_loss(LOGITS, TEACHER, LABELS, target_weight=np.linspace(0, 1, 6))
  np.testing.assert_allclose(each[2], loss(LOGITS, 0.4)[2], rtol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_two_terms_have_the_gradient_of_one_mixed_target(weight):
  truth = jax.nn.one_hot(LABELS, 5)
  mixed = weight * truth + (1 - weight) * jax.nn.softmax(TEACHER)
  single = lambda z: jnp.mean((jax.nn.softmax(z) - mixed) ** 2, -1).sum()
  double = lambda z: self_distillation_squared_loss(z, TEACHER, LABELS, target_weight=jnp.float64(weight)).sum()
  gradients = jax.jit(lambda z: (jax.grad(double)(z), jax.grad(single)(z)))(LOGITS)
  np.testing.assert_allclose(*gradients, rtol=1e-10, atol=1e-14)


def test_the_teacher_is_constant():
  loss = lambda teacher: self_distillation_squared_loss(LOGITS, teacher, LABELS, target_weight=0.5).sum()
  np.testing.assert_array_equal(jax.grad(loss)(TEACHER), 0)


def test_axis_and_masked_classes():
  labels = LABELS % 4
  expected = self_distillation_squared_loss(LOGITS[:, :4], TEACHER[:, :4], labels, target_weight=0.3)
  options = dict(target_weight=0.3, where=jnp.arange(5) < 4)
  np.testing.assert_allclose(self_distillation_squared_loss(LOGITS, TEACHER, labels, **options), expected, rtol=1e-12)
  options = dict(target_weight=0.3, axis=0)
  got = self_distillation_squared_loss(LOGITS[:, :4].T, TEACHER[:, :4].T, labels, **options)
  np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_bad_weight_and_teacher():
  for weight in (-0.1, 1.5, float("nan")):
    with pytest.raises(ValueError, match="target_weight must lie in"):
      self_distillation_squared_loss(LOGITS, TEACHER, LABELS, target_weight=weight)
  with pytest.raises(ValueError, match="teacher_logits"):
    self_distillation_squared_loss(LOGITS, TEACHER[:1], LABELS, target_weight=0.5)


@jax.jit
def _value_and_gradient(logits, teacher):
  loss = lambda z: self_distillation_squared_loss(z, teacher, jnp.array([1, 2]), target_weight=0.4)
  return loss(logits), jax.grad(lambda z: loss(z).sum())(logits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extreme_teachers(dtype):
  logits = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], dtype)
  for teacher in (logits, -logits, jnp.roll(logits, 1, axis=0)):
    values, gradient = _value_and_gradient(logits, teacher)
    assert values.dtype == dtype and jnp.isfinite(values).all() and jnp.isfinite(gradient).all()


ROWS = [
  taught_loss_row(distillation.self_distillation_squared_loss, target_weight=(0.0, 1.0)),
]
