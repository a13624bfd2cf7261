"""What `fit` costs per step beyond a bare jitted loop of the same model."""

import shutil
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import Options
from jaxreg.models import MLP
from jaxreg.training import fit, gradient_task

TITLE = "Step of fit against a bare jitted loop"


def measure(options: Options):
  """Rows: seconds per step of each way, and their ratio."""
  rows = []
  for width, batch in ((64, 64), (512, 256)):
    steps = 200 if options.quick else 3200 // (width // 64) // 2
    rows.append(_compare(width, batch, steps, 2 if options.quick else max(options.repeats, 5)))
  notes = [
    "The bare loop calls a jitted SGD step on batches that were gathered beforehand; fit draws and gathers its batches,"
    " logs every 100 steps and writes JSONL and TensorBoard files. A step's time is half the difference between runs of"
    " three times and of once the number of steps, so that what happens once (initial state, the checkpoint at the end:"
    " about 0.2 s) is left out; the median of the repetitions counts."
  ]
  return rows, notes


def _compare(width: int, batch: int, steps: int, repeats: int) -> dict:
  rng = np.random.default_rng(0)
  data = {"x": rng.normal(size=(4096, 64)).astype(np.float32), "y": rng.integers(0, 10, 4096).astype(np.int32)}
  model = MLP((width, width, 10))
  optimizer = optax.sgd(0.05)

  def objective(params, extra, batch, context):
    del context
    logits = model.apply({"params": params}, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), (extra, {})

  task = gradient_task(
    init_params=lambda key, hparams: (model.init(key, jnp.zeros((1, 64)))["params"], {}),
    objective=objective,
    optimizer=lambda hparams: optimizer,
    data=data,
    batch_size=batch,
  )
  params = task.init(jax.random.key(0), {}).params
  batches = [
    jax.device_put({name: value[start : start + batch] for name, value in data.items()})
    for start in range(0, 4096, batch)
  ]

  @jax.jit
  def bare_step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(lambda p: objective(p, {}, batch, None)[0])(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  def bare(steps):
    carry = params, optimizer.init(params)
    for index in range(steps):
      *carry, loss = bare_step(*carry, batches[index % len(batches)])
    return loss

  def fitted(steps):
    folder = tempfile.mkdtemp()
    try:
      return fit(task, steps=steps, log_every=100, checkpoint_every=steps, folder=folder, progress=False).state.params
    finally:
      shutil.rmtree(folder)

  def seconds(function, steps):
    began = time.perf_counter()
    jax.block_until_ready(function(steps))
    return time.perf_counter() - began

  fitted(steps)
  bare(steps)
  times = {"bare": [], "fit": []}
  for _ in range(repeats):
    for name, function in (("bare", bare), ("fit", fitted)):
      times[name].append((seconds(function, 3 * steps) - seconds(function, steps)) / (2 * steps))
  bare_step_time, fit_step_time = (float(np.median(times[name])) for name in ("bare", "fit"))
  return {
    "width": width,
    "batch": batch,
    "steps": steps,
    "bare µs/step": 1e6 * bare_step_time,
    "fit µs/step": 1e6 * fit_step_time,
    "fit / bare": fit_step_time / bare_step_time,
  }
