"""KRnet: invertible with the right determinant, a density, and the authors' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxreg.models import krnet
from tests.conformance import EXAMPLES, module_row, unchanged

check = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)


@functools.partial(jax.jit, static_argnames=("module", "method"))
def apply(module, variables, *arguments, method="__call__"):
  return module.apply(variables, *arguments, method=method)


def noisy(tree, seed=1, size=0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)) * size, tree)


def flow_and_variables(**options):
  flow = krnet.KRnet(**options)
  shapes = jax.eval_shape(flow.init, jax.random.key(0), jnp.zeros((4, options["features"])))
  return flow, {"params": noisy(shapes["params"]), "first": noisy(shapes["first"], 2)}


def test_inverse_and_determinant(x64):
  flow, variables = flow_and_variables(features=5, group=2, depth=2, width=4, bins=4)
  points = jnp.asarray(np.random.default_rng(0).uniform(-0.9, 0.9, (5, 5)))
  latent, logdet = apply(flow, variables, points, method="forward")
  np.testing.assert_allclose(apply(flow, variables, latent, method="inverse"), points, atol=1e-9)
  one = lambda point: flow.apply(variables, point[None], method="forward")[0][0]
  expected = np.linalg.slogdet(jax.jit(jax.vmap(jax.jacfwd(one)))(points))[1]
  np.testing.assert_allclose(logdet, expected, rtol=1e-8, atol=1e-8)


def test_density_has_mass_one_and_is_that_of_the_samples(x64):
  flow, variables = flow_and_variables(features=2, depth=2, width=4, bins=4)
  middle = -1.01 + 2.02 * (np.arange(400) + 0.5) / 400
  grid = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
  mass = np.exp(apply(flow, variables, grid)) * (2.02 / 400) ** 2
  np.testing.assert_allclose(mass.sum(), 1, atol=1e-4)
  samples = apply(flow, variables, jax.random.normal(jax.random.key(0), (4000, 2)), method="inverse")
  variance = mass @ grid**2 - (mass @ grid) ** 2
  np.testing.assert_allclose(samples.mean(0), mass @ grid, atol=4 * np.sqrt(variance.max() / 4000))


def test_cdf_layer(x64):
  layer, rng = krnet.PiecewiseQuadraticCDF(features=2, bins=8), np.random.default_rng(0)
  zero = {"params": {"log_density": np.zeros((7, 2))}}
  points = np.concatenate([rng.uniform(-50, 50, (20, 2)), [[60.0, -60.0]]])
  values, logdet = apply(layer, zero, points)
  np.testing.assert_allclose(values, points, atol=1e-12)
  np.testing.assert_allclose(logdet, 0, atol=1e-12)
  params = {"params": {"log_density": 2 * rng.normal(size=(7, 2))}}
  ends = np.array([[-50.0, -50.0], [50.0, 50.0], [-51.0, 1e4]])
  line = np.linspace(-50, 50, 18)[:, None] + np.zeros(2)
  values, logdet = apply(layer, params, np.concatenate([ends, line]))
  np.testing.assert_allclose(values[:3], ends, atol=1e-12)
  np.testing.assert_allclose(logdet[2], 0)
  assert (np.diff(values[3:], axis=0) > 0).all()
  np.testing.assert_allclose(apply(layer, params, values, method="inverse")[3:], line, atol=1e-9)


def test_activation_normalization_starts_from_the_batch():
  layer, points = krnet.ActNorm(3), np.random.default_rng(0).normal(2, 8, (50, 3)).astype(np.float32)
  values, logdet = apply(layer, jax.jit(layer.init)(jax.random.key(0), points), points)
  np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
  np.testing.assert_allclose(values.std(0), points.std(0) ** (2 / 3), rtol=1e-4)
  np.testing.assert_allclose(logdet, -np.log(points.std(0)).sum() / 3, rtol=1e-4)


def test_finite_at_the_border_of_the_box_in_float32():
  flow, variables = flow_and_variables(features=2, depth=2, width=4, bins=4)
  variables = jax.tree.map(jnp.float32, variables)
  points = jnp.array([[-1.01, 1.01], [-1.0, 1.0], [0.0, 1.01]])
  total = lambda variables, points: jnp.sum(flow.apply(variables, points))
  results = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(variables, points)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize(
  "options, message", [({"depth": 3}, "depth must"), ({"bins": 3}, "bins must"), ({}, "points must")]
)
def test_bad_input(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(krnet.KRnet(features=2, **options).init, jax.random.key(0), jnp.zeros((3, 2 if options else 3)))


def dense(arrays, names):
  """PyTorch's weights as Flax's."""
  return {
    f"layers_{i}": {"kernel": arrays[f"{name}{w}"].T, "bias": arrays[f"{name}{b}"]}
    for i, (name, w, b) in enumerate(names)
  }


def official_flow(arrays, group):
  """The official module's parameters as those of KRnet."""
  ours = {}
  for name, value in arrays.items():
    parts = name.removeprefix("param.").split(".")
    if not name.startswith("param."):
      continue
    stage, layer = int(parts[1]), parts[2]
    norm = {"b": "shift", "logs": "log_scale"}
    if layer == "scale_layers":
      ours[(f"blocks_{stage}_{parts[3]}_0", norm[parts[4]])] = value[0]
    elif layer == "affine_layers" and parts[4] == "log_gamma":
      ours[(f"blocks_{stage}_{parts[3]}_1", "log_gamma")] = value[0]
    elif layer == "affine_layers":
      index = {"l_1": 0, "l_2": 1, "l_f": 2}[parts[5]]
      kind = {"weight": "kernel", "bias": "bias"}[parts[6]]
      ours[(f"blocks_{stage}_{parts[3]}_1", f"layers_{index}", kind)] = value.T if kind == "kernel" else value
    elif layer == "scale_layer":
      ours[("last_norm", norm[parts[3]])] = value[0]
    else:
      ours[("last_cdf", "log_density")] = value
  return ours


@pytest.mark.golden
def test_golden_36_aas_flow(golden, x64):
  file, seen = golden("36-aas"), set()
  for case, arrays, _ in file.cases():
    meta = file.meta["cases"][case.removeprefix("case")]
    kind = meta.get("layer", "")
    seen.add(kind)
    if kind.startswith("affine coupling"):
      names = [("l1_", "w", "b"), ("l2_", "w", "b"), ("lf_", "w", "b")]
      params = {**dense(arrays, names), "log_gamma": arrays["log_gamma"][0]}
      layer = krnet.AffineCoupling(arrays["x"].shape[1], meta["split"], len(arrays["l1_b"]))
    elif kind.startswith("piecewise quadratic"):
      params, layer = {"log_density": arrays["p"]}, krnet.PiecewiseQuadraticCDF(arrays["x"].shape[1], meta["n_bins"])
      check(krnet._mesh(meta["n_bins"]), arrays["mesh"][:, 0])
    elif kind.startswith("logit"):
      params, layer = {}, krnet.BoundedSupport(meta["lb"], meta["hb"])
    elif kind.startswith("full KRnet"):
      check_flow(arrays, meta)
      continue
    else:
      continue
    values, logdet = apply(layer, {"params": params}, arrays["x"])
    check(values, arrays["out_z"])
    check(logdet, arrays["out_logdet"][:, 0])
    np.testing.assert_allclose(apply(layer, {"params": params}, values, method="inverse"), arrays["x"], atol=1e-8)
  assert len(seen) > 3


def check_flow(arrays, meta):
  sizes = {"features": "n_dim", "group": "n_step", "depth": "n_depth", "width": "n_width", "bins": "n_bins"}
  flow = krnet.KRnet(**{ours: meta[theirs] for ours, theirs in sizes.items()}, low=meta["lb"], high=meta["hb"])
  shapes = jax.eval_shape(flow.init, jax.random.key(0), arrays["x"])
  params = official_flow(arrays, meta["n_step"])
  assert jax.tree.map(np.shape, params) == {k: v.shape for k, v in flatten_dict(shapes["params"]).items()}
  variables = {"params": unflatten_dict(params), "first": jax.tree.map(lambda s: np.zeros(s.shape), shapes["first"])}
  total = lambda points: (lambda values: (values.sum(), values))(flow.apply(variables, points))
  (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays["x"])
  check(values, arrays["out_logp"][:, 0])
  check(gradient, arrays["grad_x_logp"])
  check(apply(flow, variables, arrays["z_prior"], method="inverse"), arrays["out_samples"])


def _points(rng):
  return (rng.uniform(-0.9, 0.9, (EXAMPLES, 3)),)


def _flow(module, **keywords):
  """`module(points)`, which returns the mapped points and the logarithm of the determinant."""
  call = lambda module, variables, points: list(module.apply(variables, points))
  return module_row(module, _points, call=call, examples="none", **keywords)


def test_bounds_per_dimension(x64):
  """A flow on a box is the flow on the cube of points scaled to it, with the scaling's log determinant."""
  options = dict(features=2, depth=2, width=4, bins=2)
  low, high = (-3.0, 0.0), (1.0, 0.5)
  cube = np.random.default_rng(0).uniform(-0.9, 0.9, (6, 2))
  box = np.array(low) + (cube + 1) / 2 * (np.array(high) - low)
  plain, wide = krnet.KRnet(low=-1.0, high=1.0, **options), krnet.KRnet(low=low, high=high, **options)
  variables = jax.jit(plain.init)(jax.random.key(0), cube)
  density, scaled = jax.jit(plain.apply)(variables, cube), jax.jit(wide.apply)(variables, box)
  np.testing.assert_allclose(scaled, density - np.log((np.array(high) - low) / 2).sum(), atol=1e-9)
  samples = wide.apply(variables, jax.random.key(1), 200, method="sample")
  assert np.all((samples >= np.array(low)) & (samples <= np.array(high)))
  with pytest.raises(ValueError, match="low must be below high"):
    krnet.KRnet(low=(0.0, 1.0), high=(1.0, 1.0), **options).init(jax.random.key(0), cube)
  with pytest.raises(ValueError, match="low must be a number or 2 numbers"):
    krnet.KRnet(low=(0.0, 1.0, 0.0), high=2.0, **options).init(jax.random.key(0), cube)


ROWS = [
  _flow(krnet.ActNorm(3)),
  _flow(krnet.AffineCoupling(3, 1, 4)),
  _flow(krnet.BoundedSupport(-1.01, 1.01), wide=False, extreme=unchanged),
  _flow(krnet.PiecewiseQuadraticCDF(3, 4)),
  module_row(krnet.KRnet(3, depth=2, width=4, bins=4), _points, extreme=unchanged),
]
