"""The README's example runs as it stands there."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_example_of_a_loop_of_ones_own():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
  names = {}
  exec(code, names)
  rng = np.random.default_rng(0)
  batch = {"x": jnp.asarray(rng.normal(size=(8, 64))), "y": jnp.arange(8) % 10, "id": jnp.arange(8) * 3}
  carry = names["params"], names["opt_state"], names["state"]
  for _ in range(3):
    carry = names["step"](*carry, batch)
  assert jnp.isfinite(carry[0]["w"]).all()
  assert int((carry[2].targets.sum(-1) > 0).sum()) == 8


def test_flags_of_the_commands_exist():
  """Every `--flag` that the README names is one of the command line's."""
  source = (README.parent / "experiments" / "harness" / "options.py").read_text(encoding="utf-8")
  for flag in set(re.findall(r"--([a-z_.]+)", README.read_text(encoding="utf-8").replace("--xla_gpu", ""))) - {
    "_deterministic_ops"
  }:
    assert flag.split(".")[-1].replace("-", "_") in source, flag
