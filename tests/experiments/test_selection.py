"""Rules of selection: what each knows, and that a table has one."""

import numpy as np
import pytest

from experiments.harness import selection


def test_rules_know_different_things():
  rng = np.random.default_rng(0)
  valid, target = rng.uniform(size=(4, 3, 5, 2)), rng.uniform(size=(4, 3, 5))
  valid[1] += 1  # the best on the training domains,
  target[2, :, -1] += 1  # at the end on the target,
  target[3, :, 0] += 2  # and early on the target, which the oracle may not take
  held_out = rng.uniform(size=(4, 2, 3))
  held_out[0, :, :] += 1
  chosen = [
    selection.training_domain_validation(valid),
    selection.oracle(target),
    selection.leave_one_domain_out(held_out, evaluations=5),
  ]
  assert [each.setting for each in chosen] == [1, 2, 0]
  assert chosen[0].evaluations.tolist() == valid[1].mean(-1).argmax(-1).tolist()
  assert chosen[1].evaluations.tolist() == chosen[2].evaluations.tolist() == [4, 4, 4]
  np.testing.assert_array_equal(chosen[1].of(target), target[2, :, -1])
  assert len({each.rule for each in chosen}) == 3


def test_a_table_has_one_rule():
  one = selection.select(np.ones((2, 3, 4)))
  other = selection.oracle(np.ones((2, 3, 4)))
  assert selection.rule_of([one, one]) == "validation"
  for mixed in ([one, other], []):
    with pytest.raises(ValueError, match="one rule of selection"):
      selection.rule_of(mixed)
  with pytest.raises(ValueError, match=r"valid must be \[settings, seeds, evaluations, domains\]"):
    selection.training_domain_validation(np.ones((2, 3, 4)))


def test_nan_is_never_chosen():
  values = np.full((2, 2, 2), np.nan)
  values[1, 0, 1] = values[1, 1, 0] = 0.1
  assert selection.select(values).of(values).tolist() == [0.1, 0.1]
  held_out = np.array([[[np.nan]], [[0.0]]])
  assert selection.leave_one_domain_out(held_out, evaluations=1).setting == 1
  assert selection.training_domain_validation(np.array([[[[np.nan, 1.0]]], [[[0.1, 0.1]]]])).setting == 1
