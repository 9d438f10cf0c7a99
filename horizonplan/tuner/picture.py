"""A study as a picture: peak memory against the metric, coloured by time, with the front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from horizonplan.tuner.setting import Setting
from horizonplan.tuner.trial import Trial

GIB, MIB = 2**30, 2**20


class Drawable(Protocol):
    """What is drawn of a study."""

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials."""

    @property
    def best_trials(self) -> Sequence[Trial]:
        """Those on the front."""

    @property
    def setting(self) -> Setting:
        """The metric, and where memory ends."""


def draw(study: Drawable, path: str | Path) -> None:
    """Draw a study into a file whose ending names the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    finished = [trial for trial in study.trials if trial.values is not None]
    points = [trial.values for trial in finished if trial.values is not None]
    unit, name = (GIB, "GiB") if max((p[0] for p in points), default=0) >= GIB else (MIB, "MiB")
    if points:
        dots = axes.scatter([p[0] / unit for p in points], [p[1] for p in points], c=[1e3 * p[2] for p in points])
        figure.colorbar(dots, ax=axes, label="time of a step (ms)")
    for trial in study.best_trials:
        assert trial.values is not None
        place = (trial.values[0] / unit, trial.values[1])
        axes.plot(*place, "o", markersize=12, markerfacecolor="none", markeredgecolor="C3")
        axes.annotate(
            f"h={trial.row.horizon}, s={trial.row.stride}", place, (6, 6), textcoords="offset points", fontsize=8
        )
    if study.setting.limit_bytes is not None:
        axes.axvline(study.setting.limit_bytes / unit, color="0.6", linestyle="--")
    axes.set_xlabel(f"peak memory of a step ({name})")
    axes.set_ylabel(f"validation {study.setting.metric}")
    axes.set_title("trials; ringed: none is better in memory, metric and time", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
