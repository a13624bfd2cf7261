"""Dynamical mean-field theory of gradient descent on the committee machine: losses at infinite dimension, no network.

With inputs of dimension `D`, `P = kappa D` examples and `N` neurons, `D` and `P` going to infinity, the fields
`W_t x_mu` of one example follow a Gaussian process with memory, and its covariance and responses follow from averages
over that process. All is causal, so that one pass forward in time solves it; only the averages are Monte Carlo.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter

__all__ = ["CommitteeDMFT", "committee_dmft"]


class CommitteeDMFT(NamedTuple):
  """Losses and order parameters at times 0, …, steps, averaged over replicates.

  Attributes:
    train_loss: `[steps + 1]`, mean squared error on the training set.
    test_loss: `[steps + 1]`, population mean squared error.
    train_error: `[steps + 1]`, standard error of `train_loss`, from the spread of the replicates.
    test_error: `[steps + 1]`, standard error of `test_loss`.
    covariance: `[steps + 1, steps + 1, neurons, neurons]`, `W_t W_s^T / D`.
    overlap: `[steps + 1, neurons]`, `W_t beta / D`.
  """

  train_loss: jax.Array
  test_loss: jax.Array
  train_error: jax.Array
  test_error: jax.Array
  covariance: jax.Array
  overlap: jax.Array


class _Order(NamedTuple):
  """Order parameters up to the present, zero beyond; the first axes are times."""

  covariance: jax.Array  # [times, times, N, N]
  overlap: jax.Array  # [times, N]
  weight_response: jax.Array  # [times, times, N, N], of the weights at t to a kick before q + 1
  force_covariance: jax.Array  # [times, times, N, N]


class _Samples(NamedTuple):
  """What every sampled example remembers of its past; the first axis is time, the last the samples."""

  force: jax.Array  # [times, N, samples]
  force_response: jax.Array  # [times, N, times, N, samples], of the force at t to a kick of the field at q
  teacher_response: jax.Array  # [times, N, samples], of the force at t to the teacher's field


@functools.partial(jax.jit, static_argnames=("neurons", "steps", "samples", "replicates"))
def _solve(key, kappa, output_scale, curvature, learning_rate, neurons, steps, samples, replicates):
  solve = functools.partial(
    _replicate,
    kappa=kappa,
    output_scale=output_scale,
    curvature=curvature,
    step_size=learning_rate / output_scale,
    neurons=neurons,
    steps=steps,
    samples=samples,
  )
  train, test, order = jax.lax.map(solve, jax.random.split(key, replicates))
  error = lambda losses: jnp.std(losses, axis=0, ddof=1) / replicates**0.5
  return CommitteeDMFT(
    train.mean(0), test.mean(0), error(train), error(test), order.covariance.mean(0), order.overlap.mean(0)
  )


def committee_dmft(
  key: jax.Array,
  *,
  kappa: ArrayLike,
  neurons: int,
  steps: int,
  output_scale: ArrayLike = 1.0,
  curvature: ArrayLike = 1.0,
  learning_rate: ArrayLike = 0.1,
  samples: int = 4096,
  replicates: int = 8,
) -> CommitteeDMFT:
  """Training and test loss of full-batch gradient descent on the committee machine, in the limit of many dimensions.

  The network is `f = (a / N) sum_i phi(w_i . x)`, not centred, from standard normal weights, with the teacher
  `(beta . x)^2 / 2`, `|beta|^2 = D`; a step is `w_i -= (eta / a) sum_mu (f_mu - y_mu) phi'(w_i . x_mu) x_mu`. Fields of
  one example are `h_t = u_t - (eta / a) sum_{q < t} R_w[t, q] g_q` with the force `g_t = (f_t - y) phi'(h_t)` and `u`
  Gaussian; the sum, the memory of the training set, is all that separates training from test examples.

  Time grows with `replicates samples steps^3 neurons^3`, memory with `samples steps^2 neurons^2`. The only error is
  that of Monte Carlo, which is returned: a few thousandths of the loss at the defaults, falling with
  `(samples replicates)^(-1/2)`.

  >>> import jax
  >>> theory = committee_dmft(jax.random.key(0), kappa=2.0, neurons=2, steps=3, curvature=0.5, samples=512)
  >>> bool(theory.train_loss[3] < theory.test_loss[3] < theory.train_loss[0])
  True

  Args:
    key: of the Monte Carlo samples.
    kappa: positive, training examples per dimension; may be traced.
    neurons: static, N.
    steps: static, number of steps.
    output_scale: positive `a`; may be traced.
    curvature: `c` of `phi(h) = h + (c / 2) h^2`; may be traced.
    learning_rate: positive `eta`, in units in which the early dynamics does not depend on the scale; stable below about
      `2 / (1 + sqrt(kappa))^2`; may be traced.
    samples: static, sampled examples of each replicate, more than `1 + neurons (steps + 1)`.
    replicates: static, at least 2 independent solutions, whose mean is returned.

  Returns:
    Losses with standard errors, and order parameters.

  Raises:
    ValueError: when an argument lies outside its domain.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, which announces a mean-field theory; the equations here were derived for this library in discrete time,
    and are not known to have the form of the paper's.
  """
  for name, value in (("kappa", kappa), ("output_scale", output_scale), ("learning_rate", learning_rate)):
    check_hyperparameter(name, value, low=0, open_low=True)
  check_hyperparameter("curvature", curvature)
  check_hyperparameter("neurons", neurons, low=1)
  check_hyperparameter("steps", steps, low=1)
  check_hyperparameter("replicates", replicates, low=2)
  check_hyperparameter("samples", samples, low=1 + neurons * (steps + 1), open_low=True)
  return _solve(key, kappa, output_scale, curvature, learning_rate, neurons, steps, samples, replicates)


def _replicate(key, *, kappa, output_scale, curvature, step_size, neurons, steps, samples):
  times = steps + 1
  normals = _whitened_normals(key, samples, 1 + neurons * times)
  teacher = normals[0]  # the first row of the Cholesky factor is (1, 0, …)
  dtype = normals.dtype
  identity = jnp.eye(neurons, dtype=dtype)
  square = jnp.zeros((times, times, neurons, neurons), dtype)
  order = _Order(square.at[0, 0].set(identity), jnp.zeros((times, neurons), dtype), square, square)
  forces = jnp.zeros((times, neurons, samples), dtype)
  past = _Samples(forces, jnp.zeros((times, neurons, times, neurons, samples), dtype), forces)

  def advance(carry, t):
    order, past = carry
    memory = order.weight_response[t]
    fields = _gaussian_fields(order, normals, t) - step_size * jnp.einsum("aij,ajs->is", memory, past.force)
    slope = 1 + curvature * fields
    error = output_scale * jnp.mean(fields + curvature / 2 * fields**2, axis=0) - teacher**2 / 2
    jacobian = output_scale / neurons * slope[:, None] * slope + curvature * error * identity[:, :, None]
    # Responses of the present field: direct, and through the forces that it remembers.
    kicked = -step_size * jnp.einsum("aij,ajqks->iqks", memory, past.force_response)
    kicked = kicked.at[:, t].add(identity[:, :, None])
    taught = -step_size * jnp.einsum("aij,ajs->is", memory, past.teacher_response)
    past = _Samples(
      past.force.at[t].set(error * slope),
      past.force_response.at[t].set(jnp.sum(jacobian[:, :, None, None] * kicked, axis=1)),
      past.teacher_response.at[t].set(jnp.sum(jacobian * taught, axis=1) - teacher * slope),
    )
    train, test = jnp.mean(error**2), _test_loss(order, t, output_scale, curvature)
    order = _advance_weights(order, past, t, kappa, step_size)
    return (order, past), (train, test)

  (order, _), (train, test) = jax.lax.scan(advance, (order, past), jnp.arange(times))
  return train, test, order


def _whitened_normals(key, samples: int, count: int):
  """Normals `[count, samples]` whose sample mean and covariance are exactly 0 and 1: second moments have no noise."""
  draws = jax.random.normal(key, (count, samples), jnp.promote_types(jnp.result_type(1.0), jnp.float32))
  draws = draws - draws.mean(1, keepdims=True)
  factor = jnp.linalg.cholesky(draws @ draws.T / samples)
  return jax.scipy.linalg.solve_triangular(factor, draws, lower=True)


def _gaussian_fields(order: _Order, normals, t):
  """The Gaussian part `[N, samples]` of the fields at time t, correlated with the teacher's and all earlier ones."""
  times, neurons = order.overlap.shape
  size = times * neurons
  joint = jnp.zeros((1 + size, 1 + size), normals.dtype).at[0, 0].set(1)
  joint = joint.at[0, 1:].set(order.overlap.reshape(-1)).at[1:, 0].set(order.overlap.reshape(-1))
  joint = joint.at[1:, 1:].set(order.covariance.transpose(0, 2, 1, 3).reshape(size, size))
  # The future is independent until it is known; successive fields are nearly equal, hence the jitter.
  known = jnp.concatenate([jnp.array([True]), jnp.repeat(jnp.arange(times) <= t, neurons)])
  joint = jnp.where(known[:, None] & known, joint, jnp.eye(1 + size, dtype=joint.dtype))
  jitter = 100 * jnp.finfo(joint.dtype).eps * jnp.diag(joint) * (jnp.arange(1 + size) > 0)
  factor = jnp.linalg.cholesky(joint + jnp.diag(jitter))
  rows = jax.lax.dynamic_slice_in_dim(factor, 1 + t * neurons, neurons)
  return rows @ normals


def _advance_weights(order: _Order, past: _Samples, t, kappa, step_size) -> _Order:
  """The order parameters that time t + 1 needs; at the last time there is none, and the writes are dropped."""
  covariance, overlap, response, force_covariance = order
  samples = past.force.shape[-1]
  now = jnp.einsum("is,qjs->qij", past.force[t], past.force) / samples
  force_covariance = force_covariance.at[t].set(now).at[:, t].set(now.transpose(0, 2, 1))
  kick = past.force_response[t].mean(-1).transpose(1, 0, 2)
  teacher = past.teacher_response[t].mean(-1)
  put = lambda array, value: array.at[t + 1].set(value, mode="drop")

  following = response[t] - step_size * kappa * jnp.einsum("aij,aqjk->qik", kick, response)
  following = following.at[t].set(jnp.eye(teacher.size, dtype=teacher.dtype))
  next_overlap = overlap[t] - step_size * kappa * (jnp.einsum("aij,aj->i", kick, overlap) + teacher)
  # Covariance of the weights, at t + 1 and before, with the noise that acts on them at t.
  noise = lambda rows: -step_size * kappa * jnp.einsum("...bij,bjk->...ik", rows, force_covariance[:, t])
  drift = kappa * jnp.einsum("aij,aqjk->qik", kick, covariance) + kappa * teacher[:, None] * overlap[:, None, :]
  row = covariance[t] - step_size * (noise(response).transpose(0, 2, 1) + drift)
  row = jnp.where((jnp.arange(overlap.shape[0]) <= t)[:, None, None], row, 0)
  drift = jnp.einsum("aij,akj->ik", row, kick) + next_overlap[:, None] * teacher
  last = row[t] - step_size * (noise(following) + kappa * drift)
  covariance = put(covariance, row)
  covariance = covariance.at[:, t + 1].set(row.transpose(0, 2, 1), mode="drop")
  covariance = covariance.at[t + 1, t + 1].set((last + last.T) / 2, mode="drop")
  return _Order(covariance, put(overlap, next_overlap), put(response, following), force_covariance)


def _test_loss(order: _Order, t, output_scale, curvature):
  """The closed-form risk, in terms of the order parameters."""
  covariance, overlap = order.covariance[t, t], order.overlap[t]
  neurons = overlap.size
  gain = output_scale * curvature / neurons
  variance = jnp.square(1 - gain * jnp.trace(covariance)) / 4
  misalignment = (1 - 2 * gain * jnp.sum(overlap**2) + gain**2 * jnp.sum(covariance**2)) / 2
  return variance + misalignment + (output_scale / neurons) ** 2 * jnp.sum(covariance)
