"""What is not dominated: the plans of which no other is at least as small, as fast and as good, and better in one.

Three numbers of a row count: peak bytes, seconds of a step (both to be small) and the loss-decrease rate (to be
large). Row a dominates row b if a is no worse than b in all three and better in one, and

- both have all three numbers: of what is unknown nothing can be said, so a row without a rate or without seconds
  dominates nothing, is dominated by nothing, and is not on the frontier;
- the rate of a weighs as much as that of b: one derived as cos^2 does not overrule one that a short run measured.
  An exact gradient's rate is 1 by definition, which weighs as much as a measurement.

Dominance so defined is transitive, so whatever is dominated is dominated by a row of the frontier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from horizonplan.rows import Row


def dominates(one: Row, other: Row) -> bool:
    """Whether ``one`` is no worse than ``other`` in memory, time and rate, and better in one of them.

    >>> small = Row(horizon=2, memory_bytes=10, rate=0.9, step_seconds=1.0)
    >>> large = Row(horizon=3, memory_bytes=20, rate=0.9, step_seconds=1.0)
    >>> dominates(small, large), dominates(large, small), dominates(small, small)
    (True, False, False)
    """
    mine, others = _point(one), _point(other)
    if mine is None or others is None or _certain(one) < _certain(other):
        return False
    return mine != others and all(a <= b for a, b in zip(mine, others, strict=True))


def frontier(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows that fit and are dominated by none that fits, by memory, then time; what is incomplete is left out.

    Rows that are equal in all three numbers are all on it, or none is. References count: it shows what there is.
    """
    known = [row for row in rows if row.fits is not False and _point(row) is not None]
    known.sort(key=lambda row: _point(row) or ())  # what comes later dominates nothing before it
    found: list[Row] = []
    for row in known:
        if not any(dominates(other, row) for other in found):
            found.append(row)
    return tuple(found)


def undominated(row: Row, rows: Sequence[Row]) -> Row:
    """The row, or one of the frontier of candidates that dominates it: of those the one of least objective.

    Args:
        row: a choice.
        rows: the table, judged. Only feasible rows that are no references may take its place.
    """
    better = frontier([other for other in rows if other.feasible and not other.reference and dominates(other, row)])
    return min(better, key=lambda other: (other.objective or 0.0, -other.memory_bytes), default=row)


def _point(row: Row) -> tuple[float, float, float] | None:
    """What is to be small; ``None`` where one of the three is unknown."""
    if row.rate is None or row.step_seconds is None:
        return None
    return float(row.memory_bytes), row.step_seconds, -row.rate


def _certain(row: Row) -> bool:
    """Whether the rate is measured, or 1 by definition, and not a model's."""
    return row.rate_source != "derived" or row.exact
