"""Label-noise generators: jittable functions of a key; rates may be traced, so that a sweep can vary them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.checks import check_hyperparameter

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
_LETTER_PAIRS = ("BD", "CG", "EF", "HN", "IL", "KX", "MW", "OQ", "PR", "UV")
LETTER_CONFUSIONS = {ord(a) - 65: ord(b) - 65 for pair in _LETTER_PAIRS for a, b in (pair, pair[::-1])}


def symmetric_noise(
  key: jax.Array,
  labels: jax.Array,
  *,
  rate: float | jax.Array,
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
    labels: integers `[examples]`.
    rate: in [0, 1]; may be traced.
    num_classes: static; number of classes K.
    include_true: static; whether the new label may be the true one.
    exact: static; whether exactly `round(rate * examples)` labels are drawn anew, not each with this probability.

  Returns:
    `[examples]` of the same dtype.

  Raises:
    ValueError: when labels are not integers or `rate` is outside [0, 1].
  """
  _check_labels(labels)
  check_hyperparameter("rate", rate, low=0, high=1)
  choose, draw = jax.random.split(key)
  uniform = jax.random.uniform(choose, labels.shape)
  if exact:
    rank = jnp.argsort(jnp.argsort(uniform.ravel())).reshape(labels.shape)
    chosen = rank < jnp.round(rate * labels.size)
  else:
    chosen = uniform < rate
  if include_true:
    new = jax.random.randint(draw, labels.shape, 0, num_classes, labels.dtype)
  else:
    new = (labels + jax.random.randint(draw, labels.shape, 1, num_classes, labels.dtype)) % num_classes
  return jnp.where(chosen, new, labels)


def pair_flip_noise(key: jax.Array, labels: jax.Array, *, rate: float | jax.Array, num_classes: int) -> jax.Array:
  """Moves each label to the next class, cyclically, with probability `rate`.

  >>> import jax, jax.numpy as jnp
  >>> pair_flip_noise(jax.random.key(0), jnp.array([0, 1, 2]), rate=1.0, num_classes=3).tolist()
  [1, 2, 0]

  Args:
    key: threefry key.
    labels: integers `[examples]`.
    rate: in [0, 1]; may be traced.
    num_classes: static; number of classes.

  Returns:
    `[examples]` of the same dtype.

  Raises:
    ValueError: when labels are not integers or `rate` is outside [0, 1].
  """
  return class_map_noise(key, labels, rate=rate, mapping=(np.arange(num_classes) + 1) % num_classes)


def class_map_noise(
  key: jax.Array, labels: jax.Array, *, rate: float | jax.Array, mapping: Mapping[int, int] | np.ndarray
) -> jax.Array:
  """Asymmetric noise: replaces a label by its confused class with probability `rate`.

  >>> import jax, jax.numpy as jnp
  >>> class_map_noise(jax.random.key(0), jnp.array([9, 8]), rate=1.0, mapping=CIFAR10_CONFUSIONS).tolist()
  [1, 8]

  Args:
    key: threefry key.
    labels: integers `[examples]`.
    rate: in [0, 1]; may be traced.
    mapping: static; class -> class, as a dict (others stay) or an array over all classes. `CIFAR10_CONFUSIONS`,
      `LETTER_CONFUSIONS` and `superclass_mapping` are the literature's.

  Returns:
    `[examples]` of the same dtype.

  Raises:
    ValueError: when labels are not integers or `rate` is outside [0, 1].
  """
  _check_labels(labels)
  check_hyperparameter("rate", rate, low=0, high=1)
  flips = jax.random.uniform(key, labels.shape) < rate
  if isinstance(mapping, Mapping):
    new = labels
    for source, target in mapping.items():
      new = jnp.where(labels == source, target, new)
  else:
    new = jnp.asarray(mapping, labels.dtype)[labels]
  return jnp.where(flips, new, labels)


def superclass_mapping(superclasses: np.ndarray) -> np.ndarray:
  """The confusion of each class with the next one of its superclass, cyclically (asymmetric noise of CIFAR-100).

  >>> superclass_mapping(np.array([0, 1, 0, 1, 0])).tolist()
  [2, 3, 4, 1, 0]

  Args:
    superclasses: integers `[classes]`, each class's superclass.

  Returns:
    Integers `[classes]`, for `class_map_noise`.
  """
  mapping = np.empty_like(superclasses)
  for superclass in np.unique(superclasses):
    members = np.flatnonzero(superclasses == superclass)
    mapping[members] = np.roll(members, -1)
  return mapping


def instance_dependent_noise(
  key: jax.Array,
  inputs: jax.Array,
  labels: jax.Array,
  *,
  rate: float | jax.Array,
  num_classes: int,
  spread: float = 0.1,
) -> jax.Array:
  """Noise whose rate and direction depend on the input, through a random linear map for each class.

  An example's rate `r` is normal around `rate` with deviation `spread`, truncated to [0, 1]; its label stays with
  probability `1 - r` and else moves to another class with probability proportional to the softmax of the inputs' random
  projection that belongs to its label.

  >>> import jax, jax.numpy as jnp
  >>> inputs, clean = jax.random.normal(jax.random.key(1), (5000, 8)), jnp.zeros(5000, jnp.int32)
  >>> noisy = instance_dependent_noise(jax.random.key(0), inputs, clean, rate=0.3, num_classes=5)
  >>> round(float((noisy != clean).mean()), 1)
  0.3

  Args:
    key: threefry key.
    inputs: floating `[examples, ...]`.
    labels: integers `[examples]`.
    rate: in [0, 1], the mean share of wrong labels (before truncation); may be traced.
    num_classes: static; number of classes.
    spread: standard deviation of the examples' rates.

  Returns:
    `[examples]` of the same dtype.

  Raises:
    ValueError: when labels are not integers or `rate` is outside [0, 1].

  Reference: Xia et al., "Part-dependent Label Noise: Towards Instance-dependent Label Noise", NeurIPS 2020, Algorithm 2
    (of which this is the projection variant that later code shares).
  """
  _check_labels(labels)
  check_hyperparameter("rate", rate, low=0, high=1)
  rates, directions, draw = jax.random.split(key, 3)
  flat = inputs.reshape(inputs.shape[0], -1)
  mean, spread = jnp.asarray(rate, flat.dtype), jnp.asarray(spread, flat.dtype)
  low, high = (0 - mean) / spread, (1 - mean) / spread
  own_rate = mean + spread * jax.random.truncated_normal(rates, low, high, labels.shape, flat.dtype)
  maps = jax.random.normal(directions, (num_classes, flat.shape[1], num_classes), flat.dtype)
  scores = jnp.einsum("nd,dkc->nkc", flat, maps.transpose(1, 0, 2))
  scores = jnp.take_along_axis(scores, labels[:, None, None], axis=1)[:, 0]
  own = jax.nn.one_hot(labels, num_classes, dtype=bool)
  others = jax.nn.log_softmax(jnp.where(own, -jnp.inf, scores)) + jnp.log(own_rate)[:, None]
  return jax.random.categorical(draw, jnp.where(own, jnp.log1p(-own_rate)[:, None], others)).astype(labels.dtype)


def _check_labels(labels) -> None:
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f"labels must be integer class indices, got dtype {jnp.result_type(labels)}.")
