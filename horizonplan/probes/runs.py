"""Real training runs from one initial state that can be left and gone on with, bit for bit.

A run that is left waits in the host's memory: its weights, buffers, optimiser state and random state.
Where there is no room for all runs, they are begun anew when they go on, which costs their steps again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from horizonplan.batch import move
from horizonplan.chain import Chain
from horizonplan.probes.budget import each, host_copy
from horizonplan.probes.cosine import HOST_SHARE, Recompute, host_bytes, never
from horizonplan.probes.memory import step
from horizonplan.probes.pieces import check_pieces
from horizonplan.probes.steady import (
    Optimize,
    optimizer_for,
    random_state,
    restored,
    seed_all,
    set_random_state,
    trainable,
)
from horizonplan.schedule import Schedule

Pair = tuple[int, int]
GROUP = 64  # batches within which another order shuffles
COPIES = 4  # of the parameters that a waiting run may hold: its weights, and an optimiser's state


class Stream:
    """Batches in the order of the data, drawn when first asked for and kept; they repeat when the data end."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._source = each(data)
        self._ended = False
        self._batches: list[Any] = []

    def place(self, step: int, order: int = 0) -> int:
        """Which batch a step takes; ``order`` 0 is the data's own, others shuffle within groups of 64."""
        if order:
            group, within = divmod(step, GROUP)
            mixed = list(range(GROUP))
            random.Random(f"{order}/{group}").shuffle(mixed)
            step = group * GROUP + mixed[within]
        while len(self._batches) <= step and not self._ended:
            try:
                self._batches.append(next(self._source))
            except StopIteration:
                self._ended = True
        if not self._batches:
            raise ValueError("batches is empty: give at least one batch.")
        return step % len(self._batches)

    def batch(self, place: int) -> Any:
        """A batch that was drawn."""
        return self._batches[place]


@dataclass
class _Run:
    """A run's losses, and where it waits (``optimizer`` None: at its start)."""

    losses: list[float] = field(default_factory=list)
    at: int = 0
    optimizer: Optimizer | None = None
    state: Any = None

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1])


class Runs:
    """Runs of one model, each with its own horizon, stride and order of the data, all from the weights it has now.

    Same weights, same random numbers, a fresh optimiser each. Between two calls the model is what it was, bit for
    bit.

    Args:
        chain: the model in the mode to train in.
        data: batches on any device.
        optimizer: as for :func:`horizonplan.probes.memory`.
        seed: seed of torch's generators at each run's start; a run of order k has ``seed + k``.
        recompute: activation checkpointing for a schedule: the same gradient in less memory.
        micro_batches: parts of a batch whose gradients are accumulated.
        room_bytes: host memory for runs that wait; ``None``: a quarter of the machine's.

    Attributes:
        stepped: steps taken so far, by horizon and stride, those taken again included.
    """

    def __init__(
        self,
        chain: Chain,
        data: Stream,
        optimizer: Optimize | None = None,
        seed: int = 0,
        recompute: Recompute = never,
        micro_batches: int = 1,
        room_bytes: float | None = None,
    ) -> None:
        self.chain, self.data, self.optimizer, self.seed = chain, data, optimizer, seed
        self.recompute, self.micro_batches = recompute, micro_batches
        self.stepped: dict[Pair, int] = {}
        self._room = HOST_SHARE * host_bytes() if room_bytes is None else room_bytes
        self._size = COPIES * sum(p.nbytes for p in chain.parameters())
        self._runs: dict[tuple[Pair, int], _Run] = {}
        self._starts: dict[tuple[range, int], list[float]] = {}

    def check_parts(self) -> None:
        """See that accumulating gives the batch's own gradient.

        Raises:
            ValueError: it does not; see :func:`horizonplan.probes.pieces.check_pieces`.
        """
        if self.micro_batches > 1:
            check_pieces(self.chain, move(self.data.batch(self.data.place(0)), self.chain.device), self.micro_batches)

    def missing(self, pair: Pair, steps: int, order: int = 0) -> int:
        """Steps that :meth:`advance` would take, those taken again included."""
        run = self._runs.get((pair, order), _Run())
        return 0 if run.diverged or len(run.losses) >= steps else steps - run.at

    def advance(self, pair: Pair, steps: int, order: int = 0) -> list[float]:
        """Go on to so many steps in all; the losses of all of them, NaN from where the loss is not finite."""
        Schedule.horizon(self.chain.depth, *pair)
        run = self._runs.setdefault((pair, order), _Run())
        if self.missing(pair, steps, order):
            places = [self.data.place(i, order) for i in range(run.at, steps)]
            with restored(self.chain, weights=True):
                self._go(run, pair, order, places)
        found = run.losses[:steps]
        return found + [math.nan] * (steps - len(found))

    def start(self, steps: range, order: int = 0) -> list[float]:
        """The initial weights' loss on the batches of some steps; computed once."""
        if (steps, order) not in self._starts:
            places = [self.data.place(i, order) for i in steps]
            with restored(self.chain), torch.no_grad():
                seed_all(self.chain, self.seed)
                losses = [self.chain.loss(move(self.data.batch(p), self.chain.device)).item() for p in places]
            self._starts[steps, order] = losses
        return self._starts[steps, order]

    def unseen(self, steps: range, order: int = 0) -> int:
        """Losses that :meth:`start` would compute."""
        return 0 if (steps, order) in self._starts else len(steps)

    def _go(self, run: _Run, pair: Pair, order: int, places: Sequence[int]) -> None:
        chain = self.chain
        schedule = Schedule.horizon(chain.depth, *pair)
        schedule = replace(schedule, recompute=self.recompute(schedule))
        if run.optimizer is None:
            seed_all(chain, self.seed + order)
            made = optimizer_for(trainable(chain), self.optimizer)
        else:
            made = run.optimizer
            _load(chain, made, run.state)
        run.losses = run.losses[: run.at]
        for place in places:
            batch = move(self.data.batch(place), chain.device)
            run.losses.append(step(chain, batch, schedule, made, self.micro_batches).item())
            self.stepped[pair] = self.stepped.get(pair, 0) + 1
            if run.diverged:
                return
        waiting = sum(other.optimizer is not None for other in self._runs.values() if other is not run)
        if self._size * (waiting + 1) <= self._room:
            run.at, run.optimizer, run.state = len(run.losses), made, _saved(chain, made)
        else:
            run.at, run.optimizer, run.state = 0, None, None


def _saved(chain: Chain, optimizer: Optimizer) -> Any:
    """Weights, buffers, random state and the optimiser's state, which is taken from it, in the host's memory."""
    values = [host_copy(p) for p in chain.model.parameters()]
    modules = list(chain.model.modules())
    buffers = [
        (place, name, None if b is None else host_copy(b), b)
        for place, module in enumerate(modules)
        for name, b in module._buffers.items()
    ]
    kept = [(place, name, value, None if b is None else b.device) for place, name, value, b in buffers]
    state = {p: _waiting(own) for p, own in optimizer.state.items()}
    optimizer.state.clear()
    return values, kept, random_state(chain), state


def _load(chain: Chain, optimizer: Optimizer, saved: Any) -> None:
    values, buffers, rng, state = saved
    modules = list(chain.model.modules())
    with torch.no_grad():
        for p, value in zip(chain.model.parameters(), values, strict=True):
            p.copy_(value)
        for place, name, value, device in buffers:
            own = modules[place]._buffers[name]
            if value is not None and own is not None and own.shape == value.shape and own.dtype == value.dtype:
                own.copy_(value)
            else:
                modules[place]._buffers[name] = None if value is None else value.to(device, copy=True)
    optimizer.state.update({p: _back(own) for p, own in state.items()})
    set_random_state(chain, rng)


@dataclass(frozen=True)
class _Waiting:
    """A tensor in the host's memory, and where it belongs."""

    value: Tensor
    device: torch.device


def _waiting(state: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: _Waiting(host_copy(t), t.device), state)


def _back(state: Any) -> Any:
    return pytree.tree_map_only(_Waiting, lambda w: w.value.to(w.device, copy=True), state)
