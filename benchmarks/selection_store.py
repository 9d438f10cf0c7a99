"""Results by cell in a file of JSON lines: a cell is there whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Store:
    """Cells of one file, one a line, each under the name in its `cell`. One process at a time writes to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                cell = json.loads(line)
                self.cells[cell["cell"]] = cell

    def __contains__(self, name: str) -> bool:
        return name in self.cells

    def add(self, name: str, values: Mapping[str, Any]) -> None:
        """Write the whole file beside the old one, then put it in its place."""
        self.cells[name] = {"cell": name, **values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(cell, allow_nan=False) + "\n" for cell in self.cells.values())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)
