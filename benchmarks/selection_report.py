"""The stored truth and choices as tables in README.md and as two plots; no number is typed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from selection_choices import ROLLOUT_PART, cells_of, exhaustive, problems
from selection_judge import INFEASIBLE, Score, best, score, spearman, truths_of
from selection_store import Store
from selection_tasks import TASKS
from selection_truth import TAIL, THIN, name_of, way_of

matplotlib.use("agg")
import matplotlib.pyplot as plt

EIGHTH = f"all, 1/{ROLLOUT_PART} of the steps"
METHODS = ("BP", "FF", "LoCo 3", "LoCo 5", "paper", "cosine", EIGHTH, "rollout", "oracle")
FIXED = METHODS[:4]
HEAD = """# Selections, judged by what every horizon trains to

Written by `python benchmarks/selection.py --report` from the cells beside it.
Tasks: {tasks}. A rate is Eq. 14's, over the last quarter of the whole budget: 1 is back-propagation's.

BP, FF (h = 1), LoCo 3 and LoCo 5 (split loss, trained themselves) are fixed. `paper`: strides=(1,), rollout_steps=0.
`cosine`: the defaults of `plan_horizon`. `{eighth}`: every (h, s) is run for that part of the budget, on other batches,
and the best by the objective is taken. `rollout`: `accuracy="rollout"`. `oracle`: the best (h, s) of the truth.
"""


@dataclass(frozen=True)
class Answer:
    """One method's answer to one problem, judged; `steps` is what it cost, in steps of back-propagation."""

    task: str
    seed: int
    problem: str
    method: str
    way: str | None
    score: Score
    steps: float
    part: float  # of what training every candidate takes


@dataclass(frozen=True)
class Rates:
    """True rates of a task and seed, and those that were predicted, by way."""

    task: str
    seed: int
    depth: int
    true: dict[str, float | None]
    cosine: dict[str, float]
    rollout: dict[str, float | None]

    def ranks(self, predicted: dict[str, Any], stride: str = "all") -> float | None:
        """Spearman's correlation with the truth over (h, s), back-propagation left out; what has no rate is last."""
        own = [way for way in predicted if stride == "all" or (way.endswith("s=1") == (stride == "1"))]
        worst = -1e9
        first = [worst if predicted[way] is None else predicted[way] for way in own]
        return spearman(first, [worst if self.true[way] is None else self.true[way] for way in own])


def answers_of(task: str, seed: int, folder: Path) -> tuple[list[Answer], Rates | None]:
    """All that is stored for a task and seed, judged; nothing where the truth or the predictions are missing."""
    cells = cells_of(Store(folder / f"truth-{task}.jsonl"), seed)
    predicted = Store(folder / f"predicted-{task}.jsonl").cells.get(name_of(seed, "rates"))
    if predicted is None:
        return [], None
    chosen = Store(folder / f"selected-{task}.jsonl").cells
    truths, depth, whole = truths_of(cells, TAIL, THIN), cells[0]["depth"], exhaustive(cells)
    fixed = dict(zip(FIXED, (way_of(depth, 1, depth), way_of(1, 1, depth), "loco 3", "loco 5"), strict=True))
    short = {
        way: replace(truths[way], rate=predicted["rollout"].get(way, 1.0)) for way in truths if way.startswith("h=")
    }
    found = []
    for problem, objective, cost in problems(truths):
        ways: dict[str, tuple[str | None, float]] = {method: (way, 0.0) for method, way in fixed.items()}
        ways["oracle"] = best(truths, objective, cost), whole
        ways[EIGHTH] = best(short, objective, cost), whole / ROLLOUT_PART
        for method in ("paper", "cosine", "rollout"):
            if cell := chosen.get(name_of(seed, f"{method}: {problem}")):
                ways[method] = cell["chosen"], cell["steps"] or 0.0
        for method, (way, steps) in ways.items():
            judged = score(way, truths, objective, cost)
            found.append(Answer(task, seed, problem, method, way, judged, steps, steps / whole))
    true = {way: truth.rate for way, truth in truths.items()}
    return found, Rates(task, seed, depth, true, predicted["cosine"], predicted["rollout"])


def write(folder: Path) -> None:
    """README.md, rates.png and rel.png."""
    answers, rates = list[Answer](), list[Rates]()
    for task in TASKS:
        seeds = sorted({cell["seed"] for cell in Store(folder / f"truth-{task}.jsonl").cells.values()})
        for seed in seeds:
            more, own = answers_of(task, seed, folder)
            answers += more
            rates += [own] if own else []
    if not rates:
        print("nothing to report yet")
        return
    titles = ", ".join(f"{task.title} ({task.steps} steps of {task.rows})" for task in TASKS.values())
    parts = [HEAD.format(tasks=titles, eighth=EIGHTH), _methods(answers), _by_task(answers)]
    parts += [_spearman(rates), *(_truth(task, rates) for task in TASKS)]
    parts.append("![predicted and true rates](rates.png)\n\n![Rel](rel.png)\n")
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
    _plot_rates(rates, folder / "rates.png")
    _plot_rel(answers, folder / "rel.png")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _methods(answers: Sequence[Answer]) -> str:
    """Every method on the problems that all stored methods have answered."""
    present = [m for m in METHODS if any(a.method == m for a in answers)]
    asked = defaultdict(set)
    for a in answers:
        asked[a.task, a.seed, a.problem].add(a.method)
    common = {key for key, methods in asked.items() if methods >= set(present)}
    rows = []
    for method in present:
        own = [a for a in answers if a.method == method and (a.task, a.seed, a.problem) in common]
        if not own:
            continue
        regrets = [a.score.regret for a in own if a.score.regret is not None]
        row = [method, f"{statistics.fmean(a.score.rel for a in own):.3f}"]
        row += [f"{statistics.median(a.score.rel for a in own):.3f}"]
        row += [f"{statistics.fmean(regrets):.3f}" if regrets else "", f"{sum(not a.score.feasible for a in own)}"]
        row += [f"{statistics.fmean(a.steps for a in own):.0f}", f"{statistics.fmean(a.part for a in own):.1%}"]
        rows.append(row)
    head = ("", "mean Rel", "median", "mean regret", "infeasible", "steps of BP", "of exhaustive")
    return f"## All problems that every method has answered: {len(common)}\n\n{_table(head, rows)}"


def _by_task(answers: Sequence[Answer]) -> str:
    """Mean Rel and infeasible answers, by task and by kind of objective."""
    head = ["mean Rel (infeasible of answers)", *(task.title for task in TASKS.values()), "rate", "lambda"]
    columns: list[Callable[[Answer], bool]] = [lambda a, t=t: a.task == t for t in TASKS]
    columns += [lambda a, k=k: a.problem.startswith(k) for k in ("rate", "lambda")]
    rows = []
    for method in METHODS:
        own = [a for a in answers if a.method == method]
        if own:
            rows.append([method, *(_rel([a.score for a in own if wanted(a)]) for wanted in columns)])
    return f"## By task, and by kind of objective (all that is stored)\n\n{_table(head, rows)}"


def _rel(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    return f"{statistics.fmean(s.rel for s in scores):.2f} ({sum(not s.feasible for s in scores)} of {len(scores)})"


def _spearman(rates: Sequence[Rates]) -> str:
    """Correlation of ranks, seed by seed."""
    rows = []
    for task in dict.fromkeys(r.task for r in rates):
        row = [TASKS[task].title]
        for kind in ("cosine", "rollout"):
            for stride in ("all", "1", "h"):
                found = [r.ranks(getattr(r, kind), stride) for r in rates if r.task == task]
                row.append(" ".join("-" if f is None else f"{f:.2f}" for f in found))
        rows.append(row)
    head = ["Spearman's correlation with the true rate, by seed", "cos^2, all", "s = 1", "s = h"]
    head += [f"run of 1/{ROLLOUT_PART}, all", "s = 1", "s = h"]
    return f"## Predicted and true rates\n\n{_table(head, rows)}"


def _truth(task: str, rates: Sequence[Rates]) -> str:
    own = [r for r in rates if r.task == task]
    if not own:
        return ""
    rows = []
    for way in own[0].true:
        values = [r.true[way] for r in own]
        cosine = [r.cosine[way] ** 2 for r in own if way in r.cosine]
        short = [r.rollout[way] for r in own if r.rollout.get(way) is not None]
        cells = [" ".join("-" if v is None else f"{v:.2f}" for v in series) for series in (values, cosine, short)]
        rows.append([way, *cells])
    return f"### {TASKS[task].title}\n\n{_table(['', 'true rate, by seed', 'cos^2', 'short run'], rows)}"


def _plot_rates(rates: Sequence[Rates], path: Path) -> None:
    figure, grid = plt.subplots(2, len(TASKS), figsize=(3 * len(TASKS), 6), squeeze=False, layout="constrained")
    for column, task in enumerate(TASKS):
        for row, kind in enumerate(("cosine", "rollout")):
            axes = grid[row, column]
            for colour, last, label in (("tab:blue", True, "s = 1"), ("tab:orange", False, "s = h")):
                points = [
                    (value**2 if kind == "cosine" else value, r.true[way])
                    for r in rates
                    if r.task == task
                    for way, value in getattr(r, kind).items()
                    if way.endswith("s=1") == last and value is not None and r.true[way] is not None
                ]
                axes.scatter(*zip(*points, strict=True) if points else ([], []), s=12, c=colour, label=label)
            axes.axline((1, 1), slope=1, color="grey", linewidth=0.7)
            axes.set_xlabel("cos²" if kind == "cosine" else f"rate in 1/{ROLLOUT_PART} of the steps")
            axes.set_title(TASKS[task].title if row == 0 else "")
        grid[0, column].sharey(grid[1, column])
    for axes in grid[:, 0]:
        axes.set_ylabel("true rate")
    grid[0, 0].legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _plot_rel(answers: Sequence[Answer], path: Path) -> None:
    names = list(dict.fromkeys(a.problem for a in answers))
    columns = [(task, name) for task in TASKS for name in names]
    methods = [m for m in METHODS if any(a.method == m for a in answers)]
    by: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for a in answers:
        by[a.method, a.task, a.problem].append(a.score.rel)
    mean = [[statistics.fmean(by[m, *c]) if by[m, *c] else float("nan") for c in columns] for m in methods]
    figure, axes = plt.subplots(figsize=(18, 4.5), layout="constrained")
    image = axes.imshow(mean, vmin=0, vmax=INFEASIBLE, aspect="auto", cmap="viridis_r")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_xticks(range(len(columns)), [name for _, name in columns], rotation=90, fontsize=6)
    for place, task in enumerate(TASKS):
        axes.text((place + 0.5) * len(names) - 0.5, -0.8, TASKS[task].title, ha="center")
        axes.axvline((place + 1) * len(names) - 0.5, color="white")
    figure.colorbar(image, label=f"Rel, mean over seeds (infeasible: {INFEASIBLE:g})")
    figure.savefig(path, dpi=80)
    plt.close(figure)
