"""What others published: the paper's Tables I to VI, and registration errors on DIR-Lab's 4D CT.

Plain data, copied digit by digit, decimals as text: 34.10 stays 34.10. Paper: Qiu et al., "ST-NeRP:
Spatial-Temporal Neural Representation Learning with Prior Embedding for Patient-specific Imaging Study".
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def _rows(names: str, *values: tuple[Any, ...]) -> list[Row]:
    return [dict(zip(names.split(), row, strict=True)) for row in values]


# Table I: a 4D CT's phase is left out of the fit and predicted. `target`: the phase left out; `rest`: mean over
# the phases that the fit saw; scan 1 is Ref-Net's own image. Case 1: pancreas, case 2: lung (Dataset A).
TABLE_1 = _rows(
    "case scan target_psnr_db rest_psnr_db target_ssim rest_ssim",
    (1, "1 (prior)", "45.26", None, "0.995", None),
    (1, "4", "34.05", "37.03", "0.982", "0.989"),
    (1, "6", "32.49", "36.83", "0.979", "0.988"),
    (1, "8", "34.10", "36.81", "0.983", "0.988"),
    (1, "mean", "33.55", "36.89", "0.981", "0.988"),
    (2, "1 (prior)", "41.30", None, "0.990", None),
    (2, "4", "27.86", "29.67", "0.964", "0.977"),
    (2, "6", "28.33", "29.67", "0.965", "0.977"),
    (2, "8", "27.39", "29.57", "0.960", "0.975"),
    (2, "mean", "27.86", "29.64", "0.963", "0.976"),
)

# Table II: the same for eight lung CTs over a therapy; the caption says Dataset B, the text Dataset C.
TABLE_2 = _rows(
    "case scan target_psnr_db rest_psnr_db target_ssim rest_ssim",
    (1, "1 (prior)", "45.65", None, "0.994", None),
    (1, "3", "30.17", "35.72", "0.884", "0.946"),
    (1, "6", "32.84", "35.46", "0.927", "0.943"),
    (2, "1 (prior)", "44.41", None, "0.991", None),
    (2, "3", "29.02", "35.82", "0.913", "0.974"),
    (2, "6", "28.41", "35.78", "0.906", "0.973"),
    ("all", "mean", "30.11", "35.70", "0.908", "0.959"),
)

# Table III: Dataset D, five patients with five lung CTs each; means. `registration`: fractions that the fit saw
# when this one was left out of it; `interpolation`: this fraction itself. Folded: voxels with |J| <= 0.
TABLE_3 = _rows(
    "task method fraction psnr_db ssim dice folded_voxels",
    ("registration", "ST-NeRP", 3, "37.52", "0.984", "0.778", 0),
    ("registration", "ST-NeRP (w/o prior)", 3, "39.83", "0.990", "0.774", 0),
    ("registration", "ST-NeRP (w/o t)", 3, "38.12", "0.986", "0.786", 0),
    ("interpolation", "ST-NeRP", 3, "30.06", "0.937", "0.700", 0),
    ("interpolation", "ST-NeRP (w/o prior)", 3, "30.57", "0.944", "0.673", 0),
    ("registration", "ST-NeRP", 4, "37.61", "0.985", "0.787", 0),
    ("registration", "ST-NeRP (w/o prior)", 4, "39.98", "0.991", "0.787", 0),
    ("registration", "ST-NeRP (w/o t)", 4, "38.14", "0.976", "0.789", 0),
    ("interpolation", "ST-NeRP", 4, "29.63", "0.931", "0.694", 0),
    ("interpolation", "ST-NeRP (w/o prior)", 4, "29.92", "0.942", "0.684", 0),
)

# Table IV: DIR-Lab 4D CT (Dataset B), T00 to T50, 300 landmarks of each of ten patients. The paper doesn't say
# over what the standard deviation is; ones this large can only be over landmarks. The authors ran ANTs and
# ST-NeRP, the other figures they quote.
TABLE_4 = _rows(
    "method tre_mean_mm tre_std_mm",
    ("ANTs", "3.25", "3.56"),
    ("Uniform B-Splines", "1.36", "0.99"),
    ("DLIR", "2.64", "4.32"),
    ("CNN with anatomical constraints", "1.14", "0.76"),
    ("IDIR", "1.10", "1.42"),
    ("Cycle-consistent INR", "1.04", "1.11"),
    ("ST-NeRP", "1.06", "1.23"),
)

# Table V: Dataset D, pairs: `long`, the first scan to each later one, and `short`, each scan to the next.
TABLE_5 = _rows(
    "scheme method psnr_db ssim dice folded_voxels",
    ("long", "ANTs", "33.04", "0.969", "0.770", 5699),
    ("long", "IDIR", "38.73", "0.988", "0.780", 0),
    ("long", "ST-NeRP", "38.21", "0.986", "0.791", 0),
    ("long", "ST-NeRP (w/o prior)", "40.60", "0.992", "0.783", 0),
    ("short", "ANTs", "33.10", "0.975", "0.789", 6911),
    ("short", "IDIR", "38.50", "0.988", "0.798", 0),
    ("short", "ST-NeRP", "38.83", "0.988", "0.803", 0),
    ("short", "ST-NeRP (w/o prior)", "40.10", "0.991", "0.802", 0),
)

# Table VI: Dataset D, what the prior does: the means of Table III's interpolation and of Table V's registration.
TABLE_6 = _rows(
    "task method psnr_db ssim dice folded_voxels",
    ("interpolation", "ST-NeRP", "29.85", "0.934", "0.697", 0),
    ("interpolation", "ST-NeRP (w/o prior)", "30.25", "0.943", "0.679", 0),
    ("registration", "ST-NeRP", "38.52", "0.987", "0.797", 0),
    ("registration", "ST-NeRP (w/o prior)", "40.35", "0.992", "0.793", 0),
)

# Mean TRE in mm over DIR-Lab's ten cases, as published: with predicted points snapped to voxels (the organisers'
# protocol) and as they are. Whoever gives one figure is taken to have snapped.
DIRLAB = _rows(
    "method tre_snapped_mean_mm tre_mean_mm time",
    ("pTVreg (local correlation, isotropic TV)", "0.92", "1.06", "130 s, GPU"),
    ("multi-resolution B-splines, pTV loss (2026)", "0.917", "1.05", ""),
    ("GaussianDIR", "0.97", None, "2.5 s"),
    ("Dual-INR (coarse and fine SIREN)", "0.976", "1.11", ""),
    ("CPT-DIR (velocity INR)", "0.99", None, "15 s"),
    ("IDIR, re-tuned (rate 1e-4, window [80, 900], 1 mm)", "1.006", "1.13", ""),
    ("cycle-consistent INR", "1.04", None, ""),
    ("ST-NeRP", "1.06", None, ""),
    ("IDIR", "1.10", None, ""),
)

# Mean distance in mm between T00 and T50 of all features that DIR-Lab's owners marked in each case, from their
# website; the 300 landmarks are a sample of these.
DIRLAB_DISPLACEMENT_MM = {
    1: 4.01,
    2: 4.65,
    3: 6.73,
    4: 9.42,
    5: 7.10,
    6: 11.10,
    7: 11.59,
    8: 15.16,
    9: 7.82,
    10: 7.63,
}
