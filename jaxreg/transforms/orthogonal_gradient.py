"""Orthogonal gradients (perpGrad, OrthoGrad): a step without the component that only rescales the weights."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, check_updates

__all__ = ["orthogonal", "orthogonalize_gradients"]


def orthogonalize_gradients(
  *,
  per_leaf: bool = True,
  renormalize: bool = True,
  eps: ArrayLike = 1e-30,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Removes from the gradient its component along the weights, `o = g - <w, g> / (<w, w> + eps) w`.

  With `renormalize` the result is `o ||g|| / (||o|| + eps)`, which keeps the gradient's length. Chain it before the
  base optimizer. Where a tensor is zero its gradient passes unchanged. Where gradient and weights are parallel, `o` is
  rounding noise that `renormalize` blows up to full size (or zero in a tensor of one element): leave biases, scales and
  scalars out with `optax.masked`. Weight decay in the base optimizer moves the weights radially again.

  Sums are taken over entries divided by the largest, so that gradients far below 1e-19, whose squares a float32 cannot
  hold, keep their direction and size.

  >>> import jax, jax.numpy as jnp, optax
  >>> tx = optax.chain(orthogonalize_gradients(), optax.sgd(0.1))
  >>> params = {"w": jnp.array([3.0, 4.0])}
  >>> state = tx.init(params)
  >>> for _ in range(3):
  ...   grads = {"w": params["w"] - 1}
  ...   updates, state = tx.update(grads, state, params)
  ...   print(abs(float(updates["w"] @ params["w"])) < 1e-5)
  ...   params = optax.apply_updates(params, updates)
  True
  True
  True

  Args:
    per_leaf: static; True projects every tensor on its own (the official code), False the whole tree as one vector (the
      paper's equation).
    renormalize: static; whether the norm of the gradient (of each tensor, or of the whole tree) is restored.
    eps: non-negative; added to the squared norm of the weights and to the norm of the projection, both measured in
      units of the largest entry (of the weights and of the gradient); may be traced.
    axis_name: static; the mesh axis over which `shard_map` splits the leaves, whose sums then run over all shards.
      Without it each shard is projected as a tensor of its own. Leaves that every device holds whole come out the same
      either way with `per_leaf`; without, leave those out. Sharded `jit` needs nothing.

  Returns:
    A stateless transformation whose `update` needs `params`.

  Raises:
    ValueError: when `eps` is negative, `params` is missing, or a gradient's shape is not its parameter's.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Definition 7
    and equation 12; the per-tensor, renormalized form is that of their code.
  """
  check_hyperparameter("eps", eps, low=0)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    check_updates(updates, params, "orthogonalize_gradients")
    gradients, structure = jax.tree.flatten(updates, is_leaf=_is_none)
    weights = structure.flatten_up_to(params)
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    for indices in [[index] for index in present] if per_leaf else [present]:
      chosen = [gradients[i] for i in indices], [weights[i] for i in indices]
      projected = _project(*chosen, renormalize, eps, axis_name)
      for index, value in zip(indices, projected):
        gradients[index] = value
    return structure.unflatten(gradients), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def orthogonal(
  base_optimizer: optax.GradientTransformation,
  *,
  per_leaf: bool = True,
  renormalize: bool = True,
  eps: ArrayLike = 1e-30,
  axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`base_optimizer` fed with orthogonalized gradients: `chain(orthogonalize_gradients(...), base_optimizer)`.

  >>> import jax.numpy as jnp, optax
  >>> tx = orthogonal(optax.sgd(0.5))
  >>> params = jnp.array([2.0, 0.0])
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update(jnp.array([0.0, 1.0]), state, params)
  ...   print(round(float(updates @ params), 6) == 0)
  ...   params = optax.apply_updates(params, updates)
  True
  True

  Args:
    base_optimizer: any optax optimizer.
    per_leaf: as in `orthogonalize_gradients`.
    renormalize: as in `orthogonalize_gradients`.
    eps: as in `orthogonalize_gradients`.
    axis_name: as in `orthogonalize_gradients`.

  Returns:
    The chained transformation.

  Raises:
    ValueError: as `orthogonalize_gradients`.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 5.
  """
  first = orthogonalize_gradients(per_leaf=per_leaf, renormalize=renormalize, eps=eps, axis_name=axis_name)
  return optax.with_extra_args_support(optax.chain(first, base_optimizer))


def _is_none(node):
  return node is None


def _project(gradients, weights, renormalize, eps, axis_name):
  """The orthogonalized `gradients`, a list of tensors treated as one vector."""
  directions, size = scaled_tensors(gradients, axis_name)
  weights, _ = scaled_tensors(weights, axis_name)
  inner = functools.partial(inner_product, axis_name=axis_name)
  squared_norm = inner(weights, weights) + eps
  # A zero tensor has no direction to remove, also when eps is 0.
  squared_norm = jnp.where(squared_norm > 0, squared_norm, 1)
  projected = directions
  for _ in range(2):  # the second pass removes what rounding leaves of a nearly parallel gradient
    share = inner(weights, projected) / squared_norm
    projected = [o - share * w for o, w in zip(projected, weights)]
  if renormalize:
    length = jnp.sqrt(inner(projected, projected)) + eps
    size = size * jnp.sqrt(inner(directions, directions)) / jnp.where(length > 0, length, 1)
  return [(o * size).astype(jnp.result_type(g)) for o, g in zip(projected, gradients)]


def scaled_tensors(tensors, axis_name=None):
  """The tensors divided by their largest absolute entry, in float32 or better, and that entry."""
  if not tensors:
    return [], jnp.ones(())
  dtype = jnp.promote_types(jnp.result_type(*tensors), jnp.float32)
  tensors = [jnp.asarray(tensor).astype(dtype) for tensor in tensors]
  size = jnp.max(jnp.stack([jnp.max(jnp.abs(tensor), initial=0) for tensor in tensors]))
  size = size if axis_name is None else jax.lax.pmax(size, axis_name)
  size = jnp.where(size >= jnp.finfo(dtype).tiny, size, 1)
  return [tensor / size for tensor in tensors], size


def inner_product(a, b, axis_name=None):
  """The inner product of two lists of tensors as vectors."""
  total = sum((jnp.sum(x * y) for x, y in zip(a, b)), jnp.zeros(()))
  return total if axis_name is None else jax.lax.psum(total, axis_name)
