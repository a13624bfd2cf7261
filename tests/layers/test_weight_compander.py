"""The compander, its inverse and derivatives, companded parameters, and the companded layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.layers import weight_compander
from jaxreg.layers.weight_compander import ARCTAN, SOFTSIGN, TANH, compand, uncompand
from jaxreg.metrics.weights import he_deviation
from jaxreg.models import MLP
from tests.conformance import draw_layer, draw_logits, extreme_logits, module_row, row

every_curve = pytest.mark.parametrize("curve", [ARCTAN, TANH, SOFTSIGN], ids=repr)
numbers = functools.partial(st.floats, allow_subnormal=False)


@functools.cache
def pulled(curve):
  """Weights, gradients in (v, a, b) for a cotangent, and the parameters of other weights."""

  @jax.jit
  def program(values, amplitude, width, cotangent, weights):
    call = lambda v, a, b: compand(v, amplitude=a, width=b, curve=curve)
    out, pull = jax.vjp(call, values, amplitude, width)
    return out, pull(cotangent), uncompand(weights, amplitude=amplitude, width=width, curve=curve)

  return program


@pytest.mark.golden
def test_golden_02_weight_compander(golden, x64):
  for _, arrays, _ in golden("02-weight_compander").cases():
    names = ("v", "a", "b", "cotangent", "w_target")
    out, (grad_v, grad_a, grad_b), back = pulled(ARCTAN)(*(jnp.asarray(arrays[name]) for name in names))
    np.testing.assert_allclose(out, arrays["out_w"], rtol=1e-9)
    # Absolute where |v| is a million b, as the card says.
    np.testing.assert_allclose(grad_v, arrays["grad_v"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grad_a, arrays["grad_a"], rtol=1e-9)
    np.testing.assert_allclose(grad_b, arrays["grad_b"], rtol=1e-9)
    np.testing.assert_allclose(back, arrays["out_v_from_w"], rtol=1e-9)


@given(numbers(1e-3, 1e3), numbers(1e-3, 1e3), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_inverse_derivatives_and_homogeneity(amplitude, width, seed):
  rng = np.random.default_rng(seed)
  values = rng.normal(size=(6, 7)) * width * 10 ** rng.uniform(-6, 3, (6, 7)) / 4
  values = np.clip(values, -1e3 * width, 1e3 * width)
  cotangent, weights = rng.normal(size=(6, 7)), rng.uniform(-0.999, 0.999, (6, 7)) * amplitude * np.pi / 2
  with jax.enable_x64(True):
    run = lambda v, a, b, w: jax.tree.map(
      np.asarray, pulled(ARCTAN)(v, jnp.float64(a), jnp.float64(b), cotangent, w)
    )  # fmt: skip
    out, (grad_v, grad_a, grad_b), back = run(values, amplitude, width, weights)
    np.testing.assert_allclose(run(back, amplitude, width, out)[0], weights, rtol=1e-9)
    np.testing.assert_allclose(run(values, amplitude, width, out)[2], values, rtol=1e-9)
    angle, ratio = out / amplitude, amplitude / width
    np.testing.assert_allclose(grad_v, cotangent * ratio * np.cos(angle) ** 2, rtol=1e-10, atol=1e-12 * ratio)
    np.testing.assert_allclose(grad_a, np.sum(cotangent * angle), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(
      grad_b, -np.sum(cotangent * ratio / 2 * np.sin(2 * angle)), rtol=1e-10, atol=1e-11 * ratio
    )
    factor = rng.uniform(0.1, 10)
    np.testing.assert_allclose(run(values, factor * amplitude, width, weights)[0], factor * out, rtol=1e-12)
    np.testing.assert_allclose(run(factor * values, amplitude, factor * width, weights)[0], out, rtol=1e-12)
    # Euler's identities.
    scale = np.sum(np.abs(cotangent * out))
    np.testing.assert_allclose(amplitude * grad_a, np.sum(cotangent * out), atol=1e-12 * scale)
    np.testing.assert_allclose(np.sum(values * grad_v), -width * grad_b, atol=1e-12 * ratio * scale)


@every_curve
@pytest.mark.parametrize("x64_on", [False, True], ids=["float32", "float64"])
def test_bounded_odd_and_finite(curve, x64_on):
  with jax.enable_x64(x64_on):
    dtype = jnp.float64 if x64_on else jnp.float32
    values = np.outer([1, -1], [0, 1e-30, 1e-9, 0.3, 1, 7, 1e4, 1e15, 1e30]).astype(dtype)
    for amplitude, width in ((1.0, 1.0), (0.1, 1e-20), (0.7, 1e4)):
      limit = (np.asarray(amplitude, dtype) * np.asarray(curve.limit, dtype)).astype(dtype)
      out, gradients, back = pulled(curve)(
        values, jnp.asarray(amplitude, dtype), jnp.asarray(width, dtype), np.ones_like(values), 1.5 * limit * values
      )
      assert (np.abs(out) < limit).all()
      np.testing.assert_array_equal(out[0], -out[1])
      assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradients, back)))


@every_curve
def test_curves_have_their_slope_and_inverse(curve, x64):
  u = jnp.linspace(-4, 4, 17)
  np.testing.assert_allclose(jax.vmap(jax.grad(curve.function))(u), curve.slope(u), rtol=1e-9)
  np.testing.assert_allclose(curve.inverse(curve.function(u)), u, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(curve.function(jnp.float64(1e18)), curve.limit, rtol=1e-12)
  np.testing.assert_allclose(curve.slope(jnp.float64(0)), 1)


def test_wide_curve_is_the_plain_parameterization(x64):
  values, cotangent = jnp.linspace(-1, 1, 42), jnp.cos(jnp.arange(42.0))
  out, (grad_v, *_), _ = pulled(ARCTAN)(values, jnp.float64(1e4), jnp.float64(1e4), cotangent, values)
  assert (np.abs(out - values) <= np.abs(values) ** 3 / 3e8 + 1e-15).all()
  stepped = compand(values - 0.1 * grad_v, amplitude=1e4, width=1e4)
  np.testing.assert_allclose(stepped, values - 0.1 * cotangent, atol=1e-6)


def test_first_order_step(x64):
  a, b = jnp.float64(0.6), jnp.float64(0.4)
  values, gradient = jnp.linspace(-1, 1, 42), jnp.cos(jnp.arange(42.0))
  out, (grad_v, *_), _ = pulled(ARCTAN)(values, a, b, gradient, values)
  predicted = -((a / b) ** 2) * jnp.cos(out / a) ** 4 * gradient
  errors = [
    np.abs(pulled(ARCTAN)(values - rate * grad_v, a, b, gradient, values)[0] - out - rate * predicted).max()
    for rate in (1e-3, 5e-4, 2.5e-4)
  ]
  np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=1e-2)


MODEL = MLP((8, 6, 3))
INPUTS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
PARAMS = jax.tree.map(
  lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
  jax.eval_shape(MODEL.init, jax.random.key(0), INPUTS)["params"],
)


@pytest.fixture(scope="module")
def companded():
  return jax.jit(weight_compander.compander_init)(PARAMS)


def test_initial_weights_are_the_given_ones_where_not_clipped(companded):
  weights = jax.jit(weight_compander.fold_params)(companded)
  assert set(companded.log_amplitude) == {f"Dense_{i}/kernel" for i in range(3)}
  for name, layer in PARAMS.items():
    np.testing.assert_array_equal(weights[name]["bias"], layer["bias"])
    largest = 0.95 * 1.5 * np.pi / 2 * he_deviation(layer["kernel"].shape)
    clipped = np.clip(layer["kernel"], -largest, largest)
    assert (clipped != layer["kernel"]).any()
    np.testing.assert_allclose(weights[name]["kernel"], clipped, rtol=2e-6, atol=1e-7)


def test_folded_network_gives_the_same_bits(companded):
  """As a program that folds before each use."""
  apply = jax.jit(lambda companded: MODEL.apply({"params": weight_compander.fold_params(companded)}, INPUTS))
  folded = jax.jit(weight_compander.fold_params)(companded)
  plain = jax.jit(lambda params: MODEL.apply({"params": params}, INPUTS))
  np.testing.assert_array_equal(apply(companded), plain(folded))


def test_training_keeps_the_bound_and_learns_the_scales_when_asked(companded):
  labels = weight_compander.CompandedParams("weights", "scales", "scales")

  @jax.jit
  def train(rate, companded):
    tx = optax.multi_transform({"weights": optax.sgd(30.0, momentum=0.9), "scales": optax.sgd(rate)}, labels)

    def loss(companded):
      return jnp.mean((MODEL.apply({"params": weight_compander.fold_params(companded)}, INPUTS) - 50.0) ** 2) / 1e3

    def step(carry, _):
      companded, state = carry
      updates, state = tx.update(jax.grad(loss)(companded), state, companded)
      companded = optax.apply_updates(companded, updates)
      return (companded, state), weight_compander.fold_params(companded)

    return jax.lax.scan(step, (companded, tx.init(companded)), None, length=30)

  (fixed, _), path = train(0.0, companded)
  assert jax.tree.map(float, fixed[1:]) == jax.tree.map(float, companded[1:])
  for layer in path.values():
    bound = 1.5 * np.pi / 2 * he_deviation(layer["kernel"].shape[1:])
    assert np.isfinite(layer["kernel"]).all() and np.abs(layer["kernel"]).max() < bound
  (learned, _), _ = train(0.1, companded)
  assert all(learned.log_amplitude[name] != companded.log_amplitude[name] for name in learned.log_amplitude)
  assert all(learned.log_width[name] != companded.log_width[name] for name in learned.log_width)


def test_attention_is_clipped_at_the_scale_of_its_inputs():
  """No weight of a fresh attention layer, a truncated normal, lies beyond the bound of its fan-in's scale."""
  attention = nn.MultiHeadDotProductAttention(8, kernel_init=nn.initializers.lecun_normal())
  params = attention.init(jax.random.key(0), jnp.ones((1, 2, 512)))["params"]
  folded = weight_compander.fold_params(weight_compander.compander_init(params))
  for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(folded)):
    np.testing.assert_allclose(after, before, atol=1e-6)
  layer = weight_compander.Companded(nn.MultiHeadDotProductAttention(8), learned=True)
  learned = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 2, 64)))["params"]
  assert "query_kernel_log_amplitude" in learned and not any("/" in name for name in learned)


@pytest.mark.parametrize("params, names", [({"scale": jnp.ones(2)}, "scale"), (jnp.ones(2), "an array without a name")])
def test_selecting_nothing_is_refused(params, names):
  with pytest.raises(ValueError, match=f"select must choose parameters to compand, got none of {names}"):
    weight_compander.compander_init(params)


def test_selection_leaves_the_rest_alone(companded):
  select = lambda path, leaf: weight_compander.is_kernel(path, leaf) and not path.startswith("Dense_2")
  some = jax.jit(functools.partial(weight_compander.compander_init, select=select))(PARAMS)
  assert set(some.log_amplitude) == {"Dense_0/kernel", "Dense_1/kernel"}
  np.testing.assert_array_equal(some.raw["Dense_2"]["kernel"], PARAMS["Dense_2"]["kernel"])
  np.testing.assert_allclose(some.raw["Dense_0"]["kernel"], companded.raw["Dense_0"]["kernel"], rtol=1e-5)


class Network(nn.Module):
  learned: bool

  @nn.compact
  def __call__(self, inputs):
    hidden = weight_compander.Companded(nn.Dense(6, name="first"), learned=self.learned, slope=2.0)(inputs)
    return weight_compander.Companded(nn.Conv(3, (2,), name="second"), learned=self.learned, slope=2.0)(hidden)


class Plain(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    return nn.Conv(3, (2,), name="second")(nn.Dense(6, name="first")(inputs))


@pytest.mark.parametrize("learned", [False, True])
def test_companded_layers_agree_with_companded_params(learned):
  inputs, names = INPUTS[None], ("first", "second")

  @jax.jit
  def both(key):
    params = Network(learned).init(key, inputs)["params"]
    own = {name: params[name] for name in names}
    weights = weight_compander.compander_init(own, slope=2.0)._replace(raw=own)
    loss = lambda output: jnp.sum(jnp.sin(output))
    layers = lambda p: loss(Network(learned).apply({"params": p}, inputs))
    pytree = lambda c: loss(Plain().apply({"params": weight_compander.fold_params(c)}, inputs))
    return params, jax.value_and_grad(layers)(params), jax.value_and_grad(pytree)(weights)

  params, (value, gradient), (expected, reference) = both(jax.random.key(1))
  shapes = jax.eval_shape(Plain().init, jax.random.key(1), inputs)["params"]
  assert jax.tree.map(jnp.shape, {name: params[name] for name in names}) == jax.tree.map(jnp.shape, shapes)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for name in ("first", "second"):
    np.testing.assert_allclose(gradient[name]["kernel"], reference.raw[name]["kernel"], rtol=1e-4, atol=1e-6)
  if learned:
    scales = {name: params[name] for name in params if name.startswith("Companded")}
    assert [sorted(scale) for scale in scales.values()] == [["kernel_log_amplitude", "kernel_log_width"]] * 2
    for index, name in enumerate(("first", "second")):
      own, other = gradient[f"Companded_{index}"], f"{name}/kernel"
      np.testing.assert_allclose(own["kernel_log_amplitude"], reference.log_amplitude[other], rtol=1e-3, atol=1e-5)
      np.testing.assert_allclose(own["kernel_log_width"], reference.log_width[other], rtol=1e-3, atol=1e-5)
  else:
    assert set(params) == {"first", "second"}


def test_bad_input():
  with pytest.raises(ValueError, match="amplitude must lie in"):
    compand(jnp.ones(3), amplitude=0.0, width=1.0)
  with pytest.raises(ValueError, match="width must lie in"):
    uncompand(jnp.ones(3), amplitude=1.0, width=float("nan"))
  with pytest.raises(ValueError, match="weights must be floating"):
    uncompand(jnp.ones(3, int), amplitude=1.0, width=1.0)
  with pytest.raises(ValueError, match="amplitude must broadcast"):
    compand(jnp.ones(3), amplitude=jnp.ones((2, 1)), width=1.0)
  with pytest.raises(ValueError, match="slope must lie in"):
    weight_compander.compander_init(PARAMS, slope=-1.0)
  with pytest.raises(ValueError, match="params.a/kernel. must be floating"):
    weight_compander.compander_init({"a": {"kernel": jnp.ones((2, 2), int)}})


ROWS = [
  row(
    weight_compander.compander_init,
    draw_layer,
    call=lambda params, **options: weight_compander.compander_init(params, **options).raw,
    bad=(("params", lambda params: ({**params, "kernel": np.ones((3, 4), np.int32)},)),),
    options=dict(deviations=(4.0, 9.0), slope=(0.5, 1.0)),
  ),
  row(
    weight_compander.fold_params,
    draw_layer,
    call=lambda params: weight_compander.fold_params(weight_compander.compander_init(params, deviations=1.5)),
  ),
  module_row(weight_compander.Companded(nn.Dense(3)), lambda rng: (draw_logits(rng),)),
  row(
    weight_compander.compand,
    lambda rng: (draw_logits(rng),),
    extreme=extreme_logits,
    bad=(("values", lambda values: (values.astype(np.int32),)),),
    examples="any",
    options=dict(amplitude=(0.5, 2.0), width=(0.5, 2.0)),
  ),
  row(
    weight_compander.uncompand,
    lambda rng: (np.tanh(draw_logits(rng)) / 2,),
    extreme=extreme_logits,
    bad=(("weights", lambda weights: (weights.astype(np.int32),)),),
    examples="any",
    options=dict(amplitude=(0.5, 2.0), width=(0.5, 2.0)),
  ),
]


EXEMPT = {
  "ARCTAN": "a curve, in the row of compand",
  "CompandedParams": "result of compander_init",
  "Curve": "functions by name",
  "SOFTSIGN": "a curve, compared with ARCTAN in its own test",
  "TANH": "a curve, compared with ARCTAN in its own test",
}
