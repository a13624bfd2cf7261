"""The sum of the norms of a model's tensors, each not squared."""

import jax
import jax.numpy as jnp

from jaxreg.checks import check_float
from jaxreg.metrics.norms import safe_norm

__all__ = ["unsquared_norm_penalty"]


def unsquared_norm_penalty(params) -> jax.Array:
  """The sum of the Euclidean norms of all tensors, `sum_p ||p||_2`, with gradient `p / ||p||_2` and 0 at zero.

  This is a group lasso whose groups are whole tensors; the official code adds it, of all parameters with biases and
  normalization scales among them, where weight decay (the norms squared) might be expected.

  >>> import jax.numpy as jnp
  >>> float(unsquared_norm_penalty({"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([2.0, 0.0])}))
  7.0

  Args:
    params: pytree of floating arrays.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when a leaf is not floating point.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by
    Self-Distillation", NeurIPS 2021, the norm penalty of the official code.
  """
  return sum((_norm(leaf) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


def _norm(leaf):
  check_float("params", leaf)
  return safe_norm(leaf)
