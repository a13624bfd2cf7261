"""Every recipe's smoke preset: builds, measures, judges its claims, draws its figure."""

import json
import sys

import jax
import numpy as np
import pytest

from experiments.harness import claims, commands, records, registry
from experiments.studies import noisy_labels
from jaxreg.training import fit

RECIPES = [name for name, entry in registry.entries().items() if entry.card]


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def engines_are_not_compared(monkeypatch):
  """Comparing the engines compiles every sweep twice; tests/training/test_sweep.py tests that it is done."""
  monkeypatch.setattr(sys.modules["jaxreg.training.sweep"], "_measure_engines", lambda *_: "map")


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name, tmp_path):
  module = registry.recipe(name)
  config = registry.preset(module, "smoke")
  record = commands.check(module, name, config, commands.VerifyOptions(preset="smoke", seeds=2))
  assert [claim["name"] for claim in record["claims"]] == [claim.name for claim in module.CLAIMS]
  assert all(len(claim["values"]) == 2 for claim in record["claims"])
  assert json.loads((tmp_path / "runs" / "verify-smoke" / name / "smoke" / "record.json").read_text())["seeds"] == [
    100,
    101,
  ]
  assert (tmp_path / "runs" / "verify-smoke" / name / "smoke" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", list(registry.entries()))
def test_run_and_predict(name, tmp_path):
  module = registry.recipe(name)
  config = registry.preset(module, "smoke")
  task = module.build(config)
  options = module.run_options(config)
  result = fit(
    task, folder=tmp_path / "run", progress=False, **{**options, "steps": 2, "log_every": 1, "eval_every": 2}
  )
  assert np.isfinite(result.rows[-1]["loss"])
  from jaxreg.training import predict

  outputs = predict(task, tmp_path / "run", task.data["x"][:3])
  np.testing.assert_allclose(
    outputs, jax.jit(task.predict)(result.state.params, result.state.extra, task.data["x"][:3])
  )
  assert set(module.points(config)) <= set(task.hparams)


def test_demo(tmp_path, capsys):
  record = noisy_labels.demo(noisy_labels.DemoOptions(preset="smoke", folder=tmp_path / "demo", engine="vmap"))
  printed = capsys.readouterr().out
  for name in ("record.json", "figure.png", "table.txt"):
    assert (tmp_path / "demo" / name).stat().st_size > 500
    assert name in printed
  assert {(row["loss"], row["noise_rate"]) for row in record["rows"]} == {
    (loss, rate) for loss in noisy_labels.LOSSES for rate in (0.0, 0.6)
  }
  base = [row for row in record["rows"] if row["loss"] == "cross_entropy"]
  assert all(row["selected_minus_cross_entropy"] == (0.0, 0.0) for row in base)


def test_selection_uses_the_noisy_validation_split_only():
  """A setting and an epoch that are best on the test set, but not on the validation set, must not be chosen."""
  import types

  config = noisy_labels.Config(rates=(0.0,), seeds=2, evaluations=2)
  shape = (3 * 2, 2)  # settings × seeds, evaluations
  valid, test = np.zeros(shape), np.ones(shape)
  valid[2:4, 0], test[2:4] = 0.9, [0.5, 0.7]  # setting 1, first evaluation
  result = types.SimpleNamespace(
    metrics={"test_accuracy": test, "noisy_valid_accuracy": valid, "loss": np.zeros(shape)},
    diverged_at=np.full(6, -1),
  )
  rows = noisy_labels.summarize(config, dict.fromkeys(noisy_labels.LOSSES, result))
  assert rows[0]["selected"][0] == 0.5 and rows[0]["last"][0] == 0.7
  assert rows[0]["setting"] == {"learning_rate": 0.05}


def test_judgements():
  judge = lambda values, **bound: claims.judge(
    claims.Claim("c", "s", "m", lambda m: m["v"], **bound), {"v": np.asarray(values)}
  )
  assert judge([0.5, 0.51, 0.49], at_least=0.4).verdict == "reproduced"
  assert judge([0.5, 0.51, 0.49], at_least=0.6).verdict == "not reproduced"
  assert judge([0.2, 0.9, 0.5], at_least=0.5).verdict == "undecided"
  assert judge([0.0, 0.0, 0.0], at_most=0.0).verdict == "reproduced"
  assert judge([0.0, 1.0, 0.0], at_most=-5.0).verdict == "not reproduced"
  assert judge([0.0, float("nan"), 0.0], at_least=-1.0).verdict == "not reproduced"
  low, high = judge([1.0, 2.0, 3.0], at_least=0.0)[2:4]
  np.testing.assert_allclose([low, high], [2 - 2.4841, 2 + 2.4841], atol=1e-3)  # t(0.975, 2) / sqrt(3)


def test_report_puts_every_record_into_the_ledger(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "LEDGER", tmp_path / "LEDGER.md")
  monkeypatch.setattr(records, "README", tmp_path / "README.md")
  (tmp_path / "README.md").write_text("before\n<!-- methods -->\nold\n<!-- /methods -->\nafter\n")
  records.report()
  ledger, readme = (tmp_path / "LEDGER.md").read_text(), (tmp_path / "README.md").read_text()
  assert readme.startswith("before") and readme.endswith("after\n") and "old" not in readme
  for name in RECIPES:
    assert f"`{name}`" in readme
    record = records.read(name)
    for claim in record["claims"] if record else ():
      assert claim["sentence"] in ledger and f"**{claim['verdict']}**" in ledger


def test_committed_ledger_is_what_report_makes(tmp_path, monkeypatch):
  expected_ledger, expected_readme = records.LEDGER.read_text(), records.README.read_text()
  monkeypatch.setattr(records, "LEDGER", tmp_path / "LEDGER.md")
  (tmp_path / "README.md").write_text(expected_readme)
  monkeypatch.setattr(records, "README", tmp_path / "README.md")
  records.report()
  assert (tmp_path / "LEDGER.md").read_text() == expected_ledger
  assert (tmp_path / "README.md").read_text() == expected_readme
