"""One file for a network and all it needs: written all at once or not at all, read without running code."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from stnerp.errors import InputError, MissingFileError

FORMAT = 1


def write_checkpoint(path: Path, kind: str, content: dict[str, Any], overwrite: bool = False) -> Path:
    """Write plain values and tensors; an existing file is replaced only if asked, by a complete new one.

    Raises:
        InputError: the file exists and `overwrite` is False, or the folder can't be written to.
    """
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already; choose another name or pass overwrite=True")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"format": FORMAT, "kind": kind, **content}, temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror}); choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def read_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """What `write_checkpoint` wrote, tensors on the CPU.

    Raises:
        MissingFileError: no such file.
        InputError: a damaged file, one of another kind, or one of a newer format.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected a {kind}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no set: what a damaged file raises depends on where it is damaged
        raise InputError(f"{path}: can't be read as a {kind}; the file is damaged or something else") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise InputError(f"{path}: is not a {kind}; give the file that stnerp saved")
    if content["format"] > FORMAT:
        raise InputError(f"{path}: was written by a newer stnerp (format {content['format']}); upgrade stnerp")
    return content
