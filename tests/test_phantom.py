"""Simulated series: image, labels, landmarks and displacement must tell the same story."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk

from stnerp.errors import InputError
from stnerp.geometry import Grid
from stnerp.motion import Breathing, Longitudinal, Sliding
from stnerp.phantom import BOX_MM, HU_RANGE, LABELS, TUMOUR_CENTRE_MM, MovedImage, Phantom

SMALL = {"size": (72, 56, 36), "spacing_mm": 5.0}
EXHALE = 0.55
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return Phantom(**SMALL, noise_hu=0.0, n_landmarks=100)


def oblique(spacing_mm: float, size: tuple[int, int, int]) -> Grid:
    """Centred on the patient, axes turned by 0.3 and 0.2 radians and the last one flipped."""
    c, s, d, e = np.cos(0.3), np.sin(0.3), np.cos(0.2), np.sin(0.2)
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, d, -e], [0, e, d]])
    axes = about_z @ about_x @ np.diag([1, 1, -1])
    origin = -axes @ ((np.array(size) - 1) * spacing_mm / 2)
    return Grid(size, (spacing_mm,) * 3, tuple(origin), tuple(axes.ravel()))


# -- Phantom


def test_image_is_like_a_ct(phantom: Phantom) -> None:
    image = Phantom().image(0.0)
    assert image.GetPixelID() == sitk.sitkInt16
    assert Grid.of(image) == Phantom().grid
    assert image.GetSize() == (144, 112, 72)
    assert image.GetSpacing() == (2.5, 2.5, 2.5)
    hu = array(image)
    assert hu.min() >= HU_RANGE[0]
    assert hu.max() <= HU_RANGE[1]
    corner = hu[:10, :10, :10]
    assert corner.mean() == pytest.approx(-1000, abs=3)  # clipping at -1024 cuts some of the noise
    assert phantom.grid.centre_mm == pytest.approx([0, 0, 0])


def test_noise_is_reproducible_and_new_at_every_time() -> None:
    first, second = Phantom(**SMALL), Phantom(**SMALL)
    assert np.array_equal(array(first.image(0.3)), array(second.image(0.3)))
    still = Breathing(*BOX_MM, amplitude_si_mm=0, amplitude_ap_mm=0, amplitude_lr_mm=0)
    noisy = Phantom(**SMALL, motion=still, noise_hu=20.0)
    difference = array(noisy.image(0.1)).astype(float) - array(noisy.image(0.2))
    body = array(noisy.labels(0.1)) > 0
    # Two independent noises of 20; thousands of voxels make the deviation good to a few percent.
    assert difference[body].std() == pytest.approx(20 * np.sqrt(2), rel=0.05)
    other = Phantom(**SMALL, seed=1)
    assert not np.array_equal(other.reference_landmarks, first.reference_landmarks)


def test_labels_agree_with_the_image(phantom: Phantom) -> None:
    for t in (0.0, EXHALE):
        hu, labels = array(phantom.image(t)), array(phantom.labels(t))
        assert labels.dtype == np.uint8
        assert set(np.unique(labels)) == {0, *LABELS.values()}
        for organ, (low, high) in {
            "lung": (-850, -700),
            "heart": (60, 140),
            "liver": (70, 120),
            "spine": (120, 350),
            "tumour": (-60, 60),
        }.items():
            assert low < np.median(hu[labels == LABELS[organ]]) < high, organ


def test_organs_are_on_the_right_side(phantom: Phantom) -> None:
    labels, world = array(phantom.labels(0.0)), phantom.grid.points_world()
    centre = {organ: world[labels == value].mean(axis=0) for organ, value in LABELS.items()}
    assert centre["liver"][0] < -30  # patient right
    assert centre["heart"][0] > 5  # a little left
    assert centre["heart"][1] < 0  # in front
    assert centre["spine"][1] > 40  # at the back
    assert centre["liver"][2] < centre["lung"][2] - 40  # below the lungs
    assert centre["tumour"] == pytest.approx(TUMOUR_CENTRE_MM, abs=4)


def test_liver_rises_and_lungs_empty_on_exhale(phantom: Phantom) -> None:
    world = phantom.grid.points_world()
    inhale, exhale = array(phantom.labels(0.0)), array(phantom.labels(EXHALE))

    def top_of_liver(labels: np.ndarray) -> float:
        return float(world[labels == LABELS["liver"]][:, 2].max())

    assert top_of_liver(exhale) - top_of_liver(inhale) == pytest.approx(15, abs=5)  # one voxel
    lung = LABELS["lung"]
    assert 0.7 < (exhale == lung).sum() / (inhale == lung).sum() < 0.95


def test_tumour_is_found_where_the_forward_map_says() -> None:
    """In the image alone, on a fine grid around it; the other direction is centimetres off."""
    expected = np.asarray(TUMOUR_CENTRE_MM)
    grid = Grid((28, 28, 40), (2.0, 2.0, 2.0), tuple(expected - [27, 27, 24]))
    phantom = Phantom(grid=grid, noise_hu=0.0)
    world = grid.points_world()

    def found(t: float, near: np.ndarray) -> np.ndarray:
        bright = (array(phantom.image(t)) > -300) & (np.linalg.norm(world - near, axis=-1) < 19)
        return world[bright].mean(axis=0)

    reference = found(0.0, expected)
    forward = phantom.map_points(expected, EXHALE, inverse=True)
    backward = phantom.map_points(expected, EXHALE)
    assert forward[2] > expected[2] + 10
    moved = found(EXHALE, forward)
    # Vessels that touch it come and go at the edge of the ball that is searched.
    assert moved == pytest.approx(phantom.map_points(reference, EXHALE, inverse=True), abs=1.0)
    assert np.linalg.norm(moved - phantom.map_points(reference, EXHALE)) > 20
    assert np.linalg.norm(forward - backward) > 20


def test_landmarks_are_exact_and_on_vessels_of_the_lungs() -> None:
    phantom = Phantom(noise_hu=0.0)
    reference = phantom.landmarks(0.0)
    assert reference.shape == (300, 3)
    assert np.array_equal(reference, phantom.reference_landmarks)
    for t in (0.2, EXHALE, 0.9):
        back = phantom.map_points(phantom.landmarks(t), t)
        assert np.abs(back - reference).max() < 1e-8
    labels, hu = array(phantom.labels(EXHALE)), array(phantom.image(EXHALE))
    x, y, z = np.rint(phantom.grid.world_to_index(phantom.landmarks(EXHALE))).astype(int).T
    lung = LABELS["lung"]
    assert (labels[z, y, x] == lung).mean() > 0.98  # nearest voxel: some land beyond an edge
    assert hu[z, y, x].mean() > np.median(hu[labels == lung]) + 200
    assert np.linalg.norm(phantom.landmarks(EXHALE) - reference, axis=-1).mean() > 5


def test_displacement_is_target_to_reference(phantom: Phantom) -> None:
    displacement = phantom.displacement(EXHALE)
    assert displacement.shape == (36, 56, 72, 3)
    z, y, x = 15, 28, 20
    point = phantom.grid.index_to_world(np.array([x, y, z], float))
    assert point + displacement[z, y, x] == pytest.approx(phantom.map_points(point, EXHALE), abs=1e-9)
    assert displacement[z, y, x, 2] < -5  # at exhale a point comes from below
    assert not phantom.displacement(0.0).any()


def test_the_same_patient_through_any_grid(phantom: Phantom) -> None:
    """Flipped and permuted axes see the same world, voxel by voxel."""
    image = phantom.image(EXHALE)
    turned = sitk.PermuteAxes(image, (2, 0, 1))[::-1, :, :]
    other = Phantom(grid=Grid.of(turned), noise_hu=0.0)
    # Positions differ by rounding, which can turn HU to the next integer.
    assert np.abs(array(other.image(EXHALE)).astype(int) - array(turned)).max() <= 1


def test_phantom_under_therapy() -> None:
    therapy = Longitudinal(*BOX_MM, TUMOUR_CENTRE_MM, tumour_radius_mm=16.0, tumour_scale=0.7)
    grid = Grid((25, 25, 25), (2.0, 2.0, 2.0), tuple(np.asarray(TUMOUR_CENTRE_MM) - 24))
    phantom = Phantom(grid=grid, motion=therapy)
    assert phantom.times(4) == [0, 14, 28, 42]
    before, after = ((array(phantom.labels(t)) == LABELS["tumour"]).sum() for t in (0.0, 42.0))
    # 0.7³, and what the shears add; about 1400 voxels make the count good to a few percent.
    assert after / before == pytest.approx(0.343, rel=0.15)


def test_organs_slide_along_ribs_and_spine_that_stand_still() -> None:
    motion = Sliding(*BOX_MM)
    phantom = Phantom(**SMALL, motion=motion, noise_hu=0.0, n_landmarks=100)
    slides = motion.slides(phantom.grid.points_world())
    still, moved = array(phantom.image(0.0)), array(phantom.image(EXHALE))
    assert np.array_equal(moved[~slides], still[~slides])  # not one HU, right up to the mantle
    assert np.abs(moved[slides].astype(float) - still[slides]).mean() > 50
    labels = {t: array(phantom.labels(t)) for t in (0.0, EXHALE)}
    for image in labels.values():
        for organ in ("lung", "heart", "liver", "tumour"):
            assert slides[image == LABELS[organ]].all(), organ
        assert not slides[image == LABELS["spine"]].any()
    ribs = (still > 250) & (labels[0.0] != LABELS["spine"]) & (labels[0.0] != LABELS["heart"])
    assert ribs.sum() > 100
    assert not slides[ribs].any()
    # The liver comes up along the wall too: voxels next to the mantle turn from lung to liver.
    wall = slides & ~motion.slides(phantom.grid.points_world() * [1.1, 1.1, 1.0])
    risen = (labels[0.0] == LABELS["lung"]) & (labels[EXHALE] == LABELS["liver"])
    assert (risen & wall).sum() > 20
    landmarks = phantom.landmarks(0.0)
    assert motion.slides(landmarks).all()
    assert np.linalg.norm(phantom.landmarks(EXHALE) - landmarks, axis=-1).mean() > 4


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="noise_hu"):
        Phantom(noise_hu=-1.0)
    with pytest.raises(InputError, match="n_landmarks"):
        Phantom(n_landmarks=0)
    with pytest.raises(InputError, match="size"):
        Phantom(size=(0, 1, 1))
    with pytest.raises(InputError, match="landmarks"):
        Phantom(size=(4, 4, 4)).landmarks(0.0)


# -- MovedImage


@pytest.mark.parametrize("turned", [False, True], ids=["straight", "oblique"])
def test_moved_image_agrees_with_the_phantom(turned: bool) -> None:
    """On either grid the moved image is the phantom's, up to interpolating a 4 mm voxel's edges."""
    grid = oblique(4.0, (70, 56, 40)) if turned else Grid((70, 56, 40), (4.0,) * 3, (-138.0, -110.0, -78.0))
    motion = Breathing(*BOX_MM)
    truth = Phantom(grid=grid, motion=motion, noise_hu=0.0)
    moved = MovedImage(truth.image(0.0), motion, labels=truth.labels(0.0), n_landmarks=20)
    # What comes from beyond the grid can't agree.
    inside = grid.contains(truth.map_points(grid.points_world(), EXHALE))
    hu = array(truth.image(EXHALE)).astype(float)[inside]

    def error(other: sitk.Image) -> float:
        return float(np.abs(array(other).astype(float)[inside] - hu).mean())

    still, wrong = error(truth.image(0.0)), error(backwards(moved))
    right = error(moved.image(EXHALE))
    # Vessels thinner than a voxel don't survive interpolation: most of what is left is theirs.
    assert right < 0.5 * still
    assert wrong > still
    labels, expected = array(moved.labels(EXHALE))[inside], array(truth.labels(EXHALE))[inside]
    overlap = 2 * ((labels == 3) & (expected == 3)).sum() / ((labels == 3).sum() + (expected == 3).sum())
    assert overlap > 0.95


def backwards(moved: MovedImage) -> sitk.Image:
    """What a flipped direction would give."""
    points = moved.grid.points_world()
    field = moved.grid.image(moved.map_points(points, EXHALE, inverse=True) - points)
    image = moved.image(0.0)
    return sitk.Resample(
        image, image, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.0, image.GetPixelID(), True
    )


def test_moved_image_is_the_image_at_the_reference_time(phantom: Phantom) -> None:
    image, labels = phantom.image(0.0), phantom.labels(0.0)
    moved = MovedImage(image, Breathing.of_grid(phantom.grid), labels=labels, noise_hu=20.0)
    assert np.array_equal(array(moved.image(0.0)), array(image))
    assert np.array_equal(array(moved.labels(0.0)), array(labels))
    assert moved.image(0.4).GetPixelID() == image.GetPixelID()
    assert np.array_equal(array(moved.image(0.4)), array(moved.image(0.4)))


def test_two_slices_are_read_linearly() -> None:
    # Of an axis of two voxels cubic splines of ITK read memory beyond the image: NaN, or another answer each time.
    grid = Grid((9, 10, 2), (12.0, 12.0, 40.0))
    values = np.random.default_rng(0).random(grid.shape, np.float32)
    moved = MovedImage(grid.image(values), Breathing.of_grid(grid))
    source = grid.world_to_index(moved.map_points(grid.points_world(), EXHALE))
    inside = np.all((source >= 0) & (source <= np.array(grid.size) - 1), axis=-1)
    linear = scipy.ndimage.map_coordinates(values, np.moveaxis(source[..., ::-1], -1, 0), order=1)
    assert inside.sum() > 50
    assert np.abs(array(moved.image(EXHALE)) - linear)[inside].max() < 1e-4  # float32 fields


def test_moved_image_in_turned_axes_is_the_same_in_the_world(phantom: Phantom) -> None:
    image = phantom.image(0.0)
    motion = Breathing(*BOX_MM)

    def turn(image: sitk.Image) -> sitk.Image:
        return sitk.PermuteAxes(image, (1, 2, 0))[:, ::-1, :]

    first = turn(MovedImage(image, motion).image(EXHALE))
    second = MovedImage(turn(image), motion).image(EXHALE)
    # The spline's coefficients are filtered axis by axis: other order, other rounding.
    assert np.abs(array(first).astype(int) - array(second)).max() <= 1


@pytest.mark.parametrize("turned", [False, True], ids=["straight", "oblique"])
def test_moved_image_is_exact_at_a_jump(turned: bool) -> None:
    """An image of each voxel's own z shows where its voxels come from: no value lies between the two sides."""
    grid = oblique(6.0, (48, 34, 34)) if turned else Grid((60, 40, 30), (5.0,) * 3, (-147.5, -97.5, -72.5))
    motion = Sliding(*BOX_MM)
    world = grid.points_world()
    moved = MovedImage(grid.image(world[..., 2].astype(np.float32)), motion)
    source = moved.map_points(world, EXHALE)
    index = grid.world_to_index(source)
    # Splines are mirrored at the border, which a ramp isn't: eight voxels inside this has faded.
    inner = np.all((index > 8) & (index < np.array(grid.size) - 9), axis=-1)
    inner[:8], inner[-8:] = False, False
    error = np.abs(array(moved.image(EXHALE)) - source[..., 2])
    jump = np.abs(source - world).max(axis=-1) > 5
    beside = jump & (~np.roll(jump, 1, axis=2) | ~np.roll(jump, -1, axis=2))
    assert (beside & inner).sum() > 50
    assert error[inner].max() < 0.01  # float32 and what the mirror leaves; half a jump would be 2.5 and more


def test_moved_labels_are_exact_at_a_jump(phantom: Phantom) -> None:
    motion = Sliding(*BOX_MM)
    labels = phantom.labels(0.0)
    moved = MovedImage(phantom.image(0.0), motion, labels=labels)
    index = moved.grid.world_to_index(moved.map_points(moved.grid.points_world(), EXHALE))
    x, y, z = np.moveaxis(np.rint(index).astype(int).clip(0, np.array(moved.grid.size) - 1), -1, 0)
    tie = np.abs(index % 1 - 0.5).min(axis=-1) < 1e-6
    assert np.array_equal(array(moved.labels(EXHALE))[~tie], array(labels)[z, y, x][~tie])


def test_beyond_the_field_of_view_the_edge_counts() -> None:
    grid = Grid((40, 40, 20), (5.0, 5.0, 5.0), (-100.0, -100.0, -47.5))
    bright = sitk.Cast(grid.image(np.full(grid.shape, 700.0)), sitk.sitkInt16)
    moved = MovedImage(bright, Breathing(*BOX_MM))
    assert (array(moved.image(EXHALE)) == 700).all()


def test_landmarks_of_a_moved_image(phantom: Phantom) -> None:
    labels = phantom.labels(0.0)
    lung = labels == LABELS["lung"]
    moved = MovedImage(phantom.image(0.0), Breathing(*BOX_MM), mask=lung, n_landmarks=50)
    reference = moved.landmarks(0.0)
    assert reference.shape == (50, 3)
    x, y, z = np.rint(moved.grid.world_to_index(reference)).astype(int).T
    assert (array(lung)[z, y, x] == 1).all()
    assert np.abs(moved.map_points(moved.landmarks(EXHALE), EXHALE) - reference).max() < 1e-8
    assert moved.grid.contains(moved.landmarks(EXHALE)).all()
    again = MovedImage(phantom.image(0.0), Breathing(*BOX_MM), mask=lung, n_landmarks=50)
    assert np.array_equal(again.landmarks(0.0), reference)
    body = MovedImage(phantom.image(0.0), Breathing(*BOX_MM), n_landmarks=50).landmarks(0.0)
    assert (np.hypot(body[:, 0] / 165, body[:, 1] / 115) < 1).all()  # nothing in the air around


def test_bad_images_are_refused(phantom: Phantom) -> None:
    image, motion = phantom.image(0.0), Breathing(*BOX_MM)
    with pytest.raises(InputError, match="labels"):
        MovedImage(image, motion, labels=phantom.labels(0.0)[1:, :, :])
    with pytest.raises(InputError, match="none were given"):
        MovedImage(image, motion).labels(0.5)
    with pytest.raises(InputError, match="one value"):
        MovedImage(sitk.Compose(image, image), motion)
    with pytest.raises(InputError, match="3 dimensions"):
        MovedImage(image[:, :, 3], motion)
    with pytest.raises(InputError, match="mask"):
        MovedImage(image, motion, mask=phantom.labels(0.0) == 99).landmarks(0.0)


def test_a_real_ct_can_be_moved() -> None:
    path = DATA / "abdomen_ct" / "ct.nii.gz"
    if not path.exists():
        pytest.skip(f"no {path.name} of abdomen_ct in the shared data")
    image = sitk.ReadImage(str(path))
    moved = MovedImage(image, Breathing.of_grid(Grid.of(image)), n_landmarks=100)
    landmarks = moved.landmarks(EXHALE)
    assert np.abs(moved.map_points(landmarks, EXHALE) - moved.reference_landmarks).max() < 1e-8
    # Intensities at landmarks go along; in the wrong place they don't. Linear sampling of a moved
    # cubic interpolation: compared by rank of error only.
    before, after = sample(image, moved.reference_landmarks), sample(moved.image(EXHALE), landmarks)
    unmoved = sample(moved.image(EXHALE), moved.reference_landmarks)
    assert np.abs(after - before).mean() < 0.3 * np.abs(unmoved - before).mean()


def sample(image: sitk.Image, points: np.ndarray) -> np.ndarray:
    image = sitk.Cast(image, sitk.sitkFloat32)
    return np.array([image.EvaluateAtPhysicalPoint(p.tolist(), sitk.sitkLinear) for p in points])
