"""Take back what a step that failed did before it failed: running statistics and random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from horizonplan.chain.calls import Buffers, buffers_of
from horizonplan.probes.budget import on_host


class Undo:
    """Buffers and torch's generators as they were at the last :meth:`note`.

    The first step shows which buffers a step changes; from then on only these are copied, so that a mask of
    megabytes costs nothing. (Their values tell: BatchNorm leaves the version of its running statistics as it is.)
    """

    def __init__(self, model: nn.Module, devices: Sequence[int]) -> None:
        self.devices = devices
        self.watched: Buffers = buffers_of(model.modules())
        self.notes: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def note(self) -> None:
        """Remember the present values."""
        with on_host(), torch.no_grad():
            if self.count == 1:
                noted = zip(self.watched, self.notes, strict=True)
                self.watched = [
                    entry for entry, (buffer, value) in noted if _changed(entry[0][entry[1]], buffer, value)
                ]
            now = [owner[name] for owner, name, _ in self.watched]
            self.notes = [(b, b.clone()) for b in now if b is not None]
        self.count += 1
        self.rng = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]

    def restore(self, rng: bool = True) -> None:
        """Bring the noted values back; ``rng=False``: those of the buffers only."""
        with on_host(), torch.no_grad():
            for (owner, name, _), (buffer, value) in zip(self.watched, self.notes, strict=True):
                owner[name] = buffer.copy_(value)
        if rng:
            torch.set_rng_state(self.rng[0])
            for device, state in zip(self.devices, self.rng[1:], strict=True):
                torch.cuda.set_rng_state(state, device)


def _changed(now: Tensor | None, buffer: Tensor, value: Tensor) -> bool:
    return now is not buffer or not torch.equal(buffer, value)
