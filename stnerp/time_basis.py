"""Smooth functions of time that vanish at the reference time: v(x, t) = Σₖ aₖ(t) Vₖ(x).

Periodic (breathing, heartbeat): harmonics cos kθ − 1 and sin kθ. Otherwise (follow-ups): natural
cubic splines, the k-th one at knot k and zero at all other knots, the reference time being a knot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_KNOTS = 9
MAX_HARMONICS = 3


def index_at(
    times: Sequence[float], t: float, period: float | None = None, within: float | None = None
) -> int | None:
    """Index of the measured time that t is, but for whole periods and `within`; None where it is none.

    Args:
        times: measured, increasing.
        within: how far they may lie apart; None: as far as rounding takes them, which is little where times are
            close to each other and far from zero, as seconds since 1970 are.
    """
    apart = [abs(t - time) if period is None else abs(math.remainder(t - time, period)) for time in times]
    if not apart:
        return None
    nearest = int(np.argmin(apart))
    if within is None:
        size = max(abs(t), *(abs(time) for time in times), period or 0.0)
        gaps = [after - before for before, after in pairwise(times)]
        within = max(min([1e-9 * size + 1e-12, *(1e-3 * gap for gap in gaps)]), 4 * float(np.spacing(size)))
    return nearest if apart[nearest] <= within else None


@dataclass(frozen=True)
class TimeBasis:
    """aₖ(t), k = 1..size, in the user's unit of time; aₖ(reference_time) = 0 exactly.

    Attributes:
        times: measured times, increasing; they decide how many functions can be told apart.
        reference_time: one of them.
        period: length of a cycle, or None.
    """

    times: tuple[float, ...]
    reference_time: float
    period: float | None = None

    def __call__(self, t: float) -> np.ndarray:
        """(size,) values at time t. Past the measured range, splines go on as straight lines."""
        if self.period is not None:
            k = np.arange(1, self.harmonics + 1)
            angle = 2 * np.pi * k * ((t - self.reference_time) / self.period)
            return np.concatenate([np.cos(angle) - 1, np.sin(angle)])
        knots = self.knots
        others = knots != self.reference_time
        return np.array([_natural_spline(knots, row, t) for row in np.eye(len(knots))[others]])

    @property
    def size(self) -> int:
        return 2 * self.harmonics if self.period is not None else len(self.knots) - 1

    @property
    def harmonics(self) -> int:
        """As many as the measured phases determine, and no more than breathing needs."""
        return min(max((len(self.times) - 1) // 2, 1), MAX_HARMONICS)

    @property
    def knots(self) -> np.ndarray:
        """Measured times, thinned evenly when there are many; first, last and reference always stay."""
        times = np.asarray(self.times, dtype=float)
        if len(times) <= MAX_KNOTS:
            return times
        chosen = np.linspace(0, len(times) - 1, MAX_KNOTS).round().astype(int)
        return np.unique(np.append(times[chosen], self.reference_time))

    @property
    def mixing(self) -> np.ndarray:
        """M (K, K) of the functions bₗ(t) = Σₖ aₖ(t) Mₖₗ, which a fit works with.

        At the measured times but the reference's, they are orthogonal, and a step along one means as much motion
        as a step along another. Of a cycle's, the k-th harmonics are 1/k² as large: so fall those of a motion
        whose acceleration is bounded, and a fast change must be seen more clearly. Directions that the times
        hardly tell apart are enlarged no further.
        """
        others = [t for t in self.times if t != self.reference_time]
        values = np.stack([self(t) for t in others])
        size, directions = np.linalg.eigh(values.T @ values / len(values))
        orthonormal = (directions / np.sqrt(np.maximum(size, 0.05 * size.max()))) @ directions.T
        if self.period is None:
            return orthonormal
        return orthonormal / np.tile(np.arange(1, self.harmonics + 1) ** 2, 2)

    @property
    def measured_range(self) -> tuple[float, float]:
        return min(self.times), max(self.times)


class Gaps(TimeBasis):
    """One function for each gap between neighbouring times: 1 inside it, 0 elsewhere.

    A cycle has one gap more, from its last time to its first.
    """

    def __call__(self, t: float) -> np.ndarray:
        """(size,) ones and zeros at time t."""
        before = neighbours(self.times, t, self.period)[0]
        return np.eye(self.size)[min(before, self.size - 1)]

    @property
    def size(self) -> int:
        return len(self.times) - (self.period is None)

    @property
    def mixing(self) -> np.ndarray:
        return np.eye(self.size)  # no two gaps overlap

    def middle(self, gap: int) -> float:
        """The time half-way through a gap."""
        return self.times[gap] + self.width(gap) / 2

    def width(self, gap: int) -> float:
        """Time between the two images of a gap."""
        following = self.times[gap + 1] if gap + 1 < len(self.times) else self.times[0] + (self.period or 0.0)
        return following - self.times[gap]


def time_text(t: float) -> str:
    """A time with every digit: days may be ordinals or seconds since 1970, and rounded they are other days."""
    return f"{t:.15g}"


def neighbours(times: Sequence[float], t: float, period: float | None = None) -> tuple[int, int, float]:
    """Indices of the times before and after t, and how far t is from the first to the second, in [0, 1).

    Before the first (after the last) time of a series that doesn't repeat, that one alone.
    """
    when = np.asarray(times, dtype=float)
    if period is not None:
        when, t = when % period, t % period
    order = np.argsort(when)
    when = when[order]
    if period is not None:
        # The cycle closed at both ends: the last time once more before the first, and vice versa.
        order = np.concatenate([order[-1:], order, order[:1]])
        when = np.concatenate([when[-1:] - period, when, when[:1] + period])
    t = float(np.clip(t, when[0], when[-1]))
    i = int(np.searchsorted(when, t, side="right")) - 1
    j = min(i + 1, len(when) - 1)
    weight = 0.0 if i == j else float((t - when[i]) / (when[j] - when[i]))
    return int(order[i]), int(order[j]), weight


def _natural_spline(knots: np.ndarray, values: np.ndarray, t: float) -> float:
    """The natural cubic spline through (knots, values) at t; straight lines outside."""
    n = len(knots)
    h, slopes = np.diff(knots), np.diff(values) / np.diff(knots)
    curvature = np.zeros(n)  # second derivatives; zero at both ends
    if n > 2:
        system = np.diag(2 * (h[:-1] + h[1:])) + np.diag(h[1:-1], 1) + np.diag(h[1:-1], -1)
        curvature[1:-1] = np.linalg.solve(system, 6 * np.diff(slopes))
    first = slopes[0] - h[0] * curvature[1] / 6
    last = slopes[-1] + h[-1] * curvature[-2] / 6
    if t <= knots[0]:
        return float(values[0] + first * (t - knots[0]))
    if t >= knots[-1]:
        return float(values[-1] + last * (t - knots[-1]))
    i = int(np.searchsorted(knots, t) - 1)
    a, b = (knots[i + 1] - t) / h[i], (t - knots[i]) / h[i]
    bend = ((a**3 - a) * curvature[i] + (b**3 - b) * curvature[i + 1]) * h[i] ** 2 / 6
    return float(a * values[i] + b * values[i + 1] + bend)
