"""Steps through one environment after another, of which a part is kept: Fish."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, check_updates

__all__ = ["FishState", "fish"]


class FishState(NamedTuple):
  """The inner optimizer's state, the parameters at which the round began, and the number of updates so far."""

  optimizer: Any
  start: Any
  count: jax.Array


def fish(
  optimizer: optax.GradientTransformation, *, environments: ArrayLike, meta_learning_rate: ArrayLike
) -> optax.GradientTransformationExtraArgs:
  """Matches the environments' gradients by going through them in turn and keeping a part of the way (Fish).

  A round is one update per environment, each with the gradient of that environment alone: update t takes a batch of
  environment `t % environments`. The last update of a round ends at `start + meta_learning_rate (inner - start)`. To
  second order this is a step on the mean loss that favours large inner products of the gradients. The inner optimizer's
  state lives on from round to round. It is `optax.lookahead` of plain parameters.

  >>> import jax.numpy as jnp, optax
  >>> tx = fish(optax.sgd(1.0), environments=2, meta_learning_rate=0.5)
  >>> params = jnp.zeros(())
  >>> state = tx.init(params)
  >>> for gradient in (-1.0, -3.0, -1.0):
  ...   updates, state = tx.update(jnp.array(gradient), state, params)
  ...   params = optax.apply_updates(params, updates)
  ...   print(params.item())
  1.0
  2.0
  3.0

  Args:
    optimizer: takes the inner steps; Adam in the literature.
    environments: number of updates in a round, at least 1; may be traced.
    meta_learning_rate: in [0, 1]; may be traced.

  Returns:
    A transformation whose `update` needs `params`.

  Raises:
    ValueError: when a hyperparameter is out of range or `params` are missing.

  Reference: Shi, Seely, Torr, Siddharth, Hannun, Usunier, Synnaeve, "Gradient Matching for Domain Generalization", ICLR
    2022, Algorithm 1 (as in the code of Gulrajani, Lopez-Paz, ICLR 2021).
  """
  check_hyperparameter("environments", environments, low=1, shape=())
  check_hyperparameter("meta_learning_rate", meta_learning_rate, low=0, high=1, shape=())
  optimizer = optax.with_extra_args_support(optimizer)

  def update(updates, state, params=None, **extra_args):
    check_updates(updates, params, "fish")
    place = state.count % environments
    start = jax.tree.map(lambda own, old: jnp.where(place == 0, own, old).astype(old.dtype), params, state.start)
    updates, inner = optimizer.update(updates, state.optimizer, params, **extra_args)

    def part_of_the_way(update, parameter, begun):
      if update is None:
        return None
      dtype = jnp.promote_types(jnp.result_type(update), jnp.float32)
      way = jnp.asarray(parameter, dtype) - begun.astype(dtype)
      end = jnp.asarray(meta_learning_rate, dtype) * (way + update) - way
      return jnp.where(place == environments - 1, end, update).astype(jnp.result_type(update))

    updates = jax.tree.map(part_of_the_way, updates, params, start, is_leaf=lambda node: node is None)
    return updates, FishState(inner, start, optax.safe_increment(state.count))

  init = lambda params: FishState(optimizer.init(params), jax.tree.map(jnp.array, params), jnp.zeros((), jnp.int32))
  return optax.GradientTransformationExtraArgs(init, update)
