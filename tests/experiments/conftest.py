"""Set-up of the recipes' tests: a folder of their own, and engines that are not compared."""

import importlib

import pytest


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # this process has its devices already
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # and its cache


@pytest.fixture(autouse=True)
def engines_are_not_compared(monkeypatch):
  """Comparing the engines compiles every sweep twice; tests/training/test_sweep.py tests that it is done."""
  monkeypatch.setattr(importlib.import_module("jaxreg.training.sweeping"), "_engine_by_rule", lambda *_: "map")
