"""Removal of the zero neurons or filters of group-sparse networks: smaller kernels, the same outputs."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

__all__ = ["compact", "compact_pair", "compact_variables"]


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
  return _without_dead(first, second, _alive(first))


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
    ValueError: as `compact_pair`, or when `order` names a layer that `params` does not hold or one without a kernel
      (with normalization between the layers: `compact_variables`).

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49).
  """
  without = [name for name in order if name in params and "kernel" not in params[name]]
  if without:
    raise ValueError(f"order must name layers with a kernel (see compact_variables for normalization), got {without}.")
  return compact_variables({"params": params}, order=order)["params"]


def compact_variables(variables: Mapping, *, order: Sequence[str], epsilon: float = 1e-5) -> dict:
  """`compact` of a network with batch normalization between its layers, as it is used for inference.

  An output goes when what batch normalization makes of it is zero: its scale and bias are zero, or its kernel entries,
  its bias and `bias - scale mean / sqrt(var + epsilon)` are. So group a kernel with its normalization's scale and bias
  when pruning; an output whose kernel alone is zero becomes a constant, which is kept.

  >>> import jax.numpy as jnp
  >>> params = {"Dense_0": {"kernel": jnp.ones((1, 3))}, "Dense_1": {"kernel": jnp.ones((3, 5))}}
  >>> params["BatchNorm_0"] = {"scale": jnp.array([1.0, 0.0, 1.0]), "bias": jnp.zeros(3)}
  >>> variables = {"params": params, "batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}
  >>> smaller = compact_variables(variables, order=("Dense_0", "BatchNorm_0", "Dense_1"))
  >>> smaller["params"]["Dense_1"]["kernel"].shape, smaller["batch_stats"]["BatchNorm_0"]["mean"].shape
  ((2, 5), (2,))

  Args:
    variables: collections of Flax: `params`, and `batch_stats` where layers are normalized.
    order: names of layers that feed one another, first to last; one without a kernel is the normalization of the layer
      before it, which must have one.
    epsilon: the normalization's.

  Returns:
    The smaller variables.

  Raises:
    ValueError: as `compact_pair`, or when `order` names a layer that is not there, ends or begins with a normalization,
      or has two in a row.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49).
  """
  params, stats = dict(variables["params"]), dict(variables.get("batch_stats", {}))
  missing = [name for name in order if name not in params and name not in stats]
  if missing:
    raise ValueError(f"order must name layers of params, which has {sorted(params)}, got {missing}.")
  layers = [index for index, name in enumerate(order) if "kernel" in params.get(name, {})]
  gaps = [after - before for before, after in zip(layers, layers[1:])]
  if order and (not layers or layers[0] != 0 or layers[-1] != len(order) - 1 or any(gap > 2 for gap in gaps)):
    raise ValueError(f"order must be layers with a kernel, with at most one normalization between two, got {order}.")
  for before, after in zip(layers, layers[1:]):
    first, second = order[before], order[after]
    alive = _alive(params[first])
    norm = order[before + 1] if after - before == 2 else None
    if norm is not None and norm not in stats:
      raise ValueError(f"variables must have batch_stats of {norm!r}, which order names, got those of {sorted(stats)}.")
    if norm is not None:
      alive = _normalized_alive(alive, params.get(norm, {}), stats[norm], epsilon)
      keep = lambda entries, alive=alive: {name: jnp.asarray(np.asarray(x)[alive]) for name, x in entries.items()}
      stats[norm] = keep(stats[norm])
      params |= {norm: keep(params[norm])} if norm in params else {}
    params[first], params[second] = _without_dead(params[first], params[second], alive)
  return {**variables, "params": params, **({"batch_stats": stats} if stats else {})}


def _alive(layer):
  """Which outputs of a layer have an entry that is not zero."""
  kernel = np.asarray(layer["kernel"])
  outputs = kernel.shape[-1]
  for name, entry in layer.items():
    if name != "kernel" and np.shape(entry) != (outputs,):
      raise ValueError(f"first[{name!r}] must have one entry per output, expected {(outputs,)}, got {np.shape(entry)}.")
  return np.any([(np.asarray(entry) != 0).reshape(-1, outputs).any(axis=0) for entry in layer.values()], axis=0)


def _normalized_alive(alive, norm, stats, epsilon):
  """Which outputs are not zero after batch normalization."""
  mean, variance = np.asarray(stats["mean"]), np.asarray(stats["var"])
  scale, bias = np.asarray(norm.get("scale", np.ones_like(mean))), np.asarray(norm.get("bias", np.zeros_like(mean)))
  constant = bias - scale * mean / np.sqrt(variance + epsilon)  # what an output that is zero becomes
  return np.where(alive, (scale != 0) | (bias != 0), constant != 0)


def _without_dead(first, second, alive):
  """The two layers without the outputs that are not alive."""
  following = np.asarray(second["kernel"])
  outputs, inputs = alive.size, following.shape[-2]
  if outputs == 0 or inputs % outputs:
    shapes = f"{np.shape(first['kernel'])} and {following.shape}"
    raise ValueError(f"second must have inputs in a multiple of first's outputs, got kernels {shapes}.")
  kept = {name: jnp.asarray(np.asarray(entry)[..., alive]) for name, entry in first.items()}
  rows = np.tile(alive, inputs // outputs)
  return kept, {**second, "kernel": jnp.asarray(following[..., rows, :])}
