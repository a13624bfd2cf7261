"""Self-tuning of hyperparameters within one run: a best-response network on the training loss, they on the validation.

The unconstrained hyperparameters `lambda` are perturbed by `eps ~ N(0, sigma^2)` for every example. Training steps fit
the response, `min_phi E L_train(lambda + eps, w_phi(lambda + eps))`; validation steps move `lambda` and `sigma`,
`min E L_valid(w_phi(lambda + eps)) - tau Entropy(sigma)`. The training loss is never differentiated in `lambda`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter

__all__ = [
  "Hyperparameter",
  "SelfTuner",
  "SelfTuningState",
  "Tuning",
  "constrain_hyperparameters",
  "perturb_hyperparameters",
  "perturbation_entropy",
  "response_inputs",
  "self_tuner",
  "tuning_init",
  "unconstrain_hyperparameter",
]


def _identity(values):
  return values


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
  """A hyperparameter to be tuned.

  >>> Hyperparameter("dropout", init=0.05, low=0.0, high=0.9).name
  'dropout'

  Attributes:
    name: its key among the constrained hyperparameters.
    init: start, strictly between `low` and `high`.
    low: lower bound, may be -inf.
    high: upper bound, may be inf.
    discrete: whether the constrained value is rounded down to an integer; it is then not differentiable, and need not
      be.
    per_example: whether each example has its own perturbation; otherwise all share the first one's.
    scale: standard deviation of the perturbation at the start, in unconstrained units.
    response_input: what of the unconstrained value the network sees.

  Raises:
    ValueError: when a value is outside its domain.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the parametrisation of hyperparameters.
  """

  name: str
  init: float
  low: float = -math.inf
  high: float = math.inf
  discrete: bool = False
  per_example: bool = True
  scale: float = 0.5
  response_input: Callable[[jax.Array], jax.Array] = _identity

  def __post_init__(self):
    check_hyperparameter("high", self.high, low=self.low, open_low=True)
    check_hyperparameter("init", self.init, low=self.low, high=self.high, open_low=True, open_high=True)
    check_hyperparameter("scale", self.scale, low=0, open_low=True)


class Tuning(NamedTuple):
  """Where the hyperparameters are.

  Attributes:
    position: `lambda`, unconstrained values `[H]`.
    raw_scale: `[H]`, of which softplus is the standard deviation of the perturbation.
  """

  position: jax.Array
  raw_scale: jax.Array


class SelfTuningState(NamedTuple):
  """All that a self-tuning run changes.

  Attributes:
    params: of the best-response network.
    tuning: the hyperparameters.
    opt_state: of the network's optimizer.
    position_opt_state: of the optimizer of `tuning.position`.
    scale_opt_state: of the optimizer of `tuning.raw_scale`; empty when that is fixed.
  """

  params: Any
  tuning: Tuning
  opt_state: Any
  position_opt_state: Any
  scale_opt_state: Any


class SelfTuner(NamedTuple):
  """The pure functions of one self-tuning problem; see `self_tuner`.

  Attributes:
    init: `(params, tuning) -> state`.
    train_step: `(state, batch, key) -> (state, loss)`, changes the network only.
    valid_step: `(state, batch, key) -> (state, loss)`, changes the hyperparameters only.
    cycle: `(state, train_batches, valid_batches, key) -> (state, (train_loss, valid_loss))`, a step for each of the
      batches stacked along the leading axes, the training steps first.
  """

  init: Callable
  train_step: Callable
  valid_step: Callable
  cycle: Callable


def tuning_init(space: Sequence[Hyperparameter]) -> Tuning:
  """The hyperparameters at their start.

  >>> space = [Hyperparameter("dropout", init=0.45, low=0.0, high=0.9), Hyperparameter("log_rate", init=-3.0)]
  >>> tuning_init(space).position.tolist()
  [0.0, -3.0]

  Args:
    space: what is tuned.

  Returns:
    `position` and `raw_scale`, `[H]`.

  Raises:
    ValueError: when the space is empty or two hyperparameters have the same name.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, Algorithm 1.
  """
  _check_space(space)
  dtype = jnp.result_type(float)
  # In NumPy's float64, and without compiling anything.
  place = lambda spec: _unconstrain(np.float64(spec.init), spec.low, spec.high, np)
  return Tuning(
    jnp.asarray([place(spec) for spec in space], dtype),
    jnp.asarray([_softplus_inverse(np.float64(spec.scale), np) for spec in space], dtype),
  )


def constrain_hyperparameters(space: Sequence[Hyperparameter], position: ArrayLike) -> dict[str, jax.Array]:
  """Hyperparameters in their ranges: `low + (high - low) sigmoid`, `low + softplus`, `high - softplus` or the identity.

  >>> space = [Hyperparameter("dropout", init=0.1, low=0.0, high=1.0)]
  >>> constrain_hyperparameters(space, jnp.zeros((2, 1)))["dropout"].tolist()
  [0.5, 0.5]

  Args:
    space: what is tuned.
    position: unconstrained values, floating `[..., H]`.

  Returns:
    name -> `[...]`; discrete ones are rounded down, in floating point.

  Raises:
    ValueError: when the last axis of `position` is not as long as the space.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the parametrisation of hyperparameters.
  """
  _check_space(space, position)
  return {spec.name: _constrain(spec, position[..., index]) for index, spec in enumerate(space)}


def unconstrain_hyperparameter(value: ArrayLike, *, low: float = -math.inf, high: float = math.inf) -> jax.Array:
  """The unconstrained value that `constrain_hyperparameters` maps to `value`.

  >>> float(unconstrain_hyperparameter(jnp.array(0.5), low=0.0, high=1.0))
  0.0

  Args:
    value: floating `[...]`, strictly between `low` and `high`.
    low: lower bound, may be -inf; static.
    high: upper bound, may be inf; static.

  Returns:
    `[...]`.

  Raises:
    ValueError: when `value` is not floating point or the bounds are not in order.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the parametrisation of hyperparameters.
  """
  check_float("value", value)
  check_hyperparameter("high", high, low=low, open_low=True)
  check_hyperparameter("value", value, low=low, high=high, open_low=True, open_high=True)
  return _unconstrain(value, low, high, jnp)


def response_inputs(space: Sequence[Hyperparameter], position: ArrayLike) -> jax.Array:
  """What a best-response network sees of the hyperparameters.

  >>> space = [Hyperparameter("weight", init=1.0, low=0.0, response_input=jnp.tanh)]
  >>> response_inputs(space, jnp.zeros((2, 1))).tolist()
  [[0.0], [0.0]]

  Args:
    space: what is tuned.
    position: unconstrained values, floating `[..., H]`.

  Returns:
    `[..., H]`.

  Raises:
    ValueError: when the last axis of `position` is not as long as the space.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019; the transformations are those of the official code.
  """
  position = as_array("position", position)
  _check_space(space, position)
  return jnp.stack([spec.response_input(position[..., index]) for index, spec in enumerate(space)], -1)


def perturb_hyperparameters(
  key: jax.Array, space: Sequence[Hyperparameter], tuning: Tuning, *, examples: int
) -> jax.Array:
  """`lambda + softplus(raw_scale) n` with `n ~ N(0, 1)` drawn for every example, or once for those that share it.

  >>> space = [Hyperparameter("dropout", init=0.1, low=0.0, high=0.9)]
  >>> perturb_hyperparameters(jax.random.key(0), space, tuning_init(space), examples=3).shape
  (3, 1)

  Args:
    key: threefry key.
    space: what is tuned.
    tuning: `position` and `raw_scale`, `[H]`.
    examples: static.

  Returns:
    `[examples, H]`.

  Raises:
    ValueError: when the tuning does not fit the space.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, Algorithm 1.
  """
  _check_space(space, tuning.position)
  noise = jax.random.normal(key, (examples, len(space)), tuning.position.dtype)
  own = np.array([spec.per_example for spec in space])
  return tuning.position + jax.nn.softplus(tuning.raw_scale) * jnp.where(own, noise, noise[:1])


def perturbation_entropy(raw_scale: ArrayLike) -> jax.Array:
  """The entropy of the perturbation, `sum_i log(softplus(raw_scale_i) sqrt(2 pi e))`.

  >>> round(float(perturbation_entropy(jnp.array([0.5413]))), 3)  # standard deviation 1
  1.419

  Args:
    raw_scale: floating `[H]`.

  Returns:
    A scalar.

  Raises:
    ValueError: when `raw_scale` is not floating point.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the objective of the hyperparameters.
  """
  check_float("raw_scale", raw_scale)
  wide = raw_scale.astype(jnp.promote_types(raw_scale.dtype, jnp.float32))
  # softplus underflows below -100, where it is exp up to rounding.
  small = wide < -40
  log_scale = jnp.where(small, wide, jnp.log(jax.nn.softplus(jnp.where(small, 0, wide))))
  return jnp.sum(log_scale + (math.log(2 * math.pi) + 1) / 2, axis=-1).astype(raw_scale.dtype)


def self_tuner(
  space: Sequence[Hyperparameter],
  train_loss: Callable,
  valid_loss: Callable,
  *,
  optimizer: optax.GradientTransformation,
  position_optimizer: optax.GradientTransformation,
  scale_optimizer: optax.GradientTransformation | None,
  entropy_weight: ArrayLike = 1e-3,
  axis_name: str | None = None,
) -> SelfTuner:
  """Alternating optimization of a best-response network and of its hyperparameters.

  >>> from jaxreg.layers.best_response import BestResponseDense
  >>> space = [Hyperparameter("log_ridge", init=0.0)]
  >>> layer, (x, y) = BestResponseDense(1, use_bias=False), (jnp.eye(4), jnp.ones((4, 1)))
  >>> error = lambda params, seen, batch: jnp.square(layer.apply(params, batch[0], seen) - batch[1])
  >>> tuner = self_tuner(space, lambda params, seen, hyperparameters, batch, key: error(params, seen, batch), error,
  ...                    optimizer=optax.sgd(0.1), position_optimizer=optax.adam(0.01), scale_optimizer=None)
  >>> state = tuner.init(layer.init(jax.random.key(0), x, jnp.zeros(1)), tuning_init(space))
  >>> state, loss = jax.jit(tuner.train_step)(state, (x, y), jax.random.key(1))
  >>> float(state.tuning.position[0])
  0.0

  Args:
    space: what is tuned.
    train_loss: `(params, response_inputs, hyperparameters, batch, key) -> losses`, with response inputs
      `[examples, H]`, hyperparameters a dict of `[examples]`, and losses averaged here. It should use dropout and
      augmentations, and take hyperparameters as constants.
    valid_loss: `(params, response_inputs, batch) -> losses`, without dropout or augmentation: with them, tuning would
      be driven to no regularization.
    optimizer: of the network.
    position_optimizer: of the unconstrained hyperparameters.
    scale_optimizer: of the raw scales; None keeps them fixed, and validation steps then draw no perturbation.
    entropy_weight: `tau`, non-negative; may be traced.
    axis_name: mapped axis over which the batches are split and gradients averaged; give every device its own key.

  Returns:
    The functions `init`, `train_step`, `valid_step` and `cycle`.

  Raises:
    ValueError: when the space is empty or `entropy_weight` is negative.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, Algorithm 1.
  """
  _check_space(space)
  check_hyperparameter("entropy_weight", entropy_weight, low=0)
  average = (lambda tree: tree) if axis_name is None else functools.partial(jax.lax.pmean, axis_name=axis_name)

  def init(params, tuning):
    scale_opt_state = () if scale_optimizer is None else scale_optimizer.init(tuning.raw_scale)
    position_opt_state = position_optimizer.init(tuning.position)
    return SelfTuningState(params, tuning, optimizer.init(params), position_opt_state, scale_opt_state)

  def train_step(state, batch, key):
    perturb_key, loss_key = jax.random.split(key)
    position = perturb_hyperparameters(perturb_key, space, state.tuning, examples=_examples(batch))
    seen, hyperparameters = response_inputs(space, position), constrain_hyperparameters(space, position)
    loss = lambda params: jnp.mean(train_loss(params, seen, hyperparameters, batch, loss_key))
    value, gradient = average(jax.value_and_grad(loss)(state.params))
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), value

  def valid_step(state, batch, key):
    def objective(tuning):
      if scale_optimizer is None:
        position = jnp.broadcast_to(tuning.position, (_examples(batch), len(space)))
      else:
        position = perturb_hyperparameters(key, space, tuning, examples=_examples(batch))
      loss = jnp.mean(valid_loss(state.params, response_inputs(space, position), batch))
      return loss - entropy_weight * perturbation_entropy(tuning.raw_scale), loss

    (_, loss), gradient = average(jax.value_and_grad(objective, has_aux=True)(state.tuning))
    position, raw_scale = state.tuning
    updates, position_opt_state = position_optimizer.update(gradient.position, state.position_opt_state, position)
    position, scale_opt_state = optax.apply_updates(position, updates), state.scale_opt_state
    if scale_optimizer is not None:
      updates, scale_opt_state = scale_optimizer.update(gradient.raw_scale, scale_opt_state, raw_scale)
      raw_scale = optax.apply_updates(raw_scale, updates)
    tuning = Tuning(position, raw_scale)
    state = state._replace(
      tuning=tuning, position_opt_state=position_opt_state, scale_opt_state=scale_opt_state
    )  # fmt: skip
    return state, loss

  def cycle(state, train_batches, valid_batches, key):
    train_key, valid_key = jax.random.split(key)
    state, train = _steps(train_step, state, train_batches, train_key)
    state, valid = _steps(valid_step, state, valid_batches, valid_key)
    return state, (train, valid)

  return SelfTuner(init, train_step, valid_step, cycle)


def _steps(step, state, batches, key):
  keys = jax.random.split(key, _examples(batches))
  state, losses = jax.lax.scan(lambda state, inputs: step(state, *inputs), state, (batches, keys))
  return state, jnp.mean(losses)


def _examples(batch) -> int:
  return jax.tree.leaves(batch)[0].shape[0]


def _constrain(spec, values):
  if math.isinf(spec.low) and math.isinf(spec.high):
    constrained = values
  elif math.isinf(spec.high):
    constrained = spec.low + jax.nn.softplus(values)
  elif math.isinf(spec.low):
    constrained = spec.high - jax.nn.softplus(values)
  else:
    constrained = spec.low + (spec.high - spec.low) * jax.nn.sigmoid(values)
  return jnp.floor(constrained) if spec.discrete else constrained


def _unconstrain(value, low, high, xp):
  if math.isinf(low) and math.isinf(high):
    return value
  if math.isinf(high):
    return _softplus_inverse(value - low, xp)
  if math.isinf(low):
    return _softplus_inverse(high - value, xp)
  return xp.log(value - low) - xp.log(high - value)


def _softplus_inverse(values, xp):
  return values + xp.log(-xp.expm1(-values))


def _check_space(space, position=None):
  names = [spec.name for spec in space]
  if not names or len(set(names)) < len(names):
    raise ValueError(f"space must be hyperparameters with different names, got {names}.")
  if position is not None:
    check_float("position", position)
    if jnp.shape(position)[-1:] != (len(names),):
      raise ValueError(f"position must have shape [..., {len(names)}], got {jnp.shape(position)}.")
