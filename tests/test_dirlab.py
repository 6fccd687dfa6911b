"""DIR-Lab's files: every layout, which byte is which voxel, which number is which point, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from stnerp.errors import InputError, MissingFileError
from stnerp.geometry import Grid
from stnerp.io.dirlab import GRIDS, WEBSITE, DirLabCase, dirlab_case, dirlab_grid, write_case

# Every size and every spacing is another, so that no two axes can be taken for each other.
SIZE, SPACING = (7, 6, 5), (0.9, 1.3, 2.5)
SMALL = dirlab_grid(SIZE, SPACING)
X, Y, Z = SIZE


def rows(count: int) -> np.ndarray:
    """Landmarks as they stand in a file: x y z from 1, first and last voxel among them."""
    some = np.random.default_rng(0).integers(1, np.array(SIZE) + 1, (count, 3))
    some[0], some[1] = (1, 1, 1), SIZE
    return some


def text(voxels: np.ndarray) -> str:
    return "".join("\t".join(map(str, row)) + "\t\r\n" for row in voxels.tolist())


def by_hand(folder: Path, number: int = 1, image: str = "case1_T00_s.img") -> Path:
    """A case written without the library: voxel x y z (from 1) holds 1000 + x + 10 y + 100 z."""
    case = folder / f"Case{number}Pack"
    for name in ("Images", "ExtremePhases", "Sampled4D"):
        (case / name).mkdir(parents=True)
    values = [
        1000 + x + 10 * y + 100 * z for z in range(1, Z + 1) for y in range(1, Y + 1) for x in range(1, X + 1)
    ]
    raw = b"".join(value.to_bytes(2, "little", signed=True) for value in values)
    (case / "Images" / image).write_bytes(raw)
    for phase in ("T00", "T50"):
        (case / "ExtremePhases" / f"Case{number}_300_{phase}_xyz.txt").write_text(text(rows(300)))
    (case / "Sampled4D" / f"case{number}_4D-75_T10.txt").write_text(text(rows(75)))
    return case


# -- which byte is which voxel, which number which point


def test_sizes_and_spacings_of_the_ten_cases() -> None:
    # Size x y z, pixel, distance of slices, as the owners' website has them.
    table = """
        256 256  94 0.97 0.97 2.5
        256 256 112 1.16 1.16 2.5
        256 256 104 1.15 1.15 2.5
        256 256  99 1.13 1.13 2.5
        256 256 106 1.10 1.10 2.5
        512 512 128 0.97 0.97 2.5
        512 512 136 0.97 0.97 2.5
        512 512 128 0.97 0.97 2.5
        512 512 128 0.97 0.97 2.5
        512 512 120 0.97 0.97 2.5
    """
    lines = [line.split() for line in table.strip().splitlines()]
    assert list(GRIDS) == list(range(1, 11))
    for grid, line in zip(GRIDS.values(), lines, strict=True):
        assert (*grid.size, *grid.spacing_mm) == tuple(map(float, line))


def test_every_voxel_is_where_the_file_has_it(tmp_path: Path) -> None:
    by_hand(tmp_path)
    image = dirlab_case(tmp_path, 1, SMALL).image(0)
    assert (image.GetSize(), image.GetSpacing(), image.GetPixelID()) == (SIZE, SPACING, sitk.sitkInt16)
    for x, y, z in [(1, 1, 1), (7, 1, 1), (1, 6, 1), (1, 1, 5), (3, 2, 4)]:
        assert image.GetPixel(x - 1, y - 1, z - 1) == 1000 + x + 10 * y + 100 * z - 1024


def test_landmarks_are_the_points_of_their_voxels(tmp_path: Path) -> None:
    """Counted from 1 and in the order x y z: the voxel at the point holds what its indices say."""
    by_hand(tmp_path)
    case = dirlab_case(tmp_path, 1, SMALL)
    image = case.image(0)
    for points_mm, voxels in ((case.landmarks(0), rows(300)), (case.sampled_landmarks(10), rows(75))):
        assert points_mm.shape == voxels.shape
        for point, (x, y, z) in zip(points_mm.tolist(), voxels.tolist(), strict=True):
            index = image.TransformPhysicalPointToContinuousIndex(point)
            assert index == pytest.approx((x - 1, y - 1, z - 1), abs=1e-9)
            assert image.GetPixel(*map(round, index)) == 1000 + x + 10 * y + 100 * z - 1024


def test_points_in_millimetres(tmp_path: Path) -> None:
    """x to the left and y to posterior with the index, z to the feet: the first slice is the highest."""
    by_hand(tmp_path)
    first, last = dirlab_case(tmp_path, 1, SMALL).landmarks(50)[:2]
    assert first == pytest.approx([0, 0, 0])
    assert last == pytest.approx([6 * 0.9, 5 * 1.3, -4 * 2.5])


def test_intensities_are_hounsfield_units(tmp_path: Path) -> None:
    case = by_hand(tmp_path)
    raw = np.zeros(Z * Y * X, "<i2")
    raw[:6] = -2000, -1, 0, 24, 1024, 32767
    (case / "Images" / "case1_T00_s.img").write_bytes(raw.tobytes())
    hu = sitk.GetArrayFromImage(dirlab_case(tmp_path, 1, SMALL).image(0)).ravel()
    assert hu[:6].tolist() == [-1024, -1024, -1024, -1000, 0, 31743]


# -- layouts


# Case, folder, image, 300 and 75 landmarks of T00.
LAYOUTS = """
1 Case1Pack             case1_T00_s.img   ExtremePhases/Case1_300_T00_xyz.txt       Sampled4D/case1_4D-75_T00.txt
2 Case2Pack             case2_T00-ssm.img ExtremePhases/Case2_300_T00_xyz.txt       Sampled4D/case2_4D-75_T00.txt
2 Case2Pack             case2_T00-s.img   ExtremePhases/Case2_300_T00.txt       sampled4D/case2_4D-75_T00_xyz.txt
3 case3pack             case3_T00_s.img   extremePhases/case3_300_T00_xyz.txt       Sampled4d/Case3_4D-75_T00.txt
6 Case6Pack             case6_T00.img     extremePhases/case6_dirLab300_T00_xyz.txt Sampled4D/case6_4D-75_T00.txt
8 Case8Deploy           case8_T00.img     extremePhases/case8_dirLab300_T00.txt     Sampled4D/case8_4D-75_T00.txt
1 Case1PackDeploy       case1_T00_s.img   ExtremePhases/Case1_300_T00_xyz.txt       SAMPLED4D/CASE1_4D-75_T00.TXT
1 Case1Pack/Case1Pack   CASE1_T00_S.IMG   EXTREMEPHASES/CASE1_300_T00_XYZ.TXT       Sampled4D/case1_4D-75_T00.txt
8 Case8Pack/Case8Deploy case8_T00.img     extremePhases/case8_dirLab300_T00_xyz.txt Sampled4D/case8_4D75_T00.txt
"""


@pytest.mark.parametrize("layout", LAYOUTS.strip().splitlines())
@pytest.mark.parametrize("images", ["Images", "images"])
def test_every_layout_is_read(tmp_path: Path, layout: str, images: str) -> None:
    number, folder, image, extremes, sampled = layout.split()
    made = by_hand(tmp_path / "made")
    case = tmp_path / "set" / folder
    for old, new in {
        "Images/case1_T00_s.img": f"{images}/{image}",
        "ExtremePhases/Case1_300_T00_xyz.txt": extremes,
        "Sampled4D/case1_4D-75_T10.txt": sampled,
    }.items():
        (case / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / old, case / new)
    # What others leave beside the files is not taken for them.
    (case / images / f"._{image}").write_bytes(b"")
    (case / images / f"{Path(image).stem}.hdr").write_bytes(b"")
    (tmp_path / "set" / f"Case{number}0Pack").mkdir()
    found = dirlab_case(tmp_path / "set", int(number), SMALL)
    assert found.phases == [0]
    assert found.image(0).GetPixel(0, 0, 0) == 1111 - 1024
    assert len(found.landmarks(0)) == 300
    assert len(found.sampled_landmarks(0)) == 75


# -- writing


def random_images(grid: Grid, phases: tuple[int, ...]) -> dict[int, sitk.Image]:
    rng = np.random.default_rng(1)
    return {phase: grid.image(rng.integers(-1024, 3000, grid.shape).astype(np.int16)) for phase in phases}


@pytest.mark.parametrize("number", range(1, 11))
def test_what_is_written_is_read(tmp_path: Path, number: int) -> None:
    placed = Grid(SIZE, SPACING, (-20.0, 13.0, 105.0), SMALL.direction)
    images = random_images(placed, (0, 30, 50, 90))
    voxels = {phase: rows(300)[::step] for phase, step in {0: 1, 50: -1}.items()}
    points = {}
    for phase, own in voxels.items():
        anywhere_within = np.random.default_rng(phase).uniform(-0.4, 0.4, own.shape)
        points[phase] = placed.index_to_world(own - 1 + anywhere_within)
    sampled = {10 * k: placed.index_to_world(rows(75) - 1.0) for k in range(6)}
    written = write_case(tmp_path, number, images, points, sampled)
    case = dirlab_case(tmp_path, number, SMALL)
    assert case == written
    assert case.phases == [0, 30, 50, 90]
    for phase, image in images.items():
        assert np.array_equal(sitk.GetArrayFromImage(case.image(phase)), sitk.GetArrayFromImage(image))
        assert Grid.of(case.image(phase)) == SMALL
    for phase, expected in voxels.items():
        assert case.landmarks(phase) == pytest.approx(SMALL.index_to_world(expected - 1.0))
    assert case.sampled_landmarks(50) == pytest.approx(SMALL.index_to_world(rows(75) - 1.0))


def test_the_owners_names_are_written(tmp_path: Path) -> None:
    images = random_images(SMALL, (0,))
    points = {0: SMALL.index_to_world(rows(300) - 1.0)}
    for number in (1, 2, 6, 8):
        write_case(tmp_path, number, images, points, {0: points[0][:75]})
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {
        "Case1Pack/Images/case1_T00_s.img",
        "Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt",
        "Case1Pack/Sampled4D/case1_4D-75_T00.txt",
        "Case2Pack/Images/case2_T00-ssm.img",
        "Case2Pack/ExtremePhases/Case2_300_T00_xyz.txt",
        "Case2Pack/Sampled4D/case2_4D-75_T00.txt",
        "Case6Pack/Images/case6_T00.img",
        "Case6Pack/extremePhases/case6_dirLab300_T00_xyz.txt",
        "Case6Pack/Sampled4D/case6_4D-75_T00.txt",
        "Case8Deploy/Images/case8_T00.img",
        "Case8Deploy/extremePhases/case8_dirLab300_T00_xyz.txt",
        "Case8Deploy/Sampled4D/case8_4D-75_T00.txt",
    }
    assert (
        (tmp_path / "Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt").read_text().startswith("1\t1\t1\n7\t6\t5\n")
    )


def test_what_does_not_fit_the_layout_is_not_written(tmp_path: Path) -> None:
    images = random_images(SMALL, (0,))
    upright = Grid(SIZE, SPACING)
    with pytest.raises(InputError, match="head to feet"):
        write_case(tmp_path, 1, random_images(upright, (0,)))
    with pytest.raises(InputError, match="one grid"):
        write_case(tmp_path, 1, images | random_images(dirlab_grid((7, 6, 4), SPACING), (50,)))
    with pytest.raises(InputError, match="one grid"):
        write_case(tmp_path, 1, {})
    with pytest.raises(InputError, match="phase: 5"):
        write_case(tmp_path, 1, {5: images[0]})
    with pytest.raises(InputError, match="outside the images"):
        write_case(tmp_path, 1, images, {0: np.array([[0.0, 0.0, 5.0]])})
    with pytest.raises(MissingFileError, match="no such folder"):
        write_case(tmp_path / "typo", 1, images)
    assert list(tmp_path.iterdir()) == []
    write_case(tmp_path, 1, images)
    with pytest.raises(InputError, match="already exists"):
        write_case(tmp_path, 1, images)
    write_case(tmp_path, 1, images, overwrite=True)


# -- mistakes


@pytest.fixture
def case(tmp_path: Path) -> DirLabCase:
    by_hand(tmp_path)
    return dirlab_case(tmp_path, 1, SMALL)


@pytest.mark.parametrize("change", [-2, 2, -1])
def test_a_file_of_another_size(case: DirLabCase, change: int) -> None:
    path = case.folder / "Images" / "case1_T00_s.img"
    size = path.stat().st_size
    path.write_bytes((path.read_bytes() + b"\0\0")[: size + change])
    with pytest.raises(InputError, match=rf"case1_T00_s\.img: {size + change} bytes.* 7 x 6 x 5 .*, {size};"):
        case.image(0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("0 1 1", r"line 2: voxel 0 1 1 lies outside 7 x 6 x 5; indices are 1-based"),
        ("1 7 1", "line 2: voxel 1 7 1 lies outside"),
        ("1 1 -2", "line 2: voxel 1 1 -2 lies outside"),
        ("5 6 7", "line 2: voxel 5 6 7 lies outside"),  # z y x
        ("1.5 1 1", "line 2: '1.5 1 1' is not three whole"),
        ("1 1", "line 2: '1 1' is not"),
        ("1 1 1 1", "line 2: '1 1 1 1' is not"),
        ("x y z", "line 2: 'x y z' is not"),
        ("nan 1 1", "line 2: 'nan 1 1' is not"),
        ("", "299 landmarks, expected 300"),
    ],
)
def test_a_landmark_that_is_no_voxel(case: DirLabCase, line: str, says: str) -> None:
    path = case.folder / "ExtremePhases" / "Case1_300_T00_xyz.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(InputError, match=says) as refused:
        case.landmarks(0)
    assert str(path) in str(refused.value)


def test_whole_numbers_may_be_written_as_floats(case: DirLabCase) -> None:
    path = case.folder / "ExtremePhases" / "Case1_300_T00_xyz.txt"
    np.savetxt(path, rows(300))
    assert case.landmarks(0) == pytest.approx(SMALL.index_to_world(rows(300) - 1.0))


def test_what_is_missing_is_named_in_one_line(tmp_path: Path, case: DirLabCase) -> None:
    for ask, says in (
        (lambda: case.image(50), "image of T50"),
        (lambda: case.sampled_landmarks(20), "75 landmarks of T20"),
        (lambda: dirlab_case(tmp_path, 8), "no folder Case8Deploy"),
        (lambda: dirlab_case(tmp_path / "typo", 1), "no folder Case1Pack"),
    ):
        with pytest.raises(MissingFileError, match=says) as refused:
            ask()
        assert WEBSITE in str(refused.value)
        assert "\n" not in str(refused.value)
    for path in (case.folder / "ExtremePhases").iterdir():
        path.unlink()
    with pytest.raises(MissingFileError, match="300 landmarks of T50"):
        case.landmarks(50)


def test_what_there_is_not(case: DirLabCase) -> None:
    with pytest.raises(InputError, match="of phases 0, 50 "):
        case.landmarks(10)
    with pytest.raises(InputError, match="of phases 0, 10, 20, 30, 40, 50 "):
        case.sampled_landmarks(60)
    with pytest.raises(InputError, match="phase: 5"):
        case.image(5)
    with pytest.raises(InputError, match="from 1 to 10"):
        dirlab_case(case.folder.parent, 11)


def test_two_files_of_one_phase(case: DirLabCase) -> None:
    shutil.copy(case.folder / "Images" / "case1_T00_s.img", case.folder / "Images" / "case1_T00.img")
    with pytest.raises(InputError, match="keep one"):
        case.image(0)
