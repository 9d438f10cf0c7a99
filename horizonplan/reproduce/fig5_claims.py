"""What Figure 5 says of the paper's claims about selection, and how far a rate is from cos^2."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY, Claim, judge
from horizonplan.reproduce.methods import BP, FF, LOCO
from horizonplan.reproduce.numbers import pm
from horizonplan.reproduce.scoring import INFEASIBLE, MODELS, ORDER, REL, REL_OF_ALL, SELECTED

COMPARABLE, NEARLY = 0.05, 0.2  # of Rel
MOST, SOME = 0.5, 0.25  # shares of the columns
GOOD, FAIR = 0.1, 0.25  # |r - cos^2|, mean
LOWEST = -1.0  # a rate below, such as that of a run that broke off, counts as this


def mean(rows: Sequence[dict[str, Any]], algorithm: str, score: str = REL, **wanted: Any) -> float:
    """The mean score (REL, of the paper's methods only, or REL_OF_ALL) over the rows that have these values."""
    return statistics.fmean(values(rows, algorithm, score, **wanted))


def values(rows: Sequence[dict[str, Any]], algorithm: str, score: str = REL, **wanted: Any) -> list[float]:
    """The score of an algorithm in each row that has these values."""
    mine = [r for r in rows if r["algorithm"] == algorithm]
    return [r[score] for r in mine if all(r[key] == value for key, value in wanted.items())]


def claims(
    rows: Sequence[dict[str, Any]], rates: Sequence[dict[str, Any]], best: Sequence[dict[str, Any]]
) -> tuple[Claim, ...]:
    """All claims, from the rows of the three tables."""
    return (
        _beats_bp(rows),
        _steadier(rows),
        _like_loco(rows),
        _difficult(rows),
        _middle(best),
        _cosine(rates),
        _others(rows),
        _times(rows),
    )


def _beats_bp(rows: Sequence[dict[str, Any]]) -> Claim:
    models = {model: (mean(rows, SELECTED, model=model), mean(rows, BP.name, model=model)) for model in MODELS}
    ours, exact = mean(rows, SELECTED), mean(rows, BP.name)
    return Claim(
        says="The selection algorithm reaches better objective values than back-propagation.",
        where="Section 5.3, Figure 5",
        rule=f"Its mean Rel is lower in every model: {HOLDS}. Over all: {PARTLY}. Else: {FAILS}.",
        found=f"Mean Rel over all is {ours:.2f} against back-propagation's {exact:.2f}; "
        + ", ".join(f"{model} {a:.2f} against {b:.2f}" for model, (a, b) in models.items())
        + ".",
        verdict=judge(all(a < b for a, b in models.values()), ours < exact),
    )


def _steadier(rows: Sequence[dict[str, Any]]) -> Claim:
    missed = {
        name: statistics.fmean(value == INFEASIBLE for value in values(rows, name, objective="O1"))
        for name in (SELECTED, FF.name)
    }
    spreads = {name: statistics.stdev(values(rows, name)) for name in (SELECTED, FF.name)}
    steadier, feasible = spreads[SELECTED] < spreads[FF.name], missed[SELECTED] < missed[FF.name]
    return Claim(
        says="It is more stable than Forward-Forward, which often misses the constraint.",
        where="Section 5.3, Figure 5",
        rule=f"Both its deviation of Rel and its share of infeasible answers (O1) are lower: {HOLDS}. One: {PARTLY}. "
        f"None: {FAILS}.",
        found=(
            f"Deviation {spreads[SELECTED]:.2f}, of FF {spreads[FF.name]:.2f}; infeasible {missed[SELECTED]:.0%} "
            f"of the answers to O1, of FF's {missed[FF.name]:.0%}."
        ),
        verdict=judge(steadier and feasible, steadier or feasible),
    )


def _like_loco(rows: Sequence[dict[str, Any]]) -> Claim:
    ours = mean(rows, SELECTED)
    others = {method.name: mean(rows, method.name) for method in LOCO}
    split = statistics.fmean(others.values())
    return Claim(
        says="Its average is comparable to LoCo's (split loss, as in the paper).",
        where="Section 5.3, Figure 5",
        rule=(
            f"Its mean Rel is at most {COMPARABLE} above the mean of LoCo 3 and LoCo 5: {HOLDS}. At most {NEARLY}: "
            f"{PARTLY}. Else: {FAILS}."
        ),
        found=f"Mean Rel {ours:.2f} against {split:.2f}; " + ", ".join(f"{n} {v:.2f}" for n, v in others.items()) + ".",
        verdict=judge(ours - split <= COMPARABLE, ours - split <= NEARLY),
    )


def _difficult(rows: Sequence[dict[str, Any]]) -> Claim:
    means = {model: mean(rows, SELECTED, model=model) for model in MODELS}
    goals = {goal: mean(rows, SELECTED, objective=goal) for goal in ("O1", "O2")}
    hardest = means[MODELS[-1]] == min(means.values())
    return Claim(
        says="It does better on difficult tasks (M3), and worse in Objective 1 than in Objective 2.",
        where="Section 5.3",
        rule=f"M3 has its lowest mean Rel and O1 a higher one than O2: {HOLDS}. One of both: {PARTLY}. Else: {FAILS}.",
        found="Mean Rel: " + ", ".join(f"{name} {value:.2f}" for name, value in (means | goals).items()) + ".",
        verdict=judge(hardest and goals["O1"] > goals["O2"], hardest or goals["O1"] > goals["O2"]),
    )


def _middle(best: Sequence[dict[str, Any]]) -> Claim:
    known = [row for row in best if row["best h"] != ""]
    counts = {
        "middle": sum(1 < row["best h"] < row["T"] for row in known),
        "BP": sum(row["best h"] == row["T"] for row in known),
        "FF": sum(row["best h"] == 1 for row in known),
    }
    share, exact, first = (count / len(known) if known else 0.0 for count in counts.values())
    return Claim(
        says="In most cases an intermediate horizon is the best choice; both ends can be.",
        where="Section 5, finding 3",
        rule=(
            "Of the horizons that were trained, the best by measured rate and memory is an intermediate one in more "
            f"than {MOST:.0%} of columns and seeds: {HOLDS}. In more than {SOME:.0%}: {PARTLY}. Else: {FAILS}."
        ),
        found=(
            f"It is the best in {share:.0%}; back-propagation in {exact:.0%}, h = 1 in {first:.0%} (of {len(known)} "
            f"columns and seeds; back-propagation brought no rate in {len(best) - len(known)} more)."
        ),
        verdict=judge(share > MOST, share > SOME),
    )


def _cosine(rates: Sequence[dict[str, Any]]) -> Claim:
    off = {
        model: [abs(max(r["rate"], LOWEST) - r["cos2"]) for r in rates if r["model"] == model and r["h"] < r["T"]]
        for model in MODELS
    }
    means = {model: statistics.fmean(values) for model, values in off.items()}
    over = statistics.fmean(r["cos2"] > r["rate"] for r in rates if r["h"] < r["T"])
    return Claim(
        says="The loss-decrease rate is cos² of the gradient's angle.",
        where="Eq. 14, Algorithm 1 line 16",
        rule=(
            f"|r - cos²| (cosine before training, rate of the whole run, one below {LOWEST:g} counts as that) is at "
            f"most {GOOD} on average in every model: {HOLDS}. At most {FAIR}: {PARTLY}. Else: {FAILS}."
        ),
        found="|r - cos²|: "
        + ", ".join(f"{model} {pm(values)}" for model, values in off.items())
        + f"; cos² is the larger of the two in {over:.0%}.",
        verdict=judge(max(means.values()) <= GOOD, max(means.values()) <= FAIR),
    )


def _others(rows: Sequence[dict[str, Any]]) -> Claim:
    means = sorted((mean(rows, name, REL_OF_ALL), name) for name in ORDER)
    return Claim(
        says="Checkpointed back-propagation, disjoint windows and LoCo with summed losses, scored in the same way.",
        where="not in the paper",
        rule="No verdict: mean Rel over all columns and seeds, best and worst taken over all methods; the best first.",
        found=f"Mean {REL_OF_ALL}: " + ", ".join(f"{name} {value:.2f}" for value, name in means) + ".",
        verdict=OURS,
    )


def _times(rows: Sequence[dict[str, Any]]) -> Claim:
    parts = []
    for model in MODELS:
        times = {
            name: statistics.fmean(r["time/BP"] for r in rows if (r["algorithm"], r["model"]) == (name, model))
            for name in ORDER
        }
        parts.append(f"{model}: " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()))
    return Claim(
        says="Time of forward and backward (the optimiser's step is not in it) of each method over back-propagation's.",
        where="asked by the paper's reviewers",
        rule="No verdict: the objectives price memory only.",
        found="; ".join(parts) + ".",
        verdict=OURS,
    )
