"""Which processor computes."""

from __future__ import annotations

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
    except RuntimeError as error:
        raise InputError(f"device: {name!r} is not a device; give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is not supported; give auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name!r} was asked for, but there is no such CUDA device; use device='cpu'")
    return device
