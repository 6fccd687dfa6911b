"""Body and lungs by thresholds, against a thorax whose labels are known."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from stnerp.errors import InputError
from stnerp.geometry import Grid
from stnerp.lungs import body_of, lungs_of
from stnerp.phantom import LABELS, Phantom


def test_lungs_and_body_of_the_phantom() -> None:
    phantom = Phantom((72, 56, 36), 5.0)
    image, labels = phantom.image(0.0), sitk.GetArrayFromImage(phantom.labels(0.0))
    body = body_of(image)
    lungs = sitk.GetArrayFromImage(lungs_of(image, body)) != 0
    assert Grid.of(body).is_close(phantom.grid)
    inside = sitk.GetArrayFromImage(body) != 0
    assert inside[labels != 0].all()
    true = np.isin(labels, [LABELS["lung"], LABELS["tumour"]])
    # Hardly anything else is found. Missed are the tumour, thick vessels, and half a voxel along the border.
    assert (lungs & true).sum() > 0.99 * lungs.sum()
    assert (lungs & true).sum() > 0.8 * true.sum()
    assert not lungs[~inside].any()


@pytest.mark.parametrize("orientation", ["PIR", "LSA"])
def test_a_scan_in_slices_that_are_not_axial(orientation: str) -> None:
    """Holes are filled across the body, however the array lies: else they would be those of other slices."""
    image = Phantom((36, 28, 18), 10.0, noise_hu=0.0).image(0.0)
    turned = body_of(sitk.DICOMOrient(image, orientation))
    assert Grid.of(turned).is_close(Grid.of(sitk.DICOMOrient(image, orientation)))
    back = sitk.GetArrayFromImage(sitk.DICOMOrient(turned, "LPS"))
    np.testing.assert_array_equal(back, sitk.GetArrayFromImage(body_of(image)))


@pytest.mark.parametrize("cut", [np.s_[9:39, :, :], np.s_[:, 10:, :]], ids=["left and right", "in front"])
def test_lungs_that_the_field_of_view_cuts(cut: tuple[slice, ...]) -> None:
    """Their air is open to the border, and is inside all the same."""
    image = Phantom((48, 38, 28), 7.0, noise_hu=0.0).image(0.0)
    whole, part = sitk.GetArrayFromImage(lungs_of(image, body_of(image))[cut]) != 0, image[cut]
    lungs = sitk.GetArrayFromImage(lungs_of(part, body_of(part))) != 0
    assert whole[..., 0].any() or whole[:, 0].any()
    # Opening and closing end at the border, some voxels off.
    assert (lungs & whole).sum() > 0.95 * whole.sum()
    assert (lungs & whole).sum() > 0.95 * lungs.sum()


def test_air_beside_a_body_that_reaches_every_side_is_outside() -> None:
    image = Phantom((48, 38, 28), 7.0, noise_hu=0.0).image(0.0)
    body = body_of(image)
    z, y, x = (slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(sitk.GetArrayFromImage(body)))
    part = sitk.GetArrayFromImage(body_of(image[x, y, z]))
    assert all(part[side].any() for side in (np.s_[:, 0], np.s_[:, -1], np.s_[..., 0], np.s_[..., -1]))
    np.testing.assert_array_equal(part, sitk.GetArrayFromImage(body[x, y, z]))


def test_what_shows_no_chest() -> None:
    grid = Grid((8, 8, 8), (1.0, 1.0, 1.0))
    air, water = (grid.image(np.full(grid.shape, hu, np.int16)) for hu in (-1000, 0))
    with pytest.raises(InputError, match="CT of a chest"):
        body_of(air)
    with pytest.raises(InputError, match="CT of a chest"):
        lungs_of(water, body_of(water))
