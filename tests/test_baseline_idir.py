"""IDIR and its cycle-consistent sibling: derivatives, penalties and answers against exact ones."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from stnerp.baselines.cycle_idir import CycleRegistration, balanced_jacobian_penalty, consensus, cycle_idir
from stnerp.baselines.idir import (
    PAIRS,
    AlignedPair,
    Siren,
    bending_penalty,
    determinant,
    hyperelastic_penalty,
    idir,
    jacobian_penalty,
    mapped,
    published_bending_penalty,
    published_cube,
)
from stnerp.errors import FitError, InputError
from stnerp.geometry import Grid, apply_affine, cube_points
from stnerp.window import Window

UNIT = Window(0.0, 1.0)
CPU = torch.device("cpu")


@pytest.fixture
def network() -> Siren:
    torch.manual_seed(0)
    return Siren((3, 16, 16, 3), omega=8.0).double()


@pytest.fixture
def points() -> torch.Tensor:
    return torch.rand(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def affine_gradient(matrix: torch.Tensor, count: int = 5) -> torch.Tensor:
    """∂u/∂x (3, N, 3) of φ(x) = matrix x, the same at every point."""
    return (matrix - torch.eye(3, dtype=matrix.dtype)).T[:, None, :].expand(3, count, 3)


# -- derivatives


def test_derivatives_are_those_of_autograd(network: Siren, points: torch.Tensor) -> None:
    u, (du, ddu) = network.with_derivatives(points, second=True)
    assert torch.equal(u, network(points))
    for n in range(4):
        by_autograd = torch.autograd.functional.jacobian(network, points[n])  # [i, j] = ∂uᵢ/∂xⱼ
        assert torch.allclose(du[:, n], by_autograd.T, rtol=1e-12, atol=1e-12)
        for i in range(3):
            hessian = torch.autograd.functional.hessian(lambda x, i=i: network(x)[i], points[n])
            expected = torch.stack([hessian[j, k] for j, k in PAIRS.tolist()])
            assert torch.allclose(ddu[:, n, i], expected, rtol=1e-10, atol=1e-10)


def test_derivatives_are_those_of_finite_differences(network: Siren, points: torch.Tensor) -> None:
    h = 1e-4
    _, (du, ddu) = network.with_derivatives(points, second=True)
    for j, step in enumerate(h * torch.eye(3, dtype=torch.float64)):
        ahead, behind = network(points + step), network(points - step)
        # Central differences: h²/6 times third derivatives of a few hundred at most.
        assert torch.allclose(du[j], (ahead - behind) / (2 * h), atol=1e-5)
        assert torch.allclose(ddu[j], (ahead - 2 * network(points) + behind) / h**2, atol=1e-3)
    assert ddu.abs().mean() > 0.1


def test_penalties_can_be_trained_on(network: Siren, points: torch.Tensor) -> None:
    """The gradient of a penalty by the weights, against finite differences in one weight."""
    weight = network.linears[1].weight

    def loss() -> torch.Tensor:
        _, (du, ddu) = network.with_derivatives(points, second=True)
        return jacobian_penalty(du) + hyperelastic_penalty(du) + bending_penalty(ddu)

    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight[3, 5] += 1e-6
        ahead = loss()
        weight[3, 5] -= 2e-6
        behind = loss()
    assert gradient[3, 5].item() == pytest.approx(((ahead - behind) / 2e-6).item(), rel=1e-5)


# -- penalties


def test_determinant_of_affine_maps() -> None:
    matrix = torch.tensor([[1.1, 0.2, -0.3], [0.0, 0.9, 0.1], [0.4, -0.2, 1.3]], dtype=torch.float64)
    for m in (matrix, -matrix, matrix[[1, 0, 2]]):
        assert torch.allclose(determinant(affine_gradient(m)), torch.linalg.det(m))


def test_penalties_vanish_for_rotations_and_grow_with_scale() -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    rotation = affine_gradient(torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64))
    assert jacobian_penalty(rotation).item() == pytest.approx(0, abs=1e-12)
    assert balanced_jacobian_penalty(rotation).item() == pytest.approx(0, abs=1e-12)
    # Lengths count by ∇u, so a rotation isn't free of them; areas and volumes are kept.
    assert hyperelastic_penalty(rotation).item() == pytest.approx(0.5 * rotation[:, 0].square().sum().item())

    scale = affine_gradient(1.2 * torch.eye(3, dtype=torch.float64))
    volume = 1.2**3
    assert jacobian_penalty(scale).item() == pytest.approx(volume - 1)
    assert balanced_jacobian_penalty(scale).item() == pytest.approx(volume + 1 / volume - 2)
    length, area = 0.5 * 3 * 0.2**2, 3 * (1.2**4 - 1) ** 2
    assert hyperelastic_penalty(scale).item() == pytest.approx(length + area + (volume - 1) ** 4 / volume**2)
    # Shrinking makes no area: that term is one-sided.
    small = affine_gradient(0.8 * torch.eye(3, dtype=torch.float64))
    assert hyperelastic_penalty(small).item() == pytest.approx(0.5 * 3 * 0.2**2 + (0.512 - 1) ** 4 / 0.512**2)


def test_balanced_penalty_counts_halves_like_doubles_and_is_clipped() -> None:
    double = balanced_jacobian_penalty(affine_gradient(torch.diag(torch.tensor([2.0, 1, 1]))))
    half = balanced_jacobian_penalty(affine_gradient(torch.diag(torch.tensor([0.5, 1, 1]))))
    assert double == half == 0.5
    folded = affine_gradient(torch.diag(torch.tensor([-3.0, 1, 1])))
    assert balanced_jacobian_penalty(folded).item() == pytest.approx(0.1 + 10 - 2)


def test_bending_penalty_and_the_published_one() -> None:
    """u = (y z, x² / 2, 3 x y): the only second derivatives are 1 (yz), 1 (xx) and 3 (xy)."""
    ddu = torch.zeros(6, 7, 3)
    ddu[5, :, 0], ddu[0, :, 1], ddu[3, :, 2] = 1, 1, 3
    assert bending_penalty(ddu).item() == pytest.approx((2 * 1 + 1 + 2 * 9) / 3)
    assert published_bending_penalty(ddu).item() == pytest.approx((2 * 1 + 1 + 9) / 3 / 7)
    # Twice the points: the same field, the same penalty; half of the published one.
    twice = torch.cat([ddu, ddu], dim=1)
    assert bending_penalty(twice) == bending_penalty(ddu)
    assert published_bending_penalty(twice).item() == pytest.approx(published_bending_penalty(ddu).item() / 2)


# -- coordinates


def test_published_cube_is_off_by_a_voxel_at_the_start_and_right_at_the_end(oblique_grid: Grid) -> None:
    index = np.array([[0.0, 0, 0], [3, 4, 5], np.array(oblique_grid.size) - 1.0])
    world = oblique_grid.index_to_world(index)
    n = np.array(oblique_grid.size)
    assert published_cube(oblique_grid).world_to_cube(world) == pytest.approx(2 * (index + 1) / n - 1)
    assert oblique_grid.world_to_cube(world) == pytest.approx(2 * index / (n - 1) - 1)
    read = oblique_grid.world_to_index(
        oblique_grid.cube_to_world(published_cube(oblique_grid).world_to_cube(world))
    )
    assert (read - index)[[0, -1]] == pytest.approx(np.stack([1 - 1 / n, 0 * n]), abs=1e-9)


def test_both_images_are_read_exactly_where_they_are(oblique_grid: Grid) -> None:
    """Images that are linear in the world, on two grids, seen through an affine map between them."""
    other = Grid((17, 21, 9), (4.0, 3.0, 6.5), tuple(oblique_grid.centre_mm - [32, 31, 26]))
    slope = np.array([0.004, -0.003, 0.005])

    def linear(points_mm: np.ndarray) -> np.ndarray:
        return 0.5 + (points_mm - oblique_grid.centre_mm) @ slope

    reference, target = (g.image(linear(g.points_world()).astype(np.float32)) for g in (oblique_grid, other))
    alignment = np.eye(4)
    alignment[:3, :3] += [[0.05, 0.02, 0], [0, -0.04, 0.03], [0.01, 0, 0.02]]
    alignment[:3, 3] = [1.0, 2.0, -1.5] - (alignment[:3, :3] - np.eye(3)) @ oblique_grid.centre_mm
    pair = AlignedPair.of(reference, target, UNIT, "none", CPU)
    pair = AlignedPair(pair.grid, pair.target_grid, alignment, pair.reference, pair.target)

    x, intensities = pair.points_of_target(None)
    world = oblique_grid.cube_to_world(x.double()).numpy()  # where the alignment puts the target's voxels
    # float32 in intensities and cube coordinates.
    assert intensities.numpy() == pytest.approx(linear(apply_affine(alignment, world)), abs=1e-5)
    inside = x.abs().amax(-1) < 0.9
    assert 100 < len(x) < other.voxels
    assert pair.reference_at(x)[inside].numpy() == pytest.approx(linear(world)[inside], abs=1e-5)
    assert pair.target_at(x)[inside].numpy() == pytest.approx(intensities[inside].numpy(), abs=1e-5)

    y, intensities = pair.points_of_reference(None)
    world = oblique_grid.cube_to_world(y.double()).numpy()
    assert intensities.numpy() == pytest.approx(linear(world), abs=1e-5)
    assert other.contains(apply_affine(alignment, world)).all()


# -- registration


def blobs(grid: Grid, shift_mm: tuple[float, float, float]) -> sitk.Image:
    """Smooth random waves in the world, moved by a shift; in [0, 1]."""
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(30, 3)) * 2 * np.pi / 50
    phases = rng.uniform(0, 2 * np.pi, 30)
    values = np.cos((grid.points_world() - shift_mm) @ waves.T + phases).sum(-1)
    return grid.image((0.5 + values / 30).clip(0, 1).astype(np.float32))


SHIFT = (3.0, -2.0, 2.5)
REFERENCE = Grid((22, 20, 16), (3.0, 3.0, 4.0), (-33.0, -30.0, -31.0))
TARGET = Grid((21, 24, 18), (3.2, 2.8, 3.6), (-34.0, -32.0, -30.0))
QUICK = {
    "window": UNIT,
    "align": "none",
    "iterations": 50,
    "points_per_step": 300,
    "learning_rate": 5e-4,
    "device": "cpu",
}
SMOOTH = {**QUICK, "iterations": 100, "learning_rate": 1e-3}  # together with `smooth_network`


@pytest.fixture
def smooth_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is smooth from its start and quick to train, in place of the published one."""
    for name in ("idir", "cycle_idir"):
        monkeypatch.setattr(f"stnerp.baselines.{name}.Siren", lambda: Siren((3, 64, 64, 3), omega=4.0))


@pytest.fixture(scope="module")
def pair() -> tuple[sitk.Image, sitk.Image]:
    """A reference, and a target whose points lie `SHIFT` further: φ(p) = p − SHIFT."""
    return blobs(REFERENCE, (0.0, 0.0, 0.0)), blobs(TARGET, SHIFT)


def inner_error_mm(displacement: sitk.Image) -> float:
    """Mean distance from the true displacement, away from the border."""
    error = np.linalg.norm(sitk.GetArrayFromImage(displacement) + np.array(SHIFT), axis=-1)
    return float(error[3:-3, 3:-3, 3:-3].mean())


def test_a_translation_is_found(pair: tuple[sitk.Image, sitk.Image]) -> None:
    found = idir(*pair, **QUICK)
    assert Grid.of(found.displacement).is_close(TARGET)
    # 4.4 mm apart at first; the wrong direction would be 9 mm off.
    assert inner_error_mm(found.displacement) < 0.7


@pytest.mark.usefixtures("smooth_network")
@pytest.mark.parametrize("regulariser", ["jacobian", "hyperelastic", "bending"])
def test_a_translation_is_found_by_a_smooth_network(pair: tuple[sitk.Image, sitk.Image], regulariser: str) -> None:
    found = idir(*pair, regulariser=regulariser, **SMOOTH)
    assert inner_error_mm(found.displacement) < 0.7


@pytest.mark.usefixtures("smooth_network")
def test_the_alignment_is_part_of_the_answer(pair: tuple[sitk.Image, sitk.Image]) -> None:
    """The same scan with its header 40 mm further: rigid alignment and network together take it back."""
    reference, target = pair[0], sitk.Image(pair[1])
    target.SetOrigin(np.add(target.GetOrigin(), (40.0, 0.0, 0.0)))
    found = idir(reference, target, **{**SMOOTH, "align": "rigid"})
    error = sitk.GetArrayFromImage(found.displacement) + np.array(SHIFT) + [40.0, 0, 0]
    assert np.linalg.norm(error, axis=-1)[3:-3, 3:-3, 3:-3].mean() < 0.7


@pytest.mark.usefixtures("smooth_network")
def test_points_come_from_the_mask(pair: tuple[sitk.Image, sitk.Image]) -> None:
    """Outside the mask the target is noise: with the mask it doesn't matter."""
    reference, target = pair
    inside = np.zeros(TARGET.shape, np.uint8)
    inside[4:14, 5:19, 5:16] = 1
    noise = np.random.default_rng(1).uniform(0, 1, TARGET.shape).astype(np.float32)
    spoilt = TARGET.image(np.where(inside, sitk.GetArrayFromImage(target), noise))

    def error(**settings: object) -> float:
        found = idir(reference, spoilt, **SMOOTH, **settings)
        miss = np.linalg.norm(sitk.GetArrayFromImage(found.displacement) + np.array(SHIFT), axis=-1)
        return float(miss[inside != 0].mean())

    assert error(mask=TARGET.image(inside)) < 0.7
    assert error() > 1.5


def test_seeds(pair: tuple[sitk.Image, sitk.Image]) -> None:
    few = {**QUICK, "iterations": 3}
    first, again, other = (sitk.GetArrayFromImage(idir(*pair, seed=s, **few).displacement) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_as_published_changes_the_coordinates_of_the_answer(oblique_grid: Grid) -> None:
    """Voxel p, from 1, is asked at 2p/n − 1, and the answer is scaled by n/2; u(x) = W x + b can be written."""
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    W, b = (parameter.detach().double().numpy() for parameter in network.parameters())
    n = np.array(oblique_grid.size)
    index = np.array([[0.0, 0, 0], [9, 11, 8], [19, 15, 10]])
    world = oblique_grid.index_to_world(index)
    for cube, scale, first in ((oblique_grid, (n - 1) / 2, 0), (published_cube(oblique_grid), n / 2, 1)):
        found = oblique_grid.world_to_index(mapped(network, cube, world))
        # float32 in cube units.
        assert found == pytest.approx(index + (((index + first) / scale - 1) @ W.T + b) * scale, abs=1e-5)


@pytest.mark.usefixtures("smooth_network")
def test_as_published_reaches_the_answer(pair: tuple[sitk.Image, sitk.Image]) -> None:
    few = {**QUICK, "iterations": 2}
    for method in (idir, cycle_idir):
        answers = [method(*pair, as_published=as_published, **few) for as_published in (False, True)]
        right, published = (sitk.GetArrayFromImage(answer.displacement) for answer in answers)
        # The same networks, asked up to a voxel further on: not another start, which would change all of it.
        assert 0.01 < np.abs(right - published).max() < 0.4 * np.abs(right).max()


def test_as_published_bending_depends_on_the_number_of_points(pair: tuple[sitk.Image, sitk.Image]) -> None:
    """With a weight of its own 10 000 points' equivalent, 500 points a step smooth 20 times more than meant."""
    strong = {**QUICK, "regulariser": "bending", "iterations": 30}

    def roughness(**settings: object) -> float:
        field = sitk.GetArrayFromImage(idir(*pair, **strong, **settings).displacement)
        return float(np.abs(np.diff(field, 2, axis=0)).mean())

    meant, published = roughness(), roughness(as_published=True)
    assert published < 0.8 * meant


# -- cycle consistency


class Shear:
    """φ(x) = (x, y, z + s sin 3x): undone by −s, with a Jacobian that isn't symmetric."""

    def __init__(self, s: float, offset: float = 0.0) -> None:
        self.s, self.offset = s, offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([0 * x[:, 0], 0 * x[:, 0] + self.offset, self.s * torch.sin(3 * x[:, 0])], dim=-1)

    def with_derivatives(
        self, x: torch.Tensor, second: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        assert not second
        du = torch.zeros(3, len(x), 3, dtype=x.dtype)
        du[0, :, 2] = 3 * self.s * torch.cos(3 * x[:, 0])
        return self(x), (du,)


class Affine:
    """φ(x) = M x + b."""

    def __init__(self, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        self.matrix, self.shift = matrix, shift

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T + self.shift - x

    def with_derivatives(
        self, x: torch.Tensor, second: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        assert not second
        return self(x), (affine_gradient(self.matrix, len(x)),)


MATRIX = torch.tensor([[1.2, 0.3, 0.0], [-0.1, 0.9, 0.2], [0.1, 0.0, 1.1]], dtype=torch.float64)
B = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64)


def test_fields_that_undo_each_other_are_certain(points: torch.Tensor) -> None:
    inverse = torch.linalg.inv(MATRIX)
    for there, back in ((Shear(0.2), Shear(-0.2)), (Affine(MATRIX, B), Affine(inverse, -inverse @ B))):
        answer, apart = consensus(there, back, points)
        assert apart.abs().max() < 1e-12
        assert torch.allclose(answer, points + there(points))
        # Two fields that are each other's negative are not each other's inverse.
        if isinstance(there, Affine):
            assert consensus(there, Affine(2 * torch.eye(3).double() - MATRIX, -B), points)[1].abs().max() > 0.01


def test_consensus_is_halfway_to_the_inverse_of_the_way_back(points: torch.Tensor) -> None:
    """Backward is the inverse of another affine map: for it, first order is exact."""
    other, shift = MATRIX + 0.05 * torch.ones(3, 3).double(), B - 0.1
    inverse = torch.linalg.inv(other)
    answer, apart = consensus(Affine(MATRIX, B), Affine(inverse, -inverse @ shift), points)
    first, second = points @ MATRIX.T + B, points @ other.T + shift
    assert torch.allclose(answer, (first + second) / 2)
    assert torch.allclose(apart, first - second)


def test_where_the_way_back_folds_the_step_stays_short(points: torch.Tensor) -> None:
    flat = torch.diag(torch.tensor([1.0, 1.0, 0.0])).double()
    _, apart = consensus(Affine(MATRIX, B), Affine(flat, B), points)
    assert apart.isfinite().all()


@pytest.mark.usefixtures("smooth_network")
def test_cycle_finds_a_translation_and_its_uncertainty(pair: tuple[sitk.Image, sitk.Image]) -> None:
    found = cycle_idir(*pair, **SMOOTH)
    assert isinstance(found, CycleRegistration)
    assert inner_error_mm(found.displacement) < 0.7
    assert Grid.of(found.uncertainty_mm).is_close(TARGET)
    uncertainty = sitk.GetArrayFromImage(found.uncertainty_mm)
    assert uncertainty.shape == TARGET.shape
    assert (uncertainty >= 0).all()
    assert 0.001 < uncertainty[3:-3, 3:-3, 3:-3].mean() < 1.0
    # An untrained pair of networks knows nothing.
    untrained = cycle_idir(*pair, **{**SMOOTH, "iterations": 1})
    assert sitk.GetArrayFromImage(untrained.uncertainty_mm).mean() > 3 * uncertainty.mean()


@pytest.mark.usefixtures("smooth_network")
def test_the_cycle_penalty_brings_the_networks_together(pair: tuple[sitk.Image, sitk.Image]) -> None:
    """In mm²: on the same fields a weight of zero leaves them further apart."""

    def apart_mm(weight: float) -> float:
        found = cycle_idir(*pair, cycle_weight=weight, **SMOOTH)
        return float(sitk.GetArrayFromImage(found.uncertainty_mm).mean())

    assert apart_mm(1e-2) < 0.8 * apart_mm(0.0)


@pytest.mark.usefixtures("smooth_network")
def test_without_a_mask_of_its_own_the_reference_takes_the_targets(pair: tuple[sitk.Image, sitk.Image]) -> None:
    mask = np.zeros(TARGET.shape, np.uint8)
    mask[5:13, 6:18, 5:16] = 1
    found = cycle_idir(*pair, mask=TARGET.image(mask), **SMOOTH)
    miss = np.linalg.norm(sitk.GetArrayFromImage(found.displacement) + np.array(SHIFT), axis=-1)
    assert miss[mask != 0].mean() < 0.7


# -- wrong input


def test_bad_arguments_are_refused(pair: tuple[sitk.Image, sitk.Image]) -> None:
    reference, target = pair
    for method in (idir, cycle_idir):
        with pytest.raises(InputError, match="iterations 0"):
            method(*pair, **{**QUICK, "iterations": 0})
        with pytest.raises(InputError, match="align"):
            method(*pair, **{**QUICK, "align": "syn"})
        with pytest.raises(InputError, match="mask: not on its image's grid"):
            method(*pair, mask=reference > 0, **QUICK)
        with pytest.raises(InputError, match="mask: none of its voxels"):
            method(*pair, mask=target > 5, **QUICK)
        with pytest.raises(FitError, match="learning_rate"):
            method(*pair, **{**QUICK, "iterations": 20, "learning_rate": 1e30})
    with pytest.raises(InputError, match="regulariser"):
        idir(*pair, regulariser="elastic", **QUICK)
    with pytest.raises(InputError, match="reference_mask"):
        cycle_idir(*pair, reference_mask=target > 0, **QUICK)


def test_a_network_covers_its_cube() -> None:
    """A start of the published size: a few per cent of the cube, and no kink at its faces."""
    torch.manual_seed(0)
    u = Siren()(cube_points((5, 5, 5)).reshape(-1, 3))
    assert 0.01 < u.abs().mean() < 0.1
