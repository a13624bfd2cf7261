"""Names that become files or folders."""

import pathlib

__all__ = ["check_file_name"]


def check_file_name(argument: str, name) -> None:
  """Raises ValueError unless a name stays where it is put: one part of a path, on any system.

  >>> check_file_name("name", "cifar10")
  >>> check_file_name("name", "../cifar10")
  Traceback (most recent call last):
  ...
  ValueError: name must be the name of a file or folder, without path parts, got '../cifar10'.

  Args:
    argument: the argument's name, for the message.
    name: what is to become a file's or folder's name.

  Raises:
    ValueError: when it is not text, is empty, `.` or `..`, or has a separator, a drive or a zero byte.

  Reference: none.
  """
  parts = (pathlib.PurePosixPath, pathlib.PureWindowsPath)
  whole = isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name
  if not whole or any(part(name).name != name for part in parts):
    raise ValueError(f"{argument} must be the name of a file or folder, without path parts, got {name!r}.")
