"""One measured number: what, in which unit, at which horizon, how sure, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A measurement at one (horizon, stride).

    Args:
        quantity: ``"memory"``, ``"cosine"``, ``"time"`` or ``"rate"``.
        unit: ``"bytes"``, ``"seconds"`` or ``"1"``.
        horizon: h; 0 for a method without horizons.
        stride: s; likewise.
        value: the number.
        stderr: its standard error over batches or repeats; ``None`` where there is only one.
        source: ``"measured"``, or how else it came about.
        detail: how it was measured, and what was measured along with it.
    """

    quantity: str
    unit: str
    horizon: int
    stride: int
    value: float
    stderr: float | None = None
    source: str = "measured"
    detail: Mapping[str, Any] = field(default_factory=dict)
