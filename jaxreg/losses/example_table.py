"""Tables of per-example state, indexed by an example's id in the data set."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, dtype_of, example_mask, widened_integers
from jaxreg.losses.labelled_logits import Labelled

__all__ = ["gather_rows", "update_rows"]


def table_ids(ids: jax.Array, shape: tuple[int, ...], examples: int, counted: jax.Array | None = None) -> jax.Array:
  """Checked ids, -1 for those outside the table and for examples that do not count.

  >>> import jax.numpy as jnp
  >>> table_ids(jnp.array([2, -5, 7, 0]), (4,), 7, jnp.array([True, True, True, False])).tolist()
  [2, -1, -1, -1]

  Args:
    ids: integers, one per label.
    shape: of the labels.
    examples: number of rows of the table.
    counted: booleans `[...]`, the examples that count; default all.

  Returns:
    Integers `[...]` in `[-1, examples)`.

  Raises:
    ValueError: unless there is one integer per label.
  """
  dtype = dtype_of("ids", ids)
  if not jnp.issubdtype(dtype, jnp.integer) or jnp.shape(ids) != shape:
    raise ValueError(
      f"ids must be integers, one per label, expected shape {shape}, got {jnp.shape(ids)} of dtype {dtype}."
    )
  ids = as_array("ids", ids)
  ids = widened_integers(ids)
  inside = (ids >= 0) & (ids < examples)
  return jnp.where(inside if counted is None else inside & counted, ids, -1)


def only_examples(batch: Labelled, where: jax.Array | None) -> Labelled:
  """The batch of which only the examples `where` count."""
  if where is None:
    return batch
  counted = batch.counted & example_mask(where, batch.labels.shape)
  logits = jnp.where(counted[..., None], batch.logits, 0)  # no table may get what is not a number
  return batch._replace(logits=logits, counted=counted)


def gather_rows(table: ArrayLike, ids: ArrayLike, *, default: ArrayLike = 0.0) -> jax.Array:
  """The rows of some examples, in at least float32.

  >>> import jax.numpy as jnp
  >>> gather_rows(jnp.arange(4.0), jnp.array([2, 0, -1]), default=9.0).tolist()
  [2.0, 0.0, 9.0]

  Args:
    table: `[examples, ...]`.
    ids: integers `[...]`.
    default: entries of a row whose id is outside `[0, examples)`; a scalar.

  Returns:
    `[..., ...]`.
  """
  table, ids = as_array("table", table), as_array("ids", ids)
  inside = (ids >= 0) & (ids < table.shape[0])
  rows = table[jnp.where(inside, ids, 0)].astype(jnp.promote_types(table.dtype, jnp.float32))
  return jnp.where(inside.reshape(inside.shape + (1,) * (rows.ndim - inside.ndim)), rows, default)


def update_rows(
  table: ArrayLike, ids: ArrayLike, rows: ArrayLike, *, unique_ids: bool = False, axis_name: str | None = None
) -> jax.Array:
  """The table with the rows of some examples replaced; no gradient flows into it.

  Ids outside `[0, examples)` change nothing. The rows of an id that occurs several times in the batch are averaged, so
  that their order does not matter. Under `pmap` or `shard_map` every replica must see every replica's rows, else the
  copies of the table drift apart: pass `axis_name`, and (ids, rows) are gathered over it. Under sharded `jit` the table
  is one global array and nothing is needed. In a compiled step that donates its state the table changes in place.

  >>> import jax.numpy as jnp
  >>> table = jnp.zeros(4)
  >>> for ids, rows in [([0, 3], [1.0, 2.0]), ([3, 1], [5.0, 6.0]), ([-1, 2, 2], [7.0, 1.0, 3.0])]:
  ...   table = update_rows(table, jnp.array(ids), jnp.array(rows))
  >>> table.tolist()
  [1.0, 6.0, 2.0, 5.0]

  Args:
    table: `[examples, ...]`.
    ids: integers `[...]`.
    rows: `[..., ...]`, cast to the table's dtype.
    unique_ids: static; promises that no id of the table occurs twice in the (global) batch, which saves sorting them.
      With a broken promise one of the rows wins, which one is not defined.
    axis_name: static; the mapped axis that splits the batch, if any.

  Returns:
    A table of the same shape and dtype.
  """
  table, ids, rows = as_array("table", table), as_array("ids", ids), as_array("rows", rows)
  ids, rows = pooled_rows(ids, rows, table.shape[0], unique_ids=unique_ids, axis_name=axis_name)
  return set_rows(table, ids, rows)


def pooled_rows(ids, rows, examples, *, unique_ids, axis_name):
  """Flat ids and rows of all devices; rows of equal ids are averages, ids outside the table are `examples`."""
  rows = jax.lax.stop_gradient(rows)
  if axis_name is not None:
    ids, rows = jax.lax.all_gather((ids, rows), axis_name, tiled=jnp.ndim(ids) > 0)
  rows, ids = rows.reshape(-1, *rows.shape[ids.ndim :]), ids.reshape(-1)
  ids = jnp.where((ids >= 0) & (ids < examples), ids, examples)
  if not unique_ids and ids.size > 1:
    ordered = jnp.sort(ids)
    repeated = jnp.any((ordered[1:] == ordered[:-1]) & (ordered[1:] < examples))
    rows = jax.lax.cond(repeated, lambda: _averaged(rows, ids, ordered), lambda: rows)
  return ids, rows


def set_rows(table, ids, rows):
  """The table with pooled rows in it."""
  return table.at[ids].set(rows.astype(table.dtype), mode="drop")


def _averaged(rows, ids, ordered):
  """The mean of the rows that have the same id."""
  first = jnp.searchsorted(ordered, ids)
  count = jnp.zeros(ids.shape, rows.dtype).at[first].add(1)
  total = jnp.zeros_like(rows).at[first].add(rows)
  return (total / count.reshape(-1, *[1] * (rows.ndim - 1)))[first]
