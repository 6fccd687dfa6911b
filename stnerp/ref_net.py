"""Ref-Net R(p): the reference image as a continuous function (Eq. 1), fitted by Eq. 3."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn
from tqdm.auto import tqdm

from stnerp.checkpoint import content_of, write_checkpoint
from stnerp.device import device_of, tensor_cores
from stnerp.errors import FitError
from stnerp.geometry import Grid, affine_points, cube_points, slab_slices
from stnerp.losses import mse
from stnerp.memory import ref_net_bytes, require_memory
from stnerp.networks import FeatureGrid, in_chunks, siren
from stnerp.preprocess import normalised
from stnerp.presets import RefNetSettings, preset_of, ref_net_settings_of, with_changes
from stnerp.replay import Replay, recording
from stnerp.resume import SECONDS, Part, Progress, State
from stnerp.seeding import own_random_numbers, start_random_numbers
from stnerp.series import Series, require_series
from stnerp.warp import sample
from stnerp.watch import require_finite as require_finite
from stnerp.window import Window

CHUNK = 2**16
FEWEST_POINTS = 1024  # a step on fewer is hardly faster
KIND = "stnerp Ref-Net"


class RefNet(nn.Module):
    """Intensity at any point of the reference image: network(p) + remainder(p).

    The network learns what has structure, and so also what lies between the voxels. Noise has none: no network
    learns it in less room than the voxels take. That remainder may be kept as voxels, read linearly.

    Attributes:
        grid: the reference image's grid; the network lives on its cube.
        window: intensities in [0, 1] are those of this window.
        settings: how the network is built.
        remainder: (1, 1, z, y, x), what is added to the network; None: nothing.
        history: one dict per recorded step of the fit: step, loss, psnr_db; the network's alone.
        fingerprint: of the voxels that it was fitted to (`fingerprint_of`).
    """

    def __init__(self, grid: Grid, window: Window, settings: RefNetSettings) -> None:
        super().__init__()
        self.grid, self.window, self.settings = grid, window, settings
        self.history: list[dict[str, float]] = []
        self.fingerprint = ""
        if settings.backbone == "siren":
            self.network: nn.Module = siren(
                3,
                1,
                layers=settings.layers,
                width=settings.width,
                omega=settings.omega,
                fourier_width=settings.fourier_width,
                fourier_sigma=settings.fourier_sigma,
            )
        else:
            spacings = [settings.grid_finest_voxels * 2**k for k in range(settings.grid_levels)][::-1]
            shapes = [grid.with_spacing(_times(grid, s)).shape for s in spacings]
            self.network = FeatureGrid(shapes, settings.grid_features, settings.decoder_width)
        self.register_buffer("remainder", torch.zeros(1, 1, *grid.shape) if settings.remainder else None)
        self.remainder: torch.Tensor | None

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """Intensities (N,), about [0, 1], at cube points (N, 3); differentiable in both.

        Beyond the image it is its border's: what a network says of where it saw nothing is made up.
        """
        points = points.to(next(self.parameters()).dtype).clamp(-1, 1)
        # The paper's coordinates are p ∈ [0, 1]³; the feature grid reads the cube itself.
        inputs = (points + 1) / 2 if self.settings.backbone == "siren" else points
        values = in_chunks(self.network, inputs, CHUNK)[:, 0]
        return values if self.remainder is None else values + sample(self.remainder, points[None])[0, 0]

    def render(self, grid: Grid | None = None) -> np.ndarray:
        """Intensities (z, y, x), about [0, 1], on a grid (default: its own). Slab by slab, so any size fits."""
        grid = grid or self.grid
        device = next(self.parameters()).device
        index_to_cube = self.grid.world_to_cube_matrix @ grid.index_to_world_matrix
        values = np.empty(grid.shape, np.float32)
        with torch.no_grad():
            for part in slab_slices(grid.shape):
                points = affine_points(index_to_cube, grid.shape, device, part)
                values[part] = self(points.reshape(-1, 3)).reshape(points.shape[:-1]).cpu().numpy()
        return values

    def image(self, grid: Grid | sitk.Image | None = None) -> sitk.Image:
        """The reference image as the network knows it, in the scan's own intensities."""
        grid = Grid.of(self.grid if grid is None else grid)
        return grid.image(self.window.denormalise(self.render(grid)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a file."""
        return {
            "grid": self.grid.to_dict(),
            "window": self.window.to_dict(),
            "settings": asdict(self.settings),
            "weights": self.state_dict(),
            "history": self.history,
            "fingerprint": self.fingerprint,
        }

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> RefNet:
        """The network that `to_dict` described, on the CPU, frozen."""
        settings = ref_net_settings_of(saved["settings"])
        net = RefNet(Grid.from_dict(saved["grid"]), Window.from_dict(saved["window"]), settings)
        net.load_state_dict(saved["weights"])
        net.history, net.fingerprint = saved["history"], saved["fingerprint"]
        return net.eval().requires_grad_(False)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the network and all it needs into one file, all at once or not at all.

        Raises:
            InputError: the file exists and `overwrite` is False.
        """
        return write_checkpoint(Path(path), KIND, self.to_dict(), overwrite)

    @staticmethod
    def load(path: str | Path) -> RefNet:
        """Read what `save` wrote. Runs no code from the file.

        Raises:
            MissingFileError: no such file.
            InputError: not a Ref-Net, or one of a newer format.
        """
        with content_of(Path(path), KIND) as saved:
            return RefNet.from_dict(saved)


@own_random_numbers
def fit_reference(
    series: Series,
    *,
    preset: str = "fast",
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = SECONDS,
    **settings: Any,
) -> RefNet:
    """Fit Ref-Net to the reference image of a series by mean squared error (Eq. 3).

    Args:
        series: its reference image is what is learnt.
        preset: "fast" or "paper".
        device: "auto", "cpu", "cuda", ...
        seed: of the network's start and of the points that are drawn.
        progress: show a bar with the loss and the time left.
        checkpoint: a file that keeps how far the fit has come. Where it exists, the fit goes on from it. SIGINT
            and SIGTERM then end it after the step, with `resume.Interrupted`. Remove it once the net is saved.
        checkpoint_seconds: between two writings of that file.
        settings: any field of `presets.RefNetSettings`, by name.

    Raises:
        InputError: an unknown preset, setting or device, a checkpoint of another fit, or more memory needed than
            there is.
        FitError: the loss is not a number.
    """
    require_series(series)
    chosen = with_changes(preset_of(preset).ref_net, settings)
    where = device_of(device)
    require_memory(ref_net_bytes(series.grid, chosen), where, "Ref-Net")
    start_random_numbers(seed)
    net = RefNet(series.grid, series.window, chosen).to(where)
    voxels = normalised(series.reference_image, series.window)
    net.fingerprint = fingerprint_of(voxels)
    image = torch.from_numpy(voxels).to(where)
    intensities, points = image.reshape(-1), None
    drawn = max(int(chosen.fraction_per_step * len(intensities)), FEWEST_POINTS)
    if drawn >= len(intensities):
        points = cube_points(series.grid.shape, where).reshape(-1, 3)
    optimiser = torch.optim.Adam(net.parameters(), lr=chosen.learning_rate, fused=True)
    schedule = cosine(optimiser, chosen.iterations) if chosen.decay == "cosine" else None
    parameters, replay = list(net.network.parameters()), Replay[torch.Tensor]()

    def look() -> torch.Tensor:
        """Eq. 3 for the voxels of one step; the parameters get its gradient."""
        if points is None:
            chosen_voxels = torch.randint(len(intensities), (drawn,), device=where)
            loss = mse(intensities[chosen_voxels], net(voxel_points(chosen_voxels, series.grid)))
        else:
            loss = mse(intensities, net(points))
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        return loss.detach()

    parts: dict[str, Part] = {"network": net.network, "adam": optimiser}
    if schedule is not None:
        parts["schedule"] = schedule
    state = State(parts, net.history, check=lambda: require_finite(net, "Ref-Net"))
    identity = {
        "network": "Ref-Net",
        "image": (net.fingerprint, net.grid),
        "window": (net.window.low, net.window.high),
        "seed": seed,
        **asdict(chosen),
    }
    with (
        recording(where),
        tensor_cores(where, allowed=chosen.backbone == "siren"),
        Progress(None if checkpoint is None else Path(checkpoint), identity, checkpoint_seconds) as fit,
        fit.stage("ref_net", state),
        tqdm(total=chosen.iterations, desc="Ref-Net", disable=not progress) as bar,
    ):
        bar.update(state.step)
        for step in fit.steps(chosen.iterations):
            loss = replay(look)
            optimiser.step()
            if schedule is not None:
                schedule.step()
            bar.update()
            if step % 20 == 0 or step == chosen.iterations:
                value = float(loss)
                if not np.isfinite(value):
                    raise FitError(f"Ref-Net: the loss (mse) is {value} at step {step}; lower learning_rate")
                psnr_db = -10 * math.log10(max(value, 1e-12))
                net.history.append({"step": step, "loss": value, "psnr_db": psnr_db})
                bar.set_postfix(loss=f"{value:.2e}", PSNR=f"{psnr_db:.1f} dB")
    if net.remainder is not None:
        net.remainder += chosen.remainder * (image - torch.from_numpy(net.render()).to(where))
    return net.eval()


def fingerprint_of(voxels: np.ndarray) -> str:
    """A checksum of an image, to tell it from another on the same grid."""
    return f"{zlib.crc32(voxels.tobytes()):08x}"


def voxel_points(voxels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Cube points (N, 3) of voxels given by their place (N,) in the flattened array."""
    z, y, x = grid.shape
    index = ((voxels % x, x), (voxels // x % y, y), (voxels // (x * y), z))
    return torch.stack([2 * i / max(n - 1, 1) - 1 for i, n in index], dim=-1)


def cosine(optimiser: torch.optim.Optimizer, steps: int, done: int = 0) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that falls from its value to 2 % of it along half a cosine, of which some steps are over."""
    group = optimiser.param_groups[0]
    rate, least = group["lr"], 0.02 * group["lr"]
    group["initial_lr"] = rate
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=least)
    if done:
        schedule.last_epoch = done
        group["lr"] = least + (rate - least) * (1 + math.cos(math.pi * done / steps)) / 2
    return schedule


def _times(grid: Grid, factor: float) -> tuple[float, float, float]:
    x, y, z = (s * factor for s in grid.spacing_mm)
    return x, y, z
