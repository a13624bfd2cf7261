"""Trials (learning rate × seed) of a small network on digits: `sweep`, one at a time, PyTorch, the arithmetic alone."""

import concurrent.futures
import importlib.util
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import Options
from experiments.benchmarks.timing import fastest
from experiments.harness import records
from jaxreg.data import bundled
from jaxreg.models import MLP
from jaxreg.training import Task, fit, gradient_task, grid, sweep

TITLE = "Sweep of a 3-layer network (width 64, batch 64) on digits, 500 steps a trial"
WIDTH, BATCH, STEPS = 64, 64, 500


def digits_task() -> Task:
  """Cross-entropy on digits by SGD."""
  data = bundled.digits()
  inputs = data["x"].reshape(len(data["x"]), -1)
  model = MLP((WIDTH, WIDTH, 10))

  def objective(params, extra, batch, context):
    del context
    logits = model.apply({"params": params}, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), (extra, {})

  return gradient_task(
    init_params=lambda key, hparams: (model.init(key, jnp.zeros((1, 64)))["params"], {}),
    objective=objective,
    optimizer=lambda hparams: optax.sgd(hparams["learning_rate"]),
    data={"x": inputs, "y": data["y"]},
    batch_size=BATCH,
    hparams={"learning_rate": 0.1},
  )


def measure(options: Options):
  """Rows: one per number of trials."""
  steps = 50 if options.quick else STEPS
  arithmetic = steps * step_flops() / matmul_rate()
  alone = _one_at_a_time(steps)
  rows = []
  for trials in (8,) if options.quick else (64, 256):
    torch_seconds = torch_trials(trials, steps)
    points = grid(learning_rate=np.geomspace(0.01, 0.3, trials // 4))
    task = digits_task()  # a new task, so that nothing is compiled yet
    jax.clear_caches()
    began = time.perf_counter()
    result = sweep(task, points, seeds=range(4), steps=steps, progress=False)
    cold = time.perf_counter() - began
    warm = min(
      sweep(task, points, seeds=range(4), steps=steps, engine=result.engine, progress=False).seconds
      for _ in range(options.repeats)
    )
    row = {
      "trials": trials,
      "engine": result.engine,
      "sweep ms/trial": 1e3 * warm / trials,
      "cold ms/trial": 1e3 * cold / trials,
      "one at a time ms/trial": 1e3 * alone,
      "arithmetic ms/trial": 1e3 * arithmetic,
      "sweep / arithmetic": warm / trials / arithmetic,
      "one at a time / sweep": alone * trials / warm,
    }
    if torch_seconds is not None:
      row |= {
        "PyTorch ms/trial": 1e3 * torch_seconds / trials,
        "PyTorch / sweep": torch_seconds / warm,
        "PyTorch / cold": torch_seconds / cold,
      }
    rows.append(row)
  notes = [
    f"Arithmetic: {step_flops() / 1e6:.2f} MFLOP of matrix products a step over the measured rate of"
    f" {matmul_rate() / 1e9:.0f} GFLOP/s (all cores, large float32 matrix product)."
    " Cold includes choosing the engine and compiling, with the persistent compilation cache off.",
    "PyTorch: one process per core, one thread each, the plain training loop with data on hand, started beforehand."
    if rows[0].get("PyTorch ms/trial")
    else "PyTorch is not installed (extra `benchmarks`): skipped.",
  ]
  return rows, notes


def step_flops() -> float:
  """Floating-point operations of the matrix products in one training step (no gradient with respect to the inputs)."""
  first, rest = 64 * WIDTH, WIDTH * WIDTH + WIDTH * 10
  return BATCH * (4 * first + 6 * rest)


def matmul_rate(size: int = 1536) -> float:
  """Floating-point operations a second of a large float32 matrix product."""
  matrix = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a: a @ a)
  return 2 * size**3 / fastest(product, matrix, repeats=10)


def _one_at_a_time(steps: int) -> float:
  task = digits_task()
  run = lambda seed: fit(task, steps=steps, log_every=steps, seed=seed, progress=False)
  run(0)
  began = time.perf_counter()
  for seed in range(4):
    jax.block_until_ready(run(seed).state)
  return (time.perf_counter() - began) / 4


def torch_trials(trials: int, steps: int) -> float | None:
  """Seconds of PyTorch for all trials, or None when it is not installed."""
  if importlib.util.find_spec("torch") is None:
    print("PyTorch is not installed (extra `benchmarks`): skipping it.")
    return None
  cores = records.cores()
  rates = np.geomspace(0.01, 0.3, trials)
  jobs = [(rates[core::cores].tolist(), steps) for core in range(cores)]
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(cores, mp_context=context) as pool:
    list(pool.map(_torch_worker, [([0.1], 20)] * cores))  # import and warm up
    began = time.perf_counter()
    list(pool.map(_torch_worker, jobs))
    return time.perf_counter() - began


def _torch_worker(job) -> None:
  import torch

  rates, steps = job
  torch.set_num_threads(1)
  data = bundled.digits()
  inputs = torch.tensor(data["x"].reshape(len(data["x"]), -1))
  labels = torch.tensor(data["y"], dtype=torch.long)
  for seed, rate in enumerate(rates):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
      torch.nn.Linear(64, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(),
      torch.nn.Linear(WIDTH, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    taken = 0
    while taken < steps:
      order = torch.randperm(len(inputs))
      for start in range(0, len(inputs) - BATCH + 1, BATCH):
        ids = order[start : start + BATCH]
        loss = torch.nn.functional.cross_entropy(model(inputs[ids]), labels[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken += 1
        if taken == steps:
          break
