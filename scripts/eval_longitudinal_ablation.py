"""python scripts/eval_longitudinal_ablation.py data=tcia_4d_lung data.patient=100_HM10395 out=runs/table3

Tables III and VI, Figure 7: fractions of a therapy (by the paper numbers 3 and 4 of 5) are left out in turn; the
model with and without the prior (Ref-Net) and without t (each image by itself), on the fraction left out
(interpolation) and on those that the fit saw (registration), with the tumour's contour. cases= changes the `data`
section, once for each case. With data=tcia_4d_lung_phantom a stand-in is written first and taken.

Writes into the run directory: config.yaml, results/ (a .json per case, fraction left out and method), pictures/
(slices, for scripts/figures.py), metrics.csv (a row per image), table_3.md and table_6.md beside the paper's
figures, and eval_longitudinal_ablation.log. The same command goes on where it was stopped; further cases,
fractions and methods join the table. overwrite=true starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from configuration import DictConfig, hydra
from leave_out import evaluate
from paper_rows import beside, published_only
from published import TABLE_3, TABLE_6
from results import Record, end_without_result
from run_directory import CONFIGS, launch, run_directory, write_config, wrote
from series_methods import LABELS
from series_tables import EXPLAINED, Row, by_method, image_rows, means, rows_of_methods, seconds, write_report

EXPLAINED_PAPER = """ *Published only*: the paper's, of methods and fractions without a row here."""
EXPLAINED_TASKS = """ *Registration*: the images that these fits saw; the paper's is the mean of its Table V, of
pairs (eval_longitudinal_registration.py): *published only*, beside no row here."""
PAPER = {"paper PSNR": "psnr_db", "paper SSIM": "ssim", "paper Dice": "dice"}
TASKS = {"interpolation": True, "registration": False}  # whether the image was left out
STAND_FOR = {
    "ST-NeRP": ("stnerp_fast_prior", "stnerp_paper"),
    "ST-NeRP (w/o prior)": ("stnerp_fast", "stnerp_paper_without_prior"),
    "ST-NeRP (w/o t)": ("stnerp_fast_without_t", "stnerp_paper_without_t"),
}


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="eval_longitudinal_ablation")
def main(config: DictConfig) -> None:
    with run_directory(config, "eval_longitudinal_ablation", ()) as out:
        records, missing = evaluate(config, out)
        wrote(write_config(config, out / "config.yaml"))
        rows = image_rows(records)
        title = "Table III: fractions of a therapy, with and without the prior, with and without t"
        sections = [("", rows_of_fractions(records, rows)), ("Over everything", rows_of_methods(records, rows))]
        write_report(out, "table_3", title, records, rows, sections, missing, EXPLAINED + EXPLAINED_PAPER)
        title = "Table VI: what the prior does"
        sections = [("", rows_of_tasks(records, rows))]
        write_report(out, "table_6", title, records, rows, sections, missing, EXPLAINED + EXPLAINED_TASKS)
        wrote(out / "eval_longitudinal_ablation.log")
        end_without_result(records)


def rows_of_fractions(records: Sequence[Record], rows: Sequence[Row]) -> list[Row]:
    """A row per task, fraction and method, beside the paper's figures; then the paper's others."""
    table = []
    for task, unseen in TASKS.items():
        for fraction in sorted({row["held_out"] for row in rows}):
            for method, own in by_method(records).items():
                mine = [r for r in rows if (r["held_out"], r["method"], r["unseen"]) == (fraction, method, unseen)]
                if mine:
                    row: Row = {"task": task, "fraction": str(fraction), "method": LABELS[method]}
                    row |= {"images": str(len(mine))} | means(mine) | {"time s": seconds(own)}
                    paper = beside(TABLE_3, STAND_FOR, PAPER, method, task=task, fraction=fraction)
                    table.append(row | paper)
    shown = [(task_of(row), row["held_out"], row["method"]) for row in rows]
    return [*table, *published_only(TABLE_3, STAND_FOR, PAPER, ["task", "fraction"], shown)]


def rows_of_tasks(records: Sequence[Record], rows: Sequence[Row]) -> list[Row]:
    """A row per task and method: means over cases and fractions; then the paper's that are beside none."""
    table = []
    for task, unseen in TASKS.items():
        for method in by_method(records):
            mine = [r for r in rows if (r["method"], r["unseen"]) == (method, unseen)]
            if mine:
                row: Row = {"task": task, "method": LABELS[method], "images": str(len(mine)), **means(mine)}
                # The paper's registration is another: the pairs of its Table V.
                table.append(row | beside(TABLE_6 if unseen else [], STAND_FOR, PAPER, method, task=task))
    shown = [(task_of(row), row["method"]) for row in rows if row["unseen"]]
    return [*table, *published_only(TABLE_6, STAND_FOR, PAPER, ["task"], shown)]


def task_of(row: Row) -> str:
    return next(task for task, unseen in TASKS.items() if row["unseen"] is unseen)


if __name__ == "__main__":
    launch(main)
