"""The gathered convolution is the masked dense one, and does less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.pruning import gathered
from jaxreg.pruning.dynamic_pruning import MaskedConv, mass_mask
from tests.conformance import row

FRACTIONS = (0.5, 1.0)


def both_dense(image, kernel, output_mask, input_mask, *, strides):
  masks = dict(output_mask=output_mask, input_mask=input_mask)
  part = gathered.gathered_conv(image, kernel, **masks, strides=strides, fractions=FRACTIONS)
  whole = jax.lax.conv_general_dilated(
    (image * input_mask)[None], kernel, (strides,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )[0]
  return part, whole * output_mask


both = functools.cache(lambda strides: jax.jit(functools.partial(both_dense, strides=strides)))


@pytest.mark.parametrize("strides", [1, 2])
def test_gathered_is_masked(strides):
  rng = np.random.default_rng(0)
  image, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 6, 4), (3, 3, 4, 6)))
  for filters in (0, 2, 3, 4, 6):
    for channels in (0, 1, 2, 3, 4):
      masks = [rng.permutation(np.arange(size) < on).astype(np.float32) for size, on in ((6, filters), (4, channels))]
      part, whole = both(strides)(image, kernel, *masks)
      np.testing.assert_allclose(part, whole, atol=1e-5)


def test_every_size_is_compiled_and_the_smallest_that_fits_is_chosen():
  image, kernel = jnp.ones((6, 6, 8)), jnp.ones((3, 3, 8, 8))
  run = lambda mask: gathered.gathered_conv(image, kernel, output_mask=mask, input_mask=mask, fractions=FRACTIONS)
  branches = jax.make_jaxpr(run)(jnp.ones(8)).jaxpr.eqns
  (switch,) = [equation for equation in branches if equation.primitive.name == "cond"]
  kernels = []
  for branch in switch.params["branches"]:
    for equation in _equations(branch.jaxpr):
      if equation.primitive.name == "conv_general_dilated":
        kernels.append(equation.invars[1].aval.shape)
  assert kernels == [(3, 3, 4, 4), (3, 3, 8, 4), (3, 3, 4, 8), (3, 3, 8, 8)]
  index = jax.jit(lambda mask: gathered._chosen(mask, FRACTIONS).index)
  assert [int(index(jnp.arange(8) < on)) for on in (0, 4, 5, 8)] == [0, 0, 1, 1]


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if hasattr(value, "jaxpr"):
        yield from _equations(value.jaxpr)


def test_two_layers_image_by_image_are_the_masked_network():
  layers = [MaskedConv(8, strides=2), MaskedConv(6)]
  images = jax.random.normal(jax.random.key(0), (5, 6, 6, 3))
  options = dict(target=functools.partial(mass_mask, mass=0.9), train=False)

  @jax.jit
  def run(key):
    variables, hidden, records = [], images, []
    for layer in layers:
      made = layer.init(key, hidden, **options)
      # Statistics and shifts that are not the trivial ones, and heads that disagree.
      made = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.uniform(key, leaf.shape), made)
      head = made["params"]["head"]["linear"]
      head["kernel"], head["bias"] = 40 * head["kernel"], head["bias"] - 20 * jnp.mean(head["kernel"])
      variables.append(made)
      hidden, new = layer.apply(made, hidden, **options, mutable=["pruning"])
      records.append(new["pruning"]["mask"])

    def one(image):
      mask, masks = jnp.ones(3), []
      for layer, made in zip(layers, variables):
        image, mask = gathered.gathered_masked_conv(layer, made, image, mask, fractions=FRACTIONS)
        masks.append(mask)
      return image, masks

    return hidden, records, jax.lax.map(one, images), jax.vmap(one)(images)

  hidden, records, *others = run(jax.random.key(1))
  assert 0 < records[0].mean() < 1 and jnp.ptp(records[0], axis=0).max() == 1
  for outputs, masks in others:
    np.testing.assert_allclose(outputs, hidden, atol=1e-5)
    for mask, record in zip(masks, records):
      np.testing.assert_array_equal(mask, record)


def test_bad_input():
  image, kernel, mask = jnp.ones((4, 4, 2)), jnp.ones((3, 3, 2, 5)), jnp.ones(2)
  refused = lambda message: pytest.raises(ValueError, match=message)
  with refused("kernel must be"):
    gathered.gathered_conv(image[None], kernel, output_mask=jnp.ones(5), input_mask=mask)
  with refused(r"output_mask must have shape \(5,\), got \(2,\)"):
    gathered.gathered_conv(image, kernel, output_mask=mask, input_mask=mask)
  with refused("input_mask must have shape"):
    gathered.gathered_conv(image, kernel, output_mask=jnp.ones(5), input_mask=jnp.ones(5))
  with refused("image must be floating"):
    gathered.gathered_conv(image.astype(int), kernel, output_mask=jnp.ones(5), input_mask=mask)
  for fractions in ((), (0.5,), (0.0, 1.0), (1.0, 1.5)):
    with refused("fractions must lie"):
      gathered.gathered_sizes(8, fractions)
  with refused("layer must have one group, got 2"):
    gathered.gathered_masked_conv(MaskedConv(4, groups=2), {}, image, mask)


ROWS = [
  row(
    gathered.gathered_conv,
    lambda rng: (rng.normal(size=(4, 4, 4)), rng.normal(size=(3, 3, 4, 4))),
    call=lambda image, kernel: gathered.gathered_conv(
      image, kernel, output_mask=jnp.arange(4) < 3, input_mask=jnp.arange(4) > 1, fractions=(0.5, 1.0)
    ),
    bad=(
      ("image", lambda image, kernel: (image.astype(np.int32), kernel)),
      ("kernel", lambda image, kernel: (image, kernel[0])),
    ),
  ),
]


EXEMPT = {
  "gathered_masked_conv": "of a module and its variables; compared with the module",
  "gathered_sizes": "of Python numbers",
}
