"""One trial forward of a chain: shapes of its states and output, and the bytes that each block keeps for its backward.

Only one block's graph is alive at a time, so a trial fits wherever local learning does. Nothing is changed by it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from horizonplan.batch import output_tensor
from horizonplan.chain import Chain
from horizonplan.chain.calls import handler, intercept, quiet
from horizonplan.chain.slots import Output


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        states: for each block, a tensor of its output's shape, type and device, which takes no memory.
        output: such a tensor for the model's output; ``None`` if the model was not called or returned no tensor.
        kept_bytes: for each block, the bytes that it keeps for its backward. The stem's count with the first block,
            those of what runs between two blocks with the second.
        loss: the terminal loss.
        result: the output itself, for a loss to be tried on.
        entry: for x(0), what ``states`` is for the others.
    """

    states: tuple[Tensor, ...]
    output: Tensor | None
    kept_bytes: tuple[int, ...]
    loss: Tensor
    result: Any
    entry: Tensor


def trial(chain: Chain, batch: Any) -> Trial:
    """Run the model once on a batch, each block's graph cut off from the next."""
    return _Watch(chain).run(batch)


def hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, type and device that takes no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


class _Watch:
    def __init__(self, chain: Chain) -> None:
        self.chain, self.turn = chain, 0
        weights = {p.untyped_storage()._cdata for p in chain.parameters()}
        self.outside = weights | {b.untyped_storage()._cdata for b in chain.model.buffers()}
        self.kept: dict[int, dict[int, int]] = defaultdict(dict)
        self.states: list[Tensor] = []
        self.last: Tensor | None = None
        self.entry: Tensor | None = None
        self.result: Any = None

    def run(self, batch: Any) -> Trial:
        chain = self.chain
        handlers = {b: handler(self._block, t) for t, b in enumerate(chain.blocks)} | {chain.model: self._model}
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        with chain.running(), quiet(chain.model), intercept(handlers), torch.enable_grad(), hooks:
            loss = chain.loss(batch)
        if not chain.layout.traced:
            chain.layout.learn_head(loss, {id(self.last)})
        found = output_tensor(self.result)
        kept = tuple(sum(self.kept[t].values()) for t in range(chain.depth))
        output = hollow(found) if isinstance(found, Tensor) else None
        assert self.entry is not None
        return Trial(tuple(self.states), output, kept, loss.detach(), self.result, self.entry)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.outside:
            self.kept[self.turn][storage._cdata] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the node that holds it

    def _block(self, t: int, original: Any, args: Any, kwargs: Any) -> Any:
        given = self.chain.layout.slots[t].get(args, kwargs)
        version = given._version
        self.entry = hollow(given) if t == 0 else self.entry
        output = Output.of(original(*args, **kwargs))
        assert output is not None  # the chain was traced
        if t > 0 and self.chain.layout.copy_input[t] is None:
            self.chain.layout.copy_input[t] = given._version != version
        self.states.append(hollow(output.state))
        self.turn = t + 1
        self.last = leaf = output.state.detach().requires_grad_()
        return output.rebuild(leaf.clone() if copies(self.chain, t + 1) else leaf, Tensor.detach)

    def _model(self, original: Any, args: Any, kwargs: Any) -> Any:
        self.result = original(*args, **kwargs)
        return self.result


def copies(chain: Chain, t: int) -> bool:
    """Whether the model, or block ``t``, overwrites x(t), or may do so: a leaf has to be copied for it then."""
    inside = t < chain.depth and chain.layout.copy_input[t] is not False
    return inside or chain.layout.copy_state[t]
