"""How well two images agree, and how smooth a field is.

Similarities take a fixed and a moved image (B, 1, z, y, x) in [0, 1] and optional weights of the
same shape, and return a number that is lower when they agree better. Penalties take a vector field
(B, 3, z, y, x) in mm along the grid's axes and its spacing in mm: they are means over the volume of
derivatives in mm per mm, and so don't depend on resolution, spacing or batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Spacing = tuple[float, float, float]
JACOBIAN_LIMITS = (0.1, 10.0)
# The part of what edges show at which a window counts one in `LocalNCC`. In CTs of the chest every second window
# that shows more than noise shows as much: so images weigh against penalties as if all windows counted alike.
COUNTS_ONE = 0.4


# -- similarity


def mse(fixed: torch.Tensor, moved: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared difference (Eq. 3, 6). Any shape."""
    return _mean((moved - fixed).square(), weight)


def global_ncc(fixed: torch.Tensor, moved: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """1 − normalised cross-correlation over all points, in [0, 2]. Any shape."""
    f = fixed - _mean(fixed, weight)
    m = moved - _mean(moved, weight)
    covariance = _mean(f * m, weight)
    return 1 - covariance / (_mean(f * f, weight) * _mean(m * m, weight) + 1e-12).sqrt()


class LocalNCC:
    """1 − mean local normalised cross-correlation between a fixed image and moved ones.

    Around each voxel, a box window: (cov(f, m) + ε) / √((var f + ε)(var m + ε)), the structure term of SSIM (Wang
    et al. 2004). ε is the variance of the images' noise: in windows with nothing but noise there is nothing to
    gain. It is 1 where both are the same but for an offset, and nowhere more, by Cauchy and Schwarz. Without ε in
    the numerator, edges that reach into flat windows would gain. What depends on the fixed image alone is
    computed once.

    Scans may differ in gain, as MR does. With ε as it is, windows agree best where var f = var m, and a target
    that is brighter by half would swell what it shows. So the fixed image is divided by its gain over the moved
    one, whose noise ε is (`gain_between`): any gain and offset of the fixed image gives the same loss.

    With `contrast` c a window counts by the fixed image's deviation in it, √(var f + ε), to the power of c; one
    counts where that is 0.4 of what edges show (`edge_deviation`), which isn't more or less for air around a body.
    With 0 the edge of a lung counts as much as noise in muscle, and the loss lies in [0, 2]; with 1 edges lead;
    with 2 it is nearly the squared difference, but for a gain and an offset of each window.

    Args:
        fixed: (1, 1, z, y, x) in [0, 1].
        spacing_mm: (x, y, z).
        window_mm: side of the box; at least three voxels on every axis.
        weight: (1, 1, z, y, x), how much each voxel counts, within a window and in the mean; None: all the same.
        noise: standard deviation of the noise, in units of the moved image.
        contrast: c, at least 0.
    """

    def __init__(
        self,
        fixed: torch.Tensor,
        spacing_mm: Spacing,
        window_mm: float,
        weight: torch.Tensor | None = None,
        noise: float = 0.01,
        contrast: float = 0.0,
    ) -> None:
        self.radii = box_radii(fixed.shape[-3:], spacing_mm, window_mm)
        self.noise = noise
        self.weight = weight
        # E[x²] − E[x]² in float32 loses less when x is small, so images are centred first.
        self.fixed = fixed - 0.5
        self.in_window = box_mean(torch.ones_like(fixed) if weight is None else weight, self.radii).clamp(min=1e-3)
        self.fixed_mean = self._mean(self.fixed)
        self.fixed_variance = (self._mean(self.fixed**2) - self.fixed_mean**2).clamp(min=0)
        self.contrast = contrast
        self.counts_one: torch.Tensor | None = None
        if contrast:
            self.counts_one = COUNTS_ONE * edge_deviation(self.fixed_variance, weight)

    def __call__(
        self, moved: torch.Tensor, slab: slice = slice(None), gain: torch.Tensor | float | None = None
    ) -> torch.Tensor:
        """The loss of a moved image (1, 1, z, y, x), or of a slab of its slices.

        Windows that a slab's cut faces would cut in two are left out.

        Args:
            gain: of the fixed image over the moved one; None: as these slices have it (`gain_between`).
        """
        fixed = self.fixed[:, :, slab]
        moved = moved - 0.5
        m, mm, mf = self._mean(torch.cat([moved, moved * moved, moved * fixed], dim=1), slab).unbind(1)
        covariance, variance = mf - m * self.fixed_mean[:, 0, slab], (mm - m * m).clamp(min=0)
        fixed_variance = self.fixed_variance[:, 0, slab]
        weight = None if self.weight is None else self.weight[:, 0, slab]
        gain = gain_between(fixed_variance, variance, weight) if gain is None else torch.as_tensor(gain)
        # Instead of dividing the fixed image by it: both sides of the fraction times the gain.
        deviation = (variance + self.noise**2).sqrt()
        fixed_deviation = (fixed_variance + (gain * self.noise) ** 2).sqrt()
        loss = 1 - (covariance + gain * self.noise**2) / (deviation * fixed_deviation)
        if self.counts_one is not None:
            one = torch.maximum(self.counts_one, gain * max(self.noise, 1e-6))
            loss = (fixed_deviation / one) ** self.contrast * loss
        first, last, _ = slab.indices(self.fixed.shape[2])
        whole = slice(
            self.radii[0] if first > 0 else 0,
            last - first - (self.radii[0] if last < self.fixed.shape[2] else 0),
        )
        return _mean(loss[:, whole], None if weight is None else weight[:, whole])

    def _mean(self, image: torch.Tensor, slab: slice = slice(None)) -> torch.Tensor:
        """Mean within the window around each voxel, voxels by their weights."""
        weighted = image if self.weight is None else image * self.weight[:, :, slab]
        return box_mean(weighted, self.radii) / self.in_window[:, :, slab]


@torch.no_grad()
def gain_between(
    fixed_variance: torch.Tensor, moved_variance: torch.Tensor, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """How many times a fixed image's contrast is a moved one's, √(mean var f / mean var m) over windows.

    1 where both are flat. A number to divide by: it has no gradient. Any shape.
    """
    flat = 1e-9
    return ((_mean(fixed_variance, weight) + flat) / (_mean(moved_variance, weight) + flat)).sqrt()


def edge_deviation(variance: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean deviation √v of windows with these variances, each by its own v: what edges show.

    Flat windows and their noise hardly count, however many there are. 0 where all are flat. Any shape.
    """
    variance = variance.clamp(min=0)
    return _mean(variance**1.5, weight) / _mean(variance, weight).clamp(min=1e-12)


def box_radii(shape: Sequence[int], spacing_mm: Spacing, window_mm: float) -> tuple[int, int, int]:
    """Half widths (z, y, x), in voxels, of a box of about `window_mm`; one at least, where the shape allows it."""
    x, y, z = (max(1, round((window_mm / s - 1) / 2)) for s in spacing_mm)
    return min(z, shape[0] - 1), min(y, shape[1] - 1), min(x, shape[2] - 1)


def box_mean(image: torch.Tensor, radii: tuple[int, int, int]) -> torch.Tensor:
    """Mean over a box around each voxel, zeros outside. (B, C, z, y, x)."""
    return _BoxMean.apply(image, radii)


class _BoxMean(torch.autograd.Function):
    """One axis after the other, as a sum of shifted slices: on a CPU several times faster than a pooling layer.

    The box is symmetric, so the gradient is the box mean of the gradient; autograd's own, slice by slice,
    takes three times as long.
    """

    @staticmethod
    def forward(ctx: Any, image: torch.Tensor, radii: tuple[int, int, int]) -> torch.Tensor:
        ctx.radii = radii
        for axis, radius in zip((2, 3, 4), radii, strict=True):
            n, total = image.shape[axis], image.clone()
            for shift in range(1, radius + 1):
                total.narrow(axis, shift, n - shift).add_(image.narrow(axis, 0, n - shift))
                total.narrow(axis, 0, n - shift).add_(image.narrow(axis, shift, n - shift))
            image = total.div_(2 * radius + 1)
        return image

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return box_mean(gradient, ctx.radii), None


# -- smoothness, in mm per mm


def diffusion(field_mm: torch.Tensor, spacing_mm: Spacing) -> torch.Tensor:
    """Mean |∇u|²: squared mm per mm."""
    total = field_mm.new_zeros(())
    for axis in range(3):
        first = _difference(field_mm, axis, spacing_mm)
        if first.numel() > 0:
            total = total + first.square().sum(1).mean()
    return total


def bending(field_mm: torch.Tensor, spacing_mm: Spacing) -> torch.Tensor:
    """Mean of the squared second derivatives, mixed ones twice (Rueckert et al. 1999): mm² per mm⁴."""
    total = field_mm.new_zeros(())
    for a in range(3):
        for b in range(3):
            second = _difference(_difference(field_mm, a, spacing_mm), b, spacing_mm)
            if second.numel() > 0:
                total = total + second.square().sum(1).mean()
    return total


def total_variation(field_mm: torch.Tensor, spacing_mm: Spacing, epsilon: float = 1e-3) -> torch.Tensor:
    """Isotropic total variation, mean |∇u| over all components and axes together: mm per mm.

    It lets a field jump where tissue slides. `epsilon` rounds the kink at zero (Vishnevskiy et al. 2017).
    """
    return _TotalVariation.apply(field_mm, spacing_mm, epsilon)


class _TotalVariation(torch.autograd.Function):
    """mean √(|∇u|² + ε²) − ε, whose derivative is the transpose of ∇ applied to ∇u / √(|∇u|² + ε²).

    Autograd's own, which stacks and squares all slopes once more, takes two to three times as long.
    """

    @staticmethod
    def forward(ctx: Any, field_mm: torch.Tensor, spacing_mm: Spacing, epsilon: float) -> torch.Tensor:
        slopes = [gradient(field_mm, axis, spacing_mm) for axis in range(3)]
        squares = torch.full_like(field_mm[:, :1], epsilon**2)
        for slope in slopes:
            for component in slope.split(1, dim=1):
                squares.addcmul_(component, component)
        root = squares.sqrt_()
        ctx.save_for_backward(root, *slopes)
        ctx.spacing_mm = spacing_mm
        return root.mean() - epsilon

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_of_mean: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        root, *slopes = ctx.saved_tensors
        weight = gradient_of_mean / (root.numel() * root)
        total = torch.zeros_like(slopes[0])
        for axis, slope in enumerate(slopes):
            add_transposed_gradient(total, weight * slope, axis, ctx.spacing_mm)
        return total, None, None


def jacobian_determinant(displacement_mm: torch.Tensor, spacing_mm: Spacing) -> torch.Tensor:
    """|∂φ/∂p| of φ = id + u, (B, z, y, x): 1 keeps volume, ≤ 0 folds."""
    rows = [gradient(displacement_mm, axis, spacing_mm) for axis in range(3)]
    jacobian = torch.stack(rows, dim=2)  # (B, component, axis, z, y, x)
    jacobian = jacobian + torch.eye(3, device=jacobian.device)[None, :, :, None, None, None]
    a, b, c = jacobian.unbind(2)
    return (a * torch.linalg.cross(b, c, dim=1)).sum(1)


def folding_penalty(displacement_mm: torch.Tensor, spacing_mm: Spacing, margin: float = 0.0) -> torch.Tensor:
    """Mean of max(0, margin − |J|): zero where nothing folds."""
    return (margin - jacobian_determinant(displacement_mm, spacing_mm)).clamp(min=0).mean()


def volume_penalty(displacement_mm: torch.Tensor, spacing_mm: Spacing) -> torch.Tensor:
    """`volume_change` of the Jacobian determinant of φ = id + u."""
    return volume_change(jacobian_determinant(displacement_mm, spacing_mm))


def volume_change(jacobian: torch.Tensor) -> torch.Tensor:
    """Mean of J + 1/J − 2, the same for twice and half the volume; J is limited to [0.1, 10] here
    (van Harten et al. 2023), which bounds the penalty, not any count of folded voxels. Any shape."""
    jacobian = jacobian.clamp(*JACOBIAN_LIMITS)
    return (jacobian + 1 / jacobian - 2).mean()


# -- distances


def robust_distance(squared_mm: torch.Tensor, scale_mm: float = 1.0) -> torch.Tensor:
    """Mean of √(d² + s²) − s over squared distances d², in mm: d²/2s well below the scale s, d − s well above.

    A smooth form of Huber's: one point that is far off pulls no harder than one that is a little off. Any shape.
    """
    return ((squared_mm + scale_mm**2).sqrt() - scale_mm).mean()


def _mean(values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return values.mean()
    return (values * weight).sum() / weight.sum().clamp(min=1e-6)


def _difference(field: torch.Tensor, axis: int, spacing_mm: Spacing) -> torch.Tensor:
    """Forward difference along x, y or z (axis 0, 1, 2) per mm: one voxel shorter there, exact for any spacing."""
    return field.diff(dim=4 - axis) / spacing_mm[axis]


def gradient(field: torch.Tensor, axis: int, spacing_mm: Spacing) -> torch.Tensor:
    """∂/∂x, ∂/∂y or ∂/∂z (axis 0, 1, 2): central differences, one-sided at the border."""
    dim = 4 - axis
    if field.shape[dim] == 1:
        return torch.zeros_like(field)
    return torch.gradient(field, spacing=spacing_mm[axis], dim=dim)[0]


def add_transposed_gradient(total: torch.Tensor, slope: torch.Tensor, axis: int, spacing_mm: Spacing) -> None:
    """Add to `total` the transpose of `gradient`, as a matrix, times `slope`. Both (B, C, z, y, x)."""
    dim, spacing = 4 - axis, spacing_mm[axis]
    n = slope.shape[dim]
    if n == 1:
        return
    # One-sided at both ends, central between.
    for voxel, before, apart, length in ((0, 0, 1, 1), (n - 1, n - 2, 1, 1), (1, 0, 2, n - 2)):
        own = slope.narrow(dim, voxel, length) / (apart * spacing)
        total.narrow(dim, before, length).sub_(own)
        total.narrow(dim, before + apart, length).add_(own)
