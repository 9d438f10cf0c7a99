"""Progress of long work: a bar on a terminal, a function of the user's, or nothing."""

import sys
from collections.abc import Callable

from rich.console import Console

Progress = bool | None | Callable[[str, int, int], None]
Report = Callable[[str | None], None]


def reporter(progress: Progress, total: int) -> Report:
    """Return ``report(message)``, to be called when a stage begins, and with ``None`` at the end.

    Args:
        progress: ``None``: lines on standard error if that is a terminal; ``True``: always; ``False``:
            never; or ``callable(message, done, total)``.
        total: number of stages.
    """
    stages = iter(range(total + 1))
    console = Console(stderr=True, highlight=False)

    def report(message: str | None) -> None:
        done = next(stages, total)
        if callable(progress):
            progress("done" if message is None else message, done, total)
        elif message is not None and (progress or (progress is None and sys.stderr.isatty())):
            console.print(f"[dim]{done + 1}/{total}[/dim] {message}")

    return report
