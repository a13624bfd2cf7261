"""Any penalty of the parameters as a gradient transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, check_updates

__all__ = ["PenalizeState", "penalize"]


class PenalizeState(NamedTuple):
  """Number of updates so far, where the weight's schedule is read."""

  count: jax.Array


def penalize(
  penalty: Callable[[Any], ArrayLike], weight: ArrayLike | optax.Schedule
) -> optax.GradientTransformationExtraArgs:
  """Adds the gradient of a penalty to the updates, `u + weight * grad penalty(params)`.

  First in a chain, before the optimizer's own scaling, it is the same as adding `weight * penalty` to the loss; between
  that scaling and the learning rate it is decoupled, as weight decay is in AdamW.

  >>> import jax.numpy as jnp, optax
  >>> ridge = lambda params: 0.5 * jnp.sum(params["w"] ** 2)
  >>> tx = optax.chain(penalize(ridge, weight=0.5), optax.sgd(1.0))
  >>> params = {"w": jnp.array([4.0, -8.0])}
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update({"w": jnp.zeros(2)}, state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> params["w"].tolist()
  [1.0, -2.0]

  Args:
    penalty: function of the parameters that returns a floating scalar; inside `optax.masked` it sees `MaskedNode` in
      place of what is masked, and under `shard_map` its device's shards, so that a penalty that is no sum over entries
      must sum over the mesh axis itself.
    weight: factor of the penalty: a number, a traced scalar, or a schedule of the number of updates.

  Returns:
    A transformation whose `update` needs `params`; its state counts the updates.

  Raises:
    ValueError: when `weight` is NaN, `params` is missing, `penalty` does not return one floating scalar, or an update's
      shape is not its parameter's.

  Reference: the penalized loss of any textbook; decoupled placement after Loshchilov, Hutter, "Decoupled Weight Decay
    Regularization", ICLR 2019, equation 2.
  """
  if not callable(weight):  # a schedule's values are traced
    check_hyperparameter("weight", weight)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    check_updates(updates, params, "penalize")
    factor = weight(state.count) if callable(weight) else weight

    def add(update, gradient):
      if update is None:
        return None
      dtype = jnp.promote_types(jnp.result_type(update), jnp.float32)
      return (jnp.asarray(update, dtype) + factor * jnp.asarray(gradient, dtype)).astype(jnp.result_type(update))

    if jax.tree.leaves(updates):
      _check_scalar(penalty, params)
      updates = jax.tree.map(add, updates, jax.grad(penalty)(params), is_leaf=lambda node: node is None)
    return updates, PenalizeState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(lambda params: PenalizeState(jnp.zeros((), jnp.int32)), update)


def _check_scalar(penalty, params):
  leaves = jax.tree.leaves(jax.eval_shape(penalty, params))
  if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
    found = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves) or "nothing"
    raise ValueError(f"penalty must return one floating scalar, got {found}.")
