"""What needs no registration: show the nearest measured image, or blend the two around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stnerp.errors import InputError
from stnerp.time_basis import neighbours


def nearest_phase(
    images: Sequence[np.ndarray], times: Sequence[float], t: float, period: float | None = None
) -> np.ndarray:
    """The measured image nearest in time (itself, not a copy).

    Halfway between two images the earlier one is taken (the one that t has just passed).

    Args:
        images: arrays of one shape, such as (z, y, x).
        times: when each was measured, in any order and unit.
        t: the time wanted, in the same unit.
        period: length of a cycle; None where time doesn't repeat. Then the first (last) image serves
            every time before (after) it.

    Raises:
        InputError: no image, as many times as images not given, shapes that differ, two images at one time
            (within the cycle), a time that isn't finite, a period that isn't positive.
    """
    before, after, weight = _around(images, times, t, period)
    return images[before] if weight <= 0.5 + 1e-9 else images[after]  # a tie's time may be rounded


def linear_blend(
    images: Sequence[np.ndarray], times: Sequence[float], t: float, period: float | None = None
) -> np.ndarray:
    """The two measured images around time t, blended linearly: a new array of floats.

    Exactly the measured image at a measured time. Arguments, behaviour outside the measured range and
    errors as for `nearest_phase`.
    """
    before, after, weight = _around(images, times, t, period)
    a, b = (images[i].astype(np.result_type(images[i], np.float32)) for i in (before, after))
    return (1 - weight) * a + weight * b


def _around(
    images: Sequence[np.ndarray], times: Sequence[float], t: float, period: float | None
) -> tuple[int, int, float]:
    """Indices of the images before and after t, and how far t is from the first to the second, in [0, 1)."""
    when = np.asarray(times, dtype=float)
    if len(images) == 0 or when.shape != (len(images),):
        raise InputError(f"times: {len(images)} images need as many times, got shape {when.shape}")
    if len({np.shape(image) for image in images}) > 1:
        raise InputError("images: shapes differ; resample them onto one grid first")
    if not (np.isfinite(when).all() and np.isfinite(t)):
        raise InputError("times: every time must be a finite number")
    if period is not None:
        if not 0 < period < np.inf:
            raise InputError(f"period: {period} must be positive, or None where time doesn't repeat")
        when = when % period
    if len(np.unique(when)) < len(when):
        raise InputError("times: two images at one time; keep one of them")
    return neighbours(times, t, period)
