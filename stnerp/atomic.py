"""A file is written whole or not at all: beside its place first, on the disk, then into its place.

A process that is killed, a full disk or a power cut leaves the file that was there before, or none; never half
of one.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stnerp.errors import InputError


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A path beside `path`, of the same endings, to write a file to. It takes the place of `path` when the block
    ends; if the block raises, it is removed and `path` stays as it was.

    What killed processes left of earlier writes of this file is removed.

    Args:
        path: of the file; its folder must exist. Whether it may be replaced is for the caller to decide.
        suffix: how the path to write to ends, in place of as many letters of `path`'s: ITK goes by endings, and
            of a.MHA it makes two files of other names, of a.Nii none.

    Raises:
        InputError: an OSError within the block, the disk is full say.
    """
    beside = path.with_name(path.name[: len(path.name) - len(suffix)] + suffix)
    remove_partial(beside)
    partial = path.with_name(f".{os.getpid()}.{beside.name}")
    try:
        yield partial
        # The contents must be on the disk before the name: after a power cut, a file that has its name is whole.
        _to_disk(partial)
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # some file systems don't do this, nor does Windows
            _to_disk(path.parent, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error}); choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove what processes that run no more left of unfinished writes of a file."""
    for partial in path.parent.glob(f".*.{glob.escape(path.name)}"):
        writer = partial.name[1:].partition(".")[0]
        if writer.isdecimal() and partial.name == f".{writer}.{path.name}" and not _runs(int(writer)):
            with contextlib.suppress(OSError):
                partial.unlink()


def _to_disk(path: Path, flags: int = os.O_RDWR) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _runs(process: int) -> bool:
    if os.name == "nt":  # there, a signal of 0 ends the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        return True
    return True
