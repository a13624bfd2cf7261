"""What attacks maximise beside the training loss: margins of logits, which do not vanish where a softmax saturates."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.losses.hinge import largest_other
from jaxreg.losses.labelled_logits import labelled
from jaxreg.losses.softmax_family import of_label

__all__ = ["dlr_objective", "margin_objective"]


def margin_objective(logits: ArrayLike, labels: ArrayLike, *, targets: ArrayLike | None = None) -> jax.Array:
  """How far the best wrong class is above the label's, `max_{k != y} z_k - z_y`: positive where an attack succeeded.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[3.0, 1.0, 2.5]])
  >>> margin_objective(logits, jnp.array([0])).item(), margin_objective(logits, jnp.array([0]), targets=[1]).item()
  (-0.5, -2.0)

  Args:
    logits: floating `[..., classes]` of at least two classes.
    labels: integers `[...]`.
    targets: integers `[...]`, the wrong class of a targeted attack in place of the best one.

  Returns:
    `[...]`, of the logits' dtype; 0 for labels, or targets, that are no class.

  Raises:
    ValueError: when labels or targets do not fit the logits, or there is one class.

  Reference: Carlini, Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017, objective f_6 without
    its clip.
  """
  batch = _of_classes(labelled(logits, labels), 2)
  if targets is not None:
    return _between(batch, labelled(batch.logits, targets))
  return batch.values((largest_other(batch.logits, batch.labels) - of_label(batch.logits, batch.labels))[..., 0])


def dlr_objective(logits: ArrayLike, labels: ArrayLike, *, targets: ArrayLike | None = None) -> jax.Array:
  """The difference-of-logits ratio: the margin in units of the spread of the largest logits, whatever their scale.

  `(max_{k != y} z_k - z_y) / (z_(1) - z_(3))`, with z_(i) the i-th largest logit; of a targeted attack
  `(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[3.0, 1.0, 2.5, 0.0]])
  >>> [dlr_objective(scale * logits, jnp.array([0])).item() for scale in (1.0, 100.0)]
  [-0.25, -0.25]

  Args:
    logits: floating `[..., classes]` of at least three classes, four with targets.
    labels: integers `[...]`.
    targets: as in `margin_objective`.

  Returns:
    `[...]`, of the logits' dtype; the margin itself where the spread is 0; 0 for labels, or targets, that are no class.

  Raises:
    ValueError: as `margin_objective`, or when there are too few classes.

  Reference: Croce, Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
    Attacks", ICML 2020, Equations 6 and 7.
  """
  batch = _of_classes(labelled(logits, labels), 3 if targets is None else 4)
  largest = jax.lax.top_k(batch.logits, 3 if targets is None else 4)[0]
  if targets is None:
    spread, margin = largest[..., 0] - largest[..., 2], margin_objective(batch.logits, batch.labels)
  else:
    spread = largest[..., 0] - (largest[..., 2] + largest[..., 3]) / 2
    margin = _between(batch, labelled(batch.logits, targets)).astype(spread.dtype)
  return batch.values(margin / jnp.where(spread == 0, 1, spread))


def _of_classes(batch, least):
  if batch.logits.shape[-1] < least:
    raise ValueError(f"logits must be of at least {least} classes here, got shape {batch.logits.shape}.")
  return batch


def _between(batch, target):
  difference = of_label(batch.logits, target.labels) - of_label(batch.logits, batch.labels)
  return batch.values(jnp.where(target.counted, difference[..., 0], 0))
