"""The truth that choices are judged by: every (h, s in {1, h}), LoCo 3 and LoCo 5, trained for a task's whole budget.

All runs of a task and seed have the same initial weights and see the same batches in the same order. A cell of
`truth-<task>.jsonl` has:

- `losses`: training losses, the mean of every THIN steps, up to where the run diverged; `start` (back-propagation
  only): those of the initial weights on the same batches;
- `loss`: the mean over the last quarter of the steps, `None` if the run `diverged`, that is if a loss was not finite;
- `val_loss`, `val_accuracy` at the end (accuracy where there are classes);
- `peak_bytes` and `flops` of one step, predicted from a profile;
- `seconds` and `cpu_seconds` of all steps.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from selection_store import Store
from selection_tasks import TASKS, Batch, Task, batches

import horizonplan as hp
from horizonplan.predict import step_bytes, step_flops
from horizonplan.probes.profile import profile

THIN = 4
TAIL = 4  # the last 1 / TAIL of the steps is what counts
LOCO = (3, 5)


def name_of(seed: int, way: str) -> str:
    """A cell's name, such as `0 h=4,s=1`."""
    return f"{seed} {way}"


def ways(depth: int) -> dict[str, hp.Schedule]:
    """All that is trained, by name; back-propagation first."""
    pairs = [(depth, depth), *((h, s) for h in range(1, depth) for s in dict.fromkeys((1, h)))]
    found = {way_of(h, s, depth): hp.Schedule.horizon(depth, h, s) for h, s in pairs}
    return found | {f"loco {stages}": hp.Schedule.loco(depth, stages) for stages in LOCO}


def way_of(h: int, s: int, depth: int) -> str:
    """The name of a horizon and stride; back-propagation has only one."""
    return f"h={h},s={1 if h == depth else s}"


class Bench:
    """A task's model as a chain, with the prices of a step; made once, since neither depends on the seed."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sample = batches(task.data(0)[0], task.rows, 1, 0)[0]

    def chain(self, seed: int) -> hp.Chain:
        """A fresh chain at a seed's weights."""
        return hp.Chain.from_model(self.task.start(seed), self.sample)

    @cached_property
    def ways(self) -> dict[str, hp.Schedule]:
        return ways(self.chain(0).depth)

    @cached_property
    def prices(self) -> dict[str, dict[str, int]]:
        """Peak bytes and FLOPs of one step of each way."""
        costs = profile(self.chain(0), self.sample, self.task.optimizer, repeats=0)
        return {
            way: {"peak_bytes": step_bytes(schedule, costs), "flops": step_flops(schedule, costs)}
            for way, schedule in self.ways.items()
        }


def train(chain: hp.Chain, schedule: hp.Schedule, task: Task, order: Sequence[Batch], seed: int) -> list[float]:
    """The loss at every step, up to the first that is not finite."""
    method = hp.algorithms.Fixed(schedule)
    optimizer = task.optimizer([p for p in chain.parameters() if p.requires_grad])
    losses = []
    torch.manual_seed(seed)
    for batch in order:
        chain.model.zero_grad(set_to_none=True)
        losses.append(method.backward(chain, batch).item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.step()
    return losses


@torch.no_grad()
def losses_at_start(chain: hp.Chain, order: Sequence[Batch], seed: int) -> list[float]:
    """Losses of the weights as they are, in training mode; use the chain for nothing else (running statistics)."""
    torch.manual_seed(seed)
    return [chain.loss(batch).item() for batch in order]


@torch.no_grad()
def validate(chain: hp.Chain, held: Sequence[Batch]) -> dict[str, float | None]:
    """Mean loss and, where there are classes, accuracy, in evaluation mode; `None` for what is not finite."""
    chain.model.eval()
    count = sum(len(batch[-1]) for batch in held)
    loss = sum(chain.loss(batch).item() * len(batch[-1]) for batch in held) / count
    accuracy = None
    if not held[0][-1].is_floating_point():
        right = [(chain.model(*batch[:-1]).argmax(-1) == batch[-1]).double().mean().item() for batch in held]
        accuracy = sum(part * len(batch[-1]) for part, batch in zip(right, held, strict=True)) / count
    chain.model.train()
    return {"val_loss": _rounded(loss) if math.isfinite(loss) else None, "val_accuracy": accuracy}


def cell(bench: Bench, way: str, order: Sequence[Batch], held: Sequence[Batch], seed: int) -> dict[str, Any]:
    """Train one way from a seed's weights."""
    task, chain = bench.task, bench.chain(seed)
    begun, busy = time.perf_counter(), time.process_time()
    losses = train(chain, bench.ways[way], task, order, seed)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - busy
    finite = [loss for loss in losses if math.isfinite(loss)]
    diverged = len(finite) < len(order)
    found = {
        "task": task.name,
        "seed": seed,
        "way": way,
        "depth": chain.depth,
        "steps": len(order),
        "loss": None if diverged else _rounded(statistics.fmean(finite[-(len(order) // TAIL) :])),
        "diverged": diverged,
        **validate(chain, held),
        **bench.prices[way],
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "losses": thinned(finite),
    }
    if bench.ways[way] == hp.Schedule.exact(chain.depth):
        found["start"] = thinned(losses_at_start(bench.chain(seed), order, seed))
    return found


def thinned(losses: Sequence[float]) -> list[float]:
    """Means of every THIN losses, an incomplete rest left out."""
    whole = len(losses) // THIN * THIN
    return [_rounded(statistics.fmean(losses[at : at + THIN])) for at in range(0, whole, THIN)]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def run(names: Sequence[str], seeds: Sequence[int], folder: Path, tasks: dict[str, Task] | None = None) -> None:
    """Train what is not stored yet, a seed of all tasks after the other, printing a line a cell."""
    benches = {name: Bench((tasks or TASKS)[name]) for name in names}
    stores = {name: Store(folder / f"truth-{name}.jsonl") for name in names}
    for seed in seeds:
        for name, bench in benches.items():
            task, store = bench.task, stores[name]
            missing = [way for way in bench.ways if name_of(seed, way) not in store]
            if not missing:
                continue
            train_data, held_data = task.data(seed)
            order = batches(train_data, task.rows, task.steps, seed)
            held = [held_data[at : at + 64] for at in range(0, len(held_data), 64)]
            for way in missing:
                found = cell(bench, way, order, held, seed)
                store.add(name_of(seed, way), found)
                print(
                    f"{name:7}seed {seed} {way:8} loss {found['loss']}  validation {found['val_loss']} "
                    f"{found['val_accuracy']}  {found['seconds']} s, cpu {found['cpu_seconds']} s",
                    flush=True,
                )


def tune(names: Sequence[str], seed: int = 100) -> None:
    """Print back-propagation's final loss at learning rates around the task's, for one more seed."""
    for name in names:
        task = TASKS[name]
        train_data, _ = task.data(seed)
        order = batches(train_data, task.rows, task.steps, seed)
        for factor in (0.1, 0.3, 1, 3, 10):
            tried = replace(task, rate=task.rate * factor)
            chain = Bench(tried).chain(seed)
            losses = train(chain, hp.Schedule.exact(chain.depth), tried, order, seed)
            start = losses_at_start(Bench(tried).chain(seed), order[:8], seed)
            end = statistics.fmean(losses[-(len(order) // TAIL) :])
            print(f"{name:7} rate {tried.rate:<8.3g} loss {statistics.fmean(start):.4f} -> {end:.4f}", flush=True)
