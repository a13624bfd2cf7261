"""Penalties that vanish exactly at orthogonal convolutions, and the shapes for which such convolutions exist.

A convolution with circular padding, stride `S`, `M` outputs and `C` inputs is a matrix `A` with `M` rows and `C S^d`
columns per output pixel in `d` dimensions. It is orthogonal when `A A^T = I` (no more rows than columns) or
`A^T A = I` (no fewer). Circular padding is `padding="CIRCULAR"` of `flax.linen.Conv`, at sizes that the stride divides.
`metrics.conv_spectrum` measures how far a kernel is from it at a given image size.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.conv_spectrum import ConvSizes, check_sizes, conv_sizes
from jaxreg.metrics.weights import flax_kernel, parameter_name

__all__ = [
  "orthogonal_conv_defect_norm",
  "orthogonal_conv_exists",
  "orthogonal_conv_offset",
  "orthogonal_conv_penalty",
  "orthogonal_conv_taps",
  "orthogonal_dense_penalty",
  "orthogonal_penalty",
]

_PADDINGS = ("CIRCULAR", "VALID", "SAME")


def orthogonal_conv_penalty(kernel: jax.Array, *, stride: int = 1) -> jax.Array:
  """The penalty `L_orth`, the squared Frobenius orthogonality defect per output pixel, from the kernel alone.

  `L_orth = ||R - T||_F^2 - max(0, M - C S^d)`, where `R` holds the inner products of the kernels of all pairs of
  outputs at all displacements that are multiples of the stride, and the target `T` is the identity at displacement
  zero. Circular padding: it is zero exactly at orthogonal convolutions, whatever the image size. `VALID` padding: the
  same, for convolutions with no more rows than columns. Zero (`SAME`) padding lets no overlapping kernel be orthogonal
  (see `orthogonal_conv_taps`); the penalty then makes all but the border orthogonal.

  Divide it by the number of outputs when several layers share one weight, exclude the kernel from weight decay, and
  start from an orthogonal kernel where `M = C S^d`, the shape in which descent gets stuck: with stride 1 and `M >= C`
  that is `flax.linen.initializers.delta_orthogonal()` (`nnx.initializers` has it too), which is zero but for an
  orthogonal matrix at the central tap. In float32 the penalty does not resolve values below about 1e-6 and may round
  to slightly less than zero.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))
  >>> float(orthogonal_conv_penalty(kernel)), float(orthogonal_conv_penalty(2 * kernel))
  (0.0, 18.0)

  Args:
    kernel: floating `[k, inputs, outputs]`, `[k, k, inputs, outputs]` or `[k, k, k, inputs, outputs]`, `k` odd.
    stride: in pixels, the same in all dimensions; static.

  Returns:
    Scalar in the dtype of `kernel`.

  Raises:
    ValueError: when the kernel is not floating point, not of equal odd sizes, or the stride is not a positive integer.

  Reference: Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
    Networks", JMLR 2022, the regularizer of Wang, Chen, Chakraborty, Yu, "Orthogonal Convolutional Neural Networks",
    CVPR 2020, squared and less its minimum. The padding is `floor((k - 1) / S) S`, whereas Wang's code has 1.
  """
  sizes = conv_sizes(kernel, stride)
  return (_squared_defect(kernel, sizes) - _offset(sizes)).astype(kernel.dtype)


def orthogonal_conv_defect_norm(kernel: jax.Array, *, stride: int = 1) -> jax.Array:
  """The norm `||R - T||_F` that is not squared: `sqrt(L_orth + max(0, M - C S^d))`, `R` and `T` as in `L_orth`.

  Its gradient has the same size however small the defect is, and is 0 where the defect is 0. With more rows than
  columns (`M > C S^d`) its least value is not 0 but the square root of the offset.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(2 * jnp.eye(2))
  >>> round(float(orthogonal_conv_defect_norm(kernel)), 4)
  4.2426

  Args:
    kernel: as in `orthogonal_conv_penalty`.
    stride: in pixels, the same in all dimensions; static.

  Returns:
    Scalar in the dtype of `kernel`.

  Raises:
    ValueError: as `orthogonal_conv_penalty`.

  Reference: Wang, Chen, Chakraborty, Yu, "Orthogonal Convolutional Neural Networks", CVPR 2020, as in the released
    code, with the padding that the stride asks for.
  """
  squared = _squared_defect(kernel, conv_sizes(kernel, stride))
  positive = squared > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0).astype(kernel.dtype)


def orthogonal_dense_penalty(weights: jax.Array) -> jax.Array:
  """The squared defect of a matrix: `||W^T W - I||_F^2` or `||W W^T - I||_F^2`, whichever has the smaller identity.

  Convolutions whose patches do not overlap (`k <= S`) are this matrix, repeated; for others it ignores the overlap.

  >>> import jax.numpy as jnp
  >>> float(orthogonal_dense_penalty(jnp.eye(3, 2))), float(orthogonal_dense_penalty(jnp.zeros((3, 2))))
  (0.0, 2.0)

  Args:
    weights: floating `[..., inputs, outputs]`; all axes but the last are flattened, as in a convolution's kernel.

  Returns:
    Scalar in the dtype of `weights`.

  Raises:
    ValueError: when the weights are not floating point or have no two axes.

  Reference: Wang, Chen, Chakraborty, Yu, "Orthogonal Convolutional Neural Networks", CVPR 2020, kernel orthogonality.
  """
  check_float("weights", weights)
  if jnp.ndim(weights) < 2:
    raise ValueError(f"weights must have the axes [..., inputs, outputs], got shape {jnp.shape(weights)}.")
  matrix = _wide(weights).reshape(-1, jnp.shape(weights)[-1])
  matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
  gram = jnp.matmul(matrix.T, matrix, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(jnp.square(gram - jnp.eye(len(gram), dtype=gram.dtype))).astype(weights.dtype)


def orthogonal_penalty(
  params,
  strides: Mapping[str, int | None],
  *,
  layer_weights: Mapping | None = None,
  layout: Callable[[str, jax.Array], jax.Array] = flax_kernel,
) -> jax.Array:
  """The weighted sum of the orthogonality penalties of chosen layers, `sum_l w_l L_orth(K_l)`.

  With `jaxreg.transforms.penalize` it becomes an optax transformation. Wang et al. leave out the first convolution and
  take the flattened form for 1×1 and downsampling convolutions, among which are shapes that cannot be orthogonal.

  >>> import jax.numpy as jnp
  >>> params = {"stem": {"kernel": jnp.zeros((3, 3, 1, 4))}, "head": {"kernel": jnp.eye(8, 10)}}
  >>> float(orthogonal_penalty(params, {"stem/kernel": 2, "head/kernel": None}, layer_weights={"stem/kernel": 0.25}))
  1.0

  Args:
    params: pytree of arrays: Linen's, an `nnx.State`, or the arrays of an Equinox module.
    strides: path of a kernel, joined by `/` -> its stride, for `orthogonal_conv_penalty`, or None, for
      `orthogonal_dense_penalty`: dense layers and convolutions in the flattened form. Static.
    layer_weights: path -> factor, which may be traced; 1 for those not in it, or all when None. To share one weight
      over layers of different widths, take `1 / outputs`.
    layout: static; `(path, kernel) -> kernel [..., inputs, outputs]`; by default arrays named `weight` are taken for
      `[outputs, inputs, ...]`, as Equinox and PyTorch keep them.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when a path does not exist, none is given, a kernel is no kernel of its kind, or no orthogonal
      convolution of its shape exists.

  Warns:
    UserWarning: when a convolution has as many rows as columns (`M = C S^d`).

  Reference: Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
    Networks", JMLR 2022, the regularized loss.
  """
  leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  factors = {} if layer_weights is None else layer_weights
  for argument, paths in (("strides", strides), ("layer_weights", factors)):
    known = leaves if argument == "strides" else strides
    if unknown := [path for path in paths if path not in known]:
      raise ValueError(f"{argument} must name kernels among {', '.join(known)}, got {', '.join(unknown)}.")
  if not strides:
    raise ValueError(f"strides must name kernels among {', '.join(leaves)}, got none.")
  total = jnp.zeros(())
  for path, stride in strides.items():
    check_hyperparameter(f"layer_weights[{path!r}]", factors.get(path, 1.0))
    total = total + factors.get(path, 1.0) * _layer_penalty(path, _wide(layout(path, leaves[path])), stride)
  return total


def orthogonal_conv_exists(
  *, outputs: int, inputs: int, kernel_size: int, stride: int = 1, dimensions: int = 2, padding: str = "CIRCULAR"
) -> bool:
  """Whether a kernel of this shape exists that makes the convolution orthogonal, on images larger than the kernel.

  With at most as many rows as columns (`M <= C S^d`): iff `M <= C t^d`; with at least as many: iff `t >= S`; where
  `t` is the number of taps that the padding allows, the kernel size with circular padding (`orthogonal_conv_taps`).

  >>> orthogonal_conv_exists(outputs=64, inputs=32, kernel_size=3)
  True
  >>> orthogonal_conv_exists(outputs=64, inputs=32, kernel_size=1, stride=2)
  False

  Args:
    outputs: channels `M`.
    inputs: channels `C`.
    kernel_size: odd number of taps `k` in each dimension.
    stride: `S`, in pixels.
    dimensions: of the image, `d`.
    padding: `CIRCULAR`, `VALID` (with windows that end at the border) or `SAME` (zeros, as XLA places them).

  Returns:
    A Python bool.

  Raises:
    ValueError: when a size is not a positive integer or the padding is unknown.

  Reference: Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
    Networks", JMLR 2022, the existence theorem, for circular padding; the others follow from the norms of border rows.
  """
  sizes = check_sizes(ConvSizes(outputs, inputs, kernel_size, stride, dimensions))
  taps = orthogonal_conv_taps(**sizes._asdict(), padding=padding)
  # Rows that share a place have entries at the taps only; columns, at least one tap each.
  return sizes.outputs <= inputs * taps**dimensions if sizes.outputs <= _columns(sizes) else taps >= stride


def orthogonal_conv_taps(
  *, outputs: int, inputs: int, kernel_size: int, stride: int = 1, dimensions: int = 2, padding: str = "CIRCULAR"
) -> int:
  """How many taps per dimension an orthogonal kernel of this shape may use: fewer than the kernel has near a border.

  Circular padding: all. Zero padding: `min(k, S)`, for an output at the border loses the other taps and must have the
  same norm, so that with stride 1 only the central tap is left. `VALID` padding with more rows than columns: all if
  `k = S`, else none, for a pixel at the corner is seen by one tap and one in the middle by more.

  >>> shape = dict(outputs=8, inputs=8, kernel_size=3)
  >>> orthogonal_conv_taps(**shape), orthogonal_conv_taps(**shape, padding="SAME")
  (3, 1)

  Args:
    outputs: channels `M`.
    inputs: channels `C`.
    kernel_size: odd number of taps `k` in each dimension.
    stride: `S`, in pixels.
    dimensions: of the image, `d`.
    padding: `CIRCULAR`, `VALID` (with windows that end at the border) or `SAME` (zeros, as XLA places them).

  Returns:
    A Python int; 0 when no orthogonal kernel exists.

  Raises:
    ValueError: when a size is not a positive integer or the padding is unknown.

  Reference: Achour, Malgouyres, Mamalet, "Existence, Stability and Scalability of Orthogonal Convolutional Neural
    Networks", JMLR 2022, the remarks on padding.
  """
  sizes = check_sizes(ConvSizes(outputs, inputs, kernel_size, stride, dimensions))
  if padding not in _PADDINGS:
    raise ValueError(f"padding must be one of {', '.join(_PADDINGS)}, got {padding!r}.")
  if padding == "SAME":
    return min(kernel_size, stride)
  # Windows that end at the border leave fewer rows than columns when M = C S^d, and rows of whole kernels.
  if padding == "VALID" and outputs > _columns(sizes):
    return kernel_size if kernel_size == stride else 0
  return kernel_size


def orthogonal_conv_offset(
  *, outputs: int, inputs: int, kernel_size: int, stride: int = 1, dimensions: int = 2
) -> float:
  """The offset `max(0, M - C S^d)` of `L_orth`: the least `||A A^T - I||_F^2` per output pixel of a tall matrix.

  >>> orthogonal_conv_offset(outputs=9, inputs=2, kernel_size=3, stride=2)
  1.0

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
    Networks", JMLR 2022, the definition of `L_orth`.
  """
  return _offset(check_sizes(ConvSizes(outputs, inputs, kernel_size, stride, dimensions)))


def _columns(sizes: ConvSizes) -> int:
  """Columns of the convolution's matrix per output pixel; its rows are the outputs."""
  return sizes.inputs * sizes.stride**sizes.dimensions


def _offset(sizes: ConvSizes) -> float:
  return float(max(0, sizes.outputs - _columns(sizes)))


def _wide(array):
  return jnp.asarray(array, jnp.promote_types(jnp.result_type(array), jnp.float32))


def _squared_defect(kernel, sizes: ConvSizes):
  """`||R - T||_F^2`, a matrix product of the overlapping taps for each displacement of the kernel against itself.

  Not one convolution: under `vmap` that becomes a grouped one, slow to compile and to run, and it needs the kernel
  padded to all displacements, which are mostly products with zeros.
  """
  wide = _wide(kernel)
  reach = (sizes.kernel_size - 1) // sizes.stride
  total = jnp.zeros((), wide.dtype)
  for steps in itertools.product(range(-reach, reach + 1), repeat=sizes.dimensions):
    # R is transposed at the opposite displacement: one half space is enough.
    if steps < (0,) * sizes.dimensions:
      continue
    moved = [sizes.stride * step for step in steps]
    product = jnp.matmul(_overlap(wide, moved).T, _overlap(wide, [-by for by in moved]), precision="highest")
    if any(steps):
      total = total + 2 * jnp.sum(jnp.square(product))
    else:
      total = total + jnp.sum(jnp.square(product - jnp.eye(sizes.outputs, dtype=product.dtype)))
  return total


def _overlap(kernel, moved: Sequence[int]):
  """The taps of a kernel that lie on those of the same kernel displaced by `moved`, as a matrix `[-1, outputs]`."""
  taps = tuple(slice(max(by, 0), min(by, 0) or None) for by in moved)
  return kernel[taps].reshape(-1, kernel.shape[-1])


def _layer_penalty(path: str, kernel, stride: int | None):
  if stride is None:
    return orthogonal_dense_penalty(kernel)
  sizes = conv_sizes(kernel, stride)
  if not orthogonal_conv_exists(**sizes._asdict()):
    raise ValueError(
      f"strides[{path!r}] must be None, the flattened form: no orthogonal convolution has "
      + ", ".join(f"{name} {size}" for name, size in sizes._asdict().items())
      + "."
    )
  if sizes.outputs == _columns(sizes):
    # One frame up is the caller's function, above this one and orthogonal_penalty.
    warnings.warn(
      f"{path} has as many outputs as inputs × stride^dimensions ({sizes.outputs}): descent often gets stuck away from"
      " orthogonality; start from an orthogonal kernel.",
      UserWarning,
      stacklevel=3,
    )
  return orthogonal_conv_penalty(kernel, stride=stride)
