"""Whole networks that several recipes need."""

from jaxreg.models.mlp import MLP

__all__ = ["MLP"]
