"""L_orth, the flattened form, the pytree penalty, and which shapes have orthogonal kernels."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from jaxreg.regularizers import orthogonal_conv
from tests.conformance import conv_row, draw_layer, row
from tests.regularizers.explicit_conv import conv_matrix, defect, orthonormal, shifting_kernel

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def penalty(stride):
  """The value and the gradient of the penalty and of the norm, one program for each shape."""
  each = [orthogonal_conv.orthogonal_conv_penalty, orthogonal_conv.orthogonal_conv_defect_norm]
  return jax.jit(lambda kernel: [jax.value_and_grad(functools.partial(f, stride=stride))(kernel) for f in each])


dense = jax.jit(jax.value_and_grad(orthogonal_conv.orthogonal_dense_penalty))


def l_orth(kernel, stride=1):
  return float(penalty(stride)(kernel)[0][0])


# outputs, inputs, kernel size, stride, output size, dimensions: rows fewer, as many and more than columns.
SHAPES = [
  (4, 3, 3, 1, 5, 2),
  (9, 2, 3, 2, 4, 2),
  (3, 1, 5, 3, 4, 2),
  (3, 2, 5, 2, 5, 2),
  (2, 2, 3, 1, 5, 2),
  (3, 2, 3, 2, 4, 1),
  (5, 2, 3, 2, 4, 1),
]


@pytest.mark.parametrize("outputs, inputs, size, stride, pixels, dimensions", SHAPES)
def test_it_is_the_squared_defect_per_pixel(outputs, inputs, size, stride, pixels, dimensions):
  rng = np.random.default_rng(0)
  for scale in (0.3, 2.0):
    kernel = scale * rng.normal(size=(*[size] * dimensions, inputs, outputs))
    explicit = np.sum(defect(conv_matrix(kernel, pixels, stride)) ** 2)
    np.testing.assert_allclose(pixels**dimensions * l_orth(kernel, stride), explicit, rtol=1e-10)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_matrix_is_flax_circular_convolution(stride):
  rng = np.random.default_rng(0)
  kernel, images = rng.normal(size=(3, 3, 2, 4)), rng.normal(size=(1, 4 * stride, 4 * stride, 2))
  conv = nn.Conv(4, (3, 3), strides=stride, padding="CIRCULAR", use_bias=False, param_dtype=jnp.float64)
  outputs = conv.apply({"params": {"kernel": kernel}}, images)[0]
  flat = np.moveaxis(images[0], -1, 0).ravel()
  np.testing.assert_allclose(np.moveaxis(outputs, -1, 0).ravel(), conv_matrix(kernel, 4, stride) @ flat, rtol=1e-10)


def convolved(kernel, stride):
  """L_orth as the kernel's convolution by itself, padded to all displacements: the definition, in any dimension."""
  size, outputs, spatial = kernel.shape[0], kernel.shape[-1], kernel.ndim - 2
  axes = "DHW"[-spatial:]
  reach = (size - 1) // stride * stride
  products = jax.lax.conv_general_dilated(
    jnp.moveaxis(kernel, -1, 0), kernel, [stride] * spatial, [(reach, reach)] * spatial,
    dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
  )  # fmt: skip
  centre = (slice(None), *[reach // stride] * spatial)
  columns = kernel.shape[-2] * stride**spatial
  return jnp.sum(jnp.square(products.at[centre].add(-jnp.eye(outputs)))) - max(0, outputs - columns)


@pytest.mark.parametrize(
  "shape, stride",
  [((3, 3, 3, 4), 1), ((5, 5, 2, 3), 2), ((7, 7, 1, 2), 3), ((9, 2, 3), 4), ((3, 3, 3, 2, 5), 1), ((3, 3, 2, 4), 5)],
)
def test_it_is_the_kernel_convolved_by_itself(shape, stride):
  kernel = np.random.default_rng(0).normal(size=shape) / np.prod(shape) ** 0.4
  value, gradient = penalty(stride)(kernel)[0]
  expected, slope = jax.value_and_grad(convolved)(kernel, stride)
  np.testing.assert_allclose(value, expected, rtol=1e-10)
  np.testing.assert_allclose(gradient, slope, rtol=1e-10, atol=1e-12)


def test_it_multiplies_no_padding():
  """Windows of all displacements were 25 times the kernel, with the gradient 50 times."""
  kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
  room = lambda f: jax.jit(f).lower(kernel).compile().memory_analysis().temp_size_in_bytes / (4 * kernel.size)
  assert room(orthogonal_conv.orthogonal_conv_penalty) < 9
  assert room(jax.grad(orthogonal_conv.orthogonal_conv_penalty)) < 13


def test_delta_orthogonal_kernels_are_where_to_start():
  for inputs, outputs in ((4, 4), (3, 8)):
    kernel = nn.initializers.delta_orthogonal()(jax.random.key(0), (3, 3, inputs, outputs), jnp.float64)
    assert abs(l_orth(kernel)) < 1e-12


def test_zero_at_orthogonal_kernels_and_the_offset():
  rng = np.random.default_rng(0)
  assert abs(l_orth(shifting_kernel(rng, 3, 5, 3))) < 1e-12
  centre = np.zeros((3, 3, 5, 3))
  centre[1, 1] = orthonormal(rng, 5, 3)
  assert abs(l_orth(centre)) < 1e-12
  tall = np.zeros((3, 3, 1, 6))  # disjoint patches of 2 × 2 pixels, to more outputs than there are
  tall[:2, :2, 0] = orthonormal(rng, 4, 6).reshape(2, 2, 6)
  assert orthogonal_conv.orthogonal_conv_offset(outputs=6, inputs=1, kernel_size=3, stride=2) == 2
  assert abs(l_orth(tall, 2)) < 1e-12
  np.testing.assert_allclose(penalty(2)(tall)[1][0], np.sqrt(2), rtol=1e-12)


def test_wrong_padding_would_accept_this_kernel():
  row = np.zeros((3, 3, 1, 1))
  row[1, [0, 2]] = 1 / np.sqrt(2)
  np.testing.assert_allclose(l_orth(row), 0.5, rtol=1e-12)
  np.testing.assert_allclose(l_orth(row[1]), 0.5, rtol=1e-12)
  np.testing.assert_allclose(penalty(1)(row)[1][0], np.sqrt(0.5), rtol=1e-12)
  identity = np.zeros((3, 3, 1, 4))  # with padding 1 its displacement zero is not where the target is
  identity[[0, 0, 1, 1], [0, 1, 0, 1], 0, range(4)] = 1
  assert abs(l_orth(identity, 2)) < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 3.0))
def test_invariances_sign_and_quartic(seed, scale):
  rng = np.random.default_rng(seed)
  kernel = scale * rng.normal(size=(3, 3, 2, 9)) / 6
  with jax.enable_x64(True):
    value, gradient = penalty(2)(kernel)[0]
    assert value >= -1e-9
    mixed = orthonormal(rng, 2, 2) @ kernel[::-1, ::-1] @ orthonormal(rng, 9, 9)
    np.testing.assert_allclose(l_orth(mixed, 2), value, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(l_orth(np.swapaxes(kernel, 0, 1), 2), value, rtol=1e-9, atol=1e-9)
    # ||R||^2 and tr R follow from the value at 0 and at K, the slope from the polynomial: L(tK) = t^4 a - 2 t^2 b + c.
    trace, constant = np.sum(kernel**2), 9 - 1
    quartic = float(value) + 2 * trace - constant
    for t in (-0.5, 2.0):
      expected = t**4 * quartic - 2 * t**2 * trace + constant
      np.testing.assert_allclose(l_orth(t * kernel, 2), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.sum(gradient * kernel), 4 * quartic - 4 * trace, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("outputs", [3, 6])
def test_without_overlap_it_is_the_dense_form(outputs):
  kernel = np.random.default_rng(0).normal(size=(1, 1, 4, outputs))
  np.testing.assert_allclose(l_orth(kernel), dense(kernel)[0], rtol=1e-10)
  patches = np.random.default_rng(0).normal(size=(3, 3, 1, outputs))
  np.testing.assert_allclose(l_orth(patches, 3), dense(patches)[0], rtol=1e-10)


@pytest.mark.parametrize(
  "inputs, outputs, size, least", [(1, 3, 1, 2.0), (1, 2, 1, 1.0), (2, 12, 1, 6.0), (1, 6, 3, 0.0)]
)
def test_least_value_where_no_orthogonal_kernel_exists(inputs, outputs, size, least):
  exists = orthogonal_conv.orthogonal_conv_exists(outputs=outputs, inputs=inputs, kernel_size=size, stride=2)
  assert exists == (least == 0)
  shape = (size, size, inputs, outputs)

  def objective(flat):
    value, gradient = penalty(2)(flat.reshape(shape))[0]
    return float(value), np.asarray(gradient).ravel()

  starts = np.random.default_rng(0).normal(size=(3, np.prod(shape))) / 2
  found = min(optimize.minimize(objective, start, jac=True, method="L-BFGS-B", tol=1e-14).fun for start in starts)
  np.testing.assert_allclose(found, least, atol=1e-5)


def test_existence():
  exists = lambda m, c, k, s=1, **more: orthogonal_conv.orthogonal_conv_exists(
    outputs=m, inputs=c, kernel_size=k, stride=s, **more
  )
  assert exists(64, 64, 3) and exists(9, 1, 3, 3) and exists(100, 1, 3) and exists(18, 2, 3, 4)
  assert not exists(19, 2, 3, 4) and not exists(128, 64, 1, 2) and not exists(40, 2, 3, 4)
  assert exists(3, 1, 3, 4, dimensions=1) and not exists(4, 1, 3, 4, dimensions=1)
  assert exists(64, 64, 3, padding="VALID") and not exists(65, 64, 3, padding="VALID")
  assert exists(9, 1, 3, 3, padding="VALID") and exists(10, 1, 3, 3, padding="VALID")
  taps = lambda *a, **more: orthogonal_conv.orthogonal_conv_taps(
    **dict(zip(("outputs", "inputs", "kernel_size", "stride"), a)), **more
  )
  assert [taps(4, 4, 3, 1, padding=p) for p in ("CIRCULAR", "VALID", "SAME")] == [3, 3, 1]
  assert [taps(5, 4, 3, 1, padding=p) for p in ("CIRCULAR", "VALID", "SAME")] == [3, 0, 1]
  assert [taps(4, 4, 3, 2, padding=p) for p in ("CIRCULAR", "VALID", "SAME")] == [3, 3, 2]


def test_paddings():
  """What the number of usable taps says, on explicit matrices."""
  rng = np.random.default_rng(0)
  size = lambda kernel, pixels, *how: np.abs(defect(conv_matrix(kernel, pixels, *how))).max()
  overlapping = shifting_kernel(rng, 3, 4, 4)
  assert size(overlapping, 5) < 1e-12 and size(overlapping, 4, 1, "VALID") < 1e-12
  assert size(overlapping, 5, 1, "SAME") > 0.5
  centre = np.zeros((3, 3, 4, 3))
  centre[1, 1] = orthonormal(rng, 4, 3)
  assert size(centre, 5, 1, "SAME") < 1e-12
  disjoint = np.zeros((3, 3, 2, 8))
  disjoint[:2, :2] = orthonormal(rng, 8, 8).reshape(2, 2, 2, 8)
  assert size(disjoint, 3, 2, "SAME") < 1e-12
  tall = orthonormal(rng, 9, 10).reshape(3, 3, 1, 10)
  assert size(tall, 3, 3, "VALID") < 1e-12


@pytest.mark.golden
def test_golden_50_orthogonal_conv(golden):
  for _, arrays, meta in golden("50-orthogonal_conv").cases():
    if "w" in arrays:
      value, gradient = dense(arrays["w"])
      np.testing.assert_allclose(value, arrays["out_loss"], rtol=1e-9)
      np.testing.assert_allclose(gradient, arrays["grad_w"], rtol=1e-9, atol=1e-12)
      continue
    kernel, stride = arrays["kernel_hwio"], meta["stride"]
    shape = dict(zip(("kernel_size", "inputs", "outputs"), kernel.shape[1:]), stride=stride)
    # Absolute only for orthogonal kernels, where everything cancels.
    exact = {"rtol": 1e-9, "atol": 1e-12}
    (value, gradient), (root, slope) = penalty(stride)(kernel)
    np.testing.assert_allclose(value, arrays["out_lorth"], **exact)
    np.testing.assert_allclose(gradient, arrays["grad_kernel_hwio"], **exact)
    np.testing.assert_allclose(orthogonal_conv.orthogonal_conv_offset(**shape), arrays["out_delta"])
    np.testing.assert_allclose(root, arrays["out_ocnn_norm"], **exact)
    if "grad_ocnn_norm_hwio" in arrays:
      np.testing.assert_allclose(slope, arrays["grad_ocnn_norm_hwio"], **exact)


def test_defect_norm_has_gradient_zero_at_zero():
  kernel = np.zeros((3, 3, 2, 2))
  kernel[1, 1] = np.eye(2)
  value, gradient = penalty(1)(kernel)[1]
  assert value == 0 and (np.asarray(gradient) == 0).all()


def test_penalty_of_a_model():
  rng = np.random.default_rng(0)
  params = {
    "stem": {"kernel": rng.normal(size=(3, 3, 1, 4)), "bias": np.ones(4)},
    "down": {"kernel": rng.normal(size=(1, 1, 4, 8))},
    "head": {"kernel": rng.normal(size=(8, 3))},
  }
  strides = {"stem/kernel": 1, "down/kernel": None, "head/kernel": None}
  each = [l_orth(params["stem"]["kernel"]), *(float(dense(params[n]["kernel"])[0]) for n in ("down", "head"))]
  total = jax.jit(lambda params, w: orthogonal_conv.orthogonal_penalty(params, strides, layer_weights=w))
  np.testing.assert_allclose(total(params, {}), sum(each), rtol=1e-10)
  np.testing.assert_allclose(total(params, {"stem/kernel": 0.25}), sum(each) - 0.75 * each[0], rtol=1e-10)
  refused = lambda strides, **more: jax.eval_shape(
    lambda p: orthogonal_conv.orthogonal_penalty(p, strides, **more), params
  )
  with pytest.raises(ValueError, match=r"strides\['down/kernel'\] must be None.*outputs 8, inputs 4, kernel_size 1"):
    refused({"down/kernel": 2})
  with pytest.raises(ValueError, match="strides must name kernels among .*stem/kernel.*, got stem"):
    refused({"stem": 1})
  with pytest.raises(ValueError, match="layer_weights must name kernels among stem/kernel, got head/kernel"):
    refused({"stem/kernel": 1}, layer_weights={"head/kernel": 1.0})
  with pytest.warns(UserWarning, match="stem/kernel has as many outputs"):
    jax.eval_shape(lambda p: orthogonal_conv.orthogonal_penalty(p, {"stem/kernel": 2}), params)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.eval_shape(lambda p: orthogonal_conv.orthogonal_penalty(p, strides), params)


def test_bad_input():
  refused = lambda message: pytest.raises(ValueError, match=message)
  with refused("kernel_size must be odd"):
    orthogonal_conv.orthogonal_conv_penalty(jnp.zeros((2, 2, 1, 1)))
  with refused("kernel must have the shape"):
    orthogonal_conv.orthogonal_conv_penalty(jnp.zeros((3, 1, 1, 1)))
  with refused("kernel must be floating"):
    orthogonal_conv.orthogonal_conv_penalty(jnp.zeros((3, 3, 1, 1), int))
  for stride in (0, 1.0, True):
    with refused("stride must be a positive int"):
      orthogonal_conv.orthogonal_conv_penalty(jnp.zeros((3, 3, 1, 1)), stride=stride)
  with refused("weights must have the axes"):
    orthogonal_conv.orthogonal_dense_penalty(jnp.zeros(3))
  with refused("padding must be one of"):
    orthogonal_conv.orthogonal_conv_exists(outputs=1, inputs=1, kernel_size=1, padding="REFLECT")


ROWS = [
  conv_row(orthogonal_conv.orthogonal_conv_penalty, stride=1),
  conv_row(orthogonal_conv.orthogonal_conv_penalty, stride=2),
  conv_row(orthogonal_conv.orthogonal_conv_defect_norm, stride=1),
  row(
    orthogonal_conv.orthogonal_dense_penalty,
    lambda rng: (rng.normal(size=(3, 4)),),
    bad=(("weights", lambda w: (w.astype(np.int32),)), ("weights", lambda w: (w[0],))),
  ),
  row(
    orthogonal_conv.orthogonal_penalty,
    lambda rng: ({"conv": {"kernel": rng.normal(size=(3, 2, 4))}, **draw_layer(rng)[0]},),
    call=lambda params, weight: orthogonal_conv.orthogonal_penalty(
      params, {"conv/kernel": 1, "kernel": None}, layer_weights={"conv/kernel": weight}
    ),
    bad=(
      ("strides", lambda params: ({"conv": params["conv"]},)),
      ("kernel", lambda params: ({**params, "conv": {"kernel": np.zeros((2, 2, 4))}},)),
    ),
    wide=True,
    options=dict(weight=(0.0, 2.0)),
  ),
]


EXEMPT = {
  "orthogonal_conv_exists": "of Python integers",
  "orthogonal_conv_offset": "of Python integers",
  "orthogonal_conv_taps": "of Python integers",
}
