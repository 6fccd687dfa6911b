"""How good is it: images, contours, landmarks and deformations against the truth.

The same code scores every method. Each name carries its unit, each docstring the population that
a figure describes. Where a figure has no value (an empty mask, no landmarks) it is NaN.
"""

from __future__ import annotations

import math

import numpy as np
import SimpleITK as sitk
from skimage.metrics import structural_similarity

from stnerp.errors import InputError
from stnerp.geometry import Grid, slab_slices

SSIM_WINDOW = 7


# -- images


def psnr_db(
    image: np.ndarray, reference: np.ndarray, data_range: float = 1.0, mask: np.ndarray | None = None
) -> float:
    """Peak signal-to-noise ratio, 10 log10(data_range² / MSE), in dB.

    Population: all voxels, or those within `mask`. Infinite for equal images, NaN for an empty mask.

    Args:
        image, reference: arrays of one shape.
        data_range: difference between the largest and the smallest possible intensity.
        mask: non-zero where voxels count.

    Raises:
        InputError: shapes that differ, a data range that isn't positive.
    """
    _check_range(data_range)
    image, reference = _voxels(image, reference, mask)
    if image.size == 0:
        return math.nan
    mse = float(np.mean((image - reference) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)


def ssim(
    image: np.ndarray, reference: np.ndarray, data_range: float = 1.0, mask: np.ndarray | None = None
) -> float:
    """Structural similarity in a box window of 7 voxels a side (scikit-image's default), in 3D for 3D arrays.

    Population: without a mask, the voxels whose whole window lies inside the image; with a mask, the
    voxels within it (windows mirrored at the image's border). NaN for an empty mask. Axes shorter than
    the window are mirrored up to its length, so that thin slabs and single slices have a value as well.

    Args:
        image, reference: arrays of one shape.
        data_range: difference between the largest and the smallest possible intensity.
        mask: non-zero where voxels count.

    Raises:
        InputError: shapes that differ, a data range that isn't positive.
    """
    _check_range(data_range)
    _check_shapes(image, reference, mask)
    if image.size == 0 or (mask is not None and not np.any(mask)):
        return math.nan
    missing = [max(0, SSIM_WINDOW - n) for n in image.shape]
    padding = [(m // 2, m - m // 2) for m in missing]
    mean, everywhere = structural_similarity(
        np.pad(np.asarray(image, float), padding, mode="symmetric"),
        np.pad(np.asarray(reference, float), padding, mode="symmetric"),
        win_size=SSIM_WINDOW,
        data_range=data_range,
        full=True,
    )
    if mask is None:
        return float(mean)
    inside = tuple(slice(before, before + n) for (before, _), n in zip(padding, image.shape, strict=True))
    return float(everywhere[inside][np.asarray(mask) != 0].mean())


def ncc(image: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Global normalised cross-correlation (Pearson's r), in [-1, 1].

    Population: all voxels, or those within `mask`. NaN for an empty mask or a constant image.

    Raises:
        InputError: shapes that differ.
    """
    image, reference = _voxels(image, reference, mask)
    if image.size == 0 or np.ptp(image) == 0 or np.ptp(reference) == 0:
        return math.nan
    a, b = image - image.mean(), reference - reference.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


# -- contours


def dice(labels: sitk.Image, reference: sitk.Image, label: int = 1) -> float:
    """Dice coefficient 2 |A ∩ B| / (|A| + |B|) of one label, in [0, 1].

    Population: the voxels of the two label images. 0 where one lacks the label, NaN where both do.

    Raises:
        InputError: label images on different grids.
    """
    a, b = _masks(labels, reference, label)
    if _empty(a) and _empty(b):
        return math.nan
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(b, a)
    return overlap.GetDiceCoefficient()


def surface_distances_mm(labels: sitk.Image, reference: sitk.Image, label: int = 1) -> dict[str, float]:
    """Distances between the surfaces of one label in two label images, in mm.

    Population: surface voxels, which have a face on the outside of the label or of the image; each is
    measured to the nearest surface voxel of the other label image, centre to centre.

    Returns:
        `hd95_mm`: the larger of the two directed 95th percentiles (symmetric).
        `mean_surface_distance_mm`: mean over the surface voxels of both (symmetric).
        Both NaN where either image lacks the label: no surface, no distance.

    Raises:
        InputError: label images on different grids.
    """
    a, b = _masks(labels, reference, label)
    if _empty(a) or _empty(b):
        return {"hd95_mm": math.nan, "mean_surface_distance_mm": math.nan}
    # All surfaces lie in the bounding box of both; a rim of background closes those at the border.
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(a | b)
    box = shapes.GetBoundingBox(1)
    a, b = (
        sitk.LabelContour(sitk.ConstantPad(sitk.RegionOfInterest(m, box[3:], box[:3]), [1] * 3, [1] * 3))
        for m in (a, b)
    )
    a_to_b, b_to_a = _directed_distances_mm(a, b), _directed_distances_mm(b, a)
    return {
        "hd95_mm": float(max(np.percentile(a_to_b, 95), np.percentile(b_to_a, 95))),
        "mean_surface_distance_mm": float(np.concatenate([a_to_b, b_to_a]).mean()),
    }


def roi_measures(mask: sitk.Image, label: int = 1) -> dict[str, float]:
    """Volume and centroid of one label.

    Population: the voxels of the label.

    Returns:
        `volume_ml`, and `centroid_x_mm`, `centroid_y_mm`, `centroid_z_mm` in world LPS (NaN where the
        label is absent, with a volume of 0).
    """
    shapes = sitk.LabelShapeStatisticsImageFilter()
    shapes.Execute(sitk.Cast(mask == label, sitk.sitkUInt8))
    found = shapes.HasLabel(1)
    x, y, z = shapes.GetCentroid(1) if found else (math.nan,) * 3
    return {
        "volume_ml": shapes.GetPhysicalSize(1) / 1000 if found else 0.0,
        "centroid_x_mm": x,
        "centroid_y_mm": y,
        "centroid_z_mm": z,
    }


# -- landmarks


def tre_mm(predicted_mm: np.ndarray, true_mm: np.ndarray) -> np.ndarray:
    """Target registration error of each landmark: distance between (N, 3) points, (N,), in mm.

    Raises:
        InputError: arrays that aren't both (N, 3).
    """
    predicted_mm, true_mm = np.asarray(predicted_mm, float), np.asarray(true_mm, float)
    if predicted_mm.shape != true_mm.shape or true_mm.ndim != 2 or true_mm.shape[1] != 3:
        raise InputError(
            f"landmarks: predicted {predicted_mm.shape} and true {true_mm.shape} must both have shape (N, 3)"
        )
    return np.linalg.norm(predicted_mm - true_mm, axis=1)


def tre_summary(predicted_mm: np.ndarray, true_mm: np.ndarray, grid: Grid | None = None) -> dict[str, float]:
    """Target registration error of one case, in mm.

    Population: the landmarks of this case. The standard deviation is over landmarks (divided by N), not
    over cases.

    Args:
        predicted_mm, true_mm: points (N, 3), world LPS mm.
        grid: of the image that the true points were marked in. With it the same figures follow with the
            predicted points snapped to the nearest voxel centre, the protocol of DIR-Lab's organisers,
            which reads about 0.1 mm lower. The lattice goes on beyond the grid's border.

    Returns:
        `landmarks` (how many), `tre_mean_mm`, `tre_std_over_landmarks_mm`, `tre_median_mm`, `tre_p95_mm`,
        `tre_max_mm`; with a grid also `tre_snapped_mean_mm` and so on. NaN without landmarks.

    Raises:
        InputError: arrays that aren't both (N, 3).
    """
    summary = {"landmarks": len(true_mm), **_summary("tre", tre_mm(predicted_mm, true_mm))}
    if grid is not None:
        snapped_mm = grid.index_to_world(np.rint(grid.world_to_index(np.asarray(predicted_mm, float))))
        summary |= _summary("tre_snapped", tre_mm(snapped_mm, true_mm))
    return summary


# -- deformations


def jacobian_determinant(displacement_mm: np.ndarray, grid: Grid) -> np.ndarray:
    """Determinant of ∂φ/∂p for φ(p) = p + u(p), at every voxel, (z, y, x), without a unit.

    With u from target to reference: below 1 where the target is the expanded reference, 1 where the
    volume is kept, 0 or below where φ folds. Nothing is clipped. Central differences inside,
    one-sided at the border; along an axis of one voxel u counts as constant.

    Args:
        displacement_mm: u, world LPS mm, (z, y, x, 3).
        grid: where u is sampled; any orientation.

    Raises:
        InputError: a displacement that doesn't fit the grid.
    """
    displacement_mm = np.asarray(displacement_mm)
    if displacement_mm.shape != (*grid.shape, 3):
        raise InputError(f"displacement: shape {displacement_mm.shape} does not fit the grid's {(*grid.shape, 3)}")
    determinant = np.empty(grid.shape, np.result_type(displacement_mm, np.float32))
    # By slabs, each with a neighbour on either side: at once it takes ten times the memory of its result.
    for part in slab_slices(grid.shape):
        first = max(part.start - 1, 0)
        found = _determinant(displacement_mm[first : part.stop + 1], grid)
        determinant[part] = found[part.start - first :][: part.stop - part.start]
    return determinant


def folding(jacobian: np.ndarray) -> dict[str, float]:
    """How regular a deformation is, from its Jacobian determinants.

    Population: all voxels of `jacobian` (select those within a mask beforehand).

    Returns:
        `folded_voxels`: voxels with |J| <= 0; `folded_percent`: their share of all voxels.
        `sd_log_jacobian`: standard deviation of ln |J| over the voxels with |J| > 0 (divided by their
        number); NaN without any. `jacobian_min`: the smallest determinant.
    """
    jacobian = np.asarray(jacobian)
    if jacobian.size == 0:
        nan = math.nan
        return {"folded_voxels": 0, "folded_percent": nan, "sd_log_jacobian": nan, "jacobian_min": nan}
    positive = jacobian[jacobian > 0].astype(float)
    folded = int(np.count_nonzero(jacobian <= 0))
    return {
        "folded_voxels": folded,
        "folded_percent": 100 * folded / jacobian.size,
        "sd_log_jacobian": float(np.log(positive).std()) if positive.size else math.nan,
        "jacobian_min": float(jacobian.min()),
    }


# -- parts of the above


def _determinant(displacement_mm: np.ndarray, grid: Grid) -> np.ndarray:
    """`jacobian_determinant` of some slices of a grid, their ends as borders."""
    # With s in mm along the grid's axes: det ∂φ/∂p = det ∂φ/∂s / det ∂p/∂s, and ∂φ/∂s = ∂p/∂s + ∂u/∂s.
    dp_ds = grid.vectors_to_world(np.eye(3))
    dφ_ds = []
    for axis in range(3):
        column = np.zeros(displacement_mm.shape, np.result_type(displacement_mm, np.float32))
        if displacement_mm.shape[2 - axis] > 1:
            column += np.gradient(displacement_mm, grid.spacing_mm[axis], axis=2 - axis)
        column += dp_ds[axis].astype(column.dtype)
        dφ_ds.append(column)
    x, y, z = dφ_ds
    determinant = np.einsum("...i,...i->...", x, np.cross(y, z))
    return np.asarray(determinant / determinant.dtype.type(np.linalg.det(dp_ds)))


def _check_shapes(image: np.ndarray, reference: np.ndarray, mask: np.ndarray | None) -> None:
    if np.shape(image) != np.shape(reference):
        raise InputError(f"image: shape {np.shape(image)} differs from the reference's {np.shape(reference)}")
    if mask is not None and np.shape(mask) != np.shape(image):
        raise InputError(f"mask: shape {np.shape(mask)} differs from the image's {np.shape(image)}")


def _check_range(data_range: float) -> None:
    if not data_range > 0:
        raise InputError(f"data_range: {data_range} must be positive")


def _voxels(image: np.ndarray, reference: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The voxels that count, in float64."""
    _check_shapes(image, reference, mask)
    image, reference = np.asarray(image, float), np.asarray(reference, float)
    if mask is None:
        return image, reference
    inside = np.asarray(mask) != 0
    return image[inside], reference[inside]


def _masks(labels: sitk.Image, reference: sitk.Image, label: int) -> tuple[sitk.Image, sitk.Image]:
    """Where each label image has the label, both on exactly one grid."""
    if not Grid.of(labels).is_close(Grid.of(reference)):
        raise InputError("masks: the two label images have different grids; resample one onto the other first")
    a, b = (sitk.Cast(image == label, sitk.sitkUInt8) for image in (labels, reference))
    b.CopyInformation(a)
    return a, b


def _empty(mask: sitk.Image) -> bool:
    return not sitk.GetArrayViewFromImage(mask).any()


def _directed_distances_mm(surface: sitk.Image, other: sitk.Image) -> np.ndarray:
    """Distance from each voxel of one surface to the nearest voxel of the other, mm."""
    distance = sitk.SignedMaurerDistanceMap(other, squaredDistance=False, useImageSpacing=True)
    on_surface = sitk.GetArrayViewFromImage(surface) != 0
    return np.abs(sitk.GetArrayViewFromImage(distance)[on_surface])


def _summary(name: str, errors_mm: np.ndarray) -> dict[str, float]:
    some = len(errors_mm) > 0
    return {
        f"{name}_mean_mm": float(errors_mm.mean()) if some else math.nan,
        f"{name}_std_over_landmarks_mm": float(errors_mm.std()) if some else math.nan,
        f"{name}_median_mm": float(np.median(errors_mm)) if some else math.nan,
        f"{name}_p95_mm": float(np.percentile(errors_mm, 95)) if some else math.nan,
        f"{name}_max_mm": float(errors_mm.max()) if some else math.nan,
    }
