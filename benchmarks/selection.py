"""Which way of choosing a horizon is best, judged by what every horizon trains to.

    OMP_NUM_THREADS=1 python benchmarks/selection.py                          # all, some hour on one core
    OMP_NUM_THREADS=1 python benchmarks/selection.py --tasks m1,m3 --seeds 0
    python benchmarks/selection.py --report                                   # tables and plots from what is stored

Everything is stored by cell in `benchmarks/results/selection`, and what is stored is not run again: kill it whenever
you like, start it again with the same command. Run one process a task at a time.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import selection_choices
import selection_report
import selection_truth
import typer
from selection_tasks import TASKS
from typer import Option

import horizonplan as hp

FOLDER = Path(__file__).resolve().parent / "results" / "selection"


def main(
    tasks: Annotated[str, Option(help="Names with commas between them.")] = ",".join(TASKS),
    seeds: Annotated[str, Option(help="Numbers with commas between them.")] = "0,1,2",
    out: Annotated[Path, Option(help="Where results are kept.")] = FOLDER,
    truth_only: Annotated[bool, Option("--truth-only", help="Train, and choose nothing.")] = False,
    report: Annotated[bool, Option("--report", help="Only render what is stored.")] = False,
    tune: Annotated[bool, Option("--tune", help="Only try back-propagation's learning rates.")] = False,
) -> None:
    """Train every horizon of some tasks, let each selection choose, and judge the choices."""
    names = tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        raise typer.BadParameter(f"tasks={unknown}: give some of {', '.join(TASKS)}")
    numbers = [int(seed) for seed in seeds.split(",")]
    if tune:
        selection_truth.tune(names)
        return
    if not report:
        selection_truth.run(names, numbers, out)
        if truth_only:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", hp.PoorFitWarning)  # that the paper's curves fit poorly is in the result
            selection_choices.run(names, numbers, out)
    selection_report.write(out)


if __name__ == "__main__":
    typer.run(main)
