"""Published methods of loss design and regularization for JAX: parts for anyone's training loop.

Rooms: `losses` (what to minimise), `regularizers` (what to add), `transforms` (how to step, optax), `layers` and
`models` (Flax), `quantization`, `pruning`, `kernels` (theory in closed form), `denoising`, `solvers` (iterative
algorithms), `adversarial`, `metrics`, `data`, `training` (the harness). Each is imported when it is first used.

>>> import jaxreg
>>> jaxreg.losses.stablemax_cross_entropy.__module__
'jaxreg.losses.stablemax'
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see of what is imported when it is first used
  from jaxreg import (
    adversarial,
    data,
    denoising,
    kernels,
    layers,
    losses,
    metrics,
    models,
    pruning,
    quantization,
    regularizers,
    solvers,
    training,
    transforms,
  )
  from jaxreg.references import citation
else:  # a type checker would take it for leave to use any name

  def __getattr__(name: str):
    if name == "citation":
      return importlib.import_module("jaxreg.references").citation
    if name in __all__:
      return importlib.import_module(f"jaxreg.{name}")
    raise AttributeError(f"module 'jaxreg' has no attribute {name!r}")

  def __dir__():
    return __all__


__version__ = "0.1.0"

__all__ = [
  "__version__",
  "adversarial",
  "citation",
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
  "training",
  "transforms",
]
