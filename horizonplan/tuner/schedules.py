"""The few schedules of a plan that trials are spent on: what nothing else in its table beats.

The folds have weighed every horizon, stride and recomputation already. What is left to training are those that are
not dominated in memory, time and rate, thinned to a handful that spans the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from horizonplan.plan import Plan
from horizonplan.rows import Row
from horizonplan.units import format_bytes


def label(row: Row) -> str:
    """A row's name among the schedules of a study.

    >>> label(Row(horizon=3, memory_bytes=1)), label(Row(horizon=6, stride=6, recompute=2, memory_bytes=1))
    ('h=3 s=1', 'h=6 s=6 k=2')
    """
    parts = [f"h={row.horizon} s={row.stride}"]
    parts += [f"k={row.recompute}"] if row.recompute else []
    parts += [f"m={row.micro_batches}"] if row.micro_batches > 1 else []
    return " ".join(parts)


def to_train(plan: Plan, most: int, limit_bytes: int | None) -> dict[str, Row]:
    """The schedules that trials choose between, the plan's own first, each under its name.

    Args:
        plan: from which.
        most: how many at most.
        limit_bytes: what a step may need; rows that are known or predicted to need more are never trained.

    Raises:
        ValueError: nothing fits.
    """
    able = [row for row in plan.rows if not row.reference and row.algorithm == "horizon" and row.precision == "fp32"]
    fitting = [row for row in able if row.fits is not False and (limit_bytes is None or _needs(row) <= limit_bytes)]
    if not fitting:
        least = min(able or plan.rows, key=_needs)
        room = "the device" if limit_bytes is None else format_bytes(limit_bytes)
        raise ValueError(
            f"plan: no schedule fits {room}; {label(least)}, the smallest, needs {format_bytes(_needs(least))}: raise "
            "memory_limit, use smaller batches, or plan with candidates='all'."
        )
    best = undominated(fitting)
    first = [plan.row] if plan.row in fitting else []
    others = sorted((row for row in best if row not in first), key=lambda row: row.memory_bytes)
    return {label(row): row for row in (*first, *_spread(others, most - len(first)))}


def undominated(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other one beats in memory, time and rate, in their order; of equal ones the first.

    Time is seconds, or FLOPs where a row has none. A rate that was not measured counts as that of the same horizon at
    stride 1: cosines hardly differ between strides, and training will tell.
    """
    rows = list(rows)
    clocked = all(row.step_seconds is not None for row in rows)
    plain = {row.horizon: row.rate for row in rows if row.stride == 1 and row.plain}

    def costs(row: Row) -> tuple[float, float, float]:
        time = row.step_seconds if clocked else row.flops
        rate = plain.get(row.horizon) if row.rate is None else row.rate
        return float(_needs(row)), float(time or 0), -(rate if rate is not None else 1.0)

    points = [costs(row) for row in rows]
    first = {point: row for row, point in zip(reversed(rows), reversed(points), strict=True)}
    best = [row for point, row in first.items() if not any(beats(other, point) for other in first)]
    return [row for row in rows if row in best]


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether all numbers are at most the other's, and one is less.

    >>> beats((1, 2), (1, 3)), beats((1, 2), (1, 2)), beats((1, 4), (2, 3))
    (True, False, False)
    """
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _needs(row: Row) -> int:
    return row.memory_bytes if row.device_bytes is None else row.device_bytes


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """So many of the rows, evenly over their order, both ends among them."""
    if len(rows) <= count:
        return list(rows)
    if count <= 1:
        return list(rows[-1:]) if count == 1 else []
    return [rows[i * (len(rows) - 1) // (count - 1)] for i in range(count)]
