"""python scripts/eval_longitudinal_interpolation.py data=tcia_4d_lung data.patient=100_HM10395 out=runs/table2

Table II, Figures 4b and 6: scans of a series over a therapy (by the paper numbers 3 and 6 of 8) are left out of
the fit in turn and predicted. cases= changes the `data` section, once for each case. With
data=tcia_4d_lung_phantom a stand-in is written first and taken.

Writes into the run directory: config.yaml, results/ (a .json per case, scan left out and method), pictures/
(slices, for scripts/figures.py), metrics.csv (a row per image), table_2.md beside the paper's figures, and
eval_longitudinal_interpolation.log. The same command goes on where it was stopped; further cases, scans and
methods join the table. overwrite=true starts anew.
"""

from __future__ import annotations

from configuration import DictConfig, hydra
from eval_4dct_interpolation import write_interpolation
from leave_out import evaluate
from published import TABLE_2
from results import end_without_result
from run_directory import CONFIGS, launch, run_directory, write_config, wrote

TITLE = "Table II: scans over a therapy that the fit did not see"


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="eval_longitudinal_interpolation")
def main(config: DictConfig) -> None:
    with run_directory(config, "eval_longitudinal_interpolation", ()) as out:
        records, missing = evaluate(config, out)
        wrote(write_config(config, out / "config.yaml"))
        write_interpolation(out, "table_2", TITLE, records, missing, TABLE_2)
        wrote(out / "eval_longitudinal_interpolation.log")
        end_without_result(records)


if __name__ == "__main__":
    launch(main)
