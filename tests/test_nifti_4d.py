"""4D NIfTI: what is written is what nibabel and `load_series` read, voxel by voxel and in world space."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from stnerp import InputError, MissingFileError, load_series
from stnerp.geometry import Grid
from stnerp.io.image import read_images, times_beside
from stnerp.io.nifti_4d import write_nifti_4d

TIMES = (0.0, 0.35, 0.7)


def volumes(grid: Grid, count: int = 3, dtype: type = np.int16) -> list[sitk.Image]:
    """Every voxel of every volume has a value of its own."""
    values = np.arange(count * grid.voxels, dtype=float).reshape(count, *grid.shape) - 500
    return [grid.image((value if dtype is np.int16 else value + 0.25).astype(dtype)) for value in values]


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


@pytest.mark.parametrize("name", ["series.nii.gz", "series.nii"])
def test_it_reads_back_the_same(any_grid: Grid, name: str, tmp_path: Path) -> None:
    images = volumes(any_grid)
    write_nifti_4d(iter(images), TIMES, tmp_path / name, dtype="int16", time_unit="s")
    series = load_series(tmp_path / name)
    assert series.times == TIMES
    assert series.time_unit == "s"
    for read, image in zip(series.images, images, strict=True):
        assert Grid.of(read).is_close(any_grid)
        np.testing.assert_array_equal(array(read), array(image))
        assert read.GetPixelID() == sitk.sitkInt16
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_nibabel_sees(any_grid: Grid, tmp_path: Path) -> None:
    images = volumes(any_grid)
    write_nifti_4d(images, (5, 7, 9), tmp_path / "a.nii.gz", dtype="int16", time_unit="ms")
    image = nibabel.load(tmp_path / "a.nii.gz")
    header = image.header
    assert image.shape == (*any_grid.size, 3)
    assert header.get_data_dtype() == np.int16
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    assert header.get_xyzt_units() == ("mm", "msec")
    assert (header["pixdim"][4], header["toffset"]) == (2, 5)
    np.testing.assert_allclose(header["pixdim"][1:4], any_grid.spacing_mm, rtol=1e-6)
    # x fastest, then y, z, t; nibabel's arrays are (x, y, z, t).
    np.testing.assert_array_equal(np.asarray(image.dataobj)[..., 1].T, array(images[1]))
    # Both transforms put each voxel where it is: RAS is LPS with x and y turned round.
    index = np.array([2.0, 1.0, 3.0])
    world = any_grid.index_to_world(index) * [-1, -1, 1]
    for affine in (header.get_sform(), header.get_qform()):
        np.testing.assert_allclose(affine[:3, :3] @ index + affine[:3, 3], world, atol=1e-4)
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)


def test_floats_keep_their_fractions_and_whole_numbers_are_rounded(tmp_path: Path) -> None:
    grid = Grid((5, 6, 4), (1, 2, 3))
    images = volumes(grid, dtype=np.float32)
    write_nifti_4d(images, TIMES, tmp_path / "f.nii.gz")
    write_nifti_4d(images, TIMES, tmp_path / "i.nii.gz", dtype="int16")
    for k, image in enumerate(images):
        np.testing.assert_array_equal(array(load_series(tmp_path / "f.nii.gz").images[k]), array(image))
        np.testing.assert_array_equal(array(load_series(tmp_path / "i.nii.gz").images[k]), np.rint(array(image)))


def test_labels_of_32_bits(tmp_path: Path) -> None:
    grid = Grid((5, 6, 4), (1, 2, 3))
    labels = [grid.image(np.full(grid.shape, label, np.int64)) for label in (70000, -3, 2**31 - 1)]
    write_nifti_4d(labels, TIMES, tmp_path / "a.nii", dtype="int32")
    for read, image in zip(read_images(tmp_path / "a.nii")[0], labels, strict=True):
        np.testing.assert_array_equal(array(read), array(image))
        assert read.GetPixelID() == sitk.sitkInt32
    for beyond in (labels[2] + 1, sitk.Cast(labels[2], sitk.sitkFloat32)):  # float32 has 2³¹ for 2³¹ - 1
        with pytest.raises(InputError, match="number 2 has values that int32 can't hold"):
            write_nifti_4d([*labels[:2], beyond], TIMES, tmp_path / "b.nii", dtype="int32")


@pytest.mark.parametrize("times", [[0, 0.1, 0.2, 0.3], [0, 1 / 3, 2 / 3, 1], [-2, -1, 0, 1], [0, 35, 70, 105]])
def test_even_times_are_in_the_header(times: list[float], tmp_path: Path) -> None:
    write_nifti_4d(volumes(Grid((5, 6, 4), (1, 2, 3)), 4), times, tmp_path / "a.nii.gz")
    series = load_series(tmp_path / "a.nii.gz")
    # The header's step is float32: within a millionth of the whole.
    np.testing.assert_allclose(series.times, times, atol=1e-6 * (times[-1] - times[0]))
    assert series.time_unit is None
    assert times_beside(tmp_path / "a.nii.gz") is None


@pytest.mark.parametrize("times", [[0, 12, 30], [1.7e9 + 1, 1.7e9 + 2, 1.7e9 + 3]])
def test_other_times_stand_beside_it(times: list[float], tmp_path: Path) -> None:
    # Days of scans; and seconds since 1970, for which float32 has no room.
    path = tmp_path / "a.nii.gz"
    images = volumes(Grid((5, 6, 4), (1, 2, 3)))
    write_nifti_4d(images, times, path)
    assert nibabel.load(path).header["pixdim"][4] == 0
    assert load_series(path).times == tuple(times)
    # They go with the file that they belong to.
    with pytest.raises(InputError, match="already exists"):
        write_nifti_4d(images, TIMES, path)
    assert load_series(path).times == tuple(times)
    write_nifti_4d(images, TIMES, path, overwrite=True)
    assert not (tmp_path / "a.json").exists()
    assert load_series(path).times == TIMES


@pytest.mark.parametrize("name", ["v.nii", "V.NII.GZ"])
@pytest.mark.parametrize("unit", [None, "ms"])
def test_uneven_times_are_read_with_the_file(name: str, unit: str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    write_nifti_4d(volumes(Grid((5, 6, 4), (1, 2, 3))), (0, 1, 5), path, time_unit=unit)
    for given in (path, str(path), [path]):
        series = load_series(given)
        assert (series.times, series.time_unit) == ((0, 1, 5), unit)


@pytest.mark.parametrize(
    "content", ['{"EchoTime": 0.03}', "[0, 1, 5]", "no JSON", "{}", '{"times": [0, 1, 5]}', "[" * 100000]
)
def test_the_json_of_others_is_neither_lost_nor_read(content: str, tmp_path: Path) -> None:
    images = volumes(Grid((5, 6, 4), (1, 2, 3)))
    write_nifti_4d(images, (0, 2, 4), tmp_path / "a.nii.gz")
    (tmp_path / "a.json").write_text(content)
    before = (tmp_path / "a.nii.gz").read_bytes()
    assert load_series(tmp_path / "a.nii.gz").times == (0, 2, 4)
    for times in (TIMES, (0, 1, 5)):
        for overwrite in (False, True):
            with pytest.raises(InputError, match=r"a\.json: holds something else than times"):
                write_nifti_4d(images, times, tmp_path / "a.nii.gz", overwrite=overwrite)
    assert (tmp_path / "a.json").read_text() == content
    assert (tmp_path / "a.nii.gz").read_bytes() == before


def test_times_beside_it_that_are_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = volumes(Grid((5, 6, 4), (1, 2, 3)))
    write_nifti_4d(images, (0, 2, 4), tmp_path / "a.nii", time_unit="s")
    (tmp_path / "a.json").write_text('{"times": [0, 1, 5, 6], "time_unit": null}')
    assert load_series(tmp_path / "a.nii").times == (0, 2, 4)
    assert "the 4 times beside it aren't used, it has 3 images" in caplog.text
    (tmp_path / "a.json").write_text('{"times": "soon", "time_unit": null}')
    with pytest.raises(InputError, match=r"a\.json: holds no list of times"):
        load_series(tmp_path / "a.nii")
    write_nifti_4d(images, (0, 1, 5), tmp_path / "a.nii", overwrite=True)  # its own, and damaged
    assert load_series(tmp_path / "a.nii").times == (0, 1, 5)


def test_one_volume_at_a_time(tmp_path: Path) -> None:
    # Those before are free to go: a series of any length needs the memory of one volume.
    grid = Grid((5, 6, 4), (1, 2, 3))
    alive: list[int] = []

    class Volume(sitk.Image):
        def __del__(self) -> None:
            alive.pop()

    def made() -> Iterator[sitk.Image]:
        for image in volumes(grid, 3):
            assert len(alive) <= 1  # that which the writer still holds while it asks for the next
            alive.append(1)
            yield Volume(image)

    write_nifti_4d(made(), TIMES, tmp_path / "a.nii", dtype="int16")
    assert len(load_series(tmp_path / "a.nii")) == 3


def test_it_refuses(tmp_path: Path) -> None:
    grid = Grid((5, 6, 4), (1, 2, 3))
    images = volumes(grid)
    large = [image * 1000 for image in volumes(grid, dtype=np.float32)]
    shifted = Grid(grid.size, grid.spacing_mm, (1, 0, 0)).image(array(images[2]))
    hole = grid.image(np.full(grid.shape, np.nan, np.float32))
    for given, times, settings, message in (
        (images, (0, 1), {}, "3 for 2 times|number"),
        (images[:2], TIMES, {}, "2 for 3 times"),
        ([], (), {}, "increase strictly"),
        (images, (0, 2, 1), {}, "increase strictly"),
        (images, (0, 1, np.nan), {}, "increase strictly"),
        (images, TIMES, {"time_unit": "days"}, "none of NIfTI's"),
        ([*images[:2], shifted], TIMES, {}, "number 2 is on another grid"),
        (large, TIMES, {"dtype": "int16"}, "number 0 has values that int16 can't hold"),
        (images, TIMES, {"dtype": "uint8"}, "uint8 can't hold"),
        ([hole, *images[1:]], TIMES, {"dtype": "int16"}, "number 0 has values"),
    ):
        with pytest.raises(InputError, match=message):
            write_nifti_4d(given, times, tmp_path / "a.nii.gz", **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"must end in \.nii\.gz or \.nii"):
        write_nifti_4d(images, TIMES, tmp_path / "a.mha")
    with pytest.raises(MissingFileError, match="folder does not exist"):
        write_nifti_4d(images, TIMES, tmp_path / "no" / "a.nii")
    assert list(tmp_path.iterdir()) == []  # nothing half written either
