"""Metrix: mixup for losses of pairs. Mixed examples are positives of an anchor to a degree, the interpolated label."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape, dtype_of
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.losses.metric_learning import (
  PairLossForm,
  embedded,
  general_pair_loss,
  normalized_embeddings,
  pair_loss,
)
from jaxreg.metrics.norms import safe_sqrt
from jaxreg.metrics.pairs import pairs_of

__all__ = [
  "MIXING_MODES",
  "MixPairs",
  "OfficialMetrixLoss",
  "metrix_loss",
  "mix",
  "official_contrastive_metrix_loss",
  "positivity_threshold",
  "select_mix_pairs",
]

MIXING_MODES = ("positive_negative", "anchor_negative", "lone_anchor_negative")


class MixPairs(NamedTuple):
  """Which examples are mixed for each anchor; the first counts as its positive, the second is a negative.

  Attributes:
    first: integers `[anchors]`, places in the batch (of all devices).
    second: integers `[anchors, negatives]`.
    where: booleans `[anchors, negatives]`, which of the pairs exist.
  """

  first: jax.Array
  second: jax.Array
  where: jax.Array


def select_mix_pairs(
  key: jax.Array,
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  mode: str = "positive_negative",
  negatives: int | None = None,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> MixPairs:
  """For each anchor one example that counts as positive, and its hardest negatives.

  >>> import jax, jax.numpy as jnp
  >>> embeddings, labels = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0], [0.0, 1.0]]), jnp.array([0, 0, 1, 2])
  >>> pairs = select_mix_pairs(jax.random.key(0), embeddings, labels, negatives=1)
  >>> pairs.first.tolist()[:2], pairs.second[:, 0].tolist(), pairs.where[:, 0].tolist()
  ([1, 0], [2, 2, 1, 2], [True, True, False, False])

  Args:
    key: of this device, where there are several; draws one of the positives.
    embeddings: floating `[batch, features]`, of which cosines are compared; without gradient.
    labels: integers `[batch]`; an example with a negative one is in no pair.
    mode: static; `positive_negative` mixes a positive with negatives, for anchors that have a positive;
      `anchor_negative` the anchor itself with its negatives; `lone_anchor_negative` does so only for anchors without
      positives (as the official code).
    negatives: static; how many of an anchor's negatives, the most similar ones; None takes all.
    where: boolean `[batch]`, the examples that count.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch: positives and negatives are those of
      all devices.

  Returns:
    `MixPairs`.

  Raises:
    ValueError: when shapes do not fit, or the mode is unknown.

  Reference: Venkataramanan et al., ICLR 2022, the mixing pairs.
  """
  if mode not in MIXING_MODES:
    raise ValueError(f"mode must be one of {', '.join(MIXING_MODES)}, got {mode!r}.")
  batch = embedded(embeddings, labels, where=where, axis_name=axis_name)
  anchors, others = jax.lax.stop_gradient((batch.anchors, batch.others))
  size = len(others.labels)
  count = size - 1 if negatives is None else min(negatives, size - 1)
  if count < 1:
    raise ValueError(f"negatives must be positive and the batch hold two examples, got {negatives} of {size}.")
  similarities, positive, negative = pairs_of(anchors, others)
  # Places of the masked rows themselves; what does not exist sorts last.
  found, second = jax.lax.top_k(jnp.where(negative, similarities, -jnp.inf), count)
  valid = found > -jnp.inf
  some = jnp.any(positive, axis=-1)
  if mode == "positive_negative":
    drawn = jax.random.categorical(key, jnp.where(positive, 0.0, -jnp.inf), axis=-1)
    first = jnp.where(some, drawn, anchors.places)
    valid &= some[:, None]
  else:
    first = anchors.places
    valid &= ~some[:, None] if mode == "lone_anchor_negative" else True
  return MixPairs(first.astype(jnp.int32), second.astype(jnp.int32), valid)


def mix(first: ArrayLike, second: ArrayLike, *, coefficient: ArrayLike) -> jax.Array:
  """`coefficient * first + (1 - coefficient) * second`, of inputs, features or embeddings.

  >>> import jax.numpy as jnp
  >>> mix(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]), coefficient=0.75).tolist()
  [0.75, 0.5]

  Args:
    first: floating `[...]`.
    second: floating, of a shape that broadcasts against it: an axis of negatives, for instance.
    coefficient: lambda, a scalar in [0, 1]; may be traced.

  Returns:
    The mixtures, in the dtype of both.

  Raises:
    ValueError: when the arguments are not floating point or `coefficient` is out of range.

  Reference: Venkataramanan et al., ICLR 2022, the interpolation.
  """
  first, second = as_array("first", first), as_array("second", second)
  check_float("first", first)
  check_float("second", second)
  check_hyperparameter("coefficient", coefficient, low=0, high=1, shape=())
  dtype = jnp.result_type(first, second)
  first, second = widened(first), widened(second)
  share = jnp.asarray(coefficient, jnp.result_type(first, second))
  return narrowed(share * first + (1 - share) * second, dtype)


def metrix_loss(
  embeddings: ArrayLike,
  labels: ArrayLike,
  pairs: MixPairs,
  *,
  coefficient: ArrayLike,
  form: PairLossForm,
  weight: ArrayLike = 0.4,
  mixed: Callable | None = None,
  lone_anchors: bool = False,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """A loss of pairs, plus `weight` times the same loss of an anchor's mixed examples with interpolated labels.

  Anchors stay as they are. A mixed example is a positive with weight `coefficient` and a negative with weight
  `1 - coefficient`. What is mixed is up to `mixed`; by default it is the embeddings, of length one, which costs next to
  nothing.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.losses import multi_similarity_form
  >>> embeddings, labels = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 3.0]]), jnp.array([0, 0, 1, 1])
  >>> pairs = select_mix_pairs(jax.random.key(0), embeddings, labels, negatives=1)
  >>> coefficient = jax.random.beta(jax.random.key(1), 2.0, 2.0)  # one for all pairs
  >>> metrix_loss(embeddings, labels, pairs, coefficient=coefficient, form=multi_similarity_form()).shape
  (4,)

  Args:
    embeddings: floating `[batch, features]`; their lengths do not count.
    labels: integers `[batch]`; see `pair_loss`, also for the arguments below that are not said here.
    pairs: from `select_mix_pairs`, with the same `axis_name`.
    coefficient: lambda, a scalar in [0, 1], drawn from Beta(2, 2) at each step; may be traced.
    form: the loss of an anchor.
    weight: of the mixed part, non-negative; may be traced.
    mixed: `(first [anchors], second [anchors, negatives]) -> [anchors, negatives, features]`, embeddings of the
      examples at these places mixed with the same coefficient, in the inputs or at a hidden layer:
      `lambda first, second: head(mix(hidden[first][:, None], hidden[second], coefficient=coefficient))`. Run batch
      normalisation behind the mixing in a pass of its own. Under `axis_name` the places are those of all devices.
    lone_anchors: static; whether the clean loss of an anchor without positives counts.
    where: boolean `[batch]`.
    chunk_size: static; of the clean loss.
    axis_name: static.

  Returns:
    `[batch]`, the loss of each anchor; 0 for examples that do not count.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Venkataramanan, Psomas, Kijak, Amsaleg, Karantzalos, Avrithis, "It Takes Two to Tango: Mixup for Deep
    Metric Learning", ICLR 2022, the mixed loss; the weight is the official code's.
  """
  check_hyperparameter("coefficient", coefficient, low=0, high=1, shape=())
  check_hyperparameter("weight", weight, low=0, shape=())
  batch = embedded(embeddings, labels, where=where, axis_name=axis_name)
  options = dict(lone_anchors=lone_anchors, where=where, chunk_size=chunk_size, axis_name=axis_name)
  clean = pair_loss(widened(as_array("embeddings", embeddings)), labels, form=form, **options)
  first, second, exists = (as_array(f"pairs.{name}", leaf) for name, leaf in pairs._asdict().items())
  check_same_shape(**{"pairs.second": second, "pairs.where": exists})
  if first.shape != batch.anchors.labels.shape or second.shape[:1] != first.shape or second.ndim != 2:
    raise ValueError(f"pairs must be those of {batch.anchors.labels.shape} anchors, got {first.shape}, {second.shape}.")
  if mixed is None:
    rows = batch.others.embeddings
    vectors = mix(rows[first][:, None], rows[second], coefficient=coefficient)
  else:
    vectors = widened(as_array("mixed", mixed(first, second)))
    if vectors.shape != (*second.shape, batch.anchors.embeddings.shape[-1]):
      raise ValueError(f"mixed must give embeddings [anchors, negatives, features], got shape {vectors.shape}.")
  exists &= batch.anchors.counted[:, None]
  vectors = normalized_embeddings(jnp.where(exists[..., None], vectors, 0))
  similarities = jnp.einsum("af,anf->an", batch.anchors.embeddings, vectors, precision="highest")
  soft = jnp.broadcast_to(jnp.asarray(coefficient, similarities.dtype), similarities.shape)
  values = clean + jnp.asarray(weight, clean.dtype) * general_pair_loss(similarities, soft, form=form, where=exists)
  return batch.values(values)


class OfficialMetrixLoss(NamedTuple):
  """The parts of `official_contrastive_metrix_loss`, scalars.

  Attributes:
    positive: mean of the positive distances times lambda, over those above 0.
    negative: mean of `(1 - lambda) [margin - distance]_+`, over those above 0.
    mixed: the sum of both.
    clean: the contrastive loss of the examples themselves.
    total: `clean + weight * mixed`.
  """

  positive: jax.Array
  negative: jax.Array
  mixed: jax.Array
  clean: jax.Array
  total: jax.Array


def official_contrastive_metrix_loss(
  embeddings: ArrayLike,
  labels: ArrayLike,
  anchor: ArrayLike,
  first: ArrayLike,
  second: ArrayLike,
  *,
  coefficient: ArrayLike,
  margin: ArrayLike = 0.5,
  weight: ArrayLike = 0.4,
) -> OfficialMetrixLoss:
  """What the official code computes for the contrastive loss: Euclidean distances, means over non-zero entries.

  The paper's form has cosines and sums, see `metrix_loss`. This one is a number of the whole batch, for comparison.
  Embeddings are mixed as they are, so that gradients are the official code's for a network whose outputs have length
  one.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 0, 1])
  >>> found = official_contrastive_metrix_loss(embeddings, labels, [0, 1], [1, 0], [2, 2], coefficient=0.5)
  >>> print(np.asarray(found.mixed).round(3), found.clean)
  0.383 0.0

  Args:
    embeddings: floating `[batch, features]`, of length one.
    labels: integers `[batch]`.
    anchor: integers `[mixed]`, the anchor of each mixed example.
    first: integers `[mixed]`, what counts as the positive in it.
    second: integers `[mixed]`, the negative.
    coefficient: lambda, a scalar in [0, 1].
    margin: distance beyond which negatives do not count, non-negative.
    weight: of the mixed part, non-negative.

  Returns:
    `OfficialMetrixLoss`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Venkataramanan et al., ICLR 2022, official code (`embed_metrix_contrastive`).
  """
  check_hyperparameter("coefficient", coefficient, low=0, high=1, shape=())
  check_hyperparameter("margin", margin, low=0, shape=())
  check_hyperparameter("weight", weight, low=0, shape=())
  batch = embedded(embeddings, labels)
  rows, dtype = batch.anchors.embeddings, batch.dtype
  given = jnp.where(batch.anchors.counted[:, None], widened(as_array("embeddings", embeddings)), 0)
  places = {"anchor": anchor, "first": first, "second": second}
  for name, value in places.items():
    if not jnp.issubdtype(dtype_of(name, value), jnp.integer) or jnp.ndim(value) != 1:
      raise ValueError(f"{name} must be integers [mixed], got shape {jnp.shape(value)}.")
  check_same_shape(**places)
  anchor, first, second = (as_array(name, value) for name, value in places.items())
  share, margin = jnp.asarray(coefficient, rows.dtype), jnp.asarray(margin, rows.dtype)
  vectors = normalized_embeddings(mix(given[first], given[second], coefficient=coefficient))
  distances = _distance(rows[anchor], vectors)
  positive = _mean_of_positive(share * distances)
  negative = _mean_of_positive((1 - share) * jax.nn.relu(margin - distances))
  _, same, different = pairs_of(batch.anchors, batch.anchors)
  between = _distance(rows[:, None], rows)
  clean = _mean_of_positive(jnp.where(same, between, 0))
  clean += _mean_of_positive(jnp.where(different, jax.nn.relu(margin - between), 0))
  mixed = positive + negative
  parts = (positive, negative, mixed, clean, clean + jnp.asarray(weight, rows.dtype) * mixed)
  return OfficialMetrixLoss(*(narrowed(part, dtype) for part in parts))


def positivity_threshold(
  coefficient: ArrayLike,
  *,
  margin: ArrayLike,
  beta: ArrayLike,
  gamma: ArrayLike,
  positive_sum: ArrayLike = 0.0,
  negative_sum: ArrayLike = 0.0,
) -> jax.Array:
  """The similarity up to which a mixed example acts as a positive of its anchor, in the multi-similarity loss.

  `m + log(lambda / (1 - lambda)) / (beta + gamma)` for the additive form of the loss, in which the sums stand without
  logarithm, divided by beta and gamma. The logarithms of the true form add `log((1 + X-) / (1 + X+)) / (beta + gamma)`.

  >>> positivity_threshold(0.5, margin=0.75, beta=18.0, gamma=75.0).item()
  0.75

  Args:
    coefficient: lambda in [0, 1], the weight of the mixed example as a positive; floating `[...]`.
    margin: m, scalar.
    beta: positive scalar.
    gamma: positive scalar.
    positive_sum: X+, the sum `sum y exp(-beta (s - m))` of the anchor, the mixed example in it; `[...]`.
    negative_sum: X-, the sum `sum (1 - y) exp(gamma (s - m))`; `[...]`. Both 0 for the additive form.

  Returns:
    `[...]`, in float32 at least; infinite at the ends of [0, 1].

  Raises:
    ValueError: when a hyperparameter is out of range.

  Reference: Venkataramanan et al., ICLR 2022, the analysis of positivity.
  """
  coefficient = as_array("coefficient", coefficient)
  check_float("coefficient", coefficient)
  check_hyperparameter("coefficient", coefficient, low=0, high=1)
  check_hyperparameter("beta", beta, low=0, open_low=True, shape=())
  check_hyperparameter("gamma", gamma, low=0, open_low=True, shape=())
  check_hyperparameter("margin", margin, shape=())
  check_hyperparameter("positive_sum", positive_sum, low=0, shape=coefficient.shape)
  check_hyperparameter("negative_sum", negative_sum, low=0, shape=coefficient.shape)
  share = coefficient.astype(jnp.promote_types(coefficient.dtype, jnp.float32))
  wide = lambda value: jnp.asarray(value, share.dtype)
  odds = jnp.log(share) - jnp.log1p(-share) + jnp.log1p(wide(negative_sum)) - jnp.log1p(wide(positive_sum))
  return wide(margin) + odds / (wide(beta) + wide(gamma))


def _distance(x, y):
  return safe_sqrt(jnp.sum(jnp.square(x - y), axis=-1))


def _mean_of_positive(values):
  count = jnp.sum(values > 0)
  return jnp.sum(jax.nn.relu(values)) / jnp.maximum(count, 1)
