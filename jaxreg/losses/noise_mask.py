"""Masks of Beta-distributed noise that a policy draws for every image, and the losses that train policy and classifier.

The policy gives the logarithms of both parameters of a Beta distribution for each cell of a coarse grid. A mask drawn
from it is enlarged, blurred and multiplied into the image; the classifier's cross-entropy is the policy's cost.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.nn import logsumexp
from jax.scipy.special import betaln, digamma, gammaln
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape, example_mask
from jaxreg.losses.labelled_logits import labelled, narrowed, widened
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "NoiseMaskTerms",
  "beta_log_density",
  "enlarge_noise_mask",
  "noise_mask_loss",
  "sample_noise_mask",
]

OBJECTIVES = ("official", "reinforce")


class NoiseMaskTerms(NamedTuple):
  """What `noise_mask_loss` is made of, scalars.

  Attributes:
    cross_entropy: the mean of the examples'.
    log_density: the mean over examples of the logarithm of the sum (`official`), or of the sum of the logarithms
      (`reinforce`), of the cells' densities. The `official` objective multiplies the classifier's learning rate by it.
  """

  cross_entropy: jax.Array
  log_density: jax.Array


def sample_noise_mask(key: jax.Array, log_alpha: ArrayLike, log_beta: ArrayLike, *, margin: float = 1e-6) -> jax.Array:
  """A mask with an entry from `Beta(exp(log_alpha), exp(log_beta))` for every cell, without gradient.

  >>> import jax, jax.numpy as jnp
  >>> mask = sample_noise_mask(jax.random.key(0), jnp.zeros((2, 16)), jnp.zeros((2, 16)))
  >>> mask.shape, bool(jnp.all((mask > 0) & (mask < 1)))
  ((2, 16), True)

  Args:
    key: threefry key; draw anew at every step.
    log_alpha: floating `[..., cells]`, the logarithm of the first parameter.
    log_beta: floating `[..., cells]`, of the second.
    margin: how far from 0 and 1 entries stay, where densities may be infinite, in (0, 0.5); static.

  Returns:
    `[..., cells]` in `[margin, 1 - margin]`, float32 at least.

  Raises:
    ValueError: when shapes or dtypes do not fit or `margin` is out of range.

  Reference: Yavuz, Yang, "Policy Gradient-Driven Noise Mask", arXiv 2406.14568, 2024.
  """
  log_alpha, log_beta = _parameters(log_alpha, log_beta)
  check_hyperparameter("margin", margin, low=0, high=0.5, open_low=True, open_high=True, shape=())
  drawn = jax.random.beta(key, jnp.exp(log_alpha), jnp.exp(log_beta), dtype=log_alpha.dtype)
  return jax.lax.stop_gradient(jnp.clip(drawn, margin, 1 - margin))


def beta_log_density(mask: ArrayLike, log_alpha: ArrayLike, log_beta: ArrayLike, *, margin: float = 1e-6) -> jax.Array:
  """The logarithm of each cell's Beta density, `(a - 1) log m + (b - 1) log(1 - m) - log B(a, b)`.

  >>> import jax.numpy as jnp
  >>> uniform = beta_log_density(jnp.array([0.25]), jnp.array([0.0]), jnp.array([0.0]))
  >>> abs(uniform.item()) < 1e-5
  True

  Args:
    mask: floating `[..., cells]` in [0, 1].
    log_alpha: floating `[..., cells]`.
    log_beta: floating `[..., cells]`.
    margin: entries nearer to 0 and 1 count as this near, in [0, 0.5); static.

  Returns:
    `[..., cells]`, in the dtype of `log_alpha`.

  Raises:
    ValueError: when shapes or dtypes do not fit or `margin` is out of range.

  Reference: Yavuz, Yang, arXiv 2406.14568, 2024 (as in the official code).
  """
  values = _log_density(mask, log_alpha, log_beta, margin)
  return narrowed(values, jnp.result_type(log_alpha))


def noise_mask_loss(
  log_alpha: ArrayLike,
  log_beta: ArrayLike,
  mask: ArrayLike,
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  objective: str = "official",
  baseline: ArrayLike | None = None,
  where: ArrayLike | None = None,
  margin: float = 1e-6,
) -> tuple[jax.Array, NoiseMaskTerms]:
  """The loss of which one gradient trains both the classifier, through its logits, and the policy, through densities.

  `official`: `mean_i log sum_g density_ig` times the mean cross-entropy. It is not the policy gradient: its mean
  gradient is 0 at uniform masks alone whatever the cost, so that the policy goes there; and the classifier's learning
  rate is multiplied by the first factor, about the logarithm of the number of cells, which of two or three cells may be
  negative. `reinforce`: the mean cross-entropy, plus `mean_i (ce_i - baseline_i) sum_g log density_ig` with constant
  costs, whose gradient in the policy is an unbiased estimate of that of the expected cost. It needs a baseline and may
  run away without a bound on the logarithms.

  >>> import jax.numpy as jnp
  >>> policy, mask = jnp.zeros((1, 16)), jnp.full((1, 16), 0.3)  # uniform masks
  >>> loss, terms = noise_mask_loss(policy, policy, mask, jnp.zeros((1, 2)), jnp.array([0]))
  >>> bool(jnp.isclose(loss, jnp.log(16) * jnp.log(2)))
  True

  Args:
    log_alpha: floating `[batch, cells]`, the policy's.
    log_beta: floating `[batch, cells]`.
    mask: floating `[batch, cells]`, drawn from it, constant under differentiation.
    logits: floating `[batch, classes]`, of the masked images.
    labels: integers `[batch]`; examples with another label than a class count for nothing.
    objective: `official` or `reinforce`; static.
    baseline: of `reinforce`, scalar or `[batch]`, constant, such as a running mean of the cross-entropy; may be traced.
    where: boolean `[batch]`: the examples that count.
    margin: as in `beta_log_density`; static.

  Returns:
    Scalar in the dtype of the logits, 0 without examples, and `NoiseMaskTerms`.

  Raises:
    ValueError: when shapes or dtypes do not fit, the objective is unknown, or a baseline is given to `official`.

  Reference: Yavuz, Yang, arXiv 2406.14568, 2024 (`official` as in the official code); Williams, "Simple Statistical
    Gradient-Following Algorithms for Connectionist Reinforcement Learning", Machine Learning 1992.
  """
  if objective not in OBJECTIVES:
    raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
  if baseline is not None and objective == "official":
    raise ValueError("baseline must be None for the official objective, which has none.")
  batch = labelled(logits, labels)
  if batch.logits.ndim != 2:
    raise ValueError(f"logits must be [batch, classes], got shape {batch.logits.shape}.")
  counted = batch.counted & example_mask(where, batch.labels.shape)
  _parameters(log_alpha, log_beta)
  if jnp.ndim(log_alpha) != 2 or jnp.shape(log_alpha)[:1] != counted.shape:
    raise ValueError(f"log_alpha must be [batch, cells] of {len(counted)} examples, got {jnp.shape(log_alpha)}.")
  check_float("mask", mask)
  check_same_shape(mask=mask, log_alpha=log_alpha)
  rows = counted[:, None]
  safe = lambda array, value: jnp.where(rows, array, value)  # nothing of the others is read
  density = _log_density(safe(jnp.asarray(mask), 0.5), safe(log_alpha, 0), safe(log_beta, 0), margin)
  count = jnp.maximum(jnp.sum(counted), 1)
  mean = lambda values: jnp.sum(jnp.where(counted, values, 0)) / count
  losses = optax.softmax_cross_entropy_with_integer_labels(safe(batch.logits, 0), batch.labels)
  cost = mean(losses)
  if objective == "official":
    terms = NoiseMaskTerms(cost, mean(logsumexp(density, axis=-1)))
    loss = terms.log_density * cost
  else:
    if baseline is not None:
      check_hyperparameter("baseline", baseline, shape=counted.shape)
    advantage = jax.lax.stop_gradient(losses - (0 if baseline is None else jnp.asarray(baseline, losses.dtype)))
    joint = jnp.sum(density, axis=-1)
    terms = NoiseMaskTerms(cost, mean(joint))
    loss = cost + mean(advantage * joint)
  return narrowed(loss, batch.dtype), NoiseMaskTerms(*(narrowed(term, batch.dtype) for term in terms))


def enlarge_noise_mask(mask: ArrayLike, *, size: int, kernel_size: int = 1, width: float = 1.0) -> jax.Array:
  """A mask of a grid as one of an image: each pixel its cell's value, then blurred by a Gaussian.

  Borders are reflected and the blur's weights have sum 1: it stays between the mask's smallest and largest entries.

  >>> import jax.numpy as jnp
  >>> enlarge_noise_mask(jnp.array([[0.0, 1.0, 1.0, 0.0]]), size=4)[0, 0].tolist()
  [0.0, 0.0, 1.0, 1.0]

  Args:
    mask: floating `[..., cells]`, of a square grid, row by row.
    size: rows and columns of the image, at least those of the grid; static.
    kernel_size: odd number of pixels of the blur, less than twice the size; 1 for none; static.
    width: of the Gaussian in pixels, positive; static.

  Returns:
    `[..., size, size]`, in the dtype of the mask.

  Raises:
    ValueError: when the mask is not floating or not a square, or a size is out of range.

  Reference: Yavuz, Yang, arXiv 2406.14568, 2024 (as in the official code).
  """
  check_float("mask", mask)
  mask = as_array("mask", mask)
  grid = round(mask.shape[-1] ** 0.5) if mask.ndim else 0
  if mask.ndim < 1 or grid < 1 or grid**2 != mask.shape[-1]:
    raise ValueError(f"mask must be [..., cells] of a square grid, got shape {mask.shape}.")
  size = static_integer("size", size, low=grid)
  kernel_size = static_integer("kernel_size", kernel_size, low=1, high=2 * size - 1)
  if kernel_size % 2 == 0:
    raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
  check_hyperparameter("width", width, low=0, open_low=True, shape=())
  cells = np.arange(size) * grid // size
  square = mask.reshape(*mask.shape[:-1], grid, grid)
  image = widened(square)[..., cells[:, None], cells]
  if kernel_size > 1:
    offsets = np.arange(kernel_size) - kernel_size // 2
    taps = np.exp(-(offsets**2) / (2 * float(width) ** 2))
    # The blur of a row as a matrix, which has the reflected borders in it.
    places = np.pad(np.arange(size), kernel_size // 2, mode="reflect")
    blur = np.zeros((size, size))
    for row in range(size):
      np.add.at(blur[row], places[row : row + kernel_size], taps / taps.sum())
    blur = jnp.asarray(blur, image.dtype)
    image = jnp.einsum("ij,...jk,lk->...il", blur, image, blur, precision="highest")
  return narrowed(image, mask.dtype)


def _parameters(log_alpha, log_beta):
  """Checked logarithms in float32 at least."""
  for name, value in {"log_alpha": log_alpha, "log_beta": log_beta}.items():
    check_float(name, value)
  log_alpha, log_beta = as_array("log_alpha", log_alpha), as_array("log_beta", log_beta)
  check_same_shape(log_alpha=log_alpha, log_beta=log_beta)
  dtype = jnp.promote_types(widened(log_alpha).dtype, log_beta.dtype)
  return log_alpha.astype(dtype), log_beta.astype(dtype)


def _log_density(mask, log_alpha, log_beta, margin):
  check_float("mask", mask)
  check_hyperparameter("margin", margin, low=0, high=0.5, open_high=True, shape=())
  mask = as_array("mask", mask)
  check_same_shape(mask=mask, log_alpha=log_alpha)
  log_alpha, log_beta = _parameters(log_alpha, log_beta)
  inside = jax.lax.stop_gradient(jnp.clip(widened(mask).astype(log_alpha.dtype), margin, 1 - margin))
  alpha, beta = jnp.exp(log_alpha), jnp.exp(log_beta)
  return (alpha - 1) * jnp.log(inside) + (beta - 1) * jnp.log1p(-inside) - _log_beta(alpha, beta)


@jax.custom_jvp
def _log_beta(alpha, beta):
  """The logarithm of the Beta function.

  JAX's own is the more precise one in float32, where the gamma functions cancel, and right to 1e-6 only in float64.
  """
  if alpha.dtype == jnp.float64:
    return gammaln(alpha) + gammaln(beta) - gammaln(alpha + beta)
  return betaln(alpha, beta)


@_log_beta.defjvp
def _log_beta_jvp(primals, tangents):
  alpha, beta = primals
  total = digamma(alpha + beta)
  return _log_beta(alpha, beta), (digamma(alpha) - total) * tangents[0] + (digamma(beta) - total) * tangents[1]
