"""Clusters against classes: accuracy after the best matching, mutual information, the Rand index."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_same_shape, dtype_of, example_mask, widened_integers
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "SplitAccuracy",
  "adjusted_rand_index",
  "cluster_accuracy",
  "normalized_mutual_information",
  "split_cluster_accuracy",
]


class SplitAccuracy(NamedTuple):
  """Accuracies over all examples, over those of known classes and over those of novel ones, scalars."""

  all: jax.Array
  known: jax.Array
  novel: jax.Array


def cluster_accuracy(
  clusters: ArrayLike, labels: ArrayLike, *, num_classes: int, where: ArrayLike | None = None
) -> jax.Array:
  """The fraction of examples whose cluster is matched with their class, in the best one-to-one matching.

  >>> import jax.numpy as jnp
  >>> print(cluster_accuracy(jnp.array([1, 1, 0, 0]), jnp.array([0, 0, 1, 0]), num_classes=2))
  0.75

  Args:
    clusters: integers `[...]`.
    labels: integers `[...]`. An example whose cluster or label is outside `[0, num_classes)` does not count.
    num_classes: static; the number of clusters and of classes (of the larger one, if they differ).
    where: boolean `[...]`, the examples that count.

  Returns:
    Scalar in [0, 1], float32 (float64 where that is enabled); NaN without examples.

  Raises:
    ValueError: when shapes or dtypes do not fit or `num_classes` is no positive integer.

  Reference: Kuhn, "The Hungarian Method for the Assignment Problem", Naval Research Logistics Quarterly 1955.
  """
  table = _contingency(clusters, labels, num_classes, where)
  return jnp.sum(_matched(table)) / jnp.sum(table)


def split_cluster_accuracy(
  clusters: ArrayLike,
  labels: ArrayLike,
  *,
  num_known: int,
  num_classes: int,
  joint: bool = True,
  where: ArrayLike | None = None,
) -> SplitAccuracy:
  """Accuracies on known and on novel classes of predictions among all of them (task-agnostic).

  >>> import jax.numpy as jnp
  >>> clusters, labels = jnp.array([0, 0, 2, 2]), jnp.array([0, 0, 1, 1])  # class 1 is novel
  >>> [round(float(a), 2) for a in split_cluster_accuracy(clusters, labels, num_known=1, num_classes=3)]
  [1.0, 1.0, 1.0]

  Args:
    clusters: integers `[...]`, the predicted classes.
    labels: integers `[...]`, the known classes first; what counts as in `cluster_accuracy`.
    num_known: static, in [1, num_classes).
    num_classes: static; of known and novel classes together.
    joint: static; one matching of all classes (the protocol called v2), or (v1) known classes as they are named, and a
      matching of the novel examples alone.
    where: boolean `[...]`, the examples that count.

  Returns:
    `SplitAccuracy`, NaN where there are no examples.

  Raises:
    ValueError: as `cluster_accuracy`, or when `num_known` is out of range.

  Reference: Gu, Zhang, Xu, He, "Class-relation Knowledge Distillation for Novel Class Discovery", ICCV 2023, the
    task-agnostic protocol (as in the official code).
  """
  table = _contingency(clusters, labels, num_classes, where)
  known = static_integer("num_known", num_known, low=1, high=table.shape[0] - 1)
  is_known = jnp.arange(table.shape[0]) < known
  if joint:
    right = _matched(table)
  else:
    right = jnp.where(is_known, jnp.diagonal(table), _matched(jnp.where(is_known, 0, table)))
  sizes = jnp.sum(table, axis=0)
  part = lambda mask: jnp.sum(right, where=mask) / jnp.sum(sizes, where=mask)
  return SplitAccuracy(part(True), part(is_known), part(~is_known))


def normalized_mutual_information(
  clusters: ArrayLike, labels: ArrayLike, *, num_classes: int, where: ArrayLike | None = None
) -> jax.Array:
  """NMI: the mutual information of clusters and classes over the mean of their entropies; 1 if both are one group.

  >>> import jax.numpy as jnp
  >>> print(normalized_mutual_information(jnp.array([1, 1, 0, 0]), jnp.array([0, 0, 1, 1]), num_classes=2).round(3))
  1.0

  Args:
    clusters, labels, num_classes, where: as in `cluster_accuracy`.

  Returns:
    Scalar in [0, 1], as in `cluster_accuracy`; scikit-learn's value, under `jit`.

  Raises:
    ValueError: as `cluster_accuracy`.

  Reference: Vinh, Epps, Bailey, "Information Theoretic Measures for Clusterings Comparison", JMLR 2010, Table 2.
  """
  table = _contingency(clusters, labels, num_classes, where)
  joint = table / jnp.sum(table)
  entropy = lambda p: -jnp.sum(jax.scipy.special.xlogy(p, p))
  of_clusters, of_labels = entropy(jnp.sum(joint, axis=1)), entropy(jnp.sum(joint, axis=0))
  information = jnp.maximum(of_clusters + of_labels - entropy(joint), 0)
  mean = (of_clusters + of_labels) / 2
  return jnp.where(mean == 0, 1, information / jnp.where(mean == 0, 1, mean))


def adjusted_rand_index(
  clusters: ArrayLike, labels: ArrayLike, *, num_classes: int, where: ArrayLike | None = None
) -> jax.Array:
  """ARI: how often clusters and classes agree whether two examples belong together, 0 in expectation by chance.

  >>> import jax.numpy as jnp
  >>> print(adjusted_rand_index(jnp.array([1, 1, 0, 0]), jnp.array([0, 0, 1, 1]), num_classes=2))
  1.0

  Args:
    clusters, labels, num_classes, where: as in `cluster_accuracy`.

  Returns:
    Scalar in [-0.5, 1], as in `cluster_accuracy`; scikit-learn's value, under `jit`. NaN for fewer than two examples.

  Raises:
    ValueError: as `cluster_accuracy`.

  Reference: Hubert, Arabie, "Comparing Partitions", Journal of Classification 1985, equation 5.
  """
  table = _contingency(clusters, labels, num_classes, where)
  pairs = lambda counts: jnp.sum(counts * (counts - 1)) / 2
  together, by_cluster, by_label = pairs(table), pairs(jnp.sum(table, axis=1)), pairs(jnp.sum(table, axis=0))
  expected = by_cluster * (by_label / pairs(jnp.sum(table)))
  largest = (by_cluster + by_label) / 2
  same = largest == expected  # both put every example apart, or all together
  return jnp.where(same, 1, (together - expected) / jnp.where(same, 1, largest - expected))


def _contingency(clusters, labels, num_classes, where):
  """How many examples are in each cluster (rows) and class, in a float in which counts below 2^24 are exact."""
  clusters, labels = as_array("clusters", clusters), as_array("labels", labels)
  size = static_integer("num_classes", num_classes, low=1)
  for name, array in (("clusters", clusters), ("labels", labels)):
    if not jnp.issubdtype(dtype_of(name, array), jnp.integer):
      raise ValueError(f"{name} must be integers, got dtype {array.dtype}.")
  check_same_shape(clusters=clusters, labels=labels)
  counted = example_mask(where, labels.shape)
  clusters, labels = widened_integers(clusters), widened_integers(labels)
  for array in (clusters, labels):
    counted &= (array >= 0) & (array < size)
  index = jnp.where(counted, clusters * size + labels, 0)
  table = jnp.zeros(size * size, jnp.int32).at[index.ravel()].add(counted.ravel().astype(jnp.int32))
  return table.reshape(size, size).astype(jnp.result_type(float))


def _matched(table):
  """For each class the number of its examples that are in the cluster matched with it."""
  rows, columns = optax.assignment.hungarian_algorithm(-table)
  return jnp.zeros(table.shape[1], table.dtype).at[columns].set(table[rows, columns])
