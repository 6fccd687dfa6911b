"""Every error a user can meet, in one small hierarchy.

A message names the file or argument, says what is wrong and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class StnerpError(Exception):
    """Base class: catch this to catch everything that stnerp raises on purpose."""


class InputError(StnerpError, ValueError):
    """A file, an image or an argument can't be used as given."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that was named does not exist or can't be read."""


class MissingContoursError(InputError):
    """Contours that were named are drawn on no scan.

    Attributes:
        absent: names that were asked for.
        there: names of those that are drawn.
    """

    def __init__(self, message: str, absent: Sequence[str] = (), there: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.absent, self.there = tuple(absent), tuple(there)


class FitError(StnerpError, RuntimeError):
    """A fit could not go on (a loss that is not a number, say)."""


class MissingDependencyError(StnerpError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""
