"""Where a chain is cut into modules: by blocks, by the states' resolution, or balanced in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import Tensor

from horizonplan.algorithms.trial import Trial
from horizonplan.schedule import Schedule

SPLITS = ("memory", "blocks", "resolution")
SECOND_ORDER = 3  # times as much is kept where the gradient is differentiated again: 2.6 to 3.6 were measured


def bounds_of(trial: Trial, modules: int, split: str | Sequence[int], second_order: bool) -> tuple[int, ...]:
    """The blocks at which modules start and end: module k holds blocks ``bounds[k]..bounds[k + 1] - 1``.

    Args:
        trial: what is known of the chain.
        modules: K.
        split: ``"memory"``: the largest module keeps as little as possible; ``"blocks"``: equally many blocks, larger
            modules first; ``"resolution"``: a module for each size of the states; or the first blocks of all modules
            but the first.
        second_order: whether modules but the first keep the graph of their gradient too.

    Raises:
        ValueError: there is no such split.
    """
    depth = len(trial.states)
    if not 1 <= modules <= depth:
        raise ValueError(f"modules={modules}: give a whole number between 1 and {depth}, the chain's blocks.")
    if not isinstance(split, str):
        bounds = (0, *split, depth)
        if len(bounds) != modules + 1 or any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"split={tuple(split)}: give {modules - 1} growing numbers of blocks in 1..{depth - 1}.")
        return bounds
    if split == "blocks":
        return (*(window.first for window in Schedule.local(depth, modules).windows), depth)
    if split == "resolution":
        bounds = (*resolutions(trial.states), depth)
        if len(bounds) != modules + 1:
            raise ValueError(f"modules={modules}: the states have {len(bounds) - 1} resolutions; give that number.")
        return bounds
    return balanced(trial.kept_bytes, modules, SECOND_ORDER if second_order else 1)


def resolutions(states: Sequence[Tensor]) -> list[int]:
    """The blocks that change the states' size (height and width, or positions; channels do not count).

    >>> import torch
    >>> resolutions([torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)])
    [0, 1]
    """
    sizes = [tuple(s.shape[2:]) if s.ndim > 3 else tuple(s.shape[1:-1]) for s in states]
    return [0, *(t for t in range(1, len(sizes)) if sizes[t] != sizes[t - 1])]


def balanced(kept: Sequence[int], modules: int, factor: float = 1) -> tuple[int, ...]:
    """The split whose largest module is smallest, and among those the most even one (larger modules first).

    Args:
        kept: bytes that each block keeps.
        modules: K.
        factor: how much more a module keeps that is not the first.

    >>> balanced([1, 1, 1, 1, 1, 1, 1, 1], 3)
    (0, 3, 6, 8)
    >>> balanced([1, 1, 1, 1, 1, 1, 1, 1], 3, factor=2)
    (0, 4, 6, 8)
    >>> balanced([8, 4, 2, 1, 1], 2)
    (0, 1, 5)
    """
    depth, total = len(kept), [0, *accumulate(kept)]

    def cost(a: int, b: int) -> float:
        return (total[b] - total[a]) * (1 if a == 0 else factor)

    peak = [cost(a, depth) for a in range(depth)]  # the smallest peak of blocks a.. in as many parts as tried
    for parts in range(2, modules + 1):
        peak = [
            min((max(cost(a, b), peak[b]) for b in range(a + 1, depth - parts + 2)), default=float("inf"))
            for a in range(depth)
        ]
    limit = peak[0]
    squares = [(c * c if (c := cost(a, depth)) <= limit else float("inf")) for a in range(depth)]
    ways: list[list[int]] = []
    for parts in range(2, modules + 1):
        choices = [
            min(
                ((c * c + squares[b], -b) for b in range(a + 1, depth - parts + 2) if (c := cost(a, b)) <= limit),
                default=(float("inf"), -depth),
            )
            for a in range(depth)
        ]
        squares = [value for value, _ in choices]
        ways.append([-b for _, b in choices])
    bounds = [0]
    for way in reversed(ways):
        bounds.append(way[bounds[-1]])
    return (*bounds, depth)
