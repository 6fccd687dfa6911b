"""Ref-Net knows the reference: to high PSNR, at any point of world space, and after a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stnerp import FitError, InputError, RefNet, Series, fit_reference, load_series
from stnerp.geometry import Grid, cube_points
from stnerp.presets import RefNetSettings
from stnerp.ref_net import voxel_points
from stnerp.window import Window

QUICK = {
    "grid": {
        "backbone": "grid",
        "remainder": 0.0,
        "iterations": 150,
        "fraction_per_step": 0.2,
        "grid_levels": 3,
        "grid_finest_voxels": 1.0,
    },
    "siren": {
        "backbone": "siren",
        "remainder": 0.0,
        "iterations": 200,
        "fraction_per_step": 0.2,
        "layers": 3,
        "width": 64,
        "omega": 10.0,
        "fourier_width": 32,
        "fourier_sigma": 1.0,
        "learning_rate": 2e-3,
    },
}


def smooth(points_mm: np.ndarray) -> np.ndarray:
    """Intensities from about 200 to 800, in waves of 60 mm and more."""
    x, y, z = np.moveaxis(points_mm, -1, 0)
    return 500 + 150 * np.sin(x / 12 + 0.3) * np.cos(y / 15) + 150 * np.sin(z / 18 - x / 30)


@pytest.fixture
def series(oblique_grid: Grid) -> Series:
    image = oblique_grid.image(smooth(oblique_grid.points_world()).astype(np.float32))
    return load_series([image, image + 1], window=(0.0, 1000.0))


def psnr_db(image: sitk.Image, expected: np.ndarray, data_range: float = 1000.0) -> float:
    error = ((sitk.GetArrayFromImage(image) - expected) ** 2).mean()
    return float(10 * np.log10(data_range**2 / error))


@pytest.mark.parametrize("backbone", QUICK)
def test_fits_a_smooth_image(series: Series, backbone: str, tmp_path: Path) -> None:
    net = fit_reference(series, progress=False, device="cpu", **QUICK[backbone])
    expected = smooth(series.grid.points_world())
    # The image itself varies by 130: a constant would reach 18 dB.
    assert psnr_db(net.image(), expected) > 33
    assert net.history[-1]["loss"] < 0.3 * net.history[0]["loss"]
    assert net.history[-1]["psnr_db"] == pytest.approx(-10 * np.log10(net.history[-1]["loss"]))

    # On a grid of other axes, the same world: flipped or misplaced, it would fall below 20 dB.
    other = Grid((9, 8, 7), (2.0, 2.0, 2.0), tuple(series.grid.centre_mm - 7.0))
    assert psnr_db(net.image(other), smooth(other.points_world())) > 30
    assert net.image(other).GetSpacing() == other.spacing_mm

    loaded = RefNet.load(net.save(tmp_path / "ref.pt"))
    assert np.array_equal(loaded.render(), net.render())
    assert np.array_equal(sitk.GetArrayFromImage(loaded.image(other)), sitk.GetArrayFromImage(net.image(other)))
    assert (loaded.grid, loaded.window, loaded.settings) == (net.grid, net.window, net.settings)
    assert loaded.history == net.history
    assert not any(p.requires_grad for p in loaded.parameters())


def test_all_voxels_at_once_is_equation_3(series: Series) -> None:
    net = fit_reference(series, progress=False, device="cpu", **{**QUICK["grid"], "fraction_per_step": 1.0})
    assert psnr_db(net.image(), smooth(series.grid.points_world())) > 33


@pytest.mark.parametrize("backbone", QUICK)
def test_remainder_is_what_the_network_has_not_learnt(series: Series, backbone: str, tmp_path: Path) -> None:
    image = sitk.GetArrayFromImage(series.reference_image) / 1000
    few = {**QUICK[backbone], "iterations": 5}
    alone = fit_reference(series, progress=False, device="cpu", **few)
    error = np.abs(alone.render() - image).max()
    assert error > 0.05
    for part in (0.5, 1.0):
        net = fit_reference(series, progress=False, device="cpu", **{**few, "remainder": part})
        # The same network, so what is left is (1 − part) of its error; float32 rounds to 1e-7.
        assert np.abs(net.render() - image - (1 - part) * (alone.render() - image)).max() < 1e-5
        assert np.array_equal(RefNet.load(net.save(tmp_path / f"{part}.pt")).render(), net.render())


def test_models_of_0_1_0_are_read_as_they_were(series: Series) -> None:
    settings = {"grid_levels": 2, "grid_finest_voxels": 1.0, "remainder": 0.0}
    net = fit_reference(series, iterations=2, progress=False, device="cpu", **settings)
    saved = net.to_dict()
    del saved["settings"]["grid_finest_voxels"], saved["settings"]["remainder"]
    assert np.array_equal(RefNet.from_dict(saved).render(), net.render())


def test_same_seed_same_network(series: Series) -> None:
    quick = {**QUICK["grid"], "iterations": 3}
    first, again, other = (
        fit_reference(series, seed=seed, progress=False, device="cpu", **quick).render() for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_paper_preset_has_the_paper_s_network(series: Series) -> None:
    net = fit_reference(series, preset="paper", iterations=1, progress=False, device="cpu")
    assert len(net.network) == 9  # type: ignore[arg-type]  # Fourier features and eight layers
    assert net.network[0].B.shape == (256, 3)  # type: ignore[index]
    assert net.settings.learning_rate == 1e-4
    assert [row["step"] for row in net.history] == [1]


def make_net(grid: Grid, backbone: str = "grid") -> RefNet:
    torch.manual_seed(0)
    settings = RefNetSettings(backbone=backbone, layers=3, width=8, fourier_width=4, grid_levels=2)  # type: ignore[arg-type]
    return RefNet(grid, Window(-1000.0, 1000.0), settings)


def test_voxel_points_are_the_voxels() -> None:
    # FACTS, trap 2: 2 i / n − 1 instead of 2 i / (n − 1) − 1, or x and z exchanged.
    for size in [(7, 5, 4), (6, 1, 3)]:
        grid = Grid(size, (1.0, 2.0, 3.0))
        points = voxel_points(torch.arange(grid.voxels), grid)
        expected = cube_points(grid.shape).reshape(-1, 3)
        assert (points - expected).abs().max() < 1e-6
    some = torch.tensor([100, 3])
    assert torch.equal(voxel_points(some, Grid((7, 5, 4), (1.0, 1.0, 1.0)))[1], torch.tensor([0.0, -1.0, -1.0]))


@pytest.mark.parametrize("backbone", ["grid", "siren"])
def test_render_reads_the_network_at_the_voxels(any_grid: Grid, backbone: str) -> None:
    net = make_net(any_grid, backbone)
    expected = net(cube_points(any_grid.shape).reshape(-1, 3)).detach().reshape(any_grid.shape)
    # One slice at a time or all at once; the same points to 1e-7.
    assert np.abs(net.render() - expected.numpy()).max() < 1e-5
    assert expected.std() > 1e-4
    image = sitk.GetArrayFromImage(net.image())
    assert np.abs(image - (2000 * expected.numpy() - 1000)).max() < 0.02


@pytest.mark.parametrize("backbone", ["grid", "siren"])
def test_differentiable_in_points(any_grid: Grid, backbone: str) -> None:
    net = make_net(any_grid, backbone)
    points = (0.5 * torch.rand(20, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()
    net(points).sum().backward()
    assert points.grad is not None
    assert (points.grad.abs().sum(0) > 0).all()


def test_loss_that_is_no_number_stops_the_fit(series: Series) -> None:
    with pytest.raises(FitError, match="learning_rate"):
        fit_reference(series, progress=False, device="cpu", **{**QUICK["grid"], "learning_rate": 1e30})


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"sigma": 3}, "sigma"), ({"preset": "best"}, "best"), ({"backbone": "hash"}, "hash")],
)
def test_unknown_settings_are_refused(series: Series, settings: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        fit_reference(series, progress=False, device="cpu", **{"iterations": 1, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("backbone", QUICK)
def test_beyond_the_image_it_is_the_border_s(series: Series, backbone: str) -> None:
    net = fit_reference(series, progress=False, device="cpu", **{**QUICK[backbone], "iterations": 2})
    edge = torch.tensor([[1.0, 0.3, -0.2], [-1.0, 0.3, 1.0]])
    beyond = torch.tensor([[1.7, 0.3, -0.2], [-3.0, 0.3, 1.2]])
    with torch.no_grad():
        assert torch.equal(net(beyond), net(edge))
