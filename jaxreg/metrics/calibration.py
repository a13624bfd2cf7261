"""How well a classifier's probabilities say how often it is right: calibration, selective risk, proper scores."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_integer_labels, counted_labels, example_mask
from jaxreg.metrics.classification import metric_dtype, predicted_classes
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "area_under_risk_coverage",
  "brier_score",
  "excess_area_under_risk_coverage",
  "expected_calibration_error",
  "negative_log_likelihood",
]


def expected_calibration_error(
  probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 10, where: ArrayLike | None = None
) -> jax.Array:
  """ECE: the mean over examples of |accuracy - confidence| of the bin that the example's confidence is in.

  The confidence is the largest probability. The bins are equal and closed on the right, `(i / bins, (i + 1) / bins]`;
  other conventions give other numbers.

  >>> import jax.numpy as jnp
  >>> probabilities, labels = jnp.array([[0.8, 0.2]] * 4), jnp.array([0, 0, 1, 1])
  >>> print(expected_calibration_error(probabilities, labels).round(3))
  0.3

  Args:
    probabilities: floating `[..., classes]`.
    labels: integers `[...]`; an example whose label is outside `[0, classes)` does not count.
    bins: static, at least 1.
    where: boolean, of the labels' shape: the examples that count.

  Returns:
    Scalar in [0, 1], of the probabilities' dtype, float32 at least; NaN without examples, or when a probability is.

  Raises:
    ValueError: when shapes do not fit or `bins` is no positive integer.

  Reference: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
  """
  probabilities, labels, counted = _examples(probabilities, labels, where)
  bins = static_integer("bins", bins, low=1)
  confidence, right = _confidence(probabilities), predicted_classes(probabilities) == labels
  upper = (jnp.arange(1, bins + 1) / bins).astype(confidence.dtype)
  index = jnp.minimum(jnp.searchsorted(upper, confidence, side="left"), bins - 1)
  # The sum over a bin of accuracy minus confidence.
  gaps = jnp.zeros(bins, confidence.dtype).at[index].add(jnp.where(counted, right - confidence, 0))
  return _or_nan(jnp.sum(jnp.abs(gaps)) / jnp.sum(counted), confidence, counted)


def area_under_risk_coverage(
  probabilities: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
  """AURC: the error among the k most confident examples, averaged over all k.

  Of equally confident examples (saturated networks have many) any order counts alike: the result is the mean over
  their orders, and does not depend on that of the examples.

  >>> import jax.numpy as jnp
  >>> probabilities = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
  >>> print(area_under_risk_coverage(probabilities, jnp.array([0, 0, 0, 1])))
  0.0625

  Args:
    probabilities: floating `[..., classes]`.
    labels: as in `expected_calibration_error`.
    where: as in `expected_calibration_error`.

  Returns:
    Scalar in [0, 1], as in `expected_calibration_error`; papers report a thousand times it.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019,
    Section 2.
  """
  probabilities, labels, counted = _examples(probabilities, labels, where)
  confidence = _confidence(probabilities)
  wrong = (predicted_classes(probabilities) != labels) & counted
  area = jnp.sum(_risks(confidence, wrong, counted)) / jnp.sum(counted)
  return _or_nan(area, confidence, counted)


def excess_area_under_risk_coverage(
  probabilities: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
  """E-AURC: AURC minus that of the same predictions in the best order, all errors last; 0 at the least.

  >>> import jax.numpy as jnp
  >>> probabilities = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
  >>> print(excess_area_under_risk_coverage(probabilities, jnp.array([0, 0, 0, 1])))
  0.0

  Args:
    probabilities: floating `[..., classes]`.
    labels: as in `expected_calibration_error`.
    where: as in `expected_calibration_error`.

  Returns:
    Scalar in [0, 1], as in `expected_calibration_error`.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Geifman, Uziel, El-Yaniv, ICLR 2019, equation 2.
  """
  probabilities, labels, counted = _examples(probabilities, labels, where)
  confidence = _confidence(probabilities)
  wrong = (predicted_classes(probabilities) != labels) & counted
  # Differences of the risks, before they are summed, so that equal ones cancel.
  best = _risks(jnp.where(wrong, 0.0, 1.0).astype(confidence.dtype), wrong, counted)
  excess = jnp.sum(_risks(confidence, wrong, counted) - best) / jnp.sum(counted)
  return _or_nan(jnp.maximum(excess, 0), confidence, counted)


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """NLL: the mean of `-log p` of the labels, in nats.

  >>> import jax.numpy as jnp
  >>> print(negative_log_likelihood(jnp.zeros((3, 4)), jnp.array([0, 1, 2])).round(4))
  1.3863

  Args:
    logits: floating `[..., classes]`, or logarithms of probabilities; the softmax is taken here, because that of
      probabilities which were rounded to 0 would be infinite.
    labels: as in `expected_calibration_error`.
    where: as in `expected_calibration_error`.

  Returns:
    Scalar, at least 0; its dtype and NaN as in `expected_calibration_error`.

  Raises:
    ValueError: when shapes do not fit.

  Reference: none.
  """
  logits, labels, counted = _examples(logits, labels, where, name="logits")
  own = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own, where=counted)


def brier_score(probabilities: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """The mean squared distance of the probabilities from the one-hot label, `sum_k (p_k - [k = y])^2`.

  >>> import jax.numpy as jnp
  >>> print(brier_score(jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([0, 0])))
  0.25

  Args:
    probabilities: floating `[..., classes]`.
    labels: as in `expected_calibration_error`.
    where: as in `expected_calibration_error`.

  Returns:
    Scalar in [0, 2], as in `expected_calibration_error`. `losses.brier_loss` is the same as a loss of logits.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 1950.
  """
  probabilities, labels, counted = _examples(probabilities, labels, where)
  truth = jax.nn.one_hot(labels, probabilities.shape[-1], dtype=probabilities.dtype)
  return jnp.mean(jnp.sum((probabilities - truth) ** 2, axis=-1), where=counted)


def _examples(scores, labels, where, name="probabilities"):
  """Flat scores in float32 at least, labels in `[0, classes)`, and which examples count."""
  scores, labels = as_array(name, scores), as_array("labels", labels)
  try:
    check_integer_labels(scores, labels)
  except ValueError as error:
    raise ValueError(str(error).replace("logits", name)) from None
  scores = scores.astype(metric_dtype(scores))
  labels, counted = counted_labels(labels, scores.shape[-1])
  counted &= example_mask(where, labels.shape)
  return scores.reshape(-1, scores.shape[-1]), labels.reshape(-1), counted.reshape(-1)


def _confidence(probabilities):
  return jnp.max(probabilities, axis=-1)


def _risks(confidence, wrong, counted):
  """Errors among the k most confident, over k, for k from 1 to the number that counts; zeros follow."""
  order = jnp.argsort(jnp.where(counted, -confidence, jnp.inf))
  ranked = jnp.where(counted, -confidence, jnp.inf)[order]
  errors = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(wrong[order].astype(jnp.int32))])
  before, after = (jnp.searchsorted(ranked, ranked, side=side) for side in ("left", "right"))
  after = jnp.minimum(after, jnp.sum(counted))
  k = jnp.arange(1, confidence.size + 1)
  within = (errors[after] - errors[before]).astype(confidence.dtype) / jnp.maximum(after - before, 1)
  expected = errors[before] + (k - before) * within
  return jnp.where(k <= jnp.sum(counted), expected / k, 0)


def _or_nan(value, confidence, counted):
  return jnp.where(jnp.any(jnp.isnan(confidence) & counted), jnp.nan, value)
