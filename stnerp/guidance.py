"""What is known of the motion beside the images: contours and landmarks that guide a fit.

A landmark at time t belongs at its partner on the reference. A point on a structure's surface at time t
belongs somewhere on that structure's surface in the reference: a landmark that may slip. A deformation that
is one to one and takes a closed surface into another takes it onto it, so one direction says it all.
Both are distances in mm at points, which don't depend on the images' resolution.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, SupportsFloat

import numpy as np
import SimpleITK as sitk
import torch

from stnerp import losses
from stnerp.errors import InputError
from stnerp.geometry import Grid, apply_affine
from stnerp.presets import DefNetSettings
from stnerp.series import Series
from stnerp.time_basis import index_at
from stnerp.warp import sample, smoothed

logger = logging.getLogger(__name__)

# Of a displacement (1, 3, z, y, x), target -> reference, in cube units of the grid that Def-Net covers: a
# distance in mm.
Guide = Callable[[torch.Tensor], torch.Tensor]

REACH_MM = 40.0  # from the reference's surface; points further away are not pulled straight towards it
SURFACE_POINTS = 4096  # of each structure, drawn once


def guides_of(
    series: Series,
    alignments: np.ndarray,
    settings: DefNetSettings,
    guided_times: Sequence[float] | None = None,
    region: Grid | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, dict[str, Guide]]:
    """What guides the fit at each image that has contours or landmarks, {index: {"contours": guide, ...}}.

    Args:
        series: with `masks` or `landmarks` at the reference and at some other times.
        alignments: (T, 4, 4), reference point -> point of the image at each time.
        settings: a weight of zero (`contours`, `landmarks`) leaves that guidance out.
        guided_times: where to use them; None: wherever they are known.
        region: part of the reference's grid that displacements are given on; None: all of it.

    Raises:
        InputError: a time that no image but the reference has, or guidance that the series doesn't have.
    """
    region = series.grid if region is None else region

    @cache  # of all times
    def reference_distance(label: int) -> tuple[torch.Tensor, Grid]:
        reference = series.masks[series.reference]
        assert reference is not None
        distance, box = signed_distance(reference, label)
        return torch.from_numpy(distance).to(device)[None, None], box

    known: dict[str, tuple[float, Sequence[Any], Callable[..., Guide]]] = {
        "contours": (settings.contours, series.masks, partial(contour_guide, reference_distance)),
        "landmarks": (settings.landmarks, series.landmarks, landmark_guide),
    }
    asked = {name: (given, make) for name, (weight, given, make) in known.items() if weight > 0}
    if guided_times is not None and not asked:
        raise InputError("guided_times: nothing guides; give contours or landmarks a weight above 0")
    chosen = list(series.targets)
    if guided_times is not None:
        chosen = [image_at(series, t, "guided_times") for t in np.ravel(guided_times).tolist()]
    guides: dict[int, dict[str, Guide]] = {}
    for name, (given, make) in asked.items():
        if given[series.reference] is None:
            raise InputError(f"{name}: none are known on the reference, {series.names[series.reference]}")
        for i in chosen:
            if given[i] is not None:
                guides.setdefault(i, {})[name] = make(series, i, alignments[i], region, device)
        if not any(name in found for found in guides.values()):
            raise InputError(
                f"{name}: have a weight of {getattr(settings, name):g}, but none are known at the guided times; "
                f"load the series with {'masks' if name == 'contours' else name} at other times, too"
            )
    if guided_times is not None and (bare := [series.times[i] for i in chosen if i not in guides]):
        raise InputError(f"guided_times: nothing is known at {', '.join(f'{t:g}' for t in bare)}; leave them out")
    return guides


def image_at(series: Series, t: float, argument: str) -> int:
    """Index of the image at time t, one besides the reference; times may differ by their rounding.

    Raises:
        InputError: there is none; the message names the argument.
    """
    i = index_at(series.times, t) if isinstance(t, SupportsFloat) else None
    if i is not None and i != series.reference:
        return i
    listed = ", ".join(f"{series.times[i]:.15g}" for i in series.targets)
    raise InputError(f"{argument}: {t!r} is not the time of an image besides the reference; those are {listed}")


def landmark_guide(
    series: Series, i: int, alignment: np.ndarray, region: Grid, device: torch.device | str = "cpu"
) -> Guide:
    """How far landmarks of image i, once moved, are from the reference's: mean robust distance, mm.

    Those beyond either image don't count: nothing says how tissue moves there.

    Raises:
        InputError: none lies within both.
    """
    at, partners = series.landmarks[i], series.landmarks[series.reference]
    assert at is not None
    assert partners is not None
    seen = Grid.of(series.images[i]).contains(at) & series.grid.contains(partners)
    if not seen.any():
        raise InputError(f"landmarks: of {series.names[i]} none lies in its image and in the reference's as well")
    if not seen.all():
        text = "landmarks of %s: %d of %d lie outside its image or the reference's, and don't guide"
        logger.warning(text, series.names[i], np.count_nonzero(~seen), len(seen))
    points = _cube(region, at[seen], alignment, device)
    wanted = _cube(region, partners[seen], np.eye(4), device)

    def guide(displacement: torch.Tensor) -> torch.Tensor:
        miss_mm = region.vectors_from_cube(_moved(points, displacement) - wanted)
        return losses.robust_distance(miss_mm.square().sum(-1))

    return guide


def contour_guide(
    reference_distance: Callable[[int], tuple[torch.Tensor, Grid]],
    series: Series,
    i: int,
    alignment: np.ndarray,
    region: Grid,
    device: torch.device | str = "cpu",
) -> Guide:
    """How far surfaces of image i, once moved, are from the reference's: mean robust distance, mm, of each label
    that both masks have, each counting as much as another. What comes from beyond the reference's mask has no
    surface there to meet, and doesn't count.

    Args:
        reference_distance: `signed_distance` of a label of the reference's mask, as a tensor (1, 1, z, y, x).

    Raises:
        InputError: no label in common.
    """
    mask, reference = series.masks[i], series.masks[series.reference]
    assert mask is not None
    assert reference is not None
    surfaces, drawn = [], Grid.of(reference)
    for label in sorted(_labels(mask) & _labels(reference)):
        field, box = reference_distance(label)
        points = surface_points(*signed_distance(mask, label))
        if len(points) > 0 and field.max() > 0:
            surfaces.append((_cube(region, points, alignment, device), field, box))
    if not surfaces:
        raise InputError(
            f"contours: the masks of {series.names[i]} and of the reference, {series.names[series.reference]}, "
            "have no label in common that is some voxels wide"
        )

    def guide(displacement: torch.Tensor) -> torch.Tensor:
        off = []
        for points, distance, box in surfaces:
            there_mm = region.cube_to_world(_moved(points, displacement))
            squared_mm = sample(distance, box.world_to_cube(there_mm)[None]).square().flatten()
            within = (drawn.world_to_cube(there_mm.detach()).abs() <= 1).all(-1)
            off.append(losses.robust_distance(squared_mm * within) / within.float().mean().clamp(min=1e-6))
        return torch.stack(off).mean()

    return guide


# -- surfaces of labels


def signed_distance(mask: sitk.Image, label: int) -> tuple[np.ndarray, Grid]:
    """About the distance to a label's surface in mm, positive inside, (z, y, x) float32, on the part of the mask's
    grid that is within `REACH_MM` of the label.

    It is smoothed by a Gaussian of one voxel, which takes the voxels' stairs off the surface: under a phantom's
    true motion, surfaces meet within a twentieth of a voxel with it and a fifth without. A label that is hardly
    a voxel wide has no inside any more.
    """
    inside = sitk.Cast(mask == label, sitk.sitkUInt8)
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(inside)
    first, size = np.reshape(shapes.GetBoundingBox(1), (2, 3))
    margin = np.ceil(REACH_MM / np.asarray(mask.GetSpacing())).astype(int)
    start, stop = np.maximum(first - margin, 0), np.minimum(first + size + margin, mask.GetSize())
    box = sitk.RegionOfInterest(inside, (stop - start).tolist(), start.tolist())

    def depth(part: sitk.Image) -> sitk.Image:
        return sitk.SignedMaurerDistanceMap(
            part, insideIsPositive=True, squaredDistance=False, useImageSpacing=True
        )

    # Each is zero at the last voxels of its own side; the surface runs between them.
    middle = torch.from_numpy(sitk.GetArrayFromImage((depth(box) - depth(1 - box)) / 2))
    return smoothed(middle[None, None], sigma=1.0)[0, 0].numpy(), Grid.of(box)


def surface_points(distance: np.ndarray, grid: Grid, count: int = SURFACE_POINTS) -> np.ndarray:
    """Points (N, 3), LPS mm, where lines between neighbouring voxels cross the surface, the distance's zero; at
    most `count`, drawn at random, always the same. Where the image ends, there is none."""
    found = []
    for axis in range(3):
        along = np.moveaxis(distance, 2 - axis, 0)
        before, after = along[:-1], along[1:]
        crossed = np.argwhere((before > 0) != (after > 0))
        a, b = before[tuple(crossed.T)], after[tuple(crossed.T)]
        zyx = np.insert(crossed[:, 1:].astype(float), 2 - axis, crossed[:, 0] + a / (a - b), axis=1)
        found.append(zyx[:, ::-1])
    points = grid.index_to_world(np.concatenate(found))
    return points[np.random.default_rng(0).permutation(len(points))[:count]]


def _labels(mask: sitk.Image) -> set[int]:
    """Labels that have a surface: neither absent nor everywhere."""
    present = set(np.unique(sitk.GetArrayViewFromImage(mask)).tolist())
    return present - {0} if len(present) > 1 else set()


# -- points


def _cube(grid: Grid, points_mm: np.ndarray, alignment: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """World points (N, 3) of an image as cube points of a grid, after pre-alignment, float32."""
    aligned = grid.world_to_cube(apply_affine(np.linalg.inv(alignment), points_mm))
    return torch.from_numpy(aligned).to(device, torch.float32)


def _moved(points: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """φ of cube points (N, 3)."""
    return points + sample(displacement, points[None])[0].T
