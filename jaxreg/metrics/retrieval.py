"""How well neighbours in an embedding share a class, and how evenly one threshold serves all classes.

Every example is a query and all others are its gallery. The similarities of a block of queries exist at a time, so that
60,000 embeddings fit in memory. Examples whose label is negative, or that `where` leaves out, are neither query nor
gallery. Similarities are cosines, distances those of embeddings of length one. Of equal similarities those of other
classes come first, so that equal embeddings retrieve nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, dtype_of, example_mask, widened_integers
from jaxreg.metrics.norms import normalized_rows
from jaxreg.metrics.pairs import Rows, in_blocks, pairs_of

__all__ = [
  "UtilityCurves",
  "calibration_range",
  "epsilon_opis",
  "mean_average_precision_at_r",
  "opis",
  "r_precision",
  "recall_at_k",
  "utility_curves",
  "utilization",
]

BLOCK = 512
FALSE_ACCEPT_RATES = (0.01, 0.10)


class UtilityCurves(NamedTuple):
  """How well thresholds of the distance separate each class.

  Attributes:
    sensitivity: `[classes, thresholds]`, the fraction of pairs within the class at most so far apart.
    specificity: `[classes, thresholds]`, the fraction of pairs with one end in the class that are farther apart.
    utility: `[classes, thresholds]`, the harmonic mean of both.
    counted: booleans `[classes]`, whether a class has a pair of its own and one with another class; the others' curves
      are 0.
  """

  sensitivity: jax.Array
  specificity: jax.Array
  utility: jax.Array
  counted: jax.Array


def recall_at_k(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  k: ArrayLike = 1,
  where: ArrayLike | None = None,
  block_size: int = BLOCK,
) -> jax.Array:
  """The fraction of queries with an example of their class among the k nearest.

  >>> import jax.numpy as jnp
  >>> embeddings, labels = jnp.array([[1.0, 0.0], [2.0, 0.1], [1.0, 0.3], [0.0, 1.0]]), jnp.array([0, 0, 1, 1])
  >>> [recall_at_k(embeddings, labels, k=k).item() for k in (1, 3)]
  [0.75, 1.0]

  Args:
    embeddings: floating `[examples, features]`.
    labels: integers `[examples]`; an example with a negative one does not count.
    k: positive scalar; may be traced.
    where: boolean `[examples]`, the examples that count.
    block_size: static; how many queries at a time.

  Returns:
    Scalar in [0, 1], float32 at least, over the queries whose class has another example; NaN if there are none, and
    of embeddings that are NaN.

  Raises:
    ValueError: when shapes or dtypes do not fit or `k` is not positive.

  Reference: the measure of Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011.
  """
  check_hyperparameter("k", k, low=1, shape=())
  gallery = _gallery(embeddings, labels, where)

  def of_block(similarities, positive, negative):
    best = jnp.max(similarities, axis=-1, where=positive, initial=-jnp.inf, keepdims=True)
    ahead = jnp.sum(negative & (similarities >= best), axis=-1)
    return (ahead < k).astype(similarities.dtype), jnp.any(positive, axis=-1)

  return _mean(*_map_queries(of_block, gallery, block_size), gallery)


def r_precision(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  max_relevant: int | None = None,
  where: ArrayLike | None = None,
  block_size: int = BLOCK,
) -> jax.Array:
  """The mean over queries of the fraction of their class among the R nearest, R being the number of its other examples.

  >>> import jax.numpy as jnp
  >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [0.0, 1.0]])
  >>> print(r_precision(embeddings, jnp.array([0, 0, 0, 1])), r_precision(embeddings, jnp.array([0, 0, 1, 1])))
  1.0 0.75

  Args:
    embeddings: floating `[examples, features]`.
    labels: integers `[examples]`; an example with a negative one does not count.
    max_relevant: static; a bound on R, the size of the largest class minus 1: only so many neighbours are sorted. A
      larger class is measured at this depth. None sorts all.
    where: boolean `[examples]`, the examples that count.
    block_size: static; how many queries at a time.

  Returns:
    Scalar in [0, 1], float32 at least; see `recall_at_k`.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, Section 4.1.
  """
  return _precision_at_r(embeddings, labels, max_relevant, where, block_size, average=False)


def mean_average_precision_at_r(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  max_relevant: int | None = None,
  where: ArrayLike | None = None,
  block_size: int = BLOCK,
) -> jax.Array:
  """MAP@R: the mean over queries of `1 / R sum of precision at i`, over the places i <= R that hold its class.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [0.0, 1.0]])
  >>> labels = jnp.array([0, 1, 0, 0])
  >>> print(np.asarray(mean_average_precision_at_r(embeddings, labels)).round(3))
  0.333

  Args:
    embeddings: floating `[examples, features]`.
    labels: integers `[examples]`; an example with a negative one does not count.
    max_relevant: static; as in `r_precision`.
    where: boolean `[examples]`, the examples that count.
    block_size: static; how many queries at a time.

  Returns:
    Scalar in [0, 1], float32 at least; see `recall_at_k`.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, Section 4.1.
  """
  return _precision_at_r(embeddings, labels, max_relevant, where, block_size, average=True)


def calibration_range(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  false_accept_rates: tuple[ArrayLike, ArrayLike] = FALSE_ACCEPT_RATES,
  num_pairs: int | None = None,
  key: jax.Array | None = None,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The distances below which given fractions of all pairs of different classes lie, linearly interpolated.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), jnp.array([0, 1, 0])
  >>> print(np.asarray(calibration_range(embeddings, labels, false_accept_rates=(0.0, 1.0))).round(3))
  [1.414 1.414]

  Args:
    embeddings: floating `[examples, features]`.
    labels: integers `[examples]`; an example with a negative one does not count.
    false_accept_rates: two fractions in [0, 1]; may be traced. State them with every number that depends on them.
    num_pairs: static; how many random pairs to draw, for large sets (5,000,000, say); None takes all pairs, whose
      memory grows with the square of the number of examples.
    key: of the random pairs.
    where: boolean `[examples]`, the examples that count.

  Returns:
    `[2]`, float32 at least; NaN when there is no such pair.

  Raises:
    ValueError: when shapes or dtypes do not fit, a fraction is out of range, or a key is missing.

  Reference: Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024, the
    calibration range; the fractions 0.01 and 0.1 are a third party's protocol.
  """
  rates = [_rate(rate) for rate in false_accept_rates]
  gallery = _gallery(embeddings, labels, where)
  size = len(gallery.labels)
  if num_pairs is None:
    similarities = jnp.matmul(gallery.embeddings, gallery.embeddings.T, precision="highest")
    one, other = np.triu_indices(size, 1)
    similarities = similarities[one, other]
  elif key is None:
    raise ValueError("key must be given for random pairs, got None.")
  else:
    first, second = jax.random.split(key)
    one = jax.random.randint(first, (num_pairs,), 0, size)
    other = jax.random.randint(second, (num_pairs,), 0, size)
    similarities = _in_blocks(
      lambda pair: jnp.sum(gallery.embeddings[pair[0]] * gallery.embeddings[pair[1]], axis=-1), (one, other), 65536
    )
  negative = gallery.counted[one] & gallery.counted[other] & (gallery.labels[one] != gallery.labels[other])
  distances = jnp.sort(jnp.where(negative, _distances(similarities), jnp.inf))
  count = jnp.sum(negative)

  def quantile(rate):
    place = jnp.asarray(rate, distances.dtype) * (count - 1).astype(distances.dtype)
    low = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, jnp.maximum(count - 1, 0))
    high = jnp.minimum(low + 1, jnp.maximum(count - 1, 0))
    share = place - low.astype(distances.dtype)
    return distances[low] * (1 - share) + distances[high] * share

  spoiled = (count == 0) | gallery.spoiled
  return jnp.where(spoiled, jnp.nan, jnp.stack([quantile(rate) for rate in rates]))


def utility_curves(
  embeddings: ArrayLike,
  labels: ArrayLike,
  thresholds: ArrayLike,
  *,
  num_classes: int,
  where: ArrayLike | None = None,
  block_size: int = BLOCK,
) -> UtilityCurves:
  """Of each class how many of its pairs a threshold of the distance accepts and how many others it rejects.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings, labels = jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), jnp.array([0, 0, 1, 1])
  >>> curves = utility_curves(embeddings, labels, jnp.array([0.1, 0.8]), num_classes=2)
  >>> print(np.asarray(curves.utility).round(3))
  [[1.    0.667]
   [0.    0.667]]

  Args:
    embeddings: floating `[examples, features]`.
    labels: integers `[examples]` in [0, num_classes); others do not count.
    thresholds: floating `[thresholds]`, ascending distances in [0, 2].
    num_classes: static.
    where: boolean `[examples]`, the examples that count.
    block_size: static; how many examples at a time.

  Returns:
    `UtilityCurves`, float32 at least; NaN where embeddings or thresholds are.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Zhang et al., ICLR 2024, sensitivity, specificity and utility.
  """
  check_hyperparameter("num_classes", num_classes, low=1)
  thresholds = as_array("thresholds", thresholds)
  check_float("thresholds", thresholds)
  if thresholds.ndim != 1:
    raise ValueError(f"thresholds must have one axis, got shape {thresholds.shape}.")
  gallery = _gallery(embeddings, labels, where, num_classes)
  dtype, bins = gallery.embeddings.dtype, thresholds.shape[0] + 1
  thresholds = thresholds.astype(dtype)

  def of_block(similarities, positive, negative):
    # The first threshold that accepts a pair; cumulative sums then count the pairs that each accepts.
    places = jnp.searchsorted(thresholds, _distances(similarities).ravel()).reshape(similarities.shape)
    row = jnp.arange(len(places))[:, None]
    count = lambda mask: jnp.zeros((len(places), bins), jnp.int32).at[row, places].add(mask.astype(jnp.int32))
    return count(positive), count(negative)

  classes = jnp.where(gallery.counted, gallery.labels, num_classes)
  total = lambda rows: jnp.zeros((num_classes, bins), jnp.int32).at[classes].add(rows, mode="drop")
  accepted = [jnp.cumsum(total(rows), axis=-1) for rows in _map_queries(of_block, gallery, block_size)]
  fraction = lambda counts: counts[:, :-1].astype(dtype) / jnp.maximum(counts[:, -1:], 1).astype(dtype)
  sensitivity, rejected = fraction(accepted[0]), 1 - fraction(accepted[1])
  counted = (accepted[0][:, -1] > 0) & (accepted[1][:, -1] > 0)
  both = sensitivity + rejected
  utility = jnp.where(both > 0, 2 * sensitivity * rejected / jnp.where(both > 0, both, 1), 0)
  spoiled = gallery.spoiled | jnp.any(jnp.isnan(thresholds))
  clean = lambda curves: jnp.where(spoiled, jnp.nan, jnp.where(counted[:, None], curves, 0))
  return UtilityCurves(clean(sensitivity), clean(rejected), clean(utility), counted)


def opis(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  thresholds: ArrayLike | None = None,
  false_accept_rates: tuple[ArrayLike, ArrayLike] = FALSE_ACCEPT_RATES,
  num_thresholds: int = 101,
  num_pairs: int | None = None,
  key: jax.Array | None = None,
  where: ArrayLike | None = None,
  block_size: int = BLOCK,
) -> jax.Array:
  """The operating-point inconsistency score: the variance of utility between classes, averaged over thresholds.

  Often quoted times 1,000. It compares models each at its own range of thresholds.

  >>> import jax, jax.numpy as jnp
  >>> labels = jnp.repeat(jnp.arange(4), 3)
  >>> spread = jnp.array([0.01, 0.1, 0.5, 1.0])[labels, None]
  >>> embeddings = jax.nn.one_hot(labels, 4) + spread * jax.random.normal(jax.random.key(0), (12, 4))
  >>> 0 < opis(embeddings, labels, num_classes=4, false_accept_rates=(0.01, 0.1)) <= 0.25
  Array(True, dtype=bool)

  Args:
    embeddings: floating `[examples, features]`.
    labels: integers `[examples]` in [0, num_classes); others do not count, nor do classes of one example.
    num_classes: static.
    thresholds: floating `[thresholds]`, ascending; default an even grid over the `calibration_range`.
    false_accept_rates: as in `calibration_range`.
    num_thresholds: static; of the default grid, at least 2.
    num_pairs: static; as in `calibration_range`.
    key: as in `calibration_range`.
    where: boolean `[examples]`, the examples that count.
    block_size: static; how many examples at a time.

  Returns:
    Scalar in [0, 1/4], float32 at least: the mean over the thresholds' range by the trapezoid rule, and where all
    thresholds are equal the variance there.

  Raises:
    ValueError: when shapes or dtypes do not fit or a fraction is out of range.

  Reference: Zhang, Xu, Tang, Fang, Wu, Tighe, Xing, "Threshold-Consistent Margin Loss for Open-World Deep Metric
    Learning", ICLR 2024, OPIS.
  """
  options = dict(false_accept_rates=false_accept_rates, num_pairs=num_pairs, key=key, where=where)
  thresholds = _grid(embeddings, labels, thresholds, num_thresholds, options)
  curves = utility_curves(embeddings, labels, thresholds, num_classes=num_classes, where=where, block_size=block_size)
  utility, counted = curves.utility, curves.counted[:, None]
  mean = jnp.mean(utility, axis=0, where=counted)
  variance = jnp.mean(jnp.square(utility - mean), axis=0, where=counted)
  return jnp.sum(_trapezoid(thresholds, variance.dtype) * variance)


def epsilon_opis(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  epsilon: ArrayLike = 0.1,
  thresholds: ArrayLike | None = None,
  false_accept_rates: tuple[ArrayLike, ArrayLike] = FALSE_ACCEPT_RATES,
  num_thresholds: int = 101,
  num_pairs: int | None = None,
  key: jax.Array | None = None,
  where: ArrayLike | None = None,
  block_size: int = BLOCK,
) -> jax.Array:
  """The squared difference of utility between the best and the worst classes, averaged over thresholds.

  Classes are ranked by their mean utility over the thresholds; `ceil(epsilon classes)` of each end are compared. The
  definition is this library's, as the paper's could not be verified.

  >>> import jax, jax.numpy as jnp
  >>> labels = jnp.repeat(jnp.arange(4), 3)
  >>> spread = jnp.array([0.01, 0.1, 0.5, 1.0])[labels, None]
  >>> embeddings = jax.nn.one_hot(labels, 4) + spread * jax.random.normal(jax.random.key(0), (12, 4))
  >>> bool(epsilon_opis(embeddings, labels, num_classes=4) > opis(embeddings, labels, num_classes=4))
  True

  Args:
    embeddings: floating `[examples, features]`.
    labels: integers `[examples]` in [0, num_classes); as in `opis`, as the rest.
    num_classes: static.
    epsilon: fraction of the classes in (0, 1]; may be traced.
    thresholds: floating `[thresholds]`.
    false_accept_rates: two fractions.
    num_thresholds: static.
    num_pairs: static.
    key: of the random pairs.
    where: boolean `[examples]`.
    block_size: static.

  Returns:
    Scalar in [0, 1], float32 at least.

  Raises:
    ValueError: when shapes or dtypes do not fit or a fraction is out of range.

  Reference: Zhang et al., ICLR 2024, epsilon-OPIS (not verified).
  """
  check_hyperparameter("epsilon", epsilon, low=0, high=1, open_low=True, shape=())
  options = dict(false_accept_rates=false_accept_rates, num_pairs=num_pairs, key=key, where=where)
  thresholds = _grid(embeddings, labels, thresholds, num_thresholds, options)
  curves = utility_curves(embeddings, labels, thresholds, num_classes=num_classes, where=where, block_size=block_size)
  utility, counted = curves.utility, curves.counted
  classes = jnp.sum(counted)
  # Rounding must not make one more of what is a whole number of classes.
  part = jnp.asarray(epsilon, utility.dtype) * classes
  ends = jnp.ceil(part * (1 - 4 * jnp.finfo(utility.dtype).eps)).astype(jnp.int32)
  means = jnp.where(counted, jnp.mean(utility, axis=1), jnp.inf)
  rank = jnp.argsort(jnp.argsort(means))
  worst = counted & (rank < ends)
  best = counted & (rank >= classes - ends) & (rank < classes)
  mean_of = lambda chosen: jnp.mean(utility, axis=0, where=chosen[:, None])
  squared = jnp.square(mean_of(best) - mean_of(worst))
  score = jnp.sum(_trapezoid(thresholds, squared.dtype) * squared)
  return jnp.where(jnp.isnan(part), jnp.nan, score)


def utilization(
  queries: ArrayLike, examples: ArrayLike, *, where: ArrayLike | None = None, block_size: int = BLOCK
) -> jax.Array:
  """The mean over queries of the squared distance to the nearest example: how close tests are to what was trained on.

  >>> import jax.numpy as jnp
  >>> utilization(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0]])).item()
  1.0

  Args:
    queries: floating `[queries, features]`, of the test set; their lengths do not count.
    examples: floating `[examples, features]`, of the training set, mixed ones perhaps among them.
    where: boolean `[examples]`, the examples that count.
    block_size: static; how many queries at a time.

  Returns:
    Scalar in [0, 4], float32 at least.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Venkataramanan et al., "It Takes Two to Tango: Mixup for Deep Metric Learning", ICLR 2022, utilization.
  """
  queries, examples = as_array("queries", queries), as_array("examples", examples)
  check_float("queries", queries)
  check_float("examples", examples)
  if queries.ndim != 2 or examples.ndim != 2 or queries.shape[1] != examples.shape[1]:
    raise ValueError(
      "queries and examples must be [queries, features] and [examples, features], got shapes"
      f" {queries.shape}, {examples.shape}."
    )
  counted = example_mask(where, examples.shape[:1])
  examples = normalized_rows(jnp.where(counted[:, None], examples, 0))

  def nearest(rows):
    similarities = jnp.matmul(rows, examples.T, precision="highest")
    best = jnp.max(similarities, axis=-1, where=counted, initial=-jnp.inf)
    return jnp.maximum(2 - 2 * best, 0)

  return jnp.mean(_in_blocks(nearest, normalized_rows(queries), block_size))


class _Gallery(NamedTuple):
  embeddings: jax.Array  # [examples, features], of length one; zeros where they do not count
  labels: jax.Array
  counted: jax.Array
  spoiled: jax.Array  # whether an embedding that counts is NaN


def _gallery(embeddings, labels, where, num_classes: int | None = None) -> _Gallery:
  embeddings, labels = as_array("embeddings", embeddings), as_array("labels", labels)
  check_float("embeddings", embeddings)
  if embeddings.ndim != 2:
    raise ValueError(f"embeddings must be [examples, features], got shape {embeddings.shape}.")
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer) or labels.shape != embeddings.shape[:1]:
    raise ValueError(
      f"labels must be integers of shape {embeddings.shape[:1]}, got {labels.shape} of dtype {labels.dtype}."
    )
  labels = widened_integers(labels)
  counted = labels >= 0
  if num_classes is not None:
    counted &= labels < num_classes
  if where is not None:
    counted &= example_mask(where, labels.shape)
  embeddings = jnp.where(counted[:, None], embeddings, 0)
  return _Gallery(normalized_rows(embeddings), labels, counted, jnp.any(jnp.isnan(embeddings)))


def _map_queries(function, gallery: _Gallery, block_size: int):
  """`function(similarities, positive, negative)` of `[queries, examples]`, a block of queries after another."""
  rows = Rows(gallery.embeddings, gallery.labels, gallery.counted, jnp.arange(len(gallery.labels)))
  return _in_blocks(lambda queries: function(*pairs_of(queries, rows)), rows, block_size)


def _in_blocks(function, rows, block_size: int):
  if block_size < 1:
    raise ValueError(f"block_size must be positive, got {block_size}.")
  return in_blocks(function, rows, block_size)


def _distances(similarities):
  return jnp.sqrt(jnp.maximum(2 - 2 * similarities, 0))


def _mean(values, counted, gallery: _Gallery):
  return jnp.where(gallery.spoiled, jnp.nan, jnp.mean(values, where=counted & gallery.counted))


def _precision_at_r(embeddings, labels, max_relevant, where, block_size, *, average: bool):
  gallery = _gallery(embeddings, labels, where)
  size = len(gallery.labels)
  depth = size - 1 if max_relevant is None else min(max_relevant, size - 1)
  if depth < 1:
    raise ValueError(f"max_relevant must be positive and two examples be there, got {max_relevant} of {size}.")

  def of_block(similarities, positive, negative):
    # A class's own examples come after equally similar others.
    ordered = jnp.where(positive, jnp.nextafter(similarities, -jnp.inf * jnp.ones_like(similarities)), similarities)
    _, places = jax.lax.top_k(jnp.where(positive | negative, ordered, -jnp.inf), depth)
    relevant = jnp.take_along_axis(positive, places, axis=-1)
    count = jnp.minimum(jnp.sum(positive, axis=-1), depth)
    rank = jnp.arange(1, depth + 1)
    hits = (relevant & (rank <= count[:, None])).astype(similarities.dtype)
    gains = hits * jnp.cumsum(hits, axis=-1) / rank if average else hits
    return jnp.sum(gains, axis=-1) / jnp.maximum(count, 1), count > 0

  return _mean(*_map_queries(of_block, gallery, block_size), gallery)


def _rate(rate):
  check_hyperparameter("false_accept_rates", rate, low=0, high=1, shape=())
  return rate


def _grid(embeddings, labels, thresholds, num_thresholds, options):
  if thresholds is not None:
    thresholds = as_array("thresholds", thresholds)
    check_float("thresholds", thresholds)
    return thresholds
  check_hyperparameter("num_thresholds", num_thresholds, low=2)
  low, high = calibration_range(embeddings, labels, **options)
  return low + (high - low) * jnp.linspace(0, 1, num_thresholds, dtype=low.dtype)


def _trapezoid(thresholds, dtype):
  """Weights of sum 1 for the mean over the range of the thresholds; equal ones where the range is a point."""
  thresholds = thresholds.astype(dtype)
  halves = jnp.diff(thresholds) / 2
  zero = jnp.zeros(1, dtype)
  weights = jnp.concatenate([halves, zero]) + jnp.concatenate([zero, halves])
  total = jnp.sum(weights)
  return jnp.where(total == 0, 1 / thresholds.shape[0], weights / jnp.where(total == 0, 1, total))
