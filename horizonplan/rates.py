"""r, from losses: how fast a loss falls relative to back-propagation's, and how sure that is.

Plain numbers, no tensors: a run is the list of its terminal losses, one a step.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

TAIL = 4


def tail_of(steps: int) -> int:
    """Steps at the end of a run that its rate is taken from: a quarter, at least one."""
    return max(1, steps // TAIL)


def relative_rate(losses: Sequence[float], exact: Sequence[float], start: Sequence[float]) -> float:
    """Eq. 14 from the losses of a run, of back-propagation and of the initial weights on the same batches.

    With J the mean loss of each, r = ln(J_h / J_0) / ln(J_T / J_0) (Unifying Back-Propagation and
    Forward-Forward Algorithms through Model Predictive Control). Losses that are not positive take the
    ratio of decreases instead. NaN where back-propagation did not lower the loss, or a loss is not finite.

    >>> round(relative_rate([0.5], [0.25], [1.0]), 3)
    0.5
    """
    j, j_exact, j_start = map(statistics.fmean, (losses, exact, start))
    if not all(map(math.isfinite, (j, j_exact, j_start))) or j_exact >= j_start:
        return math.nan
    if min(j, j_exact, j_start) > 0:
        return math.log(j / j_start) / math.log(j_exact / j_start)
    return (j_start - j) / (j_start - j_exact)


def jackknife(*series: Sequence[float]) -> float | None:
    """Standard error of the rate when each of the last batches is left out once.

    The series are those of :func:`relative_rate`, on the same batches, so what a hard batch does to all of them
    cancels. ``None`` for fewer than three batches.
    """
    count = len(series[0])
    if count < 3:
        return None
    left_out = [relative_rate(*([*s[:i], *s[i + 1 :]] for s in series)) for i in range(count)]
    if not all(map(math.isfinite, left_out)):
        return None
    return math.sqrt((count - 1) * statistics.pvariance(left_out))
