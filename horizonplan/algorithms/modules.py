"""A chain cut into gradient-isolated modules, each with its local loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from horizonplan.batch import LossFunction, scalar, target_of
from horizonplan.chain import Chain
from horizonplan.schedule import Loss, Op, Pull


@dataclass(frozen=True)
class Modules:
    """A chain's modules.

    Attributes:
        chain: the chain.
        bounds: module k holds blocks ``bounds[k]..bounds[k + 1] - 1``.
        heads: the heads of all modules but the last; ``None``: the model's own head, which is not trained by them.
        loss: the local losses; ``None``: the chain's own.
        second_order: whether modules but the first reconcile their gradient with the one before.
        only: the module that is trained, if it is one.
        copies: whether heads get a copy of the state, since they may overwrite it.
    """

    chain: Chain
    bounds: tuple[int, ...]
    heads: Sequence[nn.Module | None]
    loss: LossFunction | None
    second_order: bool
    only: int | None = None
    copies: bool = False

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def of(self, block: int) -> int:
        """The module that a block is in."""
        return next(k for k in range(len(self)) if block < self.bounds[k + 1])

    def blocks(self, k: int) -> range:
        """Module k's blocks."""
        return range(self.bounds[k], self.bounds[k + 1])

    def trains(self, k: int) -> bool:
        """Whether module k is trained."""
        return self.only is None or self.only == k

    def parameters(self, k: int) -> list[nn.Parameter]:
        """Module k's parameters: its blocks', of what runs before them, and the head's of the last one.

        Those of an auxiliary head are not among them.
        """
        layout = self.chain.layout
        found = [p for t in self.blocks(k) for p in (*layout.before[t], *layout.block[t])]
        return found + (layout.head if k == len(self) - 1 else [])

    def ops(self) -> list[Op]:
        """What trains what, as operations: for parameters that several of them train."""
        ops: list[Op] = []
        for k in range(len(self)):
            if self.trains(k):
                ops += [Pull(t, weights=True, input=t == 0, keep=False) for t in self.blocks(k)]
        return [*ops, Loss(self.chain.depth, final=True)] if self.trains(len(self) - 1) else ops

    def measure(self, output: Tensor, batch: Any) -> Tensor:
        """The loss of a head's output."""
        return scalar(self.chain.loss_of(output, batch) if self.loss is None else self.loss(output, target_of(batch)))

    def local_loss(self, k: int, state: Tensor, batch: Any) -> Tensor:
        """Module k's local loss at its output, by its auxiliary head."""
        head = self.heads[k]
        assert head is not None
        state = state.clone() if self.copies else state
        own: Callable[..., Tensor] | None = getattr(head, "local_loss", None)
        return self.measure(head(state), batch) if own is None else scalar(own(state, batch, self.measure))
