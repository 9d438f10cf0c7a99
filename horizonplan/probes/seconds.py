"""Seconds of each kind of operation on each block: drills timed in turn, so that a slow moment strikes all alike.

The mean is taken, not the median or the least: seconds of a step are the *sum* of its operations', and only means add
up. On a machine that does something else between, most operations of a millisecond come through untouched while no step
of fifty does; sums of medians then miss half of the time (docs/log.md).
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from horizonplan.chain import Chain
from horizonplan.gradient import Step, execute
from horizonplan.probes.drill import Driller, Key, clear, full_drill, key_of, plain_drill
from horizonplan.schedule import Drop, Op, Pull

Kinds = Mapping[Key, tuple[int, int]]
Cost = TypeVar("Cost")


@dataclass
class Timer:
    """The times of one batch's operations.

    Attributes:
        chain: the model.
        batch: the batch on its device.
        kinds: FLOPs and peak bytes of each operation: blocks in which they are equal are timed together.
        context: what to run under (autocast, say).
        times: seconds of each operation, one entry a run.
    """

    chain: Chain
    batch: Any
    kinds: Kinds
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    times: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self) -> None:
        """Time every operation once more. Gradients are cleared."""
        with self.context():
            for ops in self.drills():
                execute(self.chain, self.batch, ops, observer=_Clock(self.chain, self.times), gather=False)
                clear(self.chain)

    def drills(self) -> tuple[list[Op], list[Op]]:
        """The operations that are timed."""
        return full_drill(self.chain, [True], [True]), plain_drill(self.chain)

    def means(self) -> dict[Key, float]:
        """Seconds of each operation: the mean over runs and over blocks of one kind."""
        alike = {key: (key[0], *key[2:], *self.kinds[key]) if key in self.kinds else key for key in self.times}
        together: dict[Key, list[float]] = defaultdict(list)
        for key, values in self.times.items():
            together[alike[key]] += values
        return {key: statistics.fmean(together[alike[key]]) for key in self.times}


def plainly(costs: Mapping[Key, Cost]) -> dict[Key, Cost]:
    """Costs of operations, whatever they depend on besides the operation itself."""
    return {key[:5] if key[0] == "pull" else key[:3]: cost for key, cost in costs.items()}


def kinds_of(costs: Mapping[Key, Any]) -> dict[Key, tuple[int, int]]:
    """FLOPs and peak bytes of each operation that is timed."""
    return {key[:4]: (cost.flops, cost.peak_bytes) for key, cost in plainly(costs).items()}


def in_turn(timers: Sequence[Timer], rounds: int) -> None:
    """Time all of them ``rounds`` times, in turn."""
    for _ in range(rounds):
        for timer in timers:
            timer.run()


def update_seconds(chain: Chain, made: torch.optim.Optimizer, repeats: int) -> float:
    """Mean seconds of the steps of an optimiser whose state is made; weights are changed, so restore them."""
    times = []
    for _ in range(repeats):
        start = now(chain)
        made.step()
        times.append(now(chain) - start)
    return statistics.fmean(times)


def now(chain: Chain) -> float:
    """The clock, when the device has done what it was asked to."""
    if chain.device.type == "cuda":
        torch.cuda.synchronize(chain.device)
    return time.perf_counter()


class _Clock(Driller):
    """Seconds of each operation."""

    def __init__(self, chain: Chain, times: dict[Key, list[float]]) -> None:
        super().__init__(chain)
        self.times = times
        self.start = 0.0

    def begin(self, op: Op, step: Step) -> None:
        super().begin(op, step)
        self.start = now(self.chain)

    def end(self, op: Op, step: Step) -> None:
        elapsed = now(self.chain) - self.start
        if not isinstance(op, Drop):
            key = key_of(op)
            self.times[key[:4] if isinstance(op, Pull) else key].append(elapsed)
        super().end(op, step)
