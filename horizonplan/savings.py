"""Where fewer nodes suffice, and what that takes: the ladder below a choice, one step after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from horizonplan.cost import Cost, nodes_of
from horizonplan.rows import Row


@dataclass(frozen=True)
class Saving:
    """Fewer or cheaper nodes than the choice takes.

    Attributes:
        nodes: how many suffice.
        instead_of: how many the choice takes.
        node: what they are: a card's name, or a node's memory.
        row: what to train with then: of what costs no more, the row of the largest rate.
        cost: what is saved, in the cost function's unit.
    """

    nodes: int
    instead_of: int
    node: str
    row: Row
    cost: float


def savings(rows: Sequence[Row], chosen: Row, cost: Cost) -> tuple[Saving, ...]:
    """Cheaper and cheaper nodes than the choice's, down to the cheapest that a row with a known rate fits.

    Only whole nodes can be saved, so the cost is a :class:`horizonplan.LadderCost` or :class:`horizonplan.MixedNodes`.
    References count: checkpointed back-propagation is a way, too.

    Args:
        rows: the table.
        chosen: the choice.
        cost: the price of memory.
    """
    if (now := nodes_of(cost, chosen.memory_bytes)) is None:
        return ()
    spent = float(cost(chosen.memory_bytes))
    able = [row for row in rows if row.rate is not None and row.fits is not False and cost(row.memory_bytes) < spent]
    able.sort(key=lambda row: (cost(row.memory_bytes), *(-part for part in _worth(row))))
    found: list[Saving] = []
    for row in able:  # the cheapest first, and of those the best
        needs = nodes_of(cost, row.memory_bytes)
        if needs is not None and (not found or _worth(row)[0] > _worth(found[-1].row)[0]):
            found.append(Saving(needs[0], now[0], needs[1], row, spent - float(cost(row.memory_bytes))))
    return tuple(reversed(found))


def _worth(row: Row) -> tuple[float, float, float]:
    """The larger rate; then the shorter step, then the fewer bytes."""
    slow = float("inf") if row.step_seconds is None else row.step_seconds
    return row.rate or 0.0, -slow, -float(row.memory_bytes)
