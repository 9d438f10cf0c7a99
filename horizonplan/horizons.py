"""At which horizons to measure: a first spread, then wherever the choice is least certain.

A fitted curve has an interval at each horizon that was not measured. Where the choice would be
another one somewhere in that interval, a measurement can change it; where it would be the same
throughout, none can. A horizon is worth as much as the part of its interval that changes the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from horizonplan.curves import Curve
from horizonplan.rows import Row

FEWEST_HORIZONS = 4
STEPS = 9  # of an interval, at which the choice is made

Choose = Callable[[Sequence[Row]], Row | None]


@dataclass(frozen=True)
class HeldOut:
    """A horizon that was predicted before it was measured, and in no fit.

    Attributes:
        quantity: ``"memory"`` (bytes) or ``"cosine"``.
        horizon: h, at stride 1.
        low: lower end of what was predicted.
        high: upper end.
        measured: what came out.
    """

    quantity: str
    horizon: int
    low: float
    high: float
    measured: float

    @property
    def ok(self) -> bool:
        """Whether the measurement lies in the interval."""
        return self.low <= self.measured <= self.high


def first_horizons(horizons: Sequence[int] | None, depth: int) -> list[int]:
    """Where to measure first: what the user gave, or four horizons from 1 to T.

    Raises:
        ValueError: what was given are no horizons of such a chain.
    """
    if horizons is None:
        count = min(depth, FEWEST_HORIZONS)
        return sorted({round(1 + i * (depth - 1) / max(1, count - 1)) for i in range(count)})
    places = list(horizons) if isinstance(horizons, Sequence) else []
    if not places or any(isinstance(h, bool) or not isinstance(h, int) or not 1 <= h <= depth for h in places):
        raise ValueError(f"horizons={horizons!r}: give whole numbers between 1 and {depth}, the number of blocks.")
    return sorted(set(places))


def doubts(rows: Sequence[Row], curve: Curve | None, choose: Choose, measured: Iterable[int]) -> dict[int, float]:
    """For each horizon that may yet change the choice: in which part of its interval it does, in (0, 1].

    Args:
        rows: the table, with fitted cosines.
        curve: the fitted cosine; ``None``: nothing is known to doubt.
        choose: picks a row, or ``None`` where none is feasible.
        measured: horizons whose cosine is no fit.
    """
    if curve is None:
        return {}
    known, now = set(measured), choose(rows)
    found = {}
    for place, row in enumerate(rows):
        if row.stride > 1 or not row.plain or row.horizon in known or row.cosine_source != "fitted":
            continue
        low, high = curve.interval(row.horizon)
        changed = 0
        for i in range(STEPS):
            value = low + (high - low) * i / (STEPS - 1)
            tried = [*rows[:place], _with_cosine(row, value), *rows[place + 1 :]]
            changed += _key(choose(tried)) != _key(now)
        if changed:
            found[row.horizon] = changed / STEPS
    return found


def next_horizon(
    rows: Sequence[Row], curve: Curve | None, chosen: Row | None, doubtful: dict[int, float], measured: Iterable[int]
) -> int | None:
    """Where to measure next; ``None`` when every horizon has been.

    The most doubtful horizon; without doubts the chosen one, or else the one whose interval is widest,
    as a test of the fit.
    """
    known = set(measured)
    open_rows = [row for row in rows if row.stride == 1 and row.plain and row.horizon not in known]
    left = [row.horizon for row in open_rows if row.fits is not False] or [row.horizon for row in open_rows]
    if not left:
        return None
    if doubtful:
        return max(doubtful, key=lambda h: (doubtful[h], -abs(h - (chosen.horizon if chosen else 0)), -h))
    if chosen is not None and chosen.horizon in left:
        return chosen.horizon
    return max(left, key=lambda h: (_width(curve, h), _gap(h, known), -h))


def _with_cosine(row: Row, cosine: float) -> Row:
    return replace(row, cosine=cosine, rate=cosine**2)


def _key(row: Row | None) -> tuple[int | str, ...] | None:
    return None if row is None else (row.horizon, row.stride, row.recompute, row.micro_batches, row.precision)


def _width(curve: Curve | None, h: int) -> float:
    if curve is None:
        return 0.0
    low, high = curve.interval(h)
    return high - low


def _gap(h: int, known: set[int]) -> float:
    return min((abs(h - other) for other in known), default=math.inf)
