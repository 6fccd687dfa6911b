"""Films: nothing flipped, millimetres to scale, and files that other programs play."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import DIRECTIONS, make_grid, optional
from PIL import Image

from stnerp.errors import InputError, MissingFileError
from stnerp.film import COLOURS, Plane, frame, plane_grid, write_gif, write_mp4
from stnerp.geometry import Grid
from stnerp.window import Window

WINDOW = Window(0.0, 100.0)
# Where in a picture a point to the patient's left, back or head of the plane's middle is: columns, rows.
TOWARDS = {
    "axial": {"left": (1, 0), "back": (0, 1), "head": (0, 0)},
    "coronal": {"left": (1, 0), "back": (0, 0), "head": (0, -1)},
    "sagittal": {"left": (0, 0), "back": (1, 0), "head": (0, -1)},
}


@pytest.mark.parametrize("plane", get_args(Plane))
@pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
def test_what_is_left_back_and_up_is_where_radiologists_see_it(direction: np.ndarray, plane: Plane) -> None:
    grid = make_grid(direction, (40, 50, 30), (2.0, 1.5, 3.0))
    middle = grid.centre_mm
    pixels = plane_grid(grid, plane, middle, 200)
    away_mm = 12.0
    for name, axis in {"left": [1, 0, 0], "back": [0, 1, 0], "head": [0, 0, 1]}.items():
        column, row, depth = pixels.world_to_index(middle + away_mm * np.array(axis)) - pixels.world_to_index(
            middle
        )
        # Millimetres to scale, the same along both sides.
        np.testing.assert_allclose(
            (column, row), np.array(TOWARDS[plane][name]) * away_mm / pixels.spacing_mm[0], atol=1e-9
        )
        if TOWARDS[plane][name] == (0, 0):
            assert abs(depth) * pixels.spacing_mm[2] == pytest.approx(away_mm)
    # All of the grid is in the picture, and no more than its box.
    corners = grid.index_to_world(
        np.array([[x, y, z] for x in (-0.5, 39.5) for y in (-0.5, 49.5) for z in (-0.5, 29.5)])
    )
    seen = pixels.world_to_index(corners)[:, :2]
    assert (seen >= -0.5 - 1).all()
    assert (seen <= np.array(pixels.size[:2]) - 0.5 + 1).all()
    assert np.ptp(seen, axis=0).max() == pytest.approx(200)
    assert max(pixels.size) == 200
    assert pixels.size[0] % 2 == pixels.size[1] % 2 == 0
    # It goes through the point.
    assert pixels.world_to_index(middle)[2] == pytest.approx(0)


def test_a_picture_of_a_scan_is_upright(any_grid: Grid) -> None:
    # A bright ball to the patient's left, back and head of a scan of any orientation, seen in each plane.
    grid = Grid((40, 40, 40), (1, 1, 1), direction=any_grid.direction)
    ball = grid.centre_mm + np.array([9.0, 7.0, 5.0])
    image = grid.image(100 * (np.linalg.norm(grid.points_world() - ball, axis=-1) < 3).astype(np.float32))
    for plane in get_args(Plane):
        pixels = plane_grid(grid, plane, ball, 100)
        onto = pixels.image(np.zeros(pixels.shape, np.uint8))
        values = sitk.GetArrayFromImage(sitk.Resample(image, onto, sitk.Transform(), sitk.sitkLinear))[0]
        picture = frame(values, WINDOW)
        row, column = np.argwhere(picture[..., 0] > 128).mean(0) - (np.array(picture.shape[:2]) - 1) / 2
        expected = {"axial": (9, 7), "coronal": (9, -5), "sagittal": (7, -5)}[plane]
        np.testing.assert_allclose((column, row), np.array(expected) / pixels.spacing_mm[0], atol=1.0)


def test_a_frame_is_grey_with_coloured_borders() -> None:
    values = np.linspace(-50, 150, 40 * 30).reshape(40, 30)
    plain = frame(values, WINDOW)
    assert plain.shape == (40, 30, 3)
    assert plain.dtype == np.uint8
    assert (plain == plain[..., :1]).all()
    assert plain[0, 0, 0] == 0  # below the window
    assert plain[-1, -1, 0] == 255
    assert plain[20, 0, 0] == round(2.55 * values[20, 0])
    mask = np.zeros((40, 30), bool)
    mask[10:20, 5:25] = True
    drawn = frame(values, WINDOW, [mask], [(1, 2, 3)])
    coloured = (drawn == (1, 2, 3)).all(-1)
    inner = np.zeros_like(mask)
    inner[11:19, 6:24] = True
    np.testing.assert_array_equal(coloured, mask & ~inner)
    np.testing.assert_array_equal(drawn[~coloured], plain[~coloured])
    # What goes on beyond the picture has no border there.
    assert not (frame(values, WINDOW, [np.ones((40, 30))]) != plain).any()


def test_a_frame_says_when_and_which_side() -> None:
    dark = np.zeros((200, 300))
    said = frame(dark, WINDOW, text="t = 2.5 s", plane="coronal").max(-1) > 200
    assert said[:30, :100].any()  # the time
    assert said[85:115, :20].any()  # R, on the left
    assert said[:30, 140:160].any()  # H, at the top
    assert not said[:, 200:].any()
    assert not frame(dark, WINDOW).any()


def moving(count: int = 5, shape: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    frames = []
    for k in range(count):
        values = np.zeros(shape)
        values[10 : 20 + 4 * k, 20:40] = 60
        frames.append(frame(values, WINDOW, [values > 0]))
    return frames


def test_a_gif_holds_the_frames(tmp_path: Path) -> None:
    frames = moving()
    write_gif(iter(frames), tmp_path / "a.gif", 8)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 5
        assert film.size == (64, 48)
        assert (film.info["duration"], film.info["loop"]) == (120, 0)  # ms, for ever
        for k, wanted in enumerate(frames):
            film.seek(k)
            shown = np.asarray(film.convert("RGB")).astype(int)
            # 240 greys are within one of 256, and the contours' colours are kept.
            assert np.abs(shown - wanted).max() <= 1
            assert (shown[10, 20] == COLOURS[0]).all()


# imageio-ffmpeg's reader, which only this test uses, leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_mp4_plays(tmp_path: Path) -> None:
    imageio_ffmpeg = optional("imageio_ffmpeg", "film")
    frames = moving(shape=(47, 63))  # odd sides: H.264 has none
    write_mp4(iter(frames), tmp_path / "a.mp4", 5)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    about = next(reader)
    assert (about["size"], about["codec"], about["fps"]) == ((64, 48), "h264", 5)
    assert "yuv420p" in about["pix_fmt"]
    shown = [np.frombuffer(data, np.uint8).reshape(48, 64, 3) for data in reader]
    assert len(shown) == 5
    for picture, wanted in zip(shown, frames, strict=True):
        # Compressed, and colours at half the resolution: greys within a few levels away from the borders.
        assert np.abs(picture[12:18, 24:36].astype(int) - wanted[12:18, 24:36]).max() < 12
        assert picture[:8].max() < 12
        assert picture[40:].max() < 40


def test_it_refuses(tmp_path: Path) -> None:
    optional("imageio_ffmpeg", "film")
    frames = moving()
    with pytest.raises(InputError, match="plane: unknown 'oblique'"):
        plane_grid(Grid((4, 4, 4), (1, 1, 1)), "oblique", np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must share"):
        frame(np.zeros((4, 5)), WINDOW, [np.zeros((5, 4))])
    with pytest.raises(InputError, match="must share"):
        frame(np.zeros((4, 5, 6)), WINDOW)
    for write, name in ((write_gif, "a.gif"), (write_mp4, "a.mp4")):
        with pytest.raises(InputError, match="there are none"):
            write([], tmp_path / name)
        with pytest.raises(InputError, match="frames: "):
            write([frames[0], frames[0][:-2]], tmp_path / name)
        with pytest.raises(InputError, match="frames_per_second"):
            write(frames, tmp_path / name, 0)
        with pytest.raises(InputError, match="must end in"):
            write(frames, tmp_path / "a.png")
        with pytest.raises(MissingFileError, match="folder does not exist"):
            write(frames, tmp_path / "no" / name)
    assert list(tmp_path.iterdir()) == []
    write_gif(frames, tmp_path / "a.gif")
    with pytest.raises(InputError, match="already exists"):
        write_gif(frames, tmp_path / "a.gif")
    write_gif(frames, tmp_path / "a.gif", overwrite=True)
