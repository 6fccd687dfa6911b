"""RTSTRUCT files: written by hand and by the library, read back onto grids, and what is refused.

Two programs that share no code with this library check what it writes, where they are installed: `dciodvfy` of
dicom3tools, a validator, and `plastimatch`, which rasterises the contours.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import DIRECTIONS, make_grid
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian, MRImageStorage, RTStructureSetStorage

from stnerp.contours import contour_mask, keyholes
from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dicom import DicomSeries, dicom_series, read_dicom_series, series_grid, write_dicom_series
from stnerp.io.rtstruct import (
    Roi,
    StructureSet,
    carried_rois,
    read_rtstruct,
    roi_labels,
    roi_mask,
    rtstruct_contents,
    write_rtstruct,
    write_structures,
)
from stnerp.metrics import dice, surface_distances_mm

GRID = Grid((9, 8, 6), (1.0, 2.0, 3.0), (-20.0, 13.0, 105.0))


def write_by_hand(path: Path, rois: list[dict[str, Any]], **tags: Any) -> Path:
    """An RTSTRUCT made of tags alone. ROIs: number, name, and contours [(type, points (N, 3))], or none."""
    file = Dataset()
    file.SOPClassUID, file.SOPInstanceUID, file.Modality = RTStructureSetStorage, "1.2.3.4", "RTSTRUCT"
    file.StructureSetROISequence, file.ROIContourSequence = [], []
    for roi in rois:
        named = Dataset()
        named.ROINumber, named.ROIName = roi["number"], roi["name"]
        file.StructureSetROISequence.append(named)
        if "contours" not in roi:
            continue
        drawn = Dataset()
        drawn.ReferencedROINumber, drawn.ROIDisplayColor = roi["number"], [1, 2, 3]
        drawn.ContourSequence = []
        for kind, points in roi["contours"]:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{value:.6g}" for value in np.ravel(points)]
            drawn.ContourSequence.append(contour)
        file.ROIContourSequence.append(drawn)
    for keyword, value in tags.items():
        setattr(file, keyword, value)
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    file.save_as(path, enforce_file_format=True)
    return path


def rectangle(z: float, x0: float = -18.5, y0: float = 16.0, x1: float = -15.5, y1: float = 22.0) -> np.ndarray:
    return np.array([[x0, y0, z], [x1, y0, z], [x1, y1, z], [x0, y1, z]])


def by_hand(path: Path, *contours: tuple[str, np.ndarray], name: str = "A") -> Roi:
    return read_rtstruct(write_by_hand(path, [{"number": 1, "name": name, "contours": contours}])).rois[0]


def ct(folder: Path, grid: Grid = GRID, **settings: Any) -> DicomSeries:
    """A CT series whose voxels nearly all differ."""
    image = grid.image((np.arange(grid.voxels) % 3000).astype(np.int16).reshape(grid.shape))
    settings = {"patient_id": "Ä^1", "description": "a, 30.0%", "date": "20030702", "time": "101500", **settings}
    return write_dicom_series(image, folder, **settings)


def some_labels(grid: Grid, count: int = 2) -> sitk.Image:
    return grid.image(np.random.default_rng(0).integers(0, count + 1, grid.shape).astype(np.uint8))


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


# -- files of other programs


def test_a_contour_in_mm_covers_the_voxels_there(tmp_path: Path) -> None:
    # By hand, from the tags alone: LPS mm, x 1 mm, y 2 mm, z 3 mm apart from (-20, 13, 105).
    roi = by_hand(tmp_path / "a.dcm", ("CLOSED_PLANAR", rectangle(108.0)), ("CLOSED_PLANAR", rectangle(111.0)))
    expected = np.zeros(GRID.shape, np.uint8)
    expected[1:3, 2:5, 2:5] = 1  # x -18, -17, -16; y 17, 19, 21; z 108, 111
    np.testing.assert_array_equal(array(roi_mask(roi, GRID)), expected)
    assert Grid.of(roi_mask(roi, GRID)).is_close(GRID)
    assert (roi.number, roi.name, roi.color, roi.thickness_mm) == (1, "A", (1, 2, 3), 3.0)


def test_points_are_kept_apart_and_lines_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    closed = ("CLOSED_PLANAR", rectangle(108.0))
    others = [
        ("POINT", rectangle(120)[:1]),
        ("OPEN_PLANAR", rectangle(111)),
        ("CLOSED_PLANAR", rectangle(111)[:2]),
    ]
    with caplog.at_level("INFO", "stnerp"):
        roi = by_hand(tmp_path / "a.dcm", closed, *others)
    assert len(roi.contours) == 1
    np.testing.assert_array_equal(roi.points, rectangle(120)[:1])
    # By its number: names are text that somebody typed.
    assert "ROI 1: 2 open lines left out" in caplog.text
    assert "ROI 'A'" not in caplog.text
    assert array(roi_mask(roi, GRID)).sum() == 9


def test_rois_without_contours(tmp_path: Path) -> None:
    path = write_by_hand(
        tmp_path / "a.dcm",
        [
            {"number": 1, "name": "named only"},
            {"number": 2, "name": "empty", "contours": []},
            {"number": 3, "name": "isocentre", "contours": [("POINT", rectangle(108.0)[:1])]},
        ],
    )
    structures = read_rtstruct(path)
    assert [len(roi.contours) for roi in structures.rois] == [0, 0, 0]
    for roi in structures.rois:
        with pytest.raises(InputError, match=f"ROI '{roi.name}': has no closed contours"):
            roi_mask(roi, GRID)


def test_holes_of_either_type(tmp_path: Path) -> None:
    inner = rectangle(108.0, -17.5, 18.0, -16.5, 20.0)  # one voxel
    for kind in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        roi = by_hand(tmp_path / f"{kind}.dcm", (kind, inner), (kind, rectangle(108.0)))
        mask = array(roi_mask(roi, GRID))
        assert mask.sum() == 8
        assert mask[1, 3, 3] == 0


def test_one_plane_is_as_thick_as_the_other_rois_planes(tmp_path: Path) -> None:
    alone = {"number": 1, "name": "alone", "contours": [("CLOSED_PLANAR", rectangle(110.0))]}
    stack = {"number": 2, "name": "stack", "contours": [("CLOSED_PLANAR", rectangle(z)) for z in (110.0, 115.0)]}
    thin = Grid((9, 8, 20), (1, 2, 1), (-20, 13, 105))
    roi = read_rtstruct(write_by_hand(tmp_path / "a.dcm", [alone, stack])).roi("alone")
    assert array(roi_mask(roi, thin)).any((1, 2)).sum() == 5
    roi = read_rtstruct(write_by_hand(tmp_path / "b.dcm", [alone])).roi("alone")
    assert array(roi_mask(roi, thin)).any((1, 2)).sum() == 1
    # As most are, not as one is that has a stray contour.
    stray = {"number": 3, "name": "x", "contours": [("CLOSED_PLANAR", rectangle(z)) for z in (110.0, 110.5)]}
    roi = read_rtstruct(write_by_hand(tmp_path / "c.dcm", [stray, alone, stack, {**stack, "number": 4}])).rois[1]
    assert roi.thickness_mm == 5


def test_a_contour_that_is_there_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Twice the same would be nothing by the even-odd rule.
    one, two = rectangle(108.0), rectangle(111.0)
    hole = rectangle(108.0, -17.5, 18.0, -16.5, 20.0)
    again = [np.roll(one, 1, axis=0), one[::-1], np.roll(two[::-1], 2, axis=0), np.concatenate([hole, hole[:1]])]
    with caplog.at_level("INFO", "stnerp"):
        roi = by_hand(tmp_path / "a.dcm", *(("CLOSED_PLANAR", points) for points in (one, two, hole, *again)))
    assert "ROI 1: 4 contours that are there twice taken once" in caplog.text
    assert len(roi.contours) == 3
    assert array(roi_mask(roi, GRID)).sum() == 9 + 9 - 1
    # Nor where the whole ROI is there twice; what is alike but not the same is kept.
    file = pydicom.dcmread(tmp_path / "a.dcm")
    file.ROIContourSequence.append(file.ROIContourSequence[0])
    file.save_as(tmp_path / "b.dcm")
    assert len(read_rtstruct(tmp_path / "b.dcm").rois[0].contours) == 3
    like = [one, one + np.array([0, 0, 0.05]), one[[0, 2, 1, 3]], one * [1, 1.001, 1]]
    assert len(by_hand(tmp_path / "c.dcm", *(("CLOSED_PLANAR", points) for points in like)).contours) == 4


def test_each_roi_has_its_frame_of_reference(tmp_path: Path) -> None:
    series = ct(tmp_path / "ct")
    write_structures(drawn_rois(), series, tmp_path / "a.dcm")
    assert {roi.frame_uid for roi in read_rtstruct(tmp_path / "a.dcm").rois} == {series.frame_uid}
    file, other = pydicom.dcmread(tmp_path / "a.dcm"), Dataset()
    other.FrameOfReferenceUID = "1.2.3.4"
    file.ReferencedFrameOfReferenceSequence.insert(0, other)
    file.StructureSetROISequence[2].ReferencedFrameOfReferenceUID = "1.2.3.4"
    del file.StructureSetROISequence[1].ReferencedFrameOfReferenceUID
    file.StructureSetROISequence.append(file.StructureSetROISequence[0])
    file.save_as(tmp_path / "b.dcm")
    structures = read_rtstruct(tmp_path / "b.dcm")
    assert [roi.frame_uid for roi in structures.rois[:3]] == [series.frame_uid, series.frame_uid, "1.2.3.4"]
    # The file's is that of most of its ROIs, in whatever order frames are listed; else the first.
    assert structures.frame_uid == rtstruct_contents(tmp_path / "b.dcm").frame_uid == series.frame_uid
    for item in file.StructureSetROISequence:
        item.ReferencedFrameOfReferenceUID = ""
    file.save_as(tmp_path / "c.dcm")
    assert {roi.frame_uid for roi in read_rtstruct(tmp_path / "c.dcm").rois} == {"1.2.3.4"}


def test_observations_of_no_roi_are_left_out(tmp_path: Path) -> None:
    write_structures(drawn_rois(), ct(tmp_path / "ct"), tmp_path / "a.dcm")
    file = pydicom.dcmread(tmp_path / "a.dcm")
    del file.RTROIObservationsSequence[0].ReferencedROINumber
    file.RTROIObservationsSequence[2].ReferencedROINumber = None
    file.save_as(tmp_path / "b.dcm")
    assert [roi.interpreted_type for roi in read_rtstruct(tmp_path / "b.dcm").rois] == ["", "ORGAN", ""]


def test_an_example_of_pydicom_without_preamble() -> None:
    structures = read_rtstruct(get_testdata_file("rtstruct.dcm"))
    assert [(roi.name, len(roi.contours)) for roi in structures.rois] == [
        ("patient", 3),
        ("Isocenter 1", 0),
        ("Isocenter 2", 0),
    ]
    assert structures.series_uids == ("1.2.826.0.1.3680043.8.498.2010020400001.2.1.1",)
    assert rtstruct_contents(structures.path).names == ("patient", "Isocenter 1", "Isocenter 2")


# -- names


def structures_named(*names: str, drawn: bool = True) -> StructureSet:
    contours = (rectangle(108.0),) if drawn else ()
    return StructureSet("a.dcm", "", (), tuple(Roi(i, name, None, contours) for i, name in enumerate(names, 1)))


def test_names_are_found_as_they_are_then_without_spaces_and_case() -> None:
    structures = structures_named("Tumor_ c00", "LN2_C10", "tumor_c00")
    assert structures.roi("tumor_c00").number == 3
    assert structures.roi("Tumor_ c00").number == 1
    assert structures.roi("ln2_c10").number == 2
    assert structures.roi(2).name == "LN2_C10"
    with pytest.raises(InputError, match=r"'TUMOR_C00' fits several ROIs \(1 'Tumor_ c00', 3 'tumor_c00'\)"):
        structures.roi("TUMOR_C00")
    with pytest.raises(InputError, match="no ROI 'Tumor'; there are: Tumor_ c00, LN2_C10, tumor_c00"):
        structures.roi("Tumor")
    with pytest.raises(InputError, match="no ROI 7"):
        structures.roi(7)


def test_of_two_rois_of_one_name_the_drawn_one_counts() -> None:
    empty, drawn = Roi(1, "A"), Roi(2, "A", None, (rectangle(108.0),))
    assert StructureSet("a.dcm", "", (), (empty, drawn)).roi("A") is drawn
    assert StructureSet("a.dcm", "", (), (empty,)).roi("A") is empty
    with pytest.raises(InputError, match="several ROIs"):
        structures_named("A", "A").roi("A")


def test_names_are_data(tmp_path: Path) -> None:
    # They lead nowhere: into no other folder, through no format string, pattern or markup.
    names = ["../../evil", "C:/x", "a%s{0}", "*", "Größe µ", "x" * 64]
    folder = tmp_path / "inside"
    series = ct(tmp_path / "ct")
    folder.mkdir()
    write_rtstruct(some_labels(GRID, len(names)), dict(enumerate(names, 1)), series, folder / "rs.dcm")
    assert [roi.name for roi in read_rtstruct(folder / "rs.dcm").rois] == names
    assert [path.name for path in folder.iterdir()] == ["rs.dcm"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct", "inside"]


# -- written by the library


@pytest.mark.parametrize("orientation", DIRECTIONS)
def test_labels_come_back_exactly_on_the_series_grid(tmp_path: Path, orientation: str) -> None:
    series = ct(tmp_path / "ct", make_grid(DIRECTIONS[orientation]))
    grid = Grid.of(read_dicom_series(series))
    assert series_grid(series).is_close(grid, 1e-9)
    labels = some_labels(grid, 3)
    names = {1: "Tumor_c30", 2: "Lungs", 3: "not there"}
    labels = sitk.Mask(labels, labels != 3)
    write_rtstruct(labels, names, series, tmp_path / "rs.dcm", colors={2: (10, 20, 30)})
    structures = read_rtstruct(tmp_path / "rs.dcm")
    assert {roi.number: roi.name for roi in structures.rois} == names
    assert structures.roi("Lungs").color == (10, 20, 30)
    np.testing.assert_array_equal(array(roi_labels(structures.rois[:2], grid)), array(labels))
    assert structures.rois[2].contours == ()


def test_labels_of_a_grid_that_runs_the_other_way(tmp_path: Path) -> None:
    # Drawn on a left-handed grid, written for the series as it is read, which is right-handed.
    grid = make_grid(DIRECTIONS["LAS, left-handed"])
    series = ct(tmp_path / "ct", grid)
    labels = some_labels(grid, 1)
    write_rtstruct(labels, {1: "A"}, series, tmp_path / "rs.dcm")
    mask = roi_mask(read_rtstruct(tmp_path / "rs.dcm").rois[0], grid)
    np.testing.assert_array_equal(array(mask), array(labels))


def test_labels_of_a_finer_grid_are_written_at_sub_voxel_accuracy(tmp_path: Path) -> None:
    series = ct(tmp_path / "ct", Grid((26, 27, 20), (2.0, 2.0, 2.0), (-26.0, -27.0, -20.0)))
    fine = Grid((60, 60, 60), (1.0, 1.0, 1.0), (-30.2, -29.7, -29.9))
    distance_mm = np.linalg.norm(fine.points_world() - [0.4, -0.3, 0.2], axis=-1)
    sphere = distance_mm < 14
    write_rtstruct(fine.image(sphere.astype(np.uint8)), {1: "S"}, series, tmp_path / "rs.dcm")
    roi = read_rtstruct(tmp_path / "rs.dcm").rois[0]
    # In-plane the contours are those of 1 mm voxels, on slices 2 mm apart.
    radii = np.concatenate([np.linalg.norm(points - [0.4, -0.3, 0.2], axis=1) for points in roi.contours])
    assert np.abs(radii - 14).max() < 1.5  # a step of the staircase, in 3D
    assert abs(radii.mean() - 14) < 0.1
    mask = array(roi_mask(roi, fine)) > 0
    assert 2 * (mask & sphere).sum() / (mask.sum() + sphere.sum()) > 0.98


def test_references_to_the_series(tmp_path: Path) -> None:
    series = ct(tmp_path / "ct")
    write_rtstruct(some_labels(GRID), {1: "A", 2: "B"}, series, tmp_path / "rs.dcm")
    structures, contents = read_rtstruct(tmp_path / "rs.dcm"), rtstruct_contents(tmp_path / "rs.dcm")
    for found in (structures, contents):
        assert found.series_uids == (series.series_uid,)
        assert found.frame_uid == series.frame_uid != ""
    assert contents.image_uids == set(series.image_uids)
    assert contents.names == ("A", "B")
    file, scan = pydicom.dcmread(tmp_path / "rs.dcm"), pydicom.dcmread(series.files[0])
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "FrameOfReferenceUID"):
        assert file[keyword].value == scan[keyword].value
    assert file.SeriesInstanceUID != scan.SeriesInstanceUID
    # Each contour names the slice that it lies in.
    position = {uid: piece.position for uid, piece in zip(series.image_uids, series.slices, strict=True)}
    contours = [contour for roi in file.ROIContourSequence for contour in roi.ContourSequence]
    for contour in contours:
        uid = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
        assert {float(z) for z in contour.ContourData[2::3]} == {position[uid][2]}
    assert len(contours) > 2 * GRID.size[2]


def test_required_attributes(tmp_path: Path) -> None:
    """Type 1 (there, not empty) and type 2 (there) of DICOM PS3.3 A.19.3 and the modules it names."""
    series = ct(tmp_path / "ct")
    write_rtstruct(some_labels(GRID), {1: "A", 2: "B"}, series, tmp_path / "rs.dcm")
    file = pydicom.dcmread(tmp_path / "rs.dcm")
    frame = file.ReferencedFrameOfReferenceSequence[0]
    study = frame.RTReferencedStudySequence[0]
    image = study.RTReferencedSeriesSequence[0].ContourImageSequence[0]
    contour = file.ROIContourSequence[1].ContourSequence[0]
    reference = "ReferencedSOPClassUID ReferencedSOPInstanceUID"
    filled: list[tuple[Dataset, str]] = [
        (file, "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality StructureSetLabel"),
        (file, "StructureSetROISequence ROIContourSequence RTROIObservationsSequence FrameOfReferenceUID"),
        (frame, "FrameOfReferenceUID"),
        (study, reference),
        (study.RTReferencedSeriesSequence[0], "SeriesInstanceUID ContourImageSequence"),
        (image, reference),
        (file.StructureSetROISequence[1], "ROINumber ReferencedFrameOfReferenceUID"),
        (file.ROIContourSequence[1], "ReferencedROINumber"),
        (contour, "ContourGeometricType NumberOfContourPoints ContourData"),
        (contour.ContourImageSequence[0], reference),
        (file.RTROIObservationsSequence[1], "ObservationNumber ReferencedROINumber"),
    ]
    there: list[tuple[Dataset, str]] = [
        (file, "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber"),
        (file, "ReferringPhysicianName SeriesNumber Manufacturer OperatorsName StructureSetDate StructureSetTime"),
        (file.StructureSetROISequence[1], "ROIName ROIGenerationAlgorithm"),
        (file.RTROIObservationsSequence[1], "RTROIInterpretedType ROIInterpreter"),
    ]
    for dataset, keywords in filled + there:
        assert [keyword for keyword in keywords.split() if keyword not in dataset] == []
    for dataset, keywords in filled:
        assert [keyword for keyword in keywords.split() if dataset[keyword].is_empty] == []
    assert contour.NumberOfContourPoints * 3 == len(contour.ContourData)
    # Points close by themselves: the first isn't repeated.
    assert list(contour.ContourData[:3]) != list(contour.ContourData[-3:])


def test_a_hole_is_joined_to_its_outline(tmp_path: Path) -> None:
    # A keyhole, which every program reads: CLOSEDPLANAR_XOR is younger than many.
    series = ct(tmp_path / "ct")
    labels = np.zeros(GRID.shape, np.uint8)
    labels[2, 2:7, 2:7], labels[2, 4, 4] = 1, 2
    write_rtstruct(GRID.image(labels), {1: "ring", 2: "core"}, series, tmp_path / "rs.dcm")
    rois = pydicom.dcmread(tmp_path / "rs.dcm").ROIContourSequence
    assert [[contour.ContourGeometricType for contour in roi.ContourSequence] for roi in rois] == [
        ["CLOSED_PLANAR"]
    ] * 2
    np.testing.assert_array_equal(array(roi_labels(read_rtstruct(tmp_path / "rs.dcm").rois, GRID)), labels)


def test_contours_of_many_points(tmp_path: Path) -> None:
    # A comb: more text than an explicit type can count (64 kB).
    grid = Grid((100, 100, 3), (1, 1, 1))
    comb = np.zeros(grid.shape, np.uint8)
    comb[1, 1:98, 1:98:2] = 1
    comb[1, 50] = 1
    series = ct(tmp_path / "ct", grid)
    write_rtstruct(grid.image(comb), {1: "comb"}, series, tmp_path / "rs.dcm")
    roi = read_rtstruct(tmp_path / "rs.dcm").rois[0]
    assert max(len(points) for points in roi.contours) > 3000
    np.testing.assert_array_equal(array(roi_mask(roi, grid)), comb)


def test_overlapping_rois_keep_the_first() -> None:
    big = Roi(1, "big", None, (rectangle(108.0), rectangle(111.0)))
    small = Roi(2, "small", None, (rectangle(108.0, -17.5, 18.0, -16.5, 20.0),), 3.0)
    assert np.unique(array(roi_labels([big, small], GRID))).tolist() == [0, 1]
    labels = array(roi_labels([small, big], GRID))
    assert [(labels == i).sum() for i in (1, 2)] == [1, 17]


# -- structures that were computed: kept, referenced, unapproved


def drawn_rois(grid: Grid = GRID) -> list[Roi]:
    """Two structures in slices 1 and 2 of a grid, and a point."""

    def square(x0: float, x1: float, k: int) -> np.ndarray:
        return grid.index_to_world(np.array([[x0, x0, k], [x1, x0, k], [x1, x1, k], [x0, x1, k]]))

    ring = tuple(square(*side, k) for side in ((0.6, 6.4), (2.6, 4.4)) for k in (1, 2))
    ptv = Roi(7, "PTV 60Gy", (1, 2, 3), ring, 3.0, interpreted_type="PTV", label="boost", description="by hand")
    cord = Roi(4, "Größe µ", None, (square(1.6, 2.4, 1),), 3.0, interpreted_type="ORGAN")
    return [ptv, cord, Roi(12, "marker", (9, 8, 7), points=grid.index_to_world(np.array([[3.0, 4.0, 2.2]])))]


def test_what_is_known_of_an_roi_is_kept(tmp_path: Path) -> None:
    series = ct(tmp_path / "ct")
    write_structures(drawn_rois(), series, tmp_path / "rs.dcm", source_uid="1.2.3.4")
    structures = read_rtstruct(tmp_path / "rs.dcm")
    for roi, kept in zip(drawn_rois(), structures.rois, strict=True):
        for name in ("number", "name", "interpreted_type", "label", "description"):
            assert getattr(kept, name) == getattr(roi, name)
        assert kept.color == roi.color or roi.color is None
        np.testing.assert_allclose(kept.points, roi.points, atol=1e-4)
    assert structures.patient_id == "Ä^1"
    # The same as the mask of what was drawn, holes included.
    for roi, kept in zip(drawn_rois()[:2], structures.rois, strict=False):
        np.testing.assert_array_equal(array(roi_mask(kept, GRID)), array(roi_mask(roi, GRID)))
    again = read_rtstruct(write(structures.rois, series, tmp_path / "again.dcm"))
    assert again.uid not in ("", structures.uid)


def write(rois: Any, series: DicomSeries, path: Path) -> Path:
    write_structures(rois, series, path)
    return path


def test_a_computed_structure_set_says_so(tmp_path: Path) -> None:
    series = ct(tmp_path / "ct")
    write_structures(drawn_rois(), series, tmp_path / "rs.dcm", title="t=21", description="computed, t = 21",
                     source_uid="1.2.3.4")  # fmt: skip
    file = pydicom.dcmread(tmp_path / "rs.dcm")
    assert file.ApprovalStatus == "UNAPPROVED"
    assert (file.Manufacturer, file.SeriesDescription, file.StructureSetLabel) == (
        "stnerp",
        "computed, t = 21",
        "t=21",
    )
    assert file.SoftwareVersions
    assert file.PredecessorStructureSetSequence[0].ReferencedSOPInstanceUID == "1.2.3.4"
    assert {roi.ROIGenerationAlgorithm for roi in file.StructureSetROISequence} == {"AUTOMATIC"}
    dates = (file.StructureSetDate, file.SeriesDate, file.InstanceCreationDate)
    assert len(set(dates)) == 1
    assert dates[0] > file.StudyDate  # the scan's stays: it is that study
    # Of nobody but the scan's patient, as its header says; nothing else of who it is.
    scan = pydicom.dcmread(series.files[0])
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID"):
        assert file[keyword].value == scan[keyword].value
    assert "PatientAge" not in file


def test_names_of_patients_in_other_alphabets(tmp_path: Path) -> None:
    series = ct(tmp_path / "ct")
    for name in series.files:
        file = pydicom.dcmread(name)
        file.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        file.PatientName, file.PatientAge = "Yamada^Tarou=山田^太郎", "034Y"
        file.save_as(name)
    (series,) = dicom_series(tmp_path / "ct")
    write_structures(drawn_rois(), series, tmp_path / "rs.dcm")
    file = pydicom.dcmread(tmp_path / "rs.dcm")
    assert str(file.PatientName) == "Yamada^Tarou=山田^太郎"
    assert file.PatientAge == "034Y"


def test_contours_lie_exactly_in_their_slices(tmp_path: Path) -> None:
    # A header whose positions are rounded: by them other programs decide which slice a contour belongs to.
    series = ct(tmp_path / "ct")
    for name in series.files:
        file = pydicom.dcmread(name)
        x, y, z = file.ImagePositionPatient
        file.ImagePositionPatient = [x, y, z + 0.07 * (int(file.InstanceNumber) % 2)]
        file.save_as(name)
    (series,) = dicom_series(tmp_path / "ct")
    write_structures(drawn_rois(series_grid(series))[:2], series, tmp_path / "rs.dcm")
    heights = {uid: piece.position[2] for uid, piece in zip(series.image_uids, series.slices, strict=True)}
    file = pydicom.dcmread(tmp_path / "rs.dcm")
    for contour in (contour for roi in file.ROIContourSequence for contour in roi.ContourSequence):
        (uid,) = (image.ReferencedSOPInstanceUID for image in contour.ContourImageSequence)
        assert {float(z) for z in contour.ContourData[2::3]} == {heights[uid]}


def test_write_structures_refuses(tmp_path: Path) -> None:
    series, rois = ct(tmp_path / "ct"), drawn_rois()
    between = replace(rois[1], contours=tuple(points + np.array([0, 0, 1.0]) for points in rois[1].contours))
    for wrong, settings, message in (
        ([], {}, "rois: there must be one or more"),
        ([rois[0], rois[0]], {}, "a number of its own"),
        ([replace(rois[0], number=0)], {}, "must be a positive"),
        ([between], {}, "ROI 4: a contour lies in no slice"),
        (rois, {"description": "x" * 65}, "description"),
        (rois, {"title": ""}, "title"),
    ):
        with pytest.raises(InputError, match=message):
            write_structures(wrong, series, tmp_path / "rs.dcm", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "rs.dcm").exists()


def test_an_roi_that_reaches_no_slice_is_written_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    series = ct(tmp_path / "ct")
    write_structures([replace(drawn_rois()[1], contours=()), drawn_rois()[0]], series, tmp_path / "rs.dcm")
    assert "ROI 4: reaches no slice" in caplog.text
    assert "Größe" not in caplog.text
    assert [len(roi.contours) for roi in read_rtstruct(tmp_path / "rs.dcm").rois] == [0, 2]


# -- there and back: contours of the reference carried onto a target, written, and read again


# Head first supine and prone, feet first supine and prone; world direction (LPS) of each axis in a column.
POSITIONS = {
    "HFS": np.eye(3),
    "HFP": np.diag([-1.0, -1.0, 1.0]),
    "FFS": np.diag([-1.0, 1.0, -1.0]),
    "FFP": np.diag([1.0, -1.0, -1.0]),
    "oblique": DIRECTIONS["oblique"],
}
SCANS = {
    "512 matrix": Grid((512, 512, 9), (0.9766, 0.9766, 3.0), (-250.0, -230.0, 51.3)),
    "non-square pixels": Grid((90, 70, 9), (0.8, 1.3, 2.5), (-40.0, -60.0, 71.2)),
    **{name: make_grid(axes, (80, 76, 9), (1.2, 1.2, 3.0)) for name, axes in POSITIONS.items()},
}
RADII_MM = {"ball": (14.0,), "ring": (20.0, 8.0), "pair": (9.0,), "few": (4.0,)}


def round_structures(grid: Grid) -> tuple[list[Roi], dict[str, np.ndarray]]:
    """A ball, a ring (drawn as keyholes), a pair of discs, a small one on two slices; and their centres, in mm
    along the grid's axes from its middle."""
    centres = {
        "ball": [[3.3, -2.1]],
        "ring": [[-1.2, 4.4]],
        "pair": [[-14.3, 1.1], [13.6, -3.2]],
        "few": [[5.5, 7.7]],
    }
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)

    def circle(centre: Any, radius_mm: float, k: int) -> np.ndarray:
        in_plane_mm = np.array(centre) + radius_mm * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        middle = (np.array(grid.size[:2]) - 1) / 2
        return grid.index_to_world(np.column_stack([middle + in_plane_mm / grid.spacing_mm[:2], np.full(180, k)]))

    rois = []
    for number, (name, centre) in enumerate(centres.items(), 1):
        contours: list[np.ndarray] = []
        for k in (3, 4) if name == "few" else range(2, 7):
            height_mm = (k - 4) * grid.spacing_mm[2]
            shrink = np.sqrt(max(14.0**2 - height_mm**2, 1.0)) / 14.0 if name == "ball" else 1.0
            circles = [circle(c, r * shrink, k) for c in centre for r in RADII_MM[name]]
            contours += keyholes(circles, grid)
        rois.append(Roi(number, name, None, tuple(contours), grid.spacing_mm[2], interpreted_type="ORGAN"))
    return rois, {name: np.array(centre) for name, centre in centres.items()}


def around(roi: Roi, grid: Grid) -> Grid:
    """1 mm voxels along the grid's axes around an ROI, none of which lies on its borders."""
    index = grid.world_to_index(np.concatenate(roi.contours))
    low = index.min(0) - np.array([4.37, 4.23, 4.11]) / grid.spacing_mm
    x, y, z = (int(n) for n in np.ceil((index.max(0) - low) * grid.spacing_mm + 4))
    return Grid((x, y, z), (1.0, 1.0, 1.0), tuple(grid.index_to_world(low).tolist()), grid.direction)


def empty_scan(name: str, folder: Path) -> DicomSeries:
    grid = SCANS[name]
    return write_dicom_series(grid.image(np.zeros(grid.shape, np.int16)), folder / "ct", patient_id="P^1")


WAYS = [
    *((name, "carried") for name in SCANS),
    ("512 matrix", "by way of a mask"),
    ("oblique", "by way of a mask"),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_there_and_back(name: str, way: str, tmp_path: Path) -> None:
    scan = empty_scan(name, tmp_path)
    grid = series_grid(scan)
    drawn, centres = round_structures(grid)
    source = read_rtstruct(write(drawn, scan, tmp_path / "source.dcm")).rois
    if way == "carried":
        write_structures(carried_rois(source, grid, lambda p: p, lambda p: p), scan, tmp_path / "rs.dcm")
    else:
        for roi in source:
            write_rtstruct(roi_mask(roi, grid), {1: roi.name}, scan, tmp_path / f"{roi.number}.dcm")
    for i, (roi, before) in enumerate(zip(drawn, source, strict=True)):
        if way == "carried":
            after = read_rtstruct(tmp_path / "rs.dcm").rois[i]
            assert (after.number, after.name, after.interpreted_type) == (roi.number, roi.name, "ORGAN")
        else:
            after = read_rtstruct(tmp_path / f"{roi.number}.dcm").rois[0]
        on = around(roi, grid)
        masks = [
            on.image(contour_mask(r.contours, on, r.thickness_mm).astype(np.uint8)) for r in (roi, before, after)
        ]
        # What is written and read is what was drawn: coordinates are rounded to 0.1 micrometres.
        assert dice(masks[1], masks[0]) > 0.9999
        errors_mm = border_errors_mm(after, roi.name, centres[roi.name], grid)
        distances = surface_distances_mm(masks[2], masks[0])
        found = {"dice": dice(masks[2], masks[0]), **distances, "border_mean_mm": errors_mm.mean(),
                 "border_p95_mm": np.percentile(errors_mm, 95)}  # fmt: skip
        print(f"{name:17} {way:17} {roi.name:5}", *(f"{name} {value:.4f}" for name, value in found.items()))
        if way == "carried":
            assert found["dice"] > 0.99
            assert found["hd95_mm"] == 0.0  # of 1 mm voxels few change sides
            # Distances are linear between pixels: on a circle of 4 mm with pixels of 1.3 mm 1.3² / (8 x 4) off.
            assert found["border_mean_mm"] < 0.03
            assert found["border_p95_mm"] < 0.06
        else:
            # A pixel is in or out: the border is off by up to half a pixel, a quarter of one on average.
            assert found["dice"] > (0.97 if max(RADII_MM[roi.name]) > 10 else 0.9)
            assert found["border_mean_mm"] < 0.25 * np.hypot(*grid.spacing_mm[:2])


def border_errors_mm(roi: Roi, name: str, centres: np.ndarray, grid: Grid) -> np.ndarray:
    """How far the points of contours lie from the circles that were drawn, in their plane. A keyhole's channel has
    no points between its ends."""
    index = grid.world_to_index(np.concatenate(roi.contours))
    in_plane_mm = (index[:, :2] - (np.array(grid.size[:2]) - 1) / 2) * grid.spacing_mm[:2]
    height_mm = (index[:, 2] - 4) * grid.spacing_mm[2]
    from_centre = np.linalg.norm(in_plane_mm[:, None] - centres, axis=-1)
    if name == "ball":
        return np.abs(np.hypot(from_centre[:, 0], height_mm) - 14.0) * 14 / np.sqrt(14.0**2 - height_mm**2)
    return np.abs(from_centre[..., None] - RADII_MM[name]).min(axis=(1, 2))


def test_carried_points_and_contours_go_with_the_deformation() -> None:
    shift = np.array([1.0, 2.0, 3.0])  # a voxel of GRID along each axis
    moved = carried_rois(drawn_rois(), GRID, lambda p: p - shift, lambda p: p + shift)
    np.testing.assert_allclose(moved[2].points, drawn_rois()[2].points + shift)
    for before, after in zip(drawn_rois()[:2], moved, strict=False):
        expected = np.roll(array(roi_mask(before, GRID)), (1, 1, 1), (0, 1, 2))
        np.testing.assert_array_equal(array(roi_mask(after, GRID)), expected)
        assert (after.number, after.interpreted_type, after.thickness_mm) == (
            before.number,
            before.interpreted_type,
            3,
        )
    # In the target's frame of reference, whichever that is.
    framed = [replace(drawn_rois()[0], frame_uid="1.2.3")]
    assert carried_rois(framed, GRID, lambda p: p, lambda p: p)[0].frame_uid == ""
    # Out of the scan: a point that isn't there.
    far = np.array([0, 0, 100.0])
    assert [len(roi.contours) + len(roi.points) for roi in carried_rois(drawn_rois(), GRID, lambda p: p - far,
                                                                      lambda p: p + far)] == [0, 0, 0]  # fmt: skip


# -- what other programs say


@pytest.mark.skipif(
    shutil.which("dciodvfy") is None, reason="dicom3tools isn't installed (apt install dicom3tools)"
)
@pytest.mark.parametrize("name", ["512 matrix", "FFP", "oblique"])
def test_a_validator_finds_no_error(name: str, tmp_path: Path) -> None:
    scan = empty_scan(name, tmp_path)
    grid = series_grid(scan)
    rois = [*round_structures(grid)[0], Roi(9, "marker", points=grid.centre_mm[None]), Roi(11, "empty", (1, 2, 3))]
    write_structures(rois, scan, tmp_path / "a.dcm", source_uid="1.2.3.4")
    write_rtstruct(roi_mask(rois[1], grid), {1: "ring"}, scan, tmp_path / "b.dcm")
    for file in ("a.dcm", "b.dcm"):
        done = subprocess.run(["dciodvfy", "-new", tmp_path / file], capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).splitlines()
        assert "RTStructureSet" in said
        assert [line for line in said if "Error" in line] == []
        # What else it has to say is that parts a DICOMDIR would need are empty, as in the scan itself.
        assert [line for line in said if "Warning" in line and "DICOMDIR" not in line] == []


@pytest.mark.skipif(
    shutil.which("plastimatch") is None, reason="plastimatch isn't installed (pip install plastimatch)"
)
@pytest.mark.parametrize("name", ["512 matrix", "non-square pixels", "HFS"])
def test_another_reader_sees_the_same_voxels(name: str, tmp_path: Path) -> None:
    # Holes and islands included. Its grids run along the patient's axes, so that only such scans compare.
    scan = empty_scan(name, tmp_path)
    grid = series_grid(scan)
    rois = round_structures(grid)[0]
    write_structures(rois, scan, tmp_path / "rs.dcm")
    command = ["plastimatch", "convert", "--input", tmp_path / "rs.dcm", "--referenced-ct", tmp_path / "ct",
               "--output-prefix", tmp_path / "masks", "--prefix-format", "nii.gz"]  # fmt: skip
    subprocess.run(command, capture_output=True, check=True)
    for roi in rois:
        theirs = sitk.ReadImage(str(tmp_path / "masks" / f"{roi.name}.nii.gz"))
        assert Grid.of(theirs).is_close(grid)
        assert dice(theirs, roi_mask(roi, grid)) > 0.999


# -- refused


def test_what_is_no_rtstruct_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"a\.dcm: no such file"):
        read_rtstruct(tmp_path / "a.dcm")
    (tmp_path / "b.dcm").write_text("not DICOM")
    series = ct(tmp_path / "ct")
    path = tmp_path / "rs.dcm"
    write_rtstruct(some_labels(GRID), {1: "A", 2: "B"}, series, path)
    for file in (tmp_path / "b.dcm", Path(series.files[0])):
        for read in (read_rtstruct, rtstruct_contents):
            with pytest.raises(InputError, match=file.name):
                read(file)
    # Cut short anywhere: an error of one line, or what was whole, and never a traceback of pydicom's.
    whole = path.read_bytes()
    for end in range(100, len(whole), len(whole) // 40):
        path.write_bytes(whole[:end])
        with suppress(InputError):
            assert {roi.name for roi in read_rtstruct(path).rois} <= {"A", "B"}


def test_contours_that_are_no_points(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.dcm: ROI 1: a contour is no list of points"):
        by_hand(tmp_path / "a.dcm", ("CLOSED_PLANAR", rectangle(108.0).ravel()[:10]))
    bent = by_hand(tmp_path / "b.dcm", ("CLOSED_PLANAR", rectangle(108.0) + [[0, 0, 0], [0, 0, 5]] * 2))
    with pytest.raises(InputError, match="ROI 'A': contours: they don't lie in parallel planes"):
        roi_mask(bent, GRID)


def test_an_roi_elsewhere(tmp_path: Path) -> None:
    roi = by_hand(tmp_path / "a.dcm", ("CLOSED_PLANAR", rectangle(308.0)))
    with pytest.raises(InputError, match="ROI 'A': covers no voxel of the image"):
        roi_mask(roi, GRID)


def test_write_refuses(tmp_path: Path) -> None:
    series, labels, path = ct(tmp_path / "ct"), some_labels(GRID), tmp_path / "rs.dcm"
    names = {1: "A", 2: "B"}
    for wrong, message in (
        ({1: "A"}, r"names: labels \[2\] have none"),
        ({1: "A", 2: "B\\C"}, "no backslash"),
        ({1: "A", 2: "B\n"}, "no backslash or line break"),
        ({1: "A", 2: ""}, "1 to 64 characters"),
        ({1: "A", 2: "x" * 65}, "1 to 64 characters"),
        ({**names, 0: "air"}, "label 0 must be a positive"),
    ):
        with pytest.raises(InputError, match=message):
            write_rtstruct(labels, wrong, series, path)
    with pytest.raises(InputError, match="title"):
        write_rtstruct(labels, names, series, path, title="x" * 17)
    with pytest.raises(MissingFileError, match="folder does not exist"):
        write_rtstruct(labels, names, series, tmp_path / "no" / "rs.dcm")
    assert not path.exists()
    write_rtstruct(labels, names, series, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="already exists"):
        write_rtstruct(labels, names, series, path)
    assert path.read_bytes() == before
    write_rtstruct(labels, names, series, path, overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ct", "rs.dcm"]


def test_a_series_without_a_frame_of_reference_has_no_place_for_contours(tmp_path: Path) -> None:
    series = ct(tmp_path / "ct")
    for name in series.files:
        file = pydicom.dcmread(name)
        del file.FrameOfReferenceUID
        file.save_as(name)
    (series,) = dicom_series(tmp_path / "ct")
    with pytest.raises(InputError, match=r"'a, 30\.0%' has no frame of reference"):
        write_rtstruct(some_labels(GRID), {1: "A", 2: "B"}, series, tmp_path / "rs.dcm")


# -- scans whose headers leave out or get wrong what a structure set says


def edited(folder: Path, edit: Callable[[Dataset], None]) -> DicomSeries:
    """A CT series after its files' tags were edited."""
    for name in ct(folder).files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is edited here
            file = pydicom.dcmread(name)
            edit(file)
            file.save_as(name)
    return dicom_series(folder)[0]


@pytest.mark.parametrize(
    ("modality", "expected"), [("CT", CTImageStorage), ("MR", MRImageStorage), ("", CTImageStorage)]
)
def test_slices_that_do_not_say_what_they_are(tmp_path: Path, modality: str, expected: str) -> None:
    def edit(file: Dataset) -> None:
        del file.SOPClassUID
        file.Modality = modality

    write_rtstruct(some_labels(GRID, 1), {1: "A"}, edited(tmp_path / "ct", edit), tmp_path / "rs.dcm")
    file = pydicom.dcmread(tmp_path / "rs.dcm")
    image = file.ROIContourSequence[0].ContourSequence[0].ContourImageSequence[0]
    assert image.ReferencedSOPClassUID == expected


@pytest.mark.parametrize("uid", [None, ""])
def test_contours_refer_to_no_slice_without_a_uid(tmp_path: Path, uid: str | None) -> None:
    def edit(file: Dataset) -> None:
        if file.InstanceNumber == 2:
            file.SOPInstanceUID = uid

    series = edited(tmp_path / "ct", edit)
    (without,) = (piece.path for piece in series.slices if not piece.tags.get("0008|0018"))
    with pytest.raises(InputError, match=f"{re.escape(without)}: has no SOPInstanceUID"):
        write_rtstruct(some_labels(GRID, 1), {1: "A"}, series, tmp_path / "rs.dcm")
    with pytest.raises(InputError, match="has no SOPInstanceUID"):
        write_structures(drawn_rois(), series, tmp_path / "rs.dcm")
    assert not (tmp_path / "rs.dcm").exists()


def test_what_of_a_patient_dicom_does_not_take_is_left_out(tmp_path: Path) -> None:
    def edit(file: Dataset) -> None:
        file.PatientAge, file.PatientSize, file.OtherPatientIDs = "34 years", "1.8", ["a", "b"]
        # As some systems write it, which pydicom by itself doesn't.
        tag = Tag("PatientWeight")
        file[tag] = RawDataElement(tag, "DS", 4, b"70,5", 0, is_implicit_VR=False, is_little_endian=True)

    write_structures(drawn_rois(), edited(tmp_path / "ct", edit), tmp_path / "rs.dcm")
    file = pydicom.dcmread(tmp_path / "rs.dcm")
    assert "PatientWeight" not in file
    assert "PatientAge" not in file
    assert (file.PatientSize, list(file.OtherPatientIDs)) == (1.8, ["a", "b"])


def test_nothing_that_dicom_does_not_take_is_copied_or_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    odd = {"PatientBirthDate": "13.07.1951", "PatientSex": "Männlich", "StudyDate": "2020.01.01",
           "StudyTime": "12:00", "AccessionNumber": "Secret" * 9, "PatientID": "Secret^1" * 9}  # fmt: skip

    def edit(file: Dataset) -> None:
        for keyword, value in odd.items():
            tag, text = Tag(keyword), value.encode("latin-1")
            file[tag] = RawDataElement(tag, dictionary_VR(keyword), len(text), text, 0, False, True)

    series = edited(tmp_path / "ct", edit)
    caplog.clear()
    recwarn.clear()
    write_structures(drawn_rois(), series, tmp_path / "rs.dcm")
    assert read_rtstruct(tmp_path / "rs.dcm").patient_id == odd["PatientID"] == series.patient_id
    assert [str(warning.message) for warning in recwarn] == []
    assert [record.name for record in caplog.records] == ["stnerp.io.rtstruct"] * 5
    for keyword, value in odd.items():
        assert value not in caplog.text
        assert keyword == "PatientID" or f"the scan's {keyword} is not as DICOM has it" in caplog.text
    file = pydicom.dcmread(tmp_path / "rs.dcm")
    assert [file[keyword].value for keyword in odd if keyword != "PatientID"] == [""] * 5
    assert str(file.PatientName) == str(pydicom.dcmread(series.files[0]).PatientName) != ""
    assert not logging.getLogger("pydicom").disabled


def test_contours_of_no_study_would_not_be_found_with_their_scan(tmp_path: Path) -> None:
    series = edited(tmp_path / "ct", lambda file: setattr(file, "StudyInstanceUID", ""))
    with pytest.raises(InputError, match=r"ct: series 'a, 30\.0%' has no StudyInstanceUID.*export it again"):
        write_structures(drawn_rois(), series, tmp_path / "rs.dcm")
    with pytest.raises(InputError, match="has no StudyInstanceUID"):
        write_rtstruct(some_labels(GRID, 1), {1: "A"}, series, tmp_path / "rs.dcm")
    assert not (tmp_path / "rs.dcm").exists()


@pytest.mark.parametrize("text", ["x" * 65, "thorax\\gated, 30%", "y" * 63 + "\\z"])
def test_any_description_of_a_series_will_do(tmp_path: Path, text: str) -> None:
    def edit(file: Dataset) -> None:
        file.SeriesDescription = text

    series = edited(tmp_path / "ct", edit)
    assert series.description == text
    write_rtstruct(some_labels(GRID, 1), {1: "A"}, series, tmp_path / "rs.dcm")
    assert pydicom.dcmread(tmp_path / "rs.dcm").SeriesDescription == text.replace("\\", "/")[:64]


# -- the CT series that contours are written for


def test_written_series_read_back(tmp_path: Path) -> None:
    grid = make_grid(DIRECTIONS["oblique"])
    values = np.random.default_rng(0).integers(-1024, 3000, grid.shape).astype(np.float32)
    series = write_dicom_series(grid.image(values + 0.3), tmp_path / "ct", patient_id="p", number=7)
    image = read_dicom_series(tmp_path / "ct")
    np.testing.assert_array_equal(array(image), values)
    # Positions are written with ten digits.
    assert Grid.of(image).is_close(grid, 1e-6)
    assert (series.patient_id, series.number, series.frame_uid != "") == ("p", 7, True)
    assert len(set(series.image_uids)) == grid.size[2]


def test_series_of_one_study_share_what_is_given(tmp_path: Path) -> None:
    shared = {"study_uid": "1.2.3", "frame_uid": "1.2.4"}
    first, second = ct(tmp_path / "a", **shared), ct(tmp_path / "b", **shared)
    assert first.study_uid == second.study_uid == "1.2.3"
    assert first.frame_uid == second.frame_uid == "1.2.4"
    assert first.series_uid != second.series_uid
    assert not set(first.image_uids) & set(second.image_uids)


def test_write_series_refuses(tmp_path: Path) -> None:
    image = GRID.image(np.zeros(GRID.shape, np.int16))
    with pytest.raises(InputError, match="HU must lie between"):
        write_dicom_series(image - 2000, tmp_path / "a", patient_id="p")
    with pytest.raises(InputError, match="HU must lie between"):
        write_dicom_series(sitk.Cast(image, sitk.sitkFloat32) * np.nan, tmp_path / "a", patient_id="p")
    with pytest.raises(InputError, match="date: '2003-07-02'"):
        write_dicom_series(image, tmp_path / "a", patient_id="p", date="2003-07-02")
    with pytest.raises(InputError, match="at least two slices"):
        write_dicom_series(image[:, :, :1], tmp_path / "a", patient_id="p")
    with pytest.raises(MissingFileError, match="parent folder"):
        write_dicom_series(image, tmp_path / "no" / "a", patient_id="p")
    assert list(tmp_path.iterdir()) == []
    write_dicom_series(image, tmp_path / "a", patient_id="p")
    with pytest.raises(InputError, match="no empty folder"):
        write_dicom_series(image, tmp_path / "a", patient_id="p")
