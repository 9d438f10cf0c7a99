"""Figure 5's heat map and means, and the picture of rates against cos^2."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horizonplan.reproduce import style
from horizonplan.reproduce.fig5_claims import mean, values
from horizonplan.reproduce.methods import BP, FF, LOCO, LOCO_SUMMED
from horizonplan.reproduce.scoring import (
    AGAIN,
    APART,
    COLUMNS,
    INFEASIBLE,
    MODELS,
    ORDER,
    PAPER_S,
    REL,
    REL_OF_ALL,
    SELECTED,
)

COLOURS = {
    BP.name: style.EXACT,
    FF.name: "#8a5aa8",
    **{method.name: colour for method, colour in zip(LOCO, ("#1f4e8c", "#4f86c6"), strict=True)},
    **{method.name: colour for method, colour in zip(LOCO_SUMMED, ("#1f7a6d", "#63b8a8"), strict=True)},
    **{method.name: colour for method, colour in zip(APART, ("#c9781c", "#ecb467"), strict=True)},
    AGAIN: "#8c8c8c",
    SELECTED: style.CHECKPOINTED,
}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The heat maps of both scores, under them the means over a model's columns, and the time of a step."""
    made, axes = style.figure(4, 1, 11, 12, height_ratios=(2.2, 4, 3, 2))
    _heat_map(made, axes[0, 0], rows, PAPER_S, REL)
    _heat_map(made, axes[1, 0], rows, ORDER, REL_OF_ALL)
    groups = [*((model, {"model": model}) for model in MODELS), ("all", {})]
    _bars(axes[2, 0], rows, groups, PAPER_S, REL, f"mean {REL}")
    _bars(axes[3, 0], rows, groups[:-1], ORDER, "time/BP", "time / time of BP")
    axes[3, 0].axhline(1, color="0.6", lw=0.8, zorder=0)
    style.legend(axes[3, 0], ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    style.save(made, path)


def _bars(
    panel: Any,
    rows: Sequence[dict[str, Any]],
    groups: Sequence[tuple[str, dict[str, Any]]],
    names: Sequence[str],
    value: str,
    label: str,
) -> None:
    """The mean of each algorithm in each group of rows, a point for each seed."""
    for place, (_, wanted) in enumerate(groups):
        mine = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
        seeds = sorted({r["seed"] for r in mine})
        for number, name in enumerate(names):
            x = place + (number - (len(names) - 1) / 2) * 0.085
            own = {seed: [r[value] for r in mine if (r["algorithm"], r["seed"]) == (name, seed)] for seed in seeds}
            middle = statistics.fmean(v for found in own.values() for v in found)
            panel.bar(x, middle, 0.078, color=COLOURS[name], label=_label(name) if place == 0 else None)
            panel.plot([x] * len(seeds), list(map(statistics.fmean, own.values())), ".", ms=2.5, color="0.1")
    panel.set_xticks(range(len(groups)), [f"mean, {name}" for name, _ in groups])
    panel.set(ylabel=label, xlim=(-0.5, len(groups) - 0.5))


def _label(name: str) -> str:
    return f"FF ({name})" if name == FF.name else name


def _heat_map(made: Any, axes: Any, rows: Sequence[dict[str, Any]], names: Sequence[str], score: str) -> None:
    grid = [[mean(rows, name, score, column=column.name) for column in COLUMNS] for name in names]
    axes.grid(False)
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=INFEASIBLE, aspect="auto")
    for i, name in enumerate(names):
        for j, column in enumerate(COLUMNS):
            missed = statistics.fmean(v == INFEASIBLE for v in values(rows, name, score, column=column.name))
            text = "×" if missed == 1 else f"{grid[i][j]:.2f}" + ("×" if missed else "")
            axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if grid[i][j] > 0.8 else "0.15")
    labels = [f"{c.cost} {c.objective}\n{'ε' if c.objective == 'O1' else 'λ'}={c.parameter:g}" for c in COLUMNS]
    axes.set_xticks(range(len(COLUMNS)), labels, fontsize=6.5)
    axes.set_yticks(range(len(names)), map(_label, names))
    per_model = len(COLUMNS) // len(MODELS)
    for number, model in enumerate(MODELS):
        axes.text((number + 0.5) * per_model - 0.5, -0.75, model, ha="center", weight="bold")
        if number:
            axes.axvline(number * per_model - 0.5, color="white", lw=3)
    axes.axhline(len(names) - 1.5, color="white", lw=2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    made.colorbar(image, ax=axes, label=score, shrink=0.8, pad=0.01)


def draw_rates(rates: Sequence[dict[str, Any]], path: Path) -> None:
    """The measured rate of each run at stride 1 against cos^2 before training."""
    made, axes = style.figure(1, len(MODELS), 10.5, 3.5)
    for panel, model in zip(axes[0], MODELS, strict=True):
        mine = [r for r in rates if r["model"] == model and math.isfinite(r["rate"])]
        colours = style.horizon_colours(sorted({r["h"] for r in mine})) if mine else {}
        for h, colour in colours.items():
            points = [r for r in mine if r["h"] == h]
            label = "BP" if h == points[0]["T"] else f"h = {h}"
            panel.plot([p["cos2"] for p in points], [p["rate"] for p in points], "o", color=colour, ms=5, label=label)
        panel.plot([0, 1], [0, 1], ":", color="0.4", label="r = cos²")
        panel.set(xlabel="cos² before training", title=model)
        style.legend(panel)
    axes[0, 0].set_ylabel("measured rate r")
    style.save(made, path)
