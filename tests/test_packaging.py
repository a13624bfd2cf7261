"""What a wheel and a source distribution hold."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def test_the_wheel_holds_jaxreg_and_nothing_else():
  """A top-level package `experiments` would collide with the users' own."""
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
  assert settings["packages"]["find"]["include"] == ["jaxreg*"]
  assert {"py.typed", "references.bib"} <= set(settings["package-data"]["jaxreg"])


def test_the_source_distribution_holds_the_tests_with_their_data():
  listed = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").split("\n")
  assert {"graft tests", "graft experiments", "graft docs", "graft constraints"} <= set(listed)


# Distributions that no import in the repository names, and why they are declared.
NOT_IMPORTED = {
  "importlib-resources": "imported by tensorflow-datasets, which does not declare it",
  "ipykernel": "runs notebooks",
  "jupyterlab": "shows notebooks",
  "pyright": "a command",
  "pytest-xdist": "a plugin of pytest",
  "ruff": "a command",
}
# Top-level modules whose names are not their distributions', for packages that may not be installed too.
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl-py", "aqt": "aqtp", "orbax": "orbax-checkpoint", "ott": "ott-jax",
                 "sklearn": "scikit-learn"}  # fmt: skip
OWN = {"jaxreg", "experiments", "tests", "notebooks"}


def declared() -> dict[str, set[str]]:
  """The distributions that each extra brings, those of extras in it included; `""` for what is always there."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  name = lambda text: re.match(r"[\w.-]+", text).group().lower().replace("_", "-")

  def expand(texts) -> set[str]:
    found = set()
    for text in texts:
      within = re.match(r"jaxreg\[(.*)\]$", text)
      for extra in within.group(1).split(",") if within else ():
        found |= expand(project["optional-dependencies"][extra])
      found |= set() if within else {name(text)}
    return found

  lists = {"": project["dependencies"], **project["optional-dependencies"]}
  return {extra: expand(texts) for extra, texts in lists.items()}


def third_party_imports(path):
  """(distribution, extra named around the import, place) of every import that is neither Python's nor our own."""

  def visit(node, extra):
    if isinstance(node, ast.With):
      calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
      for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id == "extra_needed":
          extra = call.args[0].value
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module] if not node.level else []
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "pytest.importorskip"):
      names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
    for name in names:
      top = name.split(".")[0]
      if top not in sys.stdlib_module_names | OWN:
        yield DISTRIBUTIONS.get(top, top).lower().replace("_", "-"), extra, f"{path.relative_to(ROOT)}:{node.lineno}"
    for child in ast.iter_child_nodes(node):
      yield from visit(child, extra)

  yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


def imports_of(part: str):
  return [found for path in sorted((ROOT / part).rglob("*.py")) for found in third_party_imports(path)]


def test_names_of_distributions():
  """The table above agrees with what is installed."""
  installed = importlib.metadata.packages_distributions()
  for part in OWN:
    for distribution, _, place in imports_of(part):
      module = {name: top for top, name in DISTRIBUTIONS.items()}.get(distribution, distribution.replace("-", "_"))
      if module in installed:
        assert distribution in {name.lower().replace("_", "-") for name in installed[module]}, place


def test_jaxreg_imports_what_it_declares():
  """What only an extra brings is imported under `extra_needed`, which tells a user without it what to install."""
  brings = declared()
  for distribution, extra, place in imports_of("jaxreg"):
    assert extra in brings, f"{place}: there is no extra {extra!r}"
    assert distribution in brings[""] | brings[extra], f"{place}: {distribution} is not in the extra {extra!r}"


@pytest.mark.parametrize(
  "part, extra",
  [
    ("experiments", "experiments"),
    ("experiments/benchmarks", "benchmarks"),
    ("tests", "test"),
    ("notebooks", "notebooks"),
  ],
)
def test_the_other_parts_import_what_they_declare(part, extra):
  available = declared()[""] | declared()[extra]
  for distribution, _, place in imports_of(part):
    if extra == "experiments" and place.startswith("experiments/benchmarks/"):
      continue
    assert distribution in available, f"{place}: {distribution} is not in the extra {extra!r}"


def test_what_is_declared_is_imported():
  """Of each list by the part that it is for; NumPy, for instance, is not left to come with something else."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
  parts = dict.fromkeys(("", "data", "quantization", "solvers", "training"), "jaxreg")
  parts |= {extra: extra for extra in ("experiments", "notebooks")}
  parts |= {"benchmarks": "experiments/benchmarks", "test": "tests"}
  assert set(parts) == set(declared()) - {"cuda13", "tpu"}
  for extra, part in parts.items():
    imported = {distribution for distribution, *_ in imports_of(part)} | set(NOT_IMPORTED)
    for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
      name = re.match(r"[\w.-]+", text).group().lower().replace("_", "-")
      assert name in imported | {"jaxreg"}, f"{name} is declared for {extra or 'all'} and not imported in {part}"


def test_constraints_pin_what_the_tests_need():
  for path in sorted((ROOT / "constraints").glob("*.txt")):
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in path.read_text().split()}
    assert declared()[""] | declared()["test"] <= pinned, path.name
