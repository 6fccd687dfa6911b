"""The model against known velocities, SimpleITK and naive loops; directions where the wrong one fails."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from stnerp import InputError, RefNet, STNeRP, geometry
from stnerp.def_net import DefNet, def_net_of
from stnerp.errors import MissingFileError
from stnerp.geometry import Grid, apply_affine
from stnerp.presets import FAST, DefNetSettings, Level, RefNetSettings, def_net_settings_of
from stnerp.time_basis import TimeBasis
from stnerp.window import Window

TIMES, REFERENCE_TIME = (0.0, 2.0, 5.0), 0.0
BASIS = TimeBasis(TIMES, REFERENCE_TIME)
SETTINGS = DefNetSettings(layers=3, width=16, fourier_width=8, levels=(Level(6, 6, 1),))
WINDOW = Window(-1000.0, 1000.0)

# float32 inside a cube of 30 mm half extent: 30 × 6e-8, and ten operations.
SINGLE_MM = 3e-5


class Known(DefNet):
    """A velocity that is known: t − t_ref times `at`, mm along the grid's axes at points in those mm."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid, BASIS)
        self.weight = nn.Parameter(torch.zeros(1))

    def at(self, axis_mm: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, points: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        velocity = self.at(self.grid.vectors_from_cube(points))
        return torch.stack([(t - REFERENCE_TIME) * velocity for t in times])


class Still(Known):
    def at(self, axis_mm: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(axis_mm)


class Uniform(Known):
    MM = (3.0, -2.0, 1.5)

    def at(self, axis_mm: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.MM).expand_as(axis_mm)


class Linear(Known):
    PER_MM = np.array([[-0.06, -0.1, 0.02], [0.08, -0.05, -0.04], [0.03, 0.05, -0.07]])

    def at(self, axis_mm: torch.Tensor) -> torch.Tensor:
        return axis_mm @ torch.tensor(self.PER_MM, dtype=axis_mm.dtype).T


class Swirl(Known):
    def at(self, axis_mm: torch.Tensor) -> torch.Tensor:
        x, y, z = (axis_mm / 20).unbind(-1)
        return 2.5 * torch.stack([torch.cos(x + z), torch.sin(x - y) + 0.4, torch.cos(y) - torch.sin(z)], dim=-1)


def affines() -> np.ndarray:
    """Pre-alignment at each time, reference -> target: nothing at the reference."""
    second, third = np.eye(4), np.eye(4)
    second[:3, :3] = Rotation.from_euler("xyz", [3, -4, 5], degrees=True).as_matrix() * 1.04
    second[:3, 3] = [2.0, 1.0, -3.0]
    third[:3, 3] = [6.0, -5.0, 4.0]
    return np.stack([np.eye(4), second, third])


def voxels(grid: Grid) -> np.ndarray:
    return np.random.default_rng(0).random(grid.shape, dtype=np.float32)


def make(net: DefNet, alignments: np.ndarray | None = None, ref_net: RefNet | None = None) -> STNeRP:
    return STNeRP(
        def_net=net,
        ref_net=ref_net,
        reference_voxels=voxels(net.grid) if ref_net is None else None,
        settings=SETTINGS,
        alignments=np.stack([np.eye(4)] * 3) if alignments is None else alignments,
        window=WINDOW,
    )


def trained(grid: Grid) -> DefNet:
    """A Def-Net of the default form with weights that move points by several mm."""
    torch.manual_seed(0)
    net = def_net_of(grid, BASIS, SETTINGS)
    with torch.no_grad():
        for parameter in net.modes[-1].parameters():  # type: ignore[union-attr, index]
            parameter.copy_(0.05 * torch.randn(parameter.shape))
    return net.eval()


def inner_points(grid: Grid, count: int = 100, within: float = 0.5) -> np.ndarray:
    """World points (N, 3) of the middle of a grid."""
    return grid.cube_to_world(np.random.default_rng(1).uniform(-within, within, (count, 3)))


# -- exact answers


def test_uniform_velocity_is_a_translation_in_world_space(oblique_grid: Grid) -> None:
    found = make(Uniform(oblique_grid))
    step_mm = oblique_grid.vectors_to_world(np.array(Uniform.MM))
    points = inner_points(oblique_grid)
    for t in (0.0, 1.0, 2.5):
        assert np.abs(found.map_points(points, t) - (points + t * step_mm)).max() < SINGLE_MM
        assert np.abs(found.map_points(points, t, inverse=True) - (points - t * step_mm)).max() < SINGLE_MM
        field = sitk.GetArrayFromImage(found.displacement(t))
        assert np.abs(field - t * step_mm).max() < SINGLE_MM
        assert np.abs(sitk.GetArrayFromImage(found.jacobian(t)) - 1).max() < 1e-4


def test_linear_velocity_is_the_matrix_exponential(oblique_grid: Grid) -> None:
    found, t = make(Linear(oblique_grid)), 1.5
    points = inner_points(oblique_grid, within=0.3)
    axis_mm = oblique_grid.vectors_from_world(points - oblique_grid.centre_mm)
    for inverse in (False, True):
        matrix = scipy.linalg.expm((-t if inverse else t) * Linear.PER_MM)
        expected = oblique_grid.centre_mm + oblique_grid.vectors_to_world(axis_mm @ matrix.T)
        error = np.abs(found.map_points(points, t, inverse) - expected).max()
        # With n squarings (I + A / 2ⁿ)^(2ⁿ) errs by |A|² / 2ⁿ⁺¹; n = 4: 0.2² / 32, over 15 mm: 0.019 mm.
        # The velocity taken for the displacement errs by |A|² / 2: 0.3 mm.
        assert error < 0.02
        assert np.abs(expected - points).max() > 1


def test_image_shows_the_reference_where_points_come_from(oblique_grid: Grid) -> None:
    # u = one voxel along each axis: what lay at voxel i + 1 of the reference is now at i.
    net = Uniform(oblique_grid)
    net.MM = oblique_grid.spacing_mm
    found, reference = make(net), WINDOW.denormalise(voxels(oblique_grid))
    image = sitk.GetArrayFromImage(found.image(1.0))
    # 1e-6 of a voxel, times differences of up to 2000 between neighbours.
    assert np.abs(image[:-1, :-1, :-1] - reference[1:, 1:, 1:]).max() < 0.05
    # Beyond the field of view: the nearest voxel's intensity, or what is asked for.
    assert np.abs(image[-1, :-1, :-1] - reference[-1, 1:, 1:]).max() < 0.05
    filled = sitk.GetArrayFromImage(found.image(1.0, outside=-500.0))
    assert np.array_equal(filled[:-1, :-1, :-1], image[:-1, :-1, :-1])
    for border in (filled[-1], filled[:, -1], filled[:, :, -1]):
        assert np.abs(border + 500).max() < 1e-3


def test_pre_alignment_comes_before_the_deformation(oblique_grid: Grid) -> None:
    alignments = affines()
    aligned_only = make(Still(oblique_grid), alignments)
    points = inner_points(oblique_grid)
    for i, t in enumerate(TIMES):
        # alignments: reference -> target; φ: target -> reference.
        assert np.abs(aligned_only.map_points(apply_affine(alignments[i], points), t) - points).max() < SINGLE_MM
        back = aligned_only.map_points(points, t, inverse=True)
        assert np.abs(back - apply_affine(alignments[i], points)).max() < SINGLE_MM
    both, t = make(Uniform(oblique_grid), alignments), 2.0
    step_mm = oblique_grid.vectors_to_world(t * np.array(Uniform.MM))
    expected = apply_affine(np.linalg.inv(alignments[1]), points) + step_mm
    assert np.abs(both.map_points(points, t) - expected).max() < SINGLE_MM
    other_order = apply_affine(np.linalg.inv(alignments[1]), points + step_mm)
    assert np.abs(expected - other_order).max() > 0.1


def test_jacobian_of_an_alignment_is_its_inverse_s_determinant(oblique_grid: Grid) -> None:
    alignments = affines()
    found = make(Still(oblique_grid), alignments)
    for i, t in enumerate(TIMES):
        jacobian = sitk.GetArrayFromImage(found.jacobian(t))
        assert np.abs(jacobian - np.linalg.det(np.linalg.inv(alignments[i]))).max() < 1e-4
    assert abs(np.linalg.det(alignments[1]) - 1) > 0.1


@pytest.mark.parametrize("reference_time", TIMES)
def test_identity_at_the_reference_time(oblique_grid: Grid, reference_time: float) -> None:
    torch.manual_seed(0)
    net = def_net_of(oblique_grid, TimeBasis(TIMES, reference_time), SETTINGS)
    alignments = affines()
    alignments[[0, TIMES.index(reference_time)]] = alignments[[TIMES.index(reference_time), 0]]
    found = make(net, alignments)
    # Nothing is rounded but the way from mm to the cube and back, in double.
    assert np.abs(sitk.GetArrayFromImage(found.displacement(reference_time))).max() < 1e-11
    points = inner_points(oblique_grid)
    for inverse in (False, True):
        assert np.abs(found.map_points(points, reference_time, inverse) - points).max() < 1e-11
    image = sitk.GetArrayFromImage(found.image(reference_time))
    assert np.abs(image - WINDOW.denormalise(voxels(oblique_grid))).max() < 0.05
    assert np.abs(sitk.GetArrayFromImage(found.jacobian(reference_time)) - 1).max() < 1e-9


# -- against SimpleITK


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_simpleitk_draws_the_same_image_with_the_displacement(
    oblique_grid: Grid, aligned: bool, elsewhere: bool
) -> None:
    found, t = make(Swirl(oblique_grid), affines() if aligned else None), 2.0
    grid = oblique_grid
    if elsewhere:
        grid = Grid((17, 18, 19), (2.5, 2.0, 3.0), tuple(oblique_grid.centre_mm - 20.0))
    reference = oblique_grid.image(WINDOW.denormalise(voxels(oblique_grid)))
    field = found.displacement(t, grid)
    vectors = sitk.GetArrayFromImage(field)
    assert np.linalg.norm(vectors, axis=-1).max() > 4

    def resampled(displacement_mm: np.ndarray) -> np.ndarray:
        transform = sitk.DisplacementFieldTransform(grid.image(displacement_mm))
        return sitk.GetArrayFromImage(sitk.Resample(reference, field, transform, sitk.sitkLinear, -1000.0))

    drawn = sitk.GetArrayFromImage(found.image(t, grid, outside=-1000.0))
    # On the very face of the field of view, rounding decides whether a voxel is inside.
    index = oblique_grid.world_to_index(grid.points_world() + vectors)
    face = np.minimum(np.abs(index + 0.5), np.abs(index - np.array(oblique_grid.size) + 0.5)).min(-1) < 1e-3
    difference = np.abs(drawn - resampled(vectors))[~face]
    # 1e-5 of a voxel, times differences of up to 2000 between neighbours.
    assert difference.max() < 0.1
    assert (drawn > -1000).mean() > 0.2
    # The other way, or with the axes of the grid taken for those of the world, it's another image.
    assert np.abs(drawn - resampled(-vectors)).mean() > 100
    assert np.abs(drawn - resampled(oblique_grid.vectors_from_world(vectors))).mean() > 50


def test_displacement_image_is_on_the_grid_asked_for(oblique_grid: Grid) -> None:
    found = make(Uniform(oblique_grid))
    other = Grid((4, 5, 6), (3.0, 3.0, 3.0), (1.0, 2.0, 3.0))
    for asked in (other, other.image(np.zeros(other.shape, np.uint8))):
        for answer in (found.displacement(1.0, asked), found.image(1.0, asked), found.jacobian(1.0, asked)):
            assert Grid.of(answer).is_close(other, 1e-9)
    assert found.displacement(1.0).GetPixelID() == sitk.sitkVectorFloat64
    assert Grid.of(found.image(1.0)).is_close(oblique_grid, 1e-9)


def test_points_go_where_the_displacement_says(oblique_grid: Grid) -> None:
    found, t = make(Swirl(oblique_grid), affines()), 3.0
    points = oblique_grid.points_world()
    expected = points + sitk.GetArrayFromImage(found.displacement(t))
    assert np.abs(found.map_points(points.reshape(-1, 3), t) - expected.reshape(-1, 3)).max() < 1e-9


def test_jacobian_is_that_of_small_steps(oblique_grid: Grid) -> None:
    found, t = make(Swirl(oblique_grid), affines()), 2.0
    mine = sitk.GetArrayFromImage(found.jacobian(t))
    assert mine.min() > 0
    assert mine.std() > 0.02
    points, h = oblique_grid.points_world()[3:8, 4:12, 5:15].reshape(-1, 3), 1e-2
    columns = [found.map_points(points + h * e, t) - found.map_points(points - h * e, t) for e in np.eye(3)]
    exact = np.linalg.det(np.stack(columns, axis=-1) / (2 * h)).reshape(5, 8, 10)
    # Central differences over voxels against those at a point of a lattice of 6 mm, whose slopes jump.
    assert np.corrcoef(mine[3:8, 4:12, 5:15].ravel(), exact.ravel())[0, 1] > 0.8
    assert np.abs(mine[3:8, 4:12, 5:15] - exact).mean() < 0.05


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_jacobian_of_a_slice_is_that_of_the_volume(oblique_grid: Grid, axis: int) -> None:
    """Its neighbours are looked at, too: alone, nothing would change across it."""
    found, t = make(Swirl(oblique_grid), affines()), 2.0
    volume = found.jacobian(t)
    index, size = [0, 0, 0], list(volume.GetSize())
    index[axis], size[axis] = size[axis] // 2, 1
    slice_ = sitk.RegionOfInterest(volume, size, index)
    found_there = sitk.GetArrayFromImage(found.jacobian(t, slice_))
    within = (slice(1, -1) if n > 1 else slice(None) for n in found_there.shape)  # borders are one-sided in both
    expected = sitk.GetArrayFromImage(slice_)
    assert expected.std() > 0.01
    assert np.abs(found_there - expected)[tuple(within)].max() < 1e-9


# -- inverse


@pytest.mark.parametrize("kind", [Swirl, Linear])
def test_there_and_back(oblique_grid: Grid, kind: type[Known]) -> None:
    found, t = make(kind(oblique_grid), affines()), 2.0
    points = inner_points(oblique_grid)
    there = found.map_points(points, t, inverse=True)
    assert np.linalg.norm(there - points, axis=1).max() > 4
    assert np.abs(found.map_points(there, t) - points).max() < 1e-3
    back = found.map_points(found.map_points(points, t), t, inverse=True)
    assert np.abs(back - points).max() < 1e-3
    # A displacement subtracted is no inverse.
    assert np.abs(2 * points - found.map_points(points, t) - there).max() > 0.1


class Waves(Known):
    """Of a thin slab: along its width it moves across, and across it moves along."""

    def at(self, axis_mm: torch.Tensor) -> torch.Tensor:
        x, _, z = axis_mm.unbind(-1)
        return torch.stack([1.5 * torch.cos(x / 60 + z / 2), torch.zeros_like(x), 0.3 * torch.sin(x / 6)], dim=-1)


def test_there_and_back_in_a_thin_slab() -> None:
    # A cube unit is 160 mm along it and 1.75 mm across: counted in those, steps that help seem not to (0.2 mm).
    grid = Grid((81, 61, 8), (4.0, 4.0, 0.5))
    found, points = make(Waves(grid)), inner_points(grid)
    there = found.map_points(points, 2.0, inverse=True)
    assert np.abs(there - points)[:, [0, 2]].max(0) == pytest.approx([3.0, 0.6], rel=0.3)
    assert np.abs(found.map_points(there, 2.0) - points).max() < 1e-3


# -- labels


def label_image(grid: Grid) -> sitk.Image:
    labels = np.zeros(grid.shape, np.uint8)
    labels[2:-2, 3:-3, 3:-4] = 3
    labels[4:-4, 5:-5, 6:-6] = 200
    return grid.image(labels)


def other_grid(grid: Grid) -> Grid:
    return Grid((15, 13, 12), (3.0, 3.5, 4.0), tuple(grid.centre_mm - 20.0))


@pytest.mark.parametrize("same_grid", [True, False])
def test_nearest_labels_are_equations_7_and_8_voxel_by_voxel(oblique_grid: Grid, same_grid: bool) -> None:
    found, t = make(Swirl(oblique_grid), affines()), 2.0
    grid = oblique_grid if same_grid else other_grid(oblique_grid)
    mask = label_image(grid)
    sources = found.map_points(grid.points_world().reshape(-1, 3), t).reshape(*grid.shape, 3)
    expected = np.zeros(grid.shape, np.uint8)
    for x, y, z in np.ndindex(grid.size):
        source = mask.TransformPhysicalPointToIndex(sources[z, y, x].tolist())
        if all(0 <= i < n for i, n in zip(source, grid.size, strict=True)):
            expected[z, y, x] = mask[source]
    carried = found.propagate(mask, t, interpolation="nearest")
    assert np.array_equal(sitk.GetArrayFromImage(carried), expected)
    assert carried.GetPixelID() == sitk.sitkUInt8
    assert Grid.of(carried).is_close(grid, 1e-9)
    assert set(np.unique(expected)) == {0, 3, 200}
    assert (expected != sitk.GetArrayFromImage(mask)).mean() > 0.05


@pytest.mark.parametrize("same_grid", [True, False])
def test_majority_labels_have_the_largest_linear_weight(oblique_grid: Grid, same_grid: bool) -> None:
    found, t = make(Swirl(oblique_grid), affines()), 2.0
    grid = oblique_grid if same_grid else other_grid(oblique_grid)
    mask = label_image(grid)
    sources = found.map_points(grid.points_world().reshape(-1, 3), t)
    # Each label's own mask, read linearly by SimpleITK where it can be; the largest wins.
    inside = grid.contains(sources)
    shares = np.array(
        [
            [one.EvaluateAtPhysicalPoint(point, sitk.sitkLinear) for point in sources[inside].tolist()]
            for one in (sitk.Cast(mask == label, sitk.sitkFloat32) for label in (0, 3, 200))
        ]
    )
    expected = np.array([0, 3, 200], np.uint8)[shares.argmax(0)]
    carried = sitk.GetArrayFromImage(found.propagate(mask, t)).ravel()
    two_best = np.sort(shares, axis=0)[-2:]
    clear = two_best[1] - two_best[0] > 1e-4
    assert np.array_equal(carried[inside][clear], expected[clear])
    assert clear.mean() > 0.95
    assert not carried[~inside].any()
    assert set(np.unique(carried)) == {0, 3, 200}


@pytest.mark.parametrize("interpolation", ["majority", "nearest"])
def test_no_new_labels_and_any_type_of_them(oblique_grid: Grid, interpolation: str) -> None:
    found = make(Swirl(oblique_grid), affines())
    for pixel in (sitk.sitkInt16, sitk.sitkUInt32, sitk.sitkFloat32):
        carried = found.propagate(sitk.Cast(label_image(oblique_grid), pixel), 2.0, interpolation=interpolation)  # type: ignore[arg-type]
        assert carried.GetPixelID() == pixel
        assert set(np.unique(sitk.GetArrayFromImage(carried)).tolist()) == {0, 3, 200}


def test_unknown_interpolation_is_refused(oblique_grid: Grid) -> None:
    with pytest.raises(InputError, match="linear"):
        make(Still(oblique_grid)).propagate(label_image(oblique_grid), 2.0, interpolation="linear")  # type: ignore[arg-type]


def test_contours_and_points_move_together(oblique_grid: Grid) -> None:
    found, t = make(Uniform(oblique_grid)), 2.0
    mask = oblique_grid.image((sitk.GetArrayFromImage(label_image(oblique_grid)) > 0).astype(np.uint8))

    def centroid(labels: sitk.Image) -> np.ndarray:
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(labels)
        return np.array(shape.GetCentroid(1))

    fine = oblique_grid.with_spacing(1.5)
    before, after = centroid(found.propagate(mask, 0.0, fine)), centroid(found.propagate(mask, t, fine))
    # Reference points go forward by -u: the label does too; the faces of both lie on voxels of 1.5 mm.
    assert np.abs(after - found.map_points(before[None], t, inverse=True)[0]).max() < 1.5
    assert np.linalg.norm(after - before) > 5


@pytest.mark.parametrize("interpolation", ["majority", "nearest"])
def test_labels_at_the_reference_time_are_the_mask(oblique_grid: Grid, interpolation: str) -> None:
    mask = label_image(oblique_grid)
    found = make(trained(oblique_grid), affines())
    carried = found.propagate(mask, REFERENCE_TIME, interpolation=interpolation)  # type: ignore[arg-type]
    assert np.array_equal(sitk.GetArrayFromImage(carried), sitk.GetArrayFromImage(mask))


# -- Ref-Net as the reference


@pytest.mark.parametrize("backbone", ["grid", "siren"])
def test_image_is_the_ref_net_at_the_moved_points(oblique_grid: Grid, backbone: str) -> None:
    net, t = small_ref_net(oblique_grid, backbone), 2.0
    with torch.no_grad():  # up into [0, 1], where nothing is clipped
        last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
        last.bias.fill_(0.5)
        for grid in getattr(net.network, "grids", []):
            grid.normal_(std=0.2)
    found = make(Swirl(oblique_grid), affines(), net)
    sources = found.map_points(oblique_grid.points_world().reshape(-1, 3), t)
    cube = torch.from_numpy(oblique_grid.world_to_cube(sources)).float()
    expected = WINDOW.denormalise(net(cube).detach().numpy()).reshape(oblique_grid.shape)
    assert expected.std() > 1
    # float32 coordinates, 1e-7, and slopes of a network of up to 2000 HU per 1/100 of the cube.
    assert np.abs(sitk.GetArrayFromImage(found.image(t)) - expected).max() < 0.1


# -- memory and time


def test_slabs_change_nothing(oblique_grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    found, t, mask = make(Swirl(oblique_grid), affines()), 2.0, label_image(oblique_grid)
    whole = [found.image(t), found.displacement(t), found.propagate(mask, t)]
    monkeypatch.setattr(geometry, "SLAB_POINTS", 3 * 16 * 20)
    for before, after in zip(
        whole, [found.image(t), found.displacement(t), found.propagate(mask, t)], strict=True
    ):
        assert np.abs(sitk.GetArrayFromImage(before) - sitk.GetArrayFromImage(after)).max() < 1e-3


def test_many_times_in_any_order(oblique_grid: Grid) -> None:
    found, points = make(trained(oblique_grid)), inner_points(oblique_grid, 5)
    first = {t: found.map_points(points, t) for t in np.linspace(0, 5, 21)}
    for t in reversed(list(first)):
        assert np.array_equal(found.map_points(points, t), first[t])
    assert not np.array_equal(first[5.0], first[0.0])


def test_a_cycle_later_is_the_same(oblique_grid: Grid) -> None:
    torch.manual_seed(0)
    net = def_net_of(oblique_grid, TimeBasis(TIMES, 0.0, period=6.0), SETTINGS)
    found, points = make(net, affines()), inner_points(oblique_grid)
    for t in (1.0, 4.5, 5.5):
        assert np.abs(found.map_points(points, t) - found.map_points(points, t + 6.0)).max() < 1e-4
        assert np.abs(found.map_points(points, t) - found.map_points(points, t + 3.0)).max() > 0.5


# -- files


def small_ref_net(grid: Grid, backbone: str = "grid") -> RefNet:
    torch.manual_seed(3)
    settings = RefNetSettings(
        backbone=backbone,  # type: ignore[arg-type]
        grid_levels=2,
        grid_features=2,
        decoder_width=8,
        layers=3,
        width=16,
        fourier_width=8,
    )
    return RefNet(grid, WINDOW, settings).eval()


@pytest.mark.parametrize("prior", [None, "grid", "siren"])
def test_saved_and_loaded_it_answers_the_same(oblique_grid: Grid, prior: str | None, tmp_path: Path) -> None:
    before = make(trained(oblique_grid), affines(), small_ref_net(oblique_grid, prior) if prior else None)
    before.time_unit, before.history = "days", [{"step": 1, "loss": 0.5}]
    after = STNeRP.load(before.save(tmp_path / "patient" / "model.pt"), device="cpu")
    mask, points, other = label_image(oblique_grid), inner_points(oblique_grid), oblique_grid.with_spacing(5.0)
    for t in (0.0, 1.3, 9.0):
        for a, b in [
            (before.image(t, other), after.image(t, other)),
            (before.displacement(t), after.displacement(t)),
            (before.propagate(mask, t), after.propagate(mask, t)),
            (before.jacobian(t), after.jacobian(t)),
        ]:
            assert np.array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
            assert Grid.of(a) == Grid.of(b)
        for inverse in (False, True):
            assert np.array_equal(before.map_points(points, t, inverse), after.map_points(points, t, inverse))
    for name in ("grid", "times", "reference_time", "period", "time_unit", "window", "settings", "history"):
        assert getattr(after, name) == getattr(before, name), name


def test_a_model_of_the_first_version_keeps_its_field(oblique_grid: Grid, tmp_path: Path) -> None:
    """It knew no network_mm: a default of 12 mm would smooth its velocity."""
    before = make(trained(oblique_grid))
    assert before.settings.network_mm is not None
    path = before.save(tmp_path / "model.pt")
    content = torch.load(path, weights_only=True)
    del content["def_net"]["settings"]["network_mm"], content["flow"]
    torch.save(content, path)
    assert STNeRP.load(path).settings.network_mm is None


def test_a_file_without_a_setting_is_read_as_it_was_made() -> None:
    """Settings that came later, at values at which they change nothing; those in the file as they are there."""
    later = {"network_mm": None, "detail_mm": None, "bregman": 0.0, "contrast": 0.0}
    saved = {name: value for name, value in dataclasses.asdict(FAST.def_net).items() if name not in later}
    settings = def_net_settings_of(saved)
    assert {name: getattr(settings, name) for name in later} == later
    assert settings == dataclasses.replace(FAST.def_net, **later)
    assert def_net_settings_of(dataclasses.asdict(FAST.def_net)) == FAST.def_net


def test_a_file_is_kept_where_asked(oblique_grid: Grid, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("something dear")
    with pytest.raises(InputError, match=r"model\.pt"):
        make(trained(oblique_grid)).save(path, overwrite=False)
    assert path.read_text() == "something dear"
    make(trained(oblique_grid)).save(path, overwrite=True)
    assert STNeRP.load(path).times == TIMES


class Payload:
    """Unpickled without care, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_loading_runs_no_code(oblique_grid: Grid, tmp_path: Path) -> None:
    path, target = make(trained(oblique_grid)).save(tmp_path / "model.pt"), tmp_path / "made by the payload"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "history": Payload(target)}, path)
    with pytest.raises(InputError, match=r"model\.pt"):
        STNeRP.load(path)
    path.write_bytes(pickle.dumps(Payload(target), protocol=2))
    with pytest.raises(InputError, match=r"model\.pt"):
        STNeRP.load(path)
    assert not target.exists()


def test_files_that_are_no_model(oblique_grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="none"):
        STNeRP.load(tmp_path / "none.pt")
    with pytest.raises(InputError, match="not a stnerp model"):
        STNeRP.load(small_ref_net(oblique_grid).save(tmp_path / "ref.pt"))
    with pytest.raises(InputError, match="not a stnerp Ref-Net"):
        RefNet.load(make(trained(oblique_grid)).save(tmp_path / "model.pt"))
    path = make(trained(oblique_grid)).save(tmp_path / "damaged.pt")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="damaged"):
        STNeRP.load(path)


# -- errors


@pytest.mark.parametrize("t", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("aligned", [False, True])
def test_no_time(oblique_grid: Grid, t: float, aligned: bool) -> None:
    found = make(Uniform(oblique_grid), affines() if aligned else None)
    for ask in (
        lambda: found.image(t),
        lambda: found.displacement(t),
        lambda: found.map_points(np.zeros((1, 3)), t),
        lambda: found.map_points(np.zeros((1, 3)), t, inverse=True),
        lambda: found.propagate(label_image(oblique_grid), t),
        lambda: found.jacobian(t),
    ):
        with pytest.raises(InputError, match="t: "):
            ask()


@pytest.mark.parametrize(
    "points", [5.0, [1.0, 2.0], [[1.0, 2.0]], [[1.0, 2.0, float("nan")]], np.zeros((2, 3, 2))]
)
def test_no_points(oblique_grid: Grid, points: object) -> None:
    with pytest.raises(InputError, match="points"):
        make(Uniform(oblique_grid)).map_points(points, 1.0)  # type: ignore[arg-type]


def test_no_points_at_all_is_no_error(oblique_grid: Grid) -> None:
    for inverse in (False, True):
        assert make(Uniform(oblique_grid)).map_points(np.zeros((0, 3)), 1.0, inverse).shape == (0, 3)


def test_points_come_in_any_array_whose_last_axis_is_xyz(oblique_grid: Grid) -> None:
    model, points = make(Uniform(oblique_grid)), oblique_grid.points_world()[1:3, 2:5, 1:6]
    for inverse in (False, True):
        moved = model.map_points(points, 1.0, inverse)
        assert np.array_equal(moved.reshape(-1, 3), model.map_points(points.reshape(-1, 3), 1.0, inverse))
        np.testing.assert_allclose(moved[0, 0, 0], model.map_points(points[0, 0, 0], 1.0, inverse), atol=1e-12)


def test_one_reference_and_no_more(oblique_grid: Grid) -> None:
    arguments = {
        "def_net": Still(oblique_grid),
        "settings": dataclasses.replace(SETTINGS),
        "alignments": affines(),
        "window": WINDOW,
    }
    for ref_net, values in [(None, None), (small_ref_net(oblique_grid), voxels(oblique_grid))]:
        with pytest.raises(InputError, match="either"):
            STNeRP(ref_net=ref_net, reference_voxels=values, **arguments)  # type: ignore[arg-type]


def test_extrapolation_is_announced(oblique_grid: Grid, caplog: pytest.LogCaptureFixture) -> None:
    found, points = make(Uniform(oblique_grid)), np.zeros((1, 3))
    found.map_points(points, found.times[-1])
    assert not caplog.records
    found.map_points(points, found.times[-1] + 1)
    assert "extrapolation" in caplog.text


def test_times_that_differ_by_rounding_are_no_extrapolation(
    oblique_grid: Grid, caplog: pytest.LogCaptureFixture
) -> None:
    net = Uniform(oblique_grid)
    net.time_basis = TimeBasis((0.0, 0.1, 0.2, 0.3), 0.0)
    found = make(net, np.stack([np.eye(4)] * 4))
    found.map_points(np.zeros((1, 3)), 0.1 * 3)  # 0.30000000000000004
    assert not caplog.records
    found.map_points(np.zeros((1, 3)), 0.31)
    assert "extrapolation" in caplog.text


def test_displacements_are_kept_within_bounds(oblique_grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(Uniform(oblique_grid))
    numbers = 3 * found.lattice.voxels
    monkeypatch.setattr("stnerp.model.KEPT_NUMBERS", 2.5 * numbers)
    for t in (0.5, 1.0, 1.5, 2.0, 2.5):
        found.map_points(np.zeros((1, 3)), t)
        assert 1 <= len(found._displacements) <= 2
