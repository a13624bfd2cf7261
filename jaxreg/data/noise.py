"""Label-noise generators: jittable functions of a key; rates may be traced, so that a sweep can vary them.

Labels that are no class, as -1 or 255 for "ignore", are refused where they are NumPy arrays or lists. JAX arrays are
not read, for that would wait for the device: there such labels stay as they are.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = [
  "CIFAR10_CONFUSIONS",
  "LETTER_CONFUSIONS",
  "class_map_noise",
  "instance_dependent_noise",
  "pair_flip_noise",
  "superclass_mapping",
  "symmetric_noise",
]

# truck -> car, bird -> plane, deer -> horse, cat <-> dog
CIFAR10_CONFUSIONS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
_MAPS_TOGETHER = 2**22  # numbers
_LETTER_PAIRS = ("BD", "CG", "EF", "HN", "IL", "KX", "MW", "OQ", "PR", "UV")
LETTER_CONFUSIONS = {ord(a) - 65: ord(b) - 65 for pair in _LETTER_PAIRS for a, b in (pair, pair[::-1])}


def symmetric_noise(
  key: jax.Array,
  labels: ArrayLike,
  *,
  rate: ArrayLike,
  num_classes: int,
  include_true: bool = True,
  exact: bool = False,
) -> jax.Array:
  """Replaces labels by uniformly random ones.

  Conventions differ by several points of accuracy: with `include_true` the new label is drawn from all classes, so that
  a share `rate * (K - 1) / K` ends up wrong; without, from the other classes, and a share `rate` ends up wrong.

  >>> import jax, jax.numpy as jnp
  >>> clean = jnp.zeros(10_000, jnp.int32)
  >>> noisy = symmetric_noise(jax.random.key(0), clean, rate=0.5, num_classes=10)
  >>> abs(float((noisy != clean).mean()) - 0.45) < 0.02
  True

  Args:
    key: threefry key.
    labels: integers `[examples]` in [0, K); others in a JAX array stay as they are.
    rate: in [0, 1]; may be traced.
    num_classes: static; number of classes K.
    include_true: static; whether the new label may be the true one.
    exact: static; whether exactly `round(rate * examples)` labels are drawn anew, not each with this probability.

  Returns:
    `[examples]` of the same dtype, or int32 where that dtype cannot hold every class.

  Raises:
    ValueError: when labels are not integers, those in a NumPy array or list are outside [0, K), `rate` is outside
      [0, 1], or there are fewer classes than 1, or 2 without the true one.
  """
  check_hyperparameter("rate", rate, low=0, high=1)
  check_hyperparameter("num_classes", num_classes, low=1 if include_true else 2)
  labels, dtype = _wide(labels, num_classes, num_classes - 1)
  is_class = (labels >= 0) & (labels < num_classes)
  choose, draw = jax.random.split(key)
  uniform = jax.random.uniform(choose, labels.shape)
  if exact:
    rank = jnp.argsort(jnp.argsort(jnp.where(is_class, uniform, 2).ravel())).reshape(labels.shape)
    chosen = rank < jnp.round(rate * jnp.sum(is_class))
  else:
    chosen = uniform < rate
  if include_true:
    new = jax.random.randint(draw, labels.shape, 0, num_classes, labels.dtype)
  else:
    new = (labels + jax.random.randint(draw, labels.shape, 1, num_classes, labels.dtype)) % num_classes
  return jnp.where(chosen & is_class, new, labels).astype(dtype)


def pair_flip_noise(key: jax.Array, labels: ArrayLike, *, rate: ArrayLike, num_classes: int) -> jax.Array:
  """Moves each label to the next class, cyclically, with probability `rate`.

  >>> import jax, jax.numpy as jnp
  >>> pair_flip_noise(jax.random.key(0), jnp.array([0, 1, 2]), rate=1.0, num_classes=3).tolist()
  [1, 2, 0]

  Args:
    key, labels, rate, num_classes: as in `symmetric_noise`.

  Returns:
    As `symmetric_noise`.

  Raises:
    ValueError: when labels are not integers, those in a NumPy array or list are outside [0, K), `rate` is outside
      [0, 1], or there is no class.
  """
  check_hyperparameter("num_classes", num_classes, low=1)
  return class_map_noise(key, labels, rate=rate, mapping=(np.arange(num_classes) + 1) % num_classes)


def class_map_noise(
  key: jax.Array, labels: ArrayLike, *, rate: ArrayLike, mapping: Mapping[int, int] | Sequence[int] | ArrayLike
) -> jax.Array:
  """Asymmetric noise: replaces a label by its confused class with probability `rate`.

  >>> import jax, jax.numpy as jnp
  >>> class_map_noise(jax.random.key(0), jnp.array([9, 8]), rate=1.0, mapping=CIFAR10_CONFUSIONS).tolist()
  [1, 8]

  Args:
    key: threefry key.
    labels: integers `[examples]`; with an array as mapping in [0, K), where others in a JAX array stay as they are.
    rate: in [0, 1]; may be traced.
    mapping: static; class -> class, as a dict (others stay) or as `[K]` over all classes. `CIFAR10_CONFUSIONS`,
      `LETTER_CONFUSIONS` and `superclass_mapping` are the literature's.

  Returns:
    `[examples]` of the same dtype, or int32 where that dtype cannot hold every class of the mapping.

  Raises:
    ValueError: when labels or mapping are not integers, the mapping is shorter than the labels in a NumPy array or list
      need or leads out of its K classes, labels there are negative, or `rate` is outside [0, 1].
  """
  check_hyperparameter("rate", rate, low=0, high=1)
  if isinstance(mapping, Mapping):
    targets = _host_labels("mapping", [*mapping, *mapping.values()] or [0])
    labels, dtype = _wide(labels, None, int(targets.max()))
    new = labels
    for source, target in mapping.items():
      new = jnp.where(labels == int(source), int(target), new)
  else:
    targets = _host_labels("mapping", mapping)
    if targets.ndim != 1 or not targets.size or targets.min() < 0 or targets.max() >= targets.size:
      raise ValueError(f"mapping must be [K] classes in [0, K), got shape {targets.shape} and {_ends(targets)}.")
    labels, dtype = _wide(labels, targets.size, targets.size - 1)
    is_class = (labels >= 0) & (labels < targets.size)
    new = jnp.where(is_class, jnp.asarray(targets, labels.dtype)[jnp.where(is_class, labels, 0)], labels)
  flips = jax.random.uniform(key, labels.shape) < rate
  return jnp.where(flips, new, labels).astype(dtype)


def superclass_mapping(superclasses: Sequence[int] | ArrayLike) -> np.ndarray:
  """The confusion of each class with the next one of its superclass, cyclically (asymmetric noise of CIFAR-100).

  >>> superclass_mapping(np.array([0, 1, 0, 1, 0])).tolist()
  [2, 3, 4, 1, 0]

  Args:
    superclasses: integers `[classes]`, each class's superclass.

  Returns:
    Integers `[classes]`, for `class_map_noise`.

  Raises:
    ValueError: when the superclasses are not integers or not one for each class.
  """
  superclasses = _host_labels("superclasses", superclasses)
  if superclasses.ndim != 1:
    raise ValueError(f"superclasses must be one for each class, got shape {superclasses.shape}.")
  mapping = np.empty(superclasses.shape, np.int64)
  for superclass in np.unique(superclasses):
    members = np.flatnonzero(superclasses == superclass)
    mapping[members] = np.roll(members, -1)
  return mapping


def instance_dependent_noise(
  key: jax.Array,
  inputs: ArrayLike,
  labels: ArrayLike,
  *,
  rate: ArrayLike,
  num_classes: int,
  spread: float = 0.1,
) -> jax.Array:
  """Noise whose rate and direction depend on the input, through a random linear map for each class.

  An example's rate `r` is normal around `rate` with deviation `spread`, truncated to [0, 1]; its label stays with
  probability `1 - r` and else moves to another class with probability proportional to the softmax of the inputs' random
  projection that belongs to its label. The truncation moves the mean rate where `rate` is within two deviations of an
  end: with a spread of 0.1 to 0.206 at 0.2, to 0.129 at 0.1 and to 0.084 at 0.01. At 0 no label changes.

  >>> import jax, jax.numpy as jnp
  >>> inputs, clean = jax.random.normal(jax.random.key(1), (5000, 8)), jnp.zeros(5000, jnp.int32)
  >>> noisy = instance_dependent_noise(jax.random.key(0), inputs, clean, rate=0.3, num_classes=5)
  >>> round(float((noisy != clean).mean()), 1)
  0.3

  Args:
    key: threefry key.
    inputs: floating `[examples, ...]`.
    labels: integers `[examples]` in [0, K); others in a JAX array stay as they are.
    rate: in [0, 1], the mean fraction of wrong labels (before truncation); may be traced.
    num_classes: static; number of classes K, at least 2.
    spread: non-negative standard deviation of the examples' rates; may be traced.

  Returns:
    As `symmetric_noise`.

  Raises:
    ValueError: when inputs are not floating, labels are not integers or not one for each input, those in a NumPy array
      or list are outside [0, K), or a hyperparameter is out of range.

  Reference: Xia et al., "Part-dependent Label Noise: Towards Instance-dependent Label Noise", NeurIPS 2020, Algorithm 2
    (of which this is the projection variant that later code shares).
  """
  check_float("inputs", inputs)
  check_hyperparameter("rate", rate, low=0, high=1)
  check_hyperparameter("spread", spread, low=0)
  check_hyperparameter("num_classes", num_classes, low=2)
  labels, dtype = _wide(labels, num_classes, num_classes - 1)
  if jnp.ndim(inputs) < 1 or labels.shape != jnp.shape(inputs)[:1]:
    raise ValueError(f"labels must be one for each of inputs {jnp.shape(inputs)}, got shape {labels.shape}.")
  is_class = (labels >= 0) & (labels < num_classes)
  safe = jnp.where(is_class, labels, 0)
  rates, directions, draw = jax.random.split(key, 3)
  flat = jnp.reshape(inputs, (labels.size, math.prod(jnp.shape(inputs)[1:])))
  flat = flat.astype(jnp.promote_types(flat.dtype, jnp.float32))
  own_rate = _own_rates(rates, jnp.asarray(rate, flat.dtype), jnp.asarray(spread, flat.dtype), labels.shape)
  own_map = lambda key: jax.random.normal(key, (flat.shape[1], num_classes), flat.dtype)
  maps = jax.lax.map(own_map, jax.random.split(directions, num_classes))

  def draw_label(example):
    features, label, rate, key = example
    own = jnp.arange(num_classes) == label
    scores = jnp.matmul(features, maps[label], precision="highest")
    others = jax.nn.log_softmax(jnp.where(own, -jnp.inf, scores)) + jnp.log(rate)
    return jax.random.categorical(key, jnp.where(own, jnp.log1p(-rate), others))

  # A few examples at a time: the maps of all of them would fill the memory.
  together = max(1, min(_MAPS_TOGETHER // max(1, maps[0].size), labels.size))
  new = jax.lax.map(draw_label, (flat, safe, own_rate, jax.random.split(draw, labels.size)), batch_size=together)
  return jnp.where(is_class, new.astype(labels.dtype), labels).astype(dtype)


def _own_rates(key, mean, spread, shape):
  """Each example's rate; without spread, and where there is to be no noise, all are the mean."""
  varied = (spread > 0) & (mean > 0)
  deviation = jnp.where(varied, spread, 1)
  low, high = (0 - mean) / deviation, (1 - mean) / deviation
  drawn = mean + deviation * jax.random.truncated_normal(key, low, high, shape, mean.dtype)
  return jnp.where(varied, jnp.clip(drawn, 0, 1), mean)


def _wide(labels, num_classes: int | None, largest: int):
  """Labels in a dtype in which sums of two classes do not overflow, and the dtype of the result."""
  if not isinstance(labels, jax.Array):
    labels = _host_labels("labels", labels)
    if num_classes is not None and labels.size and (labels.min() < 0 or labels.max() >= num_classes):
      raise ValueError(f"labels must lie in [0, {num_classes}), got {_ends(labels)}.")
  labels = jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integer class indices, got dtype {labels.dtype}.")
  wide = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
  return wide, labels.dtype if largest <= jnp.iinfo(labels.dtype).max else wide.dtype


def _host_labels(name: str, values) -> np.ndarray:
  try:
    array = np.asarray(values)
  except ValueError as error:
    raise ValueError(f"{name} must be integer class indices, got rows of different lengths.") from error
  if array.dtype.kind not in "iu":
    raise ValueError(f"{name} must be integer class indices, got dtype {array.dtype}.")
  return array


def _ends(values: np.ndarray) -> str:
  return f"values from {values.min()} to {values.max()}" if values.size else "no values"
