"""The table of public ingredients, and what its rows are made with: tests/test_conformance.py tests every row.

Rows stand in the ingredients' own test files. A new ingredient joins by one line there, with an adapter for its kind.
Hyperparameters that may be traced are given as ranges `(low, high)`, along which a trial axis is laid; whatever is not
a tuple is static:

    ROWS = [
      loss_row(symmetric.brier_loss),  # loss(logits, labels)
      loss_row(label_dro.ldr_kl_loss, temperature=(0.5, 2.0), normalize="l1_mean"),
      scores_row(stablemax),  # function(logits), one value per class
      penalty_row(group_sparsity.wgsef, LAYER_GROUPS, k=(1, 3)),  # penalty(values, groups)
    ]

Transformations say their place in the chain:

    TRANSFORMS = [
      transform_row(penalize, lambda base, weight: optax.chain(penalize(ridge, weight), base), weight=(0, 1)),
    ]

An ingredient that fits no adapter is a `row` with its own arguments. A public name that cannot be a row (it takes
functions of the caller, or only holds a result) stands beside them with the reason:

    EXEMPT = {"ELRState": "state, carried by elr_loss"}
"""

import functools
import importlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.regularizers import groups

ROOMS = (
  "adversarial",
  "data",
  "denoising",
  "kernels",
  "layers",
  "losses",
  "metrics",
  "models",
  "pruning",
  "quantization",
  "regularizers",
  "solvers",
  "transforms",
)
TRIALS = 8
EXAMPLES, CLASSES, TABLE = 16, 5, 24
EXTREME = 1e4


class Row(NamedTuple):
  """One ingredient: how it is called and with what, and which of the general promises it makes."""

  name: str  # dotted, below jaxreg
  label: str  # the name with its static options, for the test's id
  call: Callable  # call(*arguments, **traced hyperparameters), and axis_name=... when there is a state
  arguments: Callable  # rng -> arguments in float64; the gradient is the first one's; NamedTuples are states
  hyperparameters: dict[str, tuple]  # ranges of those that may be traced
  extreme: Callable  # arguments -> arguments with extreme values
  bad: tuple  # (argument named by the message, arguments -> bad arguments)
  examples: str  # "any": values per example for any leading shape; "batch": for one axis; "reduced"; "none"
  differentiable: bool  # whether the gradient is that of `call`, or of `surrogate` if there is one
  wide: bool  # whether results are float32 (or not floating) rather than in the dtype of the arguments
  surrogate: Callable | None  # surrogate(x, results, *other arguments, **hyperparameters): what is differentiated
  function: Any  # the public object itself


def row(
  function,
  arguments,
  *,
  call=None,
  extreme=None,
  bad=(),
  examples="none",
  differentiable=True,
  wide=False,
  surrogate=None,
  options=None,
):
  """A row with arguments of its own; the other adapters all end here."""
  options = options or {}
  ranges = {name: value for name, value in options.items() if isinstance(value, tuple)}
  static = {name: value for name, value in options.items() if not isinstance(value, tuple)}
  name = f"{function.__module__.removeprefix('jaxreg.')}.{function.__name__}"
  label = name.split(".", 1)[1] + "".join(f"-{value}" for value in static.values())
  call = functools.partial(call or function, **static)
  extreme = extreme or (lambda values, *rest: (jax.tree.map(extremes, values), *rest))
  return Row(
    name, label, call, arguments, ranges, extreme, bad, examples, differentiable, wide, surrogate, function
  )  # fmt: skip


def loss_row(function, **options):
  """`function(logits, labels, **options)`, a value per example."""
  return row(
    function, draw_classification, extreme=extreme_logits, bad=BAD_LABELS, examples="any", options=options
  )  # fmt: skip


def scores_row(function, **options):
  """`function(logits, **options)`, a value per class."""
  return row(
    function, lambda rng: (draw_logits(rng),), extreme=extreme_logits, bad=BAD_LOGITS, examples="any", options=options
  )  # fmt: skip


def stateful_loss_row(function, init, surrogate, **options):
  """`function(logits, labels, ids, state=state, **options)`, values per example and the new state."""

  def call(logits, labels, ids, state, **hyperparameters):
    return function(logits, labels, ids, state=state, **hyperparameters)

  def arguments(rng):
    return *draw_classification(rng), draw_ids(rng), init(rng)

  bad = (
    *BAD_LABELS,
    ("ids", lambda z, y, ids, s: (z, y, ids[1:], s)),
    ("ids", lambda z, y, ids, s: (z, y, ids * 1.0, s)),
  )
  return row(
    function,
    arguments,
    call=call,
    extreme=extreme_logits,
    bad=bad,
    examples="any",
    surrogate=surrogate,
    options=options,
  )


def penalty_row(function, groups, *, bad=None, **options):
  """`function(values, groups, **options)` of the kernel and bias of a layer."""
  keywords = {name: options.pop(name) for name in tuple(options) if name in ("differentiable", "wide")}
  call = lambda values, **hyperparameters: function(values, groups, **hyperparameters)
  return row(function, draw_layer, call=call, bad=BAD_VALUES if bad is None else bad, options=options, **keywords)


def metric_row(function, *, arguments=None, call=None, bad=None, **options):
  """`function(logits, labels, **options)`, a mean over the examples, of which no gradient is promised."""
  return row(
    function,
    arguments or draw_classification,
    call=call,
    extreme=extreme_logits,
    bad=BAD_LABELS if bad is None else bad,
    examples="reduced",
    differentiable=False,
    wide=True,
    options=options,
  )


def module_row(module, arguments, *, options=None, call=None, **keywords):
  """`module(*arguments, **options)` of a Flax module, with variables that are waves."""
  options = options or {}

  def apply(*arguments):
    variables = waves(module, *arguments, **options)
    return (call or (lambda module, variables, *arguments: module.apply(variables, *arguments, **options)))(
      module, variables, *arguments
    )

  return row(type(module), arguments, call=apply, **{"examples": "batch", "wide": True, **keywords})


def waves(module, *arguments, **options):
  """Variables for a module: small parameters of both signs, positive statistics, four bits, and true."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **options))
  dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(arguments)), jnp.float32)

  def fill(path, leaf):
    wave = np.cos(1.0 + np.arange(leaf.size)).reshape(leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return jnp.full(leaf.shape, 4, leaf.dtype)
    return jnp.asarray(wave / 2 if path[0].key == "params" else 1 + wave / 4, dtype)

  return jax.tree_util.tree_map_with_path(fill, shapes)


class Transform(NamedTuple):
  """A transformation: `build(base, **hyperparameters)` puts it where it belongs beside the optimizer `base`."""

  name: str
  build: Callable
  hyperparameters: dict[str, tuple]
  function: Any


def transform_row(function, build, **ranges):
  """A row of `TRANSFORMS`."""
  name = f"{function.__module__.removeprefix('jaxreg.')}.{function.__name__}"
  return Transform(name, build, ranges, function)


def trial(ranges: dict[str, tuple], index: int) -> dict:
  """The hyperparameters of one of the trials, evenly spread over the ranges; of integers for ranges of integers."""
  share = index / (TRIALS - 1)
  values = {name: low + share * (high - low) for name, (low, high) in ranges.items()}
  integer = {name for name, (low, _) in ranges.items() if isinstance(low, int)}
  return {name: np.int32(round(v)) if name in integer else np.float64(v) for name, v in values.items()}


def draw_logits(rng):
  return 2 * rng.normal(size=(EXAMPLES, CLASSES))


def draw_classification(rng):
  return draw_logits(rng), rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)


def draw_probabilities(rng):
  return rng.dirichlet(np.ones(CLASSES), EXAMPLES)


def draw_ids(rng):
  return rng.permutation(TABLE)[:EXAMPLES].astype(np.int32)


def draw_layer(rng):
  return ({"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},)


def extremes(leaf):
  """Large, small and zero entries; the first group of every kind is zero."""
  extreme = EXTREME * np.resize([1.0, -1.0, 0.0, 1e-4, -1.0], np.shape(leaf))
  return extreme * (np.arange(extreme.shape[-1]) > 0) if extreme.ndim else extreme


def extreme_logits(logits, *rest):
  """All equal, one class far above, far below, ties, and mixtures; the labels are among all of them."""
  patterns = [
    [0.0] * 5,
    [1.0] * 5,
    [-1.0] * 5,
    [1, -1, -1, -1, -1],
    [-1, 1, 1, 1, 1],
    [1, 1, 0, 0, -1],
    [1e-4, -1, 0, 1, 1],
  ]
  shifted = [np.roll(pattern, shift) for shift in range(3) for pattern in patterns]
  return EXTREME * np.resize(shifted, np.shape(logits)), *rest


BAD_LOGITS = (("logits|differences", lambda z: (np.ones(z.shape, np.int32),)),)
BAD_LABELS = (
  ("labels", lambda z, y, *rest: (z, y[1:], *rest)),
  ("labels", lambda z, y, *rest: (z, y[:1], *rest)),
  ("labels", lambda z, y, *rest: (z, y[:, None], *rest)),
  ("labels", lambda z, y, *rest: (z, y[0], *rest)),
  ("labels", lambda z, y, *rest: (z, y.astype(np.float32), *rest)),
  ("logits", lambda z, y, *rest: (z.astype(np.int32), y, *rest)),
)
BAD_SAME_SHAPE = (
  ("shapes", lambda x, y, *rest: (x, y[1:], *rest)),
  ("shapes", lambda x, y, *rest: (x, y[:1], *rest)),
)
BAD_VALUES = (
  ("values", lambda values: (jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int32), values),)),
  ("groups", lambda values: (jax.tree.map(lambda leaf: leaf[None], values),)),
  ("groups", lambda values: (jax.tree.map(lambda leaf: leaf[..., 1:], values),)),
)
LAYER_GROUPS = groups.group_ids({"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}, kind="neuron")


def unchanged(*arguments):
  """For arguments with a bounded domain, which have no extremes."""
  return arguments


def straight_through_surrogate(x, results, **_):
  """The value, moving as the argument does from where it was, which the call returns beside it."""
  return results[0] + x - results[1]


def draw_binary(rng):
  return 2 * rng.normal(size=EXAMPLES), rng.integers(0, 2, EXAMPLES).astype(np.int32)


def elementwise_row(function, name, *, extreme, **options):
  """`function(values, **options)` of values in (0, 1), with the argument's name and the ends of its domain."""
  return row(
    function,
    lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES),),
    extreme=lambda values: (np.resize(extreme, values.shape),),
    bad=((name, lambda values: (np.ones(values.shape, np.int32),)),),
    examples="any",
    options=options,
  )


def taught_loss_row(function, **options):
  """`function(logits, teacher_logits, labels, **options)` with a teacher that prefers the later classes."""

  def call(logits, labels, *, axis=-1, **keywords):
    if not hasattr(logits, "dtype"):  # the text that is to be refused
      return function(logits, logits, labels)
    teacher = jax.lax.broadcasted_iota(logits.dtype, logits.shape, axis % logits.ndim)
    return function(logits, teacher, labels, axis=axis, **keywords)

  return row(
    function, draw_classification, call=call, extreme=extreme_logits, bad=BAD_LABELS, examples="any", options=options
  )


def conv_row(function, **options):
  """`function(kernel, **options)` of a convolution's kernel."""
  keywords = {name: options.pop(name) for name in tuple(options) if name in ("differentiable", "wide")}
  kernel = lambda rng: (rng.normal(size=(3, 3, 2, 4)),)
  return row(function, kernel, bad=BAD_CONV, options=options, **keywords)


BAD_CONV = (
  ("kernel", lambda kernel: (kernel.astype(np.int32),)),
  ("kernel", lambda kernel: (kernel[:2],)),
  ("kernel", lambda kernel: (kernel[:2, :2],)),
  ("kernel", lambda kernel: (kernel[0, 0],)),
)


def sparse_row(function, named, **options):
  """`function(values, k, **options)` along the last axis."""
  bad = ((named, lambda x: (x.astype(np.int32),)),)
  options = dict(k=2, **options)
  return row(
    function, lambda rng: (draw_logits(rng),), extreme=extreme_logits, bad=bad, examples="any", options=options
  )


OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam, "adamw": optax.adamw, "lion": optax.lion}


class Table(NamedTuple):
  """Everything that the test files of the rooms hold."""

  rows: list[Row]
  transforms: list[Transform]
  exempt: dict[str, str]  # dotted names below jaxreg, and reasons


@functools.cache
def collect() -> Table:
  """The table, from all test files of the rooms."""
  table = Table([], [], {})
  for room in ROOMS:
    for path in sorted((pathlib.Path(__file__).parent / room).glob("test_*.py")):
      # Under the name that pytest gives it, so that it is not imported twice.
      module = importlib.import_module(f"tests.{room}.{path.stem}")
      below = f"{room}.{path.stem.removeprefix('test_')}"
      rows, transforms = getattr(module, "ROWS", []), getattr(module, "TRANSFORMS", [])
      for entry in (*rows, *transforms):
        assert entry.name.rpartition(".")[0] == below, f"{entry.name} belongs into its own test file, not {path}"
      table.rows.extend(rows)
      table.transforms.extend(transforms)
      table.exempt.update({f"{below}.{name}": reason for name, reason in getattr(module, "EXEMPT", {}).items()})
  return table
