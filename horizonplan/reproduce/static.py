"""The horizon gradient in the paper's *static mode*: every window's graph is alive at once (Appendix E.1).

It is the same gradient as :func:`horizonplan.horizon_backward`'s, and the trap that an implementation must avoid: T-h+1
windows of h blocks are O(h(T-h+1)) graphs, where one window at a time needs h.
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
    depth = len(model.blocks)
    states = _states(model, batch[0])
    wanted: list[tuple[Tensor, list[nn.Parameter]]] = []
    for first in range(depth - horizon + 1):
        last = first + horizon == depth
        x = states[first] if first else model.stem(batch[0])
        for block in model.blocks[first : first + horizon]:
            x = block(x)
        output = _output(model, x, tuple(states[-1].shape))
        trained = [*model.blocks[first:]] if last else [model.blocks[first]]
        trained += [model.stem] if first == 0 else []
        trained += [model.head] if last else []
        wanted.append((loss(output, batch[1]), [p for module in trained for p in module.parameters()]))
    for value, parameters in wanted:
        torch.autograd.backward(value, inputs=parameters, retain_graph=True)


@torch.no_grad()
def _states(model: Any, x: Tensor) -> list[Tensor]:
    states = [model.stem(x)]
    for block in model.blocks:
        states.append(block(states[-1]))
    return states


def _output(model: Any, state: Tensor, shape: tuple[int, ...]) -> Tensor:
    state = project(state, shape)
    output: Tensor = model.head(state.mean(dim=(2, 3)) if state.ndim == 4 else state)
    return output
