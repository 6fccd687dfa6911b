"""ST-NeRP as a pairwise method, the paper's "w/o t" (Tables III and IV): Def-Net sees one target only.

The only baseline that knows the library's networks: it puts them behind the interface of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.baselines.pair import Align, PairRegistration, check_align
from stnerp.fit import fit_deformation
from stnerp.geometry import Grid
from stnerp.ref_net import RefNet, fit_reference
from stnerp.series import load_series
from stnerp.window import Window


def st_nerp(
    reference: sitk.Image,
    target: sitk.Image,
    *,
    window: Window,
    align: Align = "affine",
    seed: int = 0,
    preset: str = "fast",
    prior: bool = True,
    ref_net: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    progress: bool = False,
    **def_net: Any,
) -> PairRegistration:
    """Fit Ref-Net to the reference and Def-Net to a series of two images.

    Args:
        reference, target: scalar 3D images of one world, on any grids.
        window: intensities that matter, as [0, 1].
        align: pre-alignment, part of the displacement that is returned.
        seed: of both networks' start and of the points drawn.
        preset: "fast" or "paper".
        prior: False: the reference's voxels in place of Ref-Net, the paper's "w/o prior".
        ref_net: settings of Ref-Net, other than the preset's.
        device: "auto", "cpu", "cuda", ...
        def_net: settings of Def-Net, other than the preset's, by name.

    Raises:
        InputError: unknown names.
        FitError: no overlap to align, or a loss that is not a number.
    """
    check_align(align)
    series = load_series([reference, target], [0.0, 1.0], window=window)
    common: dict[str, Any] = {"preset": preset, "device": device, "seed": seed, "progress": progress}
    net = fit_reference(series, **common, **(ref_net or {})) if prior else None
    model = fit_deformation(series, net, align=align, **common, **def_net)
    displacement = model.displacement(1.0, Grid.of(target))
    return PairRegistration(displacement, None if net is None else partial(intensities_at, net))


def intensities_at(net: RefNet, points_mm: np.ndarray) -> np.ndarray:
    """Ref-Net's intensities at points (..., 3) of the reference, LPS mm, as `STNeRP.image` draws them."""
    cube = torch.from_numpy(net.grid.world_to_cube(points_mm).reshape(-1, 3))
    with torch.no_grad():
        read = net(cube.to(next(net.parameters()))).cpu().numpy()
    return net.window.denormalise(np.clip(read, 0, 1)).reshape(points_mm.shape[:-1])
