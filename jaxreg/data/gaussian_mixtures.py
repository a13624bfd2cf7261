"""Gaussian classes whose Bayes error is known: where the number of examples that a classifier needs can be counted."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = [
  "easy_covariance",
  "gaussian_mixture",
  "gaussian_mixture_bayes_error",
  "gaussian_mixture_means",
  "hard_covariance",
]


def gaussian_mixture_means(num_classes: int, num_features: int) -> np.ndarray:
  """Class means: all entries -1 in class 0 and `2^(k - 1)` in class `k`; the separation per feature is constant.

  Were the whole distance between classes fixed instead, naive Bayes would need a number of examples that is linear in
  the number of features too.

  >>> gaussian_mixture_means(3, 2).tolist()
  [[-1.0, -1.0], [1.0, 1.0], [2.0, 2.0]]

  Args:
    num_classes: at least 2.
    num_features: at least 1.

  Returns:
    float64 `[classes, features]`.

  Raises:
    ValueError: when a number is too small.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023, the simulations (official code).
  """
  check_hyperparameter("num_classes", num_classes, low=2)
  check_hyperparameter("num_features", num_features, low=1)
  levels = np.concatenate([[-1.0], 2.0 ** np.arange(num_classes - 1)])
  return np.tile(levels[:, None], (1, num_features))


def easy_covariance(num_features: int) -> np.ndarray:
  """The diagonal covariance of independent features: variance `features` in the first half of them, 1 in the rest.

  >>> easy_covariance(3).diagonal().tolist()
  [3.0, 1.0, 1.0]

  Args:
    num_features: at least 1.

  Returns:
    float64 `[features, features]`.

  Raises:
    ValueError: when the number is too small.

  Reference: Zheng et al., ICML 2023, the simulations (official code).
  """
  check_hyperparameter("num_features", num_features, low=1)
  return np.diag(np.where(np.arange(num_features) < num_features // 2, float(num_features), 1.0))


def hard_covariance(num_features: int, *, seed: int = 0) -> np.ndarray:
  """Correlated features: the easy covariance with the off-diagonal entries of `A^T A`, `A` uniform in [-1, 1].

  Such a matrix has negative eigenvalues. As NumPy's `multivariate_normal`, with which the official code draws, this
  takes their absolute values, so that it is the covariance of what is drawn.

  >>> covariance = hard_covariance(4)
  >>> covariance.shape, bool((np.linalg.eigvalsh(covariance) > 0).all())
  ((4, 4), True)

  Args:
    num_features: at least 1.
    seed: of `A`.

  Returns:
    float64 `[features, features]`, symmetric and positive semidefinite.

  Raises:
    ValueError: when the number is too small.

  Reference: Zheng et al., ICML 2023, the simulations (official code).
  """
  easy = easy_covariance(num_features)
  factor = np.random.default_rng(seed).uniform(-1, 1, (num_features, num_features))
  product = factor.T @ factor
  values, vectors = np.linalg.eigh(easy + product - np.diag(product.diagonal()))
  return (vectors * np.abs(values)) @ vectors.T


def gaussian_mixture(
  key: jax.Array, means: ArrayLike, covariance: ArrayLike, *, num_examples: int
) -> dict[str, jax.Array]:
  """Examples of equally likely Gaussian classes with one covariance.

  >>> import jax
  >>> data = gaussian_mixture(jax.random.key(0), gaussian_mixture_means(2, 4), easy_covariance(4), num_examples=10)
  >>> data["x"].shape, data["y"].shape
  ((10, 4), (10,))

  Args:
    key: threefry key.
    means: `[classes, features]`.
    covariance: `[features, features]`, symmetric and positive semidefinite.
    num_examples: static, positive.

  Returns:
    `x`: floating `[examples, features]`; `y`: int32 `[examples]`.

  Raises:
    ValueError: when shapes do not fit or the number is below 1.

  Reference: none.
  """
  means, covariance = _parameters(means, covariance)
  check_hyperparameter("num_examples", num_examples, low=1)
  choose, draw = jax.random.split(key)
  labels = jax.random.randint(choose, (num_examples,), 0, means.shape[0], jnp.int32)
  values, vectors = jnp.linalg.eigh(covariance)
  white = jax.random.normal(draw, (num_examples, means.shape[1]), means.dtype)
  spread = jnp.matmul(white * jnp.sqrt(jnp.maximum(values, 0)), vectors.T, precision="highest")
  return {"x": means[labels] + spread, "y": labels}


def gaussian_mixture_bayes_error(
  means: ArrayLike, covariance: ArrayLike, *, key: jax.Array | None = None, num_samples: int = 100_000
) -> jax.Array:
  """The smallest possible error rate on `gaussian_mixture`.

  For two classes `Phi(-d / 2)` with `d` the Mahalanobis distance of their means; for more the mean of one minus the
  largest posterior probability over drawn examples, whose standard error is at most `0.5 / sqrt(num_samples)`.

  >>> means, covariance = gaussian_mixture_means(2, 16), easy_covariance(16)
  >>> round(gaussian_mixture_bayes_error(means, covariance).item(), 5)  # Phi(-sqrt(8 / 16 + 8))
  0.00178

  Args:
    means: `[classes, features]`.
    covariance: `[features, features]`, symmetric and positive definite.
    key: threefry key, needed for more than two classes.
    num_samples: static; examples drawn for more than two classes.

  Returns:
    Scalar in [0, 1 - 1 / classes].

  Raises:
    ValueError: when shapes do not fit, or the key is missing for more than two classes.

  Reference: Anderson, "An Introduction to Multivariate Statistical Analysis", 2003, Section 6.4 (two normal populations
    with one covariance).
  """
  means, covariance = _parameters(means, covariance)
  factor = jnp.linalg.cholesky(covariance)
  whiten = lambda rows: jax.scipy.linalg.solve_triangular(factor, rows.T, lower=True).T
  if means.shape[0] == 2:
    distance = jnp.linalg.norm(whiten(means[1:] - means[:1]))
    return jax.scipy.stats.norm.cdf(-distance / 2)
  if key is None:
    raise ValueError(f"key must be given for more than two classes, got {means.shape[0]} classes and no key.")
  centres = whiten(means - means.mean(axis=0))
  labels, draw = jax.random.split(key)
  own = jax.random.randint(labels, (num_samples,), 0, means.shape[0])
  samples = centres[own] + jax.random.normal(draw, (num_samples, means.shape[1]), means.dtype)
  scores = jnp.matmul(samples, centres.T, precision="highest") - jnp.sum(centres**2, axis=1) / 2
  return jnp.mean(1 - jnp.max(jax.nn.softmax(scores), axis=1))


def _parameters(means, covariance):
  """Both in float32 at least, or float64 if enabled and given."""
  check_float("means", means)
  check_float("covariance", covariance)
  if jnp.ndim(means) != 2 or jnp.shape(means)[0] < 2:
    raise ValueError(f"means must be [classes, features] with at least two classes, got shape {jnp.shape(means)}.")
  size = jnp.shape(means)[1]
  if jnp.shape(covariance) != (size, size):
    raise ValueError(f"covariance must have shape {(size, size)}, got {jnp.shape(covariance)}.")
  dtype = jnp.promote_types(jnp.result_type(means, covariance), jnp.float32)
  return jnp.asarray(means, dtype), jnp.asarray(covariance, dtype)
