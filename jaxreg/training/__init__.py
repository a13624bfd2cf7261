"""The harness: a `Task`, `fit` for one run, `sweep` for many, checkpoints and logs. A room never imports it."""

from jaxreg.training.checkpoint import CheckpointError, load_params, predict
from jaxreg.training.files import FolderError
from jaxreg.training.fitting import FitResult, NonFiniteError, fit
from jaxreg.training.gradient import gradient_task
from jaxreg.training.hparams import grid
from jaxreg.training.log import DamagedLogError, read_metrics
from jaxreg.training.mesh import data_mesh, trial_mesh
from jaxreg.training.sweeping import SweepResult, sweep, sweep_settings
from jaxreg.training.task import Computation, Context, HeldOut, Mean, Task, TrainState

__all__ = [
  "CheckpointError",
  "Computation",
  "Context",
  "FitResult",
  "DamagedLogError",
  "FolderError",
  "HeldOut",
  "Mean",
  "NonFiniteError",
  "SweepResult",
  "Task",
  "TrainState",
  "data_mesh",
  "fit",
  "gradient_task",
  "grid",
  "load_params",
  "predict",
  "read_metrics",
  "sweep",
  "sweep_settings",
  "trial_mesh",
]
