"""What every public ingredient promises, tested over the rows that stand in the ingredients' own test files."""

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

from tests.conformance import CLASSES, EXAMPLES, OPTIMIZERS, ROOMS, TRIALS, collect, trial
from tests.conftest import GOLDEN

ROWS, TRANSFORMS, EXEMPT = collect()
BY_LABEL = {row.label: row for row in ROWS}
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
  hyperparameters = {
    name: jnp.asarray(v, wide if v.dtype == float else None) for name, v in trial(row.hyperparameters, index).items()
  }
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
  return jax.jit(functools.partial(evaluate, BY_LABEL[label]))


def assert_close(actual, expected, rtol=1e-9, atol=1e-11):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


def stack(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def mesh(**axes):
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def has_examples(row, argument) -> bool:
  return row.examples != "none" and not is_state(argument)


@every_row
def test_jit_is_eager(row, x64):
  arguments, hyperparameters = inputs(row, 4)
  assert_close(compiled(row.label)(arguments, hyperparameters)[0], row.call(*arguments, **hyperparameters))


@pytest.mark.parametrize("row", [row for row in ROWS if row.differentiable], ids=lambda row: row.label)
def test_gradient_is_right(row, x64):
  for index in (0, 4):
    arguments, hyperparameters = inputs(row, index)
    check_directional_derivatives(row, arguments, hyperparameters, *compiled(row.label)(arguments, hyperparameters))


def check_directional_derivatives(row, arguments, hyperparameters, results, value, gradient):
  x, rest = arguments[0], arguments[1:]
  function = lambda x: compiled(row.label)((x, *rest), hyperparameters)[1]
  if row.surrogate is not None:
    function = lambda x: weighted_sum(row, row.surrogate(x, results, *rest, **hyperparameters))
    np.testing.assert_allclose(function(x), value, rtol=1e-9)
  step, rng = 1e-6, np.random.default_rng(99)
  for _ in range(3):
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), x)
    ahead, behind = (function(jax.tree.map(lambda leaf, v, h=h: leaf + h * v, x, direction)) for h in (step, -step))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, v: jnp.sum(g * v), gradient, direction)))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@every_row
def test_trials_vmapped_sharded_and_pmapped_are_the_loop(row, x64):
  trials = [inputs(row, index) for index in range(TRIALS)]
  expected = stack([compiled(row.label)(*each) for each in trials])
  arguments, hyperparameters = stack(trials)
  one = functools.partial(evaluate, row)
  devices = mesh(trial=4, data=2)
  place = lambda tree, *axes: jax.device_put(tree, NamedSharding(devices, PartitionSpec(*axes)))
  placed = tuple(place(a, "trial", "data") if has_examples(row, a) else place(a, "trial") for a in arguments)
  assert_close(jax.jit(jax.vmap(one))(placed, place(hyperparameters, "trial")), expected)
  if row.examples != "none":  # their gradients on several devices: the next test
    one, expected = lambda arguments, hyperparameters: row.call(*arguments, **hyperparameters), expected[0]
  assert_close(jax.jit(jax.pmap(one))(arguments, hyperparameters), expected)


@pytest.mark.parametrize("row", [row for row in ROWS if row.examples in ("any", "batch")], ids=lambda row: row.label)
def test_a_batch_split_over_devices_is_the_whole(row, x64):
  arguments, hyperparameters = inputs(row)
  results, _, gradient = compiled(row.label)(arguments, hyperparameters)
  options = {"axis_name": "devices"} if any(map(is_state, arguments)) else {}

  def part(*block):
    results, _, gradient = evaluate(row, block, hyperparameters, **options)
    return jax.tree.map(lambda leaf: leaf[None], (results, gradient))

  specs = tuple(PartitionSpec("devices") if has_examples(row, a) else PartitionSpec() for a in arguments)
  mapped = jax.shard_map(
    part, mesh=mesh(devices=8), in_specs=specs, out_specs=PartitionSpec("devices"), check_vma=False
  )
  check_parts(row, jax.jit(mapped)(*arguments), results, gradient)
  if options:
    blocks = (a.reshape(8, -1, *a.shape[1:]) if has_examples(row, a) else a for a in arguments)
    axes = tuple(0 if has_examples(row, a) else None for a in arguments)
    outputs = jax.jit(jax.pmap(part, axis_name="devices", in_axes=axes))(*blocks)
    check_parts(row, jax.tree.map(lambda leaf: leaf[:, 0], outputs), results, gradient)


def check_parts(row, parts, results, gradient):
  """`parts` are the results and the gradient of each device, stacked."""
  whole = lambda leaf: leaf.reshape(EXAMPLES, *leaf.shape[2:])
  assert_close(whole(values_of(row, parts[0])), values_of(row, results))
  assert_close(jax.tree.map(whole, parts[1]), gradient)
  if type(results) is tuple:  # every device has the same state
    assert_close(parts[0][1], jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), results[1]))


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


def has_labels(row) -> bool:
  """Whether the row is a loss of logits and integer labels, each with a value per example."""
  if row.examples not in ("any", "batch") or not row.name.startswith("losses."):
    return False
  if not next(iter(inspect.signature(row.function).parameters)).endswith(("logits", "outputs")):
    return False
  arguments = row.arguments(np.random.default_rng(0))
  return len(arguments) > 1 and np.ndim(arguments[1]) == 1 and np.issubdtype(arguments[1].dtype, np.integer)


losses_with_labels = pytest.mark.parametrize("row", list(filter(has_labels, ROWS)), ids=lambda row: row.label)


@losses_with_labels
def test_labels_that_are_no_class_count_for_nothing(row):
  arguments, hyperparameters = inputs(row, 4, jnp.float32)
  logits, labels = arguments[:2]
  outside = np.zeros(EXAMPLES, bool)
  outside[[2, 5, 6, 11]] = True
  labels = np.array(labels, np.int32)
  labels[outside] = -1, -100, 255, CLASSES
  # Nor do their logits, whatever they are.
  spoiled = jnp.where(outside.reshape(-1, *[1] * (logits.ndim - 1)), jnp.nan, logits)
  results, value, gradient = compiled(row.label)((spoiled, jnp.asarray(labels), *arguments[2:]), hyperparameters)
  assert jnp.isfinite(value) and not np.any(gradient[outside]) and np.isfinite(gradient).all()
  assert not np.any(values_of(row, results)[outside])
  if row.examples == "any":  # no example depends on another
    expected, _, slope = compiled(row.label)(arguments, hyperparameters)
    np.testing.assert_allclose(values_of(row, results)[~outside], values_of(row, expected)[~outside], rtol=1e-6)
    np.testing.assert_allclose(gradient[~outside], slope[~outside], rtol=1e-6, atol=1e-7)
  for before, after in zip(filter(is_state, arguments), results[1:] if type(results) is tuple else ()):
    ids = arguments[-2]  # their rows of a table stay
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[ids[outside]], b[ids[outside]]), before[:1], after[:1])


@losses_with_labels
def test_narrow_labels(row):
  arguments, hyperparameters = inputs(row, 4, jnp.float32)
  call = lambda labels: values_of(row, row.call(arguments[0], labels, *arguments[2:], **hyperparameters))
  narrow = [np.asarray(arguments[1], dtype) for dtype in (np.int8, np.uint8, np.uint32, np.int64)]
  expected, *others = jax.jit(lambda *several: [call(labels) for labels in several])(arguments[1], *narrow)
  for values in others:
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@losses_with_classes
def test_nothing_comes_from_under_the_mask(row):
  arguments, hyperparameters = inputs(row, 4, jnp.float32)
  logits, rest = arguments[0], list(arguments[1:])
  mask = np.ones((EXAMPLES, CLASSES), bool)
  mask[:, 3] = False
  if rest and rest[0].ndim == 1:
    rest[0] = jnp.where(rest[0] == 3, 0, rest[0])
  mask[4] = False  # no class at all

  def total(logits):
    values = row.call(logits, *rest, where=jnp.asarray(mask), **hyperparameters)
    weights = jnp.where(mask, 1.0, 0) if values.ndim == 2 else 1
    return jnp.sum(jnp.where(jnp.isfinite(values), values, 0) * weights), values

  grad = jax.jit(jax.value_and_grad(total, has_aux=True))
  (expected, _), slope = grad(logits)
  for hidden in (np.nan, np.inf, -np.inf):
    (value, values), gradient = grad(jnp.where(mask, logits, hidden))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-7)
    assert not np.any(gradient[~mask])
    if values.ndim == 1:
      assert values[4] == 0 and np.isfinite(values).all()


# Functions of several parameters on equal terms, which broadcast against one another as NumPy's do.
OF_SEVERAL_PARAMETERS = (
  "kernels.bagged_regression.effective_noise",
  "kernels.bagged_regression.optimal_instance_bag_size",
  "metrics.noncentral_chi2.noncentral_chi2_logcdf",
  "metrics.noncentral_chi2.noncentral_chi2_logpdf",
)


@pytest.mark.parametrize(
  "row",
  [
    row
    for row in ROWS
    if row.examples in ("any", "batch") and row.hyperparameters and row.name not in OF_SEVERAL_PARAMETERS
  ],
  ids=lambda row: row.label,
)
def test_hyperparameters_that_would_change_the_shape_are_refused(row):
  """One value per row of the arguments, with an axis of length one, is refused, or is what its shape says."""
  arguments, hyperparameters = inputs(row, 4, jnp.float32)
  shapes = lambda **changed: jax.tree.map(
    jnp.shape, jax.eval_shape(functools.partial(row.call, **{**hyperparameters, **changed}), *arguments)
  )
  expected = shapes()
  for name, value in hyperparameters.items():
    try:
      assert shapes(**{name: jnp.full((EXAMPLES, 1), value)}) == expected, name
    except ValueError as error:
      assert re.search(f"{name}|{name.split('_')[-1]}", str(error))


def called_directly(row) -> bool:
  """Whether the row's arguments are the function's own; Flax modules do as Flax's own layers do."""
  return getattr(row.call, "func", None) is row.function and not isinstance(row.function, type)


@pytest.mark.parametrize("row", list(filter(called_directly, ROWS)), ids=lambda row: row.label)
def test_what_is_no_array_is_refused(row):
  arguments, hyperparameters = inputs(row, 4, jnp.float32)
  parameters = list(inspect.signature(row.function).parameters.values())
  for index, (argument, parameter) in enumerate(zip(arguments, parameters)):
    for wrong in ("a text", None) if isinstance(argument, jax.Array) and parameter.name != "key" else ():
      if wrong is parameter.default:
        continue
      with pytest.raises(REFUSALS, match=r"\w+ must .*got"):
        row.call(*arguments[:index], wrong, *arguments[index + 1 :], **hyperparameters)


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


@every_row
def test_numpy_arrays_do_as_well(row):
  """What `ArrayLike` promises, beside traced hyperparameters, and beside one traced argument at a time."""
  arguments, hyperparameters = inputs(row, dtype=jnp.float32)
  form = lambda results: jax.tree.map(lambda leaf: (leaf.shape, jnp.result_type(leaf)), results)
  expected = form(jax.eval_shape(lambda *a: row.call(*a, **hyperparameters), *arguments))
  plain = jax.tree.map(np.asarray, arguments)
  assert form(jax.eval_shape(lambda traced: row.call(*plain, **traced), hyperparameters)) == expected
  for place, argument in enumerate(arguments):
    call = lambda traced: row.call(*plain[:place], traced, *plain[place + 1 :], **hyperparameters)
    assert form(jax.eval_shape(call, argument)) == expected


# What may come of NaN without being NaN: counts of what is right, for it counts as wrong, and times that never come.
NAN_COUNTS = {
  "classification.top_k_accuracy",
  "classification.balanced_top_k_accuracy",
  "classification.memorization_fractions",
  "classification.worst_group_accuracy-3",
  "sample_complexity.probe_sample_curve",
  "sample_complexity.min_samples_to",
  "lazy_rich.grokking_gap",
  # Integers have no NaN; these inputs are rounded to them.
  "integer.integer_dense-1.5-False",
  "integer.integer_conv-1.5-True",
}


@pytest.mark.parametrize("row", [row for row in ROWS if not row.name.startswith("losses.")], ids=lambda row: row.label)
def test_nan_comes_out_as_nan(row):
  """Whatever changes the results makes a NaN of them when it is one itself; results that hold no floats cannot."""
  arguments, hyperparameters = inputs(row, dtype=jnp.float32)
  leaves, structure = jax.tree.flatten((arguments, hyperparameters))
  call = lambda leaves: floats(compiled(row.label)(*structure.unflatten(leaves))[0])
  expected = call(leaves)
  if row.label in NAN_COUNTS or not expected:
    return
  for place, leaf in enumerate(leaves):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      continue
    for where in (jnp.ones(leaf.shape, bool), jnp.arange(leaf.size).reshape(leaf.shape) == leaf.size // 3):
      with_leaf = lambda new: call([*leaves[:place], new, *leaves[place + 1 :]])
      shrunk = leaf * jnp.linspace(0.2, 0.9, leaf.size).reshape(leaf.shape)
      matters = any(not np.array_equal(a, b) for a, b in zip(with_leaf(jnp.where(where, shrunk, leaf)), expected))
      results = with_leaf(jnp.where(where, jnp.nan, leaf))
      assert not matters or any(np.isnan(result).any() for result in results), f"argument {place}"


def floats(results):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(results) if jnp.issubdtype(leaf.dtype, jnp.floating)]


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
      call = functools.partial(row.call, **{**hyperparameters, name: float("nan")})
      jax.eval_shape(call, *arguments)


# Transformations.

RATE = (0.01, 0.1)
STEPS = 3
SINGLE = {"rtol": 1e-5, "atol": 1e-6}
every_transform = pytest.mark.parametrize(
  "transform", TRANSFORMS, ids=lambda transform: transform.name.split(".", 1)[1]
)


def layer(dtype):
  leaf = lambda *shape: jnp.asarray(np.cos(1.0 + np.arange(np.prod(shape, dtype=int)).reshape(shape)), dtype)
  return {"kernel": leaf(3, 2), "bias": leaf(2), "scale": leaf()}


# Both dtypes side by side, scalars, and a layer without parameters.
TREE = {"float32": layer(jnp.float32), "bfloat16": layer(jnp.bfloat16), "empty": {}}


def is_kernel(params):
  return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def pick(tree, kernels):
  """The kernels of a tree, or the rest of it."""
  return {
    name: {key: leaf for key, leaf in part.items() if (key == "kernel") == kernels} for name, part in tree.items()
  }


def train(tx, params):
  """A few steps towards other values; the scan refuses a state or parameters that change their dtype."""
  shift = lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape) + 0.1
  target = jax.tree.map(lambda leaf: (leaf + shift(leaf)).astype(leaf.dtype), params)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.tree.map(jnp.subtract, params, target), state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), None, length=STEPS)[0][0]


def chained(transform, optimizer, hyperparameters, rate):
  base = OPTIMIZERS[optimizer](rate)
  return base, transform.build(base, **hyperparameters)


def train_all(transform, optimizer, hyperparameters, rate):
  return train(chained(transform, optimizer, hyperparameters, rate)[1], TREE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@every_transform
def test_transformations_in_a_chain(transform, optimizer):
  one = functools.partial(train_all, transform, optimizer)
  trials = [(trial(transform.hyperparameters, index), trial({"rate": RATE}, index)["rate"]) for index in range(TRIALS)]
  trials = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), trials)
  single = jax.jit(one)
  each = [single(*values) for values in trials]
  check_trained(each[-1], optimizer)
  if optimizer == "sgd":
    # Not in bfloat16: there XLA may keep more digits between operations than there are op by op.
    with jax.disable_jit():
      hyperparameters, rate = trials[-1]
      eager = train(chained(transform, optimizer, hyperparameters, rate)[1], TREE["float32"])
    assert_close(eager, each[-1]["float32"], **SINGLE)
  pairs = jax.tree.map(lambda leaf: leaf.reshape(-1, 2), stack(trials))
  mapped = jax.jit(jax.pmap(jax.vmap(one)))(*pairs)
  assert_close(jax.tree.map(lambda leaf: leaf.reshape(TRIALS, *leaf.shape[2:]), mapped), stack(each), **SINGLE)


def check_trained(trained, optimizer):
  assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, TREE)
  assert jax.tree.map(jnp.result_type, trained) == jax.tree.map(jnp.result_type, TREE)
  assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(trained))
  if optimizer == "sgd":  # adaptive steps amplify the rounding of the parameters
    for low, high in zip(jax.tree.leaves(trained["bfloat16"]), jax.tree.leaves(trained["float32"])):
      np.testing.assert_allclose(np.asarray(low, np.float32), high, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@every_transform
def test_transformations_masked_and_in_multi_transform(transform, optimizer):
  base, tx = chained(transform, optimizer, trial(transform.hyperparameters, 4), 0.05)
  is_other = lambda params: jax.tree.map(lambda kernel: not kernel, is_kernel(params))
  labels = lambda params: jax.tree.map(lambda kernel: "own" if kernel else "other", is_kernel(params))
  masked = optax.chain(optax.masked(tx, is_kernel), optax.masked(base, is_other))
  several = optax.multi_transform({"own": tx, "other": base}, labels)
  params = {"float32": TREE["float32"]}
  kernel, rest = pick(params, True), pick(params, False)
  program = lambda: ((train(masked, params), train(several, params)), train(tx, kernel), train(base, rest))
  wrapped, kernels, others = jax.jit(program)()
  for trained in wrapped:
    assert_close(pick(trained, True), kernels, **SINGLE)
    assert_close(pick(trained, False), others, **SINGLE)


@every_transform
def test_transformations_of_a_scalar_and_of_nothing(transform):
  _, tx = chained(transform, "adam", trial(transform.hyperparameters, 4), 0.05)
  assert train(tx, {}) == {}
  try:
    trained = train(tx, jnp.float32(0.7))
  except ValueError as error:  # of one that selects parameters by their names, and says so when there are none
    assert "select must choose" in str(error)
    return
  assert trained.shape == () and trained.dtype == jnp.float32 and np.isfinite(trained)


@every_transform
def test_transformations_refuse_bad_input(transform):
  tx = transform.build(optax.sgd(0.1), **trial(transform.hyperparameters, 0))
  params = {"kernel": jnp.ones((3, 2))}
  state = tx.init(params)
  with pytest.raises(REFUSALS, match="params"):
    tx.update(params, state)
  with pytest.raises(REFUSALS, match="shapes"):
    tx.update({"kernel": jnp.ones((3, 1))}, state, params)
  for name in transform.hyperparameters:
    with pytest.raises(REFUSALS):
      transform.build(optax.sgd(0.1), **{name: float("nan")})


# Nothing is left out.


def public_names():
  for room in ROOMS:
    package = importlib.import_module(f"jaxreg.{room}")
    for module in pkgutil.iter_modules(package.__path__):
      for name in importlib.import_module(f"jaxreg.{room}.{module.name}").__all__:
        yield f"{room}.{module.name}.{name}"


def test_every_public_name_is_in_the_table_or_exempt_with_a_reason():
  names, tested = set(public_names()), {row.name for row in (*ROWS, *TRANSFORMS)}
  assert not names - tested - set(EXEMPT), "add a row to the test file of its module"
  assert not set(EXEMPT) & tested, "exempt, but in the table"
  assert set(EXEMPT) <= names, "exempt, but does not exist"
  assert all(reason.strip() for reason in EXEMPT.values())


def test_rows_have_different_labels():
  assert len(BY_LABEL) == len(ROWS)


def test_every_golden_file_is_read_by_a_test_that_bears_its_name():
  sources = [path.read_text() for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
  for path in sorted(GOLDEN.glob("*.npz")):
    slug = path.stem.split("-", 1)[1]
    pattern = rf"@pytest\.mark\.golden\n(@.*\n)*def test_\w*{slug}"
    readers = [text for text in sources if f'golden("{path.stem}")' in text and re.search(pattern, text)]
    assert readers, f"no test marked golden and named after {slug} opens {path.name}"
