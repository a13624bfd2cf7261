"""The last features of every domain, kept as a ring buffer, and their means."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_state, dtype_of, example_mask
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.metrics.sizes import static_integer

__all__ = ["FeatureBank", "feature_bank_init", "feature_bank_means", "feature_bank_update"]


class FeatureBank(NamedTuple):
  """The last features of each domain, `[domains, capacity, features]`, and how many were ever written, `[domains]`."""

  features: jax.Array
  written: jax.Array


def feature_bank_init(num_domains: int, capacity: int, num_features: int, *, dtype=jnp.float32) -> FeatureBank:
  """An empty bank.

  >>> feature_bank_init(2, 3, 4).features.shape
  (2, 3, 4)

  Args:
    num_domains: at least 1; static.
    capacity: examples that are kept of each domain, at least 1; static.
    num_features: at least 1; static.
    dtype: of the features, floating; static.

  Returns:
    `FeatureBank`.

  Raises:
    ValueError: when a size is not a positive integer or the dtype not floating.

  Reference: Zhang, Wang, Liang, Zhang, Yu, Wang, Tao, Xie, "Domain-Specific Risk Minimization for Domain
    Generalization", KDD 2023, the prototypes (as in the official code).
  """
  sizes = {"num_domains": num_domains, "capacity": capacity, "num_features": num_features}
  shape = tuple(static_integer(name, size, low=1) for name, size in sizes.items())
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be floating, got {dtype}.")
  return FeatureBank(jnp.zeros(shape, dtype), jnp.zeros(shape[:1], jnp.int32))


def feature_bank_update(
  features: ArrayLike,
  domains: ArrayLike,
  bank: FeatureBank,
  *,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> FeatureBank:
  """The bank with a batch written over its oldest features.

  >>> import jax.numpy as jnp
  >>> bank = feature_bank_init(2, 2, 1)
  >>> bank = feature_bank_update(jnp.array([[1.0], [2.0], [3.0], [7.0]]), jnp.array([0, 0, 0, 1]), bank)
  >>> sorted(bank.features[0, :, 0].tolist()), bank.written.tolist()
  ([2.0, 3.0], [3, 1])

  Args:
    features: floating `[batch, features]`; kept without gradient, in the bank's dtype.
    domains: integers `[batch]` in `[0, domains)`; examples of other domains are not written.
    bank: from `feature_bank_init` or the step before.
    where: boolean `[batch]`: the examples that are written.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch, so that every device has the same
      bank.

  Returns:
    `FeatureBank`. Of more examples than fit the last ones in the batch stay.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Zhang et al., KDD 2023, the prototypes (as in the official code, which keeps whole batches).
  """
  check_state(bank, FeatureBank, "bank")
  check_float("features", features)
  features = jax.lax.stop_gradient(as_array("features", features))
  count, capacity, width = bank.features.shape
  if features.ndim != 2 or features.shape[1] != width:
    raise ValueError(f"features must be [batch, {width}], got shape {features.shape}.")
  if not jnp.issubdtype(dtype_of("domains", domains), jnp.integer) or jnp.shape(domains) != features.shape[:1]:
    raise ValueError(f"domains must be integers, one per example, got shape {jnp.shape(domains)}.")
  domains, kept = as_array("domains", domains).astype(jnp.int32), example_mask(where, features.shape[:1])
  if axis_name is not None:
    gathered = jax.lax.all_gather((features, domains, kept), axis_name)
    features, domains, kept = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), gathered)
  belongs = kept[:, None] & (domains[:, None] == jnp.arange(count))
  order = jnp.cumsum(belongs, axis=0)  # the first example of a domain in the batch has 1
  total = order[-1] if len(features) else jnp.zeros(count, order.dtype)
  written = belongs & (order > total - capacity)
  domain = jnp.where(jnp.any(written, axis=1), jnp.argmax(written, axis=1), count)
  place = (
    jnp.take_along_axis(order + bank.written - 1, jnp.minimum(domain, count - 1)[:, None], axis=1)[:, 0] % capacity
  )
  stored = jnp.asarray(bank.features).at[domain, place].set(features.astype(bank.features.dtype), mode="drop")
  return FeatureBank(stored, bank.written + total.astype(bank.written.dtype))


def feature_bank_means(bank: FeatureBank) -> jax.Array:
  """The mean of what is kept of each domain: the centroids of `nearest_domain_weights`.

  >>> import jax.numpy as jnp
  >>> bank = feature_bank_update(jnp.array([[1.0], [2.0]]), jnp.array([1, 1]), feature_bank_init(2, 4, 1))
  >>> feature_bank_means(bank).tolist()
  [[0.0], [1.5]]

  Args:
    bank: from `feature_bank_update`.

  Returns:
    `[domains, features]`, in the bank's dtype; 0 of a domain of which nothing was written.

  Raises:
    ValueError: when it is no `FeatureBank`.

  Reference: Zhang et al., KDD 2023, the prototypes (as in the official code).
  """
  check_state(bank, FeatureBank, "bank")
  filled = jnp.arange(bank.features.shape[1]) < bank.written[:, None]
  wide = jnp.where(filled[..., None], widened(jnp.asarray(bank.features)), 0)
  means = jnp.sum(wide, axis=1) / jnp.maximum(jnp.sum(filled, axis=1), 1)[:, None]
  return narrowed(means, bank.features.dtype)
