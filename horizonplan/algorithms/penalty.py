"""How the weight of the quadratic terms grows ("Beyond Backprop: Online Alternating Minimization", Appendix B)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Penalty:
    """mu: increased by ``add`` with every batch, multiplied by ``factor`` after every ``every`` batches, up to ``cap``.

    Args:
        start: mu on the first batch.
        add: at least 0.
        factor: at least 1.
        every: the batches of an epoch, ``len(loader)``; needed where ``factor`` is not 1.
        cap: the largest value.

    Raises:
        ValueError: mu would not be positive, or would shrink.

    >>> mu = Penalty(0.01, factor=1.1, every=2, cap=0.0115)
    >>> [round(mu(step), 4) for step in range(6)]
    [0.01, 0.01, 0.011, 0.011, 0.0115, 0.0115]
    """

    start: float
    add: float = 0.0
    factor: float = 1.0
    every: int = 0
    cap: float = 1.5

    def __post_init__(self) -> None:
        for name, low in {"start": 0.0, "add": 0.0, "factor": 1.0, "cap": self.start}.items():
            value = getattr(self, name)
            fits = isinstance(value, int | float) and low <= value < math.inf and (value > 0 or name == "add")
            if not fits:
                raise ValueError(f"{name}={value!r}: give a number {'> 0' if name == 'start' else f'>= {low:g}'}.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 0:
            raise ValueError(f"every={self.every!r}: give the number of batches of an epoch, len(loader).")
        if self.factor > 1 and self.every == 0:
            raise ValueError(f"factor={self.factor}: it counts in epochs; give every=len(loader), their batches.")

    def __call__(self, step: int) -> float:
        """Mu on a batch, counted from 0."""
        epochs, batches = divmod(step, self.every) if self.every else (0, step)
        if epochs == 0 or self.factor == 1:
            return min(self.cap, self.start + self.add * step)
        log = epochs * math.log(self.factor)
        if log > 700:  # beyond any float
            return self.cap
        grown = math.exp(log)
        added = self.add * self.every * self.factor * (grown - 1) / (self.factor - 1)  # a geometric series
        return min(self.cap, self.start * grown + added + self.add * batches)
