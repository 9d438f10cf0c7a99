"""The same gradient in less memory: what to recompute, and into how many parts to split a batch, under a limit.

Recomputing and accumulating change no gradient, so what is measured with them (cosines, rates) holds
for the schedule itself. Recomputing comes first: splitting needs a loss that is a mean over samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from horizonplan.predict import step_bytes
from horizonplan.probes.profile import Profile
from horizonplan.schedule import Schedule
from horizonplan.units import format_bytes


@dataclass(frozen=True)
class Frugal:
    """How to compute gradients within ``limit_bytes`` (``None``: without a limit, plainly).

    Attributes:
        profile: what the prediction is made from.
        limit_bytes: bytes that a step may occupy.
        always: recompute every schedule, whatever is predicted.
        micro_batches: parts of a batch whose gradients are accumulated.
    """

    profile: Profile
    limit_bytes: int | None = None
    always: bool = False
    micro_batches: int = 1

    def recompute(self, schedule: Schedule) -> int:
        """Checkpoint every so many blocks: 0 where the schedule fits as it is, else what needs the fewest bytes."""
        if self.limit_bytes is None or (not self.always and step_bytes(schedule, self.profile) <= self.limit_bytes):
            return 0
        return min(range(1, schedule.depth + 1), key=lambda k: step_bytes(_with(schedule, k), self.profile))

    def schedule(self, schedule: Schedule) -> Schedule:
        """The schedule with what it has to recompute."""
        return _with(schedule, self.recompute(schedule))

    def levels(self, samples: int | None) -> Iterator[Frugal]:
        """Ever thriftier ways, to be tried until one does not run out of memory.

        Args:
            samples: of the batch; ``None`` where it cannot be split.
        """
        yield self
        if self.limit_bytes is None:
            return
        if not self.always:
            yield replace(self, always=True)
        parts = 2 * self.micro_batches
        while samples is not None and parts <= samples:
            yield replace(self, always=True, micro_batches=parts)
            parts *= 2

    def note(self) -> str | None:
        """What to tell about the exact gradient; ``None`` where back-propagation ran as it is."""
        exact = Schedule.exact(self.profile.depth)
        k = self.recompute(exact)
        if not k and self.micro_batches == 1:
            return None
        assert self.limit_bytes is not None
        ways = [f"checkpointing every {k} blocks" if k > 1 else "checkpointing every block"] if k else []
        ways += [f"accumulating over {self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        excess = step_bytes(exact, self.profile) - self.limit_bytes
        return (
            f"Back-propagation needs {format_bytes(excess)} more than the {format_bytes(self.limit_bytes)} that are "
            f"there: the exact gradient was computed by {' and '.join(ways)}."
        )


def _with(schedule: Schedule, recompute: int) -> Schedule:
    return replace(schedule, recompute=recompute)
