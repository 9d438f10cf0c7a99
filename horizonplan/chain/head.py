"""The loss at any state: re-enter the model's own forward with everything before the head left out.

Blocks pass the state through, the modules before the last block return place-holders (zero-stride
NaN tensors: no work, no random numbers, and a leak shows as NaN), and from the last block on the
model itself runs. Random state and buffers stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from horizonplan.chain.calls import handler, intercept, rng_devices, scratch_buffers
from horizonplan.chain.slots import Output
from horizonplan.chain.trace import ChainError


class HeadOnly:
    """One evaluation of head and loss at a state ``z`` of x(T)'s shape.

    Args:
        model: the model.
        blocks: its blocks.
        outputs: per block, the structure of its output.
        standins: per module to leave out, what its calls return (in order; the last one repeats).
        passing: per block, what it returns as state; ``None`` for ``z`` itself.
        own_buffers: modules whose buffers the head may move.
        dense: give writable copies of place-holders.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: tuple[nn.Module, ...],
        outputs: list[Output],
        standins: Mapping[nn.Module, list[Any]],
        passing: list[Tensor | None],
        own_buffers: list[nn.Module],
        dense: bool = False,
    ) -> None:
        self.dense = dense
        self.model, self.blocks, self.outputs = model, blocks, outputs
        self.standins, self.passing, self.own_buffers = standins, passing, own_buffers

    def __call__(self, z: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Return the loss at ``z``, a leaf that requires grad; only its graph is recorded."""
        self.z, self.past = z, False
        self.calls: dict[nn.Module, int] = {}
        handlers = {m: handler(self._outer, m) for m in self.standins}
        handlers |= {b: handler(self._block, t) for t, b in enumerate(self.blocks)}
        try:
            with (
                torch.random.fork_rng(devices=rng_devices(self.model)),
                scratch_buffers(self.own_buffers),
                torch.no_grad(),
                intercept(handlers),
            ):
                loss = run()
        finally:
            del self.z
        if not self.past:
            raise ChainError(
                "the last block was not called in this forward: blocks must run in every one (no layer drop)"
            )
        return loss

    def _block(self, t: int, original: Any, args: Any, kwargs: Any) -> Any:
        state = self.passing[t]
        if t == len(self.blocks) - 1:
            self.past = True
            torch.set_grad_enabled(True)
            state = self.z
        state = self.z if state is None else state
        return self.outputs[t].rebuild(state.clone() if self.dense else state, lambda other: None)

    def _outer(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        if self.past:
            return original(*args, **kwargs)
        place = self.calls.get(module, 0)
        self.calls[module] = place + 1
        value = self.standins[module][min(place, len(self.standins[module]) - 1)]
        return tree_map_only(Tensor, Tensor.clone, value) if self.dense else value


class OutputOnly(nn.Module):
    """In a model's place: returns what it is given, whatever it is called with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output."""
        return self.output
