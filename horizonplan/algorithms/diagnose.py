"""Do earlier modules help later ones? What their update does to each module's local loss (Figure 3 of SGR's paper)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from horizonplan.algorithms.modules import Modules
from horizonplan.algorithms.sgr import SGR
from horizonplan.chain import Chain
from horizonplan.chain.calls import quiet, scratch_buffers


def input_effects(method: SGR, chain: Chain, batch: Any, update: Callable[[], object]) -> list[float]:
    """The change of each local loss that a step causes through the module's input alone.

    For module k it is L_k at the input that the updated modules before it give, minus L_k at the input that they gave
    before, with module k and its head as they were, running statistics too: below zero where the modules before it
    have helped it.

    Args:
        method: prepared for the chain, with ``only=None``.
        chain: the chain; dropout should be off.
        batch: the batch to look at.
        update: makes a step.

    Returns:
        One number for each module but the first.

    Raises:
        ValueError: modules share a parameter, so that none can be put back without the others.
    """
    modules = method.parts(chain)
    groups = [_tensors(modules, k) for k in range(len(modules))]
    shared = [{id(t) for t in one} & {id(t) for t in two} for one, two in combinations(groups, 2)]
    if any(shared):
        raise ValueError("chain: modules share parameters, which cannot be as they were in one and not in another.")

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


def _tensors(modules: Modules, k: int) -> list[Tensor]:
    """All that module k and its head compute with: parameters and buffers, each once."""
    parameters: list[Tensor] = [*modules.parameters(k)]
    known = {id(p) for p in parameters}
    owners = [m for t in modules.blocks(k) for m in modules.chain.blocks[t].modules()]
    owners += [m for m in modules.chain.model.modules() if known & {id(p) for p in m.parameters(recurse=False)}]
    head = modules.heads[k] if k < len(modules) - 1 else None
    owners += [] if head is None else head.modules()
    own = [t for m in owners for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return list({id(t): t for t in (*parameters, *own)}.values())


def _put(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(tensors, values, strict=True):
            p.copy_(value)
