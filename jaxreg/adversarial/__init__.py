"""Attacks and robustness: pure functions that take the model's apply function."""

from jaxreg.adversarial.attacks import fgsm, pgd

__all__ = [
  "fgsm",
  "pgd",
]
