"""Motions that are known exactly: ground truth for images, points and contours.

A motion is a pair of maps of world points (LPS mm) that undo each other, one per time t. All
motions here are compositions of steps that move points along one line each, by a smooth profile of
bounded slope: a step is monotone along its line, hence a bijection, and is undone by solving
one equation in one unknown. Across the lines a step may even jump (`Sliding`); where it doesn't, it is
a diffeomorphism. With Ψ_t the composition at time t, reference points move by ψ_t = Ψ_t ∘ Ψ_ref⁻¹, the
identity at the reference time.

None of this is a flow of a stationary velocity, nor a sum of harmonics in time: a model that fits
those has to approximate these motions like a patient's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from stnerp.errors import InputError
from stnerp.geometry import Grid, Triple

Profile = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # coordinate in mm -> value, slope per mm

MIN_SLOPE = 0.1  # of a step along its line; 0 would fold
CHUNK = 1 << 14  # points mapped at a time, so that intermediate arrays stay in the processor's cache


class Motion(Protocol):
    """What a known motion offers. Points are (..., 3) in LPS mm; t is in the unit of `period`."""

    @property
    def period(self) -> float | None:
        """Length of a cycle; None: not periodic."""

    @property
    def reference_time(self) -> float:
        """Time at which both maps are exactly the identity."""

    def reference_to_target(self, points_mm: np.ndarray, t: float) -> np.ndarray:
        """Where points of the reference are at time t, (..., 3)."""

    def target_to_reference(self, points_mm: np.ndarray, t: float) -> np.ndarray:
        """Where points seen at time t are in the reference, (..., 3)."""

    def times(self, count: int = 10) -> list[float]:
        """Evenly spaced times that cover the motion."""


def world_box(grid: Grid) -> tuple[Triple, Triple]:
    """Centre and half size (x, y, z), LPS mm, of the world-aligned box around a grid's outer faces."""
    index = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners = grid.index_to_world(index * np.asarray(grid.size) - 0.5)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return _triple((low + high) / 2), _triple((high - low) / 2)


# -- steps: one line each, undone by solving one equation


@dataclass(frozen=True)
class Shear:
    """Moves one coordinate: x' = x + a · across(other coordinates) · along(x).

    Attributes:
        axis: the coordinate that moves, 0 to 2.
        along: profile of that coordinate, absolute value at most 1.
        across: profile of points (..., 3) that ignores `axis`, absolute value at most 1.
    """

    axis: int
    along: Profile
    across: Callable[[np.ndarray], np.ndarray]

    def forward(self, points_mm: np.ndarray, amplitude_mm: float) -> np.ndarray:
        moved = points_mm.copy()
        moved[..., self.axis] += amplitude_mm * self.across(points_mm) * self.along(points_mm[..., self.axis])[0]
        return moved

    def inverse(self, points_mm: np.ndarray, amplitude_mm: float) -> np.ndarray:
        scale = amplitude_mm * self.across(points_mm)

        def displacement(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            value, slope = self.along(x)
            return scale * value, scale * slope

        moved = points_mm.copy()
        moved[..., self.axis] = solve_monotone(displacement, points_mm[..., self.axis], np.abs(scale))
        return moved

    def least_slope(self, amplitude_mm: float, samples_mm: np.ndarray) -> float:
        return float(1 - abs(amplitude_mm) * np.abs(self.along(samples_mm)[1]).max())


@dataclass(frozen=True)
class Contraction:
    """Moves the distance to a centre: r' = r · (1 - a · B(r)), B from 1 (r ≤ inner) to 0 (r ≥ outer)."""

    centre_mm: Triple
    inner_mm: float
    outer_mm: float

    def forward(self, points_mm: np.ndarray, amount: float) -> np.ndarray:
        arm = points_mm - np.asarray(self.centre_mm)
        r = np.linalg.norm(arm, axis=-1, keepdims=True)
        return np.where(r < self.outer_mm, points_mm - amount * self._weight(r)[0] * arm, points_mm)

    def inverse(self, points_mm: np.ndarray, amount: float) -> np.ndarray:
        arm = points_mm - np.asarray(self.centre_mm)
        r_moved = np.linalg.norm(arm, axis=-1)
        near = r_moved < self.outer_mm
        moved = points_mm.copy()
        if near.any():
            r_near = r_moved[near]
            reach = np.full_like(r_near, abs(amount) * self.outer_mm)
            r = solve_monotone(lambda r: self._displacement(r, amount), r_near, reach)
            # 1 - a B(r) is r'/r, without the division by zero at the centre.
            stretch = 1 / (1 - amount * self._weight(r)[0])
            moved[near] = np.asarray(self.centre_mm) + arm[near] * stretch[:, None]
        return moved

    def least_slope(self, amount: float) -> float:
        r = np.linspace(0, self.outer_mm, 2001)
        return float(min(1 + self._displacement(r, amount)[1].min(), 1 - max(amount, 0)))

    def _weight(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, slope = smooth_step((r - self.inner_mm) / (self.outer_mm - self.inner_mm))
        return 1 - value, -slope / (self.outer_mm - self.inner_mm)

    def _displacement(self, r: np.ndarray, amount: float) -> tuple[np.ndarray, np.ndarray]:
        weight, slope = self._weight(r)
        return -amount * r * weight, -amount * (weight + r * slope)


Step = Shear | Contraction


def smooth_step(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0 for s ≤ 0, 1 for s ≥ 1, a quintic between, twice differentiable; and its slope, at most 15/8."""
    s = np.clip(s, 0, 1)
    return s**2 * s * (10 + s * (6 * s - 15)), 30 * (s * (1 - s)) ** 2


def solve_monotone(
    displacement: Profile, target: np.ndarray, reach: np.ndarray, tolerance: float = 1e-10
) -> np.ndarray:
    """The x with x + displacement(x) = target, where |displacement| ≤ reach and the left side rises.

    Newton's method inside a shrinking bracket: a step that leaves the bracket is replaced by
    bisection, so it converges from anywhere.
    """
    x, low, high = target, target - reach, target + reach
    for _ in range(100):
        value, slope = displacement(x)
        residual = x + value - target
        low = np.where(residual < 0, x, low)
        high = np.where(residual > 0, x, high)
        newton = x - residual / (1 + slope)
        x = np.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        if np.abs(residual).max(initial=0) < tolerance:
            break
    return x


# -- motions: compositions of steps whose amplitudes depend on time


class _Composition:
    """ψ_t = Ψ_t ∘ Ψ_ref⁻¹ for a subclass that says which steps, and how much of each at time t."""

    reference_time: float
    steps: tuple[Step, ...]

    def amplitudes(self, t: float) -> tuple[float, ...]:
        """How far each step has gone at time t: mm for shears, a fraction for contractions."""
        raise NotImplementedError

    def reference_to_target(self, points_mm: np.ndarray, t: float) -> np.ndarray:
        """Where points (..., 3) of the reference are at time t; LPS mm, float64."""
        return self._map(points_mm, self.reference_time, t)

    def target_to_reference(self, points_mm: np.ndarray, t: float) -> np.ndarray:
        """Where points (..., 3) seen at time t are in the reference; LPS mm, float64."""
        return self._map(points_mm, t, self.reference_time)

    def _map(self, points_mm: np.ndarray, start: float, end: float) -> np.ndarray:
        points = np.array(points_mm, dtype=float, order="C")  # so that chunks of it are views
        if points.ndim == 0 or points.shape[-1] != 3:
            raise InputError(f"points: shape {points.shape} must end in 3 (x, y, z)")
        if not (np.isfinite(start) and np.isfinite(end)):
            raise InputError("t: must be a finite number")
        before, after = self.amplitudes(start), self.amplitudes(end)
        if before != after:
            for chunk in _chunks(points.reshape(-1, 3)):
                moved = chunk
                for step, amplitude in reversed(list(zip(self.steps, before, strict=True))):
                    moved = step.inverse(moved, amplitude) if amplitude else moved
                for step, amplitude in zip(self.steps, after, strict=True):
                    moved = step.forward(moved, amplitude) if amplitude else moved
                chunk[:] = moved
        return points


class _Breaths(_Composition):
    """A composition in a box that repeats with each breath; phase 0 is end-inspiration."""

    centre_mm: Triple
    half_size_mm: Triple
    period: float

    LEVEL = -0.25  # of the diaphragm, in half sizes above the centre

    def times(self, count: int = 10) -> list[float]:
        """`count` evenly spaced times of one cycle, from 0."""
        return [k * self.period / count for k in range(count)]

    def phase(self, t: float) -> float:
        """t in periods; measured from the reference, so that t and t + period give the very same number."""
        return (self.reference_time + (t - self.reference_time) % self.period) / self.period

    def exhaled(self, phase: float) -> float:
        """How much of a breath is out at a phase (in periods): 0 at end-inspiration to 1 at exhale.

        Lujan's 1 - cos⁴(πs), which rests at exhale, with s the phase warped so that exhaling takes longer.
        """
        s = phase - 0.25 * (1 - np.cos(2 * np.pi * phase)) / (2 * np.pi)
        return float(1 - np.cos(np.pi * s) ** 4)

    def up(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Profile of the diaphragm's lift: 1 at `LEVEL`, 0 above the apex and well below the box."""
        u = (z - self.centre_mm[2]) / self.half_size_mm[2] - self.LEVEL
        width = np.where(u < 0, 1.5, 1.2)
        value, slope = smooth_step(np.abs(u) / width)
        return 1 - value, -slope * np.sign(u) / (width * self.half_size_mm[2])

    def _check(self, motion: str) -> None:
        _check_box(motion, self.centre_mm, self.half_size_mm)
        if not 0 < self.period < np.inf:
            raise InputError(f"{motion}: period {self.period} must be a positive number")
        if not np.isfinite(self.reference_time):
            raise InputError(f"{motion}: reference_time {self.reference_time} must be a finite number")

    def _samples(self, axis: int) -> np.ndarray:
        return self.centre_mm[axis] + self.half_size_mm[axis] * np.linspace(-2, 2, 4001)


@dataclass(frozen=True)
class Breathing(_Breaths):
    """Breathing of a thorax in a box; phase 0 is end-inspiration, about half a period later exhale.

    On exhale the diaphragm moves up (+z), most at `LEVEL`, a bit below the middle of the box, fading
    to the apex, the spine and the body wall; the anterior chest wall moves back (+y); the sides move
    in. Exhaling takes longer than inhaling, and the lungs rest at exhale.

    Attributes:
        centre_mm, half_size_mm: the box (x, y, z), LPS mm.
        period: length of a breathing cycle, in the unit of t.
        reference_time: where the motion is the identity.
        amplitude_si_mm, amplitude_ap_mm, amplitude_lr_mm: largest motion from inhale to exhale.
        hysteresis: how much of a period the chest wall (AP, LR) lags behind the diaphragm (SI), -0.5
            to 0.5; 0: every point goes back the way it came.

    Raises:
        InputError: a box or period that isn't positive, or an amplitude that would fold space.
    """

    centre_mm: Triple
    half_size_mm: Triple
    period: float = 1.0
    reference_time: float = 0.0
    amplitude_si_mm: float = 15.0
    amplitude_ap_mm: float = 5.0
    amplitude_lr_mm: float = 2.0
    hysteresis: float = 0.08

    def __post_init__(self) -> None:
        self._check("breathing")
        if not abs(self.hysteresis) <= 0.5:
            raise InputError(f"breathing: hysteresis {self.hysteresis} must lie between -0.5 and 0.5 periods")
        amplitudes = (self.amplitude_si_mm, self.amplitude_ap_mm, self.amplitude_lr_mm)
        names = ("amplitude_si_mm", "amplitude_ap_mm", "amplitude_lr_mm")
        for name, step, amplitude in zip(names, self.steps, amplitudes, strict=True):
            _check_slope(f"breathing: {name}", amplitude, step.least_slope(amplitude, self._samples(step.axis)))

    @staticmethod
    def of_grid(grid: Grid, **settings: Any) -> Breathing:
        """Breathing in the world-aligned box around a grid of any orientation."""
        return Breathing(*world_box(grid), **settings)

    def amplitudes(self, t: float) -> tuple[float, ...]:
        phase = self.phase(t)
        wall = self.exhaled(phase - self.hysteresis)
        return (
            self.amplitude_si_mm * self.exhaled(phase),
            self.amplitude_ap_mm * wall,
            self.amplitude_lr_mm * wall,
        )

    @cached_property
    def steps(self) -> tuple[Shear, Shear, Shear]:  # type: ignore[override]
        centre, half = np.asarray(self.centre_mm), np.asarray(self.half_size_mm)

        def unit(points: np.ndarray, axis: int) -> np.ndarray:
            return (points[..., axis] - centre[axis]) / half[axis]

        def fade(u: np.ndarray, start: float, end: float) -> np.ndarray:
            return 1 - smooth_step((u - start) / (end - start))[0]

        def inside_wall_off_spine(points: np.ndarray) -> np.ndarray:
            x, y = unit(points, 0), unit(points, 1)
            midline, back = fade(np.abs(x), 0.12, 0.37), 1 - fade(y, 0.05, 0.35)
            return fade(np.hypot(x, y), 0.4, 0.92) * (1 - midline * back)

        def back(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            value, slope = smooth_step(((y - centre[1]) / half[1] + 0.8) / 1.35)
            return 1 - value, -slope / (1.35 * half[1])

        def front_of_chest(points: np.ndarray) -> np.ndarray:
            level = fade(np.abs(unit(points, 2) - self.LEVEL), 0, 1.3)
            return fade(np.abs(unit(points, 0)), 0.2, 0.95) * (0.3 + 0.7 * level)

        def inward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            u = (x - centre[0]) / half[0]
            value, slope = smooth_step(np.abs(u) / 0.85)
            return -np.sign(u) * value, -slope / (0.85 * half[0])

        def lower_chest(points: np.ndarray) -> np.ndarray:
            return fade(np.abs(unit(points, 2) - self.LEVEL), 0, 1.3) * fade(np.abs(unit(points, 1)), 0.2, 1.0)

        return (
            Shear(2, self.up, inside_wall_off_spine),
            Shear(1, back, front_of_chest),
            Shear(0, inward, lower_chest),
        )


@dataclass(frozen=True)
class Ellipse:
    """Cross-section of a cylinder along z: centre and half axes (x, y), LPS mm."""

    centre_mm: tuple[float, float]
    half_axes_mm: tuple[float, float]

    def contains(self, points_mm: np.ndarray) -> np.ndarray:
        """Whether points (..., 3) lie inside the cylinder, whatever their z, (...,)."""
        arm = (points_mm[..., :2] - np.asarray(self.centre_mm)) / np.asarray(self.half_axes_mm)
        return (arm**2).sum(axis=-1) < 1


@dataclass(frozen=True)
class Sliding(_Breaths):
    """Breathing that slides: the content of the chest moves up and down, the wall around it stands still.

    The content is an elliptical cylinder along z without a column around the spine. On exhale it moves up
    as in `Breathing`; outside nothing moves. At the mantle (the pleura) the displacement jumps, along the
    mantle only: nothing opens, nothing overlaps, and the map is a bijection, but no diffeomorphism.
    `stnerp.phantom.Phantom` builds its chest around this cylinder.

    Attributes:
        centre_mm, half_size_mm: the box (x, y, z), LPS mm.
        period: length of a breathing cycle, in the unit of t.
        reference_time: where the motion is the identity.
        amplitude_si_mm: largest motion from inhale to exhale.
        chest: half axes (x, y) of the cylinder, in half sizes of the box.

    Raises:
        InputError: a box, period or half axis that isn't positive, or an amplitude that would fold space.
    """

    centre_mm: Triple
    half_size_mm: Triple
    period: float = 1.0
    reference_time: float = 0.0
    amplitude_si_mm: float = 15.0
    chest: tuple[float, float] = (0.72, 0.59)

    SPINE = Ellipse((0.0, 0.52), (0.21, 0.265))  # in half sizes, from the centre

    def __post_init__(self) -> None:
        self._check("sliding")
        if len(self.chest) != 2 or not all(0 < c < np.inf for c in self.chest):
            raise InputError(f"sliding: chest {self.chest} must be two positive numbers (x, y)")
        least = self.steps[0].least_slope(self.amplitude_si_mm, self._samples(2))
        _check_slope("sliding: amplitude_si_mm", self.amplitude_si_mm, least)

    @staticmethod
    def of_grid(grid: Grid, **settings: Any) -> Sliding:
        """Sliding in the world-aligned box around a grid of any orientation."""
        return Sliding(*world_box(grid), **settings)

    @property
    def mantle(self) -> Ellipse:
        """The cylinder that slides."""
        return self._in_box(Ellipse((0.0, 0.0), self.chest))

    @property
    def spine(self) -> Ellipse:
        """The column in its back that stays."""
        return self._in_box(self.SPINE)

    def slides(self, points_mm: np.ndarray) -> np.ndarray:
        """Whether points (..., 3) belong to the content of the chest, (...,); the same at every time."""
        return self.mantle.contains(points_mm) & ~self.spine.contains(points_mm)

    def amplitudes(self, t: float) -> tuple[float, ...]:
        return (self.amplitude_si_mm * self.exhaled(self.phase(t)),)

    @cached_property
    def steps(self) -> tuple[Shear]:  # type: ignore[override]
        return (Shear(2, self.up, lambda points: self.slides(points).astype(float)),)

    def _in_box(self, unit: Ellipse) -> Ellipse:
        (x, y), (a, b) = unit.centre_mm, unit.half_axes_mm
        (cx, cy, _), (hx, hy, _) = self.centre_mm, self.half_size_mm
        return Ellipse((cx + x * hx, cy + y * hy), (a * hx, b * hy))


@dataclass(frozen=True)
class Longitudinal(_Composition):
    """Change over a therapy: a tumour shrinks while the tissue around it slowly shifts.

    The tumour contracts about its centre, early rather than late; the shift is a few low-frequency
    waves and takes its time, so paths are curved and nothing is linear in time. Before `start` and
    after `start + duration` nothing changes.

    Attributes:
        centre_mm, half_size_mm: the box (x, y, z), LPS mm; waves are about twice as long as it.
        tumour_centre_mm: where the tumour is at `start`.
        tumour_radius_mm: the contraction is uniform up to here and gone at three times this.
        tumour_scale: radius at the end relative to the start; above 1 it grows.
        shift_mm: largest shift along each axis.
        start, duration: in the unit of t, usually days.
        reference_time: where the motion is the identity.

    Raises:
        InputError: a box, radius, scale or duration that isn't positive, or an amplitude that would fold.
    """

    centre_mm: Triple
    half_size_mm: Triple
    tumour_centre_mm: Triple
    tumour_radius_mm: float = 15.0
    tumour_scale: float = 0.7
    shift_mm: float = 4.0
    start: float = 0.0
    duration: float = 42.0
    reference_time: float = 0.0

    period = None

    def __post_init__(self) -> None:
        _check_box("longitudinal", self.centre_mm, self.half_size_mm)
        if len(self.tumour_centre_mm) != 3 or not np.isfinite(self.tumour_centre_mm).all():
            raise InputError(f"longitudinal: tumour_centre_mm {self.tumour_centre_mm} must be three numbers")
        for name in ("tumour_radius_mm", "tumour_scale", "duration"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"longitudinal: {name} {getattr(self, name)} must be a positive number")
        if not np.isfinite([self.start, self.reference_time]).all():
            raise InputError("longitudinal: start and reference_time must be finite numbers")
        shrink, *shears = self.steps
        _check_slope("longitudinal: tumour_scale", self.tumour_scale, shrink.least_slope(1 - self.tumour_scale))
        for shear in shears:
            half = self.half_size_mm[shear.axis]
            samples = self.centre_mm[shear.axis] + half * np.linspace(-4, 4, 4001)
            _check_slope("longitudinal: shift_mm", self.shift_mm, shear.least_slope(self.shift_mm, samples))

    @staticmethod
    def of_grid(grid: Grid, tumour_centre_mm: Triple, **settings: Any) -> Longitudinal:
        """The motion in the world-aligned box around a grid of any orientation."""
        return Longitudinal(*world_box(grid), tumour_centre_mm, **settings)

    def times(self, count: int = 10) -> list[float]:
        """`count` evenly spaced times from the start to the end."""
        return [float(t) for t in np.linspace(self.start, self.start + self.duration, count)]

    def amplitudes(self, t: float) -> tuple[float, ...]:
        shift = float(smooth_step(np.asarray((t - self.start) / self.duration))[0])
        response = 1 - (1 - shift) ** 2
        return ((1 - self.tumour_scale) * response, *3 * (self.shift_mm * shift,))

    @cached_property
    def steps(self) -> tuple[Contraction, Shear, Shear, Shear]:  # type: ignore[override]
        def wave(axis: int, cycles: float, phase: float) -> Profile:
            k = np.pi * cycles / self.half_size_mm[axis]  # `cycles` fit into the box

            def profile(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                angle = k * (x - self.centre_mm[axis]) + phase
                return np.cos(angle), -k * np.sin(angle)

            return profile

        def shear(axis: int, *waves: tuple[float, float]) -> Shear:
            profiles = [wave(i, *waves[i]) for i in range(3)]
            i, j = (other for other in range(3) if other != axis)
            return Shear(
                axis,
                profiles[axis],
                lambda points: profiles[i](points[..., i])[0] * profiles[j](points[..., j])[0],
            )

        return (
            Contraction(self.tumour_centre_mm, self.tumour_radius_mm, 3 * self.tumour_radius_mm),
            shear(0, (0.4, 0.5), (0.6, -0.6), (0.5, 0.4)),
            shear(1, (0.6, 0.3), (0.4, 0.8), (0.4, -0.5)),
            shear(2, (0.5, -0.4), (0.5, 0.6), (0.4, -0.3)),
        )


def _check_box(motion: str, centre_mm: Triple, half_size_mm: Triple) -> None:
    if len(centre_mm) != 3 or not np.isfinite(centre_mm).all():
        raise InputError(f"{motion}: centre_mm {centre_mm} must be three numbers (x, y, z)")
    if len(half_size_mm) != 3 or not all(0 < h < np.inf for h in half_size_mm):
        raise InputError(f"{motion}: half_size_mm {half_size_mm} must be three positive numbers (x, y, z)")


def _check_slope(argument: str, value: float, least_slope: float) -> None:
    if not least_slope >= MIN_SLOPE:
        raise InputError(
            f"{argument} {value:g} would fold space (least slope {least_slope:.2f}, must be at least "
            f"{MIN_SLOPE}): make it smaller or the box larger"
        )


def _chunks(points: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(points), CHUNK):
        yield points[first : first + CHUNK]


def _triple(values: np.ndarray) -> Triple:
    x, y, z = (float(v) for v in values)
    return x, y, z
