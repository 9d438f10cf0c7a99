"""Weights, buffers and optimiser state, of which each process has its part, brought together on all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from horizonplan.algorithms.links import Wire
from horizonplan.algorithms.part import Part
from horizonplan.chain import Chain


def share(
    wire: Wire | None, chain: Chain, optimizer: Optimizer, parts: Sequence[Part], states: Mapping[int, Any]
) -> dict[int, Any]:
    """Give every process what the others have.

    Args:
        wire: to the others; ``None``: there are none.
        chain: the chain.
        optimizer: its optimiser.
        parts: those that this process has to give; all of them for the whole model.
        states: what it gives besides, by part.

    Returns:
        What the others gave besides, by part.
    """
    if wire is None:
        return {}
    model, whole = chain.model, bool(parts) and parts[0].first == 0 and parts[-1].last
    weights = list(model.parameters()) if whole else [p for part in parts for p in part.parameters()]
    modules = list(model.modules()) if whole else [m for part in parts for m in part.modules()]
    others: dict[int, Any] = {}
    own = own_share(model, optimizer, weights, modules), dict(states)
    for rank, (theirs, besides) in enumerate(wire.gather(own)):
        if rank != wire.part:
            take_over(model, optimizer, theirs)
            others |= besides
    return others


def own_share(
    model: nn.Module, optimizer: Optimizer, parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module]
) -> dict[str, Any]:
    """What this process has that others need, on the CPU, by name.

    Args:
        model: the model.
        optimizer: its optimiser.
        parameters: those that this process trains.
        modules: those whose buffers it moves.
    """
    wanted, movers = {id(p) for p in parameters}, set(modules)
    trained = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    states = {name: optimizer.state[p] for name, p in trained.items() if p in optimizer.state}
    return {
        "parameters": {name: p.detach().cpu() for name, p in trained.items()},
        "buffers": {
            (path, name): b.detach().cpu()
            for path, module in model.named_modules()
            if module in movers
            for name, b in module._buffers.items()
            if b is not None
        },
        "optimizer": {name: {key: _packed(value) for key, value in state.items()} for name, state in states.items()},
    }


@torch.no_grad()
def take_over(model: nn.Module, optimizer: Optimizer, share: Mapping[str, Any]) -> None:
    """Take over what another process has (:func:`own_share`)."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, value in share["parameters"].items():
        parameters[name].copy_(value)
    for (path, name), value in share["buffers"].items():
        buffer = modules[path]._buffers[name]
        if buffer is None:  # one that is made in a module's first forward
            device = next((p.device for p in model.parameters()), value.device)
            modules[path]._buffers[name] = value.to(device, copy=True)
        else:
            buffer.copy_(value)
    for name, state in share["optimizer"].items():
        p = parameters[name]
        optimizer.state[p] = {key: _unpacked(value, p.device) for key, value in state.items()}


def _packed(value: Any) -> Any:
    """A tensor with the kind of its device; anything else as it is."""
    return (value.cpu(), value.device.type) if isinstance(value, Tensor) else (value, None)


def _unpacked(packed: tuple[Any, str | None], device: torch.device) -> Any:
    value, kind = packed
    return value if kind is None else value.to(device if kind == device.type else kind)
