"""The deformation in files that other tools apply: displacement fields, ITK transforms, elastix, the velocity.

All vectors are LPS mm, as in ITK and DICOM. "Target -> reference" is φ_t = ψ_t ∘ A_t⁻¹: pre-alignment A is undone,
then comes ψ = exp(v). It takes *points* of time t to the reference, and with it a resampler draws the *reference
image* at time t. `inverse=True` is φ_t⁻¹, reference -> target: for points of the reference and images of time t.
docs/transforms.md tells which tool takes which file, and how.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from stnerp.alignment import affine_at
from stnerp.atomic import replacing
from stnerp.baselines.pair import registration_of
from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid, affine_transform, apply_affine
from stnerp.io.dicom import reason
from stnerp.io.image import check_writable, file_reader, lower_suffix, write_image
from stnerp.model import STNeRP
from stnerp.warp import sample

FIELDS = (".nii.gz", ".nii", ".mha", ".nrrd")
TRANSFORMS = (".h5", ".tfm")
_NOTE = "ITK_FileNotes"  # what ITK keeps as the description of a NIfTI, MetaImage or NRRD file


# -- in memory


def displacement_field(
    model: STNeRP, t: float, grid: Grid | sitk.Image | None = None, *, inverse: bool = False
) -> sitk.Image:
    """φ_t(p) − p (`inverse`: φ_t⁻¹(p) − p) at every voxel p of a grid, LPS mm, float64 vectors (x, y, z).

    Exact at the voxels; linear interpolation between them, as every tool does it, is not. Outside the grid ITK
    leaves points where they are.

    Args:
        t: any time, in the user's unit.
        grid: where the field is wanted; None: the reference's grid. To draw an image that is the image's own grid.
        inverse: reference -> target instead of target -> reference, as `STNeRP.map_points` finds it.

    Raises:
        InputError: `t` is no time.
    """
    return registration_of(Grid.of(model.grid if grid is None else grid), _map(model, t, inverse)).displacement


def composite_transform(
    model: STNeRP, t: float, grid: Grid | sitk.Image | None = None, *, inverse: bool = False
) -> sitk.CompositeTransform:
    """Pre-alignment and what is left after it, as ITK composes them: φ_t = ψ_t ∘ A_t⁻¹, or φ_t⁻¹ = A_t ∘ ψ_t⁻¹.

    ψ lies on the model's own lattice, whose linear interpolation is the model, so that target -> reference is
    exact between voxels, too: all over the reference's grid, over `grid`, and wherever the reference is seen at t.
    ψ⁻¹ is no such function; its field is exact at the voxels of `grid`.

    Args:
        t: any time, in the user's unit.
        grid: None: the reference's.
        inverse: reference -> target instead of target -> reference.

    Raises:
        InputError: `t` is no time.
    """
    grid, φ = Grid.of(model.grid if grid is None else grid), _map(model, t, inverse)
    alignment = affine_at(model.alignments, model.times, t, model.period)
    back = np.linalg.inv(alignment)
    if inverse:
        residual = registration_of(grid, lambda points_mm: apply_affine(back, φ(points_mm)))
        # The last goes first.
        return sitk.CompositeTransform([affine_transform(alignment), _field(residual.displacement)])
    corners = apply_affine(back, np.concatenate([model.grid.corners_world(), grid.corners_world()]))
    lattice = _continued(model.lattice, model.lattice.world_to_index(corners))
    residual = registration_of(lattice, lambda points_mm: φ(apply_affine(alignment, points_mm)))
    return sitk.CompositeTransform([_field(residual.displacement), affine_transform(back)])


def velocity_field(model: STNeRP, t: float) -> sitk.Image:
    """The stationary velocity v_t on the model's lattice, LPS mm per unit of flow time, float64 vectors (x, y, z).

    ψ_t = exp(v_t) by scaling and squaring: u = v / 2ⁿ, then n times u(p) ← u(p) + u(p + u(p)), read linearly, with
    n = `model.settings.squarings`; φ_t = ψ_t ∘ A_t⁻¹. Beyond the lattice's border the model reads the border's u.
    Many tools read zero there, so the image has a margin of the border's velocity, as wide as the flow is fast:
    with it they agree within the lattice, but for points that come in across its border, where they nearly do.
    """
    _map(model, t, inverse=False)
    lattice = model.lattice
    velocity_mm = model.velocity_mm(t).double().cpu()
    fastest = velocity_mm.abs().amax(dim=(0, 2, 3, 4)).numpy() / np.asarray(lattice.spacing_mm)
    grid = _continued(lattice, np.stack([-fastest, np.asarray(lattice.size) - 1 + fastest]))
    points = torch.from_numpy(lattice.world_to_cube(grid.points_world()))
    return grid.image(lattice.vectors_to_world(sample(velocity_mm, points[None])[0].movedim(0, -1).numpy()))


def transformix_parameters(field: str | os.PathLike[str], outside: float = 0.0) -> dict[str, list[str]]:
    """elastix' transform parameters that apply a displacement field, a file that `write_transform` wrote.

    The image is drawn on the field's voxels, linearly. The map names the field by its full path.

    Args:
        field: the file.
        outside: intensity of points that come from outside the image.

    Raises:
        MissingFileError: no such file.
        InputError: not a field of 3D vectors.
    """
    grid = _grid_of_file(Path(field))
    numbers: dict[str, Sequence[float]] = {
        "Spacing": grid.spacing_mm,
        "Origin": grid.origin_mm,
        "Direction": np.reshape(grid.direction, (3, 3)).T.ravel().tolist(),  # elastix goes down the columns
        "DefaultPixelValue": [outside],
    }
    return {
        "Transform": ["DeformationFieldTransform"],
        "DeformationFieldFileName": [Path(field).resolve().as_posix()],
        "DeformationFieldInterpolationOrder": ["1"],
        "NumberOfParameters": ["0"],
        "HowToCombineTransforms": ["Compose"],
        "FixedImageDimension": ["3"],
        "MovingImageDimension": ["3"],
        "FixedInternalImagePixelType": ["float"],
        "MovingInternalImagePixelType": ["float"],
        "UseDirectionCosines": ["true"],
        "Size": [str(n) for n in grid.size],
        "Index": ["0", "0", "0"],
        **{name: [repr(float(value)) for value in values] for name, values in numbers.items()},
        "Resampler": ["DefaultResampler"],
        "ResampleInterpolator": ["FinalLinearInterpolator"],
        "ResultImagePixelType": ["float"],
        "ResultImageFormat": ["nii.gz"],
        "CompressResultImage": ["true"],
    }


# -- in files


def write_transform(
    model: STNeRP,
    t: float,
    path: str | os.PathLike[str],
    grid: Grid | sitk.Image | None = None,
    *,
    inverse: bool = False,
    separate: bool = True,
    overwrite: bool = False,
) -> Path:
    """Write the deformation of one time; what kind of file, the name's suffix decides.

    Args:
        t: any time, in the user's unit.
        path: ending in .nii.gz, .nii, .mha or .nrrd for `displacement_field`, float32; in .h5 or .tfm (which is
            text) for an ITK transform, float64.
        grid: of the field; None: the reference's.
        inverse: reference -> target instead of target -> reference.
        separate: in an ITK transform, pre-alignment and the rest one after the other (`composite_transform`);
            False: the one field that a .nii.gz would hold.
        overwrite: replace the file if it exists.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file exists and `overwrite` is false, another suffix, or no time.
    """
    path = Path(path)
    if not path.name.lower().endswith(FIELDS + TRANSFORMS):
        raise InputError(f"{path}: the file name must end in one of {', '.join(FIELDS + TRANSFORMS)}")
    check_writable(path, overwrite)
    if path.name.lower().endswith(TRANSFORMS):
        if separate:
            transform: sitk.Transform = composite_transform(model, t, grid, inverse=inverse)
        else:
            transform = _field(displacement_field(model, t, grid, inverse=inverse))
        with replacing(path, lower_suffix(path, TRANSFORMS)) as partial:
            try:
                sitk.WriteTransform(transform, str(partial))
            except RuntimeError as error:
                raise InputError(f"{path}: can't be written: {reason(error)}") from None
        return path
    direction = "reference -> target" if inverse else "target -> reference"
    return _write_field(
        displacement_field(model, t, grid, inverse=inverse), f"{direction}, LPS mm, t = {t:g}", path, overwrite
    )


def write_velocity(model: STNeRP, t: float, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write `velocity_field` as .nii.gz, .nii, .mha or .nrrd, float32; its description says how many squarings.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file exists and `overwrite` is false, another suffix, or no time.
    """
    path = Path(path)
    if not path.name.lower().endswith(FIELDS):
        raise InputError(f"{path}: the file name must end in one of {', '.join(FIELDS)}")
    check_writable(path, overwrite)
    note = f"stationary velocity, LPS mm, t = {t:g}, {model.settings.squarings} squarings"
    return _write_field(velocity_field(model, t), note, path, overwrite)


def write_transformix(
    field: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    outside: float = 0.0,
    overwrite: bool = False,
) -> Path:
    """Write `transformix_parameters` as the text file that elastix' transformix takes (-tp).

    Raises:
        MissingFileError: no such field, or the folder does not exist.
        InputError: not a field of 3D vectors, or the file exists and `overwrite` is false.
    """
    path = Path(path)
    check_writable(path, overwrite)
    parameters = transformix_parameters(field, outside)
    lines = [f"({name} {' '.join(map(_quoted, values))})\n" for name, values in parameters.items()]
    with replacing(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return path


def _map(model: STNeRP, t: float, inverse: bool) -> Callable[[np.ndarray], np.ndarray]:
    """`STNeRP.map_points` at one time."""
    model.map_points(np.empty((0, 3)), t)  # refuses what is no time, before anything else does
    return partial(model.map_points, t=t, inverse=inverse)


def _continued(grid: Grid, index: np.ndarray) -> Grid:
    """The same voxels, and as many more as hold these indices (N, 3) and one voxel around them."""
    first = np.minimum(np.floor(index.min(0)) - 1, 0)
    last = np.maximum(np.ceil(index.max(0)) + 1, np.asarray(grid.size) - 1)
    return grid.part(first, last)


def _field(displacement: sitk.Image) -> sitk.DisplacementFieldTransform:
    return sitk.DisplacementFieldTransform(sitk.Image(displacement))  # which takes the image away


def _write_field(field: sitk.Image, note: str, path: Path, overwrite: bool) -> Path:
    single = sitk.Cast(field, sitk.sitkVectorFloat32)  # 1e-5 mm of 100 mm
    single.SetMetaData(_NOTE, note)
    write_image(single, path, overwrite)
    return path


def _grid_of_file(path: Path) -> Grid:
    """The grid of a file of 3D vectors; no voxel is read."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; write_transform writes one")
    reader = file_reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path}: can't be read as a displacement field: {reason(error)}") from None
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 3:
        raise InputError(f"{path}: holds no 3D vectors; give a displacement field that write_transform wrote")
    return Grid(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def _quoted(value: str) -> str:
    """As elastix wants it: numbers as they are, words between quotes."""
    try:
        float(value)
    except ValueError:
        return f'"{value}"'
    return value
