"""Losses of clean and attacked logits: margins in comp-sum form, their smooth upper bound, and TRADES."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter
from jaxreg.losses.comp_sum import comp_sum_outer, of_negative_log
from jaxreg.losses.labelled_logits import labelled, narrowed, widened
from jaxreg.losses.softmax_family import of_label, softmax_statistics

__all__ = [
  "adversarial_margin_comp_sum_loss",
  "margin_shift_norm",
  "rho_margin",
  "smooth_adversarial_comp_sum_loss",
  "trades_loss",
]


def rho_margin(margins: ArrayLike, *, rho: ArrayLike = 1.0) -> jax.Array:
  """The rho-margin function `min(max(0, 1 - margin / rho), 1)`.

  >>> import jax.numpy as jnp
  >>> rho_margin(jnp.array([-1.0, 0.5, 3.0]), rho=2.0).tolist()
  [1.0, 0.75, 0.0]

  Args:
    margins: floating `[...]`, differences of scores.
    rho: positive scalar (or array broadcasting against `margins`), in units of the scores; may be traced.

  Returns:
    `[...]` in [0, 1].

  Raises:
    ValueError: when `margins` are not floating point or `rho` is not positive.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the rho-margin loss (Section 5).
  """
  margins = as_array("margins", margins)
  check_float("margins", margins)
  check_hyperparameter("rho", rho, low=0, open_low=True, shape=margins.shape)
  wide = widened(margins)
  return narrowed(jnp.clip(1 - wide / jnp.asarray(rho, wide.dtype), 0, 1), margins.dtype)


def adversarial_margin_comp_sum_loss(
  adversarial_logits: ArrayLike,
  labels: ArrayLike,
  *,
  tau: ArrayLike = 1.0,
  rho: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The comp-sum loss of rho-margins, `Phi(sum_{k != y} rho_margin(z'_y - z'_k))` with `Phi` of `comp_sum_outer`.

  Divided by `Phi(1)` it is at least 1 where the attacked input is misclassified.

  >>> import jax.numpy as jnp
  >>> loss = adversarial_margin_comp_sum_loss(jnp.array([[2.0, 1.5, 0.0]]), jnp.array([0]), tau=0.0)
  >>> round(loss.item(), 3)
  0.5

  Args:
    adversarial_logits: the logits z' of attacked inputs, floating `[..., classes]`.
    labels: integers `[...]`.
    tau: non-negative scalar (or array broadcasting against `labels`); may be traced.
    rho: positive margin in units of the logits, scalar; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against the logits: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the adversarial comp-sum rho-margin losses (Section 5), at the attacked input.
  """
  batch = labelled(adversarial_logits, labels, axis=axis, where=where)
  rho = batch.hyperparameter("rho", rho, low=0, open_low=True, scalar=True)
  tau = batch.hyperparameter("tau", tau, low=0)
  terms = rho_margin(_margins(batch.logits, batch.labels), rho=rho)
  rivals = jnp.arange(terms.shape[-1]) != batch.labels[..., None]
  total = jnp.sum(terms, axis=-1, where=rivals if batch.where is None else rivals & batch.where)
  return batch.values(comp_sum_outer(total, tau=tau))


def margin_shift_norm(
  logits: ArrayLike,
  adversarial_logits: ArrayLike,
  labels: ArrayLike,
  *,
  epsilon: ArrayLike = 1e-12,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """How far an attack moves the margins: `sqrt(sum_k ((z'_y - z'_k) - (z_y - z_k))^2 + epsilon)`.

  Also the objective of the inner maximisation: its gradient in z' has the direction of the squared norm's.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.zeros((1, 3)), jnp.array([0])
  >>> round(margin_shift_norm(logits, jnp.array([[0.0, 3.0, 4.0]]), labels).item(), 3)
  5.0

  Args:
    logits: the logits z of clean inputs, floating `[..., classes]`.
    adversarial_logits: the logits z' of attacked inputs, likewise.
    labels: integers `[...]`.
    epsilon: positive scalar that makes the norm differentiable where nothing moved; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against the logits: the classes that take part, the label among them.

  Returns:
    `[...]`, in units of the logits.

  Raises:
    ValueError: when labels do not fit the logits, or the two kinds of logits each other, or `epsilon` is not positive.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the norm in the smooth adversarial comp-sum loss (Section 5).
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  attacked = batch.other_logits("adversarial_logits", adversarial_logits, axis)
  return batch.values(_shift_norm(batch, attacked, epsilon))


def smooth_adversarial_comp_sum_loss(
  logits: ArrayLike,
  adversarial_logits: ArrayLike,
  labels: ArrayLike,
  *,
  tau: ArrayLike = 1.0,
  rho: ArrayLike = 1.0,
  nu: ArrayLike = 1.0,
  epsilon: ArrayLike = 1e-12,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The smooth adversarial comp-sum loss `Phi(sum_{k != y} exp((z_k - z_y) / rho)) + nu * margin_shift_norm`.

  With `nu >= sqrt(classes - 1) / rho` it bounds `adversarial_margin_comp_sum_loss` from above, whatever the attack
  found; smaller values train better. `nu` is in units of the logits: where it is large, small models collapse to a
  constant. Train with gradients through both kinds of logits, the attacked input itself constant
  (`jaxreg.adversarial.attacks.pgd` of `margin_shift_norm`).

  >>> import jax.numpy as jnp
  >>> logits, attacked, labels = jnp.zeros((1, 3)), jnp.array([[0.0, 3.0, 4.0]]), jnp.array([0])
  >>> round(smooth_adversarial_comp_sum_loss(logits, attacked, labels, tau=0.0, nu=0.5).item(), 3)
  4.5

  Args:
    logits: the logits z of clean inputs, floating `[..., classes]`.
    adversarial_logits: the logits z' of attacked inputs, likewise.
    labels: integers `[...]`.
    tau: non-negative scalar (or array broadcasting against `labels`); may be traced.
    rho: positive margin in units of the logits, scalar; may be traced.
    nu: non-negative weight of the shift, scalar; may be traced.
    epsilon: positive scalar inside the norm's square root; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against the logits: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits, or the two kinds of logits each other, or a hyperparameter is out of
      range.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the smooth adversarial comp-sum losses (Section 5).
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  attacked = batch.other_logits("adversarial_logits", adversarial_logits, axis)
  rho = batch.hyperparameter("rho", rho, low=0, open_low=True, scalar=True)
  tau, nu = batch.hyperparameter("tau", tau, low=0), batch.hyperparameter("nu", nu, low=0)
  nll = -softmax_statistics(batch.logits / rho, batch.labels, batch.where).log_label
  return batch.values(of_negative_log(nll, tau) + nu * _shift_norm(batch, attacked, epsilon))


def trades_loss(
  logits: ArrayLike,
  adversarial_logits: ArrayLike,
  labels: ArrayLike,
  *,
  weight: ArrayLike = 6.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """TRADES: cross-entropy of the clean input plus `weight * KL(softmax(logits) || softmax(adversarial_logits))`.

  Gradients flow through both kinds of logits. The attack maximises the same divergence, which has no gradient at the
  clean input: start it elsewhere.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.zeros((1, 2)), jnp.array([1])
  >>> attacked = jnp.log(jnp.array([[0.8, 0.2]]))
  >>> round(trades_loss(logits, attacked, labels, weight=1.0).item(), 3)
  0.916

  Args:
    logits: the logits of clean inputs, floating `[..., classes]`.
    adversarial_logits: the logits of attacked inputs, likewise.
    labels: integers `[...]`.
    weight: the paper's 1 / lambda (beta in its code), non-negative scalar; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against the logits: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits, or the two kinds of logits each other, or `weight` is negative.

  Reference: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off between Robustness and
    Accuracy", ICML 2019, equation 5.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  attacked = batch.other_logits("adversarial_logits", adversarial_logits, axis)
  weight = batch.hyperparameter("weight", weight, low=0)
  clean, attacked = (jax.nn.log_softmax(x, where=batch.where) for x in (batch.logits, attacked))
  if batch.where is not None:  # both are -inf there, and their difference not a number
    clean, attacked = jnp.where(batch.where, clean, 0), jnp.where(batch.where, attacked, 0)
  divergence = optax.losses.kl_divergence_with_log_targets(attacked, clean, where=batch.where)
  return batch.values(weight * divergence - of_label(clean, batch.labels)[..., 0])


def _margins(logits, labels):
  """`z_y - z_k` for every class k."""
  return of_label(logits, labels) - logits


def _shift_norm(batch, attacked, epsilon):
  epsilon = batch.hyperparameter("epsilon", epsilon, low=0, open_low=True)
  moved = _margins(attacked - batch.logits, batch.labels)
  return jnp.sqrt(jnp.sum(moved**2, axis=-1, where=batch.where) + epsilon)  # the label's own entry is zero
