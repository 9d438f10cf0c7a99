"""Figure 5: what each method is worth, by the paper's relative performance, over models, costs and objectives.

    Rel(a) = (O(a) - min O) / (max O - min O)                                    (Eq. 19)

The rate of an algorithm is that of its own training run (Eq. 14, last epoch), its memory that of its own step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horizonplan.cost import Cost as Price
from horizonplan.cost import LadderCost, LinearCost
from horizonplan.objective import AccuracyConstraint, Objective, Weighted
from horizonplan.probes import cosine
from horizonplan.reproduce import style
from horizonplan.reproduce.cases import Case
from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import Cost, Lab
from horizonplan.reproduce.methods import BP, FF, LOCO, LOCO_SUMMED, Method, checkpointed, disjoint, sliding
from horizonplan.reproduce.numbers import pm, rate
from horizonplan.reproduce.selection import algorithm_1, probed

NAME, TITLE = "fig5", "Figure 5: the selection algorithm against fixed methods"
MODELS = ("M1", "M2", "M3")
EPSILONS, LAMBDAS = (0.1, 0.3), (0.1, 0.5)
STEP_SHARE = 0.3  # of the largest memory: the ladder's node
INFEASIBLE = 1.5
BATCHES = 4
SELECTED = "selection"
AGAIN = "BP, checkpointed"
APART = (disjoint(3), disjoint(5))
FIXED = (BP, FF, *LOCO, *LOCO_SUMMED, *APART)
ORDER = (*(method.name for method in FIXED), AGAIN, SELECTED)
COMPARABLE, NEARLY = 0.05, 0.2  # of Rel
MOST, SOME = 0.5, 0.25  # shares of the columns
GOOD, FAIR = 0.1, 0.25  # |r - cos^2|, mean


@dataclass(frozen=True)
class Column:
    """One of the figure's columns: a model, a price of memory, an objective."""

    model: str
    cost: str
    objective: str
    parameter: float

    @property
    def name(self) -> str:
        """As on the axis."""
        return f"{self.model} {self.cost} {self.objective} {self.parameter:g}"

    @property
    def goal(self) -> Objective:
        """Objective 1 or 2."""
        return AccuracyConstraint(self.parameter) if self.objective == "O1" else Weighted(self.parameter)

    def price(self, largest: int) -> Price:
        """The price of memory (Table D3), from the largest M(h)."""
        return LinearCost(1.0, largest) if self.cost == "C1" else LadderCost(1.0, round(STEP_SHARE * largest))


COLUMNS = tuple(
    Column(model, cost, objective, parameter)
    for model in MODELS
    for cost in ("C1", "C2")
    for objective, parameters in (("O1", EPSILONS), ("O2", LAMBDAS))
    for parameter in parameters
)


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


def relative(values: Mapping[str, float | None]) -> dict[str, float]:
    """Eq. 19; ``None``, an infeasible answer, counts 1.5 and takes no part in best and worst. 0 if all others tie.

    >>> relative({"a": 1.0, "b": 3.0, "c": 2.0, "d": None})
    {'a': 0.0, 'b': 1.0, 'c': 0.5, 'd': 1.5}
    """
    known = [value for value in values.values() if value is not None]
    low, width = (min(known), max(known) - min(known)) if known else (0.0, 0.0)
    return {
        name: INFEASIBLE if value is None else (value - low) / width if width > 0 else 0.0
        for name, value in values.items()
    }


def worth(column: Column, found: float, memory: int, largest: int) -> float | None:
    """O(a) of a rate and its bytes; ``None`` where the constraint is missed or the run broke off."""
    if not math.isfinite(found):
        return None
    price, goal = column.price(largest)(memory), column.goal
    return None if goal.shortfall(found, price, memory, 1) else goal.value(found, price, memory, 1)


def run(lab: Lab, out: Path) -> Finding:
    """Train the fixed methods and what the algorithm selects, score, draw and judge."""
    benches = [bench(lab, case, seed) for case in map(lab.case, MODELS) for seed in lab.seeds_of(case)]
    rows = [row for mine in benches for column in COLUMNS if column.model == mine.case.name
            for row in scores(lab, mine, column)]  # fmt: skip
    rates = [row for mine in benches for row in _rates(lab, mine)]
    best = [_best(lab, mine, column) for mine in benches for column in COLUMNS if column.model == mine.case.name]
    _draw(rows, out / f"{NAME}.png")
    _draw_rates(rates, out / f"{NAME}-rates.png")
    tables = (
        write_table(out / f"{NAME}.csv", rows),
        write_table(out / f"{NAME}-rates.csv", rates),
        write_table(out / f"{NAME}-best-horizons.csv", best),
    )
    words = "; ".join(f"{lab.case(m).words}, {len(lab.seeds_of(lab.case(m)))} seeds" for m in MODELS)
    caption = (
        "Rel (Eq. 19, 0 is the best, 1 the worst of the feasible answers), mean over the seeds; × infeasible in every "
        f"seed, (×) in some; an infeasible answer counts {INFEASIBLE:g}. O1: 1 - ε, ε = {_all(EPSILONS)}; O2: λ = "
        f"{_all(LAMBDAS)}. C1: linear cost, M0 the largest M(h); C2: ladder, M0 = {STEP_SHARE:g} of it. '{AGAIN}': the "
        "smaller memory of every block and every root of T. Below: means over a model's columns, points are seeds. The "
        "second picture: the rate of each training run at stride 1 against the cosine² before training. The algorithm "
        f"measures at h = {_words_of_probes(lab)}; where its fit finds no feasible horizon, it takes the nearest. "
        f"{words}."
    )
    claims = _claims(rows, rates, best)
    return Finding(NAME, TITLE, caption, (f"{NAME}.png", f"{NAME}-rates.png"), tables, claims)


def _all(values: Sequence[float]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def _words_of_probes(lab: Lab) -> str:
    return ", ".join(f"{'/'.join(map(str, probed(lab.case(model).depth)))} in {model}" for model in MODELS)


def again(depth: int) -> list[Method]:
    """Back-propagation with activation checkpointing every block, and every root of T."""
    return [checkpointed(every) for every in sorted({1, round(depth**0.5)})]


def _horizons(case: Case) -> list[int]:
    """Where memory and cosine are measured: everywhere in small networks."""
    everywhere = range(1, case.depth + 1) if case.depth <= 16 else ()
    return sorted({*everywhere, *case.horizons, *probed(case.depth)})


def bench(lab: Lab, case: Case, seed: int) -> Bench:
    """Measure a model's steps and its cosines before training (cells)."""
    horizons = _horizons(case)
    methods = list(dict.fromkeys([*(sliding(h, case.depth) for h in horizons), *FIXED, *again(case.depth)]))
    costs = lab.costs(case, methods, NAME)
    settings = {**case.settings, "horizons": horizons, "batches": BATCHES, "seed": seed}

    def measure() -> dict[str, float]:
        batches = lab.batches(case, seed, BATCHES)
        chain = lab.chain(case, lab.model(case, seed).train(), batches[0])
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
    sizes = {name: _bytes(lab, mine, method) for name, method in methods.items()}
    found[AGAIN] = found[BP.name]  # the same gradient
    sizes[AGAIN] = min(mine.costs[method.name].bytes for method in again(case.depth))
    values = {name: worth(column, found[name], sizes[name], mine.largest) for name in ORDER}
    rel = relative(values)
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
            "O": "" if values[name] is None else values[name],
            "Rel": rel[name],
        }
        for name in ORDER
    ]


def _rate(lab: Lab, mine: Bench, method: Method) -> float:
    exact = lab.run(mine.case, BP, mine.seed)
    return rate(exact.initial_loss, lab.run(mine.case, method, mine.seed).final_loss, exact.final_loss)


def _bytes(lab: Lab, mine: Bench, method: Method) -> int:
    if method.name not in mine.costs:
        return lab.costs(mine.case, [method], f"{NAME}-{method.name}")[method.name].bytes
    return mine.costs[method.name].bytes


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
    """The best of the trained horizons by the measured rates."""
    case, values = mine.case, {}
    for h in case.horizons:
        method = sliding(h, case.depth)
        value = worth(column, _rate(lab, mine, method), _bytes(lab, mine, method), mine.largest)
        if value is not None:
            values[h] = value
    best = min(values, key=lambda h: (values[h], h))
    return {"column": column.name, "model": column.model, "seed": mine.seed, "best h": best, "T": case.depth}


def _mean(rows: Sequence[dict[str, Any]], algorithm: str, **wanted: Any) -> float:
    return statistics.fmean(_values(rows, algorithm, **wanted))


def _values(rows: Sequence[dict[str, Any]], algorithm: str, **wanted: Any) -> list[float]:
    mine = [r for r in rows if r["algorithm"] == algorithm]
    return [r["Rel"] for r in mine if all(r[key] == value for key, value in wanted.items())]


def _claims(
    rows: Sequence[dict[str, Any]], rates: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]]
) -> tuple[Claim, ...]:
    return (
        _beats_bp(rows),
        _steadier(rows),
        _like_loco(rows),
        _difficult(rows),
        _middle(best),
        _cosine(rates),
        _others(rows),
    )


def _beats_bp(rows: Sequence[dict[str, Any]]) -> Claim:
    models = {model: (_mean(rows, SELECTED, model=model), _mean(rows, BP.name, model=model)) for model in MODELS}
    ours, exact = _mean(rows, SELECTED), _mean(rows, BP.name)
    return Claim(
        says="The selection algorithm reaches better objective values than back-propagation.",
        where="Section 5.3, Figure 5",
        rule=f"Its mean Rel is lower in every model: {HOLDS}. Over all: {PARTLY}. Else: {FAILS}.",
        found=f"Over all {ours:.2f} against {exact:.2f}; "
        + ", ".join(f"{model} {a:.2f} against {b:.2f}" for model, (a, b) in models.items())
        + ".",
        verdict=judge(all(a < b for a, b in models.values()), ours < exact),
    )


def _steadier(rows: Sequence[dict[str, Any]]) -> Claim:
    missed = {
        name: statistics.fmean(value == INFEASIBLE for value in _values(rows, name, objective="O1"))
        for name in (SELECTED, FF.name)
    }
    spreads = {name: statistics.stdev(_values(rows, name)) for name in (SELECTED, FF.name)}
    steadier, feasible = spreads[SELECTED] < spreads[FF.name], missed[SELECTED] < missed[FF.name]
    return Claim(
        says="It is more stable than Forward-Forward, which often misses the constraint.",
        where="Section 5.3, Figure 5",
        rule=f"Both its deviation of Rel and its share of infeasible answers (O1) are lower: {HOLDS}. One: {PARTLY}. "
        f"None: {FAILS}.",
        found=(
            f"Deviation {spreads[SELECTED]:.2f} against {spreads[FF.name]:.2f}; infeasible {missed[SELECTED]:.0%} "
            f"against {missed[FF.name]:.0%} of the answers to O1."
        ),
        verdict=judge(steadier and feasible, steadier or feasible),
    )


def _like_loco(rows: Sequence[dict[str, Any]]) -> Claim:
    ours = _mean(rows, SELECTED)
    others = {method.name: _mean(rows, method.name) for method in (*LOCO, *LOCO_SUMMED)}
    split = statistics.fmean(others[method.name] for method in LOCO)
    return Claim(
        says="Its average is comparable to LoCo's (split loss, as in the paper).",
        where="Section 5.3, Figure 5",
        rule=(
            f"Its mean Rel is at most {COMPARABLE} above the mean of LoCo 3 and LoCo 5: {HOLDS}. At most {NEARLY}: "
            f"{PARTLY}. Else: {FAILS}."
        ),
        found=f"{ours:.2f} against {split:.2f}; " + ", ".join(f"{n} {v:.2f}" for n, v in others.items()) + ".",
        verdict=judge(ours - split <= COMPARABLE, ours - split <= NEARLY),
    )


def _difficult(rows: Sequence[dict[str, Any]]) -> Claim:
    means = {model: _mean(rows, SELECTED, model=model) for model in MODELS}
    goals = {goal: _mean(rows, SELECTED, objective=goal) for goal in ("O1", "O2")}
    hardest = means[MODELS[-1]] == min(means.values())
    return Claim(
        says="It does better on difficult tasks (M3), and worse in Objective 1 than in Objective 2.",
        where="Section 5.3",
        rule=f"M3 has its lowest mean Rel and O1 a higher one than O2: {HOLDS}. One of both: {PARTLY}. Else: {FAILS}.",
        found=f"{', '.join(f'{m} {v:.2f}' for m, v in means.items())}; O1 {goals['O1']:.2f}, O2 {goals['O2']:.2f}.",
        verdict=judge(hardest and goals["O1"] > goals["O2"], hardest or goals["O1"] > goals["O2"]),
    )


def _middle(best: Sequence[dict[str, Any]]) -> Claim:
    share = statistics.fmean(1 < row["best h"] < row["T"] for row in best)
    ends = {
        end: statistics.fmean(row["best h"] == (row["T"] if end == "BP" else 1) for row in best) for end in ("BP", "FF")
    }
    return Claim(
        says="In most cases an intermediate horizon is the best choice; both ends can be.",
        where="Section 5, finding 3",
        rule=(
            "Of the horizons that were trained, the best by measured rate and memory is an intermediate one in more "
            f"than {MOST:.0%} of columns and seeds: {HOLDS}. In more than {SOME:.0%}: {PARTLY}. Else: {FAILS}."
        ),
        found=f"It is in {share:.0%}; back-propagation in {ends['BP']:.0%}, h = 1 in {ends['FF']:.0%}.",
        verdict=judge(share > MOST, share > SOME),
    )


def _cosine(rates: Sequence[dict[str, Any]]) -> Claim:
    off = {
        model: [abs(max(r["rate"], -1.0) - r["cos2"]) for r in rates if r["model"] == model and r["h"] < r["T"]]
        for model in MODELS
    }
    means = {model: statistics.fmean(values) for model, values in off.items()}
    over = statistics.fmean(r["cos2"] > r["rate"] for r in rates if r["h"] < r["T"])
    return Claim(
        says="The loss-decrease rate is cos² of the gradient's angle.",
        where="Eq. 14, Algorithm 1 line 16",
        rule=(
            f"|r - cos²| (cosine before training, rate of the whole run) is at most {GOOD} on average in every model: "
            f"{HOLDS}. At most {FAIR}: {PARTLY}. Else: {FAILS}."
        ),
        found=", ".join(f"{model} {pm(values)}" for model, values in off.items())
        + f"; cos² is the larger of the two in {over:.0%}.",
        verdict=judge(max(means.values()) <= GOOD, max(means.values()) <= FAIR),
    )


def _others(rows: Sequence[dict[str, Any]]) -> Claim:
    means = sorted((_mean(rows, name), name) for name in ORDER)
    return Claim(
        says="Checkpointed back-propagation and disjoint windows, scored in the same way.",
        where="not in the paper",
        rule="No verdict: mean Rel over all columns and seeds, the best first.",
        found=", ".join(f"{name} {value:.2f}" for value, name in means) + ".",
        verdict=OURS,
    )


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(2, 1, 11, 7.4)
    top, below = axes[:, 0]
    _heat_map(made, top, rows)
    colours = {**dict(zip(ORDER, style.shades(len(ORDER)), strict=True)), SELECTED: style.CHECKPOINTED}
    groups = [*((f"{model}", {"model": model}) for model in MODELS), ("all", {})]
    for place, (_, wanted) in enumerate(groups):
        for number, name in enumerate(ORDER):
            x = place + (number - (len(ORDER) - 1) / 2) * 0.085
            mean = _mean(rows, name, **wanted)
            below.bar(x, mean, 0.078, color=colours[name], label=name if place == 0 else None)
            seeds = sorted({r["seed"] for r in rows if all(r[k] == v for k, v in wanted.items())})
            points = [_mean(rows, name, seed=seed, **wanted) for seed in seeds]
            below.plot([x] * len(points), points, ".", ms=2.5, color="0.1")
    below.set_xticks(range(len(groups)), [f"mean, {name}" for name, _ in groups])
    below.set(ylabel="mean Rel", xlim=(-0.5, len(groups) - 0.5))
    style.legend(below, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    style.save(made, path)


def _heat_map(made: Any, axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    grid = [[_mean(rows, name, column=column.name) for column in COLUMNS] for name in ORDER]
    axes.grid(False)
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=INFEASIBLE, aspect="auto")
    for i, name in enumerate(ORDER):
        for j, column in enumerate(COLUMNS):
            missed = statistics.fmean(v == INFEASIBLE for v in _values(rows, name, column=column.name))
            text = "×" if missed == 1 else f"{grid[i][j]:.2f}" + (" (×)" if missed else "")
            axes.text(j, i, text, ha="center", va="center", fontsize=5.8, color="white" if grid[i][j] > 0.8 else "0.15")
    labels = [f"{c.cost} {c.objective}\n{'ε' if c.objective == 'O1' else 'λ'}={c.parameter:g}" for c in COLUMNS]
    axes.set_xticks(range(len(COLUMNS)), labels, fontsize=6.5)
    axes.set_yticks(range(len(ORDER)), ORDER)
    per_model = len(COLUMNS) // len(MODELS)
    for number, model in enumerate(MODELS):
        axes.text((number + 0.5) * per_model - 0.5, -0.75, model, ha="center", weight="bold")
        if number:
            axes.axvline(number * per_model - 0.5, color="white", lw=3)
    axes.axhline(len(ORDER) - 1.5, color="white", lw=2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    made.colorbar(image, ax=axes, label="Rel", shrink=0.8, pad=0.01)


def _draw_rates(rates: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(1, len(MODELS), 10.5, 3.5)
    for panel, model in zip(axes[0], MODELS, strict=True):
        mine = [r for r in rates if r["model"] == model and math.isfinite(r["rate"])]
        colours = style.horizon_colours(sorted({r["h"] for r in mine}))
        for h, colour in colours.items():
            points = [r for r in mine if r["h"] == h]
            label = "BP" if h == points[0]["T"] else f"h = {h}"
            panel.plot([p["cos2"] for p in points], [p["rate"] for p in points], "o", color=colour, ms=5, label=label)
        panel.plot([0, 1], [0, 1], ":", color="0.4", label="r = cos²")
        panel.set(xlabel="cos² before training", title=model)
        style.legend(panel)
    axes[0, 0].set_ylabel("measured rate r")
    style.save(made, path)
