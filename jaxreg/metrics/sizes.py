"""Static whole numbers: Python's, NumPy's, or of any type that counts as an index."""

import operator

__all__ = []


def is_integer(value) -> bool:
  """Whether a value is a whole number that can be read now; booleans are none."""
  try:
    operator.index(value)
  except TypeError:  # of tracers, too
    return False
  return not isinstance(value, bool)


def static_integer(name: str, value, *, low: int, high: int | None = None) -> int:
  """The value as a Python int; raises ValueError unless it is a whole number in [low, high]."""
  if is_integer(value) and low <= operator.index(value) and (high is None or operator.index(value) <= high):
    return operator.index(value)
  kind = {0: "a non-negative integer", 1: "a positive integer"}.get(low, f"an integer of at least {low}")
  kind = kind if high is None else f"an integer in [{low}, {high}]"
  raise ValueError(f"{name} must be {kind}, got {value!r}.")
