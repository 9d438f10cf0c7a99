"""The plan as a picture: memory, cosine and rate, and objective over the horizon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from horizonplan.curves import Curve
from horizonplan.rows import Row

GIB, MIB = 2**30, 2**20


class Drawable(Protocol):
    """What is drawn of a plan."""

    @property
    def row(self) -> Row:
        """The chosen row."""

    @property
    def rows(self) -> Sequence[Row]:
        """All rows."""

    @property
    def depth(self) -> int:
        """Blocks of the model."""

    @property
    def curves(self) -> Mapping[str, Curve]:
        """The fitted polynomials."""


def draw(plan: Drawable, path: str | Path) -> None:
    """Draw a plan into a file whose ending names the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    memory, cosine, objective = figure.subplots(1, 3)
    _memory(memory, plan)
    _cosine(cosine, plan)
    _objective(objective, plan)
    for axes in (memory, cosine, objective):
        axes.set_xlabel("horizon h (blocks)")
        axes.axvline(plan.row.horizon, color="0.8", zorder=0)
        axes.set_xlim(0.5, plan.depth + 0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _families(plan: Drawable) -> list[tuple[str, str, list[Row]]]:
    stride_one = [r for r in plan.rows if r.stride == 1 and r.plain]
    disjoint = [r for r in plan.rows if r.stride == r.horizon > 1 and r.plain]
    return [("s = 1", "C0", stride_one), ("s = h (disjoint)", "C1", disjoint)]


def _memory(axes: Any, plan: Drawable) -> None:
    unit, name = (GIB, "GiB") if max(r.memory_bytes for r in plan.rows) >= GIB else (MIB, "MiB")
    for label, colour, rows in _families(plan):
        _line(axes, rows, lambda r: r.memory_bytes / unit, colour, label, lambda r: r.memory_source == "measured")
    curve = plan.curves.get("memory")
    if curve is not None:
        ends = (1, plan.depth)
        axes.plot(ends, [curve(h) / unit for h in ends], ":", color="0.5", label="the paper's line")
    for row in plan.rows:
        if row.recompute and row.horizon == plan.depth and replace(row, recompute=0).plain:
            axes.plot(
                plan.depth, row.memory_bytes / unit, "^", color="C2", label=f"BP, checkpoint every {row.recompute}"
            )
    axes.plot(plan.row.horizon, plan.row.memory_bytes / unit, "o", mfc="none", mec="C3", ms=13, label="chosen")
    axes.set(title="peak memory of a step", ylabel=name, ylim=(0, None))
    axes.legend(fontsize=7, frameon=False)


def _cosine(axes: Any, plan: Drawable) -> None:
    (_, colour, rows), (_, other, disjoint) = _families(plan)
    measured = [r for r in rows if r.cosine_source == "measured"]
    if measured:
        axes.errorbar(
            [r.horizon for r in measured],
            [r.cosine for r in measured],
            [2 * (r.cosine_stderr or 0) for r in measured],
            fmt="o", color=colour, capsize=2, label="cosine, measured (2 s.e.)",
        )  # fmt: skip
    curve = plan.curves.get("cosine")
    if curve is not None:
        grid = [1 + i * (plan.depth - 1) / 100 for i in range(101)]
        axes.plot(grid, curve(grid), "-", color=colour, alpha=0.6, label="cosine, fitted (s = 1)")
    seen = [r for r in disjoint if r.cosine_source == "measured"]
    if seen:
        axes.plot([r.horizon for r in seen], [r.cosine for r in seen], "s", color=other, label="cosine, s = h")
    rolled = [r for r in plan.rows if r.rate_source == "measured" and r.plain]
    for row in rolled:
        axes.plot(
            row.horizon,
            row.rate,
            "*",
            ms=11,
            color=colour if row.stride == 1 else other,
            label=f"rate, s = {row.stride}",
        )
    axes.set(title="gradient cosine and measured rate")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
    else:
        axes.set(ylim=(0, 1.05))
        axes.text(0.5, 0.5, "nothing known", transform=axes.transAxes, ha="center", color="0.5")


def _objective(axes: Any, plan: Drawable) -> None:
    for label, colour, rows in _families(plan):
        known = [r for r in rows if r.objective is not None]
        axes.plot([r.horizon for r in known], [r.objective for r in known], "-", color=colour, alpha=0.4)
        for row in known:
            axes.plot(row.horizon, row.objective, "o", color=colour, mfc=colour if row.feasible else "none")
        if known:
            axes.plot([], [], "o", color=colour, label=label)
    if plan.row.objective is not None:
        axes.plot(plan.row.horizon, plan.row.objective, "o", mfc="none", mec="C3", ms=13, label="chosen")
    axes.set(title="objective (hollow: not feasible)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def _line(
    axes: Any,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    colour: str,
    label: str,
    filled: Callable[[Row], bool],
) -> None:
    axes.plot([r.horizon for r in rows], [value(r) for r in rows], "-", color=colour, alpha=0.6, label=label)
    for row in rows:
        axes.plot(row.horizon, value(row), "o", ms=4, color=colour, mfc=colour if filled(row) else "none")
