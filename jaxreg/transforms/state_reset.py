"""An optimizer that starts anew at a step, as when the weight of a penalty jumps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, check_updates

__all__ = ["ResetState", "reset_at"]


class ResetState(NamedTuple):
  """The optimizer's state and the number of updates so far."""

  optimizer: Any
  count: jax.Array


def reset_at(optimizer: optax.GradientTransformation, step: ArrayLike) -> optax.GradientTransformationExtraArgs:
  """An optimizer whose state is that of its `init` again before one update.

  Moments of gradients without a penalty say nothing about those with its full weight; IRM, V-REx and Fishr therefore
  reset Adam where their weight jumps. A schedule inside the optimizer starts anew as well.

  >>> import jax.numpy as jnp, optax
  >>> tx = reset_at(optax.trace(decay=1.0), 2)
  >>> state = tx.init(jnp.zeros(()))
  >>> for _ in range(3):
  ...   updates, state = tx.update(jnp.ones(()), state, jnp.zeros(()))
  ...   print(updates.item())
  1.0
  2.0
  1.0

  Args:
    optimizer: the optimizer.
    step: the update, counted from 0, before which the state is reset; may be traced; negative for never.

  Returns:
    A transformation whose `update` needs `params`.

  Raises:
    ValueError: when `step` is not a scalar number or `params` are missing.

  Reference: Arjovsky, Bottou, Gulrajani, Lopez-Paz, "Invariant Risk Minimization", arXiv 1907.02893, 2019 (as in the
    code of Gulrajani, Lopez-Paz, ICLR 2021).
  """
  check_hyperparameter("step", step, shape=())
  optimizer = optax.with_extra_args_support(optimizer)

  def update(updates, state, params=None, **extra_args):
    check_updates(updates, params, "reset_at")
    now = state.count == step
    fresh = optimizer.init(params)
    before = jax.tree.map(lambda new, old: jnp.where(now, new, old).astype(old.dtype), fresh, state.optimizer)
    updates, after = optimizer.update(updates, before, params, **extra_args)
    return updates, ResetState(after, optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(
    lambda params: ResetState(optimizer.init(params), jnp.zeros((), jnp.int32)), update
  )
