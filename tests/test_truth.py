"""Contours and landmarks that scans lack: tables go on without them, say so, and say what their means are of."""

from __future__ import annotations

import copy
import csv
import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from conftest import optional
from test_scripts import run as run_script

from stnerp.errors import InputError, MissingContoursError
from stnerp.io.landmarks import read_landmarks
from stnerp.phantom import Phantom

SCRIPTS = Path(__file__).parents[1] / "scripts"
COMMON = ["align=none", "device=cpu", "progress=false"]
TINY = ["data.size=[36,28,18]", "data.spacing_mm=10", "data.days=[0,7,14]", "data.phases=[0,50]"]
MOVED = "data.series=longitudinal"


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(script: str, out: Path, *arguments: str) -> None:
    run_script(script, f"out={out}", *COMMON, *arguments)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cells_of(text: str, beginning: str) -> dict[str, str]:
    """A row of a report's tables, by the titles of its own table."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {beginning} |"))
    head = max(i for i in range(at) if lines[i + 1].startswith("| ---"))
    titles, cells = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (head, at))
    return dict(zip(titles, cells, strict=True))


# -- contours and landmarks of some scans alone


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients of the same scans: all contours and landmarks, none on the reference, on some, nowhere."""
    folder = tmp_path_factory.mktemp("hospital") / "cohort"
    folder.mkdir()
    phantom = Phantom((24, 19, 12), 15.0, n_landmarks=20)
    for i, t in enumerate((0.0, 0.2, 0.4)):
        sitk.WriteImage(phantom.image(t), str(folder / f"{i}.nii.gz"))
        sitk.WriteImage(phantom.labels(t), str(folder / f"m{i}.nii.gz"))
        points = "\n".join(",".join(f"{x:.4f}" for x in point) for point in phantom.landmarks(t))
        (folder / f"l{i}.csv").write_text(points + "\n", encoding="utf-8")
        assert len(read_landmarks(folder / f"l{i}.csv")) == 20
    masks, points = [f"m{i}.nii.gz" for i in range(3)], [f"l{i}.csv" for i in range(3)]
    common = {"images": [f"{i}.nii.gz" for i in range(3)], "times": [0, 7, 14], "label_names": {2: "heart"}}
    patients = [
        {"patient": "full", **common, "masks": masks, "landmarks": points},
        {"patient": "noref", **common, "masks": [None, *masks[1:]], "landmarks": [None, *points[1:]]},
        {"patient": "some", **common, "masks": [masks[0], None, masks[2]], "landmarks": [*points[:2], None]},
        {"patient": "nothing", **common},
    ]
    patients = [copy.deepcopy(patient) for patient in patients]  # else YAML refers from one to another
    (folder / "weeks.yaml").write_text(yaml.safe_dump({"patients": patients}), encoding="utf-8")
    return folder / "weeks.yaml"


def of_cohort(manifest: Path, *patients: str) -> list[str]:
    cases = ",".join(f"{{patient: {name}}}" for name in patients)
    return ["data=manifest", f"data.manifest={manifest}", f"cases=[{cases}]", "data.contours=[heart]"]


def test_a_mean_says_of_how_many_images_it_is(cohort: Path, tmp_path: Path) -> None:
    data = of_cohort(cohort, "full", "noref", "some", "nothing")
    methods = "methods=[no_motion,nearest_image,linear_blend]"
    run("eval_longitudinal_interpolation", tmp_path, *data, "held_out=[2]", methods)
    text = (tmp_path / "table_2.md").read_text(encoding="utf-8")
    still, copied = (cells_of(text, f"{name} | 4") for name in ("no motion", "nearest image"))
    assert still["unseen Dice"].endswith("(1 of 4)")
    assert copied["unseen Dice"].endswith("(1 of 4)")  # of the reference, or the third scan's
    assert still["seen Dice"].endswith("(2 of 4)")
    assert still["unseen TRE mm"].endswith("(2 of 4)")
    assert not still["unseen PSNR dB"].endswith(")")
    for line in (
        "- case 2: no contour of heart on scan 1 (the reference): no Dice",
        "- case 2: no landmarks on scan 1 (the reference): no TRE",
        "- case 3: no contour of heart on scan 2: Dice is of 0 of 1 images (nearest image), "
        "of 1 of 2 images (no motion)",
        "- case 3: no landmarks on scan 3: TRE is of 1 of 1 images (nearest image), of 1 of 2 images (no motion)",
        "- case 4: no contours of heart: no Dice",
        "- case 4: no landmarks on any scan: no TRE",
    ):
        assert line in text.splitlines(), line
    assert "- case 1: no" not in text
    # What was told stays told when others join the table.
    run("eval_longitudinal_interpolation", tmp_path, *of_cohort(cohort, "full"), "held_out=[3]", methods)
    assert "- case 2: no contour of heart on scan 1" in (tmp_path / "table_2.md").read_text(encoding="utf-8")


def test_pairs_say_it_too(cohort: Path, tmp_path: Path) -> None:
    data = of_cohort(cohort, "full", "some")
    run("eval_longitudinal_registration", tmp_path, *data, "schemes=[long,short]", "methods=[no_motion]")
    text = (tmp_path / "table_5.md").read_text(encoding="utf-8")
    assert cells_of(text, "long | no motion | 4")["Dice"].endswith("(3 of 4)")
    assert cells_of(text, "short | no motion | 4")["Dice"].endswith("(2 of 4)")
    assert "- case 2: no contour of heart on scan 2: Dice is of 1 of 4 images (no motion)" in text.splitlines()
    assert "- case 1: no" not in text


def test_an_absent_value_counts_as_one_of_the_images() -> None:
    means = importlib.import_module("series_tables").means
    assert means([{"dice": 0.8}, {}, {"dice": None}, {"dice": 0.6}]) == {"Dice": "0.700 ± 0.100 (2 of 4)"}
    assert means([{"dice": 0.8}, {"dice": 0.6}]) == {"Dice": "0.700 ± 0.100"}
    assert means([{}, {}]) == {}


def test_records_of_before_tell_what_their_rows_do() -> None:
    """They don't say which scans have contours."""
    truth = importlib.import_module("truth")
    rows: list[dict[str, Any]] = [
        {"case": 1, "method": "greedy", "folded_voxels": 0, "dice": 0.5},
        {"case": 2, "method": "greedy", "folded_voxels": 0},
        {"case": 2, "method": "nearest_image", "dice": 0.7},
        {"case": 2, "method": "linear_blend", "psnr_db": 30.0},
    ]
    records = [{"arguments": {"case": case}, "result": {"images": []}} for case in (1, 2)]
    expected = ["- case 2: Dice is of 0 of 1 images (greedy), of 1 of 1 images (nearest image)"]
    assert truth.lacking_lines(records, rows) == expected
    for row in rows:
        row.pop("dice", None)
    assert truth.lacking_lines(records, rows) == []  # a table without contours


# -- a collection without contours, or with others


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stand_in") / "with_contours"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        data = ["data=tcia_4d_lung_phantom", MOVED, f"data.root={root}", *TINY]
        run("eval_longitudinal_interpolation", root.with_name("run"), *data, "held_out=[2]", "methods=[no_motion]")
    bare = root.with_name("scans_alone")
    shutil.copytree(root, bare, ignore=shutil.ignore_patterns("*RTS*"))
    return bare


def of_collection(root: Path) -> list[str]:
    return ["data=tcia_4d_lung", f"data.root={root}", "data.patient=900_PHANTOM"]


@pytest.mark.parametrize(
    ("script", "table", "more"),
    [
        ("eval_4dct_interpolation", "table_1.md", ["held_out=[2]", "data.date=2000-01-10"]),
        ("eval_longitudinal_interpolation", "table_2.md", ["held_out=[2]", MOVED]),
        ("eval_longitudinal_registration", "table_5.md", ["schemes=[short]", MOVED, "cases=[{phase: 0}]"]),
    ],
)
def test_scans_without_contours_are_scored(
    script: str, table: str, more: list[str], collection: Path, tmp_path: Path
) -> None:
    run(script, tmp_path, *of_collection(collection), *more, "methods=[no_motion]")
    rows = rows_of(tmp_path / "metrics.csv")
    assert rows
    assert all(row["psnr_db"] and row["ssim"] for row in rows)
    assert "- case 1: no contours of Tumor: no Dice" in (tmp_path / table).read_text(encoding="utf-8").splitlines()
    log = (tmp_path / f"{script}.log").read_text(encoding="utf-8")
    assert "no Dice and HD95 of Tumor: 900_PHANTOM" in log
    assert "data.rois='[]'" in log


def test_other_contours_are_named(collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And those that are there are scored all the same."""
    root = of_collection(collection.with_name("with_contours"))
    data = [*root, MOVED, "data.rois=[GTV,Heart]", "data.contours=[GTV,Heart]", "held_out=[2]"]
    run("eval_longitudinal_interpolation", tmp_path, *data, "methods=[no_motion]")
    assert all(row["dice_Heart"] for row in rows_of(tmp_path / "metrics.csv"))
    text = (tmp_path / "table_2.md").read_text(encoding="utf-8")
    assert "- case 1: no contour of GTV on any scan" in text.splitlines()
    log = (tmp_path / "eval_longitudinal_interpolation.log").read_text(encoding="utf-8")
    assert "no contours of GTV; there are: Lungs, " in log
    assert "none: data.rois='[Lungs]' or data.rois='[]'" in log
    # A fit that may be guided by them, and whose model carries them, isn't made without.
    with pytest.raises(SystemExit) as exit_:
        run_script("train_def", f"out={tmp_path / 'fit'}", *data[:-1], "prior=false", "device=cpu")
    assert exit_.value.code == 2
    assert "none: data.rois='[Lungs]' or data.rois='[]'" in capsys.readouterr().err


def test_contours_are_left_out_until_the_scans_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading may miss others: what no scan has first, then what the reference doesn't have."""
    truth, data = importlib.import_module("truth"), importlib.import_module("data")
    omega_conf = importlib.import_module("configuration").OmegaConf
    read: list[Any] = []

    def load(section: Any) -> Any:
        read.append((list(section.rois), list(section.contours)))
        if "GTV" in section.rois:
            raise MissingContoursError("no GTV", ["GTV"], ["Heart", "Lungs"])
        if "Heart" in section.contours:
            raise MissingContoursError("no Heart", ["Heart"], ["Lungs", "Heart"])
        return data.PatientData(None, {}, [], 0.0)

    monkeypatch.setattr(truth, "load_data", load)
    asked = {"rois": ["GTV", "Heart", "Lungs"], "contours": ["GTV", "Heart", "Lungs"]}
    assert truth.load_what_is_there(omega_conf.create(asked)).nowhere == ("GTV",)
    assert read[1:] == [(["Heart", "Lungs"], ["Heart", "Lungs"]), (["Lungs"], ["Lungs"])]
    read.clear()
    # A slip is one, and not a contour that isn't drawn.
    for contours in (["Tumr"], ["GTV", "Tumr"]):
        with pytest.raises(InputError, match=r"data.contours: Tumr must be among data.rois") as error:
            truth.load_what_is_there(omega_conf.create(asked | {"contours": contours}))
        assert not isinstance(error.value, MissingContoursError)
    assert read == []
    # Nothing was asked for, whatever is to be scored.
    assert truth.load_what_is_there(omega_conf.create({"rois": [], "contours": ["Tumor"]})).nowhere == ()


def test_a_contour_is_on_no_scan_or_not_on_the_reference(tmp_path: Path) -> None:
    truth = importlib.import_module("truth")
    image = sitk.GetImageFromArray(np.random.default_rng(0).random((8, 8, 8), np.float32))
    label = sitk.Image(image.GetSize(), sitk.sitkUInt8)
    label[2, 2, 2] = 2
    names = [str(tmp_path / name) for name in ("0.mha", "1.mha", "m0.mha", "m1.mha")]
    sitk.WriteImage(image, names[0])
    sitk.WriteImage(image, names[1])
    sitk.WriteImage(label, names[2])
    label[4, 4, 4] = 3
    sitk.WriteImage(label, names[3])
    section = {"images": names[:2], "times": [0, 7], "masks": names[2:], "contours": ["heart", "node", "cyst"]}
    section |= {"label_names": {2: "heart", 3: "node", 4: "cyst"}, "kind": "files", "window": [0, 1]}
    section |= {"reference": 0, "period": None, "landmarks": None}
    patient = truth.load_what_is_there(importlib.import_module("configuration").OmegaConf.create(section))
    assert (patient.contours, patient.nowhere) == ([2], ("cyst",))
    result = {"truth": truth.truth_of(patient), "images": []}
    arguments = {"case": 1, "data": section}
    assert truth.lacking_lines([{"arguments": arguments, "result": result}], []) == [
        "- case 1: no contour of node on the reference, no contour of cyst on any scan"
    ]


# -- which data


def test_a_table_says_of_which_data_it_is() -> None:
    told = importlib.import_module("series_tables").told
    section = {"kind": "tcia_4d_lung", "root": "/home/me/4D-Lung", "patient": "p", "rois": ["Tumor", "LN"]}
    section |= {"dates": ["2003-07-02", "2003-07-09"], "contours": None}
    assert told(section) == (
        "kind tcia_4d_lung, root 4D-Lung, patient p, dates [2003-07-02, 2003-07-09], rois [Tumor, LN]"
    )
    assert told({"kind": "manifest", "manifest": "/data/b/weeks.yaml"}) == "kind manifest, manifest weeks.yaml"
    files = {"kind": "files", "images": ["/data/a.nii.gz", "/data/b.nii.gz"]}
    assert told(files) == "kind files, images [a.nii.gz, b.nii.gz]"
    assert told({"kind": "dirlab", "folder": "/data/dirlab/"}) == "kind dirlab, folder dirlab"
