"""How a budget of short runs is best spent: strategies replayed on the losses that the selection benchmark has stored.

    PYTHONPATH=. python benchmarks/selection_replay.py              # some minutes, nothing is trained
    PYTHONPATH=. python benchmarks/selection_replay.py --parts 0.15

Each strategy sees the first steps of the recorded trainings, as far as it pays for them, and answers all problems of
`selection.py`. That the runs it sees are the truth's own, in the same order of the data, makes all of them look better
than they are; it is their differences that count. Losses are means of four steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import typer
from selection import FOLDER
from selection_choices import cells_of, exhaustive, problems
from selection_judge import score, truths_of
from selection_store import Store
from selection_tasks import TASKS
from selection_truth import TAIL, THIN
from typer import Option

import horizonplan as hp
from horizonplan.choice import choose_rated
from horizonplan.racing import race
from horizonplan.rates import relative_rate, tail_of

Who = tuple[int, int]
FORWARD = 1 / 3  # of a step's price
ROUNDS = 3


@dataclass
class Recorded:
    """A task and seed: the recorded trainings of all (h, s), and what was paid to see of them."""

    task: str
    cells: dict[Who, Mapping[str, Any]]
    cosines: Mapping[str, float]
    seen: dict[Who, int] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.exact = next(who for who, cell in self.cells.items() if "start" in cell)
        self.steps = self.cells[self.exact]["steps"]
        self.candidates = [who for who in self.cells if who != self.exact]

    def rows(self, rates: Mapping[Who, float | None]) -> list[hp.Row]:
        """A table with these rates; those that are left out are no rows, back-propagation always is."""
        facts = {who: {"memory_bytes": c["peak_bytes"], "flops": c["flops"]} for who, c in self.cells.items()}
        rows = [hp.Row(horizon=h, stride=s, rate=rate, **facts[h, s]) for (h, s), rate in rates.items()]
        return [*rows, hp.Row(horizon=self.exact[0], rate=1.0, **facts[self.exact])]

    def rate(self, who: Who, steps: int) -> float | None:
        """The rate after so many steps, `None` where there is none."""
        count = steps // THIN
        last = slice(count - max(1, count // TAIL), count)
        exact = self.cells[self.exact]
        if len(self.cells[who]["losses"]) < count:
            return None
        found = relative_rate(self.cells[who]["losses"][last], exact["losses"][last], exact["start"][last])
        return found if math.isfinite(found) else None

    # what follows makes it a `horizonplan.racing.Track`

    def price(self, who: Who | None, steps: int, order: int) -> float:
        """In steps of back-propagation; there is no second order of the data, and nothing beyond the recording."""
        if order or steps > self.steps:
            return math.inf
        cell, exact = self.cells[who or self.exact], self.cells[self.exact]
        price: float = cell["flops"] / exact["flops"] * max(0, steps - self.seen.get(who or self.exact, 0))
        return price if who or steps in self.started else price + FORWARD * tail_of(steps)

    def advance(self, who: Who | None, steps: int, order: int) -> list[float]:
        """Its losses so far, NaN where it diverged."""
        self.spent += self.price(who, steps, order)
        self.started |= set() if who else {steps}
        self.seen[who or self.exact] = max(steps, self.seen.get(who or self.exact, 0))
        cell = self.cells[who or self.exact]
        losses = [loss for loss in cell["losses"] for _ in range(THIN)][:steps]
        return losses + [math.nan if cell["diverged"] else losses[-1]] * (steps - len(losses))

    def start(self, steps: int, order: int) -> list[float]:
        """Of the initial weights."""
        losses = [loss for loss in self.cells[self.exact]["start"] for _ in range(THIN)]
        return losses[steps - tail_of(steps) : steps]


Strategy = Callable[[Recorded, hp.Objective, Any, float], Who]


def taken(recorded: Recorded, rates: Mapping[Who, float | None], objective: hp.Objective, cost: Any) -> Who:
    """The best at these rates, back-propagation where none is feasible."""
    known = {who: rate for who, rate in rates.items() if rate is not None}
    try:
        row = choose_rated(recorded.rows(known), objective, cost)
    except hp.InfeasibleError:
        return recorded.exact
    return row.horizon, row.stride


def halving(recorded: Recorded, objective: hp.Objective, cost: Any, budget: float, rounds: int, drift: float) -> Who:
    """All run, the better half goes on, and so on; every round may spend as much. One round: all run alike.

    Args:
        recorded: the trainings.
        objective: what is asked for.
        cost: of memory.
        budget: steps of back-propagation.
        rounds: how many.
        drift: taken from every rate for each doubling between the last round's steps and the whole training's.
    """
    alive, steps, rates = list(recorded.candidates), 0, dict[Who, float | None]()
    for left in range(rounds, 0, -1):
        share = (budget - recorded.spent) / left
        longer = range(steps + THIN, recorded.steps + 1, THIN)
        steps = max((n for n in longer if _price(recorded, alive, n) <= share), default=steps)
        if not steps:
            continue  # a later round has a larger share
        for who in (None, *alive):
            recorded.advance(who, steps, 0)
        rates = {who: recorded.rate(who, steps) for who in alive}
        if left > 1:
            alive = _ranked(recorded, rates, objective, cost)[: -(-len(alive) // 2)]
    lower = drift * math.log2(recorded.steps / steps) if steps else 0.0
    return taken(recorded, {w: None if r is None else r - lower for w, r in rates.items()}, objective, cost)


def raced(recorded: Recorded, objective: hp.Objective, cost: Any, budget: float) -> Who:
    """As `plan_horizon(accuracy="rollout")`, with the selection benchmark's steps."""

    def choose(rates: Mapping[Who, float | None]) -> Who | None:
        who = taken(recorded, rates, objective, cost)
        return None if who == recorded.exact else who

    prior = {who: recorded.cosines[f"h={who[0]},s=1"] ** 2 for who in recorded.candidates}
    outcome = race(prior, recorded, choose, budget, min(128, recorded.steps // 2))
    return taken(recorded, {who: outcome.rate(who) for who in recorded.candidates}, objective, cost)


def _price(recorded: Recorded, alive: Sequence[Who], steps: int) -> float:
    return sum(recorded.price(who, steps, 0) for who in (None, *alive))


def _ranked(recorded: Recorded, rates: Mapping[Who, float | None], objective: hp.Objective, cost: Any) -> list[Who]:
    """In the order in which they would be taken if those before were not there; then the rest by rate."""
    left, order = dict(rates), list[Who]()
    while (best := taken(recorded, left, objective, cost)) != recorded.exact:
        order.append(best)
        del left[best]
    return order + sorted(left, key=lambda who: (-math.inf if left[who] is None else -left[who], who))


STRATEGIES: dict[str, Strategy] = {
    "all alike": partial(halving, rounds=1, drift=0.0),
    "halving": partial(halving, rounds=ROUNDS, drift=0.0),
    "halving, rates less .02 a doubling": partial(halving, rounds=ROUNDS, drift=0.02),
    "halving, rates less .05 a doubling": partial(halving, rounds=ROUNDS, drift=0.05),
    "race": raced,
}


def recordings() -> Iterator[tuple[dict[str, Any], Recorded]]:
    """All that is stored: the truth by way, and the same trainings as a strategy sees them."""
    for task in TASKS:
        truth, predicted = (Store(FOLDER / f"{kind}-{task}.jsonl") for kind in ("truth", "predicted"))
        for known in predicted.cells.values():
            cells = cells_of(truth, known["seed"])
            ways = {cell["way"]: cell for cell in cells}
            pairs = {_pair(way): cell for way, cell in ways.items() if way.startswith("h=")}
            yield {"cells": cells}, Recorded(task, pairs, known["cosine"])


def _pair(way: str) -> Who:
    h, s = way.split(",")
    return int(h[2:]), int(s[2:])


def main(
    parts: Annotated[str, Option(help="Budgets, as parts of what training all takes.")] = "0.1,0.15,0.3,0.6",
) -> None:
    """Replay every strategy at every budget, and print Eq. 19's Rel."""
    stored = [(truths_of(truth["cells"], TAIL, THIN), exhaustive(truth["cells"]), seen) for truth, seen in recordings()]
    print(f"| of exhaustive | strategy | mean Rel | infeasible of answers | spent |{'|'.join(TASKS)}|")
    for part in map(float, parts.split(",")):
        for name, strategy in STRATEGIES.items():
            scores, spent, by_task = [], [], dict[str, list[float]]()
            for truths, whole, recorded in stored:
                for _, objective, cost in problems(truths):
                    seen = replace(recorded, seen={}, started=set(), spent=0.0)
                    h, s = strategy(seen, objective, cost, part * whole)
                    found = score(f"h={h},s={s}", truths, objective, cost)
                    scores.append(found)
                    spent.append(seen.spent / whole)
                    by_task.setdefault(recorded.task, []).append(found.rel)
            missed = sum(not found.feasible for found in scores)
            mean = statistics.fmean(found.rel for found in scores)
            means = [f"{statistics.fmean(rels):.2f}" for rels in by_task.values()]
            told = [f"{part:g}", name, f"{mean:.2f}", f"{missed} of {len(scores)}", f"{statistics.fmean(spent):.1%}"]
            print(f"| {' | '.join(told + means)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
