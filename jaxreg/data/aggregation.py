"""Bags of examples whose responses are known on average only, and their private release."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter

__all__ = ["aggregate", "gaussian_private_bag_means", "laplace_private_bag_means"]


def aggregate(key: jax.Array, inputs: ArrayLike, responses: ArrayLike, *, bag_size: int) -> tuple[jax.Array, jax.Array]:
  """Splits examples at random into bags of equal size; what does not fill a bag is left out.

  >>> import jax, jax.numpy as jnp
  >>> bags, means = aggregate(jax.random.key(0), jnp.arange(10.0)[:, None], jnp.arange(10.0), bag_size=3)
  >>> bags.shape, bool(jnp.allclose(means, bags[..., 0].mean(1)))
  ((3, 3, 1), True)

  Args:
    key: of the permutation.
    inputs: `[examples, ...]`.
    responses: floating `[examples, ...]`; for classes one-hot rows, whose means are proportions.
    bag_size: static; examples per bag.

  Returns:
    Inputs `[bags, bag_size, ...]` and mean responses `[bags, ...]`.

  Raises:
    ValueError: when lengths differ or `bag_size` is not in [1, examples].

  Reference: Javanmard et al., "Learning from Aggregate Responses", ICLR 2024, the problem's setting.
  """
  inputs, responses = as_array("inputs", inputs), as_array("responses", responses)
  check_float("responses", responses)
  if not inputs.ndim or not responses.ndim:
    raise ValueError(f"inputs and responses must have an axis of examples, got {inputs.shape} and {responses.shape}.")
  examples = inputs.shape[0]
  if jnp.shape(responses)[0] != examples:
    raise ValueError(f"responses must be as many as inputs, {examples}, got {jnp.shape(responses)[0]}.")
  if not 1 <= bag_size <= examples:
    raise ValueError(f"bag_size must lie in [1, {examples}], got {bag_size}.")
  order = jax.random.permutation(key, examples)[: examples // bag_size * bag_size]
  bags = lambda values: jnp.asarray(values)[order].reshape(-1, bag_size, *jnp.shape(values)[1:])
  return bags(inputs), bags(responses).mean(1)


def laplace_private_bag_means(
  key: jax.Array, responses: ArrayLike, *, clip: ArrayLike, epsilon: ArrayLike
) -> jax.Array:
  """Bag means of clipped responses plus Laplace noise of scale `2 clip / (bag_size epsilon)`.

  Every response is in one bag, and replacing it within `[-clip, clip]` moves one mean by at most `2 clip / bag_size`;
  so the whole release is epsilon-label-differentially private. Inputs and the bags' composition are not protected.

  >>> import jax, jax.numpy as jnp
  >>> laplace_private_bag_means(jax.random.key(0), jnp.zeros((5, 4)), clip=1.0, epsilon=2.0).shape
  (5,)

  Args:
    key: of the noise.
    responses: floating `[bags, bag_size]`.
    clip: positive bound of a response; may be traced.
    epsilon: positive privacy parameter; may be traced.

  Returns:
    `[bags]`.

  Raises:
    ValueError: when a parameter is out of range.

  Reference: Javanmard et al., ICLR 2024, the label-private mechanism; Dwork, Roth, "The Algorithmic Foundations of
    Differential Privacy", 2014, theorem 3.6.
  """
  check_hyperparameter("epsilon", epsilon, low=0, open_low=True)
  means, sensitivity = _clipped_means(responses, clip)
  noise = jax.random.laplace(key, means.shape, means.dtype)
  return means + sensitivity / epsilon * noise


def gaussian_private_bag_means(
  key: jax.Array,
  responses: ArrayLike,
  *,
  clip: ArrayLike,
  epsilon: ArrayLike,
  delta: float,
) -> jax.Array:
  """Bag means of clipped responses plus normal noise, (epsilon, delta)-label-differentially private.

  The standard deviation is `sqrt(2 log(1.25 / delta)) * 2 clip / (bag_size epsilon)`, which is proved for
  `epsilon < 1`.

  >>> import jax, jax.numpy as jnp
  >>> gaussian_private_bag_means(jax.random.key(0), jnp.zeros((5, 4)), clip=1.0, epsilon=0.5, delta=1e-5).shape
  (5,)

  Args:
    key: of the noise.
    responses: floating `[bags, bag_size]`.
    clip: positive bound of a response; may be traced.
    epsilon: in (0, 1); may be traced.
    delta: static; in (0, 1).

  Returns:
    `[bags]`.

  Raises:
    ValueError: when a parameter is out of range.

  Reference: Dwork, Roth, "The Algorithmic Foundations of Differential Privacy", 2014, theorem A.1.
  """
  check_hyperparameter("epsilon", epsilon, low=0, high=1, open_low=True, open_high=True)
  check_hyperparameter("delta", delta, low=0, high=1, open_low=True, open_high=True)
  means, sensitivity = _clipped_means(responses, clip)
  noise = jax.random.normal(key, means.shape, means.dtype)
  return means + math.sqrt(2 * math.log(1.25 / delta)) * sensitivity / epsilon * noise


def _clipped_means(responses, clip):
  check_float("responses", responses)
  check_hyperparameter("clip", clip, low=0, open_low=True)
  if jnp.ndim(responses) != 2:
    raise ValueError(f"responses must be [bags, bag_size], got shape {jnp.shape(responses)}.")
  wide = jnp.asarray(responses, jnp.promote_types(responses.dtype, jnp.float32))
  return jnp.clip(wide, -clip, clip).mean(-1), 2 * clip / responses.shape[-1]
