"""The processes that train together (torchrun): sums over them, and gradients reduced as windows finish.

A parameter's gradient is reduced in its post-accumulate hook, which fires once a step, after the parameter's last use;
while other windows are still being computed, the sum is under way. Every process scales its gradient by its share of
the samples, so that the sum is the gradient on the joint batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Team:
    """This process among the others.

    Attributes:
        rank: this process's number, from 0.
        world: how many there are.
        reducing: whether gradients that become complete now are to be reduced (not while micro-batches accumulate).
        waits: whether a reduction is waited for in its hook, as a fused update needs it.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world, self.device = rank, world, device
        self.reducing, self.waits = True, False
        self.pending: list[Any] = []

    def sum(self, *values: float) -> list[float]:
        """The sums of some numbers over all processes."""
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier()

    def alike(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes rank 0's values."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    @contextmanager
    def hooked(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Reduce these parameters' gradients as they become complete."""
        hooked = parameters if self.world > 1 else []
        handles = [p.register_post_accumulate_grad_hook(self._reduce) for p in hooked]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.pending.clear()

    def finish(self) -> None:
        """Wait for the reductions under way."""
        for work in self.pending:
            work.wait()
        self.pending.clear()

    def _reduce(self, parameter: Tensor) -> None:
        if not self.reducing:
            return
        assert parameter.grad is not None
        work = dist.all_reduce(parameter.grad, async_op=not self.waits)
        if work is not None:
            self.pending.append(work)


@contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """The processes that torchrun started, or this one alone.

    A process group that is there already is used; else one is made (nccl on CUDA, gloo elsewhere) and taken down.
    """
    own = dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if dist.is_available() and dist.is_initialized():
            yield Team(dist.get_rank(), dist.get_world_size(), device if device.type == "cuda" else None)
        else:
            yield Team()
    finally:
        if own:
            dist.destroy_process_group()
