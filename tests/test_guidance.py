"""Contours and landmarks: zero where the motion is right, a pull towards it elsewhere, else nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DIRECTIONS, make_grid
from test_fit import BRIEF, SMALL, tre_mm

from stnerp import InputError, Series, STNeRP, fit_deformation, load_series, losses
from stnerp.geometry import Grid, apply_affine
from stnerp.guidance import SURFACE_POINTS, Guide, guides_of, image_at, signed_distance, surface_points
from stnerp.phantom import Phantom
from stnerp.presets import DefNetSettings

BOTH = DefNetSettings(contours=1.0, landmarks=1.0)
# Oblique, left-handed and anisotropic. The second image shows what the reference shows, so many voxels further.
GRID = make_grid(DIRECTIONS["oblique, left-handed"], (30, 28, 24), (2.0, 3.0, 4.0))
SHIFT = np.array([2, -1, 1])
SHIFT_MM = GRID.vectors_to_world(SHIFT * np.array(GRID.spacing_mm))


def blobs(index: np.ndarray) -> np.ndarray:
    """Two ellipsoids, labels 1 and 7, at continuous indices (..., 3)."""
    labels = np.zeros(index.shape[:-1], np.uint8)
    labels[(((index - (11, 14, 12)) / (6, 5, 4)) ** 2).sum(-1) < 1] = 1
    labels[(((index - (21, 12, 11)) / (3, 4, 3)) ** 2).sum(-1) < 1] = 7
    return labels


def shifted(**known: Any) -> Series:
    """Two images, the second shifted by SHIFT voxels, with masks and landmarks, unless given otherwise."""
    z, y, x = np.meshgrid(*map(np.arange, GRID.shape), indexing="ij")
    index = np.stack([x, y, z], axis=-1)
    masks = [blobs(index), blobs(index - SHIFT)]
    points = GRID.index_to_world(np.array([[8.0, 9.0, 7.0], [15.5, 20.0, 12.0], [20.0, 11.0, 16.25]]))
    defaults: dict[str, Any] = {
        "masks": [GRID.image(mask) for mask in masks],
        "landmarks": [points, points + SHIFT_MM],
    }
    images = [GRID.image(mask.astype(np.float32)) for mask in masks]
    return load_series(images, [0.0, 1.0], window=(0, 7), **{**defaults, **known})


def guides(series: Series, alignment: np.ndarray | None = None) -> dict[str, Guide]:
    """Those of the second image."""
    alignments = np.stack([np.eye(4), np.eye(4) if alignment is None else alignment])
    return guides_of(series, alignments, BOTH)[1]


def constant(axis_mm: np.ndarray) -> torch.Tensor:
    """A displacement that is the same everywhere, in cube units."""
    cube = torch.as_tensor(axis_mm / np.array(GRID.half_extent_mm), dtype=torch.float32)
    return cube[None, :, None, None, None].expand(1, 3, 5, 6, 7)


TRUE = constant(-SHIFT * np.array(GRID.spacing_mm))  # target -> reference: back again


# -- surfaces


def ball(radius_mm: float, grid: Grid) -> sitk.Image:
    """Label 3 in a ball around the grid's centre."""
    r = np.linalg.norm(grid.points_world() - grid.centre_mm, axis=-1)
    return grid.image((r < radius_mm).astype(np.uint8) * 3)


def test_distance_to_a_ball(any_grid: Grid) -> None:
    grid = make_grid(np.reshape(any_grid.direction, (3, 3)), (41, 37, 33), (1.0, 1.2, 1.4))
    distance, box = signed_distance(ball(15.0, grid), 3)
    true = 15.0 - np.linalg.norm(box.points_world() - grid.centre_mm, axis=-1)
    near = np.abs(true) < 2.5
    # In voxels of 1 to 1.4 mm. Stairs are a voxel high; the Gaussian leaves less than half of that.
    assert np.abs(distance - true)[near].mean() < 0.3
    assert np.abs(distance - true)[near].max() < 0.8
    # Far away it is somewhat short: to the last voxels of either side, the mean of which lies before the surface.
    assert np.abs(distance - true)[true > -10].max() < 3.0
    points = surface_points(distance, box)
    off = np.linalg.norm(points - grid.centre_mm, axis=1) - 15.0
    assert np.abs(off).mean() < 0.2
    assert 1000 < len(points) <= SURFACE_POINTS
    assert np.array_equal(points[:100], surface_points(distance, box, 100))


def test_no_surface_where_the_image_ends() -> None:
    half = np.zeros(GRID.shape, np.uint8)
    half[:12] = 1  # of 24 slices: one face inside the image, five at its border
    points = surface_points(*signed_distance(GRID.image(half), 1))
    assert np.abs(GRID.world_to_index(points)[:, 2] - 11.5).max() < 1e-3


def test_distances_count_as_huber_s() -> None:
    near, far = (losses.robust_distance(torch.tensor([d**2], dtype=torch.float64)) for d in (1e-3, 1e3))
    assert float(near) == pytest.approx(1e-6 / 2, rel=1e-5)  # d²/2s
    assert float(far) == pytest.approx(1e3 - 1, rel=1e-5)  # d − s
    both = losses.robust_distance(torch.tensor([0.0, 9.0]), scale_mm=4.0)
    assert float(both) == pytest.approx((0 + 5 - 4) / 2)


# -- zero where the motion is right


@pytest.mark.parametrize("name", ["contours", "landmarks"])
def test_a_perfect_fit_costs_nothing(name: str) -> None:
    guide = guides(shifted())[name]
    # Float32 at points some 10 mm from the centre: 1e-6 mm, whose square is divided by 2 mm.
    assert float(guide(TRUE)) < 1e-6
    assert float(guide(0 * TRUE)) > 1.0
    assert float(guide(-TRUE)) > 1.5 * float(guide(0 * TRUE))  # the wrong way round


def test_landmarks_cost_their_distance() -> None:
    guide = guides(shifted())["landmarks"]
    distance_mm = float(np.linalg.norm(SHIFT_MM))
    assert float(guide(0 * TRUE)) == pytest.approx(np.sqrt(distance_mm**2 + 1) - 1, rel=1e-5)
    assert float(guide(-TRUE)) == pytest.approx(np.sqrt(4 * distance_mm**2 + 1) - 1, rel=1e-5)


def test_landmarks_beyond_a_field_of_view_do_not_guide(caplog: pytest.LogCaptureFixture) -> None:
    inside, far = GRID.index_to_world(np.array([[8.0, 9.0, 7.0], [15.5, 20.0, 12.0]])), np.full((1, 3), 1e3)
    known = shifted(landmarks=[np.concatenate([inside, far]), np.concatenate([inside + SHIFT_MM, far + 50])])
    alone = shifted(landmarks=[inside, inside + SHIFT_MM])
    for u in (TRUE, 0 * TRUE):
        all_of_them, two = (float(guides(series)["landmarks"](u)) for series in (known, alone))
        assert all_of_them == pytest.approx(two, abs=1e-6)
    assert "1 of 3 lie outside" in caplog.text
    with pytest.raises(InputError, match=r"landmarks: .* none lies in its image"):
        guides(shifted(landmarks=[np.concatenate([inside[:1], far]), np.concatenate([far, inside[:1]])]))


@pytest.mark.parametrize("name", ["contours", "landmarks"])
def test_the_gradient_points_the_right_way(name: str) -> None:
    guide = guides(shifted())[name]
    still = torch.zeros_like(TRUE).requires_grad_()
    guide(still).backward()
    assert still.grad is not None
    pull = -still.grad.sum((2, 3, 4))[0]
    towards = TRUE[0, :, 0, 0, 0]
    assert float(torch.nn.functional.cosine_similarity(pull, towards, dim=0)) > 0.5
    assert float(guide(0.1 * TRUE)) < float(guide(0 * TRUE)) < float(guide(-0.1 * TRUE))


@pytest.mark.parametrize("name", ["contours", "landmarks"])
def test_pre_alignment_counts(name: str) -> None:
    alignment = np.eye(4)
    alignment[:3, 3] = SHIFT_MM  # reference -> target: the whole motion
    assert float(guides(shifted(), alignment)[name](0 * TRUE)) < 1e-6
    assert float(guides(shifted(), np.linalg.inv(alignment))[name](0 * TRUE)) > 2.0
    points = shifted().landmarks[0]
    assert points is not None
    assert np.abs(apply_affine(alignment, points) - shifted().landmarks[1]).max() < 1e-9


def test_what_the_reference_cuts_off_pulls_nowhere() -> None:
    """A ball of which the reference shows the lower part: what the target shows besides has nothing to meet."""
    whole = Grid((30, 30, 30), (4.0, 4.0, 4.0), (-58.0, -58.0, -58.0))
    radius_mm = np.linalg.norm(whole.points_world(), axis=-1)
    image, mask = whole.image((100 - radius_mm).astype(np.float32)), whole.image((radius_mm < 40).astype(np.uint8))
    series = load_series([image[:, :, :16], image], [0.0, 1.0], masks=[mask[:, :, :16], mask])
    guide = guides_of(series, np.stack([np.eye(4)] * 2), DefNetSettings(contours=1.0))[1]["contours"]
    still = torch.zeros(1, 3, 8, 15, 15, requires_grad=True)
    cost = guide(still)
    cost.backward()
    assert float(cost.detach()) < 0.02  # of masks smoothed beside a border; with what is cut off it would be 3 mm
    upwards = torch.full((1, 3, 8, 15, 15), 0.0)
    upwards[:, 2] = -0.1  # points come from 0.1 half extents further down, 3 mm
    assert float(guide(upwards)) > 0.5


def test_every_label_counts_alike() -> None:
    both = guides(shifted())["contours"]
    z, y, x = np.meshgrid(*map(np.arange, GRID.shape), indexing="ij")
    labels = blobs(np.stack([x, y, z], axis=-1))
    alone = [
        guides(shifted(masks={0: GRID.image(labels * (labels == label)), 1: shifted().masks[1]}))["contours"]
        for label in (1, 7)
    ]
    assert float(both(0 * TRUE)) == pytest.approx(sum(float(one(0 * TRUE)) for one in alone) / 2, rel=1e-5)


# -- in a fit


@pytest.fixture(scope="module")
def noisy() -> tuple[Phantom, Series]:
    """Five phases in so much noise that the images alone say little, with all masks and some landmarks."""
    phantom = Phantom(size=(36, 28, 18), spacing_mm=10.0, noise_hu=600.0, n_landmarks=60)
    times = phantom.times(5)
    series = load_series(
        [phantom.image(t) for t in times],
        times,
        period=1.0,
        window="ct",
        masks=[phantom.labels(t) for t in times],
        landmarks=[phantom.landmarks(t)[::3] for t in times],
    )
    return phantom, series


def test_off_is_the_same_to_the_bit(phantom: Phantom, phantom_series: Series) -> None:
    times = phantom_series.times
    known = load_series(
        list(phantom_series.images),
        times,
        period=1.0,
        window="ct",
        masks=[phantom.labels(t) for t in times],
        landmarks=[phantom.landmarks(t) for t in times],
    )
    plain, unguided = (fit_deformation(series, None, **BRIEF) for series in (phantom_series, known))
    assert plain.history == unguided.history
    fields = [sitk.GetArrayFromImage(model.displacement(0.4)) for model in (plain, unguided)]
    assert np.array_equal(*fields)


@pytest.mark.parametrize("weights", [{"landmarks": 0.02}, {"contours": 0.05}], ids=str)
def test_guidance_at_two_times_helps_at_the_others(
    noisy: tuple[Phantom, Series], weights: dict[str, float]
) -> None:
    phantom, series = noisy
    plain = fit_deformation(series, None, **SMALL)
    guided = fit_deformation(series, None, guided_times=[0.2, 0.6], **weights, **SMALL)

    def error_mm(model: STNeRP, times: list[float]) -> float:
        return float(np.mean([tre_mm(model, phantom, t) for t in times]))

    # At the guided times themselves, at measured ones without guidance, and between all of them.
    for times, left in (([0.2, 0.6], 0.7), ([0.4, 0.8], 0.85), ([0.1, 0.3, 0.5, 0.7, 0.9], 0.8)):
        assert error_mm(guided, times) < left * error_mm(plain, times)
    name = next(iter(weights))
    assert guided.history[-1][name] < 0.7 * guided.history[0][name]
    assert getattr(guided.settings, name) == weights[name]


def test_loss_holds_the_guidance(noisy: tuple[Phantom, Series]) -> None:
    weights = {"contours": 0.05, "landmarks": 0.02}
    for row in fit_deformation(noisy[1], None, **weights, **BRIEF).history:
        terms = {name: value for name, value in row.items() if name not in ("step", "level", "loss")}
        assert set(weights) < set(terms)
        assert row["loss"] == pytest.approx(sum(terms.values()), rel=1e-5)


# -- errors


@pytest.mark.parametrize(
    ("known", "settings", "guided_times", "says"),
    [
        ({}, {}, [1.0], "guided_times: nothing guides"),
        ({}, {"contours": 0.1}, [0.5], "guided_times: 0.5 is not the time"),
        ({}, {"contours": 0.1}, [0.0], "guided_times: 0.0 is not the time"),
        ({"masks": None}, {"contours": 0.1}, None, "contours: none are known on the reference"),
        ({"landmarks": {0: [[1.0, 2.0, 3.0]]}}, {"landmarks": 0.1}, None, "landmarks: .* none are known at the"),
        ({"masks": {0: 1, 1: 2}}, {"contours": 0.1}, None, "no label in common"),
        ({}, {"contours": -0.1}, None, "contours: -0.1 must be"),
    ],
)
def test_guidance_that_is_not_there_is_refused(
    known: dict[str, Any], settings: dict[str, float], guided_times: list[float] | None, says: str
) -> None:
    if "landmarks" in known:
        known = {"landmarks": {0: shifted().landmarks[0]}}
    if known.get("masks"):
        first = sitk.GetArrayFromImage(shifted().masks[0]).clip(0, 1)
        known = {"masks": {i: GRID.image(first * label) for i, label in known["masks"].items()}}
    with pytest.raises(InputError, match=says):
        fit_deformation(shifted(**known), None, align="none", guided_times=guided_times, **settings, **BRIEF)


def test_a_time_without_guidance_is_refused(phantom: Phantom, phantom_series: Series) -> None:
    series = load_series(
        list(phantom_series.images), phantom_series.times, period=1.0, window="ct",
        landmarks={0: phantom.landmarks(0.0), 1: phantom.landmarks(0.25)},
    )  # fmt: skip
    with pytest.raises(InputError, match=r"nothing is known at 0\.75"):
        fit_deformation(series, None, landmarks=0.1, guided_times=[0.25, 0.75], **BRIEF)


def test_a_time_may_be_a_number_of_numpy_s() -> None:
    assert image_at(shifted(), np.float32(1.0), "init") == image_at(shifted(), np.int64(1), "init") == 1
    with pytest.raises(InputError, match="init: 'x' is not the time of an image"):
        image_at(shifted(), "x", "init")  # type: ignore[arg-type]
