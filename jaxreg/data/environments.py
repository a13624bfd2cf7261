"""Environments out of one set of images: what colours, rotations and class frequencies change between domains."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter

__all__ = ["colored_digits", "imbalanced_environments", "rotate_images", "rotated_environments"]


def colored_digits(
  key: jax.Array,
  images: ArrayLike,
  labels: ArrayLike,
  *,
  color_flip: ArrayLike,
  label_flip: ArrayLike = 0.25,
  boundary: ArrayLike = 5,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Coloured MNIST: two classes with wrong labels, and a colour that predicts the label better than the shape does.

  The label says whether the digit is below `boundary`, and is wrong for a fraction `label_flip`; the colour is the
  label, but for a fraction `color_flip`. The literature trains on environments with `color_flip` 0.2 and 0.1 and tests
  on one with 0.9; half the resolution, `images[:, ::2, ::2]`, is usual.

  >>> import jax, jax.numpy as jnp
  >>> images, digits = jnp.ones((4, 2, 2, 1)), jnp.array([0, 4, 5, 9])
  >>> colored, labels, colors = colored_digits(jax.random.key(0), images, digits, color_flip=0.0, label_flip=0.0)
  >>> labels.tolist(), colors.tolist(), colored[:, 0, 0].tolist()
  ([1, 1, 0, 0], [1, 1, 0, 0], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])

  Args:
    key: threefry key.
    images: floating `[examples, height, width, 1]`.
    labels: integers `[examples]`, the digits.
    color_flip: in [0, 1], the fraction of examples whose colour is not their label; may be traced.
    label_flip: in [0, 1], the fraction of wrong labels; may be traced.
    boundary: digits below it have label 1; may be traced.

  Returns:
    Images `[examples, height, width, 2]` in the images' dtype, of which the channel of the colour holds the digit and
    the other one is 0; labels and colours, int32 `[examples]`, 0 or 1.

  Raises:
    ValueError: when shapes or dtypes do not fit or a fraction lies outside [0, 1].

  Reference: Arjovsky, Bottou, Gulrajani, Lopez-Paz, "Invariant Risk Minimization", arXiv 1907.02893, 2019, Section 5.
  """
  images, labels = _images_and_labels(images, labels)
  if images.ndim != 4 or images.shape[-1] != 1:
    raise ValueError(f"images must be [examples, height, width, 1], got shape {images.shape}.")
  check_hyperparameter("color_flip", color_flip, low=0, high=1, shape=())
  check_hyperparameter("label_flip", label_flip, low=0, high=1, shape=())
  check_hyperparameter("boundary", boundary, shape=())
  of_labels, of_colors = jax.random.split(key)
  flipped = lambda key, rate: jax.random.uniform(key, labels.shape, jnp.float32) < rate
  is_one = (labels < boundary) ^ flipped(of_labels, label_flip)
  is_second = is_one ^ flipped(of_colors, color_flip)
  shown = is_second[:, None] == jnp.array([False, True])
  colored = jnp.where(shown[:, None, None], images, 0)
  return colored, is_one.astype(jnp.int32), is_second.astype(jnp.int32)


def rotate_images(images: ArrayLike, *, degrees: ArrayLike) -> jax.Array:
  """Images rotated about their centre, interpolated linearly between pixels, with zeros from outside.

  >>> import jax.numpy as jnp
  >>> corner = jnp.array([[1.0, 0.0], [0.0, 0.0]])[..., None]
  >>> abs(rotate_images(corner, degrees=90.0)[..., 0]).round(3).tolist()
  [[0.0, 0.0], [1.0, 0.0]]

  Args:
    images: floating `[..., height, width, channels]`.
    degrees: scalar, counter-clockwise as one looks at row 0 on top; may be traced.

  Returns:
    As the images, in their dtype.

  Raises:
    ValueError: when images are not floating point with three axes at least, or `degrees` is no scalar.

  Reference: Ghifary, Kleijn, Zhang, Balduzzi, "Domain Generalization for Object Recognition with Multi-task
    Autoencoders", ICCV 2015, Rotated MNIST.
  """
  images = as_array("images", images)
  check_float("images", images)
  if images.ndim < 3:
    raise ValueError(f"images must be [..., height, width, channels], got shape {images.shape}.")
  check_hyperparameter("degrees", degrees, shape=())
  height, width = images.shape[-3:-1]
  dtype = jnp.promote_types(images.dtype, jnp.float32)
  angle = jnp.deg2rad(jnp.asarray(degrees, dtype))
  down = jnp.arange(height, dtype=dtype)[:, None] - (height - 1) / 2
  right = jnp.arange(width, dtype=dtype) - (width - 1) / 2
  # Where each pixel comes from: rotated the other way about.
  rows = jnp.cos(angle) * down + jnp.sin(angle) * right + (height - 1) / 2
  columns = jnp.cos(angle) * right - jnp.sin(angle) * down + (width - 1) / 2
  total = 0
  for row, row_weight in _neighbours(rows):
    for column, column_weight in _neighbours(columns):
      inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
      found = images[..., jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1), :].astype(dtype)
      total += jnp.where(inside, row_weight * column_weight, 0)[..., None] * found
  return total.astype(images.dtype)


def rotated_environments(
  key: jax.Array, images: ArrayLike, labels: ArrayLike, *, degrees: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Rotated MNIST: as many environments as angles, of different images, each rotated by its angle.

  >>> import jax, jax.numpy as jnp
  >>> images, labels = jnp.ones((13, 4, 4, 1)), jnp.arange(13)
  >>> rotated, digits = rotated_environments(jax.random.key(0), images, labels, degrees=jnp.arange(0.0, 90.0, 15.0))
  >>> rotated.shape, digits.shape
  ((6, 2, 4, 4, 1), (6, 2))

  Args:
    key: threefry key, which decides who comes into which environment.
    images: floating `[examples, height, width, channels]`.
    labels: integers `[examples]`.
    degrees: `[environments]`, as in `rotate_images`; may be traced.

  Returns:
    Images `[environments, examples // environments, height, width, channels]` and labels `[environments, …]`; what does
    not divide evenly is left out.

  Raises:
    ValueError: when shapes or dtypes do not fit or there are fewer images than environments.

  Reference: Ghifary et al., ICCV 2015, Rotated MNIST.
  """
  images, labels = _images_and_labels(images, labels)
  if images.ndim != 4:
    raise ValueError(f"images must be [examples, height, width, channels], got shape {images.shape}.")
  degrees = as_array("degrees", degrees)
  if degrees.ndim != 1 or not 0 < len(degrees) <= len(images):
    raise ValueError(f"degrees must be [environments], between one and one per image, got shape {degrees.shape}.")
  size = len(images) // len(degrees)
  order = jax.random.permutation(key, len(images))[: size * len(degrees)].reshape(-1, size)
  rotated = jax.vmap(lambda some, angle: rotate_images(some, degrees=angle))(images[order], degrees)
  return rotated, labels[order]


def imbalanced_environments(
  rng: np.random.Generator, labels: ArrayLike, *, fraction: float = 0.97, boundary: int = 5, official: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Two environments in which the classes of coloured MNIST have opposite frequencies.

  The first has `fraction` of the digits below `boundary` and the remaining fraction of the others, the second the rest.

  >>> first, second = imbalanced_environments(np.random.default_rng(0), np.repeat(np.arange(10), 20))
  >>> len(first), len(second)
  (100, 100)

  Args:
    rng: decides who comes into which environment.
    labels: integers `[examples]`, the digits, on the host.
    fraction: in [0, 1].
    boundary: digits below it are one class.
    official: whether fractions are taken of all examples rather than of those of a class, as the official scripts do:
      the first environment then has all digits below the boundary, and the second none.

  Returns:
    Two sorted integer arrays, the examples of each environment.

  Raises:
    ValueError: when labels are no integers `[examples]` or `fraction` lies outside [0, 1].

  Reference: Hemati, Zhang, Estiri, Chen, "Understanding Hessian Alignment for Domain Generalization", ICCV 2023, the
    scripts of imbalanced coloured MNIST.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or labels.dtype.kind not in "iu":
    raise ValueError(f"labels must be integers [examples], got shape {labels.shape} of dtype {labels.dtype}.")
  check_hyperparameter("fraction", fraction, low=0, high=1)
  first, second = [], []
  for members, share in ((labels < boundary, fraction), (labels >= boundary, 1 - fraction)):
    members = rng.permutation(np.flatnonzero(members))
    count = round(share * (len(labels) if official else len(members)))
    first.append(members[:count])
    second.append(members[count:])
  return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))


def _images_and_labels(images, labels):
  images, labels = as_array("images", images), as_array("labels", labels)
  check_float("images", images)
  if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != images.shape[:1]:
    raise ValueError(
      f"labels must be integers, one per image, got shape {labels.shape} of dtype {labels.dtype} for images of shape"
      f" {images.shape}."
    )
  return images, labels


def _neighbours(places):
  """The pixels before and after each place, and how much they count."""
  before = jnp.floor(places)
  part = places - before
  before = before.astype(jnp.int32)
  return (before, 1 - part), (before + 1, part)
