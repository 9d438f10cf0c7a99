"""A small card on the CPU: a byte budget, and running out of memory where a card of that size would.

``Budget`` counts live bytes as :class:`horizonplan.probes.LiveBytes` does and raises
``torch.OutOfMemoryError`` when they exceed its limit. What a program would keep on the host is made
under :func:`on_host` and does not count.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from horizonplan.batch import nbytes, take
from horizonplan.probes.tracker import LiveBytes, own_bytes
from horizonplan.units import format_bytes

_END = object()


class Budget(LiveBytes):  # type: ignore[no-untyped-call]
    """Raises ``torch.OutOfMemoryError`` inside its ``with`` block when live bytes exceed ``limit_bytes``.

    >>> with Budget(100) as budget:
    ...     budget.hold(torch.zeros(10))
    ...     torch.ones(20).shape
    Traceback (most recent call last):
    torch.OutOfMemoryError: out of memory: 80 B more than the 40 B in use do not fit in 100 B
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def hold(self, *groups: Any, batch: Any = None) -> None:
        """Count tensors that were made elsewhere as being on the card: weights, and one batch at a time."""
        self.held_bytes = own_bytes(*groups) + nbytes(batch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.live
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.held_bytes + self.live > self.limit_bytes and self.live > before:
            raise torch.OutOfMemoryError(
                f"out of memory: {format_bytes(self.live - before)} more than the "
                f"{format_bytes(self.held_bytes + before)} in use do not fit in {format_bytes(self.limit_bytes)}"
            )
        return out


@contextmanager
def on_host() -> Iterator[None]:
    """What is made in here is the host's: no budget and no tracker counts it."""
    with _disable_current_modes():
        yield


def each(data: Iterable[Any]) -> Iterator[Any]:
    """Batches as a loader makes them in the host's memory."""
    batches = iter(data)
    while True:
        with on_host():
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


def taken(data: Iterable[Any], count: int) -> list[Any]:
    """The first ``count`` batches, in the host's memory; see :func:`horizonplan.batch.take`."""
    with on_host():
        return take(data, count)


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in the host's memory."""
    with on_host():
        return tensor.detach().to("cpu", copy=True)


def available_bytes(device: torch.device, own: int | None = None) -> int | None:
    """Bytes that a step may occupy on a CUDA device now; ``None`` elsewhere (no limit).

    Args:
        device: the device.
        own: bytes of tensors there that belong to the step; ``None``: all of this process's. What else it keeps there
            is not available.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # not in older torch
    reserved = torch.cuda.memory_reserved(device)
    others = 0 if own is None else max(0, torch.cuda.memory_allocated(device) - own)
    return min(free + reserved, int(ask(device) * total)) - others


def recover(device: torch.device) -> None:
    """After running out of memory, outside the ``except`` block (whose traceback keeps tensors): free what is dead."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
