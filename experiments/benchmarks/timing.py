"""Timing of functions that return arrays."""

import time
from collections.abc import Callable

import jax

__all__ = ["fastest", "interleaved"]


def fastest(function: Callable, *arguments, repeats: int = 5) -> float:
  """Seconds of the fastest of some calls, after one that is not counted."""
  return interleaved({"only": lambda: function(*arguments)}, repeats=repeats)["only"]


def interleaved(functions: dict[str, Callable], *, repeats: int = 5) -> dict[str, float]:
  """Seconds of the fastest call of each function, called in turn so that a slow moment of the machine hits all."""
  best = dict.fromkeys(functions, float("inf"))
  for function in functions.values():
    jax.block_until_ready(function())
  for _ in range(repeats):
    for name, function in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(function())
      best[name] = min(best[name], time.perf_counter() - began)
  return best
