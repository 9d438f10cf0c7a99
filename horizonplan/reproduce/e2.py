"""Figure E2: training loss over the epochs for each horizon, at the paper's stride 1 and with disjoint windows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horizonplan.reproduce import style
from horizonplan.reproduce.cases import Case
from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import Lab, Run
from horizonplan.reproduce.methods import Method, disjoint, sliding
from horizonplan.reproduce.numbers import ranks, rate

NAME, TITLE = "e2", "Figure E2: training loss for each horizon"
MODELS = ("M1", "M2", "M3")
ALIGNED, NEARLY = 0.8, 0.5  # of back-propagation's logarithmic decrease after one epoch
STALLED = 1.2  # times back-propagation's final loss
STRONG, WEAK = -0.8, -0.5  # rank correlation of horizon and final loss


def trained(case: Case) -> list[tuple[str, int, Method]]:
    """What is trained: stride ("s = 1" or "s = h"), horizon, method."""
    overlapping = [("s = 1", h, sliding(h, case.depth)) for h in case.horizons]
    return overlapping + [("s = h", h, disjoint(h)) for h in case.disjoint]


def run(lab: Lab, out: Path) -> Finding:
    """Train every horizon, draw and judge."""
    rows: list[dict[str, Any]] = []
    for case in map(lab.case, MODELS):
        for kind, h, method in trained(case):
            for seed, found in zip(lab.seeds_of(case), lab.runs(case, method), strict=True):
                rows += _rows(case, kind, h, seed, found)
    _draw(lab, rows, out / f"{NAME}.png")
    words = "; ".join(f"{lab.case(m).words}, {len(lab.seeds_of(lab.case(m)))} seeds" for m in MODELS)
    caption = (
        "Mean training loss of each epoch, mean over the seeds (thin: each seed). Above the paper's stride 1, "
        f"below disjoint windows of the same horizons; back-propagation is black in both. {words}."
    )
    return Finding(
        NAME, TITLE, caption, (f"{NAME}.png",), (write_table(out / f"{NAME}.csv", rows),), _claims(lab, rows)
    )


def _rows(case: Case, kind: str, h: int, seed: int, found: Run) -> list[dict[str, Any]]:
    losses = [found.initial_loss, *found.losses]
    losses += [math.inf] * (case.epochs + 1 - len(losses))  # broke off
    place = {"model": case.name, "stride": kind, "h": h, "seed": seed}
    return [{**place, "epoch": epoch, "loss": loss} for epoch, loss in enumerate(losses)]


def _loss(rows: Sequence[dict[str, Any]], model: str, kind: str, h: int, epoch: int) -> list[float]:
    wanted = model, kind, h, epoch
    return [r["loss"] for r in rows if (r["model"], r["stride"], r["h"], r["epoch"]) == wanted]


def _claims(lab: Lab, rows: Sequence[dict[str, Any]]) -> tuple[Claim, ...]:
    all_cases = [lab.case(model) for model in MODELS]
    return _early(all_cases, rows), _late(all_cases, rows), _larger(all_cases, rows), _strides(all_cases, rows)


def _early(all_cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    rates = {}
    for case in all_cases:
        initial, exact = (_loss(rows, case.name, "s = 1", case.depth, epoch) for epoch in (0, 1))
        small = _loss(rows, case.name, "s = 1", 1, 1)
        rates[case.name] = statistics.fmean(rate(a, b, c) for a, b, c in zip(initial, small, exact, strict=True))
    return Claim(
        says="In the first epochs the loss falls alike for all horizons, so that a small one is a good warm-up.",
        where="Appendix E.2, Figure E2",
        rule=(
            f"After the first epoch h = 1 has reached at least {ALIGNED} of back-propagation's logarithmic decrease in "
            f"every model: {HOLDS}. At least {NEARLY} in all but one: {PARTLY}. Else: {FAILS}."
        ),
        found="h = 1 has reached " + ", ".join(f"{value:.2f} in {model}" for model, value in rates.items()) + ".",
        verdict=judge(min(rates.values()) >= ALIGNED, sorted(rates.values())[1] >= NEARLY),
    )


def _late(all_cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    ratios = {}
    for case in all_cases:
        small, exact = (_loss(rows, case.name, "s = 1", h, case.epochs) for h in (1, case.depth))
        ratios[case.name] = statistics.fmean(small) / statistics.fmean(exact)
    return Claim(
        says="Later the losses part, and those of small horizons stay high.",
        where="Appendix E.2, Figure E2",
        rule=(
            f"The final loss of h = 1 is at least {STALLED} times back-propagation's in every model: {HOLDS}. In all "
            f"but one: {PARTLY}. Else: {FAILS}."
        ),
        found="It is " + ", ".join(f"{value:.1f} times in {model}" for model, value in ratios.items()) + ".",
        verdict=judge(min(ratios.values()) >= STALLED, sorted(ratios.values())[1] >= STALLED),
    )


def _larger(all_cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    found, worst = {}, []
    for case in all_cases:
        finals = [statistics.fmean(_loss(rows, case.name, "s = 1", h, case.epochs)) for h in case.horizons]
        found[case.name] = ranks(case.horizons, finals)
        highest = case.horizons[finals.index(max(finals))]
        worst.append(f"h = {highest} in {case.name}")
    return Claim(
        says="Larger horizons perform better, and converge to back-propagation's result.",
        where="Section 5.2, Appendix E.2",
        rule=(
            f"The rank correlation of horizon and final loss (stride 1) is {STRONG} or less in every model: {HOLDS}. "
            f"{WEAK} or less in all but one: {PARTLY}. Else: {FAILS}."
        ),
        found=(
            "The correlation is "
            + ", ".join(f"{value:.2f} in {model}" for model, value in found.items())
            + f". The highest final loss is that of {', '.join(worst)}."
        ),
        verdict=judge(max(found.values()) <= STRONG, sorted(found.values())[-2] <= WEAK),
    )


def _strides(all_cases: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    parts = []
    for case in all_cases:
        both = [h for h in case.disjoint if h in case.horizons]
        ends = {
            (kind, h): statistics.fmean(_loss(rows, case.name, kind, h, case.epochs))
            for kind in ("s = 1", "s = h")
            for h in both
        }
        better = sum(ends["s = h", h] < ends["s = 1", h] for h in both)
        parts.append(f"{better} of {len(both)} in {case.name}")
    return Claim(
        says="Disjoint windows (s = h), which cost less time, against the paper's stride 1 at the same horizon.",
        where="not in the paper",
        rule="No verdict: how often disjoint windows end with the lower training loss.",
        found="Disjoint windows end lower at " + ", ".join(parts) + " horizons.",
        verdict=OURS,
    )


def _draw(lab: Lab, rows: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(2, len(MODELS), 10.5, 6)
    for column, model in enumerate(MODELS):
        case = lab.case(model)
        colours = style.horizon_colours(case.horizons)
        limits = []
        for panel, kind in zip(axes[:, column], ("s = 1", "s = h"), strict=True):
            shown = case.horizons if kind == "s = 1" else (*case.disjoint, case.depth)
            for h in shown:
                drawn = "s = 1" if h == case.depth else kind
                values = [_loss(rows, model, drawn, h, epoch) for epoch in range(case.epochs + 1)]
                epochs = [e for e, v in enumerate(values) if all(map(math.isfinite, v))]
                means = [statistics.fmean(values[e]) for e in epochs]
                label = "BP" if h == case.depth else f"h = {h}"
                panel.plot(epochs, means, color=colours[h], label=label, lw=1.4)
                for seed in range(len(values[0])):
                    panel.plot(epochs, [values[e][seed] for e in epochs], color=colours[h], alpha=0.3, lw=0.5)
            panel.set(yscale="log", xlabel="epoch")
            panel.set_title(f"{model}: {case.title}, {kind}")
            style.legend(panel, ncols=2)
            limits.append(panel.get_ylim())
        for panel in axes[:, column]:
            panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
            style.log_ticks(panel)
    for panel in axes[:, 0]:
        panel.set_ylabel("training loss")
    style.save(made, path)
