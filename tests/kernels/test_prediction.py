"""Predictions of networks of infinite width: conditional Gaussians and ensembles of linear models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxreg.kernels import prediction
from jaxreg.kernels.dual_activations import erf_dual, relu_dual
from jaxreg.kernels.gradient_flow import gradient_descent_coefficients, kernel_eigensystem
from jaxreg.kernels.infinite_width import KernelState, fully_connected
from tests.conformance import row

TRAIN, TEST = (np.random.default_rng(seed).normal(size=(count, 3)) for seed, count in ((0, 7), (1, 4)))
TARGETS = np.random.default_rng(2).normal(size=(7, 2))


@functools.cache
def states():
  network = lambda x, y=None: fully_connected(x, y, depth=2, dual=erf_dual(), weight_variance=1.5, bias_variance=0.1)
  with jax.enable_x64(True):
    return network(jnp.asarray(TRAIN)), network(jnp.asarray(TEST), jnp.asarray(TRAIN)), network(jnp.asarray(TEST))


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_posterior_is_the_conditional_gaussian(x64, noise):
  """From the precision matrix of both sets together, by which the test outputs' block is conditioned."""
  train, cross, test = (np.asarray(state.covariance) for state in states())
  joint = np.block([[train + noise * np.eye(7), cross.T], [cross, test]])
  precision = np.linalg.inv(joint)
  covariance = np.linalg.inv(precision[7:, 7:])
  posterior = jax.jit(prediction.nngp_posterior)(*states(), TARGETS, noise=noise)
  np.testing.assert_allclose(posterior.covariance, covariance, rtol=1e-7, atol=1e-10)
  np.testing.assert_allclose(posterior.mean, -covariance @ precision[7:, :7] @ TARGETS, rtol=1e-7)
  single = prediction.nngp_posterior(*states(), TARGETS[:, 0], noise=noise)
  np.testing.assert_allclose(single.mean, posterior.mean[:, 0])


def linear_networks(kind):
  """Features whose Gram matrices are the tangent kernel, and initial outputs with the covariance K, as matrices."""
  pick = {"ntk": lambda s: s.ntk, "nngp": lambda s: s.covariance}[kind]
  train, cross, test = (np.asarray(pick(state)) for state in states())
  dynamics = np.block([[train, cross.T], [cross, test]])
  train, cross, test = (np.asarray(state.covariance) for state in states())
  return dynamics, np.block([[train, cross.T], [cross, test]])


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize("time, ridge", [(0.0, 0.0), (0.7, 0.0), (5.0, 0.2), (jnp.inf, 0.0), (jnp.inf, 0.2)])
def test_ensembles_are_linear_models_trained_by_gradient_flow(x64, kind, time, ridge):
  """The differential equation of the outputs, solved by a matrix exponential, from random initial outputs."""
  dynamics, initial = linear_networks(kind)
  # df/dt = -T_.d (f_d - y) - ridge (f - f_0), for the change g = f - f_0 of the training outputs:
  train = dynamics[:7, :7]
  rate = train + ridge * np.eye(7)
  filter_ = np.linalg.inv(rate)
  if np.isfinite(time):
    filter_ = filter_ @ (np.eye(7) - scipy.linalg.expm(-rate * time))
  to_outputs = dynamics[7:, :7] @ filter_  # of y - f_0
  mapping = np.concatenate([-to_outputs, np.eye(4)], 1)  # of all initial outputs
  ensemble = {"ntk": prediction.ntk_ensemble, "nngp": prediction.nngp_ensemble}[kind]
  got = jax.jit(ensemble)(*states(), TARGETS, time=time, ridge=ridge)
  np.testing.assert_allclose(got.mean, to_outputs @ TARGETS, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(got.covariance, mapping @ initial @ mapping.T, rtol=1e-6, atol=1e-9)


def test_the_flow_is_that_of_small_steps(x64):
  """Gradient descent of a linear model with these kernels, one step after the other."""
  dynamics, _ = linear_networks("ntk")
  rate, steps = 1e-4, 20_000
  change = np.zeros((11, 2))
  step = lambda _, change: change + rate * dynamics[:, :7] @ (TARGETS - change[:7])
  change = jax.jit(lambda change: jax.lax.fori_loop(0, steps, step, change))(change)
  got = prediction.ntk_ensemble(*states(), TARGETS, time=rate * steps)
  np.testing.assert_allclose(got.mean, change[7:], rtol=1e-3, atol=1e-4)


def test_last_layer_alone_ends_at_the_posterior(x64):
  ensemble, posterior = prediction.nngp_ensemble(*states(), TARGETS), prediction.nngp_posterior(*states(), TARGETS)
  for a, b in zip(ensemble, posterior, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def test_training_inputs_are_known(x64):
  train = states()[0]
  for function in (prediction.nngp_posterior, prediction.ntk_ensemble):
    got = function(train, train, train, TARGETS)
    np.testing.assert_allclose(got.mean, TARGETS, rtol=1e-7)
    np.testing.assert_allclose(got.covariance, 0, atol=1e-9)


def test_close_inputs_in_float32():
  """Variances stay what they are in float64, and are not negative."""
  line, others = np.linspace(-3, 3, 100)[:, None], np.linspace(-2.9, 2.9, 21)[:, None]
  targets = np.sin(2 * line[:, 0])
  network = lambda x, y=None: fully_connected(x, y, depth=1, dual=relu_dual(), weight_variance=2.0, bias_variance=0.1)

  @jax.jit
  def predict(line, others, targets):
    return prediction.ntk_ensemble(network(line), network(others, line), network(others), targets, ridge=1e-2)

  got = predict(*(jnp.asarray(x, jnp.float32) for x in (line, others, targets)))
  with jax.enable_x64(True):
    exact = [np.asarray(leaf) for leaf in predict(*(np.asarray(x, np.float32) * 1.0 for x in (line, others, targets)))]
  np.testing.assert_allclose(got.mean, exact[0], atol=2e-3)
  assert (np.diagonal(got.covariance) >= 0).all()
  np.testing.assert_allclose(got.covariance, exact[1], atol=1e-3)


@pytest.mark.parametrize("ridge, momentum", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.9)])
def test_largest_learning_rate(x64, ridge, momentum):
  gram = states()[0].ntk
  largest = float(prediction.largest_learning_rate(gram, ridge=ridge, momentum=momentum))
  if momentum == 0:
    spread = lambda share: jnp.abs(
      gradient_descent_coefficients(
        kernel_eigensystem(gram), TARGETS, steps=4000, learning_rate=share * largest, ridge=ridge
      )
    ).max()
    assert spread(0.999) < 1e3 < spread(1.01)
  # The heavy ball on the largest eigenvalue: both roots of its recursion inside the unit circle.
  value = float(np.linalg.eigvalsh(gram)[-1]) + ridge
  for share, inside in ((0.999, True), (1.001, False)):
    roots = np.roots([1, share * largest * value - 1 - momentum, momentum])
    assert (np.abs(roots).max() < 1) == inside


def test_bad_input():
  train, cross, test = states()
  flat = KernelState(*[jnp.ones(2)] * 4)
  for message, call in (
    ("targets must be", lambda: prediction.nngp_posterior(train, cross, test, TARGETS[:3])),
    ("train, cross and test must be", lambda: prediction.ntk_ensemble(train, train, test, TARGETS)),
    (
      "states must be of outputs",
      lambda: prediction.ntk_ensemble(flat, cross, test, TARGETS),
    ),
    ("noise must lie", lambda: prediction.nngp_posterior(train, cross, test, TARGETS, noise=-1.0)),
    ("time must lie", lambda: prediction.nngp_ensemble(train, cross, test, TARGETS, time=-1.0)),
    ("momentum must lie", lambda: prediction.largest_learning_rate(jnp.eye(2), momentum=1.0)),
    ("gram must be", lambda: prediction.largest_learning_rate(jnp.ones((2, 3)))),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def _predicted(function, **options):
  """Of inputs and targets, through a network."""

  def call(inputs, targets, **hyperparameters):
    network = lambda x, y=None: fully_connected(x, y, depth=1, dual=erf_dual(), bias_variance=0.1)
    inputs = jnp.asarray(inputs)
    inputs = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))  # else this call itself rounds
    others = 0.5 * inputs[:2] + 0.1
    return list(function(network(inputs), network(others, inputs), network(others), targets, **hyperparameters))

  return row(
    function,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(4, 2))),
    call=call,
    extreme=lambda inputs, targets: (np.resize([1.0, -1.0, 0.5], inputs.shape), targets),
    wide=True,
    options=options,
  )


ROWS = [
  _predicted(prediction.nngp_posterior, noise=(0.1, 1.0)),
  _predicted(prediction.ntk_ensemble, time=(0.5, 2.0), ridge=(0.1, 0.5)),
  _predicted(prediction.nngp_ensemble, time=(0.5, 2.0), ridge=(0.1, 0.5)),
  row(
    prediction.largest_learning_rate,
    lambda rng: (np.diag(rng.uniform(1, 2, 3)) + 0.1,),
    bad=(("gram", lambda gram: (gram[:2],)),),
    wide=True,
    options=dict(ridge=(0.1, 0.5), momentum=(0.1, 0.9)),
  ),
]


EXEMPT = {"Prediction": "what the functions of this module give"}
