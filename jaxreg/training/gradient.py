"""`gradient_task`: a `Task` whose step is the gradient of an objective, given to an optax optimizer."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreg.training.task import PRECISIONS, Computation, Context, HeldOut, Mean, Task, TrainState

__all__ = ["gradient_task"]


def gradient_task(
  init_params: Callable,
  objective: Callable,
  optimizer: Callable,
  *,
  data: Any,
  batch_size: int | None,
  hparams: Mapping[str, Any] | None = None,
  after_update: Callable | None = None,
  evaluate: Callable | None = None,
  predict: Callable | None = None,
  held_out: HeldOut | None = None,
  config: Any = None,
  param_spec: Callable | None = None,
  **computation,
) -> Task:
  """A task that takes one gradient step of an objective at a time.

  Args:
    init_params: `(key, hparams) -> (params, extra)`.
    objective: `(params, extra, batch, context) -> (loss, (extra, metrics))` with a `Context`; the loss and each metric
      are scalars, or a `Mean` where examples have weights.
    optimizer: `hparams -> optax.GradientTransformation`. One that looks at the objective elsewhere (sharpness-aware
      minimisation, L-BFGS, line searches, Sophia) gets those of `value`, `grad`, `value_fn(params)`, `obj_fn(params)`
      (the same) and `grad_fn(params)` that its `update` asks for; looking moves neither `extra` nor the key.
    data: as in `Task`.
    batch_size: as in `Task`.
    hparams: as in `Task`.
    after_update: `(params, extra, context) -> (params, extra)` after the optimizer's update, with the new parameters:
      moving-average teachers, projections.
    evaluate: `(params, extra, hparams) -> metrics`.
    predict: `(params, extra, inputs) -> outputs`.
    held_out: as in `Task`.
    config: as in `Task`.
    param_spec: as in `Task`.
    **computation: fields of `Computation`: `accumulate`, `precision`, `remat`, `axis_name`, `cast`.

  Returns:
    A `Task`.

  Raises:
    ValueError: when an argument is out of range.
  """

  def init(key, hparams):
    params, extra = init_params(jax.random.fold_in(key, 0), hparams)
    return TrainState.create(key, params, extra, optimizer(hparams).init(params))

  def make_step(how: Computation):
    def step(state, batch, hparams):
      key = state.step_key()
      if how.axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(how.axis_name))
      context = Context(state.step, key, hparams, how.axis_name)

      gradients = lambda params: _gradients(objective, how, params, state.extra, batch, context)
      loss, extra, metrics, grads = gradients(state.params)
      # A line search refuses what neither it nor `value_fn` takes.
      value_fn = lambda params, grad_fn=None, obj_fn=None: _value(objective, how, params, state.extra, batch, context)
      looks = {
        "value": loss,
        "grad": grads,
        "value_fn": value_fn,
        "obj_fn": value_fn,  # its name in estimates of the Hessian's diagonal (`optax.contrib.sophia`)
        # Sharpness-aware minimisation also says which of its steps it is in.
        "grad_fn": lambda params, *_: gradients(params)[3],
      }
      updates, opt_state = _update(optimizer(hparams), grads, state.opt_state, state.params, looks)
      params = optax.apply_updates(state.params, updates)
      if after_update is not None:
        params, extra = after_update(params, extra, context)
      return state.advance(params=params, extra=extra, opt_state=opt_state), {"loss": loss, **metrics}

    return step

  how = Computation(**computation)
  return Task(
    init=init,
    step=make_step(how),
    data=data,
    batch_size=batch_size,
    hparams={} if hparams is None else hparams,
    evaluate=None if evaluate is None else lambda state, hparams: evaluate(state.params, state.extra, hparams),
    predict=None if predict is None else lambda state, inputs: predict(state.params, state.extra, inputs),
    config=config,
    held_out=held_out,
    param_spec=param_spec,
    computation=how,
    make_step=make_step,
  )


def _update(optimizer, grads, opt_state, params, looks):
  """The optimizer's update with what its signature asks for and nothing that it refuses."""
  parameters = inspect.signature(optimizer.update).parameters.values()
  if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
    names = {parameter.name for parameter in parameters}
    looks = {name: value for name, value in looks.items() if name in names}
  return optimizer.update(grads, opt_state, params, **looks)


def _gradients(objective, how: Computation, params, extra, batch, context: Context):
  """Loss, new extra state, metrics and gradients, over all micro-batches and devices."""

  def total(params, extra, batch, key, scale):
    loss, extra, metrics = _evaluate(objective, how, params, extra, batch, context._replace(key=key))
    return loss.total * scale, (loss, extra, metrics)

  if how.remat:
    total = jax.checkpoint(total, policy=jax.checkpoint_policies.checkpoint_dots)
  gradient = jax.grad(total, has_aux=True)
  at_scale = _scaled(gradient) if how.precision == "float16" else lambda *arguments: gradient(*arguments, 1.0)

  def part(extra, batch, key):
    grads, (loss, extra, metrics) = at_scale(params, extra, batch, key)
    return extra, (grads, loss, metrics)

  extra, (grads, loss, metrics) = _over_parts(part, how, extra, batch, context.key)
  parts = how.accumulate
  if how.axis_name is not None:
    grads, loss, metrics = jax.lax.psum((grads, loss, metrics), how.axis_name)
    parts = parts * jax.lax.psum(1, how.axis_name)
  weight = jnp.where(loss.weight == 0, 1, loss.weight)
  grads = jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)
  is_mean = lambda x: isinstance(x, Mean)
  metrics = jax.tree.map(lambda x: x.value() if is_mean(x) else x / parts, metrics, is_leaf=is_mean)
  return loss.value(), extra, metrics, grads


def _value(objective, how: Computation, params, extra, batch, context: Context):
  """The loss alone; line searches differentiate it."""

  def part(extra, batch, key):
    loss, extra, _ = _evaluate(objective, how, params, extra, batch, context._replace(key=key))
    return extra, loss

  _, loss = _over_parts(part, how, extra, batch, context.key)
  return (loss if how.axis_name is None else jax.lax.psum(loss, how.axis_name)).value()


def _evaluate(objective, how: Computation, params, extra, batch, context: Context):
  """The objective of one micro-batch in the precision asked for; the loss as a `Mean` in at least float32."""
  dtype = PRECISIONS[how.precision]
  narrow = (lambda tree: tree) if dtype == jnp.float32 else (lambda tree: _cast(tree, dtype))
  inputs = {name: narrow(value) if name in how.cast else value for name, value in batch.items()}
  loss, (extra, metrics) = objective(narrow(params), extra, inputs, context)
  loss = loss if isinstance(loss, Mean) else Mean(loss, 1.0)
  return Mean(*(jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) for x in loss)), extra, metrics


def _over_parts(part, how: Computation, extra, batch, key):
  """Sums `part(extra, batch, key) -> (extra, values)` over micro-batches; the extra state goes from one to the next."""
  if how.accumulate == 1:
    return part(extra, batch, key)
  # Every n-th example goes to one micro-batch, so that a sharded batch is not moved between devices.
  parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, how.accumulate, *x.shape[1:]), 1, 0), batch)
  # A scan that stacks would keep all gradients; summing keeps one.
  shapes = jax.eval_shape(lambda: part(extra, jax.tree.map(lambda x: x[0], parts), key)[1])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(carry, one):
    extra, index, sums = carry
    extra, new = part(extra, one, jax.random.fold_in(key, index))
    return (extra, index + 1, jax.tree.map(jnp.add, sums, new)), None

  (extra, _, sums), _ = jax.lax.scan(add, (extra, jnp.int32(0), zeros), parts)
  return extra, sums


def _scaled(gradient, *, largest: float = 2.0**15, factor: float = 8.0):
  """Gradients of the loss times the largest scale at which float16 does not overflow, divided by it in float32.

  The scale is sought anew at every step, from the largest one down, so that there is no state to carry and no step to
  skip; a gradient that is not finite at any scale is returned as it is.
  """

  def scaled(*arguments):
    def at(scale):
      grads, aux = gradient(*arguments, scale)
      finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]))
      return jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), grads), aux, finite

    def smaller(carry):
      scale = carry[0] / factor
      return scale, *at(scale)

    start = jnp.float32(largest)
    _, grads, aux, _ = jax.lax.while_loop(lambda c: ~c[3] & (c[0] > 1), smaller, (start, *at(start)))
    return grads, aux

  return scaled


def _cast(tree, dtype):
  def cast(leaf):
    return leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

  return jax.tree.map(cast, tree)
