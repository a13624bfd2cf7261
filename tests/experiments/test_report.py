"""`report` judges the committed tables again without training, and rebuilds what is made from records."""

import dataclasses
import json
import shutil
import time

import numpy as np
import pytest

from experiments.harness import records, registry, report, trials, verification
from tests.experiments import tiny_recipe

TINY = "tests.experiments.tiny_recipe"
SEEDS = list(range(100, 105))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  verification.verify(tiny_recipe, TINY, "cpu", tiny_recipe.PRESETS["cpu"], SEEDS, folder, progress=False)
  return folder


@pytest.fixture
def committed(finished, tmp_path, monkeypatch):
  """A repository with one record; nothing in it can train."""
  monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
  monkeypatch.setattr(report, "LEDGER", tmp_path / "LEDGER.md")
  monkeypatch.setattr(report, "README", tmp_path / "README.md")
  (tmp_path / "README.md").write_text("before\n<!-- methods -->\nold\n<!-- /methods -->\nafter\n")
  entry = registry.Entry(TINY, TINY, "Tiny", "00-tiny", ("cpu",), True)
  monkeypatch.setattr(registry, "entries", lambda: {TINY: entry})
  for name in ("cell", "cells", "measure"):
    monkeypatch.setattr(tiny_recipe, name, None)
  verification.publish(finished, tmp_path / "results" / TINY / "cpu")
  return tmp_path / "results" / TINY / "cpu"


def edit(folder, change):
  record = json.loads((folder / "record.json").read_text())
  change(record)
  records.write(folder / "record.json", record)


def test_it_changes_nothing_that_is_right(committed, tmp_path):
  before = {path.name: path.read_bytes() for path in committed.iterdir()}
  assert report.report() == []
  assert {path.name: path.read_bytes() for path in committed.iterdir()} == before
  ledger, readme = (tmp_path / "LEDGER.md").read_text(), (tmp_path / "README.md").read_text()
  assert "A learning rate of 0.05 comes closer" in ledger and "**reproduced**" in ledger
  assert "Fewer than five seeds decide nothing" in ledger and "engine vmap" in ledger
  assert readme.startswith("before") and readme.endswith("after\n") and "1 reproduced" in readme


def test_another_table_gives_another_verdict_and_figure(committed, tmp_path):
  table = trials.Trials.load(committed / "trials.npz")
  rates = table["rates"]
  swapped = {**rates.metrics, "distance": rates.metrics["distance"][::-1]}
  table.cells["rates"] = rates._replace(metrics=swapped)
  table.save(committed / "trials.npz")
  figure = (committed / "figure.png").read_bytes()
  assert report.report() == []
  assert json.loads((committed / "record.json").read_text())["claims"][0]["verdict"] == "not reproduced"
  assert "**not reproduced**" in (tmp_path / "LEDGER.md").read_text()
  assert (committed / "figure.png").read_bytes() != figure


def test_texts_are_those_of_the_recipe_now(committed, tmp_path, monkeypatch):
  monkeypatch.setattr(tiny_recipe, "NOTES", ("A note\nin | two lines.",), raising=False)
  monkeypatch.setattr(tiny_recipe, "DEVIATIONS", ("No noise.", "Momentum."), raising=False)
  table = lambda config, summary: [{"rate | x": 0.5, "text": "a|b\nc"}]
  monkeypatch.setattr(tiny_recipe, "table", table, raising=False)
  assert report.report() == []
  ledger = (tmp_path / "LEDGER.md").read_text()
  assert "1. No noise.\n2. Momentum." in ledger and "A note in | two lines." in ledger
  assert r"| rate \| x | text |" in ledger and r"| 0.5 | a\|b c |" in ledger


def test_a_condition_changed_after_the_result_must_be_amended(committed, tmp_path, monkeypatch):
  claims = tiny_recipe.claims
  changed = lambda config, **fields: tuple(claim._replace(at_least=0.01, **fields) for claim in claims(config))
  monkeypatch.setattr(tiny_recipe, "claims", changed)
  (problem,) = report.report()
  assert "the condition of claim faster was ≥ 0 and is ≥ 0.01 now" in problem
  assert "Shown as recorded" in (tmp_path / "LEDGER.md").read_text()
  assert json.loads((committed / "record.json").read_text())["claims"][0]["condition"] == "≥ 0"
  amended = "2026-11-28: 0.01 | because."
  monkeypatch.setattr(tiny_recipe, "claims", lambda config: changed(config, amended=amended))
  assert report.report() == []
  assert json.loads((committed / "record.json").read_text())["claims"][0]["amended"] == amended
  assert r"*Amended: 2026-11-28: 0.01 \| because.*" in (tmp_path / "LEDGER.md").read_text()


def test_a_preset_that_changed_is_not_judged_by_an_old_table(committed, monkeypatch):
  presets = {"cpu": dataclasses.replace(tiny_recipe.PRESETS["cpu"], steps=80)}
  monkeypatch.setattr(tiny_recipe, "PRESETS", presets)
  (problem,) = report.report()
  assert "recorded with config.steps = 60, which is 80 now; verify it again" in problem


def test_a_table_of_other_seeds_is_not_judged(committed):
  edit(committed, lambda record: record.update(seeds=[1, 2]))
  (problem,) = report.report()
  assert "record.json has the seeds [1, 2]" in problem


def test_records_without_a_table_stay_as_recorded(committed, tmp_path):
  (committed / "trials.npz").unlink()
  edit(committed, lambda record: record["claims"][0].update(sentence="as | it\nwas", verdict="undecided"))
  before = (committed / "record.json").read_bytes()
  assert report.report() == []
  assert (committed / "record.json").read_bytes() == before
  assert r"as \| it was" in (tmp_path / "LEDGER.md").read_text()


def test_what_is_no_number_is_shown(committed, tmp_path):
  (committed / "trials.npz").unlink()
  values = [float("nan"), float("inf")]
  edit(committed, lambda record: record["claims"][0].update(values=values, mean=values[0], interval=values))
  text = (committed / "record.json").read_text()
  assert "NaN" not in text and "Infinity" not in text
  assert report.report() == []
  assert "not a number [not a number, inf] | not a number, inf |" in (tmp_path / "LEDGER.md").read_text()


def test_a_record_of_another_preset_stands_beside(committed, tmp_path):
  other = shutil.copytree(committed, committed.parent / "paper")
  (other / "trials.npz").unlink()
  edit(other, lambda record: record.update(preset="paper"))
  assert report.report() == []
  assert "1 reproduced; paper: 1 reproduced" in (tmp_path / "README.md").read_text()
  assert (tmp_path / "LEDGER.md").read_text().count("### Preset") == 2


def test_the_committed_ledger_is_what_report_makes(tmp_path, monkeypatch):
  expected_ledger, expected_readme = report.LEDGER.read_text(), report.README.read_text()
  results = shutil.copytree(records.RESULTS, tmp_path / "results")
  recorded = {path: path.read_bytes() for path in results.rglob("*.json")}
  monkeypatch.setattr(records, "RESULTS", results)
  monkeypatch.setattr(report, "LEDGER", tmp_path / "LEDGER.md")
  monkeypatch.setattr(report, "README", tmp_path / "README.md")
  (tmp_path / "README.md").write_text(expected_readme)
  began = time.perf_counter()
  assert report.report() == []
  print(f"report: {time.perf_counter() - began:.1f} s")
  assert (tmp_path / "LEDGER.md").read_text() == expected_ledger
  assert (tmp_path / "README.md").read_text() == expected_readme
  assert {path: path.read_bytes() for path in results.rglob("*.json")} == recorded


def test_what_follows_from_a_table_has_ten_significant_digits(tmp_path):
  values = [1 / 3, {"a": 1e-7 / 3}, 5.0, 2**40 + 1, None]
  assert records.rounded(values) == [0.3333333333, {"a": 3.333333333e-08}, 5.0, 2**40 + 1, None]
  settings = {"rate": 0.1234567890123456}  # compared, and so kept as they are
  records.write(tmp_path / "config.json", settings)
  assert json.loads((tmp_path / "config.json").read_text()) == settings


def test_strict_json():
  value = records.strict({"a": (np.float32("nan"), float("inf"), np.int64(3), np.array([1.5]), True, None, {1: set()})})
  assert value == {"a": [None, "inf", 3, [1.5], True, None, {"1": "set()"}]}
