import gzip
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch

from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dicom import dicom_series, read_dicom_folder, read_dicom_series
from stnerp.io.image import as_image, as_images, read_image, read_images, read_labels, write_image
from stnerp.io.landmarks import read_landmarks, write_landmarks

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def rotation(x=0.0, y=0.0, z=0.0):
    """Direction cosines (nine numbers) of a rotation by three angles in radians."""
    transform = sitk.Euler3DTransform()
    transform.SetRotation(x, y, z)
    return transform.GetMatrix()


OBLIQUE = Grid((5, 6, 7), (1.0, 2.0, 3.5), (-10.0, 20.0, 30.0), rotation(0.3, -0.2, 0.5))
GRIDS = {
    "LPS": Grid((5, 6, 7), (1.0, 2.0, 3.5), (-10.0, 20.0, 30.0)),
    "RAS": Grid((5, 6, 7), (1.0, 2.0, 3.5), (-10.0, 20.0, 30.0), (-1, 0, 0, 0, -1, 0, 0, 0, 1)),
    "PIR": Grid((5, 6, 7), (1.0, 2.0, 3.5), (-10.0, 20.0, 30.0), (0, 0, -1, 1, 0, 0, 0, -1, 0)),
    "oblique": OBLIQUE,
}


def numbered(grid, dtype=np.int16):
    """An image whose voxels all differ, so that any flip or shift shows."""
    return grid.image(np.arange(grid.voxels, dtype=dtype).reshape(grid.shape))


def assert_same(image, other, atol_mm=1e-4):
    # NIfTI keeps positions in float32: 1e-4 mm is a thousand times finer than any voxel here.
    assert Grid.of(image).is_close(Grid.of(other), atol_mm)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(other))


# -- images in files


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("orientation", GRIDS)
def test_written_images_read_back_the_same(tmp_path, suffix, orientation):
    image = numbered(GRIDS[orientation])
    write_image(image, tmp_path / f"a{suffix}")
    assert_same(read_image(tmp_path / f"a{suffix}"), image)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_write_refuses_to_overwrite_unless_asked(tmp_path):
    path = tmp_path / "a.nii.gz"
    write_image(numbered(OBLIQUE), path)
    with pytest.raises(InputError, match="overwrite=true"):
        write_image(numbered(OBLIQUE), path)
    other = numbered(GRIDS["LPS"])
    write_image(other, path, overwrite=True)
    assert_same(read_image(path), other)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.nii"
    write_image(numbered(OBLIQUE), path)
    unwritable = sitk.Image([2] * 3, sitk.sitkLabelUInt8)
    with pytest.raises(InputError, match=r"a\.nii: can't be written"):
        write_image(unwritable, path, overwrite=True)
    assert_same(read_image(path), numbered(OBLIQUE))
    assert [file.name for file in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize("suffix", [".MHA", ".NII.GZ", ".Nii", ".nii.GZ", ".NRRD"])
def test_suffixes_in_upper_case(tmp_path, suffix):
    image, path = numbered(OBLIQUE), tmp_path / f"a{suffix}"
    # What a killed process left, whose number no process has.
    (tmp_path / f".{2**31 - 1}.a{suffix.lower()}").write_bytes(b"half")
    for given, overwrite in ((image + 1, False), (image, True)):
        write_image(given, path, overwrite)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match="can't be written"):
        write_image(sitk.Image([2] * 3, sitk.sitkLabelUInt8), path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix not in (".Nii", ".nii.GZ"):  # which ITK doesn't read
        assert_same(read_image(path), image)
    assert_same(read_image(path.rename(tmp_path / f"b{suffix.lower()}")), image)


def test_write_names_what_is_wrong_with_the_path(tmp_path):
    with pytest.raises(MissingFileError, match="folder does not exist"):
        write_image(numbered(OBLIQUE), tmp_path / "no" / "a.nii")
    with pytest.raises(InputError, match=r"must end in one of \.nii\.gz"):
        write_image(numbered(OBLIQUE), tmp_path / "a.txt")


def test_missing_and_broken_files_are_named_in_one_line(tmp_path):
    with pytest.raises(MissingFileError, match=r"a\.nii: no such file") as error:
        read_image(tmp_path / "a.nii")
    assert isinstance(error.value, FileNotFoundError)
    for name in ("b.nii.gz", "b.nrrd", "b.mha", "b.dcm"):
        (tmp_path / name).write_bytes(b"NRRD0004\nnot an image")
        with pytest.raises(InputError, match=name) as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_a_file_cut_short_is_an_error(tmp_path, suffix, capfd):
    path = tmp_path / f"a{suffix}"
    write_image(numbered(OBLIQUE), path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=path.name):
        read_image(path)
    capfd.readouterr()  # MetaIO's own complaint


def test_a_nifti_of_several_gzip_members_is_whole(tmp_path):
    write_image(numbered(OBLIQUE), tmp_path / "a.nii")
    whole = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(whole[:400]) + gzip.compress(whole[400:]))
    assert_same(read_image(tmp_path / "b.nii.gz"), numbered(OBLIQUE))


def test_only_3d_images_with_one_value_per_voxel(tmp_path):
    flat = sitk.GetImageFromArray(np.zeros((5, 6), np.uint8))
    vectors = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3)), isVector=True)
    four = sitk.JoinSeries([numbered(OBLIQUE)] * 3)
    for image, message in ((flat, "2D"), (vectors, "3 values per voxel"), (four, "3 images")):
        sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / "a.nii.gz")
        with pytest.raises(InputError, match=message):
            as_image(image)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 3), np.uint8), isVector=True), str(tmp_path / "a.png"))
    with pytest.raises(InputError, match="3 values per voxel"):
        read_image(tmp_path / "a.png")


def test_a_fourth_axis_of_one_image_does_not_matter(tmp_path):
    sitk.WriteImage(sitk.JoinSeries([numbered(OBLIQUE)]), str(tmp_path / "a.mha"))
    assert_same(read_image(tmp_path / "a.mha"), numbered(OBLIQUE))
    assert read_images(tmp_path / "a.mha")[1:] == (None, None)


# -- 4D files


def write_4d_nifti(path, unit, step, start=0.0, count=3):
    array = np.arange(5 * 6 * 7 * count, dtype=np.int16).reshape(5, 6, 7, count)
    image = nib.Nifti1Image(array, np.diag([1, 2, 3, 1.0]))
    image.header.set_xyzt_units("mm", unit)
    image.header["pixdim"][4] = step
    image.header["toffset"] = start
    image.to_filename(path)
    return array


@pytest.mark.parametrize(("stored", "unit"), [("sec", "s"), ("msec", "ms"), ("usec", "us"), ("unknown", None)])
def test_4d_nifti_times_are_in_its_own_unit(tmp_path, stored, unit):
    array = write_4d_nifti(tmp_path / "a.nii.gz", stored, step=35, start=70)
    images, times, time_unit = read_images(tmp_path / "a.nii.gz")
    assert (times, time_unit) == ([70, 105, 140], unit)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), array[..., i].T)
        assert image.GetSpacing() == (1, 2, 3)


def test_4d_nifti_times_are_decimal(tmp_path):
    write_4d_nifti(tmp_path / "a.nii", "sec", step=0.1, count=4)
    # Neither float32's 0.10000000149 nor the sum's 0.30000000000000004.
    assert read_images(tmp_path / "a.nii")[1] == [0, 0.1, 0.2, 0.3]


def test_4d_nifti_without_a_step_has_no_times(tmp_path):
    write_4d_nifti(tmp_path / "a.nii", "sec", step=0)
    assert read_images(tmp_path / "a.nii")[1] is None


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_other_4d_files_have_times_without_a_unit(tmp_path, suffix):
    phases = [numbered(OBLIQUE), numbered(OBLIQUE) + 1, numbered(OBLIQUE) + 2]
    four = sitk.JoinSeries(phases, 5.0, 0.5)  # origin and spacing along t
    sitk.WriteImage(four, str(tmp_path / f"a{suffix}"))
    for images, times, unit in (read_images(tmp_path / f"a{suffix}"), as_images(four)):
        assert (times, unit) == ([5, 5.5, 6], None)
        for image, phase in zip(images, phases, strict=True):
            assert_same(image, phase)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_cine_mr():
    images, times, unit = read_images(DATA / "cine_mr" / "cine.nii.gz")
    assert (times, unit) == ([35.0 * i for i in range(25)], "ms")
    other = as_images(nib.load(DATA / "cine_mr" / "cine.nii.gz"))
    assert other[1:] == (times, unit)
    for image, same in zip(images, other[0], strict=True):
        assert_same(image, same)


# -- images in memory


@pytest.mark.parametrize("orientation", GRIDS)
def test_nibabel_and_simpleitk_agree_on_the_same_file(tmp_path, orientation):
    sitk.WriteImage(numbered(GRIDS[orientation]), str(tmp_path / "a.nii.gz"))
    loaded = nib.load(tmp_path / "a.nii.gz")
    image = as_image(loaded)
    assert_same(image, numbered(GRIDS[orientation]))
    # And with nibabel's own arithmetic: a voxel's RAS position is its LPS position with x, y negated.
    ras = nib.affines.apply_affine(loaded.affine, [1, 2, 3])
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint([1, 2, 3]), ras * [-1, -1, 1], atol=1e-4)
    assert image[1, 2, 3] == np.asanyarray(loaded.dataobj)[1, 2, 3]


def test_nibabel_rescaling_is_applied():
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4))
    image.header.set_slope_inter(2, 1)
    scaled = nib.Nifti1Image.from_bytes(image.to_bytes())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(as_image(scaled)), np.asanyarray(scaled.dataobj).T)


def forms(rotation_degrees, spacing, origin):
    """An affine, index to RAS mm."""
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*np.radians(rotation_degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(turn.GetMatrix(), (3, 3)) * spacing
    affine[:3, 3] = origin
    return affine


QFORM = forms((10, 20, 30), (1, 2, 3), (5, 6, 7))
SFORMS = {
    "same": QFORM,
    "turned": forms((-40, 0, 10), (1, 2, 3), (-50, 60, 7)),
    "shifted": forms((10, 20, 30), (1, 2, 3), (5, 6, 8)),
    "flipped": QFORM @ np.diag([-1, 1, 1, 1]),
    "sheared": np.array([[1, 0.5, 0, 3], [0, 2, 0, 4], [0, 0, 3, 5], [0, 0, 0, 1]]),
}


def write_forms(path, sform, codes, unit="mm", scale=1):
    header = nib.Nifti1Header()
    image = nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(5, 6, 7), None, header)
    scaling = np.diag([scale, scale, scale, 1])
    image.header.set_qform(scaling @ QFORM, codes[0])
    image.header.set_sform(scaling @ sform, codes[1])
    image.header.set_xyzt_units(unit)
    image.to_filename(path)
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == codes


@pytest.mark.parametrize("qform_code", range(5))
@pytest.mark.parametrize("sform_code", range(5))
@pytest.mark.parametrize("sform", SFORMS)
def test_a_nibabel_nifti_lies_where_its_file_does(tmp_path, sform, sform_code, qform_code):
    """Whichever form ITK prefers; nibabel prefers the sform."""
    write_forms(tmp_path / "a.nii", SFORMS[sform], (qform_code, sform_code))
    if sform == "sheared" and sform_code and not qform_code:
        with pytest.raises(InputError, match="orthonormal"):
            read_image(tmp_path / "a.nii")
        with pytest.raises(InputError, match="sheared"):
            as_image(nib.load(tmp_path / "a.nii"))
        return
    read = sitk.ReadImage(str(tmp_path / "a.nii"))
    for given in (tmp_path / "a.nii", nib.load(tmp_path / "a.nii")):
        assert_same(as_image(given), read, 1e-6)


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1)])
@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (1, 1)])
def test_the_unit_of_a_nifti_counts(tmp_path, unit, scale, codes):
    write_forms(tmp_path / "a.nii", QFORM, codes, unit, scale)
    to_lps = np.diag([-1.0, -1, 1, 1]) @ QFORM
    for given in (tmp_path / "a.nii", nib.load(tmp_path / "a.nii")):
        world = as_image(given).TransformIndexToPhysicalPoint([1, 2, 3])
        np.testing.assert_allclose(world, (to_lps @ [1, 2, 3, 1])[:3], atol=1e-4)


def test_other_kinds_of_nibabel_nifti_too(tmp_path):
    """Two files, NIfTI-2, the other byte order, and an affine that the header doesn't have yet."""
    expected = np.diag([-1.0, -1, 1, 1]) @ QFORM @ [1, 2, 3, 1]
    voxels = np.arange(210, dtype=np.int16).reshape(5, 6, 7)
    changed = nib.Nifti1Image(voxels, np.eye(4))
    changed.affine[:] = QFORM
    swapped = nib.Nifti1Image(voxels, QFORM, nib.Nifti1Header(endianness=">"))
    swapped.to_filename(tmp_path / "swapped.nii")
    for image in (
        nib.Nifti1Pair(voxels, QFORM),
        nib.Nifti2Image(voxels, QFORM),
        nib.load(tmp_path / "swapped.nii"),
        changed,
    ):
        read = as_image(image)
        np.testing.assert_allclose(read.TransformIndexToPhysicalPoint([1, 2, 3]), expected[:3], atol=1e-4)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(read), voxels.T)


@pytest.mark.parametrize("sform_code", [1, 2])
@pytest.mark.parametrize("qform_code", [0, 1])
def test_a_nifti_with_voxels_of_two_sizes(tmp_path, qform_code, sform_code):
    """ITK takes the axes of the sform and the size of pixdim."""
    write_forms(tmp_path / "a.nii", QFORM @ np.diag([1.5, 1, 1, 1]), (qform_code, sform_code))
    for given in (tmp_path / "a.nii", nib.load(tmp_path / "a.nii")):
        with pytest.raises(InputError, match="its sform and its pixdim speak of voxels of two sizes"):
            as_image(given)


@pytest.mark.parametrize(("unit", "scale"), [("mm", 1), ("meter", 1e-3)])
def test_a_nifti_in_two_places_is_told_of(tmp_path, caplog, unit, scale):
    """ITK takes one form or the other by their codes; nibabel's tools always the sform."""
    path = tmp_path / "a.nii"
    for form, codes in (("same", (1, 2)), ("shifted", (0, 2)), ("shifted", (1, 0))):
        write_forms(path, SFORMS[form], codes, unit, scale)
        as_image(path)
    write_forms(path, forms((10, 20, 30), (1, 2, 3), (5, 6, 7.4)), (1, 2), unit, scale)  # less than half a voxel
    as_image(path)
    assert not caplog.records
    for codes in ((1, 2), (2, 1)):
        caplog.clear()
        write_forms(path, SFORMS["shifted"], codes, unit, scale)
        first_ras = np.array([-1, -1, 1]) * as_image(path).GetOrigin()
        taken = "qform" if first_ras[2] == pytest.approx(7, abs=1e-4) else "sform"
        assert f"{path}: its sform and its qform lie up to 1 mm apart; the {taken} is taken" in caplog.text


@pytest.mark.parametrize("spacing", [(0.0007, 0.0007, 0.001), (700, 700, 3000)])
def test_voxels_in_memory_have_sizes_in_mm_too(spacing):
    array = np.zeros((5, 6, 7), np.int16)
    for given, options in (
        (array, {"spacing_mm": spacing}),
        (np.stack([array] * 2), {"spacing_mm": spacing}),
        (nib.Nifti1Image(array, np.diag([*spacing, 1])), {}),
        (nib.MGHImage(array, np.diag([*spacing, 1])), {}),
    ):
        with pytest.raises(InputError, match="mm large; is its spacing in mm"):
            as_images(given, **options)
    with pytest.raises(InputError, match="isn't a number; give spacing_mm, origin"):
        as_image(array, (1, 1, 1), origin=(0, np.nan, 0))
    with pytest.raises(InputError, match="sheared"):
        as_image(array, (1, 1, 1), direction=(1, 0.5, 0, 0, 1, 0, 0, 0, 1))


def test_nibabel_shear_is_refused():
    affine = np.diag([2.0, 2, 3, 1])
    affine[0, 1] = 0.5
    with pytest.raises(InputError, match="sheared"):
        as_image(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine))


def test_array_is_zyx_and_spacing_xyz():
    array = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    for given in (array, torch.from_numpy(array).requires_grad_()):
        image = as_image(given, (1.0, 2.0, 5.0), origin=(10, 20, 30))
        assert image.GetSize() == (4, 3, 2)
        assert image[3, 1, 0] == array[0, 1, 3]
        assert image.TransformIndexToPhysicalPoint((3, 1, 1)) == (13, 22, 35)


@pytest.mark.parametrize("dtype", [bool, np.uint8, ">i2", np.int64, np.float16, np.float32, np.float64])
def test_array_types(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(as_image(array, (1, 1, 1))), array)


def test_bfloat16_tensor():
    tensor = torch.arange(24).reshape(2, 3, 4).bfloat16()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(as_image(tensor, (1, 1, 1))), tensor.float().numpy())


@pytest.mark.parametrize(
    ("value", "spacing", "message"),
    [
        (np.zeros((3, 4, 5)), None, r"spacing_mm=\(x, y, z\)"),
        (np.zeros((3, 4, 5)), (1, 2), "three numbers"),
        (np.zeros((3, 4, 5)), (1, 2, 0), "spacing"),
        (np.zeros((4, 5)), (1, 1, 1), "shape"),
        (np.zeros((0, 3, 4, 5)), (1, 1, 1), "shape"),
        (np.zeros((3, 4, 5), complex), (1, 1, 1), "complex"),
        (np.zeros((2, 3, 4, 5)), (1, 1, 1), "2 images"),
        (3.5, None, "float is not an image"),
    ],
)
def test_unusable_values_are_refused(value, spacing, message):
    with pytest.raises(InputError, match=message):
        as_image(value, spacing)


def test_labels_may_be_stored_as_floats(tmp_path):
    labels = numbered(OBLIQUE, np.float32)
    write_image(labels, tmp_path / "a.nii.gz")
    image = read_labels(tmp_path / "a.nii.gz")
    assert image.GetPixelID() == sitk.sitkInt32
    assert_same(image, labels)
    write_image(labels + 0.5, tmp_path / "b.nii.gz")
    with pytest.raises(InputError, match=r"b\.nii\.gz: labels must be whole numbers"):
        read_labels(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_labels_beyond_32_bits_are_refused(tmp_path, dtype):
    for label in (3e9, 2.0**31, -3e9):
        write_image(OBLIQUE.image(np.full(OBLIQUE.shape, label, dtype)), tmp_path / "a.nii.gz", overwrite=True)
        with pytest.raises(InputError, match=r"a\.nii\.gz: labels must lie between -2147483648 and 2147483647"):
            read_labels(tmp_path / "a.nii.gz")
    for label in (2**31 - 128, -(2**31)):  # the outermost of float32
        write_image(OBLIQUE.image(np.full(OBLIQUE.shape, label, dtype)), tmp_path / "a.nii.gz", overwrite=True)
        assert read_labels(tmp_path / "a.nii.gz")[0, 0, 0] == label


# -- DICOM


def write_dicom(folder, grid, array, uid, *, shift=None, skip=(), slope=1, intercept=-1024, **tags):
    """A CT series with real tags; `array` (z, y, x) holds stored values, before the rescale.

    Numbers may be given per slice; `tags` are DICOM keywords.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.reshape(grid.direction, (3, 3))
    x, y, z = grid.size
    for k in set(range(z)) - set(skip):
        position = grid.index_to_world(np.array([0.0, 0, k])) + (0 if shift is None else shift[k])
        piece = pydicom.Dataset()
        piece.SOPClassUID = pydicom.uid.CTImageStorage
        piece.SOPInstanceUID = f"{uid}.{k + 1}"
        piece.StudyInstanceUID = "1.2.826.0.1.3680043.8.498.1"
        piece.SeriesInstanceUID = uid
        piece.Modality = "CT"
        # Numbered against the direction of the stack: the order has to come from the positions.
        piece.InstanceNumber = z - k
        piece.ImagePositionPatient = [f"{value:.10g}" for value in position]
        piece.ImageOrientationPatient = [f"{value:.12f}" for value in axes[:, :2].T.ravel()]
        piece.PixelSpacing = [grid.spacing_mm[1], grid.spacing_mm[0]]  # between rows, then columns
        piece.SliceThickness = 99  # says nothing about the distance
        piece.Rows, piece.Columns = y, x
        piece.SamplesPerPixel, piece.PhotometricInterpretation = 1, "MONOCHROME2"
        piece.BitsAllocated, piece.BitsStored, piece.HighBit, piece.PixelRepresentation = 16, 16, 15, 0
        piece.RescaleSlope = np.broadcast_to(slope, z)[k]
        piece.RescaleIntercept = np.broadcast_to(intercept, z)[k]
        piece.PixelData = array[k].astype("<u2").tobytes()
        for keyword, value in tags.items():
            setattr(piece, keyword, value)
        piece.file_meta = pydicom.dataset.FileMetaDataset()
        piece.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        # Names in no order either.
        piece.save_as(folder / f"{(k * 3) % 7}_{uid}.dcm", enforce_file_format=True)


UID = "1.2.826.0.1.3680043.8.498.7"
STORED = np.random.default_rng(0).integers(0, 3000, (7, 6, 5))


@pytest.mark.parametrize("orientation", GRIDS)
def test_dicom_series_values_and_positions(tmp_path, orientation):
    grid = GRIDS[orientation]
    write_dicom(tmp_path / "sub", grid, STORED, UID)
    (tmp_path / "DICOMDIR.txt").write_text("not DICOM")
    image = read_image(tmp_path)
    expected = grid.image((STORED - 1024).astype(np.int16))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(expected))
    # Positions were written with ten digits.
    assert Grid.of(image).is_close(grid, 1e-6)


def test_dicom_stack_against_its_normal(tmp_path):
    # Left-handed: slices were written downwards, the image comes back upwards, at the same places.
    grid = Grid((5, 6, 7), (1, 2, 3.5), (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, -1))
    write_dicom(tmp_path, grid, STORED, UID)
    image = read_dicom_series(tmp_path)
    expected = grid.image((STORED - 1024).astype(np.int16))[:, :, ::-1]
    assert image.TransformIndexToPhysicalPoint((4, 5, 0)) == (4, 10, -21)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(expected))


def test_dicom_slope_of_each_slice(tmp_path):
    grid = Grid((5, 6, 7), (1, 2, 3))
    # The first slice alone would fit an unsigned integer.
    slopes = 0.5 * np.arange(7) + 1
    write_dicom(tmp_path, grid, STORED, UID, slope=slopes, intercept=-np.arange(7))
    image = sitk.GetArrayFromImage(read_dicom_series(tmp_path))
    # Exact: halves of small integers.
    np.testing.assert_array_equal(image, STORED * slopes[:, None, None] - np.arange(7)[:, None, None])


def test_dicom_phases_in_order(tmp_path):
    grid = Grid((5, 6, 7), (1, 2, 3))
    # Written in the wrong order on purpose: names, series numbers and times of day all say otherwise.
    for i, percent in enumerate((50, 0, 100, 30)):
        write_dicom(
            tmp_path / "4d",
            grid,
            np.full((7, 6, 5), percent),
            f"{UID}.{i}",
            SeriesDescription=f"P4^S100, Gated, {percent}.0%",
            AcquisitionDate="20240105",
            AcquisitionTime=f"1{9 - i}0000",
            SeriesNumber=9 - i,
        )
    earlier = {"AcquisitionDate": "20231231", "SeriesDescription": "planning"}
    write_dicom(tmp_path / "old", grid, np.full((7, 6, 5), 7), f"{UID}.9", **earlier)
    assert [series.phase for series in dicom_series(tmp_path)] == [None, 0, 30, 50, 100]
    values = [sitk.GetArrayFromImage(image).max() + 1024 for image in read_dicom_folder(tmp_path)]
    assert values == [7, 0, 30, 50, 100]
    with pytest.raises(InputError, match=r"5 DICOM series \(planning"):
        read_image(tmp_path)


PHASES = {
    "P4^P113^S300^I00003, Gated, 30.0%A": 30,
    "Gated, 0%": 0,
    "30%A": 30,
    "4D T30%": 30,
    "CT T=30% 3.0": 30,
    "Thorax 3.0 B31f 30% Ex": 30,
    "4DCT_30%_In": 30,
    "EX 30 %": 30,
    "Resp. 30%": 30,
    "phase 30%": 30,
    "Gated ASIR 40%, 30%": 30,
    "Resp SS50% 30%": 30,
    "Thorax ASIR 40%": None,
    "4D ASiR-V 30%": None,
    "CT 30%": None,
    "Thorax 30%": None,
    "Index 30%": None,
    "thorax": None,
}


@pytest.mark.parametrize("description", PHASES)
def test_dicom_phase_of_a_description(tmp_path, description):
    write_dicom(tmp_path, Grid((5, 6, 7), (1, 2, 3)), STORED, UID, SeriesDescription=description)
    assert [series.phase for series in dicom_series(tmp_path)] == [PHASES[description]]


def described(folder, descriptions, **tags):
    """Series of one day, each an hour after the one before."""
    for i, description in enumerate(descriptions):
        own = {
            "SeriesDescription": description,
            "AcquisitionDate": "20240105",
            "AcquisitionTime": f"{8 + i:02d}0000",
        }
        write_dicom(folder, Grid((5, 6, 7), (1, 2, 3)), STORED, f"{UID}.{i}", **{**own, **tags})
    return [series.description for series in dicom_series(folder)]


def test_dicom_percentages_of_the_reconstruction_order_nothing(tmp_path):
    names = ["Thorax ASIR 40%", "Thorax ASIR 20%"]
    assert described(tmp_path, names) == names


def test_dicom_percentages_alone_are_phases_where_they_make_a_breath(tmp_path):
    breath = ["CT 50%", "CT 0%", "CT 75%", "CT 25%"]
    assert described(tmp_path / "breath", [*breath, "plain"]) == ["CT 0%", "CT 25%", "CT 50%", "CT 75%", "plain"]
    assert [series.phase for series in dicom_series(tmp_path / "breath")] == [0, 25, 50, 75, None]
    for i, names in enumerate(
        (
            breath[:3],  # too few
            ["CT 50%", "CT 30%", "CT 75%", "CT 25%"],  # without 0
            ["CT 50%", "CT 0%", "CT 73%", "CT 25%"],
            ["CT 150%", "CT 0%", "CT 75%", "CT 25%"],
            ["CT 50%", "CT 0%", "CT 0.0%", "CT 25%"],
        )
    ):
        assert described(tmp_path / str(i), names) == names
        assert {series.phase for series in dicom_series(tmp_path / str(i))} == {None}


def test_dicom_percentages_of_several_days_make_no_breath(tmp_path):
    for i, percent in enumerate((75, 50, 25, 0)):
        tags = {"AcquisitionDate": f"2024010{i + 1}", "SeriesDescription": f"CT {percent}%"}
        write_dicom(tmp_path, Grid((5, 6, 7), (1, 2, 3)), STORED, f"{UID}.{i}", **tags)
    assert {series.phase for series in dicom_series(tmp_path)} == {None}


def test_dicom_phases_that_share_one_series(tmp_path):
    grid = Grid((5, 6, 7), (1, 2, 3))
    for phase in (2, 10, 1):
        shared = {"TemporalPositionIdentifier": phase, "SeriesInstanceUID": UID}
        write_dicom(tmp_path, grid, np.full((7, 6, 5), phase), f"{UID}.{phase}", **shared)
    values = [sitk.GetArrayFromImage(image).max() + 1024 for image in read_dicom_folder(tmp_path)]
    assert values == [1, 2, 10]


def test_dicom_same_positions_without_a_phase(tmp_path):
    grid = Grid((5, 6, 7), (1, 2, 3))
    for i in range(2):
        write_dicom(tmp_path, grid, STORED + i, f"{UID}.{i}", SeriesInstanceUID=UID)
    with pytest.raises(InputError, match="several slices at the same position"):
        read_dicom_folder(tmp_path)


def test_dicom_copies_and_localisers_and_doses_do_not_count(tmp_path):
    grid = Grid((5, 6, 7), (1, 2, 3))
    write_dicom(tmp_path / "a", grid, STORED, UID)
    write_dicom(tmp_path / "copy", grid, STORED, UID)
    write_dicom(tmp_path / "scout", grid, STORED, f"{UID}.3", skip=range(1, 7))
    write_dicom(tmp_path / "dose", grid, STORED, f"{UID}.4", Modality="RTDOSE")
    assert len(dicom_series(tmp_path)) == 1
    assert read_image(tmp_path).GetSize() == (5, 6, 7)


@pytest.mark.parametrize("missing", [1, 3, 5])
def test_dicom_missing_slice(tmp_path, missing):
    write_dicom(tmp_path, OBLIQUE, STORED, UID, skip=[missing])
    with pytest.raises(InputError, match=rf"{tmp_path.name}.*missing or unevenly spaced.*3\.5 to 7 mm"):
        read_image(tmp_path)


def test_dicom_rounded_positions_are_no_gaps(tmp_path):
    shift = np.zeros((7, 3))
    shift[:, 2] = np.random.default_rng(1).uniform(-0.05, 0.05, 7)
    write_dicom(tmp_path, Grid((5, 6, 7), (1, 2, 1.25)), STORED, UID, shift=shift)
    image = read_image(tmp_path)
    # The distance that fits the whole stack, so that its last slice is where its tag says.
    last = 6 * 1.25 + shift[6, 2]
    np.testing.assert_allclose(image.TransformIndexToPhysicalPoint((0, 0, 6)), (0, 0, last), atol=1e-6)


def test_dicom_tilted_gantry(tmp_path):
    shift = np.zeros((7, 3))
    shift[:, 1] = np.arange(7) * 0.5
    write_dicom(tmp_path, Grid((5, 6, 7), (1, 2, 3)), STORED, UID, shift=shift)
    with pytest.raises(InputError, match="tilted gantry"):
        read_image(tmp_path)


def test_dicom_without_a_pixel_size(tmp_path):
    """The detector's (ImagerPixelSpacing) isn't the patient's."""
    write_dicom(tmp_path, Grid((5, 6, 7), (1, 2, 3)), STORED, UID, ImagerPixelSpacing=[2, 1])
    for path in tmp_path.iterdir():
        piece = pydicom.dcmread(path)
        del piece.PixelSpacing
        piece.save_as(path)
    with pytest.raises(InputError, match="has pixels without a size"):
        read_image(tmp_path)


def item(**tags):
    dataset = pydicom.Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def write_multi_frame(path, positions, stored, grid, spacing=None, uid=UID):
    """An Enhanced MR: (N, 3) positions of its frames, or None where it doesn't say; `stored` is (N, y, x)."""
    axes = np.reshape(grid.direction, (3, 3))
    between = [grid.spacing_mm[1], grid.spacing_mm[0]] if spacing is None else spacing
    file = item(
        SOPClassUID=pydicom.uid.EnhancedMRImageStorage,
        SOPInstanceUID=f"{uid}.{path.stem}",
        StudyInstanceUID="1.2.826.0.1.3680043.8.498.1",
        SeriesInstanceUID=uid,
        SeriesDescription="cine",
        Modality="MR",
        PatientID="p",
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
        BitsAllocated=16,
        BitsStored=16,
        HighBit=15,
        PixelRepresentation=0,
        **dict(zip(("NumberOfFrames", "Rows", "Columns"), stored.shape, strict=True)),
        PixelData=stored.astype("<u2").tobytes(),
    )
    measures = item(SliceThickness=99, SpacingBetweenSlices=grid.spacing_mm[2])
    if between:
        measures.PixelSpacing = between
    cosines = [f"{value:.12f}" for value in axes[:, :2].T.ravel()]
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=cosines)], PixelMeasuresSequence=[measures]
    )
    places = [None] * len(stored) if positions is None else positions
    frames = [item(FrameContentSequence=[item(FrameReferenceDateTime="20240101")]) for _ in places]
    for frame, place in zip(frames, places, strict=True):
        if place is not None:
            frame.PlanePositionSequence = [item(ImagePositionPatient=[f"{value:.10g}" for value in place])]
    file.SharedFunctionalGroupsSequence = [shared]
    file.PerFrameFunctionalGroupsSequence = frames
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    path.parent.mkdir(exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


def places_of(grid, slices):
    return [grid.index_to_world(np.array([0.0, 0, k])) for k in slices]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("orientation", GRIDS)
def test_a_multi_frame_file_by_folder_and_by_path(tmp_path, orientation, descending):
    grid = GRIDS[orientation]
    order = range(7)[::-1] if descending else range(7)
    path = write_multi_frame(tmp_path / "1.dcm", places_of(grid, order), STORED[list(order)], grid)
    for source in (tmp_path, path):
        image = read_image(source)
        for k in range(7):
            index = (1, 2, 6 - k if descending else k)
            world = grid.index_to_world(np.array([1.0, 2, k]))
            np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), world, atol=1e-6)
            assert image[index] == STORED[k, 2, 1]


def test_a_multi_frame_file_is_where_its_frames_are(tmp_path):
    """Not as far apart as another tag says."""
    grid, other = (Grid((5, 6, 7), (1, 2, z), (-10, 20, 30)) for z in (3.5, 5))
    path = write_multi_frame(tmp_path / "1.dcm", places_of(grid, range(7)), STORED, other)
    for source in (tmp_path, path):
        assert Grid.of(read_image(source)).is_close(grid, 1e-6)


@pytest.mark.parametrize(
    ("slices", "says"),
    [
        ([0, 1, 2, 0, 1, 2], r"6 frames at 3 positions \(a series in one file\)"),
        ([0, 0, 1, 1, 2, 2], r"6 frames at 3 positions \(a series"),
        ([3] * 6, r"6 frames at one position \(a series"),
        ([0, 1, 2, 4, 5, 6], r"6 frames at 6 positions \(unevenly"),
        ([0, 2, 4, 1, 3, 5], r"6 frames at 6 positions \(unevenly"),
    ],
)
def test_a_multi_frame_file_that_is_no_volume(tmp_path, slices, says):
    path = write_multi_frame(tmp_path / "1.dcm", places_of(OBLIQUE, slices), STORED[:6], OBLIQUE)
    for read in (lambda: read_image(tmp_path), lambda: read_image(path), lambda: read_images(path)):
        with pytest.raises(InputError, match=rf"1\.dcm: has {says}.*; convert it to NIfTI, by dcm2niix") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_multi_frame_file_that_says_too_little(tmp_path):
    grid, places = GRIDS["LPS"], places_of(GRIDS["LPS"], range(7))
    for i, (positions, spacing, says) in enumerate(
        (
            ([*places[:-1], None], None, "has 7 frames and says of 6 where they lie"),
            (None, None, "has 7 frames and doesn't say that they are evenly spaced slices"),
            (places, [], "has pixels without a size"),
            (places + 0.5 * np.arange(7)[:, None] * [1, 0, 0], None, "tilted gantry"),
        )
    ):
        path = write_multi_frame(tmp_path / str(i) / "1.dcm", positions, STORED, grid, spacing)
        for source in (path, path.parent):
            with pytest.raises(InputError, match=says):
                read_image(source)


def test_multi_frame_files_of_one_series_are_volumes_of_their_own(tmp_path):
    grid = GRIDS["LPS"]
    for i in range(2):
        write_multi_frame(tmp_path / f"{i}.dcm", places_of(grid, range(7)), STORED + i, grid)
    images = read_dicom_folder(tmp_path)
    for i, image in enumerate(images):
        assert_same(image, grid.image((STORED + i).astype(np.uint16)))
    assert len(images) == 2


def test_dicom_folder_without_images(tmp_path):
    with pytest.raises(MissingFileError, match="no DICOM series"):
        read_image(tmp_path)
    with pytest.raises(MissingFileError, match="no such folder"):
        dicom_series(tmp_path / "no")


def test_dicom_reading_is_silent(tmp_path):
    write_dicom(tmp_path, OBLIQUE, STORED, UID, shift=np.random.default_rng(1).uniform(-0.05, 0.05, (7, 3)))
    code = "import sys; from stnerp.io.image import read_image; read_image(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
    assert sitk.ProcessObject.GetGlobalWarningDisplay()


# -- landmarks

POINTS = np.array([[1.5, -2, 3], [4, 5.25, -1e3], [0, 0, 7]])


@pytest.mark.parametrize(
    "text",
    [
        "1.5,-2,3\n4,5.25,-1e3\n0,0,7\n",
        "x,y,z\n1.5,-2,3\n4,5.25,-1e3\n0,0,7",
        "\ufeffx_mm;y_mm;z_mm\r\n1.5;-2;3\r\n4;5.25;-1e3\r\n0;0;7\r\n",
        "X (mm),Y (mm),Z (mm)\n1.5,-2,3\n4,5.25,-1e3\n0,0,7",
        "1.5\t-2\t3\n4\t5.25\t-1e3\n0\t0\t7",
        "  1.5  -2 3\n\n# a comment\n4 5.25 -1e3\n0 0 7\n",
        "1, 1.5, -2, 3\n2, 4, 5.25, -1e3\n3, 0, 0, 7",
        'carina,1.5,-2,3\n"rib, left",4,5.25,-1e3\nc,0,0,7',
        "5, 1.5, -2, 3\n9, 4, 5.25, -1e3\n7, 0, 0, 7",
        "label,x,y,z\na,1.5,-2,3\nb,4,5.25,-1e3\nc,0,0,7",
        "n,x,y,z,m\n1,1.5,-2,3,1\n2,4,5.25,-1e3,2\n3,0,0,7,3",
        "z,y,x,label\n3,-2,1.5,a\n-1e3,5.25,4,b\n7,0,0,c",
        "point\n3\n1.5 -2 3\n4 5.25 -1e3\n0 0 7\n",
    ],
)
def test_landmark_tables(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    points = read_landmarks(tmp_path / "a.txt")
    assert points.dtype == np.float64
    np.testing.assert_array_equal(points, POINTS)


@pytest.mark.parametrize("first", [0, 1])
def test_whole_labels_that_count_stand_before_whole_coordinates(tmp_path, first):
    (tmp_path / "a.csv").write_text(f"{first},10,20,30\n{first + 1},11,21,31\n{first + 2},12,22,7\n")
    np.testing.assert_array_equal(read_landmarks(tmp_path / "a.csv"), [[10, 20, 30], [11, 21, 31], [12, 22, 7]])


def test_index_landmarks_count_from_zero(tmp_path):
    (tmp_path / "a.txt").write_text("index\n2\n0 0 0\n1 2 3\n")
    points = read_landmarks(tmp_path / "a.txt", OBLIQUE)
    image = numbered(OBLIQUE)
    expected = [image.TransformIndexToPhysicalPoint(index) for index in ((0, 0, 0), (1, 2, 3))]
    np.testing.assert_allclose(points, expected, atol=1e-12)
    with pytest.raises(InputError, match="pass the grid"):
        read_landmarks(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("header", "sign"),
    [
        ("# Markups fiducial file version = 4.10\n# CoordinateSystem = 0\n", -1),
        ("# Markups fiducial file version = 4.11\n# CoordinateSystem = RAS\n", -1),
        ("# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n", 1),
        ("# CoordinateSystem = 1\n", 1),
        ("", -1),
    ],
)
def test_slicer_landmarks(tmp_path, header, sign):
    columns = "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    rows = "1,1.5,-2,3,0,0,0,1,1,1,0,F-1,,\n2,4,5.25,-1e3,0,0,0,1,1,1,0,F-2,,\n3,0,0,7,0,0,0,1,1,1,0,F-3,,\n"
    (tmp_path / "a.fcsv").write_text(header + columns + rows)
    np.testing.assert_array_equal(read_landmarks(tmp_path / "a.fcsv"), POINTS * [sign, sign, 1])


def markups(**values):
    points = [{"id": str(i), "label": f"F-{i}", "position": p} for i, p in enumerate(POINTS.tolist(), 1)]
    points[0] |= {"orientation": [-1, 0, 0, 0, -1, 0, 0, 0, 1], "positionStatus": "defined"}
    return {"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": points} | values


@pytest.mark.parametrize(("system", "sign"), [("LPS", 1), ("RAS", -1)])
def test_slicer_markups(tmp_path, system, sign):
    written = {"@schema": "x", "markups": [markups(coordinateSystem=system, coordinateUnits="mm")]}
    (tmp_path / "a.mrk.json").write_text(json.dumps(written, indent=4))
    points = read_landmarks(tmp_path / "a.mrk.json")
    np.testing.assert_array_equal(points, POINTS * [sign, sign, 1])
    assert points.dtype == np.float64


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"markups": []}, "no list of control points"),
        ({"markups": [markups(), markups()]}, "one list of points"),
        ({"markups": [{"type": "Fiducial"}]}, "no list of control points"),
        ({"markups": [markups(controlPoints=[{"position": ["a", 1, 2]}])]}, "no list of control points"),
        ([1], "no list of control points"),
        ({"markups": [markups(coordinateSystem="IJK")]}, "RAS or LPS"),
        ({"markups": [markups(coordinateSystem=["LPS"])]}, "RAS or LPS"),
        ({"markups": [markups(coordinateUnits="um")]}, "must hold mm"),
        ({"markups": [markups(controlPoints=[])]}, "holds no points"),
        ({"markups": [markups(controlPoints=[{"position": [1, 2]}])]}, "is not a point"),
        ({"markups": [markups(controlPoints=[{"position": [1, 2, float("nan")]}])]}, "is not a point"),
        (
            {"markups": [markups(controlPoints=[{"position": [0, 0, 0], "positionStatus": "undefined"}])]},
            "weren't placed",
        ),
    ],
)
def test_slicer_markups_that_are_wrong(tmp_path, written, message):
    (tmp_path / "a.mrk.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=rf"a\.mrk\.json: .*{message}"):
        read_landmarks(tmp_path / "a.mrk.json")
    (tmp_path / "b.json").write_text(json.dumps(written)[:-1])
    with pytest.raises(InputError, match=r"b\.json: is no list of control points"):
        read_landmarks(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "no landmarks"),
        ("a.csv", "# only this\n", "no landmarks"),
        ("a.csv", "x,y,z\n", "a header and no landmarks"),
        ("a.csv", "x,y,z\n1,2,3\n\n1,two,3\n", "line 4: '1,two,3'"),
        ("a.csv", "1,2,3\n1,2,nan\n", "line 2"),
        ("a.csv", "1,2,3\n1,2\n", "line 2: 2 columns"),
        ("a.csv", "1,2\n", "2 columns"),
        ("a.csv", "1.5,2,3,7\n", "the first is no label"),
        ("a.csv", "-100 20.5 30.5 1\n-101.5 21.5 31.5 2\n", "the first is no label"),
        ("a.csv", "100 20.5 30.5 1\n101.5 21.5 31.5 2\n", "the first is no label"),
        ("a.csv", "100 20.5 30.5 1\n101 21.5 31.5 2\n", "the first or the last may be the label"),
        ("a.csv", "1,20.5,30.5,1\n2,21.5,31.5,2\n", "the first or the last may be the label"),
        ("a.csv", "5,20.5,30.5,70\n9,21.5,31.5,60\n", "the first or the last may be the label"),
        ("a.csv", "x1,y1,z1,x2,y2,z2\n1,2,3,4,5,6\n", "names x, y and z more than once"),
        ("a.csv", "x,y,z,x_mm,y_mm,z_mm\n1,2,3,4,5,6\n", "names x, y and z more than once"),
        ("a.csv", "r,a,s\n1,2,3\n", "must name the columns x, y, z"),
        ("a.txt", "point\n3\n1 2 3\n", "states 3 points and holds 1"),
        ("a.txt", "point\n1\n1 2 3\n4 5 6\n", "states 1 points and holds 2"),
        ("a.txt", "point\n1 2 3\n", "must be the number of points"),
        ("a.txt", "point\n1\n1 2\n", "line 3"),
        ("a.fcsv", "# CoordinateSystem = IJK\n1,2,3,4\n", "coordinate system IJK"),
        ("a.fcsv", "# CoordinateSystem = LPS\n1,2,x,4\n", "line 2"),
    ],
)
def test_landmark_files_that_are_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_landmarks(tmp_path / name)
    assert name in str(error.value)


def test_landmark_file_missing_or_binary(tmp_path):
    with pytest.raises(MissingFileError, match="no such landmark file"):
        read_landmarks(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="can't be read as text"):
        read_landmarks(tmp_path / "a.csv")


def test_landmarks_round_trip_bit_by_bit(tmp_path):
    points = np.random.default_rng(0).normal(size=(20, 3)) * 100
    write_landmarks(points, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith("x_mm,y_mm,z_mm\n")
    np.testing.assert_array_equal(read_landmarks(tmp_path / "a.csv"), points)
    with pytest.raises(InputError, match="overwrite=true"):
        write_landmarks(points, tmp_path / "a.csv")
    write_landmarks(points[:2], tmp_path / "a.csv", overwrite=True)
    assert len(read_landmarks(tmp_path / "a.csv")) == 2
    with pytest.raises(InputError, match=r"\(N, 3\)"):
        write_landmarks(points[:, :2], tmp_path / "b.csv")
