"""How a study chooses settings: by validation data alone, under one rule for all that it compares.

Where the test is of another domain than the training, the rules are those of Gulrajani, Lopez-Paz, "In Search of Lost
Domain Generalization", ICLR 2021. They know different things of the target, and numbers of different rules do not
belong into one table: `rule_of` refuses them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

__all__ = ["Selection", "leave_one_domain_out", "oracle", "rule_of", "select", "training_domain_validation"]


class Selection(NamedTuple):
  """A setting for all seeds, and an evaluation for each.

  Attributes:
    setting: index of the setting.
    evaluations: `[seeds]`, indices of the evaluations.
    rule: what chose them.
  """

  setting: int
  evaluations: np.ndarray
  rule: str = "validation"

  def of(self, values: np.ndarray) -> np.ndarray:
    """What is chosen of `[settings, seeds, evaluations]`, as `[seeds]`."""
    return values[self.setting, np.arange(len(self.evaluations)), self.evaluations]


def select(valid: np.ndarray) -> Selection:
  """Chooses by a validation metric that should be large; test data are never seen here.

  The setting has the best mean over seeds of each run's best evaluation; the evaluation is each run's own best one.

  >>> valid = np.array([[[0.5, 0.6], [0.5, 0.4]], [[0.9, 0.1], [0.2, 0.8]]])
  >>> chosen = select(valid)
  >>> chosen.setting, chosen.evaluations.tolist(), chosen.of(valid).tolist()
  (1, [0, 1], [0.9, 0.8])

  Args:
    valid: `[settings, seeds, evaluations]`; NaN is never chosen.
  """
  valid = np.where(np.isnan(valid), -np.inf, valid)
  setting = int(valid.max(axis=-1).mean(axis=-1).argmax())
  return Selection(setting, valid[setting].argmax(axis=-1))


def training_domain_validation(valid: np.ndarray) -> Selection:
  """Chooses by held-out examples of the training domains, which all count alike: nothing is known of the target.

  >>> valid = np.array([[[[0.9, 0.1]]], [[[0.6, 0.6]]]])  # two settings, one seed, one evaluation, two domains
  >>> training_domain_validation(valid).setting
  1

  Args:
    valid: `[settings, seeds, evaluations, domains]`.
  """
  _check_axes("valid", valid, "settings, seeds, evaluations, domains")
  return select(np.mean(valid, axis=-1))._replace(rule="training-domain validation")


def leave_one_domain_out(held_out: np.ndarray, evaluations: int) -> Selection:
  """Chooses by runs that each left out one training domain and were measured there at their end.

  The chosen setting is then trained on all training domains, and taken at its last evaluation.

  >>> held_out = np.array([[[0.9], [0.1]], [[0.6], [0.6]]])  # two settings, two domains, one seed
  >>> chosen = leave_one_domain_out(held_out, evaluations=5)
  >>> chosen.setting, chosen.evaluations.tolist()
  (1, [4])

  Args:
    held_out: `[settings, domains, seeds]`, accuracies on the domain that was left out.
    evaluations: number of evaluations of the runs on all domains.
  """
  _check_axes("held_out", held_out, "settings, domains, seeds")
  scores = np.where(np.isnan(held_out), -np.inf, held_out).mean(axis=(1, 2))
  last = np.full(held_out.shape[2], evaluations - 1)
  return Selection(int(scores.argmax()), last, "leave-one-domain-out cross-validation")


def oracle(target: np.ndarray) -> Selection:
  """Chooses by labelled examples of the target other than the test's, at the end of training: no early stopping.

  >>> target = np.array([[[0.9, 0.3]], [[0.2, 0.5]]])
  >>> chosen = oracle(target)
  >>> chosen.setting, chosen.evaluations.tolist()
  (1, [1])

  Args:
    target: `[settings, seeds, evaluations]`.
  """
  _check_axes("target", target, "settings, seeds, evaluations")
  chosen = select(target[..., -1:])
  return Selection(chosen.setting, chosen.evaluations + target.shape[-1] - 1, "test-domain validation (oracle)")


def rule_of(selections: Iterable[Selection]) -> str:
  """The one rule by which all of a table was chosen; a ValueError names the rules where there are several.

  >>> rule_of([Selection(0, np.zeros(1, int)), Selection(2, np.zeros(1, int))])
  'validation'
  """
  rules = list(dict.fromkeys(selection.rule for selection in selections))
  if len(rules) != 1:
    raise ValueError(f"a table must have one rule of selection, got {', '.join(rules) or 'none'}.")
  return rules[0]


def _check_axes(name: str, values: np.ndarray, axes: str) -> None:
  if np.ndim(values) != len(axes.split(", ")):
    raise ValueError(f"{name} must be [{axes}], got shape {np.shape(values)}.")
