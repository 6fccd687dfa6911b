"""Films of a slice that moves: frames drawn in millimetres as radiologists look at them, as GIF and MP4.

A frame is one plane of the patient, sampled where its pixels are (`plane_grid`): square pixels whatever the
scan's voxels, head or front up, the patient's right on the left whatever the scan's orientation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion

from stnerp.atomic import replacing
from stnerp.errors import InputError, MissingDependencyError
from stnerp.geometry import Grid
from stnerp.io.image import check_writable
from stnerp.window import Window

Plane = Literal["axial", "coronal", "sagittal"]
Rgb = tuple[int, int, int]

#: Colours of contours that have none of their own.
COLOURS: tuple[Rgb, ...] = ((255, 96, 64), (64, 200, 255), (120, 230, 90), (255, 210, 60), (230, 110, 255))

# World direction (LPS) of a picture's columns, to the right, and rows, downwards; letters of its left and top.
_PLANES: dict[Plane, tuple[np.ndarray, np.ndarray, str, str]] = {
    "axial": (np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]), "R", "A"),
    "coronal": (np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, -1.0]), "R", "H"),
    "sagittal": (np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, -1.0]), "A", "H"),
}
_FONT_SHARE = 1 / 24  # of the picture's longer side
_GREYS = 240  # of a GIF's 256 colours; the others are the contours'
_CRF = 18  # of H.264: no difference to be seen


def plane_grid(grid: Grid, plane: Plane, through_mm: np.ndarray, pixels: int = 480) -> Grid:
    """Where the pixels of a picture lie: one slice, parallel to the patient's axes, that shows all of a grid.

    An array on it, (1, rows, columns), is the picture: its first row on top, its first column on the left.

    Args:
        grid: of any orientation; the picture reaches as far as its voxels.
        plane: axial (front up), coronal or sagittal (head up); axial and coronal with the patient's right on
            the left, sagittal with the front on the left.
        through_mm: a point of the plane, (3,), LPS mm.
        pixels: of the longer side; both sides are even, as films want it.

    Raises:
        InputError: an unknown plane.
    """
    if plane not in _PLANES:
        raise InputError(f"plane: unknown {plane!r}; give one of {', '.join(get_args(Plane))}")
    right, down, _, _ = _PLANES[plane]
    corners = grid.corners_world(0.5)
    low = np.array([(corners @ axis).min() for axis in (right, down)])
    extent_mm = np.array([(corners @ axis).max() for axis in (right, down)]) - low
    pixel_mm = float(extent_mm.max()) / pixels
    columns, rows = (2 * int(np.ceil(side / pixel_mm / 2 - 1e-6)) for side in extent_mm)
    normal = np.cross(right, down)
    # The picture's middle is the grid's.
    first = low + (extent_mm - np.array([columns - 1, rows - 1]) * pixel_mm) / 2
    x, y, z = (first[0] * right + first[1] * down + (through_mm @ normal) * normal).tolist()
    axes = np.stack([right, down, normal], axis=1)
    return Grid((columns, rows, 1), (pixel_mm, pixel_mm, pixel_mm), (x, y, z), tuple(axes.ravel().tolist()))


def frame(
    values: np.ndarray,
    window: Window,
    masks: Sequence[np.ndarray] = (),
    colours: Sequence[Rgb] = COLOURS,
    text: str = "",
    plane: Plane | None = None,
) -> np.ndarray:
    """One picture, (rows, columns, 3), uint8.

    Args:
        values: intensities, (rows, columns), the first row on top.
        window: intensities that are black and white.
        masks: (rows, columns), non-zero inside; their borders are drawn, the last on top.
        colours: of the masks, red, green, blue from 0 to 255; used in turn.
        text: in the upper left corner: the time.
        plane: adds the letters of the patient's sides on the left and at the top: R, A, H (head).

    Raises:
        InputError: values that aren't (rows, columns), or masks of another shape.
    """
    if np.ndim(values) != 2 or any(np.shape(mask) != np.shape(values) for mask in masks):
        shapes = ", ".join(str(np.shape(mask)) for mask in masks)
        raise InputError(f"frame: values {np.shape(values)} and masks ({shapes}) must share (rows, columns)")
    grey = np.rint(255 * window.normalise(values)).astype(np.uint8)
    picture = np.repeat(grey[..., None], 3, axis=-1)
    for i, mask in enumerate(masks):
        picture[_border(np.asarray(mask) != 0, max(picture.shape[:2]))] = colours[i % len(colours)]
    return _written(picture, text, plane)


def write_gif(
    frames: Iterable[np.ndarray],
    path: str | os.PathLike[str],
    frames_per_second: float = 8.0,
    colours: Sequence[Rgb] = COLOURS,
    overwrite: bool = False,
) -> None:
    """Write a GIF that runs for ever: greys and the contours' colours, the same in all frames.

    Args:
        frames: (rows, columns, 3), uint8, of one shape.
        path: of the file.
        frames_per_second: rounded to what a GIF can say: hundredths of a second per frame.
        colours: other than greys, at most 16.

    Raises:
        MissingFileError: the folder does not exist.
        InputError: the file exists and `overwrite` is false; no frames, or of different shapes.
    """
    palette = Image.new("P", (1, 1))
    greys = np.repeat(np.rint(np.linspace(0, 255, _GREYS)).astype(int), 3)
    palette.putpalette([*greys.tolist(), *chain.from_iterable(list(colours)[: 256 - _GREYS])])

    def indexed(picture: np.ndarray) -> Image.Image:
        return Image.fromarray(picture).quantize(palette=palette, dither=Image.Dither.NONE)

    pictures = map(indexed, _checked(frames, frames_per_second))
    with _replacing(path, overwrite, ".gif") as partial:
        first = next(pictures)
        duration_ms = max(2, round(100 / frames_per_second)) * 10
        first.save(partial, save_all=True, append_images=pictures, duration=duration_ms, loop=0, optimize=False)


def write_mp4(
    frames: Iterable[np.ndarray],
    path: str | os.PathLike[str],
    frames_per_second: float = 8.0,
    overwrite: bool = False,
) -> None:
    """Write an MP4 (H.264, 4:2:0, as every browser and slide shows it); odd sides get a black row or column.

    Arguments and errors are those of `write_gif`.

    Raises:
        MissingDependencyError: imageio-ffmpeg isn't installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        raise MissingDependencyError("MP4 needs imageio-ffmpeg: pip install 'stnerp[film]'") from None
    pictures = _checked(frames, frames_per_second)
    with _replacing(path, overwrite, ".mp4") as partial:
        first = _even(next(pictures))
        rows, columns, _ = first.shape
        writer = imageio_ffmpeg.write_frames(
            str(partial),
            (columns, rows),
            fps=frames_per_second,
            codec="libx264",
            quality=None,
            output_params=["-crf", str(_CRF), "-movflags", "+faststart"],
            macro_block_size=2,
            ffmpeg_log_level="error",
        )
        try:
            writer.send(None)
            for picture in chain([first], map(_even, pictures)):
                writer.send(np.ascontiguousarray(picture))
        except OSError as error:
            raise InputError(f"{path}: ffmpeg can't write it: {str(error).splitlines()[0]}") from None
        finally:
            writer.close()


def _border(mask: np.ndarray, side: int) -> np.ndarray:
    """A mask's outermost pixels, in larger pictures with the next ones outside."""
    # The picture's own edge is no border of what goes on beyond it.
    line = mask & ~binary_erosion(mask, border_value=1)
    return line | (binary_dilation(mask) & ~mask) if side >= 320 else line


def _written(picture: np.ndarray, text: str, plane: Plane | None) -> np.ndarray:
    if not text and plane is None:
        return picture
    canvas = Image.fromarray(picture)
    rows, columns, _ = picture.shape
    size = max(8.0, max(rows, columns) * _FONT_SHARE)
    outline = max(1, round(size / 12))
    font, draw = ImageFont.load_default(size), ImageDraw.Draw(canvas)
    letters = [(size / 3, size / 4, text, "la")]
    if plane is not None:
        _, _, left, top = _PLANES[plane]
        letters += [(size / 3, rows / 2, left, "lm"), (columns / 2, size / 4, top, "ma")]
    for x, y, letter, anchor in letters:
        # White in black, so that it is seen everywhere.
        draw.text((x, y), letter, "white", font, anchor, stroke_width=outline, stroke_fill="black")
    return np.asarray(canvas)


def _checked(frames: Iterable[np.ndarray], frames_per_second: float) -> Iterator[np.ndarray]:
    """The frames, one by one; at least one, all of one shape."""
    if not 0 < frames_per_second <= 100:
        raise InputError(f"frames_per_second: {frames_per_second} must be a number above 0, at most 100")
    shape: tuple[int, ...] | None = None
    for picture in frames:
        shape = picture.shape if shape is None else shape
        if picture.shape != shape or picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise InputError(
                f"frames: {picture.shape} {picture.dtype} after {shape}; all must be (rows, columns, 3)"
            )
        yield picture
    if shape is None:
        raise InputError("frames: there are none; give at least one time")


def _even(picture: np.ndarray) -> np.ndarray:
    rows, columns, _ = picture.shape
    return np.pad(picture, ((0, rows % 2), (0, columns % 2), (0, 0)))


@contextmanager
def _replacing(path: str | os.PathLike[str], overwrite: bool, suffix: str) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is whole."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise InputError(f"{path}: the file name must end in {suffix}")
    check_writable(path, overwrite)
    with replacing(path) as partial:
        yield partial
