import numpy as np
import pytest
import SimpleITK as sitk

from stnerp.errors import InputError
from stnerp.window import MODALITY, PRESETS, Window


def image_of(array):
    return sitk.GetImageFromArray(np.asarray(array))


def ct(size=8):
    """Half air, half soft tissue, in HU."""
    array = np.full((size, size, size), 40, np.int16)
    array[: size // 2] = -1000
    return image_of(array)


def mr(low=100.0, high=900.0):
    return image_of(np.linspace(low, high, 1000).reshape(10, 10, 10))


def test_normalise_maps_the_ends_to_0_and_1_and_clips_beyond():
    window = Window(-1000, 1000)
    values = window.normalise(np.array([-3024, -1000, -500, 0, 1000, 3071], np.int16))
    assert values.dtype == np.float32
    # Exact: all are multiples of a power of two.
    np.testing.assert_array_equal(values, np.array([0, 0, 0.25, 0.5, 1, 1], np.float32))


def test_denormalise_inverts_normalise_within_the_window():
    window = Window(-160, 240)
    array = np.arange(-160, 241).reshape(1, 1, -1)
    back = window.denormalise(window.normalise(array))
    assert back.shape == array.shape
    # float32 in [0, 1] resolves 6e-8 of 400 HU; 1e-4 leaves room for the two roundings.
    np.testing.assert_allclose(back, array, atol=1e-4)


def test_window_is_exact_for_large_offsets():
    # In float32, 2^24 + 1 equals 2^24: the subtraction has to come first.
    window = Window(2**24, 2**24 + 4)
    np.testing.assert_array_equal(window.normalise(np.array([2**24 + 1])), np.array([0.25], np.float32))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_need_no_images(name):
    window = Window.of(name, [])
    assert (window.low, window.high, window.name) == (*PRESETS[name], name)


def test_pairs_and_windows_are_taken_as_they_are():
    assert Window.of([0, 5]) == Window(0.0, 5.0, "custom")
    assert Window.of(Window(1, 2, "mine")) == Window(1, 2, "mine")


def test_percentile_is_over_all_images_together():
    window = Window.of("percentile", [mr(0, 500), mr(500, 1000)])
    low, high = np.percentile(
        np.concatenate([np.linspace(0, 500, 1000), np.linspace(500, 1000, 1000)]), [0.1, 99.9]
    )
    assert (window.low, window.high, window.name) == (low, high, "percentile")


def test_percentile_of_a_large_image_is_that_of_a_sample_across_it():
    # 2.1 M voxels, brightness along x only: a sample that took one column only would see no contrast.
    array = np.broadcast_to(np.arange(128, dtype=np.int16), (128, 128, 128)).copy()
    window = Window.of("percentile", [image_of(array)])
    assert (window.low, window.high) == (0, 127)


def test_auto_recognises_ct_and_only_ct():
    assert Window.of("auto", [ct(), ct()]).name == "ct"
    assert Window.of("auto", [mr()]).name == "percentile"
    assert Window.of("auto", [ct(), mr()]).name == "percentile"
    # Signed phase images reach below anything a CT holds.
    assert Window.of("auto", [mr(-4096, 4095)]).name == "percentile"
    padded = sitk.GetArrayFromImage(ct())
    padded[0] = -3024
    assert Window.of("auto", [image_of(padded)]).name == "ct"
    # An MR with signs (inversion recovery, phase): much of it is below air, and at no one value.
    assert Window.of("auto", [mr(-2330, 3545)]).name == "percentile"
    # What says that it is no CT is none.
    phase = ct()
    phase.SetMetaData(MODALITY, "MR ")
    assert Window.of("auto", [phase]).name == "percentile"


@pytest.mark.parametrize(
    ("spec", "images", "message"),
    [
        ("lungs", [], "unknown name 'lungs'"),
        ("percentile", [], "needs images"),
        ("percentile", [image_of(np.full((4, 4, 4), 7))], "nearly all voxels equal 7"),
        ((1, 1), [], "low below high"),
        ((1, 0), [], "low below high"),
        ((float("nan"), 1), [], "finite"),
        ((1, 2, 3), [], "pair"),
        (5, [], "pair"),
    ],
)
def test_unusable_windows_are_refused(spec, images, message):
    with pytest.raises(InputError, match=message):
        Window.of(spec, images)


def test_numbers_of_numpy_become_plain():
    window = Window(*np.percentile(np.arange(11.0), [10, 90]))
    assert [type(window.low), type(window.high)] == [float, float]
    assert (window.low, window.high) == (1, 9)


def test_dict_round_trip():
    window = Window(-1000.5, 150, "lung")
    assert Window.from_dict(window.to_dict()) == window
