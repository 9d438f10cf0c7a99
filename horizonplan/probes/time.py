"""Seconds of a training step, measured: medians of warm steps, all candidates in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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
    with restored(chain, weights=True):
        made = optimizer_for(trainable(chain), optimizer)
        schedules = [Schedule.horizon(chain.depth, *pair, recompute) for pair in pairs]
        steps = [partial(step, chain, batch, schedule, made, micro_batches) for schedule in schedules]
        rounds = in_turn(steps, chain.device, repeats)
    return [
        Sample("time", "seconds", *pair, statistics.median(values), stderr_of(values), detail={"rounds": tuple(values)})
        for pair, values in zip(pairs, rounds, strict=True)
    ]


def in_turn(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[list[float]]:
    """Seconds of each call in ``repeats`` rounds over all of them, after one that does not count."""
    rounds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, values in zip(calls, rounds, strict=True):
            seconds = _seconds(call, device)
            if turn > 0:
                values.append(seconds)
    return rounds


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - start


def stderr_of(values: Sequence[float]) -> float | None:
    """Standard error of the mean; ``None`` for fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
