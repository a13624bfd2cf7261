"""The commands that train: `run`, `sweep`, `verify`, `report`, `bench`, `demo`."""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
import traceback
import types
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from experiments.harness import identity, options, records, registry, tables
from experiments.harness.trials import Cell, Interrupted


def run(arguments: list[str]) -> int:
  """Trains one recipe once."""
  asked = _parse("run", arguments, options.RunOptions)
  flags = asked.flags
  _start(flags.distributed)
  from jaxreg.training import fit

  cell = _cell(asked)
  task = cell.task.replace(accumulate=flags.accumulate, precision=flags.precision, remat=flags.remat)
  hparams = {name: value for name, (value,) in options.assignments(flags.set, task.hparams).items()}
  steps = cell.steps if flags.steps is None else flags.steps
  settings = hparams, flags.seed, flags.precision, flags.accumulate, flags.remat
  folder = flags.folder or _default_folder("", asked, *settings)
  result = fit(
    task,
    steps=steps,
    seed=flags.seed,
    hparams=hparams,
    folder=folder,
    log_every=cell.log_every or cell.eval_every or cell.steps,
    eval_every=cell.eval_every,
    checkpoint_every=flags.checkpoint_every,
    profile_steps=flags.profile_steps,
  )
  if jax.process_index() == 0:
    for name, value in (result.rows[-1] if result.rows else {}).items():
      print(f"{name:32} {value:.5g}")
    print(f"metrics and checkpoints: {folder}")
  if result.interrupted:
    raise Interrupted(result, steps)
  return 0


def sweep(arguments: list[str]) -> int:
  """Trains a recipe's grid with several seeds."""
  asked = _parse("sweep", arguments, options.SweepOptions)
  flags = asked.flags
  _start(flags.distributed)
  from jaxreg import training

  cell = _cell(asked)
  if callable(cell.task.data):
    raise ValueError(
      f"sweep cannot run preset {asked.preset} of {asked.name}: its data are a stream, which one run at a time reads;"
      " use run."
    )
  steps = cell.steps if flags.steps is None else flags.steps
  given = options.assignments(flags.set, cell.task.hparams) | options.assignments(
    flags.grid, cell.task.hparams, "--grid"
  )
  points = options.grid_points(cell.points, given)
  folder = flags.folder or _default_folder("sweep-", asked, points, steps, flags.first_seed)
  result = training.sweep(
    cell.task,
    points,
    seeds=range(flags.first_seed, flags.first_seed + flags.seeds),
    steps=steps,
    eval_every=cell.eval_every if cell.eval_every and steps % cell.eval_every == 0 else steps,
    engine=flags.engine,
    memory_budget=None if flags.memory_gib is None else int(flags.memory_gib * 2**30),
    folder=folder,
    label=asked.name,
  )
  if jax.process_index() == 0:
    path = folder / "trials.jsonl"
    rows = [json.dumps(records.strict(row), allow_nan=False) + "\n" for row in result.rows()]
    path.write_text("".join(rows), encoding="utf-8")
    print_points(result, flags.seeds)
    print(f"{len(result.seeds)} trials in {result.seconds:.1f} s with engine {result.engine}\nrows: {path}")
  return 0


def print_points(result, seeds: int) -> None:
  """One line per hyperparameter point: mean ± standard error over seeds of the last metrics."""
  varied = [name for name, value in result.hparams.items() if len(set(value.tolist())) > 1]
  rows = []
  for first in range(0, len(result.seeds), seeds):
    trials = slice(first, first + seeds)
    row = {name: result.hparams[name][first].item() for name in varied}
    for name, values in result.metrics.items():
      last = values[trials, -1]
      error = f" ± {last.std(ddof=1) / np.sqrt(seeds):.2g}" if seeds > 1 else ""
      row[name] = f"{last.mean():.4g}{error}"
    rows.append(row | {"diverged": int((result.diverged_at[trials] >= 0).sum())})
  tables.show(rows, keys=varied)


def verify(arguments: list[str]) -> int:
  """Measures recipes and judges their claims."""
  names, rest = _leading(arguments)
  flags = tyro.cli(options.VerifyOptions, args=rest, prog="python -m experiments verify [NAME …]")
  flags.check()
  known = registry.entries()
  names = names or [name for name, entry in known.items() if entry.claims and flags.preset in entry.presets]
  recipes = {name: registry.recipe(name) for name in names}
  for name, recipe in recipes.items():
    if not hasattr(recipe, "claims"):
      raise ValueError(f"{name} states no claims.")
    if flags.commit and name not in known:
      raise ValueError(f"{name} is no recipe of this repository; only those have committed records.")
    registry.preset(recipe, flags.preset)
  _start(options.Distributed())
  failed = [name for name, recipe in recipes.items() if not _verify_one(name, recipe, flags)]
  if flags.commit:
    _report()
  if failed:
    print(f"failed: {', '.join(failed)}", file=sys.stderr)
  return 1 if failed else 0


def _verify_one(name: str, recipe, flags: options.VerifyOptions) -> bool:
  """Verifies one recipe; says in a sentence what went wrong, so that the next one can go on."""
  from experiments.harness import verification

  folder = flags.folder / name / flags.preset
  seeds = list(range(flags.first_seed, flags.first_seed + flags.seeds))
  print(f"{name} {flags.preset}, seeds {seeds[0]} to {seeds[-1]}", flush=True)
  try:
    config = registry.preset(recipe, flags.preset)
    print_record(verification.verify(recipe, name, flags.preset, config, seeds, folder))
    if flags.commit:
      verification.publish(folder, folder := records.RESULTS / name / flags.preset)
  except Interrupted:
    raise
  except Exception as error:
    print(f"error: {name}: {_sentence(error)}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    return False
  print(f"table, record and figure: {folder}")
  return True


def print_record(record: dict) -> None:
  """A record's claims and verdicts."""
  rows = []
  for claim in record["claims"]:
    low, high = claim["interval"]
    numbers = f"{claim['mean']:.4g} [{low:.4g}, {high:.4g}] {claim['condition']}"
    rows.append({"verdict": claim["verdict"], "claim": f"{claim['sentence']}: {numbers}"})
  tables.show(rows, keys=("verdict",), title=f"{record['recipe']} {record['preset']}: mean [95 % interval], condition")


def report(arguments: list[str]) -> int:
  """Judges the committed tables again and rebuilds the ledger."""
  del arguments
  return _report()


def _report() -> int:
  from experiments.harness import report as reports

  began = time.perf_counter()
  problems = reports.report()
  for problem in problems:
    print(f"error: {problem}", file=sys.stderr)
  print(f"ledger: {reports.LEDGER} in {time.perf_counter() - began:.1f} s")
  return 1 if problems else 0


def demo(arguments: list[str]) -> int:
  """The noisy-label ablation."""
  from experiments.studies import noisy_labels

  flags = tyro.cli(noisy_labels.DemoOptions, args=arguments, prog="python -m experiments demo")
  _start(options.Distributed())
  noisy_labels.demo(flags)
  return 0


def bench(arguments: list[str]) -> int:
  """The benchmarks."""
  from experiments import benchmarks

  names, rest = _leading(arguments)
  listed = "\n".join(f"{name}: {text}" for name, text in benchmarks.BENCHMARKS.items())
  flags = tyro.cli(
    benchmarks.Options, args=rest, prog="python -m experiments bench [NAME …]",
    description=f"How to benchmark. The benchmarks:\n\n{listed}",
  )  # fmt: skip
  for name in names:
    if name not in benchmarks.BENCHMARKS:
      raise registry.UnknownName("benchmark", name, list(benchmarks.BENCHMARKS))
  _use_all_cores()  # programs are not kept: benchmarks measure compiling
  benchmarks.run(names or list(benchmarks.BENCHMARKS), flags)
  return 0


def _parse(command: str, arguments: list[str], options_type) -> "_Asked":
  """Reads `NAME [PRESET] --flags`; the recipe's own configuration appears as flags under `config`."""
  words, rest = _leading(arguments)
  helps = bool({"-h", "--help"} & set(rest))
  if not words or len(words) > 2:
    if helps:
      print(
        f"usage: python -m experiments {command} NAME [PRESET] [flags]\n\nNAME is a module path, or one of"
        f" {', '.join(registry.entries())}.\n\nWith a NAME, --help lists the flags."
      )
      sys.exit(0)
    raise ValueError(f"{command} needs a recipe's name and perhaps a preset, got {' '.join(words) or 'nothing'}.")
  name, preset = words[0], words[1] if len(words) == 2 else "cpu"
  module = registry.recipe(name)
  default, default_flags = registry.preset(module, preset), options_type()

  def both(
    config: Annotated[type(default), tyro.conf.arg(name="config")] = default,
    flags: Annotated[options_type, tyro.conf.arg(name="")] = default_flags,
  ):
    return config, flags

  rest = options.gathered(rest)
  about = (module.__doc__ or "").strip()
  if helps:
    about += f"\n\n{options.hparam_help(module.cell(default).task.hparams)}"
  config, flags = tyro.cli(
    both, args=rest, prog=f"python -m experiments {command} {' '.join(words)}", description=about
  )
  flags.check()
  return _Asked(name, preset, module, config, flags)


class _Asked(NamedTuple):
  """What a command line asks for."""

  name: str
  preset: str
  module: types.ModuleType
  config: Any
  flags: Any


def _cell(asked: _Asked) -> Cell:
  if getattr(asked.flags, "precision", None) == "float64":
    jax.config.update("jax_enable_x64", True)
  return asked.module.cell(asked.config)


def _default_folder(kind: str, asked: _Asked, *settings) -> pathlib.Path:
  """A folder that contains what distinguishes runs, so that the same command finds its own again."""
  what = identity.short_hash(dataclasses.asdict(asked.config), *settings)
  return pathlib.Path("runs") / f"{kind}{asked.name}-{asked.preset}-{what}"


def _leading(arguments: list[str]) -> tuple[list[str], list[str]]:
  """The words before the first flag, and the rest."""
  count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
  return arguments[:count], arguments[count:]


def _start(distributed: options.Distributed) -> None:
  """What must come before JAX's backend starts: devices, the compilation cache, the other hosts."""
  _use_all_cores()
  _keep_programs()
  if distributed.auto or distributed.coordinator:
    jax.distributed.initialize(
      distributed.coordinator,
      distributed.processes,
      distributed.process,
      heartbeat_timeout_seconds=distributed.heartbeat_timeout,
    )


def _use_all_cores() -> None:
  """One virtual device per core that this process may use, where the CPU is the device."""
  if "JAX_NUM_CPU_DEVICES" not in os.environ and "xla_force_host_platform" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", records.cores())


def _keep_programs() -> None:
  """Compiled programs are kept on disk, in `$JAX_COMPILATION_CACHE_DIR` or `~/.cache/jaxreg/xla`, for the next run."""
  if "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  folder = pathlib.Path("~/.cache/jaxreg/xla").expanduser()
  with contextlib.suppress(OSError):  # where nothing can be kept, programs are compiled again
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _sentence(error: Exception) -> str:
  text = " ".join(str(error).split())
  return text if isinstance(error, ValueError | FileNotFoundError) and text else f"{type(error).__name__}: {text}"
