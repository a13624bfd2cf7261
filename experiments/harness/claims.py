"""Claims as data, and the rule that judges them: a condition fixed beforehand, an interval over seeds."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

__all__ = ["MINIMUM_SEEDS", "RULES", "SCALES", "Claim", "Judgement", "interval", "judge"]

CONFIDENCE = 0.95
MINIMUM_SEEDS = 5
SCALES = ("linear", "log")
RULES = (
  "A verdict compares the 95 % t-interval of the mean over seeds with a condition fixed before the run: *reproduced*"
  " when all of the interval satisfies the condition, *not reproduced* when none of it does, *undecided* otherwise."
  " Fewer than five seeds decide nothing. Where all seeds have the same value the interval has no width, and the sign"
  " test judges: five of five seeds satisfy the condition, or do not (p = 1/32). On a logarithmic scale mean and"
  " interval are those of the logarithms. A value that is not a finite number is *not reproduced*."
)


class Claim(NamedTuple):
  """One sentence that a run can confirm or refute.

  Attributes:
    name: short identifier.
    sentence: the claim as a reader should understand it; it stands alone.
    measured: how it is measured: baseline, metric, setting.
    value: `summary -> [seeds]`, the number per seed that the condition is about.
    at_least: the condition `value >= at_least`; or
    at_most: the condition `value <= at_most`.
    scale: `linear`, or `log` for ratios and other positive values: the interval is that of the logarithms.
    amended: what was changed after a result was seen, when and why.
  """

  name: str
  sentence: str
  measured: str
  value: Callable[[Mapping[str, np.ndarray]], np.ndarray]
  at_least: float | None = None
  at_most: float | None = None
  scale: str = "linear"
  amended: str = ""

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


def judge(claim: Claim, summary: Mapping[str, np.ndarray]) -> Judgement:
  """Compares the interval of the mean over seeds with the condition, by the rules in `RULES`.

  >>> claim = Claim("gain", "b beats a", "b minus a", lambda m: m["b"] - m["a"], at_least=0.1)
  >>> a, b = np.array([0.5, 0.6, 0.5, 0.5, 0.6]), np.array([0.8, 0.9, 0.9, 0.8, 0.8])
  >>> judge(claim, {"a": a, "b": b}).verdict
  'reproduced'
  """
  _check(claim)
  values = np.asarray(claim.value(summary), np.float64)
  if values.ndim != 1 or values.size < 2:
    raise ValueError(f"claim {claim.name} needs one number for each of at least two seeds, got shape {values.shape}.")
  mean, low, high = _interval(values, claim.scale)
  return Judgement(values.tolist(), mean, low, high, _verdict(claim, values, low, high))


def interval(values: np.ndarray) -> tuple[float, float]:
  """The 95 % t-interval of the mean of `[seeds]`, by which claims are judged.

  >>> [round(end, 3) for end in interval(np.array([0.1, 0.2, 0.3]))]
  [-0.048, 0.448]
  """
  return _interval(np.asarray(values, np.float64), "linear")[1:]


def _check(claim: Claim) -> None:
  if (claim.at_least is None) == (claim.at_most is None):
    raise ValueError(f"claim {claim.name} must have one of at_least and at_most.")
  if claim.scale not in SCALES:
    raise ValueError(f"scale of claim {claim.name} must be one of {', '.join(SCALES)}, got {claim.scale!r}.")
  bound = claim.at_most if claim.at_least is None else claim.at_least
  if claim.scale == "log" and bound <= 0:
    raise ValueError(f"claim {claim.name} has a logarithmic scale; its bound must be positive, got {bound:g}.")


def _interval(values: np.ndarray, scale: str) -> tuple[float, float, float]:
  """Mean, low and high; all NaN where a value, or its logarithm, is not finite."""
  with np.errstate(divide="ignore", invalid="ignore"):
    points = np.log(values) if scale == "log" else values
  if not np.isfinite(points).all():
    return (math.nan,) * 3
  if np.ptp(values) == 0:
    return (float(values[0]),) * 3
  mean, error = points.mean(), points.std(ddof=1) / math.sqrt(points.size)
  half = stats.t.ppf((1 + CONFIDENCE) / 2, points.size - 1) * error
  back = np.exp if scale == "log" else np.asarray
  return tuple(float(back(x)) for x in (mean, mean - half, mean + half))


def _verdict(claim: Claim, values: np.ndarray, low: float, high: float) -> str:
  if not math.isfinite(low):
    return "not reproduced"
  if values.size < MINIMUM_SEEDS:
    return "undecided"
  sign, bound = (1, claim.at_least) if claim.at_least is not None else (-1, claim.at_most)
  worst, best = sorted((sign * low, sign * high))  # equal where the sign test judges
  if worst >= sign * bound:
    return "reproduced"
  return "undecided" if best >= sign * bound else "not reproduced"
