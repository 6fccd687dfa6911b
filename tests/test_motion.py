"""Known motions: identity, inverse, no folding, and the directions that anatomy asks for."""

from __future__ import annotations

import numpy as np
import pytest

from stnerp.errors import InputError
from stnerp.geometry import Grid
from stnerp.motion import Breathing, Longitudinal, Motion, Sliding, smooth_step, solve_monotone, world_box

CENTRE, HALF = (10.0, -5.0, 20.0), (180.0, 140.0, 90.0)
TUMOUR = (-60.0, 20.0, 15.0)

MOTIONS: dict[str, Motion] = {
    "breathing": Breathing(CENTRE, HALF),
    "breathing from exhale": Breathing(CENTRE, HALF, reference_time=0.5),
    "breathing in seconds, deep": Breathing(
        CENTRE,
        HALF,
        period=4.2,
        reference_time=1.3,
        amplitude_si_mm=45,
        amplitude_ap_mm=25,
        amplitude_lr_mm=15,
    ),
    "sliding": Sliding(CENTRE, HALF),
    "sliding from exhale, deep": Sliding(CENTRE, HALF, period=4.0, reference_time=2.2, amplitude_si_mm=45),
    "longitudinal": Longitudinal(CENTRE, HALF, TUMOUR),
    "longitudinal from the middle": Longitudinal(CENTRE, HALF, TUMOUR, reference_time=14.0, tumour_scale=0.4),
    "longitudinal, growing": Longitudinal(CENTRE, HALF, TUMOUR, tumour_scale=1.3, shift_mm=8.0),
}


@pytest.fixture(params=MOTIONS.values(), ids=MOTIONS.keys())
def motion(request: pytest.FixtureRequest) -> Motion:
    return request.param


def some_points(count: int = 2000) -> np.ndarray:
    """Points in and around the box, the tumour's centre among them."""
    points = np.random.default_rng(0).uniform(-1.3, 1.3, (count, 3)) * HALF + CENTRE
    points[0] = TUMOUR
    return points


def test_identity_exactly_at_reference_time(motion: Motion) -> None:
    points = some_points()
    assert np.array_equal(motion.reference_to_target(points, motion.reference_time), points)
    assert np.array_equal(motion.target_to_reference(points, motion.reference_time), points)
    if motion.period:
        # 4 periods are exact in floating point for the reference times above only up to rounding of t.
        again = motion.reference_to_target(points, motion.reference_time + 4 * motion.period)
        assert np.abs(again - points).max() < 1e-9


def test_maps_undo_each_other(motion: Motion) -> None:
    points = some_points()
    moved_at_all = 0.0
    for t in motion.times(7):
        moved = motion.reference_to_target(points, t)
        # Newton stops at 1e-10 mm and converges quadratically; composing three steps loses little.
        assert np.abs(motion.target_to_reference(moved, t) - points).max() < 1e-8
        back = motion.target_to_reference(points, t)
        assert np.abs(motion.reference_to_target(back, t) - points).max() < 1e-8
        moved_at_all = max(moved_at_all, np.abs(moved - points).max())
    assert moved_at_all > 3


def test_never_folds(motion: Motion) -> None:
    grid = Grid((37, 29, 19), (10.0, 10.0, 10.0), tuple(np.asarray(CENTRE) - HALF))
    # Around the tumour too, where the contraction is finer than 10 mm.
    close = Grid((31, 31, 31), (3.0, 3.0, 3.0), tuple(np.asarray(TUMOUR) - 45))
    for points in (grid.points_world(), close.points_world()):
        for t in motion.times(5):
            for mapping in (motion.reference_to_target, motion.target_to_reference):
                assert jacobian(mapping, points, t).min() > 0.02


def jacobian(mapping: object, points: np.ndarray, t: float, h: float = 1e-3) -> np.ndarray:
    """Determinant by central differences, (...,)."""
    columns = [(mapping(points + h * e, t) - mapping(points - h * e, t)) / (2 * h) for e in np.eye(3)]
    return np.linalg.det(np.stack(columns, axis=-1))


@pytest.mark.parametrize(
    "settings", [{"amplitude_si_mm": 60.0}, {"amplitude_ap_mm": 110.0}, {"amplitude_lr_mm": -90.0}]
)
def test_an_amplitude_that_folds_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        Breathing(CENTRE, HALF, **settings)


def test_sliding_that_folds_or_has_no_chest_is_refused() -> None:
    with pytest.raises(InputError, match="amplitude_si_mm"):
        Sliding(CENTRE, HALF, amplitude_si_mm=60.0)
    with pytest.raises(InputError, match="chest"):
        Sliding(CENTRE, HALF, chest=(0.7, 0.0))
    with pytest.raises(InputError, match="sliding: period"):
        Sliding(CENTRE, HALF, period=-1.0)


def test_longitudinal_amplitudes_that_fold_are_refused() -> None:
    with pytest.raises(InputError, match="tumour_scale"):
        Longitudinal(CENTRE, HALF, TUMOUR, tumour_scale=3.0)
    with pytest.raises(InputError, match="tumour_scale"):
        Longitudinal(CENTRE, HALF, TUMOUR, tumour_scale=0.05)
    with pytest.raises(InputError, match="shift_mm"):
        Longitudinal(CENTRE, HALF, TUMOUR, shift_mm=120.0)


def test_the_folding_amplitude_really_folds() -> None:
    """The refusal is about folding: just past it, the shear's own slope turns negative."""
    up = Breathing(CENTRE, HALF).steps[0]
    z = CENTRE[2] + HALF[2] * np.linspace(-1, 1, 2001)
    axis = np.stack([np.full_like(z, CENTRE[0] - 60), np.full_like(z, CENTRE[1]), z], axis=-1)
    assert np.diff(up.forward(axis, 45.0)[:, 2]).min() > 0
    assert np.diff(up.forward(axis, 65.0)[:, 2]).min() < 0


@pytest.mark.parametrize(
    "settings",
    [
        {"period": 0.0},
        {"hysteresis": 0.7},
        {"reference_time": float("nan")},
        {"half_size_mm": (1.0, 0.0, 1.0)},
        {"centre_mm": (0.0, 0.0)},
    ],
)
def test_bad_arguments_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Breathing(**{"centre_mm": CENTRE, "half_size_mm": HALF, **settings})


def test_bad_longitudinal_arguments_and_points_are_refused() -> None:
    with pytest.raises(InputError, match="duration"):
        Longitudinal(CENTRE, HALF, TUMOUR, duration=0.0)
    with pytest.raises(InputError, match="tumour_centre_mm"):
        Longitudinal(CENTRE, HALF, (0.0, float("nan"), 0.0))
    with pytest.raises(InputError, match="shape"):
        MOTIONS["breathing"].reference_to_target(np.zeros((3, 2)), 0.5)
    with pytest.raises(InputError, match="t:"):
        MOTIONS["breathing"].reference_to_target(np.zeros((2, 3)), float("inf"))


# -- anatomy


def lung_point(u: tuple[float, float, float]) -> np.ndarray:
    return np.asarray(CENTRE) + np.asarray(u) * HALF


def test_diaphragm_goes_up_on_exhale_and_apex_spine_and_wall_stay() -> None:
    breathing = Breathing(CENTRE, HALF)

    def lift(*u: float) -> float:
        return float((breathing.reference_to_target(lung_point(u), 0.55) - lung_point(u))[2])

    assert lift(-0.35, 0.0, -0.25) == pytest.approx(15, abs=0.1)  # flat top of the profile
    assert lift(0.35, 0.0, -0.25) == pytest.approx(15, abs=0.1)
    assert 5 < lift(-0.35, 0.0, 0.2) < 13
    assert abs(lift(-0.35, 0.0, 0.96)) < 0.01
    assert abs(lift(0.0, 0.45, -0.25)) < 0.01  # spine
    assert abs(lift(0.93, 0.0, -0.25)) < 0.01  # body wall


def test_chest_wall_goes_back_and_sides_go_in_on_exhale() -> None:
    breathing = Breathing(CENTRE, HALF, hysteresis=0.0)

    def moved(*u: float) -> np.ndarray:
        return breathing.reference_to_target(lung_point(u), 0.55) - lung_point(u)

    assert moved(0.0, -0.8, -0.25)[1] == pytest.approx(5, abs=0.1)  # back is +y
    assert abs(moved(0.0, 0.7, -0.25)[1]) < 0.01
    assert moved(0.8, 0.0, -0.25)[0] == pytest.approx(-2, abs=0.1)  # the left side moves right
    assert moved(-0.8, 0.0, -0.25)[0] == pytest.approx(2, abs=0.1)


# -- sliding


def on_the_mantle(sliding: Sliding, factor: float, count: int = 100) -> np.ndarray:
    """Points around the chest near the diaphragm's level, at `factor` times the mantle's radius.

    Those behind, beside the spine's column, are left out.
    """
    angle, z = np.random.default_rng(2).uniform((0, -40), (2 * np.pi, 40), (count, 2)).T
    (x, y), (a, b) = sliding.mantle.centre_mm, sliding.mantle.half_axes_mm
    points = np.stack([x + factor * a * np.cos(angle), y + factor * b * np.sin(angle), z + CENTRE[2]], axis=-1)
    return points[np.sin(angle) < 0.8]


@pytest.mark.parametrize("t", [0.2, 0.55, 0.9])
def test_displacement_jumps_at_the_mantle_along_it(t: float) -> None:
    sliding = Sliding(CENTRE, HALF)
    # A nanometre on either side: any blend of the two sides, however narrow, would show.
    inside, outside = on_the_mantle(sliding, 1 - 1e-8), on_the_mantle(sliding, 1 + 1e-8)
    for mapping in (sliding.reference_to_target, sliding.target_to_reference):
        jump = (mapping(inside, t) - inside) - (mapping(outside, t) - outside)
        assert not jump[:, :2].any()  # along z, and so along the mantle
        assert np.array_equal(mapping(outside, t), outside)
        assert (np.abs(jump[:, 2]) > 0.3 * sliding.amplitudes(t)[0]).all()
    lift = (sliding.reference_to_target(inside, t) - inside)[:, 2]
    assert np.allclose(lift, sliding.amplitudes(t)[0] * sliding.up(inside[:, 2])[0])


def test_the_spine_is_not_part_of_the_content() -> None:
    sliding = Sliding(CENTRE, HALF)
    (x, y), (_, b) = sliding.spine.centre_mm, sliding.spine.half_axes_mm
    front = np.array([[x, y - b + d, CENTRE[2]] for d in (-1e-6, 1e-6)])
    moved = (sliding.reference_to_target(front, 0.55) - front)[:, 2]
    assert moved[0] > 10
    assert moved[1] == 0


def test_nothing_outside_moves_and_content_stays_content() -> None:
    sliding = Sliding(CENTRE, HALF, amplitude_si_mm=45)
    points = some_points()
    content = sliding.slides(points)
    assert 0.1 < content.mean() < 0.3  # π 0.72 · 0.59 / 2.6² of the box of points, less the spine
    for t in sliding.times(5)[1:]:
        for mapping in (sliding.reference_to_target, sliding.target_to_reference):
            moved = mapping(points, t)
            assert np.array_equal(moved[~content], points[~content])
            assert np.array_equal(sliding.slides(moved), content)
            assert np.array_equal(moved[:, :2], points[:, :2])


def test_volume_of_the_sliding_content() -> None:
    """Lungs empty below a diaphragm that rises; the column as a whole keeps its volume."""
    sliding = Sliding(CENTRE, HALF)
    z = CENTRE[2] + HALF[2] * np.linspace(-2, 2, 20_001)
    line = np.stack([np.full_like(z, CENTRE[0] - 70), np.full_like(z, CENTRE[1]), z], axis=-1)
    volume = jacobian(sliding.reference_to_target, line, 0.55)
    expected = 1 + sliding.amplitudes(0.55)[0] * sliding.up(z)[1]
    assert np.abs(volume - expected).max() < 1e-6  # central differences of 1 µm
    level = CENTRE[2] + sliding.LEVEL * HALF[2]
    assert (volume[z > level] < 1 + 1e-9).all()  # squeezed above the diaphragm, stretched below
    assert (volume[z < level] > 1 - 1e-9).all()
    assert volume.min() == pytest.approx(1 - 15 * 15 / 8 / (1.2 * HALF[2]), abs=1e-3)
    # Steps of 18 µm through a smooth integrand that is 1 at both ends.
    assert volume[1:].sum() * (z[1] - z[0]) == pytest.approx(z[-1] - z[0], abs=1e-4)


def test_breath_starts_at_inhale_rests_at_exhale_and_inhales_faster() -> None:
    breathing = Breathing(CENTRE, HALF)
    phases = np.linspace(0, 1, 1001)
    out = np.array([breathing.exhaled(p) for p in phases])
    assert out[0] == 0
    assert out[-1] == pytest.approx(0, abs=1e-12)
    assert out.max() == pytest.approx(1, abs=1e-6)
    peak = phases[out.argmax()]
    assert 0.5 < peak < 0.65  # exhaling takes longer
    assert -np.diff(out).min() > 1.2 * np.diff(out).max()  # inhaling is faster
    assert (out > 0.9).mean() > 0.3  # rests at exhale: a sine spends 0.2 there


def path(breathing: Breathing) -> np.ndarray:
    point = lung_point((-0.3, -0.3, -0.2))
    return np.array([breathing.reference_to_target(point, t) for t in np.linspace(0, 1, 401)])


def furthest_between_ways(points: np.ndarray) -> float:
    """Largest distance from a point of the way back to the nearest of the way out, mm."""
    turn = points[:, 2].argmax()
    out, back = points[: turn + 1], points[turn:]
    return float(np.linalg.norm(out[:, None] - back[None], axis=-1).min(axis=0).max())


def test_hysteresis_takes_another_way_back() -> None:
    assert furthest_between_ways(path(Breathing(CENTRE, HALF))) > 1.0
    # The way out has about 200 samples over 15 mm, at most 0.15 mm apart: half of that, and some.
    assert furthest_between_ways(path(Breathing(CENTRE, HALF, hysteresis=0.0))) < 0.1


def test_reference_time_only_changes_the_reference() -> None:
    """From time a to b by any reference: ψ_b ∘ ψ_a⁻¹ doesn't depend on it."""
    points = some_points(200)
    answers = [
        m.reference_to_target(m.target_to_reference(points, 0.2), 0.6)
        for m in (Breathing(CENTRE, HALF, reference_time=r) for r in (0.0, 0.3, 0.5))
    ]
    assert np.abs(answers[0] - answers[1]).max() < 1e-8
    assert np.abs(answers[0] - answers[2]).max() < 1e-8


def test_tumour_shrinks_to_its_scale_and_nothing_happens_outside_the_therapy() -> None:
    still = Longitudinal(CENTRE, HALF, TUMOUR, tumour_radius_mm=12.0, tumour_scale=0.7, shift_mm=0.0)
    sphere = np.random.default_rng(1).normal(size=(100, 3))
    sphere *= 12.0 / np.linalg.norm(sphere, axis=-1, keepdims=True)

    def radius(t: float) -> np.ndarray:
        return np.linalg.norm(still.reference_to_target(sphere + TUMOUR, t) - TUMOUR, axis=-1)

    assert np.allclose(radius(42.0), 0.7 * 12.0)
    assert np.allclose(radius(100.0), 0.7 * 12.0)
    assert np.allclose(radius(-5.0), 12.0)
    assert np.allclose(radius(21.0), 12 - 0.75 * 3.6)  # early: three quarters done half way through
    far = np.add(TUMOUR, (36.1, 0, 0))
    assert np.array_equal(still.reference_to_target(far, 42.0), far)


def test_tissue_shifts_by_a_few_mm() -> None:
    shift = Longitudinal(CENTRE, HALF, TUMOUR, tumour_scale=1.0, shift_mm=4.0)
    points = some_points()
    moved = np.abs(shift.reference_to_target(points, 42.0) - points).max(axis=0)
    assert (moved <= 4.0).all()
    assert (moved > 2.5).all()


# -- parts


def test_times() -> None:
    assert Breathing(CENTRE, HALF, period=4.0).times(4) == [0, 1, 2, 3]
    assert Breathing(CENTRE, HALF).times()[:4] == [0, 0.1, 0.2, 0.3]
    assert Sliding(CENTRE, HALF, period=4.0).times(4) == [0, 1, 2, 3]
    assert Longitudinal(CENTRE, HALF, TUMOUR, start=2.0, duration=30.0).times(4) == [2, 12, 22, 32]


def test_any_layout_of_points_gives_the_same_answer_and_is_left_alone() -> None:
    breathing = MOTIONS["breathing"]
    points = some_points(24)
    expected = breathing.reference_to_target(points, 0.4)
    before = points.copy()
    fortran = np.asfortranarray(points)
    assert np.array_equal(breathing.reference_to_target(fortran, 0.4), expected)
    block = breathing.reference_to_target(points.reshape(2, 3, 4, 3), 0.4)
    assert np.array_equal(block.reshape(-1, 3), expected)
    assert np.array_equal(breathing.reference_to_target(points[3], 0.4), expected[3])
    assert breathing.reference_to_target(np.zeros((0, 3)), 0.4).shape == (0, 3)
    assert np.array_equal(points, before)


def test_chunks_make_no_difference() -> None:
    points = some_points(40_000)
    whole = MOTIONS["breathing"].target_to_reference(points, 0.4)
    assert np.allclose(whole[-5:], MOTIONS["breathing"].target_to_reference(points[-5:], 0.4), atol=1e-9)


def test_world_box_of_a_turned_grid() -> None:
    """A quarter turn about z swaps x and y; the box goes to the voxels' outer faces."""
    turned = Grid((10, 20, 30), (10.0, 12.0, 5.0), (5.0, 0.0, 0.0), (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    centre, half = world_box(turned)
    assert half == pytest.approx((120.0, 50.0, 75.0))
    assert centre == pytest.approx(tuple(turned.centre_mm))
    assert Breathing.of_grid(turned, amplitude_si_mm=5.0).half_size_mm == half
    assert Longitudinal.of_grid(turned, (0.0, 0.0, 0.0), shift_mm=0.1).centre_mm == centre
    sliding = Sliding.of_grid(turned, amplitude_si_mm=5.0, chest=(0.5, 0.4))
    assert sliding.mantle.centre_mm == centre[:2]
    assert sliding.mantle.half_axes_mm == pytest.approx((60.0, 20.0))


def test_smooth_step_and_its_slope() -> None:
    s = np.linspace(-0.5, 1.5, 2001)
    value, slope = smooth_step(s)
    assert value[0] == 0
    assert value[-1] == 1
    assert slope.max() == pytest.approx(15 / 8)
    assert np.abs(np.gradient(value, s) - slope)[1:-1].max() < 1e-5  # second differences of 1e-3 steps


def test_solver_converges_where_newton_alone_would_not() -> None:
    """x + 0.95 sin x has slopes from 0.05 to 1.95."""
    x = np.linspace(-20, 20, 5001)
    found = solve_monotone(lambda x: (0.95 * np.sin(x), 0.95 * np.cos(x)), x + 0.95 * np.sin(x), np.ones_like(x))
    # A residual of 1e-10 over a slope of 0.05.
    assert np.abs(found - x).max() < 1e-8
