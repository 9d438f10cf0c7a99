"""The paper's warm-up: small horizons first, which are cheap, then larger ones."""

from __future__ import annotations

from collections.abc import Mapping

from horizonplan.algorithms import Algorithm, Fixed, Windows
from horizonplan.schedule import Schedule


def warm_up(final: Windows, depth: int, epochs: int) -> dict[int, Algorithm]:
    """Horizons 1, 2, 4, ... for equal shares of some epochs, then the final method.

    "Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive Control" finds that small
    horizons do well early in training and badly late. Windows are disjoint where the final ones are (or there is only
    one, back-propagation), and overlap as those do elsewhere. What is left out when epochs are few are the smallest.

    Args:
        final: what to train with in the end.
        depth: blocks of the chain.
        epochs: epochs before that.

    Returns:
        First epoch -> method.

    Raises:
        ValueError: the final windows are of no horizon and stride.

    >>> from horizonplan.algorithms import Horizon
    >>> for epoch, method in warm_up(Horizon(6, 6), 12, 6).items():
    ...     print(epoch, method.schedule(12).pair)
    0 (1, 1)
    2 (2, 2)
    4 (4, 4)
    6 (6, 6)
    """
    schedule = final.schedule(depth)
    if schedule.pair is None:
        raise ValueError(f"warmup={epochs}: {final} has no horizon to grow to; set it to 0.")
    horizon, stride = schedule.pair
    smaller = [2**i for i in range(horizon.bit_length()) if 2**i < horizon][-epochs:]
    disjoint = stride == horizon or horizon == depth
    found: dict[int, Algorithm] = {}
    for number, h in enumerate(smaller):
        recompute = min(schedule.recompute, h - 1)
        found[number * epochs // len(smaller)] = Fixed(
            Schedule.horizon(depth, h, h if disjoint else min(stride, h), recompute)
        )
    return found | {epochs if smaller else 0: final}


def by_epoch(algorithms: Mapping[int, Algorithm], epoch: int) -> Algorithm:
    """The method in use in an epoch.

    >>> by_epoch({0: "first", 3: "second"}, 2)
    'first'
    """
    return algorithms[max(first for first in algorithms if first <= epoch)]
