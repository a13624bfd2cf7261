"""Projection heads: golden vectors, exact properties."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.layers import projection_head as ph
from jaxreg.losses import supcon_loss
from tests.conformance import CLASSES, EXAMPLES, module_row, row

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.golden
def test_golden_projection_head_modules(golden):
  for case, arrays, _ in golden("46-projection_head").cases("head"):
    inputs = jnp.asarray(arrays["x"])
    head = ph.FixedReweightingHead(kappa=float(arrays["kappa"]))
    close = lambda actual, expected, case=case: np.testing.assert_allclose(
      actual, expected, rtol=1e-10, atol=1e-10, err_msg=case
    )
    close(head.apply({}, inputs), arrays["out_reweighted"])
    close(head.apply({}, jnp.ones_like(inputs))[0], arrays["weights"])
    value, pull = jax.vjp(lambda x, b: ph.symmetric_relu(x, threshold=b), inputs, jnp.asarray(arrays["b"]))
    close(value, arrays["out_symrelu"])
    for gradient, name in zip(pull(jnp.asarray(arrays["cotangent"])), ("x", "b")):
      close(gradient, arrays[f"grad_{name}_symrelu"])


@pytest.mark.golden
def test_golden_projection_head_supcon(golden):
  for case, arrays, _ in golden("46-projection_head").cases("supcon"):
    labels = jnp.tile(jnp.asarray(arrays["labels"]), int(arrays["num_views"]))
    mean = lambda z, y=labels, t=arrays["temperature"]: supcon_loss(z, y, temperature=t).mean()
    value, gradient = jax.value_and_grad(mean)(jnp.asarray(arrays["z"]))
    np.testing.assert_allclose(value, arrays["out_loss"], rtol=1e-10, atol=1e-10, err_msg=case)
    np.testing.assert_allclose(gradient, arrays["grad_z"], rtol=1e-10, atol=1e-10, err_msg=case)


def test_fixed_head_is_linear_and_the_identity_at_one():
  x, y = np.random.default_rng(0).normal(size=(2, 3, 8))
  apply = lambda kappa, x: ph.FixedReweightingHead(kappa=kappa).apply({}, jnp.asarray(x))
  np.testing.assert_array_equal(apply(1.0, x), x)
  np.testing.assert_allclose(apply(1.3, 2 * x + y), 2 * apply(1.3, x) + apply(1.3, y), rtol=1e-12)
  gradient = jax.grad(lambda x: apply(1.3, x).sum())(jnp.asarray(x))
  np.testing.assert_allclose(gradient, np.tile(1.3 ** -np.arange(8.0), (3, 1)), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fixed_head_is_finite_for_many_features(dtype):
  inputs = 1e4 * jnp.ones((2, 2048), dtype)
  value, gradient = jax.value_and_grad(
    lambda x: ph.FixedReweightingHead(kappa=2.28).apply({}, x).astype(jnp.float32).sum()
  )(inputs)
  assert np.isfinite(value) and np.isfinite(np.asarray(gradient, np.float32)).all() and gradient.dtype == dtype


def test_kappa_below_one_is_refused():
  with pytest.raises(ValueError, match="kappa must lie in"):
    ph.FixedReweightingHead(kappa=0.5).apply({}, jnp.ones((1, 2)))


def test_symmetric_relu():
  x = jnp.linspace(-3, 3, 40)  # no kink among them
  for b in (0.7, -0.4):
    np.testing.assert_allclose(ph.symmetric_relu(-x, threshold=b), -ph.symmetric_relu(x, threshold=b), rtol=1e-14)
    slope = jax.vmap(lambda v, b=b: jax.grad(lambda b: ph.symmetric_relu(v, threshold=b))(b))(x)
    np.testing.assert_allclose(slope, -1.0 * (x > b) + 1.0 * (-x > b), atol=1e-14)
  np.testing.assert_allclose(ph.symmetric_relu(x, threshold=0.0), x, rtol=1e-14)


def test_identity_initialisation():
  head = ph.MLPProjectionHead(hidden=6, features=6, identity_init=True)
  inputs = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  variables = head.init(jax.random.key(0), inputs)
  np.testing.assert_allclose(head.apply(variables, inputs), inputs, atol=1e-7)
  assert variables["params"]["threshold"] == 0
  with pytest.raises(ValueError, match="must be equally many for identity_init"):
    ph.MLPProjectionHead(hidden=5, features=6, identity_init=True).init(jax.random.key(0), inputs)


def test_plain_head_is_two_layers():
  head = ph.MLPProjectionHead(hidden=5, features=3)
  inputs = np.random.default_rng(0).normal(size=(4, 6))
  params = head.init(jax.random.key(0), inputs)["params"]
  hidden = np.maximum(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
  expected = hidden @ params["out"]["kernel"] + params["out"]["bias"]
  np.testing.assert_allclose(head.apply({"params": params}, inputs), expected, rtol=1e-6)


def test_encoder_with_head_gives_both_representations():
  inputs = np.random.default_rng(0).normal(size=(4, 6))
  model = ph.WithHead(nn.Dense(5), ph.MLPProjectionHead(hidden=5, features=3))
  variables = model.init(jax.random.key(0), inputs)
  before, after = model.apply(variables, inputs)
  np.testing.assert_allclose(before, nn.Dense(5).apply({"params": variables["params"]["encoder"]}, inputs), rtol=1e-6)
  head = ph.MLPProjectionHead(hidden=5, features=3)
  np.testing.assert_allclose(after, head.apply({"params": variables["params"]["head"]}, before), rtol=1e-6)
  bare = ph.WithHead(nn.Dense(5))
  one, two = bare.apply(bare.init(jax.random.key(0), inputs), inputs)
  np.testing.assert_array_equal(one, two)


_features = lambda rng: (rng.normal(size=(EXAMPLES, CLASSES)),)
_after = lambda module, variables, inputs: module.apply(variables, inputs)[1]

ROWS = [
  row(
    ph.symmetric_relu,
    _features,
    bad=(("inputs", lambda x: (x.astype(np.int32),)),),
    examples="any",
    options=dict(threshold=(-0.5, 0.5)),
  ),
  module_row(ph.FixedReweightingHead(kappa=1.5), _features, wide=False),
  module_row(ph.MLPProjectionHead(hidden=4, features=3), _features),
  module_row(ph.WithHead(nn.Dense(4), ph.MLPProjectionHead(hidden=4, features=3)), _features, call=_after),
]
