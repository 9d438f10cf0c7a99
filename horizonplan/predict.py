"""Fold a schedule over a profile: peak bytes, FLOPs and seconds of a step that was never run.

The fold walks the same operations that the engine executes and keeps the same books: who holds
which state, which graphs and gradients exist. Bytes of storages have holders; a storage counts
until its last holder lets go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from horizonplan.gradient import HEAD, STEM, trained_by
from horizonplan.probes.drill import key_of
from horizonplan.probes.profile import OpCost, Profile
from horizonplan.schedule import Drop, Loss, Op, Pull, Rerun, Run, Schedule


@dataclass(frozen=True)
class Moment:
    """Bytes of activations and gradients after an operation, and the peak during it."""

    op: Op
    live_bytes: int
    peak_bytes: int


def memory_trace(ops: Iterable[Op], profile: Profile) -> Iterator[Moment]:
    """Live bytes operation by operation, weights and optimiser state not counted."""
    books = _Books(profile, list(ops))
    for place, op in enumerate(books.ops):
        yield books.enter(place, op)


def at_batch_size(small: Profile, large: Profile, samples: tuple[int, int], wanted: int) -> Profile:
    """The profile of another batch size, from the profiles of two: bytes, FLOPs and seconds on straight lines.

    Bytes of states, graphs and gradients are constants plus multiples of the samples, so the line is exact for
    them; an operator that chooses another algorithm for another size is not on it.

    Args:
        small: profiled on ``samples[0]`` samples.
        large: profiled on ``samples[1]`` samples, another number.
        samples: the two batch sizes.
        wanted: the batch size asked for.

    Raises:
        ValueError: the two sizes are equal, or ``wanted`` is below 1.
    """
    first, second = samples
    if first == second or wanted < 1:
        raise ValueError(f"samples={samples}, wanted={wanted}: give profiles of two sizes, and a size >= 1.")
    part = (wanted - first) / (second - first)

    def between(a: Any, b: Any) -> Any:
        if isinstance(a, OpCost):
            return OpCost(*(between(getattr(a, f), getattr(b, f)) for f in ("peak_bytes", "flops", "later_bytes")))
        if isinstance(a, tuple):
            return tuple(between(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {key: between(a[key], b[key]) for key in a if key in b}
        if a is None or b is None or isinstance(a, bool):
            return a
        value = a + (b - a) * part
        return max(0.0, value) if isinstance(a, float) else round(value)

    sized = ["state", "cotangent", "graph", "before", "arrival", "lasting", "result_bytes"]
    sized += ["costs", "seconds", "base_bytes", "update_bytes"]
    return replace(large, **{name: between(getattr(small, name), getattr(large, name)) for name in sized})


def accumulated_bytes(schedule: Schedule, whole: Profile, piece: Profile) -> int:
    """M of a step that accumulates gradients over micro-batches: all gradients are there when the last one begins.

    Args:
        schedule: of each micro-batch.
        whole: profile of the batch, which stays where it is.
        piece: profile of one micro-batch, the largest.
    """
    books = _Books(piece, piece.ops(schedule), accumulate=True)
    moments = [books.enter(place, op) for place, op in enumerate(books.ops)]
    peak = max(moment.peak_bytes for moment in moments)
    return whole.base_bytes + max(peak, moments[-1].live_bytes + piece.update_bytes)


def activation_bytes(ops: Iterable[Op], profile: Profile) -> int:
    """Peak bytes of activations and gradients of forward and backward."""
    return max(moment.peak_bytes for moment in memory_trace(ops, profile))


def step_bytes(schedule: Schedule, profile: Profile) -> int:
    """M(h): peak bytes of one full step at steady state, the optimiser's own step included."""
    moments = list(memory_trace(profile.ops(schedule), profile))
    peak = max(moment.peak_bytes for moment in moments)
    return profile.base_bytes + max(peak, moments[-1].live_bytes + profile.update_bytes)


def step_flops(schedule: Schedule, profile: Profile) -> int:
    """FLOPs of one forward and backward, heads included (matrix products, convolutions, attention)."""
    ops = profile.ops(schedule)
    pulled = _pulls_last(ops, profile)
    return sum(profile.costs[_cost_key(op, profile, pulled)].flops for op in ops if not isinstance(op, Drop))


def forward_flops(profile: Profile) -> int:
    """FLOPs of the terminal loss alone, or some more: of the head its backward may be among them."""
    ops = profile.ops(Schedule.exact(profile.depth))
    pulled = _pulls_last(ops, profile)
    forward = (op for op in ops if isinstance(op, Run | Loss))
    return sum(profile.costs[_cost_key(op, profile, pulled)].flops for op in forward)


def step_seconds(schedule: Schedule, profile: Profile) -> float | None:
    """Seconds of one step, the optimiser's included; ``None`` if the profile has no times."""
    if not profile.seconds:
        return None
    timed = (op for op in profile.ops(schedule) if not isinstance(op, Drop))
    return profile.update_seconds + sum(profile.seconds[key_of(op)[:4]] for op in timed)


def _pulls_last(ops: Iterable[Op], profile: Profile) -> bool:
    """Whether anything is pulled below the head."""
    return any(isinstance(op, Pull) and op.t == profile.depth - 1 for op in ops)


def _cost_key(op: Op, profile: Profile, pulled: bool, fresh: bool = True, last: bool = False) -> tuple[object, ...]:
    """The profiled operation nearest to this one: what was not drilled apart makes no difference there."""
    if isinstance(op, Loss) and op.final:
        return ("loss", op.end, True, pulled)
    choices = [key_of(op, f, e) for f in (fresh, not fresh) for e in (last, not last)]
    if isinstance(op, Pull) and profile.before[op.t] > 0:
        choices = [key_of(op, f, e) for e in (last, not last) for f in (fresh, not fresh)]
    return next(key for key in choices if key in profile.costs)


class _Books:
    """Who holds what while the operations go by."""

    def __init__(self, profile: Profile, ops: list[Op], accumulate: bool = False) -> None:
        self.profile, self.ops = profile, ops
        self.live = 0
        self.holders: dict[tuple[str, int], set[str]] = {}
        self.rebuilt: set[int] = set()
        self.made: set[int] = set()
        self.last_pull = {op.t: place for place, op in enumerate(ops) if isinstance(op, Pull)}
        self.pulled = _pulls_last(ops, profile)
        self.delivered = self._deliveries()
        for group in profile.gradients if accumulate else ():
            self._make(group)

    def enter(self, place: int, op: Op) -> Moment:
        profile, peak = self.profile, 0
        if isinstance(op, Run) or (isinstance(op, Loss) and op.final):
            self._begin_turn(op.t if isinstance(op, Run) else profile.depth)
        if not isinstance(op, Drop):
            last = isinstance(op, Pull) and place == self.last_pull[op.t]
            peak = self._peak(op, profile.costs[_cost_key(op, profile, self.pulled, self._is_fresh(op), last)])
        if isinstance(op, Run):
            self._run(op)
        elif isinstance(op, Rerun):
            self.rebuilt.add(op.t)
            self.live += profile.graph[op.t] + profile.state[op.t + 1]
        elif isinstance(op, Loss):
            if op.final:
                peak = max(peak, self._end_forward())
            if not op.final or self.pulled:
                self.live += profile.cotangent[op.end]
        elif isinstance(op, Pull):
            self._pull(place, op)
        else:
            self._release(("x", op.state), "engine")
        return Moment(op, self.live, max(peak, self.live + self.delivered.get(place, 0)))

    def _peak(self, op: Op, cost: OpCost) -> int:
        """The operation's peak; a rebuilt block's own copy of its output is gone in the second half of a pull."""
        peak = self.live + cost.peak_bytes
        if isinstance(op, Pull) and cost.later_bytes is not None:
            copy = self.profile.state[op.t + 1] if op.t in self.rebuilt else 0
            peak = max(peak, self.live + cost.later_bytes - copy)
        return peak

    def _end_forward(self) -> int:
        """The model's forward returns its loss and lets go of everything; the peak of the backward that follows."""
        profile = self.profile
        self.live -= sum(profile.lasting)
        self._let_go(profile.depth + 1)
        peak = self.live + (profile.costs["loss", profile.depth, True, self.pulled].later_bytes or 0)
        self._make(HEAD)
        self.live += profile.result_bytes
        return peak

    def _deliveries(self) -> dict[int, int]:
        """Where sums over several uses are handed to their parameter: the largest is copied there once more."""
        places: dict[int, list[int]] = {}
        sizes: dict[int, int] = {}
        for place, op in enumerate(self.ops):
            for group in trained_by(op):
                for parameter, size in self.profile.gradients.get(group, ()):
                    places.setdefault(parameter, []).append(place)
                    sizes[parameter] = size
        due: dict[int, int] = {}
        for parameter, used in places.items():
            if len(used) > 1:
                due[used[-1]] = max(due.get(used[-1], 0), sizes[parameter])
        return due

    def _run(self, op: Run) -> None:
        profile, t = self.profile, op.t
        if t == 0:
            self._hold(("x", 0), profile.state[0], "engine", "model")
        pulled = t in self.last_pull
        if pulled and t > 0 and profile.before[t]:
            self.holders["x", t].add("arrival")
        self._hold(("v", t), profile.arrival[t], "model", *(["arrival"] if pulled else []))
        self._hold(("x", t + 1), profile.state[t + 1], "engine", "model", *(["graph"] if op.graph else []))
        self.live += profile.before[t] - profile.arrival[t] + profile.lasting[t] + profile.graph[t] * op.graph

    def _begin_turn(self, turn: int) -> None:
        """The block before has returned: the model lets go of what it does not need any more."""
        self._let_go(turn)
        if turn > 0:
            self._release(("v", turn - 1), "model")
            if turn - 1 not in self.last_pull:
                self.live -= self.profile.before[turn - 1] - self.profile.arrival[turn - 1]

    def _let_go(self, turn: int) -> None:
        for t, released in enumerate(self.profile.released):
            if released == turn:
                self._release(("x", t), "model")

    def _pull(self, place: int, op: Pull) -> None:
        profile, t = self.profile, op.t
        self.live -= profile.cotangent[t + 1]
        if op.input and t > 0:
            self.live += profile.cotangent[t]
        if op.weights:
            self._make(t)
        if op.input and t == 0:
            self._make(STEM)
        if not op.keep:
            self.live -= profile.graph[t]
            if t in self.rebuilt:
                self.rebuilt.discard(t)
                self.live -= profile.state[t + 1]
            else:
                self._release(("x", t + 1), "graph")
        if place == self.last_pull[t]:
            self.live -= profile.before[t] - profile.arrival[t]
            self._release(("v", t), "arrival")
            self._release(("x", t), "arrival")

    def _is_fresh(self, op: Op) -> bool:
        group = op.t if isinstance(op, Pull) and op.weights else None
        return group is not None and any(p not in self.made for p, _ in self.profile.gradients.get(group, ()))

    def _make(self, group: int) -> None:
        for parameter, size in self.profile.gradients.get(group, ()):
            if parameter not in self.made:
                self.made.add(parameter)
                self.live += size

    def _hold(self, storage: tuple[str, int], size: int, *holders: str) -> None:
        self.holders[storage] = set(holders)
        self.live += size

    def _release(self, storage: tuple[str, int], holder: str) -> None:
        holders = self.holders.get(storage)
        if holders and holder in holders:
            holders.discard(holder)
            if not holders:
                kind, t = storage
                self.live -= self.profile.state[t] if kind == "x" else self.profile.arrival[t]
