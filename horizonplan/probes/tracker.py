"""Exact live bytes and dispatched FLOPs on any device that executes eagerly, by watching every operator.

Bytes are those of the storages that operators return while the tracker is on; a storage that came
in from outside (weights, the batch) is not counted, nor are views and in-place results. What an
operator allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten
_ATTENTION_ON_CPU = {  # which torch counts on CUDA only
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live and peak bytes of storages made inside the ``with`` block.

    ``before_next`` is called once, before the next operator.

    >>> with LiveBytes() as tracker:
    ...     kept = torch.zeros(10) + 1
    >>> tracker.live, tracker.peak
    (40, 80)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.before_next: Callable[[], None] | None = None
        self._sizes: dict[int, int] = {}
        self._names: dict[int, int] = {}  # an address may serve several storages one after another
        self._living: set[int] = set()
        self._made = 0

    def reset_peak(self) -> None:
        """Start a new peak: the largest value of ``live`` at an allocation from now on (0 without any)."""
        self.peak = 0

    def bytes_of(self, tensor: Tensor | None) -> int:
        """Bytes of a tensor's storage if it was made here and is alive, else 0."""
        return 0 if tensor is None else self._sizes.get(tensor.untyped_storage()._cdata, 0)

    def key_of(self, tensor: Tensor) -> int:
        """A number for a tensor's storage, for :meth:`alive`; -1 for storages from outside."""
        return self._names.get(tensor.untyped_storage()._cdata, -1)

    def alive(self, key: int) -> bool:
        """Whether a storage made here is still alive."""
        return key in self._living

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.before_next is not None:
            call, self.before_next = self.before_next, None
            call()
        outside = {
            t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
        } - self._sizes.keys()
        out = func(*args, **kwargs)
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in outside:
                    self._sizes[key] = storage.nbytes()
                    self._made += 1
                    self._names[key] = self._made
                    self._living.add(self._made)
                    self.live += self._sizes[key]
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._living.discard(self._names.pop(key, 0))


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of matrix products, convolutions and attention dispatched inside the ``with`` block.

    Formulas are torch's own (``torch.utils.flop_counter``): a multiplication and an addition are two.

    >>> with Flops() as counter:
    ...     _ = torch.zeros(3, 4) @ torch.zeros(4, 5)
    >>> counter.total
    120
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kind: Any = getattr(func, "_overloadpacket", None)
        formula = flop_registry.get(_ATTENTION_ON_CPU.get(kind, kind))
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def own_bytes(*groups: Any) -> int:
    """Bytes of all tensors in the groups (parameters, buffers, optimiser state, batches), each storage once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for group in groups
        for t in tree_iter(group)
        if isinstance(t, torch.Tensor)
    }
    return sum(storages.values())
