import numpy as np

from experiments.papers import ode_heuristics
from experiments.problems import spirals
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("ode_heuristics", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("ode_heuristics", tmp_path)


def test_spirals_say_which_runs_converged():
  """A model that does not move stays above the threshold; one that follows the spiral is far below it."""
  measured = spirals.measure_ode([0], steps=1)
  assert set(measured) == {f"{name} {metric}" for name in ("vanilla", "error") for metric in METRICS}
  assert measured["vanilla converged"] == 0 and measured["vanilla loss"] > 5 * spirals.thresholds()["ODE"]
  np.testing.assert_allclose([spirals.thresholds()[name] for name in ("ODE", "SDE")], [0.2313, 0.2173], rtol=1e-3)


METRICS = ("loss", "evaluations", "converged")


def test_the_table_is_about_converged_runs():
  config, summary = ode_heuristics.PRESETS["cpu"], {}
  for kind in ("SDE", "ODE"):
    for name, converged in (("vanilla", [1.0, 0.0, 1.0]), ("error", [0.0, 0.0, 0.0])):
      values = ([0.1, 2.0, 0.3], [18.0, 40.0, 20.0], converged)
      summary |= {f"spiral {kind} {name} {metric}": np.array(value) for metric, value in zip(METRICS, values)}
  first, second, *_ = ode_heuristics.table(config, summary)
  assert first == {
    "spiral": "SDE", "model": "vanilla", "seeds converged": "2 of 3", "loss": "0.2", "evaluations": "19",
  }  # fmt: skip
  assert second["seeds converged"] == "0 of 3" and second["loss"] == "none converged"
  assert ode_heuristics.table(ode_heuristics.PRESETS["smoke"], {}) == []
