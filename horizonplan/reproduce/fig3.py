"""Figure 3: accuracy and memory of each horizon, the batch reciprocal to the horizon, so that memory is about equal.

The paper tunes ResNet-50 in full and ViT-B/16 with LoRA on CIFAR-100. The small run has M3's network from scratch and
LoRA on MiniLM in their places. Figure 4 draws the same runs over the epochs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from horizonplan.reproduce import style, verses
from horizonplan.reproduce.cases import Case, fine_tuning
from horizonplan.reproduce.findings import FAILS, HOLDS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import ROUNDS, Cost, Lab, with_batch
from horizonplan.reproduce.methods import BP, Method, checkpointed, disjoint, sliding
from horizonplan.reproduce.numbers import line, spread

NAME, TITLE = "fig3", "Figure 3: accuracy and memory at equal memory"
EQUAL, ROUGHLY = 0.25, 0.5  # how far from back-propagation's memory the reciprocal rule may end
STRAIGHT, NEARLY = 0.05, 0.1  # how far from a line, as a part of the mean, M(h) may be
CLOSE, NEAR = 0.02, 0.05  # accuracy
AGAIN = checkpointed(1)


def present(lab: Lab) -> tuple[list[Case], str]:
    """The cases that can be run here, and a sentence on the one that cannot."""
    found = [lab.case(name) for name in fine_tuning(lab.scale)]
    reason = verses.missing(lab.sources.text) if lab.scale == "small" else None
    if reason is None:
        return found, ""
    return found[:1], f" {found[1].name} was not run: {reason}."


def reciprocal(case: Case, horizon: int) -> Case:
    """The case with the batch that makes memory equal if memory is proportional to the horizon."""
    return with_batch(case, round(case.batch * case.depth / horizon))


def trained(case: Case) -> list[tuple[str, int, Case, Method]]:
    """Stride, horizon, case with its batch, method."""
    overlapping = [("s = 1", h, reciprocal(case, h), sliding(h, case.depth)) for h in case.horizons]
    return overlapping + [("s = h", h, reciprocal(case, h), disjoint(h)) for h in case.disjoint]


def run(lab: Lab, out: Path) -> Finding:
    """Train every horizon with its batch, measure its step, draw and judge."""
    found, note = present(lab)
    rows: list[dict[str, Any]] = []
    seeds: list[dict[str, Any]] = []
    for case in found:
        for kind, h, own, method in (*trained(case), (AGAIN.name, case.depth, case, AGAIN)):
            runs = lab.runs(own, BP if method == AGAIN else method)  # the same gradient
            accuracies = [run.final_accuracy for run in runs]
            rows.append(_row(lab, case, kind, h, own, cost_of(lab, own, method), accuracies))
            place = {name: rows[-1][name] for name in ("model", "kind", "h", "batch")}
            pairs = zip(lab.seeds_of(case), accuracies, strict=True)
            seeds += [{**place, "seed": seed, "accuracy": accuracy} for seed, accuracy in pairs]
    same = {
        case.name: lab.costs(case, [sliding(h, case.depth) for h in case.horizons], f"{NAME}/same-batch")
        for case in found
    }
    memory = [
        {"model": case.name, "h": h, "batch": case.batch, "bytes": same[case.name][sliding(h, case.depth).name].bytes}
        for case in found
        for h in case.horizons
    ]
    _draw(found, rows, out / f"{NAME}.png")
    words = f"{lab.words(found)}; the batches named are those of h = T"
    places = "" if lab.scale == "paper" else " The small run has other cases than the paper's ResNet-50 and ViT-B/16."
    caption = (
        "Above: validation accuracy after the last epoch (lines: mean and deviation over the seeds) and peak memory "
        f"of a step (bars), with batches reciprocal to the horizon. Below: {lab.timed} of forward and backward for one "
        f"pass over the data (bars: median of at least {ROUNDS} steps, lines: the middle half). Checkpointed "
        f"back-propagation has back-propagation's accuracy.{places} {words}.{note}"
    )
    tables = (
        write_table(out / f"{NAME}.csv", rows),
        write_table(out / f"{NAME}-seeds.csv", seeds),
        write_table(out / f"{NAME}-same-batch.csv", memory),
    )
    return Finding(NAME, TITLE, caption, (f"{NAME}.png",), tables, _claims(found, rows, memory))


def cost_of(lab: Lab, own: Case, method: Method) -> Cost:
    """What a step of a case with its batch costs."""
    return lab.costs(own, [method], f"{NAME}/{method.name}")[method.name]


def steps_of_a_pass(lab: Lab, own: Case) -> int:
    """Batches in the training data."""
    samples: Any = lab.data(own).training
    return math.ceil(len(samples) / own.batch)


def seconds_of_a_pass(lab: Lab, own: Case, cost: Cost) -> float:
    """Forward and backward over all training data."""
    return cost.median_seconds * steps_of_a_pass(lab, own)


def _row(lab: Lab, case: Case, kind: str, h: int, own: Case, cost: Cost, accuracies: Sequence[float]) -> dict[str, Any]:
    steps = steps_of_a_pass(lab, own)
    return {
        "model": case.name,
        "kind": kind,
        "h": h,
        "batch": own.batch,
        "bytes": cost.bytes,
        "accuracy": statistics.fmean(accuracies),
        "accuracy_sd": spread(accuracies),
        "seconds_per_pass": seconds_of_a_pass(lab, own, cost),
        "lower_quartile": cost.quartiles[0] * steps,
        "upper_quartile": cost.quartiles[1] * steps,
    }


def _of(rows: Sequence[dict[str, Any]], model: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["model"], row["kind"]) == (model, kind)]


def _claims(
    found: Sequence[Case], rows: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]
) -> tuple[Claim, ...]:
    return (
        *(_shape(case, memory, linear=case is not found[0]) for case in found),
        _equal(found, rows),
        _accuracy(found, rows),
    )


def _shape(case: Case, memory: Sequence[dict[str, Any]], linear: bool) -> Claim:
    mine = [row for row in memory if row["model"] == case.name]
    sizes = [row["bytes"] for row in mine]
    fit = line([row["h"] for row in mine], sizes)
    off = max(abs(fit.slope * row["h"] + fit.intercept - row["bytes"]) for row in mine) / statistics.fmean(sizes)
    falls = [f"h = {b['h']}" for a, b in pairwise(mine) if b["bytes"] < a["bytes"]]
    where = "Section 5.1, Figure 3"
    figures = (
        f"{case.name}, batches of {case.batch}: from {sizes[0] / sizes[-1]:.2f} of BP's memory at h = 1; off a line "
        f"by up to {off:.1%}; less than at the smaller horizon before at {', '.join(falls) or 'no horizon'}."
    )
    if linear:
        return Claim(
            says="Memory is linear in the horizon where all blocks are of one size (transformers).",
            where=where,
            rule=f"Off a line by at most {STRAIGHT:.0%} of the mean: {HOLDS}; {NEARLY:.0%}: {PARTLY}; else {FAILS}.",
            found=figures,
            verdict=judge(off <= STRAIGHT, off <= NEARLY),
        )
    return Claim(
        says="Where stages shrink (ResNets), memory grows with the horizon, but not linearly.",
        where=where,
        rule=(
            f"It never falls, and is off a line by more than {STRAIGHT:.0%} of the mean: {HOLDS}. One of the two: "
            f"{PARTLY}. Else: {FAILS}."
        ),
        found=figures,
        verdict=judge(not falls and off > STRAIGHT, not falls or off > STRAIGHT),
    )


def _equal(found: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    ranges = {}
    for case in found:
        exact = _of(rows, case.name, "s = 1")[-1]["bytes"]
        ratios = [row["bytes"] / exact for row in _of(rows, case.name, "s = 1")]
        ranges[case.name] = min(ratios), max(ratios)
    off = max(max(1 - low, high - 1) for low, high in ranges.values())
    return Claim(
        says="A batch reciprocal to the horizon needs as much memory at every horizon.",
        where="Section 5.1, Figure 3",
        rule=(
            f"The memory of every horizon with its batch is within {EQUAL:.0%} of back-propagation's: {HOLDS}; within "
            f"{ROUGHLY:.0%}: {PARTLY}; else {FAILS}."
        ),
        found="Of back-propagation's memory: "
        + ", ".join(f"{model} {low:.2f} to {high:.2f}" for model, (low, high) in ranges.items())
        + ".",
        verdict=judge(off <= EQUAL, off <= ROUGHLY),
    )


def _accuracy(found: Sequence[Case], rows: Sequence[dict[str, Any]]) -> Claim:
    worst, parts = [], []
    for case in found:
        mine = _of(rows, case.name, "s = 1")
        exact = mine[-1]["accuracy"]
        large = [exact - row["accuracy"] for row in mine if case.depth / 2 <= row["h"] < case.depth]
        worst.append(max(large))
        apart = {row["h"]: row["accuracy"] for row in _of(rows, case.name, "s = h")}
        other = ", ".join(f"{value:.3f} at h = {h}" for h, value in apart.items())
        parts.append(
            f"{case.name}: BP {exact:.3f}, h = 1 {mine[0]['accuracy']:.3f}, from T/2 on at most {max(large):.3f} "
            f"below BP (disjoint windows {other})"
        )
    return Claim(
        says="The accuracy of large horizons converges to back-propagation's.",
        where="Section 5.2, Figure 3",
        rule=(
            f"From h = T/2 on no horizon is more than {CLOSE} below back-propagation in any case: {HOLDS}; not more "
            f"than {NEAR}: {PARTLY}; else {FAILS}."
        ),
        found=(
            "; ".join(parts) + ". At one learning rate and as many epochs, a larger batch also means fewer steps: the "
            "smaller the horizon, the less it has been trained."
        ),
        verdict=judge(max(worst) <= CLOSE, max(worst) <= NEAR),
    )


def _draw(found: Sequence[Case], rows: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(2, len(found), 5.4 * len(found), 6)
    for column, case in enumerate(found):
        top, below = axes[:, column]
        beside = top.twinx()
        _bars(beside, case, rows, "bytes", 2**20)
        beside.set(ylabel="memory of a step (MiB)", ylim=(0, 1.35 * beside.get_ylim()[1]))
        beside.spines["right"].set_visible(True)
        for kind, colour, mark in (("s = 1", "#3b6fb6", "o"), ("s = h", style.APART, "s")):
            mine = _of(rows, case.name, kind)
            values, errors = [r["accuracy"] for r in mine], [r["accuracy_sd"] for r in mine]
            form = {"fmt": f"{mark}-", "ms": 5, "capsize": 2, "color": colour, "label": f"accuracy, {kind}"}
            top.errorbar(_places(case, [r["h"] for r in mine]), values, errors, **form)
        top.set(ylabel="validation accuracy", ylim=(0, 1.35), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
        top.set_title(f"{case.name}: {case.title}")
        top.set_zorder(2)
        top.patch.set_visible(False)
        lines, bars = top.get_legend_handles_labels(), beside.get_legend_handles_labels()
        names = [*lines[1], *(f"memory, {name}" for name in bars[1])]
        style.legend(top, handles=[*lines[0], *bars[0]], labels=names, loc="upper left", ncols=2)
        _bars(below, case, rows, "seconds_per_pass", 1)
        mine = [r for r in rows if r["model"] == case.name]
        below.set(ylabel="seconds for one pass", ylim=(0, 1.3 * max(r["upper_quartile"] for r in mine)))
        style.legend(below, loc="upper left", ncols=3)
        for panel in (top, below):
            names = [f"{h}{' (BP)' if h == case.depth else ''}\n{reciprocal(case, h).batch}" for h in case.horizons]
            panel.set_xticks(range(len(names)), names)
            panel.set_xlabel("horizon h, and its batch size below")
    style.save(made, path)


def _places(case: Case, horizons: Sequence[int]) -> list[int]:
    return [case.horizons.index(h) for h in horizons]


def _bars(axes: Any, case: Case, rows: Sequence[dict[str, Any]], value: str, unit: float) -> None:
    kinds = {"s = 1": ("#c9d7ea", -0.28), "s = h": ("#f3dcc0", 0.0), AGAIN.name: ("#e2c3b8", 0.28)}
    for kind, (colour, shift) in kinds.items():
        mine = _of(rows, case.name, kind)
        places, sizes = [at + shift for at in _places(case, [r["h"] for r in mine])], [r[value] / unit for r in mine]
        axes.bar(places, sizes, 0.26, color=colour, label=kind, zorder=1)
        if value == "seconds_per_pass":
            ends = [[r[value] - r["lower_quartile"] for r in mine], [r["upper_quartile"] - r[value] for r in mine]]
            axes.errorbar(places, sizes, ends, fmt="none", ecolor="0.4", elinewidth=0.7, capsize=2)
    axes.grid(False)
