"""Citations: every public ingredient has one, and they are found through transformations and wrappers."""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import optax
import pytest

import jaxreg.losses
from jaxreg.losses.comp_sum import generalized_cross_entropy_loss
from jaxreg.losses.early_learning import elr_init
from jaxreg.losses.label_dro import ldr_kl_loss
from jaxreg.models import MLP
from jaxreg.regularizers.group_sparsity import group_lasso
from jaxreg.transforms import orthogonalize_gradients, penalize, proximal

# The function and its table live in one module, whatever its name.
citation = jaxreg.citation
table = inspect.getmodule(citation)
ROOMS = (
  "adversarial",
  "denoising",
  "kernels",
  "layers",
  "losses",
  "metrics",
  "models",
  "pruning",
  "quantization",
  "regularizers",
  "solvers",
  "transforms",
)


def cited(*objects) -> list[str]:
  return re.findall(r"^@\w+\{(\w+),", citation(*objects), flags=re.MULTILINE)


def public_functions():
  modules = [f"jaxreg.{room}.{m.name}" for room in ROOMS for m in pkgutil.iter_modules(_room(room).__path__)]
  for module in map(
    importlib.import_module, [*modules, "jaxreg.data.aggregation", "jaxreg.data.mixing", "jaxreg.data.noise"]
  ):
    for name in module.__all__:
      if callable(getattr(module, name)):
        yield getattr(module, name)


def _room(room):
  return importlib.import_module(f"jaxreg.{room}")


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_every_public_ingredient_has_references_or_explicitly_none(function):
  name = f"{function.__module__}.{function.__qualname__}"
  assert name in table.REFERENCES or function.__module__ in table.REFERENCES, "add it to REFERENCES"
  said = re.search(r"Reference: (?!none)(\w+)", inspect.getdoc(function) or "")
  if said and said[1] != "the":
    assert said[1] in citation(function), f"the docstring refers to {said[1]}, the citation does not"


def test_table_names_what_exists_and_every_entry_is_used():
  used = {"jaxreg"}
  for name, keys in table.REFERENCES.items():
    used.update(keys)
    module, _, attribute = name.rpartition(".")
    if importlib.util.find_spec(module).submodule_search_locations is None:
      assert hasattr(importlib.import_module(module), attribute), name
    else:
      importlib.import_module(name)
  assert used == set(table._entries())


def test_functions_modules_rooms_and_states():
  assert cited() == ["jaxreg"]
  assert cited(ldr_kl_loss) == ["jaxreg", "zhu2023label"]
  assert cited(generalized_cross_entropy_loss) == ["jaxreg", "zhang2018generalized", "mao2023crossentropy"]
  assert cited(importlib.import_module("jaxreg.losses.label_dro"), ldr_kl_loss) == ["jaxreg", "zhu2023label"]
  assert {"zhu2023label", "liu2020early", "ma2020normalized"} <= set(cited(jaxreg.losses))
  assert cited(elr_init(3, 2)) == ["jaxreg", "liu2020early"]
  assert cited(MLP((3,)), MLP) == ["jaxreg"]


def test_wrapped_functions():
  assert cited(functools.partial(ldr_kl_loss, temperature=2.0)) == ["jaxreg", "zhu2023label"]
  assert cited(jax.jit(ldr_kl_loss)) == ["jaxreg", "zhu2023label"]


def test_transformations_in_a_chain():
  ridge = functools.partial(group_lasso, groups=None)
  chain = optax.chain(orthogonalize_gradients(), optax.masked(penalize(ridge, 0.1), True), optax.adam(0.1))
  assert set(cited(chain)) == {"jaxreg", "prieto2025grokking", "loshchilov2019decoupled", "yuan2006model"}
  assert "parikh2014proximal" in cited(proximal(lambda x, step: x, 0.1))


def test_entries_are_whole():
  text = citation(*(importlib.import_module(f"jaxreg.{room}") for room in (*ROOMS, "data")))
  assert text.count("{") == text.count("}")
  entries = text.split("\n\n")
  assert len(entries) == len(set(entries)) == len(table._entries())
  for entry in entries:
    assert re.fullmatch(r"@\w+\{\w+,\n(  \w+ = \{.+\},\n)+\}", entry)


def test_file_is_sorted_and_has_every_key_once():
  text = (pathlib.Path(jaxreg.__file__).parent / "references.bib").read_text()
  keys = re.findall(r"^@\w+\{(\w+),$", text, flags=re.MULTILINE)
  assert keys == sorted(set(keys)) == list(table._entries())


@pytest.mark.parametrize("stranger", [optax.sgd(0.1), jax, len, 3, "ldr", lambda x: x])
def test_strangers_are_refused(stranger):
  with pytest.raises(ValueError, match="objects must be"):
    citation(stranger)
