"""Interpolation in time without registration: exact at measured times, right around a cycle."""

import numpy as np
import pytest

from stnerp.baselines.interpolation import linear_blend, nearest_phase
from stnerp.errors import InputError

TIMES = [0.0, 1.0, 4.0]
IMAGES = [np.full((2, 3, 4), value, np.float32) for value in (0.0, 10.0, 40.0)]
both = pytest.mark.parametrize("method", [nearest_phase, linear_blend])


@both
@pytest.mark.parametrize("period", [None, 5.0])
def test_exact_at_measured_times(method, period):
    for image, time in zip(IMAGES, TIMES, strict=True):
        np.testing.assert_array_equal(method(IMAGES, TIMES, time, period), image)


@pytest.mark.parametrize(("t", "value"), [(0.4, 0), (0.6, 10), (2.4, 10), (2.6, 40), (-9, 0), (9, 40)])
def test_nearest(t, value):
    assert nearest_phase(IMAGES, TIMES, t).max() == value


def test_a_tie_goes_to_the_earlier_image():
    assert nearest_phase(IMAGES, TIMES, 2.5).max() == 10
    assert nearest_phase(IMAGES, TIMES, 4.5, period=5.0).max() == 40  # between 4 and 0 = 5


@pytest.mark.parametrize("period", [None, 1.0])
def test_a_tie_of_times_that_are_rounded(period):
    images, times = [np.full((1, 1, 1), k) for k in range(10)], [k / 10 for k in range(10)]
    ties = range(9 if period is None else 10)
    assert [nearest_phase(images, times, (k + 0.5) / 10, period).item() for k in ties] == list(ties)


@pytest.mark.parametrize(("t", "value"), [(0.25, 2.5), (3.0, 30), (-9, 0), (9, 40)])
def test_blend(t, value):
    blend = linear_blend(IMAGES, TIMES, t)
    np.testing.assert_allclose(blend, value)
    assert blend.dtype == np.float32


@pytest.mark.parametrize("cycle", [-10.0, 0.0, 5.0])
@pytest.mark.parametrize(("t", "nearest", "blend"), [(4.25, 40, 30), (4.75, 0, 10), (0.25, 0, 2.5), (3.0, 40, 30)])
def test_a_cycle_wraps_around(t, nearest, blend, cycle):
    assert nearest_phase(IMAGES, TIMES, t + cycle, period=5.0).max() == nearest
    np.testing.assert_allclose(linear_blend(IMAGES, TIMES, t + cycle, period=5.0), blend)


def test_a_cycle_whose_first_image_is_not_at_zero():
    # Times 1 and 3 of a cycle of 5: at 0.5, three quarters of the way from 3 - 5 = -2 to 1 plus a bit.
    images = [np.zeros((1, 1, 1)), np.ones((1, 1, 1))]
    np.testing.assert_allclose(linear_blend(images, [1.0, 3.0], 0.5, period=5.0), 1 - 2.5 / 3)
    np.testing.assert_allclose(linear_blend(images, [1.0, 3.0], 4.0, period=5.0), 1 - 1 / 3)


@both
@pytest.mark.parametrize("period", [None, 5.0])
def test_the_order_of_images_does_not_matter(method, period):
    order = [2, 0, 1]
    shuffled = [IMAGES[i] for i in order], [TIMES[i] for i in order]
    for t in (-1.0, 0.3, 1.7, 4.9):
        np.testing.assert_array_equal(method(*shuffled, t, period), method(IMAGES, TIMES, t, period))


@both
@pytest.mark.parametrize("period", [None, 5.0])
def test_a_single_image_serves_every_time(method, period):
    np.testing.assert_array_equal(method(IMAGES[1:2], [2.0], 3.3, period), IMAGES[1])


def test_integers_blend_to_fractions():
    images = [np.zeros((1, 1, 1), np.int16), np.ones((1, 1, 1), np.int16)]
    assert linear_blend(images, [0, 1], 0.25).item() == 0.25


@both
@pytest.mark.parametrize(
    ("images", "times", "t", "period", "message"),
    [
        ([], [], 0.0, None, "images"),
        (IMAGES, TIMES[:2], 0.0, None, "times"),
        (IMAGES[:2], [1.0, 1.0], 0.0, None, "one time"),
        (IMAGES[:2], [0.0, 5.0], 0.0, 5.0, "one time"),
        (IMAGES[:2], [0.0, np.nan], 0.0, None, "finite"),
        (IMAGES[:2], [0.0, 1.0], np.inf, None, "finite"),
        (IMAGES[:2], [0.0, 1.0], 0.0, 0.0, "period"),
        ([IMAGES[0], IMAGES[0][1:]], [0.0, 1.0], 0.0, None, "shapes"),
    ],
)
def test_what_is_refused(method, images, times, t, period, message):
    with pytest.raises(InputError, match=message):
        method(images, times, t, period)
