"""The paper's relative performance, and what is scored by it: the twelve cases and the methods of Figure 5.

Rel(a) = (O(a) - min O) / (max O - min O)                                    (Eq. 19)

Best and worst are those of the paper's five methods. Methods that are ours must not move the scale on which the paper's
claims are judged: they are scored by a second Rel, whose best and worst are those of all methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from horizonplan.cost import Cost as Price
from horizonplan.cost import LadderCost, LinearCost
from horizonplan.objective import AccuracyConstraint, Objective, Weighted
from horizonplan.reproduce.methods import BP, FF, LOCO, LOCO_SUMMED, Method, checkpointed, checkpoints, disjoint

MODELS = ("M1", "M2", "M3")
EPSILONS, LAMBDAS = (0.1, 0.3), (0.1, 0.5)
STEP_SHARE = 0.3  # of the largest memory: the ladder's node
INFEASIBLE = 1.5
SELECTED = "selection"
REL, REL_OF_ALL = "Rel", "Rel of all"
AGAIN = "BP, checkpointed"
APART = (disjoint(3), disjoint(5))
FIXED = (BP, FF, *LOCO, *LOCO_SUMMED, *APART)
PAPER_S = (BP.name, FF.name, *(method.name for method in LOCO), SELECTED)
ORDER = (*(method.name for method in FIXED), AGAIN, SELECTED)


@dataclass(frozen=True)
class Column:
    """One of the figure's columns: a model, a price of memory, an objective."""

    model: str
    cost: str
    objective: str
    parameter: float

    @property
    def name(self) -> str:
        """As on the axis."""
        return f"{self.model} {self.cost} {self.objective} {self.parameter:g}"

    @property
    def goal(self) -> Objective:
        """Objective 1 or 2."""
        return AccuracyConstraint(self.parameter) if self.objective == "O1" else Weighted(self.parameter)

    def price(self, largest: int) -> Price:
        """The price of memory (Table D3), from the largest M(h)."""
        return LinearCost(1.0, largest) if self.cost == "C1" else LadderCost(1.0, round(STEP_SHARE * largest))


COLUMNS = tuple(
    Column(model, cost, objective, parameter)
    for model in MODELS
    for cost in ("C1", "C2")
    for objective, parameters in (("O1", EPSILONS), ("O2", LAMBDAS))
    for parameter in parameters
)


def relative(values: Mapping[str, float | None]) -> dict[str, float]:
    """Eq. 19; ``None``, an infeasible answer, counts 1.5 and takes no part in best and worst. 0 if all others tie.

    >>> relative({"a": 1.0, "b": 3.0, "c": 2.0, "d": None})
    {'a': 0.0, 'b': 1.0, 'c': 0.5, 'd': 1.5}
    """
    known = [value for value in values.values() if value is not None]
    low, width = (min(known), max(known) - min(known)) if known else (0.0, 0.0)
    return {
        name: INFEASIBLE if value is None else (value - low) / width if width > 0 else 0.0
        for name, value in values.items()
    }


def worth(column: Column, found: float, memory: int, largest: int) -> float | None:
    """O(a) of a rate and its bytes; ``None`` where the constraint is missed or the run broke off."""
    if not math.isfinite(found):
        return None
    price, goal = column.price(largest)(memory), column.goal
    return None if goal.shortfall(found, price, memory, 1) else goal.value(found, price, memory, 1)


def again(depth: int) -> list[Method]:
    """Back-propagation with activation checkpointing every block, and every root of T."""
    return [checkpointed(every) for every in checkpoints(depth)]
