"""Seconds of a training step, measured: medians of warm steps, all candidates in turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import torch

from horizonplan.chain import Chain
from horizonplan.probes.memory import Stride, largest, pairs_of, step
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize, optimizer_for, restored, trainable
from horizonplan.schedule import Schedule


def time(
    chain: Chain,
    batches: Iterable[Any],
    horizons: Sequence[int],
    strides: Sequence[Stride] = (1,),
    optimizer: Optimize | None = None,
    repeats: int = 5,
    recompute: int = 0,
    micro_batches: int = 1,
) -> list[Sample]:
    """Measure the seconds of a full training step at each horizon and stride, on the largest batch.

    One warm-up each, then ``repeats`` rounds over all of them, so that a slow moment of the machine
    strikes all alike; the median is the value, its standard error that of the rounds' mean.
    """
    batch, pairs = largest(batches), pairs_of(chain.depth, horizons, strides)
    rounds: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), optimizer)
        for turn in range(repeats + 1):
            for pair in pairs:
                seconds = _seconds(chain, batch, Schedule.horizon(chain.depth, *pair, recompute), made, micro_batches)
                if turn > 0:
                    rounds[pair].append(seconds)
    return [
        Sample("time", "seconds", *pair, statistics.median(values), _stderr(values), detail={"rounds": tuple(values)})
        for pair, values in rounds.items()
    ]


def _seconds(
    chain: Chain, batch: Any, schedule: Schedule, optimizer: torch.optim.Optimizer, micro_batches: int
) -> float:
    if chain.device.type == "cuda":
        torch.cuda.synchronize(chain.device)
    start = perf_counter()
    step(chain, batch, schedule, optimizer, micro_batches)
    if chain.device.type == "cuda":
        torch.cuda.synchronize(chain.device)
    return perf_counter() - start


def _stderr(values: list[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
