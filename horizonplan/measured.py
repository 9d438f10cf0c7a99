"""A plan from measurements that somebody made elsewhere, and a plan judged anew without probing.

Algorithm 1 of "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control" as the paper
has it: peak memory is a straight line in h (Eq. 16), the cosine a cubic (Eq. 15), the rate its square (Eq. 14), and h
the best of 1..T by brute force. Nothing is probed here.

Where the blocks' own bytes are known, memory at the horizons in between is a straight line in W(h) instead of h, with
W(h) the bytes of the h consecutive blocks that hold most. For equal blocks W(h) is proportional to h, and the line is
the paper's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horizonplan.cards import Card as Card  # what a caller of replan_for_cards needs
from horizonplan.cards import priced
from horizonplan.choice import choose_horizon, choose_rated, choose_stride, find, recommend
from horizonplan.cost import Cost, LadderCost, as_cost
from horizonplan.curves import Curve, fit_cosine, fit_memory
from horizonplan.objective import AccuracyConstraint, InfeasibleError, Objective, evaluate
from horizonplan.plan import Plan
from horizonplan.rows import Row
from horizonplan.units import format_bytes

DEFAULT_OBJECTIVE = AccuracyConstraint(epsilon=0.1)
MOST = 2**63 - 1
DERIVED = "Rates are derived as the square of the cosine: no short runs were given for {where}."
ANEW = "Judged anew from the rows of an earlier plan, without probing. Notes after this one are that plan's."


class MeasurementError(ValueError):
    """Measurements that cannot be used.

    Attributes:
        field: The parameter at fault, such as ``"memory_bytes[2]"``.
        reason: What is wrong with it, and the remedy.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason

    def __reduce__(self) -> tuple[type["MeasurementError"], tuple[str, str]]:
        return type(self), (self.field, self.reason)


@dataclass(frozen=True)
class Strided:
    """What was measured at a stride other than 1; s = h is disjoint windows.

    Attributes:
        horizon: h, 2..T-1.
        stride: s, 2..h.
        memory_bytes: Peak bytes of a step.
        cosine: Cosine to back-propagation's gradient; ``None``: not measured.
        rate: Loss-decrease rate of a short run relative to back-propagation's; ``None``: not measured. Without one it
            cannot be chosen, as the cosine says nothing about strides.
        step_seconds: Seconds of a step; ``None``: not measured.
    """

    horizon: int
    stride: int
    memory_bytes: int
    cosine: float | None = None
    rate: float | None = None
    step_seconds: float | None = None


def plan_from_measurements(
    depth: int,
    horizons: Sequence[int],
    memory_bytes: Sequence[int],
    cosine: Sequence[float],
    objective: Objective = DEFAULT_OBJECTIVE,
    cost: Cost | None = None,
    *,
    rates: Sequence[float | None] | None = None,
    step_seconds: Sequence[float | None] | None = None,
    block_bytes: Sequence[int] | None = None,
    strided: Sequence[Strided] = (),
) -> Plan:
    """Choose a horizon from memory and cosines measured at a few.

    Args:
        depth: Blocks T of the network, at least 2.
        horizons: Where was measured at stride 1: distinct, in 1..T, at least two.
        memory_bytes: Peak bytes of a step at each.
        cosine: Cosine between that gradient and back-propagation's at each.
        objective: What to minimise, and subject to what.
        cost: Price of memory; ``None``: linear. A node memory left open is M(T).
        rates: What short runs measured at each, relative to back-propagation; ``None`` in it, or for it: not measured,
            and derived as cos^2.
        step_seconds: Seconds of a step at each. They are shown, and not fitted: time is no polynomial in h.
        block_bytes: What each block's graph holds: memory between the measured horizons then follows the blocks.
        strided: What was measured at other strides.

    Raises:
        InfeasibleError: No candidate meets the objective; ``.nearest`` is the row that misses it by least.
        MeasurementError: The measurements cannot be used.

    Warns:
        PoorFitWarning: A polynomial does not describe the measurements. The plan's notes say so, too.

    Example:
        >>> plan = plan_from_measurements(12, [1, 4, 8, 12], [300, 600, 1000, 1400], [0.4, 0.9, 0.99, 1.0])
        >>> plan.horizon, plan.row.memory_source, round(plan.row.rate, 2)
        (5, 'fitted', 0.93)
    """
    given = {"memory_bytes": memory_bytes, "cosine": cosine, "rates": rates, "step_seconds": step_seconds}
    _check(depth, horizons, {name: values for name, values in given.items() if values is not None}, block_bytes)
    _check_strided(depth, strided)
    curves = {"memory": fit_memory(horizons, memory_bytes), "cosine": fit_cosine(horizons, cosine, depth)}
    size = curves["memory"] if block_bytes is None else _by_blocks(horizons, memory_bytes, block_bytes)
    points = {
        h: {name: values[i] for name, values in given.items() if values is not None} for i, h in enumerate(horizons)
    }
    everywhere = range(1, depth + 1)
    fitted = zip(everywhere, size(everywhere).tolist(), curves["cosine"](everywhere).tolist(), strict=True)
    rows = [_row(h, depth, points.get(h, {}), memory, angle) for h, memory, angle in fitted]
    rows += [_strided_row(one) for one in strided]
    price = as_cost(cost, max(1, rows[depth - 1].memory_bytes))
    row, judged = _chosen(rows, {}, objective, price)
    notes = _notes(judged, curves, block_bytes is not None)
    return Plan(row, judged, depth, objective, price, curves, notes=notes)


def replan(plan: Plan, objective: Objective | None = None, cost: Cost | None = None) -> Plan:
    """Judge a plan's rows by another objective or cost, without probing.

    Args:
        plan: Any plan.
        objective: ``None``: the plan's.
        cost: ``None``: the plan's. A node memory left open is M(T).

    Raises:
        InfeasibleError: No candidate meets the objective.
        ValueError: The plan's cost was a function that a file forgot.
    """
    objective = plan.objective if objective is None else objective
    price = as_cost(plan.cost if cost is None else cost, max(1, find(plan.rows, plan.depth, 1).memory_bytes))
    row, rows = _chosen(plan.rows, plan.provenance, objective, price)
    notes = plan.notes if ANEW in plan.notes else (ANEW, *plan.notes)
    return replace(plan, row=row, rows=rows, objective=objective, cost=price, notes=notes)


def replan_for_cards(plan: Plan, cards: Sequence[Card], objective: Objective | None = None) -> tuple[Plan, Card]:
    """Judge a plan's rows with each of some cards as the node, bought whole, and take the best.

    The best is the least objective; where that is equal, the least money. The plan's cost is then in money.

    Raises:
        InfeasibleError: No candidate meets the objective, whatever the card.
        MeasurementError: There are no cards, or one of them is none.
    """
    _check_cards(cards)
    found: list[tuple[Plan, Card]] = []
    for card in cards:
        try:
            found.append((replan(plan, objective, LadderCost(priced(card), card.memory_bytes)), card))
        except InfeasibleError as error:
            infeasible = error
    if not found:
        raise infeasible
    best, taken = min(found, key=lambda pair: (pair[0].row.objective or 0.0, pair[0].row.cost or 0.0))
    told = "; ".join(_on_card(one, card) for one, card in found)
    note = f"Of the cards, {taken.name} is taken. {told}. Whether a step can be split over several was not looked at."
    return replace(best, notes=(note, *best.notes)), taken


def measurements_of(plan: Plan) -> dict[str, Any]:
    """What of a plan was measured, as arguments of ``plan_from_measurements``: nothing predicted or fitted."""
    seen = [row for row in plan.rows if row.memory_source == "measured" and row.plain]
    plain = [r for r in seen if r.stride == 1 and (r.cosine_source == "measured" or r.horizon == plan.depth)]
    plain.sort(key=lambda row: row.horizon)
    return {
        "depth": plan.depth,
        "horizons": [row.horizon for row in plain],
        "memory_bytes": [row.memory_bytes for row in plain],
        "cosine": [row.cosine for row in plain],
        "rates": [row.rate if row.rate_source == "measured" else None for row in plain],
        "step_seconds": [row.step_seconds if row.step_seconds_source == "measured" else None for row in plain],
        "strided": [
            Strided(
                row.horizon,
                row.stride,
                row.memory_bytes,
                row.cosine if row.cosine_source == "measured" else None,
                row.rate if row.rate_source == "measured" else None,
                row.step_seconds if row.step_seconds_source == "measured" else None,
            )
            for row in seen
            if row.stride > 1
        ],
    }


def _on_card(plan: Plan, card: Card) -> str:
    count = -(-plan.row.memory_bytes // card.memory_bytes)
    return f"{card.name} ({format_bytes(card.memory_bytes)}): h={plan.horizon}, {count} of it for {plan.row.cost:g}"


def _chosen(
    rows: Sequence[Row], how: Mapping[str, Any], objective: Objective, price: Cost
) -> tuple[Row, tuple[Row, ...]]:
    """The choice as the planner made it (``how``: a plan's provenance), and the judged rows."""
    judged = evaluate(rows, objective, price)
    if how.get("candidates") == "all":
        return recommend(judged, objective, price), judged
    if how.get("accuracy") == "rollout":
        return choose_rated(judged, objective, price), judged
    plain = [
        row for row in judged if row.stride == 1
    ]  # h at stride 1, then its stride where short runs measured several
    best = choose_horizon([row for row in plain if row.feasible and not row.reference] or plain, objective, price)
    if not best.plain:
        return best, judged
    same = [row for row in judged if row.horizon == best.horizon and row.plain and not row.reference]
    run = [(row.horizon, row.stride) for row in same if row.rate_source == "measured"]
    if len(run) > 1 and (best.horizon, 1) in run:
        best, _ = choose_stride(judged, run, objective, price)
    return best, judged


def _row(h: int, depth: int, point: Mapping[str, Any], memory: float, cosine: float) -> Row:
    known, exact = bool(point), h == depth
    seconds, rate = point.get("step_seconds"), None if exact else point.get("rates")
    cosine = 1.0 if exact else float(point.get("cosine", cosine))
    return Row(
        horizon=h,
        memory_bytes=int(point["memory_bytes"]) if known else max(1, round(memory)),
        memory_source="measured" if known else "fitted",
        cosine=cosine,
        cosine_source="derived" if exact else "measured" if known else "fitted",
        rate=cosine**2 if rate is None else float(rate),
        rate_source="derived" if rate is None else "measured",
        step_seconds=seconds,
        step_seconds_source="unmeasured" if seconds is None else "measured",
    )


def _strided_row(one: Strided) -> Row:
    return Row(
        horizon=one.horizon,
        stride=one.stride,
        memory_bytes=one.memory_bytes,
        memory_source="measured",
        cosine=one.cosine,
        cosine_source="unmeasured" if one.cosine is None else "measured",
        rate=one.rate,
        rate_source="unmeasured" if one.rate is None else "measured",
        step_seconds=one.step_seconds,
        step_seconds_source="unmeasured" if one.step_seconds is None else "measured",
    )


def _by_blocks(
    horizons: Sequence[int], memory_bytes: Sequence[int], block_bytes: Sequence[int]
) -> Callable[[Sequence[int]], NDArray[np.floating]]:
    """Memory as a straight line in the bytes of the h consecutive blocks that hold most."""
    ends = np.cumsum([0.0, *block_bytes])

    def most(places: Sequence[int]) -> list[float]:
        return [float((ends[h:] - ends[:-h]).max()) for h in places]

    line = np.polyfit(most(horizons), memory_bytes, 1)
    return lambda places: np.polyval(line, most(places))


def _notes(rows: Sequence[Row], curves: Mapping[str, Curve], by_blocks: bool) -> tuple[str, ...]:
    """What the reader of a plan of foreign measurements should know."""
    inner = [row for row in rows if row.stride == 1][:-1]
    notes = ["Made from measurements that were given: no prediction was tested."]
    if derived := [row.horizon for row in inner if row.rate_source == "derived"]:
        notes.append(DERIVED.format(where="any horizon" if len(derived) == len(inner) else f"h={derived}"))
    if any(row.stride > 1 and row.rate is None for row in rows):
        notes.append("Strides above 1 without a rate of a short run are shown, and never chosen.")
    if by_blocks:
        notes.append("Memory between the measured horizons follows the blocks' own bytes, not the drawn line in h.")
    order = len(curves["cosine"].coefficients) - 1
    if order < 3 and any(row.cosine_source == "fitted" for row in rows):
        notes.append(f"The cosine's curve is of order {order} only: too few horizons were measured for a cubic.")
    for name, curve in curves.items():
        if curve.poor and any(getattr(row, f"{name}_source") == "fitted" for row in rows):
            off = format_bytes(round(curve.misfit)) if name == "memory" else f"{curve.misfit:.3g}"
            notes.append(f"The curve fits the {name} poorly (off by {off}): measure more horizons.")
    return tuple(notes)


def _check(
    depth: int, horizons: Sequence[int], given: Mapping[str, Sequence[Any]], block_bytes: Sequence[int] | None
) -> None:
    _number("depth", depth, 2, MOST, whole=True)
    seen: set[int] = set()
    for i, h in enumerate(horizons):
        _number(f"horizons[{i}]", h, 1, depth, whole=True, limit=f"depth={depth}")
        if h in seen:
            raise MeasurementError(f"horizons[{i}]", f"{h} was given before; give each horizon once, with its mean")
        seen.add(h)
    if len(horizons) < 2:
        raise MeasurementError("horizons", f"{list(horizons)}: measure at least 2 horizons")
    for name, values in given.items():
        if len(values) != len(horizons):
            raise MeasurementError(name, f"{len(values)} values for {len(horizons)} horizons; give one for each")
        low, high, whole = _RANGES[name]
        for i, value in enumerate(values):
            if value is not None or name not in ("rates", "step_seconds"):
                _number(f"{name}[{i}]", value, low, high, whole)
    if block_bytes is None:
        return
    if len(block_bytes) != depth:
        raise MeasurementError("block_bytes", f"{len(block_bytes)} values for depth={depth}; give one for each block")
    for i, size in enumerate(block_bytes):
        _number(f"block_bytes[{i}]", size, 1, MOST, whole=True)


def _check_strided(depth: int, strided: Sequence[Strided]) -> None:
    seen: set[tuple[int, int]] = set()
    for i, one in enumerate(strided):
        _number(f"strided[{i}].horizon", one.horizon, 2, depth - 1, whole=True, limit=f"depth - 1 = {depth - 1}")
        _number(f"strided[{i}].stride", one.stride, 2, one.horizon, whole=True, limit=f"its horizon, {one.horizon}")
        for name, ranged in (
            ("memory_bytes", "memory_bytes"),
            ("cosine", "cosine"),
            ("rate", "rates"),
            ("step_seconds", "step_seconds"),
        ):
            if getattr(one, name) is not None or name == "memory_bytes":
                _number(f"strided[{i}].{name}", getattr(one, name), *_RANGES[ranged])
        if (one.horizon, one.stride) in seen:
            raise MeasurementError(f"strided[{i}]", f"h={one.horizon}, s={one.stride} was given before; give it once")
        seen.add((one.horizon, one.stride))


def _check_cards(cards: Sequence[Card]) -> None:
    if not cards:
        raise MeasurementError("cards", "give at least one")
    for i, card in enumerate(cards):
        _number(f"cards[{i}].memory_bytes", card.memory_bytes, 1, MOST, whole=True)
        _number(f"cards[{i}].price", card.price, 1e-12, 1e12)
        if card.name in [other.name for other in cards[:i]]:
            raise MeasurementError(f"cards[{i}].name", f"{card.name!r} was given before; give each card once")


_RANGES: dict[str, tuple[float, float, bool]] = {  # least, most, whole
    "memory_bytes": (1, MOST, True),
    "cosine": (-1, 1, False),
    "rates": (-1e6, 1e6, False),
    "step_seconds": (0, 1e9, False),
}


def _number(field: str, value: object, low: float, high: float, whole: bool = False, limit: str | None = None) -> None:
    kind = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # type: ignore[operator]
        what = "whole number" if whole else "number"
        most = limit or ("2^63 - 1" if high == MOST else f"{high:g}")
        raise MeasurementError(field, f"{value!r}; give a {what} from {low:g} to {most}")
