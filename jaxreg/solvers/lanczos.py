"""Lanczos vectors of a symmetric operator, its Ritz pairs, and right-hand sides made of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.norms import safe_norm

__all__ = ["LanczosResult", "lanczos_decomposition", "ritz_pairs", "ritz_right_hand_sides"]


class LanczosResult(NamedTuple):
  """Orthonormal vectors `Q` and the tridiagonal matrix `T = Q A Q^T`."""

  vectors: jax.Array  # Q, [steps, ...]
  diagonal: jax.Array  # [steps]
  subdiagonal: jax.Array  # [steps - 1]


def lanczos_decomposition(
  matvec: Callable, start: ArrayLike, *, steps: int, reorthogonalize: bool = True
) -> LanczosResult:
  """Lanczos vectors: an orthonormal basis of the span of `start`, `A start`, `A^2 start`, … that makes A tridiagonal.

  >>> import jax.numpy as jnp
  >>> result = lanczos_decomposition(lambda v: jnp.array([1.0, 2.0, 3.0]) * v, jnp.ones(3), steps=2)
  >>> [round(value, 3) for value in result.diagonal.tolist()], result.vectors.shape
  ([2.0, 2.0], (2, 3))

  Args:
    matvec: static; `[...]` to `A` times it, `A` symmetric.
    start: floating `[...]`, any shape.
    steps: static, the number of vectors, at most the size of `start`. If the span is smaller, the vectors beyond it are
      zero; all of them for a `start` of zeros.
    reorthogonalize: static; whether every vector is made orthogonal to all before it, twice. Without it, rounding
      brings copies of the eigenvectors that were found first.

  Returns:
    LanczosResult.

  Raises:
    ValueError: when `start` is not floating point or `steps` does not lie in [1, size].

  Reference: Lanczos, "An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential and
    Integral Operators", Journal of Research of the National Bureau of Standards 1950.
  """
  check_float("start", start)
  check_hyperparameter("steps", steps, low=1, high=jnp.size(start))
  dtype = jnp.promote_types(jnp.result_type(start), jnp.float32)
  wide = jnp.asarray(start, dtype)
  threshold = 10 * jnp.finfo(dtype).eps

  def body(carry, index):
    vectors, vector, before, beta = carry
    vectors = vectors.at[index].set(vector)
    image = matvec(vector.reshape(wide.shape)).reshape(-1).astype(dtype)
    alpha = jnp.vdot(image, vector)
    rest = image - alpha * vector - beta * before
    if reorthogonalize:
      for _ in range(2):
        rest = rest - vectors.T @ (vectors @ rest)
    norm = safe_norm(rest)
    exhausted = norm <= threshold * safe_norm(image)
    beta = jnp.where(exhausted, 0, norm)
    following = jnp.where(exhausted, 0, rest / jnp.where(exhausted, 1, norm))
    return (vectors, following, vector, beta), (alpha, beta)

  flat = wide.reshape(-1)
  length = safe_norm(flat)
  first = (
    jnp.zeros((steps, flat.size), dtype),
    flat / jnp.where(length == 0, 1, length),
    jnp.zeros_like(flat),
    jnp.zeros((), dtype),
  )
  (vectors, *_), (diagonal, beyond) = jax.lax.scan(body, first, jnp.arange(steps))
  return LanczosResult(vectors.reshape(steps, *wide.shape), diagonal, beyond[:-1])


def ritz_pairs(result: LanczosResult) -> tuple[jax.Array, jax.Array]:
  """Approximate eigenvalues and eigenvectors of `A`: those of `T`, carried back by the Lanczos vectors.

  >>> import jax.numpy as jnp
  >>> result = lanczos_decomposition(lambda v: jnp.array([1.0, 2.0, 3.0]) * v, jnp.ones(3), steps=3)
  >>> [round(value, 3) for value in ritz_pairs(result)[0].tolist()]
  [1.0, 2.0, 3.0]

  Args:
    result: of `lanczos_decomposition`.

  Returns:
    Values in ascending order `[steps]`, vectors of norm 1 `[steps, ...]`.

  Reference: Lanczos, "An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential and
    Integral Operators", Journal of Research of the National Bureau of Standards 1950.
  """
  off = result.subdiagonal
  values, vectors = jnp.linalg.eigh(jnp.diag(result.diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
  return values, jnp.tensordot(vectors.T, result.vectors, 1)


def ritz_right_hand_sides(
  key: jax.Array,
  values: ArrayLike,
  vectors: ArrayLike,
  *,
  count: int,
  extra: int = 0,
  low_scale: ArrayLike = 9.0,
  smallest: ArrayLike = 1e-8,
) -> jax.Array:
  """Random combinations of Ritz vectors, of norm 1, with larger coefficients for the lower half of the spectrum.

  Coefficients are normal, of deviation `low_scale` for the lowest `m / 2 + extra` of the vectors that are kept and 1
  for the others. Vectors with Ritz values below `smallest`, those of a null space, are not used.

  >>> import jax, jax.numpy as jnp
  >>> sides = ritz_right_hand_sides(jax.random.key(0), jnp.array([0.0, 1.0]), jnp.eye(2), count=3)
  >>> jnp.abs(sides).tolist()
  [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]

  Args:
    key: threefry key.
    values: Ritz values in ascending order, floating `[m]`.
    vectors: Ritz vectors, floating `[m, ...]`.
    count: static, the number of right-hand sides.
    extra: theta, how many vectors more than half of them are emphasised; may be traced.
    low_scale: non-negative, how much they are; may be traced.
    smallest: Ritz values below it are dropped; may be traced.

  Returns:
    `[count, ...]`.

  Raises:
    ValueError: when `values` are not one per vector or a hyperparameter is outside its domain.

  Reference: Kaneda, Akar, Chen, Kala, Hyde, Teran, "A Deep Conjugate Direction Method for Iteratively Solving Linear
    Systems", ICML 2023, the training set (Section 5.2).
  """
  check_float("values", values)
  check_float("vectors", vectors)
  check_hyperparameter("count", count, low=1)
  check_hyperparameter("low_scale", low_scale, low=0)
  if jnp.shape(values) != jnp.shape(vectors)[:1]:
    raise ValueError(f"values must have the shape {jnp.shape(vectors)[:1]}, one per vector, got {jnp.shape(values)}.")
  kept = values >= smallest
  rank = jnp.cumsum(kept) - 1
  scale = kept * jnp.where(rank < values.size // 2 + extra, low_scale, 1).astype(vectors.dtype)
  coefficients = scale * jax.random.normal(key, (count, values.size), vectors.dtype)
  sides = jnp.tensordot(coefficients, vectors, 1)
  norms = jnp.sqrt(jnp.sum(jnp.square(sides), axis=tuple(range(1, sides.ndim)), keepdims=True))
  return sides / norms
