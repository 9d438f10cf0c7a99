"""The choice by measured rates: all candidates race in short real runs, and the objective says who matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from horizonplan.candidates import with_derived_rate
from horizonplan.choice import NO_FALL, Judge, choose_horizon, choose_rated
from horizonplan.decide import Decision
from horizonplan.explain import depth_of, name_of
from horizonplan.frugal import Frugal
from horizonplan.predict import forward_flops, step_flops
from horizonplan.probes.runs import Pair, Runs, Stream
from horizonplan.probes.sample import Sample
from horizonplan.probing import Probing
from horizonplan.racing import DRIFT, Outcome, race
from horizonplan.rates import tail_of
from horizonplan.rows import Row
from horizonplan.schedule import Schedule
from horizonplan.settle import Settled
from horizonplan.weigh import best

NO_ROOM = (
    "No candidate could be run within rollout_budget={:g} steps of back-propagation: the choice is by the cosine. Give "
    "more of it."
)


class Rollouts:
    """A :class:`horizonplan.racing.Track` of real runs, priced in steps of back-propagation by their FLOPs."""

    def __init__(self, probing: Probing, runs: Runs, way: Frugal) -> None:
        self.probing, self.runs, self.way = probing, runs, way
        self.depth = probing.chain.depth
        self._step: dict[Pair, float] = {}
        self._forward = forward_flops(probing.profile) / probing.bp_flops
        self._starts = 0

    @property
    def spent(self) -> float:
        """Steps of back-propagation so far."""
        return self._forward * self._starts + sum(self._cost(pair) * n for pair, n in self.runs.stepped.items())

    def price(self, who: Pair | None, steps: int, order: int) -> float:
        """Of what is missing; losses of the initial weights are back-propagation's."""
        pair = who or (self.depth, 1)
        price = self._cost(pair) * self.runs.missing(pair, steps, order)
        if who:
            return price
        halfway = self.runs.unseen(_last(steps // 2), 0) if steps > 1 and not order else 0  # where rates are compared
        return price + self._forward * (self.runs.unseen(_last(steps), order) + halfway)

    def advance(self, who: Pair | None, steps: int, order: int) -> Sequence[float]:
        """Run; back-propagation's run computes the initial weights' losses too."""
        if who is None:
            self._starts += self.runs.unseen(_last(steps), order)
            self.runs.start(_last(steps), order)
        return self.runs.advance(who or (self.depth, 1), steps, order)

    def start(self, steps: int, order: int) -> Sequence[float]:
        """Losses of the initial weights on the last quarter's batches."""
        self._starts += self.runs.unseen(_last(steps), order)
        return self.runs.start(_last(steps), order)

    def _cost(self, pair: Pair) -> float:
        if pair not in self._step:
            schedule = self.way.schedule(Schedule.horizon(self.depth, *pair))
            self._step[pair] = step_flops(schedule, self.probing.profile) / self.probing.bp_flops
        return self._step[pair]


def decide_by_rollouts(
    probing: Probing, found: Settled, stream: Stream, steps: int, budget: float, seed: int
) -> Decision:
    """Let all candidates race, and choose by what was measured.

    Args:
        probing: where measurements are made.
        found: the table; its fitted cosines only say who is expected to be good.
        stream: the data.
        steps: steps after which rates are compared, or more.
        budget: steps of back-propagation that the race may take.
        seed: of the runs' random numbers.

    Raises:
        InfeasibleError: nothing meets the objective.
    """
    judge, rows = found.judge, found.rows
    outcome = probing.raced(lambda way: _race(probing, judge, rows, stream, steps, budget, seed, way))
    if outcome is None or (outcome.rivals and not outcome.exact_fell):
        price = judge.price(rows)
        chosen = best(rows, judge) if judge.beside else choose_horizon(rows, judge.objective, price)
        rows, chosen = judge.swapped(rows, chosen, with_derived_rate(chosen))
        told = NO_FALL if outcome and outcome.steps else NO_ROOM.format(budget)
        return Decision(rows, chosen, (told,) if outcome else ())
    rated = judge.judged([_rated(row, outcome) for row in rows])
    chosen = best(rated, judge) if judge.beside else choose_rated(rated, judge.objective, judge.price(rated))
    rolled = tuple(_samples(outcome))
    return Decision(rated, chosen, tuple(_notes(outcome, chosen, rated, budget)), rolled)


def best_rated(rows: Sequence[Row], failed: Row, judge: Judge) -> Row | None:
    """The best row by its rate, or ``None`` if nothing fits; for what turns out not to fit the device."""
    try:
        return choose_rated([row for row in rows if row.fits is not False], judge.objective, judge.price(rows))
    except ValueError:
        return None


def contenders(rows: Sequence[Row]) -> dict[Pair, float | None]:
    """Every (horizon, stride) that may run, with the rate that its horizon's cosine promises."""
    promised = {row.horizon: row.cosine**2 for row in rows if row.stride == 1 and row.cosine is not None}
    return {
        (row.horizon, row.stride): promised.get(row.horizon)
        for row in rows
        if _runs(row) and not row.reference and row.fits is not False
    }


def _race(
    probing: Probing,
    judge: Judge,
    rows: Sequence[Row],
    stream: Stream,
    steps: int,
    budget: float,
    seed: int,
    way: Frugal,
) -> Outcome:
    runs = Runs(probing.chain, stream, probing.optimizer, seed, way.recompute, way.micro_batches)
    runs.check_parts()
    track, price, candidates = Rollouts(probing, runs, way), judge.price(rows), contenders(rows)
    weighed = [row for row in rows if not row.reference and row.fits is not False and (_runs(row) or row.exact)]

    def choose(rates: Mapping[Pair, float | None]) -> Pair | None:
        tried = [
            replace(row, rate=rates[row.horizon, row.stride], rate_stderr=None) if _runs(row) else row
            for row in weighed
        ]
        try:
            taken = choose_rated(tried, judge.objective, price)
        except ValueError:
            return None
        return (taken.horizon, taken.stride) if _runs(taken) else None

    earlier = probing.spent.setdefault("rollouts", 0.0)
    try:
        return race(candidates, track, choose, budget - earlier, steps)
    finally:
        probing.spent["rollouts"] = earlier + track.spent


def _runs(row: Row) -> bool:
    """Whether a row's rate is that of its horizon and stride (recomputing changes no gradient), and not 1."""
    return replace(row, recompute=0).plain and not row.exact


def _rated(row: Row, outcome: Outcome) -> Row:
    """The row with what the race found of its rate; a rate that only the cosine promises is left to references."""
    pair = row.horizon, row.stride
    if not _runs(row) or (row.reference and pair not in outcome.standings):
        return row
    standing = outcome.standings.get(pair)
    if standing is None or standing.rate is None:
        return replace(row, rate=None, rate_stderr=None, rate_source="unmeasured")
    if standing.steps < outcome.steps:
        return replace(row, rate=outcome.rate(pair), rate_stderr=None, rate_source="predicted")
    return replace(row, rate=standing.rate, rate_stderr=standing.stderr, rate_source="measured")


def _samples(outcome: Outcome) -> list[Sample]:
    return [
        Sample(
            "rate",
            "1",
            *pair,
            math.nan if standing.rate is None else standing.rate,
            standing.stderr,
            detail={
                "why": "the run diverged" if standing.diverged else "measured",
                "rate": standing.rate,
                "stderr": standing.stderr,
                "steps": standing.steps,
                "orders": len(standing.rates),
                "rate_at_half": standing.earlier[0] if standing.earlier else None,
            },
        )
        for pair, standing in outcome.standings.items()
        if standing.steps or standing.diverged
    ]


def _notes(outcome: Outcome, chosen: Row, rows: Sequence[Row], budget: float) -> list[str]:
    if not outcome.steps:
        return ["No rollout was needed: no candidate's rate could change the choice."]
    ran = [s for s in outcome.standings.values() if s.steps or s.diverged]
    far = [s for s in ran if s.steps == outcome.steps]
    told = [
        f"Rates were measured by rollouts: {len(ran)} of {len(outcome.standings)} candidates ran, {len(far)} of them "
        f"{outcome.steps} steps. Where a rate is marked as predicted its run was shorter, and the lower end of what is "
        "expected of it is shown."
    ]
    pair = chosen.horizon, chosen.stride
    others = [who for who in outcome.rivals if who != pair]
    if others:
        names = ", ".join(f"h={h}, stride {s}" for h, s in others[:4]) + (", ..." if len(others) > 4 else "")
        told.append(
            f"The race is not decided: {names} might still be the better choice, and {outcome.spent:.0f} of "
            f"rollout_budget={budget:g} are spent. Give more of it, or more rollout_steps."
        )
    standing = outcome.standings.get(pair)
    if standing is not None and standing.earlier is not None and standing.rate is not None and standing.falling:
        least = standing.rates[0] - standing.falling - DRIFT
        told.append(
            f"The rate of {name_of(chosen, depth_of(rows))} falls with the steps: {standing.earlier[0]:.2f} after "
            f"{standing.steps // 2}, {standing.rates[0]:.2f} after {standing.steps}. Expect less of a longer training, "
            f"down to {least:.2f} in twice the steps; give more rollout_steps to see."
        )
    return told


def _last(steps: int) -> range:
    return range(steps - tail_of(steps), steps)
