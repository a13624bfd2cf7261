"""Polynomials."""

__all__ = []


def horner(x, coefficients):
  """The polynomial with these coefficients, the constant first."""
  total = coefficients[-1]
  for coefficient in coefficients[-2::-1]:
    total = total * x + coefficient
  return total
