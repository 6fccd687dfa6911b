"""What scripts/eval_dirlab.py measured: metrics.csv, landmarks.csv, and table_4.md beside the paper's figures."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dirlab_data import known_motion_errors_mm
from pair_methods import LABELS, NAMES
from published import DIRLAB, TABLE_4
from results import Record, notes, read_records
from run_directory import logger, wrote
from series_tables import told

from stnerp.report import markdown_table, text_table, write_csv

# Rows of the paper's table, and the methods that stand for them here.
STAND_FOR = {
    "ANTs": ("ants_syn",),
    "Uniform B-Splines": ("elastix_bspline",),
    "DLIR": ("dlir",),
    "CNN with anatomical constraints": ("anatomy_cnn",),
    "IDIR": ("idir",),
    "Cycle-consistent INR": ("cycle_idir",),
    "ST-NeRP": ("stnerp_fast_prior", "stnerp_paper"),  # its prior is Ref-Net
}

EXPLAINED = """\
TRE: distance in mm between T50's landmarks, mapped to T00, and T00's; *snapped*: mapped points rounded to the
nearest voxel of T00 first, as the set's owners do it. (The authors of IDIR and of its cycle-consistent kin map
T00's landmarks to T50 and snap there.) "a ± b; c": mean, standard deviation over all landmarks of these cases
together, and standard deviation of the cases' means. Landmarks are whole voxels: even a perfect displacement has a
TRE of about 0.8 mm when not snapped. Dice and HD95 (mm): mean over cases, of T00's lungs, found by thresholds and
carried to T50, with T50's own. Folded: voxels with |J| ≤ 0, of the whole images, all these cases added. SD log J:
mean over cases, likewise of the whole images. (IDIR draws its points in the lungs, elsewhere its answers mean
little.) DLIR and the CNN with anatomical constraints are fitted to the pair itself here, without a cohort and
without key points: not what their authors published. Time: mean over cases, from files to the displacement at
every voxel. Paper: its Table IV, mean ± standard deviation; it doesn't say over what, nor whether points were
snapped."""


def sorted_records(folder: Path) -> list[Record]:
    """All records of a folder, in the order of methods and cases."""
    order = {name: i for i, name in enumerate(NAMES)}
    return sorted(read_records(folder), key=lambda r: (order[r["arguments"]["method"]], r["arguments"]["case"]))


def write_tables(out: Path, records: Sequence[Record], missing: Mapping[int, str]) -> None:
    """Write the three tables and log the main one.

    Args:
        records: at least one.
        missing: cases that were asked for, now or before, and have no data, and why.
    """
    metrics, landmarks = [], []
    for record in records:
        asked, result = record["arguments"], record["result"]
        about = {"case": asked["case"], "method": asked["method"]}
        numbers = {name: value for name, value in result.items() if not name.startswith("errors")}
        more = {
            "failure": record["failure"],
            "seed": asked["common"]["seed"],
            "options": json.dumps(asked["options"]),
        }
        metrics.append({**about, **numbers, **more, "hardware": record["hardware"]})
        errors = zip(result.get("errors_mm", []), result.get("errors_snapped_mm", []), strict=True)
        for i, (error, snapped) in enumerate(errors, 1):
            landmarks.append({**about, "landmark": i, "error_mm": error, "error_snapped_mm": snapped})
    wrote(write_csv(out / "metrics.csv", metrics), write_csv(out / "landmarks.csv", landmarks))
    path = out / "table_4.md"
    path.write_text(markdown(records, missing), encoding="utf-8")
    wrote(path)
    logger.info("\n%s\n", text_table(rows_of_methods(records, missing)))


def markdown(records: Sequence[Record], missing: Mapping[int, str]) -> str:
    """The whole report."""
    common = records[0]["arguments"]["common"]
    left_out = ", ".join(str(case) for case in sorted(set(missing) - set(_cases(records))))
    about = [
        f"- data: {told(common['data'])}",
        f"- cases: {', '.join(map(str, _cases(records)))}" + (f"; left out: {left_out}" if left_out else ""),
        f"- pre-alignment: {common['align']}; window: {common['window']}; seed: {common['seed']}",
        f"- times: on {' | '.join(sorted({record['hardware'] for record in records}))}",
    ]
    if _known_motion(records):
        about.insert(0, _about_stand_ins(records))
    parts = [
        "# Table IV: DIR-Lab 4D CT, T00 to T50",
        "\n".join(about),
        markdown_table(rows_of_methods(records, missing)),
        EXPLAINED,
        "## Mean TRE of each case, mm, snapped",
        markdown_table(rows_of_cases(records, "tre_snapped_mean_mm", 2)),
        *(
            ["## Mean distance from the known motion, mm", markdown_table(known)]
            if _known_motion(records) and (known := rows_of_cases(records, "motion_error_mean_mm", 2))
            else []
        ),
        "## Seconds of each case",
        markdown_table(rows_of_cases(records, "seconds", 1)),
        "## Published by others: mean TRE over the ten cases, mm",
        markdown_table(DIRLAB),
    ]
    if lines := notes(records, missing, LABELS):
        parts += ["## What is changed or missing", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def rows_of_methods(records: Sequence[Record], missing: Collection[int] = ()) -> list[dict[str, str]]:
    """A row per method, over all cases that it registered, beside the paper's figure; then the paper's others.

    Args:
        missing: cases that count as asked for, although nothing was measured on them.
    """
    asked = {*_cases(records), *missing}
    paper = {row["method"]: f"{row['tre_mean_mm']} ± {row['tre_std_mm']}" for row in TABLE_4}
    beside = {method: paper[name] for name, methods in STAND_FOR.items() for method in methods}
    rows = []
    for method, results in _results(records).items():
        row = {"method": LABELS[method], "cases": f"{len(results)} of {len(asked)}"}
        if results:
            row |= {
                "TRE snapped": _with_spreads(results, "errors_snapped_mm"),
                "TRE": _with_spreads(results, "errors_mm"),
                **({"motion": _mean_of(results, "motion_error_mean_mm", 2)} if _known_motion(records) else {}),
                "Dice lungs": _mean_of(results, "dice_lungs", 3),
                **({"Dice motion": _mean_of(results, "motion_dice_lungs", 3)} if _known_motion(records) else {}),
                "HD95 lungs": _mean_of(results, "hd95_lungs_mm", 2),
                "folded": f"{sum(result['folded_voxels'] for result in results)}",
                "SD log J": _mean_of(results, "sd_log_jacobian", 3),
                "time s": _mean_of(results, "seconds", 1),
            }
        rows.append({**row, "paper": beside.get(method, "")})
    run = {method for method, results in _results(records).items() if results}
    rest = [name for name, methods in STAND_FOR.items() if not run & set(methods)]
    return [*rows, *({"method": f"{name}, published only", "paper": paper[name]} for name in rest)]


def rows_of_cases(records: Sequence[Record], name: str, digits: int) -> list[dict[str, str]]:
    """A row per case, with one figure of each method's."""
    rows = []
    for case in _cases(records):
        row = {"case": str(case)}
        for method in _results(records):
            own = [
                r["result"]
                for r in records
                if (r["arguments"]["case"], r["arguments"]["method"]) == (case, method)
            ]
            row[LABELS[method]] = f"{own[0][name]:.{digits}f}" if own and name in own[0] else ""
        rows.append(row)
    return rows


# -- parts of the above


def _cases(records: Sequence[Record]) -> list[int]:
    return sorted({record["arguments"]["case"] for record in records})


def _known_motion(records: Sequence[Record]) -> bool:
    return bool(records[0]["arguments"]["common"]["data"]["kind"] == "dirlab_phantom")


def _results(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """What each method measured, one per case, without its failures."""
    methods = dict.fromkeys(record["arguments"]["method"] for record in records)
    return {m: [r["result"] for r in records if r["arguments"]["method"] == m and r["result"]] for m in methods}


def _with_spreads(results: Sequence[Mapping[str, Any]], name: str) -> str:
    """Mean ± standard deviation over landmarks; standard deviation over cases, where there are several."""
    pooled, means = np.concatenate([result[name] for result in results]), [np.mean(r[name]) for r in results]
    over_cases = f"; {np.std(means):.2f}" if len(means) > 1 else ""
    return f"{pooled.mean():.2f} ± {pooled.std():.2f}{over_cases}"


def _mean_of(results: Sequence[Mapping[str, Any]], name: str, digits: int) -> str:
    """Mean over cases; empty where one of them doesn't have it."""
    if any(name not in result for result in results):
        return ""
    return f"{np.mean([result[name] for result in results]):.{digits}f}"


def _about_stand_ins(records: Sequence[Record]) -> str:
    section = records[0]["arguments"]["common"]["data"]
    errors = [known_motion_errors_mm(section, case) for case in _cases(records)]
    free, snapped = (np.concatenate([pair[k] for pair in errors]).mean() for k in (0, 1))
    return (
        f"- **Stand-ins**: a breathing phantom in DIR-Lab's layout, scale {section['scale']:g}. "
        "Don't compare these figures with the published ones. "
        f"The known motion itself has a TRE of {free:.2f} mm, snapped {snapped:.2f} mm; *motion*: distance in mm "
        "from where it takes the landmarks, so that nothing is rounded; mean over cases; *Dice motion*: of the "
        "carried lungs with T00's lungs as it carries them, instead of those that thresholds find in T50"
    )
