"""What a plan measures on a model: within a limit of memory, and with the price of every measurement.

Prices are in steps of back-propagation: FLOPs dispatched over those of one such step, as the profile
counts them. So they are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from horizonplan import probes
from horizonplan.alternatives import Alternatives, alternatives
from horizonplan.batch import batch_size, move
from horizonplan.chain import Chain
from horizonplan.frugal import Frugal
from horizonplan.precision import autocast
from horizonplan.predict import step_bytes, step_flops
from horizonplan.probes import Flops
from horizonplan.probes.budget import recover
from horizonplan.probes.child import out_of_memory
from horizonplan.probes.cosine import Cosines
from horizonplan.probes.memory import COUNTED_STEPS, FAILED, OUT_OF_MEMORY, WARM_STEPS, Value, attempt, largest
from horizonplan.probes.profile import Profile
from horizonplan.probes.sample import Sample
from horizonplan.probes.steady import Optimize
from horizonplan.rows import Row
from horizonplan.schedule import Schedule


class Probing:
    """Measurements on one chain, kept together.

    Args:
        chain: the model, on the device to measure on.
        batches: for the cosine, on any device; memory and time are measured on the largest of them.
        optimizer: as for :func:`horizonplan.probes.profile`.
        limit_bytes: what tensors may occupy on the device; ``None``: no limit.
        chain_flops: what making the chain took.

    Attributes:
        samples: all that was measured.
        spent: steps of back-propagation by stage.

    Raises:
        torch.OutOfMemoryError: not even one block at a time fits.
    """

    def __init__(
        self,
        chain: Chain,
        batches: Sequence[Any],
        optimizer: Optimize | None,
        limit_bytes: int | None,
        chain_flops: int = 0,
    ) -> None:
        self.chain, self.batches, self.optimizer = chain, batches, optimizer
        self.biggest = move(largest(batches), chain.device)
        with fitting(chain.device):
            self.profile = profile = probes.profile(chain, self.biggest, optimizer, summed=False)
        self.frugal = Frugal(profile, limit_bytes)
        self.samples: list[Sample] = []
        self.cosines: Cosines | None = None
        self.unknown: str | None = None
        self.no_rates: str | None = None
        self.bp_flops = max(1, step_flops(Schedule.exact(chain.depth), profile))
        self.spent = {"profile": (profile.spent_flops + chain_flops) / self.bp_flops, "memory": 0.0, "cosine": 0.0}

    def alternatives(self) -> Alternatives:
        """Profiles of what may be planned beside the paper's family, all timed in turn with the batch's own."""
        spent = 0

        def measure(batch: Any) -> Profile:
            nonlocal spent
            found = probes.profile(self.chain, batch, self.optimizer, repeats=0, summed=False)
            spent += found.spent_flops
            return found

        with fitting(self.chain.device):
            others = (move(batch, self.chain.device) for batch in self.batches)
            found = alternatives(self.chain, self.biggest, measure, others)
            self.profile, found = found.timed(self.chain, self.biggest, self.profile, self.optimizer)
        self.spent["profile"] += spent / self.bp_flops
        return found

    @property
    def probed(self) -> float:
        """Price of all probes, short runs apart."""
        return sum(self.spent[stage] for stage in ("profile", "memory", "cosine"))

    @property
    def full(self) -> list[Sample]:
        """Where memory ran out."""
        return [s for s in self.samples if s.source == OUT_OF_MEMORY]

    @property
    def too_large_bytes(self) -> int | None:
        """What the smallest step that ran out of memory had been predicted to need; ``None`` if none did."""
        return min((self._bytes((s.horizon, s.stride)) for s in self.full), default=None)

    @property
    def failed(self) -> list[Sample]:
        """What crashed or took too long."""
        return [s for s in self.samples if s.source == FAILED]

    def price(self, horizon: int) -> float:
        """What measuring memory and cosine at a horizon would take."""
        return self._memory_price([(horizon, 1)]) + self._cosine_price([(horizon, 1)])

    def memory_of(self, row: Row) -> list[Sample]:
        """Measure a row's peak bytes, whatever it recomputes, splits and rounds; no sample if that is not worth trying.

        Only a plain row's sample is kept.
        """
        pair = row.horizon, row.stride
        if row.plain or (row.micro_batches, row.precision) == (1, "fp32"):
            return self.memory([pair], row.recompute)
        with autocast(row.precision, self.chain.device):
            given = [self.biggest], [row.horizon], [row.stride], self.optimizer, row.recompute
            found = probes.memory(self.chain, *given, micro_batches=row.micro_batches)
        self.spent["memory"] += self._memory_price([pair], row.recompute)
        return found

    def memory(self, pairs: Sequence[tuple[int, int]], recompute: int = 0) -> list[Sample]:
        """Measure peak bytes; what is predicted to need as much as a step that ran out of memory is not tried."""
        too_large = math.inf if self.too_large_bytes is None else self.too_large_bytes
        wanted = [pair for pair in pairs if self._bytes(pair, recompute) < too_large]
        found = []
        for stride in dict.fromkeys(s for _, s in wanted):
            at = [h for h, s in wanted if s == stride]
            found += probes.memory(self.chain, [self.biggest], at, [stride], self.optimizer, recompute)
        self.spent["memory"] += self._memory_price([(s.horizon, s.stride) for s in found], recompute)
        self.samples += [s for s in found if not recompute]
        return found

    def cosine(self, pairs: Sequence[tuple[int, int]], stage: str = "cosine") -> list[Sample]:
        """Measure cosines; the exact gradient is had by recomputing or in parts where it does not fit as it is.

        Where it cannot be had at all, ``unknown`` says why, and there are no samples.
        """
        if self.unknown or not pairs:
            return []
        self.spent[stage] = self.spent.get(stage, 0.0) + self._cosine_price(pairs)
        found, reason = self._thriftily(lambda way: partial(self._cosine, pairs, way))
        if found is None:
            self.cosines, self.unknown = None, f"There is no exact gradient to compare with on this device: {reason}."
            return []
        self.samples += found
        return found

    def rollout(self, batches: Sequence[Any], pairs: Sequence[tuple[int, int]], steps: int, seed: int) -> list[Sample]:
        """Short real runs, back-propagation among them; none where even the thriftiest way does not fit.

        ``no_rates`` then says why.
        """
        every = [(self.chain.depth, 1), *pairs]
        self.spent.setdefault("short runs", 0.0)
        self.spent["short runs"] += steps * sum(self._flops(pair) for pair in every) / self.bp_flops

        def run(way: Frugal) -> Callable[[], list[Sample]]:
            runs = partial(probes.rollout, self.chain, batches, pairs, steps, self.optimizer, seed)
            if way.limit_bytes is None:
                return runs
            return partial(runs, recompute=way.recompute, micro_batches=way.micro_batches)

        found, reason = self._thriftily(run)
        if found is None:
            self._say_no_rates(reason)
        return found or []

    def raced(self, run: Callable[[Frugal], Value]) -> Value | None:
        """What comes of a race of real runs in the first way that does not run out of memory.

        ``None`` where there is no such way; ``no_rates`` then says why.
        """
        found, reason = self._thriftily(lambda way: partial(run, way))
        if found is None:
            self._say_no_rates(reason)
        return found

    def _say_no_rates(self, reason: str) -> None:
        self.no_rates = f"There were no short runs: back-propagation does not fit this device in any way ({reason})."

    def _thriftily(self, run: Callable[[Frugal], Callable[[], Value]]) -> tuple[Value | None, str]:
        """What runs in the first way that does not run out of memory; or ``None`` and why there is none."""
        reason = ""
        for way in self.frugal.levels(batch_size(self.biggest)):
            try:
                found, message = attempt(run(way), self.chain.device)
            except ValueError as error:
                if way.micro_batches == 1:
                    raise
                return None, f"{reason}; {error}"
            if found is not None:
                return found, ""
            reason = str(message)
        return None, reason

    def notes(self) -> list[str]:
        """What to tell about what did not fit."""
        told: list[str | None] = [self.frugal.note()] if self.cosines is not None else []
        if self.full:
            first = min(self.full, key=lambda s: s.horizon)
            told.append(
                f"Memory ran out at h={first.horizon}, stride {first.stride}: larger horizons were not tried, and "
                "their bytes are predicted."
            )
        told += [f"Measuring memory at h={s.horizon} failed: {s.detail['message']}." for s in self.failed]
        told += [self.unknown, self.no_rates]
        return [note for note in told if note]

    def _cosine(self, pairs: Sequence[tuple[int, int]], way: Frugal) -> list[Sample]:
        if self.cosines is None or way != self.frugal:
            self.cosines = Cosines(self.chain, self.batches, way.recompute, way.micro_batches)
        found = self.cosines.measure(pairs)
        self.frugal = way
        return found

    def _bytes(self, pair: tuple[int, int], recompute: int = 0) -> int:
        return step_bytes(Schedule.horizon(self.chain.depth, *pair, recompute), self.profile)

    def _flops(self, pair: tuple[int, int]) -> int:
        schedule = self.frugal.schedule(Schedule.horizon(self.chain.depth, *pair))
        return step_flops(schedule, self.profile)

    def _memory_price(self, pairs: Sequence[tuple[int, int]], recompute: int = 0) -> float:
        schedules = [Schedule.horizon(self.chain.depth, *pair, recompute) for pair in pairs]
        steps = sum(step_flops(schedule, self.profile) for schedule in schedules)
        if self.chain.device.type == "cuda":
            return (WARM_STEPS + COUNTED_STEPS) * steps / self.bp_flops
        warm = step_flops(Schedule.horizon(self.chain.depth, 1), self.profile) * len({s for _, s in pairs})
        return (warm + steps) / self.bp_flops

    def _cosine_price(self, pairs: Iterable[tuple[int, int]]) -> float:
        depth, count = self.chain.depth, len(self.batches)
        kept = len(self.cosines.kept) if self.cosines is not None else 0
        one = sum(self._flops(pair) for pair in pairs if pair[0] < depth)
        return (count * one + (count - kept) * self._flops((depth, 1))) / self.bp_flops


@contextmanager
def fitting(device: torch.device) -> Iterator[None]:
    """What must fit for anything to: running out of memory in here ends with the remedy."""
    message = None
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        message = str(error)
    if message is not None:
        recover(device)
        raise torch.OutOfMemoryError(
            f"{message}. Planning takes one block at a time and needs little more than a step of h=1: give smaller "
            "batches or a larger device."
        )


def counted_chain(make: Callable[[], Chain]) -> tuple[Chain, int]:
    """A chain, and the FLOPs that making it took."""
    with Flops() as counter:
        chain = make()
    return chain, counter.total
