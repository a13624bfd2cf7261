"""Attacks with a log-barrier in place of the box's walls, and losses that know how such an attack follows the model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.adversarial.attacks import check_attack
from jaxreg.checks import check_float, check_hyperparameter, check_same_shape
from jaxreg.metrics.sizes import static_integer

__all__ = ["fast_bat_loss", "implicit_adversarial_loss", "log_barrier_attack"]

_HESSIANS = ("diagonal", "full", "none")
_MARGIN = 1e-3  # the fraction of the box that stays between an offset and each wall


def log_barrier_attack(
  loss_of_inputs: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  key: jax.Array | None = None,
  *,
  radius: ArrayLike,
  barrier: ArrayLike,
  steps: int,
  optimizer: optax.GradientTransformation,
  bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
) -> jax.Array:
  """The offset that minimises `-loss(x + offset) - c sum_k (log(high_k - offset_k) + log(offset_k - low_k))`.

  The box `[low, high]` is what the radius and the bounds leave to the offset of each coordinate. The minimiser is
  strictly inside, so that it is a smooth function of the model; as c goes to 0 it goes to a stationary point of the
  attack in the box. Each step is followed by a projection that keeps a thousandth of the box's width from every wall.

  >>> import jax.numpy as jnp, optax
  >>> loss = lambda x: x @ jnp.array([1.0, -2.0])
  >>> attack = dict(radius=0.1, barrier=0.05, steps=300, optimizer=optax.sgd(0.01))
  >>> offset = log_barrier_attack(loss, jnp.array([[0.5, 0.5]]), **attack)
  >>> [round(value, 4) for value in offset[0].tolist()]
  [0.0618, -0.0781]

  Args:
    loss_of_inputs: `[batch, ...] -> [batch]`, each example's loss; closes over the model and the labels. Batch
      statistics have to be frozen.
    inputs: floating `[batch, ...]`, within `bounds`.
    key: of uniform noise inside the box at the start; None starts at the centre. On several devices fold in the
      device's index, or equal noise is drawn on each.
    radius: of the box around the inputs, non-negative scalar in units of the inputs; may be traced.
    barrier: c, positive scalar in units of the loss; may be traced. It must be large enough for the loss's curvature if
      the minimiser is to be the only one.
    steps: number of the optimizer's steps, at least 0; static.
    optimizer: optax's, of the offsets; `optax.sgd` and `optax.adam` keep the examples apart.
    bounds: the smallest and the largest value that an input may have, each broadcasting against `inputs`; may be
      traced. None sets none.

  Returns:
    The offset `[batch, ...]` of the inputs, in their dtype, constant under differentiation; 0 in a box without width.

  Raises:
    ValueError: when `inputs` are not floating point, the loss is not one value per example, the optimizer is none, or a
      hyperparameter is out of range.

  Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, Equation 7 and
    the inner loop of its algorithm.
  """
  check_attack(loss_of_inputs, inputs, bounds=bounds, radius=radius)
  check_hyperparameter("radius", radius, shape=())
  check_hyperparameter("barrier", barrier, low=0, open_low=True, shape=())
  steps = static_integer("steps", steps, low=0)
  if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
    raise ValueError(f"optimizer must be an optax transformation, got {optimizer!r}.")
  inputs = jax.lax.stop_gradient(jnp.asarray(inputs))
  low, high = _box(inputs, radius, bounds)
  barrier = jax.lax.stop_gradient(jnp.asarray(barrier, low.dtype))
  offset = (low + high) / 2
  if key is not None:
    noise = jax.random.uniform(key, offset.shape, offset.dtype, -0.5, 0.5)
    offset = offset + (1 - 2 * _MARGIN) * (high - low) * noise

  def step(_, carry):
    offset, state = carry
    slope = jax.grad(lambda x: jnp.sum(loss_of_inputs(x)))((inputs + offset).astype(inputs.dtype))
    below, above, free = _distances(offset, low, high)
    gradient = barrier * (1 / above - 1 / below) - slope.astype(offset.dtype)
    updates, state = optimizer.update(jax.lax.stop_gradient(jnp.where(free, gradient, 0)), state, offset)
    return _inside(optax.apply_updates(offset, updates), low, high), state

  offset, _ = jax.lax.fori_loop(0, steps, step, (_inside(offset, low, high), optimizer.init(offset)))
  return jax.lax.stop_gradient(offset.astype(inputs.dtype))


def implicit_adversarial_loss(
  loss_fn: Callable[[optax.Params, jax.Array], ArrayLike],
  params: optax.Params,
  inputs: ArrayLike,
  offset: ArrayLike,
  *,
  radius: ArrayLike,
  barrier: ArrayLike,
  hessian: str = "diagonal",
  bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
  tolerance: ArrayLike = 1e-6,
) -> jax.Array:
  """Losses at attacked inputs whose derivative in the parameters includes that of the attack.

  With the offset d at the minimum of `log_barrier_attack`, `dl/dparams = partial_params l + grad_params <grad_d l, v>`,
  where `H v = grad_d l`, v is held fixed, and H is the Hessian in d of what the attack minimises: of the loss and the
  barrier (`full`), or of the barrier alone (`diagonal`), exact where the loss is piecewise linear in the inputs. `none`
  leaves the second term out.

  >>> import jax, jax.numpy as jnp
  >>> loss_fn = lambda slope, x: slope * x[:, 0]  # the attack's offset for a slope of 1 is 0.0618, as above
  >>> options = dict(radius=0.1, barrier=0.05)
  >>> loss = lambda slope: implicit_adversarial_loss(
  ...   loss_fn, slope, jnp.array([[0.5]]), jnp.array([[0.0618034]]), **options)[0]
  >>> [round(value.item(), 4) for value in jax.value_and_grad(loss)(1.0)]
  [0.5618, 0.5894]

  Args:
    loss_fn: `(params, [batch, ...]) -> [batch]`, each example's loss; closes over the labels. No example's loss may
      depend on another example.
    params: a pytree; the result's derivative is in these alone.
    inputs: floating `[batch, ...]`, within `bounds`.
    offset: `[batch, ...]`, from `log_barrier_attack` with the same parameters and hyperparameters.
    radius: as in `log_barrier_attack`.
    barrier: as in `log_barrier_attack`.
    hessian: `diagonal`, `full` (conjugate gradients for each example, of Hessian-vector products) or `none`; static.
    bounds: as in `log_barrier_attack`.
    tolerance: of conjugate gradients, the norm of the residual relative to that of `grad_d l`; may be traced.

  Returns:
    `[batch]`, the values of `loss_fn` at the attacked inputs.

  Raises:
    ValueError: when the offset does not fit the inputs, the loss is not one value per example, or a hyperparameter is
      out of range.

  Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, the implicit
    gradient.
  """
  check_hyperparameter("barrier", barrier, low=0, open_low=True, shape=())
  check_hyperparameter("tolerance", tolerance, low=0, shape=())
  if hessian not in _HESSIANS:
    raise ValueError(f"hessian must be one of {', '.join(_HESSIANS)}, got {hessian!r}.")
  inputs, offset, low, high = _prepared(loss_fn, params, inputs, offset, radius, bounds)
  offset = _inside(offset, low, high)
  attacked = (inputs + offset).astype(inputs.dtype)
  if hessian == "none":
    return loss_fn(params, attacked)
  fixed = jax.lax.stop_gradient(params)
  slope = jax.grad(lambda x: jnp.sum(loss_fn(fixed, x)))(attacked).astype(offset.dtype)
  below, above, free = _distances(offset, low, high)
  curvature = jax.lax.stop_gradient(jnp.asarray(barrier, offset.dtype)) * (1 / below**2 + 1 / above**2)
  response = jnp.where(free, slope, 0) / curvature
  if hessian == "full":
    response = _solve(loss_fn, fixed, attacked, jnp.where(free, slope, 0), curvature, free, tolerance)
  return _with_response(loss_fn, params, attacked, response)


def fast_bat_loss(
  loss_fn: Callable[[optax.Params, jax.Array], ArrayLike],
  params: optax.Params,
  inputs: ArrayLike,
  offset: ArrayLike,
  *,
  radius: ArrayLike,
  curvature: ArrayLike,
  bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
) -> jax.Array:
  """Losses at attacked inputs with the derivative of a linearised attack, which rests where the box's walls hold it.

  As `implicit_adversarial_loss` with `v = grad_d l / curvature` on coordinates whose offset is more than 1e-7 from both
  ends of its box, and 0 on the others.

  >>> import jax, jax.numpy as jnp
  >>> loss_fn = lambda weights, x: x @ weights
  >>> loss = lambda weights: fast_bat_loss(
  ...   loss_fn, weights, jnp.array([[0.5, 0.5]]), jnp.array([[0.125, 0.25]]), radius=0.25, curvature=4.0)[0]
  >>> jax.grad(loss)(jnp.array([1.0, 2.0])).tolist()
  [0.875, 0.75]

  Args:
    loss_fn: as in `implicit_adversarial_loss`.
    params: as in `implicit_adversarial_loss`.
    inputs: floating `[batch, ...]`, within `bounds`.
    offset: `[batch, ...]`, of an attack with walls, such as the difference that `fgsm` or `pgd` makes.
    radius: of the box around the inputs, non-negative scalar in units of the inputs; may be traced.
    curvature: lambda, positive scalar; the official code's default is 1 over the attack's step size; may be traced.
    bounds: as in `log_barrier_attack`.

  Returns:
    `[batch]`, the values of `loss_fn` at the attacked inputs.

  Raises:
    ValueError: as `implicit_adversarial_loss`.

  Reference: Zhang, Zhang, Khanduri, Hong, Chang, Liu, "Revisiting and Advancing Fast Adversarial Training Through the
    Lens of Bi-Level Optimization", ICML 2022, the implicit gradient; the margin 1e-7 is the official code's.
  """
  check_hyperparameter("curvature", curvature, low=0, open_low=True, shape=())
  inputs, offset, low, high = _prepared(loss_fn, params, inputs, offset, radius, bounds)
  attacked = (inputs + offset).astype(inputs.dtype)
  fixed = jax.lax.stop_gradient(params)
  slope = jax.grad(lambda x: jnp.sum(loss_fn(fixed, x)))(attacked).astype(offset.dtype)
  moves = (offset > low + 1e-7) & (offset < high - 1e-7)
  curvature = jax.lax.stop_gradient(jnp.asarray(curvature, offset.dtype))
  return _with_response(loss_fn, params, attacked, jnp.where(moves, slope, 0) / curvature)


def _prepared(loss_fn, params, inputs, offset, radius, bounds):
  """Checked and constant inputs, the offset in float32 at least, and its box."""
  check_attack(lambda x: loss_fn(params, x), inputs, bounds=bounds, radius=radius)
  check_hyperparameter("radius", radius, shape=())
  check_float("offset", offset)
  check_same_shape(inputs=inputs, offset=offset)
  inputs, offset = jax.lax.stop_gradient((jnp.asarray(inputs), jnp.asarray(offset)))
  low, high = _box(inputs, radius, bounds)
  return inputs, offset.astype(low.dtype), low, high


def _box(inputs, radius, bounds):
  """The smallest and the largest offset of each coordinate, constant."""
  wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
  radius = jnp.broadcast_to(jnp.asarray(radius, wide.dtype), wide.shape)
  low, high = -radius, radius
  if bounds is not None:
    smallest, largest = (jnp.asarray(bound, wide.dtype) for bound in bounds)
    low, high = jnp.maximum(low, smallest - wide), jnp.minimum(high, largest - wide)
  return jax.lax.stop_gradient((low, high))


def _inside(offset, low, high):
  margin = _MARGIN * (high - low)
  return jnp.clip(offset, low + margin, high - margin)


def _distances(offset, low, high):
  """From both walls, and which coordinates have any; 1 where there is none."""
  free = ~((high - offset <= 0) | (offset - low <= 0))  # negated, so that a NaN stays one
  return jnp.where(free, offset - low, 1), jnp.where(free, high - offset, 1), free


def _solve(loss_fn, params, attacked, slope, curvature, free, tolerance):
  """`(diag(curvature) - hessian of the loss)^-1 slope` for each example, with the barrier's part as preconditioner."""

  def of_example(point, slope, curvature, free):
    loss = lambda offset: loss_fn(params, (point + offset).astype(point.dtype)[None])[0].astype(slope.dtype)
    gradient, origin = jax.grad(loss), jnp.zeros_like(slope)

    def product(vector):
      bent = jax.jvp(gradient, (origin,), (jnp.where(free, vector, 0),))[1]
      return curvature * vector - jnp.where(free, bent, 0)

    divided = lambda vector: vector / curvature
    return jax.scipy.sparse.linalg.cg(product, slope, tol=tolerance, M=divided)[0]

  return jax.lax.stop_gradient(jax.vmap(of_example)(attacked, slope, curvature, free))


def _with_response(loss_fn, params, attacked, response):
  """The losses, which move with the parameters as if `<gradient in the inputs, response>` were added to them."""
  response = jax.lax.stop_gradient(response).astype(attacked.dtype)
  losses, along = jax.jvp(lambda x: loss_fn(params, x), (attacked,), (response,))
  return losses + (along - jax.lax.stop_gradient(along))
