"""Files for other tools: every tool that is here applies every file as the model does, images and points.

SimpleITK always; ANTs, elastix and greedy where the extra `peers` is installed.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import DIRECTIONS, composed, make_grid, optional
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from test_model import SINGLE_MM, WINDOW, Swirl, Uniform, affines, inner_points, make, trained, voxels
from test_scripts import contents, refused, run

from stnerp import InputError, MissingFileError, STNeRP
from stnerp.baselines.pair import PairRegistration, peer
from stnerp.errors import MissingDependencyError
from stnerp.geometry import Grid, apply_affine
from stnerp.io.transforms import (
    composite_transform,
    displacement_field,
    transformix_parameters,
    velocity_field,
    write_transform,
    write_transformix,
    write_velocity,
)

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "transforms.md").read_text(encoding="utf-8")
T = 2.0
OUTSIDE = -1000.0
FIELDS, TRANSFORMS = (".nii.gz", ".nii", ".mha", ".nrrd"), (".h5", ".tfm")


@pytest.fixture(scope="module")
def reference() -> Grid:
    """Oblique, left-handed and anisotropic: about 60 mm wide."""
    return make_grid(DIRECTIONS["oblique, left-handed"], (20, 16, 11), (3.0, 4.0, 6.0))


@pytest.fixture(scope="module")
def model(reference: Grid) -> STNeRP:
    """Moves points by up to 12 mm, after an affine pre-alignment."""
    return make(Swirl(reference), affines())


@pytest.fixture(scope="module")
def target(model: STNeRP, reference: Grid) -> Grid:
    """Another oblique grid, right-handed, about what the reference shows at time T."""
    axes = Rotation.from_euler("xyz", [-10, 15, 5], degrees=True).as_matrix()
    centre = model.map_points(reference.centre_mm[None], T, inverse=True)[0]
    one = Grid((17, 18, 19), (2.5, 2.0, 3.0), (0.0, 0.0, 0.0), tuple(axes.ravel()))
    x, y, z = (float(c) for c in centre - one.centre_mm)
    return Grid(one.size, one.spacing_mm, (x, y, z), one.direction)


def through(transform: sitk.Transform, points_mm: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(point) for point in points_mm.tolist()])


def centres(grid: Grid) -> np.ndarray:
    """Every 7th voxel centre (N, 3), LPS mm."""
    return grid.points_world().reshape(-1, 3)[::7]


def box_in(grid: Grid) -> Grid:
    """Small and fine, in the middle of a grid and along its axes."""
    one = Grid((18, 17, 16), (1.0, 1.1, 1.2), (0.0, 0.0, 0.0), grid.direction)
    x, y, z = (float(c) for c in grid.centre_mm - one.centre_mm)
    return Grid(one.size, one.spacing_mm, (x, y, z), one.direction)


# -- fields


@pytest.mark.parametrize("inverse", [False, True])
def test_field_is_the_model_at_every_voxel(model: STNeRP, target: Grid, inverse: bool) -> None:
    field = displacement_field(model, T, target, inverse=inverse)
    assert Grid.of(field).is_close(target, 1e-9)
    points = target.points_world().reshape(-1, 3)
    moved = points + sitk.GetArrayFromImage(field).reshape(-1, 3)
    assert np.abs(moved - model.map_points(points, T, inverse)).max() < 1e-9
    there = moved if inverse else points
    back = points if inverse else moved
    assert np.abs(model.map_points(there, T) - back)[target.contains(there)].max() < 1e-3
    # The other direction, or the negative, is another field.
    assert np.abs(moved - model.map_points(points, T, not inverse)).max() > 3


def test_field_is_on_the_reference_unless_asked_otherwise(model: STNeRP, reference: Grid) -> None:
    for inverse in (False, True):
        assert Grid.of(displacement_field(model, T, inverse=inverse)).is_close(reference, 1e-9)
    forward = sitk.GetArrayFromImage(displacement_field(model, T))
    assert np.abs(forward - sitk.GetArrayFromImage(model.displacement(T))).max() < 1e-9


@pytest.mark.parametrize("suffix", FIELDS)
def test_field_file_holds_float_vectors_in_lps(model: STNeRP, target: Grid, tmp_path: Path, suffix: str) -> None:
    path = write_transform(model, T, tmp_path / f"field{suffix}", target.image(np.zeros(target.shape)))
    read = sitk.ReadImage(str(path))
    assert read.GetPixelID() == sitk.sitkVectorFloat32
    assert Grid.of(read).is_close(target)
    exact = sitk.GetArrayFromImage(displacement_field(model, T, target))
    assert np.abs(sitk.GetArrayFromImage(read) - exact).max() < 1e-5
    assert read.GetMetaData("ITK_FileNotes") == "target -> reference, LPS mm, t = 2"
    inverse = write_transform(model, T, tmp_path / f"inverse{suffix}", target, inverse=True)
    assert sitk.ReadImage(str(inverse)).GetMetaData("ITK_FileNotes") == "reference -> target, LPS mm, t = 2"


def test_nifti_is_five_dimensional_with_the_intent_of_vectors(model: STNeRP, target: Grid, tmp_path: Path) -> None:
    image = nibabel.load(write_transform(model, T, tmp_path / "field.nii.gz", target))
    assert image.shape == (*target.size, 1, 3)
    assert image.header.get_intent()[0] == "vector"
    assert image.header["intent_code"] == 1007
    # The frame is NIfTI's RAS, the components stay LPS.
    exact = sitk.GetArrayFromImage(displacement_field(model, T, target))
    assert np.abs(np.asarray(image.dataobj)[:, :, :, 0].transpose(2, 1, 0, 3) - exact).max() < 1e-5
    assert np.abs(image.affine[:3, 3] - np.array([-1, -1, 1]) * target.origin_mm).max() < 1e-3


# -- ITK transforms


def test_composite_is_the_model_between_voxels_too(model: STNeRP, reference: Grid, target: Grid) -> None:
    composite = composite_transform(model, T, target)
    rng = np.random.default_rng(0)
    for grid in (reference, target):
        points = grid.cube_to_world(rng.uniform(-1, 1, (500, 3)))
        assert np.abs(through(composite, points) - model.map_points(points, T)).max() < SINGLE_MM
    # Linear interpolation on another grid is not the model.
    field = PairRegistration(displacement_field(model, T, target))
    assert np.abs(field.map_points(points) - model.map_points(points, T)).max() > 1e-3


def test_composite_undoes_the_alignment_first(model: STNeRP, target: Grid) -> None:
    composite = composite_transform(model, T, target)
    residual, back = composite.GetNthTransform(0), composite.GetNthTransform(1)
    points = target.cube_to_world(np.random.default_rng(0).uniform(-0.5, 0.5, (50, 3)))
    exact = np.linalg.inv(affines()[1])
    assert np.abs(through(back, points) - apply_affine(exact, points)).max() < 1e-9
    assert np.abs(through(residual, through(back, points)) - model.map_points(points, T)).max() < SINGLE_MM
    assert np.abs(through(back, through(residual, points)) - model.map_points(points, T)).max() > 0.1


def test_a_far_grid_is_covered(model: STNeRP, target: Grid) -> None:
    # 150 mm away the border's displacement goes on, in the file as in the model.
    x, y, z = (float(o) + 150 for o in target.origin_mm)
    far = Grid(target.size, target.spacing_mm, (x, y, z), target.direction)
    points = far.cube_to_world(np.random.default_rng(0).uniform(-1, 1, (200, 3)))
    composite = composite_transform(model, T, far)
    assert np.abs(through(composite, points) - model.map_points(points, T)).max() < 2 * SINGLE_MM
    assert np.abs(through(composite_transform(model, T), points) - model.map_points(points, T)).max() > 1


def test_inverse_composite_is_exact_at_voxels(model: STNeRP, reference: Grid) -> None:
    composite, points = composite_transform(model, T, inverse=True), centres(reference)
    assert np.abs(through(composite, points) - model.map_points(points, T, inverse=True)).max() < 1e-9
    inner = inner_points(reference)
    error = np.abs(through(composite, inner) - model.map_points(inner, T, inverse=True)).max()
    assert 1e-3 < error < 0.3  # 3 x 4 x 6 mm voxels on kinks 6 mm apart


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("suffix", TRANSFORMS)
def test_transform_files_lose_nothing(
    model: STNeRP, target: Grid, tmp_path: Path, suffix: str, separate: bool
) -> None:
    path = write_transform(model, T, tmp_path / f"a{suffix}", target, separate=separate)
    read = sitk.ReadTransform(str(path))
    assert isinstance(read, sitk.CompositeTransform if separate else sitk.DisplacementFieldTransform)
    points = centres(target)
    assert np.abs(through(read, points) - model.map_points(points, T)).max() < SINGLE_MM


@pytest.mark.parametrize("suffix", [".H5", ".TFM", ".MHA", ".NII.GZ"])
def test_suffixes_in_upper_case(model: STNeRP, target: Grid, tmp_path: Path, suffix: str) -> None:
    path = write_transform(model, T, tmp_path / f"a{suffix}", target)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix.lower() in FIELDS:
        assert transformix_parameters(path)["Size"] == [str(n) for n in target.size]
    write_transform(model, T, tmp_path / f"b{suffix.lower()}", target)
    lower, points = path.rename(tmp_path / f"c{suffix.lower()}"), centres(target)
    same = through(as_transform(lower), points) - through(as_transform(tmp_path / f"b{suffix.lower()}"), points)
    assert not same.any()


def test_translation_is_written_as_it_is(reference: Grid, tmp_path: Path) -> None:
    step_mm = reference.vectors_to_world(2.5 * np.array(Uniform.MM))
    found, points = make(Uniform(reference)), inner_points(reference)
    for suffix in (*FIELDS, *TRANSFORMS):
        path = write_transform(found, 2.5, tmp_path / f"a{suffix}")
        transform = as_transform(path)
        assert np.abs(through(transform, points) - points - step_mm).max() < SINGLE_MM, suffix


# -- every tool

Draw = Callable[[sitk.Image, Grid, Path], np.ndarray]
Move = Callable[[np.ndarray, Path], np.ndarray]


def as_transform(path: Path) -> sitk.Transform:
    if path.name.endswith(TRANSFORMS):
        return sitk.ReadTransform(str(path))
    return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))


def draw_simpleitk(image: sitk.Image, grid: Grid, path: Path) -> np.ndarray:
    onto = grid.image(np.zeros(grid.shape, np.float32))
    return sitk.GetArrayFromImage(sitk.Resample(image, onto, as_transform(path), sitk.sitkLinear, OUTSIDE))


def move_simpleitk(points_mm: np.ndarray, path: Path) -> np.ndarray:
    return through(as_transform(path), points_mm)


def draw_ants(image: sitk.Image, grid: Grid, path: Path) -> np.ndarray:
    ants = peer("ants", "antspyx")
    onto = ants.from_sitk(grid.image(np.zeros(grid.shape, np.float32)))
    drawn = ants.apply_transforms(onto, ants.from_sitk(image), [str(path)], defaultvalue=OUTSIDE)
    return sitk.GetArrayFromImage(ants.to_sitk(drawn))


def move_ants(points_mm: np.ndarray, path: Path) -> np.ndarray:
    ants, pandas = peer("ants", "antspyx"), importlib.import_module("pandas")
    table = pandas.DataFrame(points_mm, columns=list("xyz"))
    return ants.apply_transforms_to_points(3, table, [str(path)])[list("xyz")].to_numpy()


def transformix(image: sitk.Image, path: Path, points_mm: np.ndarray | None = None) -> Any:
    """The filter after its run, with the parameters that belong to a field."""
    itk = peer("itk", "itk-elastix", needs="ElastixRegistrationMethod")
    with warnings.catch_warnings():  # ITK loads its parts when they are first used, and warns
        warnings.simplefilter("ignore")
        parameters = itk.ParameterObject.New()
        text = write_transformix(path, path.with_name("parameters.txt"), outside=OUTSIDE, overwrite=True)
        parameters.ReadParameterFile(str(text))
        moving = itk.image_from_array(sitk.GetArrayFromImage(image))
        moving.SetOrigin(image.GetOrigin())
        moving.SetSpacing(image.GetSpacing())
        moving.SetDirection(np.reshape(image.GetDirection(), (3, 3)))
        found = itk.TransformixFilter.New(moving)
        found.SetTransformParameterObject(parameters)
        found.SetLogToConsole(False)
        found.SetOutputDirectory(str(path.parent))
        if points_mm is not None:
            lines = ["point", str(len(points_mm)), *(" ".join(map(repr, point)) for point in points_mm.tolist())]
            points_file = path.with_name("points.txt")
            points_file.write_text("\n".join(lines) + "\n")
            found.SetFixedPointSetFileName(str(points_file))
        found.Update()
        return itk.array_from_image(found.GetOutput())


def draw_elastix(image: sitk.Image, grid: Grid, path: Path) -> np.ndarray:
    return transformix(image, path)


def move_elastix(points_mm: np.ndarray, path: Path) -> np.ndarray:
    grid = Grid.of(sitk.ReadImage(str(path)))
    transformix(grid.image(np.zeros(grid.shape, np.float32)), path, points_mm)
    text = path.with_name("outputpoints.txt").read_text()
    return np.array([line.split() for line in re.findall(r"OutputPoint = \[(.*?)\]", text)], float)


def draw_greedy(image: sitk.Image, grid: Grid, path: Path) -> np.ndarray:
    sitk.WriteImage(image, str(path.with_name("moving.nii.gz")))
    sitk.WriteImage(grid.image(np.zeros(grid.shape, np.float32)), str(path.with_name("onto.nii.gz")))
    names = {name: path.with_name(f"{name}.nii.gz") for name in ("moving", "onto", "drawn")}
    command = f"-V 0 -rf {names['onto']} -rm {names['moving']} {names['drawn']} -ri LINEAR -r {path}"
    # In a process of its own: beside other copies of ITK it finds no reader of files.
    code = f"from picsl_greedy import Greedy3D; Greedy3D().execute({command!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return sitk.GetArrayFromImage(sitk.ReadImage(str(names["drawn"])))


#: How to draw, how to move points, which files, and the module and package that it needs.
TOOLS: dict[str, tuple[Draw, Move | None, tuple[str, ...], tuple[str, ...]]] = {
    "simpleitk": (draw_simpleitk, move_simpleitk, FIELDS + TRANSFORMS, ("SimpleITK", "SimpleITK")),
    "ants": (draw_ants, move_ants, FIELDS + TRANSFORMS, ("ants", "antspyx")),
    "elastix": (draw_elastix, move_elastix, FIELDS, ("itk", "itk-elastix", "ElastixRegistrationMethod")),
    "greedy": (draw_greedy, None, (".nii.gz",), ("picsl_greedy", "picsl-greedy")),
}


def skip_without(package: tuple[str, ...]) -> None:
    try:
        peer(*package)
    except MissingDependencyError as missing:
        pytest.skip(str(missing))


@pytest.fixture(
    params=[(name, suffix) for name, tool in TOOLS.items() for suffix in tool[2]], ids="{0[0]} {0[1]}".format
)
def tool(request: pytest.FixtureRequest) -> tuple[Draw, Move | None, str]:
    name, suffix = request.param
    draw, move, _, package = TOOLS[name]
    skip_without(package)
    return draw, move, suffix


@pytest.mark.parametrize("inverse", [False, True])
def test_every_tool_draws_what_the_model_draws(
    tool: tuple[Draw, Move | None, str],
    model: STNeRP,
    reference: Grid,
    target: Grid,
    tmp_path: Path,
    inverse: bool,
) -> None:
    draw, _, suffix = tool
    source, grid = (target, reference) if inverse else (reference, target)
    values = WINDOW.denormalise(voxels(source))
    path = write_transform(model, T, tmp_path / f"a{suffix}", grid, inverse=inverse)
    drawn = draw(source.image(values), grid, path)
    index = source.world_to_index(model.map_points(grid.points_world().reshape(-1, 3), T, inverse))
    expected = map_coordinates(values, index.T[::-1], order=1).reshape(grid.shape)
    # Within the outermost voxel centres; tools differ in the half voxel outside them.
    seen = np.all((index > 1e-3) & (index < np.array(source.size) - 1.001), axis=1).reshape(grid.shape)
    assert seen.mean() > 0.15
    # Noise of ±1000 HU, some 500 HU per mm: 0.05 HU are 0.0001 mm.
    assert np.abs(drawn - expected)[seen].max() < 0.05
    if not inverse:
        assert np.abs(sitk.GetArrayFromImage(model.image(T, grid)) - drawn)[seen].max() < 0.05
    other = source.world_to_index(model.map_points(grid.points_world().reshape(-1, 3), T, not inverse))
    assert np.abs(drawn - map_coordinates(values, other.T[::-1], order=1).reshape(grid.shape))[seen].mean() > 100


@pytest.mark.parametrize("inverse", [False, True])
def test_every_tool_moves_points_as_the_model_does(
    tool: tuple[Draw, Move | None, str],
    model: STNeRP,
    reference: Grid,
    target: Grid,
    tmp_path: Path,
    inverse: bool,
) -> None:
    _, move, suffix = tool
    if move is None:
        pytest.skip("moves no points from a text file")
    box = box_in(reference if inverse else target)
    path = write_transform(model, T, tmp_path / f"a{suffix}", box, inverse=inverse)
    at_voxels, between = centres(box), inner_points(box, within=0.9)
    at_voxels = at_voxels[np.all(np.abs(box.world_to_cube(at_voxels)) < 0.9, axis=1)]

    def error(points: np.ndarray, backwards: bool = False) -> float:
        return float(np.abs(move(points, path) - model.map_points(points, T, inverse != backwards)).max())

    # Some compute in float32, some write six digits.
    assert error(at_voxels) < 1e-4
    assert error(at_voxels, backwards=True) > 3
    # Voxels of 1 mm on a lattice of 6 mm; the composite is the lattice itself.
    assert error(between) < (1e-4 if suffix in TRANSFORMS and not inverse else 0.05)


# -- elastix


def test_transformix_parameters_say_where_the_field_lies(
    model: STNeRP, target: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_transform(model, T, "field.mha", target)
    found = transformix_parameters("field.mha", outside=-1000)
    assert found["Transform"] == ["DeformationFieldTransform"]
    assert found["DeformationFieldFileName"] == [(tmp_path / "field.mha").resolve().as_posix()]
    assert found["DeformationFieldInterpolationOrder"] == ["1"]  # 0, elastix' default, is the nearest vector
    assert [int(n) for n in found["Size"]] == list(target.size)
    # Column after column, unlike ITK.
    columns = np.reshape(target.direction, (3, 3)).T.ravel()
    assert np.abs(np.array(found["Direction"], float) - columns).max() < 1e-12
    assert np.abs(columns - np.array(target.direction)).max() > 0.1
    path = write_transformix("field.mha", "TransformParameters.0.txt", outside=-1000)
    lines = path.read_text().splitlines()
    assert '(Transform "DeformationFieldTransform")' in lines
    assert "(DefaultPixelValue -1000.0)" in lines
    assert f'(DeformationFieldFileName "{found["DeformationFieldFileName"][0]}")' in lines
    assert "(Size 17 18 19)" in lines


# -- velocity


def integrated(velocity: sitk.Image, squarings: int) -> sitk.Transform:
    """exp(v) by SimpleITK, which takes the field for zero outside."""

    def image(array: np.ndarray) -> sitk.Image:
        return Grid.of(velocity).image(array)

    u = sitk.GetArrayFromImage(velocity) / 2**squarings
    for _ in range(squarings):
        step = sitk.DisplacementFieldTransform(image(u))
        u = u + sitk.GetArrayFromImage(sitk.Resample(image(u), velocity, step, sitk.sitkLinear))
    return sitk.DisplacementFieldTransform(image(u))


def test_velocity_can_be_integrated_elsewhere(model: STNeRP, reference: Grid) -> None:
    velocity = velocity_field(model, T)
    alignment = composite_transform(model, T).GetNthTransform(1).GetInverse()

    def error(flow: sitk.Image, within: float) -> float:
        points = inner_points(reference, 300, within)
        exact = model.map_points(through(alignment, points), T)
        return float(np.abs(through(integrated(flow, model.settings.squarings), points) - exact).max())

    assert error(velocity, within=0.6) < SINGLE_MM
    assert error(Grid.of(velocity).image(-sitk.GetArrayFromImage(velocity)), within=0.6) > 1
    # Across the border the margin goes on with its velocity, the model with its displacement: nearly the same.
    assert error(velocity, within=1.0) < 1e-3


def test_a_uniform_flow_stays_uniform_elsewhere(reference: Grid) -> None:
    found, points = make(Uniform(reference)), inner_points(reference, 300, within=1.0)
    velocity, squarings = velocity_field(found, 5.0), found.settings.squarings
    moved = points + reference.vectors_to_world(5 * np.array(Uniform.MM))
    assert np.abs(through(integrated(velocity, squarings), points) - moved).max() < SINGLE_MM
    # Without the margin the flow comes to rest where it leaves the lattice.
    lattice = found.lattice.image(np.zeros(found.lattice.shape))
    bare = sitk.Resample(velocity, lattice, sitk.Transform(), sitk.sitkLinear)
    assert np.abs(through(integrated(bare, squarings), points) - moved).max() > 3


def test_velocity_file_says_how_often_to_square(model: STNeRP, tmp_path: Path) -> None:
    for suffix in FIELDS:
        read = sitk.ReadImage(str(write_velocity(model, T, tmp_path / f"v{suffix}")))
        assert read.GetMetaData("ITK_FileNotes") == "stationary velocity, LPS mm, t = 2, 4 squarings"
        exact = sitk.GetArrayFromImage(velocity_field(model, T))
        assert np.abs(sitk.GetArrayFromImage(read) - exact).max() < 1e-5
    assert model.settings.squarings == 4


def test_velocity_is_zero_at_the_reference_time(model: STNeRP, reference: Grid) -> None:
    assert not sitk.GetArrayFromImage(velocity_field(model, 0.0)).any()


# -- what is refused


def test_refused(model: STNeRP, reference: Grid, tmp_path: Path) -> None:
    write_transform(model, T, tmp_path / "a.h5")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"a.h5: already exists"):
        write_transform(model, 3.0, tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"a.mat: the file name must end in one of .nii.gz, .*\.tfm"):
        write_transform(model, T, tmp_path / "a.mat")
    with pytest.raises(InputError, match=r"a.h5: the file name must end in one of .nii.gz"):
        write_velocity(model, T, tmp_path / "a.h5", overwrite=True)
    with pytest.raises(MissingFileError, match="the folder does not exist"):
        write_transform(model, T, tmp_path / "nowhere" / "a.mha")
    with pytest.raises(MissingFileError, match="no such file"):
        write_transformix(tmp_path / "a.mha", tmp_path / "a.txt")
    for suffix in (".mha", ".h5"):
        with pytest.raises(InputError, match="t: "):
            write_transform(model, float("nan"), tmp_path / f"b{suffix}")
    with pytest.raises(InputError, match="t: "):
        velocity_field(model, float("inf"))
    assert contents(tmp_path) == before
    sitk.WriteImage(reference.image(np.zeros(reference.shape)), str(tmp_path / "scalar.mha"))
    (tmp_path / "text.mha").write_text("no image")
    for name, says in {"scalar.mha": "holds no 3D vectors", "text.mha": "can't be read"}.items():
        with pytest.raises(InputError, match=f"{name}: {says}"):
            transformix_parameters(tmp_path / name)
    write_transform(model, 3.0, tmp_path / "a.h5", overwrite=True)
    assert contents(tmp_path)["a.h5"] != before["a.h5"]


# -- the script and the documentation


@pytest.fixture(scope="module")
def patient(reference: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, the reference and a scan of day 5, as docs/transforms.md has it."""
    folder = tmp_path_factory.mktemp("patient")
    (folder / "runs" / "p1").mkdir(parents=True)
    x, y, z = (float(o) for o in reference.origin_mm + np.array([10.0, -20.0, 35.0]) - reference.centre_mm)
    found = make(trained(Grid(reference.size, reference.spacing_mm, (x, y, z), reference.direction)), affines())
    found.save(folder / "runs" / "p1" / "model.pt")
    sitk.WriteImage(found.image(0.0), str(folder / "reference.nii.gz"))
    sitk.WriteImage(found.image(5.0, found.grid.with_spacing(4.0)), str(folder / "day5.nii.gz"))
    return folder


@pytest.fixture
def here(patient: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    optional("hydra", "scripts")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(patient)
    return patient


COMMANDS = re.findall(r"^python scripts/export_transforms\.py (.*)$", DOCS, re.MULTILINE)
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)


def words(command: str) -> list[str]:
    return [word.replace("'", "") for word in command.split()]


def test_export_says_what_it_wrote_and_for_what(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("export_transforms", "out=runs/p1", "times=[1.5]", "suffix=.mha", "grid=day5.nii.gz")
    printed = capsys.readouterr().out
    folder = Path("runs/p1/transforms")
    stems = ("target_to_reference.mha", "target_to_reference.txt", "target_to_reference.h5",
             "reference_to_target.mha", "reference_to_target.txt", "velocity.mha")  # fmt: skip
    assert {path.name for path in folder.glob("t1.5_*")} == {f"t1.5_{stem}" for stem in stems}
    for stem in stems:
        assert f"wrote {folder / f't1.5_{stem}'}" in printed
    for use in ("antsApplyTransforms -d 3 -i reference.nii.gz -r at_t1.5.nii.gz", "transformix -in reference.nii",
                "antsApplyTransforms -d 3 -i at_t1.5.nii.gz -r reference.nii.gz", "transformix -in at_t1.5.nii.gz",
                "draws the reference at t = 1.5; takes points of t", "takes reference points to t",
                "sitk.Resample(reference, target", "3D Slicer", "4 squarings"):  # fmt: skip
        assert use in printed, use
    assert Grid.of(sitk.ReadImage(str(folder / "t1.5_target_to_reference.mha"))).is_close(
        Grid.of(sitk.ReadImage("day5.nii.gz"))
    )
    model = STNeRP.load("runs/p1/model.pt")
    assert Grid.of(sitk.ReadImage(str(folder / "t1.5_reference_to_target.mha"))).is_close(model.grid)
    points = centres(model.grid)
    forward = sitk.ReadTransform(str(folder / "t1.5_target_to_reference.h5"))
    assert np.abs(through(forward, points) - model.map_points(points, 1.5)).max() < SINGLE_MM
    assert (here / "runs" / "p1" / "export_transforms.log").is_file()


def test_export_measures_what_lies_between_voxels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("export_transforms", "out=runs/p1", "times=[4]")
    mean, one_percent, most = map(
        float,
        re.findall(r"between them (\S+) mm .* average, (\S+) in 1 %, (\S+) at most", capsys.readouterr().out)[0],
    )
    model = STNeRP.load("runs/p1/model.pt")
    field = PairRegistration(displacement_field(model, 4.0))
    points = model.grid.cube_to_world(np.random.default_rng(1).uniform(-1, 1, (20000, 3)))
    apart = np.linalg.norm(field.map_points(points) - model.map_points(points, 4.0), axis=1)
    assert mean == pytest.approx(apart.mean(), rel=0.1)
    assert one_percent == pytest.approx(np.percentile(apart, 99), rel=0.2)
    assert most > one_percent > mean > 0


def test_export_replaces_nothing_unasked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("export_transforms", "out=runs/p1", "times=[3]")
    run(*arguments)
    before = contents(here)
    assert "already exists" in refused(capsys, *arguments)
    assert "suffix: '.png' must be one of" in refused(capsys, *arguments, "suffix=.png", "overwrite=true")
    assert "nowhere.mha: no such file" in refused(capsys, *arguments, "grid=nowhere.mha", "overwrite=true")
    assert "run train_def.py" in refused(capsys, "export_transforms", "out=runs/p2", "times=[3]")
    assert contents(here) == before
    run(*arguments, "overwrite=true", "grid=day5.nii.gz")
    assert contents(here) != before


def test_scans_far_apart_are_told(here: Path, reference: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    far = affines()
    far[2, :3, 3] = [80.0, 0.0, 0.0]
    (here / "runs" / "far").mkdir()
    make(trained(reference), far).save("runs/far/model.pt")
    run("export_transforms", "out=runs/far", "times=[5]")
    assert "give an image of that time, grid=" in capsys.readouterr().out


def test_documented_commands_compose() -> None:
    assert COMMANDS
    for command in COMMANDS:
        assert composed("export_transforms", *words(command)).out


NEEDED = {"ants": TOOLS["ants"][3], "itk": TOOLS["elastix"][3]}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_documented_python_runs_as_written(here: Path, number: int) -> None:
    for module, package in NEEDED.items():
        if re.search(rf"^import {module}$", BLOCKS[number], re.MULTILINE):
            skip_without(package)
    if not Path("runs/p1/transforms/t5_velocity.nii.gz").exists():
        run("export_transforms", *words(COMMANDS[0]))
    own: dict[str, Any] = {}
    with warnings.catch_warnings():
        if "itk" in sys.modules:  # loads its parts when they are first used, and warns
            warnings.simplefilter("ignore")
        exec(compile(BLOCKS[number], f"docs/transforms.md, block {number}", "exec"), own)
        drawn = array_of(own["drawn"], own) if "drawn" in own else None
    # And what comes out is what the model says.
    model, checked = STNeRP.load("runs/p1/model.pt"), 0
    if drawn is not None:
        grid = model.grid if "itk" in own else Grid.of(sitk.ReadImage("day5.nii.gz"))
        expected = sitk.GetArrayFromImage(model.image(5.0, grid))
        cube = model.grid.world_to_cube(model.map_points(grid.points_world().reshape(-1, 3), 5.0))
        seen = np.all(np.abs(cube) < 0.999, axis=1).reshape(grid.shape)
        assert np.abs(drawn - expected)[seen].max() < 0.05
        assert seen.mean() > 0.3
        checked += 1
    for before, after, inverse in (
        ("point_mm", "in_reference_mm", False),
        ("in_reference_mm", "back_mm", True),
        ("points_of_day5", "points_of_reference", False),
    ):
        if after in own:
            points, moved = (np.reshape(own[name], (-1, 3)) for name in (before, after))
            # The inverse is read between voxels of 3 x 4 x 6 mm.
            assert np.abs(moved - model.map_points(points, 5.0, inverse)).max() < (0.1 if inverse else 1e-4)
            assert np.abs(moved - points).max() > 3
            checked += 1
    if "velocity" in own:
        points = inner_points(model.grid)
        assert np.abs(through(own["transform"], points) - model.map_points(points, 5.0)).max() < 1e-4
        checked += 1
    assert checked or Path("TransformParameters.0.txt").is_file()


def array_of(image: Any, own: dict[str, Any]) -> np.ndarray:
    """Voxels (z, y, x) of an image of SimpleITK, ANTs or ITK."""
    if "itk" in own:
        return own["itk"].array_from_image(image)
    return sitk.GetArrayFromImage(own["ants"].to_sitk(image) if "ants" in own else image)
