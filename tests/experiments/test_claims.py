"""The rules that judge a claim."""

import numpy as np
import pytest

from experiments.harness.claims import Claim, judge


def judged(values, **bound):
  return judge(Claim("c", "s", "m", lambda m: m["v"], **bound), {"v": np.asarray(values)})


@pytest.mark.parametrize("values, bound, verdict", [
  ([0.5, 0.51, 0.49, 0.5, 0.5], {"at_least": 0.4}, "reproduced"),
  ([0.5, 0.51, 0.49, 0.5, 0.5], {"at_least": 0.6}, "not reproduced"),
  ([0.2, 0.9, 0.5, 0.2, 0.9], {"at_least": 0.5}, "undecided"),
  ([0.0, 1.0, 0.0, 1.0, 0.0], {"at_most": -5.0}, "not reproduced"),
  ([0.1, 0.1, 0.2, 0.1, 0.1], {"at_most": 0.3}, "reproduced"),
])  # fmt: skip
def test_the_interval_decides(values, bound, verdict):
  assert judged(values, **bound).verdict == verdict


@pytest.mark.parametrize("count", [2, 4])
def test_fewer_than_five_seeds_decide_nothing(count):
  assert judged([0.5] * count, at_least=0.0).verdict == "undecided"
  assert judged(np.linspace(0.5, 0.51, count), at_least=0.9).verdict == "undecided"


@pytest.mark.parametrize("value, verdict", [(0.1, "reproduced"), (0.3, "reproduced"), (0.30001, "not reproduced")])
def test_equal_seeds_are_judged_by_their_sign(value, verdict):
  result = judged([value] * 7, at_most=0.3)
  assert result.verdict == verdict and result.low == result.high == result.mean == value


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_reproduced(bad):
  for values in ([1.0, bad, 1.0, 1.0, 1.0], [bad, 1.0], [bad] * 5):
    for scale in ("linear", "log"):
      assert judged(values, at_least=0.5, scale=scale).verdict == "not reproduced"


def test_t_interval():
  low, high = judged([1.0, 2.0, 3.0], at_least=0.0)[2:4]
  np.testing.assert_allclose([low, high], [2 - 2.4841, 2 + 2.4841], atol=1e-3)  # t(0.975, 2) / sqrt(3)


def test_logarithmic_scale_is_the_interval_of_logarithms():
  values = np.array([1.5, 3.0, 6.0, 2.0, 12.0])
  ratio, plain = judged(values, at_least=1.2, scale="log"), judged(np.log(values), at_least=np.log(1.2))
  np.testing.assert_allclose(np.log(ratio[1:4]), plain[1:4])
  assert ratio.verdict == "reproduced" and ratio.values == values.tolist()
  assert judged(values, at_least=1.2).verdict == "undecided"  # one large ratio widens the plain interval
  assert judged([1.0, 0.0, 1.0, 1.0, 1.0], at_least=0.1, scale="log").verdict == "not reproduced"


@pytest.mark.parametrize("claim, message", [
  ({}, "one of at_least and at_most"),
  ({"at_least": 0, "at_most": 1}, "one of at_least and at_most"),
  ({"at_least": 0, "scale": "log"}, "bound must be positive"),
  ({"at_least": 0, "scale": "cubic"}, "scale of claim c must be one of linear, log"),
])  # fmt: skip
def test_claims_that_cannot_be_judged(claim, message):
  with pytest.raises(ValueError, match=message):
    judged([1.0] * 5, **claim)


def test_shapes_are_checked():
  for values in (np.zeros((5, 2)), np.zeros(1)):
    with pytest.raises(ValueError, match="one number for each"):
      judged(values, at_least=0)
