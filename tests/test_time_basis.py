"""Functions of time: zero at the reference, one at their knot, and SciPy's splines between."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from stnerp.time_basis import MAX_HARMONICS, MAX_KNOTS, Gaps, TimeBasis, index_at

IRREGULAR = (0.0, 1.5, 2.0, 7.0, 7.5, 12.0)


@pytest.mark.parametrize("reference", IRREGULAR)
def test_zero_at_the_reference_time_exactly(reference: float) -> None:
    assert np.array_equal(TimeBasis(IRREGULAR, reference)(reference), np.zeros(5))
    periodic = TimeBasis(IRREGULAR, reference, period=13.0)
    assert np.array_equal(periodic(reference), np.zeros(periodic.size))


@pytest.mark.parametrize("count", [2, 3, 10, 100])
@pytest.mark.parametrize("period", [None, 1.0])
def test_any_number_of_times(count: int, period: float | None) -> None:
    times = tuple(float(t) for t in np.linspace(0, 0.9, count))
    for reference in (times[0], times[count // 2], times[-1]):
        basis = TimeBasis(times, reference, period)
        values = np.array([basis(t) for t in np.linspace(-0.5, 1.5, 21)])
        assert values.shape == (21, basis.size)
        assert np.isfinite(values).all()
        assert not basis(reference).any()
        # No function is left out: each moves somewhere.
        assert (np.abs(values).max(axis=0) > 0.1).all()


# -- periodic


def test_periodic_in_its_period_and_no_shorter_one() -> None:
    basis = TimeBasis(tuple(np.arange(10) * 0.4), 0.8, period=4.0)
    assert basis.size == 2 * MAX_HARMONICS
    for t in (-1.3, 0.0, 0.7, 3.9):
        # cos and sin of angles up to 3 × 2π × 3: rounding of 1e-15 each, times the angle.
        assert np.abs(basis(t) - basis(t + 4)).max() < 1e-12
        assert np.abs(basis(t) - basis(t - 8)).max() < 1e-12
        assert np.abs(basis(t) - basis(t + 2)).max() > 0.1


def test_periodic_values_are_harmonics() -> None:
    basis = TimeBasis((0.0, 1.0, 2.0, 3.0, 4.0), 1.0, period=5.0)
    theta = 2 * np.pi * (2.3 - 1.0) / 5.0
    expected = [np.cos(theta) - 1, np.cos(2 * theta) - 1, np.sin(theta), np.sin(2 * theta)]
    assert np.abs(basis(2.3) - expected).max() < 1e-14


def test_no_more_harmonics_than_phases_determine() -> None:
    def harmonics(count: int) -> int:
        return TimeBasis(tuple(np.arange(count) / count), 0.0, 1.0).harmonics

    # 2h functions vanish at the reference; the other count - 1 phases determine as many.
    assert [harmonics(n) for n in (2, 3, 4, 5, 6, 7, 8, 50)] == [1, 1, 1, 2, 2, 3, 3, 3]


# -- splines


@pytest.mark.parametrize("times", [(3.0, 10.0), (0.0, 1.0, 5.0), IRREGULAR])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_one_at_their_own_knot_and_zero_at_the_others(times: tuple[float, ...], place: int) -> None:
    basis = TimeBasis(times, times[place])
    values = np.array([basis(t) for t in times])
    expected = np.delete(np.eye(len(times)), range(len(times))[place], axis=1)
    assert np.abs(values - expected).max() < 1e-14
    # Hence any motion at the measured times can be met exactly.


@pytest.mark.parametrize("times", [(0.0, 1.0, 5.0), IRREGULAR])
def test_between_knots_is_scipy_s_natural_spline(times: tuple[float, ...]) -> None:
    basis = TimeBasis(times, times[1])
    splines = [CubicSpline(times, row, bc_type="natural") for row in np.delete(np.eye(len(times)), 1, axis=0)]
    for t in np.linspace(times[0], times[-1], 83):
        assert np.abs(basis(t) - [spline(t) for spline in splines]).max() < 1e-12


def test_two_times_are_joined_by_a_line() -> None:
    basis = TimeBasis((3.0, 7.0), 3.0)
    assert [float(basis(t)[0]) for t in (-1.0, 3.0, 4.0, 7.0, 11.0)] == [-1.0, 0.0, 0.25, 1.0, 2.0]


def test_straight_and_smooth_beyond_the_measured_range() -> None:
    basis = TimeBasis(IRREGULAR, 2.0)
    for edge, away in ((0.0, -1.0), (12.0, 1.0)):
        at = np.array([basis(edge + away * d) for d in (0.0, 1.0, 2.0, 5.0)])
        slope = at[1] - at[0]
        assert np.abs(at[2] - at[0] - 2 * slope).max() < 1e-12
        assert np.abs(at[3] - at[0] - 5 * slope).max() < 1e-12
        # No kink: the slope just inside is the same, up to the spline's curvature, h f''.
        inside = (basis(edge) - basis(edge - away * 1e-5)) / 1e-5
        assert np.abs(inside - slope).max() < 1e-4


def test_many_times_share_few_knots() -> None:
    times = tuple(float(t) for t in range(100))
    basis = TimeBasis(times, 37.0)
    assert {0.0, 37.0, 99.0} <= set(basis.knots.tolist())
    assert len(basis.knots) <= MAX_KNOTS + 1
    assert basis.size == len(basis.knots) - 1
    assert (np.diff(basis.knots) > 0).all()
    # Evenly: with nine knots over 99, gaps of about 12, and one of them halved by the reference.
    assert np.diff(basis.knots).max() <= 13
    assert TimeBasis(times, 99.0).size == MAX_KNOTS - 1


def test_which_measured_time_it_is() -> None:
    times = (0.0, 0.3, 0.6)
    assert [index_at(times, t) for t in (0.0, 3 * 0.1, 0.6, 0.31, 1.3)] == [0, 1, 2, None, None]
    assert [index_at(times, t, 1.0) for t in (1.3, -0.7, 5.6, 7.0, 1.31, 0.95)] == [1, 1, 2, 0, None, None]
    assert index_at((1e6,), 1e6 + 1e-4) == 0  # rounding of that size of numbers
    assert index_at((1e6,), 1e6 + 1e-2) is None
    # Seconds since 1970, half a second apart: what rounds there is a millionth of a second.
    epoch = [1735689600 + 0.5 * i for i in range(4)]
    assert [index_at(epoch, t) for t in epoch] == [0, 1, 2, 3]
    assert [index_at(epoch, t + 1e-6, period=2.0) for t in epoch] == [0, 1, 2, 3]
    assert index_at(epoch, epoch[1] + 0.1) is None
    assert index_at((), 1.0) is None
    # As people round: 0.3333 for a third.
    assert [index_at((1 / 3,), t, 1.0, within=1e-4) for t in (0.3333, 1.3333, 0.333)] == [0, 0, None]


def test_measured_range() -> None:
    assert TimeBasis(IRREGULAR, 2.0).measured_range == (0.0, 12.0)


# -- recombined for a fit


@pytest.mark.parametrize("period", [None, 13.0])
def test_mixed_functions_are_orthogonal_at_the_measured_times(period: float | None) -> None:
    basis = TimeBasis(tuple(float(t) for t in range(9)), 2.0, period=period and 9.0)
    values = np.stack([basis(t) for t in basis.times if t != 2.0]) @ basis.mixing
    size = np.ones(basis.size)
    if period is not None:  # the k-th harmonics are 1/k² as large
        size = 1 / np.tile([1.0, 4.0, 9.0], 2)
    products = values.T @ values / len(values)
    # The smallest eigenvalues of nine even phases are above the floor of 5 %, so that nothing is cut.
    assert np.abs(products - np.diag(size**2)).max() < 1e-9


def test_what_the_times_do_not_determine_is_not_blown_up() -> None:
    # One target and two functions: the second direction has no data at all.
    basis = TimeBasis((0.0, 3.0), 0.0, period=10.0)
    assert basis.size == 2
    seen = float(np.linalg.norm(basis(3.0)))
    assert np.linalg.norm(basis.mixing, 2) == pytest.approx(1 / (seen * np.sqrt(0.05)))


def test_gaps_stay_apart() -> None:
    assert np.array_equal(Gaps(IRREGULAR, 2.0).mixing, np.eye(5))
