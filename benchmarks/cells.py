"""Results of a benchmark in one JSON file, by cell: what is there is not measured again, whenever it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Cells = dict[str, dict[str, Any]]


def load(path: Path) -> Cells:
    """What is stored."""
    return json.loads(path.read_text()) if path.exists() else {}


def store(path: Path, found: Cells) -> None:
    """Write the whole file beside the old one, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(found, indent=1))
    os.replace(beside, path)


def complete(path: Path, found: Cells, cells: Iterable[tuple[str, Callable[[], dict[str, Any]]]], hidden: str) -> None:
    """Measure the cells that are not there, each with the CPU seconds it took, child processes included.

    Args:
        path: where they are stored.
        found: what is stored; what is measured is added.
        cells: names, and what measures them.
        hidden: a value that is too long to print.
    """
    for name, measure in cells:
        if name in found:
            continue
        before = sum(os.times()[:4])
        values = measure()
        found[name] = {**values, "cpu_seconds": round(sum(os.times()[:4]) - before, 1)}
        store(path, found)
        print(name, {k: v for k, v in found[name].items() if k != hidden}, flush=True)
