"""Messages between the parts of a chain: states go to the next part, gradients to the one before, the loss to all.

Between processes (:class:`Wire`) they are point-to-point messages of ``torch.distributed``: states and gradients on a
group each (nccl on CUDA, gloo elsewhere), because nccl does what is asked of one group in turn, and two neighbours
that both send first would wait for ever; shapes and losses on a gloo group. In one process (:class:`Mailbox`) they are
queues.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_AXES = 14


class LostProcessError(RuntimeError):
    """Another process of the job ended, or did not answer in time."""


class Port(Protocol):
    """One part's end of all links."""

    def send_state(self, state: Tensor, key: Hashable) -> None:
        """To the part after; ``key`` names the shape: equal keys, equal shapes (``None``: unknown).

        Raises:
            ValueError: between processes, a state under a known key has another shape or type.
        """

    def receive_state(self, key: Hashable) -> Tensor:
        """From the part before."""

    def send_back(self, tensor: Tensor, part: int) -> None:
        """To some part before."""

    def receive_back(self, like: Tensor, part: int) -> Tensor:
        """From some part after, of a known shape, type and device."""

    def send_loss(self, loss: Tensor) -> None:
        """To all parts before."""

    def receive_loss(self) -> Tensor:
        """From the last part."""


class Mailbox:
    """The ports of all parts in one process.

    >>> first, second = Mailbox.ports(2)
    >>> first.send_state(torch.ones(2), key=None)
    >>> second.receive_state(key=None)
    tensor([1., 1.])
    """

    def __init__(self, part: int, parts: int, queues: defaultdict[Hashable, deque[Tensor]]) -> None:
        self.part, self.parts, self.queues = part, parts, queues

    @classmethod
    def ports(cls, parts: int) -> list[Mailbox]:
        """One port a part."""
        queues: defaultdict[Hashable, deque[Tensor]] = defaultdict(deque)
        return [cls(part, parts, queues) for part in range(parts)]

    def send_state(self, state: Tensor, key: Hashable) -> None:
        """See :class:`Port`."""
        self.queues["state", self.part + 1].append(state)

    def receive_state(self, key: Hashable) -> Tensor:
        """See :class:`Port`."""
        return self.queues["state", self.part].popleft()

    def send_back(self, tensor: Tensor, part: int) -> None:
        """See :class:`Port`."""
        self.queues["back", self.part, part].append(tensor)

    def receive_back(self, like: Tensor, part: int) -> Tensor:
        """See :class:`Port`."""
        return self.queues["back", part, self.part].popleft()

    def send_loss(self, loss: Tensor) -> None:
        """See :class:`Port`."""
        for part in range(self.part):
            self.queues["loss", part].append(loss)

    def receive_loss(self) -> Tensor:
        """See :class:`Port`."""
        return self.queues["loss", self.part].popleft()


class Wire:
    """The port of this process, whose rank is its part.

    Args:
        time_limit: seconds to wait for another process.
        device: where states are.
    """

    def __init__(self, time_limit: float, device: torch.device) -> None:
        self.part, self.parts = dist.get_rank(), dist.get_world_size()
        self.time_limit, self.device = time_limit, device
        limit = timedelta(seconds=time_limit)
        self.up, self.down = dist.new_group(timeout=limit), dist.new_group(timeout=limit)
        self.talk = dist.new_group(backend="gloo", timeout=limit)
        self.shapes: dict[Hashable, tuple[tuple[int, ...], torch.dtype]] = {}
        self.told: dict[Hashable, tuple[tuple[int, ...], torch.dtype]] = {}
        self.sent: dict[Hashable, tuple[Any, Tensor]] = {}  # a message is kept until the next of its kind

    def send_state(self, state: Tensor, key: Hashable) -> None:
        """See :class:`Port`."""
        form = tuple(state.shape), state.dtype
        if key is None or key not in self.told:
            self.told[key] = form
            self._send(_header(state), self.part + 1, self.talk, "shape")
        elif self.told[key] != form:
            raise ValueError(
                f"model: the state sent to part {self.part + 1} is {form}, and was {self.told[key]} for an earlier "
                "batch of the same shapes: its shape has to follow from the batch's; pad it, cut elsewhere (split=), "
                "or train in one process."
            )
        self._send(state, self.part + 1, self.up, "state")

    def receive_state(self, key: Hashable) -> Tensor:
        """See :class:`Port`."""
        if key is None or key not in self.shapes:
            header = torch.empty(MOST_AXES + 2, dtype=torch.int64)
            self.shapes[key] = _shape(self._receive(header, self.part - 1, self.talk))
        shape, dtype = self.shapes[key]
        return self._receive(torch.empty(shape, dtype=dtype, device=self.device), self.part - 1, self.up)

    def send_back(self, tensor: Tensor, part: int) -> None:
        """See :class:`Port`."""
        self._send(tensor, part, self.down, ("back", part))

    def receive_back(self, like: Tensor, part: int) -> Tensor:
        """See :class:`Port`."""
        return self._receive(torch.empty(like.shape, dtype=like.dtype, device=like.device), part, self.down)

    def send_loss(self, loss: Tensor) -> None:
        """See :class:`Port`."""
        value = torch.tensor([loss.item()], dtype=torch.float64)
        for part in range(self.part):
            self._send(value, part, self.talk, ("loss", part))

    def receive_loss(self) -> Tensor:
        """See :class:`Port`."""
        value = self._receive(torch.empty(1, dtype=torch.float64), self.parts - 1, self.talk)
        return value[0].to(self.device)

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank."""
        found: list[Any] = [None] * self.parts
        with answered(self.time_limit):
            dist.all_gather_object(found, value, group=self.talk)
        return found

    def _send(self, tensor: Tensor, part: int, group: Any, kind: Hashable) -> None:
        with answered(self.time_limit, part):
            if kind in self.sent:
                self.sent[kind][0].wait()
            tensor = tensor.contiguous()
            self.sent[kind] = dist.isend(tensor, part, group=group), tensor

    def _receive(self, tensor: Tensor, part: int, group: Any) -> Tensor:
        with answered(self.time_limit, part):
            dist.recv(tensor, part, group=group)
        return tensor


@contextmanager
def answered(time_limit: float, rank: int | None = None) -> Iterator[None]:
    """Say in words that another process ended or does not answer.

    Raises:
        LostProcessError: it does.
    """
    try:
        yield
    except RuntimeError as error:
        who = "another process" if rank is None else f"process {rank}"
        late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        what = f"did not answer within time_limit={time_limit:g} seconds" if late else "ended"
        raise LostProcessError(
            f"{who} {what}: see its own error; go on from the last checkpoint with resume=True."
        ) from error


def _header(state: Tensor) -> Tensor:
    if state.dtype not in DTYPES or state.ndim > MOST_AXES:
        raise ValueError(f"model: a state of type {state.dtype} and {state.ndim} axes cannot be sent; cut elsewhere.")
    sizes = [*state.shape, *[0] * (MOST_AXES - state.ndim)]
    return torch.tensor([DTYPES.index(state.dtype), state.ndim, *sizes], dtype=torch.int64)


def _shape(header: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    kind, axes, *sizes = header.tolist()
    return tuple(sizes[:axes]), DTYPES[kind]
