"""The rooms have an order: whatever a room imports of jaxreg is in it, beside it or below it, and never above."""

import ast
import importlib
import pathlib

import pytest

import jaxreg

# Bottom to top. Within a level a room may import another, as long as no two import each other, directly or around.
LEVELS = (
  {"checks", "extras"},
  {"data", "metrics"},
  {"losses", "kernels", "adversarial", "solvers"},
  {"regularizers", "denoising"},
  {"layers", "quantization", "pruning"},
  {"transforms", "models"},
  {"training"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PACKAGE = pathlib.Path(jaxreg.__file__).parent
TESTS = pathlib.Path(__file__).parent


def imported_rooms(path: pathlib.Path):
  """(room, line) of every import of jaxreg in a file, those inside functions among them."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}:{node.lineno} imports relatively"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    for name in names:
      if name.split(".")[0] == "jaxreg":
        yield (*name.split("."), "")[1], node.lineno


def imports_of(room: str) -> dict[str, str]:
  """The other rooms that a room imports, with a place where it does."""
  found = {}
  for path in sorted((PACKAGE / room).rglob("*.py")):
    for other, line in imported_rooms(path):
      found.setdefault(other, f"{path.relative_to(PACKAGE)}:{line}")
  found.pop(room, None)
  return found


ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_every_room_has_its_level():
  assert set(ROOMS) == set(LEVEL) - LEVELS[0] == set(jaxreg.__all__) - {"__version__", "citation"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_upwards(room):
  upwards = {other: place for other, place in imports_of(room).items() if LEVEL.get(other, 99) > LEVEL[room]}
  assert not upwards, "move down what both rooms need"


def test_no_rooms_import_each_other():
  left = {room: set(imports_of(room)) & set(ROOMS) for room in ROOMS}
  while free := [room for room, others in left.items() if not others & set(left)]:
    for room in free:
      del left[room]
  assert not left, "these rooms import each other in a circle"


@pytest.mark.parametrize("room", ROOMS)
def test_tests_mirror_the_room(room):
  tested = {path.stem.removeprefix("test_") for path in (TESTS / room).glob("test_*.py")}
  modules = {path.stem for path in (PACKAGE / room).glob("*.py")}
  assert room == "training" or tested <= modules, "move or rename the tests of a module with it"


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_hides_a_module(room):
  """`import jaxreg.losses.stablemax as module` gives the module."""
  package = importlib.import_module(f"jaxreg.{room}")
  for path in sorted((PACKAGE / room).glob("[a-z]*.py")):
    assert getattr(package, path.stem, None) in (None, importlib.import_module(f"jaxreg.{room}.{path.stem}"))
