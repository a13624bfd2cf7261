"""Diagnostics of lazy and rich training: how a kernel fits its task, how far weights move, when a run generalises."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape
from jaxreg.metrics.norms import scaled

__all__ = ["GrokkingGap", "grokking_gap", "kernel_alignment", "kernel_difficulty", "relative_motion"]


class GrokkingGap(NamedTuple):
  """When a run fits and when it generalises; each `[...]`, in the unit of its steps.

  Attributes:
    fitted_at: first recorded step with a small training loss, infinite if there is none.
    generalized_at: first recorded step from which on the test loss stays small, infinite if it ends large.
    gap: the difference; NaN where both are infinite.
  """

  fitted_at: jax.Array
  generalized_at: jax.Array
  gap: jax.Array


def kernel_alignment(kernel: ArrayLike, targets: ArrayLike) -> jax.Array:
  """Alignment of a kernel with its task, `y^T K y / (||K||_F ||y||^2)`: 1 if `K` is proportional to `y y^T`.

  For several outputs it is `<K, Y Y^T> / (||K||_F ||Y Y^T||_F)`. Nothing is centred. Evaluate the kernel on inputs that
  are not trained on. Defined as 0 where kernel or targets are zero.

  >>> import jax.numpy as jnp
  >>> round(float(kernel_alignment(jnp.eye(4), jnp.array([1.0, -1.0, 1.0, 1.0]))), 3)
  0.5

  Args:
    kernel: floating `[n, n]`.
    targets: floating `[n]` or `[n, outputs]`.

  Returns:
    Scalar in [-1, 1], float32 (float64 for float64 input).

  Raises:
    ValueError: when shapes do not fit.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the "centred kernel alignment" (printed once without the square of `||y||`).
  """
  kernel, targets = _check_kernel(kernel, targets)
  (kernel, _), (targets, _) = scaled(kernel), scaled(targets)  # a scale-free result
  product = lambda a, b: jnp.matmul(a, b, precision="highest")
  squares = jnp.sum(kernel**2) * jnp.sum(product(targets.T, targets) ** 2)
  inner = jnp.sum(targets * product(kernel, targets))
  zero = squares == 0
  return jnp.where(zero, 0, inner / jnp.sqrt(jnp.where(zero, 1, squares)))


def kernel_difficulty(kernel: ArrayLike, targets: ArrayLike, *, ridge: ArrayLike = 0.0) -> jax.Array:
  """Difficulty of a task for a kernel, `y^T (K + ridge I)^-1 y`, summed over outputs.

  It is the squared distance that lazily trained parameters move to fit the targets (for a kernel normalised by
  `N / a^2`, in units of `a^2 / N` of the output scale `a` and width `N`).

  >>> import jax.numpy as jnp
  >>> float(kernel_difficulty(jnp.array([[4.0, 0.0], [0.0, 1.0]]), jnp.array([2.0, 1.0])))
  2.0

  Args:
    kernel: floating, symmetric and positive definite once the ridge is added, `[n, n]`.
    targets: floating `[n]` or `[n, outputs]`.
    ridge: non-negative; may be traced.

  Returns:
    Scalar, float32 (float64 for float64 input); NaN where the matrix is not positive definite.

  Raises:
    ValueError: when shapes do not fit or `ridge` is negative.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the difficulty of a task.
  """
  kernel, targets = _check_kernel(kernel, targets)
  check_hyperparameter("ridge", ridge, low=0)
  # A solver reads one triangle only; the gradient should not depend on which.
  matrix = (kernel + kernel.T) / 2 + ridge * jnp.eye(kernel.shape[0], dtype=kernel.dtype)
  return jnp.sum(targets * jax.scipy.linalg.solve(matrix, targets, assume_a="pos"))


def relative_motion(params, initial_params) -> jax.Array:
  """How far training moved the weights, `||theta - theta_0|| / ||theta_0||` over all tensors: small when lazy.

  >>> import jax.numpy as jnp
  >>> float(relative_motion({"w": jnp.array([4.0, 4.0])}, {"w": jnp.array([4.0, 0.0])}))
  1.0

  Args:
    params: pytree of floating arrays.
    initial_params: pytree of the same structure and shapes, not all zero.

  Returns:
    Scalar, float32 (float64 for float64 tensors); zero where all initial weights are zero.

  Raises:
    ValueError: when shapes differ or a tensor is not floating point.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the distance from initialisation; Chizat, Oyallon, Bach, "On Lazy Training in Differentiable
    Programming", NeurIPS 2019.
  """

  structure = jax.tree.structure(params)
  if jax.tree.structure(initial_params) != structure:
    raise ValueError(
      f"initial_params must be structured like params, {structure}, got {jax.tree.structure(initial_params)}."
    )
  moved = start = 0
  for now, before in zip(jax.tree.leaves(params), jax.tree.leaves(initial_params), strict=True):
    check_float("params", now)
    check_same_shape(params=now, initial_params=before)
    dtype = jnp.promote_types(jnp.result_type(now, before), jnp.float32)
    now, before = now.astype(dtype), before.astype(dtype)
    moved, start = moved + jnp.sum(jnp.square(now - before)), start + jnp.sum(jnp.square(before))
  zero = (moved == 0) | (start == 0)
  return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, moved) / jnp.where(zero, 1, start)))


def grokking_gap(
  steps: ArrayLike,
  train_losses: ArrayLike,
  test_losses: ArrayLike,
  *,
  train_fraction: ArrayLike = 0.1,
  test_fraction: ArrayLike = 0.3,
) -> GrokkingGap:
  """The delay between fitting and generalising, from recorded losses rather than accuracies.

  A run has fitted when its training loss first falls to `train_fraction` of its first value, and generalises after its
  test loss last exceeds `test_fraction` of its first value. Thresholds on accuracy manufacture delays in regression.

  >>> import jax.numpy as jnp
  >>> train, test = jnp.array([1.0, 0.05, 0.01, 0.0]), jnp.array([1.0, 1.2, 0.9, 0.2])
  >>> [float(time) for time in grokking_gap(jnp.array([0, 10, 100, 1000]), train, test)]
  [10.0, 1000.0, 990.0]

  Args:
    steps: `[evaluations]`, increasing, at which losses were recorded, the first of them before training.
    train_losses: floating `[..., evaluations]`.
    test_losses: floating `[..., evaluations]`.
    train_fraction: in (0, 1); may be traced.
    test_fraction: in (0, 1); may be traced.

  Returns:
    Times in float32 at least.

  Raises:
    ValueError: when shapes do not fit or a fraction lies outside its domain.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024 (the thresholds are this library's).
  """
  check_float("train_losses", train_losses)
  check_float("test_losses", test_losses)
  check_same_shape(train_losses=train_losses, test_losses=test_losses)
  shape = jnp.shape(train_losses)[-1:]
  if jnp.ndim(steps) != 1 or jnp.shape(steps) != shape:
    raise ValueError(f"steps must be like the last axis of train_losses, expected {shape}, got {jnp.shape(steps)}.")
  for name, value in (("train_fraction", train_fraction), ("test_fraction", test_fraction)):
    check_hyperparameter(name, value, low=0, high=1, open_low=True, open_high=True)
  times = jnp.asarray(steps, jnp.promote_types(jnp.result_type(train_losses), jnp.float32))
  # In float32, so that the fractions are not rounded to a narrower dtype.
  train_losses, test_losses = (jnp.asarray(losses, times.dtype) for losses in (train_losses, test_losses))
  fitted = train_losses <= train_fraction * train_losses[..., :1]
  large = ~(test_losses <= test_fraction * test_losses[..., :1])  # NaN is not small
  fitted_at = jnp.min(jnp.where(fitted, times, jnp.inf), axis=-1)
  after = jnp.append(times[1:], jnp.inf)
  generalized_at = jnp.max(jnp.where(large, after, times[0]), axis=-1)
  return GrokkingGap(fitted_at, generalized_at, generalized_at - fitted_at)


def _check_kernel(kernel, targets):
  check_float("kernel", kernel)
  check_float("targets", targets)
  if jnp.ndim(kernel) != 2 or kernel.shape[0] != kernel.shape[1]:
    raise ValueError(f"kernel must be a square matrix, got shape {jnp.shape(kernel)}.")
  size = kernel.shape[0]
  if jnp.ndim(targets) not in (1, 2) or targets.shape[0] != size:
    raise ValueError(f"targets must be [{size}] or [{size}, outputs], as the kernel is, got {jnp.shape(targets)}.")
  dtype = jnp.promote_types(jnp.result_type(kernel, targets), jnp.float32)
  targets = targets.astype(dtype)
  return kernel.astype(dtype), targets[:, None] if targets.ndim == 1 else targets
