"""Making the training of any network lazier or richer: its output scale, and targets of graded difficulty."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = ["eigenvector_labels", "lazy_learning_rate", "lazy_output"]


def lazy_output(apply_fn: Callable, initial_params, *, output_scale: ArrayLike) -> Callable:
  """The network `a (f(x; theta) - f(x; theta_0))`: exactly zero at the start, and lazier the larger the scale `a`.

  With the step of `lazy_learning_rate` its early dynamics does not depend on the scale; for large `a` it stays kernel
  regression with the initial neural tangent kernel, for small `a` it learns features.

  >>> import jax.numpy as jnp
  >>> network = lambda params, x: x @ params
  >>> scaled = lazy_output(network, jnp.array([1.0, 0.0]), output_scale=4.0)
  >>> scaled(jnp.array([1.5, 1.0]), jnp.array([[1.0, 2.0]])).tolist()
  [10.0]

  Args:
    apply_fn: `(params, *inputs) -> outputs`, for example of a Flax module.
    initial_params: the parameters at the start of training.
    output_scale: positive `a`; may be traced.

  Returns:
    A function like `apply_fn`.

  Raises:
    ValueError: when `output_scale` is not positive.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the output scale; Chizat, Oyallon, Bach, "On Lazy Training in Differentiable Programming", NeurIPS 2019.
  """
  check_hyperparameter("output_scale", output_scale, low=0, open_low=True)

  def scaled(params, *inputs, **options):
    now, before = (apply_fn(values, *inputs, **options) for values in (params, initial_params))
    return jax.tree.map(lambda a, b: (output_scale * (a - b)).astype(a.dtype), now, before)

  return scaled


def lazy_learning_rate(learning_rate: ArrayLike, *, output_scale: ArrayLike) -> jax.Array:
  """The step size `eta / a^2`, with which the early dynamics of outputs does not depend on the output scale `a`.

  >>> float(lazy_learning_rate(1.0, output_scale=4.0))
  0.0625

  Args:
    learning_rate: non-negative `eta`, the step size at scale 1; may be traced.
    output_scale: positive `a`; may be traced.

  Returns:
    Scalar (or array, broadcast).

  Raises:
    ValueError: when an argument lies outside its domain.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the step size of its experiments with an output scale.
  """
  check_hyperparameter("learning_rate", learning_rate, low=0)
  check_hyperparameter("output_scale", output_scale, low=0, open_low=True)
  return jnp.asarray(learning_rate) / jnp.square(output_scale)


def eigenvector_labels(kernel: ArrayLike, *, index: ArrayLike) -> jax.Array:
  """Targets that are an eigenvector of the kernel matrix, the `index`-th from the largest eigenvalue.

  The first is learned at once, an intermediate one after a delay by learning features, a late one never. Scaled to mean
  square 1; its sign is arbitrary.

  >>> import jax.numpy as jnp
  >>> labels = eigenvector_labels(jnp.array([[2.0, 0.0], [0.0, 5.0]]), index=0)
  >>> [round(abs(float(label)), 3) for label in labels]
  [0.0, 1.414]

  Args:
    kernel: floating, symmetric `[n, n]`.
    index: in [0, n), 0 for the largest eigenvalue; may be traced.

  Returns:
    `[n]`, in float32 at least.

  Raises:
    ValueError: when `kernel` is not a square matrix or `index` lies outside its domain.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the experiment with eigenvectors of the initial kernel as labels.
  """
  check_float("kernel", kernel)
  if jnp.ndim(kernel) != 2 or kernel.shape[0] != kernel.shape[1]:
    raise ValueError(f"kernel must be a square matrix, got shape {jnp.shape(kernel)}.")
  size = kernel.shape[0]
  check_hyperparameter("index", index, low=0, high=size - 1)
  vectors = jnp.linalg.eigh(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))[1]
  return jnp.take(vectors, size - 1 - index, axis=1) * size**0.5
