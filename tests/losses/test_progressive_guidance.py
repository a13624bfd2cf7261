"""Guided cross-entropy and the three forms' loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import progressive_guidance
from tests.conformance import BAD_LABELS, draw_classification, extreme_logits, row, taught_loss_row

rng = np.random.default_rng(0)
LOGITS = [2 * rng.normal(size=(6, 5)) for _ in range(3)]
LABELS = rng.integers(0, 5, 6)


@pytest.mark.golden
def test_golden_11_eq_net_guidance(golden, x64):
  file = golden("11-eq_net")
  read = 0
  for _, arrays, _ in file.cases():
    if "student_logits" not in arrays:
      continue

    def loss(student, arrays=arrays):
      guidance = file.meta["alpha"]
      return progressive_guidance.guided_cross_entropy_loss(
        student, jnp.asarray(arrays["teacher_logits"]), jnp.asarray(arrays["labels"]), guidance=guidance
      ).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(arrays["student_logits"]))
    np.testing.assert_allclose(value, arrays["out_loss"], rtol=1e-8)
    np.testing.assert_allclose(gradient, arrays["grad_student_logits"], rtol=1e-8, atol=1e-12)
    read += 1
  assert read


@jax.jit
def three(high, random, low):
  """The loss of each example and the gradient of their sum in each form's logits."""
  call = lambda *logits: progressive_guidance.progressive_guidance_loss(*logits, jnp.asarray(LABELS))
  return call(high, random, low), jax.grad(lambda *logits: call(*logits).sum(), (0, 1, 2))(high, random, low)


def test_no_gradient_to_teachers(x64):
  _, gradients = three(*LOGITS)
  soft, one_hot = [np.asarray(jax.nn.softmax(z)) for z in LOGITS], np.eye(5)[LABELS]
  np.testing.assert_allclose(gradients[0], soft[0] - one_hot, atol=1e-12)
  np.testing.assert_allclose(gradients[1], soft[1] - (one_hot + soft[0]) / 2, atol=1e-12)
  np.testing.assert_allclose(gradients[2], soft[2] - (one_hot + soft[1]) / 2, atol=1e-12)


def test_identical_logits_leave_the_hard_labels(x64):
  values, _ = three(LOGITS[0], LOGITS[0], LOGITS[0])
  np.testing.assert_allclose(
    values, 2 * optax.softmax_cross_entropy_with_integer_labels(LOGITS[0], LABELS), rtol=1e-12
  )  # fmt: skip


def test_without_guidance_it_is_the_sum_of_cross_entropies(x64):
  values = progressive_guidance.progressive_guidance_loss(*LOGITS, jnp.asarray(LABELS), guidance=0.0)
  expected = sum(optax.softmax_cross_entropy_with_integer_labels(z, LABELS) for z in LOGITS)
  np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_bad_input():
  logits, labels = jnp.asarray(LOGITS[0]), jnp.asarray(LABELS)
  with pytest.raises(ValueError, match="guidance must lie in"):
    progressive_guidance.guided_cross_entropy_loss(logits, logits, labels, guidance=1.5)
  with pytest.raises(ValueError, match="equal shapes"):
    progressive_guidance.guided_cross_entropy_loss(logits, logits[:1], labels)


def _coarsest(logits, labels, *, axis=-1, **keywords):
  """The loss of the coarsest form, which teaches none, with two finer ones that prefer the later classes."""
  finer = jax.lax.broadcasted_iota(logits.dtype, logits.shape, axis % logits.ndim)
  return progressive_guidance.progressive_guidance_loss(-finer, finer, logits, labels, axis=axis, **keywords)


ROWS = [
  taught_loss_row(progressive_guidance.guided_cross_entropy_loss, guidance=(0.0, 1.0)),
  row(
    progressive_guidance.progressive_guidance_loss,
    draw_classification,
    call=_coarsest,
    extreme=extreme_logits,
    bad=BAD_LABELS,
    examples="any",
    options=dict(guidance=(0.0, 1.0)),
  ),
]
