"""A known motion is found, in the right direction, by every form of the fit; and bad settings end it early."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from stnerp import (
    FitError,
    InputError,
    RefNet,
    Series,
    STNeRP,
    fit,
    fit_deformation,
    fit_reference,
    load_series,
    losses,
    presets,
    resume,
)
from stnerp.checkpoint import read_checkpoint
from stnerp.def_net import FactorisedDefNet, def_net_of
from stnerp.fit import VELOCITY_PENALTIES, _Level, _points_within
from stnerp.geometry import Grid, apply_affine, homogeneous
from stnerp.losses import LocalNCC
from stnerp.phantom import Phantom
from stnerp.preprocess import normalised
from stnerp.presets import FAST, Level
from stnerp.resume import KIND
from stnerp.time_basis import TimeBasis
from stnerp.velocity import exponential
from stnerp.warp import pulled_back
from stnerp.watch import Watch
from stnerp.window import Window

# For images of 10 mm voxels. Lengths and network, that is; the scheme is the default one.
SMALL: dict[str, Any] = {
    "layers": 3,
    "width": 64,
    "fourier_width": 32,
    "window_mm": 30.0,
    "levels": [(20, 20, 20), (10, 20, 20)],
    "learning_rate": 3e-3,
    "progress": False,
    "device": "cpu",
}
BRIEF: dict[str, Any] = {**SMALL, "levels": [(20, 20, 3)]}
# Steps that differ by rounding alone stay together; with noise of 0.005, flat windows have gradients of rounding.
ROUNDING: dict[str, Any] = {**BRIEF, "levels": [(20, 20, 3), (15, 20, 3)], "detail_mm": None, "noise": 0.05}


def tre_mm(model: STNeRP, phantom: Phantom, t: float, times: float = 1.0) -> float:
    """Mean landmark error at time t, with the model's displacement taken so many times."""
    points = phantom.landmarks(t)
    moved = points + times * (model.map_points(points, t) - points)
    return float(np.linalg.norm(moved - phantom.reference_landmarks, axis=1).mean())


@pytest.fixture(scope="module")
def ref_net(phantom_series: Series) -> RefNet:
    return fit_reference(
        phantom_series, iterations=150, fraction_per_step=0.25, grid_levels=3, progress=False, device="cpu"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"prior": False},
        {"prior": True},
        {"prior": True, "reference": "network"},
        {"prior": False, "loss": "mse", "diffusion": 0.005, "total_variation": 0.005},  # it is ten times smaller
        {"prior": False, "loss": "global_ncc"},
    ],
    ids=str,
)
def test_known_motion_is_found(
    phantom: Phantom, phantom_series: Series, ref_net: RefNet, settings: dict[str, Any]
) -> None:
    prior = ref_net if settings["prior"] else None
    chosen = {**SMALL, **{name: value for name, value in settings.items() if name != "prior"}}
    model = fit_deformation(phantom_series, prior, **chosen)
    for t in phantom_series.times[1:]:
        before = tre_mm(model, phantom, t, times=0)
        # 5 to 8 mm of motion in voxels of 10 mm: half of it is gone after a second's fit, and mostly more.
        assert tre_mm(model, phantom, t) < 0.55 * before
        # The other direction doubles it.
        assert tre_mm(model, phantom, t, times=-1) > 1.4 * before
    assert (sitk.GetArrayFromImage(model.jacobian(0.5)) > 0).all()
    assert len(model.history) == 40
    assert {"step", "level", "loss", "diffusion"} <= set(model.history[0])
    assert (model.times, model.reference_time, model.period) == (phantom_series.times, 0.0, 1.0)


def test_image_of_the_fit_resembles_the_target(phantom_series: Series) -> None:
    model = fit_deformation(phantom_series, None, **SMALL)
    target = sitk.GetArrayFromImage(phantom_series.images[2]).clip(-1000, 1000).astype(float)
    moved = sitk.GetArrayFromImage(model.image(0.5)).astype(float)
    still = sitk.GetArrayFromImage(phantom_series.images[0]).clip(-1000, 1000).astype(float)
    assert ((moved - target) ** 2).mean() < 0.5 * ((still - target) ** 2).mean()


def test_unseen_phase_is_predicted(phantom: Phantom, phantom_series: Series) -> None:
    # Half the motion lies between the measured phases 0 and 0.25; a model of the nearest one would miss it.
    model = fit_deformation(phantom_series, None, **SMALL)
    t = 0.375
    assert tre_mm(model, phantom, t) < 0.5 * tre_mm(model, phantom, t, times=0)


def shifted_series(shift_mm: tuple[float, float, float], **kwargs: Any) -> Series:
    """Two scans of one patient who only lies elsewhere at the second: every point is moved by the shift."""
    still = Phantom(size=(30, 24, 16), spacing_mm=12.0, noise_hu=0.0)
    # The same anatomy seen through a grid whose header says it lies elsewhere.
    image = still.image(0.0)
    moved = sitk.Image(image)
    moved.SetOrigin([o + s for o, s in zip(image.GetOrigin(), shift_mm, strict=True)])
    return load_series([image, moved], [0.0, 10.0], window="ct", **kwargs)


@pytest.mark.parametrize("align", ["auto", "rigid", "affine"])
def test_follow_up_scans_are_aligned_first(align: str) -> None:
    shift_mm = np.array([22.0, -15.0, 12.0])
    model = fit_deformation(shifted_series(tuple(shift_mm)), None, align=align, **BRIEF)  # type: ignore[arg-type]
    points = np.array([[-60.0, 0.0, 0.0], [0.0, -20.0, 30.0], [70.0, 30.0, -20.0]])
    # Reference -> target in the file, target -> reference in the answer: the whole way, pre-alignment included.
    assert np.abs(model.alignments[0] - np.eye(4)).max() == 0
    assert np.abs(model.alignments[1][:3, 3] - shift_mm).max() < 1.5
    assert np.linalg.norm(model.map_points(points + shift_mm, 10.0) - points, axis=1).max() < 3
    assert np.linalg.norm(model.map_points(points, 10.0, inverse=True) - points - shift_mm, axis=1).max() < 3


def test_alignment_is_left_out_where_asked_and_for_cycles(phantom_series: Series) -> None:
    identity = np.stack([np.eye(4)] * 4)
    assert np.array_equal(fit_deformation(phantom_series, None, **BRIEF).alignments, identity)
    model = fit_deformation(shifted_series((12.0, 0.0, 0.0)), None, align="none", **BRIEF)
    assert np.array_equal(model.alignments, identity[:2])


def test_reference_anywhere_in_the_series(phantom: Phantom) -> None:
    times = [0.0, 0.25, 0.5]
    series = load_series([phantom.image(t) for t in times], times, reference=2, period=1.0, window="ct")
    model = fit_deformation(series, None, **BRIEF)
    assert model.reference_time == 0.5
    assert np.abs(sitk.GetArrayFromImage(model.displacement(0.5))).max() < 1e-9
    assert np.abs(sitk.GetArrayFromImage(model.displacement(0.0))).max() > 0


def test_targets_on_another_grid_are_met_in_world_space(phantom: Phantom) -> None:
    other = Grid((32, 26, 20), (11.0, 10.0, 9.0), (160.0, -125.0, -85.0), (-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    exhaled = Phantom(grid=other, noise_hu=0.0, n_landmarks=60).image(0.5)
    series = load_series([phantom.image(0.0), exhaled], [0.0, 0.5], period=1.0, window="ct")
    model = fit_deformation(series, None, **SMALL)
    assert tre_mm(model, phantom, 0.5) < 0.55 * tre_mm(model, phantom, 0.5, times=0)
    assert Grid.of(model.image(0.5, exhaled)).is_close(other)


# -- the paper's preset


# The paper's networks made small; ω₀ 10 and higher rates, so that a few steps suffice.
TINY: dict[str, Any] = {
    "preset": "paper",
    "layers": 3,
    "width": 32,
    "fourier_width": 16,
    "omega": 10.0,
    "progress": False,
    "device": "cpu",
}


@pytest.mark.parametrize("prior", [True, False])
def test_paper_preset_learns(phantom_series: Series, ref_net: RefNet, prior: bool) -> None:
    levels = [(None, None, 15)]
    model = fit_deformation(phantom_series, ref_net if prior else None, learning_rate=3e-4, levels=levels, **TINY)
    assert model.history[-1]["loss"] < 0.98 * model.history[0]["loss"]
    assert model.lattice == phantom_series.grid
    assert model.settings.squarings == 7
    assert set(model.history[0]) == {"step", "level", "loss", "mse"}


def test_paper_preset_from_end_to_end(phantom_series: Series) -> None:
    ref_net = fit_reference(phantom_series, iterations=40, learning_rate=3e-3, **TINY)
    assert ref_net.settings.backbone == "siren"
    assert ref_net.history[-1]["loss"] < ref_net.history[0]["loss"]
    model = fit_deformation(phantom_series, ref_net, levels=[(None, None, 2)], **TINY)
    # So rough a Ref-Net says little about motion: what is checked is that a SIREN is read at moved points.
    first = sum(
        float(((model.window.normalise(sitk.GetArrayFromImage(image)) - ref_net.render()) ** 2).mean())
        for image in phantom_series.images[1:]
    )
    # The fit starts at the identity, but for velocities of a hundredth.
    assert model.history[0]["loss"] == pytest.approx(first / 3, rel=0.02)
    assert np.isfinite(sitk.GetArrayFromImage(model.image(0.3))).all()


@pytest.mark.parametrize("thick_one", [0, 1], ids=["reference", "target"])
def test_slices_of_two_thicknesses_are_compared_at_one(thick_one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same thing twice, once in slices three times as thick: at rest they should agree."""
    fine = Grid((30, 28, 36), (4.0, 4.0, 2.0))
    noise = np.random.default_rng(0).normal(size=fine.shape)
    voxels = scipy.ndimage.gaussian_filter(noise, (2, 1.5, 1.5))
    thick = Grid((30, 28, 12), (4.0, 4.0, 6.0), (0.0, 0.0, 2.0))
    images = [fine.image(voxels), thick.image(voxels.reshape(12, 3, 28, 30).mean(1))]
    series = load_series(images[:: 1 - 2 * thick_one][::-1], [0.0, 1.0], window=(voxels.min(), voxels.max()))
    losses = []
    for as_it_is in (True, False):
        if not as_it_is:
            monkeypatch.setattr(presets, "thinner_sigma_mm", lambda grid, other: (0.0, 0.0, 0.0))
            monkeypatch.setattr(fit, "thicker_sigma_mm", lambda grid, other: (0.0, 0.0, 0.0))
        found = fit_deformation(series, align="none", levels=[(2, 8, 1)], progress=False)
        losses.append(found.history[0]["local_ncc"])
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("axes", [(), (2,), (0, 2), (0, 1, 2)])
def test_points_within_a_voxel_have_its_moments(axes: tuple[int, ...]) -> None:
    sigma = np.array([0.2, 0.27, 0.289]) * [axis in axes for axis in range(3)]
    points = _points_within(sigma)
    weights, at = np.array([weight for weight, _ in points]), np.array([at for _, at in points])
    assert len(points) == (6 if len(axes) == 3 else 2 * len(axes) + 1)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights @ at, 0, atol=1e-12)
    np.testing.assert_allclose((at.T * weights) @ at, np.diag(sigma**2), atol=1e-12)
    np.testing.assert_allclose(weights @ at**4, 3 * sigma**4, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 2], ids=["z", "x"])
@pytest.mark.parametrize("level_mm", [None, 2.0])
def test_a_thin_reference_is_averaged_over_a_target_s_thick_slice(axis: int, level_mm: float | None) -> None:
    """The same thing in voxels of 1 mm and in slices of 6: read at their middles alone it would be another."""
    shape = [20, 20, 20]
    shape[axis] = 48
    noise = np.random.default_rng(0).normal(size=shape)
    voxels = scipy.ndimage.gaussian_filter(noise, 2.5, mode="nearest")
    voxels = (0.5 + 0.1 * voxels / voxels.std()).astype(np.float32)
    spacing = [1.0, 1.0, 1.0]
    spacing[2 - axis] = 6.0
    origin = [0.0, 0.0, 0.0]
    origin[2 - axis] = 2.5
    fine = Grid((shape[2], shape[1], shape[0]), (1.0, 1.0, 1.0))
    slices = np.moveaxis(np.moveaxis(voxels, axis, 0).reshape(8, 6, 20, 20).mean(1), 0, axis)
    thick = Grid((slices.shape[2], slices.shape[1], slices.shape[0]), tuple(spacing), tuple(origin))
    series = load_series([fine.image(voxels), thick.image(slices)], [0.0, 1.0], window=Window(0.0, 1.0))
    level = Level(level_mm, 8, 1)
    settings = dataclasses.replace(FAST.def_net, smoothing=0.0, levels=(level,), width=8)
    net = def_net_of(fine, TimeBasis(series.times, 0.0, None), settings)
    compared = _Level(net, voxels, series, np.stack([np.eye(4)] * 2), settings, {}, level)
    target = compared.targets[1]
    still = torch.zeros(1, 3, *compared.lattice.shape)
    assert isinstance(target.similarity, LocalNCC)
    fixed = target.similarity.fixed
    middles = pulled_back(compared.reference, still, target.voxels.shape, places=target.places[0][1])
    averaged = compared._pull_back(still, target, slice(None))
    off = {"middles": middles - 0.5 - fixed, "averaged": averaged - 0.5 - fixed}
    error = {name: float(values[0, 0, 1:-1, 1:-1, 1:-1].std()) for name, values in off.items()}
    # What is left is of Simpson's rule, and of a level's Gaussian of 0.87 mm along the slices.
    assert error["averaged"] < 0.3 * error["middles"]


def test_loss_is_the_sum_of_its_terms(phantom_series: Series) -> None:
    penalties = {"bending": 2.0, "total_variation": 0.1, "folding": 1.0, "volume": 0.3}
    model = fit_deformation(phantom_series, None, **{**BRIEF, **penalties})
    for row in model.history:
        terms = [value for name, value in row.items() if name not in ("step", "level", "loss")]
        assert len(terms) == 6  # similarity and diffusion, too
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert [row["step"] for row in model.history] == [1, 2, 3]


# -- seeds, and what a step looks at


@pytest.mark.parametrize("times_per_step", [None, 1])
def test_same_seed_same_model_to_the_bit(phantom_series: Series, times_per_step: int | None) -> None:
    def displacement(seed: int) -> np.ndarray:
        model = fit_deformation(
            phantom_series, None, seed=seed, **{**BRIEF, "levels": [(20, 20, 3, times_per_step)]}
        )
        return sitk.GetArrayFromImage(model.displacement(0.4))

    first = displacement(1)
    assert np.array_equal(first, displacement(1))
    assert not np.array_equal(first, displacement(2))


def test_same_seed_with_pre_alignment() -> None:
    first, again = (fit_deformation(shifted_series((22.0, -15.0, 12.0)), None, **BRIEF) for _ in range(2))
    assert np.array_equal(first.alignments, again.alignments)
    points = np.array([[10.0, 20.0, -15.0]])
    assert np.array_equal(first.map_points(points, 10.0), again.map_points(points, 10.0))


def test_global_random_state_does_not_decide(phantom_series: Series) -> None:
    torch.manual_seed(1)
    first = fit_deformation(phantom_series, None, **BRIEF).history
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert fit_deformation(phantom_series, None, **BRIEF).history == first


def test_some_times_per_step(phantom: Phantom, phantom_series: Series) -> None:
    model = fit_deformation(phantom_series, None, **{**SMALL, "levels": [(20, 20, 20, 2), (10, 20, 20, 2)]})
    for t in phantom_series.times[1:]:
        assert tre_mm(model, phantom, t) < 0.6 * tre_mm(model, phantom, t, times=0)
    all_of_them = fit_deformation(phantom_series, None, **{**BRIEF, "levels": [(20, 20, 3, 99)]})
    assert all_of_them.history == fit_deformation(phantom_series, None, **BRIEF).history


@pytest.mark.parametrize("loss", ["local_ncc", "mse"])
def test_some_voxels_per_step(phantom: Phantom, phantom_series: Series, loss: str) -> None:
    settings = {**SMALL, "loss": loss, "diffusion": 0.05 if loss == "local_ncc" else 0.0, "voxels_per_step": 3000}
    # Which slab comes last is drawn: with 20 steps brightness alone leaves one time or another 0.65 to 0.8 of it.
    settings["levels"] = [(20, 20, 20), (10, 20, 30)]
    model = fit_deformation(phantom_series, None, **settings)
    shapes = [level.voxels(phantom_series.grid).shape for level in model.settings.levels]
    lengths = [level.steps([shape] * 3, 3000) for level, shape in zip(model.settings.levels, shapes, strict=True)]
    assert [row["level"] for row in model.history] == [1] * lengths[0] + [2] * lengths[1]
    for t in phantom_series.times[1:]:
        assert tre_mm(model, phantom, t) < 0.7 * tre_mm(model, phantom, t, times=0)


def test_ref_net_stays_as_it_was(phantom_series: Series, ref_net: RefNet) -> None:
    before = {name: value.clone() for name, value in ref_net.state_dict().items()}
    fit_deformation(phantom_series, ref_net, **{**BRIEF, "reference": "network"})
    assert all(torch.equal(value, before[name]) for name, value in ref_net.state_dict().items())


# -- errors


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"smoothness": 1.0}, "smoothness"),
        ({"preset": "best"}, "best"),
        ({"align": "similarity"}, "similarity"),
        ({"loss": "ncc"}, "ncc"),
        ({"device": "gpu"}, "gpu"),
        ({"levels": []}, "levels"),
    ],
)
def test_unknown_names_are_refused(phantom_series: Series, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        fit_deformation(phantom_series, None, **{**BRIEF, **settings})


@pytest.mark.parametrize("diffusion", [0.05, 0.0])
def test_rate_that_breaks_the_network_ends_the_fit(phantom_series: Series, diffusion: float) -> None:
    with pytest.raises(FitError, match="learning_rate"):
        fit_deformation(phantom_series, None, **{**BRIEF, "learning_rate": 3e37, "diffusion": diffusion})


def test_ref_net_of_another_grid_or_window_is_refused(phantom_series: Series, ref_net: RefNet) -> None:
    other_window = dataclasses.replace(phantom_series, window=Window(-500.0, 500.0))
    with pytest.raises(InputError, match="ref_net"):
        fit_deformation(other_window, ref_net, **BRIEF)
    smaller = Phantom(size=(30, 24, 16), spacing_mm=12.0)
    other_grid = load_series([smaller.image(t) for t in (0.0, 0.5)], [0.0, 0.5], period=1.0, window="ct")
    with pytest.raises(InputError, match="ref_net"):
        fit_deformation(other_grid, ref_net, **BRIEF)


def test_ref_net_of_another_image_is_refused(phantom: Phantom, phantom_series: Series) -> None:
    other = load_series(
        [phantom_series.images[1], phantom_series.images[0]], window=phantom_series.window, reference=0, period=10
    )
    net = fit_reference(other, iterations=1, progress=False, device="cpu", grid_levels=2)
    with pytest.raises(InputError, match="another image"):
        fit_deformation(phantom_series, net, **BRIEF)


def test_the_callers_ref_net_is_left_alone(phantom_series: Series) -> None:
    net = fit_reference(phantom_series, iterations=1, progress=False, device="cpu", grid_levels=2)
    fit_deformation(phantom_series, net, **BRIEF)
    assert all(parameter.requires_grad for parameter in net.parameters())


# -- numbers: none that is none goes unsaid, and none depends on how the work is cut


FAULTS: dict[str, tuple[Any, str]] = {
    "the value": (
        lambda field, _: field.new_tensor(float("nan")) + 0 * field.sum(),
        "diffusion is nan at step 8;",
    ),
    "the value, infinite": (lambda field, _: 0 * field.sum() + float("inf"), "diffusion is inf at step 8;"),
    "the value and its gradient": (
        lambda field, _: (field * float("nan")).sum(),
        "diffusion is nan at time 0.25;",
    ),
    "the gradient alone": (
        lambda field, _: (0 * field.sum()).sqrt(),
        "the gradient of diffusion is not finite at time 0.25;",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_term_that_is_no_number_is_named_and_the_checkpoint_is_good(
    phantom_series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken, message = FAULTS[fault]
    settings = {**BRIEF, "levels": [(20, 20, 12)], "detail_mm": None}
    path, calls, last = tmp_path / "fit.ckpt", [], []
    monkeypatch.setattr(resume, "remove", lambda path: last.append(read_checkpoint(path, KIND)))

    def from_step_8_on(field: torch.Tensor, spacing_mm: Any) -> torch.Tensor:
        calls.append(1)
        return broken(field, spacing_mm) if len(calls) > 7 * 3 else losses.diffusion(field, spacing_mm)

    monkeypatch.setitem(VELOCITY_PENALTIES, "diffusion", from_step_8_on)
    with pytest.raises(FitError, match=message) as error:
        fit_deformation(phantom_series, None, checkpoint=path, checkpoint_seconds=0, **settings)
    assert "\n" not in str(error.value)
    kept = last[0]["stages"]["def_net"]
    assert kept["step"] == 7
    assert all(value.isfinite().all() for value in kept["parts"]["net"].values())


def test_weights_that_are_no_numbers_are_told(phantom_series: Series) -> None:
    # As on a GPU, where a gradient is seen by what it did to the next loss.
    net = fit_deformation(phantom_series, None, **BRIEF).def_net
    rows = [{"step": k, "level": 1, "loss": 0.5, "mse": torch.tensor(0.5)} for k in range(1, 12)]
    watch = Watch("Def-Net", net, rows)
    watch.check()
    assert rows[0]["mse"] == 0.5
    next(net.parameters()).data[0] = float("nan")
    with pytest.raises(FitError, match="weights are not finite"):
        watch.check()
    rows += [{"step": 12, "level": 1, "loss": torch.tensor(float("nan")), "mse": torch.tensor(float("nan"))}]
    with pytest.raises(FitError, match="the weights are not finite after step 11; lower learning_rate"):
        watch.look()


def test_ref_net_s_loss_is_named(phantom_series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stnerp.ref_net.mse", lambda a, b: (b * float("nan")).mean())
    with pytest.raises(FitError, match=r"Ref-Net: the loss \(mse\) is nan at step 20"):
        fit_reference(phantom_series, iterations=30, progress=False, device="cpu", grid_levels=2)


def test_a_loss_that_rises_is_reported(
    phantom_series: Series, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("WARNING", "stnerp")
    settings = {**BRIEF, "levels": [(20, 20, 10), (20, 20, 10)], "detail_mm": None}
    fit_deformation(phantom_series, None, **settings)
    assert caplog.text == ""
    calls: list[int] = []

    def rising_at_level_2(field: torch.Tensor, spacing_mm: Any) -> torch.Tensor:
        calls.append(1)
        return losses.diffusion(field, spacing_mm) + max(0, len(calls) - 30)

    monkeypatch.setitem(VELOCITY_PENALTIES, "diffusion", rising_at_level_2)
    fit_deformation(phantom_series, None, **settings)
    assert re.search(
        r"Def-Net: the loss rose at level 2, from \d\.\d+ to \d\.\d+; lower learning_rate", caplog.text
    )
    assert "level 1" not in caplog.text


@pytest.fixture(scope="module")
def with_ref_net(phantom_series: Series, ref_net: RefNet) -> STNeRP:
    return fit_deformation(phantom_series, ref_net, **{**BRIEF, "learning_rate": 3e-2})


@pytest.mark.parametrize("prior", [True, False])
def test_answers_do_not_depend_on_how_the_work_is_cut(
    phantom: Phantom, phantom_series: Series, with_ref_net: STNeRP, monkeypatch: pytest.MonkeyPatch, prior: bool
) -> None:
    model = with_ref_net if prior else fit_deformation(phantom_series, None, **{**BRIEF, "learning_rate": 3e-2})
    labels = phantom.labels(0.0)

    def answers() -> list[np.ndarray]:
        model._displacements.clear()
        fields = [model.image(0.4), model.displacement(0.4), model.jacobian(0.4), model.propagate(labels, 0.4)]
        return [sitk.GetArrayFromImage(field).astype(float) for field in fields]

    whole = answers()
    monkeypatch.setattr("stnerp.geometry.SLAB_POINTS", 36 * 28 * 5)  # 5 of 18 slices, the last slab has 3
    for module in ("stnerp.def_net", "stnerp.ref_net"):
        monkeypatch.setattr(f"{module}.CHUNK", 777)
    image, displacement, jacobian, carried = (a - b for a, b in zip(answers(), whole, strict=True))
    # A matrix product of other rows rounds its sums otherwise: some 1e-7 of 2000 HU, and of 10 mm.
    assert np.abs(image).max() < 0.02
    assert np.abs(displacement).max() < 1e-4
    assert np.abs(jacobian).max() < 1e-5
    assert not carried.any()
    assert np.abs(whole[1]).max() > 1  # there is motion


def test_a_fit_does_not_depend_on_its_chunks(phantom_series: Series, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_deformation(phantom_series, None, **ROUNDING)
    monkeypatch.setattr("stnerp.def_net.CHUNK", 333)
    cut = fit_deformation(phantom_series, None, **ROUNDING)
    assert_alike(cut, whole)


def test_a_fit_does_not_depend_on_the_number_of_threads(phantom_series: Series) -> None:
    one = fit_deformation(phantom_series, None, **ROUNDING)
    torch.set_num_threads(2)
    try:
        two = fit_deformation(phantom_series, None, **ROUNDING)
    finally:
        torch.set_num_threads(1)
    assert_alike(two, one)


@pytest.mark.parametrize("smoothing", [0.0, 1.5])
@pytest.mark.parametrize("level", [Level(2, 8, 1), Level(5, 8, 1)], ids=["the scan's voxels", "coarser ones"])
def test_the_same_image_where_it_was_costs_nothing(level: Level, smoothing: float) -> None:
    """Whatever Gaussians there are, reference and target pass the same ones."""
    grid = Grid((21, 21, 13), (2.0, 2.0, 2.5))
    white = grid.image(np.random.default_rng(0).random(grid.shape, np.float32))
    series = load_series([white, white], [0.0, 1.0], window=Window(0.0, 1.0))
    settings = dataclasses.replace(FAST.def_net, smoothing=smoothing, levels=(level,), voxels_per_step=None)
    net = def_net_of(grid, TimeBasis(series.times, 0.0, None), settings)
    voxels = normalised(white, series.window)
    images = _Level(net, voxels, series, np.stack([np.eye(4)] * 2), settings, {}, level)
    still = torch.zeros(1, 3, *images.lattice.shape)
    moved = images._pull_back(still, images.targets[1], slice(None))
    assert moved.std() > 1e-3  # there is something to compare
    # 1 - a mean of correlations: rounding of float32, 6e-8, over variances of 1e-3 and more of values below 0.5.
    assert float(images.targets[1].similarity(moved, slice(None))) == pytest.approx(0, abs=1e-4)


def test_a_target_is_compared_at_its_own_voxels_wherever_they_lie() -> None:
    """A ramp, which no reading between voxels changes, seen by a turned camera with noise of its own."""
    grid = Grid((30, 32, 24), (2.0, 2.0, 2.5), (-30.0, -30.0, -30.0))
    turn = Rotation.from_euler("zyx", (20.0, -10.0, 5.0), degrees=True).as_matrix()
    target_grid = Grid((12, 14, 10), (3.0, 3.5, 4.0), (-15.0, -20.0, -22.0), tuple(turn.ravel()))
    alignment = homogeneous(Rotation.from_euler("x", 8.0, degrees=True).as_matrix() * 1.03, (2.3, -1.1, 0.7))

    def ramp(points_mm: np.ndarray) -> np.ndarray:
        return (0.5 + points_mm @ (0.004, -0.003, 0.005)).astype(np.float32)

    there = ramp(apply_affine(np.linalg.inv(alignment), target_grid.points_world()))
    noisy = there + np.random.default_rng(0).normal(0, 0.05, there.shape).astype(np.float32)
    reference = ramp(grid.points_world())
    images = [grid.image(reference), target_grid.image(noisy)]
    series = load_series(images, [0.0, 1.0], window=Window(0.0, 1.0))
    level = Level(2, 8, 1)
    settings = dataclasses.replace(FAST.def_net, smoothing=0.0, levels=(level,), voxels_per_step=None)
    net = def_net_of(grid, TimeBasis(series.times, 0.0, None), settings)
    compared = _Level(net, reference, series, np.stack([np.eye(4), alignment]), settings, {}, level)
    target = compared.targets[1]
    part = target.voxels.within(target_grid)
    assert target.voxels.is_close(
        target_grid.part([s.start for s in part[::-1]], [s.stop - 1 for s in part[::-1]])
    )
    assert isinstance(target.similarity, LocalNCC)
    np.testing.assert_array_equal(target.similarity.fixed[0, 0], noisy[part] - np.float32(0.5))
    moved = compared._pull_back(torch.zeros(1, 3, *compared.lattice.shape), target, slice(None))[0, 0].numpy()
    # Where neither a spline nor a Gaussian feels a border; float32 points of a few hundredths of a voxel's slope.
    inside = tuple(slice(3, -3) for _ in range(3))
    np.testing.assert_allclose(moved[inside], there[part][inside], atol=2e-4)
    # A step of the whole of it by a constant moves it as far, in the reference's frame.
    step = torch.zeros(1, 3, *compared.lattice.shape)
    step[:, 0] = 3.0 / grid.half_extent_mm[0]
    moved = compared._pull_back(step, target, slice(4, 7))[0, 0].numpy()
    np.testing.assert_allclose(moved[:, 3:-3, 3:-3], there[part][4:7, 3:-3, 3:-3] + 0.012, atol=2e-4)


def test_slabs_of_a_turned_target_together_count_as_the_whole() -> None:
    """At its ends a slab shows a corner of the reference, and counts as little as that; a fit counts its slabs."""
    grid = Grid((24, 24, 24), (2.0, 2.0, 2.0), (-23.0, -23.0, -23.0))
    turn = Rotation.from_euler("x", 40.0, degrees=True).as_matrix()
    corner = turn @ (-35.0, -35.0, -31.0)
    target_grid = Grid((36, 36, 32), (2.0, 2.0, 2.0), tuple(corner), tuple(turn.ravel()))
    draw = np.random.default_rng(0)
    images = [g.image(draw.random(g.shape, np.float32)) for g in (grid, target_grid)]
    series = load_series(images, [0.0, 1.0], window=Window(0.0, 1.0))
    level = Level(2, 8, 4)
    settings = dataclasses.replace(FAST.def_net, loss="mse", smoothing=0.0, levels=(level,), width=8)
    net = def_net_of(grid, TimeBasis(series.times, 0.0, None), settings)
    matrices = np.stack([np.eye(4)] * 2)
    compared = _Level(net, normalised(images[0], series.window), series, matrices, settings, {}, level)
    target = compared.targets[1]
    still = torch.zeros(1, 3, *compared.lattice.shape)
    slices = target.voxels.shape[0]
    parts = [slice(k, k + slices // 4) for k in range(0, slices, slices // 4)]
    assert len(parts) == 4  # of a whole number of slices

    def similarity(slab: slice) -> float:
        return float(target.similarity(compared._pull_back(still, target, slab), slab))

    # Sums of float32 in another order.
    weighted = [target.share(slab) * similarity(slab) for slab in parts]
    assert np.mean(weighted) == pytest.approx(similarity(slice(None)), rel=1e-5)
    assert target.share(parts[0]) < 0.7 < 1.2 < target.share(parts[1])
    terms = [float(compared._terms(still, target, slab)["mse"]) for slab in parts]
    assert terms == pytest.approx(weighted, rel=1e-5)

    per_step = target.voxels.voxels // 4
    assert round(grid.voxels / per_step) == 2  # of the reference's own there would be two, and √2 times 4 steps
    model = fit_deformation(
        series, align="none", levels=[(2, 8, 4)], width=8, voxels_per_step=per_step, progress=False, device="cpu"
    )
    assert len(model.history) == 2 * 4


def test_what_is_given_back_is_the_penalties_pull() -> None:
    """Where the last level begins, the penalties then pull nowhere; elsewhere they do."""
    grid = Grid((21, 21, 13), (2.0, 2.0, 2.5))
    white = grid.image(np.random.default_rng(0).random(grid.shape, np.float32))
    series = load_series([white] * 3, [0.0, 1.0, 3.0], window=Window(0.0, 1.0))
    level = Level(2, 8, 1)
    settings = dataclasses.replace(FAST.def_net, bending=1.0, levels=(level,))
    torch.manual_seed(0)
    net = def_net_of(grid, TimeBasis(series.times, 0.0, None), settings)
    alignments = np.stack([np.eye(4), np.diag([1.05, 0.95, 1.0, 1.0]), np.diag([0.9, 1.0, 1.1, 1.0])])
    images = _Level(net, normalised(white, series.window), series, alignments, settings, {}, level)
    images.give_back(images.pull())

    def pull_at(velocity_mm: torch.Tensor, index: int) -> float:
        leaf = velocity_mm.detach().requires_grad_()
        terms = images._terms(leaf, images.targets[index], slice(None))
        rest = torch.stack([value for name, value in terms.items() if name != "local_ncc"]).sum()
        return float(torch.autograd.grad(rest, leaf)[0].norm())

    start = net.lattice_velocity(images.lattice.shape, [1.0, 3.0]).detach()
    for row, index in enumerate((1, 2)):
        here = start[row : row + 1]
        # Sums of float32 in another order.
        assert pull_at(here, index) < 1e-5 * pull_at(2 * here, index)
        assert pull_at(start[1 - row : 2 - row], index) > 0.1 * pull_at(2 * here, index)


def test_penalties_ask_how_far_tissue_is_from_moving_as_a_rigid_body() -> None:
    """On an oblique grid: what moved with the rigid part of its alignment alone costs nothing."""
    turn = Rotation.from_euler("zyx", (30.0, 10.0, -20.0), degrees=True).as_matrix()
    grid = Grid((21, 21, 13), (2.0, 2.0, 2.5), (5.0, -8.0, 11.0), tuple(turn.ravel()))
    white = grid.image(np.random.default_rng(0).random(grid.shape, np.float32))
    series = load_series([white] * 3, [0.0, 1.0, 2.0], window=Window(0.0, 1.0))
    level = Level(2, 8, 1)
    settings = dataclasses.replace(FAST.def_net, diffusion=1.0, bending=1.0, total_variation=1.0, levels=(level,))
    net = def_net_of(grid, TimeBasis(series.times, 0.0, None), settings)
    posed = homogeneous(Rotation.from_euler("x", 15.0, degrees=True).as_matrix(), (9.0, 0.0, -4.0))
    stretch = np.diag([1.05, 0.98, 0.9, 1.0])
    alignments = np.stack([np.eye(4), posed @ stretch, posed])
    images = _Level(net, normalised(white, series.window), series, alignments, settings, {}, level)
    still, undone_mm = torch.zeros(1, 3, *images.lattice.shape), images.targets[1].stretch_mm
    assert undone_mm is not None
    assert images.targets[2].stretch_mm is None

    def cost(velocity_mm: torch.Tensor, index: int) -> float:
        return float(sum(images._penalties(velocity_mm, images.targets[index]).values()))

    # Float32 slopes of a velocity of a few mm, 1e-7 each, in a root that is rounded at 1e-3.
    assert cost(undone_mm, 1) == pytest.approx(0, abs=1e-6)
    assert cost(still, 2) == pytest.approx(0, abs=1e-6)
    assert cost(still, 1) > 0.05  # slopes of 0.05, 0.02 and 0.1: their root mean square is more
    # The velocity that costs nothing takes each voxel, as pre-alignment left it, where a rigid body would have it.
    displacement = exponential(undone_mm / images.half_extent_mm, 8)
    points_mm = images.lattice.points_world()
    moved_mm = points_mm + images.lattice.vectors_to_world(
        images.lattice.vectors_from_cube(displacement[0].movedim(0, -1).double().numpy())
    )
    inside = np.abs(points_mm - grid.centre_mm).max(-1) < 8  # and stays inside the grid, half of which is 15 mm
    # Velocities are read linearly, where they are linear: what rounding and 2^8 steps leave.
    expected_mm = grid.centre_mm + (points_mm[inside] - grid.centre_mm) @ stretch[:3, :3].T
    np.testing.assert_allclose(moved_mm[inside], expected_mm, atol=5e-3)


def test_a_ball_that_shrinks_a_little_is_not_taken_for_one_that_shrinks_less() -> None:
    grid, radius_mm, scale = Grid((40, 40, 40), (2.5, 2.5, 2.5)), 15.0, 0.92
    distance_mm = np.linalg.norm(grid.points_world() - grid.centre_mm, axis=-1)
    noise = np.random.default_rng(1).normal(0, 0.01, (2, *grid.shape))

    def ball(radius_mm: float, of: np.ndarray) -> sitk.Image:
        edge = 1 / (1 + np.exp((distance_mm - radius_mm) / 1.0))
        return grid.image((0.2 + 0.6 * edge + of).astype(np.float32))

    images = [ball(radius_mm, noise[0]), ball(scale * radius_mm, noise[1])]
    series = load_series(images, [0.0, 1.0], window=Window(0.0, 1.0))
    directions = np.random.default_rng(2).normal(size=(500, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    surface_mm = grid.centre_mm + scale * radius_mm * directions
    missing_mm = []
    for bregman in (0.0, 1.0):
        levels = [(8, 12, 40), (4, 6, 40), (2.5, 4, 40, None, 1e-5)]
        common: dict[str, Any] = {"levels": levels, "align": "none", "device": "cpu", "progress": False}
        # Penalties that are felt: with `contrast`, a ball in an empty picture is heard above them.
        common |= {"contrast": 0.0, "diffusion": 0.01, "total_variation": 0.1, "detail_total_variation": 0.05}
        model = fit_deformation(series, None, bregman=bregman, **common)
        there_mm = np.linalg.norm(model.map_points(surface_mm, 1.0) - grid.centre_mm, axis=1)
        missing_mm.append(radius_mm - there_mm.mean())  # of 1.2 mm
    assert missing_mm[0] > 0.1
    assert abs(missing_mm[1]) < 0.6 * missing_mm[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_fits_what_the_cpu_fits(phantom_series: Series) -> None:
    # Start and draws are made on the CPU; float32 sums in another order are all that differs (no TF32 here).
    gpu = fit_deformation(phantom_series, None, **{**ROUNDING, "device": "cuda"})
    assert_alike(gpu, fit_deformation(phantom_series, None, **ROUNDING), GPU_ROUNDING)


# The loss is what correlations leave of 1: another processor's sums round the 1, in float32, some times over.
GPU_ROUNDING = {"abs": 5 * 2**-23}


def assert_alike(a: STNeRP, b: STNeRP, rounding: dict[str, float] | None = None) -> None:
    """The same fit, but for the rounding of its sums."""
    for mine, theirs in zip(a.history, b.history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], **(rounding or {"rel": 1e-5}))
    field_mm, other_mm = (sitk.GetArrayFromImage(model.displacement(0.5)) for model in (a, b))
    # Adam divides by the gradient's size: where it is near 0, its rounding counts. 6 steps move by 1 mm and more.
    assert np.abs(other_mm).max() > 0.5
    assert np.abs(field_mm - other_mm).max() < 0.01


def test_no_field_is_clipped(phantom_series: Series) -> None:
    # 300 mm of motion, in every direction at once, in a body of 360 mm: absurd, and said as it is.
    model = fit_deformation(phantom_series, None, form="space_time", **BRIEF)
    linear = [module for module in model.def_net.modules() if isinstance(module, torch.nn.Linear)][-1]
    cube_mm = 2 * np.asarray(phantom_series.grid.half_extent_mm)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor(300.0 / cube_mm))
    field_mm = sitk.GetArrayFromImage(model.displacement(0.5))
    assert np.abs(field_mm - 300.0).max() < 1e-3
    assert np.abs(model.map_points(np.zeros((1, 3)), 0.5) - 300.0).max() < 1e-3


def test_free_velocities_are_fitted_on_lattices_that_show_them_and_on_the_last(phantom_series: Series) -> None:
    def detail(*levels: tuple[object, ...]) -> torch.Tensor:
        """The largest free velocity, mm."""
        changes: dict[str, Any] = {"network_mm": 60.0, "detail_mm": 30.0, "width": 8, "layers": 2}
        model = fit_deformation(phantom_series, levels=levels, progress=False, device="cpu", **changes)
        assert isinstance(model.def_net, FactorisedDefNet)
        assert model.def_net.detail is not None
        return model.def_net.detail.detach().abs().max()

    no_room, coarser, fine = (40, 60, 2), (40, 40, 2), (30, 30, 2)
    assert detail(no_room) == 0
    assert detail(coarser) > 0  # no other level could
    assert detail(no_room, fine) > 0
    # Not on a coarse level before the last: what one step added is what the last level's one step adds.
    once, before = (40, 40, 1), (40, 40, 9, None, 1e-9)
    assert float(detail(before, once)) == pytest.approx(float(detail(once)), rel=1e-3)


def test_a_level_with_a_rate_of_its_own_starts_the_network_anew(phantom_series: Series) -> None:
    def modes(*levels: tuple[object, ...]) -> torch.Tensor:
        changes: dict[str, Any] = {"network_mm": 40.0, "detail_mm": 40.0, "width": 8, "layers": 2}
        changes["contrast"] = 0.0  # else the first level would differ where it is the last one, too
        model = fit_deformation(
            phantom_series, levels=levels, progress=False, device="cpu", decay="constant", **changes
        )
        assert isinstance(model.def_net, FactorisedDefNet)
        assert model.def_net.detail is not None
        assert model.def_net.detail.any() == (len(levels) > 1)
        return torch.cat([weight.flatten() for weight in model.def_net.modes.parameters()])

    first, second = (40, 40, 5), (30, 30, 3)
    before = modes(first)
    assert (modes(first, (*second, None, 1e-9)) - before).abs().max() < 1e-7  # no step is longer than the rate
    assert (modes(first, second) - before).abs().max() > 1e-4  # the fit's own, 1e-3, goes on


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_after_a_level_with_a_rate_of_its_own_the_fit_s_goes_on(
    decay: str, phantom_series: Series, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    backward = _Level.backward

    def watched(self: _Level, chosen: Any, draw: Any) -> Any:
        rates.append(optimisers[-1].param_groups[0]["lr"])
        return backward(self, chosen, draw)

    optimisers: list[torch.optim.Adam] = []
    adam = torch.optim.Adam

    def kept(*arguments: Any, **settings: Any) -> torch.optim.Adam:
        optimisers.append(adam(*arguments, **settings))
        return optimisers[-1]

    monkeypatch.setattr(_Level, "backward", watched)
    monkeypatch.setattr(torch.optim, "Adam", kept)
    levels = [(40, 40, 3), (40, 40, 4, None, 1e-5), (40, 40, 3)]
    changes: dict[str, Any] = {"learning_rate": 1e-3, "detail_mm": None, "bregman": 0.0, "decay": decay}
    fit_deformation(phantom_series, **{**SMALL, **changes, "levels": levels})

    def falling(steps: int) -> np.ndarray:
        """From 1 to 2 %, along half a cosine, or not at all."""
        return (
            0.02 + 0.49 * (1 + np.cos(np.pi * np.arange(steps) / steps)) if decay == "cosine" else np.ones(steps)
        )

    of_the_fit = 1e-3 * falling(10)
    assert rates == pytest.approx([*of_the_fit[:3], *(1e-5 * falling(4)), *of_the_fit[7:]], rel=1e-9)


def test_an_image_finer_than_the_reference_is_smoothed_before_it_is_read(phantom_series: Series) -> None:
    """Noise of voxels of 2.5 mm, compared on 10 mm: read at points it would be as strong as before; a Gaussian of
    s = √((10² − 2.5²) / 12) mm leaves √(2.5 / (2 √π s)) of it along each axis."""
    coarse = phantom_series.grid.with_spacing(10.0)
    fine = phantom_series.grid.with_spacing(2.5)
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 100, fine.shape).astype(np.float32)
    still = sitk.Resample(phantom_series.reference_image, coarse.image(np.zeros(coarse.shape, np.float32)))
    series = load_series([still, fine.image(noise)], [0.0, 1.0], window=(-1000.0, 1000.0))
    settings = dataclasses.replace(FAST.def_net, levels=(Level(2, 40, 1),), width=8, smoothing=0.0)
    net = def_net_of(series.grid, TimeBasis(series.times, 0.0, None), settings)
    reference = normalised(series.reference_image, series.window)
    images = _Level(net, reference, series, np.stack([np.eye(4)] * 2), settings, {}, settings.levels[0])
    measure = images.targets[1].similarity
    assert isinstance(measure, LocalNCC)
    within = measure.fixed[0, 0, 2:-2, 2:-2, 2:-2]  # the border is repeated beyond
    sigma_mm = np.sqrt((10**2 - 2.5**2) / 12)
    left = (2.5 / (2 * np.sqrt(np.pi) * sigma_mm)) ** 1.5
    assert left < 0.2
    # Of the window's half, 0.05 of its range, in some thousand voxels that share noise with their neighbours.
    assert float(within.std()) == pytest.approx(0.05 * left, rel=0.1)


def test_windows_count_by_their_contrast_on_the_last_level_alone(phantom_series: Series) -> None:
    settings = dataclasses.replace(FAST.def_net, levels=(Level(40, 40, 1), Level(30, 30, 1)), width=8)
    net = def_net_of(phantom_series.grid, TimeBasis(phantom_series.times, 0.0, phantom_series.period), settings)
    reference = normalised(phantom_series.reference_image, phantom_series.window)
    matrices = np.stack([np.eye(4)] * len(phantom_series))
    losses_of = []
    for contrast in (0.0, 1.0):
        changed = dataclasses.replace(settings, contrast=contrast)
        for level in settings.levels:
            images = _Level(net, reference, phantom_series, matrices, changed, {}, level)
            losses_of.append(float(images.backward([1], np.random.default_rng(0))["local_ncc"]))
    assert losses_of[0] == losses_of[2]
    assert abs(losses_of[1] - losses_of[3]) > 0.05 * losses_of[1]
