"""What a type checker and an editor see: every name, array-likes, and the guides' examples without an error."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import pytest

import jaxreg

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
  page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in page.read_text()
]
ROOMS = sorted(set(jaxreg.__all__) - {"__version__", "citation"})

CALLS = """
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg
from jaxreg import adversarial, data, kernels, layers, losses, metrics, regularizers, solvers, training, transforms

logits, labels = np.ones((2, 3), np.float32), np.array([0, 2])
jaxreg.losses.comp_sum_loss(logits, labels, tau=np.float32(1)).mean()
losses.comp_sum_loss(jnp.ones((2, 3)), labels, tau=jnp.ones(()), where=np.ones(3, bool)).mean()
losses.binary_focal_loss(0.3, 1, gamma=2).mean()
values, state = losses.elr_loss(logits, labels, np.arange(2), state=losses.elr_init(2, 3), weight=3)
state.targets.sum()
metrics.top_k_accuracy(logits, labels, k=2).item()
kernels.fully_connected(logits, depth=1, dual=kernels.relu_dual()).ntk.sum()
solvers.sparse_simplex_projection(logits, k=2).sum()
solvers.solve_with_cost
adversarial.fgsm(lambda x: jnp.sum(x, -1), logits, radius=0.1, bounds=(0, np.float32(1))).sum()
noisy = data.symmetric_noise(jax.random.key(0), labels, rate=np.float32(0.2), num_classes=3)
data.class_map_noise(jax.random.key(0), noisy, rate=0.5, mapping=(1, 2, 0))
data.class_map_noise(jax.random.key(0), noisy, rate=0.5, mapping=np.arange(3))
train, test = data.split({"x": logits}, sizes=(1, 1))
data.array_stream(train, batch_size=1, seed=0)
optax.chain(transforms.penalize(lambda params: jnp.sum(params["w"]), np.float32(0.1)), optax.sgd(0.1))
points = training.grid(a=np.linspace(0, 1, 3), b=(1, 2), c=[True])
citation: str = jaxreg.citation(losses.elr_loss)
"""
WRONG = ("jaxreg.lossess", "jaxreg.losses.no_such_loss", "jaxreg.solvers.no_such_solver")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """Pyright's findings in all of it, by file: [(line, message)]."""
  folder = tmp_path_factory.mktemp("typed")
  write = lambda name, text: (folder / f"{name}.py").write_text(text, encoding="utf-8")
  for page in PAGES:
    write(page.stem, "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)))
  write("calls", CALLS)
  names = [f"jaxreg.{room}.{name}" for room in ROOMS for name in importlib.import_module(f"jaxreg.{room}").__all__]
  write("names", "\n".join(["import jaxreg", *(f"reveal_type({name})" for name in names)]))
  write("wrong", "\n".join(["import jaxreg", *WRONG]))
  # Expressions that stand alone are this test's, not a fault; the rest is pyright's own setting.
  settings = {"include": ["."], "extraPaths": [str(ROOT)], "reportUnusedExpression": False}
  (folder / "pyrightconfig.json").write_text(json.dumps(settings))
  command = [sys.executable, "-m", "pyright", "--project", str(folder), "--pythonpath", sys.executable, "--outputjson"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode in (0, 1), done.stderr + done.stdout
  result = json.loads(done.stdout)
  assert result["summary"]["filesAnalyzed"] == len(PAGES) + 3
  found = {}
  for finding in result["generalDiagnostics"]:
    line = finding["range"]["start"]["line"] + 1
    found.setdefault(pathlib.Path(finding["file"]).stem, []).append((line, finding["severity"], finding["message"]))
  return found


@pytest.mark.parametrize("page", [page.stem for page in PAGES])
def test_examples_have_no_type_errors(report, page):
  assert report.get(page, []) == []


def test_calls_with_what_the_functions_accept(report):
  assert report.get("calls", []) == []


def test_every_public_name_has_a_type(report):
  revealed = report["names"]
  assert len(revealed) > 400 and {severity for _, severity, _ in revealed} == {"information"}
  unknown = [message for _, _, message in revealed if re.search(r'is "(Any|Unknown|ModuleType)', message)]
  assert not unknown


def test_misspelt_names_are_noticed(report):
  assert [line for line, severity, _ in report["wrong"] if severity == "error"] == [2, 3, 4]
