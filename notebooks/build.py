"""Runs the notebooks and keeps their outputs: `python notebooks/build.py [NAME…]` makes NAME.ipynb from NAME.py.

The text is the source; edit that. Needs the `notebooks` extra.
"""

import os
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent


def build(path: pathlib.Path) -> None:
  """Executes one notebook from top to bottom and writes it beside its text."""
  import jupytext
  import nbclient
  import nbformat

  notebook = jupytext.read(path)
  for index, cell in enumerate(notebook.cells):
    cell["id"] = f"{path.stem}-{index}"[-64:].replace("_", "-")  # the same at every run, for readable diffs
  resources = {"metadata": {"path": FOLDER}}
  nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
  for cell in notebook.cells:
    cell.metadata.pop("execution", None)  # times of day
  nbformat.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
  os.environ["PYTHONPATH"] = str(FOLDER.parent)
  chosen = sys.argv[1:] or [path.stem for path in sorted(FOLDER.glob("*.py")) if path.name != "build.py"]
  for name in chosen:
    build(FOLDER / f"{name}.py")
    print(FOLDER / f"{name}.ipynb")
