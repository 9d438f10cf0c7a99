"""Figure 4: the runs of Figure 3 over the epochs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from horizonplan.reproduce import style
from horizonplan.reproduce.cases import Case
from horizonplan.reproduce.fig3 import AGAIN, cost_of, present, seconds_of_a_pass, trained
from horizonplan.reproduce.findings import FAILS, HOLDS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import Lab

NAME, TITLE = "fig4", "Figure 4: fine-tuning with different horizons"
SHRUNK, KEPT = 0.5, 1.0  # of the first epoch's range of losses over large horizons


def run(lab: Lab, out: Path) -> Finding:
    """Read the runs of Figure 3, draw and judge."""
    found, note = present(lab)
    rows: list[dict[str, Any]] = []
    passes: dict[tuple[str, str, int], float] = {}
    for case in found:
        passes[case.name, AGAIN.name, case.depth] = seconds_of_a_pass(lab, case, cost_of(lab, case, AGAIN))
        for kind, h, own, method in trained(case):
            passes[case.name, kind, h] = seconds_of_a_pass(lab, own, cost_of(lab, own, method))
            for seed, run in zip(lab.seeds_of(case), lab.runs(own, method), strict=True):
                for epoch, (loss, held) in enumerate(zip(run.losses, run.validation, strict=True), 1):
                    place = {"model": case.name, "stride": kind, "h": h, "batch": own.batch, "seed": seed}
                    time = {"seconds": epoch * passes[case.name, kind, h]}
                    rows.append({**place, "epoch": epoch, **time, "loss": loss, "accuracy": held["accuracy"]})
    _draw(found, rows, passes, out / f"{NAME}.png")
    words = lab.words(found)
    caption = (
        "The runs of Figure 3, batches reciprocal to the horizon. Training loss and validation accuracy of each epoch, "
        f"mean and range over the seeds; below the loss over the time that it took ({lab.timed} of forward and "
        "backward). Dashed: disjoint windows; dotted: checkpointed back-propagation, whose curves over epochs are "
        f"back-propagation's. {words}.{note}"
    )
    return Finding(
        NAME, TITLE, caption, (f"{NAME}.png",), (write_table(out / f"{NAME}.csv", rows),), (_claim(found, rows),)
    )


def _claim(found: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    shrinks = []
    parts = []
    for case in found:
        first, last = (_range(rows, case, epoch, "loss") for epoch in (1, case.epochs))
        accuracies = (_range(rows, case, epoch, "accuracy") for epoch in (1, case.epochs))
        shrinks.append(last / first if first > 0 else 1.0)
        parts.append(
            f"{case.name} from {first:.3f} to {last:.3f} (of validation accuracies from "
            f"{' to '.join(f'{width:.3f}' for width in accuracies)})"
        )
    return Claim(
        says="Horizons part in the first epochs; as training goes on, large ones converge to back-propagation.",
        where="Section 5.2, Figure 4",
        rule=(
            f"The range of training losses over the horizons from T/2 to T shrinks to {SHRUNK:.0%} or less from "
            f"the first epoch to the last in every case: {HOLDS}. It does not grow in any: {PARTLY}. Else: {FAILS}."
        ),
        found="The range of training losses over the horizons from T/2 to T goes, in " + ", in ".join(parts) + ".",
        verdict=judge(max(shrinks) <= SHRUNK, max(shrinks) <= KEPT),
    )


def _range(rows: Sequence[dict[str, Any]], case: Case, epoch: int, value: str) -> float:
    """How far the horizons from T/2 to T are apart at stride 1, means over the seeds; 0 if none got so far."""
    large = [h for h in case.horizons if h >= case.depth / 2]
    seen = [_by_epoch(rows, case, "s = 1", h, value).get(epoch) for h in large]
    means = [statistics.fmean(found) for found in seen if found]
    return max(means) - min(means) if means else 0.0


def _draw(
    found: Sequence[Case], rows: Sequence[dict[str, Any]], passes: Mapping[tuple[str, str, int], float], path: Path
) -> None:
    made, axes = style.figure(3, len(found), 5.4 * len(found), 9)
    for column, case in enumerate(found):
        colours = style.horizon_colours(case.horizons)
        over_loss, over_accuracy, over_time = axes[:, column]
        for kind, h, own, _ in trained(case):
            form = {"color": colours[h], "ls": "-" if kind == "s = 1" else "--", "ms": 3, "marker": "o"}
            name = "BP" if h == case.depth else f"h = {h}" if kind == "s = 1" else f"h = s = {h}"
            losses, accuracies = (_by_epoch(rows, case, kind, h, value) for value in ("loss", "accuracy"))
            _line(over_loss, losses, form, f"{name} (batch {own.batch})")
            _line(over_accuracy, accuracies, form, name)
            _over_time(over_time, losses, passes[case.name, kind, h], form, name)
        exact = _by_epoch(rows, case, "s = 1", case.depth, "loss")
        dotted = {"color": style.EXACT, "ls": ":", "ms": 3, "marker": "o"}
        _over_time(over_time, exact, passes[case.name, AGAIN.name, case.depth], dotted, AGAIN.name)
        for panel in (over_loss, over_accuracy):
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
        over_loss.set(ylabel="training loss")
        over_accuracy.set(ylabel="validation accuracy")
        over_time.set(ylabel="training loss", xlabel="seconds of forward and backward", xlim=(0, None))
        over_loss.set_title(f"{case.name}: {case.title}")
        style.legend(over_loss, ncols=2, fontsize=6.5)
        style.legend(over_time, ncols=2, fontsize=6.5)
    style.save(made, path)


def _by_epoch(rows: Sequence[dict[str, Any]], case: Case, kind: str, h: int, value: str) -> dict[int, list[float]]:
    """The seeds' values in each epoch that some seed has."""
    mine = [r for r in rows if (r["model"], r["stride"], r["h"]) == (case.name, kind, h)]
    return {epoch: [r[value] for r in mine if r["epoch"] == epoch] for epoch in sorted({r["epoch"] for r in mine})}


def _line(panel: Any, values: Mapping[int, list[float]], form: Mapping[str, Any], label: str) -> None:
    """Mean and range over the seeds."""
    panel.plot(list(values), list(map(statistics.fmean, values.values())), label=label, **form)
    low, high = ([end(found) for found in values.values()] for end in (min, max))
    panel.fill_between(list(values), low, high, color=form["color"], alpha=0.08, lw=0)


def _over_time(
    panel: Any, values: Mapping[int, list[float]], seconds: float, form: Mapping[str, Any], label: str
) -> None:
    """Means over the time that the epochs took."""
    panel.plot([epoch * seconds for epoch in values], list(map(statistics.fmean, values.values())), label=label, **form)
