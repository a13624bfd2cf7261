"""The guides' examples run as they stand there, each page from top to bottom."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = {}
  for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
    exec(compile(code, str(page), "exec"), names)


def test_guarantees_name_the_tests_that_hold_them():
  """Every row of the page's tables, and the tests are there."""
  page = (DOCS / "guarantees.md").read_text(encoding="utf-8")
  rows = [line for line in page.split("\n") if line.startswith("| ") and not line.startswith(("| promise", "| ---"))]
  assert len(rows) > 40
  for row in rows:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row)
    assert named, row
    for path, test in named:
      source = (pathlib.Path(__file__).parent / path).read_text(encoding="utf-8")
      assert re.search(rf"^def {test}\(", source, flags=re.M), f"{path}::{test}"
