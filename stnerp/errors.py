"""Every error a user can meet, in one small hierarchy.

A message names the file or argument, says what is wrong and what to do about it.
"""


class StnerpError(Exception):
    """Base class: catch this to catch everything that stnerp raises on purpose."""


class InputError(StnerpError, ValueError):
    """A file, an image or an argument can't be used as given."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that was named does not exist or can't be read."""


class FitError(StnerpError, RuntimeError):
    """A fit could not go on (a loss that is not a number, say)."""


class MissingDependencyError(StnerpError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""
