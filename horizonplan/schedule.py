"""The heart: which blocks' graphs are alive together, and the list of operations that follows.

A chain of ``T`` blocks maps states ``x(0) -> x(1) -> ... -> x(T)``. Its gradient is approximated by
*windows*: window ``(first, stop, end)`` takes ``x(first)`` as a constant, evaluates the loss at
``x(end)`` and updates blocks ``first..stop-1``. Truncated, local and exact gradients are all lists
of windows (Unifying Back-Propagation and Forward-Forward Algorithms through Model Predictive
Control, Eq. 9 and Remark 3.2).

Everything else interprets the operations: executing them is the gradient engine, counting them
gives the cost in layer units, folding them over a profile gives peak bytes, seconds and FLOPs.

The operations for ``T = 4, h = 2, s = 1``. Two graphs are alive at most, whatever ``T`` is:

>>> for op in Schedule.horizon(4, 2).ops():
...     print(op)
Run(t=0, graph=True)
Run(t=1, graph=True)
Loss(end=2, final=False)
Pull(t=1, weights=False, input=True, keep=True)
Pull(t=0, weights=True, input=False, keep=False)
Drop(state=0)
Run(t=2, graph=True)
Loss(end=3, final=False)
Pull(t=2, weights=False, input=True, keep=True)
Pull(t=1, weights=True, input=False, keep=False)
Drop(state=1)
Run(t=3, graph=True)
Loss(end=4, final=True)
Drop(state=4)
Pull(t=3, weights=True, input=True, keep=False)
Drop(state=3)
Pull(t=2, weights=True, input=False, keep=False)
Drop(state=2)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Window:
    """Blocks ``first..end-1`` alive together; the loss at ``x(end)`` updates blocks ``first..stop-1``."""

    first: int
    stop: int
    end: int


@dataclass(frozen=True, slots=True)
class Run:
    """Run block ``t`` forward: ``x(t) -> x(t+1)``, recording its graph or not."""

    t: int
    graph: bool


@dataclass(frozen=True, slots=True)
class Rerun:
    """Run block ``t`` forward again from a kept state to rebuild its graph (activation checkpointing)."""

    t: int


@dataclass(frozen=True, slots=True)
class Loss:
    """Evaluate head and loss at ``x(end)``; leaves the cotangent of ``x(end)``. ``final`` also trains the head."""

    end: int
    final: bool


@dataclass(frozen=True, slots=True)
class Pull:
    """Pull the cotangent of ``x(t+1)`` back through block ``t``.

    ``weights`` accumulates the block's parameter gradients, ``input`` leaves the cotangent of
    ``x(t)``, ``keep`` keeps the graph because a later window still needs it.
    """

    t: int
    weights: bool
    input: bool
    keep: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget state ``x(state)``: no later operation reads it."""

    state: int


Op = Run | Rerun | Loss | Pull | Drop


@dataclass(frozen=True)
class Schedule:
    """A validated list of windows over ``depth`` blocks, with activation checkpointing every ``recompute`` blocks.

    Args:
        depth: number of blocks ``T >= 1``.
        windows: in order of execution; ends never decrease, exactly one ends at ``T``, and every
            block is updated by at least one window.
        recompute: 0 keeps graphs; ``k >= 1`` keeps the input of every group of ``k`` blocks (groups
            start at multiples of ``k`` and at a window's first block) and rebuilds graphs when needed.

    Raises:
        ValueError: a window or the list breaks one of these rules.
    """

    depth: int
    windows: tuple[Window, ...]
    recompute: int = 0

    def __post_init__(self) -> None:
        _validate(self.depth, self.windows, self.recompute)

    @classmethod
    def horizon(cls, depth: int, horizon: int, stride: int = 1, recompute: int = 0) -> Schedule:
        """Windows of ``horizon`` blocks starting at 0, s, 2s, ...: block t's loss is at x(min(s*floor(t/s)+h, T)).

        ``stride = 1`` is the paper's family (Eq. 9), ``stride = horizon`` disjoint local modules.

        Raises:
            ValueError: unless ``1 <= stride <= horizon <= depth``.
        """
        _whole("depth", depth, 1)
        _whole("horizon", horizon, 1, depth, "the chain has that many blocks")
        _whole("stride", stride, 1, horizon, "a window may not start after the last one ended")
        windows, first = [], 0
        while first + horizon < depth:
            windows.append(Window(first, first + stride, first + horizon))
            first += stride
        return cls(depth, (*windows, Window(first, depth, depth)), recompute)

    @classmethod
    def exact(cls, depth: int, recompute: int = 0) -> Schedule:
        """Back-propagation: one window over everything, with activation checkpointing if ``recompute >= 1``."""
        return cls.horizon(depth, depth, 1, recompute)

    @classmethod
    def local(cls, depth: int, parts: int) -> Schedule:
        """``parts`` disjoint modules of nearly equal size (larger ones first), each with its own loss."""
        bounds = _bounds(depth, parts, "parts")
        return cls(depth, tuple(Window(a, b, b) for a, b in pairwise(bounds)))

    @classmethod
    def loco(cls, depth: int, stages: int, summed: bool = False) -> Schedule:
        """LoCo over ``stages`` groups of blocks (larger ones first): each stage looks one stage ahead.

        The split loss (Remark 3.1) is horizon 2 over stages. ``summed`` is LoCo's own form (Eq. 20):
        a stage's gradient is the sum of its own loss's and the next stage's. In windows: the loss at
        a stage's end updates that stage and the one before it.
        """
        bounds = _bounds(depth, stages, "stages")
        if summed:
            return cls(depth, tuple(Window(bounds[max(0, i - 1)], b, b) for i, b in enumerate(bounds[1:])))
        if stages < 3:
            return cls.exact(depth)
        ahead = [Window(bounds[i], bounds[i + 1], bounds[i + 2]) for i in range(stages - 2)]
        return cls(depth, (*ahead, Window(bounds[stages - 2], depth, depth)))

    def __str__(self) -> str:
        again = f", recompute {self.recompute}" if self.recompute else ""
        if self.pair is None:
            return f"windows {', '.join(f'{w.first}-{w.end - 1}' for w in self.windows)}{again}"
        h, s = self.pair
        return f"h={h}, stride {s}{again}" if h < self.depth else f"back-propagation{again}"

    @property
    def longest(self) -> int:
        """Blocks of the longest window."""
        return max(window.end - window.first for window in self.windows)

    @property
    def pair(self) -> tuple[int, int] | None:
        """Horizon and stride if the windows are those of :meth:`horizon`, else ``None``.

        >>> Schedule.horizon(6, 3, 2).pair, Schedule.exact(6).pair, Schedule.local(5, 2).pair
        ((3, 2), (6, 1), (3, 3))
        >>> Schedule.loco(6, 3, summed=True).pair is None
        True
        """
        first = self.windows[0]
        h, s = first.end - first.first, 1 if first.end == self.depth else first.stop - first.first
        return (h, s) if Schedule.horizon(self.depth, h, s).windows == self.windows else None

    def ops(self, stem_trains: bool = False, trainable: Sequence[bool] | None = None) -> Iterator[Op]:
        """Yield the operations in order of execution.

        Args:
            stem_trains: whether block 0's input cotangent is wanted, for the stem's parameters.
            trainable: per block, whether it has parameters to train (``None``: all). Frozen blocks
                get no weight pulls, and nothing is kept or pulled below the lowest trainable block.
        """
        trains = (True,) * self.depth if trainable is None else tuple(trainable)
        lows = [self._lowest(window, trains, stem_trains) for window in self.windows]
        pending = list(zip(self.windows, lows, strict=True))
        for t in range(self.depth):
            yield Run(t, graph=not self.recompute and any(_covers(w, low, t) for w, low in pending))
            if not self._needed(t, pending):
                yield Drop(t)
            while pending and pending[0][0].end == t + 1:
                window, low = pending.pop(0)
                final = window.end == self.depth
                if low is None and not final:
                    continue
                yield Loss(window.end, final)
                if final:
                    yield Drop(self.depth)
                if low is not None:
                    yield from self._pulls(window, low, trains, stem_trains, pending)

    def units(self, stem_trains: bool = False) -> int:
        """Cost in units of one linear layer's forward = input pull = weight pull; heads are not counted.

        >>> Schedule.exact(12).units(), Schedule.exact(12, recompute=1).units()
        (35, 47)
        """
        return count_units(self.ops(stem_trains))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``from_dict`` restores it."""
        windows = [[w.first, w.stop, w.end] for w in self.windows]
        return {"depth": self.depth, "windows": windows, "recompute": self.recompute}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schedule:
        """Restore a schedule from ``to_dict``'s data."""
        return cls(data["depth"], tuple(Window(*w) for w in data["windows"]), data["recompute"])

    @staticmethod
    def _lowest(window: Window, trains: Sequence[bool], stem_trains: bool) -> int | None:
        updated = range(window.first, window.stop)
        return next((t for t in updated if trains[t] or (t == 0 and stem_trains)), None)

    def _held(self, state: int, low: int) -> bool:
        """Whether the state is an input that stays for block ``state``'s graph or for rebuilding it."""
        return not self.recompute or state == low or state % self.recompute == 0

    def _needed(self, state: int, pending: Iterable[tuple[Window, int | None]]) -> bool:
        return any(_covers(w, low, state) and self._held(state, low or 0) for w, low in pending)

    def _pulls(
        self,
        window: Window,
        low: int,
        trains: Sequence[bool],
        stem_trains: bool,
        pending: Sequence[tuple[Window, int | None]],
    ) -> Iterator[Op]:
        top = window.end
        while top > low:
            bottom = low if not self.recompute else max(low, (top - 1) // self.recompute * self.recompute)
            if self.recompute:
                yield from (Rerun(t) for t in range(bottom, top))
            for t in reversed(range(bottom, top)):
                keep = not self.recompute and any(_covers(w, other, t) for w, other in pending)
                yield Pull(t, t < window.stop and trains[t], t > low or (t == 0 and stem_trains), keep)
                if self._held(t, low) and not self._needed(t, pending):
                    yield Drop(t)
            top = bottom


def count_units(ops: Iterable[Op]) -> int:
    """Forwards and pulls of a list of operations, each one unit (a linear layer's costs are all equal)."""
    total = 0
    for op in ops:
        if isinstance(op, Run | Rerun):
            total += 1
        elif isinstance(op, Pull):
            total += op.weights + op.input
    return total


def _covers(window: Window, low: int | None, t: int) -> bool:
    return low is not None and low <= t < window.end


def _bounds(depth: int, parts: int, name: str) -> list[int]:
    _whole("depth", depth, 1)
    _whole(name, parts, 1, depth, "every part needs a block")
    size, larger = divmod(depth, parts)
    return [i * size + min(i, larger) for i in range(parts + 1)]


def _whole(name: str, value: object, low: int, high: int | None = None, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f">= {low}" if high is None else f"between {low} and {high} ({why})"
        raise ValueError(f"{name}={value!r}: give a whole number {bound}.")


def _validate(depth: int, windows: Sequence[Window], recompute: int) -> None:
    _whole("depth", depth, 1)
    _whole("recompute", recompute, 0)
    updated: set[int] = set()
    for i, w in enumerate(windows):
        if not 0 <= w.first < w.stop <= w.end <= depth:
            raise ValueError(f"windows[{i}]={w}: give 0 <= first < stop <= end <= depth={depth}.")
        if i and w.end < windows[i - 1].end:
            raise ValueError(f"windows[{i}]={w}: ends may not decrease; sort the windows by their end.")
        updated |= set(range(w.first, w.stop))
    if sum(w.end == depth for w in windows) != 1:
        raise ValueError(
            f"windows={tuple(windows)}: exactly one window must end at depth={depth}, with the final loss."
        )
    if missing := sorted(set(range(depth)) - updated):
        raise ValueError(f"windows={tuple(windows)}: blocks {missing} are updated by no window; cover them.")
