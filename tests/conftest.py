"""Grids of every orientation, and a small patient whose motion is known."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import offline  # noqa: F401 (no test may reach for the network)
import pytest
import torch
from scipy.spatial.transform import Rotation

from stnerp import Series, load_series
from stnerp.geometry import Grid
from stnerp.phantom import Phantom

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Tensors here are so small that a second thread costs more than it brings.
torch.set_num_threads(1)

# Different sizes and spacings along x, y, z, so that no two axes can be taken for each other.
SIZE, SPACING, ORIGIN = (7, 5, 4), (1.5, 0.8, 3.0), (-20.0, 13.0, 105.0)

_OBLIQUE = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()

# World direction (LPS) of each axis in a column.
DIRECTIONS = {
    "LPS": np.eye(3),
    "RAS": np.diag([-1.0, -1.0, 1.0]),
    "LAS, left-handed": np.diag([1.0, -1.0, 1.0]),
    "sagittal": np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),
    "oblique": _OBLIQUE,
    "oblique, left-handed": _OBLIQUE @ np.diag([1.0, 1.0, -1.0]),
}


def make_grid(
    direction: np.ndarray,
    size: tuple[int, int, int] = SIZE,
    spacing_mm: tuple[float, float, float] = SPACING,
) -> Grid:
    return Grid(size, spacing_mm, ORIGIN, tuple(float(d) for d in direction.ravel()))


def optional(module: str, extra: str) -> Any:
    """A module that not everybody has; without it the test, or the file of tests that asks, is skipped."""
    return pytest.importorskip(module, reason=f"needs {module}: pip install 'stnerp[{extra}]'")


def composed(script: str, *arguments: str) -> DictConfig:
    """What Hydra makes of a script's arguments."""
    hydra = optional("hydra", "scripts")
    with hydra.initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
        return hydra.compose(script, list(arguments))


@pytest.fixture(autouse=True)
def _signals_arrive() -> Iterator[None]:
    """Ctrl-C, also where the tests run in the background, whose SIGINT a shell turns off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=DIRECTIONS.values(), ids=DIRECTIONS.keys())
def any_grid(request: pytest.FixtureRequest) -> Grid:
    """Small and anisotropic, in each orientation in turn."""
    return make_grid(request.param)


@pytest.fixture
def oblique_grid() -> Grid:
    """Oblique, left-handed and anisotropic: about 60 mm wide."""
    return make_grid(DIRECTIONS["oblique, left-handed"], (20, 16, 11), (3.0, 4.0, 6.0))


@pytest.fixture(scope="session")
def phantom() -> Phantom:
    """A thorax in 10 mm voxels that breathes by 15 mm."""
    return Phantom(size=(36, 28, 18), spacing_mm=10.0, noise_hu=0.0, n_landmarks=60)


@pytest.fixture(scope="session")
def phantom_series(phantom: Phantom) -> Series:
    """Four phases of the phantom; the first, end of inhalation, is the reference."""
    times = [0.0, 0.25, 0.5, 0.75]
    return load_series([phantom.image(t) for t in times], times, period=1.0, window="ct")
