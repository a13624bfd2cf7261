"""Required inductive bias: the information needed to pick, among hypotheses that fit, one that generalises.

`I(target) = -log P(test error <= target)` for random hypotheses that fit the training set, in nats; divide by `log 2`
for bits. The probability is far too small to be counted, so a scaled noncentral chi-square law is fitted to sampled
errors and read in its lower tail. Compare only at equal target, test set, training set and scale of labels; below the
smallest sample the number is the fitted law's.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.noncentral_chi2 import noncentral_chi2_logcdf, noncentral_chi2_logpdf

__all__ = [
  "ScaledChi2",
  "bootstrap_inductive_bias",
  "encoded_inductive_bias",
  "fit_scaled_chi2",
  "required_inductive_bias",
  "sample_network_errors",
  "sankaran_inductive_bias",
  "scaled_chi2_inductive_bias",
]

# Shares of the noncentrality in the mean at which the fit starts.
_STARTS = (0.02, 0.4, 0.8)


class ScaledChi2(NamedTuple):
  """A law of test errors: `scale` times a noncentral chi-square variable.

  Degrees of freedom and noncentrality are hardly identified one by one: do not interpret them.

  Attributes:
    df: positive degrees of freedom.
    nc: non-negative noncentrality.
    scale: positive scale.
    log_likelihood: mean log density of the errors that it was fitted to.
  """

  df: jax.Array
  nc: jax.Array
  scale: jax.Array
  log_likelihood: jax.Array


def fit_scaled_chi2(errors: ArrayLike, *, steps: int = 60) -> ScaledChi2:
  """The scaled noncentral chi-square law of maximal likelihood, by L-BFGS on logarithms from three starts.

  Errors are divided by their mean first, so that the fit is equivariant under scaling. All errors must not be equal.

  >>> import jax
  >>> law = fit_scaled_chi2(0.5 * jax.random.chisquare(jax.random.key(0), 8.0, shape=(200,)))
  >>> bool(abs(law.scale * (law.df + law.nc) - 4.0) < 0.4)
  True

  Args:
    errors: floating `[samples]`, positive test errors of random hypotheses.
    steps: static, of L-BFGS from each start.

  Returns:
    The law, float32 at least (float64 is advisable).

  Raises:
    ValueError: when `errors` is not a vector of floats.

  Reference: Boopathy, Yue, Hwang, Iyer, Fiete, "Towards Exact Computation of Inductive Bias", IJCAI 2024, the fit of
    the error distribution.
  """
  return _fit(_check_errors("errors", errors), steps)


@functools.partial(jax.jit, static_argnames="steps")
def _fit(errors, steps: int) -> ScaledChi2:
  mean = jnp.mean(errors)
  ratio = jnp.var(errors) / mean**2
  shares = jnp.asarray(_STARTS, errors.dtype)
  totals = 2 * (1 + shares) / ratio  # df + nc with the right mean and variance
  starts = jnp.log(jnp.stack([(1 - shares) * totals, shares * totals, 1 / totals], axis=1))
  fits, losses = jax.lax.map(functools.partial(_minimize, errors=errors / mean, steps=steps), starts)
  best = jnp.argmin(losses)
  df, nc, scale = jnp.exp(fits[best])
  return ScaledChi2(df, nc, scale * mean, -losses[best] - jnp.log(mean))


def _minimize(start, *, errors, steps: int):
  """Mean negative log likelihood, minimised over the logarithms of df, nc and scale; the best point met."""
  optimizer = optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=10))

  def loss(logs):
    df, nc, scale = jnp.exp(jnp.clip(logs, -25, 25))
    return -jnp.mean(noncentral_chi2_logpdf(errors / scale, df=df, nc=nc)) + jnp.log(scale)

  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry, _):
    logs, state, best, lowest = carry
    value, gradient = value_and_grad(logs, state=state)
    better = value < lowest
    best, lowest = jnp.where(better, logs, best), jnp.where(better, value, lowest)
    updates, state = optimizer.update(gradient, state, logs, value=value, grad=gradient, value_fn=loss)
    updates = jnp.where(jnp.isfinite(updates), updates, 0)
    return (optax.apply_updates(logs, updates), state, best, lowest), None

  carry = start, optimizer.init(start), start, jnp.asarray(jnp.inf, start.dtype)
  (_, _, best, lowest), _ = jax.lax.scan(step, carry, None, length=steps)
  return jnp.clip(best, -25, 25), lowest


def scaled_chi2_inductive_bias(target: ArrayLike, law: ScaledChi2) -> jax.Array:
  """`-log P(error <= target)` of a scaled noncentral chi-square law, exact where the probability underflows.

  In the deep tail it grows by `df / 2` when the target falls by a factor e: `df` is the dimension over which to
  generalise.

  >>> import jax.numpy as jnp
  >>> law = ScaledChi2(jnp.array(50.0), jnp.array(10.0), jnp.array(0.02), jnp.array(0.0))
  >>> print(f"{scaled_chi2_inductive_bias(0.001, law):.2f}")
  155.24

  Args:
    target: positive test error `[...]`; may be traced.
    law: from `fit_scaled_chi2`, or with parameters of its own; scalars, or arrays like `target`.

  Returns:
    `[...]`, nats, not negative.

  Raises:
    ValueError: when `target` or a parameter of the law lies outside its domain.

  Reference: Boopathy, Yue, Hwang, Iyer, Fiete, "Towards Exact Computation of Inductive Bias", IJCAI 2024, the
    definition of the required inductive bias.
  """
  _check_law(target, law)
  x = jnp.asarray(target) / law.scale
  return -noncentral_chi2_logcdf(x, df=law.df, nc=law.nc)


def sankaran_inductive_bias(target: ArrayLike, law: ScaledChi2) -> jax.Array:
  """The approximation `z^2 / 2`, z Sankaran's normal score of the target, that the published code falls back on.

  Only for comparison with published numbers: it is off by a third in the deep tail, and not small above the mean.

  >>> import jax.numpy as jnp
  >>> law = ScaledChi2(jnp.array(50.0), jnp.array(10.0), jnp.array(0.02), jnp.array(0.0))
  >>> print(f"{sankaran_inductive_bias(0.001, law):.1f}")
  88.4

  Args:
    target: positive test error `[...]`; may be traced.
    law: from `fit_scaled_chi2`, or with parameters of its own.

  Returns:
    `[...]`, nats.

  Raises:
    ValueError: when `target` or a parameter of the law lies outside its domain.

  Reference: Sankaran, "Approximations to the Non-Central Chi-Square Distribution", Biometrika 1963; Boopathy, Yue,
    Hwang, Iyer, Fiete, "Towards Exact Computation of Inductive Bias", IJCAI 2024 (code).
  """
  _check_law(target, law)
  df, nc = law.df, law.nc
  mean = df + nc
  h = 1 - 2 / 3 * mean * (df + 3 * nc) / (df + 2 * nc) ** 2
  p = (df + 2 * nc) / mean**2
  m = (h - 1) * (1 - 3 * h)
  center = 1 + h * p * (h - 1 - (2 - h) * m * p / 2)
  score = ((jnp.asarray(target) / law.scale / mean) ** h - center) / (h * jnp.sqrt(2 * p) * (1 + m * p / 2))
  return score**2 / 2


def required_inductive_bias(errors: ArrayLike, target: ArrayLike, *, steps: int = 60) -> jax.Array:
  """The bias required for test error `target`, from the errors of random hypotheses that fit the training set.

  Where all errors are equal, up to rounding, nothing is fitted: it is 0 at or above them and infinite below.

  >>> import jax.numpy as jnp
  >>> required_inductive_bias(jnp.zeros(200), jnp.array([0.1])).tolist()
  [0.0]

  Args:
    errors: floating `[samples]`, test errors of random hypotheses.
    target: positive test error `[...]`; may be traced.
    steps: static, of L-BFGS from each start.

  Returns:
    `[...]`, nats, not negative.

  Raises:
    ValueError: when `errors` is not a vector of floats or `target` is not positive.

  Reference: Boopathy, Yue, Hwang, Iyer, Fiete, "Towards Exact Computation of Inductive Bias", IJCAI 2024, the
    definition of the required inductive bias.
  """
  errors = _check_errors("errors", errors)
  check_hyperparameter("target", target, low=0, open_low=True)
  mean = jnp.mean(errors)
  point = jnp.var(errors) <= (10 * jnp.finfo(errors.dtype).eps * mean) ** 2
  # Any errors that differ, so that the branch not taken is finite.
  law = fit_scaled_chi2(jnp.where(point, 1 + jnp.arange(errors.size, dtype=errors.dtype), errors), steps=steps)
  target = jnp.asarray(target, errors.dtype)
  return jnp.where(point, jnp.where(target >= mean, 0, jnp.inf), scaled_chi2_inductive_bias(target, law))


def bootstrap_inductive_bias(
  key: jax.Array, errors: ArrayLike, target: ArrayLike, *, resamples: int = 100, steps: int = 60
) -> jax.Array:
  """The required bias of errors resampled with replacement: its spread is the sampling error, given the law's form.

  >>> import jax
  >>> errors = jax.random.chisquare(jax.random.key(0), 6.0, shape=(50,))
  >>> bootstrap_inductive_bias(jax.random.key(1), errors, 1.0, resamples=2, steps=10).shape
  (2,)

  Args:
    key: of the resampling.
    errors: floating `[samples]`, test errors of random hypotheses.
    target: positive test error, scalar; may be traced.
    resamples: static.
    steps: static, of L-BFGS from each start.

  Returns:
    `[resamples]`, nats.

  Raises:
    ValueError: when an argument lies outside its domain.

  Reference: Efron, Tibshirani, "An Introduction to the Bootstrap", Chapman and Hall 1993, chapter 6.
  """
  errors = _check_errors("errors", errors)
  check_hyperparameter("resamples", resamples, low=1)

  def one(key):
    return required_inductive_bias(jax.random.choice(key, errors, errors.shape), target, steps=steps)

  return jax.lax.map(one, jax.random.split(key, resamples))


def encoded_inductive_bias(
  reference_errors: ArrayLike, model_errors: ArrayLike, target: ArrayLike, *, steps: int = 60
) -> jax.Array:
  """The bias that a model class encodes: what a reference space requires less what the class requires, same task.

  >>> import jax, jax.numpy as jnp
  >>> wide = jax.random.chisquare(jax.random.key(0), 20.0, shape=(200,))
  >>> bool(encoded_inductive_bias(wide, 0.2 * wide, 4.0) > 5)
  True

  Args:
    reference_errors: floating `[samples]`, test errors of hypotheses of the reference space.
    model_errors: floating `[models]`, test errors of hypotheses of the class, such as trained networks.
    target: positive test error `[...]`; may be traced.
    steps: static, of L-BFGS from each start.

  Returns:
    `[...]`, nats.

  Raises:
    ValueError: when an argument lies outside its domain.

  Reference: Boopathy, Yue, Hwang, Iyer, Fiete, "Towards Exact Computation of Inductive Bias", IJCAI 2024, the
    comparison of model classes.
  """
  required = functools.partial(required_inductive_bias, target=target, steps=steps)
  return required(_check_errors("reference_errors", reference_errors)) - required(
    _check_errors("model_errors", model_errors)
  )


def sample_network_errors(key: jax.Array, train_fn: Callable, *, samples: int) -> jax.Array:
  """Test errors of networks trained from independent keys: the hypothesis space of an architecture and its training.

  Check that they fit the training set; else they are compared with other hypotheses on unequal terms.

  >>> import jax
  >>> sample_network_errors(jax.random.key(0), lambda key: jax.random.uniform(key), samples=3).shape
  (3,)

  Args:
    key: of all initial weights and data orders.
    train_fn: `key -> test error`, trains one network and returns a scalar; mapped with `vmap`.
    samples: static, number of networks.

  Returns:
    `[samples]`.

  Raises:
    ValueError: when `samples` is not positive.

  Reference: Boopathy, Yue, Hwang, Iyer, Fiete, "Towards Exact Computation of Inductive Bias", IJCAI 2024, the neural
    network hypothesis space.
  """
  check_hyperparameter("samples", samples, low=1)
  return jax.vmap(train_fn)(jax.random.split(key, samples))


def _check_law(target, law: ScaledChi2) -> None:
  for name, value in (("target", target), ("df", law.df), ("scale", law.scale)):
    check_hyperparameter(name, value, low=0, open_low=True)
  check_hyperparameter("nc", law.nc, low=0)


def _check_errors(name: str, errors):
  check_float(name, errors)
  if jnp.ndim(errors) != 1:
    raise ValueError(f"{name} must be [samples], got shape {jnp.shape(errors)}.")
  return jnp.asarray(errors, jnp.promote_types(jnp.result_type(errors), jnp.float32))
