"""Gradient alignment: golden gradients of a net with two heads, the card's identities, edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.losses import binary_kl_norm_loss
from jaxreg.transforms.aligned_gradients import align_gradients, aligned_value_and_grad

pytestmark = pytest.mark.usefixtures("x64")
LAYERS = ("backbone", "fc", "fc2")


def _golden_net(arrays):
  params = {
    f"{layer}_{name}": jnp.asarray(arrays[f"param_{layer}_{name}"]) for layer in LAYERS for name in ("weight", "bias")
  }
  inputs, labels, teacher = (jnp.asarray(arrays[name]) for name in ("x", "labels", "teacher"))

  def losses(params, gamma=arrays["gamma"]):
    dense = lambda layer, x: x @ params[f"{layer}_weight"].T + params[f"{layer}_bias"]
    hidden = jnp.tanh(dense("backbone", inputs))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(dense("fc", hidden), labels).mean()
    distilled = binary_kl_norm_loss(dense("fc2", hidden), teacher, temperature=arrays["tau"]).mean()
    return gamma * cross_entropy, arrays["alpha"] * distilled

  return params, losses


def _flat(params):
  return np.concatenate([np.ravel(params[f"{layer}_{name}"]) for layer in LAYERS for name in ("weight", "bias")])


def _dot(one, two):
  return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)))


@pytest.mark.golden
def test_golden_dhkd_alignment(golden):
  names, conflicts = [], []
  file = golden("47-dhkd")
  flat_order = "backbone.weight, backbone.bias, fc.weight, fc.bias, fc2.weight, fc2.bias"
  assert file.meta["flat_order"].startswith(flat_order)
  for name, arrays, _ in file.cases("ga"):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10, err_msg=name)
    params, losses = _golden_net(arrays)
    first, second = (jax.grad(lambda params, k=k, losses=losses: losses(params)[k])(params) for k in (0, 1))
    close(_flat(first), arrays["grad_cls_flat"])
    close(_flat(second), arrays["grad_kd_flat"])
    close(_dot(first, second), arrays["dot"])
    values, merged = jax.jit(aligned_value_and_grad(losses))(params)
    close(values[0], arrays["out_loss_cls"])
    close(values[1], arrays["out_loss_kd"])
    close(_flat(merged), arrays["out_merged_flat"])
    # Neither loss reaches the other's head.
    assert not np.any(first["fc2_weight"]) and not np.any(second["fc_weight"])
    assert np.any(first["backbone_weight"]) and np.any(second["backbone_weight"])
    if arrays["dot"] < 0:
      conflicts.append(name)
      backbone = {key: key.startswith("backbone") for key in params}
      assert np.abs(_flat(align_gradients(first, second, within=backbone)) - _flat(merged)).max() > 1e-6
    _check_scale_of_the_reference(params, losses, arrays)
  assert names and conflicts


def _check_scale_of_the_reference(params, losses, arrays):
  """Ten times gamma scales the reference's part alone."""
  part = lambda factor: jax.tree.map(
    jnp.subtract,
    aligned_value_and_grad(lambda params: losses(params, factor * arrays["gamma"]))(params)[1],
    jax.tree.map(lambda g: factor * g, jax.grad(lambda params: losses(params)[0])(params)),
  )
  np.testing.assert_allclose(_flat(part(10.0)), _flat(part(1.0)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_reference_decreases_as_it_would_alone(seed):
  rng = np.random.default_rng(seed)
  tree = lambda: {"a": jnp.asarray(rng.normal(size=(3, 2))), "b": [jnp.asarray(rng.normal(size=4))]}
  first, second = tree(), tree()
  combined = align_gradients(first, second)
  if _dot(first, second) < 0:
    np.testing.assert_allclose(_dot(combined, first), _dot(first, first), rtol=1e-10)
  else:
    jax.tree.map(np.testing.assert_array_equal, combined, jax.tree.map(jnp.add, first, second))


def test_within_a_part_of_the_tree():
  first, second = (
    {"a": jnp.array([1.0, 0.0]), "b": jnp.array([5.0])},
    {"a": jnp.array([-2.0, 1.0]), "b": jnp.array([9.0])},
  )
  inside = align_gradients(first, second, within={"a": True, "b": False})
  np.testing.assert_allclose(inside["a"], [1.0, 1.0])
  np.testing.assert_allclose(inside["b"], [14.0])
  # All of it: no conflict.
  np.testing.assert_allclose(align_gradients(first, second)["a"], [-1.0, 1.0])
  none = align_gradients(first, second, within=False)
  np.testing.assert_allclose(none["a"], [-1.0, 1.0])


def test_zeros_and_nothing():
  zeros, other = jnp.zeros(3), jnp.array([1.0, -2.0, 0.0])
  np.testing.assert_array_equal(align_gradients(zeros, other), other)
  np.testing.assert_array_equal(align_gradients(other, zeros), other)
  assert align_gradients({}, {}) == {}
  slope = jax.jacobian(lambda g: align_gradients(g, other))(zeros)
  assert np.isfinite(slope).all()


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_sizes_whose_squares_a_float32_cannot_hold(scale):
  first, second = scale * jnp.array([2.0, 1.0], jnp.float32), scale * jnp.array([-3.0, 1.0], jnp.float32)
  expected = align_gradients(jnp.array([2.0, 1.0]), jnp.array([-3.0, 1.0]))
  np.testing.assert_allclose(align_gradients(first, second) / np.float32(scale), expected, rtol=1e-5)


def test_low_precision_keeps_its_dtype():
  first, second = {"w": jnp.array([2.0, 1.0], jnp.bfloat16)}, {"w": jnp.array([-3.0, 1.0], jnp.bfloat16)}
  combined = align_gradients(first, second)["w"]
  assert combined.dtype == jnp.bfloat16
  np.testing.assert_allclose(combined.astype(float), [1.0, 3.0], rtol=2e-2)


def test_one_forward_pass_with_more_results():
  calls = []

  def losses(params, x):
    calls.append(None)
    return (jnp.sum(params * x), jnp.sum(params**2)), {"x": x}

  values, gradient = aligned_value_and_grad(losses, align=False, has_aux=True)(jnp.array([1.0, 2.0]), jnp.ones(2))
  assert len(calls) == 1 and values[1]["x"].tolist() == [1, 1]
  np.testing.assert_allclose(values[0], [3.0, 5.0])
  np.testing.assert_allclose(gradient, [3.0, 5.0])


def test_bad_input_is_refused():
  ones = {"a": jnp.ones(2)}
  with pytest.raises(ValueError, match="other must have the structure"):
    align_gradients(ones, {"b": jnp.ones(2)})
  with pytest.raises(ValueError, match="equal shapes"):
    align_gradients(ones, {"a": jnp.ones(3)})
  with pytest.raises(ValueError, match="within must be"):
    align_gradients(ones, ones, within={"b": True})
  with pytest.raises(ValueError, match="losses must return two scalars"):
    aligned_value_and_grad(lambda p: (p["a"], p["a"]))(ones)


EXEMPT = {
  "align_gradients": "combines two trees, without optimizer: tested above at extremes, in low precision and at zeros",
  "aligned_value_and_grad": "takes a function of the caller",
}
