"""What the numbers of a verification depend on: recipe, preset, configuration, seeds, versions, code that trains."""

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import platform

from experiments.harness import records, registry
from jaxreg.training.identity import differences, settings

__all__ = ["code", "differences", "identity", "same_config", "short_hash"]

PACKAGES = ("jaxreg", "jax", "jaxlib", "flax", "optax")
ENTRANCES = ("cell", "cells", "measure")


def identity(recipe, name: str, preset: str, config, seeds) -> dict:
  """All that a table of trials depends on, as JSON reads it back."""
  return _as_json(
    {
      "recipe": name,
      "preset": preset,
      "config": dataclasses.asdict(config),
      "seeds": list(seeds),
      "versions": versions(),
      "settings": settings(),
      "code": code(recipe),
    }
  )


def versions() -> dict[str, str]:
  """Versions of the packages that compute, and of Python."""
  return {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}


def code(recipe) -> str:
  """A hash of what trains: jaxreg, the problems, and of the recipe what its cells and `measure` reach.

  Claims, figures and notes of a recipe may change without making its trials another experiment's.
  """
  import jaxreg

  folders = [pathlib.Path(jaxreg.__file__).parent, registry.ROOT / "problems"]
  digest = hashlib.sha256(_training_source(pathlib.Path(recipe.__file__)).encode())
  for path in [path for folder in folders for path in sorted(folder.rglob("*.py"))]:
    digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def same_config(record: dict, config) -> list[tuple[str, object, object]]:
  """Where a record's configuration differs from the one that its preset has now."""
  return differences({"config": record["config"]}, _as_json({"config": dataclasses.asdict(config)}))


def short_hash(*parts) -> str:
  """Eight hexadecimal digits that distinguish settings."""
  return hashlib.sha256(json.dumps(_as_json(list(parts)), sort_keys=True).encode()).hexdigest()[:8]


def _as_json(value):
  return json.loads(json.dumps(records.strict(value)))


def _training_source(path: pathlib.Path) -> str:
  """The definitions of a module that its entrances reach by name, and what it does when imported."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  known, always = {}, []
  for node in tree.body:
    names = _defined(node)
    known |= dict.fromkeys(names, node)
    if not names and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
      always.append(node)
  reached, waiting = {}, [*ENTRANCES, *(name for node in always for name in _used(node))]
  while waiting:
    name = waiting.pop()
    if name in known and name not in reached:
      reached[name] = ast.unparse(known[name])
      waiting += _used(known[name])
  return "\n".join([*map(ast.unparse, always), *(reached[name] for name in sorted(reached))])


def _defined(node) -> list[str]:
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    return [node.name]
  if isinstance(node, ast.Import | ast.ImportFrom):
    return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
  if isinstance(node, ast.Assign | ast.AnnAssign):
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
  return []


def _used(node) -> list[str]:
  return [name.id for name in ast.walk(node) if isinstance(name, ast.Name)]
