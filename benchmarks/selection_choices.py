"""What each way of choosing takes, and what it costs: cells of `selected-<task>.jsonl` and `predicted-<task>.jsonl`.

Selections see the same weights and data as the truth, but batches in another order: nobody has the truth's own run
beforehand. What a selection costs is counted in steps of back-propagation, by the plan's own books.

- `paper`: strides=(1,), rollout_steps=0. One plan a task and seed is judged by each objective (`replan`), and each
  choice is charged with all of its measurements.
- `cosine`: the defaults of `plan_horizon`.
- `rollout`: `accuracy="rollout"` with ROLLOUT_BUDGET of what training every candidate takes, compared after the default
  128 steps, or half of a task's where that is less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from selection_judge import OBJECTIVES, costs, truths_of
from selection_store import Store
from selection_tasks import TASKS, Batch, batches
from selection_truth import TAIL, THIN, Bench, name_of, way_of

import horizonplan as hp
from horizonplan.measured import replan

OTHER_ORDER = 1000  # added to a seed
ROLLOUT_PART = 8  # rates of all candidates are measured in runs of 1 / ROLLOUT_PART of the budget
ROLLOUT_BUDGET = 0.1  # of what training every candidate takes
ROLLOUT_STEPS = 128


def problems(truths: dict[str, Any]) -> Iterator[tuple[str, hp.Objective, Any]]:
    """Name, objective and cost of everything that is asked."""
    for cost_name, cost in costs(truths).items():
        for name, objective in OBJECTIVES.items():
            yield f"{name}, {cost_name}", objective, cost


def exhaustive(cells: Sequence[dict[str, Any]]) -> float:
    """Steps of back-propagation that training every horizon and stride takes, by FLOPs."""
    exact = next(cell for cell in cells if "start" in cell)
    return sum(cell["steps"] * cell["flops"] / exact["flops"] for cell in cells if cell["way"].startswith("h="))


def cells_of(store: Store, seed: int) -> list[dict[str, Any]]:
    """A seed's cells of a task's truth."""
    return [cell for cell in store.cells.values() if cell["seed"] == seed]


def run(names: Sequence[str], seeds: Sequence[int], folder: Path) -> None:
    """Make every choice that is not stored yet, for the tasks and seeds whose truth is complete."""
    for seed in seeds:
        for name in names:
            bench = Bench(TASKS[name])
            truth = cells_of(Store(folder / f"truth-{name}.jsonl"), seed)
            if len(truth) < len(bench.ways):
                print(f"{name}, seed {seed}: the truth has {len(truth)} of {len(bench.ways)} cells; not judged yet")
                continue
            task = bench.task
            order = batches(task.data(seed)[0], task.rows, task.steps, seed + OTHER_ORDER)
            _predict(bench, order, seed, Store(folder / f"predicted-{name}.jsonl"))
            _select(bench, order, seed, truth, Store(folder / f"selected-{name}.jsonl"))


def _predict(bench: Bench, order: Sequence[Batch], seed: int, store: Store) -> None:
    """The cosine and the short run's rate of every candidate."""
    if name_of(seed, "rates") in store:
        return
    chain = bench.chain(seed)
    pairs = [(h, s) for h in range(1, chain.depth) for s in dict.fromkeys((1, h))]
    angles = {}
    for h, s in pairs:
        (sample,) = hp.probes.cosine(chain, order[:4], [h], [s])
        angles[way_of(h, s, chain.depth)] = sample.value
    steps = bench.task.steps // ROLLOUT_PART
    rolled = hp.probes.rollout(chain, order, pairs, steps, bench.task.optimizer, seed)
    rates = {way_of(r.horizon, r.stride, chain.depth): None if math.isnan(r.value) else r.value for r in rolled}
    store.add(name_of(seed, "rates"), {"seed": seed, "cosine": angles, "rollout": rates, "rollout_steps": steps})


def _select(bench: Bench, order: Sequence[Batch], seed: int, truth: list[dict[str, Any]], store: Store) -> None:
    asked = list(problems(truths_of(truth, TAIL, THIN)))

    def plan(objective: hp.Objective, cost: Any, **how: Any) -> hp.Plan:
        model, optimizer = bench.task.start(seed), bench.task.optimizer
        more: dict[str, Any] = {"optimizer": optimizer, "seed": seed, "progress": False, **how}
        return hp.plan_horizon(model, list(order), objective=objective, cost=cost, **more)

    @cache
    def measured() -> hp.Plan:  # made for the first problem, whichever is asked first
        return plan(*asked[0][1:], strides=(1,), rollout_steps=0)

    ways: dict[str, Callable[[hp.Objective, Any], hp.Plan]] = {"paper": lambda o, c: replan(measured(), o, c)}
    budget, steps = ROLLOUT_BUDGET * exhaustive(truth), min(ROLLOUT_STEPS, bench.task.steps // 2)
    ways["cosine"] = plan
    ways["rollout"] = lambda o, c: plan(o, c, accuracy="rollout", rollout_steps=steps, rollout_budget=budget)
    for problem, objective, cost in asked:
        for way, choose in ways.items():
            name = name_of(seed, f"{way}: {problem}")
            if name not in store:
                found = _chosen(choose, objective, cost)
                store.add(name, {"seed": seed, "way": way, "problem": problem, **found})
                title = f"{bench.task.name:7}seed {seed} {way:8}{problem:22}"
                print(f"{title}{found['chosen']}  {found['steps']} steps", flush=True)


def _chosen(choose: Callable[[hp.Objective, Any], hp.Plan], objective: hp.Objective, cost: Any) -> dict[str, Any]:
    """What was taken, what for, and what finding it cost."""
    begun = time.process_time()
    try:
        plan = choose(objective, cost)
    except hp.InfeasibleError as error:
        return {"chosen": None, "why": str(error), "steps": None, "rate": None, "cpu_seconds": 0.0}
    return {
        "chosen": way_of(plan.horizon, plan.stride, plan.depth),
        "steps": round(sum(plan.provenance["probing_steps"].values()), 1),
        "rate": plan.row.rate,
        "rate_source": plan.row.rate_source,
        "cpu_seconds": round(time.process_time() - begun, 3),
    }
