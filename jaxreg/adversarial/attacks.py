"""Attacks: inputs in a ball around the given ones at which a loss is large, by signed or normalised gradient steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.sizes import static_integer

__all__ = ["fgsm", "pgd", "pgd_survival"]

_NORMS = ("linf", "l2")


def fgsm(
  loss_of_inputs: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  *,
  radius: ArrayLike,
  norm: str = "linf",
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
) -> jax.Array:
  """The fast gradient attack: one step of full size, `x + radius * sign(grad)`, or `radius * grad / ||grad||` in l2.

  >>> import jax.numpy as jnp
  >>> weights = jnp.array([1.0, -2.0])
  >>> fgsm(lambda x: x @ weights, jnp.zeros((1, 2)), radius=0.5).tolist()
  [[0.5, -0.5]]

  Args:
    loss_of_inputs: `[batch, ...] -> [batch]`, each example's loss; closes over the model and the labels.
    inputs: floating `[batch, ...]`, within `bounds`.
    radius: of the ball, non-negative scalar in units of the inputs; may be traced.
    norm: `linf` or `l2`, over all axes but the first; static.
    bounds: the smallest and the largest value that an input may have, each broadcasting against `inputs`; may be
      traced. None sets none.

  Returns:
    The attacked inputs, `[batch, ...]`, constant under differentiation; an example without gradient stays as it is.

  Raises:
    ValueError: when `inputs` are not floating point, the loss is not one value per example, or a hyperparameter is out
      of range.

  Reference: Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015, Section 4.
  """
  check_attack(loss_of_inputs, inputs, norm=norm, bounds=bounds, radius=radius)
  inputs = jax.lax.stop_gradient(inputs)
  start = jnp.zeros(inputs.shape, _wide(inputs))
  return moved(inputs, _step(loss_of_inputs, inputs, start, radius, radius, norm, bounds))


def pgd(
  loss_of_inputs: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  key: jax.Array,
  *,
  radius: ArrayLike,
  step_size: ArrayLike,
  steps: int,
  norm: str = "linf",
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
  start_radius: ArrayLike | None = None,
  until: Callable[[jax.Array], ArrayLike] | None = None,
) -> jax.Array:
  """Projected gradient ascent in the ball `||x' - x|| <= radius` from a random start.

  `x' <- project(x' + step_size * sign(grad))`, or `grad / ||grad||` in l2; projecting onto the ball and the bounds.

  >>> import jax, jax.numpy as jnp
  >>> weights = jnp.array([1.0, -2.0])
  >>> attack = pgd(lambda x: x @ weights, jnp.zeros((1, 2)), jax.random.key(0), radius=0.5, step_size=0.25, steps=4)
  >>> attack.tolist()
  [[0.5, -0.5]]

  Args:
    loss_of_inputs: `[batch, ...] -> [batch]`, each example's loss; closes over the model and the labels.
    inputs: floating `[batch, ...]`, within `bounds`.
    key: of the random start. On several devices fold in the device's index, or equal starts are drawn on each.
    radius: of the ball, non-negative scalar in units of the inputs; may be traced.
    step_size: non-negative scalar in units of the inputs; may be traced.
    steps: number of gradient steps, at least 0; static.
    norm: `linf` or `l2`, over all axes but the first; static.
    bounds: the smallest and the largest value that an input may have, each broadcasting against `inputs`; may be
      traced. None sets none.
    start_radius: the start is uniform in this smaller ball; None takes `radius`; may be traced. A loss that has no
      gradient at the inputs themselves, such as TRADES', needs it positive.
    until: `[batch, ...] -> [batch]` of booleans: an example for which it holds, such as one that is misclassified,
      moves no further, and the loop ends when it holds for all. None takes all steps.

  Returns:
    The attacked inputs, `[batch, ...]`, constant under differentiation; an example without gradient stays at its start.

  Raises:
    ValueError: when `inputs` are not floating point, the loss is not one value per example, or a hyperparameter is out
      of range.

  Reference: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018, Section 2.1.
  """
  start_radius = radius if start_radius is None else start_radius
  check_attack(
    loss_of_inputs, inputs, norm=norm, bounds=bounds, radius=radius, step_size=step_size, start_radius=start_radius
  )
  steps = static_integer("steps", steps, low=0)
  inputs = jax.lax.stop_gradient(inputs)
  start = _random_start(inputs, key, radius, start_radius, norm, bounds)
  step = lambda offset: _step(loss_of_inputs, inputs, offset, step_size, radius, norm, bounds)
  if until is None:
    return moved(inputs, jax.lax.fori_loop(0, steps, lambda _, offset: step(offset), start))
  return moved(inputs, _stepped_until(step, lambda offset: until(moved(inputs, offset)), start, steps))


def pgd_survival(
  loss_of_inputs: Callable[[jax.Array], ArrayLike],
  is_correct: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  key: jax.Array,
  *,
  radius: ArrayLike,
  step_size: ArrayLike,
  steps: int,
  norm: str = "linf",
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`pgd`, and at how many of its steps each example was classified correctly before the step.

  The count says how far an example is from the boundary, and is what `gairat_weights` takes.

  >>> import jax, jax.numpy as jnp
  >>> score, inputs = lambda x: x[:, 0], jnp.array([[-0.1], [-0.3], [-9.0]])
  >>> options = dict(radius=0.0, step_size=0.0, steps=4)
  >>> attacked, survived = pgd_survival(score, lambda x: score(x) < -0.2, inputs, jax.random.key(0), **options)
  >>> survived.tolist()
  [0, 4, 4]

  Args:
    loss_of_inputs: as in `pgd`.
    is_correct: `[batch, ...] -> [batch]` of booleans, whether an example is classified correctly; closes over the model
      and the labels.
    inputs: as in `pgd`.
    key: as in `pgd`.
    radius: as in `pgd`.
    step_size: as in `pgd`.
    steps: as in `pgd`.
    norm: as in `pgd`.
    bounds: as in `pgd`.

  Returns:
    The attacked inputs as `pgd` gives them, and the counts, int32 `[batch]` in [0, steps].

  Raises:
    ValueError: as `pgd`, or when `is_correct` does not return one value per example.

  Reference: Zhang, Zhu, Niu, Han, Sugiyama, Kankanhalli, "Geometry-aware Instance-reweighted Adversarial Training",
    ICLR 2021, Algorithm 1.
  """
  check_attack(loss_of_inputs, inputs, norm=norm, bounds=bounds, radius=radius, step_size=step_size)
  steps = static_integer("steps", steps, low=0)
  inputs = jax.lax.stop_gradient(inputs)
  shape = jnp.shape(jax.eval_shape(is_correct, inputs))
  if shape != inputs.shape[:1]:
    raise ValueError(f"is_correct must return one value per example, {inputs.shape[:1]}, got shape {shape}.")

  def step(_, carry):
    offset, survived = carry
    right = jnp.asarray(is_correct(moved(inputs, offset)), bool)
    return _step(loss_of_inputs, inputs, offset, step_size, radius, norm, bounds), survived + right

  start = _random_start(inputs, key, radius, radius, norm, bounds)
  offset, survived = jax.lax.fori_loop(0, steps, step, (start, jnp.zeros(shape, jnp.int32)))
  return moved(inputs, offset), survived


def _random_start(inputs, key, radius, start_radius, norm, bounds):
  noise = in_unit_ball(key, inputs, norm)
  return projected(inputs, noise * jnp.asarray(start_radius, noise.dtype), radius, norm, bounds)


def _stepped_until(step, until, start, steps):
  done = lambda offset: jnp.asarray(until(offset), bool).reshape(-1, *[1] * (offset.ndim - 1))

  def body(carry):
    index, offset, still = carry
    offset = jnp.where(still, step(offset), offset)
    return index + 1, offset, still & ~done(offset)

  more = lambda carry: (carry[0] < steps) & jnp.any(carry[2])
  return jax.lax.while_loop(more, body, (0, start, ~done(start)))[1]


def check_attack(loss_of_inputs, inputs, *, norm="linf", bounds=None, **sizes):
  """What all attacks refuse."""
  check_float("inputs", inputs)
  if jnp.ndim(inputs) < 1:
    raise ValueError("inputs must have a leading batch axis, got a scalar.")
  if norm not in _NORMS:
    raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}.")
  if bounds is not None and (not isinstance(bounds, tuple) or len(bounds) != 2):
    raise ValueError(f"bounds must be a pair (low, high) or None, got {bounds!r}.")
  for name, size in sizes.items():
    check_hyperparameter(name, size, low=0)
  loss = jax.eval_shape(loss_of_inputs, inputs)
  if getattr(loss, "shape", None) != inputs.shape[:1]:
    raise ValueError(f"loss_of_inputs must return one value per example, {inputs.shape[:1]}, got {loss}.")


def _wide(array):
  return jnp.promote_types(array.dtype, jnp.float32)


def moved(inputs, offset):
  """The attacked inputs, in their dtype, constant."""
  return jax.lax.stop_gradient((inputs + offset).astype(inputs.dtype))


def _step(loss_of_inputs, inputs, offset, step_size, radius, norm, bounds):
  gradient = jax.grad(lambda x: jnp.sum(loss_of_inputs(x)))(moved(inputs, offset)).astype(offset.dtype)
  # Constant, so that differentiating what is computed with the attacked inputs keeps nothing of the loop.
  direction = jax.lax.stop_gradient(steepest(gradient, norm))
  return projected(inputs, offset + jnp.asarray(step_size, offset.dtype) * direction, radius, norm, bounds)


def steepest(gradient, norm):
  """The direction of unit length along which a linear loss grows fastest; 0 where there is no gradient."""
  return jnp.sign(gradient) if norm == "linf" else _normalized(gradient)


def projected(inputs, offset, radius, norm, bounds):
  """Onto the ball, then onto the bounds, which leads no further from inputs that are within them."""
  radius = jnp.asarray(radius, offset.dtype)
  if norm == "linf":
    offset = jnp.clip(offset, -radius, radius)
  else:
    length = _length(offset)
    offset = offset * jnp.where(length > radius, radius / jnp.where(length > radius, length, 1), 1)
  if bounds is None:
    return jax.lax.stop_gradient(offset)
  low, high = (jnp.asarray(bound, offset.dtype) for bound in bounds)
  return jax.lax.stop_gradient(jnp.clip(offset, low - inputs, high - inputs))


def _length(array):
  return jnp.sqrt(jnp.sum(array**2, axis=tuple(range(1, array.ndim)), keepdims=True))


def _normalized(array):
  """Unit length per example; zero stays zero, and entries whose squares would leave the dtype's range do no harm."""
  axes = tuple(range(1, array.ndim))
  largest = jnp.max(jnp.abs(array), axis=axes, keepdims=True)
  scaled = array / jnp.where(largest > 0, largest, 1)
  length = _length(scaled)
  return scaled / jnp.where(length > 0, length, 1)


def in_unit_ball(key, inputs, norm):
  """Uniform in the unit ball around zero, independently for every example."""
  dtype = _wide(inputs)
  if norm == "linf":
    return jax.random.uniform(key, inputs.shape, dtype, -1, 1)
  direction_key, length_key = jax.random.split(key)
  direction = _normalized(jax.random.normal(direction_key, inputs.shape, dtype))
  length = jax.random.uniform(length_key, (inputs.shape[0],) + (1,) * (inputs.ndim - 1), dtype)
  return direction * length ** (inputs.shape[0] / max(inputs.size, 1))
