"""Appearance that changes over time: what brightens, fades or fills can't be a moved reference image.

Two answers beside the paper's (the reference, moved):

blend
    The two measured images around t, each carried to t along the flow between them, and blended.
    Any change of brightness is followed, whatever causes it. The flow is a Def-Net of its own
    with one stationary velocity per gap: neighbours resemble each other more than the reference,
    and an error of a third of a voxel is seen.
density
    Lung tissue keeps its mass: where it fills with air it gets darker. ρ(t) = ρ(reference) · |J|,
    for what is lighter than fat (Simon 2000; Reinhardt et al. 2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import numpy as np
import scipy.ndimage
import torch
from tqdm.auto import tqdm

from stnerp import losses
from stnerp.def_net import DefNet, def_net_of
from stnerp.device import device_of
from stnerp.errors import FitError
from stnerp.geometry import Grid, apply_affine, random_slabs
from stnerp.preprocess import compared, normalised, on_grid
from stnerp.presets import FLOW, DefNetSettings, Level, def_net_settings_of
from stnerp.ref_net import cosine, require_finite
from stnerp.region import around, faded
from stnerp.resume import Progress, State
from stnerp.seeding import own_random_numbers, start_random_numbers
from stnerp.series import Series
from stnerp.time_basis import Gaps, neighbours
from stnerp.velocity import exponential
from stnerp.warp import pulled_back, sample

Appearance = Literal["reference", "blend", "density"]
LUNG_HU = (-950.0, -200.0)  # lighter is air, heavier is no lung; between, the density follows the volume
FADE_HU = 100.0


class NeighbourFlow:
    """The measured images and the flow from each to the next.

    The flow of a gap is exp(v): it carries the earlier image's points to the later one, in the frame of the
    pre-aligned reference. Within a gap the way travelled is a cubic Hermite curve whose speed at the
    measured times is that of both gaps around: hearts and lungs don't move at a steady pace and turn at once
    (on cine MR 0.6 dB more than a steady pace).

    Attributes:
        net: velocity of each gap, `Gaps` in time; like a Def-Net it may cover a part of the reference
            (`stnerp.region`), around which the flow fades.
        lattice: that carries the flow, over all of the reference.
        images: arrays (z, y, x) in [0, 1] of the measured images, each on its own grid of `grids`.
        alignments: (T, 4, 4), reference point -> point of each image.
    """

    def __init__(
        self,
        net: DefNet,
        settings: DefNetSettings,
        images: Sequence[np.ndarray],
        grids: Sequence[Grid],
        alignments: np.ndarray,
        grid: Grid,
    ) -> None:
        """`grid`: the reference's."""
        self.net, self.settings = net, settings
        self._covered = settings.levels[-1].lattice(net.grid)
        self.lattice = around(self._covered, grid)
        self.images, self.grids, self.alignments = list(images), list(grids), alignments
        self._splines: dict[int, np.ndarray] = {}
        self._gap = -1
        self._curve: tuple[torch.Tensor, ...] = ()

    def read(self, aligned_mm: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Intensities (...,) in [0, 1] at time t, at points (..., 3) in LPS mm of the pre-aligned frame,
        and whether a measured image covers them.

        At a measured time it is the measured image. Points that only one of the two neighbours covers
        are read from that one; those that neither covers, from the nearest voxel.
        """
        basis = self.net.time_basis
        before, after, w = neighbours(basis.times, t, basis.period)
        if w == 0:
            return self._image(before, aligned_mm)
        gap = min(before, basis.size - 1)
        travelled, whole = self._way(gap, w)
        first, seen_first = self._image(before, self._carried(aligned_mm, -travelled))
        last, seen_last = self._image(after, self._carried(aligned_mm, whole - travelled))
        w_first, w_last = (1 - w) * seen_first, w * seen_last
        total = w_first + w_last
        blended = (w_first * first + w_last * last) / np.where(total > 0, total, 1)
        return np.where(total > 0, blended, (1 - w) * first + w * last), total > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a file; images as 16-bit integers (1/65535 of the window)."""
        return {
            "region": self.net.grid.to_dict(),
            "settings": asdict(self.settings),
            "weights": self.net.state_dict(),
            "images": [torch.from_numpy(_to_int16(image)) for image in self.images],
            "grids": [grid.to_dict() for grid in self.grids],
            "alignments": torch.from_numpy(self.alignments),
        }

    @staticmethod
    def from_dict(saved: dict[str, Any], grid: Grid, basis: Gaps) -> NeighbourFlow:
        """The flow that `to_dict` described, over a reference grid; on the CPU."""
        settings = def_net_settings_of(saved["settings"])
        region = Grid.from_dict(saved["region"]) if "region" in saved else grid
        net = def_net_of(region, basis, settings)
        net.load_weights(saved["weights"])
        images = [_from_int16(image.numpy()) for image in saved["images"]]
        grids = [Grid.from_dict(values) for values in saved["grids"]]
        return NeighbourFlow(net.eval(), settings, images, grids, saved["alignments"].numpy(), grid)

    def _way(self, gap: int, w: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What is travelled after a part w of a gap, and in all of it: velocities for `exponential`."""
        if self._gap != gap:
            self._gap, self._curve = gap, self._hermite(gap)
        start, whole, end = self._curve
        h10, h01, h11 = w**3 - 2 * w**2 + w, 3 * w**2 - 2 * w**3, w**3 - w**2
        return h10 * start + h01 * whole + h11 * end, whole

    def _hermite(self, gap: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Speed at the start of a gap, per gap; what is travelled in it; speed at its end."""
        gaps = self.net.time_basis
        assert isinstance(gaps, Gaps)
        around = [gap - 1, gap, gap + 1]
        if gaps.period is None:  # the first and last gap keep their own pace at the ends
            around = [min(max(g, 0), gaps.size - 1) for g in around]
        around = [g % gaps.size for g in around]
        d0, d, d1 = (gaps.width(g) for g in around)
        v0, v, v1 = (self._velocity(gaps.middle(g)) for g in around)
        start = (v0 / d0 * d + v / d * d0) / (d0 + d) * d
        end = (v1 / d1 * d + v / d * d1) / (d1 + d) * d
        return start, v, end

    def _velocity(self, t: float) -> torch.Tensor:
        """(1, 3, z, y, x) on `lattice`, in units of its cube."""
        with torch.no_grad():
            velocity_mm = self.net.lattice_velocity(self._covered.shape, [t]).cpu()
        velocity_mm = faded(velocity_mm, self._covered, self.lattice)
        return velocity_mm / torch.tensor(self.lattice.half_extent_mm).to(velocity_mm)[:, None, None, None]

    def _carried(self, aligned_mm: np.ndarray, velocity: torch.Tensor) -> np.ndarray:
        """exp(v) of world points (..., 3)."""
        points = torch.from_numpy(np.ascontiguousarray(self.lattice.world_to_cube(aligned_mm)))
        field = exponential(velocity, self.settings.squarings)
        moved = sample(field, points.reshape(1, -1, 3).to(field))[0].T.reshape(points.shape).double()
        return self.lattice.cube_to_world((points + moved).numpy())

    def _image(self, index: int, aligned_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A measured image at points of the pre-aligned frame, and whether it covers them.

        By a cubic spline: a linear one would blur what doesn't move at all (1.5 dB on cine MR).
        """
        grid = self.grids[index]
        if index not in self._splines:
            if len(self._splines) > 1:
                self._splines.clear()
            self._splines[index] = scipy.ndimage.spline_filter(self.images[index], 3, np.float32, "mirror")
        points_mm = apply_affine(self.alignments[index], aligned_mm)
        last = np.asarray(grid.size) - 1
        inside = np.clip(grid.world_to_index(points_mm), 0, last)[..., ::-1]
        values = scipy.ndimage.map_coordinates(
            self._splines[index], np.moveaxis(inside, -1, 0), np.float32, 3, "mirror", prefilter=False
        )
        return values, grid.contains(points_mm)


@own_random_numbers
def fit_flow(
    series: Series,
    alignments: np.ndarray,
    *,
    region: Grid | None = None,
    settings: DefNetSettings = FLOW,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    fit: Progress | None = None,
) -> NeighbourFlow:
    """Learn the flow from each image of a series to the next.

    Both are carried half-way, where they should agree: neither is the reference of the other
    (Avants et al. 2008), and what the flow is used for, the time between, is what is fitted.

    Args:
        series: two or more images.
        alignments: (T, 4, 4), reference point -> point of each image (`STNeRP.alignments`).
        region: the part of the reference where the flow is learnt (`stnerp.region`); None: all of it.
        settings: of the network and its fit; `form` must be "factorised".
        fit: keeps how far it has come.

    Raises:
        FitError: a loss that is not a number.
    """
    where = device_of(device)
    start_random_numbers(seed)
    draw = np.random.default_rng(torch.initial_seed())
    basis = Gaps(series.times, series.reference_time, series.period)
    region = series.grid if region is None else region
    net = def_net_of(region, basis, settings).to(where)
    optimiser = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    steps = sum(level.iterations for level in settings.levels)
    schedule = cosine(optimiser, steps)
    middles = [basis.middle(gap) for gap in range(basis.size)]
    half_extent_mm = torch.tensor(region.half_extent_mm, dtype=torch.float32, device=where)
    state = State(
        {"net": net, "adam": optimiser, "schedule": schedule}, [], draw, check=lambda: require_finite(net, "flow")
    )
    fit, until = fit or Progress(None, {}), 0
    with fit.stage("flow", state), tqdm(total=steps, desc="flow", disable=not progress) as bar:
        bar.update(state.step)
        for level in settings.levels:
            until += level.iterations
            if state.step >= until:
                continue  # done before the fit was interrupted
            moving, reached = zip(
                *[_moving(series, i, alignments, region, level, where) for i in range(len(series))], strict=True
            )
            voxels, lattice = level.voxels(region), level.lattice(region)
            sigma, velocity_at = level.smoothing(region, settings.smoothing), net.on_lattice(lattice.shape)
            for step in fit.steps(until):
                (slab,) = random_slabs([voxels.shape], settings.voxels_per_step, draw)
                optimiser.zero_grad(set_to_none=True)
                velocity_mm = velocity_at(middles)
                leaf = velocity_mm.detach().requires_grad_()  # the gaps one after the other, see fit.py
                value = leaf.new_zeros(())
                for gap in range(basis.size):
                    half = leaf[gap : gap + 1] / (2 * half_extent_mm[:, None, None, None])
                    moved = [
                        pulled_back(
                            partial(sample, moving[i % len(series)]),
                            exponential(sign * half, settings.squarings),
                            voxels.shape,
                            slab,
                            sigma,
                        )
                        for i, sign in ((gap, -1), (gap + 1, 1))
                    ]
                    both = _both(reached[gap], reached[(gap + 1) % len(series)])
                    agreement = losses.LocalNCC(
                        moved[0],
                        voxels.spacing_mm,
                        settings.window_mm,
                        None if both is None else both[:, :, slab],
                        settings.noise,
                    )
                    loss = agreement(moved[1]) + settings.diffusion * losses.diffusion(
                        leaf[gap : gap + 1], lattice.spacing_mm
                    )
                    (loss / basis.size).backward()
                    value = value + loss.detach() / basis.size
                velocity_mm.backward(leaf.grad)
                optimiser.step()
                schedule.step()
                bar.update()
                if step % 10 == 1 or step == steps:
                    if not np.isfinite(float(value)):
                        raise FitError(f"flow: the loss is {float(value)} at step {step}; lower learning_rate")
                    bar.set_postfix(loss=f"{float(value):.4f}")
    # As a file keeps them, so that the model answers the same before and after.
    images = [_from_int16(_to_int16(normalised(image, series.window))) for image in series.images]
    grids = [Grid.of(image) for image in series.images]
    return NeighbourFlow(net.eval(), settings, images, grids, alignments, series.grid)


def density(hu: np.ndarray, jacobian: np.ndarray) -> np.ndarray:
    """Reference intensities, moved, as their density follows the volume: ρ = 1 + HU/1000 times |J|.

    Args:
        hu: (...), HU of the reference at φ_t(p).
        jacobian: (...), |∂φ_t/∂p| at p: ml of reference in each ml of the target.
    """
    low, high = LUNG_HU
    lung = np.clip((hu - low) / FADE_HU, 0, 1) * np.clip((high - hu) / FADE_HU, 0, 1)
    return np.asarray(hu + lung * (hu + 1000) * (jacobian - 1), dtype=hu.dtype)


def _moving(
    series: Series,
    index: int,
    alignments: np.ndarray,
    grid: Grid,
    level: Level,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An image of the series on a grid of the pre-aligned frame, at twice the level's resolution, (1, 1, z, y, x).

    And which of the level's voxels it reaches; None: all.
    """
    image = series.images[index]
    values, seen = compared(image, series.window)
    values, covered = on_grid(
        values,
        Grid.of(image),
        level.voxels(grid, refine=2),
        alignments[index],
        level.aliasing_sigma_mm(grid, Grid.of(image)),
        device,
        splines=True,
        seen=seen,
    )
    fine = torch.from_numpy(values).to(device, torch.float32)[None, None]
    if covered.all():
        return fine, None
    shares = torch.from_numpy(covered).to(device, torch.float32)[None, None]
    shape = level.voxels(grid).shape
    shares = torch.nn.functional.interpolate(shares, shape, mode="trilinear", align_corners=True)
    return fine, (shares > 0.99).float()


def _both(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """Where two images have something to compare, before they are moved; None: everywhere."""
    return b if a is None else a if b is None else a * b


def _to_int16(image: np.ndarray) -> np.ndarray:
    return (np.rint(image * 65535) - 32768).astype(np.int16)


def _from_int16(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.float32) + 32768) / 65535).astype(np.float32)
