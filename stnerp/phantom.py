"""Images whose motion is known exactly, to test methods against the truth.

`Phantom` is a thorax made of formulas: HU at any world point, so that the image at time t is the
anatomy at the points where its voxels come from, free of interpolation. `MovedImage` does the same
to a real image, at the price of interpolating it. Both answer like a fitted model does.
"""

from __future__ import annotations

import logging
from functools import cached_property

import numpy as np
import SimpleITK as sitk

from stnerp.errors import InputError
from stnerp.geometry import Grid, Triple
from stnerp.lungs import filled_across
from stnerp.motion import Breathing, Ellipse, Motion, Sliding
from stnerp.preprocess import cubic_interpolator

logger = logging.getLogger(__name__)

#: Values of the phantom's label images; everything else is 0.
LABELS = {"lung": 1, "heart": 2, "liver": 3, "spine": 4, "tumour": 5}

TUMOUR_CENTRE_MM: Triple = (-74.0, 26.0, -2.0)
TUMOUR_RADIUS_MM = 14.0
#: Centre and half size of the box that the default motion fills: the anatomy's, whatever the grid.
BOX_MM: tuple[Triple, Triple] = ((0.0, 0.0, 0.0), (180.0, 140.0, 90.0))

HU_RANGE = (-1024, 3071)
MARGIN_MM = 6.0  # landmarks keep this distance from the edge of their organ or mask
WALL_MM = 13.0  # from the rib cage's outer surface to what slides along it


class MovingScene:
    """A reference that moves by a known motion: what `Phantom` and `MovedImage` have in common."""

    grid: Grid
    motion: Motion

    def times(self, phases: int = 10) -> list[float]:
        """`phases` evenly spaced times: of one cycle (from 0) if periodic, else from start to end."""
        return self.motion.times(phases)

    def map_points(self, points_mm: np.ndarray, t: float, inverse: bool = False) -> np.ndarray:
        """Points (..., 3), LPS mm, from time t to the reference; inverse: from the reference to time t."""
        if inverse:
            return self.motion.reference_to_target(points_mm, t)
        return self.motion.target_to_reference(points_mm, t)

    def displacement(self, t: float) -> np.ndarray:
        """Displacement target -> reference at every voxel, world mm, (z, y, x, 3), float64."""
        points = self.grid.points_world()
        return self.motion.target_to_reference(points, t) - points

    def landmarks(self, t: float) -> np.ndarray:
        """The landmarks at time t, (N, 3) LPS mm; row by row those at any other time."""
        return self.motion.reference_to_target(self.reference_landmarks, t)

    @cached_property
    def reference_landmarks(self) -> np.ndarray:
        raise NotImplementedError

    def _always_seen(self, points_mm: np.ndarray) -> np.ndarray:
        """Whether points of the reference (N, 3) stay on the grid throughout the motion, (N,)."""
        seen = self.grid.contains(points_mm)
        for t in self.times():
            seen &= self.grid.contains(self.map_points(points_mm, t, inverse=True))
        return seen


class Phantom(MovingScene):
    """A thorax with known motion.

    The patient is fixed in the world (about 330 x 230 mm, the middle of the chest at the origin,
    feet towards -z); a grid is a window onto it. Edges are about 2.5 mm wide. Under `Sliding` the chest is
    a straight cylinder, the motion's: ribs and spine lie outside, the organs that slide along them inside.

    Args:
        size: voxels along x, y, z; centred on the patient.
        spacing_mm: distance between voxels, one number or three.
        motion: of the patient; None: `Breathing` of 15 mm.
        noise_hu: standard deviation of white noise, other noise at every t.
        seed: of vessels, textures, landmarks and noise.
        n_landmarks: how many points on vessels inside the lungs.
        grid: any other grid instead of size and spacing, oblique ones included.

    Raises:
        InputError: a negative noise, a size or spacing that isn't positive.
    """

    def __init__(
        self,
        size: tuple[int, int, int] = (144, 112, 72),
        spacing_mm: float | Triple = 2.5,
        motion: Motion | None = None,
        noise_hu: float = 20.0,
        seed: int = 0,
        n_landmarks: int = 300,
        grid: Grid | None = None,
    ) -> None:
        _check_counts(noise_hu, n_landmarks)
        self.grid = grid or _centred_grid(size, spacing_mm)
        self.motion = motion or Breathing(*BOX_MM)
        self.noise_hu = noise_hu
        self.seed = seed
        self.n_landmarks = n_landmarks
        self._anatomy = Anatomy(seed, self.motion if isinstance(self.motion, Sliding) else None)

    def image(self, t: float) -> sitk.Image:
        """The image at time t: HU, int16, as a scanner writes it."""
        hu = self._sample(t)[0]
        hu += _noise(self.grid.shape, self.noise_hu, self.seed, t)
        return self.grid.image(np.clip(np.rint(hu), *HU_RANGE).astype(np.int16))

    def labels(self, t: float) -> sitk.Image:
        """The organs at time t, uint8, values as in `LABELS`."""
        return self.grid.image(self._sample(t)[1])

    @cached_property
    def reference_landmarks(self) -> np.ndarray:
        """Points on vessels well inside the lungs, (N, 3) LPS mm, fixed by the seed.

        Raises:
            InputError: the grid shows too little of the lungs.
        """
        rng = np.random.default_rng([self.seed, 1])
        found: list[np.ndarray] = []
        for _ in range(30):
            index = rng.uniform(0, np.asarray(self.grid.size) - 1, (20_000, 3))
            points = self.grid.index_to_world(index)
            points = points[self._anatomy.on_lung_vessel(points)]
            found.append(points[self._always_seen(points)])
            if sum(map(len, found)) >= self.n_landmarks:
                return np.concatenate(found)[: self.n_landmarks]
        raise InputError(
            f"phantom: found {sum(map(len, found))} of {self.n_landmarks} landmarks; "
            "use a grid that shows more of the lungs, or ask for fewer"
        )

    def _sample(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """HU (float32) and labels at every voxel, (z, y, x)."""
        hu = np.empty(self.grid.shape, np.float32)
        labels = np.empty(self.grid.shape, np.uint8)
        for z, points in enumerate(self.grid.points_world()):
            hu[z], labels[z] = self._anatomy(self.motion.target_to_reference(points, t))
        return hu, labels


class MovedImage(MovingScene):
    """A real image under a known motion.

    The image at time t is interpolated (cubic B-spline) at the points where its voxels come from;
    beyond the field of view the nearest voxel counts. At the reference time it is the image itself.
    The image's own noise moves along with it, which makes registration easier than in life.

    Args:
        image: the reference, 3D, scalar, of any orientation and type.
        motion: for instance `Breathing.of_grid(Grid.of(image))`.
        labels: a label image on the same grid; nearest neighbour.
        mask: where landmarks may lie (non-zero), on the same grid; None: anywhere in the body.
        noise_hu: standard deviation of fresh white noise, other noise at every t but the reference time.
        seed: of landmarks and noise.
        n_landmarks: how many points with structure.

    Raises:
        InputError: an image that isn't 3D and scalar, labels or a mask on another grid, negative noise.
    """

    def __init__(
        self,
        image: sitk.Image,
        motion: Motion,
        labels: sitk.Image | None = None,
        mask: sitk.Image | None = None,
        noise_hu: float = 0.0,
        seed: int = 0,
        n_landmarks: int = 300,
    ) -> None:
        _check_counts(noise_hu, n_landmarks)
        self.grid = Grid.of(image)
        if image.GetNumberOfComponentsPerPixel() != 1:
            raise InputError("image: expected one value per voxel")
        for name, other in (("labels", labels), ("mask", mask)):
            if other is not None and not self.grid.is_close(Grid.of(other)):
                raise InputError(f"{name}: not on the image's grid; resample it onto the image first")
        self.motion = motion
        self.noise_hu = noise_hu
        self.seed = seed
        self.n_landmarks = n_landmarks
        self._image, self._labels, self._mask = image, labels, mask

    def image(self, t: float) -> sitk.Image:
        """The image at time t, on the reference's grid, in its type and within its range of values."""
        displacement = self.displacement(t)
        if not displacement.any():
            return sitk.Image(self._image)
        array = sitk.GetArrayViewFromImage(self._image)
        lowest, highest = float(array.min()), float(array.max())
        interpolator = cubic_interpolator(self.grid)
        moved = sitk.GetArrayFromImage(self._pull(self._image, displacement, interpolator, sitk.sitkFloat32))
        moved += _noise(self.grid.shape, self.noise_hu, self.seed, t)
        moved = np.clip(moved, lowest, highest)
        if np.issubdtype(array.dtype, np.integer):
            moved = np.rint(moved)
        return self.grid.image(moved.astype(array.dtype))

    def labels(self, t: float) -> sitk.Image:
        """The label image at time t.

        Raises:
            InputError: no labels were given.
        """
        if self._labels is None:
            raise InputError("labels: none were given; pass labels= when making the MovedImage")
        return self.propagate(self._labels, t)

    def propagate(self, mask: sitk.Image, t: float) -> sitk.Image:
        """Any label image of the reference at time t: nearest neighbour, on this grid, in its type."""
        return self._pull(mask, self.displacement(t), sitk.sitkNearestNeighbor, mask.GetPixelID())

    @cached_property
    def reference_landmarks(self) -> np.ndarray:
        """Points where the image has structure, (N, 3) LPS mm, fixed by the seed.

        Drawn among the tenth of voxels with the steepest intensity, at least `MARGIN_MM` inside the
        mask (or the body), and moved off the voxel centres at random.

        Raises:
            InputError: the mask is too small for any; for fewer than asked, a notice.
        """
        inside = patient_in(self._image) if self._mask is None else self._mask != 0
        inside = sitk.SignedMaurerDistanceMap(inside, squaredDistance=False, useImageSpacing=True)
        depth = -sitk.GetArrayFromImage(inside)
        smooth = max(1.5, *self.grid.spacing_mm)
        gradient = sitk.GetArrayFromImage(
            sitk.GradientMagnitudeRecursiveGaussian(sitk.Cast(self._image, sitk.sitkFloat32), smooth)
        )
        allowed = depth > MARGIN_MM
        if not allowed.any():
            raise InputError(f"mask: nothing lies deeper than {MARGIN_MM} mm in it; use a larger mask")
        allowed &= gradient >= np.quantile(gradient[allowed], 0.9)
        rng = np.random.default_rng([self.seed, 1])
        index = rng.permutation(np.argwhere(allowed)[:, ::-1].astype(float))
        index += rng.uniform(-0.5, 0.5, index.shape)
        index = index[: 20 * self.n_landmarks].clip(0, np.asarray(self.grid.size) - 1)
        points = self.grid.index_to_world(index)
        points = points[self._always_seen(points)][: self.n_landmarks]
        if len(points) == 0:
            raise InputError("landmarks: no place for any; use a larger image or mask")
        if len(points) < self.n_landmarks:
            logger.warning("landmarks: there was room for %d of %d", len(points), self.n_landmarks)
        return points

    def _pull(self, image: sitk.Image, displacement: np.ndarray, interpolator: int, pixel: int) -> sitk.Image:
        field = sitk.Cast(self.grid.image(displacement), sitk.sitkVectorFloat64)
        return sitk.Resample(
            image,
            self.grid.image(np.empty(self.grid.shape, np.uint8)),
            sitk.DisplacementFieldTransform(field),
            interpolator,
            0.0,
            pixel,
            True,  # nearest voxel beyond the field of view
        )


# -- anatomy: HU and labels of world points, by painting organs over one another


class Anatomy:
    """HU and labels of a thorax at world points. Every organ is a function: mm inside its surface.

    With `sliding` the lungs and the abdomen end at its mantle and its column around the spine.
    """

    def __init__(self, seed: int, sliding: Sliding | None = None) -> None:
        self._sliding = sliding
        rng = np.random.default_rng([seed, 0])
        self._lung_vessels = [
            (Waves(rng, wavelength, 2), radius)
            for wavelength, radius in ((95.0, 5.0), (52.0, 3.2), (32.0, 2.3), (20.0, 1.6))
        ]
        self._liver_vessels = Waves(rng, 60.0, 2)
        self._coarse, self._fine = Waves(rng, 45.0, 1), Waves(rng, 16.0, 2)
        self._lobes = Waves(rng, 22.0, 1)

    def __call__(self, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """HU (...,), float32, and labels (...,), uint8, of points (..., 3) in LPS mm."""
        hu = np.full(points_mm.shape[:-1], -1000, np.float32)
        labels = np.zeros(points_mm.shape[:-1], np.uint8)
        inside = _body_depth(*_xyz(points_mm)) > -EDGE_MM
        hu[inside], labels[inside] = self._body(points_mm[inside].astype(np.float32))
        return hu, labels

    def on_lung_vessel(self, points_mm: np.ndarray) -> np.ndarray:
        """Whether points (N, 3) lie on a vessel well inside a lung, (N,)."""
        points = points_mm.astype(np.float32)
        deep = self(points_mm)[1] == LABELS["lung"]
        deep &= self._lung_depth(*_xyz(points)) > MARGIN_MM
        deep[deep] = self._vessels(points[deep]) > 0.5
        return deep

    def _body(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y, z = _xyz(points)
        coarse = self._coarse(points)[0]
        fine, grain = self._fine(points)
        paint = _Painter(len(points))

        # Body wall: skin, fat, muscle with planes of fat between, then the mediastinum's fat.
        depth = _body_depth(x, y, z)
        fat = -95 + 14 * coarse
        paint(depth, 10)
        paint(depth - 2.5, fat)
        muscle = 52 + 8 * grain - 130 * _step(2 * np.abs(fine), 0.6, 0)
        paint(depth - (13 + 4 * coarse + 5 * np.abs(x) / 160), muscle)
        wall = self._wall_depth(x, y, z)
        self._ribs(paint, x, y, z, wall)
        cavity = wall - (WALL_MM - 1)
        paint(cavity, -70 + 60 * _step(fine, -0.2, 0.8) + 30 * grain)

        # Abdomen: liver under the right dome, stomach and spleen under the left.
        dome = _diaphragm_depth(x, y, z)
        below = np.minimum(-dome, cavity - 1)
        paint(below + 2.5, 45)
        paint(below, fat + 25 * grain)
        paint(np.minimum(below, _ellipsoid(x - 92, y - 48, z + 62, 34, 38, 44)), 115 + 10 * coarse)
        stomach = np.minimum(below - 2, _ellipsoid(x - 62, y + 18, z + 70, 42, 48, 40))
        paint(stomach, 45)
        paint(stomach - 4, np.where(y < -30, -950, 15 + 12 * grain))
        liver = np.minimum(below, _ellipsoid(x + 62, y + 4, z + 95, 112, 92, 90))
        vein = _tubes(self._liver_vessels(points), 60, 4)
        paint(liver, 95 + 12 * coarse + 8 * grain + 70 * vein, "liver")

        # Lungs, denser towards the back, with a bronchovascular tree that thins out to the pleura.
        lung = self._lung_depth(x, y, z)
        in_lung = lung > -EDGE_MM
        air = np.zeros_like(x)
        vessels = self._vessels(points[in_lung])
        air[in_lung] = -835 + 45 * y[in_lung] / 90 + 18 * coarse[in_lung] + 8 * grain[in_lung]
        air[in_lung] += (40 - air[in_lung]) * vessels
        paint(lung, air, "lung")

        # Mediastinum.
        spine_y = _spine_y(z)
        column = _ellipse(x - 2, y - 8, 25 + 9 * _step(z, 20, 75), 62)
        # Below the diaphragm only the crura at the back, and fat around the aorta.
        column = np.minimum(column, np.maximum(dome, np.minimum(y - 22, 40 - np.abs(x))))
        paint(np.minimum(column, cavity), -60 + 75 * _step(fine, -0.1, 0.7) + 15 * grain)
        self._great_vessels(paint, x, y, z, cavity)
        self._airways(paint, x, y, z)
        self._heart(paint, x, y, z, np.minimum(dome - 2, cavity - 2), coarse, grain)
        if self._sliding is not None:
            paint(_depth_in(self._sliding.spine, x, y), muscle)
        self._spine(paint, x, y - spine_y, z, grain, depth)

        # A tumour with lobes, in the right lower lung.
        arm = points - np.asarray(TUMOUR_CENTRE_MM, np.float32)
        r = np.sqrt((arm**2).sum(axis=-1))
        near = r < 2 * TUMOUR_RADIUS_MM
        tumour = np.full_like(r, -TUMOUR_RADIUS_MM)
        tumour[near] = TUMOUR_RADIUS_MM + 2.0 * self._lobes(points[near])[0] - r[near]
        paint(tumour, 45 + 14 * grain - 20 * _step(r, 7, 3), "tumour")
        return paint.hu, paint.labels

    def _wall_depth(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Depth inside the rib cage's outer surface, which narrows towards the apex unless it slides."""
        if self._sliding is not None:
            return _depth_in(self._sliding.mantle, x, y) + WALL_MM
        taper = np.sqrt(np.maximum(1 - (np.maximum(z + 30, 0) / 165) ** 2, 0.1))
        return _ellipse(x, y, 142 * taper, 96 * np.sqrt(taper))

    def _lung_depth(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        wall = self._wall_depth(x, y, z) - (WALL_MM + 1)
        if self._sliding is not None:
            wall = np.minimum(wall, -_depth_in(self._sliding.spine, x, y) - 1)
        top = _ellipsoid(np.abs(x) - 64, y - 4, z + 45, 74, 88, 128)
        return np.minimum(np.minimum(wall, top), np.minimum(_diaphragm_depth(x, y, z) - 2.5, np.abs(x) - 6))

    def _vessels(self, points: np.ndarray) -> np.ndarray:
        """0 to 1 along the vessels of the lungs, of points (N, 3), (N,)."""
        lung = self._lung_depth(*_xyz(points))
        strength = np.zeros(len(points), np.float32)
        for waves, radius in self._lung_vessels:
            # Thick vessels stay near the hilum, thin ones reach the pleura.
            reach = _step(lung, 0.5 * radius, 5 * radius)
            strength = np.maximum(strength, reach * _tubes(waves(points), waves.wavelength_mm, radius))
        return strength

    def _ribs(self, paint: _Painter, x: np.ndarray, y: np.ndarray, z: np.ndarray, wall: np.ndarray) -> None:
        pitch = 29.0
        along = z - 0.42 * y + 4
        across = along - pitch * np.round(along / pitch)
        rib = 5.5 * (1 - np.hypot((wall - 7) / 4.0, across / 6.5))
        paint(np.where(y < -82, -9, rib), 420)
        paint(np.where(y < -82, -9, rib - 2.2), 190)
        sternum = np.minimum(np.minimum(14 - np.abs(x), 6 - np.abs(wall - 6)), np.where(y < 0, z + 40, -9))
        paint(sternum, 280)
        paint(sternum - 2.5, 130)

    def _great_vessels(
        self, paint: _Painter, x: np.ndarray, y: np.ndarray, z: np.ndarray, cavity: np.ndarray
    ) -> None:
        # The aortic arch: half a torus on two cylinders, from the heart over to the spine.
        along = (21 * (x - 15) + 60 * (y - 6)) / 63.6
        beside = (60 * (x - 15) - 21 * (y - 6)) / 63.6
        aorta = 12 - np.hypot(np.hypot(along, np.maximum(z - 30, 0)) - 29, beside)
        aorta = np.minimum(aorta, np.where(along < 0, z + 10, 99))
        paint(np.minimum(aorta + 1.5, cavity), 45)
        paint(np.minimum(aorta, cavity), 165)
        cava = np.minimum(9 - np.hypot(x + 22, y + 12), z + 10)
        paint(cava, 150)
        trunk = 10 - _segment(x, y, z, (18, -18, -2), (26, 2, 12))
        for end in ((-44, 8, 2), (52, 18, 4)):
            trunk = np.maximum(trunk, 8 - _segment(x, y, z, (18, -2, 8), end))
        paint(trunk, 150)

    def _airways(self, paint: _Painter, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
        carina = (-8.0, 22.0, 22.0)
        airway = 8.5 - _segment(x, y, z, carina, (-8, 10, 140))
        for end in ((-46, 26, -8), (44, 28, -10)):
            airway = np.maximum(airway, 6 - _segment(x, y, z, carina, end))
        paint(airway + 2, 25)
        paint(airway, -980)
        oesophagus = _ellipse(x - 6, y - 34, 8, 6)
        paint(oesophagus, 40)

    def _heart(
        self,
        paint: _Painter,
        x: np.ndarray,
        y: np.ndarray,
        z: np.ndarray,
        limit: np.ndarray,
        coarse: np.ndarray,
        grain: np.ndarray,
    ) -> None:
        # Long axis towards the apex: left, forward, down.
        x, y, z = x - 20, y + 26, z + 20
        long, short, up = 0.77 * x - 0.48 * y - 0.42 * z, 0.53 * x + 0.85 * y, 0.36 * x - 0.22 * y + 0.91 * z
        heart = np.minimum(_ellipsoid(long, short, up, 58, 42, 44), limit)
        paint(heart + 3, -80 + 20 * grain)
        paint(heart, 75 + 10 * coarse + 8 * grain, "heart")
        for centre, axes in (
            ((14, 14, -4), (34, 16, 20)),
            ((10, -20, 2), (36, 13, 22)),
            ((-34, 6, 8), (16, 26, 22)),
        ):
            chamber = _ellipsoid(long - centre[0], short - centre[1], up - centre[2], *axes)
            paint(np.minimum(chamber, limit - 3), 160 + 6 * grain, "heart")

    def _spine(
        self,
        paint: _Painter,
        x: np.ndarray,
        y: np.ndarray,
        z: np.ndarray,
        grain: np.ndarray,
        depth: np.ndarray,
    ) -> None:
        """x and y from the centre of the vertebral bodies."""
        pitch = 25.0
        level = z - pitch * np.round(z / pitch)
        # Bodies are waisted; discs and canal count as spine, processes come once per vertebra.
        body = _ellipse(x, y, 19 + 0.02 * level**2, 15 + 0.015 * level**2)
        arch = 12 - np.hypot(x, y - 23)
        across = np.abs(level + 0.3 * (y - 23))
        process = np.minimum(3.5 - np.abs(x), np.minimum(9 - across, 14 - np.abs(y - 36)))
        transverse = np.minimum(5 - np.hypot(y - 22 - 0.2 * np.abs(x), level), 34 - np.abs(x))
        spine = np.maximum(np.maximum(body, arch), np.maximum(process, transverse))
        spine = np.minimum(spine, depth - 6)
        paint(spine, 420, "spine")
        paint(np.maximum(body, np.maximum(process, transverse)) - 2.2, 190 + 35 * grain, "spine")
        paint(np.minimum(body, np.abs(level) - (pitch / 2 - 3)), 85, "spine")
        paint(8 - np.hypot(x, y - 23), 20, "spine")


EDGE_MM = 2.5


class _Painter:
    """Paints organs over one another, with soft edges for HU and hard ones for labels."""

    def __init__(self, count: int) -> None:
        self.hu = np.full(count, -1000, np.float32)
        self.labels = np.zeros(count, np.uint8)

    def __call__(self, depth_mm: np.ndarray, hu: float | np.ndarray, label: str | None = None) -> None:
        """Where `depth_mm` (mm inside the surface) is positive, set HU and the label (None: no organ)."""
        touched = np.flatnonzero(depth_mm > -EDGE_MM / 2)
        cover = _step(depth_mm[touched], -EDGE_MM / 2, EDGE_MM / 2)
        value = hu[touched] if isinstance(hu, np.ndarray) else hu
        self.hu[touched] += cover * (value - self.hu[touched])
        self.labels[touched[depth_mm[touched] > 0]] = LABELS[label] if label else 0


class Waves:
    """Smooth random fields: sums of a dozen plane waves of about one wavelength, unit variance."""

    def __init__(self, rng: np.random.Generator, wavelength_mm: float, fields: int, waves: int = 12) -> None:
        self.wavelength_mm = wavelength_mm
        towards = rng.normal(size=(fields, waves, 3))
        towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
        k = 2 * np.pi / wavelength_mm * rng.uniform(0.75, 1.25, (fields, waves, 1))
        self._k = (k * towards).astype(np.float32)
        self._phase = rng.uniform(0, 2 * np.pi, (fields, waves)).astype(np.float32)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """The fields at points (N, 3), float32: (fields, N)."""
        scale = np.float32(np.sqrt(2 / self._k.shape[1]))
        return np.stack(
            [
                scale * np.cos(points @ k.T + phase).sum(axis=-1)
                for k, phase in zip(self._k, self._phase, strict=True)
            ]
        )


def _tubes(fields: np.ndarray, wavelength_mm: float, radius_mm: float) -> np.ndarray:
    """1 on the curves where two random fields (2, N) vanish together, falling to 1/e at about the radius."""
    # The fields' typical slope is 2π / (√3 wavelength) per direction.
    width = radius_mm * 2 * np.pi / (np.sqrt(3) * wavelength_mm)
    return np.exp(-(fields[0] ** 2 + fields[1] ** 2) / np.float32(width**2))


def _body_depth(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    # Flatter at the back, and a little wider at the shoulders.
    return _ellipse(x, np.where(y > 0, y * (1 - 0.1 * np.exp(-((x / 60) ** 2))), y), 162 + 0.04 * z, 114)


def _diaphragm_depth(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Height above the diaphragm, mm along its normal: a right dome, a lower left one."""
    right = -20 - 42 * ((x + 66) / 75) ** 2
    left = -33 - 42 * ((x - 70) / 70) ** 2
    apart = np.abs(right - left)
    dome = np.maximum(right, left) + 6 * np.exp(-apart / 12)
    behind = np.maximum(y + 12, 0) / 85
    ahead = np.maximum(-12 - y, 0) / 85
    surface = np.maximum(dome, -62) - 48 * behind**2 - 30 * ahead**2
    return (z - surface) / (1 + 0.9 * behind + 0.4 * ahead + 0.006 * np.abs(np.abs(x) - 68))


def _spine_y(z: np.ndarray) -> np.ndarray:
    return 54 + 6 * (z / 90) ** 2


def _ellipse(x: np.ndarray, y: np.ndarray, a: float | np.ndarray, b: float | np.ndarray) -> np.ndarray:
    """About the distance inside an ellipse with half axes a, b."""
    rho = np.hypot(x / a, y / b)
    return (1 - rho) * rho / np.maximum(np.hypot(x / a**2, y / b**2), 1e-6)


def _depth_in(cylinder: Ellipse, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    (cx, cy), (a, b) = cylinder.centre_mm, cylinder.half_axes_mm
    return _ellipse(x - cx, y - cy, a, b)


def _ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """About the distance inside an ellipsoid with half axes a, b, c."""
    rho = np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2)
    steepness = np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2 + (z / c**2) ** 2)
    return (1 - rho) * rho / np.maximum(steepness, 1e-6)


def _segment(x: np.ndarray, y: np.ndarray, z: np.ndarray, start: Triple, end: Triple) -> np.ndarray:
    """Distance to a line segment."""
    dx, dy, dz = (e - s for s, e in zip(start, end, strict=True))
    x, y, z = x - start[0], y - start[1], z - start[2]
    s = np.clip((x * dx + y * dy + z * dz) / (dx**2 + dy**2 + dz**2), 0, 1)
    return np.sqrt((x - s * dx) ** 2 + (y - s * dy) ** 2 + (z - s * dz) ** 2)


def _step(value: np.ndarray, start: float, end: float) -> np.ndarray:
    """0 at `start`, 1 at `end`, smooth between."""
    s = np.clip((value - start) / (end - start), 0, 1)
    return s * s * (3 - 2 * s)


# -- small parts


def _xyz(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return points[..., 0], points[..., 1], points[..., 2]


def _centred_grid(size: tuple[int, int, int], spacing_mm: float | Triple) -> Grid:
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
    sx, sy, sz = (float(s) for s in spacing)
    ox, oy, oz = (-(n - 1) * float(s) / 2 for n, s in zip(size, spacing, strict=True))
    return Grid(size, (sx, sy, sz), (ox, oy, oz))


def _noise(shape: tuple[int, int, int], level: float, seed: int, t: float) -> np.ndarray:
    """White noise that depends on seed and t alone, float32."""
    bits = int(np.float64(t + 0.0).view(np.uint64))
    rng = np.random.default_rng([seed, 2, bits])
    return np.float32(level) * rng.standard_normal(shape, dtype=np.float32)


def patient_in(image: sitk.Image) -> sitk.Image:
    """The patient: the largest bright part, its air-filled inside included (filled slice by slice)."""
    bright = sitk.OtsuThreshold(sitk.Cast(image, sitk.sitkFloat32), 0, 1)
    parts = sitk.RelabelComponent(sitk.ConnectedComponent(bright), sortByObjectSize=True)
    return filled_across(parts == 1)


def _check_counts(noise_hu: float, n_landmarks: int) -> None:
    if not 0 <= noise_hu < np.inf:
        raise InputError(f"noise_hu {noise_hu}: must be zero or positive")
    if n_landmarks < 1:
        raise InputError(f"n_landmarks {n_landmarks}: must be at least 1")
