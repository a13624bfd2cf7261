"""One-sided alignment of two gradients: what contradicts the reference in the other one is projected out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.checks import check_same_shape
from jaxreg.transforms.orthogonal_gradient import inner_product, scaled_tensors

__all__ = ["align_gradients", "aligned_value_and_grad"]


def align_gradients(reference: Any, other: Any, *, within: Any = None) -> Any:
  """The sum of two gradients, of which `other` first loses its component against `reference`.

  `g1 + g2 - min(<g1, g2>, 0) / ||g1||^2 g1`, with inner product and norm over the whole tree as one vector. Where the
  gradients conflict, the result g has `<g, g1> = ||g1||^2`: the reference decreases to first order as it would alone.
  Otherwise g is the plain sum. Only the other gradient is changed, which is not symmetric as PCGrad is.

  Under `pmap` or `shard_map` average both over the devices first. Decay the weights after this, in the optimizer.

  >>> import jax.numpy as jnp
  >>> against, along = jnp.array([-3.0, 1.0]), jnp.array([3.0, 1.0])
  >>> [align_gradients(jnp.array([2.0, 0.0]), other).tolist() for other in (against, along)]
  [[2.0, 1.0], [5.0, 1.0]]

  Args:
    reference: g1, a tree of floating arrays; zeros (or nothing) change nothing.
    other: g2, a tree of the same structure and shapes.
    within: a tree of booleans of that structure (or a prefix of it), the arrays over which inner product, norm and
      projection run; the others are added. By default all: with heads that only one of the gradients reaches, the
      inner product is then the backbone's alone and the norm is not, as in the official code.

  Returns:
    The combined gradient; each array in the dtype that the sum has.

  Raises:
    ValueError: when structures or shapes differ.

  Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an
    Auxiliary Head", KDD 2025, the gradient alignment (as in the official code).
  """
  leaves, structure = jax.tree.flatten(reference)
  if structure != jax.tree.structure(other):
    raise ValueError(f"other must have the structure of reference, {structure}, got {jax.tree.structure(other)}.")
  others = jax.tree.leaves(other)
  for one, two in zip(leaves, others):
    check_same_shape(reference=one, other=two)
  try:
    inside = jax.tree.leaves(jax.tree.broadcast(True if within is None else within, reference))
  except ValueError as error:
    raise ValueError(f"within must be a tree of booleans like reference or a prefix of it, got {within}.") from error
  chosen = [index for index, is_inside in enumerate(inside) if is_inside]
  combined = [one + two for one, two in zip(leaves, others)]
  if not chosen:
    return structure.unflatten(combined)
  # Divided by their largest entries, so that squares of tiny and of huge gradients stay inside the range.
  first, _ = scaled_tensors([leaves[index] for index in chosen])
  second, size = scaled_tensors([others[index] for index in chosen])
  inner, squared = inner_product(first, second), inner_product(first, first)
  share = -inner * size / jnp.where(squared == 0, 1, squared)
  for place, index in enumerate(chosen):
    projected = (combined[index] + share * first[place]).astype(combined[index].dtype)
    combined[index] = jnp.where((inner >= 0) | (squared == 0), combined[index], projected)
  return structure.unflatten(combined)


def aligned_value_and_grad(
  losses: Callable, *, align: bool = True, within: Callable | None = None, has_aux: bool = False
) -> Callable:
  """Two losses and their aligned gradient, from one forward pass that is pulled back twice.

  Both gradients belong to the same dropout mask and batch statistics.

  >>> import jax.numpy as jnp
  >>> losses = lambda params: (2 * params["a"], params["b"] - 3 * params["a"])
  >>> (label_loss, teacher_loss), gradient = aligned_value_and_grad(losses)({"a": jnp.ones(()), "b": jnp.ones(())})
  >>> label_loss.item(), teacher_loss.item(), gradient["a"].item(), gradient["b"].item()
  (2.0, -2.0, 2.0, 1.0)

  Args:
    losses: `(params, *arguments) -> (reference, other)`, two floating scalars, or with `has_aux` a pair of those two
      and anything else.
    align: static; False adds the gradients.
    within: `params -> tree of booleans`, see `align_gradients`.
    has_aux: static; whether `losses` returns more.

  Returns:
    `(params, *arguments) -> ((reference, other), gradient)`, or `(((reference, other), aux), gradient)` with `has_aux`.

  Raises:
    ValueError: when `losses` does not return two scalars.

  Reference: Yang et al., KDD 2025, the gradient alignment.
  """

  def value_and_grad(params, *arguments):
    function = lambda params: losses(params, *arguments)
    values, pullback, *aux = jax.vjp(function, params, has_aux=has_aux)
    if len(values) != 2 or any(jnp.shape(value) for value in values):
      raise ValueError(f"losses must return two scalars, got shapes {[jnp.shape(value) for value in values]}.")
    # In turn: not every backward pass can be vectorised.
    one, zero = ([jnp.full_like(value, number) for value in values] for number in (1, 0))
    (reference,), (other,) = pullback((one[0], zero[1])), pullback((zero[0], one[1]))
    if align:
      gradient = align_gradients(reference, other, within=None if within is None else within(params))
    else:
      gradient = jax.tree.map(jnp.add, reference, other)
    return ((values, aux[0]) if has_aux else values), gradient

  return value_and_grad
