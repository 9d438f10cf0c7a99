"""``make demo``: plan for a residual network on real digits, train with the plan, and train its exact rivals too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

import horizonplan as hp
from horizonplan.algorithms import BackPropagation
from horizonplan.datasets import mnist5k
from horizonplan.explain import name_of
from horizonplan.models import ResidualCNN
from horizonplan.units import format_bytes, format_seconds

EPOCHS = 8
BATCH = 64
SHARE = 0.85


def make_model() -> nn.Module:
    """A residual network of 9 blocks on digits pooled to 14 x 14 pixels; always the same initial weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(2), ResidualCNN(1, (16, 32, 64), 3))


def make_batches(dataset: Dataset[Any]) -> DataLoader[Any]:
    """Shuffled batches, in the same order for every run."""
    return DataLoader(dataset, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))


def optimizer(parameters: list[nn.Parameter]) -> AdamW:
    """What all runs train with."""
    return AdamW(parameters, lr=5e-4)


def main() -> None:
    """Plan, print, train three ways, print."""
    train_set, validation = mnist5k()
    model, batches = make_model(), make_batches(train_set)
    first = next(iter(batches))
    chain = hp.Chain.from_model(model, first)
    print(
        f"{len(train_set)} real MNIST digits to train on, {len(validation)} to validate; {chain.depth} residual blocks."
    )

    needed = hp.probes.memory(chain, [first], [chain.depth], optimizer=optimizer)[0].value
    limit = int(SHARE * needed)
    print(f"Suppose the card has {format_bytes(limit)}, {SHARE:.0%} of what back-propagation needs.\n")
    plan = hp.plan_horizon(model, batches, objective=hp.MemoryLimit(limit), optimizer=optimizer, progress=True)
    print(plan.explain())
    plan.save("plan.json")
    plan.plot("plan.png")
    print("\nWritten: plan.json, plan.png\n")

    runs: dict[str, dict[str, Any]] = {
        f"plan: {name_of(plan.row, plan.depth)}": {"plan": plan},
        "BP (back-propagation)": {"algorithm": BackPropagation()},
        "BP, checkpoint every block": {"algorithm": BackPropagation(recompute=1)},
    }
    results = {}
    for name, how in runs.items():
        print(f"training with {name}", flush=True)
        results[name] = hp.train(
            make_model(),
            make_batches(train_set),
            epochs=EPOCHS,
            val_data=validation,
            optimizer=optimizer,
            progress=True,
            **how,
        )
    print(f"\n{'after ' + str(EPOCHS) + ' epochs':<36}{'accuracy':>10}{'peak memory':>14}{'time/step':>12}{'time':>9}")
    for name, result in results.items():
        accuracy, peak = result.val_metrics["accuracy"], format_bytes(result.peak_bytes)
        print(f"{name:<36}{accuracy:>10.3f}{peak:>14}{format_seconds(result.step_seconds):>12}{result.seconds:>7.1f} s")


if __name__ == "__main__":
    main()
