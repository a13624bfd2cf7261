"""Quantized residual networks."""

import pytest

from experiments.papers import quantized_resnet
from experiments.problems import quantized_networks
from jaxreg.data import MissingDataError
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("quantized_resnet", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("quantized_resnet", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("quantized_resnet")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("quantized_resnet", tmp_path)


def test_missing_fashion_mnist_is_an_error(monkeypatch):
  """Another data set never stands in for it; MNIST is a preset of its own."""

  def missing():
    raise MissingDataError("Fashion-MNIST is not here.")

  monkeypatch.setattr(quantized_networks, "fashion_mnist", missing)
  quantized_networks._splits.cache_clear()
  with pytest.raises(MissingDataError, match="Fashion-MNIST"):
    quantized_resnet.cells(quantized_resnet.PRESETS["cpu"], [0])
  config = quantized_resnet.PRESETS["mnist"]
  train, test = quantized_networks._splits(config.resnet)
  assert (len(train["y"]), len(test["y"])) == (config.resnet.train, config.resnet.test)
  assert any("MNIST" in claim.measured for claim in quantized_resnet.claims(config))
  assert not any("Fashion" in claim.measured for claim in quantized_resnet.claims(config))
