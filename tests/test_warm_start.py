"""A start is what it says: another fit, moved onto this patient exactly, or a displacement; and it saves steps."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DIRECTIONS, make_grid, optional
from scipy.spatial.transform import Rotation
from test_fit import SMALL, tre_mm
from test_scripts import QUICK, SCRIPTS, TINY_PHANTOM, run

from stnerp import InputError, MissingFileError, Series, STNeRP, fit_deformation, load_series
from stnerp.baselines.pair import PairRegistration, registration_of
from stnerp.def_net import DefNet, FactorisedDefNet, def_net_of
from stnerp.geometry import Grid, apply_affine, cube_points
from stnerp.motion import Breathing
from stnerp.phantom import BOX_MM, Phantom
from stnerp.presets import DefNetSettings, with_changes
from stnerp.time_basis import TimeBasis
from stnerp.velocity import exponential
from stnerp.warm_start import (
    between_references,
    displacement_on,
    learn_velocity,
    logarithm_mm,
    start_from,
    transplant,
)
from stnerp.window import Window

FORMS = ("factorised", "space_time")
CYCLE = TimeBasis((0.0, 0.25, 0.5, 0.75), 0.0, 1.0)
HERE = make_grid(DIRECTIONS["LPS"], (21, 17, 13), (8.0, 9.0, 11.0))
THERE = make_grid(DIRECTIONS["oblique, left-handed"], (17, 19, 14), (10.0, 8.0, 9.0))
# Turned, stretched and shifted, as one patient may lie to another.
TO_SOURCE = np.eye(4)
TO_SOURCE[:3, :3] = Rotation.from_euler("xyz", [10, 5, -8], degrees=True).as_matrix() @ np.diag([1.1, 0.9, 1.05])
TO_SOURCE[:3, 3] = THERE.centre_mm - TO_SOURCE[:3, :3] @ HERE.centre_mm + (4.0, -3.0, 5.0)


def net_of(grid: Grid, basis: TimeBasis, seed: int, **settings: Any) -> DefNet:
    """A small net whose velocities are some mm, as after a fit."""
    chosen = {"layers": 3, "width": 24, "fourier_width": 12, "detail_mm": 20.0, "network_mm": None, **settings}
    torch.manual_seed(seed)
    net = def_net_of(grid, basis, with_changes(DefNetSettings(), chosen))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return net


def velocity_at(net: DefNet, points_mm: np.ndarray, times: list[float]) -> np.ndarray:
    """World velocity (T, N, 3) at world points (N, 3)."""
    cube = torch.from_numpy(net.grid.world_to_cube(points_mm)).float()
    with torch.no_grad():
        return net.grid.vectors_to_world(net(cube, times).double().numpy())


# -- algebra


@pytest.mark.parametrize("form", FORMS)
def test_a_net_moved_onto_itself_is_itself(form: str) -> None:
    source, net = (net_of(HERE, CYCLE, seed, form=form) for seed in (1, 2))
    with torch.no_grad():
        before = source.lattice_velocity((6, 7, 8), [0.25, 0.4])
        assert float((net.lattice_velocity((6, 7, 8), [0.25, 0.4]) - before).abs().max()) > 1.0
        transplant(net, source, np.eye(4))
        after = net.lattice_velocity((6, 7, 8), [0.25, 0.4])
    assert float(before.abs().max()) > 3.0
    assert float((after - before).abs().max()) < 1e-4  # mm; rounding


@pytest.mark.parametrize("form", FORMS)
def test_a_motion_follows_the_patient(form: str) -> None:
    # v(x) = A⁻¹ v'(A x), at the same phase of a cycle that is eight times as long.
    source = net_of(THERE, CYCLE, 1, form=form, detail_mm=None)
    net = net_of(HERE, TimeBasis((0.0, 2.0, 4.0, 6.0), 0.0, 8.0), 2, form=form, detail_mm=None, length_mm=110.0)
    transplant(net, source, TO_SOURCE)
    points = HERE.points_world().reshape(-1, 3)[::40]
    found = velocity_at(net, points, [2.0, 3.2])
    there = velocity_at(source, apply_affine(TO_SOURCE, points), [0.25, 0.4])
    assert np.abs(found - there @ np.linalg.inv(TO_SOURCE[:3, :3]).T).max() < 1e-3 * np.abs(there).max()
    # The way back is something else.
    wrong = velocity_at(source, apply_affine(np.linalg.inv(TO_SOURCE), points), [0.25, 0.4])
    assert np.abs(found - wrong @ TO_SOURCE[:3, :3].T).max() > 0.1 * np.abs(there).max()


def test_free_velocities_follow_too() -> None:
    # A shift by whole spacings of the free lattice, so that nothing is read between its points.
    source, net = (net_of(HERE, CYCLE, seed, detail_mm=20.0) for seed in (1, 2))
    assert isinstance(source, FactorisedDefNet)
    assert isinstance(net, FactorisedDefNet)
    shift = np.eye(4)
    shift[:3, 3] = source.detail_grid.spacing_mm * np.array([2, 1, 0])
    transplant(net, source, shift)
    assert source.detail is not None
    assert net.detail is not None
    theirs, ours = source.detail.detach(), net.detail.detach()
    assert float((ours[..., :, :-1, :-2] - theirs[..., :, 1:, 2:]).abs().max()) < 1e-6
    assert float(theirs.abs().max()) > 0.05


@pytest.mark.parametrize("phases", [3, 5, 8])
def test_other_phases_of_the_cycle(phases: int) -> None:
    source = net_of(HERE, TimeBasis(tuple(k / 8 for k in range(8)), 0.0, 1.0), 1)
    times = tuple(k / phases for k in range(phases))
    net = net_of(HERE, TimeBasis(times, 0.0, 1.0), 2)
    transplant(net, source, np.eye(4))
    points = HERE.points_world().reshape(-1, 3)[::50]
    here, there = (velocity_at(n, points, list(times)) for n in (net, source))
    # As many functions as phases tell apart: at 3 or 5 they meet the source's motion, at 8 they are its own.
    assert np.abs(here - there).max() < 1e-4


def test_a_new_scan_starts_as_the_last_one() -> None:
    source = net_of(HERE, TimeBasis((0.0, 7.0, 21.0), 0.0), 1)
    net = net_of(HERE, TimeBasis((0.0, 7.0, 21.0, 30.0), 0.0), 2)
    transplant(net, source, np.eye(4))
    points = HERE.points_world().reshape(-1, 3)[::50]
    found, before = velocity_at(net, points, [7.0, 21.0, 30.0]), velocity_at(source, points, [7.0, 21.0])
    assert np.abs(found[:2] - before).max() < 1e-4
    assert np.abs(found[2] - before[1]).max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_an_earlier_scan_leaves_the_others_where_they_are(form: str) -> None:
    source = net_of(HERE, TimeBasis((10.0, 20.0, 30.0), 10.0), 1, form=form)
    net = net_of(HERE, TimeBasis((0.0, 10.0, 20.0, 30.0, 40.0), 10.0), 2, form=form)
    transplant(net, source, np.eye(4))
    points = HERE.points_world().reshape(-1, 3)[::50]
    # Where the source has no image, its network goes on, or the motion stays as it is at its first and last time.
    beyond = [0.0, 40.0] if form == "space_time" else [10.0, 30.0]
    found = velocity_at(net, points, [10.0, 20.0, 30.0, 0.0, 40.0])
    expected = velocity_at(source, points, [10.0, 20.0, 30.0, *beyond])
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.abs(expected[1] - expected[2]).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
def test_a_cycle_that_begins_at_another_phase(form: str) -> None:
    source = net_of(HERE, CYCLE, 1, form=form, detail_mm=None)
    other = net_of(HERE, TimeBasis((-0.25, 0.0, 0.25, 0.5), 0.0, 1.0), 2, form=form, detail_mm=None)
    later = net_of(HERE, TimeBasis((7.0, 7.25, 7.5), 7.0, 1.0), 2, form=form, detail_mm=None)
    points = HERE.points_world().reshape(-1, 3)[::50]
    there = velocity_at(source, points, [0.25, 0.5])
    transplant(later, source, np.eye(4))
    assert np.abs(velocity_at(later, points, [7.25, 7.5]) - there).max() < 1e-3 * np.abs(there).max()
    if form == "space_time":  # its network jumps from 0.75 to 0, and can't do so elsewhere
        with pytest.raises(InputError, match="begins at another phase, seen from the reference"):
            transplant(other, source, np.eye(4))
    else:
        transplant(other, source, np.eye(4))
        assert np.abs(velocity_at(other, points, [0.25, 0.5]) - there).max() < 1e-3 * np.abs(there).max()


def smooth_mm(grid: Grid, size_mm: float = 12.0) -> torch.Tensor:
    """A velocity of some waves, (1, 3, z, y, x), axis mm."""
    x, y, z = cube_points(grid.shape, dtype=torch.float64).unbind(-1)
    waves = [torch.sin(2 * y + z), torch.cos(1.5 * x - z), torch.sin(x + 2 * z)]
    return size_mm * torch.stack(waves)[None]


def exp_mm(velocity_mm: torch.Tensor, grid: Grid) -> torch.Tensor:
    half = torch.from_numpy(grid.half_extent_mm)[:, None, None, None]
    return exponential(velocity_mm / half) * half


def test_logarithm_undoes_the_exponential() -> None:
    grid = HERE.with_spacing(12.0)
    shift_mm = torch.tensor([5.0, -3.0, 2.0], dtype=torch.float64)
    constant = shift_mm.reshape(1, 3, 1, 1, 1).expand(1, 3, *grid.shape)
    assert float((logarithm_mm(exp_mm(constant, grid), grid) - constant).abs().max()) < 1e-9
    velocity = smooth_mm(grid)
    displacement = exp_mm(velocity, grid)
    found = logarithm_mm(displacement, grid)
    assert float((exp_mm(found, grid) - displacement).abs().max()) < 0.1
    assert float((found - velocity).abs().max()) < 0.5
    assert float((displacement - velocity).abs().max()) > 2.0  # the logarithm was needed


def test_logarithm_of_a_fold_is_some_start() -> None:
    grid = HERE.with_spacing(12.0)
    folded = 30 * torch.randn((1, 3, *grid.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = logarithm_mm(folded, grid)
    assert bool(found.isfinite().all())
    first = float((exp_mm(folded, grid) - folded).square().mean())
    assert float((exp_mm(found, grid) - folded).square().mean()) <= first


def test_displacements_are_read_in_world_space() -> None:
    # φ = shift ∘ alignment⁻¹ leaves the shift alone once the alignment is taken out.
    alignment, shift_mm = np.linalg.inv(TO_SOURCE), np.array([3.0, -2.0, 1.0])
    given = registration_of(HERE, lambda points: apply_affine(TO_SOURCE, points) + shift_mm)
    lattice = THERE.with_spacing(40.0)
    expected = lattice.vectors_from_world(shift_mm)
    for displacement in (given, given.displacement, sitk.Cast(given.displacement, sitk.sitkVectorFloat32)):
        found = displacement_on(lattice, displacement, alignment).movedim(1, -1)[0].numpy()
        inside = np.abs(HERE.world_to_cube(apply_affine(alignment, lattice.points_world()))).max(-1) < 1
        assert inside.any()
        assert np.abs(found[inside] - expected).max() < 1e-4


def test_a_network_learns_a_velocity() -> None:
    net = def_net_of(HERE, CYCLE, with_changes(DefNetSettings(), {"layers": 3, "width": 64, "detail_mm": None}))
    lattice = HERE.with_spacing(12.0)
    velocity_mm = torch.cat([smooth_mm(lattice, size) for size in (2.0, 6.0, 3.0)])
    learn_velocity(net, velocity_mm, [0.25, 0.5, 0.75], lattice)
    with torch.no_grad():
        found = net.lattice_velocity(lattice.shape, [0.25, 0.5, 0.75])
    # Three times by two functions of time: the first and third can't differ by everything.
    assert float((found[1] - velocity_mm[1]).norm(dim=0).mean()) < 0.1 * float(velocity_mm[1].norm(dim=0).mean())


# -- in a fit

STILL: dict[str, Any] = {"learning_rate": 1e-12, "detail_step_mm": 1e-12}
ONE: dict[str, Any] = {"levels": [(20, 20, 1)]}
# Lattices of 20 mm carry free velocities here; SMALL's never do.
FREE: dict[str, Any] = {**SMALL, "network_mm": 30.0, "detail_mm": 15.0}


@pytest.fixture(scope="module")
def fitted(phantom_series: Series) -> STNeRP:
    return fit_deformation(phantom_series, None, **FREE)


def field(model: STNeRP, t: float) -> np.ndarray:
    return sitk.GetArrayFromImage(model.displacement(t))


@pytest.mark.parametrize("from_file", [False, True])
def test_a_fit_started_from_itself_is_itself(
    phantom_series: Series, fitted: STNeRP, from_file: bool, tmp_path: Path
) -> None:
    init = fitted.save(tmp_path / "model.pt") if from_file else fitted
    levels = [(20, 20, 1), (10, 20, 1)]
    again = fit_deformation(phantom_series, None, init=init, seed=5, **{**FREE, **STILL, "levels": levels})
    for t in (0.25, 0.4):
        assert np.abs(field(fitted, t)).max() > 5
        assert np.abs(field(again, t) - field(fitted, t)).max() < 1e-3  # mm


def test_the_first_steps_keep_the_start(phantom: Phantom, phantom_series: Series, fitted: STNeRP) -> None:
    again = fit_deformation(phantom_series, None, init=fitted, **{**FREE, "levels": [(20, 20, 2)]})
    for t in phantom_series.times[1:]:
        assert tre_mm(again, phantom, t) < 1.2 * tre_mm(fitted, phantom, t) + 0.2


@pytest.fixture(scope="module")
def neighbour() -> tuple[Phantom, Series]:
    """Another patient: other vessels, less breathing, five phases in a cycle of 4 s, elsewhere in the scanner."""
    grid = Grid((34, 26, 17), (11.0, 11.0, 10.5), (-190.0, -135.0, -92.0))
    motion = Breathing(*BOX_MM, period=4.0, amplitude_si_mm=11.0)
    phantom = Phantom(grid=grid, motion=motion, noise_hu=0.0, seed=7, n_landmarks=60)
    times = phantom.times(5)
    return phantom, load_series([phantom.image(t) for t in times], times, period=4.0, window="ct")


def test_another_patient_saves_steps(
    phantom: Phantom, phantom_series: Series, fitted: STNeRP, neighbour: tuple[Phantom, Series]
) -> None:
    own, series = neighbour
    brief = {**SMALL, "levels": [(20, 20, 3)]}
    cold, warm = (fit_deformation(series, None, init=init, **brief) for init in (None, fitted))
    for t in series.times[2:4]:
        assert tre_mm(warm, own, t) < 0.7 * tre_mm(cold, own, t)


def test_several_fits(phantom: Phantom, phantom_series: Series, fitted: STNeRP) -> None:
    brief = {**FREE, **STILL, **ONE}
    twice = fit_deformation(phantom_series, None, init=[fitted, fitted], **brief)
    still = fit_deformation(phantom_series, None, **brief)
    mean = fit_deformation(phantom_series, None, init=[fitted, still], **brief)
    size = np.linalg.norm(field(fitted, 0.5), axis=-1).mean()
    assert np.linalg.norm(field(twice, 0.5) - field(fitted, 0.5), axis=-1).mean() < 0.1 * size
    # With one that hasn't moved: half the motion, the exponential being nearly linear for so little.
    assert np.linalg.norm(field(mean, 0.5) - field(fitted, 0.5) / 2, axis=-1).mean() < 0.15 * size


# One step on voxels of 20 mm, as it was first checked; with the settings of `fast` 0.351 of the motion is left in
# place of 0.349, with `contrast` 0.354.
CHECKED = {"contrast": 0.0, "noise": 0.005, "diffusion": 0.05, "total_variation": 0.05}


@pytest.mark.parametrize(("pace", "left"), [(STILL, 0.32), (CHECKED, 0.35)], ids=["no step", "a step"])
def test_registrations_are_a_start(
    phantom: Phantom, phantom_series: Series, pace: dict[str, Any], left: float
) -> None:
    def registrations(direction: int) -> dict[float, PairRegistration]:
        return {
            t: registration_of(phantom.grid, lambda p, t=t: p + direction * (phantom.map_points(p, t) - p))  # type: ignore[misc]
            for t in phantom_series.times[1:]
        }

    brief = {**SMALL, **ONE, **pace}
    right, wrong = (fit_deformation(phantom_series, None, init=registrations(d), **brief) for d in (1, -1))
    for t in phantom_series.times[1:]:
        before = tre_mm(right, phantom, t, times=0)
        # Four phases by two functions of time, and a small network: most of the motion, from the first step on.
        assert tre_mm(right, phantom, t) < left * before
        assert tre_mm(wrong, phantom, t) > 1.5 * before


def test_some_times_are_enough(phantom: Phantom, phantom_series: Series) -> None:
    exhaled = {0.5: registration_of(phantom.grid, lambda p: phantom.map_points(p, 0.5))}
    model = fit_deformation(phantom_series, None, init=exhaled, **{**SMALL, **STILL, **ONE})
    assert tre_mm(model, phantom, 0.5) < 0.2 * tre_mm(model, phantom, 0.5, times=0)
    assert tre_mm(model, phantom, 0.25) < 0.8 * tre_mm(model, phantom, 0.25, times=0)


def test_train_def_takes_a_start_and_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    common = ["prior=false", *TINY_PHANTOM, *QUICK]
    run("train_def", f"out={tmp_path / 'a'}", *common)
    model = tmp_path / "a" / "model.pt"
    guidance = ["preset.def_net.landmarks=0.02", "guided_times=[1]"]
    run("train_def", f"out={tmp_path / 'b'}", f"init={model}", *guidance, *common)
    run("train_def", f"out={tmp_path / 'c'}", f"init=[{model},{model}]", *common)
    cold, warm, mean = (STNeRP.load(tmp_path / name / "model.pt") for name in "abc")
    assert warm.history[0]["local_ncc"] < cold.history[0]["local_ncc"]
    assert mean.history[0]["local_ncc"] < cold.history[0]["local_ncc"]
    assert "landmarks" in warm.history[0]
    assert "landmarks guided this fit" in (tmp_path / "b" / "train_def.log").read_text(encoding="utf-8")


# -- errors


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"width": 32}, "width 64 and not 32"), ({"form": "space_time"}, "form factorised and not space_time")],
)
def test_another_network_is_refused(
    phantom_series: Series, fitted: STNeRP, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        fit_deformation(phantom_series, None, init=fitted, **{**SMALL, **settings})


def test_what_does_not_correspond_is_refused(phantom: Phantom, phantom_series: Series, fitted: STNeRP) -> None:
    def start(init: Any, series: Series = phantom_series, **settings: Any) -> None:
        fit_deformation(series, None, init=init, align="none", **{**SMALL, **settings})

    with pytest.raises(InputError, match="both repeat"):
        start(fitted, load_series(list(phantom_series.images), phantom_series.times, window="ct"))
    with pytest.raises(InputError, match="holds no fit"):
        start([])
    with pytest.raises(InputError, match="holds no displacement"):
        start({})
    given = registration_of(phantom.grid, lambda points: points)
    for t in (0.0, 0.3):
        with pytest.raises(InputError, match=rf"init: {t} is not the time"):
            start({t: given})
    with pytest.raises(InputError, match="form=factorised"):
        start({0.25: given}, form="space_time")
    with pytest.raises(InputError, match="int is no start"):
        start(5)
    with pytest.raises(MissingFileError, match="nowhere"):
        start("nowhere.pt")


def test_a_fit_that_was_aligned_otherwise_is_refused(phantom_series: Series, fitted: STNeRP) -> None:
    """Its velocity lives in the frame of its own pre-alignment; in another one it would be millimetres off."""
    moved = np.stack([np.eye(4)] * len(phantom_series))
    moved[1, 0, 3] = 6.0
    other = copy.copy(fitted)
    other.alignments = moved
    with pytest.raises(InputError, match="pre-aligned otherwise, by up to 6 mm"):
        fit_deformation(phantom_series, None, init=other, align="none", **SMALL)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (8.0, 0.0), (1.0, 0.1), (1.0, 100.0)])
def test_alignments_are_compared_where_times_correspond(
    phantom_series: Series, fitted: STNeRP, scale: float, offset: float
) -> None:
    """In another unit or counted from another day, a time is as long after the reference."""
    times = tuple(scale * t + offset for t in phantom_series.times)
    series = replace(phantom_series, times=times, period=scale)
    net = def_net_of(series.grid, TimeBasis(times, offset, scale), fitted.settings)
    moved = np.stack([np.eye(4)] * len(series))
    moved[1, 0, 3] = 6.0
    other = copy.copy(fitted)
    other.alignments = moved
    nearly = moved.copy()
    nearly[1, 0, 3] = 2.0  # so little is found again
    for alignments in (moved, nearly):
        start_from(net, other, series, alignments, fitted.settings)
    with pytest.raises(InputError, match="pre-aligned otherwise, by up to 6 mm"):
        start_from(net, other, series, np.stack([np.eye(4)] * len(series)), fitted.settings)


def test_the_same_reference_in_another_window_is_the_same(phantom_series: Series, fitted: STNeRP) -> None:
    # As a new scan changes it where it is found from all of them.
    series = replace(phantom_series, window=Window(-900.0, 700.0))
    assert np.array_equal(between_references(series, fitted), np.eye(4))
    another = replace(series, images=(series.images[2], *series.images[1:]))
    assert not np.array_equal(between_references(another, fitted), np.eye(4))


def test_dropped_free_velocities_are_told(
    phantom_series: Series, fitted: STNeRP, caplog: pytest.LogCaptureFixture
) -> None:
    brief = {**FREE, **STILL, **ONE}
    says = "the free velocities of that fit are dropped"
    fit_deformation(phantom_series, None, init=fitted, **brief)
    assert says not in caplog.text
    for change in ({"network_mm": 8.0}, {"detail_mm": None}, {"levels": [(20, 40, 1)]}):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "stnerp"):
            fit_deformation(phantom_series, None, init=fitted, **{**brief, **change})
        assert caplog.text.count(says) == 1


def test_displacements_that_are_none_are_refused(phantom: Phantom, phantom_series: Series) -> None:
    still = registration_of(phantom.grid, lambda points: points).displacement
    holes = sitk.Image(still)
    holes[1, 2, 3] = (0.0, float("nan"), 0.0)
    in_the_plane = phantom.grid.image(np.zeros((*phantom.grid.shape, 2)))
    refused: list[tuple[dict[Any, Any], str]] = [
        ({0.25: "a.nii"}, "expected displacements by time.* got str"),
        ({0.25: phantom_series.images[1]}, "expected displacements by time.* got .*integer"),
        ({0.25: in_the_plane}, "expected displacements by time.* got vector of 64-bit float"),
        ({0.25: holes}, "vectors that are NaN or infinite"),
        ({"0.25": still}, "init: '0.25' is not the time"),
    ]
    for init, says in refused:
        with pytest.raises(InputError, match=says):
            fit_deformation(phantom_series, None, init=init, **{**SMALL, **ONE})
