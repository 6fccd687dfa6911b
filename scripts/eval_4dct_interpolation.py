"""python scripts/eval_4dct_interpolation.py data=tcia_4d_lung data.patient=100_HM10395 out=runs/table1

Table I, Figures 4a and 5: phases of a 4D CT are left out of the fit in turn (by the paper scans 4, 6 and 8) and
predicted. cases= changes the `data` section, once for each case: another patient, another manifest. With
data=tcia_4d_lung_phantom a stand-in is written first and taken.

Writes into the run directory: config.yaml, results/ (a .json per case, scan left out and method), pictures/
(slices, for scripts/figures.py), metrics.csv (a row per image), table_1.md beside the paper's figures, and
eval_4dct_interpolation.log. The same command goes on where it was stopped; further cases, scans and methods join
the table. overwrite=true starts anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configuration import DictConfig, hydra
from leave_out import evaluate
from published import TABLE_1
from results import Record, end_without_result
from run_directory import CONFIGS, launch, run_directory, write_config, wrote
from series_methods import LABELS
from series_tables import Row, by_method, image_rows, means, rows_of_methods, write_report

TITLE = "Table I: phases of a 4D CT that the fit did not see"


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="eval_4dct_interpolation")
def main(config: DictConfig) -> None:
    with run_directory(config, "eval_4dct_interpolation", ()) as out:
        records, missing = evaluate(config, out)
        wrote(write_config(config, out / "config.yaml"))
        write_interpolation(out, "table_1", TITLE, records, missing, TABLE_1)
        wrote(out / "eval_4dct_interpolation.log")
        end_without_result(records)


def write_interpolation(
    out: Path,
    name: str,
    title: str,
    records: Sequence[Record],
    missing: Mapping[str, str],
    published: Sequence[Mapping[str, Any]],
) -> None:
    """Tables I and II: means over everything, each scan left out, and what the paper says."""
    rows = image_rows(records)
    sections = [
        ("", rows_of_methods(records, rows)),
        ("Each scan that was left out", rows_of_scans(records, rows)),
        ("The reference as Ref-Net draws it, network alone", rows_of_references(records)),
        ("Published: ST-NeRP, on the paper's own patients", [dict(row) for row in published]),
    ]
    first, *others = sections
    write_report(out, name, title, records, rows, [first, *(s for s in others if s[1])], missing)


def rows_of_scans(records: Sequence[Record], rows: Sequence[Row]) -> list[Row]:
    """A row per case, scan and method: the scan left out (target), and the mean over the others (rest)."""
    table = []
    times = {(row["case"], row["scan"]): f"{row['time']:g}" for row in rows}
    keys = sorted({(row["case"], row["held_out"]) for row in rows})
    for case, scan in keys:
        for method in by_method(records):
            own = [r for r in rows if (r["case"], r["held_out"], r["method"]) == (case, scan, method)]
            if own:
                target, rest = ([r for r in own if r["unseen"] is seen] for seen in (True, False))
                row = {"case": str(case), "scan": str(scan), "time": times.get((case, scan), "")}
                row |= {"method": LABELS[method]} | means(target, "target ") | means(rest, "rest ")
                table.append(row)
    return table


def rows_of_references(records: Sequence[Record]) -> list[Row]:
    """A row per case and method with a Ref-Net."""
    found: dict[tuple[int, str], Row] = {}
    for record in records:
        result, asked = record["result"], record["arguments"]
        if "prior_psnr_db" in result:
            row = {"case": str(asked["case"]), "method": LABELS[asked["method"]]}
            row |= {"PSNR dB": f"{result['prior_psnr_db']:.2f}", "SSIM": f"{result['prior_ssim']:.3f}"}
            found[asked["case"], asked["method"]] = row
    return [found[key] for key in sorted(found)]


if __name__ == "__main__":
    launch(main)
