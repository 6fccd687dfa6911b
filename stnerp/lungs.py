"""Body and lungs of a chest CT in Hounsfield units, by thresholds: where points are drawn and scored."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from stnerp.errors import InputError

AIR_HU = -500


def body_of(image: sitk.Image) -> sitk.Image:
    """The patient in a CT: the largest part above -500 HU, with what it encloses slice by slice.

    Raises:
        InputError: nothing is above -500 HU.
    """
    return filled_across(_largest_parts(image > AIR_HU, at_least=1.0))


def filled_across(mask: sitk.Image) -> sitk.Image:
    """A mask with the holes of its axial slices filled, also of a scan whose slices are not the axial ones.

    What a side of the field of view cuts is a hole as well, where the mask lies on that side before and behind it
    as the chest wall does with a lung. A lung in a corner, cut by two sides, is not told from the air outside.
    """
    feet_to_head = np.reshape(mask.GetDirection(), (3, 3))[2]
    axis = 2 - int(np.argmax(np.abs(feet_to_head)))  # of the array (z, y, x)
    slices = np.moveaxis(sitk.GetArrayFromImage(mask), axis, 0)
    for number, across in enumerate(slices):
        framed = np.pad(across, 1)
        for lines in (framed, framed.T):
            for side, beside in ((0, 1), (-1, -2)):
                if (found := np.flatnonzero(lines[beside])).size:
                    lines[side, found[0] : found[-1] + 1] = 1
        slices[number] = sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(framed)))[1:-1, 1:-1]
    filled = sitk.GetImageFromArray(np.ascontiguousarray(np.moveaxis(slices, 0, axis)))
    filled.CopyInformation(mask)
    return filled


def lungs_of(image: sitk.Image, body: sitk.Image) -> sitk.Image:
    """Both lungs in a CT, their vessels included: large parts of the body below -500 HU.

    Raises:
        InputError: no air in the body.
    """
    air = sitk.BinaryMorphologicalOpening((image < AIR_HU) & body, [1, 1, 1])
    lungs = _largest_parts(air, at_least=0.1)
    return sitk.BinaryMorphologicalClosing(lungs, [2, 2, 2]) & body


def _largest_parts(mask: sitk.Image, at_least: float) -> sitk.Image:
    """Connected parts of at least this share of the largest one."""
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(mask), sortByObjectSize=True)
    sizes = np.bincount(sitk.GetArrayViewFromImage(parts).ravel())[1:]
    if len(sizes) == 0:
        raise InputError("image: shows no body or no lungs; is it a CT of a chest, in HU?")
    kept = int(np.count_nonzero(sizes >= at_least * sizes[0]))
    return sitk.Cast((parts >= 1) & (parts <= kept), sitk.sitkUInt8)
