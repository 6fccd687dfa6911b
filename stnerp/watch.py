"""A fit's numbers under watch: one that is no number ends the fit by name, a loss that rises is told."""

from __future__ import annotations

import logging
import math
from statistics import median
from typing import Any

import torch
from torch import nn

from stnerp.errors import FitError

logger = logging.getLogger(__name__)

EVERY = 10  # steps between two looks: reading a number waits for the GPU
SOME = 5  # losses whose median is compared


class Watch:
    """Looks at the rows of a fit's history, from time to time.

    Args:
        name: of what is fitted, for messages.
        net: what is trained.
        history: a row for each step: "step", "level", "loss" and its terms, numbers or tensors of one.
    """

    def __init__(self, name: str, net: nn.Module, history: list[dict[str, Any]]) -> None:
        self.name, self.net, self.history = name, net, history
        self._seen = 0

    def look(self) -> None:
        """Check the rows that are new.

        Raises:
            FitError: a term that is not a number, or infinite; the message names it and the step.
        """
        new = self.history[self._seen :]
        self._to_numbers(new)
        for row in new:
            terms = {name: value for name, value in row.items() if name not in ("step", "level")}
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            if not bad:
                continue
            if len(bad) == len(terms) and row["step"] > 1 and not finite(self.net):
                raise FitError(
                    f"{self.name}: the weights are not finite after step {row['step'] - 1}; lower learning_rate"
                )
            named = [name for name in bad if name != "loss"] or bad
            told = ", ".join(f"{name} is {terms[name]}" for name in named)
            raise FitError(f"{self.name}: {told} at step {row['step']}; lower learning_rate")
        self._seen = len(self.history)

    @staticmethod
    def _to_numbers(rows: list[dict[str, Any]]) -> None:
        """Tensors in rows become numbers, all of them in one transfer."""
        names = [(row, name) for row in rows for name, value in row.items() if isinstance(value, torch.Tensor)]
        if names:
            numbers = torch.stack([row[name].double() for row, name in names]).tolist()
            for (row, name), number in zip(names, numbers, strict=True):
                row[name] = number

    def check(self) -> None:
        """Whether what the fit has reached is worth keeping: all its numbers are finite.

        Raises:
            FitError: as `look`, or a weight that is not a number.
        """
        self.look()
        require_finite(self.net, self.name)

    def report(self, what: str, rows: list[dict[str, Any]]) -> None:
        """A warning if the loss of these rows, one level's say, ends above its start."""
        self._to_numbers(rows)
        losses = [row["loss"] for row in rows]
        if len(losses) < 2 * SOME:
            return
        first, last = median(losses[:SOME]), median(losses[-SOME:])
        if last > first:
            logger.warning(
                "%s: the loss rose%s, from %.4g to %.4g; lower learning_rate", self.name, what, first, last
            )


def require_finite(net: nn.Module, name: str) -> None:
    """FitError unless every weight is a number: a loss can stay finite while the weights no longer are."""
    if not finite(net):
        raise FitError(f"{name}: its weights are not finite; lower learning_rate")


def finite(net: nn.Module) -> bool:
    """Whether every weight is a finite number."""
    return bool(torch.stack([parameter.isfinite().all() for parameter in net.parameters()]).all())
