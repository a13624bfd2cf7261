"""Assignment of a batch to clusters of equal size, by a few steps of Sinkhorn's algorithm."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter
from jaxreg.solvers.sinkhorn import sinkhorn_potentials

__all__ = ["sinkhorn_assignment"]


def sinkhorn_assignment(
  logits: ArrayLike, *, epsilon: ArrayLike = 0.05, steps: int = 3, where: ArrayLike | None = None
) -> jax.Array:
  """Soft assignments of samples to clusters, `[..., samples, clusters]`, each of sum 1, without gradient.

  The transport plan at cost `-logits` from samples of equal mass to clusters of equal mass, times the number of
  samples. A step fits the clusters, then the samples; after a few steps the clusters' totals are only nearly equal.
  It is computed from logarithms, where `exp(1 / 0.05)` would leave the range of float16.

  Under `pmap` or `shard_map` each device balances its own part of the batch.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])  # all prefer the first cluster
  >>> print(sinkhorn_assignment(logits).round(2)[:, 0])
  [1.   0.88 0.12 0.  ]

  Args:
    logits: floating `[..., samples, clusters]`; the paper's are cosines.
    epsilon: of the entropy, positive, in units of the logits; a scalar or `[...]`; may be traced.
    steps: static, at least 1.
    where: boolean `[samples]` or `[..., samples]`, the samples that are assigned; the rows of the others are 0, and
      they have no part in the balance.

  Returns:
    `[..., samples, clusters]`, in float32 or float64.

  Raises:
    ValueError: when shapes or dtypes do not fit, `epsilon` is not positive or `steps` less than 1.

  Reference: Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features by Contrasting
    Cluster Assignments", NeurIPS 2020, Section 3.1; Cuturi, NeurIPS 2013, Algorithm 1.
  """
  logits = as_array("logits", logits)
  check_float("logits", logits)
  if logits.ndim < 2:
    raise ValueError(f"logits must be [..., samples, clusters], got shape {logits.shape}.")
  check_hyperparameter("epsilon", epsilon, low=0, open_low=True, shape=logits.shape[:-2])
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  where = jnp.ones(logits.shape[-2:-1], bool) if where is None else as_array("where", where)
  if where.dtype != bool or where.shape not in (logits.shape[-2:-1], logits.shape[:-1]):
    raise ValueError(f"where must be boolean, one per sample, {logits.shape[:-1]}, got {where.shape} of {where.dtype}.")
  where = jnp.broadcast_to(where, logits.shape[:-1])
  cost = -jnp.where(where[..., None], jax.lax.stop_gradient(logits).astype(dtype), 0)
  count = jnp.maximum(jnp.sum(where, axis=-1, keepdims=True), 1)
  clusters = jnp.full((*logits.shape[:-2], logits.shape[-1]), 1 / logits.shape[-1], dtype)
  _, g = sinkhorn_potentials(
    cost, where / count.astype(dtype), clusters, epsilon=epsilon, steps=steps,
    row_potential=jnp.where(where, 0, -jnp.inf).astype(dtype),
  )  # fmt: skip
  # The step's fit of the samples is a softmax over the clusters.
  g = jnp.where(jnp.any(where, axis=-1, keepdims=True), g, 0)
  scores = (g[..., None, :] - cost) / jnp.asarray(epsilon, dtype)[..., None, None]
  return jnp.where(where[..., None], jax.nn.softmax(scores), 0)
