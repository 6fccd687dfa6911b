"""Fit Def-Net with the reference frozen: min Σₜ Σₚ |R(p + uₜ(p)) − fₜ(p)|² (Eq. 6), or a better similarity.

A step: velocity of all times on the lattice (one pass of the network) → scaling and squaring →
displacement at the voxels of this level → the reference pulled back → its similarity to each target.
Times are done one after the other, so memory doesn't grow with their number.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
import torch
from tqdm.auto import tqdm

from stnerp import losses
from stnerp.alignment import Kind, affine_between, stretch_rate
from stnerp.appearance import fit_flow
from stnerp.baselines.pair import PairRegistration
from stnerp.def_net import DefNet, FactorisedDefNet, def_net_of
from stnerp.device import device_of, tensor_cores
from stnerp.errors import FitError, InputError
from stnerp.field_of_view import round_view
from stnerp.geometry import Grid, Triple, affine_axes, affine_points, apply_affine, homogeneous, random_slabs
from stnerp.guidance import Guide, guides_of
from stnerp.memory import def_net_bytes, flow_bytes, require_memory
from stnerp.model import STNeRP
from stnerp.preprocess import compared, covered_on, normalised, on_grid, thicker_sigma_mm
from stnerp.presets import FLOW, DefNetSettings, Level, preset_of, with_changes
from stnerp.ref_net import RefNet, cosine, fingerprint_of
from stnerp.region import box_around, part_around, patient_points
from stnerp.replay import Replay, memory_pool, recording
from stnerp.resume import SECONDS, Progress, State, fingerprint
from stnerp.seeding import own_random_numbers, start_random_numbers
from stnerp.series import Series, require_series
from stnerp.time_basis import TimeBasis
from stnerp.uniform_adam import UniformAdam
from stnerp.velocity import exponential
from stnerp.warm_start import RATE, Init, start_from
from stnerp.warp import NARROW, pulled_back, sample, smoothed
from stnerp.watch import EVERY, Watch

logger = logging.getLogger(__name__)

Similarity = Callable[[torch.Tensor, slice], torch.Tensor]  # of a moved slab of slices
Places = Callable[[slice], torch.Tensor]  # cube points (1, z, y, x, 3) of a slab of slices


#: From this σ on, in voxels, what makes the reference's voxels as wide as a target's is read within these.
WIDER = 0.15

#: Raised whenever the same scans, settings and seed give another model: a half-done fit doesn't go on under
#: another loss, and tables tell results of one revision from another's.
REVISION = 1


@own_random_numbers
def fit_deformation(
    series: Series,
    ref_net: RefNet | None = None,
    *,
    preset: str = "fast",
    align: Kind | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    appearance: Literal["reference", "blend"] = "reference",
    guided_times: Sequence[float] | None = None,
    init: Init | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = SECONDS,
    **settings: Any,
) -> STNeRP:
    """Learn how a patient moves or changes over a series.

    Args:
        series: two or more images; those other than the reference are fitted.
        ref_net: the reference's network (`fit_reference`); None: the reference's voxels, read
            linearly (the paper's "w/o prior").
        preset: "fast" or "paper".
        align: affine pre-alignment of each image to the reference: "none", "rigid", "affine", or "auto":
            "affine" for follow-up scans, "none" for a periodic series (one scan, one position).
        device: "auto", "cpu", "cuda", ...
        seed: of the network's start.
        progress: show a bar with the loss and the time left.
        appearance: "blend" also learns the flow between neighbouring images, for
            `model.image(t, appearance="blend")`; "reference" doesn't need it.
        guided_times: times whose contours (`series.masks`) and landmarks guide the fit, where `contours` or
            `landmarks` has a weight above 0; None: all that the series has. The reference needs its own.
        init: where the fit starts, in place of no motion: another fit or its file, of this patient before the
            newest scan or of another patient; several, for their mean; or displacements by time,
            {t: PairRegistration}, as a quick registration finds them. Shorter `levels` will do then, and the
            network's learning rate is a tenth of `learning_rate`.
        checkpoint: a file that keeps how far the fit has come. Where it exists, the fit goes on from it. SIGINT
            and SIGTERM then end it after the step, with `resume.Interrupted`. Remove it once the model is saved;
            where an error ends the fit, it is removed (`resume.Progress`).
        checkpoint_seconds: between two writings of that file.
        settings: any field of `presets.DefNetSettings`, by name.

    Raises:
        InputError: unknown names, a Ref-Net of another image, or guidance that the series doesn't have, or a start
            that doesn't fit, or a checkpoint of another fit, or more memory needed than there is.
        FitError: no overlap to align, or a loss or gradient that is not a number; the message names its term.
    """
    require_series(series)
    chosen = with_changes(preset_of(preset).def_net, settings)
    if appearance not in ("reference", "blend"):
        raise InputError(f"appearance: unknown {appearance!r}; give reference or blend")
    where = device_of(device)
    if ref_net is not None:
        _check_ref_net(ref_net, series)
    basis = TimeBasis(series.times, series.reference_time, series.period)
    unaligned = np.stack([np.eye(4)] * len(series))
    patient = patient_points(series) if chosen.region == "patient" else None
    region = box_around(patient, series.grid, unaligned)
    parts = _parts(series, region, unaligned, chosen)
    needed = def_net_bytes(region, parts, basis.size, chosen, ref_net is not None)
    require_memory(needed, where, "Def-Net")
    if appearance == "blend":
        require_memory(flow_bytes(region, len(series), FLOW), where, "the flow between neighbours")
    identity: dict[str, object] = {}
    if checkpoint is not None:
        asked = {"align": align, "appearance": appearance, "guided_times": guided_times, "seed": seed}
        depends_on = {"network": "Def-Net", "revision": REVISION, **_identity(series, ref_net, init), **asked}
        assert not depends_on.keys() & asdict(chosen).keys()  # one would hide the other
        identity = {**depends_on, **asdict(chosen)}
    with Progress(None if checkpoint is None else Path(checkpoint), identity, checkpoint_seconds) as fit:
        start_random_numbers(seed)
        aligned = fit.kept("alignments", lambda: {"matrices": torch.from_numpy(_alignments(series, align))})
        alignments = aligned["matrices"].numpy()
        _require_common(series, alignments)
        region = box_around(patient, series.grid, alignments)
        parts = _parts(series, region, alignments, chosen)  # larger ones, of images that are turned
        aligned_needed = def_net_bytes(region, parts, basis.size, chosen, ref_net is not None)
        if aligned_needed > needed:
            require_memory(aligned_needed, where, "Def-Net")
        if region != series.grid:
            share = 100 * region.voxels / series.grid.voxels
            logger.info("Def-Net covers the patient's box, %.0f %% of the image; region='image': all of it", share)
        guides = guides_of(series, alignments, chosen, guided_times, region, where)
        net = def_net_of(region, basis, chosen).to(where)
        pace = chosen
        if init is not None:
            pace = replace(chosen, learning_rate=RATE * chosen.learning_rate)
            if fit.saved("def_net") is None:
                start_from(net, init, series, alignments, chosen)
        if ref_net is not None:
            ref_net = copy.deepcopy(ref_net).to(where).requires_grad_(False)  # the caller's stays as it is
        with recording(where), tensor_cores(where, allowed=chosen.reference == "network"):
            history = _optimise(net, ref_net, series, alignments, pace, guides, progress, fit)
        flow = None
        if appearance == "blend":
            flow = fit_flow(series, alignments, region=region, device=where, seed=seed, progress=progress, fit=fit)
    return STNeRP(
        def_net=net.eval(),
        ref_net=ref_net,
        settings=chosen,
        alignments=alignments,
        window=series.window,
        reference_voxels=None if ref_net is not None else normalised(series.reference_image, series.window),
        history=history,
        time_unit=series.time_unit,
        flow=flow,
        grid=series.grid,
    )


def _identity(series: Series, ref_net: RefNet | None, init: Init | None) -> dict[str, object]:
    """What a fit depends on besides its settings (whose names it may not share), as short values to compare."""
    return {
        "images": [_image_identity(image) for image in series.images],
        "masks": [_image_identity(mask) for mask in series.masks],
        "points": [None if points is None else fingerprint_of(points) for points in series.landmarks],
        "times": series.times,
        "period": series.period,
        "reference_index": series.reference,
        "window": (series.window.low, series.window.high),
        "ref_net": None if ref_net is None else (ref_net.settings, fingerprint(ref_net)),
        "init": _init_identity(init),
    }


def _image_identity(image: sitk.Image | None) -> object:
    return None if image is None else (Grid.of(image), fingerprint_of(sitk.GetArrayViewFromImage(image)))


def _init_identity(init: Any) -> object:
    if isinstance(init, Mapping):
        return {t: _init_identity(given) for t, given in init.items()}
    if isinstance(init, Sequence) and not isinstance(init, str):
        return [_init_identity(fit) for fit in init]
    if isinstance(init, STNeRP):
        return (init.grid, init.times, fingerprint(init.def_net), fingerprint_of(init.alignments))
    if isinstance(init, sitk.Image | PairRegistration):
        return _image_identity(init if isinstance(init, sitk.Image) else init.displacement)
    if isinstance(init, str | os.PathLike) and Path(init).is_file():
        return fingerprint_of(np.fromfile(init, np.uint8))
    return init


def _check_ref_net(ref_net: object, series: Series) -> None:
    if not isinstance(ref_net, RefNet):
        raise InputError(f"ref_net: expected what fit_reference gives back, got {type(ref_net).__name__}")
    if not ref_net.grid.is_close(series.grid):
        raise InputError("ref_net: it was fitted to another grid than this series' reference; fit it again")
    theirs, ours = ref_net.window, series.window
    if (theirs.low, theirs.high) != (ours.low, ours.high):
        raise InputError(
            f"ref_net: it was fitted with the window ({theirs.low:g}, {theirs.high:g}), this series has "
            f"({ours.low:g}, {ours.high:g}); load the series with the same window or fit it again"
        )
    if ref_net.fingerprint != fingerprint_of(normalised(series.reference_image, series.window)):
        raise InputError(
            f"ref_net: it was fitted to another image than {series.names[series.reference]}; fit it again"
        )


def _alignments(series: Series, kind: Kind | Literal["auto"]) -> np.ndarray:
    """(T, 4, 4), reference point -> point of the image at each time."""
    if kind == "auto":
        kind = "affine" if series.period is None else "none"
    matrices = [np.eye(4)] * len(series)
    if kind == "none":
        return np.stack(matrices)
    reference, reference_seen = _masked(series, series.reference)
    for i in series.targets:
        target, target_seen = _masked(series, i)
        matrices[i] = affine_between(reference, target, kind, seen=(reference_seen, target_seen))
    return np.stack(matrices)


def _require_common(series: Series, alignments: np.ndarray) -> None:
    """Raises FitError for an image that saw nothing of what the reference saw, in round fields of view."""
    views = [round_view(image) for image in series.images]
    if not any(views):
        return
    seen = [
        covered_on(
            Grid.of(image), series.grid, alignment, None if view is None else view.seen(Grid.of(image).shape)
        )
        for image, alignment, view in zip(series.images, alignments, views, strict=True)
    ]
    for i in series.targets:
        if not (seen[i] & seen[series.reference]).any():
            raise FitError(
                f"{series.names[i]}: its round field of view and what the reference, "
                f"{series.names[series.reference]}, shows have nothing in common after pre-alignment; leave it out"
            )


def _masked(series: Series, index: int) -> tuple[sitk.Image, sitk.Image | None]:
    """An image as it is compared, and a mask of what of it was seen; None: all."""
    values, seen = compared(series.images[index], series.window)
    grid = Grid.of(series.images[index])
    return grid.image(values), None if seen is None else grid.image(seen.astype(np.uint8))


def _optimise(
    net: DefNet,
    ref_net: RefNet | None,
    series: Series,
    alignments: np.ndarray,
    settings: DefNetSettings,
    guides: Mapping[int, Mapping[str, Guide]],
    progress: bool,
    fit: Progress,
) -> list[dict[str, float]]:
    """Train `net` in place, level by level; returns the loss and its terms at each step."""
    detail = net.detail if isinstance(net, FactorisedDefNet) else None
    adam = torch.optim.Adam([p for p in net.parameters() if p is not detail], lr=settings.learning_rate)
    fitted = fitted_images(series, settings)
    parts = _parts(series, net.grid, alignments, settings)
    lengths = [
        level.steps([level.voxels_beside(net.grid, part).shape for part in parts], settings.voxels_per_step)
        for level in settings.levels
    ]
    steps = sum(lengths)
    optimisers: list[torch.optim.Optimizer] = [adam]
    schedules = [cosine(adam, steps)] if settings.decay == "cosine" else []
    history: list[dict[str, Any]] = []  # tensors until they are looked at: reading one waits for the GPU
    watch = Watch("Def-Net", net, history)
    draw = np.random.default_rng(torch.initial_seed())
    state = State({"net": net, "adam": adam}, history, draw, watch.check)
    if schedules:
        state.parts["schedule"] = schedules[0]

    def free_the_detail(remaining: int) -> None:
        assert detail is not None
        optimisers.append(UniformAdam([detail], lr=settings.detail_step_mm))
        state.parts["detail_adam"] = optimisers[1]
        if settings.decay == "cosine":
            schedules.append(cosine(optimisers[1], remaining))
            state.parts["detail_schedule"] = schedules[1]

    def set_rate(rate: float, over: int, done: int = 0) -> None:
        adam.param_groups[0]["lr"] = rate
        if schedules:
            schedules[0] = state.parts["schedule"] = cosine(adam, over, done)

    saved = fit.saved("def_net")
    if saved is not None and "detail_adam" in saved["parts"]:
        free_the_detail(steps)  # how many there are stands in the schedule's state
    with fit.stage("def_net", state), tqdm(total=steps, desc="Def-Net", disable=not progress) as bar:
        bar.update(state.step)
        reference, until = None, 0
        for number, (level, length) in enumerate(zip(settings.levels, lengths, strict=True)):
            until += length
            if state.step >= until:
                continue  # done before the fit was interrupted
            if reference is None:
                reference = _pulled_reference(ref_net, series, settings)
            images = _Level(net, reference, series, alignments, settings, guides, level)
            if settings.bregman and 0 < number == len(settings.levels) - 1:
                images.give_back(fit.kept("pull", images.pull))  # of the level's start, also if it goes on later
            if images.detailed is not None and len(optimisers) == 1:
                free_the_detail(sum(lengths[number:]))
            begins, own = state.step == until - length, level.learning_rate
            if begins and own is not None:
                adam.state.clear()
                set_rate(own, length)
            elif begins and number > 0 and settings.levels[number - 1].learning_rate is not None:
                set_rate(settings.learning_rate, steps, state.step)
            for step in fit.steps(until):
                net.zero_grad(set_to_none=True)
                values = images.backward(_chosen_times(fitted, level, draw), draw)
                for optimiser in optimisers:
                    optimiser.step()
                for schedule in schedules:
                    schedule.step()
                bar.update()
                history.append({"step": step, "level": number + 1, **values})
                if step % EVERY == 1 or step == steps:
                    watch.look()
                    bar.set_postfix(
                        loss=f"{history[-1]['loss']:.4f}", level=f"{number + 1}/{len(settings.levels)}"
                    )
            watch.report(f" at level {number + 1}", [row for row in history if row["level"] == number + 1])
    return [{name: float(value) for name, value in row.items()} for row in history]


def fitted_images(series: Series, settings: DefNetSettings) -> list[int]:
    """The images that the fit compares: Eq. 6 sums over all times. "factorised" maps the reference to itself
    by construction, so there is nothing to learn from it."""
    return list(series.targets) if settings.form == "factorised" else list(range(len(series)))


def _parts(series: Series, region: Grid, alignments: np.ndarray, settings: DefNetSettings) -> list[Grid]:
    """Of each image that is compared the part of its grid where pre-alignment has the region."""
    return [part_around(region, Grid.of(series.images[i]), alignments[i]) for i in fitted_images(series, settings)]


def _pulled_reference(ref_net: RefNet | None, series: Series, settings: DefNetSettings) -> np.ndarray | RefNet:
    """What is pulled back: the scan's voxels (z, y, x), Ref-Net's, or Ref-Net itself."""
    if ref_net is None:
        return compared(series.reference_image, series.window)[0]
    if settings.reference == "network":
        return ref_net
    view = round_view(series.reference_image)
    return ref_net.render() if view is None else view.continued(ref_net.render())


def _chosen_times(targets: list[int], level: Level, draw: np.random.Generator) -> list[int]:
    """Which targets this step looks at: all, or some drawn without repetition."""
    if level.times_per_step is None or level.times_per_step >= len(targets):
        return targets
    return sorted(draw.choice(targets, level.times_per_step, replace=False).tolist())


@dataclass(frozen=True)
class _Target:
    """One time's image at one level: how well a moved reference agrees with it, and what guides its motion."""

    time: float
    voxels: Grid  # that are compared: the image's own, or coarser ones
    # Where pre-alignment has them in the reference's cube (None: where the level's own are), each with its weight:
    # their middles, and points within those that are wider than the reference's.
    places: Sequence[tuple[float, Places | None]]
    similarity: Similarity
    share: Callable[[slice], float]  # of a slab's voxels that are compared, beside the same of the whole image
    overlap: int  # of slabs, in slices: each window lies whole in one
    moved_sigma: tuple[float, float, float]  # of the Gaussian that the moved reference passes, voxels (z, y, x)
    guides: Mapping[str, Guide]
    stretch_mm: torch.Tensor | None  # what pre-alignment stretched, as a velocity (1, 3, z, y, x) on the lattice


class _Level:
    """The images of one level of the fit, and the loss between them."""

    def __init__(
        self,
        net: DefNet,
        reference: np.ndarray | RefNet,
        series: Series,
        alignments: np.ndarray,
        settings: DefNetSettings,
        guides: Mapping[int, Mapping[str, Guide]],
        level: Level,
    ) -> None:
        self.net, self.settings = net, settings
        grid, device = net.grid, next(net.parameters()).device
        part = grid.within(series.grid)
        self.voxels, self.lattice = level.voxels(grid), level.lattice(grid)
        self.velocity_at = net.on_lattice(self.lattice.shape)
        self.detailed: FactorisedDefNet | None = None  # the net, if its free velocities are fitted on this level
        if isinstance(net, FactorisedDefNet) and net.detail is not None:
            fitted = net.resolves_detail(self.lattice.shape) or level is settings.levels[-1]
            self.detailed = net if fitted and net.carries_detail(self.lattice.shape) else None
            net.detail.requires_grad_(self.detailed is not None)
        half_extent_mm = torch.tensor(grid.half_extent_mm, dtype=torch.float32, device=device)
        self.half_extent_mm = half_extent_mm[:, None, None, None]
        # One image's velocity and the loss's gradient by it, always in the same place (`Replay`).
        self.velocity_mm = torch.zeros(1, 3, *self.lattice.shape, device=device)
        self.gradient = torch.zeros_like(self.velocity_mm)
        self.replays: dict[tuple[int, int, int], Replay[dict[str, torch.Tensor]]] = {}
        self.pool = memory_pool(device)
        self.may_record = isinstance(reference, np.ndarray) and not guides
        self.given_back: dict[float, torch.Tensor] = {}
        # Both images pass the same Gaussian where they are compared, the reference after it is moved: smoothed
        # before, it would be blurred less where tissue shrinks, and edges would meet in the wrong place.
        moved_smoothing = settings.smoothing
        sigma_mm = level.aliasing_sigma_mm(grid, grid)
        if isinstance(reference, RefNet):  # the Gaussian that voxels pass before, it passes after
            self.reference = partial(_network_values, reference, grid)
            moved_smoothing = math.hypot(settings.smoothing, sigma_mm[0] / min(grid.spacing_mm))
            sigma_mm = (0.0, 0.0, 0.0)
        else:  # read between its voxels, so it is kept at twice the resolution
            fine, _ = on_grid(
                reference[part], grid, level.voxels(grid, refine=2), sigma_mm=sigma_mm, device=device
            )
            self.reference = partial(sample, _tensor(fine, device))
        # Coarse levels look for motion everywhere, in faint tissue too; on the last one edges say more than noise.
        contrast = settings.contrast if level is settings.levels[-1] else 0.0
        view = round_view(series.reference_image)
        seen = None if view is None else view.seen(series.grid.shape)
        self.targets: dict[int, _Target] = {}
        for i in fitted_images(series, settings):
            # An image is compared at its own voxels, wherever pre-alignment has them: read between them, it would
            # be blurred here and not there, and its noise with it. Where they are finer than the level's, at
            # coarser ones along its own axes, which its Gaussian is wide enough for.
            image, own = series.images[i], Grid.of(series.images[i])
            box = part_around(grid, own, alignments[i])
            values, shown = compared(image, series.window)
            values, shown = values[box.within(own)], None if shown is None else shown[box.within(own)]
            back = np.linalg.inv(alignments[i])
            voxels, to_cube = self.voxels, None
            if not (box.is_close(grid) and np.allclose(alignments[i], np.eye(4))):
                voxels = level.voxels_beside(grid, box)
                to_cube = grid.world_to_cube_matrix @ back @ voxels.index_to_world_matrix
            # Of two slice thicknesses both get the larger one: this image now, the reference after it is moved.
            own_sigma_mm = level.aliasing_sigma_mm(grid, box)
            target, covered = on_grid(values, box, voxels, None, own_sigma_mm, device, True, shown)
            covered = covered & covered_on(grid, voxels, back)
            if seen is not None:
                covered = covered & covered_on(series.grid, voxels, back, seen)
            weight = None if covered.all() else _tensor(covered, device)
            fixed = smoothed(_tensor(target, device), level.smoothing(grid, settings.smoothing, voxels))
            wider = _wider(box, grid, voxels, own_sigma_mm, sigma_mm)
            within = [s if s >= WIDER else 0.0 for s in wider]
            moved_sigma = np.hypot(
                level.smoothing(grid, moved_smoothing, voxels),
                [0.0 if inside else s for s, inside in zip(wider, within, strict=True)][::-1],
            )
            radius, _, _ = losses.box_radii(voxels.shape, voxels.spacing_mm, settings.window_mm)
            self.targets[i] = _Target(
                time=series.times[i],
                voxels=voxels,
                places=[(1.0, None)] if to_cube is None else _places_within(to_cube, within, voxels, device),
                similarity=_similarity(settings, fixed, weight, voxels, contrast),
                share=_share_of(covered),
                overlap=max(2, radius),
                moved_sigma=tuple(moved_sigma.tolist()),
                guides=guides.get(i, {}),
                stretch_mm=self._stretch(alignments[i], device),
            )

    def _stretch(self, alignment: np.ndarray, device: torch.device) -> torch.Tensor | None:
        """What an alignment stretches, as a velocity in axis mm on the lattice; None: nothing penalties feel."""
        rate = stretch_rate(alignment)
        felt = self.settings.diffusion or self.settings.total_variation  # bending doesn't feel what is linear
        if not felt or np.allclose(rate, 0.0, atol=1e-6):
            return None
        around_the_centre = homogeneous(rate, -rate @ self.lattice.centre_mm)
        world_mm = affine_points(around_the_centre @ self.lattice.index_to_world_matrix, self.lattice.shape)
        velocity_mm = self.lattice.vectors_from_world(world_mm).to(device, torch.float32)
        return velocity_mm.movedim(-1, 0)[None].contiguous()

    def pull(self) -> dict[str, torch.Tensor]:
        """`bregman` times the penalties' gradient by the velocity of each target as it is now, (T, 3, z, y, x)."""
        with torch.no_grad():
            velocity_mm = self.velocity_at(self._times())
        pulls = torch.zeros_like(velocity_mm)
        for row, target in enumerate(self.targets.values()):
            leaf = velocity_mm[row : row + 1].requires_grad_()
            if penalties := list(self._penalties(leaf, target).values()):
                (gradient,) = torch.autograd.grad(torch.stack(penalties).sum(), leaf)
                pulls[row : row + 1] = self.settings.bregman * gradient
        return {"pull": pulls}

    def give_back(self, pull: Mapping[str, torch.Tensor]) -> None:
        """From now on the loss of each target is less by its velocity times what `pull` found for it."""
        pulls = pull["pull"].to(self.velocity_mm).split(1)
        self.given_back = dict(zip(self._times(), pulls, strict=True))

    def _times(self) -> list[float]:
        return [target.time for target in self.targets.values()]

    def backward(self, chosen: Sequence[int], draw: np.random.Generator) -> dict[str, torch.Tensor]:
        """Add the gradient of the mean loss over these targets to the network; returns the loss's terms."""
        targets = [self.targets[i] for i in chosen]
        velocity_mm = self.velocity_at([target.time for target in targets])
        # The graph is cut here: each time's images are done and forgotten before the next one's,
        # and the network's own backward pass runs once, on the sum.
        gradient = torch.empty_like(velocity_mm)
        sums: dict[str, torch.Tensor] = {}
        shapes, overlaps = [target.voxels.shape for target in targets], [target.overlap for target in targets]
        drawn = random_slabs(shapes, self.settings.voxels_per_step, draw, overlaps)
        for row, (i, slab) in enumerate(zip(chosen, drawn, strict=True)):
            self.velocity_mm.copy_(velocity_mm[row : row + 1].detach())
            values = self._look(i, slab)
            gradient[row : row + 1] = self.gradient / len(targets)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value / len(targets)
        # On a GPU this would wait for it; there the next loss tells.
        if gradient.device.type == "cpu" and not gradient.isfinite().all():
            raise FitError(f"Def-Net: {self._broken(velocity_mm.detach(), targets, drawn)}; lower learning_rate")
        velocity_mm.backward(gradient)
        if self.detailed is not None and (weight := self.settings.detail_total_variation):
            detail, detail_grid = self.detailed.smooth_detail(), self.detailed.detail_grid
            variation = weight * losses.total_variation(detail, detail_grid.spacing_mm)
            variation.backward()
            sums |= {"loss": sums["loss"] + variation.detach(), "detail_total_variation": variation.detach()}
        return sums

    def _look(self, index: int, slab: slice) -> dict[str, torch.Tensor]:
        """The loss of one image, and its terms, for `velocity_mm`; its gradient by that goes to `gradient`."""

        def look() -> dict[str, torch.Tensor]:
            leaf = self.velocity_mm.detach().requires_grad_()
            terms = self._terms(leaf, self.targets[index], slab)
            loss = torch.stack(list(terms.values())).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
            self.gradient.copy_(gradient)
            return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}

        if not self.may_record:
            return look()
        return self.replays.setdefault((index, slab.start, slab.stop), Replay(self.pool))(look)

    def _broken(self, velocity_mm: torch.Tensor, targets: Sequence[_Target], slabs: Sequence[slice]) -> str:
        """Which term it was, of a loss whose gradient by the velocity is not finite."""
        if not velocity_mm.isfinite().all():
            return "the velocity is not finite"
        for row, (target, slab) in enumerate(zip(targets, slabs, strict=True)):
            leaf = velocity_mm[row : row + 1].detach().requires_grad_()
            for name, term in self._terms(leaf, target, slab).items():
                if not term.isfinite():
                    return f"{name} is {float(term.detach())} at time {target.time:g}"
                (gradient,) = torch.autograd.grad(term, leaf, retain_graph=True)
                if not gradient.isfinite().all():
                    return f"the gradient of {name} is not finite at time {target.time:g}"
        return "the gradient of the loss is not finite"

    def _terms(self, velocity_mm: torch.Tensor, target: _Target, slab: slice) -> dict[str, torch.Tensor]:
        """The weighted terms of the loss at one time, from its velocity (1, 3, z, y, x) on the lattice."""
        settings, spacing_mm = self.settings, self.lattice.spacing_mm
        displacement = exponential(velocity_mm / self.half_extent_mm, settings.squarings)
        # The mean over a slab counts by how much it is a mean of: at the ends of a turned image it is little.
        similarity = target.similarity(self._pull_back(displacement, target, slab), slab)
        terms: dict[str, torch.Tensor] = {settings.loss: target.share(slab) * similarity}
        terms |= self._penalties(velocity_mm, target)
        if target.time in self.given_back:
            terms["given_back"] = -(self.given_back[target.time] * velocity_mm).sum()
        for name, penalty in DISPLACEMENT_PENALTIES.items():
            if weight := getattr(settings, name):
                terms[name] = weight * penalty(displacement * self.half_extent_mm, spacing_mm)
        for name, distance_mm in target.guides.items():
            terms[name] = getattr(settings, name) * distance_mm(displacement)
        return terms

    def _penalties(self, velocity_mm: torch.Tensor, target: _Target) -> dict[str, torch.Tensor]:
        """The weighted penalties on a target's velocity (1, 3, z, y, x).

        They see what pre-alignment stretched too: tissue that moved with its rigid part alone costs nothing. Else
        an affine fit that follows a lung would stretch the bones beside it, and undoing that would cost.
        """
        whole_mm = velocity_mm if target.stretch_mm is None else velocity_mm - target.stretch_mm
        return {
            name: weight * penalty(whole_mm, self.lattice.spacing_mm)
            for name, penalty in VELOCITY_PENALTIES.items()
            if (weight := getattr(self.settings, name))
        }

    def _pull_back(self, displacement: torch.Tensor, target: _Target, slab: slice) -> torch.Tensor:
        """The reference at p + u(p) for the voxels p of a slab of a target, (1, 1, z, y, x)."""
        shape, sigma = target.voxels.shape, target.moved_sigma
        first, *others = (
            weight * pulled_back(self.reference, displacement, shape, slab, sigma, places)
            for weight, places in target.places
        )
        return sum(others, first)


Penalty = Callable[[torch.Tensor, Triple], torch.Tensor]
VELOCITY_PENALTIES: dict[str, Penalty] = {
    "diffusion": losses.diffusion,
    "bending": losses.bending,
    "total_variation": losses.total_variation,
}
DISPLACEMENT_PENALTIES: dict[str, Penalty] = {"folding": losses.folding_penalty, "volume": losses.volume_penalty}


def _similarity(
    settings: DefNetSettings, fixed: torch.Tensor, weight: torch.Tensor | None, grid: Grid, contrast: float
) -> Similarity:
    if settings.loss == "local_ncc":
        return losses.LocalNCC(fixed, grid.spacing_mm, settings.window_mm, weight, settings.noise, contrast)
    measure = losses.mse if settings.loss == "mse" else losses.global_ncc
    if weight is None:
        return lambda moved, slab: measure(fixed[:, :, slab], moved)
    return lambda moved, slab: measure(fixed[:, :, slab], moved, weight[:, :, slab])


def _share_of(covered: np.ndarray) -> Callable[[slice], float]:
    """Of slabs of a mask (z, y, x) their density, relative to that of all; 1 where nothing is covered."""
    of_slices = covered.mean(axis=(1, 2))
    whole = of_slices.mean()
    return lambda slab: float(of_slices[slab].mean() / whole) if whole else 1.0


def _wider(
    image: Grid, reference: Grid, voxels: Grid, image_sigma_mm: Triple, reference_sigma_mm: Triple
) -> list[float]:
    """σ along an image's x, y and z, in voxels, of what makes the reference's voxels as wide as the image's.

    Less what the reference's Gaussian of the level (`reference_sigma_mm`) has done, where the image, whose voxels
    are too wide for it, doesn't pass it.
    """
    spacing_mm = np.asarray(voxels.spacing_mm)
    passed = np.where(np.divide(image_sigma_mm, spacing_mm) < NARROW, min(reference_sigma_mm), 0.0)
    squares = np.square(thicker_sigma_mm(image, reference)) - np.square(passed)
    sigmas: list[float] = (np.sqrt(squares.clip(min=0.0)) / spacing_mm).tolist()
    return sigmas


def _points_within(sigma: Sequence[float]) -> list[tuple[float, np.ndarray]]:
    """Weights, and points (x, y, z) from a voxel's middle, whose standard deviation is `sigma` along each axis.

    For a thick slice beside thin ones nearly Simpson's rule: its middle, and close to its faces. Exact for a
    Gaussian average of polynomials of the fifth degree along each axis.
    """
    axes = [axis for axis, s in enumerate(sigma) if s > 0]
    points = [(1 - len(axes) / 3, np.zeros(3))] if len(axes) < 3 else []
    for axis in axes:
        for side in (-1, 1):
            at = np.zeros(3)
            at[axis] = side * math.sqrt(3) * sigma[axis]
            points.append((1 / 6, at))
    return points


def _places_within(
    to_cube: np.ndarray, sigma: Sequence[float], voxels: Grid, device: torch.device
) -> list[tuple[float, Places]]:
    """Weights and places of the points within voxels (`_points_within`); a (4, 4) takes indices to a cube."""
    return [
        (weight, _places(to_cube @ homogeneous(np.eye(3), at), voxels, device))
        for weight, at in _points_within(sigma)
    ]


def _places(matrix: np.ndarray, voxels: Grid, device: torch.device) -> Places:
    """Of slabs of voxels their indices times a (4, 4) matrix, (1, z, y, x, 3), float32."""
    z, y, x = (axis.float() for axis in affine_axes(matrix, voxels.shape, device))
    return lambda slab: (z[slab] + y + x)[None]


def _network_values(ref_net: RefNet, grid: Grid, points: torch.Tensor) -> torch.Tensor:
    """(1, 1, z, y, x) of Ref-Net at points (1, z, y, x, 3) of a grid's cube."""
    if grid != ref_net.grid:
        points = apply_affine(ref_net.grid.world_to_cube_matrix @ grid.cube_to_world_matrix, points)
    values: torch.Tensor = ref_net(points.reshape(-1, 3))
    return values.reshape(1, 1, *points.shape[1:-1])


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """(1, 1, z, y, x), float32."""
    return torch.from_numpy(array).to(device, torch.float32)[None, None]
