"""Sharpness-aware steps: optimizers fed with gradients at points that the first gradient leads to.

The transformations need `grad_fn` in their `update`, `(params, look) -> gradient` of the same batch, as
`optax.contrib.sam` does; `look` counts the points from 0. `jaxreg.training.gradient_task` gives it; in a loop of your
own it is `lambda params, _: jax.grad(loss)(params, batch)`. On several devices it returns the gradient of the whole
batch, as the first one is. Further arguments are not used.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import (
  as_array,
  check_float,
  check_hyperparameter,
  check_updates,
  counted_labels,
  example_mask,
)
from jaxreg.losses.labelled_logits import widened
from jaxreg.metrics.sizes import static_integer
from jaxreg.regularizers.domain_inconsistency import inconsistency_penalty
from jaxreg.transforms.orthogonal_gradient import inner_product, orthogonalize_gradients, scaled_tensors

__all__ = ["gam", "sagm", "sam", "udim_value_and_grad"]


def sam(optimizer: optax.GradientTransformation, *, rho: ArrayLike = 0.05) -> optax.GradientTransformationExtraArgs:
  """Sharpness-aware minimisation: the optimizer steps by the gradient at `params + rho g / ||g||`.

  This is `optax.contrib.sam` in its opaque mode with one ascent step, whose direction is 0 where the gradient is.

  >>> import jax, jax.numpy as jnp, optax
  >>> grad = jax.grad(lambda w: jnp.sum(w**2) / 2)
  >>> params, tx = jnp.array([3.0, 4.0]), sam(optax.sgd(1.0), rho=5.0)
  >>> updates, _ = tx.update(grad(params), tx.init(params), params, grad_fn=lambda params, _: grad(params))
  >>> updates.tolist()
  [-6.0, -8.0]

  Args:
    optimizer: any optax optimizer; it sees the parameters as they are.
    rho: non-negative scalar, the length of the ascent step over the whole tree; may be traced.

  Returns:
    A transformation whose `update` needs `params` and `grad_fn`; two gradients per step.

  Raises:
    ValueError: when `rho` is negative, `params` or `grad_fn` is missing, or a gradient's shape is not its parameter's.

  Reference: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    ICLR 2021, equation 2 and Algorithm 1.
  """
  check_hyperparameter("rho", rho, low=0, shape=())
  ascent = optax.chain(optax.stateless(lambda gradient, _: _unit(gradient)[0]), optax.sgd(rho))
  wrapped = optax.contrib.sam(optimizer, ascent, opaque_mode=True)
  return _checked("sam", wrapped.init, wrapped.update)


def sagm(
  optimizer: optax.GradientTransformation, *, rho: ArrayLike = 0.05, alpha: ArrayLike = 0.001
) -> optax.GradientTransformationExtraArgs:
  """Sharpness-aware gradient matching: half the gradient here and half that at `params + (rho / ||g|| - alpha) g`.

  Taking alpha g off the ascent step draws the two gradients to one another's direction, so that the loss and the
  perturbed loss fall together.

  >>> import jax, jax.numpy as jnp, optax
  >>> grad = jax.grad(lambda w: jnp.sum(w**2) / 2)
  >>> params, tx = jnp.array([3.0, 4.0]), sagm(optax.sgd(1.0), rho=5.0, alpha=0.0)
  >>> updates, _ = tx.update(grad(params), tx.init(params), params, grad_fn=lambda params, _: grad(params))
  >>> updates.tolist()
  [-4.5, -6.0]

  Args:
    optimizer: as in `sam`.
    rho: as in `sam`.
    alpha: non-negative scalar, in units of a learning rate; may be traced.

  Returns:
    As `sam`; two gradients per step. The state is the optimizer's.

  Raises:
    ValueError: as `sam`.

  Reference: Wang, Zhang, Lei, Zhang, "Sharpness-Aware Gradient Matching for Domain Generalization", CVPR 2023, the
    update of Algorithm 1 (as in the official code).
  """
  check_hyperparameter("rho", rho, low=0, shape=())
  check_hyperparameter("alpha", alpha, low=0, shape=())

  def direction(gradient, params, grad_fn):
    unit, norm = _unit(gradient)
    other = grad_fn(_moved(params, unit, rho - alpha * norm), 0)
    return jax.tree.map(lambda a, b: a / 2 + b / 2, gradient, other)

  return _stepping("sagm", optimizer, direction)


def gam(
  optimizer: optax.GradientTransformation,
  *,
  rho: ArrayLike = 0.05,
  rho_norm: ArrayLike = 0.05,
  beta0: ArrayLike = 0.1,
  beta1: ArrayLike = 0.1,
  gamma: ArrayLike = 0.05,
) -> optax.GradientTransformationExtraArgs:
  """Gradient-norm-aware minimisation, accelerated: besides the loss, its gradient's norm is small all around.

  With g0 the gradient here, g1 that at `params + rho g0 / ||g0||`, g2 that at `params + rho_norm h / ||h||` where
  `h = g1 - g0` estimates the ascent of the norm, and g3 that `rho` further along g2: the direction is
  `u - gamma (m - <m, u> / ||u||^2 u)` with `u = beta1 g1 + (1 - beta1) g3` and `m = g0 + |1 - beta0| g2`. In low
  precision h is mostly rounding: keep the parameters in float32.

  >>> import jax, jax.numpy as jnp, optax
  >>> grad = jax.grad(lambda w: jnp.sum(w**2) / 2)
  >>> params, tx = jnp.array([3.0, 4.0]), gam(optax.sgd(1.0), rho=5.0, rho_norm=5.0, beta1=0.5)
  >>> updates, _ = tx.update(grad(params), tx.init(params), params, grad_fn=lambda params, _: grad(params))
  >>> [round(update, 3) for update in updates.tolist()]
  [-7.5, -10.0]

  Args:
    optimizer: as in `sam`.
    rho: as in `sam`.
    rho_norm: non-negative scalar, the length of the step along h; may be traced.
    beta0: non-negative scalar, see above; may be traced.
    beta1: scalar in [0, 1], the weight of SAM's gradient; 1 with `gamma` 0 is SAM; may be traced.
    gamma: non-negative scalar, how much is taken off of what the loss would gain across u; may be traced.

  Returns:
    As `sam`; four gradients per step. The state is the optimizer's.

  Raises:
    ValueError: as `sam`, or when a hyperparameter is out of range.

  Reference: Zhang, Xu, Yu, Zou, Cui, "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves
    Generalization", CVPR 2023, the accelerated algorithm (as in the official code).
  """
  for name, value in {"rho": rho, "rho_norm": rho_norm, "beta0": beta0, "gamma": gamma}.items():
    check_hyperparameter(name, value, low=0, shape=())
  check_hyperparameter("beta1", beta1, low=0, high=1, shape=())
  across = orthogonalize_gradients(per_leaf=False, renormalize=False, eps=0.0)

  def direction(g0, params, grad_fn):
    g1 = grad_fn(_moved(params, _unit(g0)[0], rho), 0)
    ascent = _unit(jax.tree.map(jnp.subtract, g1, g0))[0]
    there = _moved(params, ascent, rho_norm)
    g2 = grad_fn(there, 1)
    g3 = grad_fn(_moved(there, _unit(g2)[0], rho), 2)
    flat = jax.tree.map(lambda a, b: beta1 * a + (1 - beta1) * b, g1, g3)
    plain = jax.tree.map(lambda a, b: a + abs(1 - beta0) * b, g0, g2)
    rest, _ = across.update(plain, optax.EmptyState(), flat)
    return jax.tree.map(lambda u, o, g: (u - gamma * o).astype(g.dtype), flat, rest, g0)

  return _stepping("gam", optimizer, direction)


def udim_value_and_grad(
  network: Callable,
  craft: Callable,
  *,
  weight: ArrayLike = 1.0,
  rho: ArrayLike = 0.05,
  center: str = "source",
  num_domains: int = 1,
  axis_name: str | None = None,
) -> Callable:
  """Unknown domain inconsistency minimisation: SAM's gradient of the source loss, plus that of an inconsistency.

  The loss is the mean cross-entropy of source data alone; crafted data enter by `inconsistency_penalty`, whose gradient
  is taken at the parameters as they are and added `weight` times. For any optimizer, in place of `jax.value_and_grad`.
  The paper trains by SAM alone (weight 0) for the first fifth or third of the steps, and keeps batch statistics fixed
  after that.

  >>> import functools, jax, jax.numpy as jnp
  >>> from jaxreg.adversarial import craft_domain
  >>> network = lambda params, inputs: (jnp.tanh(inputs @ params["hidden"]), params["head"])
  >>> craft = functools.partial(craft_domain, step_size=1.0)
  >>> gradient_fn = udim_value_and_grad(network, craft, weight=0.5)
  >>> params = {"hidden": jnp.eye(2), "head": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
  >>> (loss, inconsistency), gradient = gradient_fn(params, jnp.eye(2), jnp.array([0, 1]))
  >>> jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
  True

  Args:
    network: `(params, inputs) -> (features, head)`, the features `[batch, features]` under a linear head: `kernel`
      `[features, classes]` of two at least and perhaps `bias` `[classes]`, as Flax's `Dense` has them.
    craft: `(loss_fn, params, inputs) -> inputs`, for example `craft_domain` or `craft_style` with their step size; its
      `rho` is its own. Its first gradient in the parameters is the one that is computed here, once under `jit`.
    weight: lambda, non-negative scalar; may be traced.
    rho: as in `sam`.
    center: as in `inconsistency_penalty`; static.
    num_domains: of source data, in equal consecutive blocks of the batch, over which the inconsistency is summed;
      static.
    axis_name: the mapped axis over which every domain's block is split in equal parts, or None. Give `craft` its own.

  Returns:
    `(params, inputs, labels, where=None) -> ((loss, inconsistency), gradient)`, both values at the parameters as they
    are. Examples with another label than a class, or not in the boolean `where` `[batch]`, count for nothing.

  Raises:
    ValueError: when the batch is not of `num_domains` equal blocks, shapes or dtypes do not fit, or a hyperparameter is
      out of range.

  Reference: Shin, Bae, Na, Kim, Moon, "Unknown Domain Inconsistency Minimization for Domain Generalization", ICLR 2024,
    the update (as in the official code).
  """
  check_hyperparameter("weight", weight, low=0, shape=())
  check_hyperparameter("rho", rho, low=0, shape=())
  num_domains = static_integer("num_domains", num_domains, low=1)
  together = lambda tree: tree if axis_name is None else jax.lax.pmean(tree, axis_name)

  def value_and_grad(params, inputs, labels, where=None):
    inputs, labels, counted = _batch(network, params, inputs, labels, where, num_domains)
    total = together(jnp.sum(counted))
    blocks = lambda x: x.reshape(num_domains, -1, *x.shape[1:])

    def loss_fn(params, inputs):
      features, head = network(params, inputs)
      logits = widened(features @ head["kernel"] + head.get("bias", 0))
      each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.sum(jnp.where(counted, each, 0)) / jnp.where(total == 0, 1, total)

    def inconsistency(params):
      # Apart, so that the source data's features are those of the loss, which are there already.
      (source, head), (moved, _) = network(params, inputs), network(params, crafted)
      return inconsistency_penalty(
        blocks(source), blocks(moved), blocks(labels), head, center=center, where=blocks(counted), axis_name=axis_name
      )

    # `craft_domain` computes the same first gradient in the parameters: the compiler does so once.
    crafted = jax.lax.stop_gradient(craft(loss_fn, params, inputs))
    loss, gradient = together(jax.value_and_grad(loss_fn)(params, inputs))
    sharp = together(jax.grad(loss_fn)(_moved(params, _unit(gradient)[0], rho), inputs))
    penalty, slope = together(jax.value_and_grad(inconsistency)(params))
    return (loss, penalty), jax.tree.map(lambda a, b: (a + weight * b).astype(a.dtype), sharp, slope)

  return value_and_grad


def _batch(network, params, inputs, labels, where, num_domains):
  """Checked inputs without those of examples that do not count, labels, and which examples do."""
  check_float("inputs", inputs)
  inputs, labels = as_array("inputs", inputs), as_array("labels", labels)
  if inputs.ndim < 1 or not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != inputs.shape[:1]:
    raise ValueError(
      f"inputs must be [batch, ...] and labels integers [batch], got {inputs.shape} and {labels.shape} of dtype"
      f" {labels.dtype}."
    )
  if len(inputs) % num_domains:
    raise ValueError(f"inputs must be {num_domains} equal blocks, one per domain, got a batch of {len(inputs)}.")
  _, head = jax.eval_shape(network, params, inputs)
  if head["kernel"].shape[-1] < 2:
    raise ValueError(f"network's head must have a column for each of two classes at least, got {head['kernel'].shape}.")
  labels, known = counted_labels(labels, head["kernel"].shape[-1])
  counted = example_mask(where, labels.shape) & known
  return jnp.where(counted.reshape(-1, *[1] * (inputs.ndim - 1)), inputs, 0), labels, counted


def _stepping(name: str, optimizer, direction: Callable):
  """The optimizer fed with `direction(gradient, params, grad_fn)`."""

  def update(updates, state, params, *, grad_fn):
    return optimizer.update(direction(updates, params, grad_fn), state, params)

  return _checked(name, optimizer.init, update)


def _checked(name: str, init: Callable, update: Callable):
  def checked(updates, state, params=None, *, grad_fn=None, **extra_args):
    del extra_args
    check_updates(updates, params, name)
    if grad_fn is None:
      raise ValueError(f"grad_fn must be given to the update of {name}, got None.")
    return update(updates, state, params, grad_fn=grad_fn)

  return optax.GradientTransformationExtraArgs(init, checked)


def _unit(gradient):
  """The tree divided by its norm, in float32 at least, and the norm; a tree of zeros stays so."""
  leaves, structure = jax.tree.flatten(gradient)
  scaled, size = scaled_tensors(leaves)
  length = jnp.sqrt(inner_product(scaled, scaled))
  divisor = jnp.where(length == 0, 1, length)
  return structure.unflatten([leaf / divisor for leaf in scaled]), size * length


def _moved(params, direction, length):
  return optax.apply_updates(params, jax.tree.map(lambda leaf: length * leaf, direction))
