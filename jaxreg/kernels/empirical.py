"""The neural tangent kernel of a finite network at given parameters, `T(x, x') = J(x) J(x')^T` with J its Jacobian."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array
from jaxreg.kernels.gram import tiled_gram

__all__ = ["empirical_ntk", "ntk_by_jacobians", "ntk_by_vector_products"]


def empirical_ntk(
  function: Callable, params: Any, inputs1: ArrayLike, inputs2: ArrayLike | None = None, *, tile: int | None = None
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

  Returns:
    `[inputs1, inputs2, outputs, outputs]`, or `[inputs1, inputs2]` when the function gives one number per input;
    float32 at least.

  Raises:
    ValueError: when the function's result does not fit.

  Reference: Novak, Sohl-Dickstein, Schoenholz, "Fast Finite Width Neural Tangent Kernel", ICML 2022, Sections 3.1, 3.2.
  """
  inputs1, inputs2 = _arrays(inputs1, inputs2)
  outputs = _outputs(function, params, inputs1)
  size = sum(int(np.prod(jnp.shape(leaf))) for leaf in jax.tree.leaves(params))
  contraction = 2 * (outputs or 1) ** 2 * size
  products = 3 * (outputs or 1) * _operations(function, params, inputs1, size)
  method = ntk_by_jacobians if contraction <= products else ntk_by_vector_products
  if tile is None:
    return method(function, params, inputs1, inputs2)
  return tiled_gram(lambda x, y: method(function, params, x, y), inputs1, inputs2, tile=tile)


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
  function: Callable, params: Any, inputs1: ArrayLike, inputs2: ArrayLike | None = None
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

  Returns:
    `[inputs1, inputs2, outputs, outputs]` or `[inputs1, inputs2]`, float32 at least.

  Raises:
    ValueError: when the function's result does not fit.

  Reference: Novak, Sohl-Dickstein, Schoenholz, "Fast Finite Width Neural Tangent Kernel", ICML 2022, Section 3.1.
  """
  inputs1, inputs2 = _arrays(inputs1, inputs2)
  outputs = _outputs(function, params, inputs1)

  def jacobian(inputs):
    of = jax.vmap(jax.jacrev(lambda params, x: function(params, x[None])[0]), (None, 0))
    flat = lambda leaf: leaf.reshape((len(inputs), outputs or 1, -1)).astype(_dtype(leaf))
    return jax.tree.map(flat, of(params, inputs))

  first = jacobian(inputs1)
  second = first if inputs2 is None else jacobian(inputs2)
  products = jax.tree.map(lambda a, b: jnp.einsum("iap,jbp->ijab", a, b, precision="highest"), first, second)
  kernel = sum(jax.tree.leaves(products))
  return kernel if outputs else kernel[..., 0, 0]


def _dtype(leaf):
  return jnp.promote_types(leaf.dtype, jnp.float32)


def ntk_by_vector_products(
  function: Callable, params: Any, inputs1: ArrayLike, inputs2: ArrayLike | None = None
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

  Returns:
    `[inputs1, inputs2, outputs, outputs]` or `[inputs1, inputs2]`, float32 at least.

  Raises:
    ValueError: when the function's result does not fit.

  Reference: Novak, Sohl-Dickstein, Schoenholz, "Fast Finite Width Neural Tangent Kernel", ICML 2022, Section 3.2.
  """
  inputs1, inputs2 = _arrays(inputs1, inputs2)
  outputs = _outputs(function, params, inputs1)
  others = inputs1 if inputs2 is None else inputs2

  def row(index):
    example, output = index
    one = lambda params: function(params, inputs1[example][None])[0].reshape(-1)[output]
    gradient = jax.grad(one)(params)
    pushed = jax.jvp(lambda params: function(params, others), (params,), (gradient,))[1]
    return pushed.astype(_dtype(pushed))

  index = np.indices((len(inputs1), outputs or 1)).reshape(2, -1)
  rows = jax.lax.map(row, (index[0], index[1]))
  if not outputs:
    return rows
  return jnp.swapaxes(rows.reshape(len(inputs1), outputs, len(others), outputs), 1, 2)
