"""Cauchy-Schwarz divergences and mutual information of samples, and the information bottleneck for regression.

With Gaussian kernels all of them are logarithms of sums over pairs, computed from the logarithms of the kernels: values
and gradients stay finite however far apart the samples are. Examples of a batch are coupled, so that a value belongs to
the whole batch, and values of batches of different sizes differ (by a bias of order 1 / batch). `where` leaves examples
out; nothing of them is read. With `chunk_size` kernels of so many rows exist at a time, and are computed again in the
backward pass: memory grows linearly with the batch. Under `pmap` or `shard_map` every device takes its own rows against
those of all devices (`axis_name`); gradients of the sum of all devices' values are then those of one device times their
number, which a mean over devices undoes. Under a sharded `jit` nothing is needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, example_mask
from jaxreg.kernels.rbf import gaussian_log_kernel
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.metrics.pairs import in_blocks
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "BottleneckTerms",
  "conditional_cs_divergence",
  "cs_divergence",
  "cs_information_bottleneck_loss",
  "cs_mutual_information",
  "normalized_cs_mutual_information",
  "squared_mmd",
]

ESTIMATORS = ("paper", "reference_code")


class BottleneckTerms(NamedTuple):
  """The two terms of `cs_information_bottleneck_loss`, scalars.

  Attributes:
    prediction: the conditional divergence of predictions and targets.
    compression: the normalised mutual information of representation and inputs.
  """

  prediction: jax.Array
  compression: jax.Array


def cs_divergence(
  samples: ArrayLike,
  others: ArrayLike,
  *,
  bandwidth: ArrayLike,
  where: ArrayLike | None = None,
  where_others: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The Cauchy-Schwarz divergence of two samples, `-2 log cos` of the angle between their kernel mean embeddings.

  It estimates `log(|p|^2 |q|^2 / <p, q>^2)` of the densities smoothed by the kernel: not negative, symmetric, and
  finite where the samples share no support. For Gaussians half of it is below both Kullback-Leibler divergences.

  >>> import jax.numpy as jnp
  >>> round(cs_divergence(jnp.array([0.0]), jnp.array([3.0]), bandwidth=1.0).item(), 4)  # 3^2
  9.0

  Args:
    samples: floating `[samples, dimensions]`, or `[samples]` of one dimension.
    others: floating `[others, dimensions]`, or `[others]`.
    bandwidth: of the Gaussian kernel, positive scalar; may be traced.
    where: boolean `[samples]`: those that count.
    where_others: boolean `[others]`: those that count.
    chunk_size: static; rows of kernels at a time, None for all.
    axis_name: static; the axis of devices that splits both samples.

  Returns:
    Scalar, in the dtype of `samples`; 0 where a sample is empty.

  Raises:
    ValueError: when shapes or dtypes do not fit, or the bandwidth is not positive.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, the divergence of densities and its estimator.
  """
  pair = _Pair.of(samples, others, where, where_others, axis_name)
  own, cross, other = pair.log_sums(bandwidth, chunk_size)
  return narrowed(jnp.where(pair.exist, own + other - 2 * cross, 0), pair.first.dtype)


def squared_mmd(
  samples: ArrayLike,
  others: ArrayLike,
  *,
  bandwidth: ArrayLike,
  where: ArrayLike | None = None,
  where_others: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The squared maximum mean discrepancy: the squared distance of the embeddings whose angle `cs_divergence` measures.

  Every sample is a pair with itself, too (the biased estimator, a V-statistic).

  >>> import jax.numpy as jnp
  >>> round(squared_mmd(jnp.array([0.0]), jnp.array([3.0]), bandwidth=1.0).item(), 4)  # 2 - 2 exp(-4.5)
  1.9778

  Args:
    samples: as in `cs_divergence`, as the rest.
    others: floating `[others, dimensions]`, or `[others]`.
    bandwidth: positive scalar; may be traced.
    where: boolean `[samples]`.
    where_others: boolean `[others]`.
    chunk_size: static.
    axis_name: static.

  Returns:
    Scalar, in the dtype of `samples`; 0 where a sample is empty.

  Raises:
    ValueError: when shapes or dtypes do not fit, or the bandwidth is not positive.

  Reference: Gretton, Borgwardt, Rasch, Schölkopf, Smola, "A Kernel Two-Sample Test", JMLR 2012, equation 5.
  """
  pair = _Pair.of(samples, others, where, where_others, axis_name)
  own, cross, other = pair.log_sums(bandwidth, chunk_size)
  rows, columns = (jnp.log(jnp.sum(side.counted).astype(own.dtype)) for side in (pair.first, pair.second))
  value = jnp.exp(own - 2 * rows) + jnp.exp(other - 2 * columns) - 2 * jnp.exp(cross - rows - columns)
  return narrowed(jnp.where(pair.exist, value, 0), pair.first.dtype)


def conditional_cs_divergence(
  predictions: ArrayLike,
  targets: ArrayLike,
  inputs: ArrayLike,
  *,
  input_bandwidth: ArrayLike = 1.0,
  target_bandwidth: ArrayLike = 1.0,
  estimator: str = "paper",
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The divergence of what is predicted and what is observed at given inputs: a loss for regression.

  A residual far beyond `target_bandwidth` has no gradient: outliers do not count, nor do predictions that start so far
  off. The kernel of the inputs says which examples count as of the same input: with a small `input_bandwidth` only each
  itself (then the value is `-2 log mean exp(-|residual|^2 / (2 target_bandwidth^2))`, the correntropy loss), with a
  large one all of them, and the loss compares distributions without regard to which prediction is whose. Of
  standardised inputs of ten features a bandwidth of 1 trains, `sqrt(10)` does not. The estimate may be slightly
  negative, and is not symmetric.

  >>> import jax.numpy as jnp
  >>> inputs, targets = jnp.array([[0.0], [50.0]]), jnp.array([1.0, 2.0])
  >>> round(conditional_cs_divergence(targets + 0.5, targets, inputs).item(), 4)  # the correntropy loss, 0.5^2
  0.25

  Args:
    predictions: floating `[examples, outputs]`, or `[examples]` of one output.
    targets: floating, of the same shape.
    inputs: floating `[examples, features]`, or `[examples]`.
    input_bandwidth: of the kernel of the inputs, positive scalar; may be traced.
    target_bandwidth: of the kernel of targets and predictions, positive scalar; may be traced.
    estimator: static; `paper`, in nats, or `reference_code`: in bits, and with sums of squared kernels where the paper
      has squared sums of kernels. (That code's training script passes vectors as targets, for which its function is
      squared error: `examples * mean squared error / (bandwidth^2 log 2)`.)
    where: boolean `[examples]`: those that count.
    chunk_size: static; rows of kernels at a time, None for all.
    axis_name: static; the axis of devices that splits the examples.

  Returns:
    Scalar, in the dtype of the predictions; 0 where no example counts.

  Raises:
    ValueError: when shapes or dtypes do not fit, a bandwidth is not positive, or the estimator is unknown.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, the conditional divergence and its estimator.
  """
  _check_estimator(estimator)
  _check_bandwidths(input_bandwidth=input_bandwidth, target_bandwidth=target_bandwidth)
  batch = _Batch.of(where, axis_name, predictions=predictions, targets=targets, inputs=inputs)
  if batch.rows[0].shape != batch.rows[1].shape:
    raise ValueError(f"targets must have the shape of predictions, {jnp.shape(predictions)}, got {jnp.shape(targets)}.")
  # Summands are `kernels * kernels / weights`; weights are sums of kernels to this power, or of this power of them.
  powers = (1, 2) if estimator == "paper" else (2, 1)

  def exponents(rows, others):
    (predicted, target, given), (predicted2, target2, given2) = rows, others
    kernel = gaussian_log_kernel(given, given2, bandwidth=input_bandwidth)
    near = lambda a, b: kernel + gaussian_log_kernel(a, b, bandwidth=target_bandwidth)
    return powers[0] * kernel, near(target, target2), near(predicted, predicted2), near(predicted, target2)

  weights, *terms = batch.log_row_sums(exponents, chunk_size)
  observed, predicted, cross = (batch.log_sum(term - powers[1] * weights) for term in terms)
  value = observed + predicted - 2 * cross
  return batch.value(value if estimator == "paper" else value / jnp.log(2.0).astype(value.dtype))


def cs_mutual_information(
  representations: ArrayLike,
  inputs: ArrayLike,
  *,
  representation_bandwidth: ArrayLike = 1.0,
  input_bandwidth: ArrayLike = 1.0,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The Cauchy-Schwarz divergence of the joint distribution and the product of its margins (quadratic mutual
  information), in nats.

  Not negative, and symmetric in representations and inputs. With an `input_bandwidth` far below the distances of inputs
  it is the Rényi entropy of order 2 of the representations alone: as distances grow with the dimension, so should
  bandwidths, for example like its square root, or as the rules in `kernels.bandwidths` have it.

  >>> import jax.numpy as jnp
  >>> inputs, representations = jnp.array([[0.0], [0.0], [9.0], [9.0]]), jnp.array([[0.0], [9.0], [0.0], [9.0]])
  >>> abs(cs_mutual_information(representations, inputs).item()) < 1e-6  # independent
  True

  Args:
    representations: floating `[examples, dimensions]`, or `[examples]`.
    inputs: floating `[examples, features]`, or `[examples]`.
    representation_bandwidth: of the kernel of the representations, positive scalar; may be traced.
    input_bandwidth: of the kernel of the inputs, positive scalar; may be traced.
    where: boolean `[examples]`: those that count.
    chunk_size: static; rows of kernels at a time, None for all.
    axis_name: static; the axis of devices that splits the examples.

  Returns:
    Scalar, in the dtype of the representations; 0 where no example counts.

  Raises:
    ValueError: when shapes or dtypes do not fit, or a bandwidth is not positive.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, the Cauchy-Schwarz quadratic mutual information and its estimator.
  """
  batch, (between, *_) = _informations(
    representations, inputs, representation_bandwidth, input_bandwidth, where, chunk_size, axis_name, normalized=False
  )
  return batch.value(between)


def normalized_cs_mutual_information(
  representations: ArrayLike,
  inputs: ArrayLike,
  *,
  representation_bandwidth: ArrayLike = 1.0,
  input_bandwidth: ArrayLike = 1.0,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """`I(x; t) / sqrt(I(x; x) I(t; t))` of the mutual informations `cs_mutual_information`: 1 for equal kernels.

  The scale of the information does not count in it. It may exceed 1.

  >>> import jax.numpy as jnp
  >>> inputs = jnp.array([[0.0], [1.0], [3.0]])
  >>> round(normalized_cs_mutual_information(inputs + 5, inputs).item(), 4)
  1.0

  Args:
    representations: as in `cs_mutual_information`, as the rest.
    inputs: floating `[examples, features]`, or `[examples]`.
    representation_bandwidth: positive scalar; may be traced.
    input_bandwidth: positive scalar; may be traced.
    where: boolean `[examples]`.
    chunk_size: static.
    axis_name: static.

  Returns:
    Scalar, in the dtype of the representations; 0 with gradient 0 where one of both says nothing of itself, to
    rounding: constant representations or inputs.

  Raises:
    ValueError: when shapes or dtypes do not fit, or a bandwidth is not positive.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, the compression term (as in the official code).
  """
  batch, (between, *selves) = _informations(
    representations, inputs, representation_bandwidth, input_bandwidth, where, chunk_size, axis_name, normalized=True
  )
  none = (selves[0] <= _rounding(between)) | (selves[1] <= _rounding(between))  # NaN is not
  root = jnp.sqrt(jnp.where(none, 1, selves[0])) * jnp.sqrt(jnp.where(none, 1, selves[1]))
  return batch.value(jnp.where(none, 0, between / root))


def cs_information_bottleneck_loss(
  predictions: ArrayLike,
  targets: ArrayLike,
  representations: ArrayLike,
  inputs: ArrayLike,
  *,
  weight: ArrayLike,
  input_bandwidth: ArrayLike = 1.0,
  target_bandwidth: ArrayLike = 1.0,
  representation_bandwidth: ArrayLike = 1.0,
  compression_input_bandwidth: ArrayLike | None = None,
  estimator: str = "paper",
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, BottleneckTerms]:
  """`conditional_cs_divergence` of the predictions plus `weight` times `normalized_cs_mutual_information`.

  Predictions that say what the targets are from a representation that says as little as possible of the inputs. No
  distribution of the representation is assumed, and nothing is sampled. Standardise inputs and targets. The prediction
  term needs a small `input_bandwidth`, the compression term larger ones, about the square roots of the dimensions.

  >>> import jax.numpy as jnp
  >>> inputs, targets = jnp.array([[0.0], [50.0]]), jnp.array([1.0, 2.0])
  >>> loss, terms = cs_information_bottleneck_loss(targets + 0.5, targets, inputs, inputs, weight=0.1)
  >>> round(loss.item(), 4), round(terms.prediction.item(), 4), round(terms.compression.item(), 4)
  (0.35, 0.25, 1.0)

  Args:
    predictions: floating `[examples, outputs]`, or `[examples]` of one output.
    targets: floating, of the same shape.
    representations: floating `[examples, dimensions]`: what the predictions are computed from.
    inputs: floating `[examples, features]`, or `[examples]`.
    weight: of the compression, the paper's beta, non-negative scalar; may be traced.
    input_bandwidth: as in `conditional_cs_divergence`.
    target_bandwidth: as in `conditional_cs_divergence`.
    representation_bandwidth: as in `cs_mutual_information`.
    compression_input_bandwidth: the inputs' bandwidth in the compression term; None takes `input_bandwidth`, as in the
      official code.
    estimator: static; as in `conditional_cs_divergence`.
    where: boolean `[examples]`: those that count.
    chunk_size: static; rows of kernels at a time, None for all.
    axis_name: static; the axis of devices that splits the examples.

  Returns:
    Scalar in the dtype of the predictions, and `BottleneckTerms`.

  Raises:
    ValueError: when shapes or dtypes do not fit, or a hyperparameter is out of range.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, the objective.
  """
  check_hyperparameter("weight", weight, low=0, shape=())
  if compression_input_bandwidth is not None:
    _check_bandwidths(compression_input_bandwidth=compression_input_bandwidth)
  options = dict(where=where, chunk_size=chunk_size, axis_name=axis_name)
  prediction = conditional_cs_divergence(
    predictions, targets, inputs, input_bandwidth=input_bandwidth, target_bandwidth=target_bandwidth,
    estimator=estimator, **options,
  )  # fmt: skip
  compression = normalized_cs_mutual_information(
    representations,
    inputs,
    representation_bandwidth=representation_bandwidth,
    input_bandwidth=input_bandwidth if compression_input_bandwidth is None else compression_input_bandwidth,
    **options,
  )
  wide = widened(compression)
  loss = widened(prediction) + jnp.asarray(weight, wide.dtype) * wide
  return narrowed(loss, prediction.dtype), BottleneckTerms(prediction, compression)


class _Batch(NamedTuple):
  """Arrays of the same examples, as the sums over pairs take them."""

  rows: tuple[jax.Array, ...]  # each [rows, dimensions], float32 at least; what does not count holds a row that does
  others: tuple[jax.Array, ...]  # those of all devices
  counted: jax.Array  # booleans, of all devices; all of them true if none counts
  exists: jax.Array  # boolean: whether one counts
  axis_name: str | None
  dtype: Any  # of the result

  @classmethod
  def of(cls, where, axis_name, **arrays):
    columns = {name: _columns(name, array) for name, array in arrays.items()}
    first = next(iter(columns.values()))
    for name, array in columns.items():
      if len(array) != len(first):
        raise ValueError(f"{name} must have one row for each of {len(first)} examples, got shape {array.shape}.")
    counted = example_mask(where, first.shape[:1])
    rows = tuple(_only_counted(widened(array), counted) for array in columns.values())
    others = (rows, counted) if axis_name is None else jax.lax.all_gather((rows, counted), axis_name, tiled=True)
    exists = jnp.any(others[1])
    return cls(rows, others[0], others[1] | ~exists, exists, axis_name, first.dtype)

  def log_row_sums(self, exponents: Callable, chunk_size, columns: "_Batch | None" = None) -> tuple[jax.Array, ...]:
    """Logarithms `[examples]` of sums of exponentials over the columns that count, of the rows of all devices."""
    columns = self if columns is None else columns

    def of(rows):
      found = exponents(rows, columns.others)
      return tuple(logsumexp(jnp.where(columns.counted, each, -jnp.inf), axis=1) for each in found)

    if chunk_size is None:
      sums = of(self.rows)
    else:
      sums = in_blocks(jax.checkpoint(of), self.rows, static_integer("chunk_size", chunk_size, low=1))
    return sums if self.axis_name is None else jax.lax.all_gather(sums, self.axis_name, tiled=True)

  def log_sum(self, values: jax.Array) -> jax.Array:
    """The logarithm of the sum of exponentials over the examples that count."""
    return logsumexp(jnp.where(self.counted, values, -jnp.inf))

  def value(self, value: jax.Array) -> jax.Array:
    """A result as it is returned."""
    return narrowed(jnp.where(self.exists, value, 0), self.dtype)


class _Pair(NamedTuple):
  """Two samples."""

  first: _Batch
  second: _Batch
  exist: jax.Array  # boolean

  @classmethod
  def of(cls, samples, others, where, where_others, axis_name):
    first, second = _Batch.of(where, axis_name, samples=samples), _Batch.of(where_others, axis_name, others=others)
    if first.rows[0].shape[1] != second.rows[0].shape[1]:
      shapes = jnp.shape(samples), jnp.shape(others)
      raise ValueError(f"others must have the dimensions of samples, got shapes {shapes[0]} and {shapes[1]}.")
    return cls(first, second, first.exists & second.exists)

  def log_sums(self, bandwidth, chunk_size):
    """Logarithms of the sums of kernels within the first sample, between both, and within the second."""
    kernel = lambda rows, others: (gaussian_log_kernel(rows[0], others[0], bandwidth=bandwidth),)
    pairs = (self.first, self.first), (self.first, self.second), (self.second, self.second)
    return [rows.log_sum(*rows.log_row_sums(kernel, chunk_size, others)) for rows, others in pairs]


def _informations(
  representations, inputs, representation_bandwidth, input_bandwidth, where, chunk_size, axis_name, *, normalized
):
  """The batch, and the information of both; with `normalized` also that of each about itself."""
  _check_bandwidths(representation_bandwidth=representation_bandwidth, input_bandwidth=input_bandwidth)
  batch = _Batch.of(where, axis_name, representations=representations, inputs=inputs)

  def exponents(rows, others):
    a = gaussian_log_kernel(rows[0], others[0], bandwidth=representation_bandwidth)
    b = gaussian_log_kernel(rows[1], others[1], bandwidth=input_bandwidth)
    return (a, b, a + b, 2 * a, 2 * b) if normalized else (a, b, a + b)

  a, b, between, *selves = batch.log_row_sums(exponents, chunk_size)

  def information(joint, a, b):
    # The numbers of examples cancel.
    return batch.log_sum(joint) + batch.log_sum(a) + batch.log_sum(b) - 2 * batch.log_sum(a + b)

  of_selves = [information(joint, margin, margin) for joint, margin in zip(selves, (a, b))]
  return batch, [information(between, a, b), *of_selves]


def _rounding(information):
  """What the information of a constant about itself is below."""
  return 64 * jnp.finfo(information.dtype).eps


def _columns(name, array):
  """`[rows, dimensions]` of `[rows]` or `[rows, dimensions]`."""
  check_float(name, array)
  array = as_array(name, array)
  if array.ndim not in (1, 2):
    raise ValueError(f"{name} must be [rows] or [rows, dimensions], got shape {array.shape}.")
  return array[:, None] if array.ndim == 1 else array


def _only_counted(array, counted):
  """The rows, of which those that do not count are like the first that does: not read, and no outliers."""
  if not len(array):
    return array
  first = jax.lax.stop_gradient(array[jnp.argmax(counted)])
  return jnp.where(counted[:, None], array, jnp.where(jnp.any(counted), first, 0))


def _check_bandwidths(**bandwidths):
  for name, value in bandwidths.items():
    check_hyperparameter(name, value, low=0, open_low=True, shape=())


def _check_estimator(estimator):
  if estimator not in ESTIMATORS:
    raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}.")
