"""Epochs over a loader: shared among processes, and continued in the middle by a run that resumes.

What a loader draws from the global generators in epoch ``e`` is a function of ``(seed, e)`` and the process alone:
they are seeded for it, and the model's dropout draws from the others (:class:`.random_state.Isolated`). So a resumed
run sees the same batches when it goes through the epoch's first ones again and drops them, whatever the model drew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from horizonplan.batch import take
from horizonplan.probes.budget import on_host
from horizonplan.training.random_state import GENERATOR_KINDS, Generator, Isolated, capture, mixed, restore, same

_END = object()  # of the epoch
_NONE_LEFT = object()  # for this process in the epoch's last round


@dataclass(frozen=True)
class Turn:
    """What one process trains on in one step.

    Attributes:
        batch: the batch.
        counts: ``False``: it repeats the process's last one because the other processes still have one each; give it
            weight zero.
    """

    batch: Any
    counts: bool = True


class Stream:
    """Epochs over a loader, which a resumed run continues where it was.

    Of each ``world`` successive batches, process ``rank`` gets the one at place ``rank``. A map-style DataLoader
    loads only that one, in an order that all processes share; of another iterable all batches are made (the same
    ones on all processes) and the others dropped. A loader whose sampler has ``num_replicas`` shares by itself.

    Nothing of the loader is changed except what iterating over it changes: its generators, and ``set_epoch(epoch)``
    is called on it, its samplers and its dataset where they have that. Its ``state_dict``, if any, is not used:
    going through the batches again needs no help from it. ``persistent_workers`` is taken as ``False``, because what
    such workers have drawn in earlier epochs is in no state that could be saved.

    Two things cannot be seen from here. Generators are saved if they are global or an attribute of the loader, its
    samplers or its dataset, not if they are buried deeper (in a transform). And a stream that itself picks a part by
    rank must say so by an attribute ``num_replicas``, or a part of that part is taken.

    Args:
        loader: batches, the same number of them each time it is iterated if random numbers are the same.
        devices: CUDA devices that the run draws random numbers on.
        rank: this process's number.
        world: how many processes there are.
        seed: of what the loader draws from global generators; the same on all processes.

    Attributes:
        epoch: the epoch that is under way, or the next one if none is.
        position: steps of it that are done, that of the last ``Turn`` included.

    Raises:
        ValueError: ``rank`` is not below ``world``, or the loader's own sampler shares in another way.
    """

    def __init__(
        self, loader: Iterable[Any], devices: Sequence[int] = (), rank: int = 0, world: int = 1, seed: int = 0
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank}, world={world}: give a rank from 0 to world - 1.")
        self.loader, self.devices, self.rank, self.world, self.seed = loader, devices, rank, world, seed
        self.epoch = self.position = 0
        self._parts = _parts(loader)
        self._generators = _generators(self._parts)
        self._shares = _shares(self._parts, rank, world)
        self._order: _Order | None = None
        self._own = self._own_loader()
        self._isolated: Isolated | None = None  # from an epoch's first batch on
        self._start: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None

    def batches(self, epoch: int) -> Iterator[Turn]:
        """This process's batches of an epoch; after ``load_state_dict``, those that are left of it.

        Every process gets the same number of turns. No batch is fetched before it is asked for, except by a loader's
        own workers.

        Raises:
            ValueError: there are fewer batches than processes; or, when a run is resumed, the epoch or the data are
                not the ones that it was in.
        """
        state = self._pending
        if state is not None and epoch != state["epoch"]:
            raise ValueError(f"epoch={epoch}: the state is of epoch {state['epoch']}; go on with that one.")
        with on_host():
            if state is not None:
                restore(state["start"], self.devices, self._generators)
            self._start = capture(self.devices, self._generators)
            for part in [*self._parts, *([] if self._own is self.loader else [self._own])]:
                if callable(getattr(part, "set_epoch", None)):
                    part.set_epoch(epoch)
            self.epoch, self.position = epoch, 0
        turns = self._turns(epoch)
        if state is not None:
            self._replay(turns, state)
            self._pending = None
        for turn in turns:
            self.position += 1
            yield turn
        self.epoch, self.position, self._start = epoch + 1, 0, None

    def sample(self) -> Any:
        """A batch to see what the data are; no generator is changed by it, and no worker stays."""
        with on_host():
            before = capture(self.devices, self._generators)
            try:
                return take(self._own, 1)[0]
            finally:
                restore(before, self.devices, self._generators)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: of tensors, numbers, strings, tuples, lists and dicts only.

        Taken inside the loop over ``batches``, it continues after the batch that came last; taken after that loop, at
        the next epoch.
        """
        if self._pending is not None:
            return self._pending
        with on_host():
            now = capture(self.devices, self._generators)
        return {
            **self._settings(),
            "epoch": self.epoch,
            "position": self.position,
            "start": now if self._start is None else self._start,
            "isolated": None if self._isolated is None else self._isolated.state,
            "random": now,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring all generators back, and continue there at the next call of ``batches``.

        Raises:
            ValueError: the state is that of another seed, process, number of processes or length of the data; or it is
                from the middle of an epoch whose batches come in no fixed order.
        """
        for name, here in self._settings().items():
            if state[name] != here:
                what = "data (batches an epoch)" if name == "length" else name
                raise ValueError(
                    f"{what}: {here}, but the run to be resumed had {state[name]}; give it the same again."
                )
        if state["position"] and getattr(self.loader, "num_workers", 0) and not getattr(self.loader, "in_order", True):
            raise ValueError(
                "data: a loader with in_order=False has no fixed order in which an epoch could be continued; give it "
                "in_order=True, or resume from the end of an epoch."
            )
        self._pending = state if state["position"] else None  # between epochs there is nothing to go through again
        self.epoch, self.position = state["epoch"], state["position"]
        with on_host():
            restore(state["random"], self.devices, self._generators)

    def _settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "rank": self.rank, "world": self.world, "length": _length(self.loader)}

    def _own_loader(self) -> Iterable[Any]:
        """The loader, or a copy of a DataLoader that has every setting of it but loads this process's batches only."""
        if not isinstance(self.loader, DataLoader):
            return self.loader
        own = copy.copy(self.loader)
        changed = vars(own)  # a DataLoader refuses assignments once it is made; nothing has been iterated here
        changed.update(persistent_workers=False, _iterator=None)
        if not isinstance(own.dataset, IterableDataset):
            name = "sampler" if own.batch_sampler is None else "batch_sampler"
            rank, world = (0, 1) if self._shares else (self.rank, self.world)
            self._order = changed[name] = _Order(changed[name], rank, world)
        return own

    def _turns(self, epoch: int) -> Iterator[Turn]:
        last = None
        for batch in self._fetched(epoch):
            if batch is not _NONE_LEFT:
                last = batch
            yield Turn(last, counts=batch is not _NONE_LEFT)
        if self._order is not None and self._order.none_left:
            yield Turn(last, counts=False)

    def _fetched(self, epoch: int) -> Iterator[Any]:
        """This process's batch of each round, made in the host's memory with the loader's own random numbers."""
        if self._order is not None:
            self._order.seed = mixed(self.seed, epoch)
        one_part = self._order is not None or self._shares
        batches = _own_of_each_round(self._own, *((0, 1) if one_part else (self.rank, self.world)))
        with on_host():  # where every process makes all batches, they have to be the same ones
            self._isolated = Isolated(mixed(self.seed, epoch, self.rank if one_part else 0), self.devices)
        draws = not isinstance(self._own, list | tuple)
        while True:
            with on_host(), self._isolated.drawing() if draws else nullcontext():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch

    def _replay(self, turns: Iterator[Turn], state: dict[str, Any]) -> None:
        """Go through what the interrupted run has seen of the epoch, and leave all generators as it left them."""
        where = f"epoch {state['epoch']} of the run to be resumed"
        self.position = sum(1 for _ in islice(turns, state["position"]))
        if self.position < state["position"]:
            raise ValueError(
                f"data: ended after {self.position} steps, but {where} had taken {state['position']}; give the same "
                "data again, or start a new run."
            )
        with on_host():
            if self.position and not self._drew_as(state):
                raise ValueError(
                    f"data: its first {self.position} batches drew other random numbers than in {where}; give the same "
                    "data again, or start a new run."
                )
            restore(state["random"], self.devices, self._generators)

    def _drew_as(self, state: dict[str, Any]) -> bool:
        now = capture((), self._generators)["generators"]
        isolated = None if self._isolated is None else self._isolated.state
        return same(isolated, state["isolated"]) and same(now, state["random"]["generators"])


class _Order:
    """One process's part of a sampler's index batches (or indices), in an order that all processes have in common.

    What the sampler draws from the global generators follows from ``seed``. ``AHEAD`` rounds are drawn at once,
    because changing the generators over takes longer than drawing.

    Attributes:
        seed: to be set before each epoch.
        none_left: set when the epoch's last round has nothing for this process.
    """

    AHEAD = 32

    def __init__(self, sampler: Iterable[Any], rank: int, world: int) -> None:
        self.sampler, self.rank, self.world = sampler, rank, world
        self.seed, self.none_left = 0, False

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.world)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.none_left = False
        own, isolated = _own_of_each_round(self.sampler, self.rank, self.world), Isolated(self.seed)
        while True:
            with isolated.drawing():
                ahead = list(islice(own, self.AHEAD))
            if not ahead:
                return
            for indices in ahead:
                if indices is _NONE_LEFT:
                    self.none_left = True
                    return
                yield indices


def _own_of_each_round(entries: Iterable[Any], rank: int, world: int) -> Iterator[Any]:
    """Entry ``rank`` of each ``world`` successive ones; ``_NONE_LEFT`` if the last round is too short for it."""
    iterator = iter(entries)
    for number in count():
        own, size = _NONE_LEFT, 0
        for size, entry in enumerate(islice(iterator, world), start=1):
            if size == rank + 1:
                own = entry
        entry = None  # another process's batch is not kept during the step
        if number == 0 and size < world:
            few = f"only {size} batches an epoch for {world} processes: start fewer, or give smaller batches."
            raise ValueError(f"data has {few if size else 'no batches: give at least one.'}")
        if size:
            yield own
        if size < world:
            return


def _length(loader: Iterable[Any]) -> int | None:
    """Batches of all processes in an epoch; ``None`` for a stream (whose own word for it need not be right)."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return None
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _parts(loader: Iterable[Any]) -> list[Any]:
    """The loader, its samplers and its dataset, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    found.append(getattr(loader, "dataset", None))
    return list({id(part): part for part in found if part is not None}.values())


def _generators(parts: list[Any]) -> list[Generator]:
    """The generators that these hold as attributes, each once."""
    held = (value for part in parts for value in getattr(part, "__dict__", {}).values())
    found = {id(value): value for value in held if isinstance(value, GENERATOR_KINDS)}
    found.pop(id(torch.default_generator), None)  # a global one
    return list(found.values())


def _shares(parts: list[Any], rank: int, world: int) -> bool:
    """Whether one of these already gives each process its part, as a DistributedSampler does."""
    sharing = [part for part in parts if hasattr(part, "num_replicas")]
    for part in sharing if world > 1 else ():
        place = getattr(part, "rank", rank), part.num_replicas
        if place != (rank, world):
            raise ValueError(
                f"data: its {type(part).__name__} has rank {place[0]} of {place[1]}, this process is rank {rank} of "
                f"{world}; give it rank={rank}, num_replicas={world}, or a sampler that does not share."
            )
    return bool(sharing)
