"""The notebooks run from top to bottom, and what is committed with outputs is their text of today."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.name != "build.py"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_from_top_to_bottom(name, tmp_path):
  environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parent)}
  command = [sys.executable, str(FOLDER / f"{name}.py")]
  done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180)
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_belong_to_the_text(name):
  cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
  text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
  sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
  blocks = [block.strip() for block in text.split("\n# %%\n")[1:]]
  assert [block.split("\n\n# %% [markdown]")[0].strip() for block in blocks] == sources, "run notebooks/build.py"
  outputs = [output for cell in cells for output in cell.get("outputs", ())]
  assert not [output for output in outputs if output["output_type"] == "error"]
  assert any("image/png" in output.get("data", {}) for output in outputs)
