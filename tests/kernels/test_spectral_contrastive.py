"""Linear networks under the spectral contrastive loss: closed forms against gradient descent, golden vectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.kernels import spectral_contrastive as sc
from jaxreg.losses import spectral_population_loss
from tests.conformance import CLASSES, EXAMPLES, row, unchanged

pytestmark = pytest.mark.usefixtures("x64")


def covariances(size=5, seed=0):
  """Of features with their own strengths, in a random basis that both share only in part."""
  rng = np.random.default_rng(seed)
  half, other = rng.normal(size=(2, size, size)) / np.sqrt(size)
  positive = half @ half.T + 0.3 * np.eye(size)
  return positive + 0.2 * other @ other.T + 0.1 * np.eye(size), positive


def descend(layers, covariance, positive_covariance, *, rate=0.02, steps=40_000):
  gradient = jax.grad(lambda w: spectral_population_loss(w, covariance, positive_covariance))
  step = lambda _, w: jax.tree.map(lambda a, g: a - rate * g, w, gradient(w))
  return jax.jit(lambda w: jax.lax.fori_loop(0, steps, step, w))(layers)


@pytest.mark.golden
def test_golden_projection_head_theory(golden):
  for case, arrays, _ in golden("46-projection_head").cases("spec"):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10, err_msg=case)
    optimum = sc.spectral_optimum(arrays["cov"], arrays["cov_pos"])
    close(optimum.gram, arrays["out_gram_opt"])
    close(optimum.loss, arrays["out_min_loss"])
    for index, loss in enumerate(arrays["out_min_loss_by_rank"]):
      close(sc.spectral_optimum(arrays["cov"], arrays["cov_pos"], rank=index + 1).loss, loss)
    depth = int(arrays["depth"])
    for index, gram in enumerate(arrays["out_layer_grams"]):
      close(sc.layer_gram(optimum.gram, layer=index + 1, depth=depth), gram)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("commute", [True, False])
def test_balanced_gradient_descent_reaches_the_optimum_and_the_layers_grams(depth, commute):
  inputs = covariances()
  if commute:  # then steps of finite size keep the balance too
    basis = jnp.linalg.eigh(inputs[0])[1]
    inputs = inputs[0], basis @ jnp.diag(jnp.linspace(0.2, 0.6, 5)) @ basis.T
  rotations = [np.linalg.qr(m)[0] for m in np.random.default_rng(1).normal(size=(depth, 5, 5))]
  layers = descend([jnp.asarray(0.3 * rotation) for rotation in rotations], *inputs)
  optimum = sc.spectral_optimum(*inputs)
  product = jnp.eye(5)
  for index, layer in enumerate(layers):
    product = layer @ product
    gram = sc.layer_gram(optimum.gram, layer=index + 1, depth=depth)
    exact = commute or index + 1 == depth
    np.testing.assert_allclose(product.T @ product, gram, atol=1e-8 if exact else 5e-3)
  np.testing.assert_allclose(spectral_population_loss(layers, *inputs), optimum.loss, rtol=1e-10)


def test_balanced_gradient_flow_gives_the_layers_grams():
  """By steps so small that the error of the balance, which is linear in them, is extrapolated to none."""
  inputs = covariances(3)
  rotations = [np.linalg.qr(m)[0] for m in np.random.default_rng(1).normal(size=(2, 3, 3))]
  gram = sc.layer_gram(sc.spectral_optimum(*inputs).gram, layer=1, depth=2)
  first = lambda rate, steps: descend([jnp.asarray(0.3 * r) for r in rotations], *inputs, rate=rate, steps=steps)[0]
  coarse, fine, finest = (first(0.02 / 2**k, 20_000 * 2**k) for k in range(3))
  coarse, fine, finest = (w.T @ w for w in (coarse, fine, finest))
  once, twice = 2 * fine - coarse, 2 * finest - fine
  np.testing.assert_allclose((4 * twice - once) / 3, gram, atol=1e-6)


def test_random_initialisation_balances_only_in_the_limit():
  inputs, errors = covariances(), []
  optimum = sc.spectral_optimum(*inputs)
  first = sc.layer_gram(optimum.gram, layer=1, depth=2)
  for scale in (0.3, 0.1, 0.03):
    layers = descend(list(scale * jax.random.normal(jax.random.key(2), (2, 5, 5))), *inputs, rate=0.02)
    np.testing.assert_allclose((layers[1] @ layers[0]).T @ (layers[1] @ layers[0]), optimum.gram, atol=1e-6)
    errors.append(np.abs(layers[0].T @ layers[0] - first).max())
  assert errors[0] > 3 * errors[1] > 3 * errors[2]


def test_the_optimum_is_a_stationary_point_at_every_rank():
  inputs = covariances()
  for rank in (1, 3, 5):
    gram, loss = sc.spectral_optimum(*inputs, rank=rank)
    values, vectors = jnp.linalg.eigh(gram)
    weights = (vectors * jnp.sqrt(jnp.maximum(values, 0))).T[-rank:]
    value, gradient = jax.value_and_grad(lambda w: spectral_population_loss(w, *inputs))(weights)
    np.testing.assert_allclose(value, loss, rtol=1e-10)
    np.testing.assert_allclose(gradient, 0, atol=1e-10)


def test_directions_without_variance_are_left_out():
  covariance, positive = covariances(3)
  wide = lambda m: np.pad(m, (0, 2))
  full, padded = sc.spectral_optimum(covariance, positive), sc.spectral_optimum(wide(covariance), wide(positive))
  np.testing.assert_allclose(padded.gram, wide(full.gram), atol=1e-10)
  np.testing.assert_allclose(padded.loss, full.loss, rtol=1e-12)


def test_diagonal_features():
  strength, kept = jnp.linspace(0.2, 3, 15), jnp.linspace(0.3, 1, 15)
  weights = functools.partial(sc.feature_weights, strength, kept, noise=0.8, depth=2)
  np.testing.assert_allclose(weights(layer=1) ** 2, weights(layer=2), rtol=1e-12)
  covariance, positive = jnp.diag(strength**2 + 0.8**2), jnp.diag((kept * strength) ** 2)
  gram = sc.spectral_optimum(covariance, positive).gram
  np.testing.assert_allclose(jnp.sqrt(jnp.diag(gram)), weights(layer=2), rtol=1e-10)
  at = lambda phi: sc.feature_weights(phi[None], jnp.ones(1), noise=0.8, layer=1, depth=1)[0]
  np.testing.assert_allclose(jax.grad(at)(jnp.array(0.8)), 0, atol=1e-12)  # largest where the feature is as the noise
  assert at(jnp.array(0.8)) > max(at(jnp.array(0.7)), at(jnp.array(0.9)))


def test_shares_of_features_with_depth():
  """A share falls with depth where the weight's logarithm is below its mean over the shares."""
  strength, kept = jnp.array([2.0, 1.5, 1.1, 0.8, 0.6]), jnp.array([1, 0.95, 0.9, 0.8, 0.9])
  weights = sc.feature_weights(strength, kept, noise=0.4, layer=4, depth=4)
  for layer in (1.0, 2.0, 3.0):
    share = lambda layer: sc.feature_share(strength, kept, noise=0.4, layer=layer, depth=4.0)
    np.testing.assert_allclose(share(layer).sum(), 1, rtol=1e-12)
    slope = jax.jacfwd(share)(layer)
    assert ((slope < 0) == (jnp.log(weights) < jnp.sum(share(layer) * jnp.log(weights)))).all()


def test_bad_input():
  with pytest.raises(ValueError, match="layer must be at most depth"):
    sc.layer_gram(np.eye(2), layer=3, depth=2)
  with pytest.raises(ValueError, match="rank must lie in"):
    sc.spectral_optimum(np.eye(2), np.eye(2), rank=3)
  with pytest.raises(ValueError, match="gram must be a square matrix"):
    sc.layer_gram(np.ones((2, 3)), layer=1, depth=2)


def _draw_gram(rng):
  half = rng.normal(size=(5, 5))
  return (half @ half.T + np.eye(5),)


def _draw_features(rng):
  return rng.uniform(0.2, 3, (EXAMPLES, CLASSES)), rng.uniform(0.2, 1, (EXAMPLES, CLASSES))


BAD_FEATURES = (
  ("strength", lambda s, q: (s.astype(np.int32), q)),
  ("kept", lambda s, q: (s, q.astype(np.int32))),
  ("shapes", lambda s, q: (s, q[1:])),
)
_extreme_features = lambda s, q: (np.resize([1e4, 1e-4, 1.0], s.shape), np.resize([0.0, 1.0, 1e-4, 1.0], q.shape))
FEATURES = dict(noise=(0.1, 1.0), layer=(1, 2), depth=(2, 4))

ROWS = [
  row(
    sc.spectral_optimum,
    lambda rng: (*_draw_gram(rng), *_draw_gram(rng)),
    extreme=unchanged,
    bad=(
      ("covariance", lambda s, p: (s.astype(np.int32), p)),
      ("positive_covariance", lambda s, p: (s, p[0])),
      ("shapes", lambda s, p: (s, p[1:, 1:])),
    ),
    wide=True,
    options=dict(rank=3),
  ),
  row(
    sc.layer_gram,
    _draw_gram,
    extreme=unchanged,
    bad=(("gram", lambda g: (g.astype(np.int32),)), ("gram", lambda g: (g[0],)), ("gram", lambda g: (g[1:],))),
    wide=True,
    options=dict(layer=(1, 2), depth=(2, 4)),
  ),
  row(
    sc.feature_weights,
    _draw_features,
    extreme=_extreme_features,
    bad=BAD_FEATURES,
    examples="any",
    wide=True,
    options=FEATURES,
  ),
  row(
    sc.feature_share,
    _draw_features,
    extreme=_extreme_features,
    bad=BAD_FEATURES,
    examples="any",
    wide=True,
    options=FEATURES,
  ),
]

EXEMPT = {"SpectralOptimum": "the result of spectral_optimum"}
