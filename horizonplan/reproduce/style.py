"""How all pictures look."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from horizonplan.training.files import write

INK, PALE = "#222222", "#d5dbe3"
EXACT, CHECKPOINTED, APART = "#111111", "#b5482a", "#d98e2b"
MODELS = {"M1": "#3b6fb6", "M2": "#d98e2b", "M3": "#3f9b6c"}
FEW_POWERS, FEW_TICKS = 50, 5  # ratios of a logarithmic axis' ends
SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.edgecolor": "#777777",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.5,
}


def applied() -> AbstractContextManager[None]:
    """The settings, for as long as pictures are made."""
    from matplotlib import rc_context

    return rc_context(SETTINGS)


def figure(rows: int, columns: int, width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """A figure and its axes as an array of ``(rows, columns)``; sizes in inches, ``grid`` as for ``subplots``."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False, gridspec_kw=grid)


def save(made: Any, path: Path) -> str:
    """Write a picture; returns the file's name."""
    write(path, lambda file: made.savefig(file, dpi=110, format="png"))
    return path.name


def shades(count: int) -> list[Any]:
    """Colours from dark to light for an ordered quantity, without the palest."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * i / max(1, count - 1)) for i in range(count)]


def horizon_colours(horizons: Sequence[int]) -> dict[int, Any]:
    """A colour for each horizon; the last one, back-propagation, is black."""
    return {**dict(zip(horizons[:-1], shades(len(horizons) - 1), strict=True)), horizons[-1]: EXACT}


def log_ticks(axes: Any) -> None:
    """Labels on a logarithmic y axis that has hardly a power of ten in sight."""
    axes.yaxis.set_minor_formatter("")
    low, high = axes.get_ylim()
    if high / low < FEW_POWERS:
        digits = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7) if high / low < FEW_TICKS else (1, 2, 5)
        marks = [m * 10**power for power in (-3, -2, -1, 0) for m in digits if low < m * 10**power < high]
        axes.set_yticks(marks, [f"{mark:g}" for mark in marks])


def legend(axes: Any, **options: Any) -> None:
    """A legend in the style of all pictures."""
    axes.legend(**{"handlelength": 1.8, "labelspacing": 0.3, **options})
