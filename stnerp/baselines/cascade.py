"""Registration by a cascade of convolutional networks, as DLIR and the anatomically constrained CNN have it.

Each network sees a fixed image and a moving one that the networks before it have already moved, at a finer
spacing than theirs, and answers with a step of the displacement. They are trained one after the other, without
ground truth: by how alike the images are afterwards, and how smooth the displacement is.

They are trained on the pair itself, or on a cohort: a folder with one folder of images for each patient, or for
this patient alone, whose phases it then holds. On the pair this is a fit like any other; on a cohort it is done
once, with many more iterations, and a pair takes seconds. A share of the steps can see simulated motion in place
of the patient's: with few patients that makes more of them.

The networks are written out here, for MONAI's for registration normalise over the batch, which is one pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn
from tqdm.auto import tqdm

from stnerp.alignment import affine_between
from stnerp.baselines.pair import Align, PairRegistration, check_align, in_window, registration_of
from stnerp.device import device_of
from stnerp.errors import FitError, InputError
from stnerp.geometry import Grid, Triple, apply_affine
from stnerp.io.image import read_image, read_labels
from stnerp.preprocess import on_grid
from stnerp.seeding import own_random_numbers, start_random_numbers
from stnerp.velocity import compose
from stnerp.warp import Shape, resize, warp
from stnerp.window import Window

#: loss(fixed, moved, displacement_mm, spacing_mm), of images (1, channels, z, y, x): see `Scans`.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Triple], torch.Tensor]

KNOT_MM = 60.0  # between the knots of simulated motion


@dataclass(frozen=True)
class Training:
    """How a cascade is trained.

    Attributes:
        spacings_mm: of the images that each network sees, the coarsest first.
        iterations: steps of each network.
        learning_rate: of Adam; it falls to zero along half a cosine.
        simulated: share of steps whose fixed image is the moving one under a simulated motion.
        motion_mm: standard deviation of that motion where it is largest.
        seed: of the networks' start, the pairs drawn and the simulated motion.
    """

    spacings_mm: tuple[float, ...]
    iterations: tuple[int, ...]
    learning_rate: float
    simulated: float
    motion_mm: float
    seed: int

    def __post_init__(self) -> None:
        if not self.spacings_mm or len(self.spacings_mm) != len(self.iterations):
            raise InputError(
                f"spacings_mm {self.spacings_mm}, iterations {self.iterations}: one of each per network needed"
            )
        if min(self.spacings_mm) <= 0 or min(self.iterations) < 1 or not self.learning_rate > 0:
            raise InputError(
                f"spacings_mm {self.spacings_mm}, iterations {self.iterations}, learning_rate "
                f"{self.learning_rate}: must be positive"
            )
        if not 0 <= self.simulated <= 1 or self.motion_mm < 0:
            raise InputError(
                f"simulated {self.simulated}, motion_mm {self.motion_mm}: must be in [0, 1], and not negative"
            )


# -- the images of one patient


@dataclass(frozen=True)
class Scans:
    """A patient's images on common grids, one for each network, aligned with the first of them.

    Attributes:
        grids: in the first image's world, along LPS axes.
        images: per grid (n, channels, z, y, x): intensities in [0, 1], 1 where the scan covers the grid, and
            the mask, if there is one.
        to_image: (4, 4) each, a world point of the grids -> the image's.
    """

    grids: list[Grid]
    images: list[torch.Tensor]
    to_image: list[np.ndarray]

    @staticmethod
    def of(
        images: Sequence[sitk.Image],
        masks: Sequence[sitk.Image] | None,
        window: Window,
        align: Align,
        spacings_mm: Iterable[float],
        device: torch.device,
    ) -> Scans:
        """Raises:
        InputError: fewer than two images, or a mask on another grid than its image.
        FitError: no overlap to align.
        """
        check_align(align)
        if len(images) < 2:
            raise InputError("images: at least two are needed of a patient")
        for i, mask in enumerate(masks or ()):
            if not Grid.of(mask).is_close(Grid.of(images[i])):
                raise InputError(f"mask {i}: not on its image's grid; resample it onto the image first")
        windowed = [in_window(image, window, f"image {i}") for i, image in enumerate(images)]
        to_image = [np.eye(4)]
        to_image += [np.linalg.inv(affine_between(image, windowed[0], align)) for image in windowed[1:]]
        frame = Grid.of(sitk.DICOMOrient(images[0], "LPS"))
        grids = [frame.with_spacing(spacing) for spacing in spacings_mm]

        def channels(i: int, grid: Grid) -> np.ndarray:
            def drawn(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
                array = sitk.GetArrayFromImage(image).astype(np.float32)
                return on_grid(array, Grid.of(image), grid, to_image[i], sigma_mm=grid.spacing_mm[0] / 2)

            values, covered = drawn(windowed[i])
            return np.stack([values, covered] + ([drawn(masks[i] != 0)[0]] if masks else [])).astype(np.float32)

        stacks = [np.stack([channels(i, grid) for i in range(len(images))]) for grid in grids]
        return Scans(grids, [torch.from_numpy(stack).to(device) for stack in stacks], to_image)


def cohort_files(folder: str | Path) -> list[list[tuple[Path, Path | None]]]:
    """The images of each patient in a cohort's folder, each with its mask if there are any.

    One folder per patient, in it two or more images (`a.nii.gz`, `b.mha`, ...), and for every image or for none a
    mask of the same name and `_mask` (`a_mask.nii.gz`). Names that start with a dot are passed over.

    Raises:
        InputError: no patients, one with fewer than two images, or masks for some images only.
    """
    root = Path(folder)
    patients = []
    for patient in sorted(path for path in root.glob("[!.]*") if path.is_dir()):
        images = [
            path
            for path in sorted(patient.glob("[!.]*"))
            if path.is_file() and path.suffix not in (".raw", ".zraw", ".img")  # the voxels of a header beside
        ]
        files = {path.name.removesuffix(".gz").rsplit(".", 1)[0]: path for path in images}
        if len(files) < len(images):
            raise InputError(f"{patient}: has two images of one name; give each a name of its own")
        scans = [name for name in files if not name.endswith("_mask")]
        if len(scans) < 2:
            raise InputError(f"{patient}: {len(scans)} images; a patient of the cohort needs two or more")
        patients.append([(files[name], files.get(f"{name}_mask")) for name in scans])
    if not patients:
        raise InputError(f"{root}: no cohort; expected one folder of images per patient")
    without = [path for patient in patients for path, mask in patient if mask is None]
    if 0 < len(without) < sum(map(len, patients)):
        raise InputError(f"{without[0]}: has no mask, others of the cohort do; give all images a mask, or none")
    return patients


# -- the cascade


class Cascade(nn.Module):
    """Networks from coarse to fine; network(images (1, 2, z, y, x)) -> (1, 3, z, y, x), in voxels x y z."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, fixed: Sequence[torch.Tensor], moving: Sequence[torch.Tensor]) -> torch.Tensor:
        """The displacement on the last of the given grids, cube units, fixed -> moving.

        Gradients reach the last network only: those before it have been trained.

        Args:
            fixed, moving: (1, 1, z, y, x) per grid; as many grids as networks that shall act.
        """
        u = fixed[0].new_zeros(1, 3, *fixed[0].shape[2:])
        last = len(fixed) - 1
        for k, (network, f, m) in enumerate(zip(self.networks, fixed, moving, strict=False)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and k == last):
                u = resize(u, shape_of(f))
                step = network(torch.cat([f, warp(m, u)], dim=1))
                voxel = torch.tensor([2 / max(n - 1, 1) for n in reversed(f.shape[2:])])
                u = compose(u, step * voxel.to(step)[:, None, None, None])
        return u


@own_random_numbers
def trained(
    network: Callable[[], nn.Module],
    patients: Sequence[Scans],
    loss: Loss,
    how: Training,
    name: str,
    progress: bool = False,
    pairs: Sequence[tuple[int, int]] | None = None,
) -> Cascade:
    """A cascade trained on pairs of each patient's images.

    Args:
        network: makes one of the cascade's.
        pairs: (fixed, moving), indices of images; None: all pairs, in both directions.

    Raises:
        FitError: the loss is not a number.
    """
    start_random_numbers(how.seed)
    draw = torch.Generator().manual_seed(how.seed)
    cascade = Cascade(network() for _ in how.spacings_mm).to(patients[0].images[0].device)
    cascade.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # a third less time on a CPU
    choices = [(p, i, j) for p in patients for i, j in pairs or permutations(range(len(p.to_image)), 2)]

    for k, iterations in enumerate(how.iterations, start=1):

        def value(k: int = k) -> torch.Tensor:
            patient, i, j = choices[int(torch.randint(len(choices), (), generator=draw))]
            moving = [images[j : j + 1] for images in patient.images[:k]]
            if float(torch.rand((), generator=draw)) < how.simulated:
                motion = simulated_motion(patient.grids[0], how.motion_mm, draw).to(moving[0])
                fixed = [warp(image, resize(motion, shape_of(image), order=3)) for image in moving]
            else:
                fixed = [images[i : i + 1] for images in patient.images[:k]]
            u = cascade([f[:, :1] for f in fixed], [m[:, :1] for m in moving])
            grid = patient.grids[k - 1]
            half = torch.tensor(grid.half_extent_mm).to(u)[:, None, None, None]
            return loss(fixed[-1], warp(moving[-1], u), u * half, grid.spacing_mm)

        optimiser = torch.optim.Adam(cascade.networks[k - 1].parameters(), lr=how.learning_rate)
        for step in tqdm(range(iterations), desc=f"{name}, network {k}", disable=not progress):
            optimiser.param_groups[0]["lr"] = how.learning_rate * (1 + math.cos(math.pi * step / iterations)) / 2
            optimiser.zero_grad(set_to_none=True)
            now = value()
            now.backward()
            optimiser.step()
            if (step % 10 == 0 or step == iterations - 1) and not bool(now.isfinite()):
                raise FitError(f"{name}: the loss is {float(now.detach())} at step {step}; lower learning_rate")
    return cascade.eval()


def cohort_state(folder: str | Path) -> tuple[tuple[str, int], ...]:
    """Names and times of change, ns, of all files in a cohort's folder: another state is another cohort."""
    return tuple(
        (str(path), path.stat().st_mtime_ns) for path in sorted(Path(folder).rglob("*")) if path.is_file()
    )


@lru_cache(maxsize=1)  # the pairs of a table are registered by one and the same cascade
def trained_on_cohort(
    network: Callable[[], nn.Module],
    folder: str,
    state: tuple[tuple[str, int], ...],
    window: Window,
    align: Align,
    loss: Loss,
    how: Training,
    name: str,
    device: torch.device,
    progress: bool = False,
) -> Cascade:
    """A cascade trained on all pairs of every patient in a folder, see `cohort_files`; kept for the next pair, if
    the folder's `cohort_state` is the same."""
    patients = []
    for files in cohort_files(folder):  # one patient's scans at a time: the grids of all take little beside them
        images = [read_image(path) for path, _ in files]
        masks = [read_labels(mask) for _, mask in files if mask is not None]
        patients.append(Scans.of(images, masks or None, window, align, how.spacings_mm, device))
    return trained(network, patients, loss, how, name, progress)


def simulated_motion(grid: Grid, motion_mm: float, draw: torch.Generator) -> torch.Tensor:
    """Knots of a random smooth displacement, cube units (1, 3, z, y, x): cubic B-splines are drawn through them.

    Every motion has its own size, between none and `motion_mm`.
    """
    knots = grid.with_spacing(KNOT_MM)
    half = torch.tensor(knots.half_extent_mm, dtype=torch.float32)[:, None, None, None]
    size_mm = motion_mm * torch.rand((), generator=draw)
    return size_mm * torch.randn(1, 3, *knots.shape, generator=draw) / half


def register(
    network: Callable[[], nn.Module],
    loss: Loss,
    name: str,
    images: Sequence[sitk.Image],
    masks: Sequence[sitk.Image] | None = None,
    *,
    window: Window,
    cohort: str | None,
    align: Align,
    how: Training,
    device: str | torch.device,
    progress: bool,
) -> PairRegistration:
    """Register a pair, its target and its reference, by a cascade trained on it, or on a cohort.

    Arguments and errors are those of `dlir` and `anatomy_cnn`, and of `trained`.
    """
    where = device_of(device)
    scans = Scans.of(images, masks, window, align, how.spacings_mm, where)
    if cohort is None:
        cascade = trained(network, [scans], loss, how, name, progress, pairs=[(0, 1)])
    else:
        cascade = trained_on_cohort(
            network, cohort, cohort_state(cohort), window, align, loss, how, name, where, progress
        )
    return registered(cascade, scans, images[0])


def registered(cascade: Cascade, scans: Scans, target: sitk.Image) -> PairRegistration:
    """What the cascade finds of a pair: image 0 of the scans is the target, 1 the reference."""
    with torch.no_grad():
        u = cascade([image[:1, :1] for image in scans.images], [image[1:2, :1] for image in scans.images])
    grid = scans.grids[-1]
    along_axes_mm = grid.vectors_from_cube(u[0].movedim(0, -1).double().cpu().numpy())
    found = PairRegistration(grid.image(np.ascontiguousarray(grid.vectors_to_world(along_axes_mm))))

    def target_to_reference(points_mm: np.ndarray) -> np.ndarray:
        aligned_mm = found.map_points(points_mm)
        return apply_affine(scans.to_image[1], aligned_mm)

    return registration_of(Grid.of(target), target_to_reference)


def shape_of(image: torch.Tensor) -> Shape:
    z, y, x = image.shape[2:]
    return z, y, x


def convolution(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    """A convolution, normalised over groups of four channels (one pair at a time is no batch), and an ELU."""
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, size, padding=size // 2), nn.GroupNorm(outputs // 4, outputs), nn.ELU()
    )


def starting_at_zero(layer: nn.Conv3d) -> nn.Conv3d:
    """A last layer that answers 0 before any training: a cascade starts from no motion."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
