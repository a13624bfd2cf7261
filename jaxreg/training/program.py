"""Programs: `run_chunk` compiled for `fit` on a mesh, and for `sweep` by two engines.

Traced programs are kept per task, so that a second run of the same task compiles nothing.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreg.training import hparams as hparams_lib
from jaxreg.training.loop import run_chunk
from jaxreg.training.task import Task, TrainState

__all__ = [
  "abstract_state",
  "compile_side_by_side",
  "compiled",
  "compiled_chunk",
  "compiled_evaluate",
  "initial_state",
  "lowered_engine",
  "lowered_init",
]


def measure(task: Task, state: TrainState, hparams: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The task's metrics on held-out arrays, checked."""
  metrics = {} if task.evaluate is None else task.evaluate(state, hparams)
  check_metrics(metrics, "evaluate")
  return metrics


def check_metrics(metrics, source: str) -> None:
  """Raises ValueError at trace time for a metric that is no scalar or has a name that rows of metrics use."""
  for name, value in metrics.items():
    if jnp.shape(value) != ():
      raise ValueError(f"the metric {name} of {source} must be a scalar, got shape {jnp.shape(value)}.")
    if name in ("step", "seed", "diverged_at"):
      raise ValueError(f"a metric of {source} must not be called {name}: rows of metrics use the name.")


# `fit`


def initial_state(task: Task, seed: int, hparams: Mapping[str, Any], mesh: Mesh) -> TrainState:
  """The state before the first step, laid out on the mesh."""
  kinds = tuple(sorted((name, str(np.asarray(value).dtype)) for name, value in hparams.items()))
  return _compiled_init(task, mesh, kinds)(np.uint32(seed), dict(hparams))


def abstract_state(task: Task, mesh: Mesh, hparams: Mapping[str, Any] | None = None) -> TrainState:
  """Shapes and shardings of the state, without computing anything."""
  hparams = hparams_lib.merge(task) if hparams is None else hparams
  shapes = jax.eval_shape(lambda hparams: task.init(jax.random.key(0), hparams), dict(hparams))
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(place, shapes, _state_sharding(task, mesh, shapes))


@functools.lru_cache(maxsize=32)
def _compiled_init(task: Task, mesh: Mesh, kinds: tuple):
  hparams = {name: jax.ShapeDtypeStruct((), np.dtype(dtype)) for name, dtype in kinds}
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, mesh, hparams))
  return jax.jit(lambda seed, hparams: task.init(jax.random.key(seed), hparams), out_shardings=shardings)


@functools.lru_cache(maxsize=32)
def compiled_chunk(task: Task, mesh: Mesh, steps: int):
  """The jitted chunk of at most `steps` steps on the mesh; also says whether loss and parameters stayed finite.

  It reads the number of steps, as a sweep's program does: a constant would be rounded into the metrics differently.
  """
  constrain = None
  if mesh.size > 1:
    batch = NamedSharding(mesh, PartitionSpec("data"))
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: batch, tree))

  def chunk(state, data, hparams, count):
    state, metrics, finite = run_chunk(task, state, data, hparams, steps, count=count, constrain=constrain)
    check_metrics(metrics, "step")
    if mesh.size > 1:
      state = jax.lax.with_sharding_constraint(state, _state_sharding(task, mesh, state))
    leaves = [x for x in jax.tree.leaves(state.params) if jnp.issubdtype(x.dtype, jnp.inexact)]
    good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.array(True)
    return state, metrics, {"loss": finite, "params": good}

  return jax.jit(chunk, donate_argnums=0)


@functools.lru_cache(maxsize=32)
def compiled_evaluate(task: Task):
  """The jitted evaluation of a task on what it holds as arrays."""
  return jax.jit(functools.partial(measure, task))


@functools.lru_cache(maxsize=32)
def compiled_held_out(task: Task):
  """The jitted measurement of one batch of held-out data."""

  def measure(state, batch, hparams):
    means = task.held_out.measure(state, batch, hparams)
    check_metrics({name: mean.total for name, mean in means.items()}, "held_out")
    return means

  return jax.jit(measure)


def _state_sharding(task: Task, mesh: Mesh, state: TrainState):
  spec = task.param_spec or (lambda path, leaf: PartitionSpec())
  return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), state)


# `sweep`


def _whole_bytes(state):
  """The state with int4 and int2 leaves as int8: JAX's layouts of the former differ between two compiled programs."""

  def widened(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.integer) or jnp.iinfo(leaf.dtype).bits >= 8:
      return leaf
    return leaf.astype(jnp.int8 if jnp.issubdtype(leaf.dtype, jnp.signedinteger) else jnp.uint8)

  return jax.tree.map(widened, state)


def _as_the_task_has_it(task: Task, state, hparams):
  """The inverse of `_whole_bytes`."""
  if not any(leaf.dtype in (jnp.int8, jnp.uint8) for leaf in jax.tree.leaves(state)):
    return state
  like = jax.eval_shape(task.init, jax.random.key(0), hparams)
  return jax.tree.map(lambda leaf, own: leaf if leaf.dtype == own.dtype else leaf.astype(own.dtype), state, like)


def _advance(task: Task, steps: int):
  """`(state, hparams, data, count) -> (state, metrics, diverged_at)` of one trial."""

  def advance(state, hparams, data, count):
    state = _as_the_task_has_it(task, state, hparams)
    start = state.step
    state, metrics, finite = run_chunk(task, state, data, hparams, steps, count=count)
    check_metrics(metrics, "step")
    measured = {**metrics, **measure(task, state, hparams)}
    return _whole_bytes(state), measured, jnp.where(finite < count, start + finite + 1, -1)

  return advance


def _together(task: Task, steps: int):
  """All trials side by side."""

  def together(state, hparams, data, count, trials):
    del trials  # it costs the same to run fewer
    return jax.vmap(_advance(task, steps), in_axes=(0, 0, None, None))(state, hparams, data, count)

  return together


def _in_turn(task: Task, steps: int, mesh: Mesh, lanes: int):
  """On each device the first `trials` of its trials in turn; without shard_map every device would run every trial."""
  advance = _advance(task, steps)

  def in_turn(state, hparams, data, count, trials):
    if lanes > 1:
      return jax.lax.map(lambda pair: advance(*pair, data, count), (state, hparams), batch_size=lanes)
    at = lambda tree, index: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)
    one = lambda state, index: advance(at(state, index), at(hparams, index), data, count)
    shapes = jax.eval_shape(lambda: one(state, 0)[1:])
    size = jax.tree.leaves(state)[0].shape[0]
    measured = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), shapes)

    def body(index, carry):
      state, measured = carry
      new, *rest = one(state, index)
      put = lambda all, x: jax.lax.dynamic_update_index_in_dim(all, x, index, 0)
      return jax.tree.map(put, state, new), jax.tree.map(put, measured, tuple(rest))

    state, (metrics, diverged_at) = jax.lax.fori_loop(0, trials, body, (state, measured))
    return state, metrics, diverged_at

  trial, everywhere = PartitionSpec("trial"), PartitionSpec()
  specs = (trial, trial, everywhere, everywhere, everywhere)
  return jax.shard_map(in_turn, mesh=mesh, in_specs=specs, out_specs=trial, check_vma=False)


@functools.lru_cache(maxsize=32)
def lowered_init(task: Task, mesh: Mesh, size: int, kinds: tuple):
  """The initial states of `size` trials, one after another for either engine."""
  trial = PartitionSpec("trial")

  def init(seeds, hparams):
    return jax.lax.map(lambda pair: _whole_bytes(task.init(jax.random.key(pair[0]), pair[1])), (seeds, hparams))

  sharding = NamedSharding(mesh, trial)
  mapped = jax.shard_map(init, mesh=mesh, in_specs=(trial, trial), out_specs=trial, check_vma=False)
  seeds = jax.ShapeDtypeStruct((size,), jnp.uint32, sharding=sharding)
  return jax.jit(mapped, out_shardings=sharding).lower(seeds, _trial_hparams(kinds, sharding, size))


@functools.lru_cache(maxsize=32)
def lowered_engine(task: Task, mesh: Mesh, size: int, kinds: tuple, engine: str, lanes: int, steps: int):
  """An engine's program for `size` trials and at most `steps` steps.

  It is `(state, hparams, data, count, trials) -> (state, metrics, diverged_at)`, where `count` steps are taken by
  `trials` trials of each device (all of them, when they run together).
  """
  trial, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("trial",), ()))
  like = lambda sharding: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(like(trial), lowered_init(task, mesh, size, kinds).out_info)
  data = jax.tree.map(like(everywhere), jax.eval_shape(lambda: jax.tree.map(jnp.asarray, dict(task.data))))
  count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  function = _together(task, steps) if engine == "vmap" else _in_turn(task, steps, mesh, lanes)
  program = jax.jit(function, out_shardings=trial, donate_argnums=0)
  return program.lower(state, _trial_hparams(kinds, trial, size), data, count, count)


def _trial_hparams(kinds: tuple, sharding, size: int):
  return {name: jax.ShapeDtypeStruct((size,), np.dtype(dtype), sharding=sharding) for name, dtype in kinds}


@functools.lru_cache(maxsize=64)
def compiled(lowered: Callable, *arguments):
  """A program ahead of time, so that its memory is known before it runs; cached for a second sweep."""
  return lowered(*arguments).compile()


def compile_side_by_side(*programs) -> None:
  """Compiles what `compiled` will be asked for in as many threads; tracing stays in this one."""
  for lowered, *arguments in programs:
    lowered(*arguments)
  with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
    list(pool.map(lambda program: compiled(*program), programs))


def needed_bytes(program) -> int:
  """Bytes that a compiled program needs on each device: arguments, results (donated ones count once), temporaries."""
  memory = program.memory_analysis()
  total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
  return total - memory.alias_size_in_bytes


@functools.lru_cache(maxsize=32)
def step_cost(task: Task, batch: tuple) -> tuple[float, bool]:
  """Floating-point operations of one step before optimization, and whether there are convolutions; compiles nothing."""
  from jaxreg.training import identity

  key, hparams = jax.eval_shape(lambda: jax.random.key(0)), hparams_lib.merge(task)
  state = jax.eval_shape(task.init, key, hparams)
  traced = jax.jit(task.step).trace(state, identity.as_structs(batch), hparams)
  cost = traced.lower().cost_analysis() or {}
  return float(cost.get("flops", 0.0)), "conv_general_dilated" in str(traced.jaxpr)
