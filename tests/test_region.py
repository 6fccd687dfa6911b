"""What of a field of view is fitted: the patient, at all times, without couch and air; the rest fades to rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from stnerp import Series, STNeRP, fit_deformation, fit_reference, load_series
from stnerp.def_net import def_net_of
from stnerp.geometry import Grid, homogeneous
from stnerp.presets import DefNetSettings, Level
from stnerp.region import FADE_MM, MARGIN_MM, around, box_around, faded, patient_points
from stnerp.time_basis import TimeBasis
from stnerp.window import Window

TURN = tuple(Rotation.from_euler("zyx", (20.0, -10.0, 5.0), degrees=True).as_matrix().ravel())
STRAIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
WIDE = Grid((100, 90, 40), (4.0, 4.0, 5.0), (10.0, -300.0, 50.0))
FINE = Grid((200, 180, 20), (2.0, 2.0, 10.0), WIDE.origin_mm)  # the same field of view; a couch's shell is thin
STILL = np.stack([np.eye(4)] * 2)
LOOKED_MM = 5.0  # a voxel that is looked at, and what opening rounds off


def scan(
    grid: Grid, centre_mm: tuple[float, float, float], half_axes_mm: tuple[float, float, float], couch: bool = True
) -> sitk.Image:
    """A CT: water in an ellipsoid, in mm along the axes from the grid's first voxel, structure in it; a couch."""
    x, y, z = np.moveaxis(grid.vectors_from_world(grid.points_world() - np.asarray(grid.origin_mm)), -1, 0)
    u, v, w = ((a - c) / h for a, c, h in zip((x, y, z), centre_mm, half_axes_mm, strict=True))
    inside = u**2 + v**2 + w**2 < 1
    hu = np.where(inside, 200 * np.cos(7 * u) * np.cos(7 * v) * np.cos(7 * w), -1000.0)
    if couch:
        bottom = centre_mm[1] + half_axes_mm[1] + 60
        foam, shell = (np.abs(y - bottom) < h for h in (28, 32))
        hu = np.where(shell & ~inside, np.where(foam, -940.0, -100.0), hu)
    return grid.image((hu + np.random.default_rng(0).normal(0, 20, hu.shape)).astype(np.float32))


def pair(*images: sitk.Image) -> Series:
    return load_series(list(images), [float(t) for t in range(len(images))], window="ct")


def patient_region(series: Series, alignments: np.ndarray) -> Grid:
    return box_around(patient_points(series), series.grid, alignments)


@pytest.mark.parametrize("direction", [STRAIGHT, TURN], ids=["straight", "oblique"])
def test_it_holds_the_patient_and_a_margin_and_no_couch(direction: tuple[float, ...]) -> None:
    grid = Grid(FINE.size, FINE.spacing_mm, FINE.origin_mm, direction)
    centre, half = (180.0, 120.0, 100.0), (120.0, 70.0, 200.0)
    region = patient_region(pair(*[scan(grid, centre, half)] * 2), STILL)
    first = grid.vectors_from_world(np.asarray(region.origin_mm) - np.asarray(grid.origin_mm))
    last = first + region.extent_mm
    for axis in (0, 1):  # the slices show a cut through the patient: all along z
        assert (
            centre[axis] - half[axis] - MARGIN_MM - 2 * LOOKED_MM
            < first[axis]
            <= centre[axis] - half[axis] - MARGIN_MM + LOOKED_MM
        )
        assert (
            centre[axis] + half[axis] + MARGIN_MM - LOOKED_MM
            <= last[axis]
            < centre[axis] + half[axis] + MARGIN_MM + 2 * LOOKED_MM
        )
    assert (first[2], region.size[2]) == (pytest.approx(0, abs=1e-9), grid.size[2])
    # Voxels of the reference, in its array and in space.
    numbers = np.arange(grid.voxels).reshape(grid.shape)
    part = numbers[region.within(grid)]
    assert part.shape == region.shape
    np.testing.assert_allclose(region.points_world()[3, 4, 5], grid.points_world().reshape(-1, 3)[part[3, 4, 5]])


def test_it_holds_the_patient_where_every_image_has_it() -> None:
    """The second image shows the patient elsewhere, and is itself elsewhere: alignment brings it back half-way."""
    centre, half = (180.0, 120.0, 100.0), (60.0, 50.0, 200.0)
    other = Grid(FINE.size, FINE.spacing_mm, tuple(np.add(FINE.origin_mm, (0.0, 30.0, 0.0))))  # type: ignore[arg-type]
    series = pair(scan(FINE, centre, half), scan(other, (220.0, 120.0, 100.0), half))
    half_way = homogeneous(np.eye(3), (20.0, 30.0, 0.0))  # reference -> image
    region = patient_region(series, np.stack([np.eye(4), half_way]))
    first = np.asarray(region.origin_mm) - np.asarray(FINE.origin_mm)
    last = first + region.extent_mm
    # In the reference's frame the other patient lies 20 mm further along x, and nowhere else along y.
    assert first[:2] == pytest.approx([180 - 60 - MARGIN_MM, 120 - 50 - MARGIN_MM], abs=2 * LOOKED_MM)
    assert last[:2] == pytest.approx([200 + 60 + MARGIN_MM, 120 + 50 + MARGIN_MM], abs=2 * LOOKED_MM)


@pytest.mark.parametrize("window", ["ct", (-150.0, 250.0)])
def test_lungs_belong_to_the_patient_in_every_window(window: str | tuple[float, float]) -> None:
    """Bones would be all that a narrow window shows of it."""
    body = sitk.GetArrayFromImage(scan(FINE, (180.0, 120.0, 100.0), (120.0, 70.0, 900.0)))
    lung = sitk.GetArrayFromImage(scan(FINE, (180.0, 120.0, 100.0), (118.0, 68.0, 900.0), couch=False)) > -500
    body[lung] = -750.0
    image = FINE.image(body)
    region = patient_region(load_series([image, image], [0.0, 1.0], window=window), STILL)
    assert region.extent_mm[:2] == pytest.approx((240 + 2 * MARGIN_MM, 140 + 2 * MARGIN_MM), abs=2 * LOOKED_MM)


@pytest.mark.parametrize("wall_mm", [8.0, 12.0])
def test_lungs_as_faint_as_foam_belong_to_the_patient(wall_mm: float) -> None:
    """All that shows of them is the wall around, thinner than any thorax and thicker than a couch's shell."""
    grid = Grid((200, 150, 20), (2.0, 2.0, 5.0))
    centre, half = (180.0, 120.0, 50.0), np.array([120.0, 70.0, 900.0])
    body = sitk.GetArrayFromImage(scan(grid, centre, (120.0, 70.0, 900.0)))
    inner = half - (wall_mm, wall_mm, 0)
    lung = sitk.GetArrayFromImage(scan(grid, centre, tuple(inner.tolist()), couch=False)) > -500
    heart = sitk.GetArrayFromImage(scan(grid, centre, (40.0, 35.0, 900.0), couch=False)) > -500
    body[lung & ~heart] = -880.0
    image = grid.image(body)
    region = patient_region(pair(image, image), STILL)
    assert region.extent_mm[:2] == pytest.approx((240 + 2 * MARGIN_MM, 140 + 2 * MARGIN_MM), abs=2 * LOOKED_MM)


def test_of_what_is_no_ct_all_is_covered() -> None:
    """Of a PET most of the body is a fiftieth as bright as what lights up in it."""
    counts = sitk.GetArrayFromImage(scan(FINE, (180.0, 120.0, 100.0), (120.0, 70.0, 900.0), couch=False)) + 1000
    counts[8:10, 50:70, 80:100] = 50_000
    image = FINE.image(np.maximum(counts, 0))
    assert patient_region(load_series([image, image], [0.0, 1.0]), STILL) == FINE


def test_what_contours_and_landmarks_mark_belongs_to_the_patient() -> None:
    patient = scan(FINE, (180.0, 120.0, 100.0), (80.0, 60.0, 900.0))
    alone = patient_region(pair(patient, patient), STILL)
    marked = np.zeros(FINE.shape, np.uint8)
    marked[5:8, 140:144, 180:184] = 2
    masks = [None, FINE.image(marked)]
    with_contour = patient_region(load_series([patient] * 2, [0.0, 1.0], window="ct", masks=masks), STILL)
    points = np.add(FINE.origin_mm, [[8.0, 100.0, 90.0], [200.0, 100.0, 90.0]])
    with_landmark = patient_region(
        load_series([patient] * 2, [0.0, 1.0], window="ct", landmarks=[points] * 2), STILL
    )
    last = FINE.world_to_index(with_contour.index_to_world(np.asarray(with_contour.size) - 1.0))
    assert (last[:2] >= (183, 143)).all()
    assert with_contour.origin_mm == alone.origin_mm
    assert with_landmark.origin_mm[0] == FINE.origin_mm[0] < alone.origin_mm[0]


def test_two_legs_are_one_patient() -> None:
    legs = [scan(FINE, (c, 120.0, 100.0), (40.0, 40.0, 900.0), couch=False) for c in (90.0, 250.0)]
    both = sitk.Maximum(*legs)
    region = patient_region(pair(both, both), STILL)
    assert region.extent_mm[0] == pytest.approx(160 + 80 + 2 * MARGIN_MM, abs=2 * LOOKED_MM)


def test_fingers_belong_to_a_hand() -> None:
    """They are thinner than a couch; but then so is the field of view."""
    grid = Grid((260, 170, 60), (1.0, 1.0, 1.0))
    palm = scan(grid, (60.0, 85.0, 30.0), (30.0, 30.0, 12.0), couch=False)
    finger = scan(grid, (120.0, 85.0, 30.0), (90.0, 5.0, 5.0), couch=False)
    hand = sitk.Maximum(palm, finger)
    region = patient_region(pair(hand, hand), STILL)
    assert region.voxels < 0.8 * grid.voxels
    assert region.index_to_world(np.asarray(region.size) - 1)[0] >= 205


@pytest.mark.parametrize(
    "image",
    [
        scan(FINE, (200.0, 180.0, 100.0), (190.0, 170.0, 900.0)),
        FINE.image(np.where(np.indices(FINE.shape).sum(0) % 9, -1000.0, 0.0).astype(np.float32)),
        scan(Grid((60, 50, 4), (4.0, 4.0, 5.0)), (120.0, 100.0, 10.0), (110.0, 90.0, 50.0), couch=False),
    ],
    ids=["fills it", "sheets alone", "few slices"],
)
def test_where_there_is_little_to_leave_out_it_is_the_image(image: sitk.Image) -> None:
    series = pair(image, image)
    assert patient_region(series, STILL) == series.grid


def test_what_another_image_shows_beyond_the_reference_leaves_its_patient_as_it_is() -> None:
    """And where the reference shows nothing, nothing is left out of it."""
    patient = scan(FINE, (180.0, 120.0, 100.0), (120.0, 70.0, 200.0))
    nothing = FINE.image(np.where(np.indices(FINE.shape).sum(0) % 9, -1000.0, 0.0).astype(np.float32))
    far = np.stack([np.eye(4), homogeneous(np.eye(3), (0.0, -2000.0, 0.0))])
    assert patient_region(pair(nothing, patient), far) == FINE
    region = patient_region(pair(patient, patient), far)
    assert FINE.contains(region.points_world()).all()
    assert min(region.size) >= 20
    assert patient_region(pair(patient, nothing), STILL) == patient_region(pair(patient, patient), STILL)


def test_a_lattice_continues_until_it_covers_the_image() -> None:
    region = WIDE.part((10, 0, 3), (60, 89, 30))
    lattice = region.with_spacing(7.0)
    whole = around(lattice, WIDE)
    assert whole.size[1] == lattice.size[1]  # as far as the image along y
    np.testing.assert_allclose(whole.points_world()[lattice.within(whole)], lattice.points_world(), atol=1e-9)
    ends = whole.world_to_index(WIDE.cube_to_world(np.array([[-1.0] * 3, [1.0] * 3])))
    over = np.concatenate([ends[0], np.asarray(whole.size) - 1 - ends[1]])
    assert (over > -1e-9).all()
    assert (over < 1).all()


@pytest.mark.parametrize(
    "grid", [WIDE, Grid((60, 50, 1), (4.0, 4.0, 5.0), direction=TURN)], ids=["volume", "slice"]
)
def test_a_lattice_of_the_whole_image_stays_as_it_is(grid: Grid) -> None:
    lattice = grid.with_spacing(7.0)
    whole = around(lattice, grid)
    assert whole == lattice
    field = torch.rand(1, 3, *lattice.shape)
    assert faded(field, lattice, whole) is field


def test_around_a_region_motion_fades() -> None:
    lattice, beyond = Grid((5, 4, 3), (10.0, 12.0, 15.0), direction=TURN), round(FADE_MM / 10) + 2
    field = torch.rand(1, 3, *lattice.shape)
    whole = faded(field, lattice, lattice.part((-beyond, 0, 0), (4, 4, 2)))
    assert whole.shape == (1, 3, 3, 5, 5 + beyond)
    assert torch.equal(whole[..., :4, beyond:], field)
    along = whole[0, 0, 1, 2, :beyond].flip(0) / field[0, 0, 1, 2, 0]  # from the region outward
    assert along[round(FADE_MM / 20) - 1] == pytest.approx(0.5)
    assert (along[round(FADE_MM / 10) - 1 :].abs() < 1e-12).all()
    assert (along.diff() <= 0).all()
    corner = whole[0, 0, 1, 4, beyond - 1] / field[0, 0, 1, 3, 0]
    assert corner == pytest.approx(float(along[0] * 0.5 * (1 + np.cos(np.pi * 12 / FADE_MM))))


SETTINGS = DefNetSettings(layers=3, width=16, fourier_width=8, levels=(Level(8, 8, 1),))


def moving(region: Grid) -> STNeRP:
    """A model that moves points by several mm within a region of a wide image."""
    torch.manual_seed(0)
    net = def_net_of(region, TimeBasis((0.0, 1.0), 0.0, None), SETTINGS)
    with torch.no_grad():
        for parameter in net.modes[-1].parameters():  # type: ignore[union-attr, index]
            parameter.copy_(0.05 * torch.randn(parameter.shape))
    return STNeRP(
        def_net=net.eval(),
        ref_net=None,
        reference_voxels=np.zeros(WIDE.shape, np.float32),
        settings=SETTINGS,
        alignments=STILL,
        window=Window.of("ct"),
        grid=WIDE,
    )


def test_a_model_answers_within_the_region_as_one_of_that_alone() -> None:
    region = WIDE.part((30, 25, 0), (80, 70, 39))
    model = moving(region)
    alone = STNeRP(
        def_net=model.def_net,
        ref_net=None,
        reference_voxels=np.zeros(region.shape, np.float32),
        settings=SETTINGS,
        alignments=STILL,
        window=Window.of("ct"),
    )
    points = region.points_world()[5:-5:3, 8:-8:3, 8:-8:3].reshape(-1, 3)  # 32 mm from where it fades
    moved = model.map_points(points, 1.0)
    assert np.linalg.norm(moved - points, axis=1).mean() > 2
    # Both round points to float64 on their way, and velocities are float32.
    np.testing.assert_allclose(moved, alone.map_points(points, 1.0), atol=1e-4)
    assert model.image(1.0).GetSize() == WIDE.size


def test_a_model_moves_all_of_the_image_one_to_one_and_its_far_ends_not_at_all(tmp_path: Path) -> None:
    model = moving(WIDE.part((30, 25, 0), (80, 70, 39)))
    jacobian = sitk.GetArrayFromImage(model.jacobian(1.0))
    assert jacobian.min() > 0
    field = sitk.GetArrayFromImage(model.displacement(1.0))
    far = round(FADE_MM / 4) + 1
    assert not field[:, :, : 30 - far].any()
    assert field[:, 30:65, 40:70].any()
    points = WIDE.points_world()[::5, ::6, ::6].reshape(-1, 3)
    there = model.map_points(points, 1.0, inverse=True)
    inside = WIDE.contains(there)
    np.testing.assert_allclose(model.map_points(there[inside], 1.0), points[inside], atol=1e-3)
    again = STNeRP.load(model.save(tmp_path / "model.pt"), device="cpu")
    assert again.grid == model.grid
    assert again.def_net.grid == model.def_net.grid
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again.displacement(1.0)), field)


BRIEF: dict[str, Any] = {
    "layers": 3, "width": 64, "fourier_width": 32, "window_mm": 30.0, "levels": [(10, 20, 30), (5, 10, 20)],
    "learning_rate": 3e-3, "progress": False, "device": "cpu", "align": "none",
}  # fmt: skip


@pytest.mark.parametrize("direction", [STRAIGHT, TURN], ids=["straight", "oblique"])
@pytest.mark.parametrize("reference", ["rendered", "network"])
def test_a_fit_of_the_region_finds_what_one_of_the_image_finds(
    direction: tuple[float, ...], reference: str
) -> None:
    """A patient in a corner of the image that grows by a tenth: a crop that is off by a voxel is off by 2 mm."""
    grid = Grid((140, 120, 20), (2.0, 2.0, 5.0), (10.0, -300.0, 50.0), direction)
    centre, half = (80.0, 70.0, 50.0), np.array([50.0, 40.0, 200.0])
    grown = half * (1.1, 1.1, 1.0)
    series = pair(scan(grid, centre, tuple(half)), scan(grid, centre, tuple(grown)))
    ref_net = fit_reference(series, progress=False, device="cpu") if reference == "network" else None
    fits = [
        fit_deformation(series, ref_net, region=region, reference=reference, **BRIEF)
        for region in ("patient", "image")
    ]
    assert fits[0].def_net.grid.voxels < 0.7 * grid.voxels
    assert fits[1].def_net.grid == fits[0].grid == grid
    rng = np.random.default_rng(1)
    unit = rng.uniform(-0.6, 0.6, (200, 3)) * (1, 1, 0.2)
    there, here = (grid.vectors_to_world(unit * h + centre) + grid.origin_mm for h in (grown, half))
    errors = [np.linalg.norm(fit.map_points(there, 1.0) - here, axis=1).mean() for fit in fits]
    before = np.linalg.norm(there - here, axis=1).mean()
    assert before > 1.5
    assert errors[0] < 0.9 * before  # brief fits; one that is a voxel off would be worse than none
    assert errors[0] < errors[1] + 0.2
