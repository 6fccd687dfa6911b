"""A scan against the moved reference: images that agree by construction, and what must not matter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from stnerp import STNeRP, load_series
from stnerp.agreement import Agreement, agreement, exchanged
from stnerp.def_net import DefNet
from stnerp.geometry import Grid
from stnerp.presets import DefNetSettings, Level
from stnerp.time_basis import TimeBasis

GRID = Grid((30, 26, 24), (4.0, 4.0, 4.0), (-58.0, -50.0, 10.0))


def blobs(
    shift_mm: Sequence[float] | np.ndarray = (0, 0, 0), gain: float = 1.0, offset: float = 0.0
) -> sitk.Image:
    """Smooth structure everywhere, as if moved by a shift, or one for each voxel (z, y, x, 3); from 0 to 1."""
    x, y, z = np.moveaxis((GRID.points_world() - np.asarray(shift_mm)) / 9.0, -1, 0)
    waves = np.sin(x + 0.3 * z) * np.cos(0.8 * y) + np.sin(0.7 * z - 0.4 * y) * np.cos(0.9 * x)
    return GRID.image((gain * (waves / 4 + 0.5) + offset).astype(np.float32))


class Known(DefNet):
    """Velocity t · (shift + linear · x), mm along the grid's axes at points in those mm."""

    def __init__(self, grid: Grid, times: Sequence[float], shift_mm: Sequence[float], linear: float) -> None:
        super().__init__(grid, TimeBasis(tuple(times), times[0]))
        self.weight = nn.Parameter(torch.zeros(1))
        self.shift_mm, self.linear = torch.tensor(shift_mm, dtype=torch.float32), linear

    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        axis_mm = self.grid.vectors_from_cube(points)
        return torch.stack([t * (self.shift_mm + self.linear * axis_mm) for t in times])


def known(
    times: Sequence[float] = (0.0, 1.0),
    shift_mm: Sequence[float] = (0, 0, 0),
    linear: float = 0.0,
    slices: int = GRID.size[2],
) -> STNeRP:
    """A model of the blobs, of their lowest slices alone."""
    series = load_series([blobs()] * len(times), times, window=(0, 1))
    return STNeRP(
        def_net=Known(GRID.part((0, 0, 0), (29, 25, slices - 1)), times, shift_mm, linear),
        ref_net=None,
        reference_voxels=sitk.GetArrayFromImage(blobs())[:slices],
        settings=DefNetSettings(levels=(Level(4, 8, 1),)),
        alignments=np.stack([np.eye(4)] * len(times)),
        window=series.window,
    )


def test_a_scan_that_moved_as_the_model_says_agrees() -> None:
    # Target -> reference by −6 mm: the scan lies 6 mm further along z.
    model = known(shift_mm=(0, 0, -6))
    found = agreement(model, blobs((0, 0, 6)), 1.0)
    measures = found.measures()
    assert found.structure.mean() > 0.4
    assert measures["correlation"] > 0.99  # 6 mm are one and a half voxels: read between them
    assert measures["misplaced_percent"] == measures["unlike_percent"] == 0
    assert measures["correlation_before"] < measures["correlation"] - 0.05
    assert np.nanmax(found.difference[found.structure]) < 0.05
    # The other direction is 12 mm off.
    wrong = agreement(known(shift_mm=(0, 0, 6)), blobs((0, 0, 6)), 1.0).measures()
    assert wrong["misplaced_percent"] > 50
    assert wrong["correlation"] < wrong["correlation_before"]


def test_brightness_and_contrast_do_not_matter() -> None:
    ours = agreement(known(), blobs(), 1.0).measures()
    darker = agreement(known(), blobs(gain=0.4, offset=0.1), 1.0).measures()
    inverted = agreement(known(), blobs(gain=-1, offset=1), 1.0).measures()
    assert ours["correlation"] == pytest.approx(1, abs=1e-2)
    assert darker["correlation"] == pytest.approx(ours["correlation"], abs=1e-2)
    assert inverted["correlation"] == pytest.approx(-1, abs=1e-2)
    assert inverted["unlike_percent"] == 100


def test_where_the_reference_does_not_reach_nothing_is_said() -> None:
    scan = blobs()
    scan.SetOrigin((2.0, -50.0, 10.0))  # half of it beside the reference
    found = agreement(known(), scan, 1.0)
    assert found.covered_percent == pytest.approx(50, abs=6)
    seen = Grid.of(scan).points_world()[..., 0] <= GRID.points_world()[..., 0].max() + 2
    assert np.isnan(found.correlation[~seen]).all()
    assert not found.structure[~seen].any()


def half_reached(before: float) -> Agreement:
    """A correlation of 0.9, below of 0.5; the unmoved reference doesn't reach there, and has `before` above."""
    correlation, unmoved = np.full(GRID.shape, 0.9), np.full(GRID.shape, before)
    correlation[:12], unmoved[:12] = 0.5, np.nan
    everywhere = np.ones(GRID.shape, bool)
    return Agreement(GRID, correlation, unmoved, 0 * correlation, everywhere, ~everywhere, 100.0)


def test_the_gain_is_of_what_both_reach() -> None:
    measures = half_reached(0.8).measures()
    assert measures["correlation"] == pytest.approx(0.7)
    assert measures["correlation_before"] == pytest.approx(0.8)
    assert measures["correlation_gain"] == pytest.approx(0.1)
    nowhere = half_reached(0.8).measures(np.arange(24)[:, None, None] < 12)
    assert nowhere["correlation"] == pytest.approx(0.5)
    assert np.isnan(nowhere["correlation_gain"])


# -- order


def test_exchanged_scans_are_found() -> None:
    still = np.stack([np.eye(4)] * 6)
    scans = [blobs((2.0 * i, 0, 0)) for i in range(6)]
    series = load_series(scans, window=(0, 1))
    assert exchanged(series, still) == (0, 0, 0.0)
    swapped = [scans[i] for i in (0, 4, 2, 3, 1, 5)]
    i, j, gain = exchanged(load_series(swapped, window=(0, 1)), still) or (0, 0, 0)
    assert (i, j) == (1, 4)
    assert gain > 20
    assert exchanged(series.subset([0, 1, 2]), still[:3]) is None
