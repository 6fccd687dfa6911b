"""The fitted patient: image, deformation, contours and landmarks at any time.

φ_t takes a point of the original target (time t) to the original reference, both in LPS mm:
the inverse of the pre-alignment first, then p + u_t(p) on the reference's cube.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
import torch

from stnerp import metrics
from stnerp.alignment import affine_at
from stnerp.checkpoint import read_checkpoint, write_checkpoint
from stnerp.def_net import DefNet, def_net_of
from stnerp.errors import InputError
from stnerp.geometry import Grid, apply_affine, slabs
from stnerp.io.image import to_labels
from stnerp.presets import DefNetSettings, with_changes
from stnerp.ref_net import RefNet
from stnerp.time_basis import TimeBasis
from stnerp.velocity import exponential
from stnerp.warp import sample
from stnerp.window import Window

logger = logging.getLogger(__name__)

KIND = "stnerp model"
INVERSE_STEPS = 30


class STNeRP:
    """A patient's anatomy in space and time.

    Attributes:
        grid: the reference image's grid.
        times: measured times, in the user's unit; reference_time is one of them, period may be None.
        time_unit: name of that unit, where a file told it.
        window: intensities in [0, 1] inside the networks are those of this window.
        alignments: (T, 4, 4), pre-alignment, reference point -> point of the image at each time.
        history: the loss and its terms at each step of the fit.
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
    ) -> None:
        if (ref_net is None) == (reference_voxels is None):
            raise InputError("model: give either a Ref-Net or the reference's voxels")
        self.def_net, self.ref_net, self.settings = def_net, ref_net, settings
        self.reference_voxels = reference_voxels
        self.alignments, self.window = alignments, window
        self.history = history or []
        self.time_unit = time_unit
        self.grid = def_net.grid
        self.times = def_net.time_basis.times
        self.reference_time = def_net.time_basis.reference_time
        self.period = def_net.time_basis.period
        self._displacements: dict[tuple[float, bool], torch.Tensor] = {}

    # -- what users ask

    def image(self, t: float, grid: Grid | sitk.Image | None = None, outside: float | None = None) -> sitk.Image:
        """The image at time t, float32 in the scan's own intensities (clipped to the window).

        Args:
            t: any time, in the user's unit.
            grid: where to draw it; None: the reference's grid.
            outside: intensity of points that come from outside the reference's field of view; None:
                that of the nearest point inside.
        """
        grid = self._output_grid(grid)
        values = np.empty(grid.shape, np.float32)
        voxels = None if self.reference_voxels is None else torch.from_numpy(self.reference_voxels)[None, None]
        for part, points_mm in slabs(grid):
            moved = self._to_reference_cube(points_mm, t)
            if self.ref_net is not None:
                device = next(self.ref_net.parameters()).device
                with torch.no_grad():
                    read = self.ref_net(moved.to(device).reshape(-1, 3)).cpu()
            else:
                assert voxels is not None
                read = sample(voxels, moved.reshape(1, -1, 3))
            read = read.reshape(moved.shape[:-1]).clamp(0, 1)
            values[part] = self.window.denormalise(read.numpy())
            if outside is not None:
                known = self.grid.contains(self.grid.cube_to_world(moved.numpy()))
                values[part][~known] = outside
        return grid.image(values)

    def displacement(self, t: float, grid: Grid | sitk.Image | None = None) -> sitk.Image:
        """φ_t(p) − p, target -> reference, LPS mm, at every voxel p of a grid (default: the reference's).

        A vector image (float64) that `sitk.DisplacementFieldTransform` takes as it is: resampling the
        reference through it gives the image at time t.
        """
        grid = self._output_grid(grid)
        return grid.image(self._displacement_array(t, grid))

    def map_points(self, points_mm: np.ndarray, t: float, inverse: bool = False) -> np.ndarray:
        """Points (N, 3) in LPS mm from the image at time t to the reference; `inverse`: from the reference to t.

        The inverse starts at exp(−v) and is polished until φ_t of it returns to the point.
        """
        points, t = _points(points_mm), _time(t)
        if not inverse:
            moved = self._to_reference_cube(points, t)
            return self.grid.cube_to_world(moved.double().numpy())
        alignment = affine_at(self.alignments, self.times, t, self.period)
        wanted = torch.as_tensor(self.grid.world_to_cube(points), dtype=torch.float64)
        aligned = wanted + self._read(t, wanted, inverse=True)
        miss = aligned + self._read(t, aligned) - wanted
        step = torch.ones(len(wanted), 1, dtype=torch.float64)
        for _ in range(INVERSE_STEPS):
            tried = aligned - step * miss
            tried_miss = tried + self._read(t, tried) - wanted
            better = tried_miss.norm(dim=1, keepdim=True) < miss.norm(dim=1, keepdim=True)
            aligned, miss = torch.where(better, tried, aligned), torch.where(better, tried_miss, miss)
            step = torch.where(better, step, step / 2)
        return apply_affine(alignment, self.grid.cube_to_world(aligned.numpy()))

    def propagate(
        self,
        mask: sitk.Image,
        t: float,
        grid: Grid | sitk.Image | None = None,
        interpolation: Literal["majority", "nearest"] = "majority",
    ) -> sitk.Image:
        """The reference's labels carried to time t.

        Args:
            mask: labels drawn on the reference image, on any grid in its world space.
            t: any time, in the user's unit.
            grid: where to draw them; None: the mask's own grid.
            interpolation: which of the eight labels around φ_t(p) a voxel p gets. "majority": the one with
                the largest trilinear weight; for a binary mask, linear interpolation cut at one half.
                "nearest": the nearest voxel's (the paper's Eq. 7, 8).
        """
        if interpolation not in ("majority", "nearest"):
            raise InputError(f"interpolation: unknown {interpolation!r}; give majority or nearest")
        source = Grid.of(mask)
        if mask.GetNumberOfComponentsPerPixel() != 1:
            raise InputError("mask: expected one label per voxel")
        to_labels(mask, "mask")  # refuses probabilities
        grid = source if grid is None else self._output_grid(grid)
        labels = sitk.GetArrayViewFromImage(mask)
        carried = np.zeros(grid.shape, labels.dtype)
        for part, points_mm in slabs(grid):
            reference_mm = self.grid.cube_to_world(self._to_reference_cube(points_mm, t).double().numpy())
            inside = source.contains(reference_mm)
            index = source.world_to_index(reference_mm[inside])
            read = _nearest_label if interpolation == "nearest" else _majority_label
            carried[part][inside] = read(labels, index)
        return grid.image(carried)

    def jacobian(self, t: float, grid: Grid | sitk.Image | None = None) -> sitk.Image:
        """|∂φ_t/∂p|: how many ml of reference each ml of the target came from; ≤ 0 would be a fold."""
        grid = self._output_grid(grid)
        return grid.image(metrics.jacobian_determinant(self._displacement_array(t, grid), grid))

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
            },
            overwrite,
        )

    @staticmethod
    def load(path: str | Path) -> STNeRP:
        """Read a model that `save` wrote. Runs no code from the file; loads on the CPU.

        Raises:
            MissingFileError: no such file.
            InputError: not a model, or one of a newer format.
        """
        saved = read_checkpoint(Path(path), KIND)
        grid, window = Grid.from_dict(saved["grid"]), Window.from_dict(saved["window"])
        basis = TimeBasis(tuple(saved["times"]), saved["reference_time"], saved["period"])
        settings = with_changes(DefNetSettings(), saved["def_net"]["settings"])
        def_net = def_net_of(grid, basis, settings)
        def_net.load_state_dict(saved["def_net"]["weights"])
        voxels = saved["reference_voxels"]
        return STNeRP(
            def_net=def_net.eval(),
            ref_net=None if saved["ref_net"] is None else RefNet.from_dict(saved["ref_net"]),
            reference_voxels=None if voxels is None else voxels.numpy(),
            settings=settings,
            alignments=saved["alignments"].numpy(),
            window=window,
            history=saved["history"],
            time_unit=saved["time_unit"],
        )

    # -- the deformation

    def _output_grid(self, grid: Grid | sitk.Image | None) -> Grid:
        if grid is None:
            return self.grid
        return grid if isinstance(grid, Grid) else Grid.of(grid)

    def _displacement_array(self, t: float, grid: Grid) -> np.ndarray:
        """φ_t(p) − p, (z, y, x, 3), LPS mm, float64."""
        field = np.empty((*grid.shape, 3))
        for part, points_mm in slabs(grid):
            moved = self._to_reference_cube(points_mm, t).double().numpy()
            field[part] = self.grid.cube_to_world(moved) - points_mm
        return field

    def _to_reference_cube(self, points_mm: np.ndarray, t: float) -> torch.Tensor:
        """φ_t of world points (..., 3), as points of the reference's cube, float64."""
        t = _time(t)
        alignment = affine_at(self.alignments, self.times, t, self.period)
        aligned = self.grid.world_to_cube(apply_affine(np.linalg.inv(alignment), points_mm))
        cube = torch.from_numpy(np.ascontiguousarray(aligned))
        return cube + self._read(t, cube)

    def _read(self, t: float, points: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """The displacement (..., 3), cube units, at cube points (..., 3), float64."""
        field = self._lattice_displacement(t, inverse)
        values = sample(field, points.reshape(1, -1, 3).to(field))[0]
        return values.T.reshape(points.shape).double()

    def _lattice_displacement(self, t: float, inverse: bool) -> torch.Tensor:
        """exp(±v_t) − id on the lattice of the last level, (1, 3, z, y, x), cube units, on the CPU."""
        key = (float(t), inverse)
        if key not in self._displacements:
            first, last = self.def_net.time_basis.measured_range
            if self.period is None and not first <= t <= last:
                logger.warning("t = %g is an extrapolation: the measured times are %g to %g", t, first, last)
            with torch.no_grad():
                velocity_mm = self.def_net.lattice_velocity(self.lattice.shape, [float(t)])
                half = torch.tensor(self.grid.half_extent_mm).to(velocity_mm)
                velocity = velocity_mm / half[:, None, None, None]
                field = exponential(-velocity if inverse else velocity, self.settings.squarings)
            if len(self._displacements) >= 8:  # lattices are small, but time is continuous
                self._displacements.clear()
            self._displacements[key] = field.cpu()
        return self._displacements[key]

    @property
    def lattice(self) -> Grid:
        """The lattice that carries the deformation: that of the fit's last level."""
        return self.settings.levels[-1].lattice(self.grid)


def _time(t: float) -> float:
    try:
        value = float(t)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"t: {t!r} is not a time; give a number in the unit of the series' times")
    return value


def _points(points_mm: np.ndarray) -> np.ndarray:
    points = np.asarray(points_mm, dtype=float)
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"points: expected shape (N, 3), x y z in LPS mm, got {points.shape}")
    if not np.isfinite(points).all():
        raise InputError("points: some coordinates are not finite; remove them")
    return points


def _nearest_label(labels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Labels (z, y, x) at the voxels nearest to continuous indices (N, 3)."""
    last = np.array(labels.shape[::-1]) - 1
    x, y, z = np.clip(np.rint(index), 0, last).astype(int).T
    return labels[z, y, x]


def _majority_label(labels: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Labels (z, y, x) at continuous indices (N, 3): of the eight around each, that with the largest weight."""
    last = np.array(labels.shape[::-1]) - 1
    lower = np.floor(index).astype(int)
    fraction = index - lower
    corners = [(dx, dy, dz) for dz in (0, 1) for dy in (0, 1) for dx in (0, 1)]
    around = np.empty((8, len(index)), labels.dtype)
    weight = np.empty((8, len(index)))
    for k, corner in enumerate(corners):
        x, y, z = np.clip(lower + corner, 0, last).T
        around[k] = labels[z, y, x]
        weight[k] = np.prod(np.where(corner, fraction, 1 - fraction), axis=1)
    best, most = around[0].copy(), np.zeros(len(index))
    for k in range(8):
        votes = (weight * (around == around[k])).sum(0)
        better = votes > most
        best[better], most[better] = around[k][better], votes[better]
    return best
