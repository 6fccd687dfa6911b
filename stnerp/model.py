"""The fitted patient: image, deformation, contours and landmarks at any time.

φ_t takes a point of the original target (time t) to the original reference, both in LPS mm:
the inverse of the pre-alignment first, then p + u_t(p) on the reference's cube.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from stnerp import metrics
from stnerp.alignment import affine_at
from stnerp.appearance import FADE_HU, LUNG_HU, Appearance, NeighbourFlow, density
from stnerp.checkpoint import content_of, write_checkpoint
from stnerp.def_net import DefNet, def_net_of
from stnerp.device import device_of
from stnerp.errors import InputError
from stnerp.geometry import Grid, affine_points, apply_affine, slab_slices, world_points
from stnerp.labels import Interpolation, carried_labels
from stnerp.monitor import Row, monitor
from stnerp.presets import DefNetSettings, def_net_settings_of
from stnerp.ref_net import RefNet
from stnerp.region import around, faded
from stnerp.series import Series
from stnerp.time_basis import Gaps, TimeBasis, index_at
from stnerp.velocity import exponential
from stnerp.warp import sample
from stnerp.window import Window

logger = logging.getLogger(__name__)

KIND = "stnerp model"
INVERSE_STEPS = 30
KEPT_NUMBERS = 2**26  # of the displacements asked for last: half a gigabyte, many of them on a coarse lattice


class STNeRP:
    """A patient's anatomy in space and time.

    Attributes:
        grid: the reference image's grid; Def-Net may cover a part of it (`stnerp.region`).
        times: measured times, in the user's unit; reference_time is one of them, period may be None.
        time_unit: name of that unit, where a file told it.
        window: intensities in [0, 1] inside the networks are those of this window.
        alignments: (T, 4, 4), pre-alignment, reference point -> point of the image at each time.
        history: the loss and its terms at each step of the fit.
        flow: the measured images and the flow between neighbours, where the fit learnt it.
    """

    def __init__(
        self,
        *,
        def_net: DefNet,
        ref_net: RefNet | None,
        reference_voxels: np.ndarray | None,
        settings: DefNetSettings,
        alignments: np.ndarray,
        window: Window,
        history: list[dict[str, float]] | None = None,
        time_unit: str | None = None,
        flow: NeighbourFlow | None = None,
        grid: Grid | None = None,
    ) -> None:
        if (ref_net is None) == (reference_voxels is None):
            raise InputError("model: give either a Ref-Net or the reference's voxels")
        self.def_net, self.ref_net, self.settings = def_net, ref_net, settings
        self.reference_voxels = reference_voxels
        self.alignments, self.window = alignments, window
        self.history = history or []
        self.time_unit = time_unit
        self.flow = flow
        self.grid = def_net.grid if grid is None else grid
        self.times = def_net.time_basis.times
        self.reference_time = def_net.time_basis.reference_time
        self.period = def_net.time_basis.period
        self._displacements: dict[tuple[float, bool], torch.Tensor] = {}

    def __repr__(self) -> str:
        times = ", ".join(f"{t:g}" for t in self.times)
        prior = "without" if self.ref_net is None else "with"
        return f"STNeRP(times {times}; reference {self.reference_time:g}: {self.grid}; {prior} Ref-Net)"

    # -- what users ask

    def image(
        self,
        t: float,
        grid: Grid | sitk.Image | None = None,
        outside: float | None = None,
        appearance: Appearance = "reference",
    ) -> sitk.Image:
        """The image at time t, float32 in the scan's own intensities (clipped to the window).

        Args:
            t: any time, in the user's unit.
            grid: where to draw it; None: the reference's grid.
            outside: intensity of points that come from outside the field of view; None: that of the nearest
                point inside.
            appearance: "reference": the reference image, moved (the paper's). "blend": the two measured
                images around t, each carried to t, and blended; needs a fit with `appearance="blend"`.
                "density": the reference, moved, its lung darker where it expands (CT alone).

        Raises:
            InputError: an unknown appearance, or one that this model can't show.
        """
        grid, t = Grid.of(self.grid if grid is None else grid), _time(t)
        if appearance not in ("reference", "blend", "density"):
            raise InputError(f"appearance: unknown {appearance!r}; give reference, blend or density")
        if appearance == "blend" and self.flow is None:
            raise InputError("appearance: this model knows no flow; fit it with appearance='blend'")
        if appearance == "density" and self.window.low > LUNG_HU[0] + FADE_HU:
            raise InputError(
                f"appearance: density needs CT in a window that shows the lung, not from {self.window.low:g} on"
            )
        if appearance == "blend":
            self._warn_beyond(t)
        jacobian = sitk.GetArrayFromImage(self.jacobian(t, grid)) if appearance == "density" else None
        index_to_aligned = self._to_aligned(t) @ grid.index_to_world_matrix
        index_to_cube = self.grid.world_to_cube_matrix @ index_to_aligned
        values = np.empty(grid.shape, np.float32)
        for part in slab_slices(grid.shape):
            if appearance == "blend":
                assert self.flow is not None
                read, known = self.flow.read(affine_points(index_to_aligned, grid.shape, slab=part).numpy(), t)
            else:
                points = affine_points(index_to_cube, grid.shape, self.device, part)
                moved = points + self._read(t, points)
                read = self._read_reference(moved)
                if outside is not None:
                    known = self.grid.contains(self.grid.cube_to_world(moved.cpu().numpy()))
            values[part] = self.window.denormalise(np.clip(read, 0, 1))
            if jacobian is not None:
                values[part] = density(values[part], jacobian[part])
            if outside is not None:
                values[part][~known] = outside
        return grid.image(values)

    def displacement(self, t: float, grid: Grid | sitk.Image | None = None) -> sitk.Image:
        """φ_t(p) − p, target -> reference, LPS mm, at every voxel p of a grid (default: the reference's).

        A vector image (float64) that `sitk.DisplacementFieldTransform` takes as it is: resampling the
        reference through it gives the image at time t.
        """
        grid = Grid.of(self.grid if grid is None else grid)
        return grid.image(self._displacement_array(t, grid))

    def map_points(self, points_mm: np.ndarray, t: float, inverse: bool = False) -> np.ndarray:
        """Points (..., 3) in LPS mm from the image at time t to the reference; `inverse`: from the reference to t.

        The inverse starts at exp(−v) and is polished until φ_t of it returns to the point.
        """
        points, t = world_points(points_mm), _time(t)
        if not inverse:
            cube = self.grid.world_to_cube(apply_affine(self._to_aligned(t), points))
            there = torch.from_numpy(np.ascontiguousarray(cube))
            return self.grid.cube_to_world((there + self._read(t, there)).numpy())
        wanted = torch.as_tensor(self.grid.world_to_cube(points), dtype=torch.float64)
        aligned = wanted + self._read(t, wanted, inverse=True)
        miss = aligned + self._read(t, aligned) - wanted
        step = torch.ones(*wanted.shape[:-1], 1, dtype=torch.float64)
        half_extent_mm = torch.from_numpy(self.grid.half_extent_mm)  # cube units differ in length
        for _ in range(INVERSE_STEPS):
            tried = aligned - step * miss
            tried_miss = tried + self._read(t, tried) - wanted
            miss_mm, tried_mm = ((m * half_extent_mm).norm(dim=-1, keepdim=True) for m in (miss, tried_miss))
            better = tried_mm < miss_mm
            aligned, miss = torch.where(better, tried, aligned), torch.where(better, tried_miss, miss)
            step = torch.where(better, step, step / 2)
        return apply_affine(np.linalg.inv(self._to_aligned(t)), self.grid.cube_to_world(aligned.numpy()))

    def propagate(
        self,
        mask: sitk.Image,
        t: float,
        grid: Grid | sitk.Image | None = None,
        interpolation: Interpolation = "majority",
    ) -> sitk.Image:
        """The reference's labels carried to time t; 0 where a voxel comes from outside the mask's grid.

        Args:
            mask: labels drawn on the reference image, on any grid in its world space.
            t: any time, in the user's unit.
            grid: where to draw them; None: the mask's own grid.
            interpolation: which of the eight labels around φ_t(p) a voxel p gets. "majority": the one with
                the largest trilinear weight; for a binary mask, linear interpolation cut at one half.
                "nearest": the nearest voxel's (the paper's Eq. 7, 8).
        """
        grid = Grid.of(mask if grid is None else grid)
        return carried_labels(mask, grid, partial(self.map_points, t=t), interpolation)

    def jacobian(self, t: float, grid: Grid | sitk.Image | None = None) -> sitk.Image:
        """|∂φ_t/∂p|: how many ml of reference each ml of the target came from; ≤ 0 would be a fold."""
        grid = Grid.of(self.grid if grid is None else grid)
        thick = grid.padded([1 if n == 1 else 0 for n in grid.size])  # a slice has neighbours, too
        determinant = metrics.jacobian_determinant(self._displacement_array(t, thick), thick)
        middle = tuple(slice(1, 2) if n == 1 else slice(None) for n in grid.shape)
        return grid.image(determinant[middle])

    def monitor(
        self, roi: sitk.Image, times: Iterable[float], series: Series | None = None, name: str = "roi"
    ) -> list[Row]:
        """Volume, centroid, extent, motion of the surface and density of each label of a ROI over time.

        Args:
            roi: labels drawn on the reference image, on any grid in its world space.
            times: any, in the user's unit.
            series: the scans, to compare their intensities within the ROI.
            name: of the ROI.

        Returns:
            Rows, one a time and label, as `stnerp.monitor.monitor` describes them.
        """
        return monitor(self, roi, times, measured=self.times, period=self.period, series=series, name=name)

    # -- files

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write everything that the model needs into one file, all at once or not at all.

        Raises:
            InputError: the file exists and `overwrite` is False.
        """
        basis = self.def_net.time_basis
        return write_checkpoint(
            Path(path),
            KIND,
            {
                "grid": self.grid.to_dict(),
                "region": self.def_net.grid.to_dict(),
                "times": list(basis.times),
                "reference_time": basis.reference_time,
                "period": basis.period,
                "time_unit": self.time_unit,
                "window": self.window.to_dict(),
                "def_net": {"settings": asdict(self.settings), "weights": self.def_net.state_dict()},
                "ref_net": None if self.ref_net is None else self.ref_net.to_dict(),
                "reference_voxels": (
                    None if self.reference_voxels is None else torch.from_numpy(self.reference_voxels)
                ),
                "alignments": torch.from_numpy(self.alignments),
                "history": self.history,
                "flow": None if self.flow is None else self.flow.to_dict(),
            },
            overwrite,
        )

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "auto") -> STNeRP:
        """Read a model that `save` wrote. Runs no code from the file.

        Args:
            path: of the file.
            device: where it computes: "auto", "cpu", "cuda", ...

        Raises:
            MissingFileError: no such file.
            InputError: not a model, or one of a newer format, or an unknown device.
        """
        where = device_of(device)
        with content_of(Path(path), KIND) as saved:
            grid, window = Grid.from_dict(saved["grid"]), Window.from_dict(saved["window"])
            region = Grid.from_dict(saved.get("region", saved["grid"]))
            basis = TimeBasis(tuple(saved["times"]), saved["reference_time"], saved["period"])
            alignments = saved["alignments"].numpy()
            if not np.isfinite([*basis.times, basis.reference_time, *alignments.flat]).all():
                raise ValueError("times and alignments must be finite")
            settings = def_net_settings_of(saved["def_net"]["settings"])
            def_net = def_net_of(region, basis, settings)
            def_net.load_weights(saved["def_net"]["weights"])
            voxels, flow = saved["reference_voxels"], saved.get("flow")
            model = STNeRP(
                def_net=def_net.eval(),
                ref_net=None if saved["ref_net"] is None else RefNet.from_dict(saved["ref_net"]),
                reference_voxels=None if voxels is None else voxels.numpy(),
                settings=settings,
                alignments=alignments,
                window=window,
                history=saved["history"],
                time_unit=saved["time_unit"],
                flow=None
                if flow is None
                else NeighbourFlow.from_dict(flow, grid, Gaps(basis.times, basis.reference_time, basis.period)),
                grid=grid,
            )
        model.def_net.to(where)  # here: a GPU's error says nothing about the file
        if model.ref_net is not None:
            model.ref_net.to(where)
        return model

    # -- the deformation

    @property
    def device(self) -> torch.device:
        """Where the networks are, and where images and displacements are computed."""
        return next(self.def_net.parameters()).device

    def _displacement_array(self, t: float, grid: Grid) -> np.ndarray:
        """φ_t(p) − p, (z, y, x, 3), LPS mm, float64: u_t where the pre-alignment takes p, and what that moves."""
        t = _time(t)
        to_aligned, cube_to_world = self._to_aligned(t), self.grid.cube_to_world_matrix
        index_to_cube = self.grid.world_to_cube_matrix @ to_aligned @ grid.index_to_world_matrix
        alone = (to_aligned - np.eye(4)) @ grid.index_to_world_matrix
        cube_to_mm = torch.from_numpy(cube_to_world[:3, :3].T.copy()).to(self.device)
        field = np.empty((*grid.shape, 3))
        for part in slab_slices(grid.shape):
            points, aligning = (affine_points(m, grid.shape, self.device, part) for m in (index_to_cube, alone))
            field[part] = (self._read(t, points) @ cube_to_mm + aligning).cpu().numpy()
        return field

    def _read_reference(self, points: torch.Tensor) -> np.ndarray:
        """Intensities (...,) of the reference, about [0, 1], at points (..., 3) of its cube."""
        with torch.no_grad():
            if self.ref_net is not None:
                read = self.ref_net(points.reshape(-1, 3))
            else:
                read = sample(self._reference_volume, points.reshape(1, -1, 3))
        return read.reshape(points.shape[:-1]).cpu().numpy()

    @cached_property
    def _reference_volume(self) -> torch.Tensor:
        """The reference's voxels (1, 1, z, y, x) where the networks are."""
        assert self.reference_voxels is not None
        return torch.from_numpy(self.reference_voxels).to(self.device)[None, None]

    def _to_aligned(self, t: float) -> np.ndarray:
        """(4, 4), a world point at time t -> its place in the pre-aligned frame."""
        return np.linalg.inv(affine_at(self.alignments, self.times, t, self.period))

    def _read(self, t: float, points: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """The displacement (..., 3), cube units, at cube points (..., 3), float64."""
        field = self._lattice_displacement(t, inverse)
        scale, shift = (values.to(field) for values in self._cube_to_lattice)
        values = sample(field, (points.to(field) * scale + shift).reshape(1, -1, 3))[0]
        return (values.T / scale).reshape(points.shape).to(points)

    def _warn_beyond(self, t: float) -> None:
        first, last = self.def_net.time_basis.measured_range
        if self.period is None and not first <= t <= last and index_at(self.times, t) is None:
            logger.warning("t = %g is an extrapolation: the measured times are %g to %g", t, first, last)

    def _lattice_displacement(self, t: float, inverse: bool) -> torch.Tensor:
        """exp(±v_t) − id on the lattice, (1, 3, z, y, x), units of its cube, float64.

        So that a point's displacement doesn't depend on how its coordinates were rounded on their way.
        """
        key = (float(t), inverse)
        if key not in self._displacements:
            self._warn_beyond(t)
            velocity_mm = self.velocity_mm(t)
            velocity = velocity_mm / torch.tensor(self.lattice.half_extent_mm).to(velocity_mm)[:, None, None, None]
            field = exponential(-velocity if inverse else velocity, self.settings.squarings)
            field = field.double()
            if len(self._displacements) >= max(1, KEPT_NUMBERS // field.numel()):  # time is continuous
                self._displacements.clear()
            self._displacements[key] = field
        return self._displacements[key]

    def velocity_mm(self, t: float) -> torch.Tensor:
        """v_t on `lattice`, (1, 3, z, y, x) in mm along its axes; around what Def-Net covers it fades."""
        region = self.settings.levels[-1].lattice(self.def_net.grid)
        with torch.no_grad():
            velocity_mm = self.def_net.lattice_velocity(region.shape, [float(t)])
        return faded(velocity_mm, region, self.lattice)

    @cached_property
    def lattice(self) -> Grid:
        """The lattice that carries the deformation: that of the fit's last level, over all of the image."""
        return around(self.settings.levels[-1].lattice(self.def_net.grid), self.grid)

    @cached_property
    def _cube_to_lattice(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift (3,) from the reference's cube to that of `lattice`, which has the same axes."""
        matrix = torch.from_numpy(self.lattice.world_to_cube_matrix @ self.grid.cube_to_world_matrix)
        return matrix.diagonal()[:3].clone(), matrix[:3, 3].clone()


def _time(t: float) -> float:
    try:
        value = float(t)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"t: {t!r} is not a time; give a number in the unit of the series' times")
    return value
