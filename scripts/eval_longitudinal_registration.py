"""python scripts/eval_longitudinal_registration.py data=tcia_4d_lung data.patient=100_HM10395 out=runs/table5

Table V, Figures 8 to 10: pairs of scans over a therapy, the first with each later one (long range) and each with
the next one (short range), registered by every method; the earlier scan is the reference, its tumour is carried
to the later one. cases= changes the `data` section, once for each case. With data=tcia_4d_lung_phantom a stand-in
is written first and taken.

Writes into the run directory: config.yaml, results/ (a .json per case, pair and method), pictures/ (slices, for
scripts/figures.py), metrics.csv (a row per pair), table_5.md beside the paper's figures, and
eval_longitudinal_registration.log. The same command goes on where it was stopped; further cases and methods join
the table. overwrite=true starts anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from answers import Answers, all_scores, answer, known_registration
from configuration import DictConfig, hydra
from data import PatientData
from leave_out import align_of, common_of, readable_cases, records_of, start_anew
from method_options import check_options
from pair_methods import LABELS, METHODS, NAMES, timed
from paper_rows import beside, published_only
from published import TABLE_5
from results import Record, chosen_methods, end_without_result, listed, recorded
from run_directory import CONFIGS, launch, logger, plain, run_directory, write_config, wrote
from saved_slices import save_slices
from series_methods import bar_of
from series_tables import CARRIED, PARTS, Row, image_rows, means, seconds, write_report
from truth import truth_of

from stnerp import Grid, InputError

SCHEMES = ("long", "short")
STAND_FOR = {
    "ANTs": ("ants_syn",),
    "IDIR": ("idir",),
    "ST-NeRP": ("stnerp_fast_prior", "stnerp_paper"),
    "ST-NeRP (w/o prior)": ("stnerp_fast", "stnerp_paper_without_prior"),
}
PAPER = {"paper PSNR": "psnr_db", "paper SSIM": "ssim", "paper Dice": "dice", "paper folded": "folded_voxels"}
EXPLAINED = f"""\
Cells: mean ± standard deviation over cases and pairs. PSNR and SSIM: in the window as [0, 1], on the later scan's
grid; where the earlier one has another, over the voxels that it reaches. TRE: of the later scan's landmarks,
mapped to the earlier, in mm, without snapping. Dice and HD95: means over the earlier scan's contours
(`data.contours`), carried to the later one, where the earlier one reaches; a contour that is lost has a Dice of 0
and no HD95.
{PARTS}
{CARRIED}
*Dice motion*: with the same contours carried by a stand-in's own motion, so that the later scan's voxels, into
which its own contours are cut anew, cost nothing. Folded: mean number of voxels with |J| ≤ 0. Time: seconds for a
pair, from images to the displacement at every voxel. IDIR draws its points in the lungs, elsewhere its answers
mean little. DLIR and the CNN with anatomical constraints are fitted to the pair itself here, without a cohort and
without key points: not what their authors published. Paper: its Table V, on its own five patients; *published
only*: of methods without a row here."""


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="eval_longitudinal_registration")
def main(config: DictConfig) -> None:
    with run_directory(config, "eval_longitudinal_registration", ()) as out:
        options, schemes = plain(config.options) or {}, listed("schemes", plain(config.schemes), str)
        methods = chosen_methods(plain(config.methods), options, NAMES)
        check_options(options, METHODS)
        if not set(schemes) <= set(SCHEMES):
            raise InputError(f"schemes: {schemes!r} must be some of {', '.join(SCHEMES)}")
        start_anew(config, out, methods, options)
        wrote(write_config(config, out / "config.yaml"))
        missing: dict[str, str] = {}
        wanted_of = partial(pairs_of, schemes=schemes)
        for about, patient, pairs in readable_cases(config, out, missing, wanted_of):
            common = common_of(config)
            for method in methods:
                for scheme, earlier, later in pairs:
                    stem = f"case{about['case']:02d}-{scheme}{earlier + 1}to{later + 1}-{method}"
                    arguments = {
                        **about,
                        "scheme": scheme,
                        "pair": [earlier + 1, later + 1],
                        "method": method,
                        "options": options.get(method, {}),
                        "common": common,
                    }
                    settings = {**common, "align": align_of(config, patient), **bar_of(method, config.progress)}
                    settings |= arguments["options"]
                    pair, picture = pair_of(patient, earlier, later), out / "pictures" / f"{stem}.npz"
                    make = partial(measure, pair, (earlier + 1, later + 1), method, settings, picture)
                    record, new = recorded(out / "results" / f"{stem}.json", arguments, make)
                    say(stem, record, new)
        records = records_of(out, missing)
        rows = image_rows(records)
        title = "Table V: pairs of scans over a therapy, long and short range"
        sections = [("", rows_of_schemes(records, rows)), ("Each pair", rows_of_pairs(records))]
        write_report(out, "table_5", title, records, rows, sections, missing, EXPLAINED)
        wrote(out / "eval_longitudinal_registration.log")
        end_without_result(records)


def pairs_of(patient: PatientData, schemes: Sequence[str]) -> list[tuple[str, int, int]]:
    """(scheme, earlier, later): the first scan with each later one, and each with the next."""
    scans = len(patient.series)
    pairs = {
        "long": [("long", 0, later) for later in range(1, scans)],
        "short": [("short", later - 1, later) for later in range(1, scans)],
    }
    return [pair for scheme in schemes for pair in pairs[scheme]]


def pair_of(patient: PatientData, earlier: int, later: int) -> PatientData:
    """Two images of a patient as a series, the earlier one its reference."""
    series = replace(patient.series, reference=earlier).subset([earlier, later])
    return replace(patient, series=replace(series, period=None))


def measure(
    pair: PatientData, scans: Sequence[int], method: str, settings: Mapping[str, Any], picture: Path
) -> dict[str, Any]:
    """Scores of a method on a pair, as a list of one image, its seconds, and which scans have contours."""
    series = pair.series
    if method == "known_motion":
        found, spent = known_registration(pair, 1, Grid.of(series.images[1])), 0.0
    else:
        images = series.reference_image, series.images[1]
        found, spent = timed(method, *images, **{"window": series.window, **settings})
    answers = Answers(fitted=1, registration=lambda index, grid: found)
    given = answer(pair, answers, 1)
    row: dict[str, Any] = {"earlier": series.names[0], "later": series.names[1], **all_scores(pair, given, 1)}
    save_slices(picture, pair, answers, given, 1)
    return {"images": [{**row, "seconds": spent}], "seconds": spent, "truth": truth_of(pair, scans)}


def say(name: str, record: Record, new: bool) -> None:
    """A line on a measurement."""
    if record["failure"]:
        logger.error("%s: failed: %s", name, record["failure"])
        return
    row = record["result"]["images"][0]
    told = [f"PSNR {row['psnr_db']:.2f} dB"] + (
        [f"TRE {row['tre_mean_mm']:.2f} mm"] if "tre_mean_mm" in row else []
    )
    logger.info("%s: %s, %.1f s%s", name, ", ".join(told), row["seconds"], "" if new else " (before)")


def rows_of_schemes(records: Sequence[Record], rows: Sequence[Row]) -> list[Row]:
    """A row per scheme and method, beside the paper's figures; then the paper's others."""
    table = []
    for scheme in SCHEMES:
        for method in NAMES:
            asked = (scheme, method)
            mine = [r for r in rows if (r["scheme"], r["method"]) == asked]
            own = [
                r for r in records if (r["arguments"]["scheme"], r["arguments"]["method"]) == asked and r["result"]
            ]
            if not mine:
                continue
            row: Row = {"scheme": scheme, "method": LABELS[method], "pairs": str(len(mine)), **means(mine)}
            paper = beside(TABLE_5, STAND_FOR, PAPER, method, scheme=scheme)
            table.append(row | {"time s": seconds(own)} | paper)
    shown = [(row["scheme"], row["method"]) for row in rows]
    return [*table, *published_only(TABLE_5, STAND_FOR, PAPER, ["scheme"], shown)]


def rows_of_pairs(records: Sequence[Record]) -> list[Row]:
    """A row per case and pair, with each method's Dice, or its PSNR where no contours are known."""
    name, digits = ("dice", 3) if any("dice" in row for row in image_rows(records)) else ("psnr_db", 2)
    table: dict[tuple[Any, ...], Row] = {}
    for record in records:
        asked = record["arguments"]
        scheme, case, (earlier, later) = asked["scheme"], asked["case"], asked["pair"]
        first = {"scheme": scheme, "case": str(case), "pair": f"scan {earlier} to {later}"}
        for row in image_rows([record]):
            cell = f"{row[name]:.{digits}f}" if name in row else ""
            table.setdefault((scheme, case, earlier, later), first)[LABELS[row["method"]]] = cell
    return [table[key] for key in sorted(table)]


if __name__ == "__main__":
    launch(main)
