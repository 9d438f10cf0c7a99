"""The race on recorded losses: what it would have chosen, and how far from the best that is.

    python benchmarks/signals.py --steps 400 --cache signals-cache    # records; some hours on one core
    python benchmarks/race.py signals-cache/*.json

Losses of every (h, s in {1, 2, h}) are read, not run. The truth is the rate at the end of them. Memory is taken to be
.3 + .7 h/T, disjoint windows .02 less. Rel is Eq. 19's: 0 the best candidate, 1 the worst feasible one, 1.5 an
infeasible answer; the mean over seven objectives and all tasks.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from horizonplan.racing import race
from horizonplan.rates import relative_rate, tail_of

Pair = tuple[int, int]
Rates = Mapping[Pair, float | None]
Answer = Callable[[Any, Callable[[Rates], Pair | None]], Pair | None]
OBJECTIVES = [("epsilon", e) for e in (0.05, 0.1, 0.2, 0.4)] + [("lam", lam) for lam in (0.2, 0.5, 1.0)]


class Recorded:
    """A :class:`horizonplan.racing.Track` over recorded losses; what was not recorded is too dear."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found, self.depth, self.spent = found, found["T"], 0.0
        self.done: dict[tuple[Pair | None, int], int] = {}
        self.last = len(found["runs"][f"{self.depth},1,0"])

    def price(self, who: Pair | None, steps: int, order: int) -> float:
        """In steps of back-propagation, for linear layers."""
        if steps > self.last or order > 1:
            return math.inf
        one = 1.0
        if who is not None:
            (h, s), depth = who, self.depth
            one = (2 * depth + (math.ceil((depth - h) / s) + 1) * (h - 1)) / (3 * depth - 1)
        return one * max(0, steps - self.done.get((who, order), 0))

    def advance(self, who: Pair | None, steps: int, order: int) -> Sequence[float]:
        """Read on."""
        self.spent += self.price(who, steps, order)
        self.done[who, order] = max(steps, self.done.get((who, order), 0))
        h, s = who or (self.depth, 1)
        return self.found["runs"][f"{h},{s},{order}"][:steps]

    def start(self, steps: int, order: int) -> Sequence[float]:
        """Losses of the initial weights."""
        return self.found["start"][str(order)][steps - tail_of(steps) : steps]


def rates(found: Mapping[str, Any], steps: int, orders: Sequence[int] = (0, 1)) -> dict[Pair, float]:
    """Everyone's rate after so many steps."""
    track = Recorded(found)
    last = slice(steps - tail_of(steps), steps)
    exact = {k: track.advance(None, steps, k)[last] for k in orders}
    told = {}
    for h in range(1, track.depth):
        for s in dict.fromkeys(s for s in (1, 2, h) if s <= h):
            runs = {k: found["runs"][f"{h},{s},{k}"][last] for k in orders}
            values = [relative_rate(runs[k], exact[k], track.start(steps, k)) for k in orders]
            told[h, s] = statistics.fmean(values)
    return {pair: value if math.isfinite(value) else -math.inf for pair, value in told.items()}


def objective(depth: int, kind: str, number: float) -> Callable[[Pair, float], float | None]:
    """What is minimised; ``None`` where the constraint is missed."""

    def value(pair: Pair, rate: float) -> float | None:
        cost = 0.3 + 0.7 * pair[0] / depth - 0.02 * (1 < pair[0] == pair[1] < depth)
        if kind == "lam":
            return number * cost - rate
        return cost if rate >= 1 - number else None

    return value


def chooser(depth: int, value: Callable[[Pair, float], float | None]) -> Callable[[Rates], Pair | None]:
    """The best at given rates, back-propagation (``None``) among them."""

    def choose(known: Rates) -> Pair | None:
        judged = {(depth, 1): value((depth, 1), 1.0)}
        judged |= {pair: value(pair, rate) for pair, rate in known.items() if rate is not None}
        best = min((v, -(known.get(pair) or 1.0), pair) for pair, v in judged.items() if v is not None)[2]
        return None if best[0] == depth else best

    return choose


def relative(found: Mapping[str, Any], answer: Answer) -> list[float]:
    """Eq. 19 of an answer under each objective."""
    depth, scores = found["T"], []
    truth = {**rates(found, Recorded(found).last), (found["T"], 1): 1.0}
    for kind, number in OBJECTIVES:
        value = objective(depth, kind, number)
        judged = {pair: value(pair, rate) for pair, rate in truth.items()}
        feasible = [v for v in judged.values() if v is not None]
        mine = judged[answer(found, chooser(depth, value)) or (depth, 1)]
        span = max(feasible) - min(feasible)
        scores.append(1.5 if mine is None else (mine - min(feasible)) / span if span else 0.0)
    return scores


def main(paths: Sequence[str]) -> None:
    """Two tables: everyone run to n steps, and the race to a goal within a budget."""
    tasks = [json.loads(Path(path).read_text()) for path in paths]

    def told(answer: Answer) -> str:
        scores = [score for task in tasks for score in relative(task, answer)]
        return f"{statistics.fmean(scores):.2f} ({sum(s == 1.5 for s in scores)} of {len(scores)} infeasible)"

    print("back-propagation", told(lambda found, choose: None))
    print("(2, 2)", told(lambda found, choose: (2, 2)))
    for steps in (8, 16, 32, 50, 64, 100, 128, 200):
        print(f"all to {steps} steps", told(lambda found, choose, n=steps: choose(rates(found, n, (0,)))))
    for goal in (50, 128):
        for budget in (400, 800, 1600):
            spent: list[float] = []

            def run(found: Any, choose: Any, goal: int = goal, budget: int = budget, spent: Any = spent) -> Pair | None:
                track, depth = Recorded(found), found["T"]
                expected = {pair: 1 - (1 - pair[0] / depth) ** 2 for pair in rates(found, track.last)}
                outcome = race(expected, track, choose, budget, goal)
                spent.append(outcome.spent)
                return choose({pair: outcome.rate(pair) for pair in outcome.standings})

            print(f"race to {goal}, budget {budget}: {told(run)}, spent {statistics.fmean(spent):.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
