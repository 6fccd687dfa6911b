"""How a scan agrees with the moved reference, whatever its brightness and modality.

Images are compared coarse and smoothed, in windows of some centimetres: by their local correlation, and by whether
a place some millimetres off would agree better (block matching: Saygili et al., IEEE TMI 35, 2016). The same
correlation between the scans themselves tells whether the series is smooth in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import uniform_filter

from stnerp.alignment import affine_at
from stnerp.geometry import Grid, Triple, apply_affine
from stnerp.model import STNeRP
from stnerp.preprocess import compared, on_grid
from stnerp.series import Series
from stnerp.warp import sample
from stnerp.window import Window

WORK_MM = 4.0  # images are compared at this spacing, smoothed by half of it: noise of single voxels is gone
WINDOW_MM = 20.0  # of the local correlation: large enough to hold structure, whatever happened at a single edge
NOISE = 0.002  # deviation that smoothed noise has, in units of the intensity window
STRUCTURE = 0.1  # of the image's steepest windows (95 %): what is flatter has nothing to compare
UNLIKE = 0.5  # correlation below which less than a quarter of the variance is explained
GAIN = 0.1  # in correlation, by which another place must agree better
SEARCH_MM = (4.0, 8.0, 12.0)  # how far such places are looked for, in 26 directions


@dataclass(frozen=True, eq=False)
class Windows:
    """An image with the mean and the standard deviation of the window around each voxel; arrays are (z, y, x).

    Attributes:
        image: in units of the intensity window, its middle at 0.
        inside: voxels that show something; whole: those whose whole window does.
        size: of the windows, voxels (z, y, x).
    """

    image: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    inside: np.ndarray
    whole: np.ndarray
    size: tuple[int, int, int]

    @staticmethod
    def of(unit: np.ndarray, grid: Grid, inside: np.ndarray) -> Windows:
        """Of an image (z, y, x) in [0, 1] on a grid, which shows something where `inside`."""
        x, y, z = (2 * max(1, round((WINDOW_MM / s - 1) / 2)) + 1 for s in grid.spacing_mm)
        size = (z, y, x)
        image = unit.astype(np.float32) - 0.5  # E[x²] − E[x]² loses less when x is small
        mean = uniform_filter(image, size, mode="nearest")
        variance = uniform_filter(image**2, size, mode="nearest") - mean**2
        whole = uniform_filter(inside.astype(np.float32), size, mode="nearest") > 0.999
        return Windows(image, mean, np.sqrt(variance.clip(0)), inside, whole, size)

    def structure(self) -> np.ndarray:
        """Where windows are not flat, against the steepest ones of this image."""
        if not self.whole.any():
            return self.whole
        return self.deviation > max(STRUCTURE * float(np.quantile(self.deviation[self.whole], 0.95)), 3 * NOISE)

    def correlation(self, other: Windows) -> np.ndarray:
        """Local normalised cross-correlation with another image, in [-1, 1]."""
        covariance = uniform_filter(self.image * other.image, self.size, mode="nearest") - self.mean * other.mean
        return covariance / np.sqrt((self.deviation**2 + NOISE**2) * (other.deviation**2 + NOISE**2))

    def shifted(self, step: Sequence[int]) -> Windows:
        """The same, each voxel's from `step` (z, y, x) voxels off; windows that a border cuts aren't whole."""
        image, mean, deviation, inside, whole = self.image, self.mean, self.deviation, self.inside, self.whole
        for axis, by in enumerate(step):
            if by == 0:
                continue
            n, radius = image.shape[axis], self.size[axis] // 2
            index = np.arange(n)
            from_ = np.clip(index + by, 0, n - 1)
            image, mean, deviation, inside, whole = (
                array.take(from_, axis) for array in (image, mean, deviation, inside, whole)
            )
            uncut = (index - radius + min(by, 0) >= 0) & (index + radius + max(by, 0) < n)
            whole = whole & np.expand_dims(uncut, [other for other in range(3) if other != axis])
        return Windows(image, mean, deviation, inside, whole, self.size)


def windows_of(scan: sitk.Image, window: Window, grid: Grid, to_scan: np.ndarray | None = None) -> Windows:
    """A scan as it is compared, on a working grid.

    Args:
        to_scan: (4, 4), a world point of the grid -> the scan's world point; None: the same point.
    """
    unit, seen = compared(scan, window)
    unit, covered = on_grid(unit, Grid.of(scan), grid, to_scan, WORK_MM / 2, seen=seen)
    return Windows.of(unit, grid, covered)


def working_grid(grid: Grid) -> Grid:
    """The same field of view in voxels of `WORK_MM`, or the image's own where they are larger."""
    return grid.with_spacing(_at_least(grid, WORK_MM))


# -- a scan and the moved reference


@dataclass(frozen=True, eq=False)
class Agreement:
    """A scan and the moved reference, compared on a coarse grid over the scan. Arrays are (z, y, x).

    Attributes:
        grid: the scan's `working_grid`.
        correlation: local, in [-1, 1]; before: with pre-alignment alone. NaN where the
            reference doesn't reach or the scan saw nothing.
        difference: |moved − scan| in units of the intensity window, [0, 1]; NaN likewise.
        structure: where there is something to compare.
        misplaced: where another place would agree better.
        covered_percent: part of the scan's structure that lies within what the moved reference saw.
    """

    grid: Grid
    correlation: np.ndarray
    before: np.ndarray
    difference: np.ndarray
    structure: np.ndarray
    misplaced: np.ndarray
    covered_percent: float

    def measures(self, near: np.ndarray | None = None) -> dict[str, float]:
        """`correlation`: mean over the structure; `correlation_before`: over what of it the unmoved reference
        reaches; `correlation_gain`: from the one to the other, both over the latter; `unlike_percent`: part of the
        structure with a correlation below 0.5; `misplaced_percent`. With a mask `near` (z, y, x), of the structure
        within it; NaN where there is none."""
        where = self.structure if near is None else self.structure & near
        both = where & np.isfinite(self.before)
        some = bool(where.any())
        return {
            "correlation": float(self.correlation[where].mean()) if some else math.nan,
            "correlation_before": float(self.before[both].mean()) if both.any() else math.nan,
            "correlation_gain": float((self.correlation - self.before)[both].mean()) if both.any() else math.nan,
            "unlike_percent": 100 * float((self.correlation[where] < UNLIKE).mean()) if some else math.nan,
            "misplaced_percent": 100 * float(self.misplaced[where].mean()) if some else math.nan,
        }


def agreement(
    model: STNeRP, scan: sitk.Image, t: float, reference: tuple[np.ndarray, np.ndarray | None] | None = None
) -> Agreement:
    """How a scan of time t, fitted or not, agrees with the model's reference moved to t.

    Args:
        reference: as `smooth_reference` draws it; None: drawn here.
    """
    values, has_seen = smooth_reference(model) if reference is None else reference
    grid = working_grid(Grid.of(scan))
    points_mm = grid.points_world()
    moved_mm = model.map_points(points_mm, t)
    still_mm = apply_affine(np.linalg.inv(affine_at(model.alignments, model.times, t, model.period)), points_mm)

    fixed = windows_of(scan, model.window, grid)
    moved, still = (
        _reference_at(there_mm, grid, values, has_seen, model.grid) for there_mm in (moved_mm, still_mm)
    )
    seen, shown = fixed.structure() & fixed.whole, moved.structure()
    both = fixed.whole & moved.whole
    structure = (seen | shown) & both
    correlation = fixed.correlation(moved)
    elsewhere = np.zeros_like(structure)
    for step in _steps(grid):
        there = moved.shifted(step)
        elsewhere |= there.whole & (fixed.correlation(there) > correlation + GAIN)
    return Agreement(
        grid=grid,
        correlation=np.where(both, correlation, np.nan),
        before=np.where(fixed.whole & still.whole, fixed.correlation(still), np.nan),
        difference=np.where(fixed.inside & moved.inside, np.abs(fixed.image - moved.image), np.nan),
        structure=structure,
        misplaced=elsewhere & seen & shown & structure,
        covered_percent=100 * float((seen & moved.inside).sum() / max(seen.sum(), 1)),
    )


def smooth_reference(model: STNeRP, scan: sitk.Image | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """The model's reference in [0, 1], smoothed as scans are before they are compared, (z, y, x) over its grid.

    Args:
        scan: the reference image, which says better than its picture where its field of view ends.

    Returns:
        The values, and how much of each of these voxels was seen, [0, 1]; None: all.
    """
    shown, seen = compared(model.image(model.reference_time), model.window, scan)
    fine = model.grid.with_spacing(_at_least(model.grid, WORK_MM / 2))
    values, covered = on_grid(shown, model.grid, fine, sigma_mm=WORK_MM / 2, seen=seen)
    return values, None if seen is None else covered.astype(np.float32)


# -- the scans among themselves


def exchanged(series: Series, alignments: np.ndarray) -> tuple[int, int, float] | None:
    """The two scans whose exchange would shorten the way from scan to scan most, and by how many percent.

    The way is the sum of 1 − mean local correlation over neighbours in time (closed, for a cycle). Where motion is
    smooth in time no exchange shortens it.

    Args:
        alignments: (T, 4, 4), reference point -> point of the image at each time.

    Returns:
        Indices and percent, the latter 0 where none does; None for fewer than four scans, too few to tell.
    """
    count, grid = len(series), working_grid(series.grid)
    if count < 4:
        return None
    scans = [
        windows_of(image, series.window, grid, alignment)
        for image, alignment in zip(series.images, alignments, strict=True)
    ]
    structures = [scan.structure() for scan in scans]
    apart = np.zeros((count, count))
    for i, j in combinations(range(count), 2):
        where = (structures[i] | structures[j]) & scans[i].whole & scans[j].whole
        apart[i, j] = apart[j, i] = 1 - scans[i].correlation(scans[j])[where].mean() if where.any() else 1.0

    def way(order: list[int]) -> float:
        following = order[1:] + order[:1] if series.period is not None else order[1:]
        return float(sum(apart[i, j] for i, j in zip(order, following, strict=False)))

    given = list(range(count))
    best = (0, 0, 0.0)
    # The reference comes last: an open way is as long backwards.
    for i, j in sorted(combinations(given, 2), key=lambda pair: series.reference in pair):
        order = given.copy()
        order[i], order[j] = j, i
        gain = 100 * (1 - way(order) / max(way(given), 1e-9))
        if gain > best[2] + 1e-6:
            best = (i, j, gain)
    return best


# -- parts of the above


def _reference_at(
    points_mm: np.ndarray, grid: Grid, values: np.ndarray, has_seen: np.ndarray | None, own: Grid
) -> Windows:
    """The reference, on a grid `own`, at points (z, y, x, 3) that the voxels of `grid` came from."""
    inside = own.contains(points_mm)
    if has_seen is not None:
        inside &= _read(has_seen, own, points_mm) > 0.5
    return Windows.of(_read(values, own, points_mm), grid, inside)


def _read(reference: np.ndarray, grid: Grid, points_mm: np.ndarray) -> np.ndarray:
    """A volume over a grid's cube, read linearly at points (z, y, x, 3)."""
    cube = torch.from_numpy(grid.world_to_cube(points_mm).reshape(1, -1, 3))
    return sample(torch.from_numpy(reference)[None, None], cube)[0, 0].reshape(points_mm.shape[:3]).numpy()


def _at_least(grid: Grid, spacing_mm: float) -> Triple:
    x, y, z = (max(s, spacing_mm) for s in grid.spacing_mm)
    return x, y, z


def _steps(grid: Grid) -> set[tuple[int, int, int]]:
    """Whole voxels (z, y, x) to about `SEARCH_MM` off, in 26 directions."""
    spacing_mm = np.array(grid.spacing_mm[::-1])
    directions = [np.array(d) for d in product((-1, 0, 1), repeat=3) if any(d)]
    steps = [np.rint(far / np.linalg.norm(d) * d / spacing_mm) for d in directions for far in SEARCH_MM]
    return {(int(z), int(y), int(x)) for z, y, x in steps} - {(0, 0, 0)}
