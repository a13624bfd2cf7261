"""Packages that only some functions need: how their absence is said."""

import contextlib
from collections.abc import Iterator

__all__ = ["extra_needed"]


@contextlib.contextmanager
def extra_needed(extra: str, by: str) -> Iterator[None]:
  """Around imports of packages that come with an extra of jaxreg: says which, where one is missing.

  >>> with extra_needed("data", "digits"):
  ...   import no_such_package
  Traceback (most recent call last):
  ...
  ImportError: digits needs no_such_package, run pip install 'jaxreg[data]' (No module named 'no_such_package').

  Args:
    extra: the extra's name in pyproject.toml.
    by: what needs it, for the message.

  Raises:
    ImportError: in place of the one that an import raised.

  Reference: none.
  """
  try:
    yield
  except ImportError as error:
    package = (error.name or "a package").partition(".")[0]
    message = f"{by} needs {package}, run pip install 'jaxreg[{extra}]' ({error})."
    raise ImportError(message, name=error.name) from error
