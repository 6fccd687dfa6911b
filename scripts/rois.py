"""Regions of interest that were drawn on the reference, in label images or a DICOM RT structure set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from fitted_run import is_structure_set, roi_name
from propagate_rtstruct import check_inside, wanted_rois
from run_directory import logger

from stnerp import InputError
from stnerp.geometry import Grid
from stnerp.io.image import read_labels
from stnerp.io.rtstruct import Roi, read_rtstruct, roi_mask, shown


def read_structures(path: Path, wanted: Any, reference: Grid) -> list[Roi] | None:
    """The closed ROIs of a structure set, all that are anatomy or those asked for; None: the file is another one.

    Raises:
        InputError: none of them is closed, or reaches the reference.
    """
    if not (path.suffix.lower() == ".dcm" or is_structure_set(path)):
        return None
    rois = [roi for roi in wanted_rois(read_rtstruct(path), wanted) if roi.contours]
    if not rois:
        raise InputError(f"{path}: only single points are drawn, which have no inside; choose others with rois=")
    check_inside(rois, reference, str(path))
    return rois


def read_rois(path: Path, wanted: Any, reference: Grid, names: bool = False) -> dict[str, sitk.Image]:
    """Label images by name: what is in the file, or each ROI of a structure set on the reference's voxels.

    Each has an image of its own, since ROIs overlap. What they are called was typed by somebody, and may tell who
    the patient is: they go by their numbers.

    Args:
        wanted: numbers or names of a structure set's ROIs; None: all that are anatomy.
        names: call them by their names all the same.

    Raises:
        InputError: as `read_labels`, `read_structures` and `roi_mask`.
    """
    rois = read_structures(path, wanted, reference)
    if rois is None:
        return {roi_name(path): read_labels(path)}
    masks = {}
    for roi in rois:
        try:
            mask = roi_mask(roi, reference)
        except InputError:
            if wanted is not None:
                raise
            logger.warning("ROI %d: isn't planar, or covers no voxel of the reference: left out", roi.number)
            continue
        masks[f"{roi_name(path)} ROI {roi.number}" + (f" {shown(roi.name)}" if names else "")] = mask
    if not masks:
        raise InputError(f"{path}: no ROI covers a voxel of the reference; was it drawn on the reference scan?")
    return masks


def together(rois: dict[str, sitk.Image]) -> sitk.Image:
    """One label image of them all: itself, or 1 wherever any of several is."""
    images = list(rois.values())
    if len(images) == 1:
        return images[0]
    inside = np.logical_or.reduce([sitk.GetArrayViewFromImage(image) != 0 for image in images])
    return Grid.of(images[0]).image(inside.astype(np.uint8))
