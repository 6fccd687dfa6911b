"""Adam with one scale for a whole tensor: a free field moves where its gradient is, and stays elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class UniformAdam(torch.optim.Optimizer):
    """Adam whose second moment is the largest squared gradient of the tensor (Nicolet et al. 2021, sec. 4).

    Adam scales each number by its own gradient, so where an image shows nothing, noise makes steps as large as
    an edge does elsewhere. Here no number moves by more than about `lr` in a step, most by far less, and all in
    proportion to their gradients.

    Args:
        parameters: the tensors.
        lr: the largest step, in units of the tensors.
        betas: decay of the first and second moment.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the gradients; tensors without one stay."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state |= {"steps": 0, "mean": torch.zeros_like(parameter), "square": parameter.new_zeros(())}
                state["steps"] += 1
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].lerp_(parameter.grad.square().max(), 1 - second)
                mean = state["mean"] / (1 - first ** state["steps"])
                scale = (state["square"] / (1 - second ** state["steps"])).sqrt().clamp(min=1e-20)
                parameter -= group["lr"] * mean / scale
