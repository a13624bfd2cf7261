"""Nested dropout: of K ordered channels only the first k are kept, so that early channels learn what matters most."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter

__all__ = ["NestedDropout", "keep_leading_channels", "nested_cutoff_probabilities", "sample_cutoff"]

Convention = Literal["code", "paper"]


def nested_cutoff_probabilities(
  num_channels: int, *, sigma: ArrayLike, mu: ArrayLike = 0.0, convention: Convention = "code"
) -> jax.Array:
  """The distribution of the number of channels kept: a Gaussian on 1, …, K, cut off and normalised.

  `p_k ∝ exp(-((k - mu) / sigma)^2)` in the convention of the official code, `exp(-(k - mu)^2 / (2 sigma^2))` in the
  paper's: the same with a sigma smaller by the square root of two. A channel `j` is kept with probability
  `p_j + … + p_K`.

  >>> print(nested_cutoff_probabilities(3, sigma=1.0).round(3))
  [0.952 0.047 0.   ]

  Args:
    num_channels: static; K.
    sigma: positive, in channels; a scalar that may be traced. Small ones keep one channel (the one next to `mu`), large
      ones make all numbers equally likely.
    mu: a scalar, may be traced.
    convention: static; `code` or `paper`.

  Returns:
    `[num_channels]`, float32 or wider; index `k - 1` has the probability of keeping `k` channels.

  Raises:
    ValueError: when `num_channels` is below 1, `sigma` not positive, or the convention unknown.

  Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels", IEEE TNNLS 2022; nested
    dropout: Rippel, Gelbart, Adams, "Learning Ordered Representations with Nested Dropout", ICML 2014.
  """
  if num_channels < 1:
    raise ValueError(f"num_channels must be at least 1, got {num_channels}.")
  if convention not in ("code", "paper"):
    raise ValueError(f"convention must be code or paper, got {convention!r}.")
  check_hyperparameter("sigma", sigma, low=0, open_low=True, shape=())
  check_hyperparameter("mu", mu, shape=())
  dtype = jnp.promote_types(jnp.result_type(sigma, mu, float), jnp.float32)
  kept = jnp.arange(1, num_channels + 1, dtype=dtype)
  squared = jnp.square(kept - mu)
  # Relative to the number next to mu, so that the smallest sigma keeps that one.
  exponent = -(squared - jnp.min(squared)) / sigma / sigma
  return jax.nn.softmax(exponent / 2 if convention == "paper" else exponent)


def sample_cutoff(key: jax.Array, probabilities: ArrayLike) -> jax.Array:
  """Draws a number of channels to keep.

  >>> import jax, jax.numpy as jnp
  >>> sample_cutoff(jax.random.key(0), jnp.array([0.0, 0.0, 1.0])).item()
  3

  Args:
    key: threefry key.
    probabilities: `[channels]`, as `nested_cutoff_probabilities` returns them; need not be normalised.

  Returns:
    An integer scalar in [1, channels].

  Raises:
    ValueError: unless there is one axis of probabilities.

  Reference: Chen et al., IEEE TNNLS 2022.
  """
  probabilities = as_array("probabilities", probabilities)
  check_float("probabilities", probabilities)
  if probabilities.ndim != 1:
    raise ValueError(f"probabilities must be [channels], got shape {probabilities.shape}.")
  return jax.random.categorical(key, jnp.log(probabilities)) + 1


def keep_leading_channels(features: ArrayLike, count: ArrayLike, *, axis: int = -1) -> jax.Array:
  """The first `count` channels, and zeros for the others, which get no gradient; what is kept is not rescaled.

  >>> import jax.numpy as jnp
  >>> keep_leading_channels(jnp.array([[1.0, 2.0, 3.0]]), 2).tolist()
  [[1.0, 2.0, 0.0]]

  Args:
    features: floating, channels on `axis`.
    count: an integer scalar, how many to keep; may be traced.
    axis: static; the axis of the channels.

  Returns:
    Like the features.

  Raises:
    ValueError: when features are not floating point or have no such axis, or `count` is not an integer scalar.

  Reference: Rippel, Gelbart, Adams, ICML 2014.
  """
  features, count = as_array("features", features), as_array("count", count)
  check_float("features", features)
  if not -features.ndim <= axis < features.ndim:
    raise ValueError(f"axis must be an axis of features with shape {features.shape}, got {axis}.")
  if count.ndim or not jnp.issubdtype(count.dtype, jnp.integer):
    raise ValueError(f"count must be an integer scalar, got shape {count.shape} and dtype {count.dtype}.")
  channels = features.shape[axis]
  kept = jnp.arange(channels).reshape(-1, *[1] * (features.ndim - 1 - axis % features.ndim)) < count
  return jnp.where(kept, features, 0)


class NestedDropout(nn.Module):
  """Keeps the first k channels, with one k drawn for the whole batch at every step in training.

  Follow it by a linear classifier without bias, and choose the number kept at test time on validation data
  (`metrics.accuracy_per_cutoff`, `metrics.best_cutoff`). Under `pmap` or `shard_map` devices draw the same k when they
  are given the same key.

  >>> import jax, jax.numpy as jnp
  >>> layer, features = NestedDropout(sigma=2.0), jnp.ones((2, 4))
  >>> layer.apply({}, features, count=3).tolist()[0]
  [1.0, 1.0, 1.0, 0.0]
  >>> layer.apply({}, features, rngs={"dropout": jax.random.key(0)}).shape
  (2, 4)

  Attributes:
    sigma: positive, see `nested_cutoff_probabilities`; may be traced.
    mu: see there.
    convention: static; see there.
    axis: static; the axis of the channels.
    deterministic: whether all channels are kept where no count is given; may be given in the call.
    rng_collection: the collection of keys.

  Reference: Chen et al., IEEE TNNLS 2022.
  """

  sigma: ArrayLike
  mu: ArrayLike = 0.0
  convention: Convention = "code"
  axis: int = -1
  deterministic: bool | None = None
  rng_collection: str = "dropout"

  @nn.compact
  def __call__(
    self, features: ArrayLike, *, count: ArrayLike | None = None, deterministic: bool | None = None
  ) -> jax.Array:
    """The features with the last channels zero.

    Args:
      features: floating, channels on `axis`.
      count: how many channels to keep, an integer scalar; drawn in training if not given.
      deterministic: whether all channels are kept where no count is given; default False.

    Returns:
      Like the features.
    """
    features = as_array("features", features)
    if count is None:
      if self.deterministic if deterministic is None else deterministic:
        return features
      probabilities = nested_cutoff_probabilities(
        features.shape[self.axis], sigma=self.sigma, mu=self.mu, convention=self.convention
      )
      count = sample_cutoff(self.make_rng(self.rng_collection), probabilities)
    return keep_leading_channels(features, count, axis=self.axis)
