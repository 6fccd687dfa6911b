"""ANTs SyN: symmetric diffeomorphic registration after a linear transform.

Avants, Epstein, Grossman, Gee: Symmetric diffeomorphic image registration with cross-correlation, MedIA 2008.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import SimpleITK as sitk

from stnerp.baselines.pair import Align, PairRegistration, check_align, in_window, peer
from stnerp.errors import FitError, InputError
from stnerp.window import Window

SAMPLING = {"mattes": 32, "cc": 4}  # bins of the joint histogram, radius of the window in voxels


def ants_syn(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    align: Align = "affine",
    seed: int = 0,
    metric: Literal["mattes", "cc"] = "mattes",
    iterations: Sequence[int] = (100, 70, 50, 20),
    gradient_step: float = 0.2,
    flow_sigma: float = 3.0,
    total_sigma: float = 0.0,
) -> PairRegistration:
    """SyN with mutual information ("mattes") or local cross-correlation ("cc", much slower).

    Args:
        reference, target: 3D images in one world, on any grids.
        window: intensities that matter, as [0, 1].
        align: "affine" and "rigid" start from the centres of mass; "none": from the images' headers.
        seed: of the random samples of the linear stage. With more than one thread ANTs isn't repeatable to
            the last digit.
        iterations: at most so many per level, coarse to fine; voxels are shrunk by 2 from level to level.
        gradient_step: how far a step goes.
        flow_sigma, total_sigma: smoothing of each update and of the whole field (variances, in voxels).

    Raises:
        MissingDependencyError: antspyx isn't installed.
        InputError: an unknown `align` or `metric`.
        FitError: ANTs gave up.
    """
    check_align(align)
    if metric not in SAMPLING:
        raise InputError(f"metric: unknown {metric!r}; give mattes or cc")
    ants = peer("ants", "antspyx")
    fixed = ants.from_sitk(in_window(target, window, "target"))
    moving = ants.from_sitk(in_window(reference, window, "reference"))
    ants.config.set_ants_deterministic(False, seed + 1)  # the seed alone: True refuses all but a few kinds
    try:
        with tempfile.TemporaryDirectory() as folder:
            start = "Identity"
            if align != "none":
                kind = {"rigid": "Rigid", "affine": "Affine"}[align]
                found = ants.registration(fixed, moving, kind, outprefix=str(Path(folder) / "linear"))
                start = found["fwdtransforms"][0]
            ants.registration(
                fixed,
                moving,
                "SyNOnly",
                initial_transform=[start],
                outprefix=str(Path(folder) / "syn"),
                syn_metric={"mattes": "mattes", "cc": "CC"}[metric],
                syn_sampling=SAMPLING[metric],
                reg_iterations=tuple(iterations),
                grad_step=gradient_step,
                flow_sigma=flow_sigma,
                total_sigma=total_sigma,
                write_composite_transform=True,
            )
            # ANTs maps points of the fixed image (our target) to the moving one (our reference), LPS mm.
            transform = sitk.ReadTransform(str(Path(folder) / "synComposite.h5"))
    except RuntimeError as error:
        raise FitError(f"ants: the registration failed; do the images overlap? ({error})") from error
    finally:
        ants.config.set_ants_deterministic(False, None)
    return PairRegistration(
        sitk.TransformToDisplacementField(
            transform,
            sitk.sitkVectorFloat64,
            target.GetSize(),
            target.GetOrigin(),
            target.GetSpacing(),
            target.GetDirection(),
        )
    )
