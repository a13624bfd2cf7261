"""Singular values of convolutions with circular padding, and what they say about orthogonality and robustness."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.norms import safe_norm, safe_sqrt
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "OrthogonalityError",
  "certified_radius",
  "conv_singular_values",
  "isometry_bounds",
  "orthogonality_error",
  "orthogonality_spectral_constant",
]


class OrthogonalityError(NamedTuple):
  """How far a matrix `A` is from orthogonal: norms of `A A^T - I`, or of `A^T A - I` for tall ones."""

  frobenius: jax.Array
  spectral: jax.Array


def conv_singular_values(kernel: ArrayLike, *, size: int, stride: int = 1) -> jax.Array:
  """All singular values of a convolution with circular padding, from a Fourier transform instead of its matrix.

  The transform turns the matrix into one block of `outputs` rows and `inputs * stride^d` columns per output pixel.
  With zero padding the singular values only approach these. On a CPU, XLA splits a batch of large decompositions over
  its threads and waits for them, in vain if several virtual devices do so at once: measure outside of a mapped program.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.diag(jnp.array([3.0, 2.0])))
  >>> values = conv_singular_values(kernel, size=4)
  >>> values.shape, [round(value, 4) for value in values[0, 0].tolist()]
  ((4, 4, 2), [3.0, 2.0])

  Args:
    kernel: floating `[k, inputs, outputs]`, `[k, k, inputs, outputs]` or `[k, k, k, inputs, outputs]`, `k` odd.
    size: of the output in pixels, the same in all dimensions; that of the input is `stride * size`. Static.
    stride: in pixels; static.

  Returns:
    `[size, …, size, min(outputs, inputs * stride^d)]`, descending along the last axis, float32 at least.

  Raises:
    ValueError: when the kernel is no kernel, or a size is not a positive integer.

  Reference: Sedghi, Gupta, Long, "The Singular Values of Convolutional Layers", ICLR 2019, extended to strides; as in
    Achour, Malgouyres, Mamalet, JMLR 2022.
  """
  sizes = conv_sizes(kernel, stride)
  d, size, stride = sizes.dimensions, static_integer("size", size, low=1), sizes.stride
  wide = jnp.asarray(kernel, jnp.promote_types(kernel.dtype, jnp.float32))
  # A kernel has few taps: sums over them cost less than a fast transform of the image, and they may wrap around it.
  frequencies = np.outer(np.arange(stride * size), np.arange(sizes.kernel_size) - sizes.kernel_size // 2)
  phases = jnp.asarray(np.exp(2j * np.pi * frequencies / (stride * size)), jnp.result_type(wide, jnp.complex64))
  spectrum = wide.astype(phases.dtype)
  for axis in range(d):
    spectrum = jnp.tensordot(phases, spectrum, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
    spectrum = jnp.moveaxis(spectrum, 0, axis)
  # Frequencies that differ by multiples of `size` are one after subsampling by the stride.
  blocks = spectrum.reshape((stride, size) * d + (sizes.inputs, sizes.outputs))
  order = (*range(1, 2 * d, 2), 2 * d + 1, *range(0, 2 * d, 2), 2 * d)
  blocks = blocks.transpose(order).reshape((size,) * d + (sizes.outputs, stride**d * sizes.inputs))
  return jnp.linalg.svd(blocks / stride ** (d / 2), compute_uv=False)


def orthogonality_error(singular_values: ArrayLike) -> OrthogonalityError:
  """The Frobenius and the spectral norm of `A A^T - I` or `A^T A - I` from the singular values of `A`.

  With circular padding, output size `N` with `S N >= 2 k - 1` and `d` dimensions, the square of the Frobenius norm is
  `N^d L_orth`.

  >>> import jax.numpy as jnp
  >>> error = orthogonality_error(jnp.array([1.0, 2.0, 1.0]))
  >>> float(error.frobenius), float(error.spectral)
  (3.0, 3.0)

  Args:
    singular_values: floating, of any shape; all that the shape of the matrix has, zeros included.

  Returns:
    Two scalars, float32 at least.

  Raises:
    ValueError: when the values are not floating point.

  Reference: Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
    Networks", JMLR 2022, the orthogonality residuals.
  """
  check_float("singular_values", singular_values)
  values = jnp.asarray(singular_values, jnp.promote_types(jnp.result_type(singular_values), jnp.float32))
  defect = jnp.abs((values - 1) * (values + 1))  # no cancellation near 1
  return OrthogonalityError(safe_norm(defect), jnp.max(defect, initial=0))


def orthogonality_spectral_constant(
  *, outputs: int, inputs: int, kernel_size: int, stride: int = 1, dimensions: int = 2
) -> float:
  """The constant `alpha` with `spectral error^2 <= alpha L_orth` at every image size.

  `alpha = M (2 floor((k - 1) / S) + 1)^d` with at most as many rows as columns (`M <= C S^d`), `C (2 k - 1)^d` with at
  least as many, and the smaller of both when equal.

  >>> orthogonality_spectral_constant(outputs=4, inputs=3, kernel_size=3)
  75.0

  Args:
    outputs: channels `M`.
    inputs: channels `C`.
    kernel_size: odd number of taps `k` in each dimension.
    stride: `S`, in pixels.
    dimensions: of the image, `d`.

  Returns:
    A Python float.

  Raises:
    ValueError: when a size is not a positive integer.

  Reference: Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
    Networks", JMLR 2022, the theorem on the spectral norm.
  """
  sizes = check_sizes(ConvSizes(outputs, inputs, kernel_size, stride, dimensions))
  columns = inputs * stride**dimensions
  wide = outputs * (2 * ((kernel_size - 1) // stride) + 1) ** dimensions
  tall = inputs * (2 * kernel_size - 1) ** dimensions
  return float(min(([wide] if sizes.outputs <= columns else []) + ([tall] if sizes.outputs >= columns else [])))


def isometry_bounds(penalty: ArrayLike, *, spectral_constant: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Between which values all singular values lie at every image size: `sqrt(1 -+ e)` with `e = sqrt(alpha L_orth)`.

  >>> import jax.numpy as jnp
  >>> low, high = isometry_bounds(jnp.array(1e-4), spectral_constant=100.0)
  >>> round(float(low), 4), round(float(high), 4)
  (0.9487, 1.0488)

  Args:
    penalty: floating `[...]`, values of `orthogonal_conv_penalty`; below zero, as rounding may leave it, counts as 0.
    spectral_constant: `orthogonality_spectral_constant` of the shape; may be traced.

  Returns:
    The lower and the upper bound, `[...]` float32 at least; the lower is 0 where `e` exceeds 1.

  Raises:
    ValueError: when the penalty is not floating point or the constant is not positive.

  Reference: Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
    Networks", JMLR 2022, the approximate isometry property.
  """
  check_float("penalty", penalty)
  check_hyperparameter("spectral_constant", spectral_constant, low=0, open_low=True)
  wide = jnp.asarray(penalty, jnp.promote_types(jnp.result_type(penalty), jnp.float32))
  error = safe_sqrt(wide * jnp.asarray(spectral_constant, wide.dtype))
  return safe_sqrt(1 - error), jnp.sqrt(1 + error)


def certified_radius(logits: ArrayLike, *, lipschitz_constant: ArrayLike) -> jax.Array:
  """The l2 radius within which the prediction cannot change: `(z_first - z_second) / (sqrt(2) lipschitz_constant)`.

  >>> import jax.numpy as jnp
  >>> round(float(certified_radius(jnp.array([0.0, 3.0, 1.0]), lipschitz_constant=2.0)), 4)
  0.7071

  Args:
    logits: floating `[..., classes]`.
    lipschitz_constant: bound on that of the logits in the inputs, in l2: the product of the layers' largest singular
      values when the activations are 1-Lipschitz. Positive; broadcasts against `[...]`; may be traced.

  Returns:
    `[...]` in the dtype of `logits`, in units of the inputs.

  Raises:
    ValueError: when the logits are not floating point or have fewer than two classes, or the constant is not positive.

  Reference: Tsuzuku, Sato, Sugiyama, "Lipschitz-Margin Training: Scalable Certification of Perturbation Invariance for
    Deep Neural Networks", NeurIPS 2018, proposition 1.
  """
  check_float("logits", logits)
  if jnp.ndim(logits) < 1 or jnp.shape(logits)[-1] < 2:
    raise ValueError(f"logits must have a last axis of at least two classes, got shape {jnp.shape(logits)}.")
  check_hyperparameter("lipschitz_constant", lipschitz_constant, low=0, open_low=True, shape=jnp.shape(logits)[:-1])
  wide = jnp.promote_types(logits.dtype, jnp.float32)
  # Not by slices of the pair, for which XLA would sort all classes.
  margin = jnp.sum(jax.lax.top_k(logits, 2)[0].astype(wide) * jnp.array([1, -1], wide), axis=-1)
  return (margin / (math.sqrt(2) * jnp.asarray(lipschitz_constant, wide))).astype(logits.dtype)


class ConvSizes(NamedTuple):
  """The sizes of a convolution: what its orthogonality depends on."""

  outputs: int  # M
  inputs: int  # C
  kernel_size: int  # k, odd
  stride: int  # S
  dimensions: int  # d


def conv_sizes(kernel: ArrayLike, stride: int) -> ConvSizes:
  """The sizes of a kernel `[k, …, k, inputs, outputs]`; raises ValueError when it is none."""
  check_float("kernel", kernel)
  shape = jnp.shape(kernel)
  if not 1 <= len(shape) - 2 <= 3 or len(set(shape[:-2])) != 1:
    raise ValueError(f"kernel must have the shape [k, …, k, inputs, outputs] in 1 to 3 dimensions, got {shape}.")
  return check_sizes(ConvSizes(shape[-1], shape[-2], shape[0], stride, len(shape) - 2))


def check_sizes(sizes: ConvSizes) -> ConvSizes:
  """The sizes; raises ValueError unless they are positive integers and the kernel size is odd."""
  sizes = ConvSizes(**{name: static_integer(name, size, low=1) for name, size in sizes._asdict().items()})
  if sizes.kernel_size % 2 == 0:
    raise ValueError(f"kernel_size must be odd, for an even kernel has no centre, got {sizes.kernel_size}.")
  return sizes
