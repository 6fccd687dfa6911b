"""stnerp: learn one patient's anatomy in space and time.

From a 4D CT or a series of follow-up scans, a Ref-Net learns the reference image and a Def-Net the
deformation, and both answer at any time: image, motion, contours, landmarks.
"""

from stnerp.errors import FitError, InputError, MissingDependencyError, MissingFileError, StnerpError
from stnerp.fit import fit_deformation
from stnerp.geometry import Grid
from stnerp.model import STNeRP
from stnerp.ref_net import RefNet, fit_reference
from stnerp.series import Series, load_series

__version__ = "0.1.0"

__all__ = [
    "FitError",
    "Grid",
    "InputError",
    "MissingDependencyError",
    "MissingFileError",
    "RefNet",
    "STNeRP",
    "Series",
    "StnerpError",
    "fit_deformation",
    "fit_reference",
    "load_series",
]
