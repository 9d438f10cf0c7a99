"""The processes that train together (torchrun): sums over them, and gradients reduced as windows finish.

A parameter's gradient is reduced in its post-accumulate hook, which fires once a step, after the parameter's last use;
while other windows are still being computed, the sum is under way. Every process scales its gradient by its share of
the samples, so that the sum is the gradient on the joint batch.

Gradients and weights go through the default process group (nccl on CUDA). What the processes tell each other, a few
numbers twice a step, goes through a gloo group of its own: on the host, without waiting for the device, and not in
between gradients. So processes that disagree about which gradients there are can say so: in the first step before each
reduction, later at the step's end (which a fused step may not reach).
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from horizonplan.batch import as_device
from horizonplan.probes.budget import on_host

Value = TypeVar("Value")


class Team:
    """This process among the others.

    Attributes:
        rank: this process's number, from 0.
        world: how many there are.
        talk: the group for everything but gradients and weights; ``None`` for a process alone.
        reducing: whether gradients that become complete now are to be reduced (not while micro-batches accumulate).
        silent: whether they count as zero (this process has no batch of its own in the epoch's last round).
        waits: whether a reduction is waited for in its hook, as a fused update needs it.
        layers: whether the processes share the layers, not the samples; nothing is reduced then.
    """

    def __init__(self, rank: int = 0, world: int = 1, talk: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world, self.talk = rank, world, talk
        self.reducing, self.silent, self.waits, self.layers = True, False, False, False
        self._said: tuple[Any, list[Tensor], Tensor] | None = None
        self._pending: list[Any] = []
        self._order: list[int] = []  # numbers of the parameters reduced in this step
        self._names: list[str] = []
        self._agreed_once = False

    def each(self, *values: float) -> list[list[float]]:
        """Some numbers of every process, by rank."""
        if self.world == 1:
            return [list(values)]
        with on_host():
            own = torch.tensor(values, dtype=torch.float64, device="cpu")
            found = [torch.empty_like(own) for _ in range(self.world)]
            dist.all_gather(found, own, group=self.talk)
            return [row.tolist() for row in found]

    def say(self, *values: float) -> None:
        """Give some numbers to the others, without waiting for theirs."""
        with on_host():
            own = torch.tensor(values, dtype=torch.float64, device="cpu")
            found = [torch.empty_like(own) for _ in range(self.world)]
            self._said = dist.all_gather(found, own, group=self.talk, async_op=True), found, own

    def heard(self) -> list[list[float]]:
        """What every process said last, by rank."""
        assert self._said is not None
        (work, found, _), self._said = self._said, None
        work.wait()
        return [row.tolist() for row in found]

    def sum(self, *values: float) -> list[float]:
        """The sums of some numbers over all processes, the same ones on each."""
        return [sum(column) for column in zip(*self.each(*values), strict=True)]

    def gather(self, value: Value) -> list[Value]:
        """What each process gives, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with on_host():
            dist.all_gather_object(found, value, group=self.talk)
        return found

    def at_first(self, call: Callable[[], Value], error: type[Exception]) -> Value:
        """What a call returns on rank 0, where alone it is made.

        Args:
            call: the call.
            error: what, raised by it, is raised on all processes.
        """
        found: tuple[Any, str | None] = None, None
        cause: Exception | None = None
        if self.rank == 0:
            try:
                found = call(), None
            except error as caught:
                found, cause = (None, str(caught)), caught
        value, message = self.gather(found)[0]
        if message is not None:
            raise error(message) if cause is None else cause
        return value  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            dist.barrier(group=self.talk)

    def alike(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes rank 0's values.

        Raises:
            ValueError: shapes or types differ among processes.
        """
        if self.world == 1:
            return
        tensors = list(tensors)
        told = self.gather([(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors])
        if odd := [rank for rank, theirs in enumerate(told) if theirs != told[0]]:
            raise ValueError(f"model: process {odd[0]} has other weights than process 0; make the same model on all.")
        with on_host(), torch.no_grad():
            for tensor in (t for t in tensors if t.numel()):
                dense = tensor.detach().contiguous()
                dist.broadcast(
                    dense.as_strided((dense.numel(),), (1,)).view(torch.uint8), 0
                )  # as bytes: any type of number goes
                if dense.data_ptr() != tensor.data_ptr() and self.rank and not torch.equal(dense, tensor):
                    tensor.copy_(dense)

    @contextmanager
    def hooked(self, optimizer: Optimizer, names: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Reduce the gradients of the optimiser's parameters as they become complete.

        Args:
            optimizer: the same on all processes.
            names: of its parameters, for messages.
        """
        found = {id(p): p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        hooked: Sequence[nn.Parameter] = list(found.values()) if self.world > 1 and not self.layers else []
        known = {id(p): name for name, p in names}
        self._names = [known.get(id(p), f"number {number} of the optimizer") for number, p in enumerate(hooked)]
        handles = [
            p.register_post_accumulate_grad_hook(partial(self._reduce, number))  # type: ignore[no-untyped-call]
            for number, p in enumerate(hooked)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._pending.clear()

    def finish(self, loss: float) -> float:
        """Wait for the step's reductions; returns the sum of the processes' losses.

        Raises:
            ValueError: not all processes have had the same gradients in the same order.
        """
        total = self._agreed(loss)
        for work in self._pending:
            work.wait()
        self._pending.clear()
        self._order.clear()
        self._agreed_once = True
        return total

    def _reduce(self, number: int, parameter: Tensor) -> None:
        """The parameter's hook."""
        if not self.reducing:
            return
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            raise ValueError(
                f"{self._names[number]!r} has a sparse gradient, which several processes do not sum; make it dense "
                "(sparse=False)."
            )
        if self.silent:
            parameter.grad.zero_()  # a factor of 0 would not do: 0 * inf is NaN
        self._order.append(number)
        if not self._agreed_once:  # before it is too late: reducing different parameters breaks down, or never ends
            self._agreed(0.0)
        work = dist.all_reduce(parameter.grad, async_op=not self.waits)
        if work is not None:
            self._pending.append(work)

    def _agreed(self, loss: float) -> float:
        """See that all processes have reduced the same parameters so far; returns the sum of their losses."""
        rows = self.each(loss, zlib.crc32(array("l", self._order)))
        if len({check for _, check in rows}) == 1:
            return sum(loss for loss, _ in rows)
        orders = self.gather(self._order)
        place = next(i for i in range(1 + min(map(len, orders))) if len({tuple(o[: i + 1]) for o in orders}) > 1)
        said = [self._names[order[place]] if place < len(order) else "none" for order in orders]
        words = ", ".join(f"{name!r} on process {rank}" for rank, name in enumerate(said))
        raise ValueError(
            f"model: gradient {place} of this step is that of {words}; with several processes every parameter has to "
            "have a gradient in every step, in the same order: let parts that a batch does not use add 0 to the loss."
        )


def own_device(device: str | torch.device | None, model: nn.Module) -> str | torch.device | None:
    """Where this process trains: among those that torchrun started, the CUDA device of its own.

    It is ``cuda:LOCAL_RANK`` where ``device`` is ``"cuda"`` or where it is ``None`` and the model is on CUDA; else
    ``device``.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    meant = next((p.device for p in model.parameters()), None) if device is None else as_device(device)
    if meant is None or meant.type != "cuda" or (device is not None and torch.device(device).index is not None):
        return device
    return torch.device("cuda", int(local) % torch.cuda.device_count())  # a launcher may show each process one only


@contextmanager
def team(device: torch.device, time_limit: float | None = None) -> Iterator[Team]:
    """The processes that torchrun started, or this one alone.

    A process group that is there already is used and left as it is; else one is made (nccl on CUDA, gloo elsewhere)
    and taken down. After an error the others may have stopped at another point, so nothing here waits for them: this
    process's end is what ends them.

    Args:
        device: where this process trains.
        time_limit: seconds that a process waits for the others, which share the layers with it; ``None``: they do not,
            and it waits as long as torch does.
    """
    limit = None if time_limit is None else timedelta(seconds=time_limit)
    cuda = device.type == "cuda"
    own = dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if own:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit, device_id=device if cuda else None)
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield Team()
        return
    found = Team(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=limit))
    found.layers = limit is not None
    failed = True
    try:
        with torch.cuda.device(device) if cuda else nullcontext():
            yield found
        failed = False
    finally:
        dist.destroy_process_group(found.talk)  # which closes its connections: who waits for this process sees that
        found.talk = None
        if own and not (failed and cuda):  # nccl would wait for what is under way
            dist.destroy_process_group()
