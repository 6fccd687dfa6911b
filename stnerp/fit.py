"""Fit Def-Net with the reference frozen: min Σₜ Σₚ |R(p + uₜ(p)) − fₜ(p)|² (Eq. 6), or a better similarity.

A step: velocity of all times on the lattice (one pass of the network) → scaling and squaring →
displacement at the voxels of this level → the reference pulled back → its similarity to each target.
Times are done one after the other, so memory doesn't grow with their number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from stnerp import losses
from stnerp.alignment import Kind, affine_between
from stnerp.appearance import fit_flow
from stnerp.def_net import DefNet, FactorisedDefNet, def_net_of
from stnerp.device import device_of
from stnerp.errors import FitError, InputError
from stnerp.geometry import Grid, Triple, random_slab
from stnerp.guidance import Guide, guides_of
from stnerp.model import STNeRP
from stnerp.preprocess import normalised, on_grid
from stnerp.presets import DefNetSettings, Level, preset_of, with_changes
from stnerp.ref_net import RefNet, cosine, fingerprint_of, require_finite
from stnerp.series import Series
from stnerp.time_basis import TimeBasis
from stnerp.uniform_adam import UniformAdam
from stnerp.velocity import exponential
from stnerp.warm_start import RATE, Init, start_from
from stnerp.warp import displaced_points, resize, sample

Similarity = Callable[[torch.Tensor, slice], torch.Tensor]  # of a moved slab of slices


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
        settings: any field of `presets.DefNetSettings`, by name.

    Raises:
        InputError: unknown names, a Ref-Net of another image, or guidance that the series doesn't have, or a start
            that doesn't fit.
        FitError: no overlap to align, or a loss that is not a number.
    """
    chosen = with_changes(preset_of(preset).def_net, settings)
    if appearance not in ("reference", "blend"):
        raise InputError(f"appearance: unknown {appearance!r}; give reference or blend")
    where = device_of(device)
    if ref_net is not None:
        _check_ref_net(ref_net, series)
    torch.manual_seed(seed)
    alignments = _alignments(series, align)
    guides = guides_of(series, alignments, chosen, guided_times, where)
    basis = TimeBasis(series.times, series.reference_time, series.period)
    net = def_net_of(series.grid, basis, chosen).to(where)
    pace = chosen
    if init is not None:
        start_from(net, init, series, alignments, chosen)
        pace = replace(chosen, learning_rate=RATE * chosen.learning_rate)
    if ref_net is not None:
        ref_net = copy.deepcopy(ref_net).to(where).requires_grad_(False)  # the caller's stays as it is
    history = _optimise(net, ref_net, series, alignments, pace, guides, progress)
    flow = None
    if appearance == "blend":
        flow = fit_flow(series, alignments, device=where, seed=seed, progress=progress)
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
    )


def _check_ref_net(ref_net: RefNet, series: Series) -> None:
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
    reference = series.grid.image(normalised(series.reference_image, series.window))
    matrices = [np.eye(4)] * len(series)
    for i in series.targets:
        target = Grid.of(series.images[i]).image(normalised(series.images[i], series.window))
        matrices[i] = affine_between(reference, target, kind)
    return np.stack(matrices)


def _optimise(
    net: DefNet,
    ref_net: RefNet | None,
    series: Series,
    alignments: np.ndarray,
    settings: DefNetSettings,
    guides: Mapping[int, Mapping[str, Guide]],
    progress: bool,
) -> list[dict[str, float]]:
    """Train `net` in place, level by level; returns the loss and its terms at each step."""
    detail = net.detail if isinstance(net, FactorisedDefNet) else None
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Adam([p for p in net.parameters() if p is not detail], lr=settings.learning_rate)
    ]
    steps = sum(level.iterations for level in settings.levels)
    schedules = [cosine(optimisers[0], steps)] if settings.decay == "cosine" else []
    reference = ref_net.render() if ref_net is not None else normalised(series.reference_image, series.window)
    draw = np.random.default_rng(torch.initial_seed())
    history: list[dict[str, Any]] = []  # tensors until the end: reading one waits for the GPU
    with tqdm(total=steps, desc="Def-Net", disable=not progress) as bar:
        for number, level in enumerate(settings.levels):
            images = _Level(net, ref_net, reference, series, alignments, settings, guides, level)
            if images.detailed is not None and detail is not None and len(optimisers) == 1:
                optimisers.append(UniformAdam([detail], lr=settings.detail_step_mm))
                remaining = sum(later.iterations for later in settings.levels[number:])
                schedules += [cosine(optimisers[1], remaining)] if settings.decay == "cosine" else []
            for _ in range(level.iterations):
                net.zero_grad(set_to_none=True)
                values = images.backward(_chosen_times(fitted_images(series, settings), level, draw), draw)
                for optimiser in optimisers:
                    optimiser.step()
                for schedule in schedules:
                    schedule.step()
                bar.update()
                if len(history) % 10 == 0 or len(history) == steps - 1:
                    loss = float(values["loss"])
                    if not np.isfinite(loss):
                        raise FitError(f"Def-Net: the loss is {loss} at step {len(history)}; lower learning_rate")
                    bar.set_postfix(loss=f"{loss:.4f}", level=f"{number + 1}/{len(settings.levels)}")
                history.append({"step": len(history) + 1, "level": number + 1, **values})
    require_finite(net, "Def-Net")
    return [{name: float(value) for name, value in row.items()} for row in history]


def fitted_images(series: Series, settings: DefNetSettings) -> list[int]:
    """The images that the fit compares: Eq. 6 sums over all times. "factorised" maps the reference to itself
    by construction, so there is nothing to learn from it."""
    return list(series.targets) if settings.form == "factorised" else list(range(len(series)))


def _chosen_times(targets: list[int], level: Level, draw: np.random.Generator) -> list[int]:
    """Which targets this step looks at: all, or some drawn without repetition."""
    if level.times_per_step is None or level.times_per_step >= len(targets):
        return targets
    return sorted(draw.choice(targets, level.times_per_step, replace=False).tolist())


@dataclass(frozen=True)
class _Target:
    """One time's image at one level: how well a moved reference agrees with it, and what guides its motion."""

    time: float
    similarity: Similarity
    guides: Mapping[str, Guide]


class _Level:
    """The images of one level of the fit, and the loss between them."""

    def __init__(
        self,
        net: DefNet,
        ref_net: RefNet | None,
        reference: np.ndarray,
        series: Series,
        alignments: np.ndarray,
        settings: DefNetSettings,
        guides: Mapping[int, Mapping[str, Guide]],
        level: Level,
    ) -> None:
        self.net, self.ref_net, self.settings = net, ref_net, settings
        grid, device = series.grid, next(net.parameters()).device
        self.voxels, self.lattice = level.voxels(grid), level.lattice(grid)
        self.detailed = (
            net if isinstance(net, FactorisedDefNet) and net.carries_detail(self.lattice.shape) else None
        )
        half_extent_mm = torch.tensor(grid.half_extent_mm, dtype=torch.float32, device=device)
        self.half_extent_mm = half_extent_mm[:, None, None, None]
        sigma_mm = settings.smoothing * (level.spacing_mm or 0.0)
        # The reference is read between its voxels, so it is kept at twice the resolution.
        fine, _ = on_grid(reference, grid, level.voxels(grid, refine=2), sigma_mm=sigma_mm)
        self.reference = _tensor(fine, device)
        self.targets: dict[int, _Target] = {}
        for i in fitted_images(series, settings):
            image = series.images[i]
            target, covered = on_grid(
                normalised(image, series.window), Grid.of(image), self.voxels, alignments[i], sigma_mm
            )
            weight = None if covered.all() else _tensor(covered, device)
            measure = _similarity(settings, _tensor(target, device), weight, self.voxels)
            self.targets[i] = _Target(series.times[i], measure, guides.get(i, {}))

    def backward(self, chosen: Sequence[int], draw: np.random.Generator) -> dict[str, torch.Tensor]:
        """Add the gradient of the mean loss over these targets to the network; returns the loss's terms."""
        targets = [self.targets[i] for i in chosen]
        velocity_mm = self.net.lattice_velocity(self.lattice.shape, [target.time for target in targets])
        # The graph is cut here: each time's images are done and forgotten before the next one's,
        # and the network's own backward pass runs once, on the sum.
        leaf = velocity_mm.detach().requires_grad_()
        sums: dict[str, torch.Tensor] = {}
        for row, target in enumerate(targets):
            terms = self._terms(
                leaf[row : row + 1], target, random_slab(self.voxels.shape, self.settings.voxels_per_step, draw)
            )
            loss = torch.stack(list(terms.values())).sum() / len(targets)
            loss.backward()
            for name, value in {"loss": loss * len(targets), **terms}.items():
                sums[name] = sums.get(name, loss.new_zeros(())) + value.detach() / len(targets)
        velocity_mm.backward(leaf.grad)
        if self.detailed is not None and (weight := self.settings.detail_total_variation):
            detail, detail_grid = self.detailed.smooth_detail(), self.detailed.detail_grid
            variation = weight * losses.total_variation(detail, detail_grid.spacing_mm)
            variation.backward()
            sums |= {"loss": sums["loss"] + variation.detach(), "detail_total_variation": variation.detach()}
        return sums

    def _terms(self, velocity_mm: torch.Tensor, target: _Target, slab: slice) -> dict[str, torch.Tensor]:
        """The weighted terms of the loss at one time, from its velocity (1, 3, z, y, x) on the lattice."""
        settings, spacing_mm = self.settings, self.lattice.spacing_mm
        displacement = exponential(velocity_mm / self.half_extent_mm, settings.squarings)
        terms: dict[str, torch.Tensor] = {
            settings.loss: target.similarity(self._pull_back(displacement, slab), slab)
        }
        for name, penalty in VELOCITY_PENALTIES.items():
            if weight := getattr(settings, name):
                terms[name] = weight * penalty(velocity_mm, spacing_mm)
        for name, penalty in DISPLACEMENT_PENALTIES.items():
            if weight := getattr(settings, name):
                terms[name] = weight * penalty(displacement * self.half_extent_mm, spacing_mm)
        for name, distance_mm in target.guides.items():
            terms[name] = getattr(settings, name) * distance_mm(displacement)
        return terms

    def _pull_back(self, displacement: torch.Tensor, slab: slice) -> torch.Tensor:
        """The reference at p + u(p) for the voxels p of a slab of this level, (1, 1, z, y, x)."""
        shape = self.voxels.shape
        points = displaced_points(resize(displacement, shape, slab=slab), shape, slab)
        if self.ref_net is None or self.settings.reference == "rendered":
            return sample(self.reference, points)
        return self.ref_net(points.reshape(-1, 3)).reshape(1, 1, *points.shape[1:-1])


Penalty = Callable[[torch.Tensor, Triple], torch.Tensor]
VELOCITY_PENALTIES: dict[str, Penalty] = {
    "diffusion": losses.diffusion,
    "bending": losses.bending,
    "total_variation": losses.total_variation,
}
DISPLACEMENT_PENALTIES: dict[str, Penalty] = {"folding": losses.folding_penalty, "volume": losses.volume_penalty}


def _similarity(
    settings: DefNetSettings, fixed: torch.Tensor, weight: torch.Tensor | None, grid: Grid
) -> Similarity:
    if settings.loss == "local_ncc":
        return losses.LocalNCC(fixed, grid.spacing_mm, settings.window_mm, weight, settings.noise)
    measure = losses.mse if settings.loss == "mse" else losses.global_ncc
    if weight is None:
        return lambda moved, slab: measure(fixed[:, :, slab], moved)
    return lambda moved, slab: measure(fixed[:, :, slab], moved, weight[:, :, slab])


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """(1, 1, z, y, x), float32."""
    return torch.from_numpy(array).to(device, torch.float32)[None, None]
