"""Random numbers of a fit, which are nobody else's."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from stnerp.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


def own_random_numbers(function: Callable[P, R]) -> Callable[P, R]:
    """A function that seeds PyTorch, so that the caller's random numbers go on after it as if it hadn't."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        # Asked of a GPU that nobody has used yet, its state would bring it up.
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(gpus):
            return function(*args, **kwargs)

    return alone


def start_random_numbers(seed: int) -> None:
    """Seed PyTorch.

    Raises:
        InputError: no whole number, or one of more than 64 bits.
    """
    try:
        torch.manual_seed(operator.index(seed))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"seed: {seed!r} must be a whole number of at most 64 bits, such as 0") from None
