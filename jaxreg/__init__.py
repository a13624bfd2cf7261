"""Published methods of loss design and regularization for JAX: parts for anyone's training loop.

Rooms: `losses` (what to minimise), `regularizers` (what to add), `transforms` (how to step, optax), `layers` and
`models` (Flax), `quantization`, `pruning`, `kernels` (theory in closed form), `denoising`, `solvers` (iterative
algorithms), `adversarial`, `metrics`, `data`, `training` (the harness). Each is imported when it is first used.

>>> import jaxreg
>>> jaxreg.losses.stablemax_cross_entropy.__module__
'jaxreg.losses.stablemax'
"""

import importlib

__version__ = "0.1.0"

_ROOMS = (
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
  "training",
  "transforms",
)
__all__ = ["__version__", "citation", *_ROOMS]


def __getattr__(name: str):
  if name in _ROOMS:
    return importlib.import_module(f"jaxreg.{name}")
  if name == "citation":
    return importlib.import_module("jaxreg.references").citation
  raise AttributeError(f"module 'jaxreg' has no attribute {name!r}")


def __dir__():
  return __all__
