"""Measure once what each kind of operation costs on each block: bytes, FLOPs, seconds.

A *drill* is a list of operations like a schedule's, executed by the same engine: every block runs
once, and before the model goes on its cotangent is pulled through it in every way that a schedule
may ask for. At most one block's graph is alive, so models that do not fit can be profiled.
:mod:`horizonplan.predict` folds any schedule over the result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from horizonplan.chain import Chain
from horizonplan.gradient import HEAD, STEM, Step, execute
from horizonplan.probes.drill import Driller, Key, clear, full_drill, key_of, last_pulls, plain_drill
from horizonplan.probes.seconds import Timer, in_turn, kinds_of, plainly, update_seconds
from horizonplan.probes.steady import Optimize, optimizer_for, restored, standing_bytes, trainable
from horizonplan.probes.tracker import Flops, LiveBytes
from horizonplan.schedule import Drop, Loss, Op, Pull, Run, Schedule

FEWEST = 3  # timed steps of the optimiser for each timed drill


@dataclass(frozen=True)
class OpCost:
    """One operation's peak over the bytes alive when it begins, and its FLOPs.

    ``later_bytes`` is the peak of a second half: of a pull, when it goes on through what is before the block;
    of the final loss, when the forward has returned (over the bytes alive then, the head's graph excluded).
    """

    peak_bytes: int
    flops: int
    later_bytes: int | None = None


@dataclass(frozen=True)
class Profile:
    """Measured costs of one model on one batch.

    ``state[t]`` and ``cotangent[t]`` are bytes of x(t) and its gradient; the model itself holds x(t)
    until turn ``released[t]`` begins (``depth``: the head, ``depth + 1``: its forward's end). Of
    block t, ``graph[t]`` are the bytes its graph holds besides states, ``before[t]`` those of what the
    model does before it (the stem's graph, for block 0), ``arrival[t]`` those of its own input where
    that is not x(t), ``lasting[t]`` those that stay until the forward ends. ``gradients[g]`` lists
    (parameter, bytes) for group g: a block, HEAD or STEM. ``base_bytes`` counts parameters, buffers,
    optimiser state and batch, ``update_bytes`` the optimiser step's peak over the gradients. ``spent_flops``
    is what profiling itself took.
    """

    depth: int
    stem_trains: bool
    trainable: tuple[bool, ...]
    state: tuple[int, ...]
    cotangent: tuple[int, ...]
    released: tuple[int, ...]
    graph: tuple[int, ...]
    before: tuple[int, ...]
    arrival: tuple[int, ...]
    lasting: tuple[int, ...]
    result_bytes: int
    gradients: dict[int, tuple[tuple[int, int], ...]]
    costs: dict[Key, OpCost]
    seconds: dict[Key, float] = field(default_factory=dict)
    base_bytes: int = 0
    update_bytes: int = 0
    update_seconds: float = 0.0
    spent_flops: int = 0

    def ops(self, schedule: Schedule) -> list[Op]:
        """The operations of a schedule on this model: what is frozen is left out."""
        return list(schedule.ops(self.stem_trains, self.trainable))


def profile(
    chain: Chain, batch: Any, optimizer: Optimize | None = None, repeats: int = 1, summed: bool = True
) -> Profile:
    """Profile a chain on one batch; model, optimiser, random state and mode are left as they were.

    Args:
        chain: the model, on the device to be measured.
        batch: a batch on that device; bytes and seconds are for its size.
        optimizer: ``callable(params) -> Optimizer``, an Optimizer, or ``None`` for AdamW. Its state and
            its step's temporaries count as part of a training step.
        repeats: timed drills, of which the means are taken, over blocks of one kind together; 0 leaves the
            seconds empty.
        summed: whether schedules are to be predicted in which several windows train one block, so that its
            gradient is a sum. Horizons have none; without them profiling costs less.
    """
    gc.collect()
    with restored(chain):
        with Flops() as counter:
            execute(chain, batch, Schedule.horizon(chain.depth, 1).ops(chain.stem_trains, chain.trainable))
            result = _measure_bytes(chain, batch, summed or bool(chain.layout.shared))
        spent = counter.total
        timer = Timer(chain, batch, kinds_of(result.costs))
        in_turn([timer], repeats)
        spent += repeats * sum(_flops(ops, result.costs) for ops in timer.drills())
    with restored(chain, weights=True):
        return replace(result, seconds=timer.means(), spent_flops=spent, **_update(chain, batch, optimizer, repeats))


def retimed(
    chain: Chain,
    subjects: Sequence[tuple[Any, Profile, Callable[[], AbstractContextManager[object]]]],
    optimizer: Optimize | None = None,
    rounds: int = 3,
) -> list[Profile]:
    """Profiles with their seconds measured anew, all in turn, so that they can be compared with each other.

    Args:
        chain: the model.
        subjects: each a batch, its profile, and what to run it under.
        optimizer: as for :func:`profile`.
        rounds: how often each is timed.
    """
    with restored(chain):
        timers = [Timer(chain, batch, kinds_of(found.costs), context) for batch, found, context in subjects]
        in_turn(timers, rounds)
    with restored(chain, weights=True):
        update = update_seconds(chain, _stepped(chain, optimizer), rounds)
    return [
        replace(found, seconds=timer.means(), update_seconds=update)
        for (_, found, _), timer in zip(subjects, timers, strict=True)
    ]


def _flops(ops: list[Op], costs: dict[Key, OpCost]) -> int:
    known = plainly(costs)
    counted = (key_of(op)[:5] for op in ops if not isinstance(op, Drop))
    return sum(known[key].flops for key in counted if key in known)


@dataclass
class _Turn:
    """Live bytes at one turn's landmarks; the last turn is the head's."""

    begin: int = 0
    arrive: int = 0
    end: int = 0
    peak: int = 0
    peak_after: int = 0
    flops: int = 0
    arrival: int = 0
    x_key: int = 0
    x_bytes: int = 0
    released: int = 0


class _Bytes(Driller):
    """Bytes and FLOPs of each operation, and live bytes at every turn's landmarks."""

    def __init__(self, chain: Chain, tracker: LiveBytes, flops: Flops) -> None:
        super().__init__(chain)
        self.tracker, self.counter = tracker, flops
        self.turns = [_Turn(released=chain.depth + 1) for _ in range(chain.depth + 1)]
        self.costs: dict[Key, OpCost] = {}
        self.gradients: dict[int, tuple[tuple[int, int], ...]] = {}
        self.cotangents: dict[int, int] = {}
        self.live = self.flops_before = 0
        self.halfway: int | None = None
        self.index = {id(p): i for i, p in enumerate(chain.parameters())}

    def begin(self, op: Op, step: Step) -> None:
        super().begin(op, step)
        self.live, self.flops_before = self.tracker.live, self.counter.total
        if (place := self._place(op)) is not None:
            self.turns[place].begin = self.live
            self._note_released(place - 1, place - 1)
            if place == self.chain.depth:
                self.tracker.before_next = lambda: self._note_released(place, place - 1)
        self.tracker.reset_peak()

    def arrive(self, op: Op, step: Step) -> None:
        if (place := self._place(op)) is not None:
            turn = self.turns[place]
            turn.arrive = self.tracker.live
            if place < self.chain.depth:
                self._note_released(place, place - 1)
            else:
                turn.peak = self.tracker.peak
                self.tracker.reset_peak()
        elif isinstance(op, Pull):
            self.halfway = self.tracker.peak
            self.tracker.reset_peak()

    def end(self, op: Op, step: Step) -> None:
        tracker = self.tracker
        flops = self.counter.total - self.flops_before
        if (place := self._place(op)) is not None:
            turn = self.turns[place]
            turn.end, turn.flops, turn.peak_after = tracker.live, flops, tracker.peak
            if isinstance(op, Run):
                turn.peak = tracker.peak
                self._note_states(op.t, step)
        elif not isinstance(op, Drop):
            last = isinstance(op, Pull) and step.place - 1 == step.last_pull[op.t]
            peak = tracker.peak or self.live
            first, later = (peak, None) if self.halfway is None else (self.halfway or self.live, peak - self.live)
            cost = OpCost(first - self.live, flops, later)
            self.halfway = None
            self.costs[key_of(op, self.fresh, last)] = cost
        self._note_gradients(op, step)
        super().end(op, step)

    def _place(self, op: Op) -> int | None:
        if isinstance(op, Run):
            return op.t
        return self.chain.depth if isinstance(op, Loss) and op.final else None

    def _note_released(self, turn: int, upto: int) -> None:
        """States up to x(upto) that are gone by now were released in this turn at the latest."""
        for state in self.turns[: upto + 1]:
            if not self.tracker.alive(state.x_key):
                state.released = min(state.released, turn)

    def _note_states(self, t: int, step: Step) -> None:
        for u in (t, t + 1):
            x = step.states[u]
            self.turns[u].x_key, self.turns[u].x_bytes = self.tracker.key_of(x), self.tracker.bytes_of(x)
        if self.turns[t].x_key == self.turns[t + 1].x_key:
            self.turns[t + 1].x_bytes = 0
        if t > 0 and t in step.arrivals:
            key = self.tracker.key_of(step.arrivals[t].given)
            self.turns[t].arrival = 0 if key == self.turns[t].x_key else self.tracker.bytes_of(step.arrivals[t].given)

    def _note_gradients(self, op: Op, step: Step) -> None:
        end = op.end if isinstance(op, Loss) else op.t if isinstance(op, Pull) else -1
        if end in step.cotangents:
            self.cotangents[end] = self.tracker.bytes_of(step.cotangents[end])
        layout = self.chain.layout
        if isinstance(op, Loss) and op.final:
            self.gradients[HEAD] = self._made(layout.head)
        elif isinstance(op, Pull) and op.weights and self.fresh:
            self.gradients[op.t] = self._made(layout.group(op.t))
        if isinstance(op, Pull) and op.t == 0 and op.input:
            self.gradients[STEM] = self._made(layout.before[0])

    def _made(self, parameters: list[nn.Parameter]) -> tuple[tuple[int, int], ...]:
        return tuple((self.index[id(p)], self.tracker.bytes_of(p.grad)) for p in parameters if p.grad is not None)

    def let_go(self, turn: int) -> int:
        """Bytes that the model lets go of when a turn begins."""
        states = sum(x.x_bytes for t, x in enumerate(self.turns) if x.released == turn and t < turn)
        return states + (self.turns[turn - 1].arrival if turn > 0 else 0)


def _observe(chain: Chain, batch: Any, ops: list[Op]) -> _Bytes:
    with LiveBytes() as tracker, Flops() as counter:
        observed = _Bytes(chain, tracker, counter)
        execute(chain, batch, ops, observer=observed, gather=False)
    clear(chain)
    return observed


def _measure_bytes(chain: Chain, batch: Any, summed: bool) -> Profile:
    depth = chain.depth
    freshes = [True, False] if summed else [True]
    costs = dict(_observe(chain, batch, full_drill(chain, [True, False], freshes)).costs)
    full = _observe(chain, batch, full_drill(chain, [True], [True], rerun=False))
    plain = _observe(chain, batch, plain_drill(chain))
    for weights, wanted in ((True, True), (True, False), (False, True)):
        costs |= {
            k: c for k, c in _observe(chain, batch, last_pulls(chain, weights, wanted)).costs.items() if k[0] == "pull"
        }
    for observed, with_graph in ((plain, False), (full, True)):
        for t, turn in enumerate(observed.turns):
            start = turn.begin - observed.let_go(t)
            # the last turn is the final loss: with a pull into x(T), or of the head alone
            key = ("run", t, with_graph) if t < depth else ("loss", t, True, with_graph)
            after = (turn.peak_after or turn.arrive) - turn.x_bytes
            costs[key] = OpCost(turn.peak - start, turn.flops, None if t < depth else after)
    turns, state = full.turns, [turn.x_bytes for turn in full.turns]
    stays = [turn.begin - full.let_go(t) - state[t] for t, turn in enumerate(turns)]
    held = [sum(state[u] for u in range(t) if turns[u].released > t) for t in range(depth + 1)]
    base = [0, *(stays[t] - held[t] for t in range(1, depth + 1))]
    lasting = [base[t + 1] - base[t] for t in range(depth)]
    before = [turn.arrive - turn.begin + full.let_go(t) for t, turn in enumerate(turns[:-1])]
    before[0] -= state[0] + lasting[0]
    for t in range(1, depth):
        before[t] += state[t] * (turns[t].released == t)
    graph = [turn.end - turn.arrive - state[t + 1] - (lasting[t] if t else 0) for t, turn in enumerate(turns[:-1])]
    made = sum(size for _, size in full.gradients.get(HEAD, ()))
    return Profile(
        depth=depth,
        stem_trains=chain.stem_trains,
        trainable=chain.trainable,
        state=tuple(state),
        cotangent=tuple(full.cotangents.get(t, 0) for t in range(depth + 1)),
        released=tuple(turn.released for turn in turns),
        graph=tuple(graph),
        before=tuple(before),
        arrival=tuple(turn.arrival for turn in turns[:-1]),
        lasting=tuple(lasting),
        result_bytes=turns[-1].end - state[depth] - full.cotangents.get(depth, 0) - made,
        gradients=full.gradients,
        costs=costs,
    )


def _stepped(chain: Chain, optimizer: Optimize | None) -> torch.optim.Optimizer:
    """The optimiser with all gradients there and its state made."""
    parameters = trainable(chain)
    made = optimizer_for(parameters, optimizer)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    made.step()
    return made


def _update(chain: Chain, batch: Any, optimizer: Optimize | None, repeats: int) -> dict[str, Any]:
    """What the optimiser's step costs."""
    made = _stepped(chain, optimizer)
    with LiveBytes() as tracker:
        made.step()
    return {
        "base_bytes": standing_bytes(chain, made, batch),
        "update_bytes": tracker.peak,
        "update_seconds": update_seconds(chain, made, FEWEST * repeats) if repeats else 0.0,
    }
