"""Full-size checks on real scans, where the data folder is at hand: `make test-slow`.

The bounds are what the README promises, with room for another seed or processor.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from stnerp import Grid, fit_deformation, load_series
from stnerp.alignment import affine_between
from stnerp.geometry import apply_affine
from stnerp.io.image import read_image
from stnerp.metrics import folding, ncc, tre_mm
from stnerp.phantom import patient_in
from stnerp.preprocess import compared, normalised
from stnerp.window import Window

DATA = Path(os.environ.get("STNERP_DATA", Path(__file__).parents[2] / "shared" / "data"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}; set STNERP_DATA"),
]


@pytest.mark.parametrize("seed", [0, 1])
def test_lung_followup_from_the_raw_files(seed: int) -> None:
    folder = DATA / "lung_followup"
    names = ("baseline", "followup")
    series = load_series(
        [folder / f"3DCT_lung_{name}.mha" for name in names],
        landmarks=[folder / f"{name}_landmarks.txt" for name in names],
    )
    reference_mm, target_mm = series.landmarks
    assert reference_mm is not None
    assert target_mm is not None
    grids = [Grid.of(image) for image in series.images]
    seen = grids[0].contains(reference_mm) & grids[1].contains(target_mm)
    assert seen.sum() == 51
    model = fit_deformation(series, None, seed=seed, progress=False)
    errors_mm = tre_mm(model.map_points(target_mm[seen], series.times[1]), reference_mm[seen])
    assert errors_mm.mean() < 1.6  # elastix 1.50, ANTs SyN 2.67
    assert np.median(errors_mm) < 1.3
    assert folding(sitk.GetArrayFromImage(model.jacobian(series.times[1])))["folded_voxels"] == 0


def test_two_phases_of_a_real_4d_ct() -> None:
    series = load_series([DATA / "thorax_4dct" / f"{name}.mha" for name in ("t0", "t5")], [0, 5], period=10)
    # Coarse levels only: enough to see that it goes the right way.
    model = fit_deformation(series, None, progress=False, levels=[(8, 12, 40), (4, 12, 20)])
    before, target = (normalised(image, series.window) for image in series.images)
    after = normalised(model.image(5), series.window)
    assert 1 - ncc(after, target) < 0.5 * (1 - ncc(before, target))
    assert folding(sitk.GetArrayFromImage(model.jacobian(5)))["folded_voxels"] == 0


def test_a_patient_who_lies_elsewhere_on_the_couch() -> None:
    """Moved by 27 mm, with fresh noise. Locally normalised images alone don't find that (40 mm)."""
    shift_mm = np.array([20.0, 15.0, -10.0])
    scan = sitk.Cast(read_image(DATA / "lung_followup" / "3DCT_lung_baseline.mha"), sitk.sitkFloat32)
    grid = Grid.of(scan).with_spacing((4.0, 4.0, 4.0))
    place = (grid.size, sitk.Transform(), sitk.sitkLinear, grid.origin_mm, grid.spacing_mm, grid.direction)
    scan = sitk.Resample(scan, *place, -1000.0)
    patient = sitk.Cast(patient_in(scan), sitk.sitkUInt8)
    there = sitk.TranslationTransform(3, (-shift_mm).tolist())
    moved = sitk.Resample(sitk.Mask(scan, patient, -1000.0), scan, there, sitk.sitkLinear, -1000.0)
    couch = sitk.Mask(scan, sitk.BinaryDilate(patient, [2, 2, 2]) == 0, -1000.0)
    draw = np.random.default_rng(0)
    window = Window(-1000, 1000)
    reference, target = (
        grid.image(window.normalise(sitk.GetArrayFromImage(image) + 20 * draw.standard_normal(grid.shape)))
        for image in (scan, sitk.Maximum(moved, couch))
    )
    body_mm = grid.points_world()[sitk.GetArrayFromImage(patient) > 0]
    for kind in ("rigid", "affine"):
        found_mm = apply_affine(affine_between(reference, target, kind), body_mm)  # type: ignore[arg-type]
        assert tre_mm(found_mm, body_mm + shift_mm).mean() < 1


@pytest.mark.parametrize(("radius_mm", "shift_mm"), [(80, (50.0, 0.0, 0.0)), (100, (30.0, 20.0, -50.0))])
def test_a_small_round_field_of_view_far_from_where_it_belongs(
    radius_mm: float, shift_mm: tuple[float, float, float]
) -> None:
    """A cone beam CT of a moved patient. By what is in the circle alone the second is not found, 92 mm off."""
    scan = sitk.Cast(read_image(DATA / "chest_ct" / "ct.nii.gz"), sitk.sitkFloat32)
    grid = Grid.of(scan).with_spacing((3.0, 3.0, 3.0))
    place = (grid.size, sitk.Transform(), sitk.sitkLinear, grid.origin_mm, grid.spacing_mm, grid.direction)
    scan = sitk.Resample(sitk.SmoothingRecursiveGaussian(scan, 1.2), *place, -1000.0)
    turned = sitk.Euler3DTransform(grid.centre_mm.tolist(), 0.0, 0.0, np.deg2rad(3), shift_mm)
    moved = sitk.GetArrayFromImage(sitk.Resample(scan, scan, turned, sitk.sitkLinear, -1000.0))
    y, x = ((np.arange(n) - (n - 1) / 2) * 3.0 for n in grid.shape[1:])
    away_mm = np.hypot(y[:, None], x)
    moved += 30 * np.random.default_rng(0).standard_normal(grid.shape)
    moved[:, away_mm > radius_mm] = -1024
    window = Window(-1000, 500)
    values, seen = compared(grid.image(np.rint(moved).astype(np.int16)), window)
    assert seen is not None
    reference = grid.image(window.normalise(sitk.GetArrayFromImage(scan)))
    masks = None, grid.image(seen.astype(np.uint8))
    found = affine_between(reference, grid.image(values), "rigid", seen=masks)
    target_mm = grid.points_world()[::8, away_mm < radius_mm][:, ::8].reshape(-1, 3)
    reference_mm = np.array([turned.TransformPoint(point) for point in target_mm.tolist()])
    assert tre_mm(apply_affine(np.linalg.inv(found), target_mm), reference_mm).mean() < 0.5
