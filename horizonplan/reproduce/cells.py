"""Finished pieces of a run, kept as files, so that a run that was killed goes on where it stood.

A *cell* is one piece of work with a name and settings: one training run, one table of costs. Its file holds the
settings and what came out. It is written under another name and renamed, so that it is there whole or not at
all. A file whose settings are others is not believed: the cell is computed again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from horizonplan.training.files import write

Report = Callable[[str], None]


class Cells:
    """A folder of finished cells.

    Args:
        folder: where they lie; it is made if need be.
        report: called with one line when a cell begins, and one when it is done.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cells = Cells(Path(folder), lambda line: None)
    ...     [cells.get("sums/one", {"n": 3}, lambda: sum(range(3))) for _ in range(2)], cells.computed
    ([3, 3], 1)
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder, self.report = folder, report
        self.computed, self.found = 0, 0

    def get(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """What a cell has found, from its file, or computed now and kept.

        Args:
            name: parts joined by ``/``; becomes the file's path.
            settings: JSON-ready values that decide the outcome.
            compute: returns JSON-ready values.

        Returns:
            What ``compute`` returned, as JSON reads it back (tuples are lists, keys are strings).
        """
        path = self.folder / f"{_as_path(name)}.json"
        wanted = json.loads(json.dumps(settings))
        kept = _read(path)
        if kept is not None and kept["settings"] == wanted:
            self.found += 1
        else:
            self.report(name)
            began = time.process_time()
            value = compute()
            kept = {"settings": wanted, "process_seconds": round(time.process_time() - began, 2), "value": value}
            path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(kept, indent=1)
            write(path, text.encode())
            kept = json.loads(text)
            self.computed += 1
            self.report(f"{name}: {kept['process_seconds']:.1f} s")
        return kept["value"]

    def seconds(self) -> list[float]:
        """The process time of each finished cell in the folder, whichever call computed it."""
        kept = map(_read, sorted(self.folder.rglob("*.json")))
        return [cell["process_seconds"] for cell in kept if cell is not None]


def _as_path(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9/_.-]+", "-", name)


def _read(path: Path) -> dict[str, Any] | None:
    """A cell's file; ``None`` if there is none, or what is there is no cell."""
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # no JSON, or bytes that are no text
        return None
    is_cell = isinstance(kept, dict) and kept.keys() >= {"settings", "process_seconds", "value"}
    return kept if is_cell else None
