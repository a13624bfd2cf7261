"""Swapped prediction: every view of an image predicts what another view was assigned to."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter
from jaxreg.losses.labelled_logits import narrowed, widened

__all__ = ["swapped_prediction_loss"]


def swapped_prediction_loss(logits: ArrayLike, targets: ArrayLike, *, temperature: ArrayLike = 0.1) -> jax.Array:
  """The mean over pairs of views v, o of `-<y_v, log softmax(z_o / tau)>`, where v has targets and o is not v.

  Targets are constants: one-hot labels, or an assignment to clusters such as `solvers.sinkhorn_assignment`.

  >>> import jax.numpy as jnp
  >>> targets = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two views of one image disagree
  >>> print(swapped_prediction_loss(jnp.array([[[0.0, 0.2]], [[0.2, 0.0]]]), targets).round(3))
  [0.127]

  Args:
    logits: floating `[views, ..., classes]`, at least two views, those with targets (large crops) first.
    targets: `[target views, ..., classes]`, of sum 1, for the first so many views.
    temperature: the paper's tau, positive scalar; may be traced.

  Returns:
    `[...]`, the loss of each image (and head).

  Raises:
    ValueError: when shapes do not fit or the temperature is not positive.

  Reference: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting
    Cluster Assignments", NeurIPS 2020, equations 1 and 2; over known and novel classes together Fini et al., "A Unified
    Objective for Novel Class Discovery", ICCV 2021.
  """
  logits, targets = as_array("logits", logits), as_array("targets", targets)
  check_float("logits", logits)
  check_float("targets", targets)
  if logits.ndim < 2 or targets.ndim != logits.ndim or targets.shape[1:] != logits.shape[1:]:
    raise ValueError(
      f"targets must be [target views, ..., classes] for logits [views, ..., classes], got {targets.shape} for"
      f" {logits.shape}."
    )
  views, taught = logits.shape[0], targets.shape[0]
  if views < 2 or not 1 <= taught <= views:
    raise ValueError(f"targets must be of at least one of at least two views, got {taught} of {views}.")
  check_hyperparameter("temperature", temperature, low=0, open_low=True, shape=())
  wide = widened(logits)
  targets = jax.lax.stop_gradient(targets.astype(wide.dtype))
  log_predictions = jax.nn.log_softmax(wide / jnp.asarray(temperature, wide.dtype))
  # What a view predicts are the other views' targets: all of them without its own.
  own = jnp.zeros_like(log_predictions).at[:taught].set(targets)
  others = jnp.sum(targets, axis=0) - own
  values = -jnp.sum(others * log_predictions, axis=(0, -1)) / (taught * (views - 1))
  return narrowed(values, logits.dtype)
