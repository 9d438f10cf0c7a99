"""Do earlier modules help later ones? What their update does to each module's local loss (Figure 3 of SGR's paper)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from horizonplan.algorithms.sgr import SGR
from horizonplan.chain import Chain
from horizonplan.chain.calls import quiet, scratch_buffers


def input_effects(method: SGR, chain: Chain, batch: Any, update: Callable[[], object]) -> list[float]:
    """The change of each local loss that a step causes through the module's input alone.

    For module k it is L_k at the input that the updated modules before it give, minus L_k at the input that they gave
    before, with module k and its head as they were: below zero where the modules before it have helped it.

    Args:
        method: prepared for the chain, with ``only=None``.
        chain: the chain; dropout should be off.
        batch: the batch to look at.
        update: makes a step.

    Returns:
        One number for each module but the first.
    """
    modules = method.parts(chain)
    groups = [
        [*modules.parameters(k), *(head.parameters() if head is not None else ())]
        for k, head in enumerate([*modules.heads, None])
    ]

    def losses() -> list[float]:
        with ExitStack() as stack:
            stack.enter_context(quiet(chain.model))
            for head in modules.heads:
                if head is not None:
                    stack.enter_context(scratch_buffers(head.modules()))
            return method.losses_on(chain, batch)

    before = losses()
    old = [[p.detach().clone() for p in group] for group in groups]
    update()
    new = [[p.detach().clone() for p in group] for group in groups]
    effects = []
    try:
        for k in reversed(range(1, len(modules))):  # the modules after k do not matter to its loss
            _put(groups[k], old[k])
            effects.append(losses()[k] - before[k])
    finally:
        for group, values in zip(groups, new, strict=True):
            _put(group, values)
    return effects[::-1]


def _put(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
