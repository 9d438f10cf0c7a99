"""Small statistics of the experiments: lines through points, ranks, means with their spread."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """A straight line fitted by least squares, and R squared."""

    slope: float
    intercept: float
    r2: float


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line; R squared is 1 where all y are equal.

    >>> line([1, 2, 3], [2, 4, 6])
    Line(slope=2.0, intercept=0.0, r2=1.0)
    """
    slope, intercept = (round(float(c), 12) for c in np.polyfit(x, y, 1))
    total = float(np.var(y))
    left = float(np.mean((np.asarray(y) - slope * np.asarray(x) - intercept) ** 2))
    return Line(slope, intercept, 1 - left / total if total > 0 else 1.0)


def log_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit a line to the logarithms: the slope is the power."""
    return line([math.log(v) for v in x], [math.log(v) for v in y])


def ranks(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's correlation, 0 where one side is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return float(np.corrcoef(_rank(x), _rank(y))[0, 1])


def _rank(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds, 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def pm(values: Sequence[float], digits: int = 2) -> str:
    """Mean and spread in words; one value has no spread.

    >>> pm([1.0, 3.0]), pm([0.5])
    ('2.00 ±1.41', '0.50')
    """
    middle = f"{statistics.fmean(values):.{digits}f}"
    return f"{middle} ±{spread(values):.{digits}f}" if len(values) > 1 else middle


def rate(initial: float, reached: float, exact: float) -> float:
    """Eq. 14: ``ln(J_h / J_0) / ln(J_T / J_0)``, for losses that are never negative.

    Where back-propagation does not lower the loss, or lowers it to 0, the equation compares nothing (its sign turns, or
    it divides by 0).

    Args:
        initial: J_0, the loss before the first step.
        reached: J_h; 0 counts as the smallest positive number, infinity is a run that broke off.
        exact: J_T, what back-propagation reached.

    Returns:
        The rate; minus infinity where a run broke off, and unless ``0 < exact < initial``.

    >>> rate(1.0, 0.1, 0.01), rate(1.0, 4.0, 2.0)
    (0.5, -inf)
    """
    if not (math.isfinite(initial) and math.isfinite(reached) and 0 < exact < initial):
        return -math.inf
    decrease = math.log(max(reached, sys.float_info.min)) - math.log(initial)
    return decrease / (math.log(exact) - math.log(initial))
