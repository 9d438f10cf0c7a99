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
        row: what to train with then: of what needs no more nodes, the row of the largest rate.
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
    best: dict[tuple[int, str], Row] = {}
    for row in rows:
        needs = nodes_of(cost, row.memory_bytes)
        if needs is None or row.rate is None or float(cost(row.memory_bytes)) >= spent:
            continue
        if needs not in best or _better(row, best[needs]):
            best[needs] = row
    found = [
        Saving(count, now[0], node, row, spent - float(cost(row.memory_bytes))) for (count, node), row in best.items()
    ]
    return tuple(sorted(found, key=lambda saving: saving.cost))


def _better(row: Row, other: Row) -> bool:
    """The larger rate; then the shorter step, then the fewer bytes."""
    return _key(row) > _key(other)


def _key(row: Row) -> tuple[float, float, float]:
    slow = float("inf") if row.step_seconds is None else row.step_seconds
    return row.rate or 0.0, -slow, -float(row.memory_bytes)
