"""Tables of per-example state, indexed by an example's id in the data set."""

import jax
import jax.numpy as jnp

__all__ = ["check_ids", "gather_rows", "update_rows"]


def check_ids(ids: jax.Array, labels: jax.Array) -> None:
  """Raises ValueError unless `ids` are integers, one per label."""
  if not jnp.issubdtype(jnp.result_type(ids), jnp.integer) or jnp.shape(ids) != jnp.shape(labels):
    raise ValueError(
      f"ids must be integers, one per label, expected shape {jnp.shape(labels)},"
      f" got {jnp.shape(ids)} of dtype {jnp.result_type(ids)}."
    )


def gather_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
  """The rows of some examples, in at least float32.

  >>> import jax.numpy as jnp
  >>> gather_rows(jnp.arange(4.0), jnp.array([2, 0])).tolist()
  [2.0, 0.0]

  Args:
    table: `[examples, ...]`.
    ids: integers `[...]` in `[0, examples)`.

  Returns:
    `[..., ...]`.
  """
  return table[ids].astype(jnp.promote_types(table.dtype, jnp.float32))


def update_rows(table: jax.Array, ids: jax.Array, rows: jax.Array, *, axis_name: str | None = None) -> jax.Array:
  """The table with the rows of some examples replaced; no gradient flows into it.

  Within one batch an id may occur only once (else one of its rows wins, which one is not defined). Under `pmap` or
  `shard_map` every replica must see every replica's rows, else the copies of the table drift apart: pass `axis_name`,
  and (ids, rows) are gathered over it. Under sharded `jit` the table is one global array and nothing is needed.

  >>> import jax.numpy as jnp
  >>> table = jnp.zeros(4)
  >>> for ids, rows in [([0, 3], [1.0, 2.0]), ([3, 1], [5.0, 6.0])]:
  ...   table = update_rows(table, jnp.array(ids), jnp.array(rows))
  >>> table.tolist()
  [1.0, 6.0, 0.0, 5.0]

  Args:
    table: `[examples, ...]`.
    ids: integers `[...]`.
    rows: `[..., ...]`, cast to the table's dtype.
    axis_name: static; the mapped axis that splits the batch, if any.

  Returns:
    A table of the same shape and dtype.
  """
  rows = jax.lax.stop_gradient(rows).astype(table.dtype)
  if axis_name is not None:
    ids, rows = jax.lax.all_gather((ids, rows), axis_name, tiled=jnp.ndim(ids) > 0)
  return table.at[ids].set(rows)
