"""Removal of the zero neurons or filters of group-sparse networks: smaller kernels, the same outputs."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

__all__ = ["compact", "compact_pair"]


def compact_pair(first: Mapping, second: Mapping) -> tuple[dict, dict]:
  """Removes the outputs of a layer that are zero, and the inputs of the next layer that they fed.

  An output goes when its kernel entries and its bias are all zero; it then contributes nothing as long as whatever lies
  between the layers maps zero to zero (ReLU, pooling). Dense after dense, convolution (HWIO) after convolution, and
  dense after a flattened convolution (whose channels vary fastest) all work. Shapes depend on the values: not under
  `jit`.

  >>> import jax.numpy as jnp
  >>> first = {"kernel": jnp.array([[1.0, 0.0, 2.0]]), "bias": jnp.zeros(3)}
  >>> first, second = compact_pair(first, {"kernel": jnp.ones((3, 5))})
  >>> first["kernel"].tolist(), first["bias"].shape, second["kernel"].shape
  ([[1.0, 2.0]], (2,), (2, 5))

  Args:
    first: layer with a `kernel` whose last axis are its outputs; other entries (`bias`) are `[outputs]`.
    second: the layer it feeds, whose kernel has the inputs on the last axis but one.

  Returns:
    `(first, second)` without the zero outputs.

  Raises:
    ValueError: when the second kernel's inputs are not a multiple of the first one's outputs, or an entry of `first`
      has another length.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49).
  """
  kernel, following = np.asarray(first["kernel"]), np.asarray(second["kernel"])
  outputs, inputs = kernel.shape[-1], following.shape[-2]
  if outputs == 0 or inputs % outputs:
    raise ValueError(
      f"second must have inputs in a multiple of first's outputs, got kernels {kernel.shape} and {following.shape}."
    )
  for name, entry in first.items():
    if name != "kernel" and np.shape(entry) != (outputs,):
      raise ValueError(f"first[{name!r}] must have one entry per output, expected {(outputs,)}, got {np.shape(entry)}.")
  alive = np.zeros(outputs, bool)
  for entry in first.values():
    alive |= (np.asarray(entry) != 0).reshape(-1, outputs).any(axis=0)
  kept = {name: jnp.asarray(np.asarray(entry)[..., alive]) for name, entry in first.items()}
  rows = np.tile(alive, inputs // outputs)
  return kept, {**second, "kernel": jnp.asarray(following[..., rows, :])}


def compact(params: Mapping, *, order: Sequence[str]) -> dict:
  """Removes the zero neurons or filters of a chain of layers; outputs do not change.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.array([[1.0, 0.0, 2.0]])
  >>> params = {"Dense_0": {"kernel": kernel}, "Dense_1": {"kernel": jnp.ones((3, 5))}}
  >>> compact(params, order=("Dense_0", "Dense_1"))["Dense_1"]["kernel"].shape
  (2, 5)

  Args:
    params: dictionary of layers; those not in `order` are kept as they are.
    order: names of layers that feed one another, first to last, as `compact_pair` requires of each two neighbours.

  Returns:
    The smaller parameters; their kernels' shapes are the widths for the smaller model.

  Raises:
    ValueError: as `compact_pair`, or when `order` names a layer that `params` does not hold.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49).
  """
  missing = [name for name in order if name not in params]
  if missing:
    raise ValueError(f"order must name layers of params, which has {sorted(params)}, got {missing}.")
  smaller = dict(params)
  for first, second in zip(order, order[1:]):
    smaller[first], smaller[second] = compact_pair(smaller[first], smaller[second])
  return smaller
