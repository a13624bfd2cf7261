"""Penalties on how risks, features and gradients differ between environments: V-REx, IRM, CORAL, MMD and IGA.

The leading axis is that of the environments. A mask lets them differ in size; an environment without examples does not
count.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, example_mask
from jaxreg.kernels.rbf import squared_distances
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.regularizers.environment_batch import (
  checked_features,
  class_labels,
  class_targets,
  example_weights,
  mean_of_environments,
)

__all__ = ["coral_penalty", "environment_risks", "iga_penalty", "irm_penalty", "mmd_penalty", "vrex_penalty"]

GAMMAS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)


def environment_risks(losses: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """The mean loss of every environment.

  >>> import jax.numpy as jnp
  >>> losses, where = jnp.array([[1.0, 3.0], [5.0, jnp.nan]]), jnp.array([[True, True], [True, False]])
  >>> environment_risks(losses, where=where).tolist()
  [2.0, 5.0]

  Args:
    losses: floating `[environments, batch]`.
    where: boolean `[environments, batch]`: the examples that count.

  Returns:
    `[environments]`, in the dtype of the losses; 0 of no examples.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: none.
  """
  risks, _, dtype = _risks(losses, where)
  return narrowed(risks, dtype)


def vrex_penalty(losses: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """The variance of the environments' risks (V-REx).

  >>> import jax.numpy as jnp
  >>> vrex_penalty(jnp.array([[1.0, 3.0], [5.0, 5.0]])).item()
  2.25

  Args:
    losses: floating `[environments, batch]`.
    where: boolean `[environments, batch]`: the examples that count.

  Returns:
    Scalar, in the dtype of the losses; divided by the number of environments, not that minus one.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation (REx)", ICML 2021, equation 8.
  """
  risks, some, dtype = _risks(losses, where)
  return narrowed(mean_of_environments((risks - mean_of_environments(risks, some)) ** 2, some), dtype)


def irm_penalty(
  logits: ArrayLike, labels: ArrayLike, *, split: bool = True, where: ArrayLike | None = None
) -> jax.Array:
  """The squared slope of an environment's risk in a factor of its logits, a mean over environments (IRMv1).

  The slope at 1 is `mean_n <p_n - y_n, logits_n>`; of a linear head it is the inner product of head and gradient.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[[2.0], [-2.0]]]), jnp.array([[1, 0]])
  >>> round(irm_penalty(logits, labels).item(), 4)
  0.0568

  Args:
    logits: floating `[environments, batch, classes]`; one column is a sigmoid of labels 0 and 1.
    labels: integers `[environments, batch]`; examples with another label than a class count for nothing.
    split: whether the square is the product of the slopes of the examples at even and at odd places, which estimates
      it without bias and may be negative; static.
    where: boolean `[environments, batch]`: the examples that count.

  Returns:
    Scalar, in the dtype of the logits; an environment in which no example counts, or with `split` none of a half, does
    not count.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Arjovsky, Bottou, Gulrajani, Lopez-Paz, "Invariant Risk Minimization", arXiv 1907.02893, 2019, IRMv1.
  """
  check_float("logits", logits)
  logits = as_array("logits", logits)
  if logits.ndim != 3 or logits.shape[-1] < 1:
    raise ValueError(f"logits must be [environments, batch, classes], got shape {logits.shape}.")
  labels, counted = class_labels(labels, logits.shape[:-1], logits.shape[-1])
  counted &= example_mask(where, logits.shape[:-1])
  wide = jnp.where(counted[..., None], widened(logits), 0)
  probabilities = jax.nn.sigmoid(wide) if wide.shape[-1] == 1 else jax.nn.softmax(wide)
  slopes = jnp.sum((probabilities - class_targets(labels, wide.shape[-1], wide.dtype)) * wide, axis=-1)
  halves = [(slopes[:, start::2], counted[:, start::2]) for start in (0, 1)] if split else [(slopes, counted)] * 2
  product, some = 1, True
  for part, mask in halves:
    product *= jnp.sum(example_weights(mask, part.dtype) * part, axis=-1)
    some &= jnp.any(mask, axis=-1)
  return narrowed(mean_of_environments(product, some), logits.dtype)


def coral_penalty(features: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """The squared differences of the environments' means and covariances of features, a mean over pairs (CORAL).

  Means over the entries of either. Covariances divide by the number of examples minus one.

  >>> import jax.numpy as jnp
  >>> coral_penalty(jnp.array([[[0.0], [2.0]], [[3.0], [5.0]]])).item()
  9.0

  Args:
    features: floating `[environments, batch, features]`.
    where: boolean `[environments, batch]`: the examples that count.

  Returns:
    Scalar, in the dtype of the features; 0 of one environment.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Sun, Saenko, "Deep CORAL: Correlation Alignment for Deep Domain Adaptation", ECCV Workshops 2016, with
    means as in Gulrajani, Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021 (as in its code).
  """
  wide, counted, dtype = _features(features, where)
  weights = example_weights(counted, wide.dtype)[..., None]
  mean = jnp.sum(weights * wide, axis=1)
  centred = wide - mean[:, None]
  scaled = centred * counted[..., None] / jnp.maximum(jnp.sum(counted, axis=1) - 1, 1)[:, None, None]
  covariance = jnp.einsum("ebk,ebl->ekl", centred, scaled, precision="highest")
  some = jnp.any(counted, axis=1)
  # The mean over pairs is twice the unbiased variance.
  pairs = jnp.maximum(jnp.sum(some) - 1, 1) / jnp.maximum(jnp.sum(some), 1)
  total = 0
  for each in (mean, covariance):
    flat = each.reshape(len(each), -1)
    distances = jnp.mean((flat - mean_of_environments(flat, some)) ** 2, axis=1)
    total += 2 * mean_of_environments(distances, some) / pairs
  return narrowed(total, dtype)


def mmd_penalty(
  features: ArrayLike, *, gammas: tuple[float, ...] = GAMMAS, where: ArrayLike | None = None
) -> jax.Array:
  """The maximum mean discrepancy between the environments' features, a mean over pairs (MMD).

  Of a sum of kernels `exp(-gamma |x - x'|^2)`, with every pair of examples, itself among them.

  >>> import jax.numpy as jnp
  >>> round(mmd_penalty(jnp.array([[[0.0]], [[1.0]]]), gammas=(1.0,)).item(), 4)
  1.2642

  Args:
    features: floating `[environments, batch, features]`.
    gammas: non-negative `[kernels]`.
    where: boolean `[environments, batch]`: the examples that count.

  Returns:
    Scalar, in the dtype of the features; 0 of one environment.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Li, Pan, Wang, Kot, "Domain Generalization with Adversarial Feature Learning", CVPR 2018, with the kernels
    of Gulrajani, Lopez-Paz, ICLR 2021 (as in its code).
  """
  wide, counted, dtype = _features(features, where)
  gammas = as_array("gammas", gammas).astype(wide.dtype)
  if gammas.ndim != 1 or not len(gammas):
    raise ValueError(f"gammas must be [kernels], got shape {gammas.shape}.")
  environments, size = counted.shape
  flat = wide.reshape(-1, wide.shape[-1])
  squares = squared_distances(flat, flat).reshape(environments, size, environments, size)
  weights = example_weights(counted, wide.dtype)
  kernels = sum(jnp.exp(-gamma * squares) for gamma in gammas)
  means = jnp.einsum("ea,eafb,fb->ef", weights, kernels, weights, precision="highest")
  within = jnp.diagonal(means)
  some = jnp.any(counted, axis=1)
  pairs = some[:, None] & some & ~jnp.eye(environments, dtype=bool)
  discrepancies = within[:, None] + within - 2 * means
  return narrowed(jnp.sum(jnp.where(pairs, discrepancies, 0)) / jnp.maximum(jnp.sum(pairs), 1), dtype)


def iga_penalty(gradients: Any) -> jax.Array:
  """The squared distance of the environments' gradients from their mean, summed over environments (IGA).

  >>> import jax.numpy as jnp
  >>> iga_penalty({"w": jnp.array([[1.0, 0.0], [3.0, 0.0]])}).item()
  2.0

  Args:
    gradients: a tree of floating `[environments, ...]`, of all parameters, as `vmap(grad(risk), (None, 0))` gives.

  Returns:
    Scalar, float32 at least. Its own gradient takes a second pass through the network.

  Raises:
    ValueError: when leaves are not floating point or have different numbers of environments.

  Reference: Koyama, Yamaguchi, "When is invariance useful in an Out-of-Distribution Generalization problem?", arXiv
    2008.01883, 2020 (as in the code of Gulrajani, Lopez-Paz, ICLR 2021: not divided by the environments).
  """
  leaves = jax.tree.leaves(gradients)
  for leaf in leaves:
    check_float("gradients", leaf)
  sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(f"gradients must be arrays [environments, ...], got {[jnp.shape(leaf) for leaf in leaves]}.")
  spread = lambda leaf: jnp.sum((leaf - jnp.mean(leaf, axis=0)) ** 2)
  return sum(spread(widened(jnp.asarray(leaf))) for leaf in leaves)


def _risks(losses, where):
  check_float("losses", losses)
  losses = as_array("losses", losses)
  if losses.ndim != 2:
    raise ValueError(f"losses must be [environments, batch], got shape {losses.shape}.")
  counted = example_mask(where, losses.shape)
  wide = jnp.where(counted, widened(losses), 0)
  return jnp.sum(example_weights(counted, wide.dtype) * wide, axis=1), jnp.any(counted, axis=1), losses.dtype


def _features(features, where):
  features = checked_features(features, ndim=3)
  counted = example_mask(where, features.shape[:2])
  return jnp.where(counted[..., None], widened(features), 0), counted, features.dtype
