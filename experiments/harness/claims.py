"""Claims as data, and the rule that judges them: a condition fixed beforehand, an interval over seeds."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Claim", "Judgement", "judge"]

CONFIDENCE = 0.95


class Claim(NamedTuple):
  """One sentence that a run can confirm or refute.

  Attributes:
    name: short identifier.
    sentence: the claim as a reader should understand it.
    measured: how it is measured: baseline, metric, setting.
    value: `measurements -> [seeds]`, the number per seed that the condition is about.
    at_least: the condition `value >= at_least`; or
    at_most: the condition `value <= at_most`.
  """

  name: str
  sentence: str
  measured: str
  value: Callable[[Mapping[str, np.ndarray]], np.ndarray]
  at_least: float | None = None
  at_most: float | None = None

  @property
  def condition(self) -> str:
    """The condition in words."""
    return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


class Judgement(NamedTuple):
  """A claim's outcome: values per seed, mean, confidence interval of the mean, verdict."""

  values: list[float]
  mean: float
  low: float
  high: float
  verdict: str


def judge(claim: Claim, measurements: Mapping[str, np.ndarray]) -> Judgement:
  """Compares the 95 % t-interval of the mean over seeds with the condition.

  `reproduced` when the whole interval satisfies the condition, `not reproduced` when none of it does, `undecided` when
  the bound lies inside.

  >>> claim = Claim("gain", "b beats a", "b - a", lambda m: m["b"] - m["a"], at_least=0.1)
  >>> judge(claim, {"a": np.array([0.5, 0.6, 0.5]), "b": np.array([0.8, 0.9, 0.9])}).verdict
  'reproduced'
  """
  if (claim.at_least is None) == (claim.at_most is None):
    raise ValueError(f"claim {claim.name} must have one of at_least and at_most.")
  values = np.asarray(claim.value(measurements), np.float64)
  if values.ndim != 1 or values.size < 2:
    raise ValueError(f"claim {claim.name} needs one number for each of at least two seeds, got shape {values.shape}.")
  mean, spread = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
  half = float(stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1)) * spread
  low, high = mean - half, mean + half
  sign, bound = (1, claim.at_least) if claim.at_least is not None else (-1, claim.at_most)
  worst, best = sorted((sign * low, sign * high))
  if worst >= sign * bound:
    verdict = "reproduced"
  elif best >= sign * bound:
    verdict = "undecided"
  else:  # also when a value is not a number
    verdict = "not reproduced"
  return Judgement(values.tolist(), mean, low, high, verdict)
