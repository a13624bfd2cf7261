"""The neural tangent kernel of a finite network at given parameters, `T(x, x') = J(x) J(x')^T` with J its Jacobian."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array
from jaxreg.kernels.gram import tiled_gram

__all__ = ["empirical_ntk", "ntk_by_jacobians", "ntk_by_vector_products"]


def empirical_ntk(
  function: Callable,
  params: Any,
  inputs1: ArrayLike,
  inputs2: ArrayLike | None = None,
  *,
  tile: int | None = None,
  trace_axes: Sequence[int] = (),
  diagonal_axes: Sequence[int] = (),
) -> jax.Array:
  """The empirical tangent kernel, by the cheaper of Jacobian contraction and vector products.

  Contraction costs `2 outputs^2 parameters` operations a pair of inputs and stores Jacobians; products cost about three
  evaluations of the network per output and pair, and store one gradient. The counts are those of the compiler.

  >>> import jax.numpy as jnp
  >>> linear = lambda w, x: x @ w
  >>> empirical_ntk(linear, jnp.ones((2, 1)), jnp.array([[1.0, 2.0]])).tolist()
  [[[[5.0]]]]

  Args:
    function: static; `(params, inputs) -> [inputs, outputs]` or `[inputs]`, one example per row, independent of each
      other; the `apply` function of a Flax module, for example.
    params: parameters, a tree of arrays.
    inputs1: `[inputs1, ...]`.
    inputs2: `[inputs2, ...]`, or None for the symmetric kernel of `inputs1`.
    tile: static; number of inputs at a time on either side, to bound the memory; None for all.
    trace_axes: static; `(-1,)` for the mean over the outputs of the kernels of one output with itself, which in wide
      networks are all alike; `()` for none.
    diagonal_axes: static; `(-1,)` for these kernels one by one; `()` for kernels of all pairs of outputs.

  Returns:
    `[inputs1, inputs2, outputs, outputs]`; `[inputs1, inputs2, outputs]` with `diagonal_axes`; `[inputs1, inputs2]`
    with `trace_axes` or when the function gives one number per input; float32 at least.

  Raises:
    ValueError: when the function's result does not fit, or an axis is none of the outputs or is named twice.

  Reference: Novak, Sohl-Dickstein, Schoenholz, "Fast Finite Width Neural Tangent Kernel", ICML 2022, Sections 3.1, 3.2.
  """
  inputs1, inputs2 = _arrays(inputs1, inputs2)
  outputs = _outputs(function, params, inputs1)
  size = sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(params))
  axes = {"trace_axes": trace_axes, "diagonal_axes": diagonal_axes}
  pairs = (outputs or 1) ** (2 if _kept(outputs, **axes) == "ab" else 1)
  contraction = 2 * pairs * size
  products = 3 * (outputs or 1) * _operations(function, params, inputs1, size)
  method = ntk_by_jacobians if contraction <= products else ntk_by_vector_products
  if tile is None:
    return method(function, params, inputs1, inputs2, **axes)
  return tiled_gram(lambda x, y: method(function, params, x, y, **axes), inputs1, inputs2, tile=tile)


def _kept(outputs, trace_axes, diagonal_axes):
  """The axes of outputs that a kernel keeps: `ab` for all pairs, `a` for the diagonal, none for its mean."""
  for name, axes in (("trace_axes", trace_axes), ("diagonal_axes", diagonal_axes)):
    if tuple(axes) not in ((), (-1,), (1,)) or (tuple(axes) and outputs is None):
      allowed = "()" if outputs is None else "() or (-1,)"
      raise ValueError(f"{name} must be axes of the outputs, {allowed}, got {axes!r}.")
  if len(trace_axes) and len(diagonal_axes):
    raise ValueError("trace_axes and diagonal_axes must not name the same axis.")
  return "" if len(trace_axes) else "a" if len(diagonal_axes) else "ab"


def _arrays(inputs1, inputs2):
  """The inputs as JAX arrays, which a traced index may index."""
  return as_array("inputs1", inputs1), None if inputs2 is None else as_array("inputs2", inputs2)


def _outputs(function, params, inputs):
  """The number of outputs, None for a function with one number per input."""
  shape = jax.eval_shape(function, params, inputs).shape
  if len(shape) not in (1, 2) or shape[0] != len(inputs):
    raise ValueError(f"function must give [inputs, outputs] or [inputs] for {len(inputs)} inputs, got shape {shape}.")
  return shape[1] if len(shape) == 2 else None


def _operations(function, params, inputs, size):
  """Floating-point operations of one evaluation, by the compiler's count, or twice the parameters without one."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (params, inputs[:1]))
  analysis = jax.jit(function).lower(*shapes).cost_analysis()
  return analysis["flops"] if isinstance(analysis, dict) and analysis.get("flops", 0) > 0 else 2 * size


def ntk_by_jacobians(
  function: Callable,
  params: Any,
  inputs1: ArrayLike,
  inputs2: ArrayLike | None = None,
  *,
  trace_axes: Sequence[int] = (),
  diagonal_axes: Sequence[int] = (),
) -> jax.Array:
  """The empirical tangent kernel by contraction of Jacobians: best for few parameters or expensive networks.

  >>> import jax.numpy as jnp
  >>> ntk_by_jacobians(lambda w, x: x @ w, jnp.ones(2), jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
  [[5.0, 2.0], [2.0, 1.0]]

  Args:
    function: static; `(params, inputs) -> [inputs, outputs]` or `[inputs]`.
    params: parameters, a tree of arrays.
    inputs1: `[inputs1, ...]`.
    inputs2: `[inputs2, ...]`, or None for `inputs1` with itself.
    trace_axes: as in `empirical_ntk`.
    diagonal_axes: as in `empirical_ntk`.

  Returns:
    As `empirical_ntk`.

  Raises:
    ValueError: when the function's result does not fit, or an axis is none of the outputs or is named twice.

  Reference: Novak, Sohl-Dickstein, Schoenholz, "Fast Finite Width Neural Tangent Kernel", ICML 2022, Section 3.1.
  """
  inputs1, inputs2 = _arrays(inputs1, inputs2)
  outputs = _outputs(function, params, inputs1)
  kept = _kept(outputs, trace_axes, diagonal_axes)

  def jacobian(inputs):
    of = jax.vmap(jax.jacrev(lambda params, x: function(params, x[None])[0]), (None, 0))
    flat = lambda leaf: leaf.reshape((len(inputs), outputs or 1, -1)).astype(_dtype(leaf))
    return jax.tree.map(flat, of(params, inputs))

  first = jacobian(inputs1)
  second = first if inputs2 is None else jacobian(inputs2)
  form = "iap,jbp->ijab" if kept == "ab" else f"iap,jap->ij{kept}"
  products = jax.tree.map(lambda a, b: jnp.einsum(form, a, b, precision="highest"), first, second)
  kernel = sum(jax.tree.leaves(products))
  if not outputs:
    return kernel[..., 0, 0]
  return kernel if kept else kernel / outputs


def _dtype(leaf):
  return jnp.promote_types(leaf.dtype, jnp.float32)


def ntk_by_vector_products(
  function: Callable,
  params: Any,
  inputs1: ArrayLike,
  inputs2: ArrayLike | None = None,
  *,
  trace_axes: Sequence[int] = (),
  diagonal_axes: Sequence[int] = (),
) -> jax.Array:
  """The empirical tangent kernel by products: the gradient of one output, pushed forward through all other inputs.

  Best for many parameters or outputs; no Jacobian is stored.

  >>> import jax.numpy as jnp
  >>> ntk_by_vector_products(lambda w, x: x @ w, jnp.ones(2), jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
  [[5.0, 2.0], [2.0, 1.0]]

  Args:
    function: static; `(params, inputs) -> [inputs, outputs]` or `[inputs]`.
    params: parameters, a tree of arrays.
    inputs1: `[inputs1, ...]`.
    inputs2: `[inputs2, ...]`, or None for `inputs1` with itself.
    trace_axes: as in `empirical_ntk`.
    diagonal_axes: as in `empirical_ntk`.

  Returns:
    As `empirical_ntk`.

  Raises:
    ValueError: when the function's result does not fit, or an axis is none of the outputs or is named twice.

  Reference: Novak, Sohl-Dickstein, Schoenholz, "Fast Finite Width Neural Tangent Kernel", ICML 2022, Section 3.2.
  """
  inputs1, inputs2 = _arrays(inputs1, inputs2)
  outputs = _outputs(function, params, inputs1)
  kept = _kept(outputs, trace_axes, diagonal_axes)
  others = inputs1 if inputs2 is None else inputs2

  def row(index):
    example, output = index
    one = lambda params: function(params, inputs1[example][None])[0].reshape(-1)[output]
    gradient = jax.grad(one)(params)
    pushed = jax.jvp(lambda params: function(params, others), (params,), (gradient,))[1]
    pushed = pushed.astype(_dtype(pushed))
    return pushed if kept == "ab" else pushed[:, output]

  if not kept:  # a sum over outputs, of which one is held at a time
    every = lambda example: jax.lax.fori_loop(
      1, outputs, lambda output, total: total + row((example, output)), row((example, 0))
    )
    return jax.lax.map(every, np.arange(len(inputs1))) / outputs
  index = np.indices((len(inputs1), outputs or 1)).reshape(2, -1)
  rows = jax.lax.map(row, (index[0], index[1]))
  if not outputs:
    return rows
  if kept == "a":
    return jnp.swapaxes(rows.reshape(len(inputs1), outputs, len(others)), 1, 2)
  return jnp.swapaxes(rows.reshape(len(inputs1), outputs, len(others), outputs), 1, 2)
