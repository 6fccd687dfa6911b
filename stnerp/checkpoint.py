"""One file for a network and all it needs: written all at once or not at all, read without running code."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stnerp.atomic import replacing
from stnerp.errors import InputError, MissingFileError, StnerpError

FORMAT = 1
#: From a released format to the one after it: takes the content of a file, returns it in the next format.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def write_checkpoint(path: Path, kind: str, content: dict[str, Any], overwrite: bool = False) -> Path:
    """Write plain values and tensors; an existing file is replaced only if asked, by a complete new one.

    Raises:
        InputError: the file exists and `overwrite` is False, or the folder can't be written to.
    """
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; choose another name or pass overwrite=True")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another folder") from error
    with replacing(path) as partial:
        try:
            torch.save({"format": FORMAT, "kind": kind, **content}, partial)
        except RuntimeError as error:  # torch's own word for a write that fails
            raise OSError("is the disk full?") from error
    return path


def read_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """What `write_checkpoint` wrote, in the format of today; tensors on the CPU.

    Raises:
        MissingFileError: no such file.
        InputError: a damaged file, one of another kind, or one of a newer or an unknown format.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected a {kind}")
    try:
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:  # torch doesn't look at checksums
                raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no set: what a damaged file raises depends on where it is damaged
        raise InputError(f"{path}: can't be read as a {kind}; the file is damaged or something else") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise InputError(f"{path}: is not a {kind}; give the file that stnerp saved")
    written = content.get("format")
    if type(written) is not int:
        raise InputError(f"{path}: states no format that is known ({written!r}); give the file that stnerp saved")
    if written > FORMAT:
        raise InputError(f"{path}: was written by a newer stnerp (format {written}); upgrade stnerp")
    for number in range(written, FORMAT):
        if number not in MIGRATIONS:
            raise InputError(f"{path}: format {written} is unknown; write it again with this stnerp")
        content = MIGRATIONS[number](content) | {"kind": kind, "format": number + 1}
    return content


@contextmanager
def content_of(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """What `read_checkpoint` gives; a network is built from it in this context, where a made-up file ends as a
    damaged one does.

    Raises:
        MissingFileError, InputError: as `read_checkpoint`; or a part is missing, or of another type, size or name.
    """
    saved = read_checkpoint(path, kind)
    try:
        yield saved
    except StnerpError as error:
        told = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is not a {kind} that can be used: {told}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, Warning) as error:
        raise InputError(f"{path}: is not a whole {kind}; give the file that stnerp saved") from error
