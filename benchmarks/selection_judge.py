"""Choices judged by the truth: Eq. 14's rate, Eq. 19's relative objective, regret, and correlation of ranks.

From "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control". Minimum and maximum of
Eq. 19 are taken over all that was trained and meets the objective, LoCo included, so that 0 is the best there is. An
infeasible answer counts INFEASIBLE, as in the paper's Figure 5; its regret is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import horizonplan as hp
from horizonplan.rates import relative_rate

INFEASIBLE = 1.5
LADDER = 0.3  # a node's part of the largest memory (the paper's C2)

OBJECTIVES: dict[str, hp.Objective] = {
    **{f"rate >= {1 - epsilon:g}": hp.AccuracyConstraint(epsilon) for epsilon in (0.05, 0.1, 0.2, 0.3)},
    **{f"lambda = {lam:g}": hp.Weighted(lam) for lam in (0.25, 0.5, 1.0)},
}


@dataclass(frozen=True)
class Trained:
    """What one way of training came to: its rate over the whole budget, `None` if it has none, and its peak."""

    rate: float | None
    memory_bytes: int
    horizon: int


@dataclass(frozen=True)
class Score:
    """How good an answer is; `regret` is `None` for an infeasible one."""

    rel: float
    regret: float | None
    feasible: bool


def costs(truths: Mapping[str, Trained]) -> dict[str, Any]:
    """The paper's two costs, c = 1: linear in the largest memory of a horizon, and nodes of LADDER of it."""
    largest = max(truth.memory_bytes for way, truth in truths.items() if way.startswith("h="))
    return {
        "linear": hp.LinearCost(node_memory=largest),
        "ladder": hp.LadderCost(node_memory=int(LADDER * largest)),
    }


def truths_of(cells: Iterable[Mapping[str, Any]], tail: int, thin: int) -> dict[str, Trained]:
    """The ways of one task and seed; rates by Eq. 14 over the last 1 / `tail` of the steps, as short runs have them."""
    cells = list(cells)
    exact = next(cell for cell in cells if "start" in cell)
    last = exact["steps"] // tail // thin
    found = {}
    for cell in cells:
        rate = math.nan
        if not cell["diverged"]:
            rate = relative_rate(cell["losses"][-last:], exact["losses"][-last:], exact["start"][-last:])
        horizon = int(cell["way"].split(",")[0][2:]) if cell["way"].startswith("h=") else 0
        found[cell["way"]] = Trained(rate if math.isfinite(rate) else None, cell["peak_bytes"], horizon)
    return found


def value(truth: Trained, objective: hp.Objective, cost: Any) -> float | None:
    """O of a way, `None` where it misses the objective's constraint or has no rate."""
    price, size = cost(truth.memory_bytes), truth.memory_bytes
    if objective.shortfall(truth.rate, price, size, truth.horizon) > 0:
        return None
    return objective.value(truth.rate, price, size, truth.horizon)


def score(way: str | None, truths: Mapping[str, Trained], objective: hp.Objective, cost: Any) -> Score:
    """Judge an answer, `None` for no answer at all."""
    values = {name: value(truth, objective, cost) for name, truth in truths.items()}
    own = None if way is None else values[way]
    if own is None:
        return Score(INFEASIBLE, None, False)
    known = [v for v in values.values() if v is not None]
    least, most = min(known), max(known)
    return Score((own - least) / (most - least) if most > least else 0.0, own - least, True)


def best(truths: Mapping[str, Trained], objective: hp.Objective, cost: Any) -> str:
    """The best horizon and stride, found by having trained all of them."""
    values = {way: value(truth, objective, cost) for way, truth in truths.items() if way.startswith("h=")}
    known = {way: v for way, v in values.items() if v is not None}
    return min(known, key=lambda way: (known[way], -(truths[way].rate or 0.0)))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlation of ranks, ties at their mean rank; `None` where one of the two does not vary."""
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) - 1) / 2
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True)) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(v < own for v in values) + (sum(v == own for v in values) - 1) / 2 for own in values]
