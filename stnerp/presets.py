"""All settings of a fit, in two presets: `paper`, to the letter, and `fast`, the default.

Lengths are in mm and so mean the same on every scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from stnerp.errors import InputError
from stnerp.geometry import Grid, Triple, slab_count
from stnerp.preprocess import thinner_sigma_mm
from stnerp.warp import Shape


@dataclass(frozen=True)
class RefNetSettings:
    """How Ref-Net is built and fitted (Eq. 1-3).

    Attributes:
        backbone: "siren" (Fourier features and a SIREN: the paper's) or "grid" (multi-resolution features).
        layers, width, omega, fourier_width, fourier_sigma: of the SIREN.
        grid_levels, grid_features, decoder_width: of the feature grid: resolutions, each half the one
            before; channels of each; hidden units of the decoder.
        grid_finest_voxels: spacing of the finest resolution, in voxels of the image.
        remainder: part of what the network has not learnt, noise most of it, that is kept as voxels and added
            to the network, read linearly; 1: the image comes back exactly at its voxels; 0: the network alone.
        iterations: steps of Adam.
        learning_rate, decay: constant, or falling to zero along a cosine.
        fraction_per_step: part of the voxels drawn for each step; 1: all of them, as Eq. 3 reads.
    """

    backbone: Literal["siren", "grid"] = "grid"
    layers: int = 8
    width: int = 256
    omega: float = 30.0
    fourier_width: int = 256
    fourier_sigma: float = 3.0
    grid_levels: int = 4
    grid_features: int = 2
    decoder_width: int = 32
    grid_finest_voxels: float = 2.0
    remainder: float = 1.0
    iterations: int = 200
    learning_rate: float = 2e-2
    decay: Literal["constant", "cosine"] = "cosine"
    fraction_per_step: float = 1 / 64


@dataclass(frozen=True)
class Level:
    """One level of the fit, coarse to fine.

    Attributes:
        spacing_mm: spacing of the voxels that are compared, no finer than an image has; None: the reference's own.
        lattice_mm: spacing of the lattice that carries the velocity; None: that of the voxels.
        iterations: steps of Adam, where a step looks at every voxel (else see `steps`).
        times_per_step: target times that a step looks at, drawn anew for each; None: all of them.
        learning_rate: of a new Adam for the network, falling along a cosine over this level alone; None: the fit's
            goes on. Gradients of fine images are larger, and steps of the size that coarse ones want throw the
            network about: on 2 mm one of 1e-4 moves all tissue by 0.2 mm.
    """

    spacing_mm: float | None
    lattice_mm: float | None
    iterations: int
    times_per_step: int | None = None
    learning_rate: float | None = None

    def voxels(self, grid: Grid, refine: float = 1.0) -> Grid:
        """A grid's voxels as they are compared, never finer than its own; `refine` times as many per axis where
        the level has a spacing."""
        if self.spacing_mm is None:
            return grid
        x, y, z = (max(self.spacing_mm, s) / refine for s in grid.spacing_mm)
        return grid.with_spacing((x, y, z))

    def voxels_beside(self, reference: Grid, grid: Grid) -> Grid:
        """The voxels of an image on `grid` as they are compared: no finer than its own, nor than the level's, or,
        where that has no spacing, the reference's finest.

        Beside a reference of thick slices they stay thin: slices thinned out as far lie between the reference's,
        where it has to be interpolated, all of them; among thin ones some lie at them.
        """
        level = self if self.spacing_mm is not None else replace(self, spacing_mm=min(reference.spacing_mm))
        return level.voxels(grid)

    def steps(self, shapes: Sequence[Shape], voxels_per_step: int | None) -> int:
        """Steps of Adam: √n times `iterations` where a step looks at an n-th of the voxels alone.

        Of each target it looks at a slab, of different ones at different slabs, as far as they go round: a series
        is seen whole in every step where one pair of the same size is not, and stops too early.

        Args:
            shapes: (z, y, x) of the voxels of each target that are compared.
        """
        slabs = float(np.mean([slab_count(shape, voxels_per_step) for shape in shapes]))
        at_once = min(len(shapes), self.times_per_step or len(shapes))
        return round(self.iterations * math.sqrt(max(1.0, slabs / at_once)))

    def aliasing_sigma_mm(self, grid: Grid, image: Grid) -> Triple:
        """σ along an image's x, y and z of the Gaussian that it passes before it is read at a level's voxels.

        Half of such a voxel, less what voxels of the reference, on `grid`, have blurred already; and what makes
        the image's own voxels as thick as those.
        """
        own_mm = min(grid.spacing_mm)
        level_mm = 0.5 * math.sqrt(max(self.spacing_mm or 0.0, own_mm) ** 2 - own_mm**2)
        x, y, z = (math.hypot(level_mm, thicker_mm) for thicker_mm in thinner_sigma_mm(image, grid))
        return x, y, z

    def smoothing(self, grid: Grid, smoothing: float, compared: Grid | None = None) -> tuple[float, float, float]:
        """σ (z, y, x), in voxels as they are compared, of the Gaussian that images pass after they are moved.

        Args:
            grid: the reference's.
            smoothing: σ in units of its finest spacing.
            compared: those voxels; None: the reference's own at this level.
        """
        x, y, z = (compared or self.voxels(grid)).spacing_mm
        sigma_mm = smoothing * min(grid.spacing_mm)
        return sigma_mm / z, sigma_mm / y, sigma_mm / x

    def lattice(self, grid: Grid) -> Grid:
        """The lattice that carries the velocity."""
        return self.voxels(grid) if self.lattice_mm is None else grid.with_spacing(self.lattice_mm)


@dataclass(frozen=True)
class DefNetSettings:
    """How Def-Net is built and fitted (Eq. 4-6).

    Attributes:
        form: "factorised", v = Σₖ aₖ(t) Vₖ(x), or "space_time", one network of (x, y, z, t): the paper's.
        layers, width, omega, fourier_width, fourier_sigma: of its SIREN. For "factorised" they count
            per `length_mm`, for "space_time" per side of the image.
        length_mm, velocity_mm: units of space and of the output of "factorised".
        network_mm: "factorised" is evaluated at points this far apart at most, and read between them by
            cubic splines; None: at every point of the lattice.
        detail_mm: "factorised" adds free velocities, this far apart, on lattices finer than `network_mm`: motion
            that the smooth network can't follow. They are fitted on levels whose lattice is no coarser, and on the
            last one. None: the network alone.
        detail_step_mm: the largest change of a free velocity in one step.
        detail_total_variation: weight of the isotropic total variation of the free velocities, all times
            together, so that they stay zero where the network explains the images.
        squarings: n of the scaling and squaring (Eq. 5).
        region: what Def-Net covers: "patient", of CTs the box of the reference that holds the patient at all times
            (`stnerp.region`), or "image", all of it.
        reference: what is pulled back: "rendered", Ref-Net's image read linearly, or "network", Ref-Net
            itself at the moved points (Eq. 6). Without a Ref-Net it is always the scan's voxels.
        loss: "local_ncc", "global_ncc" or "mse" (Eq. 6).
        window_mm, noise: of the local NCC (see `losses.LocalNCC`).
        contrast: power of its contrast by which a window of the local NCC counts on the last level; 0: all alike.
        smoothing: σ of the Gaussian through which images are compared, the moved one after it is moved, in units
            of the scan's finest spacing: noise is as wide as its voxels are.
        diffusion, bending, total_variation: weights of the penalties on the whole velocity, what pre-alignment
            stretched included.
        bregman: part of those penalties' pull on the velocity, as it is when the last of several levels begins,
            that is given back on that level (Bregman iteration, Osher et al. 2005). Penalties make every motion
            too small, a small one by as much as a large one; 1 takes that back, and what begins to follow noise
            is penalised as before. 0: nothing.
        folding, volume: weights of the penalties on the Jacobian of the displacement.
        contours, landmarks: weights of the distance (mm) of known contours and landmarks from the reference's,
            at the times that have them (see `guidance`).
        learning_rate, decay: of Adam; constant, or falling along a cosine over all levels.
        levels: coarse to fine.
        voxels_per_step: about how many voxels of a target a step looks at, a slab of slices drawn anew
            each time, so that what is compared in a step doesn't grow with the image; how many steps a level
            then takes: `Level.steps`. None: all of them.
    """

    form: Literal["factorised", "space_time"] = "factorised"
    layers: int = 4
    width: int = 128
    omega: float = 8.0
    fourier_width: int = 64
    fourier_sigma: float = 0.5
    length_mm: float = 150.0
    velocity_mm: float = 30.0
    network_mm: float | None = 8.0
    detail_mm: float | None = 4.0
    detail_step_mm: float = 1.0
    detail_total_variation: float = 0.05
    squarings: int = 4
    region: Literal["patient", "image"] = "patient"
    reference: Literal["rendered", "network"] = "rendered"
    loss: Literal["local_ncc", "global_ncc", "mse"] = "local_ncc"
    window_mm: float = 11.0
    noise: float = 0.02
    contrast: float = 1.0
    smoothing: float = 0.6
    diffusion: float = 0.01
    bending: float = 0.0
    total_variation: float = 0.1
    bregman: float = 1.0
    folding: float = 0.0
    volume: float = 0.0
    contours: float = 0.0
    landmarks: float = 0.0
    learning_rate: float = 1e-3
    decay: Literal["constant", "cosine"] = "cosine"
    levels: tuple[Level, ...] = (
        Level(8, 12, 60),
        Level(4, 6, 50),
        Level(2, 4, 45, learning_rate=1e-5),
    )
    voxels_per_step: int | None = 2**20


@dataclass(frozen=True)
class Preset:
    """Settings of both networks."""

    ref_net: RefNetSettings = field(default_factory=RefNetSettings)
    def_net: DefNetSettings = field(default_factory=DefNetSettings)


FAST = Preset()

PAPER = Preset(
    ref_net=RefNetSettings(
        backbone="siren",
        remainder=0.0,
        iterations=2000,
        learning_rate=1e-4,
        decay="constant",
        fraction_per_step=1.0,
    ),
    def_net=DefNetSettings(
        form="space_time",
        layers=8,
        width=256,
        omega=30.0,
        fourier_width=256,
        fourier_sigma=3.0,
        detail_mm=None,
        squarings=7,
        region="image",
        reference="network",
        loss="mse",
        contrast=0.0,
        smoothing=0.0,
        diffusion=0.0,
        total_variation=0.0,
        bregman=0.0,
        learning_rate=1e-5,
        decay="constant",
        levels=(Level(None, None, 2000),),
        voxels_per_step=None,
    ),
)

# Of the flow between neighbouring images (`appearance.fit_flow`), whichever the preset. Its levels take their
# iterations as they are, also where a step looks at a part.
FLOW = DefNetSettings(
    network_mm=12.0,
    squarings=5,
    region="image",
    detail_mm=None,
    window_mm=8.0,
    noise=0.02,
    contrast=0.0,
    smoothing=0.5,
    diffusion=0.1,
    total_variation=0.0,
    bregman=0.0,
    levels=(Level(8, 12, 60), Level(4, 8, 60), Level(2, 6, 30)),
)

Settings = TypeVar("Settings", RefNetSettings, DefNetSettings)


def preset_of(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: an unknown name.
    """
    known = {"fast": FAST, "paper": PAPER}
    if name not in known:
        raise InputError(f"preset: unknown name {name!r}; give one of {', '.join(known)}")
    return known[name]


LEVEL = "(spacing_mm, lattice_mm, iterations[, times_per_step, learning_rate])"


def with_changes(settings: Settings, changes: dict[str, Any]) -> Settings:
    """Settings with some replaced; `levels` may also come as tuples in the order of `Level`.

    Raises:
        InputError: a setting that doesn't exist.
    """
    known = {f.name for f in fields(settings)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise InputError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if "levels" in changes:
        given = changes["levels"]
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise InputError(f"levels: {given!r} must be a list of {LEVEL}")
        levels = tuple(_level(level) for level in given)
        if not levels:
            raise InputError(f"levels: give at least one level {LEVEL}")
        changes = {**changes, "levels": levels}
    changed = _plain(replace(settings, **changes))
    _check(changed)
    return changed


def ref_net_settings_of(saved: dict[str, Any]) -> RefNetSettings:
    """The settings in a file; those that 0.1.0 didn't know are as it was: grids to the voxels, nothing added."""
    return with_changes(RefNetSettings(), {"grid_finest_voxels": 1.0, "remainder": 0.0, **saved})


def def_net_settings_of(saved: dict[str, Any]) -> DefNetSettings:
    """The settings in a file; those that 0.1.0 didn't know are as it was: a network read everywhere, and alone,
    nothing given back, all windows alike, all of the image covered."""
    before = {"network_mm": None, "detail_mm": None, "bregman": 0.0, "contrast": 0.0, "region": "image"}
    return with_changes(DefNetSettings(), {**before, **saved})


AT_LEAST_ONE = (
    "width", "fourier_width", "grid_levels", "grid_features", "decoder_width", "iterations",
    "times_per_step", "voxels_per_step",
)  # fmt: skip
POSITIVE = (
    "learning_rate",
    "fraction_per_step",
    "omega",
    "grid_finest_voxels",
    "length_mm",
    "velocity_mm",
    "window_mm",
    "noise",
    "spacing_mm",
    "lattice_mm",
    "network_mm",
    "detail_mm",
    "detail_step_mm",
)


def _plain(settings: Any) -> Any:
    """The same with Python's own numbers, NumPy's else; whole ones where they must be: 4.0 squarings are 4."""
    numbers: dict[str, Any] = {}
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if name == "levels":
            numbers[name] = tuple(_plain(level) for level in value)
        elif not isinstance(value, bool) and isinstance(value, Real):
            number = float(value)
            whole = isinstance(value, Integral) or (int in (hint, *get_args(hint)) and number.is_integer())
            numbers[name] = int(number) if whole else number
    return replace(settings, **numbers)


def _check(settings: RefNetSettings | DefNetSettings | Level, within: str = "") -> None:
    """InputError for a choice that doesn't exist or a number that makes no sense."""
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"{within}{name}: unknown choice {value!r}; give one of {', '.join(get_args(hint))}")
        if name == "levels":
            for level in value:
                _check(level, within="levels: ")
        elif get_origin(hint) is Literal or (value is None and type(None) in get_args(hint)):
            continue
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{within}{name}: {value!r} must be a number")
        elif not math.isfinite(value) or value < 0:
            raise InputError(f"{within}{name}: {value} must be a finite number, not negative")
        elif int in (hint, *get_args(hint)) and value != int(value):
            raise InputError(f"{within}{name}: {value!r} must be a whole number")
        elif (name in AT_LEAST_ONE and value < 1) or (name == "layers" and value < 2):
            raise InputError(f"{within}{name}: {value} must be at least {2 if name == 'layers' else 1}")
        elif (name.startswith("fraction") or name in ("remainder", "bregman")) and value > 1:
            raise InputError(f"{within}{name}: {value} must be at most 1")
        elif name in POSITIVE and value == 0:
            raise InputError(f"{within}{name}: must be above 0")


def _level(value: Any) -> Level:
    if isinstance(value, Level):
        return value
    try:
        return Level(**value) if isinstance(value, dict) else Level(*value)
    except TypeError as error:
        raise InputError(f"levels: {value!r} must be {LEVEL}") from error
