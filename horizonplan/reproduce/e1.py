"""Figure E1: memory against h/T, one window at a time and all windows at once; and what a step costs in time.

The reviewers' two questions have their place here: activation checkpointing, and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from horizonplan.probes.steady import make_state, restored, standing_bytes
from horizonplan.probes.tracker import LiveBytes
from horizonplan.reproduce import style
from horizonplan.reproduce.cases import Case, Data, full_m3
from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import ROUNDS, Cost, Lab, optimizer_of
from horizonplan.reproduce.methods import BP, checkpointed, checkpoints, disjoint, sliding
from horizonplan.reproduce.numbers import line
from horizonplan.reproduce.static import static_backward

NAME, TITLE = "e1", "Figure E1: memory and time of a step over the horizon"
IMAGES = 8  # of random pixels, for the whole ResNet-62
GRID = (1, 2, 3, 5, 8, 10, 12, 15, 18, 20, 22, 25, 28, 30)
STRAIGHT, NEARLY = 0.99, 0.95  # R squared
CHECKPOINT_MARKS = (("*", 10), ("P", 7))  # every block, every root of T; sizes in points
BULGE = 1.5  # times back-propagation's memory


def measured(lab: Lab) -> list[tuple[Case, tuple[int, ...]]]:
    """The cases and the horizons at which they are measured: M1 and M2, and the whole ResNet-62 of the paper."""

    def noise() -> Data:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(IMAGES, 3, 32, 32, generator=generator)
        few = TensorDataset(pixels, torch.arange(IMAGES) % 10)
        return Data(few, few)

    m3 = replace(full_m3(IMAGES), name="M3-whole", source="of random pixels", data=noise)
    return [*((case, tuple(range(1, case.depth + 1))) for case in map(lab.case, ("M1", "M2"))), (m3, GRID)]


def run(lab: Lab, out: Path) -> Finding:
    """Measure single steps, draw and judge."""
    rows: list[dict[str, Any]] = []
    for case, grid in measured(lab):
        middle = [h for h in grid if 1 < h < case.depth]
        periods = checkpoints(case.depth)
        methods = [
            *(sliding(h, case.depth) for h in grid),
            *(disjoint(h) for h in middle),
            *map(checkpointed, periods),
        ]
        costs = lab.costs(case, methods, NAME)
        settings = {**lab.settings(case), "horizons": grid}
        static = lab.cells.get(f"{NAME}-static/{case.name}", settings, partial(static_bytes, lab, case, grid))
        rows += [_row(case, "s = 1", h, costs[sliding(h, case.depth).name], costs[BP.name]) for h in grid]
        rows += [_row(case, "s = h", h, costs[disjoint(h).name], costs[BP.name]) for h in middle]
        for k in periods:
            found = costs[checkpointed(k).name]
            rows.append(_row(case, f"BP, checkpoint every {k}", case.depth, found, costs[BP.name]))
        rows += [
            {**_blank(case, "all windows at once", h), "bytes": int(static[str(h)])} | _ratio(static[str(h)], costs)
            for h in grid
        ]
    _draw(rows, out / f"{NAME}.png")
    words = "; ".join(
        f"{case.name.removesuffix('-whole')}: {case.network} {case.source}, batch {case.batch}"
        for case, _ in measured(lab)
    )
    caption = (
        "Peak bytes of one training step (parameters, optimiser state and batch included) over those of "
        "back-propagation, against h/T: one window at a time (left), all windows at once, the paper's static mode "
        f"(middle). Right: {lab.timed} of forward and backward over back-propagation's, median of at least {ROUNDS} "
        "rounds in turn, bars: the middle half. Dashed: disjoint windows, s = h. Stars and crosses: back-propagation "
        "with activation checkpointing every block, and every root of T blocks. One batch and one set of weights, as a "
        f"step's bytes do not depend on them. {words}."
    )
    tables = (write_table(out / f"{NAME}.csv", rows),)
    return Finding(NAME, TITLE, caption, (f"{NAME}.png",), tables, _claims(rows))


def static_bytes(lab: Lab, case: Case, grid: Sequence[int]) -> dict[str, int]:
    """Peak bytes of a gradient in static mode at each horizon, what stands before it included."""
    (batch,) = lab.batches(case, 0, 1)
    model: Any = lab.model(case, 0).train()
    chain = lab.chain(case, model, batch)
    optimizer = optimizer_of(case, list(model.parameters()))
    found = {}
    with restored(chain, weights=True):
        make_state(optimizer)
        base = standing_bytes(chain, optimizer, batch)
        for h in grid:
            with LiveBytes() as tracker:
                static_backward(model, batch, case.loss, h)
            model.zero_grad(set_to_none=True)
            found[str(h)] = base + tracker.peak
    return found


def _blank(case: Case, kind: str, h: int) -> dict[str, Any]:
    place = {"model": case.name.removesuffix("-whole"), "kind": kind, "h": h, "T": case.depth, "h/T": h / case.depth}
    times = dict.fromkeys(("seconds", "seconds/BP", "lower quartile/BP", "upper quartile/BP"), "")
    return place | {"bytes": "", "bytes/BP": "", "flops/BP": "", "units": ""} | times


def _row(case: Case, kind: str, h: int, cost: Cost, exact: Cost) -> dict[str, Any]:
    return _blank(case, kind, h) | {
        "bytes": cost.bytes,
        "bytes/BP": cost.bytes / exact.bytes,
        "flops/BP": cost.flops / exact.flops,
        "units": cost.units,
        "seconds": cost.median_seconds,
        "seconds/BP": cost.median_seconds / exact.median_seconds,
        "lower quartile/BP": cost.quartiles[0] / exact.median_seconds,
        "upper quartile/BP": cost.quartiles[1] / exact.median_seconds,
    }


def _ratio(found: int, costs: dict[str, Cost]) -> dict[str, float]:
    return {"bytes/BP": found / costs[BP.name].bytes}


def _of(rows: Sequence[dict[str, Any]], model: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["model"], row["kind"]) == (model, kind)]


def _models(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _claims(rows: Sequence[dict[str, Any]]) -> tuple[Claim, ...]:
    return _linear(rows), _bulged(rows), _against_checkpointing(rows)


def _linear(rows: Sequence[dict[str, Any]]) -> Claim:
    fits = {}
    for model in _models(rows):
        mine = _of(rows, model, "s = 1")
        fits[model] = line([r["h"] for r in mine], [r["bytes"] for r in mine]).r2
    return Claim(
        says="One window at a time (eager mode), memory is linear in the horizon.",
        where="Eq. 11, Appendix E.1, Figure E1 left",
        rule=(
            f"A line through the bytes has R² of {STRAIGHT} or more in every model: {HOLDS}. In all but one: {PARTLY}. "
            f"Else: {FAILS}."
        ),
        found=", ".join(f"{model} R² {r2:.3f}" for model, r2 in fits.items()) + ".",
        verdict=judge(min(fits.values()) >= STRAIGHT, sorted(fits.values())[1] >= STRAIGHT),
    )


def _bulged(rows: Sequence[dict[str, Any]]) -> Claim:
    peaks, fits = {}, {}
    for model in _models(rows):
        mine = _of(rows, model, "all windows at once")
        peaks[model] = max(mine, key=lambda r: r["bytes"])
        # T-h+1 windows of h blocks, each with its own head and loss
        graphs = [[r["h"] * (r["T"] - r["h"] + 1), r["T"] - r["h"] + 1, 1] for r in mine]
        sizes = np.array([r["bytes"] for r in mine], dtype=float)
        left = sizes - np.array(graphs) @ np.linalg.lstsq(np.array(graphs, dtype=float), sizes, rcond=None)[0]
        fits[model] = 1 - float(np.var(left) / np.var(sizes))
    found = (
        f"{m} {p['bytes/BP']:.2f} times BP at h = {p['h']} of {p['T']} (R² {fits[m]:.3f})" for m, p in peaks.items()
    )
    bulges = all(p["bytes/BP"] >= BULGE and 1 < p["h"] < p["T"] for p in peaks.values())
    return Claim(
        says="With every window's graph alive at once (static mode), memory is O(h(T-h+1)), a bulge in the middle.",
        where="Appendix E.1, Figure E1 right",
        rule=(
            f"In every model the largest memory is at a middle horizon and at least {BULGE} times back-propagation's, "
            f"and bytes are linear in h(T-h+1) and T-h+1 with R² of {NEARLY} or more: {HOLDS}. Only the bulge: "
            f"{PARTLY}. Else: {FAILS}."
        ),
        found="The peak: " + ", ".join(found) + ".",
        verdict=judge(bulges and min(fits.values()) >= NEARLY, bulges),
    )


def _against_checkpointing(rows: Sequence[dict[str, Any]]) -> Claim:
    parts = []
    for model in _models(rows):
        exact = min((r for r in rows if r["model"] == model and r["kind"].startswith("BP")), key=lambda r: r["bytes"])
        mine = [r for r in _of(rows, model, "s = 1") if 1 < r["h"] < r["T"]]
        worse = [r for r in mine if r["bytes"] >= exact["bytes"] and r["flops/BP"] >= exact["flops/BP"]]
        apart = [
            r for r in _of(rows, model, "s = h") if r["bytes"] >= exact["bytes"] and r["seconds"] >= exact["seconds"]
        ]
        parts.append(
            f"{model}: {exact['kind']} needs {exact['bytes/BP']:.2f} of BP's bytes, {exact['flops/BP']:.2f} of its "
            f"FLOPs and {exact['seconds/BP']:.2f} of its time; {len(worse)} of {len(mine)} middle horizons at s = 1 "
            f"need no fewer bytes and no fewer FLOPs, and {len(apart)} of {len(_of(rows, model, 's = h'))} at s = h "
            "no fewer bytes and no less time"
        )
    return Claim(
        says="Exact gradients with activation checkpointing are an alternative at every memory.",
        where="asked by the paper's reviewers",
        rule="No verdict: the paper does not compare.",
        found="; ".join(parts) + ".",
        verdict=OURS,
    )


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(1, 3, 11, 3.9)
    eager, static, seconds = axes[0]
    for model, mark in zip(_models(rows), "os^", strict=True):
        own = {"color": style.MODELS[model], "marker": mark, "ms": 3}
        for kind, ls in (("s = 1", "-"), ("s = h", "--")):
            mine = _of(rows, model, kind)
            options = {**own, "ls": ls, "label": model if kind == "s = 1" else None}
            eager.plot([r["h/T"] for r in mine], [r["bytes/BP"] for r in mine], **options)
            seconds.errorbar([r["h/T"] for r in mine], *_times(mine), elinewidth=0.6, **options)
        exact = [r for r in rows if r["model"] == model and r["kind"].startswith("BP")]
        for row, (star, size) in zip(exact, CHECKPOINT_MARKS, strict=False):
            form = {"ms": size, "color": style.MODELS[model], "mec": "white", "mew": 0.5, "zorder": 5, "clip_on": False}
            for panel, value in ((eager, "bytes/BP"), (seconds, "seconds/BP")):
                panel.plot(row["h/T"], row[value], star, **form)
        mine = _of(rows, model, "all windows at once")
        static.plot([r["h/T"] for r in mine], [r["bytes/BP"] for r in mine], label=model, **own)
    for panel in (eager, seconds):
        panel.plot([], [], "--", color="0.4", label="disjoint, s = h")
        for (star, size), every in zip(CHECKPOINT_MARKS, ("block", "√T blocks"), strict=True):
            panel.plot([], [], star, ms=size, color="0.4", label=f"BP, checkpoint every {every}")
    for panel in axes[0]:
        panel.axhline(1, color="0.6", lw=0.8, zorder=0)
        panel.set(xlabel="h / T", ylim=(0, None), xlim=(0, 1.04))
    style.legend(eager, loc="lower center", bbox_to_anchor=(0.6, 0))
    style.legend(static, loc="lower center")
    seconds.set_ylim(0, 1.4 * seconds.get_ylim()[1])
    style.legend(seconds, loc="upper right")
    eager.set(title="one window at a time (eager)", ylabel="memory / memory of BP")
    static.set(title="all windows at once (static)", ylabel="memory / memory of BP")
    seconds.set(title="time of forward and backward", ylabel="time / time of BP")
    style.save(made, path)


def _times(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the quartiles are from them."""
    middle = [r["seconds/BP"] for r in rows]
    below = [r["seconds/BP"] - r["lower quartile/BP"] for r in rows]
    return middle, [below, [r["upper quartile/BP"] - r["seconds/BP"] for r in rows]]
