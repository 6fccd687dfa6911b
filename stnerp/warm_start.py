"""Where a fit may start instead of at rest: another fit, several, or a quick registration of each image.

A fit of another patient is moved onto this one, exactly. If A takes this patient's points to the other's, the
motion here is A⁻¹ ∘ φ ∘ A, whose velocity is A⁻¹ v(A x). A SIREN of Fourier features follows any such change by
its first and last layer alone: the features of Sx + s are those of other frequencies, turned by a phase, and
the outputs are linear in the last layer. Time functions change likewise. So nothing has to be learnt again, and
a fit that starts from itself is itself.

A displacement becomes a velocity by the logarithm, which the network then learns, without any image.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn

from stnerp.alignment import affine_between
from stnerp.baselines.pair import PairRegistration
from stnerp.def_net import DefNet, FactorisedDefNet, SpaceTimeDefNet
from stnerp.errors import InputError
from stnerp.geometry import Grid, apply_affine, cube_points
from stnerp.guidance import image_at
from stnerp.model import STNeRP
from stnerp.networks import FourierFeatures, Sine
from stnerp.preprocess import normalised
from stnerp.presets import DefNetSettings
from stnerp.ref_net import cosine, fingerprint_of
from stnerp.series import Series
from stnerp.time_basis import TimeBasis, index_at
from stnerp.velocity import exponential
from stnerp.warp import sample

logger = logging.getLogger(__name__)

Fit: TypeAlias = "STNeRP | str | os.PathLike[str]"  # a model, or the file of one
Init: TypeAlias = "Fit | Sequence[Fit] | Mapping[float, PairRegistration | sitk.Image]"

ALIGNED_MM = 5.0  # at the image's corners; less is found again in a few steps
LOGARITHM_STEPS = 10
LEARNING_STEPS, LEARNING_RATE, LEARNING_POINTS = 200, 1e-3, 2048
# Of the settings' learning rate, after a start: where nothing is to be found any more, full steps lose it again.
RATE = 0.1


def start_from(net: DefNet, init: Init, series: Series, alignments: np.ndarray, settings: DefNetSettings) -> None:
    """Set the parameters of a new net, in place.

    Args:
        net: of the series' times, on its grid or a part of it.
        init: a fit, or its file; several, for their mean; or displacements by time, as a registration of each
            image found them (target -> reference; vector images are in LPS mm).
        series: what the net will be fitted to.
        alignments: (T, 4, 4), reference point -> point of the image at each time.
        settings: of the net. Displacements and means are learnt on the lattice of the first level. A fit's free
            velocities count on levels whose lattice is finer than `network_mm`, with `detail_mm`: where the last
            level's isn't, they are dropped, and a warning says so.

    Raises:
        InputError: networks of another form or size, a cycle for what doesn't repeat (or vice versa), or one that
            `transplant` refuses, a time that the series doesn't have, a displacement that is no vectors or holds
            NaN, or nothing to start from.
        MissingFileError: no such file.
        FitError: references that can't be aligned.
    """
    lattice = settings.levels[0].lattice(net.grid)
    if isinstance(init, Mapping):
        if not init:
            raise InputError("init: holds no displacement")
        velocities_mm = [
            logarithm_mm(displacement_on(lattice, given, alignments[image_at(series, t, "init")]), lattice)
            for t, given in init.items()
        ]
        learn_velocity(net, torch.cat(velocities_mm), list(init), lattice)
        return
    fits = list(init) if isinstance(init, Sequence) and not isinstance(init, str) else [init]
    if not fits:
        raise InputError("init: holds no fit")
    nets = []
    for fit in fits:
        if not isinstance(fit, STNeRP | str | os.PathLike):
            raise InputError(
                f"init: {type(fit).__name__} is no start; give a fit, its file, or {{time: displacement}}"
            )
        model = fit if isinstance(fit, STNeRP) else STNeRP.load(os.fspath(fit), device="cpu")
        _check(model, net, settings)
        nets.append(copy.deepcopy(net).cpu())
        to_source = between_references(series, model)
        if np.array_equal(to_source, np.eye(4)):
            _check_alignments(model, series, alignments)
        transplant(nets[-1], copy.deepcopy(model.def_net).cpu(), to_source)
        _warn_of_dropped(model.def_net, net, settings)
    net.load_state_dict(nets[0].state_dict())
    if len(nets) > 1:
        _take_mean(net, nets, [series.times[i] for i in series.targets], lattice)


# -- another fit


def _check_alignments(model: STNeRP, series: Series, alignments: np.ndarray) -> None:
    """Refuse a fit of the same reference that was pre-aligned otherwise: what that lacks is in its velocity."""
    own = TimeBasis(series.times, series.reference_time, series.period)
    corners, apart_mm = series.grid.corners_world(), 0.0
    for t, alignment in zip(series.times, alignments, strict=True):
        there = source_time(own, model.def_net.time_basis, t)
        if (i := index_at(model.times, there, model.period)) is not None:
            moved_mm = [apply_affine(matrix, corners) for matrix in (model.alignments[i], alignment)]
            apart_mm = max(apart_mm, float(np.linalg.norm(moved_mm[0] - moved_mm[1], axis=1).max()))
    if apart_mm > ALIGNED_MM:
        raise InputError(
            f"init: its images were pre-aligned otherwise, by up to {apart_mm:.3g} mm; fit with the same align, "
            "or start from its displacements, {t: PairRegistration(model.displacement(t)), ...}"
        )


def between_references(series: Series, model: STNeRP) -> np.ndarray:
    """(4, 4): points of the series' reference -> points of the model's, LPS mm; the identity for one image."""
    # Through the model's window: one that is found from all images changes with each new one.
    ours = normalised(series.reference_image, model.window)
    if model.ref_net is not None:
        same = model.ref_net.fingerprint == fingerprint_of(ours)
    else:
        assert model.reference_voxels is not None
        same = model.reference_voxels.shape == ours.shape and np.array_equal(model.reference_voxels, ours)
    if same and model.grid.is_close(series.grid):
        return np.eye(4)
    theirs = model.ref_net.render() if model.ref_net is not None else model.reference_voxels
    assert theirs is not None
    ours = normalised(series.reference_image, series.window)
    return affine_between(series.grid.image(ours), model.grid.image(theirs), "affine")


def transplant(net: DefNet, source: DefNet, to_source: np.ndarray) -> None:
    """Give a net the motion of another: its velocity becomes A⁻¹ v(A x), at the times that correspond.

    Args:
        net, source: of one form, with hidden layers of the same sizes.
        to_source: A (4, 4), points of the net's reference -> points of the source's, LPS mm.

    Beyond the source's grid, the box of its patient, its network goes on as it happens to, where the source itself
    fades: what the net's grid has more of is a start like any other there. So it is before the source's first time
    and after its last with form "space_time"; with "factorised" the motion stays as it is at that time.

    Raises:
        InputError: cycles of form "space_time" that begin at other phases: its network jumps where a cycle begins.
    """
    # A in mm along the grids' axes, from their centres: x -> linear x + offset.
    linear, offset = _between_axes(net.grid, source.grid, to_source)
    back = np.linalg.inv(linear)
    if isinstance(net, FactorisedDefNet) and isinstance(source, FactorisedDefNet):
        times = _corresponding(net, source)
        # V'ₗ = Σₖ Tₗₖ A⁻¹ Vₖ: one matrix for all outputs.
        mixed = np.kron(times, back)
        _transplant_siren(
            net.modes,
            source.modes,
            linear * net.length_mm / source.length_mm,
            offset / source.length_mm,
            mixed * source.velocity_mm / net.velocity_mm,
        )
        if net.detail is not None and source.detail is not None:
            points_mm = net.grid.cube_to_world(cube_points(net.detail_grid.shape, dtype=torch.float64).numpy())
            there = torch.from_numpy(source.grid.world_to_cube(apply_affine(to_source, points_mm)))
            with torch.no_grad():
                read = sample(source.detail.double(), there[None])
                net.detail.copy_(torch.einsum("lk,bkzyx->blzyx", torch.from_numpy(mixed), read))
    elif isinstance(net, SpaceTimeDefNet) and isinstance(source, SpaceTimeDefNet):
        # All in [0, 1]: x = extent (u − ½).
        own_extent_mm, their_extent_mm = 2 * net.grid.half_extent_mm, 2 * source.grid.half_extent_mm
        into, shift = np.eye(4), np.zeros(4)
        into[:3, :3] = linear * own_extent_mm / their_extent_mm[:, None]
        shift[:3] = (offset - linear @ own_extent_mm / 2) / their_extent_mm + 0.5
        own, theirs = net.time_basis, source.time_basis
        (first, last), period = theirs.measured_range, theirs.period
        begins, ends = (source_time(own, theirs, t) for t in own.measured_range)
        if period is not None and not -1e-9 * period <= begins - first <= ends - first < (1 - 1e-9) * period:
            raise InputError(
                "init: that fit's cycle begins at another phase, seen from the reference; load the series from "
                "that phase on, or fit both with form=factorised"
            )
        into[3, 3], shift[3] = (ends - begins) / (last - first), (begins - first) / (last - first)
        out = back * their_extent_mm / own_extent_mm[:, None]
        _transplant_siren(net.network, source.network, into, shift, out)


def _transplant_siren(
    net: nn.Module, source: nn.Module, into: np.ndarray, shift: np.ndarray, out: np.ndarray
) -> None:
    """net(x) = out · source(into · x + shift), exactly.

    cos(p + φ) and sin(p + φ) are turned cos p and sin p, which the first layer undoes.
    """
    assert isinstance(net, nn.Sequential)
    assert isinstance(source, nn.Sequential)
    for own, theirs in zip(list(net)[:-1], list(source)[:-1], strict=True):
        own.load_state_dict(theirs.state_dict())
    features, first, last, outputs = net[0], net[1], net[-1], source[-1]
    assert isinstance(features, FourierFeatures)
    assert isinstance(first, Sine)
    assert isinstance(last, nn.Linear)
    assert isinstance(outputs, nn.Linear)
    with torch.no_grad():
        frequencies = features.B.double()
        phase = 2 * torch.pi * frequencies @ torch.from_numpy(shift)
        of_cos, of_sin = first.linear.weight.double().chunk(2, dim=1)
        turned = [of_cos * phase.cos() + of_sin * phase.sin(), of_sin * phase.cos() - of_cos * phase.sin()]
        first.linear.weight.copy_(torch.cat(turned, dim=1))
        features.B.copy_(frequencies @ torch.from_numpy(into))
        matrix = torch.from_numpy(out)
        last.weight.copy_(matrix @ outputs.weight.double())
        last.bias.copy_(matrix @ outputs.bias.double())


def _between_axes(own: Grid, source: Grid, to_source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map of world points as one of mm along the axes, from the centre of each grid: (3, 3) and (3,)."""
    linear = source.vectors_from_world(own.vectors_to_world(np.eye(3)) @ to_source[:3, :3].T).T
    return linear, source.vectors_from_world(apply_affine(to_source, own.centre_mm) - source.centre_mm)


def _corresponding(net: FactorisedDefNet, source: FactorisedDefNet) -> np.ndarray:
    """T (own size, source size): which sums of the source's modes move as they do, at the measured times."""
    mixing, their_mixing = (n.mixing.double().cpu().numpy() for n in (net, source))
    own, theirs = net.time_basis, source.time_basis
    if own == theirs:
        return np.linalg.solve(mixing, their_mixing)
    times = [t for t in own.times if t != own.reference_time]
    here = np.stack([own(t) for t in times]) @ mixing
    sought = np.array([source_time(own, theirs, t) for t in times])
    if theirs.period is None:  # after the last time, and before the first, the motion stays as it is there
        sought = sought.clip(*theirs.measured_range)
    there = np.stack([theirs(t) for t in sought]) @ their_mixing
    return np.linalg.pinv(here) @ there


def source_time(own: TimeBasis, source: TimeBasis, t: float) -> float:
    """The source's time that corresponds to t, seen from the reference: the same phase of a cycle, or as long
    after it, also where the source measured nothing."""
    pace = source.period / own.period if source.period and own.period else 1.0
    return source.reference_time + pace * (t - own.reference_time)


def _warn_of_dropped(source: DefNet, net: DefNet, settings: DefNetSettings) -> None:
    """Say it if the fit doesn't go on with a start's free velocities: its motion is another one then."""
    if not (isinstance(source, FactorisedDefNet) and source.detail is not None and source.detail.any()):
        return
    if isinstance(net, FactorisedDefNet) and not net.carries_detail(settings.levels[-1].lattice(net.grid).shape):
        logger.warning(
            "init: the free velocities of that fit are dropped; to keep them give detail_mm, and a last level "
            "whose lattice is finer than network_mm"
        )


def _check(model: STNeRP, net: DefNet, settings: DefNetSettings) -> None:
    differ = [
        f"{name} {getattr(model.settings, name)} and not {getattr(settings, name)}"
        for name in ("form", "layers", "width", "omega", "fourier_width")
        if getattr(model.settings, name) != getattr(settings, name)
    ]
    if differ:
        raise InputError(f"init: that fit's network has {', '.join(differ)}; give this fit the same")
    if (model.period is None) != (net.time_basis.period is None):
        raise InputError("init: that fit and this series must both repeat (period=), or neither of them")


# -- velocities on a lattice


def displacement_on(lattice: Grid, given: PairRegistration | sitk.Image, alignment: np.ndarray) -> torch.Tensor:
    """A displacement target -> reference at points of a lattice, after pre-alignment: (1, 3, z, y, x), axis mm."""
    if isinstance(given, sitk.Image) and given.GetNumberOfComponentsPerPixel() == 3:
        given = PairRegistration(sitk.Cast(given, sitk.sitkVectorFloat64))
    if not isinstance(given, PairRegistration):
        kind = given.GetPixelIDTypeAsString() if isinstance(given, sitk.Image) else type(given).__name__
        raise InputError(
            f"init: expected displacements by time, {{t: PairRegistration or image of vectors}}, got {kind}"
        )
    if not np.isfinite(sitk.GetArrayViewFromImage(given.displacement)).all():
        raise InputError("init: a displacement holds vectors that are NaN or infinite; fill them, with 0 say")
    points_mm = lattice.points_world()
    moved_mm = given.map_points(apply_affine(alignment, points_mm))
    axis_mm = lattice.vectors_from_world(moved_mm - points_mm)
    return torch.from_numpy(axis_mm).movedim(-1, 0)[None]


def logarithm_mm(displacement_mm: torch.Tensor, lattice: Grid) -> torch.Tensor:
    """v with exp(v) − id near a displacement, both (1, 3, z, y, x) in axis mm on a lattice.

    v ← v + u − (exp(v) − id), from v = u, for as long as it gets nearer. What folds or jumps has no logarithm;
    the nearest that was met is as good a start.
    """
    per_cube = torch.from_numpy(lattice.half_extent_mm)[:, None, None, None]
    velocity, best, least = displacement_mm, displacement_mm, float("inf")
    for _ in range(LOGARITHM_STEPS):
        miss = displacement_mm - exponential(velocity / per_cube) * per_cube
        size = float(miss.square().mean())
        if size >= least:
            break
        best, least = velocity, size
        velocity = velocity + miss
    return best


def learn_velocity(net: DefNet, velocity_mm: torch.Tensor, times: Sequence[float], lattice: Grid) -> None:
    """Train the network inside a net to a velocity: what a lattice holds, without any image.

    Least squares in the last layer alone would be quicker, but leaves it so steep that the next steps undo it.

    Args:
        net: of form "factorised"; its free velocities stay as they are.
        velocity_mm: (T, 3, z, y, x), axis mm, at those times, on a lattice over the net's grid.

    Raises:
        InputError: a net of another form.
    """
    if not isinstance(net, FactorisedDefNet):
        raise InputError("init: displacements, and several fits, need form=factorised; give one fit")
    at_times = torch.from_numpy(np.stack([net.time_basis(t) for t in times])) @ net.mixing.cpu()
    modes = torch.einsum("kt,tczyx->zyxkc", torch.linalg.pinv(at_times), velocity_mm.double().cpu())
    points = cube_points(lattice.shape, net.half_extent.device).reshape(-1, 3) * net.half_extent
    wanted = (modes.reshape(len(points), -1) / net.velocity_mm).to(points)
    optimiser = torch.optim.Adam(net.modes.parameters(), lr=LEARNING_RATE)
    schedule = cosine(optimiser, LEARNING_STEPS)
    for _ in range(LEARNING_STEPS):
        drawn = torch.randint(len(points), (LEARNING_POINTS,)).to(points.device)
        optimiser.zero_grad(set_to_none=True)
        (net.modes(points[drawn]) - wanted[drawn]).square().mean().backward()
        optimiser.step()
        schedule.step()
    net.zero_grad(set_to_none=True)


def _take_mean(net: DefNet, nets: Sequence[DefNet], times: Sequence[float], lattice: Grid) -> None:
    """The mean of the nets' velocities, on the hidden layers that `net` has, and that of their free velocities."""
    with torch.no_grad():
        details = [own.detail for own in nets if isinstance(own, FactorisedDefNet) and own.detail is not None]
        if isinstance(net, FactorisedDefNet) and net.detail is not None:
            net.detail.copy_(torch.stack(details).mean(0))  # type: ignore[arg-type]
        for detail in details:
            detail.zero_()
        mean = torch.stack([own.lattice_velocity(lattice.shape, times) for own in nets]).mean(0)
    learn_velocity(net, mean, times, lattice)
