"""greedy: diffeomorphic registration by greedy composition of smoothed updates, after a linear transform.

Yushkevich, Pluta, Wang, Wisse, Das, Wolk: Fast automatic segmentation of hippocampal subfields and medial
temporal lobe subregions in 3 Tesla and 7 Tesla MRI, Alzheimer's & Dementia 2016.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import SimpleITK as sitk

from stnerp.baselines.pair import Align, PairRegistration, check_align, in_window, peer
from stnerp.errors import FitError, InputError
from stnerp.window import Window

METRICS = ("NCC", "WNCC", "SSD")
DEGREES_OF_FREEDOM = {"rigid": 6, "affine": 12}


def greedy(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    align: Align = "affine",
    seed: int = 0,
    metric: Literal["NCC", "WNCC", "SSD"] = "WNCC",
    radius: int = 2,
    iterations: Sequence[int] = (100, 50, 10),
    linear_iterations: Sequence[int] = (100, 50, 10),
    update_sigma: str = "1.732vox",
    field_sigma: str = "0.7071vox",
    stationary: bool = True,
) -> PairRegistration:
    """Local correlation, stationary velocities: the steps that greedy's documentation starts with.

    Args:
        reference, target: 3D images in one world, on any grids.
        window: intensities that matter, as [0, 1].
        align: "affine" and "rigid" start from the centres of the images; "none": from their headers.
        seed: has no effect; greedy's own random numbers can't be seeded.
        metric: local correlation (NCC), the same weighted by overlap (WNCC), or squared differences (SSD).
        radius: of the correlation's window, in voxels.
        iterations, linear_iterations: per level, coarse to fine; voxels are shrunk by 2 from level to level.
        update_sigma, field_sigma: smoothing of each update and of the whole field, with a unit, vox or mm.
        stationary: exponentiate one velocity field instead of composing updates.

    Raises:
        MissingDependencyError: picsl-greedy isn't installed.
        InputError: an unknown `align` or `metric`.
        FitError: greedy gave up.
    """
    check_align(align)
    if metric not in METRICS:
        raise InputError(f"metric: unknown {metric!r}; give {', '.join(METRICS[:-1])} or {METRICS[-1]}")
    tool = peer("picsl_greedy", "picsl-greedy").Greedy3D()
    fixed, moving = in_window(target, window, "target"), in_window(reference, window, "reference")
    pair = "-V 0 -i fixed moving -m " + (metric if metric == "SSD" else f"{metric} {radius}x{radius}x{radius}")
    first, chain = "", "warp"
    quiet = {"out": io.StringIO(), "err": io.StringIO()}
    try:
        tool["fixed"], tool["moving"] = fixed, moving
        if align != "none":
            levels, degrees = "x".join(map(str, linear_iterations)), DEGREES_OF_FREEDOM[align]
            tool.execute(f"{pair} -a -dof {degrees} -ia-image-centers -n {levels} -o linear", **quiet, linear=None)
            first, chain = "-it linear", "warp linear"
        levels, sv = "x".join(map(str, iterations)), "-sv" if stationary else ""
        smoothing = f"-s {update_sigma} {field_sigma}"
        tool.execute(f"{pair} {first} {sv} -n {levels} {smoothing} -wp 0 -o warp", **quiet, warp=None)
        tool.execute(f"-V 0 -rf fixed -r {chain} -wp 0 -rc field", **quiet, field=None)
    except RuntimeError as error:
        raise FitError(f"greedy: the registration failed; do the images overlap? ({error})") from error
    # greedy takes points of the fixed image (our target) to the moving one (our reference); files would hold
    # RAS, but images in memory are ITK's: LPS mm.
    return PairRegistration(sitk.Cast(tool["field"], sitk.sitkVectorFloat64))
