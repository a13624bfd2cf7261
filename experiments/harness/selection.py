"""How a study chooses settings: by validation data alone."""

from typing import NamedTuple

import numpy as np

__all__ = ["Selection", "select"]


class Selection(NamedTuple):
  """A setting for all seeds, and an evaluation for each.

  Attributes:
    setting: index of the setting.
    evaluations: `[seeds]`, indices of the evaluations.
  """

  setting: int
  evaluations: np.ndarray

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
