"""The next thriftier schedule: first recompute, which changes no gradient, then half the horizon."""

from __future__ import annotations

import math
from dataclasses import replace

from horizonplan.algorithms import Algorithm, Fixed, Windows
from horizonplan.schedule import Schedule


def thriftier(schedule: Schedule) -> Schedule | None:
    """A schedule of the same depth that keeps fewer activations; ``None`` if none is known.

    >>> schedule = Schedule.horizon(8, 4, 4)
    >>> for _ in range(3):
    ...     schedule = thriftier(schedule)
    ...     print(schedule.longest, schedule.recompute)
    4 2
    2 1
    1 0
    """
    h, recompute = schedule.longest, schedule.recompute
    if not recompute and h > 1:
        return replace(schedule, recompute=math.isqrt(h))
    if h == 1 or schedule.pair is None:
        return None
    half, stride = h // 2, schedule.pair[1]
    disjoint = stride == h or h == schedule.depth  # back-propagation gives way to disjoint windows
    again = math.isqrt(half) if recompute and half > 1 else 0
    return Schedule.horizon(schedule.depth, half, half if disjoint else min(stride, half), again)


def reduced(algorithm: Algorithm, depth: int, times: int) -> Algorithm | None:
    """The algorithm made thriftier so many times; ``None`` if it cannot be."""
    if times == 0:
        return algorithm
    if not isinstance(algorithm, Windows):
        return None
    schedule: Schedule | None = algorithm.schedule(depth)
    for _ in range(times):
        schedule = None if schedule is None else thriftier(schedule)
    return None if schedule is None else Fixed(schedule)
