"""How the error of a classifier on frozen features falls with the number of labelled examples."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, dtype_of
from jaxreg.metrics.classification import predicted_classes
from jaxreg.metrics.linear_probe import minmax_scale, minmax_scaling, probe_logits

__all__ = ["min_samples_to", "probe_sample_curve"]


def probe_sample_curve(
  key: jax.Array,
  features: ArrayLike,
  labels: ArrayLike,
  test_features: ArrayLike,
  test_labels: ArrayLike,
  *,
  sizes: ArrayLike,
  heads: Mapping[str, Callable],
  num_classes: int,
  repeats: int = 5,
  minmax: bool = True,
) -> dict[str, jax.Array]:
  """Test errors of linear probes fitted to random subsets of each size, every class present in every subset.

  All heads see the same subsets. Features are scaled to [0, 1] with the ranges of the subset only. A subset is a mask,
  so that all sizes share one compiled fit; fits run one after another.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.metrics.gaussian_probe import gaussian_stats, stats_to_linear
  >>> bayes = lambda x, y, where: stats_to_linear(gaussian_stats(x, y, num_classes=2, where=where))
  >>> x = jax.random.normal(jax.random.key(0), (200, 3)) + 9 * (jnp.arange(200) % 2)[:, None]
  >>> y = jnp.arange(200) % 2
  >>> curve = probe_sample_curve(
  ...   jax.random.key(1), x[:100], y[:100], x[100:], y[100:], sizes=[10, 50], heads={"bayes": bayes}, num_classes=2
  ... )
  >>> curve["bayes"].shape, curve["bayes"].max().item()
  ((5, 2), 0.0)

  Args:
    key: threefry key, of the subsets.
    features: floating `[examples, features]`, to draw from; every class occurs.
    labels: integers `[examples]` in [0, num_classes).
    test_features: floating `[tests, features]`.
    test_labels: integers `[tests]`.
    sizes: integers `[sizes]` in [num_classes, examples]; may be traced.
    heads: static; name -> `fit(features, labels, where) -> LinearProbe`, with a boolean mask of the subset.
    num_classes: static.
    repeats: static; subsets of each size.
    minmax: static; whether features are scaled.

  Returns:
    name -> error rates, float32 at least, `[repeats, sizes]`.

  Raises:
    ValueError: when shapes do not fit or a size is out of range.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023, the linear-evaluation protocol (official code).
  """
  features, labels = _examples("", features, labels)
  test_features, test_labels = _examples("test_", test_features, test_labels)
  if features.shape[1] != test_features.shape[1]:
    raise ValueError(
      f"test_features must have {features.shape[1]} features as features has, got shape {test_features.shape}."
    )
  check_hyperparameter("repeats", repeats, low=1)
  sizes = sizes if isinstance(sizes, jax.Array) else np.asarray(sizes)
  if sizes.ndim != 1 or not jnp.issubdtype(sizes.dtype, jnp.integer):
    raise ValueError(f"sizes must be integers on one axis, got shape {sizes.shape} of dtype {sizes.dtype}.")
  check_hyperparameter("sizes", sizes, low=num_classes, high=features.shape[0])

  def errors(pair):
    key, size = pair
    where = _places(key, labels, num_classes) < size
    inputs, tests = features, test_features
    if minmax:
      scaling = minmax_scaling(features, where=where)
      inputs, tests = minmax_scale(scaling, features), minmax_scale(scaling, test_features)
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    wrong = lambda fit: predicted_classes(probe_logits(fit(inputs, labels, where), tests)) != test_labels
    return {name: jnp.mean(wrong(fit), dtype=dtype) for name, fit in heads.items()}

  keys = jax.random.split(key, repeats * len(sizes))
  curve = jax.lax.map(errors, (keys, jnp.tile(jnp.asarray(sizes), repeats)))
  return jax.tree.map(lambda values: values.reshape(repeats, len(sizes)), curve)


def min_samples_to(errors: ArrayLike, sizes: ArrayLike, *, target: ArrayLike) -> jax.Array:
  """The first size at which the error is below the target.

  >>> import jax.numpy as jnp
  >>> errors = jnp.array([[0.5, 0.2, 0.3, 0.1], [0.5, 0.5, 0.5, 0.5]])
  >>> min_samples_to(errors, jnp.array([4, 8, 16, 32]), target=0.25).tolist()
  [8.0, inf]

  Args:
    errors: floating `[..., sizes]`, for instance a mean over repeats.
    sizes: numbers `[sizes]`, ascending.
    target: real number, or array broadcasting against `[...]`; may be traced.

  Returns:
    `[...]`, float32 at least; infinite where the target is never reached, which an error of NaN does not.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023, the simulations (smallest sample within 0.01 of the Bayes error; official code).
  """
  check_float("errors", errors)
  check_hyperparameter("target", target)
  if jnp.ndim(errors) < 1 or jnp.shape(sizes) != jnp.shape(errors)[-1:]:
    raise ValueError(
      f"sizes must have the shape of the last axis of errors, got {jnp.shape(sizes)} for {jnp.shape(errors)}."
    )
  errors = jnp.asarray(errors)
  dtype = jnp.promote_types(errors.dtype, jnp.float32)
  reached = errors < jnp.expand_dims(jnp.asarray(target), -1)
  return jnp.min(jnp.where(reached, jnp.asarray(sizes).astype(dtype), jnp.inf), axis=-1)


def _places(key, labels, num_classes):
  """The place of each example in a random order that begins with one example of every class."""
  order = jax.random.permutation(key, labels.shape[0])
  shuffled = labels[order]
  first = jnp.argmax(shuffled[:, None] == jnp.arange(num_classes), axis=0)
  later = jnp.ones(labels.shape[0], bool).at[first].set(False)
  return jnp.zeros_like(order).at[order[jnp.argsort(later, stable=True)]].set(jnp.arange(labels.shape[0]))


def _examples(prefix, features, labels):
  check_float(f"{prefix}features", features)
  if jnp.ndim(features) != 2:
    raise ValueError(f"{prefix}features must be [examples, features], got shape {jnp.shape(features)}.")
  integer = jnp.issubdtype(dtype_of(f"{prefix}labels", labels), jnp.integer)
  if not integer or jnp.shape(labels) != jnp.shape(features)[:1]:
    raise ValueError(
      f"{prefix}labels must be integers of shape {jnp.shape(features)[:1]}, got {jnp.shape(labels)} of dtype"
      f" {jnp.result_type(labels)}."
    )
  return jnp.asarray(features), jnp.asarray(labels)
