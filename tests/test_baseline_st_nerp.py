"""ST-NeRP behind the interface of the pairwise methods: direction, grid, and what its arguments choose."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from stnerp import fit_deformation, fit_reference, load_series
from stnerp.baselines.st_nerp import st_nerp
from stnerp.errors import InputError
from stnerp.geometry import Grid
from stnerp.phantom import Phantom
from stnerp.window import Window

CT = Window.of("ct")
FEW = {"levels": [(15, 30, 30)], "device": "cpu"}
REF_NET = {"iterations": 60, "fraction_per_step": 0.1}


def test_points_of_the_target_go_to_the_reference(phantom: Phantom) -> None:
    reference, target = phantom.image(0.0), phantom.image(0.5)
    found = st_nerp(reference, target, window=CT, align="none", prior=False, **FEW)
    there = phantom.landmarks(0.5)
    before = np.linalg.norm(there - phantom.landmarks(0.0), axis=1).mean()
    after = np.linalg.norm(found.map_points(there) - phantom.landmarks(0.0), axis=1).mean()
    # Coarse and quick; the inverse direction would double the distance.
    assert after < 0.5 * before


@pytest.mark.parametrize("prior", [False, True])
def test_it_is_the_model_of_two_images(phantom: Phantom, prior: bool) -> None:
    reference, target = phantom.image(0.0), phantom.image(0.5)
    target = target[3:, 2:, 1:]  # a grid of its own
    settings = {"levels": [(15, 30, 3)], "device": "cpu", "seed": 4}
    found = st_nerp(reference, target, window=CT, align="none", prior=prior, ref_net=REF_NET, **settings)
    series = load_series([reference, target], [0, 1], window=CT)
    net = fit_reference(series, device="cpu", seed=4, progress=False, **REF_NET) if prior else None
    model = fit_deformation(series, net, align="none", progress=False, **settings)
    assert Grid.of(found.displacement).is_close(Grid.of(target))
    expected = sitk.GetArrayFromImage(model.displacement(1.0, target))
    assert np.array_equal(sitk.GetArrayFromImage(found.displacement), expected)
    assert np.abs(expected).max() > 0.01
    # The picture is the model's too, of Ref-Net or of the voxels; float32 on both sides.
    drawn, voxels = (sitk.GetArrayFromImage(image) for image in (found.image(reference), found.warp(reference)))
    picture = sitk.GetArrayFromImage(model.image(1.0, target))
    clipped = drawn if prior else np.clip(drawn, CT.low, CT.high)
    np.testing.assert_allclose(clipped, picture, atol=0.1)
    assert bool(np.abs(drawn - voxels).max() > 10) is prior


def test_presets_and_wrong_names(phantom: Phantom) -> None:
    images = phantom.image(0.0), phantom.image(0.5)
    paper = {"preset": "paper", "prior": False, "levels": [(40, 40, 1)], "width": 16, "device": "cpu"}
    assert st_nerp(*images, window=CT, align="none", **paper).displacement.GetSize() == images[1].GetSize()
    with pytest.raises(InputError, match="none, rigid or affine"):
        st_nerp(*images, window=CT, align="similar")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="preset"):
        st_nerp(*images, window=CT, preset="slow")
