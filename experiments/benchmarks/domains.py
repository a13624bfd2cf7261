"""A step of every method of domain generalization against one of ERM."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from experiments.problems.domain_methods import METHODS, SOURCES, DomainProblem, domain_task

TITLE = "Steps of methods of domain generalization against ERM's, and their operations"
SIZES = ((64, 64), (512, 256))


def measure(options: Options):
  """Rows: one per method, with its step's time and operations relative to ERM's in networks of two sizes."""
  rows = {method: {"method": method} for method in METHODS}
  for features, batch in SIZES[:1] if options.quick else SIZES:
    problem = DomainProblem(name="rotated", features=features, batch_size=batch)
    steps = {method: _step(dataclasses.replace(problem, method=method)) for method in METHODS}
    seconds = interleaved(steps, repeats=2 if options.quick else max(options.repeats, 40))
    operations = {method: _operations(step) for method, step in steps.items()}
    for method, row in rows.items():
      count = SOURCES if method == "Fish" else 1
      at = f"{features} features, batch {SOURCES} × {batch}"
      row[f"ms, {at}"] = 1e3 * count * seconds[method]
      row[f"/ ERM, {at}"] = count * seconds[method] / seconds["ERM"]
      row[f"operations / ERM, {at}"] = count * operations[method] / operations["ERM"]
  notes = [
    f"Rotated digits of 14 × 14 pixels, {SOURCES} source domains, a perceptron with one hidden layer, Adam. Of Fish"
    f" {SOURCES} steps, which see as many images. Each time is the fastest of several that take turns. Operations are"
    " those that XLA counts in the compiled step."
  ]
  return list(rows.values()), notes


def _step(problem: DomainProblem):
  """One compiled step, without arguments."""
  task = domain_task(problem)
  hparams = {name: jnp.float32(value) for name, value in task.hparams.items()}
  state = jax.jit(task.init)(jax.random.key(0), hparams)
  return functools.partial(jax.jit(task.step), state, {"row": task.data["row"][: problem.batch_size]}, hparams)


def _operations(step: functools.partial) -> float:
  return step.func.lower(*step.args).compile().cost_analysis()["flops"]
