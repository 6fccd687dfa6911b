"""DLIR and the anatomically constrained CNN: splines, losses, the cascade's algebra, training on a cohort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from stnerp.baselines import cascade as cascades
from stnerp.baselines.anatomy_cnn import UNet, anatomy_cnn, curvature, gradient_fields, loss, volume_control
from stnerp.baselines.cascade import Cascade, Scans, Training, cohort_files, registered, simulated_motion, trained
from stnerp.baselines.dlir import ConvNet, b_spline, dlir
from stnerp.baselines.pair import PairMethod
from stnerp.errors import FitError, InputError
from stnerp.geometry import Grid, Triple, apply_affine
from stnerp.window import Window

UNIT = Window(0.0, 1.0)
CPU = torch.device("cpu")
SPACING = (2.0, 1.5, 3.0)
QUICK = {"spacings_mm": (8.0,), "iterations": (2,)}


def ct(grid: Grid, seed: int = 0) -> sitk.Image:
    """An image of smooth blobs in [0, 1]."""
    points, rng = grid.points_world(), np.random.default_rng(seed)
    places = grid.cube_to_world(rng.uniform(-0.8, 0.8, (12, 3)))
    squares = ((points[..., None, :] - places) ** 2).sum(-1)
    return grid.image(np.exp(-squares / 200).sum(-1).clip(0, 1).astype(np.float32))


@pytest.fixture
def grid() -> Grid:
    axes = (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0)  # a quarter turn: voxels don't run along LPS
    return Grid((24, 20, 16), (3.0, 4.0, 5.0), (-30.0, 20.0, 5.0), axes)


# -- B-splines


@pytest.mark.parametrize("apart", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 12, 16), (5, 7, 11)])
def test_splines_reproduce_what_is_linear(apart: int, shape: tuple[int, int, int]) -> None:
    # Knots on a linear function give that function: cubic B-splines do, if each knot lies where it should.
    def linear(*axes: torch.Tensor) -> torch.Tensor:
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        return (2 * z - 3 * y + x / 2 + 7)[None, None]

    def knots_of(n: int) -> torch.Tensor:
        return apart * torch.arange(-2, -(-n // apart) + 2, dtype=torch.float64) + (apart - 1) / 2

    drawn = b_spline(linear(*map(knots_of, shape)), shape, apart)
    expected = linear(*(torch.arange(n, dtype=torch.float64) for n in shape))
    assert torch.allclose(drawn, expected, rtol=1e-12, atol=1e-12)


def test_networks_start_from_no_motion_on_any_shape() -> None:
    images = torch.rand(1, 2, 9, 14, 7)
    for network in (ConvNet(), UNet()):
        step = network(images)
        assert step.shape == (1, 3, 9, 14, 7)
        assert not step.any()


# -- losses


def test_gradient_fields_see_edges_not_intensities() -> None:
    image = torch.rand(1, 1, 6, 7, 8, dtype=torch.float64) * 20
    ones = torch.ones_like(image)
    assert float(gradient_fields(image, image, SPACING, ones)) == pytest.approx(0, abs=1e-12)
    assert float(gradient_fields(image, 3 - image, SPACING, ones)) < 1e-3  # inverted, as another modality may be
    across = torch.arange(8.0, dtype=torch.float64).expand(1, 1, 6, 7, 8)
    down = torch.arange(7.0, dtype=torch.float64)[:, None].expand(1, 1, 6, 7, 8)
    assert float(gradient_fields(across, down, SPACING, ones)) > 0.99  # edges at right angles
    half = ones.clone()
    half[..., 4:] = 0
    other = torch.cat([image[..., :4], torch.rand_like(image[..., 4:])], dim=-1)
    inner = half.clone()
    inner[..., 3:] = 0  # central differences at voxel 3 reach into the other half
    assert float(gradient_fields(image, other, SPACING, inner)) == pytest.approx(0, abs=1e-12)


def test_curvature_is_the_squared_laplacian_in_mm() -> None:
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (6, 7, 8)), indexing="ij")
    x, y, z = x * SPACING[0], y * SPACING[1], z * SPACING[2]
    u = torch.stack([x**2 + 2 * y**2 - z**2, x * y, 5 * z + 1])[None]  # Laplacians 2 + 4 − 2, 0, 0
    assert float(curvature(u, SPACING)) == pytest.approx(16, rel=1e-9)
    flat = u[:, :, :1]  # one slice: no second derivative across it
    assert float(curvature(flat, SPACING)) == pytest.approx(36, rel=1e-9)


def test_folds_are_unfolded() -> None:
    z, y, x = torch.meshgrid(*(torch.arange(5.0, dtype=torch.float64) for _ in range(3)), indexing="ij")
    for stretch in (0.05, -0.5):  # J below the limit, and negative
        amount = torch.tensor(stretch - 1, dtype=torch.float64, requires_grad=True)
        u = torch.stack([amount * x * SPACING[0], 0 * y, 0 * z])[None]
        (slope,) = torch.autograd.grad(volume_control(u, SPACING), amount)
        assert slope < -50  # 1 − 1/0.1²: as steep as at the limit, and stretching helps
    still = torch.zeros(1, 3, 5, 5, 5, dtype=torch.float64)
    assert float(volume_control(still, SPACING)) == pytest.approx(0, abs=1e-12)


def test_masks_count_where_there_are_any() -> None:
    fixed = torch.rand(1, 3, 6, 6, 6)
    moved, u = fixed.clone(), torch.zeros(1, 3, 6, 6, 6)
    alike = loss(fixed, moved, u, SPACING)
    moved[:, 2] = fixed[:, 2] + 0.5
    assert float(loss(fixed, moved, u, SPACING) - alike) == pytest.approx(0.25, rel=1e-4)
    assert float(loss(fixed[:, :2], moved[:, :2], u, SPACING)) == pytest.approx(float(alike), abs=1e-6)


# -- the cascade


class Steps(nn.Module):
    """A network that answers the same step everywhere, voxels x y z."""

    def __init__(self, *voxels: float) -> None:
        super().__init__()
        self.voxels = torch.tensor(voxels, dtype=torch.float32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.voxels[:, None, None, None].expand(1, 3, *images.shape[2:])


def test_steps_add_up_in_the_world(grid: Grid) -> None:
    image = ct(grid)
    scans = Scans.of([image, image], None, UNIT, "none", (8.0, 4.0), CPU)
    coarse, fine = (np.array(g.spacing_mm) for g in scans.grids)
    found = registered(Cascade([Steps(1, 0, 2), Steps(0, -1, 0.5)]), scans, image)
    expected = np.array([1, 0, 2]) * coarse + np.array([0, -1, 0.5]) * fine  # along LPS: so the grids lie
    points = grid.cube_to_world(np.random.default_rng(0).uniform(-1, 1, (20, 3)))
    assert found.map_points(points) - points == pytest.approx(np.tile(expected, (20, 1)), abs=1e-4)


def test_alignment_comes_after_the_steps(grid: Grid) -> None:
    image, shift = ct(grid), np.array([30.0, 0.0, 9.0])
    turn = Rotation.from_euler("z", 20, degrees=True).as_matrix()
    origin, axes = turn @ grid.origin_mm + shift, turn @ np.reshape(grid.direction, (3, 3))
    turned = Grid(grid.size, grid.spacing_mm, (origin[0], origin[1], origin[2]), tuple(axes.ravel()))
    away = turned.image(sitk.GetArrayFromImage(image))
    scans = Scans.of([image, away], None, UNIT, "rigid", (8.0,), CPU)
    found = registered(Cascade([Steps(2, 0, 1)]), scans, image)
    points = grid.cube_to_world(np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3)))
    steps = np.array([2, 0, 1]) * scans.grids[0].spacing_mm
    # The alignment is good to a fraction of a voxel; steps along the turned axes would be 6 mm off.
    assert found.map_points(points) == pytest.approx((points + steps) @ turn.T + shift, abs=1.0)


def test_a_fine_network_sees_what_the_coarse_one_moved(grid: Grid) -> None:
    seen = []

    class Watching(Steps):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return super().forward(images)

    image = torch.rand(1, 1, 9, 9, 9)
    Cascade([Steps(2, 0, 0), Watching(0, 0, 0)])([image, image], [image, image])
    fixed, moved = seen[0][:, :1], seen[0][:, 1:]
    assert torch.equal(fixed, image)
    assert torch.allclose(moved[..., :-2], image[..., 2:], atol=1e-5)  # read two voxels further along x


def test_earlier_networks_rest(grid: Grid) -> None:
    scans = Scans.of([ct(grid), ct(grid, 1)], None, UNIT, "none", (16.0, 8.0), CPU)
    whole = trained(ConvNet, [scans], loss, Training((16.0, 8.0), (2, 2), 1e-2, 0.5, 5.0, 0), "test")
    # The first alone: the second's start comes after it in the stream of random numbers, its training before.
    first = trained(ConvNet, [scans], loss, Training((16.0, 8.0), (2, 1), 1e-2, 0.5, 5.0, 0), "test")
    ours, theirs = whole.networks[0].state_dict(), first.networks[0].state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(next(iter(whole.networks[1].parameters())), next(iter(first.networks[1].parameters())))


def test_scans_lie_on_one_grid_after_alignment(grid: Grid) -> None:
    image = ct(grid)
    away = sitk.Image(image)
    away.SetOrigin([o + s for o, s in zip(image.GetOrigin(), (40.0, -25.0, 10.0), strict=True)])
    masks = [sitk.Cast(one > 0.5, sitk.sitkUInt8) for one in (image, away)]
    scans = Scans.of([image, away], masks, UNIT, "rigid", (4.0,), CPU)
    assert apply_affine(scans.to_image[1], np.zeros(3)) == pytest.approx([40, -25, 10], abs=1.0)
    a, b = scans.images[0]
    assert (a[0] - b[0]).abs().mean() < 0.02
    assert (a[2] - b[2]).abs().mean() < 0.02
    assert set(a[1].unique().tolist()) <= {0.0, 1.0}
    for values in (a[0], a[2]):  # smoothed with weights that add up to 1, but for rounding
        assert -1e-6 < float(values.min()) < 0.1
        assert 0.9 < float(values.max()) < 1 + 1e-6


def test_scans_know_where_they_end(grid: Grid) -> None:
    image = ct(grid)
    scans = Scans.of([image, image[12:]], None, UNIT, "none", (4.0,), CPU)
    a, b = scans.images[0]
    assert a[1].all()
    seen = b[1].bool()
    assert float(b[1].mean()) == pytest.approx((23 - 11.5) / 23, abs=0.05)  # to the outer face; voxels of 4 mm
    assert (a[0] - b[0])[seen].abs().max() < 0.05  # smoothed up to the cut
    assert (a[0] - b[0])[~seen].abs().max() > 0.2


def test_simulated_motion_has_its_size(grid: Grid) -> None:
    draw = torch.Generator().manual_seed(0)
    big = Grid((200, 200, 200), (3.0, 3.0, 3.0), (0.0, 0.0, 0.0), grid.direction)
    half = torch.tensor(big.with_spacing(cascades.KNOT_MM).half_extent_mm)[:, None, None, None]
    sizes = [float((simulated_motion(big, 6.0, draw) * half).std()) for _ in range(200)]
    assert 5 < max(sizes) < 6.5
    assert 2.5 < np.mean(sizes) < 3.5  # uniform between none and all of it


# -- as methods


def around_origin(size: tuple[int, int, int], spacing_mm: Triple, degrees: list[float]) -> Grid:
    axes = tuple(Rotation.from_euler("xyz", degrees, degrees=True).as_matrix().ravel())
    x, y, z = (-float(c) for c in Grid(size, spacing_mm, direction=axes).centre_mm)
    return Grid(size, spacing_mm, (x, y, z), axes)


@pytest.mark.parametrize("method", [dlir, anatomy_cnn])
def test_direction_and_unit(method: PairMethod) -> None:
    target, reference = (
        around_origin((14, 18, 20), (5.0, 4.0, 3.0), [20, -35, 50]),
        around_origin((26, 30, 22), (3.0, 2.5, 4.0), [90, 10, 5]),
    )
    rng = np.random.default_rng(0)
    places, heights, widths = rng.uniform(-45, 45, (150, 3)), rng.uniform(-0.5, 0.5, 150), rng.uniform(6, 10, 150)

    def intensity(points_mm: np.ndarray) -> np.ndarray:
        squares = ((points_mm[..., None, :] - places) ** 2).sum(-1)
        return 0.5 + (heights * np.exp(-squares / (2 * widths**2))).sum(-1)

    def φ(points_mm: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(points_mm, -1, 0)
        bend = np.stack([np.cos(y / 15), np.sin(z / 18), np.cos(x / 15)], axis=-1)
        return points_mm + [4.0, -3.0, 2.0] + 1.5 * bend

    found = method(
        reference.image(intensity(reference.points_world()).astype(np.float32)),
        target.image(intensity(φ(target.points_world())).astype(np.float32)),
        window=UNIT,
        align="none",
        spacings_mm=(6.0,),
        iterations=(40,),
    )
    points = target.cube_to_world(rng.uniform(-0.6, 0.6, (200, 3)))
    assert Grid.of(found.displacement).is_close(target, 1e-9)
    # Forty steps of one coarse network leave a tenth of the motion. Three tenths or more are left by whatever is
    # wrong: the inverse direction, RAS in place of LPS, x and z exchanged, the grid's axes in place of the
    # world's, voxels in place of millimetres, twice or half of them.
    error = np.linalg.norm(found.map_points(points) - φ(points), axis=1).mean()
    assert error < 0.25 * np.linalg.norm(φ(points) - points, axis=1).mean()


@pytest.mark.parametrize("method", [dlir, anatomy_cnn])
def test_the_same_seed_gives_the_same_answer(method: object, grid: Grid) -> None:
    images = ct(grid), ct(grid, 1)

    def field(seed: int) -> np.ndarray:
        found = method(*images, window=UNIT, align="none", seed=seed, **QUICK)  # type: ignore[operator]
        return sitk.GetArrayFromImage(found.displacement)

    first = field(0)
    assert np.array_equal(first, field(0))
    assert not np.array_equal(first, field(1))


def test_a_cohort_is_trained_on_once_and_never_on_the_pair(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patient in range(2):
        folder = tmp_path / f"patient {patient}"
        folder.mkdir()
        for k in range(2):
            image = ct(grid, 10 * patient + k)
            sitk.WriteImage(image, str(folder / f"scan{k}.mha"))
            sitk.WriteImage(sitk.Cast(image > 0.5, sitk.sitkUInt8), str(folder / f"scan{k}_mask.nii.gz"))
    (tmp_path / ".hidden").mkdir()
    names = [[tuple(path.name for path in scan if path) for scan in patient] for patient in cohort_files(tmp_path)]
    assert names == 2 * [[("scan0.mha", "scan0_mask.nii.gz"), ("scan1.mha", "scan1_mask.nii.gz")]]

    calls: list[list[Scans]] = []

    def counted(network: object, patients: list[Scans], *rest: object, **more: object) -> Cascade:
        calls.append(patients)
        return trained(network, patients, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(cascades, "trained", counted)
    for target in (ct(grid, 5), ct(grid, 6)):
        anatomy_cnn(ct(grid, 7), target, window=UNIT, align="none", cohort=str(tmp_path), **QUICK)
    assert len(calls) == 1
    assert len(calls[0]) == 2
    assert calls[0][0].images[0].shape[:2] == (2, 3)  # two images; intensities, coverage and mask
    # Another scan of the same name is another cohort.
    sitk.WriteImage(ct(grid, 20), str(tmp_path / "patient 0" / "scan1.mha"))
    anatomy_cnn(ct(grid, 7), ct(grid, 5), window=UNIT, align="none", cohort=str(tmp_path), **QUICK)
    assert len(calls) == 2

    (tmp_path / "patient 1" / "scan0_mask.nii.gz").unlink()
    with pytest.raises(InputError, match="has no mask, others of the cohort do"):
        anatomy_cnn(ct(grid), ct(grid), window=UNIT, align="none", cohort=str(tmp_path), seed=3, **QUICK)
    (tmp_path / "patient 1" / "scan0.mha").unlink()
    with pytest.raises(InputError, match="patient 1: 1 images"):
        cohort_files(tmp_path)
    with pytest.raises(InputError, match="one folder of images per patient"):
        cohort_files(tmp_path / "patient 0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacings_mm": (8.0, 4.0), "iterations": (3,)}, "one of each per network"),
        ({"spacings_mm": (), "iterations": ()}, "one of each per network"),
        ({"spacings_mm": (-8.0,), "iterations": (3,)}, "must be positive"),
        ({"spacings_mm": (8.0,), "iterations": (0,)}, "must be positive"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"simulated": 1.5}, "must be in"),
        ({"align": "similar"}, "none, rigid or affine"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str, grid: Grid) -> None:
    for method in (dlir, anatomy_cnn):
        with pytest.raises(InputError, match=message):
            method(ct(grid), ct(grid), window=UNIT, **(QUICK | settings))  # type: ignore[operator]


def test_wrong_masks_and_a_loss_that_explodes(grid: Grid) -> None:
    image = ct(grid)
    mask = sitk.Cast(image > 0.5, sitk.sitkUInt8)
    with pytest.raises(InputError, match="both or neither"):
        anatomy_cnn(image, image, window=UNIT, target_mask=mask, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resample it onto the image"):
        anatomy_cnn(image, image, window=UNIT, target_mask=mask, reference_mask=mask[1:], **QUICK)  # type: ignore[arg-type]
    with pytest.raises(FitError, match="lower learning_rate"):
        dlir(
            image, ct(grid, 1), window=UNIT, align="none", learning_rate=1e30, spacings_mm=(8.0,), iterations=(12,)
        )
