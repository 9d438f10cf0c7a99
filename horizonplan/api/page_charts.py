"""What the page draws of a plan: memory, cosine, rate and objective over h, and rate over memory.

A chart is JSON that the page's script hands to uPlot: ``x``; ``lines`` (label, tone, dash, values over x); ``marks``
(x, y, shape, filled, chosen); ``rules`` (horizontal lines); ``range`` of y; ``decimals`` of its numbers. The shape of
a mark is a family: circles stride 1, squares disjoint windows, triangles exact with recomputation, diamonds others. A
mark is filled where its number was measured (in the objective's chart: where the row meets the objective), and small
where there are many and it is none of these.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from horizonplan.api.page_dials import Answer
from horizonplan.objective import AccuracyConstraint, MemoryLimit
from horizonplan.plan import Plan
from horizonplan.rows import Row

Chart = dict[str, Any]
MANY = 60
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


@dataclass(frozen=True)
class Quantity:
    """What is drawn of a row.

    Attributes:
        value: of the row, in the unit that is drawn.
        source: the attribute that says where it comes from; empty: marks say what is feasible.
        unit: its name; empty: none.
        begins: what the axis begins with; ``None``: below the least value.
    """

    value: Callable[[Row], float | None]
    source: str
    unit: str = ""
    begins: float | None = None


COSINE = Quantity(lambda row: row.cosine, "cosine_source")
RATE = Quantity(lambda row: row.rate, "rate_source")
OBJECTIVE = Quantity(lambda row: row.objective, "")


def charts_of(plan: Plan, answer: Answer) -> dict[str, Chart]:
    """All charts of a plan under the dials."""
    rows, chosen = answer.rows, answer.row if answer.plan is not None else None
    memory, unit = _memory(rows)
    limit = [answer.objective.limit_bytes / unit] if isinstance(answer.objective, MemoryLimit) else []
    least = [1 - answer.objective.epsilon] if isinstance(answer.objective, AccuracyConstraint) else []
    line, cubic = _fitted(plan, "memory", unit), _fitted(plan, "cosine")
    return {
        "memory": _over_h(plan.depth, rows, chosen, memory, limit, line),
        "cosine": _over_h(plan.depth, rows, chosen, COSINE, [], cubic),
        "rate": _over_h(plan.depth, rows, chosen, RATE, least),
        "objective": _over_h(plan.depth, rows, chosen, OBJECTIVE, []),
        "frontier": _frontier(rows, chosen, memory, limit, least),
    }


def compared(plans: Sequence[Plan]) -> dict[str, Chart]:
    """Memory and rate of two plans over h, the second in the accent's tone."""
    memory, _ = _memory([row for plan in plans for row in plan.rows])
    depth = max(plan.depth for plan in plans)
    charts = {}
    for name, quantity in (("memory", memory), ("rate", RATE)):
        lines, marks = [], []
        for plan, label, tone in zip(plans, ("A", "B"), ("ink", "accent"), strict=True):
            rows = _stride_one(plan.rows)
            lines.append(_line(label, tone, False, _values(rows, quantity, depth)))
            shown = [*rows, *([] if plan.row in rows else [plan.row])]
            marks += [_mark(row, quantity, row == plan.row, tone) for row in shown if quantity.value(row) is not None]
        charts[name] = _chart(list(range(1, depth + 1)), lines, marks, [], quantity)
    return charts


def unit_of(rows: Iterable[Row]) -> tuple[int, str]:
    """The unit that memory is drawn in."""
    most = max(row.memory_bytes for row in rows)
    return next((size, name) for size, name in _UNITS if most >= size or size == 1)


def frontier(rows: Iterable[Row]) -> list[Row]:
    """The rows that may be chosen and that no other such row beats in both memory and rate, by memory."""
    found: list[Row] = []
    known = [row for row in rows if row.rate is not None and row.fits is not False and not row.reference]
    for row in sorted(known, key=lambda row: (row.memory_bytes, -(row.rate or 0.0))):
        if not found or (row.rate or 0.0) > (found[-1].rate or 0.0):
            found.append(row)
    return found


def _memory(rows: Sequence[Row]) -> tuple[Quantity, int]:
    unit, name = unit_of(rows)
    return Quantity(lambda row: row.memory_bytes / unit, "memory_source", name, 0.0), unit


def _fitted(plan: Plan, name: str, unit: int = 1) -> list[float | None] | None:
    curve = plan.curves.get(name)
    return None if curve is None else [curve(h) / unit for h in range(1, plan.depth + 1)]


def _over_h(
    depth: int,
    rows: Sequence[Row],
    chosen: Row | None,
    quantity: Quantity,
    rules: list[float],
    fitted: list[float | None] | None = None,
) -> Chart:
    lines = [_line("s = 1", "ink", False, _values(_stride_one(rows), quantity, depth))]
    disjoint = [row for row in rows if row.stride == row.horizon > 1 and row.plain]
    if any(quantity.value(row) is not None for row in disjoint):
        lines.append(_line("s = h", "faint", False, _values(disjoint, quantity, depth)))
    if fitted is not None:
        lines.append(_line("fit", "faint", True, fitted))
    marks = [_mark(row, quantity, row == chosen) for row in rows if quantity.value(row) is not None]
    return _chart(list(range(1, depth + 1)), lines, marks, rules, quantity)


def _frontier(
    rows: Sequence[Row], chosen: Row | None, memory: Quantity, limits: list[float], least: list[float]
) -> Chart:
    def x_of(row: Row) -> float:
        return row.memory_bytes / unit

    unit, best = unit_of(rows)[0], frontier(rows)
    marks = [_mark(row, RATE, row == chosen) | {"x": x_of(row)} for row in rows if row.rate is not None]
    line = _line("rate", "ink", False, [row.rate for row in best])
    chart = _chart([x_of(row) for row in best], [line], marks, least, RATE)
    x_range = [0.0, 1.05 * max([x_of(row) for row in rows] + limits)]
    return chart | {"x_label": "memory", "x_unit": memory.unit, "x_rules": limits, "x_range": x_range}


def _chart(
    x: Sequence[float],
    lines: list[dict[str, Any]],
    marks: list[dict[str, Any]],
    rules: list[float],
    quantity: Quantity,
) -> Chart:
    drawn = [y for line in lines for y in line["values"] if y is not None] + [mark["y"] for mark in marks] + rules
    low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
    room = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    many = len(marks) > MANY
    marks = [mark | {"small": many and not (mark["chosen"] or (quantity.source and mark["filled"]))} for mark in marks]
    bottom = low - room if quantity.begins is None else min(quantity.begins, low)
    return {
        "x": list(x),
        "x_label": "h",
        "x_unit": "",
        "x_rules": [],
        "unit": quantity.unit,
        "lines": lines,
        "marks": marks,
        "rules": rules,
        "range": [bottom, high + room],
        "decimals": _decimals(high - low) if quantity.unit else 3,
    }


def _line(label: str, tone: str, dash: bool, values: Sequence[float | None]) -> dict[str, Any]:
    return {"label": label, "tone": tone, "dash": dash, "values": list(values)}


def _mark(row: Row, quantity: Quantity, chosen: bool, tone: str = "") -> dict[str, Any]:
    shape = "circle"
    if row.recompute:
        shape = "triangle"
    elif row.stride > 1:
        shape = "square" if row.stride == row.horizon else "diamond"
    filled = getattr(row, quantity.source) == "measured" if quantity.source else row.feasible
    y, tone = quantity.value(row), tone or ("accent" if chosen else "ink")
    return {"x": row.horizon, "y": y, "shape": shape, "filled": filled, "chosen": chosen, "tone": tone}


def _values(rows: Iterable[Row], quantity: Quantity, depth: int) -> list[float | None]:
    known = {row.horizon: quantity.value(row) for row in rows}
    return [known.get(h) for h in range(1, depth + 1)]


def _stride_one(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.stride == 1 and row.plain]


def _decimals(spread: float) -> int:
    return 2 if spread <= 0 else min(4, max(0, 2 - math.floor(math.log10(spread))))
