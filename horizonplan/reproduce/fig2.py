"""Figure 2: 1 - cos(theta_h) against T - h while M1, M2 and M3 are trained with back-propagation.

Beside the paper's stride 1, disjoint windows.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from horizonplan.probes import cosine
from horizonplan.reproduce import style
from horizonplan.reproduce.cases import Case
from horizonplan.reproduce.findings import FAILS, HOLDS, OURS, PARTLY, Claim, Finding, judge, write_table
from horizonplan.reproduce.lab import Lab, optimizer_of
from horizonplan.reproduce.numbers import log_line, pm
from horizonplan.training import Callback, DecayOnGrowth, train

NAME, TITLE = "fig2", "Figure 2: the gradient's angle over the horizon, along training"
MODELS = ("M1", "M2", "M3")
EPOCHS = (0, 1, 2, 5, 10, 20, 40)
BATCHES = 4
STRIDES = (1, "horizon")
STRAIGHT, ALMOST = 0.95, 0.8  # R squared in the log-log plane
MOST, HALF = 0.8, 0.5  # shares of the lines or horizons


def horizons(case: Case) -> list[int]:
    """Where the angle is measured: everywhere in small networks, else at the horizons that are trained."""
    return list(range(1, case.depth)) if case.depth <= 16 else [h for h in case.horizons if h < case.depth]


def run(lab: Lab, out: Path) -> Finding:
    """Train with back-propagation, measure angles on the way, draw and judge."""
    rows: list[dict[str, Any]] = []
    for case in map(lab.case, MODELS):
        for seed in lab.seeds_of(case):
            own = {"after": EPOCHS, "batches": BATCHES, "horizons": horizons(case), "strides": STRIDES, "seed": seed}
            name = f"{NAME}/{case.name}/seed-{seed}"
            rows += lab.cells.get(name, {**lab.settings(case), **own}, partial(angles, lab, case, seed))
    fits = [
        {"model": model, "epoch": epoch, "seed": seed, **_fit(rows, model, epoch, seed)}
        for model, epoch, seed in dict.fromkeys((r["model"], r["epoch"], r["seed"]) for r in rows)
    ]
    _draw(lab, rows, out / f"{NAME}.png")
    tables = (write_table(out / f"{NAME}.csv", rows), write_table(out / f"{NAME}-powers.csv", fits))
    words = lab.words([lab.case(model) for model in MODELS])
    caption = (
        f"1 - cos(θ) of the gradients of horizon h and of back-propagation, over all blocks, mean over {BATCHES} "
        "batches and the seeds (bars: the seeds' range), while the network is trained with back-propagation. Dashed: "
        "disjoint windows, s = h, before training and after the last epoch. Checkpointed back-propagation has the "
        f"exact gradient: no line. All lines are of the same training runs: no time. {words}."
    )
    return Finding(NAME, TITLE, caption, (f"{NAME}.png",), tables, _claims(rows, fits))


def angles(lab: Lab, case: Case, seed: int) -> list[dict[str, Any]]:
    """Train one seed; 1 - cos at each horizon and stride before and after some epochs."""
    model = lab.model(case, seed)
    batches = lab.batches(case, seed, BATCHES)
    rows: list[dict[str, Any]] = []
    lost = False  # no angle any more: a loss that is not finite, a gradient that vanishes

    def measure(chain: Any, epoch: int) -> None:
        nonlocal lost
        try:
            samples = () if lost else cosine(chain, batches, horizons(case), STRIDES)
        except ValueError:
            if epoch == 0:  # nothing has been trained: the network or its data are wrong
                raise
            lost = True
            return
        for sample in samples:
            stride = "s = 1" if sample.stride == 1 else "s = h"
            found = {"epoch": epoch, "stride": stride, "h": sample.horizon, "T-h": case.depth - sample.horizon}
            rows.append({"model": case.name, "seed": seed, **found, "1-cos": 1 - sample.value})

    class Watch(Callback):
        def on_train_begin(self, run: Any) -> None:
            measure(run.chain, 0)

        def on_epoch_end(self, run: Any, epoch: Mapping[str, Any]) -> None:
            if epoch["epoch"] + 1 in EPOCHS:
                measure(run.chain, epoch["epoch"] + 1)

    with suppress(FloatingPointError):  # a run that breaks off has angles until then
        train(
            model,
            lab.loader(case, seed),
            loss=case.loss,
            epochs=min(case.epochs, EPOCHS[-1]),
            optimizer=lambda parameters: optimizer_of(case, parameters),
            scheduler=DecayOnGrowth,
            callbacks=[Watch()],
            watch_every=0,
            progress=False,
            seed=seed,
        )
    return rows


def _fit(rows: Sequence[dict[str, Any]], model: str, epoch: int, seed: int) -> dict[str, float]:
    wanted = model, epoch, seed, "s = 1"
    mine = [r for r in rows if (r["model"], r["epoch"], r["seed"], r["stride"]) == wanted and r["1-cos"] > 0]
    found = log_line([r["T-h"] for r in mine], [r["1-cos"] for r in mine])
    return {"power": found.slope, "r2": found.r2}


def _claims(rows: Sequence[dict[str, Any]], fits: Sequence[dict[str, Any]]) -> tuple[Claim, ...]:
    return _polynomial(fits), _growing(rows), _strides(rows)


def _polynomial(fits: Sequence[dict[str, Any]]) -> Claim:
    powers = [
        f"{model} {pm([f['power'] for f in fits if f['model'] == model])} "
        f"(R² {min(f['r2'] for f in fits if f['model'] == model):.2f} at worst)"
        for model in MODELS
    ]
    straight = [statistics.fmean(f["r2"] >= STRAIGHT for f in fits if f["model"] == model) for model in MODELS]
    almost = min(f["r2"] for f in fits) >= ALMOST
    shares = ", ".join(f"{model} {share:.0%}" for model, share in zip(MODELS, straight, strict=True))
    return Claim(
        says="The gradient converges polynomially in h for all models throughout training, if at a lower order than "
        "in linear networks.",
        where="Section 5.1, Figure 2",
        rule=(
            f"Of every model's log-log lines (one for each epoch and seed), at least {MOST:.0%} have R² of {STRAIGHT} "
            f"or more: {HOLDS}. No line is below {ALMOST}: {PARTLY}. Else: {FAILS}."
        ),
        found=(
            f"Lines with R² of {STRAIGHT} or more: {shares}. Powers, mean and deviation over the lines: "
            f"{', '.join(powers)}."
        ),
        verdict=judge(min(straight) >= MOST, almost),
    )


def _growing(rows: Sequence[dict[str, Any]]) -> Claim:
    shares = {}
    for model in MODELS:
        mine = [r for r in rows if (r["model"], r["stride"]) == (model, "s = 1")]
        last = max(r["epoch"] for r in mine)
        value = {(r["epoch"], r["seed"], r["h"]): r["1-cos"] for r in mine}
        shares[model] = statistics.fmean(value[last, s, h] > value[0, s, h] for e, s, h in value if e == last)
    return Claim(
        says="The angle of one horizon tends to grow during training.",
        where="Section 5.1, Figure 2",
        rule=(
            f"1 - cos is larger after the last epoch than before the first for at least {MOST:.0%} of horizons and "
            f"seeds, in every model: {HOLDS}. For at least {HALF:.0%} of all: {PARTLY}. Else: {FAILS}."
        ),
        found="It is larger after the last epoch for "
        + ", ".join(f"{share:.0%} in {model}" for model, share in shares.items())
        + ".",
        verdict=judge(min(shares.values()) >= MOST, statistics.fmean(shares.values()) >= HALF),
    )


def _strides(rows: Sequence[dict[str, Any]]) -> Claim:
    parts = []
    for model in MODELS:
        mine = [r for r in rows if r["model"] == model]
        value = {(r["stride"], r["epoch"], r["seed"], r["h"]): r["1-cos"] for r in mine}
        pairs = [(found, value["s = 1", *place]) for (kind, *place), found in value.items() if kind == "s = h"]
        parts.append(f"{statistics.fmean(apart > overlapping for apart, overlapping in pairs):.0%} in {model}")
    return Claim(
        says="The angle of disjoint windows (s = h) against that of the paper's stride 1 at the same horizon.",
        where="not in the paper",
        rule="No verdict: how often the angle of disjoint windows is the larger one.",
        found="Disjoint windows have the larger angle for " + ", ".join(parts) + " of horizons, epochs and seeds.",
        verdict=OURS,
    )


def _draw(lab: Lab, rows: Sequence[dict[str, Any]], path: Path) -> None:
    made, axes = style.figure(1, len(MODELS), 11, 4)
    for panel, model in zip(axes[0], MODELS, strict=True):
        mine = [r for r in rows if r["model"] == model]
        epochs = sorted({r["epoch"] for r in mine})
        for colour, epoch in zip(style.shades(len(epochs)), epochs, strict=True):
            label = "initial" if epoch == 0 else f"epoch {epoch}"
            _line(panel, [r for r in mine if (r["epoch"], r["stride"]) == (epoch, "s = 1")], "o-", colour, label)
            if epoch in (epochs[0], epochs[-1]):
                apart = [r for r in mine if (r["epoch"], r["stride"]) == (epoch, "s = h")]
                _line(panel, apart, "s--", colour, f"{label}, s = h")
        panel.set(xscale="log", yscale="log", xlabel="T - h")
        panel.set_title(f"{model}: {lab.case(model).title}")
        furthest = max(r["T-h"] for r in mine)
        ticks = [left for left in (1, 2, 3, 5, 8, 12, 20, 29) if left <= furthest]
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        style.log_ticks(panel)
        style.legend(panel, loc="lower right", fontsize=6.5)
    axes[0, 0].set_ylabel("1 - cos(θ)")
    style.save(made, path)


def _line(panel: Any, rows: Sequence[dict[str, Any]], form: str, colour: Any, label: str) -> None:
    """One epoch's line: means over the seeds, bars over their range."""
    lefts = sorted({r["T-h"] for r in rows})
    values = [[r["1-cos"] for r in rows if r["T-h"] == left] for left in lefts]
    means = [statistics.fmean(v) for v in values]
    below = [m - min(v) for m, v in zip(means, values, strict=True)]
    above = [max(v) - m for m, v in zip(means, values, strict=True)]
    panel.errorbar(lefts, means, [below, above], fmt=form, ms=3, lw=1.3, elinewidth=0.6, color=colour, label=label)
