"""The frontier as a picture: every row by memory and time, its rate as colour, what is not dominated named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horizonplan.explain import depth_of, name_of
from horizonplan.frontier import frontier
from horizonplan.plot import Drawable
from horizonplan.rows import Row

MOST = 14  # names that a picture has room for


def draw(plan: Drawable, path: str | Path) -> None:
    """Draw a plan's frontier into a file whose ending names the format.

    Raises:
        ValueError: no row has seconds, so there is nothing to draw.
    """
    from matplotlib.figure import Figure

    timed = [row for row in plan.rows if row.step_seconds]
    if not timed:
        raise ValueError("plan: no row has the seconds of a step; plan on a device where steps can be timed.")
    unit, name = (2**30, "GiB") if max(row.memory_bytes for row in timed) >= 2**30 else (2**20, "MiB")
    figure = Figure(figsize=(9.5, 5.4), layout="constrained")
    axes = figure.subplots()
    unknown = [row for row in timed if row.rate is None]
    known = [row for row in timed if row.rate is not None]
    _scatter(axes, unknown, unit, facecolors="none", edgecolors="0.7", s=24, label="rate unknown")
    if known:
        drawn = _scatter(axes, known, unit, c=[row.rate for row in known], cmap="viridis", vmin=0.0, vmax=1.0, s=42)
        figure.colorbar(drawn, ax=axes, label="rate (1: as fast as back-propagation)")
    edge = frontier(plan.rows)
    _scatter(axes, edge, unit, facecolors="none", edgecolors="k", s=95, label="not dominated")
    _names(axes, edge, plan.row, depth_of(plan.rows), unit)
    if plan.row.step_seconds:
        _scatter(axes, [plan.row], unit, facecolors="none", edgecolors="C3", s=210, linewidths=1.8, label="chosen")
    axes.set(xlabel=f"peak memory of a step ({name})", ylabel="time of a step (ms)", yscale="log")
    axes.set_title("memory, time and rate of a step" + ("" if edge else ": no rate is known"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.08)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _scatter(axes: Any, rows: Sequence[Row], unit: int, **style: Any) -> Any:
    x = [row.memory_bytes / unit for row in rows]
    return axes.scatter(x, [1000 * (row.step_seconds or 0.0) for row in rows], **style)


def _names(axes: Any, edge: Sequence[Row], chosen: Row, depth: int, unit: int) -> None:
    """Names beside points, of as many as there is room for: the choice, and then evenly by memory."""
    step = max(1, -(-len(edge) // MOST))
    for i, row in enumerate(edge):
        if i % step == 0 or row == chosen or row == edge[-1]:
            place = row.memory_bytes / unit, 1000 * (row.step_seconds or 0.0)
            name = name_of(row, depth).replace(" (back-propagation)", "").replace("disjoint windows", "disjoint")
            axes.annotate(name, place, xytext=(7, 5), textcoords="offset points", fontsize=7, color="0.25")
