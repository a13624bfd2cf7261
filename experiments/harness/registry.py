"""Finds recipes by reading their source, so that listing them imports nothing; imports one by name.

A recipe is a module of this package that defines `PRESETS`, a dict from names to frozen dataclasses, and

- `build(config) -> Task`, `points(config) -> dict`: what `run` trains and `sweep` varies;
- `run_options(config) -> dict`: `steps`, `log_every`, `eval_every` of one run;
- `CARD`, `measure(config, seeds) -> dict`, `CLAIMS`, `figure(measurements, path)`: what `verify` does.
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
  """What the source of a recipe says: its name and module, the first line of its docstring, its card and presets."""

  name: str
  module: str
  title: str
  card: str
  presets: tuple[str, ...]


class UnknownName(ValueError):
  """A name that does not exist, with the nearest one suggested."""

  def __init__(self, kind: str, name: str, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
    super().__init__(f"unknown {kind} {name!r}; {hint}")


def entries() -> dict[str, Entry]:
  """All recipes by name, in alphabetical order."""
  found = (_read(path) for package in PACKAGES for path in sorted((ROOT / package).glob("*.py")))
  return {entry.name: entry for entry in sorted(filter(None, found))}


def recipe(name: str) -> types.ModuleType:
  """Imports a recipe; raises UnknownName if there is none."""
  known = entries()
  if name not in known:
    raise UnknownName("recipe", name, list(known))
  return importlib.import_module(known[name].module)


def preset(module: types.ModuleType, name: str):
  """A recipe's configuration by preset name; raises UnknownName if there is none."""
  if name not in module.PRESETS:
    raise UnknownName("preset", name, list(module.PRESETS))
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
  )
