"""The structure of a pytree as JSON, so that a checkpoint gives back lists, NamedTuples and integer keys as saved."""

import collections
import sys
from typing import Any

import jax
import numpy as np

# Dtypes of typed keys, and the names of their implementations.
KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}

__all__ = ["KEYS", "array_of", "decode", "describe", "encode", "is_key", "like"]


def encode(tree) -> tuple[Any, list]:
  """A tree's structure as JSON values, and its leaves in JAX's order."""
  leaves = []
  return _encode(tree, leaves), leaves


def _encode(node, leaves: list):
  if jax.tree_util.all_leaves([node]) and node is not None:
    leaves.append(node)
    return len(leaves) - 1
  if node is None:
    return None
  entries = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]
  children = [_encode(child, leaves) for _, child in entries]
  if isinstance(node, tuple) and hasattr(node, "_fields"):
    return {"namedtuple": [type(node).__module__, type(node).__qualname__, list(node._fields)], "children": children}
  if type(node) in (list, tuple):
    return {type(node).__name__: children}
  keys = [_key(path[0]) for path, _ in entries]
  return {"dict" if type(node) is dict else "node": keys, "children": children}


def _key(entry):
  for name in ("key", "name", "idx"):
    if hasattr(entry, name):
      return getattr(entry, name) if isinstance(getattr(entry, name), (int, str)) else str(getattr(entry, name))
  return str(entry)


def decode(structure, leaves: list):
  """The tree again: NamedTuples of their own class where it is imported already, other nodes as dicts."""
  if structure is None:
    return None
  if isinstance(structure, int):
    return leaves[structure]
  inside = lambda children: [decode(child, leaves) for child in children]
  if "list" in structure:
    return inside(structure["list"])
  if "tuple" in structure:
    return tuple(inside(structure["tuple"]))
  children = inside(structure["children"])
  if "namedtuple" in structure:
    module, name, fields = structure["namedtuple"]
    known = getattr(sys.modules.get(module), name, None)  # nothing is imported because a file says so
    if getattr(known, "_fields", None) != tuple(fields):
      known = collections.namedtuple(name.rpartition(".")[2], fields)
    return known(*children)
  return dict(zip(structure.get("dict", structure.get("node")), children))


def is_key(leaf) -> bool:
  """Whether a leaf is an array of typed keys."""
  return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf) -> list:
  """Dtype and shape of a leaf."""
  dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
  return [str(dtype), list(np.shape(leaf))]


def array_of(leaf):
  """A leaf as an array without extended dtype, or its shape if it is abstract."""
  if not is_key(leaf):
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
  return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(jax.random.key_data, leaf)


def like(leaf, array):
  """The inverse of `array_of`: an array of typed keys where `leaf` is one."""
  return jax.random.wrap_key_data(array, impl=KEYS[str(leaf.dtype)]) if is_key(leaf) else array
