import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from test_io import rotation, write_dicom

from stnerp import fit_deformation, fit_reference
from stnerp.errors import InputError, MissingFileError, StnerpError
from stnerp.geometry import Grid
from stnerp.io.image import read_image, write_image
from stnerp.io.landmarks import write_landmarks
from stnerp.series import load_series
from stnerp.window import Window

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")

GRID = Grid((6, 7, 8), (1.0, 2.0, 3.0), (-10.0, 20.0, 30.0))


def image(seed=0, grid=GRID, dtype=np.float32):
    return grid.image(np.random.default_rng(seed).uniform(0, 100, grid.shape).astype(dtype))


def mask(grid=GRID):
    array = np.zeros(grid.shape, np.uint8)
    array[2:5, 2:5, 2:5] = 3
    return grid.image(array)


def moved(millimetres, grid=GRID):
    """The grid, shifted along x."""
    x, y, z = grid.origin_mm
    return Grid(grid.size, grid.spacing_mm, (x + millimetres, y, z), grid.direction)


def three():
    return [image(i) for i in range(3)]


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"t{i}.nii.gz" for i in (1, 2, 10)]
    for i, path in enumerate(paths):
        write_image(image(i), path)
    return [str(path) for path in paths]


# -- what goes in


def test_files_in_the_order_given(files):
    series = load_series(files, times=[0, 1.5, 9], reference=1)
    assert len(series) == 3
    assert series.names == ("t1.nii.gz", "t2.nii.gz", "t10.nii.gz")
    assert (series.times, series.reference, series.reference_time, series.targets) == (
        (0, 1.5, 9),
        1,
        1.5,
        (0, 2),
    )
    assert series.grid.is_close(GRID)
    assert series.reference_image is series.images[1]
    for i in range(3):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(series.images[i]), sitk.GetArrayFromImage(image(i)))
    assert (series.period, series.time_unit, series.masks, series.landmarks) == (
        None,
        None,
        (None,) * 3,
        (None,) * 3,
    )


def test_a_pattern_is_in_natural_order(files):
    pattern = str(Path(files[0]).parent / "t*.nii.gz")
    series = load_series(pattern)
    assert series.names == ("t1.nii.gz", "t2.nii.gz", "t10.nii.gz")
    assert series.times == (0, 1, 2)


def test_equal_file_names_are_told_apart_by_their_folders(tmp_path):
    paths = []
    for i in range(2):
        (tmp_path / f"p{i}").mkdir()
        paths.append(tmp_path / f"p{i}" / "ct.nii.gz")
        write_image(image(i), paths[-1])
    assert load_series(paths).names == tuple(map(str, paths))


def test_every_kind_of_image_gives_the_same_series(tmp_path):
    grid = Grid(GRID.size, GRID.spacing_mm)
    images = [image(i, grid) for i in range(3)]
    arrays = np.stack([sitk.GetArrayFromImage(one) for one in images])
    affine = np.diag([-1.0, -2, 3, 1])  # LPS axes in RAS
    sitk.WriteImage(sitk.JoinSeries(images), str(tmp_path / "4d.nii.gz"))
    for given in (
        images,
        list(arrays),
        arrays,
        torch.from_numpy(arrays),
        [nib.Nifti1Image(array.T, affine) for array in arrays],
        sitk.JoinSeries(images),
        nib.Nifti1Image(np.moveaxis(arrays, 0, 3).transpose(2, 1, 0, 3), affine),
        tmp_path / "4d.nii.gz",
        [str(tmp_path / "4d.nii.gz")],
        [images[0], arrays[1], nib.Nifti1Image(arrays[2].T, affine)],
    ):
        series = load_series(given, times=(0, 1, 2), spacing_mm=(1, 2, 3))
        assert all(Grid.of(one).is_close(grid) for one in series.images)
        np.testing.assert_array_equal([sitk.GetArrayFromImage(one) for one in series.images], arrays)


def test_dicom_folders(tmp_path):
    for i in range(3):
        stored = np.random.default_rng(i).integers(0, 2000, GRID.shape)
        write_dicom(tmp_path / f"day{i}", GRID, stored, f"1.2.3.{i}", SeriesDescription=f"Gated, {50 - 10 * i}%")
    together = load_series(tmp_path)
    assert together.names == ("Gated, 30%", "Gated, 40%", "Gated, 50%")
    listed = load_series([tmp_path / f"day{i}" for i in range(3)])
    assert listed.names == ("day0", "day1", "day2")
    for one, same in zip(listed.images, together.images[::-1], strict=True):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(same))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("of_one", "says"),
    [
        ({"PatientID": "another"}, "2 different patient IDs"),
        ({"Modality": "PT"}, "several modalities, CT, PT"),
        ({"ManufacturerModelName": "kV imaging"}, "2 devices; is a cone beam CT among them"),
        ({"SeriesDescription": "Average"}, "'Average' have no phase"),
        ({}, ""),
    ],
)
def test_what_is_hardly_of_one_series_is_told(listed, of_one, says, tmp_path, caplog):
    for i in range(4):
        stored = np.random.default_rng(i).integers(0, 2000, GRID.shape)
        tags = {"SeriesDescription": f"Gated, {20 * i}%", "PatientID": "one", **(of_one if i == 3 else {})}
        write_dicom(tmp_path / f"s{i}", GRID, stored, f"1.2.3.{i}", **tags)
    load_series([tmp_path / f"s{i}" for i in range(4)] if listed else tmp_path)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == (1 if says else 0)
    assert all(says in message for message in told)
    assert "another" not in caplog.text  # who it is


@pytest.mark.parametrize(
    "times",
    [
        (20240115, 20240130, 20240201),
        ("20240115", "20240130", "20240201"),
        np.array(["2024-01-15", "2024-01-30", "2024-02-01"], "datetime64[ns]"),
    ],
)
def test_dates_do_not_count_days(times):
    """From 30 January to 1 February it is two days, and not 71."""
    with pytest.raises(InputError, match=r"times: .* dates"):
        load_series(three(), times)


def test_times_of_a_4d_file_hold_unless_others_are_given(tmp_path):
    array = np.random.default_rng(0).normal(size=(6, 7, 8, 3)).astype(np.float32)
    four = nib.Nifti1Image(array, np.eye(4))
    four.header.set_xyzt_units("mm", "msec")
    four.header["pixdim"][4] = 35
    four.to_filename(tmp_path / "a.nii.gz")
    series = load_series(tmp_path / "a.nii.gz", period=105.5)
    assert (series.times, series.time_unit, series.period) == ((0, 35, 70), "ms", 105.5)
    assert series.names == ("a.nii.gz[0]", "a.nii.gz[1]", "a.nii.gz[2]")
    series = load_series(tmp_path / "a.nii.gz", times=[1, 2, 3])
    assert (series.times, series.time_unit) == ((1, 2, 3), None)


def test_window_is_shared_by_all_images():
    series = load_series(three())
    assert series.window == Window.of("percentile", three())
    assert load_series(three(), window=(0, 50)).window == Window(0, 50)
    assert load_series(three(), window="lung").window.name == "lung"


def test_grids_may_differ_and_stay_as_they_are(caplog):
    with caplog.at_level(logging.INFO, logger="stnerp"):
        series = load_series([image(0), image(1, moved(2.0))])
    assert Grid.of(series.images[1]).is_close(moved(2.0))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "grids differ" in caplog.text


def test_equal_grids_are_no_news(caplog):
    with caplog.at_level(logging.INFO, logger="stnerp"):
        load_series(three())
    assert caplog.text == ""


# -- fields of view


def test_touching_boxes_overlap_and_distant_ones_do_not():
    # Voxel centres span 5 mm along x.
    load_series([image(0), image(1, moved(4.9))])
    with pytest.raises(InputError, match=r"image 1: .*do not meet .*5 mm apart.*origins"):
        load_series([image(0), image(1, moved(5.1))])


def test_overlap_of_oblique_boxes_is_exact():
    # A slab 40 mm long, turned by 30 degrees about z: its bounding box covers the corner below it.
    slab = Grid((41, 4, 8), (1, 1, 1), (0, 0, 0), rotation(z=np.pi / 6))
    corner = Grid((6, 6, 8), (1, 1, 1), (25, 0, 0))
    on_it = Grid((6, 6, 8), (1, 1, 1), (20, 10, 0))
    load_series([image(0, slab), image(1, on_it)])
    with pytest.raises(InputError, match="do not meet"):
        load_series([image(0, slab), image(1, corner)])


def test_boxes_apart_along_an_edge_direction_only():
    # Two beams crossing at a distance: no face normal separates them, the cross product of edges does.
    a = Grid((60, 4, 4), (1, 1, 1), (-30, 0, 0), rotation(x=np.pi / 4))
    b = Grid((4, 60, 4), (1, 1, 1), (0, -30, 0), rotation(y=np.pi / 4))
    # 3 mm squares standing on an edge: a's top edge is at 3√2 mm, b's bottom edge at its origin - 3√½ mm.
    touching = 3 * np.sqrt(2) + 3 * np.sqrt(0.5)
    near, apart = (
        image(1, Grid(b.size, b.spacing_mm, (0, -30, height), b.direction))
        for height in (touching - 0.01, touching + 0.01)
    )
    load_series([image(0, a), near])
    with pytest.raises(InputError, match="do not meet"):
        load_series([image(0, a), apart])


# -- masks


def test_masks_may_be_one_or_listed_or_mapped(tmp_path):
    write_image(mask(), tmp_path / "m.nii.gz")
    path = tmp_path / "m.nii.gz"
    array = sitk.GetArrayFromImage(mask())
    for given, expected in (
        (path, [1]),
        (str(path), [1]),
        (mask(), [1]),
        (array, [1]),
        (array.astype(bool), [1]),
        (nib.load(path), [1]),
        ([path, None, mask()], [0, 2]),
        ({0: path, "2": array}, [0, 2]),
        (np.stack([array] * 3), [0, 1, 2]),
    ):
        series = load_series(three(), reference=1, masks=given)
        assert [i for i, one in enumerate(series.masks) if one is not None] == expected
        for i in expected:
            assert Grid.of(series.masks[i]).is_close(GRID)
            np.testing.assert_array_equal(sitk.GetArrayFromImage(series.masks[i]) > 0, array > 0)


@pytest.mark.parametrize(("modality", "window"), [("CT", "ct"), ("MR", "percentile")])
def test_dicom_says_of_which_modality_an_image_is(tmp_path, modality, window):
    """Phase images of an MR may have the intensities of a CT."""
    for i in range(2):
        stored = np.random.default_rng(i).choice([24, 1064], size=GRID.shape)
        write_dicom(tmp_path / f"day{i}", GRID, stored, f"1.2.3.{i}", Modality=modality)
    assert load_series([tmp_path / "day0", tmp_path / "day1"]).window.name == window


def test_a_mask_lies_where_its_image_lies_but_for_rounding():
    """NIfTI keeps an origin in single precision; ITK takes that for another place."""
    near = mask()
    near.SetOrigin([o + 1e-5 for o in near.GetOrigin()])
    series = load_series(three(), masks=near)
    assert series.masks[0].GetOrigin() == series.images[0].GetOrigin()
    sitk.Mask(series.images[0], series.masks[0])  # would raise


def test_mask_on_another_grid_is_resampled_with_a_notice(caplog):
    # Every second voxel of a twice finer grid whose first voxel is the image's.
    fine = Grid((11, 13, 15), (0.5, 1.0, 1.5), GRID.origin_mm)
    labels = np.random.default_rng(0).integers(0, 5, fine.shape).astype(np.uint8)
    series = load_series(three(), masks=fine.image(labels))
    assert "mask 0 is on another grid than image 0: resampled onto it" in caplog.text
    np.testing.assert_array_equal(sitk.GetArrayFromImage(series.masks[0]), labels[::2, ::2, ::2])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (mask(moved(500)), "mask 0: nothing of it lies inside image 0; is it the mask of another patient"),
        (mask() * 0, "mask 0: is empty"),
        (sitk.Cast(mask(), sitk.sitkFloat32) + 0.5, "mask 0: labels must be whole numbers"),
        ([None, None], "masks: 2 for 3 images"),
        ({3: mask()}, "masks: 3 is not the index of an image, from 0 to 2"),
        ({-1: mask()}, "masks: -1"),
        (np.ones((3, 4, 5)), "mask 0: an array has no voxel size"),
        ("nowhere.nii.gz", r"nowhere\.nii\.gz: no such file"),
        (7, "mask 0: int is not an image"),
    ],
)
def test_unusable_masks(masks, message):
    with pytest.raises(InputError, match=message):
        load_series(three(), masks=masks)


# -- landmarks

POINTS = GRID.index_to_world(np.array([[1.0, 2, 3], [4, 5, 6]]))


def test_landmarks_from_arrays_and_files(tmp_path):
    write_landmarks(POINTS, tmp_path / "a.csv")
    (tmp_path / "index.txt").write_text("index\n2\n1 2 3\n4 5 6\n")
    for given, expected in (
        (POINTS, [0]),
        (tmp_path / "a.csv", [0]),
        ([torch.from_numpy(POINTS), None, tmp_path / "a.csv"], [0, 2]),
        ({2: tmp_path / "index.txt"}, [2]),
        (np.stack([POINTS] * 3), [0, 1, 2]),
    ):
        series = load_series(three(), landmarks=given)
        assert [i for i, points in enumerate(series.landmarks) if points is not None] == expected
        for i in expected:
            np.testing.assert_allclose(series.landmarks[i], POINTS, atol=1e-12)


def test_index_landmarks_use_the_grid_of_their_own_image(tmp_path):
    (tmp_path / "index.txt").write_text("index\n1\n0 0 0\n")
    series = load_series([image(0), image(1, moved(2.0))], landmarks=[tmp_path / "index.txt"] * 2)
    np.testing.assert_array_equal(series.landmarks[1] - series.landmarks[0], [[2, 0, 0]])


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        ([POINTS, POINTS[:1], None], "numbers differ .image 0 2, image 1 1."),
        (POINTS + 1000, "landmarks 0: no point lies inside image 0; are they in LPS mm"),
        (POINTS * np.nan, "landmarks 0: holds coordinates that are NaN"),
        (POINTS[:, :2], r"landmarks 0: shape \(2, 2\) must be \(N, 3\)"),
        (POINTS[:0], r"shape \(0, 3\)"),
        ({0: "nowhere.csv"}, r"nowhere\.csv: no such landmark file"),
        ([["a", "b"], None, None], "landmarks 0: must be a file or an array"),
    ],
)
def test_unusable_landmarks(landmarks, message):
    with pytest.raises(InputError, match=message):
        load_series(three(), landmarks=landmarks)


# -- what is refused


def with_voxels(value, count):
    array = sitk.GetArrayFromImage(image())
    array.flat[:count] = value
    return GRID.image(array)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, r"images: got 0"),
        ([image()], {}, "series needs at least two"),
        ("no/such*.nii", {}, r"no file matches the pattern no/such\*\.nii"),
        (["nowhere.nii", "nope.nii"], {}, r"nowhere\.nii: no such file"),
        (
            [np.zeros((5, 6, 7)), np.zeros((5, 6, 7))],
            {},
            r"image 0: an array has no voxel size; give spacing_mm",
        ),
        ([image(), 5], {}, "image 1: int is not an image"),
        ([image(), with_voxels(np.nan, 12)], {}, "image 1: 12 voxels are NaN or infinite"),
        ([image(), with_voxels(np.inf, 1)], {}, "image 1: 1 voxels"),
        ([image(), image() * 0], {}, "image 1: every voxel is 0"),
        (
            [image(), image(grid=Grid((6, 7, 3), (1, 1, 1)))],
            {},
            "image 1: 6 x 7 x 3 voxels; every axis needs 4",
        ),
        (three(), {"times": [0, 1]}, "times: 2 for 3 images"),
        (three(), {"times": [0, 1, 1]}, "times: image 1 and image 2 both are at 1"),
        (three(), {"times": [0, 2, 1]}, r"times: 1 \(image 2\) comes after 2 \(image 1\); sort"),
        (three(), {"times": [0, 1, float("nan")]}, "times: .* finite"),
        (three(), {"times": [0, 1, "day 3"]}, "times: .* must be numbers"),
        (three(), {"times": 5}, "times: 5 must be numbers"),
        (three(), {"reference": 3}, "reference: 3 must be the index of an image, from 0 to 2"),
        (three(), {"reference": -1}, "reference: -1"),
        (three(), {"reference": 0.5}, "reference: 0.5"),
        (three(), {"period": 0}, "period: 0 must be a positive number"),
        (three(), {"period": float("inf")}, "period: inf"),
        (three(), {"period": 2}, "period: 2 is not longer than the 2 from first to last image"),
        # 0.1 + 0.2 is above 0.3 by a rounding: still the same phase twice.
        (three(), {"times": [0, 0.1, 0.3], "period": 0.1 + 0.2}, "period: 0.3 is not longer"),
        (three(), {"window": "bone"}, "window: unknown name"),
    ],
)
def test_what_would_fail_later_is_refused_first(images, options, message):
    with pytest.raises(InputError, match=message) as error:
        load_series(images, **options)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_a_file_not_found(files):
    with pytest.raises(FileNotFoundError):
        load_series([*files, "nowhere.nii.gz"])
    with pytest.raises(MissingFileError):
        load_series(Path(files[0]).parent)  # a folder, and no DICOM in it
    with pytest.raises(StnerpError):
        load_series("nowhere.nii.gz")


# -- leaving images out


def test_subset_keeps_what_belongs_together():
    images = [image(i) for i in range(5)]
    series = load_series(
        images,
        times=[0, 1, 2, 3, 4],
        reference=2,
        period=5,
        masks={2: mask(), 3: mask()},
        landmarks={1: POINTS, 4: POINTS + 0.5},
    )
    part = series.subset([4, 0, 2])
    assert (part.times, part.reference, part.reference_time, part.period) == ((0, 2, 4), 1, 2, 5)
    assert part.names == ("image 0", "image 2", "image 4")
    assert part.reference_image is series.reference_image
    assert [one is not None for one in part.masks] == [False, True, False]
    np.testing.assert_array_equal(part.landmarks[2], POINTS + 0.5)
    # Learned from the full series: held-out images must be compared on the same scale.
    assert part.window == series.window


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1, 2], "leave out the reference image, 0"),
        ([0], "reference alone"),
        ([0, 3], "from 0 to 2"),
        ([0, -1], "from 0 to 2"),
        ([0, 1, 1], "different numbers"),
    ],
)
def test_unusable_subsets(indices, message):
    with pytest.raises(InputError, match=message):
        load_series(three()).subset(indices)


# -- real scans


@needs_data
def test_cine_mr():
    series = load_series(DATA / "cine_mr" / "cine.nii.gz", reference=12, period=25 * 35)
    assert (len(series), series.time_unit) == (25, "ms")
    assert series.times == tuple(35.0 * i for i in range(25))
    assert series.window.name == "percentile"


@needs_data
def test_lung_followup():
    folder = DATA / "lung_followup"
    names = ("baseline", "followup")
    series = load_series(
        [folder / f"3DCT_lung_{name}.mha" for name in names],
        times=[0, 30],
        masks=[folder / f"3DCT_lung_{name}_mask.mha" for name in names],
        landmarks=[folder / f"{name}_landmarks.txt" for name in names],
    )
    assert series.window == Window(-1000, 1000, "ct")
    assert all(len(points) == 100 for points in series.landmarks)
    inside = [Grid.of(one).contains(points) for one, points in zip(series.images, series.landmarks, strict=True)]
    assert np.sum(inside[0] & inside[1]) == 51
    np.testing.assert_array_equal(series.landmarks[0][0], [-36.351, -36.974, -1204.5])


@needs_data
def test_mask_of_another_patient():
    lung = DATA / "lung_followup" / "3DCT_lung_baseline_mask.mha"
    chest = read_image(DATA / "chest_ct" / "ct.nii.gz")
    with pytest.raises(InputError, match=r"3DCT_lung_baseline_mask\.mha: .*another patient"):
        load_series([chest, chest + 1], masks=lung)


def test_what_a_series_and_a_fit_print_says_what_they_are():
    series = load_series([image(0), image(1)], times=[0, 30], window=(0, 100))
    about = "times 0, 30; reference 0: 6 x 7 x 8 voxels of 1 x 2 x 3 mm"
    assert repr(series).startswith(f"Series({about}; Window(")
    model = fit_deformation(series, align="none", levels=[(4, 4, 1)], progress=False)
    assert repr(model) == f"STNeRP({about}; without Ref-Net)"


@pytest.mark.parametrize("fit", [fit_reference, fit_deformation])
def test_something_else_in_place_of_a_series(fit):
    with pytest.raises(InputError, match="expected what load_series gives back, got list"):
        fit(["a.nii.gz"])


def test_a_cycle_that_was_seen_in_part_is_told_of(caplog):
    load_series(three(), times=[0, 3, 6], period=10)
    load_series(three()[:2], times=[0, 5], period=10)
    assert not caplog.records
    load_series(three(), times=[0, 1, 3], period=10)
    assert "no image between 3 and 10, more than half of the cycle of 10" in caplog.text
