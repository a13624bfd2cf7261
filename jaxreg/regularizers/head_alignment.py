"""Penalties on how the derivatives of the loss in the classifier's head differ between environments.

Features are `[environments, batch, features]`, and the head is one of `linear_head`, whose closed forms make no second
pass over anything but the last layer. Of another head its function and parameters may be given; its derivatives are
then those of automatic differentiation. Gradients flow into features and head. An environment without examples does
not count.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_state, example_mask
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.metrics.sizes import static_integer
from jaxreg.regularizers.environment_batch import (
  checked_features,
  class_labels,
  class_targets,
  example_weights,
  expanded,
  mean_of_environments,
)
from jaxreg.regularizers.linear_head import HeadBatch, labelled_batch

__all__ = ["FishrState", "fishr_init", "fishr_penalty", "hgp_penalty", "hutchinson_penalty", "rademacher_probes"]


class FishrState(NamedTuple):
  """Moving averages of the variances of the examples' gradients, each array of the head with a leading axis."""

  variances: Any


def hgp_penalty(
  features: ArrayLike,
  labels: ArrayLike,
  head: Any,
  *,
  product_weight: ArrayLike,
  gradient_weight: ArrayLike,
  where: ArrayLike | None = None,
  stop_reference: bool = True,
  apply: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Aligns the head's gradients and Hessian-gradient products of environments with those of their mean loss (HGP).

  `mean_e (product_weight |H_e g_e - H g|^2 + gradient_weight |g_e - g|^2)` with g and H of the mean over environments.
  It grows with the fourth power of the features and more: weights differ by magnitudes between networks.

  >>> import jax.numpy as jnp
  >>> features, labels = jnp.array([[[1.0]], [[3.0]]]), jnp.array([[0], [0]])
  >>> hgp_penalty(features, labels, {"kernel": jnp.zeros((1, 2))}, product_weight=0.0, gradient_weight=1.0).item()
  0.5

  Args:
    features: floating `[environments, batch, features]`.
    labels: integers `[environments, batch]`; examples with another label than a class count for nothing.
    head: `kernel` floating `[features, classes]` and perhaps `bias` `[classes]`, one column for two classes; with
      `apply` any tree of floating arrays.
    product_weight: the official code's alpha, non-negative scalar; may be traced.
    gradient_weight: its beta, non-negative scalar; may be traced.
    where: boolean `[environments, batch]`: the examples that count, by which environments may differ in size.
    stop_reference: whether g and H g are constants under differentiation; static. That of g changes no gradient.
    apply: `(head, features[batch, ...]) -> logits[batch, classes]` of a head that is not linear; static.

  Returns:
    Scalar, in the dtype of the features.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: Hemati, Zhang, Estiri, Chen, "Understanding Hessian Alignment for Domain Generalization", ICCV 2023, HGP
    (as in the official code, whose reference is the product of the mean loss, not the mean product).
  """
  batch = _batch(features, labels, head, where, apply)
  constant = jax.lax.stop_gradient if stop_reference else lambda tree: tree
  gradients = batch.gradient()
  mean = mean_of_environments(gradients, _present(batch))
  products = batch.product(gradients)
  reference = mean_of_environments(batch.product(mean), _present(batch))
  of_products = _distances(products, constant(reference))
  of_gradients = _distances(gradients, constant(mean))
  return _weighted(of_products, product_weight, "product_weight", of_gradients, gradient_weight, batch, features)


def hutchinson_penalty(
  features: ArrayLike,
  labels: ArrayLike,
  head: Any,
  *,
  diagonal_weight: ArrayLike,
  gradient_weight: ArrayLike,
  probes: Any = None,
  where: ArrayLike | None = None,
  stop_reference: bool = True,
  apply: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Aligns the head's gradients and Hessian diagonals of environments with those of their mean loss.

  `mean_e (diagonal_weight |D_e - D|^2 + gradient_weight |g_e - g|^2)`. By default the diagonals are exact. The paper
  estimates them by `mean_r z_r * (H z_r)` of random signs z, of which the squared distance is larger by the estimates'
  variance; signs that the environments share estimate their differences with less noise than independent ones.

  >>> import jax.numpy as jnp
  >>> features, labels = jnp.array([[[1.0]], [[3.0]]]), jnp.array([[0], [0]])
  >>> head = {"kernel": jnp.zeros((1, 2))}
  >>> hutchinson_penalty(features, labels, head, diagonal_weight=1.0, gradient_weight=0.0).item()
  2.0

  Args:
    features, labels, head, where, stop_reference, apply: as in `hgp_penalty`.
    diagonal_weight: the official code's alpha, non-negative scalar; may be traced.
    gradient_weight: its beta, non-negative scalar; may be traced.
    probes: signs as `rademacher_probes` draws them, a tree like the head with leading axes: `[samples, ...]` shared by
      all environments, or `[environments + 1, samples, ...]`, the first of the mean loss and then those of each
      environment, as in the official code. None for exact diagonals, which only a linear head has. Memory grows with
      the number of samples.

  Returns:
    Scalar, in the dtype of the features.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: Hemati et al., ICCV 2023, Hutchinson (as in the official code).
  """
  batch = _batch(features, labels, head, where, apply)
  constant = jax.lax.stop_gradient if stop_reference else lambda tree: tree
  gradients = batch.gradient()
  if probes is None:
    if apply is not None:
      raise ValueError("probes must be given for a head that is not linear, got None.")
    diagonals = batch.diagonal()
    reference = mean_of_environments(diagonals, _present(batch))
  else:
    diagonals, reference = _estimates(batch, _checked_probes(probes, batch))
  of_diagonals = _distances(diagonals, constant(reference))
  of_gradients = _distances(gradients, constant(mean_of_environments(gradients, _present(batch))))
  return _weighted(of_diagonals, diagonal_weight, "diagonal_weight", of_gradients, gradient_weight, batch, features)


def rademacher_probes(key: jax.Array, head: Any, *, samples: int, environments: int | None = None) -> Any:
  """Random signs like a head, for `hutchinson_penalty`.

  >>> import jax, jax.numpy as jnp
  >>> head = {"kernel": jnp.zeros((2, 3))}
  >>> rademacher_probes(jax.random.key(0), head, samples=5)["kernel"].shape
  (5, 2, 3)
  >>> rademacher_probes(jax.random.key(0), head, samples=5, environments=2)["kernel"].shape
  (3, 5, 2, 3)

  Args:
    key: threefry key; draw anew at every step.
    head: a tree of floating arrays.
    samples: number of probes, at least 1; static. The official code has 300.
    environments: their number for probes that are independent, None for shared ones; static.

  Returns:
    A tree like the head, of -1 and 1 in its dtypes, with leading axes `[samples]` or `[environments + 1, samples]`.

  Raises:
    ValueError: when a size is not positive or the head is not floating point.

  Reference: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines",
    Communications in Statistics 1989.
  """
  leading = (static_integer("samples", samples, low=1),)
  if environments is not None:
    leading = (static_integer("environments", environments, low=1) + 1, *leading)
  leaves, structure = jax.tree.flatten(head)
  for leaf in leaves:
    check_float("head", leaf)
  draw = lambda key, leaf: jax.random.rademacher(key, (*leading, *jnp.shape(leaf)), jnp.result_type(leaf))
  return structure.unflatten([draw(key, leaf) for key, leaf in zip(jax.random.split(key, max(len(leaves), 1)), leaves)])


def fishr_init(head: Any, *, environments: int) -> FishrState:
  """Moving averages of zeros, with which Fishr starts.

  >>> import jax.numpy as jnp
  >>> fishr_init({"kernel": jnp.zeros((2, 3), jnp.bfloat16)}, environments=4).variances["kernel"].shape
  (4, 2, 3)

  Args:
    head: a tree of floating arrays.
    environments: their number; static.

  Returns:
    `FishrState`, of float32 at least.

  Raises:
    ValueError: when the head is not floating point or `environments` is not positive.

  Reference: Rame, Dancette, Cord, "Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization", ICML
    2022.
  """
  environments = static_integer("environments", environments, low=1)

  def zeros(leaf):
    check_float("head", leaf)
    return jnp.zeros((environments, *jnp.shape(leaf)), jnp.promote_types(jnp.result_type(leaf), jnp.float32))

  return FishrState(jax.tree.map(zeros, head))


def fishr_penalty(
  features: ArrayLike,
  labels: ArrayLike,
  head: Any,
  state: FishrState,
  *,
  decay: ArrayLike,
  where: ArrayLike | None = None,
  apply: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, FishrState]:
  """Aligns the variances of the examples' gradients in the head between environments (Fishr).

  The squared distance of the environments' variances from their mean, a mean over environments and parameters. The
  variances are `m / (1 - decay)` with m their moving average, so that their gradients do not depend on `decay`; this
  makes them larger with every step until the average has settled.

  >>> import jax.numpy as jnp
  >>> features, labels = jnp.array([[[1.0], [1.0]], [[1.0], [3.0]]]), jnp.zeros((2, 2), int)
  >>> head = {"kernel": jnp.zeros((1, 2))}
  >>> penalty, state = fishr_penalty(features, labels, head, fishr_init(head, environments=2), decay=0.5)
  >>> penalty.item(), state.variances["kernel"][1].tolist()
  (0.015625, [[0.125, 0.125]])

  Args:
    features, labels, head, where, apply: as in `hgp_penalty`. With `apply` every example's gradient is formed.
    state: moving averages, at first `fishr_init(…)`; those of an environment without examples stay.
    decay: of the moving averages, in [0, 1); may be traced.

  Returns:
    Scalar, in the dtype of the features, and the new state.

  Raises:
    ValueError: when shapes or dtypes do not fit or `decay` is out of range.

  Reference: Rame et al., ICML 2022, equation 4 (moving averages as in the official code).
  """
  check_hyperparameter("decay", decay, low=0, high=1, open_high=True, shape=())
  check_state(state, FishrState)
  batch = _batch(features, labels, head, where, apply)
  variances, _ = batch.moments()
  before = _like(state.variances, variances, "state")
  keep = jnp.asarray(decay, batch.weights.dtype)
  some = _present(batch)
  averages = jax.tree.map(
    lambda old, new: jnp.where(expanded(some, new), keep * old + (1 - keep) * new, old), before, variances
  )
  corrected = jax.tree.map(lambda average: average / (1 - keep), averages)
  size = sum(leaf[0].size for leaf in jax.tree.leaves(variances))
  distances = _distances(corrected, mean_of_environments(corrected, _present(batch)))
  penalty = mean_of_environments(distances, some) / size
  kept = jax.tree.map(lambda new, old: jax.lax.stop_gradient(new).astype(old.dtype), averages, state.variances)
  return narrowed(penalty, jnp.result_type(features)), FishrState(kept)


class _OtherBatch(NamedTuple):
  """What `HeadBatch` computes in closed form, by automatic differentiation, of environments."""

  features: jax.Array
  labels: jax.Array
  weights: jax.Array
  head: Any
  apply: Callable

  def _loss(self, head, features, labels, weights):
    logits = widened(self.apply(head, features))
    if logits.shape[-1] == 1:
      losses = optax.sigmoid_binary_cross_entropy(logits, class_targets(labels, 1, logits.dtype))[..., 0]
    else:
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(weights * losses)

  def _each(self, function, *others):
    return jax.vmap(function)(self.features, self.labels, self.weights, *others)

  def gradient(self):
    return self._each(lambda *own: jax.grad(self._loss)(self.head, *own))

  def product(self, direction):
    def one(features, labels, weights, direction):
      gradient = lambda head: jax.grad(self._loss)(head, features, labels, weights)
      return jax.jvp(gradient, (self.head,), (direction,))[1]

    environments = self.features.shape[0]
    expand = lambda leaf, own: leaf if leaf.ndim > own.ndim else jnp.broadcast_to(leaf, (environments, *own.shape))
    return self._each(one, jax.tree.map(expand, direction, self.head))

  def moments(self):
    def one(features, labels, weights):
      alone = lambda feature, label: jax.grad(self._loss)(self.head, feature[None], label[None], jnp.ones(1))
      gradients = jax.vmap(alone)(features, labels)
      mean = jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), gradients)
      return jax.tree.map(lambda g, m: jnp.tensordot(weights, (g - m) ** 2, 1), gradients, mean), mean

    return self._each(one)


def _batch(features, labels, head, where, apply) -> HeadBatch | _OtherBatch:
  if apply is None:
    return labelled_batch(features, labels, head, where, ndim=3)
  features = checked_features(features, ndim=3)
  for leaf in jax.tree.leaves(head):
    check_float("head", leaf)
  wide = jax.tree.map(lambda leaf: widened(as_array("head", leaf)), head)
  logits = jax.eval_shape(apply, wide, jax.ShapeDtypeStruct(features.shape[1:], widened(features).dtype))
  if getattr(logits, "ndim", 0) != 2 or logits.shape[0] != features.shape[1]:
    raise ValueError(f"apply must return logits [batch, classes], got {logits}.")
  labels, known = class_labels(labels, features.shape[:-1], logits.shape[1])
  counted = known & example_mask(where, features.shape[:-1])
  features = jnp.where(counted[..., None], widened(features), 0)
  return _OtherBatch(features, labels, example_weights(counted, features.dtype), wide, apply)


def _checked_probes(probes, batch):
  """Probes in the dtype of the computation, and whether each environment has its own."""
  if jax.tree.structure(probes) != jax.tree.structure(batch.head):
    raise ValueError(
      f"probes must be a tree like the head, {jax.tree.structure(batch.head)}, got {jax.tree.structure(probes)}."
    )
  shapes = [(jnp.shape(probe), leaf.shape) for probe, leaf in zip(*map(jax.tree.leaves, (probes, batch.head)))]
  leading = {probe[: len(probe) - len(own)] for probe, own in shapes}
  environments = batch.features.shape[0]
  fits = all(probe[len(probe) - len(own) :] == own for probe, own in shapes) and len(leading) == 1
  (axes,) = leading if fits else ((),)
  if not (len(axes) == 1 or (len(axes) == 2 and axes[0] == environments + 1)):
    raise ValueError(
      f"probes must be like the head with axes [samples] or [{environments + 1}, samples] before, got shapes"
      f" {[probe for probe, _ in shapes]}."
    )
  return jax.tree.map(lambda probe, leaf: as_array("probes", probe).astype(leaf.dtype), probes, batch.head)


def _estimates(batch, probes):
  """Estimates of the diagonals of the environments, and of their mean loss."""
  shared = jax.tree.leaves(probes)[0].ndim - jax.tree.leaves(batch.head)[0].ndim == 1
  own = lambda probe, product: probe * product
  average = lambda trees: jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), trees)
  estimate = lambda probe: jax.tree.map(own, probe, batch.product(probe))
  if shared:
    diagonals = average(jax.vmap(estimate)(probes))
    return diagonals, mean_of_environments(diagonals, _present(batch))
  reference = mean_of_environments(
    average(jax.vmap(estimate)(jax.tree.map(lambda probe: probe[0], probes))), _present(batch)
  )
  by_sample = jax.tree.map(lambda probe: jnp.swapaxes(probe[1:], 0, 1), probes)
  return average(jax.vmap(estimate)(by_sample)), reference


def _present(batch):
  """Which environments have examples."""
  return jnp.any(batch.weights > 0, axis=-1)


def _distances(trees, reference):
  """Squared distances of each environment's tree from one, `[environments]`."""
  squares = lambda one, other: jnp.sum((one - other) ** 2, axis=tuple(range(1, one.ndim)))
  return sum(jax.tree.leaves(jax.tree.map(squares, trees, reference)))


def _weighted(curvature, curvature_weight, name, gradient, gradient_weight, batch, features):
  check_hyperparameter(name, curvature_weight, low=0, shape=())
  check_hyperparameter("gradient_weight", gradient_weight, low=0, shape=())
  total = jnp.asarray(curvature_weight, curvature.dtype) * curvature
  total += jnp.asarray(gradient_weight, gradient.dtype) * gradient
  return narrowed(mean_of_environments(total, _present(batch)), jnp.result_type(features))


def _like(tree, other, name):
  """A tree in the dtypes of another, whose structure and shapes it must have."""
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  if shapes(tree) != shapes(other):
    raise ValueError(f"{name} must hold arrays of shapes {shapes(other)}, got {shapes(tree)}.")
  return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), tree, other)
