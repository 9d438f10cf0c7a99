"""Figure 4: the runs of Figure 3 over the epochs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horizonplan.reproduce import style
from horizonplan.reproduce.cases import Case
from horizonplan.reproduce.fig3 import present, trained
from horizonplan.reproduce.findings import FAILS, HOLDS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import Lab

NAME, TITLE = "fig4", "Figure 4: fine-tuning with different horizons"
SHRUNK, KEPT = 0.5, 1.0  # of the first epoch's spread of accuracies over large horizons


def run(lab: Lab, out: Path) -> Finding:
    """Read the runs of Figure 3, draw and judge."""
    found, note = present(lab)
    rows: list[dict[str, Any]] = []
    for case in found:
        for kind, h, own, method in trained(case):
            for seed, run in zip(lab.seeds_of(case), lab.runs(own, method), strict=True):
                for epoch, (loss, held) in enumerate(zip(run.losses, run.validation, strict=True), 1):
                    place = {"model": case.name, "stride": kind, "h": h, "batch": own.batch, "seed": seed}
                    rows.append({**place, "epoch": epoch, "loss": loss, "accuracy": held["accuracy"]})
    _draw(found, rows, out / f"{NAME}.png")
    words = "; ".join(f"{c.words}; {len(lab.seeds_of(c))} seeds" for c in found)
    caption = (
        "The runs of Figure 3, batches reciprocal to the horizon. Above: training loss, below: validation accuracy "
        f"of each epoch, means over the seeds; dashed: disjoint windows. {words}.{note}"
    )
    return Finding(
        NAME, TITLE, caption, (f"{NAME}.png",), (write_table(out / f"{NAME}.csv", rows),), (_claim(found, rows),)
    )


def _mean(rows: Sequence[dict[str, Any]], model: str, kind: str, h: int, epoch: int, value: str) -> float | None:
    wanted = model, kind, h, epoch
    found = [r[value] for r in rows if (r["model"], r["stride"], r["h"], r["epoch"]) == wanted]
    return statistics.fmean(found) if found else None


def _claim(found: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    shrinks = {}
    parts = []
    for case in found:
        large = [h for h in case.horizons if h >= case.depth / 2]
        widths = []
        for epoch in (1, case.epochs):
            seen = [_mean(rows, case.name, "s = 1", h, epoch, "accuracy") for h in large]
            known = [value for value in seen if value is not None]
            widths.append(max(known) - min(known))
        shrinks[case.name] = widths[1] / widths[0] if widths[0] > 0 else 1.0
        parts.append(f"{case.name} from {widths[0]:.3f} to {widths[1]:.3f}")
    return Claim(
        says="Horizons part in the first epochs; as training goes on, large ones converge to back-propagation.",
        where="Section 5.2, Figure 4",
        rule=(
            f"The range of validation accuracies over the horizons from T/2 to T shrinks to {SHRUNK:.0%} or less from "
            f"the first epoch to the last in every case: {HOLDS}. It does not grow in any: {PARTLY}. Else: {FAILS}."
        ),
        found="The range goes, in " + ", in ".join(parts) + ".",
        verdict=judge(max(shrinks.values()) <= SHRUNK, max(shrinks.values()) <= KEPT),
    )


def _draw(found: Sequence[Case], rows: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(2, len(found), 5.2 * len(found), 5.6)
    for column, case in enumerate(found):
        colours = style.horizon_colours(case.horizons)
        for panel, value in zip(axes[:, column], ("loss", "accuracy"), strict=True):
            for kind, h, own, _ in trained(case):
                values = [_mean(rows, case.name, kind, h, e, value) for e in range(1, case.epochs + 1)]
                epochs = [e for e, v in enumerate(values, 1) if v is not None]
                label = "BP" if h == case.depth else f"h = {h}" if kind == "s = 1" else f"h = s = {h}"
                known = [v for v in values if v is not None]
                options = {"color": colours[h], "ls": "-" if kind == "s = 1" else "--", "ms": 3, "marker": "o"}
                panel.plot(epochs, known, label=f"{label} (batch {own.batch})", **options)
            panel.set(xlabel="epoch", ylabel=f"training {value}" if value == "loss" else f"validation {value}")
            panel.set_xticks(range(1, case.epochs + 1))
        axes[0, column].set_title(f"{case.name}: {case.title}")
        style.legend(axes[0, column], ncols=2, fontsize=6.5)
    style.save(made, path)
