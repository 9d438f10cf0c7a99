"""A plan from measurements that somebody made elsewhere, and a plan judged anew without probing.

Algorithm 1 of "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control" as the paper
has it: memory is a straight line in h (Eq. 16), the cosine a cubic (Eq. 15), the rate its square (Eq. 14).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from horizonplan.cost import Cost, as_cost
from horizonplan.curves import Curve, fit_cosine, fit_memory
from horizonplan.objective import AccuracyConstraint, Objective, evaluate, select
from horizonplan.plan import Plan
from horizonplan.rows import Row, Source

DEFAULT_OBJECTIVE = AccuracyConstraint(epsilon=0.1)


class MeasurementError(ValueError):
    """Measurements that cannot be used.

    Attributes:
        field: The parameter at fault, such as ``"memory_bytes[2]"``.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field

    def __reduce__(self) -> tuple[type["MeasurementError"], tuple[str, str]]:
        return type(self), (self.field, str(self).removeprefix(f"{self.field}: "))


def plan_from_measurements(
    depth: int,
    horizons: Sequence[int],
    memory_bytes: Sequence[int],
    cosine: Sequence[float],
    objective: Objective = DEFAULT_OBJECTIVE,
    cost: Cost | None = None,
) -> Plan:
    """Choose a horizon from memory and cosines measured at a few.

    Args:
        depth: Blocks T of the network.
        horizons: Where was measured: distinct, in 1..T, at least two.
        memory_bytes: Peak bytes of a step at each.
        cosine: Cosine between that gradient and back-propagation's at each.
        objective: What to minimise, and subject to what.
        cost: Price of memory; ``None``: linear. A node memory left open is M(T).

    Raises:
        InfeasibleError: No candidate meets the objective.
        MeasurementError: The measurements cannot be used.
    """
    curves = {"memory": fit_memory(horizons, memory_bytes), "cosine": fit_cosine(horizons, cosine, depth)}
    memory, cosines = dict(zip(horizons, memory_bytes, strict=True)), dict(zip(horizons, cosine, strict=True))
    rows = [_row(h, depth, memory, cosines, curves) for h in range(1, depth + 1)]
    price = as_cost(cost, max(1, rows[-1].memory_bytes))
    judged = evaluate(rows, objective, price)
    return Plan(select(rows, objective, price), judged, depth, objective, price, curves)


def replan(plan: Plan, objective: Objective | None = None, cost: Cost | None = None) -> Plan:
    """The same table judged by another objective or cost, without probing.

    Raises:
        InfeasibleError: No candidate meets the objective.
    """
    objective = plan.objective if objective is None else objective
    price = plan.cost if cost is None else cost
    rows = evaluate(plan.rows, objective, price)
    return replace(plan, row=select(plan.rows, objective, price), rows=rows, objective=objective, cost=price)


def _row(
    h: int, depth: int, memory: Mapping[int, int], cosines: Mapping[int, float], curves: Mapping[str, Curve]
) -> Row:
    row = Row(
        horizon=h,
        memory_bytes=memory[h] if h in memory else max(0, math.ceil(curves["memory"](h))),
        memory_source="measured" if h in memory else "fitted",
    )
    if h == depth:
        return replace(row, cosine=1.0, cosine_source="derived", rate=1.0, rate_source="derived")
    value = cosines[h] if h in cosines else curves["cosine"](h)
    source: Source = "measured" if h in cosines else "fitted"
    return replace(row, cosine=value, cosine_source=source, rate=value**2, rate_source="derived")
