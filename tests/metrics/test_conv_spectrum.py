"""Singular values of circular convolutions against explicit matrices, and the bounds that do not depend on the size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.metrics import conv_spectrum
from jaxreg.regularizers.orthogonal_conv import orthogonal_conv_penalty
from tests.conformance import EXAMPLES, EXTREME, conv_row, draw_logits, extreme_logits, row
from tests.regularizers.explicit_conv import conv_matrix, defect, shifting_kernel
from tests.regularizers.test_orthogonal_conv import SHAPES

pytestmark = pytest.mark.usefixtures("x64")

summary = jax.jit(conv_spectrum.orthogonality_error)
penalty = functools.cache(lambda stride: jax.jit(functools.partial(orthogonal_conv_penalty, stride=stride)))
program = functools.cache(lambda **sizes: jax.jit(functools.partial(conv_spectrum.conv_singular_values, **sizes)))


def spectrum(kernel, **sizes):
  return np.asarray(program(**sizes)(kernel))


def shape_of(kernel, stride):
  return dict(
    outputs=kernel.shape[-1],
    inputs=kernel.shape[-2],
    kernel_size=kernel.shape[0],
    stride=stride,
    dimensions=kernel.ndim - 2,
  )


@pytest.mark.parametrize("outputs, inputs, size, stride, pixels, dimensions", SHAPES)
def test_singular_values_errors_and_bounds(outputs, inputs, size, stride, pixels, dimensions):
  rng = np.random.default_rng(1)
  kernels = [scale * rng.normal(size=(*[size] * dimensions, inputs, outputs)) for scale in (0.1, 0.5)]
  for kernel in kernels:
    matrix = conv_matrix(kernel, pixels, stride)
    values = spectrum(kernel, size=pixels, stride=stride)
    assert values.shape == (*[pixels] * dimensions, min(outputs, inputs * stride**dimensions))
    explicit = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(np.sort(values.ravel()), np.sort(explicit), rtol=1e-10, atol=1e-12)
    error = summary(values)
    np.testing.assert_allclose(error.frobenius, np.linalg.norm(defect(matrix)), rtol=1e-10)
    np.testing.assert_allclose(error.spectral, np.linalg.norm(defect(matrix), 2), rtol=1e-10)
    rows, columns = matrix @ matrix.T - np.eye(len(matrix)), matrix.T @ matrix - np.eye(matrix.shape[1])
    difference = outputs * pixels**dimensions - inputs * (stride * pixels) ** dimensions
    np.testing.assert_allclose(np.sum(rows**2) - np.sum(columns**2), difference, rtol=1e-9, atol=1e-9)
    alpha = conv_spectrum.orthogonality_spectral_constant(**shape_of(kernel, stride))
    assert error.spectral**2 <= alpha * penalty(stride)(kernel)


def test_images_smaller_than_the_kernel():
  kernel = np.random.default_rng(0).normal(size=(5, 5, 2, 3))
  explicit = np.linalg.svd(conv_matrix(kernel, 3), compute_uv=False)
  np.testing.assert_allclose(np.sort(spectrum(kernel, size=3).ravel()), np.sort(explicit), rtol=1e-10)


def test_near_isometry_at_every_size():
  rng = np.random.default_rng(0)
  kernel = shifting_kernel(rng, 3, 5, 4) + 1e-4 * rng.normal(size=(3, 3, 5, 4))
  value = penalty(1)(kernel)
  alpha = conv_spectrum.orthogonality_spectral_constant(**shape_of(kernel, 1))
  low, high = conv_spectrum.isometry_bounds(value, spectral_constant=alpha)
  assert 0.9 < low < 1 < high < 1.1
  for size in (5, 16):
    values = spectrum(kernel, size=size)
    assert low <= values.min() <= values.max() <= high
    np.testing.assert_allclose(summary(values).frobenius / size, np.sqrt(value), rtol=1e-6)


def test_isometry_bounds_far_from_orthogonal():
  bounds = jax.jit(lambda value: conv_spectrum.isometry_bounds(value, spectral_constant=100.0))
  np.testing.assert_allclose(bounds(jnp.array([0.0, -1e-7, 1.0])), [[1, 1, 0], [1, 1, np.sqrt(11)]])
  gradient = jax.jit(jax.grad(lambda value: sum(conv_spectrum.isometry_bounds(value, spectral_constant=100.0))))
  assert gradient(0.0) == 0 and jnp.isfinite(gradient(1.0))


@pytest.mark.golden
def test_golden_50_orthogonal_conv_spectrum(golden):
  for _, arrays, meta in golden("50-orthogonal_conv").cases("case"):
    kernel, stride = arrays["kernel_hwio"], meta["stride"]
    values = spectrum(kernel, size=meta["N"], stride=stride)
    error = summary(values)
    exact = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose([values.min(), values.max()], arrays["out_sv_min_max"], **exact)
    np.testing.assert_allclose(error.frobenius, arrays["out_errF"], **exact)
    np.testing.assert_allclose(error.spectral, arrays["out_errS"], **exact)
    shape = shape_of(kernel, stride)
    alpha = conv_spectrum.orthogonality_spectral_constant(**shape)
    if shape["outputs"] > shape["inputs"] * stride**2:
      # The official code starts its minimum from a value that was meant to be huge, and is not for tall convolutions.
      alpha = min(alpha, shape["kernel_size"] * shape["inputs"] * shape["outputs"])
    np.testing.assert_allclose(alpha, arrays["out_alpha_spectral"])


def test_the_official_constant_of_tall_convolutions_is_too_small():
  kernel = np.ones((3, 3, 1, 2))
  error, value = summary(spectrum(kernel, size=5)), penalty(1)(kernel)
  alpha = conv_spectrum.orthogonality_spectral_constant(**shape_of(kernel, 1))
  assert 3 * 1 * 2 < error.spectral**2 / value <= alpha


def test_certified_radius_is_tight_for_a_linear_classifier():
  rng = np.random.default_rng(0)
  weights, x = rng.normal(size=(6, 2)), rng.normal(size=6)
  radius = conv_spectrum.certified_radius(jnp.asarray(x @ weights), lipschitz_constant=np.linalg.norm(weights, 2))
  direction = weights[:, 1] - weights[:, 0]
  true = abs(x @ direction) / np.linalg.norm(direction)
  assert 0 < radius <= true
  orthogonal = np.linalg.qr(weights)[0]
  radius = conv_spectrum.certified_radius(jnp.asarray(x @ orthogonal), lipschitz_constant=1.0)
  np.testing.assert_allclose(radius, abs(x @ (orthogonal[:, 1] - orthogonal[:, 0])) / np.sqrt(2), rtol=1e-12)


def test_bad_input():
  refused = lambda message: pytest.raises(ValueError, match=message)
  with refused("size must be a positive int"):
    conv_spectrum.conv_singular_values(jnp.zeros((3, 3, 1, 1)), size=0)
  with refused("kernel must have the shape"):
    conv_spectrum.conv_singular_values(jnp.zeros((3, 1)), size=4)
  with refused("singular_values must be floating"):
    conv_spectrum.orthogonality_error(jnp.ones(2, int))
  with refused("penalty must be floating"):
    conv_spectrum.isometry_bounds(jnp.ones((), int), spectral_constant=1.0)
  with refused("spectral_constant must lie"):
    conv_spectrum.isometry_bounds(jnp.ones(()), spectral_constant=0.0)
  with refused("at least two classes"):
    conv_spectrum.certified_radius(jnp.ones((3, 1)), lipschitz_constant=1.0)
  with refused("lipschitz_constant must lie"):
    conv_spectrum.certified_radius(jnp.ones((3, 2)), lipschitz_constant=0.0)
  with refused("inputs must be a positive int"):
    conv_spectrum.orthogonality_spectral_constant(outputs=1, inputs=0, kernel_size=3)


ROWS = [
  conv_row(conv_spectrum.conv_singular_values, stride=2, size=3, differentiable=False, wide=True),
  row(
    conv_spectrum.orthogonality_error,
    lambda rng: (rng.uniform(0.5, 2, (3, 4)),),
    bad=(("singular_values", lambda values: (values.astype(np.int32),)),),
    wide=True,
  ),
  row(
    conv_spectrum.isometry_bounds,
    lambda rng: (rng.uniform(0.02, 0.05, EXAMPLES),),
    extreme=lambda values: (EXTREME * np.resize([1.0, -1.0, 0.0], values.shape),),
    bad=(("penalty", lambda values: (values.astype(np.int32),)),),
    wide=True,
    options=dict(spectral_constant=(1.0, 9.0)),
  ),
  row(
    conv_spectrum.certified_radius,
    lambda rng: (draw_logits(rng),),
    extreme=extreme_logits,
    bad=(("logits", lambda z: (z.astype(np.int32),)), ("logits", lambda z: (z[:, :1],))),
    examples="any",
    options=dict(lipschitz_constant=(0.5, 2.0)),
  ),
]


EXEMPT = {
  "OrthogonalityError": "result of orthogonality_error",
  "orthogonality_spectral_constant": "of Python integers",
}
