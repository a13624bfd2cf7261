"""Threshold-consistent margins (TCM): hard pairs are drawn to absolute margins that are common to all classes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.losses.metric_learning import embedded, map_anchors

__all__ = ["HardPairs", "tcm_from_similarities", "tcm_hard_pairs", "tcm_loss"]


class HardPairs(NamedTuple):
  """Numbers of pairs beyond a margin, scalars; each pair counts once.

  Attributes:
    positive: pairs of one label whose similarity is at most the positive margin.
    negative: pairs of different labels whose similarity is at least the negative margin.
  """

  positive: jax.Array
  negative: jax.Array


def tcm_loss(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  positive_margin: ArrayLike = 0.9,
  negative_margin: ArrayLike = 0.5,
  positive_weight: ArrayLike = 1.0,
  negative_weight: ArrayLike = 1.0,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The distances of hard pairs from two margins, averaged over hard pairs only; add it to any loss of embeddings.

  `mean of (m+ - s) over positives with s <= m+`, plus `mean of (s - m-) over negatives with s >= m-`, each times its
  weight; s is the cosine. That is the mean of the values over the batch (of all devices): an anchor's value is what its
  own pairs add, times the size of the batch. A side without hard pairs adds 0. When a pair crosses a margin the number
  of hard pairs changes, and the value jumps.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]]), jnp.array([0, 0, 1])
  >>> print(np.asarray(tcm_loss(embeddings, labels).mean()).round(3))
  0.1

  Args:
    embeddings: floating `[batch, features]`; their lengths do not count.
    labels: integers `[batch]` of any width; an example with a negative one does not count.
    positive_margin: m+, the cosine above which positives are left alone; a scalar, may be traced, as the others.
    negative_margin: m-, the cosine below which negatives are left alone. Tune both on classes of the training set.
    positive_weight: lambda+, non-negative.
    negative_weight: lambda-, non-negative.
    where: boolean `[batch]`, the examples that count.
    chunk_size: static; how many anchors at a time; None takes all.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch. Hard pairs are then those of all
      devices.

  Returns:
    `[batch]`, whose mean is the loss.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Zhang, Xu, Tang, Fang, Wu, Tighe, Xing, "Threshold-Consistent Margin Loss for Open-World Deep Metric
    Learning", ICLR 2024, the TCM regularizer.
  """
  margins = _checked(positive_margin, negative_margin, positive_weight, negative_weight)
  batch = embedded(embeddings, labels, where=where, axis_name=axis_name)
  sides = map_anchors(lambda *pairs: _sides(*pairs, *margins[:2]), batch, chunk_size)
  total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)
  return batch.values(len(batch.others.labels) * _averaged(sides, margins[2:], total))


def tcm_from_similarities(
  similarities: ArrayLike,
  positive: ArrayLike,
  negative: ArrayLike,
  *,
  positive_margin: ArrayLike = 0.9,
  negative_margin: ArrayLike = 0.5,
  positive_weight: ArrayLike = 1.0,
  negative_weight: ArrayLike = 1.0,
) -> jax.Array:
  """`tcm_loss` of given pairs, which miners or memories of embeddings may have chosen.

  >>> import jax.numpy as jnp, numpy as np
  >>> similarities, positive = jnp.array([[0.4, 0.7, 0.1]]), jnp.array([[True, False, False]])
  >>> print(np.asarray(tcm_from_similarities(similarities, positive, ~positive).sum()).round(3))
  0.7

  Args:
    similarities: floating `[anchors, examples]`.
    positive: boolean, of the same shape: pairs of one label, without those of an example with itself.
    negative: boolean, of the same shape: pairs of different labels.
    positive_margin: as in `tcm_loss`, as the rest.
    negative_margin: scalar.
    positive_weight: non-negative scalar.
    negative_weight: non-negative scalar.

  Returns:
    `[anchors]`, whose sum is the loss.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Zhang et al., ICLR 2024, the TCM regularizer.
  """
  margins = _checked(positive_margin, negative_margin, positive_weight, negative_weight)
  similarities = as_array("similarities", similarities)
  check_float("similarities", similarities)
  masks = {name: as_array(name, mask) for name, mask in (("positive", positive), ("negative", negative))}
  for name, mask in masks.items():
    if mask.shape != similarities.shape or mask.dtype != bool or mask.ndim != 2:
      raise ValueError(
        f"{name} must be boolean [anchors, examples], expected shape {similarities.shape}, got {mask.shape} of dtype"
        f" {mask.dtype}."
      )
  wide = jnp.where(masks["positive"] | masks["negative"], widened(similarities), 0)
  sides = _sides(wide, masks["positive"], masks["negative"], *margins[:2])
  return narrowed(_averaged(sides, margins[2:], lambda x: x), similarities.dtype)


def tcm_hard_pairs(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  positive_margin: ArrayLike = 0.9,
  negative_margin: ArrayLike = 0.5,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> HardPairs:
  """How many pairs of a batch are hard, that is, pulled by `tcm_loss`.

  >>> import jax.numpy as jnp
  >>> embeddings, labels = jnp.array([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]]), jnp.array([0, 0, 1])
  >>> [int(count) for count in tcm_hard_pairs(embeddings, labels)]
  [0, 2]

  Args:
    embeddings: floating `[batch, features]`.
    labels: integers `[batch]`; as in `tcm_loss`, as the rest.
    positive_margin: scalar.
    negative_margin: scalar.
    where: boolean `[batch]`.
    chunk_size: static.
    axis_name: static.

  Returns:
    `HardPairs`, int32.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Zhang et al., ICLR 2024, the TCM regularizer.
  """
  margins = _checked(positive_margin, negative_margin, 1.0, 1.0)
  batch = embedded(embeddings, labels, where=where, axis_name=axis_name)
  sides = map_anchors(lambda *pairs: _sides(*pairs, *margins[:2]), batch, chunk_size)
  total = lambda x: x if axis_name is None else jax.lax.psum(x, axis_name)
  return HardPairs(*(total(jnp.sum(count)) // 2 for _, count in sides))


def _checked(positive_margin, negative_margin, positive_weight, negative_weight):
  check_hyperparameter("positive_margin", positive_margin, low=-1, high=1, shape=())
  check_hyperparameter("negative_margin", negative_margin, low=-1, high=1, shape=())
  check_hyperparameter("positive_weight", positive_weight, low=0, shape=())
  check_hyperparameter("negative_weight", negative_weight, low=0, shape=())
  return positive_margin, negative_margin, positive_weight, negative_weight


def _sides(similarities, positive, negative, positive_margin, negative_margin):
  """Of positives and negatives, each anchor's sum of distances from the margin and its number of hard pairs."""
  above, below = (jnp.asarray(margin, similarities.dtype) for margin in (positive_margin, negative_margin))
  sides = ((above - similarities, positive), (similarities - below, negative))
  hard = [(distance, mask & (distance >= 0)) for distance, mask in sides]
  return [(jnp.sum(jnp.where(mask, x, 0), axis=-1), jnp.sum(mask, axis=-1, dtype=jnp.int32)) for x, mask in hard]


def _averaged(sides, weights, total):
  values = 0.0
  for (distance, count), weight in zip(sides, weights):
    pairs = total(jnp.sum(count.astype(distance.dtype)))
    values += jnp.asarray(weight, distance.dtype) * distance / jnp.maximum(pairs, 1)
  return values
