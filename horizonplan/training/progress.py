"""Progress of a run: a line on a terminal that follows the steps, and one line that stays for each epoch."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.status import Status

from horizonplan.progress import Progress
from horizonplan.training.run import Run
from horizonplan.units import format_bytes

REFRESH_SECONDS = 0.5
RECENT = 20


class Reporter:
    """Shows loss, steps a second, peak memory and horizon.

    Args:
        progress: ``None``: on standard error if that is a terminal; ``True``: always; ``False``: never; or
            ``callable(message, done, total)``, called after each epoch.
        epochs: of the run.
        active: whether this process is the one that shows.
    """

    def __init__(self, progress: Progress, epochs: int, active: bool) -> None:
        self.call = progress if callable(progress) and active else None
        self.console = Console(stderr=True, highlight=False)
        terminal = sys.stderr.isatty()
        self.shows = active and not callable(progress) and (progress or (progress is None and terminal))
        self.live = Status("", console=self.console) if self.shows and terminal else None
        self.epochs, self.shown = epochs, 0.0
        if self.live is not None:
            self.live.start()

    def step(self, run: Run) -> None:
        """After a step."""
        now = time.perf_counter()
        if self.live is None or now - self.shown < REFRESH_SECONDS:
            return
        self.shown = now
        self.live.update(f"epoch {run.epoch}, step {run.step}: loss {run.history[-1]['loss']:.4f}, {_pace(run)}")

    def epoch(self, run: Run, epoch: Mapping[str, Any]) -> None:
        """After an epoch."""
        metrics = "".join(
            f", validation {name.removeprefix('val_')} {value:.4f}"
            for name, value in epoch.items()
            if name.startswith("val_")
        )
        message = f"epoch {run.epoch}: loss {epoch['loss']:.4f}{metrics}, {_pace(run)}"
        if self.call is not None:
            self.call(message, run.epoch, self.epochs)
        elif self.shows:
            self.console.print(f"[dim]{run.epoch + 1}/{self.epochs}[/dim] {message}", soft_wrap=True)

    def close(self, done: bool) -> None:
        """At the end; ``done`` unless the run was broken off."""
        if self.live is not None:
            self.live.stop()
        if self.call is not None and done:
            self.call("done", self.epochs, self.epochs)


def _pace(run: Run) -> str:
    seconds = statistics.median(run.seconds[-RECENT:]) if run.seconds else 0.0
    pace = f"{1 / seconds:.1f} steps/s, " if seconds else ""
    horizon = "" if run.horizon is None else f", horizon {run.horizon}"
    return f"{pace}peak {format_bytes(run.peak_bytes)}{horizon}"
