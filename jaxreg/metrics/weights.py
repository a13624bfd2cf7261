"""How a network's weights are distributed: skewness and kurtosis, and weights near zero and far from it."""

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.norms import scaled

__all__ = [
  "WeightMoments",
  "WeightStats",
  "flax_kernel",
  "he_deviation",
  "input_axes",
  "is_kernel",
  "parameter_name",
  "weight_moments",
  "weight_stats",
]


class WeightMoments(NamedTuple):
  """Mean third and fourth powers of standardized weights, scalars."""

  skewness: jax.Array
  kurtosis: jax.Array


class WeightStats(NamedTuple):
  """Scalars over all kernels of a network, in units of He's standard deviation of each kernel.

  Attributes:
    largest: the largest absolute weight.
    near_zero: the share of weights nearer to zero than the threshold.
    kurtosis: the mean over the kernels of their kurtosis.
  """

  largest: jax.Array
  near_zero: jax.Array
  kurtosis: jax.Array


def weight_moments(weights: ArrayLike, *, ddof: int = 1) -> WeightMoments:
  """Skewness `mean z^3` and kurtosis `mean z^4` of all entries, standardized by their mean and deviation.

  A normal law has kurtosis 3, a uniform one 1.8, two points 1. Equal weights have moments and gradients 0.

  >>> import jax.numpy as jnp
  >>> moments = weight_moments(jnp.array([-1.0, 1.0, -1.0, 1.0]), ddof=0)
  >>> float(moments.skewness), float(moments.kurtosis)
  (0.0, 1.0)

  Args:
    weights: floating, of any shape.
    ddof: what the deviation's divisor is less than the number of entries; 1 is the unbiased variance. Static.

  Returns:
    Two scalars, float32 at least.

  Raises:
    ValueError: when the weights are not floating point, or are not more than `ddof`.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, the moments in
    equation 6; the unbiased deviation as in the official code.
  """
  check_float("weights", weights)
  if jnp.size(weights) <= ddof:
    raise ValueError(f"weights must be more than ddof {ddof} entries, got {jnp.size(weights)}.")
  centred, _ = scaled(weights)  # fourth powers must stay in range
  centred = centred - jnp.mean(centred)
  variance = jnp.sum(centred**2) / (centred.size - ddof)
  # Equal weights differ from their mean by rounding.
  equal = variance <= (4 * jnp.finfo(centred.dtype).eps) ** 2
  standard = jnp.where(equal, 0, centred) * jax.lax.rsqrt(jnp.where(equal, 1, variance))
  return WeightMoments(jnp.mean(standard**3), jnp.mean(standard**4))


def weight_stats(
  params, *, threshold: ArrayLike = 0.1, in_axes: Callable[[str, jax.Array], tuple[int, ...]] | None = None
) -> WeightStats:
  """The largest weight, the share of weights near zero and the kurtosis of a network's kernels.

  Kernels are the arrays of at least two axes; a weight counts in units of `sqrt(2 / fan_in)` of its kernel.

  >>> import jax.numpy as jnp
  >>> stats = weight_stats({"kernel": jnp.array([[0.0, 0.05], [2.0, -4.0]]), "bias": jnp.ones(2)})
  >>> float(stats.largest), float(stats.near_zero)
  (4.0, 0.5)

  Args:
    params: pytree of arrays with at least one kernel of more than one entry.
    threshold: non-negative, below which a weight is near zero; may be traced.
    in_axes: static; `(path, kernel) -> axes` that the layer sums over; by default `input_axes`.

  Returns:
    Three scalars, float32 at least.

  Raises:
    ValueError: when there is no kernel, one is not floating point, or `threshold` is negative.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023; the measures are ours.
  """
  check_hyperparameter("threshold", threshold, low=0)
  named = [(parameter_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
  kernels = [leaf for _, leaf in named if jnp.ndim(leaf) > 1]
  fans = [(in_axes or input_axes)(path, leaf) for path, leaf in named if jnp.ndim(leaf) > 1]
  if not kernels:
    raise ValueError("params must have a kernel, an array of at least two axes, got none.")
  kurtosis = [weight_moments(kernel).kurtosis for kernel in kernels]
  units = [
    jnp.abs(jnp.asarray(kernel, value.dtype)) / he_deviation(jnp.shape(kernel), in_axes=axes)
    for kernel, value, axes in zip(kernels, kurtosis, fans)
  ]
  # NaN is neither near nor far.
  near = [jnp.sum(jnp.where(jnp.isnan(unit - threshold), jnp.nan, unit < threshold)) for unit in units]
  return WeightStats(
    reduce(jnp.maximum, [jnp.max(unit) for unit in units]),
    reduce(operator.add, near) / sum(unit.size for unit in units),
    reduce(operator.add, kurtosis) / len(kurtosis),
  )


def he_deviation(shape: tuple[int, ...], *, in_axes: tuple[int, ...] | None = None) -> float:
  """The standard deviation `sqrt(2 / fan_in)` of He's initializer, the natural scale of a kernel's weights.

  >>> he_deviation((3, 3, 2, 16))
  0.3333333333333333
  >>> he_deviation((512, 8, 64), in_axes=(0,))  # the queries of attention: 512 inputs
  0.0625

  Args:
    shape: of the kernel.
    in_axes: the axes that a layer sums over; by default all but the last. `input_axes` finds those of Flax's layers.

  Returns:
    A Python number.

  Raises:
    ValueError: when `in_axes` are not different axes of the shape.

  Reference: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet
    Classification", ICCV 2015, equation 10.
  """
  chosen = range(len(shape) - 1) if in_axes is None else in_axes
  wrapped = {axis + len(shape) if axis < 0 else axis for axis in chosen}
  if len(wrapped) != len(chosen) or not wrapped <= set(range(len(shape))):
    raise ValueError(f"in_axes must be different axes of a kernel of shape {shape}, got {in_axes}.")
  return math.sqrt(2 / max(1, math.prod(shape[axis] for axis in wrapped)))


def input_axes(path: str, leaf) -> tuple[int, ...]:
  """The axes that a layer of Flax sums over, by the name and the shape of its kernel.

  They are all but the last; of the queries, keys and values of attention, `[features, heads, size]`, the first; of
  arrays named `weight`, which Equinox and PyTorch keep as `[outputs, inputs, ...]`, all but the first. For other
  layouts (kernels stacked by `nn.scan`, `[layers, ...]`) write a function like this one.

  >>> import numpy as np
  >>> input_axes("attention/query/kernel", np.ones((512, 8, 64))), input_axes("Conv_0/kernel", np.ones((3, 3, 8, 16)))
  ((0,), (0, 1, 2))
  >>> input_axes("layers/0/weight", np.ones((16, 8, 3, 3)))
  (1, 2, 3)

  Args:
    path: names from the root of the parameters, separated by `/`.
    leaf: the kernel.

  Returns:
    Axes.

  Reference: none.
  """
  *_, layer, name = ("", *path.split("/"))
  if name == "weight":
    return tuple(range(1, np.ndim(leaf)))
  projection = np.ndim(leaf) == 3 and layer in ("query", "key", "value")
  return (0,) if projection else tuple(range(np.ndim(leaf) - 1))


def flax_kernel(path: str, leaf) -> jax.Array:
  """A kernel in Flax's layout, `[..., inputs, outputs]`; arrays named `weight` are taken for `[outputs, inputs, ...]`.

  >>> import numpy as np
  >>> flax_kernel("layers/0/weight", np.ones((16, 8, 3, 3))).shape
  (3, 3, 8, 16)

  Args:
    path: names from the root of the parameters, separated by `/`.
    leaf: the kernel, with at least two axes.

  Returns:
    The kernel, transposed where needed.

  Reference: none.
  """
  return jnp.moveaxis(leaf, (1, 0), (-2, -1)) if path.rsplit("/", 1)[-1] == "weight" else jnp.asarray(leaf)


def is_kernel(path: str, leaf) -> bool:
  """Whether a parameter is the kernel of a dense or convolutional layer, by its name in Flax, Equinox or PyTorch.

  Kernels are called `kernel`, or `weight` with at least two axes (normalization layers have a `weight` with one).

  >>> import numpy as np
  >>> is_kernel("Dense_0/kernel", None), is_kernel("Dense_0/bias", None), is_kernel("norm/weight", np.ones(3))
  (True, False, False)

  Args:
    path: names from the root of the parameters, separated by `/`.
    leaf: the parameter, or None where only names are known.

  Returns:
    True or False.

  Reference: none.
  """
  name = path.rsplit("/", 1)[-1]
  return name == "kernel" or (name == "weight" and (leaf is None or np.ndim(leaf) > 1))


def parameter_name(path) -> str:
  """Names from the root of a pytree, separated by `/`; an NNX variable's own `value` is left out.

  >>> import jax
  >>> [parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({"Dense_0": {"kernel": 1.0}})]
  ['Dense_0/kernel']

  Args:
    path: the keys that `jax.tree_util` gives with a leaf.

  Returns:
    The name.

  Reference: none.
  """
  if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")
