"""The paper's settings to the letter, and a word about settings that don't exist."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from stnerp.errors import InputError
from stnerp.geometry import Grid
from stnerp.presets import FAST, PAPER, DefNetSettings, Level, RefNetSettings, preset_of, with_changes


def test_paper_is_the_paper_to_the_letter() -> None:
    for net in (PAPER.ref_net, PAPER.def_net):
        # "8 fully connected layers", "256 neurons", SIREN, Fourier features of width 256 with σ = 3.
        assert (net.layers, net.width, net.fourier_width, net.fourier_sigma) == (8, 256, 256, 3.0)
        assert net.omega == 30.0
        assert net.decay == "constant"
    assert PAPER.ref_net.backbone == "siren"
    assert PAPER.ref_net.learning_rate == 1e-4
    assert PAPER.ref_net.iterations == 2000
    assert PAPER.ref_net.fraction_per_step == 1.0
    assert PAPER.def_net.learning_rate == 1e-5
    assert PAPER.def_net.squarings == 7
    assert PAPER.def_net.loss == "mse"
    assert PAPER.def_net.form == "space_time"
    assert PAPER.def_net.reference == "network"
    assert PAPER.def_net.levels == (Level(None, None, 2000),)
    penalties = ("diffusion", "bending", "total_variation", "folding", "volume", "smoothing")
    assert not any(getattr(PAPER.def_net, name) for name in penalties)


def test_fast_is_coarse_to_fine_and_starts_smooth() -> None:
    levels = FAST.def_net.levels
    spacings = [level.spacing_mm or 0.0 for level in levels]
    assert spacings == sorted(spacings, reverse=True)
    assert FAST.def_net.form == "factorised"
    assert FAST.def_net.loss == "local_ncc"
    assert FAST.def_net.omega <= 10


def test_presets_by_name() -> None:
    assert preset_of("fast") is FAST
    assert preset_of("paper") is PAPER
    with pytest.raises(InputError, match="fast, paper"):
        preset_of("faster")


def test_more_steps_where_one_sees_a_part() -> None:
    shape, quarter = (64, 64, 64), 64**3 // 4
    level = Level(2, 4, 45)
    assert level.steps([shape], None) == level.steps([shape], 64**3) == 45
    assert level.steps([shape], quarter) == 90  # a quarter at a time: √4 times as many
    assert level.steps([shape] * 2, quarter) == 64  # two images show two quarters
    assert level.steps([shape] * 4, quarter) == level.steps([shape] * 9, quarter) == 45
    assert Level(2, 4, 45, times_per_step=1).steps([shape] * 9, quarter) == 90
    assert level.steps([(32, 32, 32)], quarter) == 45  # an eighth of the voxels
    assert level.steps([shape, (32, 32, 32)], quarter) == round(45 * math.sqrt((4 + 1) / 2 / 2))  # each on its own


def test_changes_leave_the_rest() -> None:
    changed = with_changes(FAST.def_net, {"width": 64, "loss": "mse"})
    assert (changed.width, changed.loss) == (64, "mse")
    assert {**asdict(changed), "width": FAST.def_net.width, "loss": FAST.def_net.loss} == asdict(FAST.def_net)
    assert with_changes(FAST.ref_net, {}) == FAST.ref_net


def test_levels_come_in_three_forms() -> None:
    expected = (Level(8, 8, 5), Level(4, None, 3), Level(None, 8, 2))
    given = [(8, 8, 5), Level(4, None, 3), {"spacing_mm": None, "lattice_mm": 8, "iterations": 2}]
    assert with_changes(DefNetSettings(), {"levels": given}).levels == expected


@pytest.mark.parametrize("settings", [FAST.def_net, PAPER.def_net, FAST.ref_net, PAPER.ref_net])
def test_settings_survive_as_plain_values(settings: DefNetSettings | RefNetSettings) -> None:
    assert with_changes(type(settings)(), asdict(settings)) == settings


@pytest.mark.parametrize("levels", [[], [(8, 8)], [(8, 8, 5, 5, 1e-3, 5)], [{"spacing": 8}], [8], 8])
def test_impossible_levels_are_refused(levels: object) -> None:
    with pytest.raises(InputError, match="levels"):
        with_changes(DefNetSettings(), {"levels": levels})


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (DefNetSettings(), "sigma", 3),
        (DefNetSettings(), "loss", "ncc"),
        (DefNetSettings(), "form", "stationary"),
        (DefNetSettings(), "reference", "voxels"),
        (DefNetSettings(), "decay", "exponential"),
        (DefNetSettings(), "squarings", -1),
        (DefNetSettings(), "levels", [(8, 8, 5, 0)]),
        (DefNetSettings(), "learning_rate", 0.0),
        (DefNetSettings(), "learning_rate", float("nan")),
        (RefNetSettings(), "backbone", "hash"),
        (RefNetSettings(), "decay", "exponential"),
        (RefNetSettings(), "iterations", 0),
        (RefNetSettings(), "iterations", float("inf")),
        (RefNetSettings(), "iterations", float("nan")),
        (RefNetSettings(), "fraction_per_step", 1.5),
        (RefNetSettings(), "learning_rate", -1.0),
        (RefNetSettings(), "squarings", 7),
    ],
)
def test_unknown_or_impossible_settings_are_refused(
    settings: DefNetSettings | RefNetSettings, name: str, value: object
) -> None:
    with pytest.raises(InputError, match=name):
        with_changes(settings, {name: value})


# -- grids of a level

CT = Grid((101, 81, 41), (1.0, 1.0, 2.5), (5.0, 6.0, 7.0))


def test_level_s_grids() -> None:
    level = Level(4.0, 8.0, 10)
    assert level.voxels(CT).size == (26, 21, 26)
    assert level.lattice(CT).spacing_mm == pytest.approx((8.0, 8.0, 8.0), rel=0.1)
    assert Level(4.0, None, 10).lattice(CT) == level.voxels(CT)
    assert Level(None, None, 10).voxels(CT) is CT


def test_voxels_are_never_finer_than_the_scan_s() -> None:
    assert Level(2.0, None, 1).voxels(CT).spacing_mm == pytest.approx((2.0, 2.0, 2.5))
    assert Level(1.0, None, 1).voxels(CT).is_close(CT)
    # What is read between voxels is kept at twice the resolution, the scan's own too.
    assert Level(2.0, None, 1).voxels(CT, refine=2).spacing_mm == pytest.approx((1.0, 1.0, 1.25), rel=0.01)


def test_numbers_of_numpy_and_whole_ones_with_a_point_are_numbers() -> None:
    given = {"squarings": np.int64(4), "noise": np.float32(0.5), "width": 128.0, "contours": 2}
    levels = [(np.float64(8.0), 12, 60.0)]
    settings = with_changes(DefNetSettings(), {**given, "levels": levels})
    assert (settings.squarings, settings.noise, settings.width, settings.contours) == (4, 0.5, 128, 2)
    assert [type(getattr(settings, name)) for name in given] == [int, float, int, int]
    assert [type(value) for value in asdict(settings.levels[0]).values()] == [
        float,
        int,
        int,
        type(None),
        type(None),
    ]
    with pytest.raises(InputError, match=r"squarings: 4\.5 must be a whole number"):
        with_changes(DefNetSettings(), {"squarings": 4.5})
    with pytest.raises(InputError, match="squarings: True must be a number"):
        with_changes(DefNetSettings(), {"squarings": True})


def test_gaussians_of_a_level() -> None:
    coarse = Grid((41, 31, 21), (2.5, 2.5, 2.5))
    # Half a voxel of the level, less what the reference's voxels have blurred: √(2² − 1²) / 2.
    level, own = Level(2.0, None, 1), Level(None, None, 1)
    assert level.aliasing_sigma_mm(CT, CT) == pytest.approx((3**0.5 / 2,) * 3)
    assert level.aliasing_sigma_mm(coarse, coarse) == own.aliasing_sigma_mm(CT, CT) == (0, 0, 0)
    # An image with thinner voxels, √(h² / 12) more, h² being the difference; of a thicker one nothing.
    thicker = (5.25 / 12) ** 0.5
    assert own.aliasing_sigma_mm(coarse, CT) == pytest.approx((thicker, thicker, 0))
    assert level.aliasing_sigma_mm(CT, coarse) == pytest.approx((3**0.5 / 2,) * 3)
    # After moving, 0.7 of the scan's finest spacing, in voxels of the level, (z, y, x).
    assert Level(2.0, None, 1).smoothing(CT, 0.7) == pytest.approx((0.28, 0.35, 0.35), rel=0.01)
    assert Level(None, None, 1).smoothing(CT, 0.7) == pytest.approx((0.28, 0.7, 0.7))
    assert Level(2.0, None, 1).smoothing(coarse, 0.7) == pytest.approx((0.7, 0.7, 0.7))
    assert Level(2.0, None, 1).smoothing(CT, 0.7, coarse) == pytest.approx(
        [0.7 * min(CT.spacing_mm) / s for s in coarse.spacing_mm[::-1]]
    )


def test_an_image_is_compared_at_its_own_voxels_but_never_at_finer_ones_than_the_level_s() -> None:
    thin, thick = Grid((50, 50, 40), (1.0, 1.0, 1.0)), Grid((50, 50, 8), (1.5, 1.5, 5.0))
    finest = Level(None, None, 1)
    assert finest.voxels_beside(thin, thick).is_close(thick)
    assert finest.voxels_beside(thick, thin).spacing_mm == pytest.approx((49 / 33, 49 / 33, 39 / 26))
    assert Level(1.2, None, 1).voxels_beside(thick, thin).spacing_mm == pytest.approx((49 / 41, 49 / 41, 39 / 32))
    assert Level(2, None, 1).voxels_beside(thin, thick).spacing_mm == pytest.approx((73.5 / 37, 73.5 / 37, 5))


def test_level_s_corners_are_the_scan_s() -> None:
    corners = np.array([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    for level in (Level(3.0, 7.0, 1), Level(1000.0, 1000.0, 1)):
        for grid in (level.voxels(CT), level.lattice(CT)):
            assert np.abs(grid.cube_to_world(corners) - CT.cube_to_world(corners)).max() < 1e-9
            assert min(grid.size) >= 2
