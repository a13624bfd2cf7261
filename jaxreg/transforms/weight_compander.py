"""Weight compander as an optimizer: the caller keeps plain weights, the optimizer steps on their parameters."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, check_updates
from jaxreg.layers.weight_compander import (
  ARCTAN,
  CompandedParams,
  Curve,
  compander_init,
  fold_params,
)
from jaxreg.metrics.weights import input_axes, is_kernel, parameter_name

__all__ = ["CompandWeightsState", "compand_weights"]


class CompandWeightsState(NamedTuple):
  """Parameters behind the companded weights, and the optimizers' states.

  Attributes:
    raw: path of a companded weight -> its parameters v, float32 at least.
    log_amplitude: path -> scalar log a.
    log_width: path -> scalar log b.
    optimizer: state of the optimizer of v and of what is not companded.
    scales: state of the optimizer of log a and log b, empty without one.
  """

  raw: dict[str, jax.Array]
  log_amplitude: dict[str, jax.Array]
  log_width: dict[str, jax.Array]
  optimizer: optax.OptState
  scales: optax.OptState


def compand_weights(
  optimizer: optax.GradientTransformation,
  scale_optimizer: optax.GradientTransformation | None = None,
  *,
  deviations: ArrayLike = 1.5,
  slope: ArrayLike = 1.0,
  select: Callable[[str, jax.Array], bool] = is_kernel,
  in_axes: Callable[[str, jax.Array], tuple[int, ...]] = input_axes,
  curve: Curve = ARCTAN,
) -> optax.GradientTransformationExtraArgs:
  """Lets an optimizer step on `v` where weights are `w = a arctan(v / b)`; the model and its gradients stay plain.

  The gradient in `w` is pulled back to `v`, the optimizer (its decay too) works on `v`, and the update is the
  difference of the new weights to the given ones, so nothing that changes updates may follow in a chain. The state's
  `v` is what counts: weights changed elsewhere are set back, and the first update clips weights beyond 0.95 of their
  bound. With a `scale_optimizer`, `log a` and `log b` are learned; it should have a tenth of the optimizer's rate
  and no decay.

  >>> import jax.numpy as jnp, optax
  >>> tx = compand_weights(optax.sgd(1.0), optax.sgd(0.1))
  >>> params = {"kernel": jnp.array([[0.1], [1e-3]]), "bias": jnp.zeros(1)}
  >>> state = tx.init(params)
  >>> updates, state = tx.update({"kernel": jnp.full((2, 1), -9e9), "bias": jnp.ones(1)}, state, params)
  >>> params = optax.apply_updates(params, updates)
  >>> params["bias"].tolist(), bool((params["kernel"] > 0.1).all()), list(state.raw)
  ([-1.0], True, ['kernel'])

  Args:
    optimizer: of v and of the parameters that are not companded; it sees a tree like the parameters.
    scale_optimizer: of log a and log b, or None to keep them.
    deviations: positive amplitude in He standard deviations; may be traced.
    slope: positive slope a / b at zero; may be traced.
    select: static; `(path, leaf) -> bool`, the parameters to compand.
    in_axes: static; as in `compander_init`. The fan-in is read from shapes: call `init` outside of `shard_map`, where
      kernels are whole; the update is entry by entry but for the gradient of the scales.
    curve: static; the function.

  Returns:
    A transformation whose `update` needs `params` and passes further arguments on to `optimizer`.

  Raises:
    ValueError: when `deviations` or `slope` is not positive, nothing is selected, `params` is missing, or an update's
      shape is not its parameter's.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023; the function is unverified.
  """
  check_hyperparameter("deviations", deviations, low=0, open_low=True)
  check_hyperparameter("slope", slope, low=0, open_low=True)
  optimizer, scale_optimizer = optax.with_extra_args_support(optimizer), scale_optimizer or optax.set_to_zero()
  fold = functools.partial(fold_params, curve=curve)

  def init(params):
    widened = jax.tree_util.tree_map_with_path(
      lambda path, x: _wide(x) if select(parameter_name(path), x) else x, params
    )
    options = dict(deviations=deviations, slope=slope, select=select, in_axes=in_axes, curve=curve)
    companded = compander_init(widened, **options)
    scales = (companded.log_amplitude, companded.log_width)
    raw = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(companded.raw)}
    raw = {name: raw[name] for name in companded.log_amplitude}
    return CompandWeightsState(raw, *scales, optimizer.init(companded.raw), scale_optimizer.init(scales))

  def update(updates, state, params=None, **extra_args):
    check_updates(updates, params, "compand_weights")
    place = lambda path, leaf: state.raw.get(parameter_name(path), leaf)
    companded = CompandedParams(
      jax.tree_util.tree_map_with_path(place, params), state.log_amplitude, state.log_width
    )  # fmt: skip
    if "grad_fn" in extra_args:  # it knows the weights only
      outer = extra_args["grad_fn"]
      at = lambda raw: companded._replace(raw=raw)
      extra_args["grad_fn"] = lambda raw, *rest: _pull_back(fold, at(raw), outer(fold(at(raw)), *rest)).raw
    gradient = _pull_back(fold, companded, updates)
    steps, optimizer_state = optimizer.update(gradient.raw, state.optimizer, companded.raw, **extra_args)
    scales = (companded.log_amplitude, companded.log_width)
    scale_steps, scale_state = scale_optimizer.update(gradient[1:], state.scales, scales)
    new = CompandedParams(optax.apply_updates(companded.raw, steps), *optax.apply_updates(scales, scale_steps))

    def difference(path, parameter, weight, step):
      name = parameter_name(path)
      return (weight - parameter).astype(jnp.result_type(parameter)) if name in state.raw else step

    updates = jax.tree_util.tree_map_with_path(difference, params, fold(new), steps)
    raw = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(new.raw)}
    raw = {name: raw[name] for name in state.raw}
    return updates, CompandWeightsState(raw, *new[1:], optimizer_state, scale_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _pull_back(fold, companded, gradients):
  """The gradient in the companded parameters, from that in the weights."""
  weights, pull = jax.vjp(fold, companded)
  (result,) = pull(jax.tree.map(lambda gradient, weight: gradient.astype(weight.dtype), gradients, weights))
  return result


def _wide(leaf):
  return jnp.asarray(leaf, jnp.promote_types(jnp.result_type(leaf), jnp.float32))
