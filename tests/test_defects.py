"""What clinics send: each defect ends in a right answer or in one clear line. docs/inputs.md is the list."""

from __future__ import annotations

import gzip
import importlib
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import optional
from pydicom.encaps import encapsulate
from pydicom.uid import RLELossless
from test_io import write_dicom
from test_scripts import QUICK, _scripts_importable, refused, run  # noqa: F401 (a fixture)

from stnerp import STNeRP, fit_deformation, load_series
from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io import image as io_image
from stnerp.io.dicom import dicom_series, read_headers, write_dicom_series
from stnerp.io.image import as_image, read_image, read_images, write_image
from stnerp.io.landmarks import read_landmarks
from stnerp.io.manifest import read_manifest
from stnerp.io.rtstruct import Roi, write_structures
from stnerp.preprocess import normalised, on_grid
from stnerp.window import Window

ROOT = Path(__file__).resolve().parent.parent
GRID = Grid((6, 8, 7), (1.0, 2.0, 3.0), (-10.0, 20.0, 30.0))
UID = "1.2.826.0.1.3680043.8.498.9"
Caplog = pytest.LogCaptureFixture
Capsys = pytest.CaptureFixture[str]


def voxels(seed: int = 0, grid: Grid = GRID) -> np.ndarray:
    """Whole numbers of HU, air and soft tissue."""
    return np.random.default_rng(seed).integers(-1000, 400, grid.shape).astype(np.int16)


def scan(seed: int = 0, grid: Grid = GRID) -> sitk.Image:
    return grid.image(voxels(seed, grid))


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.dcm"))


# -- headers and their voxels


def lying(folder: Path, suffix: str, size: int) -> Path:
    """A small file whose header speaks of size^3 voxels."""
    path = folder / f"a{suffix}"
    if suffix.startswith(".nii"):
        sitk.WriteImage(scan(), str(folder / "a.nii"))
        content = bytearray((folder / "a.nii").read_bytes())
        content[42:48] = struct.pack("<3h", size, size, size)
        (folder / "a.nii").unlink()
        path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
        return path
    sitk.WriteImage(scan(), str(path), useCompression=False)
    key = {"m": rb"DimSize = ", "n": rb"sizes: "}[suffix[1]]
    content = re.sub(key + rb"[\d ]+", key + b" ".join([str(size).encode()] * 3), path.read_bytes())
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("size", [9, 2000, 32000])
def test_a_header_that_lies(
    suffix: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Refused before memory is asked for; a size that is wrong by little, at the latest when it is read."""
    path = lying(tmp_path, suffix, size)
    if size > 9:
        monkeypatch.setattr(sitk.ImageFileReader, "Execute", lambda _: pytest.fail("asks for memory"))
    with pytest.raises(InputError, match=path.name) as error:
        read_image(path)
    assert "\n" not in str(error.value)
    capfd.readouterr()  # MetaIO's own complaint


def test_more_voxels_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(scan(), tmp_path / "a.nii.gz")
    monkeypatch.setattr(io_image, "memory_bytes", lambda: 2 * GRID.voxels - 1)
    with pytest.raises(InputError, match=r"a\.nii\.gz: 6 x 8 x 7 voxels need .* more memory than there is"):
        read_image(tmp_path / "a.nii.gz")
    monkeypatch.setattr(io_image, "memory_bytes", lambda: 2 * GRID.voxels)
    read_image(tmp_path / "a.nii.gz")


def test_a_nifti_beside_its_compressed_namesake(tmp_path: Path) -> None:
    """ITK, asked for a.nii.gz, takes the voxels of a.nii."""
    write_image(scan(0), tmp_path / "a.nii")
    write_image(scan(1), tmp_path / "a.nii.gz")
    for name, seed in (("a.nii", 0), ("a.nii.gz", 1)):
        np.testing.assert_array_equal(array(read_image(tmp_path / name)), voxels(seed))


def with_header(path: Path, key: str, value: str) -> Path:
    """An .mha whose header says something else."""
    sitk.WriteImage(scan(), str(path), useCompression=False)
    changed, count = re.subn(rf"{key} = [^\n]+".encode(), f"{key} = {value}".encode(), path.read_bytes())
    assert count == 1
    path.write_bytes(changed)
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TransformMatrix", "1 0 0 0 1 0 0 0 0", "a.mha"),
        ("TransformMatrix", "1 0 0 0 nan 0 0 0 1", "a.mha"),
        ("TransformMatrix", "1 0 0 0.5 1 0 0 0 1", "sheared"),
        ("TransformMatrix", "2 0 0 0 2 0 0 0 2", "not of length 1"),
        ("ElementSpacing", "1 1 0", "a.mha"),
        ("ElementSpacing", "1 1 1e9", "is its spacing in mm"),
        ("ElementSpacing", "1e-6 1e-6 1e-6", "is its spacing in mm"),
    ],
)
def test_axes_that_span_no_space(
    key: str, value: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_image(with_header(tmp_path / "a.mha", key, value))
    assert "a.mha" in str(error.value)
    assert "\n" not in str(error.value)
    capfd.readouterr()


@pytest.mark.parametrize("origin", [np.nan, np.inf])
def test_an_origin_that_is_no_number(origin: float) -> None:
    image = scan()
    image.SetOrigin((0.0, origin, 0.0))
    with pytest.raises(InputError, match="image: its spacing, origin or direction isn't a number"):
        as_image(image)


def test_left_handed_axes_are_right(tmp_path: Path) -> None:
    image = read_image(with_header(tmp_path / "a.mha", "TransformMatrix", "1 0 0 0 1 0 0 0 -1"))
    assert image.TransformIndexToPhysicalPoint((1, 2, 3)) == (-9, 24, 21)
    np.testing.assert_array_equal(array(image), voxels())


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.nii", "/dev/zero", "."])
def test_names_that_are_no_files(name: str) -> None:
    with pytest.raises(MissingFileError, match=r"no such file|no DICOM series"):
        read_image("/nowhere" if name == "." else name)
    with pytest.raises(MissingFileError):
        read_landmarks(name)
    with pytest.raises(MissingFileError):
        read_manifest(name)


# -- DICOM


def test_a_missing_slice_is_named_by_its_place(tmp_path: Path) -> None:
    write_dicom(tmp_path, GRID, voxels() + 1024, UID, skip=[3])
    with pytest.raises(InputError, match=r"missing .*3 to 6 mm apart, most behind the one at \(-10, 20, 36\)"):
        read_image(tmp_path)


def test_slices_twice_with_the_same_pixels(tmp_path: Path, caplog: Caplog) -> None:
    write_dicom(tmp_path / "a", GRID, voxels() + 1024, UID)
    write_dicom(tmp_path / "b", GRID, voxels() + 1024, f"{UID}.1", skip=range(2, 7), SeriesInstanceUID=UID)
    np.testing.assert_array_equal(array(read_image(tmp_path)), voxels())
    assert "has 2 slices twice, with the same pixels: one of each is taken" in caplog.text


@pytest.mark.parametrize(
    ("uid", "says"), [(UID, ": .* are one by their UID, and differ"), (f"{UID}.1", r", 2 at most and 1 at .*36\)")]
)
def test_slices_twice_with_other_pixels(tmp_path: Path, uid: str, says: str) -> None:
    write_dicom(tmp_path / "a", GRID, voxels() + 1024, UID)
    write_dicom(tmp_path / "b", GRID, voxels(1) + 1024, uid, skip=range(2, 7), SeriesInstanceUID=UID)
    with pytest.raises(InputError, match=f"several slices at the same position{says}"):
        read_image(tmp_path)


def test_mixed_series_are_told_apart(tmp_path: Path) -> None:
    for i in range(2):
        write_dicom(tmp_path, GRID, voxels(i) + 1024, f"{UID}.{i}", SeriesNumber=i)
    series = load_series(tmp_path)
    for i in range(2):
        np.testing.assert_array_equal(array(series.images[i]), voxels(i))


def test_one_series_with_pixels_of_two_sizes(tmp_path: Path) -> None:
    write_dicom(tmp_path, GRID, voxels() + 1024, UID)
    piece = pydicom.dcmread(files(tmp_path)[0])
    piece.PixelSpacing = [2.0, 1.1]
    piece.save_as(files(tmp_path)[0])
    with pytest.raises(InputError, match="pixels of several sizes"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("PixelSpacing", ["0", "1"], "pixels without a size"),
        ("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"], "at no right angle"),
        ("ImageOrientationPatient", ["0"] * 6, "at no right angle"),
        ("RescaleSlope", None, ""),
    ],
)
def test_a_series_whose_numbers_make_no_image(tmp_path: Path, keyword: str, value: object, message: str) -> None:
    write_dicom(tmp_path, GRID, voxels() + 1024, UID, **{keyword: value})
    if not message:  # an empty slope is 1
        np.testing.assert_array_equal(array(read_image(tmp_path)), voxels())
        return
    with pytest.raises(InputError, match=message):
        read_image(tmp_path)


def test_a_rescale_slope_that_is_no_number(tmp_path: Path) -> None:
    write_dicom(tmp_path, GRID, voxels() + 1024, UID, RescaleSlope="1.0 ")
    path = files(tmp_path)[2]
    path.write_bytes(path.read_bytes().replace(b"DS\x04\x001.0 ", b"DS\x04\x00one "))
    with pytest.raises(InputError, match=r"\.dcm: its rescale slope or intercept is no number"):
        read_image(tmp_path)


@pytest.mark.parametrize("where", ["pixels", "tags", "position", "beginning"])
def test_a_dicom_slice_cut_short(tmp_path: Path, where: str) -> None:
    """The last slice, so that nothing is missing between the others."""
    series = write_dicom_series(scan(), tmp_path / "ct", patient_id="p")
    path = Path(series.files[-1])
    content = path.read_bytes()
    end = {
        "pixels": len(content) - 10,
        "tags": content.index(struct.pack("<HH", 0x28, 0x10)),
        "position": content.index(struct.pack("<HH", 0x20, 0x32)) + 12,
        "beginning": 200,
    }[where]
    path.write_bytes(content[:end])
    with pytest.raises(InputError, match=rf"{path.name}: .*(copy|export)") as error:
        read_image(tmp_path / "ct")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=path.name):
        read_image(path)


def test_a_damaged_file_leaves_the_other_series_of_an_index(tmp_path: Path, caplog: Caplog) -> None:
    series = write_dicom_series(scan(), tmp_path / "ct", patient_id="p")
    Path(series.files[-1]).write_bytes(Path(series.files[-1]).read_bytes()[:200])
    assert len(read_headers(tmp_path)) == 6
    assert "0007.dcm: is a damaged DICOM file" in caplog.text or "0007.dcm: is a DICOM file of no" in caplog.text


def test_a_dicom_header_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom(tmp_path, GRID, voxels() + 1024, UID)
    for path in files(tmp_path):
        piece = pydicom.dcmread(path)
        piece.Rows = piece.Columns = 65535
        piece.save_as(path)
    for reader in (sitk.ImageSeriesReader, sitk.ImageFileReader):
        monkeypatch.setattr(reader, "Execute", lambda _: pytest.fail("asks for memory"))
    with pytest.raises(InputError, match="its pixels aren't all there, or its header lies"):
        read_image(tmp_path)


def compressed(folder: Path, kind: str) -> None:
    """The slices of a series, their pixels compressed: by GDCM, or (RLE) by pydicom."""
    for path in files(folder):
        piece = pydicom.dcmread(path)
        if kind == "RLE":
            piece.compress(RLELossless)
        else:
            stored = np.frombuffer(piece.PixelData, "<u2").reshape(1, piece.Rows, piece.Columns)
            writer = sitk.ImageFileWriter()
            writer.SetImageIO("GDCMImageIO")
            writer.UseCompressionOn()
            writer.SetCompressor(kind)
            writer.SetFileName(str(folder / "one.tmp.dcm"))
            writer.Execute(sitk.GetImageFromArray(stored))
            other = pydicom.dcmread(folder / "one.tmp.dcm")
            (folder / "one.tmp.dcm").unlink()
            piece.file_meta.TransferSyntaxUID = other.file_meta.TransferSyntaxUID
            piece.PixelData = encapsulate(
                [next(pydicom.encaps.generate_frames(other.PixelData, number_of_frames=1))]
            )
            piece["PixelData"].is_undefined_length = True
        piece.save_as(path)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000", "RLE"])
def test_compressed_pixels(tmp_path: Path, kind: str) -> None:
    """Lossless: what clinics' archives use."""
    grid = Grid((40, 48, 4), (1.0, 1.0, 3.0))
    write_dicom(tmp_path, grid, voxels(0, grid) + 1024, UID)
    compressed(tmp_path, kind)
    syntaxes = {pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed for path in files(tmp_path)}
    assert syntaxes == {True}
    np.testing.assert_array_equal(array(read_image(tmp_path)), voxels(0, grid))
    path = files(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"\.dcm: its pixels aren't all there"):
        read_image(tmp_path)


@pytest.mark.parametrize("bits", [12, 16])
def test_signed_stored_values(tmp_path: Path, bits: int) -> None:
    stored = np.clip(voxels(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    signed = {"PixelRepresentation": 1, "BitsStored": bits, "HighBit": bits - 1}
    write_dicom(tmp_path, GRID, stored.astype("<i2").view("<u2"), UID, intercept=0, **signed)
    np.testing.assert_array_equal(array(read_image(tmp_path)), stored)


def test_signed_and_unsigned_slices_in_one_series(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a", GRID, np.full(GRID.shape, 60000), UID, intercept=0, skip=range(4, 7))
    stored = voxels().view("<u2")
    signed = {"PixelRepresentation": 1, "SeriesInstanceUID": UID}
    write_dicom(tmp_path / "b", GRID, stored, f"{UID}.1", intercept=0, skip=range(4), **signed)
    read = array(read_image(tmp_path))
    assert (read[:4] == 60000).all()
    np.testing.assert_array_equal(read[4:], voxels()[4:])


# -- intensities


@pytest.mark.parametrize("padding", [-2000, -3024])
def test_padding_is_air_and_stays_out_of_the_tissue(padding: int) -> None:
    """Beside the scanner's round field of view: clipped by the window first, so that no blur draws on it."""
    body = np.full((8, 24, 24), 40, np.int16)
    body[:, :4] = -1000
    grid = Grid((24, 24, 8), (2.0, 2.0, 3.0))
    padded = body.copy()
    padded[:, :4] = padding
    images = [grid.image(body), grid.image(padded)]
    series = load_series([grid.image(np.maximum(padded, -1000)), images[1]])
    assert series.window == Window(-1000, 1000, "ct")
    coarse = grid.with_spacing(5.0)
    clean, other = (on_grid(normalised(one, series.window), grid, coarse, sigma_mm=5.0)[0] for one in images)
    np.testing.assert_array_equal(clean, other)


def test_metal_is_white() -> None:
    metal = voxels()
    metal[2, 2, 2] = 30000
    series = load_series([scan(1), GRID.image(metal)])
    assert series.window.name == "ct"
    assert normalised(series.images[1], series.window)[2, 2, 2] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number(value: float, tmp_path: Path) -> None:
    broken = voxels().astype(np.float32)
    broken[1, 2, 3] = value
    for i, image in enumerate((scan(), GRID.image(broken))):
        write_image(image, tmp_path / f"{i}.nii.gz")
    with pytest.raises(InputError, match=r"1\.nii\.gz: 1 voxels are NaN or infinite"):
        load_series(str(tmp_path / "*.nii.gz"))


def test_an_image_in_another_unit() -> None:
    unit = GRID.image(((voxels(1) + 1000) / 1400).astype(np.float32) + 5000)
    with pytest.raises(InputError, match="image 1: shows nothing in the window -1000 to 1000"):
        load_series([scan(), unit], window="ct")


def test_another_intensity_scale_has_a_window_of_both() -> None:
    series = load_series([scan(), GRID.image((voxels(1) + 1024).astype(np.uint16))])
    assert series.window.name == "percentile"
    assert series.window.low <= -990
    assert series.window.high >= 1300


# -- fields of view


def test_little_overlap_is_told(caplog: Caplog) -> None:
    """In slices of 3 mm; 72 mm of them."""
    tall, near, far = (Grid((6, 8, 24), (1.0, 2.0, 3.0), (0.0, 0.0, z)) for z in (0.0, 36.0, 67.0))
    load_series([scan(0, tall), scan(1, near)])
    assert "holds only" not in caplog.text
    load_series([scan(0, tall), scan(1, far)])
    assert "image 1: holds only 5 % of the field of view of the reference, image 0" in caplog.text


def test_other_spacing_and_field_of_view_are_seen_in_world_space() -> None:
    """A ramp along x, in two grids: the same intensities at the same points."""
    fine = Grid((12, 8, 8), (1.0, 2.0, 2.0))
    coarse = Grid((5, 6, 5), (2.0, 2.5, 3.0), (1.0, 1.0, 1.0))
    ramps = [grid.image(grid.points_world()[..., 0].astype(np.float32) * 50) for grid in (fine, coarse)]
    series = load_series(ramps, window=(0, 600))
    read, covered = on_grid(normalised(series.images[1], series.window), coarse, fine)
    expected = normalised(series.images[0], series.window)
    inside = covered & (fine.points_world()[..., 0] >= 1) & (fine.points_world()[..., 0] <= 9)
    assert inside.sum() > 100
    # Linear interpolation of a ramp is exact but for float32.
    np.testing.assert_allclose(read[inside], expected[inside], atol=1e-6)


# -- masks and landmarks


def test_a_mask_that_is_an_image() -> None:
    with pytest.raises(InputError, match="mask 0: has negative labels; is it an image"):
        load_series([scan(), scan(1)], masks=scan())


def test_unexpected_labels_are_kept_and_named_by_number(tmp_path: Path) -> None:
    labels = np.zeros(GRID.shape, np.uint8)
    labels[2:4, 2:4, 2:4], labels[5:7, 2:4, 2:4] = 1, 7
    for i in range(2):
        write_image(scan(i), tmp_path / f"{i}.nii.gz")
    write_image(GRID.image(labels), tmp_path / "m.nii.gz")
    OmegaConf = optional("omegaconf", "scripts").OmegaConf
    data = importlib.import_module("data")
    loaded = data.load_data(
        OmegaConf.create(
            {
                **dict.fromkeys(("times", "period", "landmarks", "contours")),
                "kind": "files",
                "images": str(tmp_path / "?.nii.gz"),
                "reference": 0,
                "window": "auto",
                "masks": {0: str(tmp_path / "m.nii.gz")},
                "label_names": {1: "heart", 3: "liver"},
            }
        )
    )
    assert loaded.label_names == {1: "heart", 7: "label 7"}


@pytest.mark.parametrize("content", ["", "\n\n", "# a comment\n", "x,y,z\n", "point\n0\n", "\ufeff"])
def test_landmark_files_without_points(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.csv"):
        read_landmarks(tmp_path / "a.csv")


# -- times, and small images through everything


def test_a_4d_file_without_a_unit_of_time(tmp_path: Path) -> None:
    four = nib.Nifti1Image(np.moveaxis([voxels(i).T for i in range(3)], 0, 3), np.diag([1, 2, 3, 1.0]))
    four.header["pixdim"][4] = 0
    four.to_filename(tmp_path / "a.nii.gz")
    assert read_images(tmp_path / "a.nii.gz")[1:] == (None, None)
    series = load_series(tmp_path / "a.nii.gz")
    assert (series.times, series.time_unit) == ((0, 1, 2), None)


def test_times_that_are_very_uneven_are_told(caplog: Caplog) -> None:
    """Two scans of an hour, then one of months later."""
    load_series([scan(i) for i in range(3)], times=[0, 7, 21])
    assert "times" not in caplog.text
    load_series([scan(i) for i in range(3)], times=[0, 0.05, 90])
    assert "times: 0 and 0.05 are very near, others 89.95 apart" in caplog.text


SMALL = Grid((4, 4, 4), (5.0, 5.0, 5.0))


def blob(t: float, grid: Grid = SMALL) -> np.ndarray:
    """A ball that moves by 2 mm along x."""
    points = grid.points_world() - grid.centre_mm - np.array([2.0 * t, 0, 0])
    return (1000 * np.exp(-(points**2).sum(-1) / 60) - 800).astype(np.int16)


@pytest.mark.parametrize(
    "times",
    [[0.0, 1.0], [0.0, 0.2, 0.3, 1.0, 3.1], list(np.linspace(0, 1, 100))],
    ids=["two", "irregular", "a hundred"],
)
@pytest.mark.parametrize("period", [None, 1.5], ids=["follow-up", "periodic"])
def test_images_four_voxels_wide_through_everything(
    times: list[float], period: float | None, tmp_path: Path
) -> None:
    if period is not None and times[-1] > period:
        period = 2 * times[-1]
    span = times[-1] - times[0]
    images = [SMALL.image(blob(t / span)) for t in times]
    model = fit_deformation(
        load_series(images, times, period=period),
        None,
        align="none",
        progress=False,
        levels=[(5, 10, 2, 2)],
        width=8,
        layers=2,
        fourier_width=8,
    )
    model.save(tmp_path / "model.pt")
    model = STNeRP.load(tmp_path / "model.pt")
    mask = np.zeros(SMALL.shape, np.uint8)
    mask[1:3, 1:3, 1:3] = 1
    for t in (times[0], times[1], (times[0] + times[-1]) / 3):
        assert np.isfinite(array(model.image(t))).all()
        assert np.isfinite(array(model.displacement(t))).all()
        assert array(model.propagate(SMALL.image(mask), t)).any()
    # The reference maps to itself, whatever the times.
    assert np.abs(array(model.displacement(times[0]))).max() < 1e-6


# -- what a user of the scripts sees


def _nothing(folder: Path) -> None:
    del folder


def _nan(folder: Path) -> None:
    write_image(
        GRID.image(np.where(voxels(1) > 0, np.nan, 0).astype(np.float32)), folder / "1.nii.gz", overwrite=True
    )


def _truncated(folder: Path) -> None:
    (folder / "1.nii.gz").write_bytes((folder / "1.nii.gz").read_bytes()[:-40])


def _elsewhere(folder: Path) -> None:
    far = Grid(GRID.size, GRID.spacing_mm, (5000.0, 0.0, 0.0))
    write_image(scan(1, far), folder / "1.nii.gz", overwrite=True)


def _thin(folder: Path) -> None:
    thin = Grid((6, 8, 3), GRID.spacing_mm, GRID.origin_mm)
    write_image(scan(1, thin), folder / "1.nii.gz", overwrite=True)


def _gap(folder: Path) -> None:
    write_dicom(folder / "ct", GRID, voxels() + 1024, UID, skip=[3])


def _tilted(folder: Path) -> None:
    shift = np.zeros((7, 3))
    shift[:, 1] = np.arange(7)
    write_dicom(folder / "ct", GRID, voxels() + 1024, UID, shift=shift)


def _lying(folder: Path) -> None:
    lying(folder, ".mha", 30000)


def _empty_mask(folder: Path) -> None:
    write_image(GRID.image(np.zeros(GRID.shape, np.uint8)), folder / "m.nii.gz")


def _landmarks(folder: Path) -> None:
    (folder / "p.csv").write_text("x,y,z\n")


DEFECTS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "NaN": (_nan, [], "1.nii.gz: .* NaN"),
    "truncated": (_truncated, [], "1.nii.gz: "),
    "elsewhere": (_elsewhere, [], "do not meet"),
    "three slices": (_thin, [], "every axis needs 4"),
    "missing slice": (_gap, ["data.images=[0.nii.gz,ct]"], "missing or unevenly spaced"),
    "tilted gantry": (_tilted, ["data.images=[0.nii.gz,ct]"], "tilted gantry"),
    "lying header": (_lying, ["data.images=[0.nii.gz,a.mha]"], "more than its data can hold"),
    "same time": (_nothing, ["data.times=[3,3]"], "both are at 3"),
    "no numbers": (_nothing, ["data.times=[1,two]"], "times: "),
    "empty mask": (_empty_mask, ["data.masks=m.nii.gz"], "is empty"),
    "no landmarks": (_landmarks, ["data.landmarks=p.csv"], "a header and no landmarks"),
    "mask of another index": (_nothing, ["data.masks={²: 0.nii.gz}"], ""),
    "a name without end": (_nothing, [f"data.images=[0.nii.gz,{'x' * 300}]"], "no such file"),
    "window": (_nothing, ["data.window=[1,nan]"], "window: "),
    "period": (_nothing, ["data.period=inf"], "period: "),
    "a number without end": (_nothing, [f"seed={'9' * 5000}"], "seed=9+': a number of 5000 digits"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("script", ["train_def", "eval_interpolation"])
def test_scripts_say_it_in_one_line(
    script: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_image(scan(i), tmp_path / f"{i}.nii.gz")
    spoil, overrides, says = DEFECTS[name]
    spoil(tmp_path)
    extra = {"train_def": ["prior=false"], "eval_interpolation": ["held_out=[1]"]}[script]
    named = any(one.startswith("data.images") for one in overrides)
    files = [] if named else ["data.images=[0.nii.gz,1.nii.gz]"]
    line = refused(capsys, script, "out=p", *QUICK, *extra, *files, *overrides)
    assert re.search(says, line), line
    assert not (tmp_path / "p" / "model.pt").exists()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a model, and a DICOM scan."""
    folder = tmp_path_factory.mktemp("fitted")
    images = [SMALL.image(blob(t)) for t in (0.0, 1.0)]
    small = {"levels": [(5, 10, 1)], "width": 4, "layers": 2, "fourier_width": 4}
    fit_deformation(load_series(images), None, align="none", progress=False, **small).save(
        folder / "p" / "model.pt"
    )
    write_dicom_series(images[0], folder / "ct", patient_id="p", description="day 0")
    return folder


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("propagate_roi", ["roi=broken.nii.gz", "times=[0]"], "broken.nii.gz: "),
        ("propagate_roi", ["roi=half.nii.gz", "times=[0]"], "whole numbers"),
        ("propagate_roi", ["roi=far.nii.gz", "times=[0]"], "far.nii.gz"),
        ("propagate_roi", ["roi=half.nii.gz", "times=[nan]"], "times: "),
        ("monitor", ["roi=broken.nii.gz", "scans=false"], "broken.nii.gz: "),
        ("propagate_rtstruct", ["rtstruct=broken.dcm", "target=ct", "t=1"], "broken.dcm: "),
        ("propagate_rtstruct", ["rtstruct=rs.dcm", "target=nowhere", "t=1"], "nowhere: no such folder"),
    ],
)
def test_scripts_of_a_finished_run_too(
    script: str, arguments: list[str], says: str, fitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(fitted)
    (fitted / "broken.nii.gz").write_bytes(gzip.compress(b"not an image"))
    (fitted / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x08\0\x05\0CS\xff\xff")
    write_image(SMALL.image(np.full(SMALL.shape, 0.5, np.float32)), fitted / "half.nii.gz", overwrite=True)
    far = Grid(SMALL.size, SMALL.spacing_mm, (9000.0, 0.0, 0.0))
    write_image(far.image(np.ones(far.shape, np.uint8)), fitted / "far.nii.gz", overwrite=True)
    write_structures([ball("GTV")], dicom_series(fitted / "ct")[0], fitted / "rs.dcm", overwrite=True)
    assert says in refused(capsys, script, "out=p", *arguments)


def test_a_broken_file_as_a_user_meets_it(tmp_path: Path) -> None:
    """In a process of its own: what native code prints is part of what a user sees."""
    optional("hydra", "scripts")
    write_image(scan(), tmp_path / "0.nii.gz")
    (tmp_path / "1.nii.gz").write_bytes((tmp_path / "0.nii.gz").read_bytes()[:-40])
    command = [sys.executable, str(ROOT / "scripts" / "train_ref.py"), "out=p", "data.images=[0.nii.gz,1.nii.gz]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: 1.nii.gz: ")


# -- names that come from files


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "a\0b",
    "x" * 64,
    "<script>alert(1)</script>",
    "=cmd|'/c calc'!A0",
    "+1",
    "@SUM(A1)",
    "CON",
    "aux.txt",
    "a b",
    "a_b",
    "$\\frac{$",
    "line\nbreak",
]


def ball(name: str, number: int = 1) -> Roi:
    """A square in the middle slices of `SMALL`."""
    square = np.array([[3.0, 3.0], [12.0, 3.0], [12.0, 12.0], [3.0, 12.0]])
    contours = tuple(np.column_stack([square, np.full(4, z)]) for z in (5.0, 10.0))
    return Roi(number, name, contours=contours, thickness_mm=5.0)


@pytest.mark.parametrize("names", [False, True])
def test_names_of_rois_stay_in_the_run_directory(
    names: bool, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.chdir(fitted)
    rois = [ball(f"roi {i}", i) for i in range(1, len(HOSTILE) + 1)]
    write_structures(rois, dicom_series(fitted / "ct")[0], tmp_path / "rs.dcm")
    structures = pydicom.dcmread(tmp_path / "rs.dcm")
    for item, name in zip(structures.StructureSetROISequence, HOSTILE, strict=True):
        item.ROIName = name.replace("\\", "/")
    structures.save_as(tmp_path / "rs.dcm")
    before = set(fitted.rglob("*"))
    arguments = [f"rtstruct={tmp_path / 'rs.dcm'}", "target=ct", "t=0.5", f"names={str(names).lower()}"]
    line = None
    try:
        run("propagate_rtstruct", "out=p", "overwrite=true", *arguments)
    except SystemExit:
        line = capsys.readouterr().err
    assert line is None or (line.startswith("error: ") and len(line.splitlines()) == 1)
    written = {path.relative_to(fitted).as_posix() for path in fitted.rglob("*")} - {
        path.relative_to(fitted).as_posix() for path in before
    }
    assert written <= {"p/rtstruct", *(f"p/rtstruct/t0.5.{end}" for end in ("dcm", "csv", "png"))} | {
        "p/propagate_rtstruct.log"
    }
    if line is None and names:
        rows = (fitted / "p" / "rtstruct" / "t0.5.csv").read_text(encoding="utf-8")
        # No cell that a spreadsheet would run.
        assert not re.search(r'(^|,)"?[=+@]', rows, re.MULTILINE)
        assert not re.search(r'(^|,)"?-(?![\d.])', rows, re.MULTILINE)


def test_text_of_headers_is_of_one_line(tmp_path: Path) -> None:
    write_dicom(tmp_path, GRID, voxels() + 1024, UID, SeriesDescription="two lines", PatientID="p")
    for path in files(tmp_path):
        path.write_bytes(path.read_bytes().replace(b"two lines", b"two\nlin\x1bs"))
    assert dicom_series(tmp_path)[0].description == "two lin s"


def test_patients_and_phases_of_files_name_no_file(tmp_path: Path) -> None:
    """4D-Lung is indexed by what headers say; none of it is a path."""
    four_d_lung = importlib.import_module("stnerp.io.four_d_lung")
    for i, name in enumerate(("../../x", "<script>", "=cmd()")):
        write_dicom_series(scan(i), tmp_path / str(i), patient_id=name, description="Gated, 0%", date="20030702")
    before = sorted(tmp_path.rglob("*"))
    collection = four_d_lung.index_4d_lung(tmp_path)
    assert set(collection.patients) == {"../../x", "<script>", "=cmd()"}
    for patient in collection.patients:
        assert len(four_d_lung.breathing_series(collection, patient, rois=())["images"]) == 1
    assert sorted(tmp_path.rglob("*")) == before


# -- the list itself


def test_every_row_of_the_table_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    tables = [row.strip("|").split("|") for row in rows]
    defects = [row for row in tables if len(row) == 3 and not re.fullmatch(r"[- ]+| defect |.*\*\*.*", row[0])]
    assert len(defects) > 25
    defined = {
        f"{path.stem}.{name}"
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for defect, _, tests in defects:
        named = re.findall(r"`(test_\w+\.test_\w+)`", tests)
        assert named, defect
        assert not set(named) - defined, defect


def test_this_file_is_in_the_table() -> None:
    text = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
    own = re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
    unlisted = [name for name in own[:-2] if f"test_defects.{name}" not in text]
    assert not unlisted
