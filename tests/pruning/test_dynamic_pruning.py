"""Dynamic pruning: masks by mass and by number, the heads' loss, and the masked convolution."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.pruning import dynamic_pruning as pruning
from tests.conformance import CLASSES, EXAMPLES, draw_logits, extreme_logits, module_row, row

TOLERANCE = 1e-5
mass_programs = functools.cache(lambda min_keep: jax.jit(functools.partial(pruning.mass_mask, min_keep=min_keep)))
uniform_mask = jax.jit(pruning.uniform_mask)
loss_and_gradient = jax.jit(
  jax.value_and_grad(lambda logits, targets: jnp.mean(pruning.mask_prediction_loss(logits, targets)))
)


def mass_mask(maps, *, mass, min_keep=0):
  return mass_programs(min_keep)(maps, mass=mass)


def shares(maps):
  strengths = np.abs(maps).max(axis=tuple(range(1, maps.ndim - 1)))
  return strengths / strengths.sum(-1, keepdims=True)


def test_the_example_of_the_poster():
  maps = np.array([[0.3, 0.3, 0.2, 0.1, 0.1, 0.03, 0.01]])
  assert mass_mask(maps, mass=0.95).sum() == 4
  assert mass_mask(-maps[:, None, ::-1], mass=0.95).tolist()[0][4:] == [1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.999), st.floats(0.01, 100.0))
def test_mass_mask_properties(seed, mass, scale):
  rng = np.random.default_rng(seed)
  maps = rng.normal(size=(4, 3, 3, 7)) * rng.exponential(size=(1, 1, 1, 7)) ** 2
  maps[..., 2] = 0
  permutation = rng.permutation(7)
  with jax.enable_x64(True):
    kept = np.asarray(mass_mask(maps, mass=mass)) > 0
    more = np.asarray(mass_mask(maps, mass=(1 + mass) / 2)).sum(-1)
    np.testing.assert_array_equal(np.asarray(mass_mask(scale * maps, mass=mass)) > 0, kept)
    np.testing.assert_array_equal(np.asarray(mass_mask(maps[..., permutation], mass=mass)) > 0, kept[:, permutation])
    assert (mass_mask(maps, mass=-1.0) == 1).all()
    np.testing.assert_array_equal(np.asarray(mass_mask(maps, mass=1.0)) > 0, shares(maps) > TOLERANCE)
    at_least = np.asarray(mass_mask(maps, mass=mass, min_keep=2)) > 0
  assert (more >= kept.sum(-1)).all()
  for share, mask, floor in zip(shares(maps), kept, at_least):
    total = share[mask].sum()
    assert total <= mass + TOLERANCE + 1e-12
    if not mask.all():
      assert total + share[~mask].max() > mass + TOLERANCE - 1e-12
    assert mask.sum() == 0 or share[mask].min() >= share[~mask].max(initial=0)
    np.testing.assert_array_equal(floor, mask | (share >= np.sort(share)[-2]))


def test_masks_are_constant_and_survive_dead_layers():
  maps = jnp.zeros((2, 3, 3, 4))
  total = lambda maps: sum(
    jnp.sum(mask * jnp.sum(maps, (1, 2)))
    for mask in (pruning.mass_mask(maps, mass=0.9), pruning.uniform_mask(maps, prune_ratio=0.5))
  )
  value, gradient = jax.jit(jax.value_and_grad(total))(maps)
  assert value == 0 and set(np.unique(gradient)) <= {0.0, 1.0}  # the masks themselves, and no NaN
  assert (mass_mask(maps, mass=0.9) == 1).all() and (mass_mask(maps, mass=1.0) == 0).all()
  assert mass_mask(maps, mass=1.0, min_keep=1).sum(-1).tolist() == [1, 1]
  assert (uniform_mask(maps, prune_ratio=0.0) == 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_uniform_mask_drops_a_number(seed, dropped):
  maps = np.random.default_rng(seed).uniform(0.1, 1, (3, 2, 8)).astype(np.float32)
  kept = np.asarray(uniform_mask(maps, prune_ratio=dropped / 8)) > 0
  assert (kept.sum(-1) == 8 - dropped).all()
  for share, mask in zip(shares(maps), kept):
    assert share[mask].min(initial=1) >= share[~mask].max(initial=0)


def test_straight_through_mask():
  logits = jnp.array([-120.0, -1e-6, 0.0, 1e-6, 120.0])
  values, derivative = jax.jit(lambda x: jax.jvp(pruning.straight_through_mask, (x,), (jnp.ones_like(x),)))(logits)
  assert values.tolist() == [0, 0, 0, 1, 1]
  soft = 1 / (1 + np.exp(-np.float64(logits)))
  np.testing.assert_allclose(derivative, soft * (1 - soft), atol=1e-6)


def test_loss_gradient_and_extremes(x64):
  rng = np.random.default_rng(0)
  logits = [rng.normal(size=(4, 3)), np.resize([120.0, -120.0, 0.0], (4, 5))]
  targets = [rng.integers(0, 2, z.shape).astype(float) for z in logits]
  value, gradients = loss_and_gradient(logits, targets)
  assert np.isfinite(value)
  for z, g, gradient in zip(logits, targets, gradients):
    np.testing.assert_allclose(gradient, (1 / (1 + np.exp(-z)) - g) / (4 * 2), rtol=1e-9, atol=1e-15)


@pytest.mark.golden
def test_golden_33_ftwt_masks(golden, x64):
  for _, arrays, _meta in golden("33-ftwt").cases():
    if "out_feature_maps" not in arrays:
      continue
    maps = np.moveaxis(arrays["out_feature_maps"], 1, -1)
    for mass, expected in zip(arrays["rs"], arrays["out_mask_mass"]):
      np.testing.assert_array_equal(mass_mask(maps, mass=mass), expected)
    for ratio, expected in zip(arrays["pruning_ratios"], arrays["out_mask_uniform"]):
      np.testing.assert_array_equal(uniform_mask(maps, prune_ratio=ratio), expected)


@pytest.mark.golden
def test_golden_33_ftwt_loss(golden, x64):
  for _, arrays, _meta in golden("33-ftwt").cases():
    count = sum(name.startswith("logits") for name in arrays)
    if count == 0:
      continue
    logits, targets = ([arrays[f"{name}{index}"] for index in range(count)] for name in ("logits", "gt"))
    value, gradients = loss_and_gradient(logits, targets)
    np.testing.assert_allclose(value, arrays["out_loss"], rtol=1e-9)
    accuracy = 100 * jnp.mean(pruning.mask_accuracy(logits, targets))
    np.testing.assert_allclose(accuracy, arrays["out_mask_acc_percent"], rtol=1e-6)  # float32
    for index, gradient in enumerate(gradients):
      np.testing.assert_allclose(gradient, arrays[f"grad_logits{index}"], rtol=1e-9, atol=1e-15)


@pytest.mark.golden
@pytest.mark.parametrize("mode", pruning.MODES)
def test_golden_33_ftwt_layer(golden, mode, x64):
  file = golden("33-ftwt")
  padding = [(file.meta["conv"]["padding"],) * 2] * 2
  for case, arrays, _meta in file.cases():
    if "cotangent" not in arrays:
      continue
    mass = file.meta[f"r_for_{case}"]
    filters, channels, *kernel_size = arrays["w"].shape
    layer = pruning.MaskedConv(
      filters, tuple(kernel_size), file.meta["conv"]["stride"], padding, pool="mean", mode=mode
    )
    stats = {"norm": {"mean": arrays["bn_mean"], "var": arrays["bn_var"]}}
    params = {
      "conv": {"kernel": arrays["w"].transpose(2, 3, 1, 0)},
      "norm": {"scale": arrays["bn_scale"], "bias": arrays["bn_bias"]},
      "head": {"linear": {"kernel": arrays["head_w"].T, "bias": arrays["head_b"]}},
    }

    @jax.jit
    def run(params, x):
      def objective(params, x):
        outputs, new = layer.apply(
          {"params": params, "batch_stats": stats},
          x,
          target=functools.partial(pruning.mass_mask, mass=mass),
          train=False,
          mutable=["pruning"],
        )
        new = new["pruning"]
        mask_loss = jnp.mean(pruning.mask_prediction_loss(new["logits"], new["targets"]))
        cotangent = jnp.moveaxis(arrays["cotangent"], 1, -1)
        return jnp.sum(outputs * cotangent) + mask_loss, (outputs, new, mask_loss)

      return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, x)

    (_, (outputs, new, mask_loss)), gradients = run(params, np.moveaxis(arrays["x"], 1, -1))
    close = lambda actual, name: np.testing.assert_allclose(actual, arrays[f"{name}_{mode}"], rtol=1e-9, atol=1e-12)
    close(np.moveaxis(outputs, -1, 1), "out_y")
    close(new["logits"], "out_mask_logits")
    np.testing.assert_array_equal(new["targets"], arrays[f"out_gt_{mode}"])
    close(new["mask"].sum(-1), "out_active")
    close(mask_loss, "out_mask_loss")
    close(np.moveaxis(gradients[1], -1, 1), "grad_x")
    close(gradients[0]["conv"]["kernel"].transpose(3, 2, 0, 1), "grad_w")
    close(gradients[0]["head"]["linear"]["kernel"].T, "grad_head_w")
    close(gradients[0]["head"]["linear"]["bias"], "grad_head_b")


class Pair(nn.Module):
  """Two masked layers."""

  mode: str

  @nn.compact
  def __call__(self, images, **options):
    hidden = pruning.MaskedConv(4, mode=self.mode, name="layer0")(images, **options)
    return pruning.MaskedConv(3, mode=self.mode, name="layer1")(hidden, **options)


@functools.cache
def pair(mode):
  """The gradients of the mask loss in parameters and images, and the outputs with each kind of mask."""
  model, target = Pair(mode), functools.partial(pruning.mass_mask, mass=0.7)

  @jax.jit
  def run(variables, images):
    def objective(params, images):
      outputs, new = model.apply(
        {**variables, "params": params}, images, target=target, train=True, mutable=["pruning", "batch_stats"]
      )
      logits, targets = ({name: part[key] for name, part in new["pruning"].items()} for key in ("logits", "targets"))
      return jnp.mean(pruning.mask_prediction_loss(logits, targets)), (outputs, new["pruning"])

    gradients, (outputs, records) = jax.grad(objective, argnums=(0, 1), has_aux=True)(variables["params"], images)
    dense = model.apply(variables, images, target=target, train=True, masks="none", mutable=["batch_stats"])[0]
    return gradients, outputs, records, dense

  images = jax.random.normal(jax.random.key(0), (4, 5, 5, 2))
  init = jax.jit(lambda: model.init(jax.random.key(1), images, target=target, train=False))
  return run, init(), images


def test_decoupled_heads_do_not_reach_earlier_layers():
  results = {}
  for mode in pruning.MODES:
    run, variables, images = pair(mode)
    gradients, _, records, _ = run(variables, images)
    results[mode] = gradients
  assert set(variables) == {"params", "batch_stats"} and (records["layer0"]["mask"] <= 1).all()
  params, inputs = results["decoupled"]
  assert (inputs == 0).all()
  assert all((leaf == 0).all() for layer in params.values() for leaf in jax.tree.leaves((layer["conv"], layer["norm"])))
  joint_params, joint_inputs = results["joint"]
  assert (joint_inputs != 0).any() and (joint_params["layer0"]["conv"]["kernel"] != 0).any()
  heads = lambda params, layer: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params[layer]["head"])])
  np.testing.assert_allclose(heads(params, "layer1"), heads(joint_params, "layer1"), rtol=1e-6)
  assert np.abs(heads(params, "layer0") - heads(joint_params, "layer0")).max() > 1e-6


def test_with_all_filters_on_it_is_the_dense_network():
  run, variables, images = pair("decoupled")
  bias = {"layer0": 10.0, "layer1": 10.0}
  params = {
    name: {**part, "head": {"linear": {**part["head"]["linear"], "bias": jnp.full_like(
      part["head"]["linear"]["bias"], bias[name])}}}
    for name, part in variables["params"].items()
  }  # fmt: skip
  _, outputs, records, dense = run({**variables, "params": params}, images)
  np.testing.assert_array_equal(outputs, dense)
  assert all((record["mask"] == 1).all() for record in records.values())


def test_shortcut_and_training_statistics():
  layer, target = pruning.MaskedConv(2), functools.partial(pruning.mass_mask, mass=-1.0)
  images = jax.random.normal(jax.random.key(0), (4, 5, 5, 2))
  variables = jax.jit(lambda: layer.init(jax.random.key(1), images, target=target, train=False))()
  run = lambda shortcut: layer.apply(
    variables, images, target=target, train=True, masks="target", shortcut=shortcut, mutable=["batch_stats"]
  )
  (added, new), (plain, _) = jax.jit(lambda: (run(images), run(jnp.zeros_like(images))))()
  assert (added != plain).any() and (added >= 0).all()
  assert (new["batch_stats"]["norm"]["mean"] != 0).all()


def test_bfloat16_and_extremes():
  maps = jnp.array([[1e4, -1e4, 3.0, 0.0]], jnp.bfloat16)
  mask = mass_mask(maps, mass=0.6)
  assert mask.dtype == jnp.bfloat16 and mask.tolist() == [[1, 0, 0, 0]]
  head = pruning.MaskHead(2)
  params = head.init(jax.random.key(0), maps)
  value, gradient = jax.value_and_grad(lambda p: jnp.sum(head.apply(p, maps)))(params)
  assert jnp.isfinite(value) and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_bad_input():
  refused = lambda message: pytest.raises(ValueError, match=message)
  maps = jnp.ones((2, 3, 3, 4))
  with refused("mass must lie"):
    pruning.mass_mask(maps, mass=1.5)
  with refused("tolerance must lie"):
    pruning.mass_mask(maps, mass=0.5, tolerance=-1)
  with refused(r"min_keep must be an integer in \[0, 4\], got 5"):
    pruning.mass_mask(maps, mass=0.5, min_keep=5)
  with refused("prune_ratio must lie"):
    pruning.uniform_mask(maps, prune_ratio=1.1)
  for function in (
    functools.partial(pruning.mass_mask, mass=0.5),
    functools.partial(pruning.uniform_mask, prune_ratio=0.5),
  ):
    with refused("feature_maps must have the axes"):
      function(maps[0, 0, 0])
    with refused("feature_maps must be floating"):
      function(maps.astype(int))
  with refused("logits must be floating"):
    pruning.straight_through_mask(jnp.ones(2, int))
  with refused("same layers"):
    pruning.mask_prediction_loss([maps[:, 0, 0]], [])
  with refused("same layers"):
    pruning.mask_accuracy([], [])
  with refused("targets must have the shape of the logits"):
    pruning.mask_prediction_loss([maps[:, 0, 0]], [maps[:1, 0, 0]])
  target = functools.partial(pruning.mass_mask, mass=0.5)
  with refused("masks must be one of head"):
    pruning.MaskedConv(2).init(jax.random.key(0), maps, target=target, train=False, masks="heads")
  with refused("mode must be one of"):
    pruning.MaskedConv(2, mode="both").init(jax.random.key(0), maps, target=target, train=False)
  with refused("pool must be one of max, mean"):
    pruning.MaskHead(2, pool="avg").init(jax.random.key(0), maps)


def mask(function, **options):
  """`function(feature_maps, **options)`, zeros and ones of each filter, of which there is no gradient."""
  maps = lambda rng: (rng.normal(size=(EXAMPLES, 3, CLASSES)),)
  bad = (
    ("feature_maps", lambda maps: (maps.astype(np.int32),)),
    ("feature_maps", lambda maps: (maps[0, 0],)),
  )
  return row(function, maps, bad=bad, examples="batch", differentiable=False, options=options)


_BAD_MASKS = (
  ("logits", lambda z, g: (z.astype(np.int32), g)),
  ("targets", lambda z, g: (z, g[:1])),
  ("targets", lambda z, g: (z, g[:, 0])),
)


ROWS = [
  row(
    pruning.straight_through_mask,
    lambda rng: (rng.normal(size=EXAMPLES),),
    call=lambda logits: (pruning.straight_through_mask(logits), logits),
    bad=(("logits", lambda logits: (logits.astype(np.int32),)),),
    surrogate=lambda logits, results: results[0] + jax.nn.sigmoid(logits) - jax.nn.sigmoid(results[1]),
  ),
  module_row(pruning.MaskHead(3), lambda rng: (rng.normal(size=(EXAMPLES, 2, 2, 4)),)),
  module_row(
    pruning.MaskedConv(3),
    lambda rng: (rng.normal(size=(EXAMPLES, 4, 4, 2)),),
    options=dict(target=functools.partial(pruning.mass_mask, mass=0.9), train=False),
  ),
  mask(pruning.mass_mask, mass=(0.2, 0.9)),
  mask(pruning.uniform_mask, prune_ratio=(0.1, 0.7)),
  row(
    pruning.mask_prediction_loss,
    lambda rng: (draw_logits(rng), rng.integers(0, 2, (EXAMPLES, CLASSES)).astype(np.float64)),
    extreme=extreme_logits,
    bad=_BAD_MASKS,
    examples="batch",
  ),
  row(
    pruning.mask_accuracy,
    lambda rng: (draw_logits(rng), rng.integers(0, 2, (EXAMPLES, CLASSES)).astype(np.float64)),
    extreme=extreme_logits,
    bad=_BAD_MASKS,
    examples="batch",
    differentiable=False,
    wide=True,
  ),
]
