"""How far to trust a fit: maps of what is uncertain, and a plain verdict for each time.

Independent looks:

refits
    The fit again, coarser, from other seeds and, where images lie between others, each without some of those.
    Where they put a point elsewhere, the images don't say where it is (a bootstrap of registration: Kybic, IEEE
    TIP 19, 2010).
agreement
    Each scan against the moved reference, and the scans' order against their likeness (`stnerp.agreement`).
geometry
    Folding, volume changes that no tissue shows, inverse consistency, fields of view, extrapolated times.

Nothing here knows a modality. Every limit of a verdict is in `Limits`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from scipy.ndimage import distance_transform_edt

from stnerp.agreement import (
    GAIN,
    SEARCH_MM,
    WINDOW_MM,
    WORK_MM,
    Agreement,
    agreement,
    exchanged,
    smooth_reference,
    windows_of,
    working_grid,
)
from stnerp.alignment import affine_at
from stnerp.errors import InputError
from stnerp.field_of_view import saw
from stnerp.fit import fit_deformation
from stnerp.geometry import Grid, apply_affine, slabs
from stnerp.model import STNeRP
from stnerp.monitor import MOST_POINTS, check_roi, jacobian_at, label_points
from stnerp.series import Series
from stnerp.time_basis import index_at, neighbours, time_text
from stnerp.velocity import compose, exponential

logger = logging.getLogger(__name__)

REFIT_LEVELS = ((8.0, 12.0, 60), (4.0, 6.0, 50))  # the fast preset without its last, dearest level
# As the limits below were found: the preset's finer network is dearer, its penalties go with its `bregman` and
# `contrast`.
REFIT_SETTINGS: dict[str, Any] = {
    "network_mm": 12.0,
    "bregman": 0.0,
    "contrast": 0.0,
    "diffusion": 0.01,
    "total_variation": 0.07,
    "detail_total_variation": 0.05,
}


@dataclass(frozen=True)
class Limits:
    """What a verdict calls normal. Beyond any of these: "look here".

    Attributes:
        unlike_percent: part of a scan's structure whose correlation with the moved reference is below 0.5. Another
            patient, half a picture missing or a fit that failed leave 7 to 70 %, a good fit 0 to 3 %.
        misplaced_percent: part of the structure that would agree better, by 0.1, 4 to 12 mm from where the model
            puts it: a motion that was not found. A good fit leaves 0 to 2 %.
        uncertainty_mm: 95th percentile of the refits' distance from the model: about the largest error that
            contours are granted, and a slice's thickness.
        gap_mm: 95th percentile of the motion between the two scans around a time without one: the way between
            is a guess, and can be off by a part of that.
        jacobian: least and greatest |∂φ/∂p| of tissue, whose volume is 1 / |∂φ/∂p| times what it was; not even a
            lung or a bladder changes fivefold in a series.
        jacobian_ml: volume that may lie beyond, and folded_ml, with |∂φ/∂p| ≤ 0.
        inverse_mm: 95th percentile of the distance after a way to time t and back.
        order_percent: by which exchanging two scans may shorten the way from scan to scan: 0 to 2 % in series of
            smooth motion, to 5 % with a scan of something else among them, 33 % and more in a wrong order.
        covered_percent: least part of the scan's structure that lies within the moved reference.
        outside_percent: part of the ROI that may lie outside the scan, or was drawn outside the reference.
    """

    unlike_percent: float = 5.0
    misplaced_percent: float = 3.0
    uncertainty_mm: float = 3.0
    gap_mm: float = 10.0
    jacobian: tuple[float, float] = (0.2, 5.0)
    jacobian_ml: float = 1.0
    folded_ml: float = 0.1
    inverse_mm: float = 1.0
    order_percent: float = 10.0
    covered_percent: float = 50.0
    outside_percent: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if name == "jacobian" else (value,)
            if not (isinstance(numbers, tuple) and len(numbers) == 1 + (name == "jacobian")):
                raise InputError(f"limits: {name} {value!r} must be two numbers, least and greatest")
            if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
                raise InputError(f"limits: {name} {value!r} must be a number, not negative")
            if numbers[0] > numbers[-1]:
                raise InputError(f"limits: {name} {value!r} must be two numbers, least and greatest")


@dataclass(frozen=True)
class Verdict:
    """What is said of one time.

    Attributes:
        time: in the user's unit; `measured`: whether the model was fitted to a scan of it.
        reasons: why to look here, a sentence each; none: ok.
        measures: the numbers behind, by name.
        agreement: with the scan of this time, where there is one.
    """

    time: float
    measured: bool
    reasons: tuple[str, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)
    agreement: Agreement | None = None

    @property
    def ok(self) -> bool:
        return not self.reasons

    def row(self) -> dict[str, Any]:
        """For a table: the first reason is the gravest."""
        return {
            "time": self.time,
            "measured": self.measured,
            "verdict": "ok" if self.ok else "look here",
            "reason": "; ".join(self.reasons),
            **self.measures,
        }


# -- uncertainty


def refits(
    series: Series,
    count: int = 4,
    *,
    seed: int = 1,
    align: Any = "auto",
    device: str | torch.device = "auto",
    progress: bool = True,
    levels: Sequence[Any] = REFIT_LEVELS,
) -> list[STNeRP]:
    """Independent, cheaper fits of the same series: other seeds, and scans left out where they lie between others.

    Of the scans that do, the k-th refit leaves out every `count`-th, so that each is left out once; a refit's
    `times` are those that it saw. Where there are too few, of a pair say, some leave out none: a warning.

    Raises:
        InputError: a count below 2.
    """
    if count < 2:
        raise InputError(f"refits: {count} must be 2 or more; one alone has no spread")
    between = [i for i in series.targets if series.period is not None or 0 < i < len(series) - 1]
    everything = list(range(len(series)))
    kept = [[i for i in everything if i not in between[k::count]] for k in range(count)]
    kept = [some if len(some) > 1 else everything for some in kept]
    if whole := kept.count(everything):
        logger.warning(
            "refits: %d of %d leave out no scan, as too few lie between others; their seeds alone differ, which "
            "shows less of what is uncertain",
            *(whole, count),
        )
    common: dict[str, Any] = {"align": align, "device": device, "progress": progress, "levels": levels}
    return [
        fit_deformation(series.subset(some), None, seed=seed + k, **common, **REFIT_SETTINGS)
        for k, some in enumerate(kept)
    ]


def uncertainty_at(model: STNeRP, fits: Sequence[STNeRP], points_mm: np.ndarray, t: float) -> np.ndarray:
    """√ mean |φₖ(p) − φ(p)|² over refits φₖ, at points (..., 3) of time t, (...,) in mm.

    The distance is from the model, not from the refits' mean: a model that stopped too early is off by itself. At
    a time that the model was fitted to, refits that didn't see its scan are left out; NaN if all are.
    """
    elsewhere = index_at(model.times, t, model.period) is None
    used = [fit for fit in fits if elsewhere or index_at(fit.times, t, fit.period) is not None]
    if not used:
        return np.full(points_mm.shape[:-1], np.nan)
    here_mm = model.map_points(points_mm, t)
    squared = [((fit.map_points(points_mm, t) - here_mm) ** 2).sum(-1) for fit in used]
    return np.sqrt(np.mean(squared, axis=0))


def uncertainty_mm(model: STNeRP, fits: Sequence[STNeRP], t: float, grid: Grid | None = None) -> sitk.Image:
    """`uncertainty_at` every voxel of a grid (default: the reference's), float32, in mm."""
    grid = grid or model.grid
    values = np.empty(grid.shape, np.float32)
    for part, points_mm in slabs(grid):
        values[part] = uncertainty_at(model, fits, points_mm, t)
    return grid.image(values)


def inverse_consistency_mm(model: STNeRP, t: float) -> sitk.Image:
    """|exp(v) ∘ exp(−v) − id| on the lattice that carries the deformation, float32, in mm.

    Exact flows give zero; what is left shows a lattice too coarse for the motion, or too few squarings.
    """
    half_extent_mm = torch.from_numpy(model.lattice.half_extent_mm)[:, None, None, None]
    velocity = model.velocity_mm(t).double().cpu() / half_extent_mm
    there, back = (exponential(sign * velocity, model.settings.squarings) for sign in (-1, 1))
    apart_mm = (compose(back, there) * half_extent_mm).norm(dim=1)[0]
    return model.lattice.image(apart_mm.float().numpy())


def round_trip_mm(model: STNeRP, points_mm: np.ndarray, t: float) -> np.ndarray:
    """How far reference points (N, 3) are from themselves after `map_points` to time t and back, (N,) in mm."""
    back_mm = model.map_points(model.map_points(points_mm, t, inverse=True), t)
    return np.linalg.norm(back_mm - points_mm, axis=1)


# -- verdicts

Finding = tuple[dict[str, float], list[str]]  # numbers by name, and reasons to look


def verdicts(
    model: STNeRP,
    series: Series,
    times: Iterable[float] | None = None,
    *,
    fits: Sequence[STNeRP] = (),
    roi: sitk.Image | None = None,
    limits: Limits | None = None,
) -> list[Verdict]:
    """Whether each time is ok, or why to look there.

    Args:
        model: the fit that is judged.
        series: its scans, or more of them: those that the fit didn't see are compared as well.
        times: any, in the user's unit; None: those of the scans.
        fits: as from `refits`; without them their distance is not judged.
        roi: labels drawn on the reference; all is judged there, scans within `WINDOW_MM` of it. None: wherever
            the reference has structure.
        limits: what is normal.

    Raises:
        InputError: a series of another reference, or a ROI that is empty or outside it.
    """
    if not series.grid.is_close(model.grid) or series.reference_time != model.reference_time:
        raise InputError("series: its reference is not the model's; give the series that the model was fitted to")
    judge = _Judge(model, series, fits, roi, limits or Limits())
    return [judge.at(float(t)) for t in (series.times if times is None else times)]


class _Judge:
    """What all times have in common, and one check a method."""

    def __init__(
        self, model: STNeRP, series: Series, fits: Sequence[STNeRP], roi: sitk.Image | None, limits: Limits
    ) -> None:
        self.model, self.series, self.fits, self.limits = model, series, fits, limits
        self.reference = smooth_reference(model, series.reference_image)
        self.roi = roi is not None
        if roi is not None:
            check_roi(roi, model.grid, "roi")
            points_mm, voxel_ml = label_points(roi), math.prod(roi.GetSpacing()) / 1000
        else:
            grid = working_grid(series.grid)
            windows = windows_of(series.reference_image, series.window, grid)
            structure = windows.structure() & windows.inside
            if not structure.any():  # nothing to compare, which the scans' findings say
                structure = np.ones_like(structure)
            points_mm, voxel_ml = grid.points_world()[structure], math.prod(grid.spacing_mm) / 1000
        self.unseen_percent = 100 * float((~saw(series.reference_image, points_mm)).mean())
        step = len(points_mm) // MOST_POINTS | 1
        self.points_mm, self.point_ml = points_mm[::step], step * voxel_ml
        alignments = np.stack([self.alignment(t) for t in series.times])
        self.exchanged = exchanged(series, alignments)
        self.scans: dict[int, Finding] = {}
        self.agreements: dict[int, Agreement] = {}

    def at(self, t: float) -> Verdict:
        measures: dict[str, float] = {}
        reasons: list[str] = []
        there_mm = self.model.map_points(self.points_mm, t, inverse=True)
        findings = [
            self.reach(),
            self.scan_at(t),
            self.order(t),
            self.time(t),
            self.fits_at(t, there_mm),
            self.geometry(t, there_mm),
        ]
        for numbers, sentences in findings:
            measures |= numbers
            reasons += sentences
        scan = index_at(self.series.times, t, self.series.period)
        found = None if scan is None else self.agreements.get(scan)
        measured = index_at(self.model.times, t, self.model.period) is not None
        return Verdict(t, measured, tuple(reasons), measures, found)

    def alignment(self, t: float) -> np.ndarray:
        return affine_at(self.model.alignments, self.model.times, t, self.model.period)

    def reach(self) -> Finding:
        """How much of the ROI the reference doesn't show."""
        if not self.roi:
            return {}, []
        measures = {"outside_reference_percent": self.unseen_percent}
        if self.unseen_percent <= self.limits.outside_percent:
            return measures, []
        return measures, [
            f"{self.unseen_percent:.0f} % of the ROI lies outside the reference, where motion is a guess"
        ]

    def scan_at(self, t: float) -> Finding:
        """The scan of this time; at a time without one, whether those around it are in doubt."""
        if (i := index_at(self.series.times, t, self.series.period)) is not None:
            return self.scan(i)
        doubtful = [i for i in self.around(t) if self.scan(i)[1]]
        times = [time_text(self.series.times[i]) for i in doubtful]
        return {}, [f"the scan at t = {time}, next to this time, is in doubt" for time in times]

    def around(self, t: float) -> list[int]:
        """The scan of a time, or those before and after it."""
        before, after, weight = neighbours(self.series.times, t, self.series.period)
        return [before] if weight == 0 else sorted({before, after})

    def scan(self, index: int) -> Finding:
        """How one scan agrees with the moved reference."""
        if index not in self.scans:
            self.scans[index] = self._scan(index)
        return self.scans[index]

    def _scan(self, index: int) -> Finding:
        limits, reasons = self.limits, []
        scan, t = self.series.images[index], self.series.times[index]
        found = self.agreements[index] = agreement(self.model, scan, t, self.reference)
        near = None
        outside = 0.0
        if self.roi:
            there_mm = self.model.map_points(self.points_mm, t, inverse=True)
            outside = 100 * float((~saw(scan, there_mm)).mean())
            near = _near(found.grid, there_mm)
        measures = found.measures(near) | {"covered_percent": found.covered_percent}
        if outside > limits.outside_percent:
            reasons.append(f"{outside:.0f} % of the ROI leaves the scan's field of view")
        if math.isnan(measures["correlation"]) and not reasons:
            reasons.append(
                "neither the scan nor the moved reference has structure here: nothing could be compared"
            )
        if measures["unlike_percent"] > limits.unlike_percent:
            reasons.append(
                f"{measures['unlike_percent']:.0f} % of the scan's structure looks unlike the moved reference: "
                "another patient, a damaged image, tissue that changed, or a fit that failed"
            )
        if measures["correlation_gain"] < -GAIN / 10:
            reasons.append(
                "the scan agrees less with the moved reference than with the reference where it lay, by "
                f"{-measures['correlation_gain']:.2f} in correlation: the fit made it worse"
            )
        if measures["misplaced_percent"] > limits.misplaced_percent:
            reasons.append(
                f"{measures['misplaced_percent']:.0f} % of the structure agrees better {SEARCH_MM[0]:g} to "
                f"{SEARCH_MM[-1]:g} mm from where the model puts it: motion was not found"
            )
        if self.roi:
            measures["outside_percent"] = outside
        elif found.covered_percent < limits.covered_percent:
            reasons.append(
                f"only {found.covered_percent:.0f} % of the scan's structure lies within the moved reference"
            )
        return measures, reasons

    def order(self, t: float) -> Finding:
        """Whether this scan seems to be in the wrong place of the series; without a scan, whether any does."""
        if self.exchanged is None:
            return {}, []
        i, j, gain = self.exchanged
        here = index_at(self.series.times, t, self.series.period)
        elsewhere = here is not None and here not in (i, j)
        if gain <= self.limits.order_percent or elsewhere:
            return {"order_percent": gain}, []
        first, second = (time_text(self.series.times[k]) for k in (i, j))
        return {"order_percent": gain}, [
            f"with the scans at t = {first} and {second} exchanged, the series would change {gain:.0f} % less "
            "from scan to scan: check their times, or the change is irregular and not to be predicted"
        ]

    def time(self, t: float) -> Finding:
        """How far this time is from what was measured."""
        times, period = self.model.times, self.model.period
        if index_at(times, t, period) is not None:
            return {"gap_p95_mm": 0.0}, []
        if period is None and not times[0] <= t <= times[-1]:
            return {}, ["this is before the first or after the last scan: the motion goes on in a straight line"]
        before, after, _ = neighbours(times, t, period)
        apart_mm = np.linalg.norm(self.still(times[before]) - self.still(times[after]), axis=1)
        gap_mm = float(np.percentile(apart_mm, 95))
        if gap_mm <= self.limits.gap_mm:
            return {"gap_p95_mm": gap_mm}, []
        return {"gap_p95_mm": gap_mm}, [
            f"between the scans around this time 5 % of the tissue moves by more than {gap_mm:.0f} mm, "
            "and the way between is a guess"
        ]

    def still(self, t: float) -> np.ndarray:
        """Where the points are at time t, the patient's place in the scanner left out."""
        there_mm = self.model.map_points(self.points_mm, t, inverse=True)
        return apply_affine(np.linalg.inv(self.alignment(t)), there_mm)

    def fits_at(self, t: float, there_mm: np.ndarray) -> Finding:
        """How far refits are from the model."""
        if not self.fits:
            return {}, []
        apart_mm = uncertainty_at(self.model, self.fits, there_mm, t)
        p95_mm = float(np.percentile(apart_mm, 95))
        measures = {"uncertainty_mean_mm": float(apart_mm.mean()), "uncertainty_p95_mm": p95_mm}
        if np.isnan(p95_mm):
            return measures, ["no other fit has seen this scan, so that nothing is known of how far off it may be"]
        if not p95_mm > self.limits.uncertainty_mm:
            return measures, []
        return measures, [
            f"other fits of the same scans put 5 % of the tissue more than {p95_mm:.1f} mm elsewhere"
        ]

    def geometry(self, t: float, there_mm: np.ndarray) -> Finding:
        """Whether tissue can deform like this, and the way back leads back."""
        limits, reasons = self.limits, []
        jacobian = jacobian_at(self.model, there_mm, t, WORK_MM / 4)
        folded_ml = self.point_ml * float((jacobian <= 0).sum())
        low, high = limits.jacobian
        beyond_ml = self.point_ml * float(((jacobian < low) | (jacobian > high)).sum())
        misses_mm = [round_trip_mm(self.model, self.points_mm, t)]
        if not self.roi:
            misses_mm.append(sitk.GetArrayFromImage(inverse_consistency_mm(self.model, t)))
        inverse_mm = max(float(np.percentile(miss_mm, 95)) for miss_mm in misses_mm)
        if folded_ml > limits.folded_ml:
            reasons.append(f"{folded_ml:.1f} ml of tissue fold")
        if beyond_ml > limits.jacobian_ml:
            most, least = (1 / limit if limit else math.inf for limit in limits.jacobian)
            reasons.append(
                f"{beyond_ml:.1f} ml of tissue grow beyond {most:g} or shrink below {least:g} times their volume"
            )
        if inverse_mm > limits.inverse_mm:
            reasons.append(f"the way to this time and back misses by {inverse_mm:.1f} mm (95 %)")
        return {
            "folded_ml": folded_ml,
            "jacobian_min": float(jacobian.min()),
            "jacobian_max": float(jacobian.max()),
            "beyond_jacobian_ml": beyond_ml,
            "inverse_p95_mm": inverse_mm,
        }, reasons


def _near(grid: Grid, points_mm: np.ndarray) -> np.ndarray:
    """Voxels (z, y, x) within `WINDOW_MM` of some point."""
    index = np.rint(grid.world_to_index(points_mm)).astype(int)
    index = index[np.all((index >= 0) & (index < grid.size), axis=1)]
    far = np.ones(grid.shape, bool)
    far[tuple(index[:, ::-1].T)] = False
    if far.all():
        return ~far
    return distance_transform_edt(far, sampling=grid.spacing_mm[::-1]) <= WINDOW_MM
