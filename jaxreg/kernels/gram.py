"""Gram matrices of many examples, tile by tile: memory for one tile beside the result, devices sharing the tiles."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxreg.checks import as_array
from jaxreg.kernels.infinite_width import KernelState
from jaxreg.metrics.sizes import static_integer

__all__ = ["tiled_gram"]


def tiled_gram(
  kernel: Callable,
  inputs1: ArrayLike,
  inputs2: ArrayLike | None = None,
  *,
  tile: int,
  mesh: Mesh | None = None,
  advance: Callable[[int], None] | None = None,
):
  """Kernels between all pairs of inputs, computed in tiles, each pair of a symmetric matrix once.

  >>> import jax.numpy as jnp
  >>> linear = lambda x, y: x @ (x if y is None else y).T
  >>> x = jnp.arange(6.0).reshape(3, 2)
  >>> bool(jnp.allclose(tiled_gram(linear, x, tile=2), x @ x.T))
  True

  Args:
    kernel: static; `(tile of inputs1, tile of inputs2) -> [tile, tile, ...]`, an array or a tree of arrays and of
      `KernelState`s, such as `fully_connected` returns; it gets None in place of the second tile on the diagonal of a
      symmetric matrix, where both are the same. Kernels with matrices as values, `[tile, tile, outputs, outputs]`,
      satisfy `K(x, y) = K(y, x)^T`.
    inputs1: `[inputs1, ...]`.
    inputs2: `[inputs2, ...]`, or None for the symmetric matrix of `inputs1`.
    tile: static; positive number of inputs on either side of a tile.
    mesh: static; the tiles are shared among all its devices, each of which holds all inputs; None for one device.
    advance: static; called with 1 after every tile, for a progress bar (`jaxreg.training.progress`). There
      are `n (n + 1) / 2` tiles for a symmetric matrix of n tiles a side, and with a mesh a few repeated ones.

  Returns:
    What the kernel returns, `[inputs1, inputs2, ...]` for every array and `[inputs1, ...]` and `[inputs2, ...]` for the
    variances of a state.

  Raises:
    ValueError: when `tile` is not positive.

  Reference: Novak et al., "Neural Tangents: Fast and Easy Infinite Neural Networks in Python", ICLR 2020, Section 3
    (batching and multiple devices).
  """
  tile = static_integer("tile", tile, low=1)
  inputs1 = as_array("inputs1", inputs1)
  inputs2 = None if inputs2 is None else as_array("inputs2", inputs2)
  rows = _tiles(inputs1, tile)
  count1, blocks1 = len(inputs1), len(rows)
  if inputs2 is not None:
    columns, count2 = _tiles(inputs2, tile), len(inputs2)
    shape = (blocks1, len(columns))
    first, second = (index.reshape(-1) for index in np.indices(shape))
    blocks = _each(lambda i, j, x, y: kernel(x[i], y[j]), (first, second), (rows, columns), mesh, advance)
    grid = jax.tree.map(lambda b: b.reshape(shape + b.shape[1:]), blocks)
    return _map_kernels(
      lambda b: _join(b, count1, count2), lambda b: _line(b[:, 0], count1), lambda b: _line(b[0], count2), grid
    )
  index = np.arange(blocks1)
  first, second = np.triu_indices(blocks1, 1)
  diagonal = _each(lambda i, x: kernel(x[i], None), (index,), (rows,), mesh, advance)
  line = lambda b, *_: _line(b, count1)
  if not len(first):
    return _map_kernels(lambda b: b[0, :count1, :count1], line, line, diagonal)
  above = _each(lambda i, j, x: kernel(x[i], x[j]), (first, second), (rows,), mesh, advance)

  def assemble(diagonal, above, mirror=_mirror):
    # A gather: tile (i, j) is at its place among those on and above the diagonal, or the mirror image of tile (j, i).
    stacked = jnp.concatenate([diagonal, above, mirror(above)])
    place = np.zeros((blocks1, blocks1), np.int64)
    place[index, index] = index
    place[first, second] = blocks1 + np.arange(len(first))
    place[second, first] = blocks1 + len(first) + np.arange(len(first))
    return _join(stacked[place], count1, count1)

  return _map_kernels(assemble, line, line, diagonal, above, mirror=_mirror_positions)


def _map_kernels(pairs, first, second, *trees, **options):
  """`pairs` of all arrays between inputs, and of the variances in a `KernelState` `first` and `second`."""
  is_state = lambda node: isinstance(node, KernelState)

  def of(node, *others):
    if not is_state(node):
      return pairs(node, *others)
    covariance, variance1, variance2, ntk, complement = zip(node, *others, strict=True)
    between = lambda arrays: None if arrays[0] is None else pairs(*arrays, **options)
    return KernelState(between(covariance), first(*variance1), second(*variance2), between(ntk), between(complement))

  return jax.tree.map(of, *trees, is_leaf=is_state)


def _tiles(inputs, tile):
  """`[tiles, tile, ...]`; the last input fills the last tile."""
  count = len(inputs)
  index = np.minimum(np.arange(-(-count // tile) * tile), count - 1)
  return jnp.asarray(inputs)[index].reshape((-1, tile) + jnp.shape(inputs)[1:])


def _mirror(blocks):
  swapped = jnp.swapaxes(blocks, 1, 2)
  return jnp.swapaxes(swapped, 3, 4) if blocks.ndim == 5 else swapped


def _mirror_positions(blocks):
  """The mirror image for images: equal positions stay, of pairs of positions each is swapped."""
  swapped = jnp.swapaxes(blocks, 1, 2)
  return jnp.swapaxes(jnp.swapaxes(swapped, 3, 4), 5, 6) if blocks.ndim == 7 else swapped


def _line(blocks, count):
  """The variances `[tiles, tile, ...]` of all inputs, one after the other."""
  return blocks.reshape((-1,) + blocks.shape[2:])[:count]


def _join(blocks, rows, columns):
  joined = jnp.swapaxes(blocks, 1, 2)
  shape = (joined.shape[0] * joined.shape[1], joined.shape[2] * joined.shape[3]) + joined.shape[4:]
  return joined.reshape(shape)[:rows, :columns]


def _each(function, indices, inputs, mesh, advance):
  """The function of every index, one after the other; with a mesh every device takes its share of them."""

  def every(indices, inputs):
    def one(index):
      blocks = function(*index, *inputs)
      if advance is not None:  # the argument makes it wait for the tile
        jax.debug.callback(lambda _: advance(1), jnp.ravel(jax.tree.leaves(blocks)[0])[0])
      return blocks

    return jax.lax.map(one, indices)

  if mesh is None:
    return every(indices, inputs)
  count, devices = len(indices[0]), mesh.size
  padded = [np.minimum(np.arange(-(-count // devices) * devices), count - 1) for _ in indices]
  spread = PartitionSpec(mesh.axis_names)
  mapped = jax.shard_map(every, mesh=mesh, in_specs=(spread, PartitionSpec()), out_specs=spread, check_vma=False)
  blocks = mapped(tuple(index[place] for index, place in zip(indices, padded, strict=True)), inputs)
  return jax.tree.map(lambda b: b[:count], blocks)
