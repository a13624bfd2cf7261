"""How inconsistent a loss's landscape is between source data and crafted ones, by the gradients of a linear head."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_same_shape, example_mask
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.regularizers.linear_head import head_gradient, head_gradient_square_norms, head_gradient_variance

__all__ = ["inconsistency_penalty"]

CENTERS = ("source", "own")


def inconsistency_penalty(
  features: ArrayLike,
  crafted_features: ArrayLike,
  labels: ArrayLike,
  head: Mapping[str, ArrayLike],
  *,
  center: str = "source",
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The squared difference of two variances of head gradients, and the size of the crafted examples' gradients.

  Of the examples' gradients in the head's P coordinates, let `v0` be the variance of the source ones and `v1` the mean
  square of the crafted ones about the *source* mean: `sum_j (v0_j - v1_j)^2 / (4 P)`, plus `mean_n ||g1_n||^2` of each
  array of the head over its number of entries. Gradients flow through both halves. The first part goes with the fourth
  power of the features and all of it is a mean over coordinates: a weight belongs to one head and scale of features.

  >>> import jax.numpy as jnp
  >>> head = {"kernel": jnp.zeros((1, 2))}
  >>> source, labels = jnp.array([[1.0], [3.0]]), jnp.array([0, 0])
  >>> inconsistency_penalty(source, source, labels, head).item()  # variances cancel
  1.25
  >>> inconsistency_penalty(source, source + 2, labels, head).item()
  4.5

  Args:
    features: floating `[..., batch, features]` of the source examples; leading axes are domains, which are summed.
    crafted_features: of the same examples' crafted inputs.
    labels: integers `[..., batch]`; examples with another label than a class count for nothing.
    head: `kernel` floating `[features, classes]` and perhaps `bias` `[classes]`; one column is a sigmoid of labels 0
      and 1.
    center: what the crafted gradients' mean square is about, the `source` mean (as in the official code; swapping
      source and crafted features then changes the first part) or their `own` mean, as in Fishr; static.
    where: boolean `[..., batch]`: the examples that count; those of the others are not read.
    axis_name: the mapped axis over which the batch is split in equal parts, or None: every device has the value of the
      whole, and the mean over the devices of their gradients (`pmean`) is its gradient.

  Returns:
    Scalar, in the dtype of the features; 0 of no examples.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Shin, Bae, Na, Kim, Moon, "Unknown Domain Inconsistency Minimization for Domain Generalization", ICLR 2024,
    the inconsistency objective (as in the official code).
  """
  if center not in CENTERS:
    raise ValueError(f"center must be one of {', '.join(CENTERS)}, got {center!r}.")
  for name, value in {"features": features, "crafted_features": crafted_features}.items():
    check_float(name, value)
  features, crafted, labels = (
    as_array(*named) for named in (("features", features), ("features", crafted_features), ("labels", labels))
  )
  check_same_shape(features=features, crafted_features=crafted)
  counted = example_mask(where, features.shape[:-1])
  dtype = features.dtype
  features, crafted = widened(features), widened(crafted)
  if axis_name is not None:
    gather = lambda x, axis: jax.lax.all_gather(x, axis_name, axis=x.ndim + axis, tiled=True)
    features, crafted = gather(features, -2), gather(crafted, -2)
    labels, counted = gather(labels, -1), gather(counted, -1)
  wide = {name: widened(as_array("head", array)) for name, array in head.items()} if isinstance(head, Mapping) else head
  mean = head_gradient(features, labels, wide, where=counted) if center == "source" else None
  source = head_gradient_variance(features, labels, wide, where=counted)
  moved = head_gradient_variance(crafted, labels, wide, where=counted, center=mean)
  norms = head_gradient_square_norms(crafted, labels, wide, where=counted)
  entries = {name: array.size for name, array in wide.items()}
  spread = sum(jnp.sum(jnp.square(source[name] - moved[name])) for name in wide) / (4 * sum(entries.values()))
  return narrowed(spread + sum(jnp.sum(norms[name]) / entries[name] for name in wide), dtype)
