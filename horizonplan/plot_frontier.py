"""The frontier as a picture: every row by memory and time, its rate as colour, what is not dominated named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horizonplan.explain import depth_of, name_of
from horizonplan.frontier import frontier
from horizonplan.plot import Drawable
from horizonplan.rows import Row

WIDE = 4.0  # from this ratio of largest to smallest on, memory is drawn in powers


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
    edge = frontier(plan.rows)
    figure = Figure(figsize=(11.5, 5.4), layout="constrained")
    axes, names = figure.subplots(1, 2, width_ratios=(3, 1))
    unknown = [row for row in timed if row.rate is None]
    known = [row for row in timed if row.rate is not None]
    if unknown:
        _scatter(axes, unknown, unit, facecolors="none", edgecolors="0.75", s=20, label="rate unknown")
    if known:
        drawn = _scatter(axes, known, unit, c=[row.rate for row in known], cmap="viridis", vmin=0.0, vmax=1.0, s=42)
        figure.colorbar(drawn, ax=axes, label="rate (1: as fast as back-propagation)")
    _scatter(axes, edge, unit, facecolors="none", edgecolors="k", s=95, label="not dominated (numbered)")
    if plan.row.step_seconds:
        _scatter(axes, [plan.row], unit, facecolors="none", edgecolors="C3", s=210, linewidths=1.8, label="chosen")
    for number, row in enumerate(edge, 1):
        above = 7 if number % 2 else -13  # neighbours above and below
        axes.annotate(str(number), _place(row, unit), xytext=(-3, above), textcoords="offset points", fontsize=8)
    _list(names, edge, depth_of(plan.rows))
    _scales(axes, timed, unit)
    axes.set(xlabel=f"peak memory of a step ({name})", ylabel="time of a step (ms)")
    axes.set_title("memory, time and rate of a step" + ("" if edge else ": no rate is known"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _place(row: Row, unit: int) -> tuple[float, float]:
    return row.memory_bytes / unit, 1000 * (row.step_seconds or 0.0)


def _scatter(axes: Any, rows: Sequence[Row], unit: int, **style: Any) -> Any:
    places = [_place(row, unit) for row in rows]
    return axes.scatter([x for x, _ in places], [y for _, y in places], **style)


def _scales(axes: Any, rows: Sequence[Row], unit: int) -> None:
    """Powers where the numbers are far apart, written out."""
    for axis, values in (("x", [_place(row, unit)[0] for row in rows]), ("y", [_place(row, unit)[1] for row in rows])):
        if min(values) > 0 and max(values) >= WIDE * min(values):
            getattr(axes, f"set_{axis}scale")("log")
            for ticks in ("major", "minor"):
                getattr(getattr(axes, f"{axis}axis"), f"set_{ticks}_formatter")("{x:g}")
            axes.tick_params(axis=axis, which="minor", labelsize=6)
    axes.margins(x=0.08, y=0.1)


def _list(axes: Any, edge: Sequence[Row], depth: int) -> None:
    """What the numbers stand for, with each one's rate."""
    axes.set_axis_off()
    words = [
        f"{number}  {name_of(row, depth).replace(' (back-propagation)', '')}, rate {row.rate or 0.0:.2f}"
        for number, row in enumerate(edge, 1)
    ]
    axes.text(0.0, 1.0, "\n".join(words), transform=axes.transAxes, va="top", fontsize=7, linespacing=1.6)
