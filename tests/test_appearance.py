"""Appearance that changes over time: blending along the flow, and lung density."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stnerp import Grid, InputError, Series, STNeRP, fit_deformation, load_series
from stnerp.appearance import NeighbourFlow, density, fit_flow
from stnerp.baselines.interpolation import linear_blend
from stnerp.def_net import def_net_of
from stnerp.metrics import psnr_db
from stnerp.preprocess import normalised
from stnerp.presets import FLOW, Level, with_changes
from stnerp.time_basis import Gaps, neighbours

GRID = Grid((32, 28, 24), (2.0, 2.5, 3.0), (-10.0, 5.0, 20.0))
SPEED_MM = 4.0  # per unit of time, along x
SMALL = with_changes(FLOW, {"levels": (Level(4, 12, 40), Level(3, 12, 20)), "width": 32})


def blob(t: float, speed_mm: float = SPEED_MM) -> sitk.Image:
    """A ball that moves and fades."""
    points = GRID.points_world() - GRID.centre_mm - np.array([speed_mm * (t - 1.5), 0, 0])
    ball = np.exp(-0.5 * (points**2).sum(-1) / 8**2)
    return GRID.image((100 * (1 - 0.2 * t) * ball).astype(np.float32))


@pytest.fixture(scope="module")
def series() -> Series:
    return load_series([blob(t) for t in (0, 1, 3)], times=[0, 1, 3], window=(0, 100))


@pytest.fixture(scope="module")
def flow(series: Series) -> NeighbourFlow:
    return fit_flow(series, np.stack([np.eye(4)] * 3), settings=SMALL, progress=False)


@pytest.fixture(scope="module")
def model(series: Series, flow: NeighbourFlow) -> STNeRP:
    found = fit_deformation(series, align="none", levels=[(8, 12, 1)], progress=False)
    found.flow = flow
    return found


class Steady(torch.nn.Module):
    """A velocity of its own for each gap, constant in space, along x."""

    def __init__(self, gaps: Gaps, velocities_mm: list[float]) -> None:
        super().__init__()
        self.grid, self.time_basis, self.velocities_mm = GRID, gaps, velocities_mm

    def lattice_velocity(self, shape: tuple[int, int, int], times: list[float]) -> torch.Tensor:
        velocity = torch.zeros(len(times), 3, *shape)
        for row, t in enumerate(times):
            velocity[row, 0] = float(self.time_basis(t) @ np.array(self.velocities_mm))
        return velocity


def steady(times: tuple[float, ...], velocities_mm: list[float], period: float | None = None) -> NeighbourFlow:
    net = Steady(Gaps(times, times[0], period), velocities_mm)
    images = [normalised(blob(t), load_series([blob(0), blob(1)], window=(0, 100)).window) for t in times]
    return NeighbourFlow(net, SMALL, images, [GRID] * len(times), np.stack([np.eye(4)] * len(times)), GRID)  # type: ignore[arg-type]


def test_gaps_tell_which_neighbours_are_around() -> None:
    gaps = Gaps((0.0, 1.0, 3.0), 0.0)
    assert gaps.size == 2
    assert [gaps(t).argmax() for t in (0, 0.5, 1, 2.9, 3, 7)] == [0, 0, 1, 1, 1, 1]
    assert [gaps.width(0), gaps.width(1), gaps.middle(1)] == [1, 2, 2]
    cycle = Gaps((0.0, 1.0, 3.0), 0.0, 4.0)
    assert cycle.size == 3
    assert [cycle(t).argmax() for t in (3.5, 7.5, 4.5)] == [2, 2, 0]
    assert cycle.width(2) == 1
    assert neighbours((0, 1, 3), 3.25, 4.0) == (2, 0, 0.25)


@pytest.mark.parametrize("w", [0.25, 0.5, 0.9])
def test_the_way_of_a_steady_motion_is_steady(w: float) -> None:
    # The gap is twice as long and the way, too: the same pace everywhere.
    travelled, whole = steady((0.0, 1.0, 3.0), [4.0, 8.0])._way(1, w)
    torch.testing.assert_close(travelled, w * whole)


def test_the_way_of_an_accelerated_motion_is_a_parabola() -> None:
    # x = t² at t = 0..3; a Hermite cubic through its velocities between is exact for the middle gap.
    travelled, _ = steady((0.0, 1.0, 2.0, 3.0), [1.0, 3.0, 5.0])._way(1, 0.5)
    mm = travelled[0, 0].mean() * GRID.half_extent_mm[0]
    assert mm == pytest.approx(1.5**2 - 1, abs=1e-5)  # half of the way would be 1.5


def test_the_cycle_closes() -> None:
    travelled, whole = steady((0.0, 1.0, 2.0), [2.0, 2.0, -4.0], period=3.0)._way(2, 1.0)
    torch.testing.assert_close(travelled, whole)


def test_content_is_carried_towards_its_own_future() -> None:
    """With the true flow the ball is half-way, and half as much faded; a wrong sign leaves two balls."""
    flow = steady((0.0, 2.0), [2 * SPEED_MM])
    read, covered = flow.read(GRID.points_world(), 1.0)
    assert np.abs(read - sitk.GetArrayFromImage(blob(1)) / 100).max() < 2e-3
    assert covered.all()


def test_a_measured_image_comes_back_as_it_is(model: STNeRP, series: Series) -> None:
    for image, t in zip(series.images, series.times, strict=True):
        drawn = sitk.GetArrayFromImage(model.image(t, appearance="blend"))
        assert np.abs(drawn - sitk.GetArrayFromImage(image)).max() < 1e-3  # of 100: rounding of the spline


def test_the_flow_is_found_and_beats_a_linear_blend(model: STNeRP, series: Series) -> None:
    arrays = [normalised(image, series.window) for image in series.images]
    truth = normalised(blob(2), series.window)
    blended = normalised(model.image(2, appearance="blend"), series.window)
    # 4 mm off either way; a flow that is right to a fifth wins 14 dB, one of the wrong sign loses 6.
    assert psnr_db(blended, truth) > psnr_db(linear_blend(arrays, series.times, 2), truth) + 8


def test_where_one_neighbour_ends_the_other_is_shown(flow: NeighbourFlow) -> None:
    half = Grid((16, 28, 24), GRID.spacing_mm, GRID.origin_mm)
    images = [flow.images[0], flow.images[1][:, :, :16]]
    still = steady((0.0, 1.0), [0.0])
    partly = NeighbourFlow(still.net, SMALL, images, [GRID, half], np.stack([np.eye(4)] * 2), GRID)
    read, covered = partly.read(GRID.points_world(), 0.5)
    np.testing.assert_allclose(read[:, :, 17:], images[0][:, :, 17:], atol=1e-5)
    np.testing.assert_allclose(read[:, :, :15], (images[0] + flow.images[1])[:, :, :15] / 2, atol=2e-2)
    assert covered.all()
    outside = GRID.points_world() + np.array([500.0, 0, 0])
    assert not partly.read(outside, 0.5)[1].any()


def test_where_an_image_ends_nothing_seems_to_move() -> None:
    """A still ball whose second image ends at its middle: beyond, it shows its last plane again and again."""
    half = blob(1.5)[:15]
    still = load_series([blob(1.5), half], times=[0, 1], window=(0, 100))
    found = fit_flow(still, np.stack([np.eye(4)] * 2), settings=SMALL, progress=False)
    shape = (12, 10, 10)
    velocity_mm = found.net.lattice_velocity(shape, [0.5])
    assert velocity_mm.shape == (1, 3, *shape)
    # In a unit of time, of a ball of 8 mm; with what seems to lie beyond it would be 20 mm.
    assert float(velocity_mm.detach().norm(dim=1).max()) < 0.3


def test_saved_and_loaded(model: STNeRP, tmp_path: Path) -> None:
    loaded = STNeRP.load(model.save(tmp_path / "model.pt"))
    a, b = (sitk.GetArrayFromImage(m.image(2, appearance="blend")) for m in (model, loaded))
    assert np.array_equal(a, b)  # files keep images in 16 bits, and so does the model before


def test_alignments_lead_to_each_image(series: Series) -> None:
    """An image 30 mm away, and its alignment: the blend lies where the reference does."""
    shifted = sitk.Image(series.images[1])
    shifted.SetOrigin([o + d for o, d in zip(shifted.GetOrigin(), (30, -20, 10), strict=True)])
    away = np.eye(4)
    away[:3, 3] = (30, -20, 10)
    net = def_net_of(GRID, Gaps((0.0, 1.0), 0.0), SMALL)
    arrays = [normalised(image, series.window) for image in series.images[:2]]
    flow = NeighbourFlow(net, SMALL, arrays, [GRID, Grid.of(shifted)], np.stack([np.eye(4), away]), GRID)
    read, covered = flow.read(GRID.points_world(), 1.0)
    np.testing.assert_allclose(read, arrays[1], atol=1e-5)
    assert covered.all()


def test_a_flow_of_a_region_is_found_there_and_fades_around(series: Series, tmp_path: Path) -> None:
    """Of the region's half of the image the flow is that of an image of that half alone."""
    region = GRID.part((0, 0, 4), (31, 13, 23))
    at_rest = np.stack([np.eye(4)] * 3)
    found = fit_flow(series, at_rest, region=region, settings=SMALL, progress=False)
    halves = load_series([image[:, :14, 4:] for image in series.images], times=[0, 1, 3], window=(0, 100))
    alone = fit_flow(halves, at_rest, settings=SMALL, progress=False)
    covered = region.within(GRID)
    aligned_mm = GRID.points_world()
    travelled = [f._way(0, 0.5)[0] for f in (found, alone)]
    moved = [f._carried(aligned_mm, v) - aligned_mm for f, v in zip((found, alone), travelled, strict=True)]
    assert np.abs(moved[1][covered]).max() > 0.5 * SPEED_MM
    np.testing.assert_allclose(moved[0][covered], moved[1][covered], atol=0.1)  # images end there
    assert np.abs(moved[0][:, -1]).max() < 0.8 * np.abs(moved[1][:, -1]).max()  # 35 of 60 mm beyond

    loaded = NeighbourFlow.from_dict(found.to_dict(), GRID, found.net.time_basis)  # type: ignore[arg-type]
    for got, kept in zip(loaded.read(aligned_mm, 0.5), found.read(aligned_mm, 0.5), strict=True):
        assert np.array_equal(got, kept)


def test_density_keeps_the_mass_of_the_lung() -> None:
    hu = np.array([-1000.0, -700.0, -700.0, 40.0, 900.0])
    j = np.array([0.5, 1.2, 1.0, 1.2, 0.8])
    np.testing.assert_allclose(density(hu, j), [-1000, 1.2 * 300 - 1000, -700, 40, 900])


def test_a_lung_that_expands_gets_darker(series: Series, model: STNeRP) -> None:
    voxels = np.full(GRID.shape, -700, np.float32)
    voxels[0] = 0  # a table: an image of one value is refused
    lung = GRID.image(voxels)
    ct = load_series([lung, lung], times=[0, 1], window=(-1000, 1000))
    found = fit_deformation(ct, align="none", levels=[(8, 12, 1)], progress=False)
    shrunk = GRID.vectors_from_world(-0.1 * (GRID.points_world() - GRID.centre_mm))  # φ = 0.9 id: target is larger
    found._displacement_array = lambda t, grid: shrunk  # type: ignore[method-assign]
    dark = sitk.GetArrayFromImage(found.image(1, appearance="density"))
    assert dark[12, 14, 16] == pytest.approx(300 * 0.9**3 - 1000, abs=1)


def test_what_cannot_be_shown_is_refused(series: Series, model: STNeRP) -> None:
    bare = fit_deformation(series, align="none", levels=[(8, 12, 1)], progress=False)
    with pytest.raises(InputError, match="appearance='blend'"):
        bare.image(2, appearance="blend")
    with pytest.raises(InputError, match="density needs CT"):
        model.image(2, appearance="density")
    with pytest.raises(InputError, match="unknown 'sharp'"):
        model.image(2, appearance="sharp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="appearance: unknown"):
        fit_deformation(series, appearance="density")  # type: ignore[arg-type]
