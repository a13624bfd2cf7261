"""The simulated Gaussian classes and their Bayes error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxreg.data.gaussian_mixtures import (
  easy_covariance,
  gaussian_mixture,
  gaussian_mixture_bayes_error,
  gaussian_mixture_means,
  hard_covariance,
)


@pytest.mark.parametrize("features", [1, 2, 7, 16, 100])
def test_bayes_error_of_two_classes(features, x64):
  error = gaussian_mixture_bayes_error(gaussian_mixture_means(2, features), easy_covariance(features))
  half = features // 2
  np.testing.assert_allclose(error, stats.norm.cdf(-np.sqrt(half / features + features - half)), rtol=1e-9)


@pytest.mark.parametrize("covariance", [easy_covariance, hard_covariance])
def test_the_optimal_rule_attains_it(covariance, x64):
  means, matrix = gaussian_mixture_means(2, 5) / 4, covariance(5)
  data = gaussian_mixture(jax.random.key(0), means, matrix, num_examples=100_000)
  weights = np.linalg.solve(matrix, means[1] - means[0])
  wrong = ((data["x"] - means.mean(0)) @ weights > 0) != (data["y"] == 1)
  expected = gaussian_mixture_bayes_error(means, matrix)
  assert 0.01 < expected < 0.45
  np.testing.assert_allclose(np.mean(wrong), expected, atol=4 * 0.5 / np.sqrt(100_000))


def test_more_classes_by_drawing(x64):
  """Three classes of which the far one is never confused: two thirds of the pair's error."""
  means = np.array([[-0.5, 0.0], [0.5, 0.0], [0.0, 100.0]])
  error = gaussian_mixture_bayes_error(means, np.eye(2), key=jax.random.key(1))
  np.testing.assert_allclose(error, 2 / 3 * stats.norm.cdf(-0.5), atol=4 * 0.5 / np.sqrt(100_000))


def test_moments(x64):
  matrix, means = hard_covariance(6, seed=3), gaussian_mixture_means(3, 6)
  data = gaussian_mixture(jax.random.key(2), means, matrix, num_examples=60_000)
  np.testing.assert_allclose(np.bincount(data["y"]) / 60_000, 1 / 3, atol=0.01)
  for k in range(3):
    own = np.asarray(data["x"])[np.asarray(data["y"]) == k]
    np.testing.assert_allclose(own.mean(0), means[k], atol=5 * np.sqrt(matrix.diagonal().max() / 20_000))
    np.testing.assert_allclose(np.cov(own.T), matrix, atol=0.06 * matrix.diagonal().max())


def test_hard_covariance():
  matrix = hard_covariance(20)
  np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
  assert np.linalg.eigvalsh(matrix).min() > 0
  assert np.abs(matrix - np.diag(matrix.diagonal())).max() > 0.5  # features are not independent
  np.testing.assert_array_equal(matrix, hard_covariance(20))
  assert not np.array_equal(matrix, hard_covariance(20, seed=1))


def test_mapped_and_jitted():
  means, matrix = gaussian_mixture_means(2, 4), easy_covariance(4)
  one = lambda key: gaussian_mixture(key, means, matrix, num_examples=8)
  keys = jax.random.split(jax.random.key(0), 3)
  mapped = jax.jit(jax.vmap(one))(keys)
  np.testing.assert_array_equal(mapped["y"], np.stack([one(key)["y"] for key in keys]))
  np.testing.assert_allclose(mapped["x"], np.stack([one(key)["x"] for key in keys]), atol=1e-5)


def test_bad_input_is_refused():
  means, matrix, key = gaussian_mixture_means(3, 4), easy_covariance(4), jax.random.key(0)
  for bad, named in (
    (lambda: gaussian_mixture_means(1, 4), "num_classes"),
    (lambda: easy_covariance(0), "num_features"),
    (lambda: gaussian_mixture(key, means[0], matrix, num_examples=3), "means"),
    (lambda: gaussian_mixture(key, means, matrix[:2], num_examples=3), "covariance"),
    (lambda: gaussian_mixture(key, means, jnp.eye(4, dtype=int), num_examples=3), "covariance"),
    (lambda: gaussian_mixture(key, means, matrix, num_examples=0), "num_examples"),
    (lambda: gaussian_mixture_bayes_error(means, matrix), "key"),
  ):
    with pytest.raises(ValueError, match=named):
      bad()


EXEMPT = {
  "easy_covariance": "a NumPy array of integers' making",
  "gaussian_mixture": "draws; its tests compare the distributions",
  "gaussian_mixture_bayes_error": "an integral by samples, compared with closed forms",
  "gaussian_mixture_means": "a NumPy array of integers' making",
  "hard_covariance": "a NumPy array of integers' making",
}
