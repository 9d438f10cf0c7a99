"""The paper's Algorithm 1: two polynomials through a few measurements, then brute force.

It is to the letter but for two things that the paper leaves open. A fitted cosine beyond 1 counts as 1. A negative one
has the rate 0: its square would make a direction that climbs as good as one that descends.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from horizonplan.cost import Cost
from horizonplan.curves import PoorFitWarning, fit_cosine, fit_memory
from horizonplan.objective import InfeasibleError, Objective, select
from horizonplan.rows import Row


def probed(depth: int) -> list[int]:
    """The set H: four horizons at equal distances, both ends included.

    >>> probed(13)
    [1, 5, 9, 13]
    """
    return sorted({round(1 + i * (depth - 1) / 3) for i in range(4)})


def algorithm_1(
    memory: Mapping[int, float], cosines: Mapping[int, float], depth: int, objective: Objective, cost: Cost
) -> int:
    """Fit memory by a line (Eq. 16) and the cosine by a cubic (Eq. 15), r = cos^2 (Eq. 14), then the best horizon.

    The fits are the paper's, without a pin at h = T. A fitted cosine counts as the nearest number from -1 to 1, and
    where it is negative r is 0.

    Args:
        memory: bytes at the measured horizons.
        cosines: at the measured horizons.
        depth: T.
        objective: what to minimise.
        cost: of bytes.

    Returns:
        The horizon. Where the fits see none that is feasible, the one that misses the constraint least.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorFitWarning)  # poor or not, the paper takes them
        bytes_at = fit_memory(list(memory), list(memory.values()))
        cosine_at = fit_cosine(list(cosines), list(cosines.values()), depth, pinned=False)
    rows = []
    for h in range(1, depth + 1):
        angle = min(1.0, max(-1.0, cosine_at(h)))
        rows.append(Row(horizon=h, memory_bytes=max(0, round(bytes_at(h))), cosine=angle, rate=max(0.0, angle) ** 2))
    try:
        return select(rows, objective, cost).horizon
    except InfeasibleError as error:
        return error.nearest.horizon
