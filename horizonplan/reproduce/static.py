"""The horizon gradient in the paper's *static mode*: every window's graph is alive at once (Appendix E.1).

It is the same gradient as :func:`horizonplan.horizon_backward`'s, and the trap that an implementation must avoid: T-h+1
windows of h blocks are O(h(T-h+1)) graphs, where one window at a time needs h. Nothing else is kept: at h = T there is
one window, and its memory is back-propagation's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.batch import LossFunction
from horizonplan.projection import project


def static_backward(model: Any, batch: tuple[Tensor, Tensor], loss: LossFunction, horizon: int) -> None:
    """Accumulate the gradient of stride 1 into ``p.grad``, all windows built before the first is pulled.

    Args:
        model: with ``stem``, ``blocks`` and ``head``, as those in ``horizonplan.models``; in training mode its running
            statistics move once for every run of a block.
        batch: input and target.
        loss: of output and target.
        horizon: blocks that each gradient looks ahead, 1 to the number of blocks.
    """
    windows = _windows(model, batch, loss, horizon)
    while windows:
        value, parameters = windows.pop()  # so that a graph that was pulled is freed
        torch.autograd.backward(value, inputs=parameters)


def _windows(
    model: Any, batch: tuple[Tensor, Tensor], loss: LossFunction, horizon: int
) -> list[tuple[Tensor, list[nn.Parameter]]]:
    """The loss at the end of each window, the graph behind it, and the parameters that it trains; the first last."""
    depth = len(model.blocks)
    starts, shape = _starts(model, batch[0], depth - horizon)
    found: list[tuple[Tensor, list[nn.Parameter]]] = []
    for first in reversed(range(depth - horizon + 1)):
        last = first + horizon == depth
        x = starts.pop() if first else model.stem(batch[0])
        for block in model.blocks[first : first + horizon]:
            x = block(x)
        output = _output(model, x, shape)
        trained = [*model.blocks[first:]] if last else [model.blocks[first]]
        trained += [model.stem] if first == 0 else []
        trained += [model.head] if last else []
        found.append((loss(output, batch[1]), [p for module in trained for p in module.parameters()]))
    return found


@torch.no_grad()
def _starts(model: Any, x: Tensor, count: int) -> tuple[list[Tensor], tuple[int, ...]]:
    """The states before blocks 1 to ``count``, and the shape of the state behind the last block."""
    x = model.stem(x)
    starts = []
    for number, block in enumerate(model.blocks, 1):
        x = block(x)
        if number <= count:
            starts.append(x)
    return starts, tuple(x.shape)


def _output(model: Any, state: Tensor, shape: tuple[int, ...]) -> Tensor:
    state = project(state, shape)
    output: Tensor = model.head(state.mean(dim=(2, 3)) if state.ndim == 4 else state)
    return output
