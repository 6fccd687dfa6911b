"""python scripts/train_ref.py out=runs/p1 data.images='[a.nii.gz,b.nii.gz]' data.times='[0,12]' data.reference=0

Fit Ref-Net to the reference image (Eq. 3). Writes into the run directory: config.yaml, ref_net.pt,
ref_net.csv, ref_net_history.csv, pictures/ref_net.png, train_ref.log. Interrupted, the same command goes on.
Then: scripts/train_def.py.
"""

from __future__ import annotations

import time

import numpy as np
from configuration import DictConfig, hydra
from data import load_data
from run_directory import (
    CONFIGS,
    REF_NET_CHECKPOINT,
    launch,
    logger,
    run_directory,
    settings_of,
    write_config,
    wrote,
)

from stnerp import fit_reference
from stnerp.metrics import psnr_db, ssim
from stnerp.preprocess import normalised
from stnerp.report import overview, text_table, write_csv

WRITES = ("config.yaml", "ref_net.pt", "ref_net.csv", "ref_net_history.csv", "pictures/ref_net.png")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train_ref")
def main(config: DictConfig) -> None:
    with run_directory(config, "train_ref", WRITES, checkpoints=[REF_NET_CHECKPOINT]) as out:
        patient = load_data(config.data)
        series = patient.series
        start = time.perf_counter()
        net = fit_reference(
            series,
            device=config.device,
            seed=config.seed,
            progress=config.progress,
            checkpoint=out / REF_NET_CHECKPOINT,
            **settings_of(config.preset.ref_net),
        )
        seconds = time.perf_counter() - start

        voxels, rendered = normalised(series.reference_image, series.window), np.clip(net.render(), 0, 1)
        score = {
            "reference": series.names[series.reference],
            "psnr_db": psnr_db(rendered, voxels),
            "ssim": ssim(rendered, voxels),
            "voxels": voxels.size,
            "weights": sum(weight.numel() for weight in net.parameters()),
            "load_seconds": patient.seconds,
            "fit_seconds": seconds,
        }
        logger.info("%s", text_table([score]))
        wrote(
            net.save(out / "ref_net.pt", overwrite=True),
            write_config(config, out / "config.yaml"),
            write_csv(out / "ref_net.csv", [score]),
            write_csv(out / "ref_net_history.csv", net.history),
            overview(
                out / "pictures" / "ref_net.png",
                reference=voxels,
                target=voxels,
                prediction=rendered,
                displacement_mm=np.zeros((*series.grid.shape, 3)),
                grid=series.grid,
                title=f"Ref-Net against {score['reference']}",
            ),
            out / "train_ref.log",
        )


if __name__ == "__main__":
    launch(main)
