"""Figure 5: what each method is worth, by the paper's relative performance, over models, costs and objectives.

The rate of an algorithm is that of its own training run (Eq. 14, last epoch), its memory that of its own step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from horizonplan.probes import cosine
from horizonplan.reproduce import fig5_claims, fig5_pictures
from horizonplan.reproduce.cases import Case
from horizonplan.reproduce.findings import Finding, write_table
from horizonplan.reproduce.lab import Cost, Lab
from horizonplan.reproduce.methods import BP, Method, sliding
from horizonplan.reproduce.numbers import rate
from horizonplan.reproduce.scoring import (
    AGAIN,
    COLUMNS,
    EPSILONS,
    FIXED,
    INFEASIBLE,
    LAMBDAS,
    MODELS,
    ORDER,
    PAPER_S,
    REL,
    REL_OF_ALL,
    SELECTED,
    STEP_SHARE,
    Column,
    again,
    relative,
    worth,
)
from horizonplan.reproduce.selection import algorithm_1, probed

NAME, TITLE = "fig5", "Figure 5: the selection algorithm against fixed methods"
BATCHES = 4


@dataclass(frozen=True)
class Bench:
    """What is known of one model and one seed before a column is judged.

    Attributes:
        case: the model.
        seed: of its runs.
        costs: of one step, by method.
        cosines: at every horizon measured, before training.
        largest: the largest M(h) at stride 1, bytes.
    """

    case: Case
    seed: int
    costs: Mapping[str, Cost]
    cosines: Mapping[int, float]
    largest: int


def run(lab: Lab, out: Path) -> Finding:
    """Train the fixed methods and what the algorithm selects, score, draw and judge."""
    benches = [bench(lab, case, seed) for case in map(lab.case, MODELS) for seed in lab.seeds_of(case)]
    rows = [row for mine in benches for column in COLUMNS if column.model == mine.case.name
            for row in scores(lab, mine, column)]  # fmt: skip
    rates = [row for mine in benches for row in _rates(lab, mine)]
    best = [_best(lab, mine, column) for mine in benches for column in COLUMNS if column.model == mine.case.name]
    fig5_pictures.draw(rows, out / f"{NAME}.png")
    fig5_pictures.draw_rates(rates, out / f"{NAME}-rates.png")
    tables = (
        write_table(out / f"{NAME}.csv", rows),
        write_table(out / f"{NAME}-rates.csv", rates),
        write_table(out / f"{NAME}-best-horizons.csv", best),
    )
    words = lab.words([lab.case(model) for model in MODELS])
    caption = (
        f"{REL} (Eq. 19, 0 is the best, 1 the worst of the feasible answers of the paper's methods), below it "
        f"{REL_OF_ALL} (the same with best and worst of all methods), mean over the seeds; ×: infeasible in every "
        f"seed, after a number in some; an infeasible answer counts {INFEASIBLE:g}. O1: 1 - ε, ε = {_all(EPSILONS)}; "
        f"O2: λ = {_all(LAMBDAS)}. C1: linear cost, M0 the largest M(h); C2: ladder, M0 = {STEP_SHARE:g} of it. "
        f"'{AGAIN}': the smaller memory of every block and every root of T. Then {REL}: means over a model's columns, "
        f"points are seeds. Below: {lab.timed} of forward and backward over back-propagation's, which the paper does "
        "not price (of the selection: the mean over its choices). The second picture: the rate of each training run at "
        "stride 1 against cos² before training. "
        f"The algorithm measures at h = {_words_of_probes(lab)}; where its fit finds no feasible horizon, it takes the "
        "nearest. "
        f"{words}."
    )
    claims = fig5_claims.claims(rows, rates, best)
    return Finding(NAME, TITLE, caption, (f"{NAME}.png", f"{NAME}-rates.png"), tables, claims)


def _all(values: Sequence[float]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def _words_of_probes(lab: Lab) -> str:
    return ", ".join(f"{'/'.join(map(str, probed(lab.case(model).depth)))} in {model}" for model in MODELS)


def _horizons(case: Case) -> list[int]:
    """Where memory and cosine are measured: everywhere in small networks."""
    everywhere = range(1, case.depth + 1) if case.depth <= 16 else ()
    return sorted({*everywhere, *case.horizons, *probed(case.depth)})


def bench(lab: Lab, case: Case, seed: int) -> Bench:
    """Measure a model's steps and its cosines before training (cells)."""
    horizons = _horizons(case)
    methods = list(dict.fromkeys([*(sliding(h, case.depth) for h in horizons), *FIXED, *again(case.depth)]))
    costs = lab.costs(case, methods, NAME)
    settings = {**lab.settings(case), "horizons": horizons, "batches": BATCHES, "seed": seed}

    def measure() -> dict[str, float]:
        batches = lab.batches(case, seed, BATCHES)
        chain = lab.chain(case, lab.model(case, seed).train(), batches[0])
        with torch.random.fork_rng():  # dropout
            torch.manual_seed(seed)
            return {str(sample.horizon): sample.value for sample in cosine(chain, batches, horizons)}

    cosines = lab.cells.get(f"{NAME}-cosines/{case.name}/seed-{seed}", settings, measure)
    largest = max(costs[sliding(h, case.depth).name].bytes for h in horizons)
    return Bench(case, seed, costs, {int(h): value for h, value in cosines.items()}, largest)


def scores(lab: Lab, mine: Bench, column: Column) -> list[dict[str, Any]]:
    """Every algorithm in one column, for one seed."""
    case = mine.case
    memory = {h: mine.costs[sliding(h, case.depth).name].bytes for h in probed(case.depth)}
    angles = {h: mine.cosines[h] for h in probed(case.depth)}
    selected = algorithm_1(memory, angles, case.depth, column.goal, column.price(mine.largest))
    chosen = sliding(selected, case.depth)
    methods = {**{method.name: method for method in FIXED}, SELECTED: chosen}
    found = {name: _rate(lab, mine, method) for name, method in methods.items()}
    costs = {name: _cost(lab, mine, method) for name, method in methods.items()}
    found[AGAIN] = found[BP.name]  # the same gradient
    costs[AGAIN] = min((mine.costs[method.name] for method in again(case.depth)), key=lambda cost: cost.bytes)
    sizes = {name: cost.bytes for name, cost in costs.items()}
    times = {name: cost.median_seconds / mine.costs[BP.name].median_seconds for name, cost in costs.items()}
    values = {name: worth(column, found[name], sizes[name], mine.largest) for name in ORDER}
    rel = relative({name: values[name] for name in PAPER_S})
    rel_of_all = relative(values)
    return [
        {
            "column": column.name,
            "model": column.model,
            "cost": column.cost,
            "objective": column.objective,
            "parameter": column.parameter,
            "seed": mine.seed,
            "algorithm": name,
            "h": selected if name == SELECTED else "",
            "rate": found[name],
            "bytes": sizes[name],
            "time/BP": times[name],
            "O": "" if values[name] is None else values[name],
            REL: rel.get(name, ""),
            REL_OF_ALL: rel_of_all[name],
        }
        for name in ORDER
    ]


def _rate(lab: Lab, mine: Bench, method: Method) -> float:
    exact = lab.run(mine.case, BP, mine.seed)
    return rate(exact.initial_loss, lab.run(mine.case, method, mine.seed).final_loss, exact.final_loss)


def _cost(lab: Lab, mine: Bench, method: Method) -> Cost:
    if method.name not in mine.costs:  # selected, in a network too deep to be measured everywhere
        return lab.costs(mine.case, [method], f"{NAME}-{method.name}")[method.name]
    return mine.costs[method.name]


def _rates(lab: Lab, mine: Bench) -> list[dict[str, Any]]:
    """Measured rate and squared cosine at every horizon that was trained."""
    case = mine.case
    return [
        {
            "model": case.name,
            "seed": mine.seed,
            "h": h,
            "T": case.depth,
            "cos2": mine.cosines[h] ** 2,
            "rate": _rate(lab, mine, sliding(h, case.depth)),
        }
        for h in case.horizons
    ]


def _best(lab: Lab, mine: Bench, column: Column) -> dict[str, Any]:
    """The best of the trained horizons by the measured rates; none where back-propagation broke off."""
    case, values = mine.case, {}
    for h in case.horizons:
        method = sliding(h, case.depth)
        value = worth(column, _rate(lab, mine, method), _cost(lab, mine, method).bytes, mine.largest)
        if value is not None:
            values[h] = value
    best = min(values, key=lambda h: (values[h], h), default="")
    return {"column": column.name, "model": column.model, "seed": mine.seed, "best h": best, "T": case.depth}
