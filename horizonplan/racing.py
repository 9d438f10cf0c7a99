"""A race between candidates whose rates are measured by running them: who goes on, how far, and when it is over.

No model in here: a :class:`Track` runs candidates and tells prices, ``choose`` says which candidate would be taken if
the rates were such and such. A candidate whose rate lies in an interval matters if it would be chosen with its upper
end while all others have their lower ends; only those that matter run. All start with few steps, the steps double,
the same runs go on. What is left of the budget is shared out evenly over the rounds to come, so the fewer are left
the further they run (successive halving), and where not all of those that matter can be paid for, the best do.

A short run says little about a longer one: small horizons keep up early and fall behind later. So the interval of a
rate grows with every doubling that lies between its steps and the goal. Rates are expected to grow with the horizon
at like strides, give or take ``SLACK``: what ran bounds what did not, and not every horizon needs to run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from horizonplan.rates import jackknife, relative_rate, tail_of

Who = tuple[int, int]
Choose = Callable[[Mapping[Who, float | None]], Who | None]

ROUNDS = 3  # so the first one takes a quarter of the goal's steps: shorter runs mislead (docs/log.md)
DRIFT = 0.1  # what a rate may change by with each doubling of the steps
SLACK = 0.1  # by which a larger horizon's rate may be below a smaller one's, at like strides
ERRORS = 2.0  # standard errors either way
ORDERS = 3
FAR = 1e3  # beyond any rate


class Track(Protocol):
    """Runs candidates; ``None`` stands for back-propagation, which every rate is relative to."""

    @property
    def spent(self) -> float:
        """What all of it has taken so far, in the budget's unit."""

    def price(self, who: Who | None, steps: int, order: int) -> float:
        """What it would take to bring a candidate to so many steps."""

    def advance(self, who: Who | None, steps: int, order: int) -> Sequence[float]:
        """Bring a candidate to so many steps in all; its losses, NaN where it diverged."""

    def start(self, steps: int, order: int) -> Sequence[float]:
        """Losses of the initial weights on the last batches of so many steps; paid for with back-propagation."""


@dataclass(frozen=True)
class Standing:
    """What is known of one candidate.

    Attributes:
        rates: one an order of the data, after ``steps`` steps.
        errors: their standard errors over the last batches.
        steps: steps it has run; 0: none.
        earlier: its rate and standard error (or ``None``) after half the steps, in the first order.
        diverged: whether its loss ceased to be finite.
    """

    rates: tuple[float, ...] = ()
    errors: tuple[float | None, ...] = ()
    steps: int = 0
    earlier: tuple[float, float | None] | None = None
    diverged: bool = False

    @property
    def rate(self) -> float | None:
        """The mean over orders; ``None`` where there is none."""
        known = [rate for rate in self.rates if math.isfinite(rate)]
        return statistics.fmean(known) if known and not self.diverged else None

    @property
    def stderr(self) -> float | None:
        """Standard error of ``rate``: over the last batches, and over orders where there are several."""
        known = [(r, e or 0.0) for r, e in zip(self.rates, self.errors, strict=True) if math.isfinite(r)]
        if not known or (len(known) == 1 and self.errors[0] is None):
            return None
        within = math.sqrt(statistics.fmean([e * e for _, e in known]))
        between = statistics.stdev([r for r, _ in known]) if len(known) > 1 else 0.0
        return max(within, between) / math.sqrt(len(known))

    @property
    def falling(self) -> float:
        """By how much the rate fell in the last doubling beyond its error; 0 where it did not."""
        if self.earlier is None or not self.rates or self.rate is None or not math.isfinite(self.earlier[0]):
            return 0.0
        error = ERRORS * math.hypot(self.errors[0] or 0.0, self.earlier[1] or 0.0)
        fall = self.earlier[0] - self.rates[0]
        return fall if fall > error else 0.0

    def interval(self, goal: int) -> tuple[float, float]:
        """Where its rate after ``goal`` steps may lie."""
        if self.rate is None or not self.steps:
            return -FAR, FAR
        margin = ERRORS * (self.stderr or 0.0) + DRIFT * max(0.0, math.log2(goal / self.steps))
        return self.rate - margin, self.rate + margin


@dataclass(frozen=True)
class Outcome:
    """How a race ended.

    Attributes:
        standings: of every candidate.
        steps: the most that any has run; rates are compared there.
        rivals: candidates that might still be chosen; one or none where the race is decided.
        exact_fell: whether back-propagation lowered its own loss, without which there are no rates.
        spent: what it took.
    """

    standings: Mapping[Who, Standing]
    steps: int
    rivals: tuple[Who, ...]
    exact_fell: bool
    spent: float

    def rate(self, who: Who) -> float | None:
        """The rate to choose by: one that did not come as far as others counts with its interval's lower end."""
        standing = self.standings[who]
        return (
            standing.rate if standing.steps == self.steps or standing.rate is None else standing.interval(self.steps)[0]
        )


@dataclass
class _Race:
    track: Track
    choose: Choose
    budget: float
    goal: int
    standings: dict[Who, Standing]
    prior: Mapping[Who, float]
    exact: dict[int, Sequence[float]] = field(default_factory=dict)

    def rivals(self) -> list[Who]:
        """Those that matter, the most promising first."""
        within = self._intervals()
        low = {who: None if s.diverged else within[who][0] for who, s in self.standings.items()}
        runs = [who for who, end in low.items() if end is not None]
        matter = {who for who in runs if self.choose({**low, who: within[who][1]}) == who}
        return [who for who in self._ranked(within) if who in matter]

    def _intervals(self) -> dict[Who, tuple[float, float]]:
        """Where rates at the goal may lie, by their own runs and those of other horizons at like strides."""
        own = {who: standing.interval(self.goal) for who, standing in self.standings.items()}
        ran = [who for who, standing in self.standings.items() if standing.rate is not None]
        found = {}
        for who, (low, high) in own.items():
            for other in ran:
                if other[0] < who[0] and _alike(other, who):
                    low = max(low, min(high, own[other][0] - SLACK))
                elif other[0] > who[0] and _alike(other, who):
                    high = min(high, max(low, own[other][1] + SLACK))
            found[who] = low, high
        return found

    def _ranked(self, within: Mapping[Who, tuple[float, float]]) -> list[Who]:
        """In the order in which they would be chosen if those before were not there; the hopeless by their rates."""
        rates = {who: None if s.diverged else self._expected(who, within[who]) for who, s in self.standings.items()}
        order, left = [], dict(rates)
        while (best := self.choose(left)) is not None:
            order.append(best)
            left[best] = None
        return order + sorted(set(rates) - set(order), key=lambda who: (-(rates[who] or -FAR), who))

    def _expected(self, who: Who, within: tuple[float, float]) -> float:
        rate = self.standings[who].rate
        if rate is None and within == (-FAR, FAR):
            return self.prior.get(who, 0.0)
        return statistics.fmean(within) if rate is None else rate

    def due(self, rivals: Iterable[Who], steps: int, order: int) -> list[Who]:
        """Which of them have not run so far in so many orders."""
        return [who for who in rivals if self._price(who, steps, order) > 0]

    def round(self, due: Sequence[Who], steps: int, order: int, share: float) -> bool:
        """Bring candidates to so many steps in orders 0 to ``order`` while the share lasts; whether any came.

        One at least comes where the budget allows.
        """
        left = self.budget - self.track.spent
        exact = self._price(None, steps, order)
        if not due or exact + self._price(due[0], steps, order) > left:
            return False
        limit = self.track.spent + min(left, max(share, exact + self._price(due[0], steps, order)))
        for k in range(order + 1):
            self.exact[k] = self.track.advance(None, steps, k)
        for who in due:
            if self.track.spent + self._price(who, steps, order) <= limit:
                self._advance(who, steps, order)
        return True

    def exact_fell(self) -> bool:
        """Whether back-propagation's loss is below that of the initial weights."""
        if 0 not in self.exact:
            return False
        steps = len(self.exact[0])
        tail = self.exact[0][-tail_of(steps) :]
        return statistics.fmean(tail) < statistics.fmean(self.track.start(steps, 0))

    def _price(self, who: Who | None, steps: int, order: int) -> float:
        return sum(self.track.price(who, steps, k) for k in range(order + 1))

    def _advance(self, who: Who, steps: int, order: int) -> None:
        rates = []
        for k in range(order + 1):
            losses = self.track.advance(who, steps, k)
            if not math.isfinite(losses[-1]):
                self.standings[who] = replace(self.standings[who], diverged=True)
                return
            rates.append(self._rate(losses, steps, k))
            if k == 0:
                earlier = self._rate(losses, steps // 2, 0) if steps > 1 else None
        values, errors = zip(*rates, strict=True)
        self.standings[who] = Standing(values, errors, steps, earlier)

    def _rate(self, losses: Sequence[float], steps: int, order: int) -> tuple[float, float | None]:
        last = slice(steps - tail_of(steps), steps)
        series = losses[last], self.exact[order][last], self.track.start(steps, order)
        return relative_rate(*series), jackknife(*series)


def _alike(one: Who, other: Who) -> bool:
    """Whether two strides are the same, in blocks or as parts of the horizon."""
    return one[1] == other[1] or (one[0] == one[1] and other[0] == other[1])


def race(
    candidates: Mapping[Who, float | None],
    track: Track,
    choose: Choose,
    budget: float,
    goal: int,
    first: int | None = None,
    orders: int = ORDERS,
) -> Outcome:
    """Run candidates until it is clear which would be chosen, or the budget is spent.

    Args:
        candidates: who may run, with a rate to expect, by which they are ranked before they have run.
        track: what runs them.
        choose: the candidate that would be taken at given rates (``None``: it has none), or ``None`` if none would.
        budget: what it may take, back-propagation's own run included; never exceeded.
        goal: steps after which rates are compared. Where the best one's rate is still falling then, and the budget
            allows, it is doubled.
        first: steps of the first round; ``None``: a quarter of the goal's.
        orders: orders of the data that are tried where one does not decide it.
    """
    prior = {who: rate for who, rate in candidates.items() if rate is not None}
    here = _Race(track, choose, budget, goal, {who: Standing() for who in candidates}, prior)
    steps, order = min(first or -(-goal // 2 ** (ROUNDS - 1)), goal), 0
    while rivals := here.rivals():
        due = here.due(rivals, steps, order)
        rounds = 1 + math.ceil(math.log2(here.goal / steps))
        moved = here.round(due, steps, order, (budget - track.spent) / rounds)
        if steps < here.goal:
            steps = min(2 * steps, here.goal)
        elif due and not (moved and here.exact_fell()):
            break
        elif due:
            continue
        elif len(rivals) > 1 and order + 1 < orders:
            order += 1
        elif here.standings[rivals[0]].falling:
            here.goal, steps, order = 2 * here.goal, 2 * here.goal, 0
        else:
            break
    reached = max((s.steps for s in here.standings.values()), default=0)
    return Outcome(here.standings, reached, tuple(rivals), here.exact_fell(), track.spent)
