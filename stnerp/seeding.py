"""Random numbers of a fit, which are nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

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
