"""Layer-parallel windows: disjoint windows trained at once, the next one on batch n while this one takes batch n + 1.

With stride = horizon no gradient passes from one window to the one before: a window that has its input has all that it
needs (update unlocking; "Towards Interpretable Deep Local Learning with Successive Gradient Reconciliation", Remark 2).
So states go from process to process, and nothing comes back but the head. The last window trains it; the others take
their losses with it. That they need not wait, they use the head as it was one batch earlier: this is the delayed
schedule, and the gradients are those of ``Horizon(h, h)`` but for the age of the head in all windows but the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from horizonplan.algorithms.base import LayerParallel, gradient_norm
from horizonplan.algorithms.links import Mailbox, Port, Wire
from horizonplan.algorithms.part import Part, check_layers, cut
from horizonplan.algorithms.sections import fresh, meet, refuse_not_finite
from horizonplan.algorithms.trial import trial
from horizonplan.algorithms.whole import share
from horizonplan.batch import scalar, signature
from horizonplan.chain import Chain


@dataclass(eq=False)
class ParallelWindows(LayerParallel):
    """Train ``parts`` disjoint windows at once, in as many processes (torchrun), or in turn in one.

    Args:
        parts: windows, and processes.
        split: where to cut; as for :class:`ParallelInTime`.
        time_limit: seconds that a process waits for another one.

    Raises:
        ValueError: bad arguments.

    >>> ParallelWindows(parts=2)
    ParallelWindows(parts=2, split='blocks')
    """

    parts: int = 2
    split: str | Sequence[int] = "blocks"
    time_limit: float = field(default=300.0, repr=False)  # a run may be resumed with another one

    def __post_init__(self) -> None:
        check_layers(self.parts, self.split, self.time_limit)
        self._chain: Chain | None = None

    def prepare(self, chain: Chain, batch: Any) -> None:
        """Cut the chain, and meet the other processes. The first step does it where it was not done.

        Raises:
            ValueError: more parts than blocks, other than ``parts`` processes, or a cut that cannot be.
            ChainError: a parameter is used in two windows.
        """
        parts = cut(chain, trial(chain, batch), self.parts, self.split, pulls=False)
        self.bounds = (*(part.first for part in parts), chain.depth)
        self._wire: Wire | None = meet(self.parts, self.time_limit, chain.device)
        ports: Sequence[Port] = Mailbox.ports(self.parts) if self._wire is None else [self._wire] * self.parts
        self._all = [_Window(part, port) for part, port in zip(parts, ports, strict=True)]
        self._own = self._all if self._wire is None else [self._all[self._wire.part]]
        self._chain, self._steps, self._told = chain, 0, False
        self._weights = list(chain.parameters())
        self._head = [p for p in chain.layout.head if p.requires_grad]
        self._delayed: list[Tensor] = []

    def step(self, chain: Chain, batch: Any, optimizer: Optimizer) -> Tensor:
        """Train on one batch; returns the terminal loss, detached, shape ``()``.

        In several processes every one has to give the same batch, and returns the same loss; each has then updated its
        own window's weights.

        Raises:
            FloatingPointError: a loss or a gradient is not finite; this process's weights were not updated.
            LostProcessError: another process ended, or did not answer in time.
        """
        if self._chain is not chain:
            self.prepare(chain, batch)
        if self._steps == 0:
            first = self._wire is None or self._wire.part == 0
            share(self._wire, chain, optimizer, [w.part for w in self._all] if first else [], {})
            self._delayed = [p.detach().clone() for p in self._head]
        self._hear()
        now = [p.detach().clone() for p in self._head]
        self._tell(now)
        with fresh(self._weights, optimizer, [window.port for window in self._own]):
            loss = self._gradients(batch, optimizer)
        optimizer.step()
        self._delayed = now if self._wire is None else self._delayed
        self._steps += 1
        return loss

    def gather(self, chain: Chain, optimizer: Optimizer) -> None:
        """See :class:`LayerParallel`."""
        if self._chain is chain:
            self._hear()
            share(self._wire, chain, optimizer, [window.part for window in self._own], {})

    def state_dict(self) -> dict[str, Any]:
        """Where the chain is cut, the steps made, and the earlier head; the first process's after :meth:`gather`."""
        return {"bounds": list(self.bounds), "steps": self._steps, "head": self._delayed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them, on all processes.

        Raises:
            ValueError: the chain is cut elsewhere now.
        """
        if tuple(state.get("bounds", ())) != self.bounds:
            then = state.get("bounds")
            raise ValueError(f"split: windows began at {then} and do at {self.bounds} now; give split=.")
        self._hear()
        self._steps = state["steps"]
        self._delayed = [value.to(p.device, copy=True) for p, value in zip(self._head, state["head"], strict=False)]

    def _gradients(self, batch: Any, optimizer: Optimizer) -> Tensor:
        """Accumulate the gradients of this process's windows, one after another; returns the terminal loss."""
        losses = []
        for window in self._own:
            if (loss := window.run(batch, self._head, self._delayed)) is not None:
                losses.append(loss)
        losses += [window.port.receive_loss() for window in self._own if not window.part.last]
        refuse_not_finite(losses[0], gradient_norm(optimizer))
        return losses[0]

    def _tell(self, head: list[Tensor]) -> None:
        """The last process gives the others the head of this step, for their next one."""
        self._told = self._wire is not None and bool(head)
        if self._wire is not None and self._told and self._own[0].part.last:
            for part in range(self.parts - 1):
                self._wire.send_back(torch.cat([p.flatten() for p in head]), part)

    def _hear(self) -> None:
        """The others take over the head of the step before."""
        if self._wire is not None and self._told and not self._own[0].part.last:
            flat = torch.cat([p.flatten() for p in self._delayed])
            received = self._wire.receive_back(flat, self.parts - 1)
            pieces = torch.split(received, [p.numel() for p in self._delayed])
            self._delayed = [piece.view_as(p) for piece, p in zip(pieces, self._delayed, strict=True)]
        self._told = False


class _Window:
    """One window's work in a step."""

    def __init__(self, part: Part, port: Port) -> None:
        self.part, self.port = part, port

    def run(self, batch: Any, head: Sequence[nn.Parameter], delayed: Sequence[Tensor]) -> Tensor | None:
        """Run the window, hand its state on, and accumulate its gradients, of the loss at its end.

        Args:
            batch: the batch.
            head: the head's parameters.
            delayed: their earlier values.

        Returns:
            The terminal loss, detached, which the last window tells the others; ``None`` for these.
        """
        key = signature(batch) or None
        end = self.part.run(batch, lambda: self.port.receive_state(key))
        self.part.leaf = None
        if self.part.last:
            self.port.send_loss(end.detach())
            if end.requires_grad:  # not all of the window is frozen
                torch.autograd.backward(end)
            return end.detach()
        self.port.send_state(end.detach(), key)
        if end.requires_grad:
            torch.autograd.backward(end, self._cotangent(end.detach().requires_grad_(), batch, head, delayed))
        return None

    def _cotangent(
        self, z: Tensor, batch: Any, head: Sequence[nn.Parameter], delayed: Sequence[Tensor]
    ) -> Tensor | None:
        """The gradient of the window's loss in its end."""
        chain = self.part.chain
        with chain.running(), _values(head, delayed), torch.enable_grad():
            shapes = chain.shapes_for(batch, [None] * self.part.stop + [z.detach()])
            loss = scalar(chain.loss_at(z, batch, self.part.standins, shapes, self.part.outputs))
            torch.autograd.backward(loss, inputs=[z])
        return z.grad


@contextmanager
def _values(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Parameters with other values for a while."""
    own = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value
