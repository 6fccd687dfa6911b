"""Which processor computes."""

from __future__ import annotations

import torch

from stnerp.errors import InputError


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one, else the CPU.

    Raises:
        InputError: CUDA is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {name!r} was asked for, but no CUDA device is available; use device='cpu'")
    return device
