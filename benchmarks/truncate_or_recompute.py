"""Truncate or recompute? The measured frontier of three small models, as tables and pictures.

    OMP_NUM_THREADS=1 python benchmarks/truncate_or_recompute.py --pictures docs/pictures    # some minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/truncate_or_recompute.py gpt

A CNN with BatchNorm and a ViT on scikit-learn's digits, and a GPT with a vocabulary of 8,000 on a made-up language
(every word has four that may follow it). The candidates are those of `plan_horizon(candidates="all")`. Rates are
measured by short runs at a few horizons with s = 1, 2 and h, relative to back-propagation in the same steps; memory by
the tracker; time by whole steps in this process' own seconds, all in turn. What has no rate (bf16) is left out. AdamW,
1e-3.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import horizonplan as hp
from horizonplan import probes
from horizonplan.candidates import with_rates
from horizonplan.chain.calls import training_mode
from horizonplan.datasets import digits
from horizonplan.explain import name_of
from horizonplan.models import CharacterGPT, Patches, ResidualCNN, SequenceClassifier
from horizonplan.precision import autocast
from horizonplan.probes.budget import taken
from horizonplan.probes.steady import optimizer_for, restored, trainable
from horizonplan.units import format_bytes

VOCABULARY = 8000
Task = tuple[nn.Module, Any]


def cnn() -> Task:
    """Nine residual blocks of 8, 16 and 32 channels."""
    train, _ = digits(images=True)
    return ResidualCNN(1, (8, 16, 32), 3), DataLoader(train, batch_size=128, shuffle=True)


def vit() -> Task:
    """Eight blocks over 16 patches of 2 x 2 pixels."""
    train, _ = digits(images=True)
    model = nn.Sequential(Patches(2), SequenceClassifier(4, 16, 10, width=32, depth=8, heads=4))
    return model, DataLoader(train, batch_size=128, shuffle=True)


def gpt() -> Task:
    """Six blocks, and a head as large as all of them."""
    follows = torch.randint(0, VOCABULARY, (VOCABULARY, 4))
    words = [torch.randint(0, 200, (400,))]
    for _ in range(32):
        words.append(follows[words[-1], torch.randint(0, 4, (400,))])
    text = torch.stack(words, 1)
    return CharacterGPT(VOCABULARY, width=64, depth=6, heads=4, context=32), DataLoader(
        torch.utils.data.TensorDataset(text[:, :-1], text[:, 1:]), batch_size=16, shuffle=True
    )


def token_loss(scores: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next word; all sequences have one length, so it is a mean over samples."""
    return nn.functional.cross_entropy(scores.flatten(0, 1), words.flatten())


TASKS: dict[str, tuple[Callable[[], Task], Any]] = {"cnn": (cnn, None), "vit": (vit, None), "gpt": (gpt, token_loss)}


def measured(name: str, steps: int, rounds: int) -> hp.Plan:
    """The plan with those of its rows whose rate is known, everything of them measured."""
    torch.manual_seed(0)
    make, loss = TASKS[name]
    model, data = make()
    unlimited = hp.MemoryLimit("1TiB")
    plan = hp.plan_horizon(
        model, data, loss=loss, objective=unlimited, candidates="all", rollout_steps=0, progress=False
    )
    batches = taken(data, steps)
    with training_mode(model):
        chain = plan.chain(model, batches[0], loss)
        depth = plan.depth
        pairs = [(h, s) for h in sorted({1, 2, depth // 2, depth - 2}) for s in dict.fromkeys((1, min(2, h), h))]
        rates = probes.rollout(chain, batches, pairs, steps)
        rows = [row if row.exact else replace(row, rate=None, rate_source="unmeasured") for row in plan.rows]
        plan = replace(plan, rows=with_rates(rows, rates))
        known = tuple(row for row in plan.rows if row.rate is not None)
        rows = _measure(chain, batches[0], known, rounds)
    return replace(plan, rows=tuple(rows), row=next(row for row in rows if row.exact and row.plain))


def _measure(chain: hp.Chain, batch: Any, rows: tuple[hp.Row, ...], rounds: int) -> list[hp.Row]:
    """Rows with measured memory and seconds; seconds of all in turn."""
    found = []
    for row in rows:
        with autocast(row.precision, chain.device):
            (sample,) = probes.memory(
                chain, [batch], [row.horizon], [row.stride], None, row.recompute, micro_batches=row.micro_batches
            )
        found.append(replace(row, memory_bytes=round(sample.value), memory_source="measured"))
    spent: list[list[float]] = [[] for _ in rows]
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), None)
        for _ in range(rounds + 1):
            for row, seconds in zip(rows, spent, strict=True):
                seconds.append(_step(chain, batch, row, made))
    means = [statistics.fmean(seconds[1:]) for seconds in spent]
    return [
        replace(row, step_seconds=mean, step_seconds_source="measured") for row, mean in zip(found, means, strict=True)
    ]


def _step(chain: hp.Chain, batch: Any, row: hp.Row, made: torch.optim.Optimizer) -> float:
    schedule = hp.Schedule.horizon(chain.depth, row.horizon, row.stride, row.recompute)
    start = time.process_time()
    made.zero_grad(set_to_none=True)
    probes.pieces.gradient(chain, batch, schedule, row.micro_batches)
    made.step()
    return time.process_time() - start


def show(plan: hp.Plan) -> None:
    """The frontier as a table: memory and time relative to back-propagation's, and the rate."""
    base = plan.row
    columns = "not dominated", "memory", "of BP's", "time of BP's", "rate", "time to BP's loss"
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    for row in plan.frontier:
        slow, small = row.step_seconds / base.step_seconds, row.memory_bytes / base.memory_bytes
        rate = "1 (exact)" if row.exact else f"{row.rate:.2f}"
        to_loss = f"{slow / row.rate:.2f}" if row.rate > 0 else "never"
        size = format_bytes(row.memory_bytes)
        print(f"| {name_of(row, plan.depth)} | {size} | {small:.2f} | {slow:.2f} | {rate} | {to_loss} |")
    print(flush=True)


def main() -> None:
    """Measure, print the tables, draw the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--steps", type=int, default=60, help="of the short runs")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--pictures", type=Path, help="a folder for them")
    asked = parser.parse_args()
    for name in asked.tasks:
        plan = measured(name, asked.steps, asked.rounds)
        print(f"\n## {name}: {plan.depth} blocks, {len(plan.rows)} candidates measured\n")
        show(plan)
        if asked.pictures is not None:
            plan.plot_frontier(asked.pictures / f"frontier_{name}.png")


if __name__ == "__main__":
    main()
