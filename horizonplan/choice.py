"""The choice from the table: h by the cosine (the paper's rule), then the stride by what short real runs measured.

The cosine never chooses between strides: at equal memory, disjoint windows can train better than
stride 1 although stride 1 has the larger cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from horizonplan.alternatives import Alternatives
from horizonplan.candidates import Room, table
from horizonplan.cost import Cost, as_cost
from horizonplan.curves import Curve
from horizonplan.explain import depth_of, name_of
from horizonplan.frontier import undominated
from horizonplan.objective import InfeasibleError, Objective, evaluate, select
from horizonplan.probes.memory import Stride, stride_of
from horizonplan.probes.profile import Profile
from horizonplan.probes.sample import Sample
from horizonplan.rows import Row
from horizonplan.units import format_bytes

NO_RATE = "The short runs found no rate: all of them diverged. Give another optimizer or a smaller learning rate."
NO_FALL = (
    "The short runs found no rate: back-propagation itself did not lower the loss in them. Give more rollout_steps or "
    "another optimizer. Where a rate is shown for a truncated gradient it is cos^2."
)


@dataclass(frozen=True)
class Judge:
    """What was asked for: from measurements to a table, and from a table to a choice.

    Attributes:
        objective: what to minimise, and subject to what.
        cost: price of memory; ``None``: linear in nodes.
        strides: strides that are candidates.
        exact_may_win: whether checkpointed back-propagation is a candidate.
        room: what the device has.
        node_bytes: a node's memory where the cost leaves it open; ``None``: back-propagation's need.
        beside: candidates beside the paper's family.
    """

    objective: Objective
    cost: Cost | None
    strides: Sequence[Stride]
    exact_may_win: bool
    room: Room
    node_bytes: int | None = None
    beside: Alternatives | None = None

    def rows(self, profile: Profile, samples: Iterable[Sample], curves: Mapping[str, Curve]) -> tuple[Row, ...]:
        """The table, judged."""
        rows = table(profile, samples, curves, self.strides, self.exact_may_win)
        if self.beside is not None:
            rows += self.beside.rows(profile, rows)
        return self.judged([self.room.holds(row) for row in rows])

    def judged(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Rows with cost, objective and feasibility."""
        return evaluate(rows, self.objective, self.price(rows))

    def price(self, rows: Sequence[Row]) -> Cost:
        """The cost with its node's memory filled in."""
        return as_cost(self.cost, self.node_bytes or max(1, find(rows, depth_of(rows), 1).memory_bytes))

    def swapped(self, rows: Sequence[Row], old: Row, new: Row) -> tuple[tuple[Row, ...], Row]:
        """The table with one row replaced and judged anew, and that row."""
        place, price = rows.index(old), self.price(rows)
        changed = [*rows[:place], new, *rows[place + 1 :]]
        judged = evaluate(changed, self.objective, price)
        return judged, judged[place]

    def horizon(self, rows: Sequence[Row]) -> Row | None:
        """The row whose horizon is taken, or ``None`` where nothing is feasible."""
        try:
            return choose_horizon(rows, self.objective, self.price(rows))
        except InfeasibleError:
            return None


def choose_horizon(rows: Iterable[Row], objective: Objective, cost: Cost) -> Row:
    """The best row at stride 1 by its derived rate (Algorithm 1, line 17), exact ones with recomputation included.

    Raises:
        InfeasibleError: there is none.
    """
    return select([row for row in rows if row.stride == 1], objective, cost)


def recommend(rows: Iterable[Row], objective: Objective, cost: Cost) -> Row:
    """The best row of a table in which any may win, or the one of the frontier that dominates it.

    So no row is recommended of which another candidate is at least as small, as fast and as good, and better in one:
    not where objectives tie (whole nodes), and not where the objective does not look at the rate (the largest horizon).
    A row whose rate is known goes before those of which it is not. Another method's windows are for comparison only.

    Raises:
        InfeasibleError: no candidate is feasible.
    """
    judged = [row for row in evaluate(rows, objective, cost) if row.algorithm == "horizon"]
    known = [row for row in judged if row.rate is not None]
    if any(row.feasible and not row.reference for row in known):
        judged = known
    return undominated(select(judged, objective, cost), judged)


def pairs_at(horizon: int, strides: Sequence[Stride]) -> list[tuple[int, int]]:
    """(horizon, stride) for the strides that fit a horizon; stride 1 where none does."""
    fitting = [stride_of(s, horizon) for s in strides if s == "horizon" or (isinstance(s, int) and s <= horizon)]
    return [(horizon, s) for s in dict.fromkeys(fitting or [1])]


def choose_stride(
    rows: Sequence[Row], pairs: Sequence[tuple[int, int]], objective: Objective, cost: Cost
) -> tuple[Row, list[str]]:
    """The better of the strides tried at one horizon, and what to note about it.

    As :func:`choose_rated`; if none meets the objective, the one with the largest rate is taken.
    """
    tried = [find(rows, *pair) for pair in pairs]
    tried = [row for row in tried if row.fits is not False] or tried
    rates = {row: row.rate for row in tried if row.rate is not None}  # what diverged is out, whatever is asked for
    if not rates:
        return tried[0], [NO_RATE]
    try:
        best = choose_rated([replace(row, reference=False) for row in rates], objective, cost)
    except InfeasibleError:
        return max(rates, key=rates.__getitem__), []
    return find(tried, best.horizon, best.stride), []


def choose_rated(rows: Sequence[Row], objective: Objective, cost: Cost) -> Row:
    """The best row by what was measured: the objective decides, then the rate, then fewer FLOPs.

    Rates within two standard errors count as equal. Rows without a rate and references are out.

    Raises:
        InfeasibleError: none meets the objective.
        ValueError: none has a rate.
    """
    rated = [row for row in rows if row.rate is not None and not row.reference]
    best = select(rated, objective, cost)
    equal = [row for row in evaluate(rated, objective, cost) if row.feasible and row.objective == best.objective]
    leader = max(equal, key=lambda row: row.rate or 0.0)
    return min((row for row in equal if _as_fast(row, leader)), key=lambda row: row.flops or 0)


def first_that_fits(rows: Sequence[Row], pairs: Sequence[tuple[int, int]]) -> Row:
    """The first of some (horizon, stride) that fits the device, or the first of all if none does."""
    tried = [find(rows, *pair) for pair in pairs]
    return next((row for row in tried if row.fits is not False), tried[0])


def _as_fast(row: Row, leader: Row) -> bool:
    """Whether two measured rates differ by less than two standard errors of their difference."""
    if row.rate is None or leader.rate is None:
        return False
    spread = math.hypot(row.rate_stderr or 0.0, leader.rate_stderr or 0.0)
    return leader.rate - row.rate <= 2 * spread


def shortfall_notes(rows: Sequence[Row], chosen: Row, objective: Objective, cost: Cost) -> list[str]:
    """Say plainly when what was measured at the choice misses the objective, and what comes next."""
    if chosen.feasible:
        return []
    others = [row for row in rows if row != chosen and (row.stride == 1 or row.horizon == chosen.horizon)]
    try:
        advice = f"The next best candidate is {name_of(select(others, objective, cost), depth_of(rows))}."
    except ValueError:
        advice = "No other candidate meets it."
    rate = "unknown" if chosen.rate is None else f"{chosen.rate:.3f}"
    if chosen.fits is False:
        return [
            f"The choice does not fit the device: it needs {format_bytes(chosen.device_bytes or chosen.memory_bytes)}, "
            f"or ran out of memory when it was measured. {advice}"
        ]
    return [
        f"The choice misses the objective ({objective.describe()}): its rate is {rate} ({chosen.rate_source}) and it "
        f"needs {format_bytes(chosen.memory_bytes)} ({chosen.memory_source}). {advice}"
    ]


def find(rows: Iterable[Row], horizon: int, stride: int) -> Row:
    """The row of a horizon and stride that recomputes nothing, splits no batch and rounds no forward."""
    return next(r for r in rows if (r.horizon, r.stride) == (horizon, stride) and r.plain)
