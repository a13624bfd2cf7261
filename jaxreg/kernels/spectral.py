"""Products of functions of symmetric matrices with vectors, `f(A) x`, with derivatives also at equal eigenvalues.

Eigenvectors have no derivative at equal eigenvalues, and a noisy one at close eigenvalues; smooth functions of the
matrix have one everywhere. With `A = V diag(l) V^T` and a change E of the matrix it is `V (F * (V^T E V)) V^T`, with
the divided differences `F_ij = (f(l_i) - f(l_j)) / (l_i - l_j)`, or `f'(l_i)` at equal eigenvalues.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxreg.metrics.polynomials import horner

__all__ = []

_dot = functools.partial(jnp.matmul, precision="highest")


def apply_function(function, matrix, values, vectors, x, *parameters):
  """`f(A) x` for `x` `[n]` or `[n, m]`, with first and second derivatives in all arrays.

  Args:
    function: static; `(values, *parameters) -> f(values)`, elementwise.
    matrix: A, `[n, n]`, symmetric; all derivatives in it are those in its symmetric part.
    values: its eigenvalues, `[n]`; taken as constant. They may differ from those of A by rounding.
    vectors: its eigenvectors, `[n, n]`; taken as constant.
    x: `[n]` or `[n, m]`.
    *parameters: scalars.
  """
  values, vectors = jax.lax.stop_gradient((values, vectors))
  parameters = tuple(jnp.asarray(parameter, values.dtype) for parameter in parameters)
  return _program(function, matrix, values, vectors, x, *parameters)


@functools.partial(jax.jit, static_argnums=0)  # else derivatives would compute array by array
def _program(function, matrix, values, vectors, x, *parameters):
  return _apply(function, matrix, values, vectors, x, *parameters)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _apply(function, matrix, values, vectors, x, *parameters):
  return _dot(vectors, _scale_rows(function(values, *parameters), _dot(vectors.T, x)))


def _scale_rows(scales, rows):
  return (scales * rows.T).T


@functools.partial(_apply.defjvp, symbolic_zeros=True)
def _apply_jvp(function, primals, tangents):
  matrix, values, vectors, x, *parameters = primals
  change, _, _, x_change, *parameter_changes = tangents
  constants = (values, vectors, *parameters)
  rotate = lambda inner: _dot(vectors, inner)
  along = _dot(vectors.T, x)
  total = jnp.zeros_like(x)
  if not isinstance(change, SymbolicZero):
    total = total + rotate(_dot(_change(function, matrix, constants, change), along))
  if not isinstance(x_change, SymbolicZero):
    rotated = _dot(vectors.T, x_change)
    first = _zero_with_derivative(_first_order, function, matrix, *constants)
    total = total + rotate(_scale_rows(function(values, *parameters), rotated) + _dot(first, rotated))
  for place, parameter_change in enumerate(parameter_changes):
    if not isinstance(parameter_change, SymbolicZero):
      slope = _Slope(function, place)
      first = _zero_with_derivative(_first_order, slope, matrix, *constants)
      inner = _scale_rows(slope(values, *parameters), along) + _dot(first, along)
      total = total + parameter_change * rotate(inner)
  return _apply(function, *primals), total


class _Slope:
  """The derivative of a function in one of its parameters; equal ones compile once."""

  def __init__(self, function, place):
    self.key = function, place

  def __eq__(self, other):
    return isinstance(other, _Slope) and self.key == other.key

  def __hash__(self):
    return hash(self.key)

  def __call__(self, values, *parameters):
    function, place = self.key
    of = lambda parameter: function(values, *parameters[:place], parameter, *parameters[place + 1 :])
    return jax.jvp(of, (parameters[place],), (jnp.ones_like(parameters[place]),))[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _zero_with_derivative(derivative, function, matrix, *constants):
  """Zeros that have a derivative in the matrix: what a higher derivative needs is not computed for a lower one."""
  shape = jax.eval_shape(functools.partial(derivative, function), matrix, *constants).shape
  # They depend on all arguments: `vmap` over one of them then finds an axis in the zeros as well as in the derivative.
  zeros = (jnp.where(jnp.isnan(jnp.ravel(array)[0]), 0, 0) for array in (matrix, *constants))
  return jnp.broadcast_to(sum(zeros).astype(matrix.dtype), shape)


@_zero_with_derivative.defjvp
def _zero_jvp(derivative, function, primals, tangents):
  return _zero_with_derivative(derivative, function, *primals), derivative(function, tangents[0], *primals[1:])


def _inside(change, vectors):
  """`V^T E V` of the symmetric part of a change."""
  inside = _dot(vectors.T, _dot(change, vectors))
  return (inside + inside.T) / 2


def _first_order(function, change, values, vectors, *parameters):
  return divided_differences(lambda x: function(x, *parameters), values) * _inside(change, vectors)


def _second_order(function, change, values, vectors, *parameters):
  """`[i, j, k]`: what the next change's entry `[j, k]` is multiplied by in entry `[i, k]`."""
  differences = second_divided_differences(lambda x: function(x, *parameters), values)
  return differences * _inside(change, vectors)[:, :, None]


def _change(function, matrix, constants, change):
  """The change of `V^T f(A) V` with one of A, first order, and differentiable in A."""
  values, vectors, *parameters = constants

  @jax.checkpoint  # no array with three axes is kept for reverse mode
  def more(matrix, constants, inside):
    second = _zero_with_derivative(_second_order, function, matrix, *constants)
    # Not by einsum: sums of products with zeros cost nothing once XLA has seen them.
    return jnp.sum(second * inside[None], 1) + jnp.sum(second.transpose(2, 1, 0) * inside[:, :, None], 1)

  inside = _inside(change, vectors)
  return divided_differences(lambda x: function(x, *parameters), values) * inside + more(matrix, constants, inside)


def divided_differences(function, values):
  """`(f(x_i) - f(x_j)) / (x_i - x_j)` of all pairs, `f'(x_i)` at equal values.

  At close values the derivative is averaged between them, by two points of Gauss: each entry is the one of the two
  forms whose error is smaller, which is estimated from rounding and from the average by one point.
  """
  at = function(values)
  slope = lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]
  gap = values - values[:, None]
  middle, half = (values + values[:, None]) / 2, gap / 12**0.5
  close = (slope(middle - half) + slope(middle + half)) / 2
  equal = gap == 0
  safe = jnp.where(equal, 1, gap)
  rounding = 4 * jnp.finfo(values.dtype).eps * jnp.maximum(jnp.abs(at), jnp.abs(at[:, None]))
  use_close = equal | (jnp.abs(close - slope(middle)) <= jnp.abs(rounding / safe))
  return jnp.where(use_close, close, (at - at[:, None]) / safe)


def second_divided_differences(function, values):
  """`f[x_i, x_j, x_k]` of all triples, by the two values that are farthest apart; `f''(x) / 2` where all are close."""
  first = divided_differences(function, values)
  slope = lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]
  half = jax.jvp(slope, (values,), (jnp.ones_like(values),))[1] / 2
  ends = lambda array: (array[:, None, None], array[None, :, None], array[None, None, :])
  i, j, k = ends(values)
  pairs = first[:, :, None], first[:, None, :], first[None]  # ij, ik, jk
  ij, ik, jk = jnp.broadcast_arrays(*pairs)
  # (gap, difference of first differences) for the three choices of the two ends.
  gaps = jnp.stack(jnp.broadcast_arrays(k - i, k - j, j - i))
  rises = jnp.stack([jk - ij, ik - ij, jk - ik])
  widest = jnp.argmax(jnp.abs(gaps), 0)[None]
  gap, rise = (jnp.take_along_axis(array, widest, 0)[0] for array in (gaps, rises))
  equal = gap == 0
  curve = jnp.stack(jnp.broadcast_arrays(*ends(half)))
  # The first differences are right to about the fourth part of the digits.
  rounding = jnp.finfo(values.dtype).eps ** 0.75 * jnp.max(jnp.abs(jnp.stack([ij, ik, jk])), 0)
  safe = jnp.where(equal, 1, gap)
  use_close = equal | (jnp.max(curve, 0) - jnp.min(curve, 0) <= jnp.abs(rounding / safe))
  return jnp.where(use_close, jnp.mean(curve, 0), rise / safe)


@jax.custom_jvp
def aligned_eigh(matrix, columns):
  """Eigenvalues and eigenvectors of a symmetric matrix, and a basis of equal ones in which sums of squares are smooth.

  Where eigenvalues are equal the vectors are those in which the rows of `V^T columns` are orthogonal. A change of the
  matrix then rotates no vector of such a subspace, and derivatives of any `sum_i g(l_i) |v_i^T columns|^2` are right.
  """
  values, vectors = jnp.linalg.eigh(matrix)
  inside = _dot(vectors.T, columns)
  group = _groups(values)
  shared = jnp.where(group == group[:, None], _dot(inside, inside.T), 0)
  shared = shared / jnp.maximum(jnp.trace(shared), jnp.finfo(values.dtype).tiny)
  # The numbers of a group lie above all those of the group before, so that the order of the eigenvalues stays.
  rotation = jnp.linalg.eigh(shared + 2 * jnp.diag(group.astype(values.dtype)))[1]
  return _dot(jnp.square(rotation.T), values), _dot(vectors, rotation)


@aligned_eigh.defjvp
def _aligned_eigh_jvp(primals, tangents):
  values, vectors = aligned_eigh(*primals)
  inside = _inside(tangents[0], vectors)
  group = _groups(values)
  equal = group == group[:, None]
  rotation = jnp.where(equal, 0, inside / jnp.where(equal, 1, values - values[:, None]))
  return (values, vectors), (jnp.diagonal(inside), _dot(vectors, rotation))


def _groups(values):
  """The number of the group of equal eigenvalues, up to rounding, of each of them."""
  tolerance = 16 * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
  return jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), jnp.diff(values) > tolerance]))


def powers(base, complement, exponent):
  """`b^m` and `1 - b^m` for a whole number m and `c = 1 - b`; from c where it is small, beyond 1 signs alternate."""
  small = complement < 0.5
  log = exponent * jnp.log1p(-jnp.where(small, complement, 0.25))
  power = whole_power(jnp.where(small, 0.25, base), exponent)
  return jnp.where(small, jnp.exp(log), power), jnp.where(small, -jnp.expm1(log), 1 - power)


@jax.custom_jvp
def whole_power(base, exponent):
  """`b^m` for a whole number m of floating type, 1 for m < 0: with all derivatives in b also at 0, in m at b != 0."""
  return jax.lax.pow(*jnp.broadcast_arrays(base, jnp.maximum(exponent, 0)))


@whole_power.defjvp
def _whole_power_jvp(primals, tangents):
  base, exponent = primals
  power = whole_power(base, exponent)
  slope = exponent * whole_power(base, exponent - 1)
  log = jnp.log(jnp.where(base == 0, 1, jnp.abs(base)))
  return power, slope * tangents[0] + power * log * tangents[1]


def decayed_fraction(z):
  """`(1 - exp(-z)) / z` for z >= 0, smooth at 0."""
  small = z < 0.5
  safe = jnp.where(small, 1, z)
  return jnp.where(small, horner(jnp.where(small, z, 0), _DECAYED), -jnp.expm1(-safe) / safe)


def log_slope(u):
  """`-log(1 - u) / u` for 0 <= u <= 0.1, smooth at 0."""
  return horner(u, _LOG_SLOPE)


# Enough terms for float64.
_DECAYED = tuple((-1.0) ** k / math.factorial(k + 1) for k in range(14))
_LOG_SLOPE = tuple(1 / (k + 1) for k in range(17))
