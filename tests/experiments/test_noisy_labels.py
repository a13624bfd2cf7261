"""The demo, and its rule for choosing settings."""

import numpy as np

from experiments.harness.selection import select
from experiments.harness.trials import CellTrials, Trials
from experiments.studies import noisy_labels
from tests.experiments import recipe_checks


def test_demo(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  record = noisy_labels.demo(noisy_labels.DemoOptions(preset="smoke", folder=tmp_path / "demo", engine="vmap"))
  printed = capsys.readouterr().out
  for name in ("record.json", "figure.png", "table.txt", "trials.npz"):
    assert (tmp_path / "demo" / name).stat().st_size > 500
    assert name in printed
  assert "…" not in printed and all(len(line) <= 80 for line in printed.splitlines() if line[:1] in "┃│")
  assert {(row["loss"], row["noise_rate"]) for row in record["rows"]} == {
    (loss, rate) for loss in noisy_labels.LOSSES for rate in (0.0, 0.6)
  }
  base = [row for row in record["rows"] if row["loss"] == "cross_entropy"]
  assert all(row["selected_minus_cross_entropy"] == (0.0, 0.0) for row in base)
  assert set(record["engines"].values()) == {"vmap"}


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("noisy_labels", tmp_path)


def test_selection_uses_the_noisy_validation_split_only():
  """A setting and an epoch that are best on the test set, but not on the validation set, must not be chosen."""
  config = noisy_labels.Config(rates=(0.0,), seeds=2, evaluations=2)
  shape = (3, 2, 2)  # settings, seeds, evaluations
  valid, test = np.zeros(shape), np.ones(shape)
  valid[1, :, 0], test[1] = 0.9, [0.5, 0.7]  # setting 1, first evaluation
  metrics = {"test_accuracy": test, "noisy_valid_accuracy": valid, "loss": np.zeros(shape)}
  cell = CellTrials({}, np.arange(2), np.arange(2), metrics, np.full(shape[:2], -1), "map")
  summary = noisy_labels.summary(config, Trials(np.arange(2), dict.fromkeys(noisy_labels.LOSSES, cell)))
  assert summary["elr 0 selected"].tolist() == [0.5, 0.5] and summary["elr 0 last"].tolist() == [0.7, 0.7]
  rows = noisy_labels.table(config, summary)
  assert rows[0]["setting"] == {"learning_rate": 0.05} and rows[0]["selected"] == (0.5, 0.0)


def test_a_setting_is_chosen_for_all_seeds_and_an_evaluation_for_each():
  valid = np.array([[[0.5, 0.9], [0.1, 0.2]], [[0.6, 0.7], [0.8, np.nan]]])
  chosen = select(valid)
  assert chosen.setting == 1 and chosen.evaluations.tolist() == [1, 0]
  assert chosen.of(valid).tolist() == [0.7, 0.8]
  assert select(np.full((2, 1, 3), np.nan)).setting == 0
