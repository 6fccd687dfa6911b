"""Trust: known distances, images that agree by construction, and fits that are broken on purpose."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import optional
from scipy.ndimage import gaussian_filter
from test_agreement import GRID, blobs, half_reached, known

from stnerp import InputError, Series, STNeRP, fit_deformation, load_series, report, trust
from stnerp.geometry import Grid
from stnerp.trust import Limits, Verdict, verdicts

QUICK: dict[str, Any] = {"progress": False, "device": "cpu", "align": "none", "levels": [(6, 12, 40)]}


# -- uncertainty


def test_uncertainty_is_the_distance_of_the_refits() -> None:
    # 3 and 4 mm off, at right angles: √((9 + 16) / 2), whatever their own mean is.
    fits = [known(shift_mm=(3, 0, 0)), known(shift_mm=(0, -4, 0))]
    points = GRID.points_world()[8:12, 8:12, 8:12].reshape(-1, 3)
    # Velocities go through float32: a cube of 60 mm half extent, 60 × 6e-8, and the squarings.
    np.testing.assert_allclose(trust.uncertainty_at(known(), fits, points, 1.0), np.sqrt(12.5), atol=1e-4)
    image = trust.uncertainty_mm(known(), fits, 0.5)
    assert Grid.of(image).is_close(GRID)
    np.testing.assert_allclose(sitk.GetArrayFromImage(image)[5:-5, 5:-5, 5:-5], np.sqrt(12.5) / 2, atol=1e-4)


def test_at_a_scan_only_refits_that_saw_it_count() -> None:
    model = known((0, 1, 2))
    unaware, aware = known((0, 2), (8, 0, 0)), known((0, 1, 2), (1, 0, 0))
    points = np.zeros((1, 3)) + GRID.centre_mm
    assert trust.uncertainty_at(model, [unaware, aware], points, 1.0) == pytest.approx(1, abs=1e-4)
    assert trust.uncertainty_at(model, [unaware, aware], points, 0.5) == pytest.approx(
        0.5 * np.sqrt((64 + 1) / 2), abs=1e-4
    )
    assert np.isnan(trust.uncertainty_at(model, [unaware], points, 1.0)).all()


def test_refits_leave_out_each_scan_between_others_once(
    phantom_series: Series, caplog: pytest.LogCaptureFixture
) -> None:
    quick = {"progress": False, "device": "cpu", "levels": [(30, 40, 1)]}
    cycle = trust.refits(phantom_series, 3, **quick)
    assert [fit.times for fit in cycle] == [(0, 0.5, 0.75), (0, 0.25, 0.75), (0, 0.25, 0.5)]
    assert "leave out no scan" not in caplog.text
    follow_up = load_series(phantom_series.images, [0, 1, 2, 3], window="ct")
    # The last scan has none after it, and there are two to leave out for three refits.
    fits = trust.refits(follow_up, 3, align="none", **quick)
    assert [fit.times for fit in fits] == [(0, 2, 3), (0, 1, 3), (0, 1, 2, 3)]
    assert "1 of 3 leave out no scan" in caplog.text
    weights = [fit.def_net.modes[0].B for fit in fits]  # type: ignore[union-attr, index]
    assert not torch.equal(weights[0], weights[1])
    with pytest.raises(InputError, match="refits"):
        trust.refits(phantom_series, 1)


def test_inverse_consistency_of_flows() -> None:
    inside = np.s_[4:-4, 4:-4, 4:-4]
    shifted = sitk.GetArrayFromImage(trust.inverse_consistency_mm(known(shift_mm=(5, -3, 2)), 1.0))
    np.testing.assert_allclose(shifted[inside], 0, atol=1e-4)
    # A linear field is read without error inside; 4 squarings of 0.2: e^0.2 e^−0.2 to second order.
    linear = sitk.GetArrayFromImage(trust.inverse_consistency_mm(known(linear=0.2), 1.0))
    assert 1e-3 < linear[inside].max() < 0.2
    assert trust.round_trip_mm(known(linear=0.2), GRID.centre_mm[None] + 10, 1.0) == pytest.approx(0, abs=1e-4)


# -- verdicts


def said(verdict: Verdict, word: str) -> bool:
    return any(word in reason for reason in verdict.reasons)


def test_times_without_a_scan() -> None:
    scans = load_series([blobs(), blobs((0, 0, 14))], [0, 1], window=(0, 1))
    before, between, at, after = verdicts(known(shift_mm=(0, 0, -14)), scans, [-1, 0.5, 1, 2])
    assert at.ok, at.reasons
    assert at.measured
    assert not between.measured
    assert said(between, "more than 14 mm")
    assert said(before, "straight line")
    assert said(after, "straight line")
    slow = load_series([blobs(), blobs((0, 0, 6))], [0, 1], window=(0, 1))
    assert verdicts(known(shift_mm=(0, 0, -6)), slow, [0.5])[0].ok
    # A time that rounding took beyond the last scan is that scan's.
    tenths = load_series([blobs()] * 4, [0, 0.1, 0.2, 0.3], window=(0, 1))
    for late in verdicts(known(tenths.times), tenths, [0.1 + 0.2, np.nextafter(0.3, 0)]):
        assert late.measured
        assert late.ok, late.reasons
        assert late.measures["gap_p95_mm"] == 0
    # What lies next to a scan in doubt is in doubt.
    assert said(verdicts(known(), slow, [0.5])[0], "t = 1, next to this time, is in doubt")


def test_times_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Julian days a week apart must not read the same."""
    days = (2460000, 2460007)
    scans = load_series([blobs(), blobs((0, 0, 6))], days, window=(0, 1))
    monkeypatch.setattr(trust, "exchanged", lambda *_: (0, 1, 50.0))
    verdict = verdicts(known(days), scans, [2460003.5])[0]
    assert said(verdict, "t = 2460007, next to this time, is in doubt")
    assert said(verdict, "t = 2460000 and 2460007 exchanged")


def test_worse_is_what_agreed_better_at_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    series = load_series([blobs(), blobs()], [0, 1], window=(0, 1))
    for before, worse in ((0.8, False), (0.95, True)):
        monkeypatch.setattr(trust, "agreement", lambda *_, before=before: half_reached(before))
        assert said(verdicts(known(), series, [1])[0], "the fit made it worse") == worse


def test_what_no_other_fit_has_seen_is_told() -> None:
    """Without a word, an uncertainty that isn't known would pass as a small one."""
    scans = load_series([blobs(), blobs(), blobs()], [0, 1, 2], window=(0, 1))
    model, unaware, aware = known((0, 1, 2)), known((0, 2)), known((0, 1, 2))
    assert said(verdicts(model, scans, [1], fits=[unaware])[0], "no other fit has seen this scan")
    assert verdicts(model, scans, [1], fits=[unaware, aware])[0].ok


def test_tissue_that_no_tissue_is() -> None:
    series = load_series([blobs(), blobs()], [0, 1], window=(0, 1))
    # e^(3 · 0.6) = 6: beyond fivefold.
    assert said(verdicts(known(linear=0.6), series, [1], limits=Limits(inverse_mm=99))[0], "ml of tissue grow")
    assert not said(verdicts(known(linear=0.3), series, [1])[0], "ml of tissue")
    # Towards the reference it contracts, e^(−3 · 0.3) = 0.41: since then it has grown.
    limits = Limits(jacobian=(0.5, 100), inverse_mm=99)
    assert said(verdicts(known(linear=-0.3), series, [1], limits=limits)[0], "grow beyond 2 or shrink below 0.01")
    assert said(
        verdicts(known(linear=0.3), series, [1], limits=Limits(jacobian=(0, 2), inverse_mm=99))[0], "below 0.5"
    )


def test_refits_that_disagree() -> None:
    series = load_series([blobs(), blobs()], [0, 1], window=(0, 1))
    near, far = [known(shift_mm=(1, 0, 0))] * 2, [known(shift_mm=(0, 5, 0))] * 2
    assert verdicts(known(), series, [1], fits=near)[0].ok
    verdict = verdicts(known(), series, [1], fits=far)[0]
    assert said(verdict, "more than 5.0 mm elsewhere")
    assert verdict.measures["uncertainty_mean_mm"] == pytest.approx(5, abs=0.1)
    assert verdicts(known(), series, [1], fits=far, limits=Limits(uncertainty_mm=6))[0].ok


def test_a_roi_is_judged_where_it_is() -> None:
    array = np.zeros(GRID.shape, np.uint8)
    array[10:14, 10:14, 2:5] = 1
    roi = GRID.image(array)
    # Something at the other end of the scan goes dark: nothing to this ROI.
    damaged = sitk.GetArrayFromImage(blobs())
    damaged[:, :, 15:] = 0
    series = load_series([blobs(), GRID.image(damaged)], [0, 1], window=(0, 1))
    whole, there = (verdicts(known(), series, [1], roi=mask)[0] for mask in (None, roi))
    assert said(whole, "unlike the moved reference")
    assert there.ok, there.reasons
    # Target -> reference by +14 mm: the ROI, 8 mm from the border, has left the scan.
    gone = verdicts(known(shift_mm=(14, 0, 0)), series, [1], roi=roi)[0]
    assert said(gone, "leaves the scan's field of view")
    # Altogether: that there is nothing to compare goes without saying.
    lost = verdicts(known(shift_mm=(40, 0, 0)), series, [1], roi=roi)[0]
    assert lost.reasons == ("100 % of the ROI leaves the scan's field of view",)


def test_the_way_back_is_judged_in_the_roi() -> None:
    array = np.zeros(GRID.shape, np.uint8)
    array[11:13, 12:14, 14:16] = 1
    series, model = load_series([blobs(), blobs()], [0, 1], window=(0, 1)), known(linear=0.6)
    whole, there = (verdicts(model, series, [1], roi=roi)[0] for roi in (None, GRID.image(array)))
    assert said(whole, "to this time and back")  # at the border, from where the field is continued
    assert there.measures["inverse_p95_mm"] < 1e-2


def test_what_of_a_roi_the_reference_does_not_show() -> None:
    """Motion is a guess there, at every time, however well scans agree beside it."""
    model = known(slices=12)
    series = load_series([model.grid.image(model.reference_voxels), blobs()], [0, 1], window=(0, 1))
    array = np.zeros(GRID.shape, np.uint8)
    array[10:20, 8:18, 8:18] = 1
    for verdict in verdicts(model, series, [0, 0.5, 1], roi=GRID.image(array)):
        assert verdict.reasons[0].startswith("80 % of the ROI lies outside the reference")
        assert verdict.measures["outside_reference_percent"] == pytest.approx(80)


def test_silence_is_no_consent() -> None:
    """Where nothing can be compared the verdict is not ok."""
    flat = GRID.image(np.full(GRID.shape, 0.5, np.float32))
    edge = sitk.GetArrayFromImage(flat)
    edge[:, :, -2:] = 0.9  # a scan isn't all of one value
    series = load_series([blobs(), GRID.image(edge)], [0, 1], window=(0, 1))
    model = known()
    model.reference_voxels = edge
    array = np.zeros(GRID.shape, np.uint8)
    array[10:14, 10:14, 4:7] = 1
    assert said(verdicts(model, series, [1], roi=GRID.image(array))[0], "nothing could be compared")


def test_a_reference_without_structure_is_no_crash() -> None:
    """Nothing to look at anywhere: the verdict says so, at a scan's time and between."""
    faint = GRID.image(np.random.default_rng(0).uniform(0.5, 0.505, GRID.shape).astype(np.float32))
    series = load_series([faint, faint], [0, 1], window=(0, 1))
    model = known()
    model.reference_voxels = sitk.GetArrayFromImage(faint)
    for verdict in verdicts(model, series, [1, 0.5]):
        assert not verdict.ok
    assert said(verdicts(model, series, [1])[0], "nothing could be compared")


def test_a_scan_is_found_a_period_later() -> None:
    series = load_series([blobs(), blobs()], [0, 1], window=(0, 1), period=4)
    model = known()
    model.def_net.time_basis = replace(model.def_net.time_basis, period=4.0)
    assert verdicts(model, series, [5])[0].agreement is not None


def test_limits_are_numbers() -> None:
    with pytest.raises(InputError, match="uncertainty_mm 'two' must be a number"):
        Limits(uncertainty_mm="two")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="jacobian"):
        Limits(jacobian=(0.1,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="least and greatest"):
        Limits(jacobian=(5.0, 0.2))


def test_a_series_of_another_reference_is_refused() -> None:
    series = load_series([blobs(), blobs()], [0, 1], window=(0, 1), reference=1)
    with pytest.raises(InputError, match="reference"):
        verdicts(known(), series)


# -- fits that are broken on purpose


def risen(by_mm: float) -> sitk.Image:
    """The blobs with their middle lifted, fading over some centimetres."""
    apart_mm = np.linalg.norm(GRID.points_world() - GRID.centre_mm, axis=-1)
    return blobs(np.exp(-((apart_mm / 45) ** 2))[..., None] * np.array([0.0, 0.0, by_mm]))


@pytest.fixture(scope="module")
def scans() -> Series:
    """Four scans of a steady motion, each with a time function of its own."""
    return load_series([risen(4.0 * i) for i in range(4)], [0, 1, 2, 3], window=(0, 1))


@pytest.fixture(scope="module")
def good(scans: Series) -> STNeRP:
    return fit_deformation(scans, **QUICK)


def changed(series: Series, index: int, change: Callable[[np.ndarray], np.ndarray]) -> Series:
    """The series with one image changed."""
    images = list(series.images)
    images[index] = Grid.of(images[index]).image(change(sitk.GetArrayFromImage(images[index])))
    return load_series(images, series.times, period=series.period, window=series.window)


def test_a_good_fit_is_ok_everywhere(good: STNeRP, scans: Series) -> None:
    fits = trust.refits(scans, 2, **QUICK)
    found = verdicts(good, scans, [0, 1, 2, 3, 0.5, 2.5], fits=fits)
    assert [verdict.reasons for verdict in found] == [()] * 6
    assert found[2].row()["verdict"] == "ok"
    assert found[3].measures["correlation"] > found[3].measures["correlation_before"] + 0.03


@pytest.mark.parametrize("broken", [{"levels": [(6, 12, 2)]}, {"learning_rate": 1.0}], ids=["too short", "rate"])
def test_a_fit_that_failed(scans: Series, broken: dict[str, Any]) -> None:
    verdict = verdicts(fit_deformation(scans, **{**QUICK, **broken}), scans, [3])[0]
    assert not verdict.ok
    # Steps of 30 mm throw the reference out of the scan; two steps leave the motion to be found.
    assert said(verdict, "motion was not found" if "levels" in broken else "lies within the moved reference")


def other_patient(array: np.ndarray) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(0).standard_normal(array.shape), 2.2)
    return (0.5 + 0.2 * noise / noise.std()).astype(np.float32)


# Each leaves other traces: a flip or a shift is found in part, black is unlike anything.
DAMAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "another patient": other_patient,
    "mirrored": lambda array: np.ascontiguousarray(array[:, :, ::-1]),
    "28 mm off": lambda array: np.roll(array, 7, axis=0),
    "half black": lambda array: np.where(np.arange(24)[:, None, None] < 12, np.float32(0), array),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_image(scans: Series, name: str) -> None:
    series = changed(scans, 2, DAMAGES[name])
    verdict, beside = verdicts(fit_deformation(series, **QUICK), series, [2, 2.5])
    assert not verdict.ok
    assert not beside.ok
    if name in ("another patient", "half black"):
        assert said(verdict, "unlike the moved reference")
        assert said(beside, "t = 2, next to this time, is in doubt")


def test_scans_in_the_wrong_order(scans: Series) -> None:
    wrong = load_series([scans.images[i] for i in (0, 2, 1, 3)], scans.times, window=(0, 1))
    model = fit_deformation(wrong, **QUICK)
    # Each scan has a time function of its own, so that each is well explained: only the order is wrong.
    assert [said(verdict, "t = 1 and 2 exchanged") for verdict in verdicts(model, wrong, [1, 1.5, 2])] == [
        True
    ] * 3
    assert len(verdicts(model, wrong, [1])[0].reasons) == 1


# -- the script


def script(*arguments: str) -> None:
    before, sys.argv = sys.argv, ["trust.py", *arguments]
    try:
        importlib.import_module("run_directory").launch(importlib.import_module("trust").main)
    finally:
        sys.argv = before


def test_the_script_writes_maps_and_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], good: STNeRP,
    scans: Series,
) -> None:  # fmt: skip
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    aligned, titles = [], []

    def quick(*arguments: Any, align: str, **common: Any) -> list[STNeRP]:
        aligned.append(align)
        return trust.refits(*arguments, align=align, levels=[(12, 24, 5)], **common)

    def draw(path: Path, columns: list[dict[str, Any]], **settings: Any) -> Path:
        titles.extend(column["title"] for column in columns)
        return report.trust_overview(path, columns, **settings)

    monkeypatch.setattr(importlib.import_module("trust"), "refits", quick)
    monkeypatch.setattr(importlib.import_module("trust"), "trust_overview", draw)
    good.save(tmp_path / "model.pt")
    for i, image in enumerate(scans.images):
        sitk.WriteImage(image, str(tmp_path / f"{i}.nii.gz"))
    files = ", ".join(f"{tmp_path}/{i}.nii.gz" for i in range(4))
    (tmp_path / "train_def.yaml").write_text(
        f"data: {{kind: files, images: [{files}], times: [0, 1, 2, 3], period: null, reference: 0, "
        "window: [0, 1], masks: null, landmarks: null, label_names: null, contours: null}\nalign: none\n"
    )
    common = [f"out={tmp_path}", "times=[2,2.5000001]", "progress=false", "refits=2"]
    script(*common, "limits={uncertainty_mm: 0.01}")
    with (tmp_path / "trust" / "trust.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["verdict"] for row in rows] == ["look here"] * 2
    assert [row["measured"] for row in rows] == ["True", "False"]
    assert float(rows[0]["correlation"]) > 0.8
    written = {path.name for path in (tmp_path / "trust").glob("*.nii.gz")}
    maps = {"uncertainty_mm", "inverse_consistency_mm"}
    assert written == {f"t{t}_{name}.nii.gz" for t in (2, 2.5000001) for name in maps} | {
        "t2_correlation.nii.gz", "t2_difference.nii.gz"
    }  # fmt: skip
    assert (tmp_path / "trust" / "trust.png").stat().st_size > 0
    assert aligned == ["none"]  # as the fit itself was
    printed = capsys.readouterr().out
    assert "t = 2.5000001: look here: " in printed
    assert titles == ["t = 2", "t = 2.5000001, no scan"]
    assert "other fits of the same scans" in printed
    for wrong, says in (
        ("{certainty: 2}", "uncertainty_mm"),
        ("2", "limits: 2 must"),
        ("[2]", "limits: [2] must"),
    ):
        with pytest.raises(SystemExit):
            script(*common, "overwrite=true", f"limits={wrong}")
        assert says in capsys.readouterr().err
    (tmp_path / "trust" / "t1_notes.txt").touch()
    script(common[0], "times=[3]", "refits=0", "overwrite=true")  # maps of other times go, nobody else's files
    left = {path.name for path in (tmp_path / "trust").iterdir()}
    assert left == {"trust.csv", "trust.png", "t1_notes.txt"} | {
        f"t3_{name}.nii.gz" for name in ("inverse_consistency_mm", "correlation", "difference")
    }
