"""Residual networks: the papers' parameter counts, resolutions, and batch statistics over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.models import PreActivationResNet, ResNet, WideResNet
from tests.conformance import EXAMPLES, module_row


def count(model, size):
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
  ("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)]
)
def test_imagenet_networks_have_the_usual_number_of_parameters(depth, parameters):
  assert count(ResNet.of_depth(depth, classes=1000, large_images=True), 224) == parameters


def test_wide_network_has_the_papers_number_of_parameters():
  assert round(count(WideResNet(28, 10, 10), 32) / 1e6, 1) == 36.5  # Table 4
  assert round(count(WideResNet(16, 8, 10), 32) / 1e6, 1) == 11.0


def test_pre_activation_network_has_the_usual_number_of_parameters():
  """11,171,146 in the common port to CIFAR, which leaves out the last normalisation, of twice 512 parameters."""
  assert count(PreActivationResNet((2, 2, 2, 2), classes=10), 32) == 11_171_146 + 1024


def test_wide_network_is_a_pre_activation_one_of_three_stages():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
  wide, plain = WideResNet(10, 2, 3, width=4), PreActivationResNet((1, 1, 1), 3, width=4, widen=2)
  variables = wide.init(jax.random.key(0), images, train=False)
  np.testing.assert_array_equal(wide.apply(variables, images, train=False), plain.apply(variables, images, train=False))


def test_depths_are_checked():
  with pytest.raises(ValueError, match="depth"):
    ResNet.of_depth(20, classes=10)
  with pytest.raises(ValueError, match="depth"):
    WideResNet(27, 1, 10).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)


def test_statistics_of_the_whole_batch_over_devices():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 3)), jnp.float32)
  model = ResNet(stages=(1, 1), classes=4, width=4)
  variables = model.init(jax.random.key(0), images, train=False)
  apply = lambda net: lambda v, x: net.apply(v, x, train=True, mutable=["batch_stats"])
  expected, stats = jax.jit(apply(model))(variables, images)
  split = images.reshape(8, 1, 8, 8, 3)
  got, got_stats = jax.pmap(apply(model.copy(axis_name="devices")), axis_name="devices", in_axes=(None, 0))(
    variables, split
  )
  np.testing.assert_allclose(got[:, 0], expected, rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[3], b, rtol=1e-4, atol=1e-5), got_stats, stats)


ROWS = [
  module_row(
    ResNet(stages=(1,), classes=2, width=2),
    lambda rng: (rng.normal(size=(EXAMPLES, 4, 4, 1)),),
    options=dict(train=False),
  ),
  module_row(
    PreActivationResNet(stages=(1,), classes=2, width=2),
    lambda rng: (rng.normal(size=(EXAMPLES, 4, 4, 1)),),
    options=dict(train=False),
  ),
  module_row(
    WideResNet(depth=10, widen=1, classes=2, width=2),
    lambda rng: (rng.normal(size=(EXAMPLES, 4, 4, 1)),),
    options=dict(train=False),
  ),
]


EXEMPT = {
  "DEPTHS": "numbers",
}
