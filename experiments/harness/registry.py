"""Finds recipes by reading their source, so that listing them imports nothing; imports one by name.

A recipe is a module in `papers/` or `studies/`, or anywhere else by its module path, that defines

- `PRESETS`: names to frozen dataclasses, and `CARD` if it belongs to a paper;
- `cell(config) -> Cell`: what `run` trains and `sweep` varies;
- for `verify`: `cells(config, seeds) -> {name: Cell}` or `measure(config, seeds, trained) -> {name: [seeds, ...]}`, or
  both; `summary(config, trials) -> {name: [seeds, ...]}`, by default what was measured; `claims(config)`;
  `figure(config, summary, path)`; and perhaps `table(config, summary)`, `tables(config, summary)` by title,
  `DEVIATIONS`, `NOTES` or `notes(config)`.
"""

import ast
import difflib
import importlib
import pathlib
import types
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("papers", "studies")


class Entry(NamedTuple):
  """What a recipe's source says: name, module, the first line of its docstring, card, presets, if it states claims."""

  name: str
  module: str
  title: str
  card: str
  presets: tuple[str, ...]
  claims: bool


class UnknownName(ValueError):
  """A name that does not exist, with the nearest one suggested."""

  def __init__(self, kind: str, name: str, known, *, of: str = ""):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
    super().__init__(f"unknown {kind} {name!r}{of and ' of '}{of}; {hint}")


def entries() -> dict[str, Entry]:
  """All recipes by name, in alphabetical order."""
  found = (_read(path) for package in PACKAGES for path in sorted((ROOT / package).glob("*.py")))
  return {entry.name: entry for entry in sorted(filter(None, found))}


def recipe(name: str) -> types.ModuleType:
  """Imports a recipe by its name, or by a module path with a dot; raises UnknownName if there is none."""
  if "." in name:
    return _import(name)
  known = entries()
  if name not in known:
    raise UnknownName("recipe", name, list(known))
  return importlib.import_module(known[name].module)


def _import(path: str) -> types.ModuleType:
  try:
    module = importlib.import_module(path)
  except ModuleNotFoundError as error:
    if error.name and path.startswith(error.name):
      raise ValueError(f"there is no module {path}: {error}; PYTHONPATH says where Python looks.") from None
    raise
  missing = [part for part in ("PRESETS", "cell") if not hasattr(module, part)]
  if missing:
    raise ValueError(f"{path} is not a recipe: it does not define {' and '.join(missing)}.")
  return module


def preset(module: types.ModuleType, name: str):
  """A recipe's configuration by preset name; raises UnknownName if there is none."""
  if name not in module.PRESETS:
    raise UnknownName("preset", name, list(module.PRESETS), of=module.__name__.removeprefix("experiments.papers."))
  return module.PRESETS[name]


def _read(path: pathlib.Path) -> Entry | None:
  tree = ast.parse(path.read_text(encoding="utf-8"))
  values = {}
  for node in tree.body:
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if isinstance(target, ast.Name):
      values[target.id] = node.value
  presets = values.get("PRESETS")
  if not isinstance(presets, ast.Dict):
    return None
  card = values.get("CARD")
  return Entry(
    name=path.stem,
    module=f"experiments.{path.parent.name}.{path.stem}",
    title=(ast.get_docstring(tree) or "").split("\n")[0].rstrip("."),
    card=card.value if isinstance(card, ast.Constant) else "",
    presets=tuple(key.value for key in presets.keys if isinstance(key, ast.Constant)),
    claims=any(isinstance(node, ast.FunctionDef) and node.name == "claims" for node in tree.body),
  )
