"""What the trainer's loop costs, beside a bare loop around ``horizon_backward`` and a loop of plain back-propagation.

    OMP_NUM_THREADS=1 python benchmarks/trainer.py               # all, some eight minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/trainer.py transformer

After each step of the trainer a callback makes one step of each other loop, each on a copy of the model of its own, so
that a slow moment of the machine strikes all alike; which of them is first changes from round to round, because a step
finds the caches as the one before it left them. A step lasts from the callback's end to its next call: the batch's
loading, logging and the ends of epochs are in it. Process time; the first steps, which the trainer tracks, are left
out. A cell is the median over the rounds of one way's step over another's in the same round, and half of the distance
between the quartiles; `all` is the ratio of the sums.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import families
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import horizonplan as hp

ROUNDS, SKIPPED, EPOCH = 72, 8, 16  # EPOCH: steps of an epoch
CASES: dict[str, Callable[[], families.Built]] = {
    "transformer": partial(families.transformer, depth=8, width=64, rows=20),
    "residual MLP": partial(families.residual_mlp, depth=12, width=384, rows=640),
    "residual CNN": partial(families.residual_cnn, widths=(8, 16, 32), blocks_per_stage=2, rows=14),
    "MLP, short steps": partial(families.residual_mlp, depth=12, width=32, rows=32),
}


class Beside(hp.Callback):
    """After each step of the trainer, a step of each other loop; the process time of all."""

    def __init__(self, others: Mapping[str, Iterator[None]]) -> None:
        self.others, self.ended = others, 0.0
        self.spent: dict[str, list[float]] = {name: [] for name in ("trainer", *others)}

    def on_train_begin(self, run: Any) -> None:
        self.ended = time.process_time()

    def on_step_end(self, run: Any, step: Any) -> None:
        self.spent["trainer"].append(time.process_time() - self.ended)
        for name in (list, reversed)[len(self.spent["trainer"]) % 2](list(self.others)):
            start = time.process_time()
            next(self.others[name])
            self.spent[name].append(time.process_time() - start)
        self.ended = time.process_time()


def bare(model: nn.Module, data: Iterable[Any], schedule: hp.Schedule) -> Iterator[None]:
    """A bare loop around the engine."""
    chain = hp.Chain.from_model(model, next(iter(data)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        for batch in data:
            optimizer.zero_grad(set_to_none=True)
            hp.horizon_backward(chain, batch, schedule)
            optimizer.step()
            yield


def plain(model: nn.Module, data: Iterable[Any]) -> Iterator[None]:
    """Back-propagation without this library."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        for inputs, targets in data:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            yield


def loaders(batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Callable[[], Iterable[Any]]]:
    """The same data as a list of batches and as a DataLoader that shuffles."""
    samples = TensorDataset(*(part.repeat(EPOCH, *[1] * (part.ndim - 1)) for part in batch))
    return {"list": lambda: [batch] * EPOCH, "loader": lambda: DataLoader(samples, len(batch[0]), shuffle=True)}


def depth(model: nn.Module) -> int:
    """T of the bundled models, whose blocks are in a ModuleList."""
    return next(len(m) for m in model.modules() if isinstance(m, nn.ModuleList))


def measure(
    model: nn.Module, data: Callable[[], Iterable[Any]], horizon: int, **options: Any
) -> dict[str, list[float]]:
    """Seconds of each round's steps, by the way."""
    schedule = hp.Schedule.horizon(depth(model), horizon, horizon)
    others = {"bare": bare(copy.deepcopy(model), data(), schedule), "plain": plain(copy.deepcopy(model), data())}
    beside = Beside(others)
    hp.train(
        model,
        data(),
        algorithm=hp.algorithms.Fixed(schedule),
        epochs=ROUNDS // EPOCH + 1,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        callbacks=[beside],
        watch_every=0,
        progress=False,
        **options,
    )
    return {name: spent[SKIPPED:ROUNDS] for name, spent in beside.spent.items()}


def cell(over: list[float], under: list[float]) -> str:
    """Median, half of the quartiles' distance, and the ratio of the sums."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:8.3f} ±{(high - low) / 2:5.3f} {sum(over) / sum(under):6.3f}"


def main(names: list[str]) -> None:
    """Print one row a model, kind of data, horizon and whether there is a log."""
    pairs = ("trainer", "bare"), ("trainer", "plain"), ("bare", "plain")
    print(f"{'':40}{'ms':>6}" + "".join(f"{f'{a}/{b}    all':>22}" for a, b in pairs))
    for name in names or CASES:
        torch.manual_seed(0)
        model, batch = CASES[name]()
        for kind, data in loaders(batch).items():
            for horizon in (1, depth(model)):
                for logged in (False, True):
                    with tempfile.TemporaryDirectory() as folder:
                        options = {"run_dir": folder, "save_every": 10**9} if logged else {}
                        spent = measure(copy.deepcopy(model), data, horizon, **options)
                    what = f"{name}, {kind}, h={horizon}{', log' if logged else ''}"
                    cells = "".join(cell(spent[a], spent[b]) for a, b in pairs)
                    print(f"{what:40}{1e3 * statistics.median(spent['plain']):6.1f}{cells}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
