"""What every public ingredient promises, tested over the table of tests/conformance.py."""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.conformance import CLASSES, EXAMPLES, EXEMPT, OPTIMIZERS, ROWS, TRANSFORMS, TRIALS, trial
from tests.conftest import GOLDEN

REFUSALS = (ValueError, AssertionError)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
losses_with_classes = pytest.mark.parametrize(
  "row",
  [row for row in ROWS if {"axis", "where"} <= set(inspect.signature(row.function).parameters) and row.bad],
  ids=lambda row: row.label,
)


def is_state(argument) -> bool:
  return hasattr(argument, "_fields")


def cast(arguments, dtype):
  """Floating arguments in `dtype`; a state's table in float32 where `dtype` is narrower, as it is kept."""

  def convert(argument):
    wide = jnp.promote_types(dtype, jnp.float32) if is_state(argument) else dtype
    return jax.tree.map(lambda x: jnp.asarray(x, wide if np.issubdtype(x.dtype, np.floating) else None), argument)

  return tuple(convert(argument) for argument in arguments)


def inputs(row, index=0, dtype=jnp.float64):
  """Arguments and hyperparameters of one of the trials."""
  wide = jnp.promote_types(dtype, jnp.float32)
  hyperparameters = {name: jnp.asarray(v, wide if v.dtype == float else None) for name, v in trial(row.hyperparameters, index).items()}
  return cast(row.arguments(np.random.default_rng(index)), dtype), hyperparameters


def values_of(row, results):
  return results[0] if type(results) is tuple else results


def weighted_sum(row, values):
  """A scalar to differentiate: classes and groups weighted differently, examples alike, for they are independent."""

  def total(leaf):
    classes = leaf.ndim > (1 if row.examples in ("any", "batch") else 0)
    return jnp.sum(leaf * jnp.linspace(0.5, 1.5, leaf.shape[-1]).astype(leaf.dtype) if classes else leaf)

  return sum(jax.tree.leaves(jax.tree.map(total, values)))


def evaluate(row, arguments, hyperparameters, **static):
  """Results, the weighted sum of the values, and its gradient in the first argument."""

  def objective(x):
    results = row.call(x, *arguments[1:], **hyperparameters, **static)
    return weighted_sum(row, values_of(row, results)), results

  if not row.differentiable:
    return row.call(*arguments, **hyperparameters, **static), (), ()
  (value, results), gradient = jax.value_and_grad(objective, has_aux=True)(arguments[0])
  return results, value, gradient


@functools.cache
def compiled(label):
  row = next(row for row in ROWS if row.label == label)
  return jax.jit(functools.partial(evaluate, row))


def assert_close(actual, expected, rtol=1e-9, atol=1e-11):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


def stack(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.cache
def mesh():
  return jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))


def split_over_devices(tree):
  return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec("devices")))


@every_row
def test_jit_is_eager_and_the_gradient_is_right(row, x64):
  for index in (0, 4):
    arguments, hyperparameters = inputs(row, index)
    actual = compiled(row.label)(arguments, hyperparameters)
    if index == 0:
      assert_close(actual, evaluate(row, arguments, hyperparameters))
    if row.differentiable:
      check_directional_derivatives(row, arguments, hyperparameters, *actual)


def check_directional_derivatives(row, arguments, hyperparameters, results, value, gradient):
  x, rest = arguments[0], arguments[1:]
  function = lambda x: compiled(row.label)((x, *rest), hyperparameters)[1]
  if row.surrogate is not None:
    function = lambda x: weighted_sum(row, row.surrogate(x, results, *rest, **hyperparameters))
    np.testing.assert_allclose(function(x), value, rtol=1e-9)
  step, rng = 1e-6, np.random.default_rng(99)
  for _ in range(3):
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), x)
    moved = lambda h, d=direction: function(jax.tree.map(lambda leaf, v: leaf + h * v, x, d))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, v: jnp.sum(g * v), gradient, direction)))
    tolerance = 1e-6 if value.dtype == jnp.float64 else 1e-2
    step_size = step if value.dtype == jnp.float64 else 1e-2
    numeric = (moved(step_size) - moved(-step_size)) / (2 * step_size)
    np.testing.assert_allclose(slope, numeric, rtol=tolerance, atol=tolerance)


@every_row
def test_trials_vmapped_pmapped_and_sharded_are_the_loop(row, x64):
  trials = [inputs(row, index) for index in range(TRIALS)]
  expected = stack([compiled(row.label)(*each) for each in trials])
  stacked = stack(trials)
  one = functools.partial(evaluate, row)
  mapped = jax.jit(jax.vmap(one))
  assert_close(mapped(*stacked), expected)
  assert_close(mapped(*split_over_devices(stacked)), expected)
  assert_close(jax.pmap(one)(*stacked), expected)


@pytest.mark.parametrize("row", [row for row in ROWS if row.examples in ("any", "batch")], ids=lambda row: row.label)
def test_a_batch_split_over_devices_is_the_whole(row, x64):
  arguments, hyperparameters = inputs(row)
  results, _, gradient = compiled(row.label)(arguments, hyperparameters)
  options = {"axis_name": "devices"} if any(is_state(argument) for argument in arguments) else {}
  axes = tuple(None if is_state(argument) else 0 for argument in arguments)

  def part(*block):
    results, _, gradient = evaluate(row, block, hyperparameters, **options)
    return jax.tree.map(lambda leaf: leaf[None], (results, gradient))

  blocks = tuple(
    argument if axis is None else argument.reshape(8, -1, *argument.shape[1:]) for argument, axis in zip(arguments, axes)
  )
  specs = tuple(PartitionSpec() if axis is None else PartitionSpec("devices") for axis in axes)
  sharded = jax.shard_map(
    part, mesh=mesh(), in_specs=specs, out_specs=PartitionSpec("devices"), check_vma=False
  )
  outputs = [
    jax.tree.map(lambda leaf: leaf[:, 0], jax.pmap(part, axis_name="devices", in_axes=axes)(*blocks)),
    jax.jit(sharded)(*arguments),
  ]
  for actual_results, actual_gradient in outputs:
    whole = lambda leaf: leaf.reshape(EXAMPLES, *leaf.shape[2:])
    assert_close(whole(values_of(row, actual_results)), values_of(row, results))
    assert_close(jax.tree.map(whole, actual_gradient), gradient)
    if options:
      for device in range(8):
        assert_close(jax.tree.map(lambda leaf, d=device: leaf[d], actual_results[1]), results[1])


@pytest.mark.parametrize("row", [row for row in ROWS if row.examples != "none"], ids=lambda row: row.label)
def test_a_sharded_batch_is_the_whole(row, x64):
  arguments, hyperparameters = inputs(row)
  placed = tuple(argument if is_state(argument) else split_over_devices(argument) for argument in arguments)
  assert_close(
    compiled(row.label)(placed, hyperparameters), compiled(row.label)(arguments, hyperparameters)
  )


@pytest.mark.parametrize("row", [row for row in ROWS if row.examples == "any"], ids=lambda row: row.label)
def test_any_leading_shape(row, x64):
  arguments, hyperparameters = inputs(row)
  expected = values_of(row, compiled(row.label)(arguments, hyperparameters)[0])
  call = lambda *a: values_of(row, row.call(*a, **hyperparameters))
  axes = tuple(None if is_state(argument) else 0 for argument in arguments)

  def layouts(*arguments):
    grid = [a if axis is None else a.reshape(2, -1, *a.shape[1:]) for a, axis in zip(arguments, axes)]
    return call(*grid).reshape(expected.shape), jax.vmap(call, in_axes=axes)(*arguments)

  for actual in jax.jit(layouts)(*arguments):
    assert_close(actual, expected)


@losses_with_classes
def test_class_axis_and_masked_class(row, x64):
  arguments, hyperparameters = inputs(row)
  dense = arguments[1:] and arguments[1].ndim == 2
  moved = tuple(jnp.moveaxis(a, -1, 0) if a.ndim == 2 else a for a in arguments)
  kept = arguments[1] if dense else jnp.minimum(arguments[1], CLASSES - 2) if arguments[1:] else None
  kept = () if kept is None else (kept,)
  fewer = tuple(a[..., :-1] if a.ndim == 2 else a for a in (arguments[0], *kept))
  mask = jnp.arange(CLASSES) < CLASSES - 1

  def layouts():
    call = functools.partial(row.call, **hyperparameters)
    plain = call(*arguments)
    back = call(*moved, axis=0)
    masked = call(arguments[0], *kept, where=mask)
    if plain.ndim == 2:
      back, masked = jnp.moveaxis(back, 0, -1), masked[..., :-1]
    return (plain, plain, call(*fewer)), (back, call(*arguments, where=jnp.ones(CLASSES, bool)), masked)

  expected, actual = jax.jit(layouts)()
  assert_close(actual, expected)


@every_row
def test_float32_and_bfloat16(row):
  for index in (0, TRIALS - 1):
    (arguments, hyperparameters) = inputs(row, index, jnp.bfloat16)
    extreme = cast(row.extreme(*row.arguments(np.random.default_rng(index))), jnp.bfloat16)
    for narrow, ordinary in ((arguments, True), (extreme, False)):
      low = compiled(row.label)(narrow, hyperparameters)
      high = compiled(row.label)(cast_up(narrow), hyperparameters)
      check_narrow(row, low, high, ordinary)


def cast_up(arguments):
  return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arguments)


def check_narrow(row, low, high, ordinary):
  for results in (low, high):
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(results))
  for leaf in jax.tree.leaves(values_of(row, low[0])):
    assert leaf.dtype == (jnp.bfloat16 if not row.wide else leaf.dtype)
    assert not row.wide or leaf.dtype != jnp.bfloat16
  assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(low[2]))
  if not ordinary:
    return
  for a, b in zip(jax.tree.leaves((low[0], low[2])), jax.tree.leaves((high[0], high[2]))):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # Two roundings to 8 bits, relative to the largest entry.
    np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-7 * np.abs(b).max(initial=0))


@pytest.mark.parametrize("row", [row for row in ROWS if row.bad], ids=lambda row: row.label)
def test_bad_input_is_refused(row):
  arguments, hyperparameters = inputs(row, dtype=jnp.float32)
  call = functools.partial(row.call, **hyperparameters)
  jax.eval_shape(call, *arguments)
  arguments = jax.tree.map(np.asarray, arguments)
  for named, spoil in row.bad:
    with pytest.raises(REFUSALS, match=named):
      jax.eval_shape(call, *spoil(*arguments))


@pytest.mark.parametrize("row", [row for row in ROWS if row.hyperparameters], ids=lambda row: row.label)
def test_hyperparameters_that_are_no_numbers_are_refused(row):
  arguments, hyperparameters = inputs(row, dtype=jnp.float32)
  for name in row.hyperparameters:
    with pytest.raises(REFUSALS, match=name):
      row.call(*arguments, **{**hyperparameters, name: float("nan")})


# Transformations.

RATE = (0.01, 0.1)
STEPS = 3


def parameters(dtypes):
  leaf = lambda shape, index, scale=1.0: jnp.asarray(scale * np.cos(1.0 + np.arange(np.prod(shape)).reshape(shape)), dtypes[index])
  return {"layer": {"kernel": leaf((3, 2), 0), "bias": leaf((2,), 1)}, "scale": leaf((), 2), "empty": {}}


TREES = {
  "float32": parameters([jnp.float32] * 3),
  "bfloat16": parameters([jnp.bfloat16] * 3),
  "mixed": parameters([jnp.bfloat16, jnp.float32, jnp.float32]),
  "kernel": {"layer": {"kernel": parameters([jnp.float32] * 3)["layer"]["kernel"]}},
  "scalar": jnp.float32(0.7),
  "empty": {},
}


def is_kernel(params):
  return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def train(tx, params, state=None):
  """A few steps towards other values; the scan refuses a state or parameters that change their dtype."""
  target = jax.tree.map(lambda leaf: (leaf + jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)).astype(leaf.dtype), params)

  def step(carry, _):
    params, state = carry
    gradients = jax.tree.map(lambda p, t: p - t, params, target)
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), None, length=STEPS)[0][0]


def run(transform, optimizer, hyperparameters, rate):
  base = OPTIMIZERS[optimizer](rate)
  tx = transform.build(base, **hyperparameters)
  labels = lambda params: jax.tree.map(lambda kernel: "own" if kernel else "other", is_kernel(params))
  results = {name: train(tx, params) for name, params in TREES.items()}
  results["base"] = train(base, TREES["float32"])
  results["masked"] = train(optax.chain(optax.masked(tx, is_kernel), optax.masked(base, lambda p: jax.tree.map(lambda k: not k, is_kernel(p)))), TREES["float32"])
  results["multi_transform"] = train(optax.multi_transform({"own": tx, "other": base}, labels), TREES["float32"])
  return results


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.name.split(".", 1)[1])
def test_transformations_in_a_chain(transform, optimizer):
  one = functools.partial(run, transform, optimizer)
  each = [(trial(transform.hyperparameters, index), trial({"rate": RATE}, index)["rate"]) for index in range(TRIALS)]
  each = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), each)
  single = jax.jit(one)
  expected = [single(*values) for values in each]
  check_trees(expected[-1], optimizer)
  assert_close(one(*each[-1]), expected[-1], rtol=1e-5, atol=1e-6)
  expected, stacked = stack(expected), stack(each)
  assert_close(jax.jit(jax.vmap(one))(*stacked), expected, rtol=1e-5, atol=1e-6)
  assert_close(jax.pmap(one)(*stacked), expected, rtol=1e-5, atol=1e-6)


def check_trees(results, optimizer):
  for name, params in TREES.items():
    assert jax.tree.map(jnp.shape, results[name]) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.result_type, results[name]) == jax.tree.map(jnp.result_type, params)
  assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(results))
  for wrapped in ("masked", "multi_transform"):
    kernel = lambda params: {"layer": {"kernel": params["layer"]["kernel"]}}
    assert_close(kernel(results[wrapped]), results["kernel"], rtol=1e-6)
    for path in (lambda params: params["layer"]["bias"], lambda params: params["scale"]):
      assert_close(path(results[wrapped]), path(results["base"]), rtol=1e-6)
  if optimizer == "sgd":  # adaptive steps amplify the rounding of the parameters
    for narrow in ("bfloat16", "mixed"):
      for a, b in zip(jax.tree.leaves(results[narrow]), jax.tree.leaves(results["float32"])):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.name.split(".", 1)[1])
def test_transformations_refuse_bad_input(transform):
  tx = transform.build(optax.sgd(0.1), **trial(transform.hyperparameters, 0))
  params = {"w": jnp.ones((3, 2))}
  state = tx.init(params)
  with pytest.raises(REFUSALS, match="params"):
    tx.update(params, state)
  with pytest.raises(REFUSALS, match="shapes"):
    tx.update({"w": jnp.ones((3, 1))}, state, params)
  for name in transform.hyperparameters:
    with pytest.raises(REFUSALS):
      transform.build(optax.sgd(0.1), **{name: float("nan")})


# Nothing is left out.


def public_names(room):
  package = importlib.import_module(f"jaxreg.{room}")
  for module in pkgutil.iter_modules(package.__path__):
    for name in importlib.import_module(f"jaxreg.{room}.{module.name}").__all__:
      yield f"{room}.{module.name}.{name}"


def test_every_public_ingredient_is_in_the_table():
  names = {name for room in ("losses", "metrics", "regularizers", "transforms") for name in public_names(room)}
  tested = {row.name for row in ROWS} | {row.name for row in TRANSFORMS}
  assert not names - tested - set(EXEMPT), "add a line to tests/conformance.py"
  assert not set(EXEMPT) - names, "exempt, but does not exist"
  assert not set(EXEMPT) & tested, "exempt, but in the table"


def test_every_golden_file_is_read_by_a_test_that_bears_its_name():
  sources = [path.read_text() for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
  for path in sorted(GOLDEN.glob("*.npz")):
    slug = path.stem.split("-", 1)[1]
    pattern = rf"@pytest\.mark\.golden\n(@.*\n)*def test_\w*{slug}"
    readers = [text for text in sources if f'golden("{path.stem}")' in text and re.search(pattern, text)]
    assert readers, f"no test marked golden and named after {slug} opens {path.name}"
