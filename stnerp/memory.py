"""Whether a fit fits: its peak memory, predicted from sizes alone, and what is there.

The prediction counts the tensors that a step holds at once; how many of each kind there are was measured
(docs/robustness.md). It is meant to be right within 30 %.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from stnerp.errors import InputError
from stnerp.geometry import SLAB_POINTS, Grid
from stnerp.presets import DefNetSettings, Level, RefNetSettings

logger = logging.getLogger(__name__)

GIB = 2**30
NUMBER = 4  # bytes of a float32
POINTS = 2**16  # of a pass of a network, `def_net.CHUNK` and `ref_net.CHUNK`; on a large GPU more, which it has
TOO_HIGH = 1.3  # by how much a prediction may be, before a fit is refused for it

# Held whatever the size: what torch and SimpleITK load when they are first used.
LOADED = 40 * 2**20
# Numbers held at once, measured:
LAYER = 2.2  # of each hidden unit and point of a pass: the sum, its sine
FROZEN_LAYER = 1.0  # the same of a network that isn't trained
GRID_POINT = 4.0  # of each unit of a feature grid's decoder, and point
RENDERED = 19.0  # of each voxel of a slab, while Ref-Net is drawn: most of them points in double precision
SMOOTHING = 4.0  # of each voxel of a scan, while a level is made
READ = 5.0  # of each voxel of an image of the flow, while it is read by cubic splines
TARGET = {"local_ncc": 5.0, "global_ncc": 1.0, "mse": 1.0}  # of each voxel that is compared, and image
STEP = {"local_ncc": 22.0, "global_ncc": 16.0, "mse": 16.0}  # of each voxel that a step looks at
VELOCITY = 6.0  # of each lattice point, direction and function of time
DETAIL = 6.0  # of each free velocity, with its gradient, its two moments and its smooth form
SQUARING = 4.0  # of each lattice point, direction and squaring


def ref_net_bytes(grid: Grid, settings: RefNetSettings) -> float:
    """The most that `fit_reference` holds besides the series, in bytes."""
    points = max(settings.fraction_per_step * grid.voxels, 1024.0)
    image = 3.0 * grid.voxels + (3 * grid.voxels if settings.remainder else 0)
    rendered = RENDERED * min(grid.voxels, SLAB_POINTS)
    drawn = points * (3 + 4 if settings.fraction_per_step < 1 else 2 * 3 + 2)
    if settings.backbone == "siren":
        passes = _siren(min(points, POINTS), settings.layers, settings.width)
        return LOADED + NUMBER * (image + max(drawn + passes, rendered))
    x, y, z = grid.spacing_mm
    factors = [settings.grid_finest_voxels * 2**k for k in range(settings.grid_levels)]
    trained = settings.grid_features * sum(grid.with_spacing((f * x, f * y, f * z)).voxels for f in factors)
    hidden = 3 * settings.decoder_width + settings.grid_levels * settings.grid_features
    passes = GRID_POINT * min(points, POINTS) * hidden
    return LOADED + NUMBER * (image + 4 * trained + max(drawn + passes, rendered))


def def_net_bytes(
    grid: Grid, scans: Sequence[Grid], functions: int, settings: DefNetSettings, ref_net: bool = True
) -> float:
    """The most that `fit_deformation` holds besides the series, in bytes.

    Guidance isn't counted: with `contours`, 4 bytes more for each voxel of the reference's mask within
    `guidance.REACH_MM` of a label's box, for each label.

    Args:
        grid: that Def-Net covers: the reference's or a part of it.
        scans: of each image that is compared the part that shows this, `region.part_around`.
        functions: of time (`TimeBasis.size`).
        settings: of the fit.
        ref_net: with a Ref-Net or without.
    """
    return max(_level_bytes(grid, scans, functions, settings, level, ref_net) for level in settings.levels)


def flow_bytes(grid: Grid, images: int, settings: DefNetSettings) -> float:
    """The most that `fit_flow` holds besides the series, in bytes: images at twice the last level's resolution,
    each made with `READ` numbers a voxel."""
    fine = max(level.voxels(grid, refine=2).voxels for level in settings.levels)
    kept = images * (fine + grid.voxels) + READ * fine
    return def_net_bytes(grid, [grid] * 2, images, settings, ref_net=False) + NUMBER * kept


def _level_bytes(
    grid: Grid, scans: Sequence[Grid], functions: int, settings: DefNetSettings, level: Level, ref_net: bool
) -> float:
    images, fine = len(scans), level.voxels(grid, refine=2).voxels
    voxels = [level.voxels_beside(grid, scan).voxels for scan in scans]
    lattice, network = level.lattice(grid).voxels, level.lattice(grid).voxels
    at_once = images if level.times_per_step is None else min(level.times_per_step, images)
    looked_at = min(max(voxels), 1.2 * settings.voxels_per_step) if settings.voxels_per_step else max(voxels)
    kept = (2 if ref_net else 1) * grid.voxels + fine + TARGET[settings.loss] * sum(voxels)
    step = STEP[settings.loss] * looked_at
    if ref_net and settings.reference == "network":
        step += FROZEN_LAYER * min(looked_at, POINTS) * settings.layers * settings.width
    if settings.form == "factorised":
        if settings.network_mm is not None:
            network = min(network, grid.with_spacing(settings.network_mm).voxels)
        detail = 0 if settings.detail_mm is None else grid.with_spacing(settings.detail_mm).voxels
        velocity, passes = 3 * functions * (VELOCITY * lattice + DETAIL * detail) + 6 * at_once * lattice, 1
        kept += 2 * settings.fourier_width * network
    else:
        velocity, passes = 3 * VELOCITY * at_once * lattice, at_once
    if settings.bregman and level is settings.levels[-1] and len(settings.levels) > 1:
        velocity += 3 * images * lattice
    if settings.diffusion or settings.total_variation:
        velocity += 3 * images * lattice  # what pre-alignment stretched
    squaring = 3 * SQUARING * (settings.squarings + 2) * lattice
    # A pass of few points is kept until its gradient is needed, a longer one is made again, piece by piece.
    piece = _siren(min(network, POINTS), settings.layers, settings.width)
    graph = passes * piece if network <= POINTS else 0
    made = SMOOTHING * max(scan.voxels for scan in [grid, *scans])
    rendered = RENDERED * min(grid.voxels, SLAB_POINTS) if ref_net else 0
    return LOADED + NUMBER * (kept + velocity + max(rendered, made, graph + step + squaring, piece))


def _siren(points: float, layers: int, width: int) -> float:
    """Numbers that one pass of a SIREN and its gradient hold."""
    return LAYER * points * layers * width


def require_memory(needed: float, device: torch.device, name: str) -> None:
    """Refuse a fit that won't fit.

    Args:
        needed: bytes.
        device: that it needs them on.
        name: of what is fitted, for messages.

    Raises:
        InputError: there is less, even if the prediction is as much too high as it may be.
    """
    available = available_bytes(device)
    if available is None or needed <= available:
        return
    told = f"{name}: needs about {needed / GIB:.1f} GiB of memory, {available / GIB:.1f} GiB are available"
    if needed > TOO_HIGH * available:
        raise InputError(
            f"{told} ({device.type}); resample the images to coarser voxels, take fewer of them, or preset='fast'"
        )
    logger.warning("%s (%s); it may run out of it", told, device.type)


def available_bytes(device: torch.device) -> float | None:
    """What a process can still take: of the machine or its container, or of the GPU; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    known = [*_of_the_machine(Path("/proc/meminfo")), *_of_the_containers(Path("/proc/self/cgroup"))]
    return min(known, default=None)


def _of_the_machine(meminfo: Path) -> Iterator[float]:
    values = _table(meminfo)
    if "MemAvailable:" in values:
        yield 1024 * values["MemAvailable:"]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        yield float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _of_the_containers(cgroups: Path, root: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """What the limits of this process's control groups leave, of version 2 and 1, all the way up."""
    names = {"": ("memory.max", "memory.current", "inactive_file"),
             "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
    for line in _text(cgroups).splitlines():
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in names:
            continue
        limit_of, usage_of, unused = names[kind]
        top = root / kind
        # In a container, its own group is often the top.
        folder = top / path.strip("/")
        for group in [folder, *folder.parents]:
            limit, usage = _text(group / limit_of).strip(), _text(group / usage_of).strip()
            if limit.isdigit() and usage.isdigit():
                yield int(limit) - int(usage) + _table(group / "memory.stat").get(unused, 0)
            if group == top:
                break


def _table(path: Path) -> dict[str, float]:
    """The first two words of each line."""
    rows = [line.split() for line in _text(path).splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
