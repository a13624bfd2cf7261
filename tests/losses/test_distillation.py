"""Losses with a teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxreg.losses import distillation
from jaxreg.losses.distillation import (
  binary_kl_loss,
  binary_kl_norm_loss,
  self_distillation_squared_loss,
  softmax_kd_loss,
)
from jaxreg.losses.symmetric import brier_loss
from jaxreg.regularizers.unsquared_norm import unsquared_norm_penalty
from tests.conformance import BAD_SAME_SHAPE, draw_logits, extreme_logits, row, taught_loss_row

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


OF_TEACHERS = {"kd": softmax_kd_loss, "binarykl": binary_kl_loss, "binaryklnorm": binary_kl_norm_loss}


@pytest.mark.golden
def test_golden_dhkd_losses(golden):
  names = []
  for name, arrays, _ in golden("47-dhkd").cases("loss"):
    names.append(name)
    student, teacher = jnp.asarray(arrays["student"]), jnp.asarray(arrays["teacher"])
    for short, loss in OF_TEACHERS.items():
      temperature = arrays["kd_T" if short == "kd" else "tau"]
      mean = lambda z, loss=loss, t=temperature, teacher=teacher: loss(z, teacher, temperature=t).mean()
      value, gradient = jax.jit(jax.value_and_grad(mean))(student)
      # The official code clamps sigmoids at 1e-8, which costs about 1e-10.
      np.testing.assert_allclose(value, arrays[f"out_{short}"], rtol=1e-8, atol=1e-8, err_msg=f"{name} {short}")
      np.testing.assert_allclose(gradient, arrays[f"grad_student_{short}"], rtol=1e-8, atol=1e-8, err_msg=name)
  assert names


def test_binary_kl_is_the_divergence_of_bernoulli_variables():
  p, q = special.expit(TEACHER / 3), special.expit(LOGITS / 3)
  divergence = special.rel_entr(p, q) + special.rel_entr(1 - p, 1 - q)
  values = binary_kl_loss(LOGITS, TEACHER, temperature=3.0)
  np.testing.assert_allclose(values, 9 * divergence.sum(1), atol=1e-12)
  assert (values > 0).all() and not np.any(binary_kl_loss(TEACHER, TEACHER))
  gradient = jax.grad(lambda z: binary_kl_loss(z, TEACHER, temperature=3.0).sum())(LOGITS)
  np.testing.assert_allclose(gradient, 3 * (q - p), atol=1e-12)


def test_binary_kl_norm_is_log_cosh():
  difference = LOGITS - TEACHER
  values = binary_kl_norm_loss(LOGITS, TEACHER, temperature=3.0)
  np.testing.assert_allclose(values, 9 * np.log(np.cosh(difference / 6)).sum(1), atol=1e-12)
  gradient = jax.grad(lambda z: binary_kl_norm_loss(z, TEACHER, temperature=3.0).sum())(LOGITS)
  np.testing.assert_allclose(gradient, 1.5 * np.tanh(difference / 6), atol=1e-12)
  assert (np.abs(gradient) <= 1.5).all()
  # BinaryKL of the difference against a teacher that is undecided.
  np.testing.assert_allclose(binary_kl_loss(difference, 0 * TEACHER, temperature=3.0), values, atol=1e-12)


def test_limits_of_the_temperature():
  difference = np.clip(LOGITS - TEACHER, -5, 5)
  for loss in (binary_kl_loss, binary_kl_norm_loss):
    values = loss(TEACHER + difference, TEACHER, temperature=1e4)
    np.testing.assert_allclose(values, (difference**2).sum(1) / 8, rtol=1e-6)
  far = np.sign(difference) * np.maximum(np.abs(difference), 1)
  values = binary_kl_norm_loss(TEACHER + far, TEACHER, temperature=1e-3)
  np.testing.assert_allclose(values, 1e-3 / 2 * np.abs(far).sum(1), rtol=1e-2)


def test_only_the_softmax_forgets_a_common_shift():
  shifted = TEACHER + np.linspace(1, 3, 6)[:, None]
  np.testing.assert_allclose(softmax_kd_loss(LOGITS, shifted), softmax_kd_loss(LOGITS, TEACHER), rtol=1e-10)
  for loss in (binary_kl_loss, binary_kl_norm_loss):
    assert (np.abs(loss(LOGITS, shifted) - loss(LOGITS, TEACHER)) > 1e-3).all()


@pytest.mark.parametrize("loss", OF_TEACHERS.values(), ids=OF_TEACHERS)
def test_teachers_are_constant_and_temperatures_positive(loss):
  np.testing.assert_array_equal(jax.grad(lambda teacher: loss(LOGITS, teacher).sum())(TEACHER), 0)
  each = loss(LOGITS, TEACHER, temperature=np.linspace(1, 6, 6))
  np.testing.assert_allclose(each[2], loss(LOGITS, TEACHER, temperature=3.0)[2], rtol=1e-12)
  with pytest.raises(ValueError, match="temperature must lie in"):
    loss(LOGITS, TEACHER, temperature=0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("loss", OF_TEACHERS.values(), ids=OF_TEACHERS)
def test_finite_where_a_clamped_sigmoid_is_not(loss, dtype):
  """The official code's float32 losses are infinite, and their gradients NaN, from logits of about 40 on."""
  logits = jnp.array([[40.0, -40, 0], [1e4, -1e4, 0], [-1e4, 1e4, 1e4]], dtype)
  for teacher in (logits, -logits, jnp.zeros_like(logits)):
    values, gradient = jax.jit(lambda z, t: (loss(z, t), jax.grad(lambda z: loss(z, t).sum())(z)))(logits, teacher)
    assert values.dtype == gradient.dtype == dtype
    assert jnp.isfinite(values).all() and jnp.isfinite(gradient).all() and (values >= 0).all()


def _teacher_row(function):
  return row(
    function,
    lambda rng: (draw_logits(rng), draw_logits(rng)),
    extreme=lambda z, t: (*extreme_logits(z), *extreme_logits(t[::-1])),
    bad=(*BAD_SAME_SHAPE, ("logits", lambda z, t: (z.astype(np.int32), t))),
    examples="any",
    options=dict(temperature=(1.0, 4.0)),
  )


ROWS = [
  taught_loss_row(distillation.self_distillation_squared_loss, target_weight=(0.0, 1.0)),
  *map(_teacher_row, OF_TEACHERS.values()),
]
