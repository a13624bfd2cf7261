"""Domains of labelled examples: several sources and a target, all of different examples."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["domain_parts"]


def domain_parts(
  key: jax.Array,
  place: Callable,
  *,
  examples: int,
  sources: Sequence[float],
  target: float,
  train: int,
  valid: int,
  test: int,
  target_valid: int = 0,
) -> dict[str, dict[str, jax.Array]]:
  """Draws which examples are in which domain, and moves each there.

  >>> place = lambda key, rows, domain: (rows + 100 * domain, rows)
  >>> sizes = dict(examples=9, sources=(1, 2), target=3, train=2, valid=1, test=3)
  >>> parts = domain_parts(jax.random.key(0), place, **sizes)
  >>> parts["train"]["x"].shape, parts["target"]["x"].shape
  ((2, 2), (3,))
  >>> sorted(row for part in parts.values() for row in part["y"].ravel().tolist())
  [0, 1, 2, 3, 4, 5, 6, 7, 8]

  Args:
    key: of the choice and of what `place` draws: traced, so that every run of a sweep has its own data.
    place: `(key, rows, domain) -> (inputs, labels)` of these examples in that domain, of all arrays.
    examples: how many there are.
    sources: the source domains, two numbers at least.
    target: the other domain, a number.
    train: training examples of each source domain.
    valid: validation examples of each source domain.
    test: test examples of the target.
    target_valid: validation examples of the target.

  Returns:
    `train` and `valid`, each `x` and `y` `[examples, sources, ...]`; `target` and `target_valid`, `[examples, ...]`.
  """
  count = len(sources)
  needed = count * (train + valid) + test + target_valid
  if needed > examples:
    raise ValueError(f"the domains need {needed} examples, but there are {examples}.")
  of_rows, key = jax.random.split(key)
  rows = jax.random.permutation(of_rows, examples)
  parts = jnp.split(rows, np.cumsum([count * train, count * valid, test, target_valid]))
  keys = jax.random.split(key, (3, count))

  def of_sources(rows, keys):  # mapped, for a loop over the sources compiles many times as long
    placed = jax.vmap(place, out_axes=1)(keys, rows.reshape(count, -1), jnp.asarray(sources))
    return dict(zip("xy", placed, strict=True))

  of_target = lambda rows, key: dict(zip("xy", place(key, rows, target), strict=True))
  return {
    "train": of_sources(parts[0], keys[0]),
    "valid": of_sources(parts[1], keys[1]),
    "target": of_target(parts[2], keys[2, 0]),
    "target_valid": of_target(parts[3], keys[2, 1]),
  }
