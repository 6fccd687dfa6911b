"""elastix: a free-form deformation of uniform cubic B-splines, coarse to fine, after a linear transform.

Klein, Staring, Murphy, Viergever, Pluim: elastix: a toolbox for intensity-based medical image registration,
IEEE TMI 2010. Similarity, penalty, optimiser, iterations and control points are those of the first spline stage of
Par0011 of its model zoo (EMPIRE10, lung CT within a patient). Its second stage, 5 mm within a lung mask, needs a
mask and more than doubles the time; `grid_spacing_mm=5` has its spacing in one stage.
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import numpy as np
import SimpleITK as sitk

from stnerp.baselines.pair import Align, PairRegistration, check_align, in_window, peer
from stnerp.errors import FitError
from stnerp.geometry import Grid
from stnerp.window import Window

Parameters = dict[str, list[str]]


def elastix_bspline(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    align: Align = "affine",
    seed: int = 0,
    grid_spacing_mm: float = 10.0,
    resolutions: int = 4,
    iterations: int = 1000,
    linear_iterations: int = 500,
    samples: int = 5000,
    bending_weight: float = 0.05,
) -> PairRegistration:
    """Normalised correlation and bending energy, minimised by adaptive stochastic gradient descent.

    Args:
        reference, target: 3D images in one world, on any grids.
        window: intensities that matter, as [0, 1].
        align: what comes before the splines; "none": nothing, the images lie as their headers say.
        seed: of the random samples.
        grid_spacing_mm: between control points at the last resolution; twice as much at each one before.
        resolutions: levels of the image pyramid; each halves the smoothing of the one before.
        iterations, linear_iterations: per resolution, of the splines and of the linear transform.
        samples: random points at which the images are compared, new ones in each iteration.
        bending_weight: of the bending energy's gradient, relative to that of the correlation.

    Raises:
        MissingDependencyError: itk-elastix isn't installed.
        InputError: an unknown `align`.
        FitError: elastix gave up (too little overlap, say).
    """
    check_align(align)
    itk = peer("itk", "itk-elastix", needs="ElastixRegistrationMethod")
    stages = [] if align == "none" else [_linear(align, resolutions, linear_iterations)]
    stages.append(_bspline(resolutions, iterations, grid_spacing_mm, bending_weight))
    for stage in stages:
        stage |= {"NumberOfSpatialSamples": [str(samples)], "RandomSeed": [str(seed + 1)]}
    try:
        # ITK loads its parts when they are first used, and warns; as errors these warnings end Python.
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            fixed = _to_itk(itk, in_window(target, window, "target"))
            moving = _to_itk(itk, in_window(reference, window, "reference"))
            parameters = itk.ParameterObject.New()
            for stage in stages:
                parameters.AddParameterMap(stage)
            _, found = itk.elastix_registration_method(
                fixed, moving, parameter_object=parameters, log_to_console=False
            )
            field = itk.transformix_deformation_field(  # writes it to a file, too
                moving, found, log_to_console=False, output_directory=folder
            )
            displacement_mm = itk.array_from_image(field).astype(np.float64)
    except RuntimeError as error:
        raise FitError(f"elastix: the registration failed; do the images overlap? ({error})") from error
    # elastix maps points of the fixed image (our target) to the moving one (our reference), LPS mm.
    return PairRegistration(Grid.of(target).image(displacement_mm))


def _common(resolutions: int, iterations: int) -> Parameters:
    return {
        "Registration": ["MultiResolutionRegistration"],
        "FixedInternalImagePixelType": ["float"],
        "MovingInternalImagePixelType": ["float"],
        "UseDirectionCosines": ["true"],
        "FixedImagePyramid": ["FixedSmoothingImagePyramid"],
        "MovingImagePyramid": ["MovingSmoothingImagePyramid"],
        "NumberOfResolutions": [str(resolutions)],
        "Interpolator": ["LinearInterpolator"],
        "Metric": ["AdvancedNormalizedCorrelation"],
        "Optimizer": ["AdaptiveStochasticGradientDescent"],
        "MaximumNumberOfIterations": [str(iterations)],
        "AutomaticParameterEstimation": ["true"],
        "UseAdaptiveStepSizes": ["true"],
        "ImageSampler": ["RandomCoordinate"],
        "NewSamplesEveryIteration": ["true"],
        "MaximumNumberOfSamplingAttempts": ["50"],
        "HowToCombineTransforms": ["Compose"],
        "ResampleInterpolator": ["FinalLinearInterpolator"],
        "Resampler": ["DefaultResampler"],
        "WriteResultImage": ["false"],
    }


def _linear(align: Align, resolutions: int, iterations: int) -> Parameters:
    return _common(resolutions, iterations) | {
        "Transform": ["EulerTransform" if align == "rigid" else "AffineTransform"],
        "AutomaticScalesEstimation": ["true"],
        "AutomaticTransformInitialization": ["true"],
        "AutomaticTransformInitializationMethod": ["GeometricalCenter"],
    }


def _bspline(resolutions: int, iterations: int, grid_spacing_mm: float, bending_weight: float) -> Parameters:
    return _common(resolutions, iterations) | {
        "Registration": ["MultiMetricMultiResolutionRegistration"],
        "Metric": ["AdvancedNormalizedCorrelation", "TransformBendingEnergyPenalty"],
        "UseRelativeWeights": ["true"],
        "Metric0RelativeWeight": ["1.0"],
        "Metric1RelativeWeight": [str(bending_weight)],
        "Transform": ["BSplineTransform"],
        "FinalGridSpacingInPhysicalUnits": [str(grid_spacing_mm)],
        "GridSpacingSchedule": [str(2.0**level) for level in reversed(range(resolutions))],
    }


def _to_itk(itk: Any, image: sitk.Image) -> Any:
    converted = itk.image_from_array(sitk.GetArrayFromImage(image))
    converted.SetOrigin(image.GetOrigin())
    converted.SetSpacing(image.GetSpacing())
    converted.SetDirection(np.reshape(image.GetDirection(), (3, 3)))
    return converted
