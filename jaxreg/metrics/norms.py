"""Square roots and scales that are safe at zero, in value and gradient, and that let NaN pass as NaN."""

import jax
import jax.numpy as jnp

__all__ = []


def safe_sqrt(squared: jax.Array) -> jax.Array:
  """The square root with derivative 0 at 0; 0 below, where rounding may lead, and NaN of NaN."""
  zero = squared <= 0
  return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def scaled(array: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The array, float32 at least, divided by its largest absolute entry, and that entry: no square leaves the range.

  The entry is a constant of differentiation, on which a function of both does not depend; 1 for an array of zeros, of
  subnormal numbers, or with NaN, which stays in the array.
  """
  array = jnp.asarray(array)
  array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
  size = jax.lax.stop_gradient(jnp.max(jnp.abs(array), initial=0))
  size = jnp.where(size >= jnp.finfo(array.dtype).tiny, size, 1)
  return array / size, size


def safe_norm(array: jax.Array) -> jax.Array:
  """The Euclidean norm of all entries, float32 at least, with gradient 0 at 0."""
  array, size = scaled(array)
  return size * safe_sqrt(jnp.sum(jnp.square(array)))


def normalized_rows(array: jax.Array) -> jax.Array:
  """Vectors on the last axis, float32 at least, divided by their lengths; those of zeros, and the gradient, stay 0."""
  array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
  # Divided by the largest entry first, on which the result does not depend: no square leaves the range.
  size = jax.lax.stop_gradient(jnp.max(jnp.abs(array), axis=-1, keepdims=True, initial=0))
  array = array / jnp.where(size >= jnp.finfo(array.dtype).tiny, size, 1)
  squared = jnp.sum(jnp.square(array), axis=-1, keepdims=True)
  zero = squared == 0
  return array * jnp.where(zero, 0, jax.lax.rsqrt(jnp.where(zero, 1, squared)))
