"""What the readers of data sets raise."""

__all__ = ["MissingDataError"]


class MissingDataError(FileNotFoundError):
  """A data set is not on this machine; the message names the command that prepares it."""
