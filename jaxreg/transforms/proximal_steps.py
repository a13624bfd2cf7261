"""Proximal steps: any proximal operator, and the half-space projection, as the last transformation of a chain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, check_same_shape, check_updates
from jaxreg.regularizers.groups import resolve_groups, scale_groups, sum_groups

__all__ = ["ProximalState", "half_space_projection", "proximal"]


class ProximalState(NamedTuple):
  """Number of updates so far, where the step size's schedule is read."""

  count: jax.Array


def proximal(
  prox: Callable | optax.Params, learning_rate: ArrayLike | optax.Schedule
) -> optax.GradientTransformationExtraArgs:
  """Ends an optimizer's step with a proximal one, `p <- prox(p + v, learning_rate)` for the update `v`.

  With `prox(x, t) = argmin_z ||z - x||^2 / (2 t) + penalty(z)` and plain SGD before it, this is the proximal gradient
  method for `loss + penalty`; the loss's gradient must not contain the penalty. It comes last in the chain and needs
  the learning rate (or the same schedule) that the optimizer before it uses, because a step of that length scales the
  penalty. After Adam and other adaptive methods the scalar rate is a heuristic: the exact operator would use their
  metric. A ramp of the penalty's strength is a factor in the schedule given here.

  Under `shard_map` an operator sees its shard of a parameter; one that couples entries of several shards must sum over
  the mesh axis itself.

  >>> import jax.numpy as jnp, optax
  >>> soft_threshold = lambda x, step: jnp.sign(x) * jnp.maximum(jnp.abs(x) - step * 2.0, 0)
  >>> tx = optax.chain(optax.sgd(0.1), proximal({"w": soft_threshold, "b": None}, 0.1))
  >>> params = {"w": jnp.array([1.0, 0.1]), "b": jnp.array([0.1])}
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   grads = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
  ...   updates, state = tx.update(grads, state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> [round(v, 3) for v in params["w"].tolist()], round(float(params["b"][0]), 3)
  ([0.6, 0.0], 0.1)

  Args:
    prox: function of `(parameters, step_size)` that returns the parameters' proximal point, or a prefix of the
      parameters' tree whose leaves are such functions or None (no penalty). Each function receives the whole subtree
      below it, in float32 or better, so that a group may spread over several tensors (a kernel and its bias).
    learning_rate: step size handed to the operators: a number, a traced scalar, or a schedule of the number of updates.

  Returns:
    A transformation whose `update` needs `params`; its state counts the updates. Updates come out in the wider of the
    parameter's and the update's dtype, so that a parameter that shall be zero becomes exactly zero.

  Raises:
    ValueError: when `learning_rate` is negative, `prox` holds something else than functions and None, `params` is
      missing, or the shapes of updates, parameters and proximal points differ.

  Reference: Parikh, Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 2014, Section 4.2.
  """
  if not callable(learning_rate):  # a schedule's values are traced
    check_hyperparameter("learning_rate", learning_rate, low=0)
  if not jax.tree.leaves(prox):
    raise ValueError(f"prox must be a function or a tree of functions and None, got no function in {prox!r}.")
  for operator in jax.tree.leaves(prox):
    if not callable(operator):
      raise ValueError(f"prox must be a function or a tree of functions and None, got {operator!r} in it.")

  def update(updates, state, params=None, **extra_args):
    del extra_args
    check_updates(updates, params, "proximal")
    step_size = learning_rate(state.count) if callable(learning_rate) else learning_rate

    def apply(operator, update, parameters):
      if operator is None or not jax.tree.leaves(update):
        return update
      return _move(update, parameters, lambda trial, _: operator(trial, step_size))

    updates = jax.tree.map(apply, prox, updates, params, is_leaf=lambda node: node is None or callable(node))
    return updates, ProximalState(optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(lambda params: ProximalState(jnp.zeros((), jnp.int32)), update)


def half_space_projection(
  kinds: str | Callable | optax.Params, *, epsilon: ArrayLike = 0.0, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
  """Zeroes every group whose step leaves its half-space, `<p_j + v_j, p_j> < epsilon ||p_j||^2`.

  A group that turns around has crossed the origin, where the penalty wants it. Optional companion of `proximal`,
  chained after it for the time when training has settled (`optax.conditionally_transform` delays it). Groups that are
  zero already take their step.

  >>> import jax.numpy as jnp, optax
  >>> tx = optax.chain(optax.sgd(1.0), half_space_projection("neuron"))
  >>> params = jnp.ones((2, 2))
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update(jnp.array([[1.5, 0.1], [1.5, 0.1]]), state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> (params[0] > 0).tolist(), bool((params[1] == params[0]).all())
  ([False, True], True)

  Args:
    kinds: prefix of the parameters' tree whose leaves are a kind of `group_ids`, a function from the subtree below to
      such ids, or None (not grouped). A subtree of several tensors (a kernel and its bias) is grouped jointly.
    epsilon: in [0, 1): how much of its old direction a group must keep; may be traced.
    axis_name: static; the mesh axis over which `shard_map` splits the groups, each over all shards (kernels split along
      their inputs, for groups per output): inner products are then sums over the shards. Without it a group is what a
      shard holds of it. Sharded `jit` needs nothing.

  Returns:
    A stateless transformation whose `update` needs `params`.

  Raises:
    ValueError: when `epsilon` is outside [0, 1), `kinds` groups nothing, `params` is missing, shapes of updates and
      parameters differ, or a kind does not fit its tensor.

  Reference: Dai, Chen, Wang, Robinson, "An Adaptive Half-Space Projection Method for Stochastic Optimization Problems
    with Group Sparse Regularization", TMLR 2023 (unverified: the rule is card 49's).
  """
  check_hyperparameter("epsilon", epsilon, low=0, high=1, open_high=True)
  if not jax.tree.leaves(kinds):
    raise ValueError(f"kinds must group some of the parameters, got {kinds!r}.")

  def update(updates, state, params=None, **extra_args):
    del extra_args
    check_updates(updates, params, "half_space_projection")

    def apply(kind, update, parameters):
      if kind is None or not jax.tree.leaves(update):
        return update
      groups, num_groups = resolve_groups(kind, parameters)

      def project(trial, before):
        kept = sum_groups(jax.tree.map(jnp.multiply, trial, before), groups, num_groups=num_groups)
        squared_norm = sum_groups(jax.tree.map(jnp.square, before), groups, num_groups=num_groups)
        if axis_name is not None:
          kept, squared_norm = jax.lax.psum((kept, squared_norm), axis_name)
        alive = (squared_norm == 0) | (kept >= epsilon * squared_norm)
        return scale_groups(trial, groups, alive.astype(kept.dtype))

      return _move(update, parameters, project)

    return jax.tree.map(apply, kinds, updates, params, is_leaf=lambda node: node is None or callable(node)), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _move(update, parameters, operator):
  """The update that takes `parameters` to `operator(parameters + update, parameters)`."""
  before = jax.tree.map(lambda p: jnp.asarray(p).astype(jnp.promote_types(jnp.result_type(p), jnp.float32)), parameters)
  after = operator(jax.tree.map(jnp.add, before, update), before)

  def difference(new, old, parameter, update):
    check_same_shape(proximal_points=new, params=old)
    # Not the update's dtype: in a narrower one -p is rounded and p - p is no longer zero.
    return (new - old).astype(jnp.promote_types(jnp.result_type(parameter), jnp.result_type(update)))

  return jax.tree.map(difference, after, before, parameters, update)
