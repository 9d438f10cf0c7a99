"""Take back what a step that failed did before it failed: running statistics and random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from horizonplan.chain.calls import buffers_of
from horizonplan.probes.budget import on_host

SMALL_BYTES = 2**20


class Undo:
    """Buffers and torch's generators as they were at the last :meth:`note`.

    Buffers of up to a mebibyte are copied at every note, larger ones (masks, say) once a step has been seen to change
    them. A larger one that changes for the first time in a step that fails is not taken back.
    """

    def __init__(self, model: nn.Module, devices: Sequence[int]) -> None:
        self.model, self.devices = model, devices
        self.versions: dict[int, int] = {}  # of large buffers at the last note
        self.moving: set[int] = set()  # large buffers that change
        self.notes: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []

    def note(self) -> None:
        """Remember the present values."""
        kept = buffers_of(self.model.modules())
        large = {id(b): b._version for _, _, b in kept if b.nbytes > SMALL_BYTES}
        if self.versions:
            self.moving |= {key for key, version in large.items() if self.versions.get(key) != version}
        self.versions = large
        with on_host(), torch.no_grad():
            self.notes = [
                (owner, name, b, b.clone()) for owner, name, b in kept if id(b) not in large or id(b) in self.moving
            ]
        self.rng = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self.devices)]

    def restore(self, rng: bool = True) -> None:
        """Bring the noted values back; ``rng=False``: those of the buffers only."""
        with on_host(), torch.no_grad():
            for owner, name, buffer, value in self.notes:
                owner[name] = buffer.copy_(value)
        if rng:
            torch.set_rng_state(self.rng[0])
            for device, state in zip(self.devices, self.rng[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
