"""A training process for tests to start and kill: `python worker.py FOLDER [--option value …]`."""

import argparse
import json
import os
import time

import jax

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--slow", type=float, default=0.0, help="seconds to sleep after each logged chunk")
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--coordinator")
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--job", choices=["fit", "sweep", "stream"], default="fit")
parser.add_argument("--die-at", type=int, default=-1, help="kill this process abruptly after that step")
parser.add_argument("--seeds", type=int, default=4, help="of a sweep")
parser.add_argument("--examples", type=int, default=64)
parser.add_argument("--hold", type=float, default=0.0, help="seconds to sleep while the folder is held")
parser.add_argument("--file-limit", type=int, default=0, help="largest file this process may write, in bytes")
options = parser.parse_args()

jax.config.update("jax_num_cpu_devices", options.devices)
if options.coordinator:
  jax.distributed.initialize(
    options.coordinator, options.processes, options.process, heartbeat_timeout_seconds=10, initialization_timeout=60
  )

import numpy as np  # noqa: E402

from jaxreg.training import examples, fit, grid, log, sweep  # noqa: E402
from jaxreg.training import mesh as mesh_lib  # noqa: E402

if options.file_limit:
  import resource

  resource.setrlimit(resource.RLIMIT_FSIZE, (options.file_limit, options.file_limit))

if options.hold:
  from jaxreg.training import identity

  def held(folder, run):
    print("holding", flush=True)
    time.sleep(options.hold)

  identity.claim = held

append = log.MetricsLog.append


def hooked(self, row):
  append(self, row)
  print("step", row["step"], flush=True)
  if 0 <= options.die_at <= row["step"]:
    os._exit(9)
  time.sleep(options.slow)


log.MetricsLog.append = hooked

if options.job == "sweep":
  result = sweep(
    examples.least_squares(), grid(learning_rate=[0.01, 0.02, 0.05, 0.1]), seeds=range(options.seeds),
    steps=options.steps, eval_every=100, engine="map", folder=options.folder, progress=False, memory_budget=1,
    keep_params=True,
  )  # fmt: skip
  answer = {"loss": result.metrics["loss"].tolist(), "w": result.params["w"].tolist()}
else:
  task = examples.least_squares(examples=options.examples)
  if options.job == "stream":
    from jaxreg.data import stream

    arrays = task.data
    task = task.replace(data=lambda: stream.array_stream(arrays, batch_size=16, seed=1))
  result = fit(
    task, steps=options.steps, log_every=20, eval_every=40, checkpoint_every=40, folder=options.folder, progress=False
  )
  params = mesh_lib.gather(result.state.params)
  answer = {
    "w": np.asarray(params["w"]).view(np.uint32).tolist(),
    "rows": result.rows,
    "interrupted": result.interrupted,
  }
if jax.process_index() == 0:
  print("answer " + json.dumps(answer), flush=True)
