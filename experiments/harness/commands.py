"""The commands that train: `run`, `sweep`, `verify`, `report`, `bench`, `demo`."""

import dataclasses
import json
import os
import pathlib
import sys
import time
import types
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.harness import claims, records, registry


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Several processes, one a host; on a TPU pod or under Slurm the addresses are found by JAX itself.

  Attributes:
    auto: initialise from what the cluster says of itself.
    coordinator: `host:port` of process 0, when the cluster says nothing.
    processes: number of processes.
    process: this process's number.
    heartbeat_timeout: seconds after which the others end when one has died.
  """

  auto: bool = False
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  heartbeat_timeout: int = 100


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """How to train.

  Attributes:
    folder: where checkpoints and metrics go; `runs/NAME` by default. Running again resumes.
    seed: the run's seed.
    steps: overrides the recipe's number of steps.
    checkpoint_every: steps between checkpoints, a multiple of the recipe's logging interval.
    accumulate: micro-batches per step.
    precision: dtype of the computation: float32, bfloat16, float16 or float64.
    remat: recompute activations in the backward pass.
    profile_steps: steps to run under the profiler first.
    set: hyperparameters, as NAME=VALUE.
    distributed: several hosts.
  """

  folder: pathlib.Path | None = None
  seed: int = 0
  steps: int | None = None
  checkpoint_every: int | None = None
  accumulate: int = 1
  precision: str = "float32"
  remat: bool = False
  profile_steps: int = 0
  set: tuple[str, ...] = ()
  distributed: Distributed = Distributed()


@dataclasses.dataclass(frozen=True)
class SweepOptions:
  """How to sweep.

  Attributes:
    folder: where finished chunks and the table go; `runs/sweep-NAME` by default. Running again resumes.
    seeds: number of seeds, starting at `first_seed`.
    first_seed: the first seed.
    engine: auto, vmap or map.
    memory_gib: memory per device that a chunk of trials may use.
    distributed: several hosts.
  """

  folder: pathlib.Path | None = None
  seeds: int = 5
  first_seed: int = 0
  engine: str = "auto"
  memory_gib: float | None = None
  distributed: Distributed = Distributed()


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
  """How to verify.

  Attributes:
    preset: which preset; only `cpu` and `paper` write to the ledger's records.
    seeds: number of seeds, at least two.
    first_seed: the first seed; those below 100 set the conditions and cannot check them.
  """

  preset: str = "cpu"
  seeds: int = 5
  first_seed: int = 100

  def __post_init__(self):
    if self.seeds < 2:
      raise ValueError(f"seeds must be at least 2, got {self.seeds}.")
    if self.first_seed < 100:
      raise ValueError(f"first_seed must be at least 100, got {self.first_seed}.")


def run(arguments: list[str]) -> int:
  """Trains one recipe once."""
  name, module, config, options = _parse("run", arguments, RunOptions)
  _start(options.distributed)
  from jaxreg.training import fit

  task = module.build(config).replace(accumulate=options.accumulate, precision=options.precision, remat=options.remat)
  arguments = module.run_options(config)
  if options.steps:
    arguments |= {"steps": options.steps}
  folder = options.folder or pathlib.Path("runs") / name
  result = fit(
    task,
    seed=options.seed,
    hparams=_hparams(options.set),
    folder=folder,
    checkpoint_every=options.checkpoint_every,
    profile_steps=options.profile_steps,
    **arguments,
  )
  if jax.process_index() == 0:
    last = result.rows[-1] if result.rows else {}
    print("  ".join(f"{key} {value:.5g}" for key, value in last.items()))
    print(f"metrics and checkpoints: {folder}" + ("; interrupted, run again to resume" if result.interrupted else ""))
  return 0


def sweep(arguments: list[str]) -> int:
  """Trains a recipe's grid with several seeds."""
  name, module, config, options = _parse("sweep", arguments, SweepOptions)
  _start(options.distributed)
  from jaxreg import training

  folder = options.folder or pathlib.Path("runs") / f"sweep-{name}"
  result = training.sweep(
    module.build(config),
    module.points(config),
    seeds=range(options.first_seed, options.first_seed + options.seeds),
    engine=options.engine,
    memory_budget=None if options.memory_gib is None else int(options.memory_gib * 2**30),
    folder=folder,
    label=name,
    **{key: value for key, value in module.run_options(config).items() if key in ("steps", "eval_every")},
  )
  if jax.process_index() == 0:
    path = folder / "trials.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in result.rows()), encoding="utf-8")
    print_points(result, options.seeds)
    print(f"{len(result.seeds)} trials in {result.seconds:.1f} s with engine {result.engine}; rows: {path}")
  return 0


def print_points(result, seeds: int) -> None:
  """One line per hyperparameter point: mean ± standard error over seeds of the last metrics."""
  varied = [name for name, value in result.hparams.items() if len(set(value.tolist())) > 1]
  table = Table(*varied, *result.metrics, "diverged")
  for first in range(0, len(result.seeds), seeds):
    trials = slice(first, first + seeds)
    cells = []
    for value in result.metrics.values():
      last = value[trials, -1]
      error = last.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else float("nan")
      cells.append(f"{last.mean():.4g} ± {error:.2g}")
    diverged = int((result.diverged_at[trials] >= 0).sum())
    table.add_row(*[f"{result.hparams[name][first]:.4g}" for name in varied], *cells, str(diverged))
  Console().print(table)


def verify(arguments: list[str]) -> int:
  """Measures recipes and judges their claims."""
  names, flags = _leading(arguments)
  options = tyro.cli(VerifyOptions, args=flags, prog="python -m experiments verify [NAME …]")
  names = names or [entry.name for entry in registry.entries().values() if entry.card]
  modules = {name: registry.recipe(name) for name in names}
  configs = {name: registry.preset(module, options.preset) for name, module in modules.items()}
  for name, module in modules.items():
    if not hasattr(module, "CLAIMS"):
      raise ValueError(f"{name} states no claims.")
  _start(Distributed())
  for name, module in modules.items():
    record = check(module, name, configs[name], options)
    print_record(record)
  if options.preset != "smoke":
    records.report()
    print(f"ledger: {records.LEDGER}")
  return 0


def check(module: types.ModuleType, name: str, config, options: VerifyOptions) -> dict:
  """Runs one recipe's measurement, judges its claims, writes record and figure; returns the record."""
  seeds = list(range(options.first_seed, options.first_seed + options.seeds))
  began = time.perf_counter()
  measurements = module.measure(config, seeds)
  seconds = time.perf_counter() - began
  judged = []
  for claim in module.CLAIMS:
    result = claims.judge(claim, measurements)
    judged.append(
      {
        "name": claim.name,
        "sentence": claim.sentence,
        "measured": claim.measured,
        "condition": claim.condition,
        "values": result.values,
        "mean": result.mean,
        "interval": [result.low, result.high],
        "verdict": result.verdict,
      }
    )
  record = {
    "recipe": name,
    "card": module.CARD,
    "preset": options.preset,
    "config": dataclasses.asdict(config),
    "seeds": seeds,
    "claims": judged,
    "notes": list(getattr(module, "NOTES", ())),
    "wall_seconds": seconds,
    **records.environment(),
  }
  if hasattr(module, "table"):
    record["table"] = module.table(measurements)
  root = records.RESULTS if options.preset != "smoke" else pathlib.Path("runs") / "verify-smoke"
  folder = root / name / options.preset
  records.write(folder / "record.json", record)
  module.figure(measurements, folder / "figure.png")
  print(f"record and figure: {folder}/record.json, figure.png")
  return record


def print_record(record: dict) -> None:
  """A table of a record's verdicts."""
  table = Table("claim", "condition", "mean", "95 % interval", "verdict", title=record["recipe"])
  for claim in record["claims"]:
    low, high = claim["interval"]
    table.add_row(
      claim["sentence"], claim["condition"], f"{claim['mean']:.4g}", f"[{low:.4g}, {high:.4g}]", claim["verdict"]
    )
  Console().print(table)


def report(arguments: list[str]) -> int:
  """Rebuilds the ledger."""
  if arguments:
    raise ValueError(f"report takes no arguments, got {' '.join(arguments)}.")
  records.report()
  print(f"ledger: {records.LEDGER}")
  return 0


def demo(arguments: list[str]) -> int:
  """The noisy-label ablation."""
  from experiments.studies import noisy_labels

  options = tyro.cli(noisy_labels.DemoOptions, args=arguments, prog="python -m experiments demo")
  _start(Distributed())
  noisy_labels.demo(options)
  return 0


def bench(arguments: list[str]) -> int:
  """The benchmarks."""
  from experiments import benchmarks

  names, flags = _leading(arguments)
  options = tyro.cli(benchmarks.Options, args=flags, prog="python -m experiments bench [NAME …]")
  for name in names:
    if name not in benchmarks.BENCHMARKS:
      raise registry.UnknownName("benchmark", name, list(benchmarks.BENCHMARKS))
  _start(Distributed())
  benchmarks.run(names or list(benchmarks.BENCHMARKS), options)
  return 0


def _parse(command: str, arguments: list[str], options_type):
  """Reads `NAME [PRESET] --flags`; the recipe's own configuration appears as flags under `config`."""
  words, flags = _leading(arguments)
  if not words or len(words) > 2:
    if set(flags) & {"-h", "--help"}:
      print(
        f"usage: python -m experiments {command} NAME [PRESET] [flags]; NAME is one of "
        f"{', '.join(registry.entries())}.\nWith a NAME, --help lists the flags."
      )
      sys.exit(0)
    raise ValueError(f"{command} needs a recipe's name and perhaps a preset, got {' '.join(words) or 'nothing'}.")
  module = registry.recipe(words[0])
  config, options = registry.preset(module, words[1] if len(words) == 2 else "cpu"), options_type()

  def both(
    config: Annotated[type(config), tyro.conf.arg(name="config")] = config,
    options: Annotated[options_type, tyro.conf.arg(name="")] = options,
  ):
    return config, options

  config, options = tyro.cli(
    both, args=flags, prog=f"python -m experiments {command} {' '.join(words)}", description=module.__doc__
  )
  return words[0], module, config, options


def _leading(arguments: list[str]) -> tuple[list[str], list[str]]:
  """The words before the first flag, and the rest."""
  count = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
  return arguments[:count], arguments[count:]


def _hparams(assignments: tuple[str, ...]) -> dict[str, float]:
  values = {}
  for text in assignments:
    name, sign, value = text.partition("=")
    try:
      values[name] = float(value)
    except ValueError:
      raise ValueError(f"--set takes NAME=NUMBER, got {text!r}.") from None
    if not sign:
      raise ValueError(f"--set takes NAME=NUMBER, got {text!r}.")
  return values


def _start(distributed: Distributed) -> None:
  """Connects the hosts; on a CPU makes one virtual device per core, which must come before JAX's backend starts."""
  if "JAX_NUM_CPU_DEVICES" not in os.environ and "xla_force_host_platform" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
  if distributed.auto or distributed.coordinator:
    jax.distributed.initialize(
      distributed.coordinator,
      distributed.processes,
      distributed.process,
      heartbeat_timeout_seconds=distributed.heartbeat_timeout,
    )
