"""Intensity windows: the linear map between a scan's own intensities and [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import SimpleITK as sitk

from stnerp.errors import InputError

PRESETS = {
    "lung": (-1000.0, 150.0),
    "soft_tissue": (-160.0, 240.0),
    "ct": (-1000.0, 1000.0),
    "full_ct": (-1024.0, 3071.0),
}
PERCENTILES = (0.1, 99.9)
MODALITY = "0008|0060"  # where an image keeps it, as ITK's reader of DICOM files writes it

# Hounsfield units start at -1024, or -3024 (-3100 with noise) outside a scanner's round field of view. A
# twentieth of the voxels or more is below -500, where only air and lung are, and less below air and its noise, but
# for the one value outside the field of view: an MR with signs (inversion, phase, difference) is spread there.
_CT_MINIMUM = -3100
_CT_AIR = -500
_CT_BELOW_AIR = -1100
_CT_FRACTION = 0.05
_SAMPLES = 1_000_000


@dataclass(frozen=True)
class Window:
    """Intensities from `low` to `high` become 0 to 1; what lies outside is clipped.

    Attributes:
        low, high: intensities in the image's own unit (HU for CT).
        name: where the numbers come from: a preset's name, "percentile" or "custom".

    Raises:
        InputError: numbers that aren't finite, or `low` not below `high`.
    """

    low: float
    high: float
    name: str = "custom"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"window: ({self.low}, {self.high}) must be two finite numbers, low below high")
        for name in ("low", "high"):  # numbers of NumPy go into no model's file
            object.__setattr__(self, name, float(getattr(self, name)))

    @staticmethod
    def of(spec: str | Sequence[float] | Window, images: Iterable[sitk.Image] = ()) -> Window:
        """The window that `spec` asks for.

        Args:
            spec: a preset ("lung", "soft_tissue", "ct", "full_ct"); "percentile", the 0.1st to 99.9th
                percentile of all voxels of all images (of a regular sample of about a million per
                image, where they have more); a pair (low, high); a window; or "auto". Auto is "ct" if
                all images look like Hounsfield units (no voxel below -3100, at least a twentieth of each
                image below -500, which is air or lung, and less than that below -1100, padding aside), and
                none says that it is of another modality (DICOM), else "percentile".
            images: needed for "percentile" and "auto" only.

        Raises:
            InputError: an unknown name, an unusable pair, or no contrast within the window.
        """
        if isinstance(spec, Window):
            return spec
        if not isinstance(spec, str):
            return _window_of_pair(spec)
        if spec in PRESETS:
            return Window(*PRESETS[spec], name=spec)
        if spec not in ("auto", "percentile"):
            known = ", ".join([*PRESETS, "percentile", "auto"])
            raise InputError(f"window: unknown name {spec!r}; give one of {known}, or a pair (low, high)")
        images = list(images)
        if not images:
            raise InputError(f"window: {spec!r} needs images; give a preset's name or a pair (low, high)")
        if spec == "auto" and all(is_ct(image) for image in images):
            return Window(*PRESETS["ct"], name="ct")
        return _percentile_window(images)

    def normalise(self, array: np.ndarray) -> np.ndarray:
        """Intensities (any shape) to [0, 1], clipped, float32."""
        # Subtracted in double: MR and PET counts can be large next to the window's width. Slice by slice: what
        # fits into the processor's cache takes half the time.
        array = np.asarray(array)
        unit = np.empty(array.shape, np.float32)
        for part, values in zip(unit, array, strict=True) if array.ndim > 1 else [(unit, array)]:
            part[...] = np.clip((values.astype(np.float64) - self.low) / (self.high - self.low), 0, 1)
        return unit

    def denormalise(self, array: np.ndarray) -> np.ndarray:
        """Values in [0, 1] (any shape) to intensities, float32; exact inverse inside the window."""
        return (np.asarray(array, dtype=np.float64) * (self.high - self.low) + self.low).astype(np.float32)

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, float | str]) -> Window:
        return Window(float(values["low"]), float(values["high"]), str(values["name"]))


def _window_of_pair(pair: Sequence[float]) -> Window:
    try:
        low, high = (float(value) for value in pair)
    except (TypeError, ValueError):
        raise InputError(f"window: {pair!r} must be a preset's name or a pair (low, high)") from None
    return Window(low, high)


def is_ct(image: sitk.Image) -> bool:
    """Whether an image looks like Hounsfield units: see `Window.of`."""
    if image.HasMetaDataKey(MODALITY) and image.GetMetaData(MODALITY).strip() != "CT":
        return False
    voxels = sitk.GetArrayViewFromImage(image)
    lowest = voxels.min()
    if lowest < _CT_MINIMUM or (voxels < _CT_AIR).mean() < _CT_FRACTION:
        return False
    return bool(((voxels < _CT_BELOW_AIR) & (voxels != lowest)).mean() < _CT_FRACTION)


def _percentile_window(images: Sequence[sitk.Image]) -> Window:
    # Odd steps drift across rows, whose lengths are mostly even, instead of taking one column only.
    samples = []
    for image in images:
        voxels = sitk.GetArrayViewFromImage(image).reshape(-1)
        samples.append(voxels[:: voxels.size // _SAMPLES | 1].astype(np.float64))
    low, high = np.percentile(np.concatenate(samples), PERCENTILES)
    if not low < high:
        raise InputError(
            f"window: nearly all voxels equal {low:g}, no contrast to work with; give a pair (low, high)"
        )
    return Window(float(low), float(high), "percentile")
