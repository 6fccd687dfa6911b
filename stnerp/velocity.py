"""From a stationary velocity to a diffeomorphism: Eq. 5 by scaling and squaring.

Fields are (B, 3, z, y, x), components (x, y, z), in cube units (see `geometry`).
"""

from __future__ import annotations

import torch

from stnerp.warp import warp


def exponential(velocity: torch.Tensor, squarings: int = 7) -> torch.Tensor:
    """u = exp(v) − id: where the flow of v carries each point in unit time, minus the point.

    exp(v) = exp(v / 2ⁿ)^(2ⁿ) (Dalca et al. 2019; Arsigny et al. 2006). Beyond the border the field
    continues with the border's value, so that a constant velocity gives that constant everywhere.
    The inverse of exp(v) is exp(−v).

    Args:
        velocity: (B, 3, z, y, x) in cube units.
        squarings: n; the first step moves no point further than |v| / 2ⁿ.

    Returns:
        Displacement (B, 3, z, y, x) in cube units.
    """
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        displacement = compose(displacement, displacement)
    return displacement


def compose(outer: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Displacement of outer ∘ inner: first p + inner(p), then outer from there."""
    return inner + warp(outer, inner)
