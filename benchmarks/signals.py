"""Which cheap signals rank horizons and strides as a longer training does?

    python benchmarks/signals.py --steps 256 --cache signals-cache    # about an hour on one core

Three small tasks. The truth is the rate after ``--steps`` steps of every (h, s in {1, 2, h}), the mean over two orders
of the data. A signal's score is Spearman's correlation with it over all (h, s), and over the strides of one horizon
alone (the part of neighbouring pairs of strides that it puts in the right order). Its price is in steps of
back-propagation, for all (h, s) together. The losses are kept in ``--cache``, so a second run only computes signals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp
from horizonplan.datasets import digits
from horizonplan.models import CharacterGPT, Patches, ResidualCNN, SequenceClassifier
from horizonplan.probes.memory import step
from horizonplan.probes.runs import Runs, Stream
from horizonplan.probes.steady import optimizer_for, restored, seed_all, trainable
from horizonplan.rates import relative_rate, tail_of

Pair = tuple[int, int]
ORDERS, BATCHES, FEW = 2, 4, 5


def vit() -> tuple[nn.Module, DataLoader, Any]:
    """An 8-block transformer on scikit-learn's digits, AdamW."""
    model = nn.Sequential(Patches(2), SequenceClassifier(4, length=16, classes=10, width=32, depth=8))
    return model, loader(digits(images=True)[0], 32), lambda p: torch.optim.AdamW(p, lr=1e-3)


def cnn() -> tuple[nn.Module, DataLoader, Any]:
    """A 9-block residual CNN with BatchNorm on the same digits, SGD."""
    model = ResidualCNN(1, (8, 16, 32), blocks_per_stage=3)
    return model, loader(digits(images=True)[0], 32), lambda p: torch.optim.SGD(p, lr=0.05)


def gpt() -> tuple[nn.Module, DataLoader, Any]:
    """An 8-block character GPT on the King James text, AdamW."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from kjv import load, split

    text = "\n".join(verse.text for verse in split(load(), 0)[0])[:400_000]
    kinds = sorted(set(text))
    codes, length = torch.tensor([kinds.index(c) for c in text]), 32
    count = (len(codes) - 1) // length
    pieces = [codes[first : first + count * length].view(count, length) for first in (0, 1)]
    model = CharacterGPT(len(kinds), 32, 8, context=length)
    return model, loader(TensorDataset(*pieces), 16), lambda p: torch.optim.AdamW(p, lr=3e-3)


TASKS = {"vit": vit, "cnn": cnn, "gpt": gpt}


def loader(data: Any, size: int) -> DataLoader:
    """Shuffled batches, the same each time."""
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(0))


def pairs_of(depth: int) -> list[Pair]:
    """All (h, s) that are looked at, back-propagation not among them."""
    return [(h, s) for h in range(1, depth) for s in dict.fromkeys((1, 2, h)) if s <= h]


def losses(chain: hp.Chain, data: DataLoader, optimizer: Any, steps: int) -> dict[str, Any]:
    """Every run's losses, and those of the initial weights on the same batches."""
    stream = Stream(itertools.chain.from_iterable(iter(data) for _ in range(1 + 2 * steps // len(data))))
    runs = Runs(chain, stream, optimizer)
    found: dict[str, Any] = {"T": chain.depth, "runs": {}, "start": {}}
    for order in range(ORDERS):
        found["start"][str(order)] = runs.start(range(steps), order)
        for pair in [(chain.depth, 1), *pairs_of(chain.depth)]:
            found["runs"][f"{pair[0]},{pair[1]},{order}"] = runs.advance(pair, steps, order)
    return found


def rate(found: Mapping[str, Any], pair: Pair, steps: int, order: int) -> float:
    """The rate after so many steps."""
    last = slice(steps - tail_of(steps), steps)
    keys = [f"{pair[0]},{pair[1]},{order}", f"{found['T']},1,{order}"]
    return relative_rate(*(found["runs"][key][last] for key in keys), found["start"][str(order)][last])


def gradients(chain: hp.Chain, batch: Any, schedule: hp.Schedule) -> list[torch.Tensor]:
    """Each block's gradient as one vector."""
    with restored(chain):
        seed_all(chain, 0)
        hp.horizon_backward(chain, batch, schedule)
        groups = [[p for p in block.parameters() if p.grad is not None] for block in chain.blocks]
        return [torch.cat([p.grad.flatten().clone() for p in group]) for group in groups]


def agreement(chain: hp.Chain, batches: list[Any]) -> dict[Pair, float]:
    """Do a block's own objective and its neighbour's pull it the same way? The mean cosine over neighbouring blocks."""
    depth = chain.depth
    values: dict[Pair, list[float]] = {pair: [] for pair in pairs_of(depth)}
    for batch in batches:
        toward = {h: gradients(chain, batch, hp.Schedule.horizon(depth, h)) for h in range(1, depth + 1)}

        def pull(t: int, end: int, toward: Mapping[int, list[torch.Tensor]] = toward) -> torch.Tensor:
            return toward[depth if end == depth else end - t][t]

        for (h, s), found in values.items():
            ends = [min(s * (t // s) + h, depth) for t in range(depth)]
            for t in range(depth - 1):
                found.append(torch.cosine_similarity(pull(t, ends[t]), pull(t, ends[t + 1]), dim=0).item())
    return {pair: statistics.fmean(found) for pair, found in values.items()}


def update_cosines(chain: hp.Chain, batches: list[Any], optimizer: Any) -> dict[Pair, float]:
    """The cosine between what a few steps change and what a few steps of back-propagation do."""

    def change(pair: Pair) -> torch.Tensor:
        with restored(chain, weights=True):
            seed_all(chain, 0)
            mine = [p for block in chain.blocks for p in block.parameters()]
            before = [p.detach().clone() for p in mine]
            made = optimizer_for(trainable(chain), optimizer)
            for batch in batches:
                step(chain, batch, hp.Schedule.horizon(chain.depth, *pair), made)
            return torch.cat([(p - q).detach().flatten() for p, q in zip(mine, before, strict=True)])

    exact = change((chain.depth, 1))
    return {pair: torch.cosine_similarity(change(pair), exact, dim=0).item() for pair in pairs_of(chain.depth)}


def spearman(left: list[float], right: list[float]) -> float:
    """Rank correlation, ties in the middle of their ranks."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + sum(v == x for v in values) / 2 for x in values]

    return statistics.correlation(ranks(left), ranks(right))


def by_stride(signal: Mapping[Pair, float], truth: Mapping[Pair, float]) -> float:
    """Of the pairs of strides at one horizon, the part that the signal orders as the truth does."""
    right = [
        (signal[a] - signal[b]) * (truth[a] - truth[b]) > 0 for a, b in itertools.combinations(truth, 2) if a[0] == b[0]
    ]
    return sum(right) / len(right)


def signals(
    chain: hp.Chain, data: DataLoader, optimizer: Any, found: Mapping[str, Any]
) -> dict[str, tuple[Any, float]]:
    """Each signal over (h, s), and what it costs in steps of back-propagation (a step of (h, s) counted as one)."""
    pairs = pairs_of(chain.depth)
    count = len(pairs)
    batches = list(itertools.islice(iter(data), FEW))
    cosines = {
        (c.horizon, c.stride): c.value**2
        for c in hp.probes.cosine(chain, batches[:BATCHES], range(1, chain.depth), (1,))
    }
    for s in (2, "horizon"):
        places = range(2, chain.depth)
        samples = hp.probes.cosine(chain, batches[:BATCHES], places, (s,))
        cosines |= {(c.horizon, c.stride): c.value**2 for c in samples}
    told: dict[str, tuple[Any, float]] = {
        "cosine^2": (cosines, BATCHES * (count + 1)),
        "horizon alone": ({pair: float(pair[0]) for pair in pairs}, 0),
        "disjoint first, then horizon": ({(h, s): h + (100.0 if s == h else 0.0) for h, s in pairs}, 0),
        "agreement of neighbours": (agreement(chain, batches[:BATCHES]), BATCHES * chain.depth),
        f"cosine of {FEW} steps' updates": (update_cosines(chain, batches, optimizer), FEW * (count + 1)),
    }
    for steps in (3, 5, 8, 16, 32, 64, 128):
        told[f"rollout, {steps} steps"] = ({p: decrease(found, p, steps) for p in pairs}, steps * (count + 1))
    return told


def decrease(found: Mapping[str, Any], pair: Pair, steps: int) -> float:
    """How far the loss fell in the last quarter of so many steps; it ranks runs as the rate does."""
    last = slice(steps - tail_of(steps), steps)
    ran = found["runs"][f"{pair[0]},{pair[1]},0"][last]
    fell = statistics.fmean(found["start"]["0"][last]) - statistics.fmean(ran)
    return fell if math.isfinite(fell) else -math.inf


def table(name: str, make: Callable[[], Any], steps: int, cache: Path) -> None:
    """Print one task's scores."""
    torch.manual_seed(0)
    model, data, optimizer = make()
    chain = hp.Chain.from_model(model.train(), next(iter(data)))
    path = cache / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(losses(chain, data, optimizer, steps)))
    found = json.loads(path.read_text())
    truth = {p: statistics.fmean(rate(found, p, steps, k) for k in range(ORDERS)) for p in pairs_of(chain.depth)}
    truth = {pair: value if math.isfinite(value) else -math.inf for pair, value in truth.items()}
    print(f"\n{name}: {len(truth)} (h, s), truth after {steps} steps\n{'signal':32} rank  strides   price")
    for signal, (values, price) in signals(chain, data, optimizer, found).items():
        over = spearman([values[p] for p in truth], list(truth.values()))
        print(f"{signal:32} {over:4.2f} {by_stride(values, truth):8.2f} {price:7.0f}", flush=True)


def main() -> None:
    """All tasks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--cache", type=Path, default=Path("signals-cache"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    for name in given.tasks:
        table(name, TASKS[name], given.steps, given.cache)


if __name__ == "__main__":
    main()
