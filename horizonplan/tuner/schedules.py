"""The few schedules of a plan that trials are spent on: what nothing else in its table is known to beat.

The folds have weighed every horizon, stride and recomputation already. What is left to training are those that are
not dominated in memory, time and rate, and those whose rate nobody knows, thinned to a handful that spans the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from horizonplan.frontier import frontier
from horizonplan.plan import Plan
from horizonplan.rows import Row
from horizonplan.units import format_bytes


def label(row: Row) -> str:
    """A row's name among the schedules of a study.

    >>> label(Row(horizon=3, memory_bytes=1)), label(Row(horizon=6, stride=6, recompute=2, memory_bytes=1))
    ('h=3 s=1', 'h=6 s=6 k=2')
    >>> label(Row(algorithm="LoCo 3", horizon=6, stride=3, memory_bytes=1, precision="bf16"))
    'LoCo 3 h=6 s=3 bf16'
    """
    parts = [] if row.algorithm == "horizon" else [row.algorithm]
    parts += [f"h={row.horizon} s={row.stride}"]
    parts += [f"k={row.recompute}"] if row.recompute else []
    parts += [f"m={row.micro_batches}"] if row.micro_batches > 1 else []
    parts += [] if row.precision == "fp32" else [row.precision]
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
    best = contenders(fitting)
    first = [plan.row] if plan.row in fitting else []
    others = sorted((row for row in best if row not in first), key=lambda row: row.memory_bytes)
    return {label(row): row for row in (*first, *_spread(others, most - len(first)))}


def contenders(rows: Iterable[Row]) -> list[Row]:
    """The rows on the frontier (:func:`horizonplan.frontier`), and those of unknown rate, in their order.

    Of a rate that was not measured nothing can be said, so training is to tell. Of exact ways only the smallest and the
    fastest are taken. Where not all rows have seconds, FLOPs stand in for them.
    """
    rows = list(rows)
    if all(row.step_seconds is not None for row in rows):
        timed = rows
    else:
        timed = [replace(row, step_seconds=float(row.flops or 0)) for row in rows]
    best = _once(frontier(timed))
    return [row for row, known in zip(rows, timed, strict=True) if row.rate is None or known in best]


def _once(rows: Sequence[Row]) -> list[Row]:
    """Exact ways train alike, and their memory and time are known: the smallest and the fastest stand for all."""
    exact = [row for row in rows if row.exact]
    ends = [min(exact, key=_needs), min(exact, key=lambda row: row.step_seconds or 0.0)] if exact else []
    return [row for row in rows if not row.exact or row in ends]


def _needs(row: Row) -> int:
    return row.memory_bytes if row.device_bytes is None else row.device_bytes


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """So many of the rows, evenly over their order, both ends among them."""
    if len(rows) <= count:
        return list(rows)
    if count <= 1:
        return list(rows[-1:]) if count == 1 else []
    return [rows[i * (len(rows) - 1) // (count - 1)] for i in range(count)]
