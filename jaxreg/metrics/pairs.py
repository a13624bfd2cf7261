"""Pairs of embeddings, some examples against all: a block of rows at a time, so that no square matrix exists."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = []


class Rows(NamedTuple):
  """Embeddings with what says which of them make pairs."""

  embeddings: jax.Array  # [rows, features], zeros where they do not count
  labels: jax.Array  # integers [rows]
  counted: jax.Array  # booleans [rows]
  places: jax.Array  # integers [rows], an example's place among all


def pairs_of(rows: Rows, others: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Inner products, and which pairs are of one label and of different ones, `[rows, others]`; none with itself."""
  similarities = jnp.matmul(rows.embeddings, others.embeddings.T, precision="highest")
  pairs = rows.counted[:, None] & others.counted & (rows.places[:, None] != others.places)
  same = rows.labels[:, None] == others.labels
  return similarities, pairs & same, pairs & ~same


def in_blocks(function: Callable, rows: Any, size: int) -> Any:
  """A function of rows (a tree of arrays), applied to `size` of them after another.

  What fills up the last block is zeros (which do not count as examples), and is cut off.
  """
  length = len(jax.tree.leaves(rows)[0])
  if size >= length:
    return function(rows)
  blocks = -(-length // size)
  pad = lambda leaf: jnp.pad(leaf, [(0, blocks * size - length)] + [(0, 0)] * (leaf.ndim - 1))
  parts = jax.tree.map(lambda leaf: pad(leaf).reshape(blocks, size, *leaf.shape[1:]), rows)
  found = jax.lax.map(function, parts)
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:length], found)
