"""Figure 5's heat map and means, and the picture of rates against cos^2."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horizonplan.reproduce import style
from horizonplan.reproduce.fig5_claims import mean, values
from horizonplan.reproduce.methods import FF
from horizonplan.reproduce.scoring import COLUMNS, INFEASIBLE, MODELS, ORDER, SELECTED


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The heat map over all columns, and under it the means over a model's columns."""
    made, axes = style.figure(2, 1, 11, 7.4)
    top, below = axes[:, 0]
    _heat_map(made, top, rows)
    colours = {**dict(zip(ORDER, style.shades(len(ORDER)), strict=True)), SELECTED: style.CHECKPOINTED}
    groups = [*((f"{model}", {"model": model}) for model in MODELS), ("all", {})]
    for place, (_, wanted) in enumerate(groups):
        for number, name in enumerate(ORDER):
            x = place + (number - (len(ORDER) - 1) / 2) * 0.085
            below.bar(
                x, mean(rows, name, **wanted), 0.078, color=colours[name], label=_label(name) if place == 0 else None
            )
            seeds = sorted({r["seed"] for r in rows if all(r[k] == v for k, v in wanted.items())})
            points = [mean(rows, name, seed=seed, **wanted) for seed in seeds]
            below.plot([x] * len(points), points, ".", ms=2.5, color="0.1")
    below.set_xticks(range(len(groups)), [f"mean, {name}" for name, _ in groups])
    below.set(ylabel="mean Rel", xlim=(-0.5, len(groups) - 0.5))
    style.legend(below, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    style.save(made, path)


def _label(name: str) -> str:
    return f"FF ({name})" if name == FF.name else name


def _heat_map(made: Any, axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    grid = [[mean(rows, name, column=column.name) for column in COLUMNS] for name in ORDER]
    axes.grid(False)
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=INFEASIBLE, aspect="auto")
    for i, name in enumerate(ORDER):
        for j, column in enumerate(COLUMNS):
            missed = statistics.fmean(v == INFEASIBLE for v in values(rows, name, column=column.name))
            text = "×" if missed == 1 else f"{grid[i][j]:.2f}" + ("×" if missed else "")
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color="white" if grid[i][j] > 0.8 else "0.15")
    labels = [f"{c.cost} {c.objective}\n{'ε' if c.objective == 'O1' else 'λ'}={c.parameter:g}" for c in COLUMNS]
    axes.set_xticks(range(len(COLUMNS)), labels, fontsize=6.5)
    axes.set_yticks(range(len(ORDER)), map(_label, ORDER))
    per_model = len(COLUMNS) // len(MODELS)
    for number, model in enumerate(MODELS):
        axes.text((number + 0.5) * per_model - 0.5, -0.75, model, ha="center", weight="bold")
        if number:
            axes.axvline(number * per_model - 0.5, color="white", lw=3)
    axes.axhline(len(ORDER) - 1.5, color="white", lw=2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    made.colorbar(image, ax=axes, label="Rel", shrink=0.8, pad=0.01)


def draw_rates(rates: Sequence[dict[str, Any]], path: Path) -> None:
    """The measured rate of each run at stride 1 against cos^2 before training."""
    made, axes = style.figure(1, len(MODELS), 10.5, 3.5)
    for panel, model in zip(axes[0], MODELS, strict=True):
        mine = [r for r in rates if r["model"] == model and math.isfinite(r["rate"])]
        colours = style.horizon_colours(sorted({r["h"] for r in mine}))
        for h, colour in colours.items():
            points = [r for r in mine if r["h"] == h]
            label = "BP" if h == points[0]["T"] else f"h = {h}"
            panel.plot([p["cos2"] for p in points], [p["rate"] for p in points], "o", color=colour, ms=5, label=label)
        panel.plot([0, 1], [0, 1], ":", color="0.4", label="r = cos²")
        panel.set(xlabel="cos² before training", title=model)
        style.legend(panel)
    axes[0, 0].set_ylabel("measured rate r")
    style.save(made, path)
