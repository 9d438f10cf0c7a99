"""The plan is watched: peak memory and cosine of a step, now and then, against what the plan says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from horizonplan.algorithms import Algorithm, Windows
from horizonplan.chain import Chain
from horizonplan.chain.calls import ENTRY
from horizonplan.plan import Plan
from horizonplan.probes.cosine import Cosines
from horizonplan.probes.memory import attempt
from horizonplan.probes.steady import standing_bytes
from horizonplan.probes.tracker import LiveBytes
from horizonplan.schedule import Schedule
from horizonplan.units import format_bytes
from horizonplan.verify import MEMORY_TOLERANCE

COSINE_TOLERANCE = 0.1
FIRST_STEPS = 2
Value = TypeVar("Value")


class PlanWarning(UserWarning):
    """A training run does not do what its plan says."""


@dataclass
class Watch:
    """Measures steps, and tells where they leave the plan.

    Attributes:
        chain: the chain that is trained.
        plan: what to compare with; ``None``: only measure.
        tell: receives events ``(kind, **values)``.
        memory_every: steps between two measurements of the peak on CPU; 0: only the first two steps.
        cosine_every: steps between two measurements of the cosine; 0: never.
        extra: what the methods train besides the model.
        peak_bytes: the largest peak so far. On CPU that of tracked steps, the first one left out if there are more
            (it makes the optimiser's state), and 0 with compiled blocks; on CUDA the allocator's.
    """

    chain: Chain
    plan: Plan | None
    tell: Callable[..., None]
    memory_every: int = 100
    cosine_every: int = 0
    extra: nn.Module | None = None
    peak_bytes: int = 0
    steps: int = 0
    warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.chain.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.chain.device)

    def measured(
        self, step: int, call: Callable[[], Value], clear: Callable[[], None], optimizer: Any, batch: Any
    ) -> Value:
        """Make a step; on CPU some are tracked. ``step`` counts from the run's start, resumed or not."""
        due = self.steps < FIRST_STEPS or (self.memory_every > 0 and step % self.memory_every == 0)
        self.steps += 1
        if self.chain.device.type == "cuda":
            found = call()
            if due:
                self._peak(torch.cuda.max_memory_allocated(self.chain.device), step)
            return found
        compiled = any(vars(block).get(ENTRY) is not None for block in self.chain.blocks)
        if compiled or not due:  # the compiler gives up for good on code that it first meets under a tracker
            return call()
        clear()
        base = standing_bytes(self.chain, optimizer, batch, self.extra)
        with LiveBytes() as tracker:
            found = call()
        if step == 1:
            self.peak_bytes = 0
        self._peak(base + tracker.peak, step)
        return found

    def cosine(self, step: int, algorithm: Algorithm, batch: Any, context: Any) -> None:
        """Measure the cosine of the present gradient, if it is due; nothing of the run is changed by it."""
        if not self.cosine_every or step % self.cosine_every:
            return
        schedule = scheduled(algorithm, self.chain.depth)
        assert schedule.pair is not None
        h, s = schedule.pair

        def measure() -> float:
            return Cosines(self.chain, [batch], lambda _: schedule.recompute).measure([(h, s)])[0].value

        try:
            with context:
                found, message = attempt(measure, self.chain.device)
        except ValueError as error:  # a loss that is not finite, which the step itself will meet
            found, message = None, str(error)
        if found is None:
            self.tell("cosine", step=step, cosine=None, why=message)
            return
        low = self._lowest_cosine(h, s)
        self.tell("cosine", step=step, cosine=found, lowest_planned=low)
        if low is not None and found < low:
            self._warn("cosine", step, f"the cosine is {found:.3f}, the plan has at least {low:.3f}")

    def _peak(self, peak: int, step: int) -> None:
        self.peak_bytes = max(self.peak_bytes, peak)
        planned = None if self.plan is None else self.plan.row.memory_bytes
        self.tell("memory", step=step, peak_bytes=peak, planned_bytes=planned)
        if planned is not None and step > 0 and peak > planned * (1 + MEMORY_TOLERANCE):
            words = f"a step needs {format_bytes(peak)}, the plan has {format_bytes(planned)}"
            self._warn("memory", step, words)

    def _lowest_cosine(self, h: int, s: int) -> float | None:
        if self.plan is None or (h, s) != (self.plan.horizon, self.plan.stride) or self.plan.row.cosine is None:
            return None
        batches = self.plan.provenance.get("batches", 1)
        spread = (self.plan.row.cosine_stderr or 0.0) * math.sqrt(batches if isinstance(batches, int) else 1)
        return self.plan.row.cosine - COSINE_TOLERANCE - 2 * spread

    def _warn(self, kind: str, step: int, message: str) -> None:
        self.tell("beyond_plan", step=step, quantity=kind, message=message)
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(
                f"step {step}: {message}; plan again with what has changed, or train with another candidate.",
                PlanWarning,
                2,
            )


def scheduled(algorithm: Algorithm, depth: int) -> Schedule:
    """The schedule of a method that has a cosine to watch.

    Raises:
        ValueError: it has none.
    """
    schedule = algorithm.schedule(depth) if isinstance(algorithm, Windows) else None
    if schedule is None or schedule.pair is None:
        raise ValueError(
            f"cosine_every: {algorithm} has no horizon and stride whose cosine could be watched; set it to 0."
        )
    return schedule
