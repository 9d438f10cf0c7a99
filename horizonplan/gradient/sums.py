"""Parameters whose gradient is a sum over uses: delivered once, after the last use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from horizonplan.chain import Chain
from horizonplan.chain.calls import Ambient
from horizonplan.schedule import Loss, Op, Pull

HEAD, STEM = -2, -1


def trained_by(op: Op) -> list[int]:
    """The parameter groups an operation trains: HEAD, STEM, or a block's number."""
    if isinstance(op, Loss):
        return [HEAD] if op.final else []
    if isinstance(op, Pull):
        return [*([op.t] if op.weights else []), *([STEM] if op.t == 0 and op.input else [])]
    return []


class Sums:
    """Tied weights, and blocks that several windows update.

    While a step runs, their modules see an alias on the same storage; partial gradients gather in
    the alias, and the sum is delivered to the parameter after its last use, so that hooks see it once.
    """

    def __init__(self, chain: Chain, ops: list[Op]) -> None:
        self.model = chain.model
        uses: dict[int, list[int]] = defaultdict(list)
        for place, op in enumerate(ops):
            for group in trained_by(op):
                uses[group].append(place)
        self.parameters = {id(p): p for p in chain.layout.shared} if ops else {}
        for group, places in uses.items():
            if len(places) > 1:
                self.parameters |= {id(p): p for p in _members(chain, group)}
        self.alias = {i: nn.Parameter(p.detach()) for i, p in self.parameters.items() if p.requires_grad}
        last: dict[int, int] = {}
        for group, places in uses.items():
            for p in _members(chain, group) if self.alias else []:
                last[id(p)] = max(last.get(id(p), 0), places[-1])
        self.due: dict[int, list[int]] = defaultdict(list)
        for i in self.alias:
            if i in last:
                self.due[last[i]].append(i)
        self.saved: list[tuple[dict[str, Any], str, nn.Parameter]] = []

    def __enter__(self) -> None:
        if self.alias:
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None and id(p) in self.alias:
                        self.saved.append((module._parameters, name, p))
            for owner, name, p in self.saved:
                owner[name] = self.alias[id(p)]

    def __exit__(self, *exc: object) -> None:
        for owner, name, p in self.saved:
            owner[name] = p

    def inputs(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """What to differentiate for these parameters: the trainable ones, and their aliases if they have any."""
        trainable = [p for p in parameters if p.requires_grad]
        return [*trainable, *(self.alias[id(p)] for p in trainable if id(p) in self.alias)]

    def deliver(self, place: int) -> None:
        """Hand over the sums that are complete after the operation at ``place``."""
        for i in self.due.get(place, ()):
            total, self.alias[i].grad = self.alias[i].grad, None
            if total is not None:
                with Ambient.off():
                    torch.autograd.backward(self.parameters[i], total)


def _members(chain: Chain, group: int) -> list[nn.Parameter]:
    layout = chain.layout
    if group == HEAD:
        return layout.head
    if group == STEM:
        return layout.before[0]
    return layout.group(group)
