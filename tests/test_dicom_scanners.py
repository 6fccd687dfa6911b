"""DICOM as scanners write it: names of phases, times of triggers, frames of films, bits and slopes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import RLELossless
from test_io import item, places_of, write_dicom, write_multi_frame

from stnerp import load_series
from stnerp.errors import InputError
from stnerp.geometry import Grid
from stnerp.io.dicom import dicom_series, read_dicom_folder, write_dicom_series
from stnerp.io.four_d_lung import breathing_series, index_4d_lung
from stnerp.io.image import read_image

GRID = Grid((5, 6, 7), (1.0, 2.0, 3.0), (-10.0, 20.0, 30.0))
STORED = np.random.default_rng(0).integers(0, 3000, GRID.shape)
UID = "1.2.826.0.1.3680043.8.498.8"
CYCLE = [*(f"{depth}% Ex" for depth in (80, 60, 40, 20, 0)), *(f"{depth}% In" for depth in (20, 40, 60, 80))]
NUCLEAR = "1.2.840.10008.5.1.4.1.1.20"


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def edit(folder: Path, change: Callable[[int, pydicom.Dataset], None]) -> None:
    """Change a folder's slices, which count in the order of their names."""
    for i, path in enumerate(sorted(folder.glob("*.dcm"))):
        piece = pydicom.dcmread(path)
        change(i, piece)
        piece.save_as(path)


# -- phases by name


def test_depths_of_both_ways_are_a_cycle(tmp_path: Path) -> None:
    """Siemens: 100% In is full, from there the air goes out (Ex) to 0 and comes in again."""
    names = [f"4DCT {depth}" for depth in ("100% In", *CYCLE)]
    for i in (3, 9, 0, 7, 1, 5, 2, 8, 4, 6):
        image = GRID.image((STORED + 100 * i - 1024).astype(np.int16))
        common = {"study_uid": UID, "date": "20240105", "patient_id": "p"}
        write_dicom_series(image, tmp_path / str(i), description=names[i], time=f"10{i:02d}00", **common)
    found = dicom_series(tmp_path)
    assert [series.description for series in found] == names
    assert [series.phase for series in found] == [*range(0, 100, 10)]
    # Times that aren't given are the places in the cycle.
    series = load_series(tmp_path, period=10)
    assert series.times == tuple(range(10))
    assert series.names == tuple(names)
    (scan,) = index_4d_lung(tmp_path).scans
    assert [phase.percent for phase in scan.phases] == [*range(0, 100, 10)]
    assert breathing_series(index_4d_lung(tmp_path), "p", rois=())["times"] == [*range(0, 100, 10)]


def test_depths_of_one_way_are_what_they_say(tmp_path: Path) -> None:
    for i, name in enumerate(("50% Ex", "0% Ex", "100% Ex")):
        write_dicom(tmp_path, GRID, STORED, f"{UID}.{i}", SeriesDescription=name)
    assert [series.phase for series in dicom_series(tmp_path)] == [0, 50, 100]


@pytest.mark.parametrize(
    "description",
    [
        *("4DCT AVG 0-75%", "4D MIP 0-100%", "AVG 0%", "Gating 0%, average", "AveIP 4D 100%", "4D_AVG_50%"),
        *("4D MinIP 50%", "gated tMIP 0%", "4D mean 0%", "Resp 0% - 90%", "4D T0%-T90%", "4D max. int. proj. 50%"),
    ],
)
def test_averages_and_projections_are_no_phases(tmp_path: Path, description: str) -> None:
    for i, name in enumerate(("4DCT 75%", description, "4DCT 0%", "4DCT 25%", "4DCT 50%")):
        write_dicom(tmp_path, GRID, STORED, f"{UID}.{i}", SeriesDescription=name, SeriesNumber=i)
    found = dicom_series(tmp_path)
    assert [series.phase for series in found] == [0, 25, 50, 75, None]
    assert found[-1].description == description


@pytest.mark.parametrize("description", ["4D-30%", "Gated 3 min 30%", "Avenue 4D 30%", "4D max inhale 30%"])
def test_names_that_only_look_like_averages(tmp_path: Path, description: str) -> None:
    write_dicom(tmp_path, GRID, STORED, UID, SeriesDescription=description)
    assert [series.phase for series in dicom_series(tmp_path)] == [30]


# -- phases in one series


def write_cine(folder: Path, time_ms: Callable[[int, int], float], phases: int = 4) -> None:
    """Phases of one series; trigger times by phase and slice."""
    for phase in range(phases):
        write_dicom(folder / str(phase), GRID, STORED + 100 * phase, f"{UID}.{phase}", SeriesInstanceUID=UID)
        for path in (folder / str(phase)).iterdir():
            piece = pydicom.dcmread(path)
            piece.TriggerTime = f"{time_ms(phase, 7 - piece.InstanceNumber):.1f}"
            piece.save_as(path)


@pytest.mark.parametrize("shift_ms", [0, 1.3, 15], ids=["none", "little", "beyond a phase"])
def test_trigger_times_that_shift_from_slice_to_slice(tmp_path: Path, shift_ms: float) -> None:
    write_cine(tmp_path, lambda phase, k: 40 * phase + shift_ms * k)
    images = read_dicom_folder(tmp_path)
    assert len(images) == 4
    for phase, image in enumerate(images):
        np.testing.assert_array_equal(array(image), STORED + 100 * phase - 1024)


@pytest.mark.parametrize(
    ("keyword", "values"),
    [("FrameReferenceTime", ("30000", "90000", "240000")), ("AcquisitionTime", ("095959.5", "100001", "100102"))],
    ids=["dynamic PET", "contrast-enhanced MR"],
)
def test_frames_of_a_dynamic_scan(tmp_path: Path, keyword: str, values: tuple[str, ...]) -> None:
    """Later frames of one series first: order and difference are told by one time alone."""
    for frame, value in enumerate(values):
        tags = {"SeriesInstanceUID": UID, "Modality": "PT", keyword: value}
        write_dicom(tmp_path / str(9 - frame), GRID, STORED + 100 * frame, f"{UID}.{frame}", **tags)
    images = read_dicom_folder(tmp_path)
    assert [int(array(image).min()) for image in images] == [int(STORED.min()) + 100 * i - 1024 for i in range(3)]


def test_a_phase_that_lacks_slices_is_named(tmp_path: Path) -> None:
    write_cine(tmp_path, lambda phase, _: 40 * phase)
    for path in sorted((tmp_path / "2").iterdir())[:2]:
        path.unlink()
    with pytest.raises(
        InputError, match=r"lacks 2 of 7 slices of phase 3 of 4 \(trigger time 80\); export it again"
    ):
        dicom_series(tmp_path)


def test_a_lack_without_a_phase_is_told_by_its_place(tmp_path: Path) -> None:
    write_cine(tmp_path, lambda phase, k: 40 * phase + 1.3 * k)
    first = min((tmp_path / "2").iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    first.unlink()
    with pytest.raises(InputError, match=r"position, 4 at most and 3 at \(-10, 20, 30\); export it again"):
        dicom_series(tmp_path)


@pytest.mark.parametrize("apart_mm", [0.0001, 0.01, 0.2])
def test_phases_and_copies_that_lie_a_little_apart(
    tmp_path: Path, apart_mm: float, caplog: pytest.LogCaptureFixture
) -> None:
    for phase in range(3):
        shift, tags = np.full((7, 3), phase * apart_mm / 2 * np.array([0, 0, 1])), {"SeriesInstanceUID": UID}
        uid = f"{UID}.{phase}"
        write_dicom(tmp_path / "copies", GRID, STORED, uid, shift=shift, **tags)
        tags["TemporalPositionIdentifier"] = str(3 - phase)
        write_dicom(tmp_path / "phases", GRID, STORED + phase, uid, shift=shift, **tags)
    np.testing.assert_array_equal(array(read_image(tmp_path / "copies")), STORED - 1024)
    assert "has 14 slices twice, with the same pixels" in caplog.text
    phases = read_dicom_folder(tmp_path / "phases")
    for phase, image in enumerate(phases[::-1]):
        np.testing.assert_array_equal(array(image), STORED + phase - 1024)
        assert image.GetOrigin()[2] == pytest.approx(30 + phase * apart_mm / 2, abs=1e-6)
    assert len(phases) == 3


def test_a_gap_is_still_a_gap(tmp_path: Path) -> None:
    """Half a stack that is missing makes no one place of what is left."""
    shift = np.zeros((7, 3))
    shift[3:, 2] = 60
    write_dicom(tmp_path, GRID, STORED, UID, shift=shift)
    with pytest.raises(InputError, match="missing or unevenly spaced slices"):
        read_image(tmp_path)


def test_a_compressed_copy_beside_the_file(tmp_path: Path) -> None:
    """An archive's and its viewer's: one by their UID, and in all that counts."""
    grid = Grid((40, 48, 4), (1.0, 1.0, 3.0))
    for phase in range(2):
        stored = np.random.default_rng(phase).integers(0, 3000, grid.shape)
        tags = {"SeriesInstanceUID": UID, "TemporalPositionIdentifier": str(phase + 1)}
        write_dicom(tmp_path, grid, stored, f"{UID}.{phase}", **tags)
    for path in list(tmp_path.iterdir()):
        piece = pydicom.dcmread(path)
        piece.compress(RLELossless, generate_instance_uid=False)
        piece.save_as(path.with_suffix(".rle.dcm"))
    images = read_dicom_folder(tmp_path)
    assert len(images) == 2
    for phase, image in enumerate(images):
        stored = np.random.default_rng(phase).integers(0, 3000, grid.shape)
        np.testing.assert_array_equal(array(image), stored - 1024)


# -- values


@pytest.mark.parametrize("first", [12, 16])
def test_slices_of_12_and_16_bits_in_one_series(tmp_path: Path, first: int) -> None:
    """The first slice in space would decide the type of all."""
    write_dicom(tmp_path, GRID, np.full(GRID.shape, 60000), UID)

    def narrow(_: int, piece: pydicom.Dataset) -> None:
        if piece.InstanceNumber == (7 if first == 12 else 1):
            piece.BitsStored, piece.HighBit = 12, 11
            piece.PixelData = np.full((6, 5), 3000, "<u2").tobytes()

    edit(tmp_path, narrow)
    read = array(read_image(tmp_path))[:: 1 if first == 12 else -1]
    assert (read[0] == 3000 - 1024).all()
    assert (read[1:] == 60000 - 1024).all()


def write_rescaled(path: Path, rescale: list[tuple[float, float]]) -> Path:
    """An enhanced multi-frame file with a slope and an intercept for each frame."""
    write_multi_frame(path, places_of(GRID, range(7)), STORED, GRID)
    file = pydicom.dcmread(path)
    for frame, (slope, intercept) in zip(file.PerFrameFunctionalGroupsSequence, rescale, strict=True):
        frame.PixelValueTransformationSequence = [item(RescaleSlope=slope, RescaleIntercept=intercept)]
    file.save_as(path)
    return path


@pytest.mark.parametrize("first", [(2, -1000), (0.3, 0.7), (1, 0)])
def test_a_rescale_of_each_frame(tmp_path: Path, first: tuple[float, float]) -> None:
    """Enhanced PET has a slope for each frame; GDCM takes the first one's for all."""
    rescale = [first, *((0.5 * k, float(-k)) for k in range(1, 7))]
    path = write_rescaled(tmp_path / "1.dcm", rescale)
    slopes, intercepts = np.array(rescale).T[:, :, None, None]
    expected = (STORED * slopes + intercepts).astype(np.float32)
    for source in (path, tmp_path):
        image = read_image(source)
        np.testing.assert_array_equal(array(image), expected)
        assert Grid.of(image).is_close(GRID, 1e-6)


def test_one_rescale_of_all_frames(tmp_path: Path) -> None:
    path = write_rescaled(tmp_path / "1.dcm", [(2, -1000)] * 7)
    image = read_image(path)
    np.testing.assert_array_equal(array(image), 2 * STORED - 1000)
    assert image.GetPixelID() != sitk.sitkFloat32
    file = pydicom.dcmread(path)  # what is shared counts, as for GDCM
    file.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [
        item(RescaleSlope=3, RescaleIntercept=0)
    ]
    file.save_as(path)
    np.testing.assert_array_equal(array(read_image(path)), 3 * STORED)


def test_a_frame_without_a_slope_to_go_by(tmp_path: Path) -> None:
    path = write_rescaled(tmp_path / "1.dcm", [(2, 0), (0, 0), *[(1, 0)] * 5])
    with pytest.raises(InputError, match=r"1\.dcm: a frame's rescale slope or intercept is 0"):
        read_image(path)


# -- films


def write_film(path: Path, modality: str, sop_class: str, **tags: object) -> Path:
    """Frames without functional groups."""
    write_multi_frame(path, None, STORED, GRID)
    file = pydicom.dcmread(path)
    del file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence
    own = {"SOPClassUID": sop_class, "Modality": modality, "SeriesDescription": "film"}
    for keyword, value in {**own, "SeriesInstanceUID": f"{UID}.99", **tags}.items():
        setattr(file, keyword, value)
    file.file_meta.MediaStorageSOPClassUID = sop_class
    file.save_as(path)
    return path


@pytest.mark.parametrize(
    ("modality", "sop_class", "tags"),
    [
        ("US", "1.2.840.10008.5.1.4.1.1.3.1", {}),
        # As thick as it may be: its frames follow one another in time.
        ("US", "1.2.840.10008.5.1.4.1.1.3.1", {"FrameIncrementPointer": 0x00181063, "SliceThickness": 2}),
        ("XA", "1.2.840.10008.5.1.4.1.1.12.1", {"ImagerPixelSpacing": [0.3, 0.3]}),
        # Projections of a SPECT: energies, detectors, angles.
        ("NM", NUCLEAR, {"FrameIncrementPointer": [0x00540010, 0x00540090], "SpacingBetweenSlices": 4}),
        ("RTDOSE", "1.2.840.10008.5.1.4.1.1.481.2", {"GridFrameOffsetVector": [0, 3, 6, 9, 12, 15, 30]}),
    ],
)
def test_films_are_no_volumes(
    tmp_path: Path, modality: str, sop_class: str, tags: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_film(tmp_path / "film" / "1.dcm", modality, sop_class, PixelSpacing=[4, 5], **tags)
    with pytest.raises(
        InputError, match=r"1\.dcm: has 7 frames and doesn't say that they are evenly spaced slices"
    ):
        read_image(path)
    if modality == "RTDOSE":
        return
    with pytest.raises(InputError, match=r"1\.dcm: has 7 frames"):
        read_image(tmp_path)
    write_dicom(tmp_path / "ct", GRID, STORED, UID)
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(array(read_image(tmp_path)), STORED - 1024)
    assert f"{path}: left out, it doesn't say where it lies" in caplog.text


@pytest.mark.parametrize(
    "tags",
    [
        {"SpacingBetweenSlices": 3, "SliceThickness": 9},
        {"SliceThickness": 3, "FrameIncrementPointer": 0x00540080},
        {"GridFrameOffsetVector": [0, 3, 6, 9, 12, 15, 18], "FrameIncrementPointer": 0x3004000C},
    ],
)
def test_frames_that_are_slices_of_a_distance(tmp_path: Path, tags: dict[str, object]) -> None:
    path = write_film(tmp_path / "1.dcm", "NM", NUCLEAR, PixelSpacing=[4, 5], **tags)
    for source in (path, tmp_path):
        image = read_image(source)
        np.testing.assert_array_equal(array(image), STORED)
        assert image.GetSpacing() == (5, 4, 3)
