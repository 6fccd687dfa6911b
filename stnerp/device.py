"""Which processor computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from stnerp.errors import InputError


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one, else the CPU.

    Raises:
        InputError: an unknown device, or CUDA where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device: {name!r} is not a device; give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is not supported; give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name!r} was asked for, but there is no such CUDA device; use device='cpu'")
    return device


@contextmanager
def tensor_cores(device: torch.device, allowed: bool = True) -> Iterator[None]:
    """Whether a GPU may multiply float32 matrices in TF32 within: several times faster, 10 bits of mantissa.

    Enough for the hidden layers of a network. Not for coordinates: of 300 mm, 0.1 mm would be lost.
    """
    if device.type != "cuda":
        yield
        return
    speak: Callable[[str], object] = torch.set_float32_matmul_precision
    words = ("highest", "high")
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the application has used the newer name for it, and the two don't mix
        products = torch.backends.cuda.matmul
        speak, words, before = (
            partial(setattr, products, "fp32_precision"),
            ("ieee", "tf32"),
            products.fp32_precision,
        )
    speak(words[allowed])
    try:
        yield
    finally:
        speak(before)
