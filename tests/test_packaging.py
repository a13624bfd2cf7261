"""What a wheel and a source distribution hold."""

import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parent.parent


def test_the_wheel_holds_jaxreg_and_nothing_else():
  """A top-level package `experiments` would collide with the users' own."""
  settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
  assert settings["packages"]["find"]["include"] == ["jaxreg*"]
  assert {"py.typed", "references.bib"} <= set(settings["package-data"]["jaxreg"])


def test_the_source_distribution_holds_the_tests_with_their_data():
  listed = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").split("\n")
  assert {"graft tests", "graft experiments", "graft docs", "graft constraints"} <= set(listed)
